"""Adapters against peft and lycoris-lora: first the formulas of reference_lora.py, layer by layer, then the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_lora
import tiny
from cases import SD1, denoise, text
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels

from sdcpp_py import SDContext, _native

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: torch.nn.Linear(32, 64),
    "square": lambda: torch.nn.Linear(64, 64),
    "no-bias": lambda: torch.nn.Linear(64, 32, bias=False),
    "conv1x1": lambda: torch.nn.Conv2d(32, 64, 1),
    "conv3x3": lambda: torch.nn.Conv2d(32, 64, 3, padding=1),
    "strided": lambda: torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(5)


def example(layer: Any) -> Any:
    """Inputs of a layer, float32."""
    is_conv = layer.weight.ndim == 4
    return torch.randn(2, layer.weight.shape[1], 7, 6) if is_conv else torch.randn(3, 5, layer.weight.shape[1])


def run(layer: Any, weight: np.ndarray, bias: np.ndarray | None, x: Any) -> np.ndarray:
    """The layer with other values: float64."""
    w, b = torch.from_numpy(weight), None if bias is None else torch.from_numpy(bias)
    if weight.ndim == 2:
        return torch.nn.functional.linear(x.double(), w, b).numpy()
    return torch.nn.functional.conv2d(x.double(), w, b, layer.stride, layer.padding).numpy()


def randomise(module: Any, size: float = 0.3) -> None:
    """Adapters begin as no change at all: draws all that is trained."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "magnitude" in name or "dora_scale" in name or "rescale" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            else:
                parameter.copy_(torch.randn_like(parameter) * size)


def fine_tune(module: Any) -> None:
    """Weights that are trained themselves stay near those that they began with."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


def compare(layer: Any, factors: reference_lora.Factors, x: Any, got: np.ndarray, tolerance: float = 1e-5) -> None:
    """The layer's output, theirs in float32 against the formulas in float64."""
    weight, bias = (None if p is None else p.detach().numpy().astype(np.float64) for p in (layer.weight, layer.bias))
    plain = run(layer, weight, bias, x)
    with_bias = None if bias is None else reference_lora.changed_bias(bias, factors)
    want = run(layer, reference_lora.changed(weight, factors), with_bias, x)
    assert np.std(want - plain) > 0.03 * np.std(plain), "a change too small to tell formulas apart"
    assert_close(got, want, tolerance)


# ---- formulas against lycoris-lora ---------------------------------------------------------------------

# Module, options, and the layers that it cannot be on.
LYCORIS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "locon": ("LoConModule", {"lora_dim": 4, "alpha": 2}, set()),
    "locon-tucker": ("LoConModule", {"lora_dim": 4, "alpha": 2, "use_tucker": True}, set()),
    "locon-rslora": ("LoConModule", {"lora_dim": 4, "alpha": 2, "rs_lora": True}, set()),
    "dora-inputs": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": False}, set()),
    "dora-rows": ("LoConModule", {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": True}, set()),
    "loha": ("LohaModule", {"lora_dim": 3, "alpha": 2}, set()),
    "loha-tucker": ("LohaModule", {"lora_dim": 3, "alpha": 2, "use_tucker": True}, set()),
    "loha-dora": ("LohaModule", {"lora_dim": 3, "alpha": 2, "weight_decompose": True, "wd_on_out": True}, set()),
    "lokr": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 4}, set()),
    "lokr-full": ("LokrModule", {"lora_dim": 10000, "alpha": 1, "factor": 8, "full_matrix": True}, set()),
    "lokr-both": ("LokrModule", {"lora_dim": 1, "alpha": 3, "factor": 8, "decompose_both": True}, set()),
    "lokr-tucker": ("LokrModule", {"lora_dim": 2, "alpha": 1, "factor": 4, "use_tucker": True}, set()),
    "lokr-unbalanced": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 1, "factor": 4, "unbalanced_factorization": True},
        set(),
    ),
    "lokr-dora": (
        "LokrModule",
        {"lora_dim": 2, "alpha": 1, "factor": 4, "weight_decompose": True, "wd_on_out": False},
        set(),
    ),
    "full": ("FullModule", {}, set()),
    "ia3-input": ("IA3Module", {"train_on_input": True}, set()),
    "ia3-output": ("IA3Module", {"train_on_input": False}, set()),
    "glora": ("GLoRAModule", {"lora_dim": 3, "alpha": 2}, set()),
    "glora-core": ("GLoRAModule", {"lora_dim": 3, "alpha": 2, "use_tucker": True}, {"conv1x1"}),
    "oft": ("DiagOFTModule", {"lora_dim": 8}, set()),
    "oft-constrained": ("DiagOFTModule", {"lora_dim": 8, "constraint": 0.02, "rescaled": True}, set()),
    "boft": ("ButterflyOFTModule", {"lora_dim": 4}, set()),
    "boft-constrained": ("ButterflyOFTModule", {"lora_dim": 4, "constraint": 0.02, "rescaled": True}, set()),
}


SIZES = {"full": 0.05, "loha-tucker": 0.6, "loha": 0.4, "lokr-both": 0.5, "lokr-tucker": 0.4}  # of random factors


def lycoris_factors(module: Any) -> reference_lora.Factors:
    """What the module would be saved as, by role."""
    return {key.removeprefix("layer."): value.detach().numpy() for key, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "layer_name"),
    [(name, layer) for name, (_, _, impossible) in LYCORIS.items() for layer in LAYERS if layer not in impossible],
)
def test_formulas_agree_with_lycoris(name: str, layer_name: str) -> None:
    from lycoris import modules

    kind, options, _ = LYCORIS[name]
    layer = LAYERS[layer_name]()
    holder = torch.nn.Sequential()
    holder.add_module("layer", layer)
    x = example(layer)
    original = LAYERS[layer_name]()
    original.load_state_dict(layer.state_dict())
    module = getattr(modules, kind)("layer", layer, 1.0, **options)
    module.apply_to()
    randomise(module, SIZES.get(name, 0.2))
    with torch.no_grad():
        got = holder(x).double().numpy()
    compare(original, lycoris_factors(module), x, got)


# ---- formulas against peft -----------------------------------------------------------------------------


PEFT_KINDS = [
    *("lora", "rslora", "dora", "lora-bias", "loha", "loha-tucker", "lokr", "lokr-both", "lokr-tucker", "lokr-full"),
    *("oft", "oft-exact", "oft-shared", "ia3-output", "ia3-input"),
]


def peft_config(name: str) -> Any:
    import peft

    common: dict[str, Any] = {"target_modules": ["layer"]}
    return {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=2, **common),
        "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, **common),
        "dora": lambda: peft.LoraConfig(r=4, lora_alpha=2, use_dora=True, **common),
        "lora-bias": lambda: peft.LoraConfig(r=4, lora_alpha=2, lora_bias=True, **common),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=2, **common),
        "loha-tucker": lambda: peft.LoHaConfig(r=3, alpha=2, use_effective_conv2d=True, **common),
        "lokr": lambda: peft.LoKrConfig(r=2, alpha=1, decompose_factor=4, **common),
        "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=8, **common),
        "lokr-tucker": lambda: peft.LoKrConfig(r=2, alpha=1, decompose_factor=4, use_effective_conv2d=True, **common),
        "lokr-full": lambda: peft.LoKrConfig(r=64, alpha=32, **common),
        "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=True, **common),
        "oft-exact": lambda: peft.OFTConfig(r=0, oft_block_size=8, use_cayley_neumann=False, **common),
        "oft-shared": lambda: peft.OFTConfig(r=0, oft_block_size=8, block_share=True, **common),
        "ia3-output": lambda: peft.IA3Config(feedforward_modules=[], **common),
        "ia3-input": lambda: peft.IA3Config(feedforward_modules=["layer"], **common),
    }[name]()


PEFT_ROLES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def peft_factors(model: Any, config: Any) -> reference_lora.Factors:
    """What peft would save, by the roles of reference_lora; alpha and IA3's side as its config gives them."""
    import peft

    prefix = "base_model.model.layer."
    saved = {
        key.removeprefix(prefix): value.detach().numpy() for key, value in peft.get_peft_model_state_dict(model).items()
    }
    if "ia3_l" in saved:
        return {"weight": saved["ia3_l"].reshape(-1) - 1, "on_input": np.array("layer" in config.feedforward_modules)}
    factors = {PEFT_ROLES.get(role, role): values for role, values in saved.items()}
    alpha = getattr(config, "lora_alpha", getattr(config, "alpha", None))
    if alpha is not None:
        root = config.r**0.5 if getattr(config, "use_rslora", False) else 1
        factors["alpha"] = np.array(alpha * root)
    return factors


def randomise_peft(model: Any) -> None:
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "base_layer" in key or not any(part in key for part in PEFT_PARTS):
                continue
            if "magnitude" in key or "ia3" in key:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.05 if "oft" in key else 0.3))


PEFT_PARTS = ("lora_", "hada_", "lokr_", "oft_", "ia3_")


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("name", PEFT_KINDS)
def test_formulas_agree_with_peft(name: str, layer_name: str) -> None:
    """The merged layer: of convolutions with a kernel peft's OFT computes something else unmerged."""
    import peft

    if name == "lora-bias" and layer_name == "no-bias":
        pytest.skip("peft cannot merge this")
    layer, original = LAYERS[layer_name](), LAYERS[layer_name]()
    original.load_state_dict(layer.state_dict())
    holder = torch.nn.Sequential()
    holder.add_module("layer", layer)
    config = peft_config(name)
    model = peft.get_peft_model(holder, config)
    randomise_peft(model)
    factors = peft_factors(model, config)
    merged = model.eval().merge_and_unload().layer
    weight, bias = (
        None if p is None else p.detach().numpy().astype(np.float64) for p in (original.weight, original.bias)
    )
    if name == "oft-exact":
        want = reference_lora.rotated_inputs(weight, factors["oft_R.weight"].astype(np.float64), terms=0)
    elif name == "lokr-full":  # peft divides by its config's rank even where there is none; LyCORIS does not
        want = weight + config.alpha / config.r * (reference_lora.changed(weight, factors) - weight)
    else:
        want = reference_lora.changed(weight, factors)
    assert np.std(want - weight) > 0.03 * np.std(weight)
    assert_close(merged.weight.detach().numpy(), want, 1e-6)
    if bias is not None:
        want_bias = reference_lora.changed_bias(bias, factors)
        if name == "ia3-output":  # peft scales all that the layer gives, LyCORIS the weight alone
            want_bias = bias * (1 + factors["weight"])
        assert_close(merged.bias.detach().numpy(), want_bias, 1e-6)


# ---- the engine against whole networks of peft and lycoris-lora ------------------------------------------

UNET_INPUTS = denoise("lora-unet", SD1, 9, 6, [250.0, 700.0])
TEXT_INPUTS = text("lora-text", SD1, 1)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVS = ["conv1", "conv2", "conv_shortcut", "proj_in", "proj_out", "downsamplers.0.conv", "upsamplers.0.conv"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(scope="module")
def contexts(all_kernels: Kernels, tiny_folder: Callable[[tiny.TinySD1], Path]) -> Iterator[dict[str, SDContext]]:
    """One that adds the change to each product, and one that writes it into the resident weights."""
    opened = {mode: SDContext(tiny_folder(SD1), threads=1, lora_mode=mode) for mode in ("runtime", "restore")}
    for context in opened.values():
        assert (context.info.kernels, context.info.precision) == (all_kernels.name, all_kernels.precision)
    yield opened
    for context in opened.values():
        context.close()


@pytest.fixture(scope="module")
def untouched(tiny_folder: Callable[[tiny.TinySD1], Path]) -> Callable[[str], Any]:
    """torch's network of that name without any adapter, a new one each time."""
    import diffusers
    import transformers

    kinds = {"unet": diffusers.UNet2DConditionModel, "text_encoder": transformers.CLIPTextModel}
    networks = cache(lambda part: kinds[part].from_pretrained(tiny_folder(SD1) / part))
    return lambda part: copy.deepcopy(networks(part))


def run_unet(network: Any, dtype: Any = torch.float32) -> np.ndarray:
    inputs = {name: torch.from_numpy(values).to(dtype) for name, values in UNET_INPUTS.inputs.items()}
    with torch.no_grad():
        return network.to(dtype)(inputs["latent"], inputs["time"], inputs["text"]).sample.float().numpy()


def run_text(network: Any, dtype: Any = torch.float32) -> np.ndarray:
    ids = torch.from_numpy(TEXT_INPUTS.inputs["ids"]).long()
    with torch.no_grad():
        return network.to(dtype)(ids).last_hidden_state.float().numpy()[None]


@dataclass(frozen=True)
class Adapted:
    """A file, what torch's network answers without and with it, and its own error there in bfloat16."""

    file: Path
    case: Any
    plain: np.ndarray
    want: np.ndarray
    rounded: float


# Asserts that the engine agrees with what a function gives, which is called for the first kernel set only.
Agrees = Callable[[Callable[[], list[Adapted]]], None]


@pytest.fixture
def assert_engine_agrees(contexts: dict[str, SDContext], all_kernels: Kernels, once: Callable[..., Any]) -> Agrees:
    """In each mode, and without a trace after it."""

    def agrees(adapt: Callable[[], list[Adapted]]) -> None:
        for adapted in once(adapt):
            network, inputs = adapted.case.network, adapted.case.inputs
            tolerance = all_kernels.tolerance(1e-5, of_torch=adapted.rounded)
            assert relative_rmse(adapted.want, adapted.plain) > 1e-3, "the adapter has no effect"
            for context in contexts.values():
                context.apply_loras({adapted.file: 1.0})
                (report,) = context.lora_reports
                assert report.is_complete, (report.skipped[:3], report.unmatched[:3], report.absent[:3])
                got = _native.probe_run(context._native, network, **inputs)
                assert_close(got, adapted.want, tolerance)
                context.apply_loras({})
                got = _native.probe_run(context._native, network, **inputs)
                assert_close(got, adapted.plain, all_kernels.tolerance(1e-5))

    return agrees


def of_part(part: str, untouched: Callable[[str], Any]) -> tuple[Any, Callable[[Any], np.ndarray], Any]:
    """torch's network of that name, how it is run, and on what."""
    is_text = part == "text_encoder"
    return untouched(part), run_text if is_text else run_unet, TEXT_INPUTS if is_text else UNET_INPUTS


def network_config(name: str, targets: list[str]) -> Any:
    """A config of `peft_config` for these modules of a network."""
    config = peft_config(name)
    config.target_modules = set(targets)
    if name == "ia3-input":
        config.feedforward_modules = set(targets)
    return config


@pytest.mark.parametrize("name", [name for name in PEFT_KINDS if not name.endswith("-tucker")])
@pytest.mark.parametrize("part", ["unet-linear", "unet-conv", "text"])
def test_peft_networks(
    name: str, part: str, assert_engine_agrees: Agrees, untouched: Callable[[str], Any], once_path: Path
) -> None:
    """A folder as peft saves it, on attention, on convolutions, and on the text encoder."""
    assert_engine_agrees(lambda: [adapted_by_peft(name, part, untouched, once_path / "adapter")])


def adapted_by_peft(name: str, part: str, untouched: Callable[[str], Any], folder: Path) -> Adapted:
    import peft

    network, run, case = of_part("text_encoder" if part == "text" else "unet", untouched)
    targets = {"unet-linear": ATTENTION, "unet-conv": CONVS, "text": PROJECTIONS}[part]
    if name == "lora-bias" and part == "unet-linear":
        targets = ["to_out.0"]  # the others have no bias to add to
    if name.startswith("oft") and part == "unet-conv":
        targets = ["conv_shortcut", "proj_in", "proj_out"]  # unmerged, peft's is another function for larger kernels
    plain = run(network)
    model = peft.get_peft_model(network, network_config(name, targets)).eval()
    randomise_peft(model)
    want = run(model.base_model.model)
    model.save_pretrained(folder)
    rounded = relative_rmse(run(model.base_model.model, torch.bfloat16), want)
    return Adapted(folder, case, plain, want, rounded)


def test_a_lora_that_diffusers_saves(
    assert_engine_agrees: Agrees, untouched: Callable[[str], Any], once_path: Path
) -> None:
    """Both components in one file, with alpha and rank in its metadata."""
    assert_engine_agrees(lambda: adapted_by_diffusers(untouched, once_path))


def adapted_by_diffusers(untouched: Callable[[str], Any], folder: Path) -> list[Adapted]:
    import diffusers
    import peft

    unet, text_encoder = untouched("unet"), untouched("text_encoder")
    plain = run_unet(unet), run_text(text_encoder)
    config = peft.LoraConfig(r=4, lora_alpha=1, target_modules=ATTENTION, rank_pattern={"attn2.to_k": 2})
    unet.add_adapter(config)
    text_encoder.add_adapter(peft.LoraConfig(r=4, lora_alpha=2, target_modules=PROJECTIONS))
    for network in (unet, text_encoder):
        randomise_peft(network)
    want = run_unet(unet), run_text(text_encoder)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=peft.get_peft_model_state_dict(unet),
        text_encoder_lora_layers=peft.get_peft_model_state_dict(text_encoder),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        text_encoder_lora_adapter_metadata=text_encoder.peft_config["default"].to_dict(),
    )
    (file,) = folder.glob("*.safetensors")
    rounded = run_unet(unet, torch.bfloat16), run_text(text_encoder, torch.bfloat16)
    cases = zip((UNET_INPUTS, TEXT_INPUTS), plain, want, rounded, strict=True)
    return [Adapted(file, case, before, there, relative_rmse(half, there)) for case, before, there, half in cases]


LYCORIS_NETWORKS: dict[str, dict[str, Any]] = {
    "locon": {"algo": "lora"},
    "locon-tucker": {"algo": "lora", "use_tucker": True},
    "locon-norms": {"algo": "lora", "train_norm": True},
    "dora": {"algo": "lora", "dora_wd": True},
    "dora-inputs": {"algo": "lora", "weight_decompose": True, "wd_on_out": False},
    "loha": {"algo": "loha"},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 4},
    "lokr-full": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr-tucker": {"algo": "lokr", "factor": 4, "use_tucker": True},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
    "glora": {"algo": "glora"},
    "oft": {"algo": "diag-oft"},
    "oft-rescaled": {"algo": "diag-oft", "constraint": 0.01, "rescaled": True},
    "boft": {"algo": "boft"},
}


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
@pytest.mark.parametrize("name", LYCORIS_NETWORKS)
def test_lycoris_networks(
    name: str, part: str, assert_engine_agrees: Agrees, untouched: Callable[[str], Any], once_path: Path
) -> None:
    """All modules of a network, in the file that the wrapper writes."""
    assert_engine_agrees(lambda: [adapted_by_lycoris(name, part, untouched, once_path)])


def adapted_by_lycoris(name: str, part: str, untouched: Callable[[str], Any], folder: Path) -> Adapted:
    import lycoris
    from safetensors.torch import save_file

    network, run, case = of_part(part, untouched)
    plain = run(network)
    options = dict(LYCORIS_NETWORKS[name])
    dims = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0}
    wrapper = lycoris.create_lycoris(network, 1.0, **dims, **options)
    wrapper.apply_to()
    if options["algo"] == "full":
        fine_tune(wrapper)
    else:
        randomise(wrapper, 0.1)
    want = run(network)
    file = folder / "lycoris.safetensors"
    save_file({key: value.contiguous() for key, value in wrapper.state_dict().items()}, file)
    wrapper.to(torch.bfloat16)
    return Adapted(file, case, plain, want, relative_rmse(run(network, torch.bfloat16), want))
