"""What the parity tests (diffusers, live) and the golden tests (its stored answers) of FLUX.1 and SD3 share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from cases import noise, token_ids
from tiny_flux import TinyFlux
from tiny_sd3 import TinySD3

Model = TinyFlux | TinySD3

FLUX = TinyFlux()
FLUX_SCHNELL = TinyFlux(guidance=False, double_blocks=1, single_blocks=3)
FLUX_FILL = TinyFlux(inputs=384)
FLUX_CONTROL = TinyFlux(inputs=128, heads=3, double_blocks=1, single_blocks=1)
SD3 = TinySD3()
SD35_MEDIUM = TinySD3(norms=True, dual=2, heads=2, positions=16)
SD35_LARGE = TinySD3(norms=True, blocks=2)
SD3_WITHOUT_T5 = TinySD3(blocks=2, encoders=("text_encoder", "text_encoder_2"))


@dataclass(frozen=True)
class Case:
    """One run of one network: what goes in, by the probe's names."""

    name: str
    model: Model
    network: str
    inputs: dict[str, np.ndarray] = field(hash=False)


def denoise(name: str, model: Model, width: int, height: int, times: list[float], tokens: int = 11) -> Case:
    n = len(times)
    is_flux = isinstance(model, TinyFlux)
    inputs = {
        "latent": noise(name + "latent", n, model.inputs // 4 if is_flux else 16, height, width),
        "time": np.array(times, np.float32),
        "text": noise(name + "text", n, tokens, model.context),
        "pooled": noise(name + "pooled", n, model.pooled if is_flux else model.clip_l + model.clip_g),
    }
    if is_flux and model.guidance:
        inputs["guidance"] = np.array([3.5, 1.25][:n], np.float32)
    return Case(name, model, "denoise", inputs)


def clip(name: str, model: Model, network: str, second: bool = False, skip: int = 2) -> Case:
    """Two chunks, which end where they end."""
    pad = 0 if second else 49407
    ids = np.stack([token_ids(320, 736, 1876), token_ids(*range(300, 375))])
    after = np.cumsum(ids == 49407, axis=1) > 1
    ids[after] = pad
    ends = np.array([row.tolist().index(49407) + 77 * i for i, row in enumerate(ids)], np.float32)
    return Case(
        name, model, network, {"ids_2" if second else "ids": ids, "ends": ends, "clip_skip": np.float32([skip])}
    )


NETWORKS = [
    denoise("flux", FLUX, 8, 6, [731.0]),
    denoise("flux-batch", FLUX, 4, 10, [999.0, 17.5]),
    denoise("flux-schnell", FLUX_SCHNELL, 6, 6, [500.0]),
    denoise("flux-fill", FLUX_FILL, 6, 4, [333.0]),
    denoise("flux-control", FLUX_CONTROL, 4, 4, [1000.0]),
    denoise("sd3", SD3, 8, 6, [731.0]),
    denoise("sd3-crop", SD3, 2, 24, [3.0]),
    denoise("sd3.5-medium", SD35_MEDIUM, 6, 10, [999.0, 17.5]),
    denoise("sd3.5-large", SD35_LARGE, 4, 4, [1000.0], tokens=40),
    clip("flux-pooled", FLUX, "pooled"),
    clip("sd3-clip-l", SD3, "text"),
    clip("sd3-clip-l-pooled", SD3, "pooled"),
    clip("sd3-clip-g-skip-1", SD3, "text", second=True, skip=1),
    clip("sd3-clip-g-pooled", SD3, "pooled", second=True),
    Case("flux-decode", FLUX, "vae_decode", {"latent": noise("flux-decode", 1, 16, 5, 4)}),
    Case("flux-encode", FLUX, "vae_encode", {"image": np.tanh(noise("flux-encode", 1, 3, 32, 48))}),
]

PICTURE = (np.indices((64, 96)).sum(axis=0)[..., None] * np.array([1, 2, 3]) % 256).astype(np.uint8)
TALL = np.ascontiguousarray(PICTURE.swapaxes(0, 1)[:, ::-1])
MASK = np.zeros((64, 96), np.uint8)
MASK[13:48, 24:70] = 255


@dataclass(frozen=True)
class Run:
    """A whole run, as SDContext.generate is asked for it."""

    name: str
    model: Model
    pipeline: str
    arguments: dict[str, object] = field(hash=False)

    def request(self) -> dict[str, object]:
        size = {"width": 96, "height": 64, "seed": 11, "steps": 4}
        return {"prompt": "a red heart, soft light", "negative_prompt": "blurry", **size, **self.arguments}


RUNS = [
    Run("flux", FLUX, "FluxPipeline", {"guidance": 2.5}),
    Run("flux-shift", FLUX, "FluxPipeline", {"shift": 1.7, "steps": 3}),
    Run("flux-schnell", FLUX_SCHNELL, "FluxPipeline", {}),
    Run("flux-img2img", FLUX, "FluxImg2ImgPipeline", {"init_image": PICTURE, "strength": 0.75}),
    Run("flux-fill", FLUX_FILL, "FluxFillPipeline", {"init_image": PICTURE, "mask": MASK, "strength": 1.0}),
    Run("flux-control", FLUX_CONTROL, "FluxControlPipeline", {"control_image": PICTURE}),
    Run("flux-kontext", FLUX, "FluxKontextPipeline", {"reference_image": TALL, "guidance": 2.5}),
    Run("sd3", SD3, "StableDiffusion3Pipeline", {"cfg_scale": 4.0}),
    Run(
        "sd3-img2img",
        SD3,
        "StableDiffusion3Img2ImgPipeline",
        {"init_image": PICTURE, "strength": 0.5, "cfg_scale": 4.0},
    ),
    Run("sd3-without-t5", SD3_WITHOUT_T5, "StableDiffusion3Pipeline", {"cfg_scale": 4.0}),
    Run("sd3.5-medium", SD35_MEDIUM, "StableDiffusion3Pipeline", {"cfg_scale": 4.0}),
]

# With the files of tiny_redux.
REDUX = Run("flux-redux", FLUX, "FluxPipeline", {"redux_image": TALL, "redux_strength": 0.7})
