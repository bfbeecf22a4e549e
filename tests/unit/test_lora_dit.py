"""LoRAs on FLUX.1 and SD3: every spelling, fused and split, and shapes that differ, against the changed weights.

The truth is a model that holds the change in its weights, made by reference_lora in float64 and rounded to float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import lora_dit
import numpy as np
import pytest
import reference_lora
from cases_dit import FLUX, FLUX_FILL, FLUX_SCHNELL, SD3, SD35_MEDIUM
from closeness import assert_close
from kernel_sets import Kernels
from lora_dit import Update, denoise, kohya, matrices, peft, split
from tiny_dit import Tensors

from sdcpp_py import BadArgument, BadFile, SDContext, _native

TOLERANCE = 1e-5  # float32 on both sides: the order of sums
pytestmark = pytest.mark.usefixtures("kernels")

Opens = Callable[..., SDContext]


def lies_as(context: SDContext, model: lora_dit.Model, path: Path, want: np.ndarray, multiplier: float = 1.0) -> None:
    """The LoRA makes of the model what is wanted, and leaves no trace."""
    base = denoise(context, model)
    context.apply_loras([(str(path), multiplier)])
    got = denoise(context, model)
    context.apply_loras([])
    assert np.std(want - base) > 0.02 * np.std(base), "a change too small to be seen"
    assert_close(got, want, TOLERANCE)
    np.testing.assert_array_equal(denoise(context, model), base)


SPELLINGS = {
    "peft": (True, peft("transformer.")),
    "bare": (True, peft("")),
    "onetrainer": (True, kohya("lora_transformer_")),
    "lycoris": (True, kohya("lycoris_")),
    "kohya": (False, kohya()),
    "comfy": (False, peft("diffusion_model.")),
    "fal": (False, peft("base_model.model.")),
}


@pytest.mark.parametrize("model", [FLUX, SD35_MEDIUM], ids=["flux", "sd3.5"])
@pytest.mark.parametrize("is_split", [True, False], ids=["split", "fused"])
def test_every_module_in_every_spelling(
    is_split: bool, model: lora_dit.Model, dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    """All modules of the transformer, to files that split and files that fuse, half-swapped modulations among them."""
    paths = split(model, matrices(model)) if is_split else matrices(model)
    update = lora_dit.random_update(model, paths)
    want = denoise(dit_with(model, lora_dit.merged(model, (update, 0.7))), model)
    for name, (splits, spell) in SPELLINGS.items():
        if splits != is_split:
            continue
        path = lora_dit.write(spell(update), tmp_path / f"{name}.safetensors")
        for storage in ("folder", "single"):
            context = dit(model, storage=storage)
            report = context.inspect_lora(path)
            assert (len(report.applied), report.unmatched, report.skipped) == (len(paths), [], []), name
            lies_as(context, model, path, want, 0.7)


# A subset of the parts leaves the others' rows alone (cases 25 and 31); halves are swapped where diffusers' are.
PARTS = {
    "flux": (
        FLUX,
        [
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_v",
            "transformer_blocks.1.attn.add_k_proj",
            "single_transformer_blocks.0.proj_mlp",
            "single_transformer_blocks.1.attn.to_k",
            "norm_out.linear",
        ],
    ),
    "sd3.5": (
        SD35_MEDIUM,
        [
            "transformer_blocks.1.attn2.to_v",
            "transformer_blocks.2.norm1_context.linear",
            "transformer_blocks.1.norm1_context.linear",
            "transformer_blocks.0.attn.add_q_proj",
            "norm_out.linear",
        ],
    ),
    "flux-fused": (
        FLUX,
        ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1", "final_layer.adaLN_modulation.1"],
    ),
}
KINDS = ["lora", "loha", "lokr-w2", "full", "dora-rows", "dora-inputs", "oft", "ia3-output"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("turn", range(3))
def test_kinds_on_parts_of_fused_weights(
    turn: int, name: str, dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    """Each part has a kind of its own, and others at the next turn."""
    model, paths = PARTS[name]
    update: Update = {}
    for i, path in enumerate(paths):
        make = reference_lora.KINDS[KINDS[(3 * turn + i) % len(KINDS)]].make
        update |= lora_dit.random_update(model, [path], make, seed=i)
    want = denoise(dit_with(model, lora_dit.merged(model, (update, 1.0))), model)
    spell = kohya() if "fused" in name else kohya("lycoris_")
    path = lora_dit.write(spell(update), tmp_path / "parts.safetensors")
    for storage in ("folder", "single"):
        lies_as(dit(model, storage=storage), model, path, want)


CASES = [
    pytest.param(FLUX, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"], "peft", id="case-25"),
    pytest.param(FLUX, ["norm_out.linear"], "peft", id="case-29"),
    pytest.param(FLUX, ["final_layer.adaLN_modulation.1"], "kohya", id="case-29-of-kohya"),
    pytest.param(SD35_MEDIUM, [f"transformer_blocks.{i}.norm1_context.linear" for i in (1, 2)], "peft", id="case-30"),
    pytest.param(SD35_MEDIUM, ["transformer_blocks.1.attn2.to_v"], "peft", id="case-31"),
    pytest.param(
        FLUX,
        [f"transformer_blocks.0.{part}" for part in ("ff.net.0.proj", "norm1.linear", "attn.to_q")],
        "onetrainer",
        id="case-36",
    ),
]


@pytest.mark.parametrize(("model", "paths", "spelling"), CASES)
def test_modules_find_their_rows(
    model: lora_dit.Model,
    paths: list[str],
    spelling: str,
    dit: Opens,
    dit_with: Callable[..., SDContext],
    tmp_path: Path,
) -> None:
    update = lora_dit.random_update(model, paths)
    want = denoise(dit_with(model, lora_dit.merged(model, (update, 1.0))), model)
    path = lora_dit.write(SPELLINGS[spelling][1](update), tmp_path / "rows.safetensors")
    assert len(dit(model).inspect_lora(path).applied) == len(paths)
    lies_as(dit(model), model, path, want)


def test_case_31_a_second_attention_that_is_not_there(dit: Opens, tmp_path: Path) -> None:
    update = lora_dit.random_update(
        SD35_MEDIUM, [f"transformer_blocks.{i}.attn2.to_v" for i in range(SD35_MEDIUM.dual)]
    )
    absent = {f"transformer_blocks.{SD35_MEDIUM.dual}.attn2.to_v": next(iter(update.values()))}
    path = lora_dit.write(peft("transformer.")({**update, **absent}), tmp_path / "attn2.safetensors")
    report = dit(SD35_MEDIUM).inspect_lora(path)
    assert (len(report.applied), len(report.unmatched)) == (SD35_MEDIUM.dual, 2)


def test_case_26_each_part_has_its_own_rank_and_alpha(
    dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    """Scales of 1, 1/4 and 1 on rows of one matrix."""
    block = "single_transformer_blocks.0."
    update: Update = {}
    for part, rank, alpha in (("attn.to_q", 8, 8.0), ("attn.to_k", 16, 4.0), ("proj_mlp", 4, None)):
        update |= lora_dit.random_update(
            FLUX, [block + part], lambda rng, w, r=rank, a=alpha: reference_lora.lora(rng, w, r, a)
        )
    want = denoise(dit_with(FLUX, lora_dit.merged(FLUX, (update, 1.0))), FLUX)
    path = lora_dit.write(kohya("lora_transformer_")(update), tmp_path / "ranks.safetensors")
    lies_as(dit(FLUX), FLUX, path, want)


def test_case_27_a_fused_pair_on_split_weights(dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path) -> None:
    """A diffusers folder has q, k, v and the MLP apart; in memory they are one, as the LoRA is."""
    update = lora_dit.random_update(FLUX, ["single_blocks.0.linear1"])
    want = denoise(dit_with(FLUX, lora_dit.merged(FLUX, (update, 1.0))), FLUX)
    lies_as(dit(FLUX), FLUX, lora_dit.write(kohya()(update), tmp_path / "fused.safetensors"), want)


def test_case_28_split_training_of_kohya(dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path) -> None:
    """Stacked downs and a block-diagonal up with the alpha of one part are read as they stand."""
    rng, h, r = np.random.default_rng(3), FLUX.hidden, 4
    up = np.zeros((3 * h, 3 * r), np.float32)
    for i in range(3):
        up[i * h : (i + 1) * h, i * r : (i + 1) * r] = rng.standard_normal((h, r))
    down = rng.standard_normal((3 * r, h)).astype(np.float32) / 8
    update: Update = {"double_blocks.0.img_attn.qkv": {
        "lora_down.weight": down, "lora_up.weight": up, "alpha": np.float32(r)
    }}  # fmt: skip
    want = denoise(dit_with(FLUX, lora_dit.merged(FLUX, (update, 1.0))), FLUX)
    lies_as(dit(FLUX), FLUX, lora_dit.write(kohya()(update), tmp_path / "split.safetensors"), want)


def test_case_40_processors_of_xlabs(dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path) -> None:
    """qkv_lora2 is the text's, and of a single block's linear1 its q, k and v."""
    h = FLUX.hidden
    paths = ["double_blocks.0.txt_attn.qkv", "double_blocks.0.img_attn.proj", "single_blocks.0.linear1"]
    update = lora_dit.random_update(FLUX, paths, without_alpha)
    single = update.pop("single_blocks.0.linear1")
    names = {"double_blocks.0.txt_attn.qkv": "double_blocks.0.processor.qkv_lora2",
             "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1"}  # fmt: skip
    tensors = {}
    for path, factors in update.items():
        for role in ("down", "up"):
            tensors[f"diffusion_model.{names[path]}.{role}.weight"] = factors[f"lora_{role}.weight"]
    tensors["diffusion_model.single_blocks.0.processor.qkv_lora.down.weight"] = single["lora_down.weight"]
    tensors["diffusion_model.single_blocks.0.processor.qkv_lora.up.weight"] = single["lora_up.weight"][: 3 * h]
    single["lora_up.weight"][3 * h :] = 0
    update["single_blocks.0.linear1"] = single
    want = denoise(dit_with(FLUX, lora_dit.merged(FLUX, (update, 1.0))), FLUX)
    lies_as(dit(FLUX), FLUX, lora_dit.write(tensors, tmp_path / "xlabs.safetensors"), want)


def test_case_37_t5_is_meant_by_whatever_number(dit: Opens, tmp_path: Path) -> None:
    """kohya counts FLUX's T5 as te3, OneTrainer as te2; where a LoRA's T5 is not there, that is no mistake."""
    rng = np.random.default_rng(0)
    stem = "encoder_block_0_layer_0_SelfAttention_q"
    factors = {"lora_down.weight": rng.standard_normal((4, FLUX.context)).astype(np.float32),
               "lora_up.weight": rng.standard_normal((64, 4)).astype(np.float32)}  # fmt: skip
    for prefix in ("lora_te3_", "lora_te2_"):
        tensors = {f"{prefix}{stem}.{role}": values for role, values in factors.items()}
        report = dit(FLUX).inspect_lora(lora_dit.write(tensors, tmp_path / f"{prefix}.safetensors"))
        assert (report.text_modules, report.unet_modules, report.unmatched) == (1, 0, [])


def test_text_encoders_of_sd3_have_multipliers_of_their_own(dit: Opens, tmp_path: Path) -> None:
    """te1, te2 and te3 in one file, with te2= and te3= of its tag: each as a file of that encoder alone."""
    rng = np.random.default_rng(1)
    layer, block = "text_model_encoder_layers_0_mlp_fc1", "encoder_block_1_layer_1_DenseReluDense_wi_0"
    files: dict[str, Tensors] = {}
    for key, stem, inputs, outputs in (
        ("te", f"lora_te1_{layer}", SD3.clip_l, 4 * SD3.clip_l),
        ("te2", f"lora_te2_{layer}", SD3.clip_g, 4 * SD3.clip_g),
        ("te3", f"lora_te3_{block}", SD3.context, 2 * SD3.context),
    ):
        files[key] = {
            f"{stem}.lora_down.weight": rng.standard_normal((4, inputs)).astype(np.float32),
            f"{stem}.lora_up.weight": rng.standard_normal((outputs, 4)).astype(np.float32) / 8,
        }
    whole = lora_dit.write({k: v for tensors in files.values() for k, v in tensors.items()}, tmp_path / "x.safetensors")
    alone = {key: lora_dit.write(tensors, tmp_path / f"{key}.safetensors") for key, tensors in files.items()}
    context = dit(SD3)

    def paint(loras: dict[Path, Any]) -> np.ndarray:
        context.generate("a cat", loras=loras, width=32, height=32, steps=1, cfg_scale=1.0, seed=1)
        return _native.probe_latent(context._native)

    plain, seen = paint({}), []
    for told in ({"te": 0.5, "te2": 1.0, "te3": -0.5}, {"te": 0.0, "te2": 1.0, "te3": 0.0}, {"te": 0.5, "te3": 0.0}):
        multipliers = {"te2": told["te"], "te3": told["te"], **told}
        want = paint({alone[key]: multiplier for key, multiplier in multipliers.items()})
        got = paint({whole: {"unet": 0.0, **told}})
        assert_close(got, want, TOLERANCE)
        assert all(np.std(got - other) > 1e-3 * np.std(plain) for other in (plain, *seen)), "too small to be seen"
        seen.append(got)
    np.testing.assert_array_equal(paint({}), plain)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("FLUX.1-Turbo-Alpha", "Turbo, made for steps 8 and multiplier 1;"),
        ("Hyper-FLUX.1-dev-16steps-lora", "Hyper, made for steps 16 and multiplier 0.125;"),
    ],
)
def test_a_distilled_lora_says_its_settings(
    name: str, told: str, dit: Opens, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    update = lora_dit.random_update(FLUX, ["img_in"])
    path = lora_dit.write(kohya()(update), tmp_path / f"{name}.safetensors")
    request = {"width": 32, "height": 32, "steps": 8}
    dit(FLUX).generate("a cat", loras={path: 0.125}, **request)
    assert not caplog.records
    dit(FLUX).generate("a cat", loras={path: 1.0}, **{**request, "steps": 20})
    assert told in caplog.text
    assert len(caplog.records) == 1
    dit(FLUX).apply_loras({})


def test_guidance_of_a_lora_for_dev_is_absent_from_schnell(dit: Opens, tmp_path: Path) -> None:
    update = lora_dit.random_update(FLUX, ["guidance_in.in_layer", "img_in", "txt_in"])
    report = dit(FLUX_SCHNELL).inspect_lora(lora_dit.write(kohya()(update), tmp_path / "dev.safetensors"))
    assert (len(report.applied), report.unmatched, len(report.absent)) == (2, [], 3)


def test_case_42_a_lora_of_the_other_family_is_refused(dit: Opens, tmp_path: Path) -> None:
    update = lora_dit.random_update(SD3, matrices(SD3))
    path = lora_dit.write(kohya()(update), tmp_path / "sd3.safetensors")
    with pytest.raises(BadFile, match="SD3"):
        dit(FLUX).apply_loras([(str(path), 1.0)])


# ---- shapes that differ --------------------------------------------------------------------------------


def without_alpha(rng: np.random.Generator, weight: np.ndarray) -> reference_lora.Factors:
    return reference_lora.lora(rng, weight, alpha=None)


def turbo() -> Update:
    """As FLUX.1-Turbo-Alpha: all of a plain model's modules, 64 input features among them."""
    paths = [path for path in split(FLUX, matrices(FLUX)) if "guidance" not in path]
    return lora_dit.random_update(FLUX, paths, without_alpha)


def write_gguf(weights: Tensors, path: Path, kind: gguf.GGMLQuantizationType) -> tuple[Path, Tensors]:
    """As ComfyUI-GGUF names them, and what the weights mean."""
    writer, meant = gguf.GGUFWriter(path, arch="flux"), {}
    for name, values in weights.items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
            meant[name] = values
        elif kind == gguf.GGMLQuantizationType.F16:
            writer.add_tensor(name, values.astype(np.float16))
            meant[name] = values.astype(np.float16).astype(np.float32)
        else:
            raw = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, raw, raw_dtype=kind)
            meant[name] = gguf.quants.dequantize(raw, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, meant


# ggml's own products round what they multiply as the weights are: to 11 bits, or to 127 steps of a block's largest.
ROUNDED = {"F16": 5e-3, "Q8_0": 4e-2, "Q4_0": 4e-2}


@pytest.mark.parametrize("kind", ROUNDED)
def test_case_32_turbo_alpha_on_fill(
    kind: str, kernels: Kernels, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    """The first 64 of 384 input features change, and nothing is left when the prompt drops it."""
    file, meant = write_gguf(lora_dit.original(FLUX_FILL), tmp_path / "fill.gguf", gguf.GGMLQuantizationType[kind])
    update = turbo()
    path = lora_dit.write(peft("transformer.")(update), tmp_path / "turbo.safetensors")
    want = denoise(dit_with(FLUX_FILL, lora_dit.merged(FLUX_FILL, (update, 1.0), weights=meant)), FLUX_FILL)
    with dit_with(FLUX_FILL, file) as context:
        fingerprint, base = context.fingerprint(), denoise(context, FLUX_FILL)
        report = context.inspect_lora(path)
        assert report.padded == ["transformer.x_embedder: 64 of 384 input features"]
        assert (report.unmatched, report.skipped) == ([], [])
        context.apply_loras([(str(path), 1.0)])
        assert_close(denoise(context, FLUX_FILL), want, ROUNDED[kind] if kernels.name == "reference" else TOLERANCE)
        context.apply_loras([])
        np.testing.assert_array_equal(denoise(context, FLUX_FILL), base)
        assert context.fingerprint() == fingerprint


def test_turbo_alpha_on_fill_in_f32_is_exact(dit_with: Callable[..., SDContext], dit: Opens, tmp_path: Path) -> None:
    update = turbo()
    want = denoise(dit_with(FLUX_FILL, lora_dit.merged(FLUX_FILL, (update, 0.5))), FLUX_FILL)
    path = lora_dit.write(peft("transformer.")(update), tmp_path / "turbo.safetensors")
    lies_as(dit(FLUX_FILL), FLUX_FILL, path, want, 0.5)


def test_case_35_a_narrower_lora_beside_another(dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path) -> None:
    """One of all 384 input features and one of 64; when the first goes the second is exact."""
    update = turbo()
    whole = lora_dit.random_update(FLUX_FILL, ["img_in", "txt_in"], seed=5)
    first = lora_dit.write(kohya()(whole), tmp_path / "fill.safetensors")
    second = lora_dit.write(peft("transformer.")(update), tmp_path / "turbo.safetensors")
    both = denoise(dit_with(FLUX_FILL, lora_dit.merged(FLUX_FILL, (whole, 0.6), (update, 1.0))), FLUX_FILL)
    alone = denoise(dit_with(FLUX_FILL, lora_dit.merged(FLUX_FILL, (update, 1.0))), FLUX_FILL)
    context = dit(FLUX_FILL)
    context.apply_loras([(str(first), 0.6), (str(second), 1.0)])
    assert_close(denoise(context, FLUX_FILL), both, TOLERANCE)
    context.apply_loras([(str(second), 1.0)])
    assert_close(denoise(context, FLUX_FILL), alone, TOLERANCE)
    context.apply_loras([])


def control() -> tuple[Tensors, Update]:
    """As FLUX.1-Canny-dev-lora: 128 input features, biases of the ups, and new values of norms."""
    rng = np.random.default_rng(8)
    update = lora_dit.random_update(FLUX, ["double_blocks.0.img_attn.qkv", "single_blocks.0.linear2"], without_alpha)
    wide = {"lora_down.weight": rng.standard_normal((4, 128)).astype(np.float32) / 8,
            "lora_up.weight": rng.standard_normal((FLUX.hidden, 4)).astype(np.float32) / 4,
            "lora_B.bias": rng.standard_normal(FLUX.hidden).astype(np.float32) / 10}  # fmt: skip
    tensors = peft("")({"img_in": wide, **update})
    tensors["single_blocks.0.norm.key_norm.scale"] = rng.uniform(0.5, 2, FLUX.head_size).astype(np.float32)
    return tensors, {"img_in": wide, **update}


def test_cases_33_and_34_a_control_lora_widens_the_input_of_dev(
    dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    """As the Control model that it makes of dev; refused without a picture; no trace afterwards."""
    tensors, update = control()
    path = lora_dit.write(tensors, tmp_path / "canny.safetensors")
    widened = lora_dit.original(FLUX)
    widened["img_in.weight"] = np.pad(widened["img_in.weight"], ((0, 0), (0, 64)))
    widened = lora_dit.merged(FLUX, (update, 1.0), weights=widened)
    widened["single_blocks.0.norm.key_norm.scale"] = tensors["single_blocks.0.norm.key_norm.scale"]
    context = dit(FLUX)
    base = denoise(context, FLUX)
    picture = np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8)
    request: dict[str, Any] = {"width": 96, "height": 64, "steps": 2, "seed": 4}
    plain = np.asarray(context.generate("a heart", **request))

    context.apply_loras([(str(path), 1.0)])
    with dit_with(FLUX, widened) as truth:
        assert_close(denoise(context, FLUX, channels=32), denoise(truth, FLUX, channels=32), TOLERANCE)
        truth.generate("a heart", control_image=picture, guidance=3.5, **request)
        context.generate("a heart", control_image=picture, loras=[(str(path), 1.0)], **request)
        got, want = (_native.probe_latent(c._native) for c in (context, truth))
        assert_close(got, want, 1e-4)

    with pytest.raises(BadArgument, match="128 input features, where the plain model has 64: it needs a control_image"):
        context.generate("a heart", loras=[(str(path), 1.0)], **request)
    with pytest.raises(BadArgument, match="neither the model nor a LoRA"):
        context.generate("a heart", control_image=picture, **request)
    np.testing.assert_array_equal(np.asarray(context.generate("a heart", **request)), plain)
    np.testing.assert_array_equal(denoise(context, FLUX), base)


def test_a_control_lora_beside_a_plain_one(dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path) -> None:
    """64 and 128 input features at once, in either order."""
    tensors, update = control()
    other = turbo()
    paths = [lora_dit.write(tensors, tmp_path / "canny.safetensors"),
             lora_dit.write(peft("transformer.")(other), tmp_path / "turbo.safetensors")]  # fmt: skip
    widened = lora_dit.original(FLUX)
    widened["img_in.weight"] = np.pad(widened["img_in.weight"], ((0, 0), (0, 64)))
    widened = lora_dit.merged(FLUX, (update, 0.8), (other, 0.3), weights=widened)
    scale = widened["single_blocks.0.norm.key_norm.scale"]
    scale += np.float32(0.8) * (tensors["single_blocks.0.norm.key_norm.scale"] - scale)
    context = dit(FLUX)
    with dit_with(FLUX, widened) as truth:
        want = denoise(truth, FLUX, channels=32)
    for order in ([0, 1], [1, 0]):
        context.apply_loras([(str(paths[i]), (0.8, 0.3)[i]) for i in order])
        assert_close(denoise(context, FLUX, channels=32), want, TOLERANCE)
    context.apply_loras([])


def test_control_loras_need_the_runtime_mode_and_a_plain_model(
    dit: Opens, dit_with: Callable[..., SDContext], tmp_path: Path
) -> None:
    path = lora_dit.write(control()[0], tmp_path / "canny.safetensors")
    restoring = dit_with(FLUX, lora_dit.original(FLUX), lora_mode="restore")
    with restoring as context, pytest.raises(BadArgument, match="lora_mode 'runtime'"):
        context.apply_loras([(str(path), 1.0)])
    skipped = dit(FLUX_FILL).inspect_lora(path).skipped
    assert any("takes 128 inputs, of which some are another picture's" in why for why in skipped)
    report = dit(FLUX).inspect_lora(path)
    assert any("needs a control_image" in warning for warning in report.warnings)


@pytest.mark.parametrize("mode", ["restore", "diff"])
def test_weights_that_are_written(mode: str, dit_with: Callable[..., SDContext], dit: Opens, tmp_path: Path) -> None:
    """Rewritten weights that lie split in their files come back bit for bit."""
    update = lora_dit.random_update(FLUX, split(FLUX, matrices(FLUX)))
    want = denoise(dit_with(FLUX, lora_dit.merged(FLUX, (update, 0.7))), FLUX)
    path = lora_dit.write(peft("transformer.")(update), tmp_path / "all.safetensors")
    with SDContext(dit(FLUX)._path, threads=1, lora_mode=mode) as context:
        fingerprint = context.fingerprint()
        context.apply_loras([(str(path), 0.7)])
        assert_close(denoise(context, FLUX), want, TOLERANCE)
        context.reset_loras()
        assert context.fingerprint() == fingerprint


# ---- weights per block ---------------------------------------------------------------------------------


ON = {
    "flux": (FLUX, 58, {2: "transformer_blocks.1.", 21: "single_transformer_blocks.1."}),
    "sd3.5": (SD35_MEDIUM, 25, {2: "transformer_blocks.1."}),
}


@pytest.mark.parametrize(("model", "n", "on"), ON.values(), ids=ON)
def test_weights_per_block(model: lora_dit.Model, n: int, on: dict[int, str], dit: Opens, tmp_path: Path) -> None:
    """lbw leaves of a LoRA what lies in the blocks that are on, halves where it says so."""
    update = lora_dit.random_update(model, split(model, matrices(model)))
    inside = {path: factors for path, factors in update.items() if path.startswith(tuple(on.values()))}
    whole = lora_dit.write(peft("transformer.")(update), tmp_path / "whole.safetensors")
    part = lora_dit.write(peft("transformer.")(inside), tmp_path / "part.safetensors")
    numbers = ",".join("0.5" if i in on else "0" for i in range(n))
    context = dit(model)
    context.apply_loras([(str(part), 0.5)])
    want = denoise(context, model)
    context.apply_loras([(str(whole), {"lbw": numbers})])
    got = denoise(context, model)
    context.apply_loras([])
    assert np.std(want - denoise(context, model)) > 0.02 * np.std(want), "a change too small to be seen"
    assert_close(got, want, TOLERANCE)


def test_the_text_encoders_of_flux_have_numbers_of_their_own(dit: Opens, tmp_path: Path) -> None:
    """The first of 61 is CLIP's, the second T5's."""
    rng = np.random.default_rng(0)
    files: dict[str, Tensors] = {}
    for name, stem, out, inputs in (
        ("CLIP", "lora_te1_text_model_encoder_layers_0_mlp_fc1", 4 * FLUX.pooled, FLUX.pooled),
        ("T5", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", 64, FLUX.context),
    ):
        files[name] = {
            f"{stem}.lora_down.weight": rng.standard_normal((4, inputs)).astype(np.float32),
            f"{stem}.lora_up.weight": rng.standard_normal((out, 4)).astype(np.float32),
        }
    both = lora_dit.write(files["CLIP"] | files["T5"], tmp_path / "both.safetensors")
    context = dit(FLUX)
    request: dict[str, Any] = {"width": 32, "height": 32, "steps": 1, "seed": 1}

    def latent(loras: Any) -> np.ndarray:
        context.generate("a heart", loras=loras, **request)
        return _native.probe_latent(context._native)

    for i, name in enumerate(files):
        alone = lora_dit.write(files[name], tmp_path / f"{name}.safetensors")
        numbers = ",".join("1" if k == i else "0" for k in range(61))
        want = latent([(str(alone), 1.0)])
        assert np.any(want != latent([]))
        np.testing.assert_array_equal(latent([(str(both), {"lbw": numbers})]), want)
