"""Makes files with exactly the shapes of a model that people have, and random weights.

python tests/bench/checkpoint.py sd15-random.safetensors                SD 1.5 in f16, 2.1 GB
python tests/bench/checkpoint.py --family sdxl sdxl-random.safetensors  SDXL in f16, 6.9 GB
python tests/bench/checkpoint.py --family flux FOLDER [--type q8_0]     FLUX.1 dev in q4_K, 6.7 GB, with CLIP-L, T5-XXL
                                                                        in q8_0 and the autoencoder: 5.5 GB
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import random_files
import tiny
import tiny_flux
import tiny_sdxl
import tiny_t5

SD15 = tiny.TinySD1(
    unet_widths=(320, 640, 1280, 1280),
    unet_attends=(True, True, True, False),
    unet_blocks=2,
    text_width=768,
    text_layers=12,
    vae_widths=(128, 256, 512, 512),
    vae_blocks=2,
)
SDXL = tiny.TinySD1(
    unet_widths=(320, 640, 1280),
    unet_attends=(False, True, True),
    unet_depths=(1, 2, 10),
    unet_blocks=2,
    head_size=64,
    text_width=768,
    text_layers=12,
    text_2_width=1280,
    text_2_layers=32,
    vae_widths=(128, 256, 512, 512),
    vae_blocks=2,
    pipeline="StableDiffusionXLPipeline",
)
FLUX = tiny_flux.TinyFlux(
    heads=24, head_size=128, axes=(16, 56, 56), double_blocks=19, single_blocks=38, context=4096, pooled=768
)
T5_XXL = tiny_t5.TinyT5(width=4096, heads=64, head_size=64, hidden=10240, layers=24, vocabulary=32128)
Shapes = tiny.Shapes


def without_memory(shapes: Shapes) -> dict[str, np.ndarray]:
    """Arrays of these shapes that are no more than that."""
    return {name: np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}


def single_file(model: tiny.TinySD1) -> Shapes:
    """A single file of Stable Diffusion 1.x, 2.x or XL, under its original names."""
    parts = {part: without_memory(of) for part, of in tiny.component_shapes(model).items()}
    return {name: values.shape for name, values in tiny_sdxl.single_tensors(model, parts).items()}


def flux_transformer(model: tiny_flux.TinyFlux) -> Shapes:
    """FLUX's transformer, under the authors' names."""
    shapes, out = tiny_flux.transformer_shapes(model), {}
    for name, parts in tiny_flux.modules(model).items():
        for leaf in ("weight", "bias"):
            of = [shapes[f"{part}.{leaf}"] for part in parts if f"{part}.{leaf}" in shapes]
            if of:
                leaf = "scale" if name.endswith("_norm") else leaf
                out[f"{name}.{leaf}"] = (sum(shape[0] for shape in of), *of[0][1:])
    return out


def flux_vae() -> Shapes:
    """FLUX's autoencoder, under the authors' names."""
    shapes = tiny.vae_shapes_of(SDXL, channels=16, quant=False)
    as_matrix = {tiny_sdxl.vae_name(name, len(SDXL.vae_widths)): shape for name, shape in shapes.items()}
    return {name: (*shape, 1, 1) if ".attn_1." in name and len(shape) == 2 else shape
            for name, shape in as_matrix.items()}  # fmt: skip


def write_flux(folder: Path, kind: str) -> None:
    """The files that people download for FLUX."""
    folder.mkdir(parents=True, exist_ok=True)
    random_files.write_gguf(folder / f"flux-{kind}.gguf", "flux", flux_transformer(FLUX), kind)
    if (folder / "t5xxl-q8_0.gguf").exists():
        return
    t5 = {tiny_t5.llama_name(name): shape for name, shape in tiny_t5.shapes(T5_XXL).items()}
    random_files.write_gguf(folder / "t5xxl-q8_0.gguf", "t5encoder", t5, "q8_0")
    random_files.write_safetensors(folder / "clip_l.safetensors", tiny.clip_shapes(768, 12))
    random_files.write_safetensors(folder / "ae.safetensors", flux_vae(), "float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--family", choices=("sd15", "sdxl", "flux"), default="sd15")
    parser.add_argument("--type", default="q4_K", choices=tuple(random_files.STEPS), help="of FLUX's transformer")
    arguments = parser.parse_args()
    if arguments.family == "flux":
        write_flux(arguments.path, arguments.type)
    else:
        model = SD15 if arguments.family == "sd15" else SDXL
        random_files.write_safetensors(arguments.path, single_file(model))


if __name__ == "__main__":
    main()
