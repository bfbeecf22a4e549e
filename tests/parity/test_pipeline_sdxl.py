"""Whole runs of SD 2.x and SDXL against diffusers' pipelines, tokenizers included: from a prompt and a seed to a
latent and pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import tiny
import tiny_sdxl
from cases import SD2, SD2_V_DEEP, SDXL, SDXL_DEEP, SSD_1B
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels
from tiny_sdxl import SDXL_V

from sdcpp_py import SDContext, _native

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = [pytest.mark.parity, pytest.mark.usefixtures("kernels")]

Once = Callable[..., Any]
PROMPT, NEGATIVE, SEED, STEPS = "a red heart, soft light", "blurry", 11, 9
REQUEST: dict[str, Any] = {"steps": STEPS, "cfg_scale": 5.0, "seed": SEED, "sampler": "euler", "scheduler": "normal"}
PICTURE = (np.indices((64, 80)).sum(axis=0)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)
IDS = {SD2: "sd2", SD2_V_DEEP: "sd2-v-inpainting", SDXL: "sdxl", SDXL_DEEP: "sdxl-inpainting", SSD_1B: "ssd-1b"}


class Truth:
    """A tiny model's folder opened by diffusers."""

    def __init__(self, model: tiny.TinySD1, folder: Path) -> None:
        from reference_networks import open_parts
        from reference_tokens import clip_tokenizer

        self.model, self.parts = model, open_parts(folder)
        self.parts["tokenizer"] = clip_tokenizer("!" if model.open_clip else "<|endoftext|>", 77)
        if model.text_2_width:
            self.parts["tokenizer_2"] = clip_tokenizer("!", 77)

    def pipeline(self, task: str = "", spacing: str = "linspace") -> Any:
        """Stable diffusion's pipeline of this task: "", "Img2Img" or "Inpaint"."""
        import diffusers

        scheduler = diffusers.EulerDiscreteScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=self.model.prediction,
            timestep_spacing=spacing,
            steps_offset=1,
            rescale_betas_zero_snr=self.model.zero_snr,
        )
        extra: dict[str, Any] = {"add_watermarker": False}
        if not self.model.text_2_width:
            extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        kind = getattr(diffusers, self.model.pipeline.replace("Pipeline", f"{task}Pipeline"))
        pipe = kind(**self.parts, scheduler=scheduler, **extra)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def paint(self, task: str = "", spacing: str = "linspace", **arguments: Any) -> np.ndarray:
        """The latent that the pipeline ends with."""
        arguments = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent"} | arguments
        return self.pipeline(task, spacing)(prompt=PROMPT, negative_prompt=NEGATIVE, **arguments).images.numpy()

    def encode(self, rgb: np.ndarray) -> np.ndarray:
        """The mean of the latent, scaled."""
        import torch

        image = torch.from_numpy(rgb.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
        with torch.no_grad():
            return self.parts["vae"].encode(image).latent_dist.mean.numpy() * np.float32(self.model.vae_scale)

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Rows of 8-bit RGB."""
        import torch

        with torch.no_grad():
            image = self.parts["vae"].decode(torch.from_numpy(latent / self.model.vae_scale)).sample.numpy()
        return np.round(np.clip(image * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def noise(height: int, width: int) -> Any:
    import torch

    return torch.randn((1, 4, height // 8, width // 8), generator=torch.Generator().manual_seed(SEED))


def latent_of(context: SDContext) -> np.ndarray:
    return _native.probe_latent(context._native)


@pytest.fixture(scope="module")
def truth_of(tiny_folder: Callable[..., Path]) -> Callable[[tiny.TinySD1], Truth]:
    """Of a model: opened once."""
    return cache(lambda model: Truth(model, tiny_folder(model)))


@pytest.fixture(scope="module", params=[SD2, SDXL], ids=IDS.get)
def pair(
    request: pytest.FixtureRequest, kernels: Kernels, truth_of: Callable[..., Truth], tiny_folder: Callable[..., Path]
) -> Iterator[tuple[SDContext, Truth]]:
    with SDContext(tiny_folder(request.param), threads=1) as context:
        yield context, truth_of(request.param)


def test_text_to_image(pair: tuple[SDContext, Truth], once: Once) -> None:
    context, truth = pair
    image = context.generate(PROMPT, NEGATIVE, width=96, height=64, **REQUEST)
    want = once(lambda: truth.paint(latents=noise(64, 96), width=96, height=64))
    assert_close(latent_of(context), want, tolerance=1e-3)
    picture = once(lambda: truth.decode(want)[0], "pixels")
    levels = np.abs(np.asarray(image).astype(int) - picture.astype(int))
    assert np.mean(levels <= 1) >= 0.999


# Whole runs below compare to 1e-4: both sides are float32, and 2e-6 to 2e-5 apart.
# Ours, and what StableDiffusionXLPipeline calls it, with the height first.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "original": ({"original_size": (48, 16)}, {"original_size": (16, 48)}),
    "all": (
        {"original_size": (48, 16), "crop_top_left": (8, 24), "target_size": (80, 32)},
        {"original_size": (16, 48), "crops_coords_top_left": (8, 24), "target_size": (32, 80)},
    ),
    "negative": (
        {"negative_original_size": (24, 16), "negative_crop_top_left": (4, 12), "negative_target_size": (40, 56)},
        {
            "negative_original_size": (16, 24),
            "negative_crops_coords_top_left": (4, 12),
            "negative_target_size": (56, 40),
        },
    ),
}


@pytest.mark.parametrize("told", SIZES)
def test_sizes_that_sdxl_is_told(
    told: str, tiny_folder: Callable[..., Path], truth_of: Callable[..., Truth], once: Once
) -> None:
    ours, theirs = SIZES[told]
    truth = truth_of(SDXL)
    usual = once(lambda: truth.paint(latents=noise(64, 96), width=96, height=64), "usual")
    want = once(lambda: truth.paint(latents=noise(64, 96), width=96, height=64, **theirs))
    assert relative_rmse(want, usual) > 0.01, "the sizes have no effect"
    with SDContext(tiny_folder(SDXL), threads=1) as context:
        context.generate(PROMPT, NEGATIVE, width=96, height=64, **REQUEST, **ours)
        assert_close(latent_of(context), want, tolerance=1e-4)


def test_image_to_image(pair: tuple[SDContext, Truth], once: Once) -> None:
    import torch

    context, truth = pair
    context.generate(PROMPT, NEGATIVE, init_image=PICTURE, strength=0.75, **REQUEST)
    # Latents are taken as they are; XL's pipeline would not know the picture's size from them.
    size = {"original_size": (64, 80), "target_size": (64, 80)} if truth.model.text_2_width else {}
    want = once(
        lambda: truth.paint(
            "Img2Img",
            image=torch.from_numpy(truth.encode(PICTURE)),
            strength=0.75,
            generator=torch.Generator().manual_seed(SEED),
            **size,
        ),
    )
    assert_close(latent_of(context), want, tolerance=1e-3)


@pytest.mark.parametrize("model", [SD2_V_DEEP, SDXL_DEEP], ids=IDS.get)
def test_a_model_made_for_inpainting_repaints_all(
    model: tiny.TinySD1, tiny_folder: Callable[..., Path], truth_of: Callable[..., Truth], once: Once
) -> None:
    """Nine input channels: latent, mask, and a picture of which nothing is kept."""
    import torch

    truth = truth_of(model)
    with SDContext(tiny_folder(model), threads=1) as context:
        context.generate(PROMPT, NEGATIVE, width=64, height=64, **REQUEST)
        got = latent_of(context)
    grey = np.full((64, 64, 3), 127.5, np.float32)
    want = once(
        lambda: truth.paint(
            "Inpaint",
            image=torch.from_numpy(grey.transpose(2, 0, 1)[None] / 127.5 - 1),
            mask_image=torch.ones((1, 1, 64, 64)),
            masked_image_latents=torch.from_numpy(truth.encode(grey)),
            latents=noise(64, 64),
            strength=1.0,
            width=64,
            height=64,
        ),
    )
    assert_close(got, want, tolerance=1e-3)


ZERO_SNR = REQUEST | {"steps": 10, "scheduler": "simple", "width": 96, "height": 64}  # "simple": diffusers' trailing


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_zero_terminal_snr(
    rescale: float, tiny_folder: Callable[..., Path], truth_of: Callable[..., Truth], once: Once
) -> None:
    """v-prediction from noise alone, as scheduler_config.json asks for, also with Lin et al.'s rescaled guidance."""
    truth = truth_of(SDXL_V)
    size = {"num_inference_steps": 10, "width": 96, "height": 64, "spacing": "trailing"}
    # diffusers scales the first latent by the highest sigma itself.
    want = once(lambda: truth.paint(latents=noise(64, 96), guidance_rescale=rescale, **size))
    with SDContext(tiny_folder(SDXL_V), threads=1) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("v", True)
        context.generate(PROMPT, NEGATIVE, **ZERO_SNR, guidance_rescale=rescale)
        assert_close(latent_of(context), want, tolerance=1e-4)
        if rescale:
            context.generate(PROMPT, NEGATIVE, **ZERO_SNR)
            assert relative_rmse(latent_of(context), want) > 0.01, "rescaling has no effect"
    with SDContext(tiny_folder(SDXL_V), zero_snr=False, threads=1) as context:
        context.generate(PROMPT, NEGATIVE, **ZERO_SNR, guidance_rescale=rescale)
        assert relative_rmse(latent_of(context), want) > 0.01, "the noise levels have no effect"


def test_ssd_1b_paints(tiny_folder: Callable[..., Path], truth_of: Callable[..., Truth], once: Once) -> None:
    want = once(lambda: truth_of(SSD_1B).paint(latents=noise(64, 96), width=96, height=64))
    with SDContext(tiny_folder(SSD_1B), threads=1) as context:
        context.generate(PROMPT, NEGATIVE, width=96, height=64, **REQUEST)
        assert_close(latent_of(context), want, tolerance=1e-4)


@pytest.mark.parametrize("mode", ["runtime", "restore"])
def test_multipliers_of_each_part_are_diffusers(
    mode: str, tiny_folder: Callable[..., Path], once: Once, once_path: Path
) -> None:
    """kohya's lora_te1_, lora_te2_ and lora_unet_ as set_adapters weighs the same factors."""
    loras, want = once(lambda: weighed_by_diffusers(tiny_folder(SDXL), once_path))
    with SDContext(tiny_folder(SDXL), lora_dir=loras, lora_mode=mode, threads=1) as context:
        request = REQUEST | {"width": 64, "height": 64}
        context.generate(f"{PROMPT}<lora:x:te=0.4:te2=0.9:unet=-0.5>", NEGATIVE, **request)
        assert_close(latent_of(context), want, tolerance=1e-4)
        context.generate(f"{PROMPT}<lora:x:te=0.4:unet=-0.5>", NEGATIVE, **request)
        assert relative_rmse(latent_of(context), want) > 0.01, "te2 has no effect"


def weighed_by_diffusers(folder: Path, loras: Path) -> tuple[Path, np.ndarray]:
    """The folder with x.safetensors, and the latent that SDXL's pipeline paints with it."""
    import peft
    import torch

    truth = Truth(SDXL, folder)
    attention = [path for path in lora_files.modules("linear", "unet text_encoder text_encoder_2", SDXL)
                 if path.endswith((".to_q", ".to_v", ".q_proj", ".v_proj"))]  # fmt: skip
    update = lora_files.random_update(attention, seed=3, model=SDXL)
    lora_files.save(loras / "x.safetensors", lora_files.tensors_of(update, lora_files.numbered))
    pipe = truth.pipeline()
    for part in ("text_encoder", "text_encoder_2", "unet"):
        network = getattr(pipe, part)
        network.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v", "q_proj", "v_proj"]), "x"
        )
        for name, module in network.named_modules():
            for path, factors in update.items() if hasattr(module, "lora_A") and name else ():
                if path.startswith(f"{part}.") and path.endswith(f".{name}"):
                    module.lora_A["x"].weight.data = torch.from_numpy(factors["lora_down.weight"])
                    module.lora_B["x"].weight.data = torch.from_numpy(factors["lora_up.weight"])
    pipe.set_adapters("x", {"text_encoder": 0.4, "text_encoder_2": 0.9, "unet": -0.5})
    want = pipe(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        latents=noise(64, 64),
        width=64,
        height=64,
        output_type="latent",
    ).images.numpy()
    return loras, want


def test_more_text_than_one_window(
    tiny_folder: Callable[..., Path], truth_of: Callable[..., Truth], once: Once
) -> None:
    """SDXL: chunks side by side, weights by encoder, the picture's vector from the first chunk."""
    want = once(lambda: painted_of_two_windows(truth_of(SDXL)))
    with SDContext(tiny_folder(SDXL), threads=1) as context:
        request = REQUEST | {"steps": 2, "cfg_scale": 1.0, "width": 64, "height": 64}
        context.generate("a red heart BREAK (blue sea:1.5)", **request)
        assert_close(latent_of(context), want, tolerance=1e-3)


def painted_of_two_windows(truth: Truth) -> np.ndarray:
    import torch

    pipe = truth.pipeline()
    first, _, pooled, _ = pipe.encode_prompt("a red heart", do_classifier_free_guidance=False)
    second, *_ = pipe.encode_prompt("blue sea", do_classifier_free_guidance=False)
    weights = torch.ones((1, 77, 1))
    weights[:, 1:3] = 1.5
    parts = []
    for part in second.split([SDXL.text_width, SDXL.text_2_width], dim=-1):
        weighted = part * weights
        parts.append(weighted * (part.mean() / weighted.mean()))
    return pipe(
        prompt_embeds=torch.cat([first, torch.cat(parts, dim=-1)], dim=1),
        pooled_prompt_embeds=pooled,
        guidance_scale=1.0,
        num_inference_steps=2,
        latents=noise(64, 64),
        width=64,
        height=64,
        output_type="latent",
    ).images.numpy()


@pytest.mark.parametrize("model", [SD2, SDXL, SSD_1B], ids=IDS.get)
def test_a_single_file_paints_the_same(model: tiny.TinySD1, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    request = REQUEST | {"width": 64, "height": 64, "steps": 2}
    latents = []
    for path in (tiny_folder(model), tiny_sdxl.write_single(model, tmp_path / "single.safetensors")):
        with SDContext(path, threads=1) as context:
            context.generate(PROMPT, NEGATIVE, **request)
            latents.append(latent_of(context))
    np.testing.assert_array_equal(*latents)
