"""A tensor that is read when it is asked for, and the types that its elements can have."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .. import _native, check
from ..errors import BadArgument

Floats = NDArray[np.float32]
Rows = Callable[[int, int], Any]  # rows first to last - 1, side by side, as their type stores them


@dataclass(frozen=True)
class ElementType:
    """A type of elements, as ggml and safetensors have them.

    Attributes:
        name: As the command line spells it: "q4_K".
        number: In GGUF files; None where only safetensors has it.
        block: Elements of a row that are stored together; 1 where not quantised.
        block_bytes: What a block takes.
        can_write: Weights can be converted to it.
        wants_importance: It quantises poorly where nothing tells which columns matter.
    """

    name: str
    number: int | None
    block: int
    block_bytes: int
    can_write: bool
    wants_importance: bool

    @property
    def is_quantised(self) -> bool:
        return self.block > 1

    @property
    def is_float(self) -> bool:
        return self.is_quantised or self.name in ("f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2")

    def row_bytes(self, length: int) -> int:
        """Bytes of a row of that many elements, which are whole blocks."""
        return length // self.block * self.block_bytes


TYPES: Final = {
    entry["name"]: ElementType(
        entry["name"],
        entry["number"] if entry["number"] < 1000 else None,
        entry["block"],
        entry["block_bytes"],
        entry["can_write"],
        entry["wants_importance"],
    )
    for entry in _native.types()
}
_BY_LOWER_CASE: Final = {name.lower(): kind for name, kind in TYPES.items()}


def element_type(name: str) -> ElementType:
    """The type of that name, in letters of any case.

    Raises:
        BadArgument: There is none, or it is one of whole numbers or of activations.
    """
    found = _BY_LOWER_CASE.get(check.text("type", name).lower())
    if found is None or not found.can_write:
        known = ", ".join(kind.name for kind in TYPES.values() if kind.can_write)
        raise BadArgument(f"type {name!r}: weights cannot be written so; there are: {known}")
    return found


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model, in a file or made on the way.

    Attributes:
        name: As its file spells it.
        shape: numpy's order, the slowest dimension first; () for a scalar.
        type: Name of the type that ``read`` gives.
        read: Gives rows first to last - 1 as one buffer of that type. A row is the last dimension; vectors and
            scalars are one row. Called by one thread, in the order of the rows.
        kept: Name of the type that it has where no other is asked for; "" for ``type``.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    read: Rows
    kept: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_length(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Rows that hold something: none of a tensor without elements, however many its shape states."""
        return math.prod(self.shape[:-1]) if self.elements else 0

    @property
    def bytes(self) -> int:
        """Bytes of all rows as ``read`` gives them."""
        return self.rows * TYPES[self.type].row_bytes(self.row_length)

    @property
    def kept_type(self) -> ElementType:
        return TYPES[self.kept or self.type]

    def floats(self, first: int = 0, last: int | None = None) -> Floats:
        """Rows first to last - 1 as float32: (rows, row length). All rows by default.

        Raises:
            BadFile: The file ends before them.
            Io: It cannot be read.
        """
        end = self.rows if last is None else last
        raw = _native.convert_rows(self.type, self.read(first, end), "f32", end - first, self.row_length)
        return raw.view(np.float32).reshape(end - first, self.row_length)

    def array(self) -> Floats:
        """The whole tensor as float32, in its shape."""
        return self.floats().reshape(self.shape)

    def changed(self, change: Callable[[int, Floats], Floats]) -> "Tensor":
        """The same tensor with its values changed on the way.

        Args:
            change: Gets the number of the first row and some rows, (rows, row length), that it may write to; gives
                rows of the same shape. Called in the order of the rows.
        """

        def read(first: int, last: int) -> Floats:
            rows = np.ascontiguousarray(change(first, self.floats(first, last)), np.float32)
            if rows.shape != (last - first, self.row_length):
                raise BadArgument(
                    f"{self.name}: {last - first} rows of {self.row_length} were changed to the shape {rows.shape}"
                )
            return rows

        return replace(self, type="f32", read=read, kept=self.kept or self.type)


def from_array(name: str, values: NDArray[Any], kept: str = "") -> Tensor:
    """A tensor of what numpy holds, read as float32."""
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1] if values.ndim else 1)
    return Tensor(name, values.shape, "f32", lambda first, last: rows[first:last], kept)
