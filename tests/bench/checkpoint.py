"""Makes a checkpoint with exactly Stable Diffusion 1.5's shapes and random weights: a 2.1 GB file in f16.

python tests/bench/checkpoint.py sd15-random.safetensors
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

SD15 = tiny.TinySD1(
    unet_widths=(320, 640, 1280, 1280),
    unet_attends=(True, True, True, False),
    unet_blocks=2,
    text_width=768,
    text_layers=12,
    vae_widths=(128, 256, 512, 512),
    vae_blocks=2,
)


def draw(generator: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Like tiny.draw, but from one stream: hashing every name would take minutes at this size."""
    values = generator.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1:
        values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    elif "embedding" not in name or "time_embedding" in name:
        values /= np.sqrt(np.prod(shape[1:]))
    return values.astype(np.float16)


def write(path: Path) -> None:
    """Writes the single file under its original names."""
    from sdcpp_py import _native
    from sdcpp_py.files import data_dir

    generator = np.random.default_rng(0)
    shapes = {"unet": tiny.unet_shapes(SD15), "vae": tiny.vae_shapes(SD15), "text_encoder": tiny.text_shapes(SD15)}
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        folder = Path(temporary)
        files = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
        for component, of in shapes.items():
            (folder / component).mkdir()
            tensors = {name: draw(generator, name, shape) for name, shape in of.items()}
            save_file(tensors, folder / component / f"{files[component]}.safetensors")
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
        context = _native.Context(str(folder), data_dir=str(data_dir()))
        tiny.write_single(folder, path, context)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
