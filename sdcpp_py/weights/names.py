"""A diffusers folder's tensors under the names and in the shapes that single files have.

The table is the engine's own: each weight that a family declares carries both names, and a fused one its parts.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import _native
from ..errors import BadFile, Unsupported
from ..files import data_dir
from .source import AnyPath, Source
from .tensor import Tensor

# The matrices of an autoencoder's attention, which single files have as convolutions of one pixel.
_PIXEL_CONVOLUTION = re.compile(r"^first_stage_model\..*\.attn_1\.(q|k|v|proj_out)\.weight$")


@dataclass(frozen=True)
class Part:
    """Rows of a fused weight, and where they come from."""

    tensor: Tensor
    first: int
    rows: int
    swap_halves: bool

    def runs(self, first: int, last: int) -> list[tuple[int, int]]:
        """Which rows of the tensor stand at rows first to last - 1 of the fused weight, as far as they are here."""
        begin, end = max(first - self.first, 0), min(last - self.first, self.rows)
        if begin >= end:
            return []
        if not self.swap_halves:
            return [(begin, end)]
        half = self.rows // 2
        cuts = sorted({begin, end, *([half] if begin < half < end else [])})
        return [((a + half) % self.rows, (a + half) % self.rows + b - a) for a, b in pairwise(cuts)]


def single_file_names(source: Source, components: Mapping[str, AnyPath]) -> Source:
    """The same model named as single files are. Of a family that is not known, all stays as it is.

    Raises:
        BadFile: The folder lacks weights of its family.
    """
    parts = {role: os.fsencode(Path(path)) for role, path in components.items()}
    try:
        _, declared = _native.list_weights(os.fsencode(source.path), components=parts, data_dir=os.fsencode(data_dir()))
    except Unsupported:
        return source
    stored = {tensor.name: tensor for tensor in source.tensors}
    fused: dict[str, list[Part]] = {}
    used: set[str] = set()
    tensors: list[Tensor] = []
    for weight in declared:
        name = weight["name"]
        found = stored.get(weight["diffusers_name"]) or stored.get(name)
        if found is None:
            raise BadFile(f"{source.path}: has no {weight['diffusers_name']}, which {name} is made of")
        used.add(found.name)
        if weight["rows"] == math.prod(weight["shape"][:-1]) or found.name == name:
            tensors.append(_renamed(found, name))
            continue
        part = Part(found, weight["first_row"], weight["rows"], weight["swap_halves"])
        fused.setdefault(name, []).append(part)
        if sum(one.rows for one in fused[name]) == math.prod(weight["shape"][:-1]):
            tensors.append(_joined(name, weight["shape"], fused.pop(name)))
    others = [name for name in stored if name not in used]
    left_out = [*source.left_out, *([f"{len(others):,} tensors without a place in single files"] if others else [])]
    return replace(source, tensors=tensors, left_out=left_out)


def _renamed(tensor: Tensor, name: str) -> Tensor:
    if _PIXEL_CONVOLUTION.match(name) and len(tensor.shape) == 2:
        columns = tensor.row_length

        def read(first: int, last: int) -> Any:  # rows of one element each
            begin, end = first // columns, -(-last // columns)
            return tensor.floats(begin, end).reshape(-1)[first - begin * columns : last - begin * columns]

        return Tensor(name, (*tensor.shape, 1, 1), "f32", read, tensor.kept or tensor.type)
    return replace(tensor, name=name)


def _joined(name: str, shape: Sequence[int], parts: Sequence[Part]) -> Tensor:
    """The fused weight, row by row in the order of its parts."""
    placed = sorted(parts, key=lambda part: part.first)
    kinds = {part.tensor.type for part in placed}
    (kind,) = kinds if len(kinds) == 1 else ("f32",)

    def read(first: int, last: int) -> bytes:
        out = []
        for part in placed:
            for begin, end in part.runs(first, last):
                rows = part.tensor.read(begin, end) if len(kinds) == 1 else part.tensor.floats(begin, end)
                out.append(bytes(rows))
        return b"".join(out)

    return Tensor(name, tuple(shape), kind, read, placed[0].tensor.kept or placed[0].tensor.type)
