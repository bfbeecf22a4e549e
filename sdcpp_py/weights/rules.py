"""Which type each weight is written in."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ..errors import BadArgument
from .families import Family
from .tensor import TYPES, ElementType, Floats, Tensor, element_type

# Where rows are no whole blocks of 256, the type of blocks of 32 with about as many bits.
NARROWER: Final = {
    "q2_K": "q4_0",
    "q3_K": "q4_0",
    "q4_K": "q5_0",
    "q5_K": "q5_1",
    "q6_K": "q8_0",
    "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
    "nvfp4": "mxfp4",
    "q1_0": "q4_0",
    "q2_0": "q4_0",
}
_HALVES: Final = ("f16", "bf16")
_SAFETENSORS: Final = (
    "f64",
    "f32",
    "f16",
    "bf16",
    "f8_e4m3",
    "f8_e5m2",
    "i64",
    "i32",
    "i16",
    "i8",
    "u64",
    "u32",
    "u16",
    "u8",
    "bool",
)
_WIDER: Final = {"u8": "i16", "bool": "i8", "u16": "i32", "u32": "i64"}  # whole numbers that GGUF lacks


@dataclass(frozen=True)
class Planned:
    """A tensor and how it will be written.

    Attributes:
        tensor: What is read.
        type: What is written.
        why: In words, where the type is not the one asked for; "".
        importance: A weight per column, or None.
    """

    tensor: Tensor
    type: ElementType
    why: str = ""
    importance: Floats | None = None

    @property
    def bytes(self) -> int:
        return self.tensor.rows * self.type.row_bytes(self.tensor.row_length)


class Rules:
    """Decides the type of each tensor: given rules first, then what the kind of weight allows.

    Args:
        type: The type for matrices; None: as they are.
        given: Pairs of a regular expression, searched for in the name, and a type. The first that matches counts; those
            with a quantised type concern matrices alone.
        container: "gguf" or "safetensors".
        family: Whose sensitive weights stay in 16 bits.
        importance: A weight per column by the name of a tensor.

    Raises:
        BadArgument: An unknown type, a type that the container lacks, or no regular expression.
    """

    def __init__(
        self,
        type: str | None,
        given: Sequence[tuple[str, str]],
        container: str,
        family: Family | None,
        importance: Mapping[str, Floats] | None = None,
    ) -> None:
        self._container = container
        self._family = family
        self._importance = importance or {}
        self._type = None if type is None else self._allowed(element_type(type))
        self._given = [(_pattern(pattern), self._allowed(element_type(name))) for pattern, name in given]
        self._used: set[str] = set()

    def plan(self, tensors: Sequence[Tensor]) -> list[Planned]:
        """The type of each of them.

        Raises:
            BadArgument: A given rule asks for a type that a row does not fit, or matches no tensor; or the importance
                is of none of them.
        """
        if self._importance and not any(tensor.name in self._importance for tensor in tensors):
            name = next(iter(self._importance))
            raise BadArgument(
                f"importance matrix: the model has no {name}, nor any other that it is of; is it of another?"
            )
        planned = [self._plan(tensor) for tensor in tensors]
        for pattern, type in self._given:
            if pattern.pattern not in self._used:
                what = "matrix" if type.is_quantised else "tensor"
                raise BadArgument(f"tensor type: no {what} has a name that matches {pattern.pattern!r}")
        return planned

    def _plan(self, tensor: Tensor) -> Planned:
        for pattern, type in self._given:
            fits = tensor.kept_type.is_float and (_is_matrix(tensor) or not type.is_quantised)
            if not fits or not pattern.search(tensor.name):
                continue
            self._used.add(pattern.pattern)
            if tensor.row_length % type.block:
                raise BadArgument(
                    f"tensor type: {tensor.name} has rows of {tensor.row_length}, no whole blocks of {type.name}, "
                    f"which has {type.block} in a block"
                )
            return self._done(tensor, type)
        return self._done(tensor, *self._default(tensor))

    def _done(self, tensor: Tensor, type: ElementType, why: str = "") -> Planned:
        columns = self._importance.get(tensor.name) if type.is_quantised else None
        if columns is not None and columns.size != tensor.row_length:
            raise BadArgument(
                f"importance matrix: has {columns.size} columns for {tensor.name}, which has {tensor.row_length}; "
                "was it made with another model?"
            )
        if columns is None and type.wants_importance:
            why = why or "no importance matrix"
        return Planned(tensor, type, why, columns)

    def _default(self, tensor: Tensor) -> tuple[ElementType, str]:
        own = tensor.kept_type
        if not own.is_float:
            return self._whole_numbers(tensor, own), ""
        asked = self._type
        if asked is None:
            return self._held(own), ""
        if not asked.is_quantised and not asked.name.startswith("f8"):
            vector = len(tensor.shape) < 2 and self._container == "gguf"
            return (TYPES["f32"], "") if vector else (asked, "")
        if len(tensor.shape) > 2:
            return self._half(own), "convolution"
        if not _is_matrix(tensor):
            return (TYPES["f32"] if self._container == "gguf" else self._held(own)), "vector"
        if self._family is not None and self._family.is_sensitive(tensor.name):
            return self._half(own), "sensitive"
        return self._fitting(asked, tensor, own)

    def _fitting(self, asked: ElementType, tensor: Tensor, own: ElementType) -> tuple[ElementType, str]:
        for type in (asked, TYPES.get(NARROWER.get(asked.name, ""))):
            if type is not None and tensor.row_length % type.block == 0:
                return type, "" if type is asked else f"no blocks of {asked.name}"
        return self._half(own), f"no blocks of {asked.name}"

    def _half(self, own: ElementType) -> ElementType:
        """16 bits, exact where the source has no more; what is quantised already gets no better by them."""
        return own if own.name in _HALVES or (own.is_quantised and self._holds(own)) else TYPES["f16"]

    def _held(self, own: ElementType) -> ElementType:
        """The own type, or f16 where the container lacks it."""
        return own if self._holds(own) else TYPES["f16"]

    def _holds(self, type: ElementType) -> bool:
        return type.number is not None if self._container == "gguf" else type.name in _SAFETENSORS

    def _allowed(self, type: ElementType) -> ElementType:
        if not self._holds(type):
            other = "safetensors" if self._container == "gguf" else "gguf"
            raise BadArgument(f"type {type.name!r}: {self._container} files have no such elements; write .{other}")
        return type

    def _whole_numbers(self, tensor: Tensor, own: ElementType) -> ElementType:
        if self._holds(own):
            return own
        if own.name not in _WIDER:
            raise BadArgument(
                f"{tensor.name}: is of type {own.name}, which GGUF files cannot hold; leave it out with drop"
            )
        return TYPES[_WIDER[own.name]]


def _is_matrix(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and min(tensor.shape) > 1


def _pattern(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise BadArgument(f"tensor type: {text!r} is no regular expression ({error})") from error
