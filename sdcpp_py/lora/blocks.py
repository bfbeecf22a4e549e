"""Weights per block of the denoiser (lbw), as webui's extension LoRA Block Weight takes them.

BASE is what lies outside of the blocks, text encoders included; INxx, MID and OUTxx are input_blocks.xx,
middle_block and output_blocks.xx of the original layout. A list of numbers follows one of the layouts below,
told apart by its length; a preset is a name for one.
"""

import math
from typing import Final

from ..errors import BadArgument
from ..prompt import shown

PREFIX: Final = "model.diffusion_model."
FAMILIES: Final = ("sd1", "sd2", "sdxl")

_BLOCKS: Final = {"sd1": 12, "sdxl": 9}  # on the way in, and as many on the way out
# Blocks with attention, which is all that a plain LoRA has.
_ATTENTION: Final = {
    "sd1": "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    "sdxl": "IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
}
# The extension's own for SD1; for SDXL the same halves, shallow and deep, of its blocks.
_ON: Final = {
    "sd1": {
        "INS": "IN01 IN02 IN04",
        "IND": "IN05 IN07 IN08",
        "INALL": "IN01 IN02 IN04 IN05 IN07 IN08",
        "MIDD": "IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06",
        "OUTD": "OUT03 OUT04 OUT05 OUT06",
        "OUTS": "OUT07 OUT08 OUT09 OUT10 OUT11",
        "OUTALL": "OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    },
    "sdxl": {
        "INS": "IN04 IN05",
        "IND": "IN07 IN08",
        "INALL": "IN04 IN05 IN07 IN08",
        "MIDD": "IN07 IN08 MID OUT00 OUT01 OUT02",
        "OUTD": "OUT00 OUT01 OUT02",
        "OUTS": "OUT03 OUT04 OUT05",
        "OUTALL": "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    },
}
_EVERYWHERE: Final = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
PRESETS: Final = ("NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5")

Blocks = tuple[tuple[str, float], ...]


def read_blocks(text: str, family: str) -> Blocks:
    """Paths of modules by their original names, each with its factor for all below it; the longest one counts.

    "" stands for BASE. A block that the layout leaves out, and that only files with more than attention
    have, follows its neighbour before it, or the first one behind it.

    Raises:
        BadArgument: No preset, no numbers, or as many as no layout has.
        ValueError: `family` is not one of FAMILIES.
    """
    kind = {"sd1": "sd1", "sd2": "sd1", "sdxl": "sdxl"}.get(family)
    if kind is None:
        raise ValueError(f"lbw: there are no block layouts for {family}")
    text = text.strip()
    base, listed = _listed(text, kind)
    every = _every_block(kind)
    factors = [(_prefix(block), factor) for block, factor in zip(every, _spread(every, listed), strict=True)]
    rest = [(prefix, factor) for prefix, factor in factors if factor != base]
    return tuple(rest if base == 1 else [("", base), *rest])


def _listed(text: str, kind: str) -> tuple[float, dict[str, float]]:
    """The factors of BASE and of the blocks that a preset or a list tells."""
    attention = _ATTENTION[kind].split()
    if text.upper() in _EVERYWHERE:
        factor = _EVERYWHERE[text.upper()]
        return factor, dict.fromkeys(attention, factor)
    if text.upper() in _ON[kind]:
        on = _ON[kind][text.upper()].split()
        return 1.0, {block: float(block in on) for block in attention}
    every = _every_block(kind)
    layouts = {len(attention) + 1: attention, len(every) + 1: every}
    numbers = [_number(part) for part in text.split(",")]
    if len(numbers) not in layouts:
        if len(numbers) == 1:
            raise BadArgument(f"lbw={shown(text)}: is no preset; there are: {', '.join(PRESETS)}")
        wanted = " or ".join(map(str, sorted(layouts)))
        raise BadArgument(f"lbw={shown(text)}: has {len(numbers)} numbers; this model's layouts have {wanted}")
    bad = next((part for part, number in zip(text.split(","), numbers, strict=True) if number is None), None)
    if bad is not None:
        raise BadArgument(f"lbw={shown(text)}: {shown(bad.strip())} is no finite number")
    return numbers[0] or 0.0, {
        block: number or 0.0 for block, number in zip(layouts[len(numbers)], numbers[1:], strict=True)
    }


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _every_block(kind: str) -> list[str]:
    n = _BLOCKS[kind]
    return [f"IN{i:02}" for i in range(n)] + ["MID"] + [f"OUT{i:02}" for i in range(n)]


def _spread(every: list[str], listed: dict[str, float]) -> list[float]:
    """A factor for each block; the ways in and out each for themselves."""
    out: list[float] = []
    for way in ("IN", "MID", "OUT"):
        blocks = [block for block in every if block.startswith(way)]
        factor = next(listed[block] for block in blocks if block in listed)
        for block in blocks:
            factor = listed.get(block, factor)
            out.append(factor)
    return out


def _prefix(block: str) -> str:
    if block == "MID":
        return f"{PREFIX}middle_block"
    way, number = ("input", block[2:]) if block.startswith("IN") else ("output", block[3:])
    return f"{PREFIX}{way}_blocks.{int(number)}"
