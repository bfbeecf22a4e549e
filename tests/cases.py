"""The inputs that the parity tests (diffusers, live) and the golden tests (its stored answers) share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import tiny
from tiny_sdxl import KOALA, SD2, SD2_V_DEEP, SDXL, SDXL_DEEP, SSD_1B

SD1 = tiny.TinySD1()
# Two sizes with attention, more blocks, a narrower autoencoder, inpainting inputs.
SD1_DEEP = tiny.TinySD1(
    unet_widths=(32, 64, 64),
    unet_attends=(True, True, False),
    unet_blocks=2,
    unet_inputs=9,
    text_layers=3,
    vae_widths=(16, 16, 32, 32),
    vae_blocks=2,
)


def noise(name: str, *shape: int) -> np.ndarray:
    """Normal numbers that depend on the name and the shape alone: float32."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def token_ids(*ids: int, pad: int = 49407) -> np.ndarray:
    """Begin, ids, end and padding: 77 numbers."""
    padded = [49406, *ids, 49407]
    return np.array(padded + [pad] * (77 - len(padded)), dtype=np.float32)


@dataclass(frozen=True)
class Case:
    """One run of one network: what goes in, by the probe's names."""

    name: str
    model: tiny.TinySD1
    network: str
    inputs: dict[str, np.ndarray] = field(hash=False)


def denoise(name: str, model: tiny.TinySD1, width: int, height: int, times: list[float], tokens: int = 77) -> Case:
    n = len(times)
    inputs = {
        "latent": noise(name + "latent", n, model.unet_inputs, height, width),
        "time": np.array(times, dtype=np.float32),
        "text": noise(name + "text", n, tokens, model.context_width),
    }
    if model.text_2_width:
        inputs["pooled"] = noise(name + "pooled", n, model.text_2_width)
        # Small ones: the sine of 1024 in float32 is as exact as the angle, to 6e-5, on either side.
        inputs["sizes"] = np.array([[8 * height, 8 * width, 0, 8, 96, 8 * width]] * n, dtype=np.float32)
    return Case(name, model, "denoise", inputs)


def text(name: str, model: tiny.TinySD1, skip: int, network: str = "text", n: int = 3) -> Case:
    prompts = [(320, 736, 1876), tuple(range(300, 375)), ()][:n]

    def ids(pad: int) -> np.ndarray:
        return np.stack([token_ids(*prompt, pad=pad) for prompt in prompts])

    inputs = {"ids": ids(0 if model.open_clip else 49407), "clip_skip": np.array([skip], dtype=np.float32)}
    if model.text_2_width:
        ends = [77 * chunk + 1 + len(prompt) for chunk, prompt in enumerate(prompts)]
        inputs |= {"ids_2": ids(0), "ends": np.array(ends, dtype=np.float32)}
    return Case(name, model, network, inputs)


def decode(name: str, model: tiny.TinySD1, width: int, height: int, n: int = 1) -> Case:
    return Case(name, model, "vae_decode", {"latent": noise(name, n, 4, height, width)})


def encode(name: str, model: tiny.TinySD1, width: int, height: int, n: int = 1) -> Case:
    return Case(name, model, "vae_encode", {"image": np.tanh(noise(name, n, 3, height, width))})


NETWORKS = [
    denoise("unet-square", SD1, 8, 8, [500.0]),
    denoise("unet-wide", SD1, 12, 8, [999.0]),
    denoise("unet-odd", SD1, 9, 7, [0.0]),
    denoise("unet-batch", SD1, 6, 10, [17.25, 731.0]),
    denoise("unet-long-prompt", SD1, 8, 8, [250.0], tokens=154),
    denoise("unet-deep-inpainting", SD1_DEEP, 8, 12, [333.0]),
    text("text", SD1, 1),
    text("text-skip-2", SD1, 2),
    text("text-deep-skip-3", SD1_DEEP, 3),
    decode("decode-square", SD1, 8, 8),
    decode("decode-tall", SD1, 4, 9, 2),
    decode("decode-narrow", SD1_DEEP, 6, 4),
    encode("encode-square", SD1, 64, 64),
    encode("encode-wide", SD1, 80, 48, 2),
    encode("encode-narrow", SD1_DEEP, 48, 64),
    denoise("sd2-unet", SD2, 8, 6, [500.0, 3.5]),
    denoise("sd2-unet-deep-inpainting", SD2_V_DEEP, 8, 4, [333.0]),
    text("sd2-text", SD2, 2, n=1),
    text("sd2-text-deep-skip-3", SD2_V_DEEP, 3, n=1),
    denoise("sdxl-unet-batch", SDXL, 8, 6, [250.0, 17.25]),
    denoise("sdxl-unet-deep-inpainting", SDXL_DEEP, 8, 4, [250.0]),
    denoise("ssd-1b-unet", SSD_1B, 8, 8, [500.0]),
    denoise("koala-unet", KOALA, 8, 4, [250.0]),
    text("sdxl-text", SDXL, 2, n=2),
    text("sdxl-text-skip-1", SDXL, 1, n=1),
    text("sdxl-pooled", SDXL, 2, "pooled"),
    text("sdxl-pooled-skip-3", SDXL_DEEP, 3, "pooled"),
    decode("sdxl-decode", SDXL, 6, 5),
    encode("sdxl-encode", SDXL, 48, 40),
]
