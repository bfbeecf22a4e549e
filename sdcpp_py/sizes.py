"""Sizes of pictures that models were trained on."""

import math
from typing import Final

# Width and height of what FLUX.1 Kontext was trained on, about a million pixels each
# (https://github.com/black-forest-labs/flux, src/flux/util.py, PREFERED_KONTEXT_RESOLUTIONS).
KONTEXT: Final = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)
KONTEXT_AREA: Final = min(width * height for width, height in KONTEXT)


def kontext_size(size: tuple[int, int], area: float = math.inf, multiple: int = 16) -> tuple[int, int]:
    """Width and height at which FLUX.1 Kontext looks at a picture: of those it was trained on, the one with the nearest
    proportions. Where a smaller picture of ``area`` pixels is painted, it is scaled to that area and rounded to
    ``multiple``, as what is looked at takes as much time as what is painted."""
    ratio = size[0] / size[1]
    width, height = min(KONTEXT, key=lambda known: abs(ratio - known[0] / known[1]))
    scale = min(1.0, (area / KONTEXT_AREA) ** 0.5)
    return nearest_multiple(width * scale, multiple), nearest_multiple(height * scale, multiple)


def nearest_multiple(side: float, multiple: int) -> int:
    """Of the multiples from 1 on."""
    return max(1, round(side / multiple)) * multiple
