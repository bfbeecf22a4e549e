"""Weights per block of the denoiser (lbw), as webui's extension LoRA Block Weight takes them.

BASE is what lies outside of the blocks, text encoders included; INxx, MID and OUTxx are input_blocks.xx,
middle_block and output_blocks.xx of the original layout; Dxx and Sxx are FLUX's double_blocks.xx and
single_blocks.xx, Jxx SD3's joint_blocks.xx. A list of numbers follows one of the layouts below, told apart by its
length; a preset is a name for one.
"""

import math
from collections.abc import Collection, Sequence
from typing import Final

from ..errors import BadArgument
from ..prompt import shown

PREFIX: Final = "model.diffusion_model."
FAMILIES: Final = ("sd1", "sd2", "sdxl", "sd3", "flux")

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
_DOUBLE: Final = tuple(f"D{i:02}" for i in range(19))
_SINGLE: Final = tuple(f"S{i:02}" for i in range(38))
# FLUX: LoRA Block Weight's 61, ComfyUI-Inspire-Pack's 58, and the same without BASE. SD3: medium and large.
_TRANSFORMERS: Final = {
    "flux": (
        ("CLIP", "T5", "IN", *_DOUBLE, *_SINGLE, "OUT"),
        ("BASE", *_DOUBLE, *_SINGLE),
        (*_DOUBLE, *_SINGLE),
    ),
    "sd3": tuple(("BASE", *(f"J{i:02}" for i in range(n))) for n in (24, 38)),
}
_OUTSIDE: Final = {
    "CLIP": ("text_encoders.clip_l",),
    "T5": ("text_encoders.t5xxl",),
    "IN": tuple(f"{PREFIX}{name}" for name in ("img_in", "txt_in", "time_in", "vector_in", "guidance_in")),
    "OUT": (f"{PREFIX}final_layer",),
}
_INSIDE: Final = {"D": "double_blocks", "S": "single_blocks", "J": "joint_blocks"}
_EVERYWHERE: Final = {"NONE": 0.0, "ALL": 1.0, "ALL0.5": 0.5}
PRESETS: Final = ("NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5")
_PRESETS: Final = {"flux": ("NONE", "ALL", "DOUBLE", "SINGLE", "ALL0.5"), "sd3": ("NONE", "ALL", "ALL0.5")}

Blocks = tuple[tuple[str, float], ...]


def read_blocks(text: str, family: str) -> Blocks:
    """Paths of modules by their original names, each with its factor for all below it; the longest one counts.

    "" stands for BASE. A block that the layout leaves out, and that only files with more than attention
    have, follows its neighbour before it, or the first one behind it.

    Raises:
        BadArgument: No preset, no numbers, or as many as no layout has.
        ValueError: `family` is not one of FAMILIES.
    """
    text = text.strip()
    if family in _TRANSFORMERS:
        return _of_transformer(text, family)
    kind = {"sd1": "sd1", "sd2": "sd1", "sdxl": "sdxl"}.get(family)
    if kind is None:
        raise ValueError(f"lbw: there are no block layouts for {family}")
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
    base, *numbers = _numbers(text, (len(attention) + 1, len(every) + 1), PRESETS)
    return base, dict(zip(attention if len(numbers) == len(attention) else every, numbers, strict=True))


def _of_transformer(text: str, family: str) -> Blocks:
    """Blocks that a model lacks count for nothing."""
    if text.upper() in _EVERYWHERE:
        factor = _EVERYWHERE[text.upper()]
        return () if factor == 1 else (("", factor),)
    layouts = {len(layout): layout for layout in _TRANSFORMERS[family]}
    if family == "flux" and text.upper() in ("DOUBLE", "SINGLE"):
        off = _SINGLE if text.upper() == "DOUBLE" else _DOUBLE
        listed = dict.fromkeys(off, 0.0)
    else:
        numbers = _numbers(text, layouts, _PRESETS[family])
        listed = dict(zip(layouts[len(numbers)], numbers, strict=True))
    base = listed.pop("BASE", 1.0)
    rest = [(path, factor) for block, factor in listed.items() for path in _paths(block) if factor != base]
    return tuple(rest if base == 1 else [("", base), *rest])


def _paths(block: str) -> tuple[str, ...]:
    return _OUTSIDE.get(block) or (f"{PREFIX}{_INSIDE[block[0]]}.{int(block[1:])}",)


def _numbers(text: str, lengths: Collection[int], presets: Sequence[str]) -> list[float]:
    """A list of one of these lengths."""
    parts = text.split(",")
    if len(parts) not in lengths:
        if len(parts) == 1:
            raise BadArgument(f"lbw={shown(text)}: is no preset; there are: {', '.join(presets)}")
        wanted = " or ".join(map(str, sorted(lengths)))
        raise BadArgument(f"lbw={shown(text)}: has {len(parts)} numbers; this model's layouts have {wanted}")
    numbers = [_number(part) for part in parts]
    for part, number in zip(parts, numbers, strict=True):
        if number is None:
            raise BadArgument(f"lbw={shown(text)}: {shown(part.strip())} is no finite number")
    return [number for number in numbers if number is not None]


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
