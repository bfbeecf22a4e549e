"""A diffusers folder's tensors under the names and in the shapes that single files have.

The table is the engine's own: each weight that a family declares carries both names, and a fused one its parts.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..errors import BadFile, Unsupported
from ..files import AnyPath
from .families import Family
from .source import Source
from .tensor import Floats, Tensor, from_array

# The matrices of an autoencoder's attention, which single files have as convolutions of one pixel.
_PIXEL_CONVOLUTION = re.compile(r"^first_stage_model\..*\.attn_1\.(q|k|v|proj_out)\.weight$")
_AUTOENCODER = "first_stage_model."
_LAYER = re.compile(r"^(cond_stage_model\.model\.transformer\.resblocks\.)(\d+)(\..*)$")


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
        return swapped_runs(begin, end, self.rows) if self.swap_halves else [(begin, end)]


def swapped_runs(first: int, last: int, rows: int) -> list[tuple[int, int]]:
    """Where rows first to last - 1 are found in a matrix of so many rows that has its halves the other way round."""
    half = rows // 2
    cuts = sorted({first, last, *([half] if first < half < last else [])})
    return [((a + half) % rows, (a + half) % rows + b - a) for a, b in pairwise(cuts)]


def single_file_names(source: Source, components: Mapping[str, AnyPath]) -> Source:
    """The same model named as single files are. Of a family that is not known, all stays as it is.

    Raises:
        BadFile: The folder lacks weights of its family.
    """
    try:
        family, declared = source.declared(components)
    except Unsupported:
        return source
    stored = {tensor.name: tensor for tensor in source.tensors}
    fused: dict[str, list[Part]] = {}
    used: set[str] = set()
    tensors: list[Tensor] = []
    for weight in declared:
        name, shape = weight["name"], weight["shape"]
        found = stored.get(weight["diffusers_name"]) or stored.get(name)
        if found is None:
            raise BadFile(f"{source.path}: has no {weight['diffusers_name']}, which {name} is made of")
        used.add(found.name)
        rows = shape[0] if len(shape) == 1 else math.prod(shape[:-1])
        is_whole = weight["rows"] in (rows, math.prod(shape[:-1])) and not weight["swap_halves"]
        if is_whole or found.name == name:
            tensors.append(_renamed(found, name))
            continue
        joined = fused.setdefault(name, [])
        joined.append(Part(found, weight["first_row"], weight["rows"], weight["swap_halves"]))
        if sum(one.rows for one in joined) == rows:
            tensors.append(_joined(name, shape, fused.pop(name)))
    if family == "sd2":
        tensors += _last_layer(tensors)
    others = [name for name in stored if name not in used]
    left_out = [*source.left_out, *([f"{len(others):,} tensors without a place in single files"] if others else [])]
    return replace(source, tensors=tensors, left_out=left_out)


def with_one_autoencoder(tensors: Sequence[Tensor], family: Family | None) -> list[Tensor]:
    """The autoencoder's tensors below one prefix, that of the family's files, where the engine's reader has given the
    usual one to some of them."""
    if not any(tensor.name.startswith(_AUTOENCODER) for tensor in tensors):
        return list(tensors)  # there is none, or it has diffusers' names
    prefix = "vae." if family is not None and family.name == "flux" else _AUTOENCODER

    def renamed(tensor: Tensor) -> Tensor:
        for given in (_AUTOENCODER, "vae."):
            if tensor.name.startswith(given):
                return replace(tensor, name=prefix + tensor.name.removeprefix(given))
        return tensor

    return [renamed(tensor) for tensor in tensors]


def _last_layer(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The text encoder's last layer, which single files of SD 2 have and nothing uses: zeros, which change no state."""
    last = max((int(match[2]) for tensor in tensors if (match := _LAYER.match(tensor.name))), default=0)
    out = []
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        if match and int(match[2]) == last:
            values = np.zeros(tensor.shape, np.float32)
            name = f"{match[1]}{last + 1}{match[3]}"
            out.append(from_array(name, values, tensor.kept or tensor.type))
    return out


def _renamed(tensor: Tensor, name: str) -> Tensor:
    if name.endswith("text_projection") and tensor.name != name:
        # Single files have OpenCLIP's, a parameter without a layer, with rows for inputs.
        return _made(tensor, name, tensor.shape[::-1], lambda: tensor.array().T)
    if _PIXEL_CONVOLUTION.match(name) and len(tensor.shape) == 2:
        return _made(tensor, name, (*tensor.shape, 1, 1), tensor.array)
    return replace(tensor, name=name)


def _made(tensor: Tensor, name: str, shape: tuple[int, ...], values: Callable[[], Floats]) -> Tensor:
    """A tensor of the values of another, which is small enough to be read whole."""
    length = shape[-1]

    def read(first: int, last: int) -> Floats:
        return np.ascontiguousarray(values()).reshape(-1, length)[first:last]

    return Tensor(name, shape, "f32", read, tensor.kept or tensor.type)


def _joined(name: str, shape: Sequence[int], parts: Sequence[Part]) -> Tensor:
    """The fused weight, row by row in the order of its parts; a vector's rows are its numbers."""
    placed = sorted(parts, key=lambda part: part.first)
    kept = placed[0].tensor.kept or placed[0].tensor.type
    if len(shape) == 1:

        def whole() -> Floats:
            numbers = [part.tensor.array()[slice(*run)] for part in placed for run in part.runs(0, shape[0])]
            return np.concatenate(numbers)

        return _made(placed[0].tensor, name, tuple(shape), whole)
    kinds = {part.tensor.type for part in placed}
    kind = kinds.pop() if len(kinds) == 1 else "f32"

    def read(first: int, last: int) -> bytes:
        out = []
        for part in placed:
            for begin, end in part.runs(first, last):
                rows = part.tensor.read(begin, end) if part.tensor.type == kind else part.tensor.floats(begin, end)
                out.append(bytes(rows))
        return b"".join(out)

    return Tensor(name, tuple(shape), kind, read, kept)
