"""Paints the README's pictures with the model and the LoRAs that ship, and checks what they claim.

python docs/pictures.py
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from sdcpp_py import SDContext

IMAGES = Path(__file__).parent / "images"
PROMPTS = (
    "a red heart", "dog face", "pizza", "rocket", "sunflower", "red apple", "octopus", "strawberry",
    "penguin", "snowman", "violin", "tropical fish", "cactus", "sailboat", "lion", "birthday cake",
)  # fmt: skip
SEED = 7


def grid(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size in rows, two pixels apart."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + 2), (i // columns) * (height + 2)))
    return sheet


def plain(sd_ctx: SDContext) -> None:
    """A sheet of what the model knows."""
    pictures = sd_ctx.generate(prompts=PROMPTS, seed=SEED)
    grid(pictures, columns=8).save(IMAGES / "grid.png", optimize=True)


def loras(sd_ctx: SDContext) -> None:
    """Per row a prompt: no LoRA, half, full, two together, none again. The last equals the first bit for bit."""
    first, second = [path.stem for path in sorted((Path(__file__).parents[1] / "models").glob("*.safetensors"))][:2]
    tags = ("", f" <lora:{first}:0.5>", f" <lora:{first}>", f" <lora:{first}:0.6> <lora:{second}:0.6>", "")
    pictures = []
    for prompt in ("a red heart", "dog face", "rocket"):
        row = [sd_ctx.generate(prompt + tag, seed=SEED) for tag in tags]
        assert np.array_equal(np.asarray(row[0]), np.asarray(row[-1])), f"{prompt}: a LoRA left a trace"
        pictures += row
    grid(pictures, columns=len(tags)).save(IMAGES / "loras.png", optimize=True)


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    with SDContext() as context:
        plain(context)
        loras(context)
