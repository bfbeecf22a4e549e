"""stable-diffusion.cpp, through stable-diffusion-cpp-python, paints with our files what it paints with their source.

Runs where SDCPP_PEER names a Python that has the package. The model has Stable Diffusion 1.5's own shapes, which that
engine expects, and random weights: 2.1 GB in a temporary folder, or the file that SDCPP_PEER_MODEL names.
"""

from __future__ import annotations

import math
import os
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sdcpp_py.lora import bake
from sdcpp_py.weights import convert, open_source

PEER = os.environ.get("SDCPP_PEER", "")

pytestmark = [
    pytest.mark.parity,
    pytest.mark.slow,
    pytest.mark.skipif(not PEER, reason="SDCPP_PEER names no Python that has stable-diffusion-cpp-python"),
]

PAINT = """
import sys
from stable_diffusion_cpp import StableDiffusion
model, out, kind, folder, prompt = sys.argv[1:]
context = StableDiffusion(model_path=model, wtype=kind, lora_model_dir=folder, n_threads=1, verbose=False)
images = context.generate_image(prompt=prompt, width=128, height=128, sample_steps=2, cfg_scale=3.0, seed=1,
                                sample_method="euler")
images[0].save(out)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("SDCPP_PEER_MODEL"):
        return Path(given)
    path = tmp_path_factory.mktemp("peer") / "sd15-random.safetensors"
    runpy.run_path(str(Path(__file__).parents[1] / "bench" / "checkpoint.py"))["write"](path)
    return path


@pytest.fixture
def paint(tmp_path: Path) -> Callable[..., np.ndarray]:
    def paint(model: Path, kind: str = "default", prompt: str = "a cat") -> np.ndarray:
        out = tmp_path / "picture.png"
        command = [PEER, "-c", PAINT, str(model), str(out), kind, str(tmp_path), prompt]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
        return np.asarray(Image.open(out)).astype(float)

    return paint


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return math.sqrt(np.mean((a - b) ** 2))


def test_the_same_pictures_from_our_files(source: Path, paint: Callable[..., np.ndarray], tmp_path: Path) -> None:
    """To the last bit where the weights are the same. Where they are quantised, as from a file of f16 that holds what
    they mean, but for the 8 bits that this engine rounds activations to then: twice what q8_0 costs it."""
    want = paint(source)
    assert want.std() > 2, "a picture of nothing shows nothing"
    file = tmp_path / "ours.gguf"
    convert(source, file)
    np.testing.assert_array_equal(paint(file), want)
    eight_bits = rmse(paint(source, kind="q8_0"), want)
    for kind in ("q8_0", "q4_K"):
        convert(source, file, type=kind)
        convert(file, tmp_path / "meant.gguf", type="f16")
        got, meant = paint(file), paint(tmp_path / "meant.gguf")
        print(
            f"{kind}: {rmse(got, want):.2f} of 255 from the source's picture, {rmse(got, meant):.2f} from what it means"
        )
        assert rmse(got, meant) < 2 * eight_bits


def test_a_baked_model_paints_as_with_the_lora(source: Path, paint: Callable[..., np.ndarray], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    with open_source(source) as opened:
        for tensor in opened.tensors:
            if tensor.name.endswith(("attn1.to_q.weight", "attn2.to_v.weight", "ff.net.2.weight")):
                stem = tensor.name.removeprefix("model.diffusion_model.").removesuffix(".weight")
                key = f"lora_unet_{stem.replace('.', '_')}"
                rows, columns = tensor.shape
                tensors[f"{key}.lora_down.weight"] = rng.standard_normal((4, columns), np.float32) / columns**0.5
                tensors[f"{key}.lora_up.weight"] = rng.standard_normal((rows, 4), np.float32)
                tensors[f"{key}.alpha"] = np.array(4, np.float32)
    save_file(tensors, tmp_path / "x.safetensors")
    bake(source, [(tmp_path / "x.safetensors", 0.5)], tmp_path / "baked.gguf")
    base, want = paint(source), paint(source, prompt="a cat<lora:x:0.5>")
    changed = rmse(base, want)
    differs = rmse(paint(tmp_path / "baked.gguf"), want)
    print(f"the LoRA changes the picture by {changed:.2f} of 255; ours is off by {differs:.2f}")
    assert changed > 2
    assert differs < 0.05 * changed + 0.5  # both round sums to f16
