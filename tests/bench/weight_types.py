"""The table of docs/weights.md: size and error of the model that ships, in every type.

python tests/bench/weight_types.py
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from sdcpp_py.files import shipped_model
from sdcpp_py.quality import compare
from sdcpp_py.weights import TYPES, ElementType, convert

PROMPTS = ("a red heart", "a cat")


def row(source: Path, target: Path, kind: ElementType) -> str:
    """A row of the table: the error of those matrices that became of this type, and of pictures."""
    plan = convert(source, target, type=kind.name)
    quality = compare(source, target, prompts=PROMPTS, seed=1, steps=10, threads=1)
    matrices = [error for error in quality.tensors if error.type == kind.name and error.error_squares > 0]
    squares = sum(one.squares for one in matrices)
    rmse = math.sqrt(sum(one.error_squares for one in matrices) / squares) if matrices else 0.0
    psnr = sum(picture.psnr for picture in quality.pictures) / len(quality.pictures)
    rest = ", ".join(sorted({planned.type.name for planned in plan.tensors if "no blocks" in planned.why}))
    size = f"{plan.bytes / 1e6:.1f} MB"
    return f"| `{kind.name}` | {size} | {len(matrices)} | {rmse:.2g} | {rest} | {psnr:.1f} dB |"


if __name__ == "__main__":
    print("| type | file | matrices | their relative RMSE | the others | pictures |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        full, target = Path(temporary) / "f32.gguf", Path(temporary) / "converted.gguf"
        convert(shipped_model(), full, type="f32")
        kinds = [kind for kind in TYPES.values() if kind.can_write and kind.number is not None]
        for kind in sorted(kinds, key=lambda kind: -kind.block_bytes / kind.block):
            print(row(full, target, kind), flush=True)
