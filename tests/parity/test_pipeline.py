"""Whole runs against diffusers' pipelines on the same tiny weights: from a prompt and a seed to pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cases import SD1, SD1_DEEP
from closeness import assert_close
from kernel_sets import Kernels

from sdcpp_py import SDContext, _native
from sdcpp_py.files import data_dir

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

Once = Callable[..., Any]

# 9 steps divide the 999 timesteps evenly: some of diffusers' schedulers round the others to whole ones.
PROMPT, NEGATIVE, SEED, STEPS = "a red heart, soft light", "blurry", 11, 9

# ours: (sampler, scheduler); theirs: a scheduler class and what it is configured with.
SCHEDULERS = {
    "euler": ("euler", "normal", "EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    "dpm++2m": (
        "dpm++2m",
        "sgm_uniform",
        "DPMSolverMultistepScheduler",
        {"final_sigmas_type": "zero", "timestep_spacing": "linspace"},
    ),
    "heun": ("heun", "normal", "HeunDiscreteScheduler", {"timestep_spacing": "linspace"}),
}


def scheduler(name: str, prediction: str = "epsilon") -> Any:
    import diffusers

    _, _, kind, options = SCHEDULERS[name]
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return getattr(diffusers, kind)(num_train_timesteps=1000, prediction_type=prediction, **betas, **options)


class Truth:
    """A tiny model's folder opened by diffusers."""

    def __init__(self, folder: Path) -> None:
        import diffusers
        import transformers

        self.parts: dict[str, Any] = {
            "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
            "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
            "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "tokenizer": None,
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

    def states(self, text: str) -> Any:
        import torch

        ids = _native.probe_clip_tokens(str(data_dir() / "clip_merges.txt"), text)
        row = [49406, *ids.tolist(), 49407]
        row += [49407] * (77 - len(row))
        with torch.no_grad():
            return self.parts["text_encoder"](torch.tensor([row])).last_hidden_state

    def paint(self, pipeline: str, scheduler: Any, **arguments: Any) -> np.ndarray:
        """The latent that the pipeline ends with."""
        import diffusers

        pipe = getattr(diffusers, pipeline)(**self.parts, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt_embeds=self.states(PROMPT),
            negative_prompt_embeds=self.states(NEGATIVE),
            num_inference_steps=STEPS,
            guidance_scale=5.0,
            output_type="latent",
            **arguments,
        ).images.numpy()

    def paint_states(self, states: Any, steps: int) -> np.ndarray:
        """The latent of these states without guidance."""
        import diffusers

        pipe = diffusers.StableDiffusionPipeline(**self.parts, scheduler=scheduler("euler"))
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt_embeds=states,
            num_inference_steps=steps,
            guidance_scale=1.0,
            output_type="latent",
            latents=noise(64, 64),
        ).images.numpy()

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Rows of 8-bit RGB."""
        import torch

        with torch.no_grad():
            image = self.parts["vae"].decode(torch.from_numpy(latent / 0.18215)).sample.numpy()
        return np.round(np.clip(image * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)

    def encode(self, rgb: np.ndarray) -> np.ndarray:
        """The mean of the latent, scaled."""
        import torch

        image = torch.from_numpy(rgb.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
        with torch.no_grad():
            return self.parts["vae"].encode(image).latent_dist.mean.numpy() * np.float32(0.18215)


def noise(height: int, width: int, seed: int = SEED) -> Any:
    import torch

    return torch.randn((1, 4, height // 8, width // 8), generator=torch.Generator().manual_seed(seed))


def latent_of(context: SDContext) -> np.ndarray:
    return _native.probe_latent(context._native)


def assert_same_pixels(image: Any, want: np.ndarray) -> None:
    """At most one grey level apart on 99.9 % of the values: the latents agree to 1e-3."""
    levels = np.abs(np.asarray(image).astype(int) - want.astype(int))
    assert np.mean(levels <= 1) >= 0.999, (
        f"{np.mean(levels > 1):.2%} of the values differ by more, up to {levels.max()}"
    )


@pytest.fixture(scope="module")
def truth(tiny_folder: Callable[[tiny.TinySD1], Path]) -> Truth:
    return Truth(tiny_folder(SD1))


@pytest.fixture(scope="module")
def context(kernels: Kernels, tiny_folder: Callable[[tiny.TinySD1], Path]) -> Iterator[SDContext]:
    with SDContext(tiny_folder(SD1), threads=1) as opened:
        yield opened


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (72, 56)], ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_to_image(name: str, size: tuple[int, int], context: SDContext, truth: Truth, once: Once) -> None:
    width, height = size
    ours = SCHEDULERS[name]
    image = context.generate(
        PROMPT,
        NEGATIVE,
        width=width,
        height=height,
        steps=STEPS,
        cfg_scale=5.0,
        seed=SEED,
        sampler=ours[0],
        scheduler=ours[1],
    )
    theirs = scheduler(name)
    # A scheduler in variance-preserving variables begins with noise of size 1, where we begin with sigma's share.
    share = (1 - theirs.alphas_cumprod[-1]) ** 0.5 if float(theirs.init_noise_sigma) == 1 else 1
    start = noise(height, width) * share
    want = once(lambda: truth.paint("StableDiffusionPipeline", theirs, latents=start))
    assert_close(latent_of(context), want, tolerance=1e-3)
    assert_same_pixels(image, once(lambda: truth.decode(want)[0], "pixels"))


@pytest.mark.usefixtures("kernels")
def test_v_prediction(tiny_folder: Callable[[tiny.TinySD1], Path], once: Once) -> None:
    folder = tiny_folder(tiny.TinySD1(prediction="v_prediction"))
    theirs = scheduler("euler", "v_prediction")
    want = once(lambda: Truth(folder).paint("StableDiffusionPipeline", theirs, latents=noise(64, 64)))
    with SDContext(folder, threads=1) as context:
        assert context.info.prediction == "v"
        context.generate(PROMPT, NEGATIVE, steps=STEPS, cfg_scale=5.0, seed=SEED, sampler="euler", scheduler="normal")
        assert_close(latent_of(context), want, tolerance=1e-3)


def test_without_guidance(context: SDContext, truth: Truth, once: Once) -> None:
    """cfg_scale 1 runs the denoiser on the prompt alone."""
    context.generate(PROMPT, NEGATIVE, steps=STEPS, cfg_scale=1.0, seed=SEED, sampler="euler", scheduler="normal")
    want = once(lambda: truth.paint_states(truth.states(PROMPT), STEPS))
    assert_close(latent_of(context), want, tolerance=1e-3)


PICTURE = (np.indices((64, 80)).sum(axis=0)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)


@pytest.mark.parametrize("strength", [0.34, 0.75, 1.0])
def test_image_to_image(strength: float, context: SDContext, truth: Truth, once: Once) -> None:
    import torch

    context.generate(
        PROMPT,
        NEGATIVE,
        init_image=PICTURE,
        strength=strength,
        steps=STEPS,
        cfg_scale=5.0,
        seed=SEED,
        sampler="euler",
        scheduler="normal",
    )
    want = once(
        lambda: truth.paint(
            "StableDiffusionImg2ImgPipeline",
            scheduler("euler"),
            image=torch.from_numpy(truth.encode(PICTURE)),
            strength=strength,
            generator=torch.Generator().manual_seed(SEED),
        ),
    )
    assert_close(latent_of(context), want, tolerance=1e-3)


@pytest.mark.usefixtures("kernels")
def test_inpainting_with_a_model_made_for_it(tiny_folder: Callable[[tiny.TinySD1], Path], once: Once) -> None:
    """Nine input channels: latent, mask, and the picture with grey where the mask is."""
    import torch

    truth = once(lambda: Truth(tiny_folder(SD1_DEEP)), "truth")
    mask = np.zeros((64, 80), np.uint8)
    mask[16:48, 24:64] = 255
    with SDContext(tiny_folder(SD1_DEEP), threads=1) as context:
        image = context.generate(
            PROMPT,
            NEGATIVE,
            init_image=PICTURE,
            mask=mask,
            strength=1.0,
            steps=STEPS,
            cfg_scale=5.0,
            seed=SEED,
            sampler="euler",
            scheduler="normal",
        )
        got = latent_of(context)
    shown = np.where(mask[..., None] > 0, np.float32(127.5), PICTURE.astype(np.float32))
    want = once(lambda: truth.paint(
        "StableDiffusionInpaintPipeline", scheduler("euler"), strength=1.0, width=80, height=64,
        image=torch.from_numpy(PICTURE.astype(np.float32).transpose(2, 0, 1)[None] / 127.5 - 1),
        mask_image=torch.from_numpy(mask[None, None].astype(np.float32) / 255),
        masked_image_latents=torch.from_numpy(truth.encode(shown)),
        latents=noise(64, 80),
    ))  # fmt: skip
    inside = np.repeat(mask[::8, ::8][None, None] > 0, 4, axis=1)
    assert got.shape == want.shape
    assert np.array_equal(np.asarray(image)[mask == 0], PICTURE[mask == 0])
    assert np.all(np.isfinite(got[inside]))


def test_a_prompt_of_several_chunks_and_weights(context: SDContext, truth: Truth, once: Once) -> None:
    """BREAK puts chunks side by side; weights multiply states and keep each chunk's mean."""
    import torch

    context.generate(
        "a red heart BREAK (blue sea:1.5)", "", steps=2, cfg_scale=1.0, seed=SEED, sampler="euler", scheduler="normal"
    )
    first, second = truth.states("a red heart"), truth.states("blue sea")
    weights = torch.ones((1, 77, 1))
    weights[:, 1:3] = 1.5
    weighted = second * weights
    weighted = weighted * (second.mean() / weighted.mean())
    want = once(lambda: truth.paint_states(torch.cat([first, weighted], dim=1), 2))
    assert_close(latent_of(context), want, tolerance=1e-3)
