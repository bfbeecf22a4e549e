"""Adapters of peft and lycoris-lora on SD 2.x and SDXL: UNets with a vector, and OpenCLIP's fused projections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sdxl
from cases import SD2, SDXL, Case, denoise, text
from closeness import assert_close, relative_rmse

from sdcpp_py import SDContext, _native

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

# Of single files: projections that the networks of torch have apart are fused there, and one matrix transposed.
PARTS = {
    "sd2-unet": (SD2, "unet"),
    "sd2-text": (SD2, "text_encoder"),
    "sdxl-unet": (SDXL, "unet"),
    "sdxl-text": (SDXL, "text_encoder"),
    "sdxl-text-2": (SDXL, "text_encoder_2"),
}
PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Part:
    """One network: torch's, and the engine's in each mode."""

    model: tiny.TinySD1
    name: str
    network: Any
    contexts: dict[str, SDContext]

    @property
    def cases(self) -> list[Case]:
        if self.name == "unet":
            return [denoise("lora", self.model, 8, 6, [250.0])]
        cases = [text("lora", self.model, 2, n=1)]
        return [*cases, text("lora", self.model, 2, "pooled", n=1)] if self.name == "text_encoder_2" else cases

    @torch.no_grad()
    def truth(self, dtype: Any = torch.float64) -> list[np.ndarray]:
        """In float64: with strong adapters torch's own float32 is up to 2e-5 away from it."""
        self.network.to(dtype)
        out = [self._run(case, dtype) for case in self.cases]
        self.network.float()
        return out

    def _run(self, case: Case, dtype: Any) -> np.ndarray:
        inputs = {name: torch.from_numpy(values).to(dtype) for name, values in case.inputs.items()}
        if case.network == "denoise":
            told = {"text_embeds": inputs.get("pooled"), "time_ids": inputs.get("sizes")}
            return self.network(inputs["latent"], inputs["time"], inputs["text"], added_cond_kwargs=told).sample.numpy()
        ids = inputs["ids_2" if self.name == "text_encoder_2" else "ids"].long()
        out = self.network(ids, output_hidden_states=True)
        if case.network == "pooled":
            return out.text_embeds.numpy()[None, None]
        if self.model.text_2_width:
            return out.hidden_states[-2].numpy()[None]
        return out.last_hidden_state.numpy()[None]

    def engine(self, mode: str) -> list[np.ndarray]:
        out = []
        for case in self.cases:
            got = _native.probe_run(self.contexts[mode]._native, case.network, **case.inputs)
            if case.network == "text" and self.model.text_2_width:  # both encoders side by side
                first = self.model.text_width
                got = got[..., :first] if self.name == "text_encoder" else got[..., first:]
            out.append(got)
        return out


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[tiny.TinySD1], dict[str, SDContext]]]:
    folder = tmp_path_factory.mktemp("single")
    opened: dict[tiny.TinySD1, dict[str, SDContext]] = {}

    def of(model: tiny.TinySD1) -> dict[str, SDContext]:
        if model not in opened:
            path = tiny_sdxl.write_single(model, folder / f"{len(opened)}.safetensors")
            opened[model] = {mode: SDContext(path, threads=1, lora_mode=mode) for mode in ("runtime", "restore")}
        return opened[model]

    yield of
    for modes in opened.values():
        for context in modes.values():
            context.close()


@pytest.fixture(params=PARTS)
def part(
    request: pytest.FixtureRequest,
    tiny_folder: Callable[..., Path],
    contexts: Callable[[tiny.TinySD1], dict[str, SDContext]],
) -> Part:
    from reference_networks import open_parts

    model, name = PARTS[request.param]
    return Part(model, name, open_parts(tiny_folder(model))[name], contexts(model))


def assert_engine_agrees(part: Part, file: Path, plain: list[np.ndarray], want: list[np.ndarray]) -> None:
    """In both modes, and without a trace after it."""
    assert relative_rmse(want[-1], plain[-1]) > 1e-3, "the adapter has no effect"
    for mode, context in part.contexts.items():
        context.apply_loras({file: 1.0})
        (report,) = context.lora_reports
        assert report.is_complete, (report.skipped[:3], report.unmatched[:3], report.absent[:3])
        for got, there in zip(part.engine(mode), want, strict=True):
            assert_close(got, there, 1e-5)
        context.apply_loras({})
        for got, there in zip(part.engine(mode), plain, strict=True):
            assert_close(got, there, 1e-5)


def randomise(module: Any, size: float) -> None:
    """Adapters begin as no change at all: draws all that is trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "magnitude" in name or "dora_scale" in name or "rescale" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            else:
                parameter.copy_(torch.randn_like(parameter) * size)


PEFT = {
    "lora": {"r": 4, "lora_alpha": 2},
    "rslora": {"r": 4, "lora_alpha": 2, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 2, "use_dora": True},
}


@pytest.mark.parametrize("name", PEFT)
def test_what_diffusers_saves(name: str, part: Part, tmp_path: Path) -> None:
    """One component's adapter of peft in the file of a pipeline, with alpha and ranks in its metadata."""
    import diffusers
    import peft

    plain = part.truth()
    part.network.add_adapter(peft.LoraConfig(target_modules=TARGETS, **PEFT[name]))
    trained = [(n, p) for n, p in part.network.named_parameters() if "lora_" in n]
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in trained:
            if "magnitude" in key:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.4))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    want = part.truth()
    kind = diffusers.StableDiffusionXLPipeline if part.model.text_2_width else diffusers.StableDiffusionPipeline
    kind.save_lora_weights(
        tmp_path,
        **{f"{part.name}_lora_layers": peft.get_peft_model_state_dict(part.network)},
        **{f"{part.name}_lora_adapter_metadata": part.network.peft_config["default"].to_dict()},
    )
    (file,) = tmp_path.glob("*.safetensors")
    assert_engine_agrees(part, file, plain, want)


LYCORIS: dict[str, tuple[float, dict[str, Any]]] = {  # the size of random factors, and options
    "locon": (0.1, {"algo": "lora", "train_norm": True}),
    "dora-inputs": (0.1, {"algo": "lora", "weight_decompose": True, "wd_on_out": False}),
    "loha": (0.1, {"algo": "loha"}),
    "lokr": (0.1, {"algo": "lokr", "factor": 4}),
    "full": (0.02, {"algo": "full"}),
    "ia3": (0.1, {"algo": "ia3"}),
    "glora": (0.1, {"algo": "glora"}),
    "oft": (0.1, {"algo": "diag-oft", "constraint": 0.01, "rescaled": True}),
    "boft": (0.1, {"algo": "boft"}),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_networks(name: str, part: Part, tmp_path: Path) -> None:
    """All modules of a network, under the prefix by which kohya's trainer tells encoders apart."""
    lycoris = pytest.importorskip("lycoris")
    from safetensors.torch import save_file

    plain = part.truth()
    size, options = LYCORIS[name]
    dims = {"linear_dim": 4, "linear_alpha": 2.0, "conv_dim": 4, "conv_alpha": 2.0}
    wrapper = lycoris.create_lycoris(part.network, 1.0, **dims, **options)
    wrapper.apply_to()
    randomise(wrapper, size)
    dtype = torch.float32 if "oft" in name else torch.float64  # those have constants of float32
    wrapper.to(dtype)
    want = part.truth(dtype)
    wrapper.float()
    file = tmp_path / "lycoris.safetensors"
    renamed = {
        key.replace("lycoris_", PREFIXES[part.name], 1): value.contiguous()
        for key, value in wrapper.state_dict().items()
    }
    save_file(renamed, file)
    assert_engine_agrees(part, file, plain, want)
