"""Whole pictures of the model that ships with the LoRAs that ship, against diffusers with peft and LyCORIS.

Both run the weights of the shipped file as dequantised, in float32, from one noise with one sampler. diffusers reads
the two LoRAs through load_lora_weights; LoHa it refuses, so LyCORIS, which trained that one, puts it in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shipped
import tiny
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels

from sdcpp_py import SDContext, _native
from sdcpp_py.files import data_dir, shipped_model

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

SHAPE = tiny.TinySD1(
    unet_widths=(64, 96, 128), unet_attends=(True, True, False), unet_blocks=1, heads=8,
    text_width=128, text_layers=2, vae_widths=(16, 32, 64, 96), vae_blocks=1,
)  # fmt: skip
PROMPT, SEED, STEPS, SCALE = "dog face", 7, 9, 5.0
FOLDER = shipped_model().parent

STATES: dict[str, dict[str, float]] = {
    "none": {},
    "kohya with convolutions and text encoder": {"line": 1.0},
    "diffusers": {"night": 0.8},
    "LyCORIS LoHa": {"pastel": 1.0},
    "two": {"line": 0.7, "night": 0.4},
    "one against the other": {"line": 1.2, "night": -0.3},
    "all three": {"line": 0.5, "night": 0.3, "pastel": 0.6},
}


def components(context: SDContext) -> dict[str, Any]:
    """The shipped weights in the modules of diffusers and transformers."""
    import diffusers
    import transformers

    config = tiny.configs(SHAPE)
    sizes = {key: value for key, value in config["text_encoder"].items() if key not in ("architectures", "model_type")}
    modules = {
        "unet": diffusers.UNet2DConditionModel.from_config(config["unet"]),
        "vae": diffusers.AutoencoderKL.from_config(config["vae"]),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)),
    }
    values = shipped.weights()
    named = {w["diffusers_name"]: values[w["name"]] for w in _native.probe_weights(context._native)}
    for part, module in modules.items():
        state = module.state_dict()
        prefix = f"{part}." if f"{part}.{next(iter(state))}" in named else f"{part}.text_model."
        mine = {name: torch.from_numpy(named[prefix + name]).reshape(state[name].shape) for name in state}
        module.load_state_dict(mine)
        module.eval()
    return modules


class Truth:
    """A pipeline of the shipped weights, with no LoRA in it."""

    def __init__(self, context: SDContext) -> None:
        import diffusers

        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        self.networks: list[Any] = []  # of LyCORIS, which the pipeline does not know
        self.pipe = diffusers.StableDiffusionPipeline(
            **components(context),
            scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="linspace", steps_offset=1, **betas),
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        self.pipe.set_progress_bar_config(disable=True)

    def states(self, text: str) -> Any:
        ids = _native.probe_clip_tokens(str(data_dir() / "clip_merges.txt"), text).tolist()
        row = ([49406, *ids] + [49407] * 77)[:77]
        with torch.no_grad():
            return self.pipe.text_encoder(torch.tensor([row])).last_hidden_state

    def apply(self, state: dict[str, float]) -> None:
        if "pastel" in state:
            self.apply_loha(FOLDER / "pastel.safetensors", state["pastel"])
        peft = {name: multiplier for name, multiplier in state.items() if name != "pastel"}
        for name in peft:
            self.pipe.load_lora_weights(FOLDER, weight_name=f"{name}.safetensors", adapter_name=name)
        if peft:
            self.pipe.set_adapters(list(peft), list(peft.values()))

    def apply_loha(self, path: Path, multiplier: float) -> None:
        """Through LyCORIS's wrapper of any module, whose names begin otherwise than those of its trainer."""
        import lycoris
        from safetensors.torch import load_file

        weights = {key.replace("lora_unet_", "lycoris_"): value.float() for key, value in load_file(path).items()}
        network, _ = lycoris.create_lycoris_from_weights(multiplier, None, self.pipe.unet, weights)
        assert len(network.loras) == len({key.partition(".")[0] for key in weights})
        network.apply_to()
        network.load_state_dict(weights)
        network.eval()
        self.networks.append(network)

    def paint(self, state: dict[str, float], dtype: Any = torch.float32) -> tuple[np.ndarray, np.ndarray]:
        """With these LoRAs, computed in that precision: the latent, and the picture's 8-bit values."""
        self.apply(state)
        for part in (self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, *self.networks):
            part.to(dtype)
        noise = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(SEED)).to(dtype)
        with torch.no_grad():
            latent = self.pipe(
                prompt_embeds=self.states(PROMPT), negative_prompt_embeds=self.states(""),
                num_inference_steps=STEPS, guidance_scale=SCALE, output_type="latent", latents=noise,
            ).images  # fmt: skip
            image = self.pipe.vae.decode(latent / 0.18215).sample
        latent, image = latent.float(), image.float()
        return latent.numpy(), np.round(image.numpy().clip(-1, 1) * 127.5 + 127.5).transpose(0, 2, 3, 1)[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shipped.write_as(tmp_path_factory.mktemp("shipped") / "f32.gguf", np.float32)


@pytest.fixture(scope="module", params=["runtime", "restore"])
def context(request: pytest.FixtureRequest, all_kernels: Kernels, model: Path) -> Iterator[SDContext]:
    with SDContext(model, threads=1, lora_dir=FOLDER, lora_mode=request.param) as opened:
        yield opened


@pytest.mark.parametrize("name", STATES)
def test_a_picture_is_that_of_diffusers(
    name: str, context: SDContext, all_kernels: Kernels, once: Callable[..., Any]
) -> None:
    """In float32 sums of another order are 2e-6 apart after 9 steps, and pixels within a grey level; in bf16 both are
    as far from that as torch's own bfloat16 is, a tenth left to luck."""
    base, _ = once(lambda: Truth(context).paint({}), "base")
    want, picture = once(lambda: Truth(context).paint(STATES[name]))
    image = context.generate(
        PROMPT, loras=STATES[name], steps=STEPS, cfg_scale=SCALE, seed=SEED, sampler="euler", scheduler="normal"
    )
    got = _native.probe_latent(context._native)
    levels = np.abs(np.asarray(image).astype(int) - picture.astype(int))
    if all_kernels.precision == "bf16":
        rounded, coarse = once(lambda: Truth(context).paint(STATES[name], torch.bfloat16), "bfloat16")
        assert_close(got, want, 1.1 * relative_rmse(rounded, want))
        assert np.mean(levels) <= 1.1 * np.mean(np.abs(coarse - picture))
    else:
        assert_close(got, want, 1e-4)
        assert np.mean(levels <= 1) >= 0.999, f"up to {levels.max()} grey levels"
    assert name == "none" or relative_rmse(want, base) > 0.02, "the LoRA has no effect"
