"""Files that the LoRA tools write, loaded by diffusers, peft and lycoris-lora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flux_files
import numpy as np
import pytest
import reference_lora
from closeness import assert_close, relative_rmse

from sdcpp_py import errors
from sdcpp_py.lora import tools

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

# Factors are float32 and a product of each side's sums; the issue asks for 1e-5, which leaves a tenth.
SUM = 1e-6


@pytest.fixture(scope="module")
def flux() -> Any:
    """FLUX's transformer, tiny, without any adapter."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=flux_files.CHANNELS,
        num_layers=flux_files.LAYERS,
        num_single_layers=flux_files.LAYERS,
        attention_head_dim=16,
        num_attention_heads=flux_files.WIDTH // 16,
        joint_attention_dim=flux_files.TEXT,
        pooled_projection_dim=flux_files.POOLED,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def loaded(model: Any, path: Path) -> dict[str, np.ndarray]:
    """What peft adds to each module once diffusers has loaded the file."""
    from diffusers import FluxPipeline

    state, alphas = FluxPipeline.lora_state_dict(str(path), return_alphas=True)[:2]
    model.load_lora_adapter(state, prefix="transformer", network_alphas=alphas, adapter_name="merged")
    try:
        return {
            name.removesuffix(".base_layer"): layer.get_delta_weight("merged").detach().double().numpy()
            for name, layer in model.named_modules()
            if hasattr(layer, "get_delta_weight") and "merged" in layer.lora_A
        }
    finally:
        model.delete_adapters("merged")
        model.unload_lora()


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float = SUM) -> None:
    assert got.keys() == want.keys()
    for name, change in want.items():
        assert_close(got[name], change, tolerance)


@pytest.mark.parametrize("to", ["diffusers", "ai-toolkit"])
def test_flux_loras_of_every_trainer_merge_into_one_that_diffusers_loads(flux: Any, tmp_path: Path, to: str) -> None:
    """Story 4: two of AI-Toolkit, one of kohya with fused projections, one of LyCORIS."""
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "second", "kohya", "lycoris")]
    changes = [
        flux_files.ai_toolkit(files[0], seed=1),
        flux_files.ai_toolkit(files[1], seed=2, rank=8),
        flux_files.kohya(files[2], seed=3),
        flux_files.lycoris(files[3], seed=4),
    ]
    ratios = (0.7, -0.3, 1.1, 0.5)
    merged = tmp_path / "merged.safetensors"
    tools.merge(zip(files, ratios, strict=True), merged, to=to)
    assert_same(loaded(flux, merged), flux_files.weighted(*zip(changes, ratios, strict=True)))


def test_two_flux_loras_of_ai_toolkit_merge(flux: Any, tmp_path: Path) -> None:
    """The pair at which sd-scripts ends with KeyError: 'transformer.single_transformer_blocks.0.attn.to_k'."""
    names = ["single_transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.add_v_proj"]
    a, b, merged = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "merged"))
    one, other = flux_files.ai_toolkit(a, 5, names=names), flux_files.ai_toolkit(b, 6, rank=3, names=names)
    tools.merge([f"{a}:0.7", f"{b}:-0.3"], merged)
    assert_same(loaded(flux, merged), flux_files.weighted((one, 0.7), (other, -0.3)))


@pytest.mark.parametrize("kind", ["lokr-full", "lokr-both", "full"])
def test_kinds_without_a_low_rank_reach_peft_exactly(flux: Any, tmp_path: Path, kind: str) -> None:
    make = {
        "lokr-full": reference_lora.lokr("full"),
        "lokr-both": reference_lora.lokr("both"),
        "full": reference_lora.full,
    }[kind]
    change = flux_files.lycoris(tmp_path / "a.safetensors", 7, make)
    tools.merge([f"{tmp_path / 'a.safetensors'}:0.6"], tmp_path / "b.safetensors", to="diffusers")
    assert_same(loaded(flux, tmp_path / "b.safetensors"), flux_files.weighted((change, 0.6)))


def test_diffusers_own_converter_reads_what_we_write_for_kohya(tmp_path: Path) -> None:
    """At FLUX's own width, as the converter counts rows by it; compared by what the change makes of a vector."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
    from safetensors.torch import load_file

    rng = np.random.default_rng(8)
    rows = {"attn.to_q": 3072, "attn.to_k": 3072, "attn.to_v": 3072, "proj_mlp": 12288}
    tensors, x = {}, rng.standard_normal(3072)
    want = {}
    for name, height in rows.items():
        a, b = rng.standard_normal((4, 3072)).astype(np.float32), rng.standard_normal((height, 4)).astype(np.float32)
        stem = f"transformer.single_transformer_blocks.0.{name}"
        tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = a, b
        want[stem] = b.astype(np.float64) @ (a @ x)
    import lora_files

    source = lora_files.save(tmp_path / "a.safetensors", tensors)
    tools.convert(source, tmp_path / "kohya.safetensors", to="kohya")
    state = load_file(tmp_path / "kohya.safetensors")
    assert set(state) == {
        f"lora_unet_single_blocks_0_linear1.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    theirs = _convert_kohya_flux_lora_to_diffusers(state)
    for stem, change in want.items():
        a, b = (theirs[f"{stem}.lora_{side}.weight"].double().numpy() for side in "AB")
        assert relative_rmse(b @ (a @ x), change) < SUM


# ---- names, against diffusers' own models and converters ---------------------------------------------------


def of_family(family: str) -> Any:
    """The denoiser as diffusers builds it, without memory for its weights."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel

    sdxl = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    sd35 = {"num_layers": 24, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13)), "pos_embed_max_size": 8}
    with torch.device("meta"):
        return {
            "sd1": lambda: UNet2DConditionModel(cross_attention_dim=768),
            "sd2": lambda: UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True),
            "sdxl": lambda: UNet2DConditionModel(**sdxl),
            "sd3": lambda: SD3Transformer2DModel(num_attention_heads=24, caption_projection_dim=1536, **sd35),
            "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
        }[family]()


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_outlines_hold_every_module_of_the_family_and_no_other(family: str) -> None:
    from sdcpp_py.lora.outline import LINEAR, NORM, outline_of

    outline = outline_of(family)
    forms = {
        part.diffusers: module.form
        for module in outline.modules
        if module.component == "denoiser"
        for part in module.parts
    }
    theirs = {
        name: LINEAR if p.ndim == 2 else NORM if p.ndim == 1 else p.shape[-1]
        for full, p in of_family(family).named_parameters()
        if (name := full.removesuffix(".weight")) != full
    }
    optional = {name for name in forms if "skip" in name or name.endswith("conv_shortcut")}
    absent = {"sd3": {"ff_context", "to_add_out", "norm_added", "norm_q", "norm_k"}}.get(family, set())
    assert {name: forms[name] for name in theirs} == theirs
    extra = {name for name in forms.keys() - theirs.keys() - optional if not any(word in name for word in absent)}
    # SD 3's outline has a second attention in every block; only SD 3.5 medium's first 13 do
    assert not {name for name in extra if ".attn2." not in name or family != "sd3"}


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_original_names_and_rows_are_those_of_diffusers_converters(family: str) -> None:
    """Each original weight is filled with numbers of its own rows; diffusers' converter tells where they go."""
    from diffusers.loaders import single_file_utils as convert

    from sdcpp_py.lora.outline import NORM, outline_of

    width = {"sd3": 1536, "flux": 3072}.get(family, 4)
    modules = [module for module in outline_of(family).modules if module.component == "denoiser"]
    known = {name.removesuffix(".weight") for name, _ in of_family(family).named_parameters()}
    original, where = {}, {}
    for i, module in enumerate(modules):
        parts = [part for part in module.parts if part.diffusers in known]
        if not parts:
            continue
        rows = width * module.units if module.units > 1 else 2 * width
        values = i * 1e6 + torch.arange(rows, dtype=torch.float64)
        ones = (1,) * (0 if module.form == NORM else 1 + len(module.kernel()))
        original[f"model.diffusion_model.{module.name}.{module.leaf}"] = values.reshape(rows, *ones)
        original[f"model.diffusion_model.{module.name}.bias"] = values
        unit = rows // module.units
        for part in parts:
            taken = values[part.first * unit : (part.first + part.units) * unit]
            last = part.diffusers == "transformer_blocks.23.norm1_context.linear"  # its swap is told by its size alone
            where[part.diffusers] = taken.roll(len(taken) // 2) if part.swaps or last else taken
    config = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    if family in ("sd1", "sdxl"):
        config |= {"down_block_types": [0] * (3 if family == "sdxl" else 4)}
        config |= {"addition_embed_type": "text_time"} if family == "sdxl" else {}
        theirs = convert.convert_ldm_unet_checkpoint(dict(original), config)
    elif family == "sd3":
        original["model.diffusion_model.pos_embed"] = torch.zeros(1)
        theirs = convert.convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    else:
        theirs = convert.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    for name, values in where.items():
        assert torch.equal(theirs[f"{name}.weight"].flatten(), values), name


# ---- sums of other kinds, and other readers ----------------------------------------------------------------


def test_ties_is_pefts(tmp_path: Path) -> None:
    """peft's own function on the weighted changes, which here have no two elements of one size."""
    from peft.utils.merge_utils import ties

    from sdcpp_py.lora import algebra

    deltas = [torch.randn(24, 32) * ratio for ratio in (0.7, -0.3, 1.0)]
    for density in (0.2, 0.5, 1.0):
        want = ties(deltas, torch.ones(3), density)
        pairs = [algebra.of_dense(delta.numpy()) for delta in deltas]
        got = algebra.agreed(pairs, "ties", density, np.random.default_rng(0))
        assert_close(got, want.numpy(), 1e-6)


def deltas(network: Any) -> dict[str, np.ndarray]:
    """What peft adds to each of a network's modules."""
    return {
        name: layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in network.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def test_peft_opens_the_folder_of_a_merge(flux: Any, tmp_path: Path) -> None:
    """Ranks differ by module, and "proj_out" ends the names of others."""
    import copy

    import peft

    files = [tmp_path / f"{name}.safetensors" for name in ("first", "kohya", "lycoris")]
    changes = [
        flux_files.ai_toolkit(files[0], seed=1),
        flux_files.kohya(files[1], seed=3),
        flux_files.lycoris(files[2], seed=4),
    ]
    ratios = (0.7, -0.3, 1.0)
    tools.merge(list(zip(files, ratios, strict=True)), tmp_path / "folder", to="peft")
    network = peft.PeftModel.from_pretrained(copy.deepcopy(flux), tmp_path / "folder")
    assert_same(deltas(network), flux_files.weighted(*zip(changes, ratios, strict=True)))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_peft_opens_a_folder_of_one_network(kind: str, part: str, tmp_path: Path) -> None:
    """Also with DoRA's norms. Both networks in one folder are refused."""
    import lora_files
    import peft
    import tiny
    from cases import SD1
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    make = reference_lora.lora if kind == "lora" else reference_lora.dora(reference_lora.lora, of_inputs=False)
    kinds = "linear conv" if kind == "lora" else "linear"
    update = lora_files.random_update(lora_files.modules(kinds, "unet text_encoder"), make)
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    with pytest.raises(errors.BadArgument, match=r"is for one network, .* prune --keep"):
        tools.convert(source, tmp_path / "both", to="peft")
    component = {"unet": "denoiser", "text_encoder": "clip"}[part]
    tools.prune(source, tmp_path / "folder", keep=[f"{component}.*"], to="peft")
    if part == "unet":
        network = UNet2DConditionModel.from_config(tiny.configs(SD1)["unet"])
    else:
        network = CLIPTextModelWithProjection(CLIPTextConfig(**tiny.configs(SD1)["text_encoder"]))
    weights = {name.removeprefix(f"{part}."): values for name, values in lora_files.base().items()}
    known = {name: torch.from_numpy(weights[name]) for name in network.state_dict() if name in weights}
    assert known
    network.load_state_dict(known, strict=False)
    adapted = peft.PeftModel.from_pretrained(network, tmp_path / "folder").merge_and_unload().state_dict()
    mine = {path: factors for path, factors in update.items() if path.startswith(f"{part}.")}
    assert mine
    for name, values in lora_files.merged((mine, 1.0)).items():
        assert_close(adapted[name.removeprefix(f"{part}.")].numpy(), values, 1e-6)


def test_unet_loras_reach_peft_through_diffusers(tmp_path: Path) -> None:
    """Convolutions too; diffusers' loader gets the file that kohya's keys became."""
    import lora_files
    import tiny
    from cases import SD1
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    update = lora_files.random_update(lora_files.modules("linear conv", "unet"))
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    tools.merge([(source, -0.6)], tmp_path / "y.safetensors", to="diffusers")
    unet = UNet2DConditionModel.from_config(tiny.configs(SD1)["unet"])
    state, alphas = StableDiffusionPipeline.lora_state_dict(str(tmp_path / "y.safetensors"))[:2]
    unet.load_lora_adapter(state, prefix="unet", network_alphas=alphas, adapter_name="merged")
    got = {
        f"unet.{name}": layer.get_delta_weight("merged").detach().double().numpy()
        for name, layer in unet.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert got.keys() == update.keys()
    for path, factors in update.items():
        weight = lora_files.base()[f"{path}.weight"]
        assert_close(got[path], -0.6 * (reference_lora.changed(weight, factors) - weight), SUM)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_lycoris_reads_what_we_write_for_kohya(kind: str, tmp_path: Path) -> None:
    """Its own loader puts the file's modules onto layers, whose outputs tell the weights that they have then."""
    import lora_files
    from lycoris.modules import get_module, make_module
    from safetensors.torch import load_file

    make = {
        "lora": reference_lora.lora,
        "loha": reference_lora.loha,
        "lokr": reference_lora.lokr("w2", 4, 4),  # the split that its loader computes anew
        "full": reference_lora.full,
    }[kind]
    paths = [path for path in lora_files.modules("linear", "unet") if path.endswith("attn1.to_q")]
    update = lora_files.random_update(paths, make)
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update, lora_files.lycoris))
    tools.merge([(source, 0.5)], tmp_path / "y.safetensors", to="kohya")
    state = load_file(tmp_path / "y.safetensors")
    for path, factors in update.items():
        weight = lora_files.base()[f"{path}.weight"]
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
        stem = lora_files.kohya(path)
        module = make_module(*get_module(state, stem), stem, layer)
        module.apply_to()
        with torch.no_grad():
            got = layer(torch.eye(weight.shape[1])).T.double().numpy() - weight
        # float32 of the weight and its change together
        assert_close(got, 0.5 * (reference_lora.changed(weight, factors) - weight), 1e-5)
