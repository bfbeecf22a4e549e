"""How much a converted model differs from its source: tensor by tensor, and in pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import check
from .context import SDContext
from .errors import BadArgument
from .files import AnyPath
from .progress import OnProgress, tell
from .request import SEEDS
from .weights import Tensor, open_source
from .weights.names import single_file_names
from .weights.writing import PIECE


@dataclass(frozen=True)
class TensorError:
    """The error of one tensor.

    Attributes:
        name: Of the tensor.
        source_type, type: Before and after.
        elements: How many numbers.
        bytes: Of the converted one.
        squares: Sum of the squares of the source.
        error_squares: Sum of the squares of the differences.
        largest: The largest difference.
    """

    name: str
    source_type: str
    type: str
    elements: int
    bytes: int
    squares: float
    error_squares: float
    largest: float

    @property
    def relative_rmse(self) -> float:
        """Root mean square of the differences over that of the source."""
        return _ratio(self.error_squares, self.squares)


@dataclass(frozen=True)
class TypeSummary:
    """The error of all tensors of one type together; fields as above."""

    type: str
    tensors: int
    elements: int
    bytes: int
    relative_rmse: float
    largest: float


@dataclass(frozen=True)
class PictureError:
    """How two pictures of one prompt and seed differ.

    Attributes:
        prompt, seed: What was painted.
        rmse: Root mean square of the differences of pixels, 0 to 255.
        largest: The largest difference.
        psnr: Peak signal-to-noise ratio in decibels; infinite where they are equal.
    """

    prompt: str
    seed: int
    rmse: float
    largest: int
    psnr: float


@dataclass(frozen=True)
class Quality:
    """The comparison of two models.

    Attributes:
        tensors: Those that both have, the worst first.
        pictures: One per prompt.
        missing, added: Names that only the source has, and only the converted model.
    """

    tensors: list[TensorError]
    pictures: list[PictureError]
    missing: list[str]
    added: list[str]

    def by_type(self) -> list[TypeSummary]:
        """The errors of each type of the converted model, the largest type first."""
        groups: dict[str, list[TensorError]] = {}
        for error in self.tensors:
            groups.setdefault(error.type, []).append(error)
        out = [
            TypeSummary(
                type,
                len(errors),
                sum(error.elements for error in errors),
                sum(error.bytes for error in errors),
                _ratio(sum(error.error_squares for error in errors), sum(error.squares for error in errors)),
                max(error.largest for error in errors),
            )
            for type, errors in groups.items()
        ]
        return sorted(out, key=lambda error: -error.bytes)


def compare(
    source: AnyPath,
    converted: AnyPath,
    *,
    prompts: Sequence[str] = (),
    seed: int = 0,
    steps: int = 20,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> Quality:
    """Compares a converted model with its source.

    Args:
        source: The model that it was made from.
        converted: The model to judge.
        prompts: To paint with both; none: only tensors are compared.
        seed: Of the first picture; picture k has seed + k.
        steps: Of each picture.
        threads: Of the CPU; None: one per core.
        on_progress: Called with what is done, the whole, and what it was; False stops.

    Raises:
        BadArgument: They have no tensor in common, or two of one name and different shapes.
        Cancelled: ``on_progress`` said so.
        SdcppError: As ``open_source`` and ``SDContext``.
    """
    asked = check.texts("prompts", prompts)
    seed = check.whole("seed", seed, 0, SEEDS - max(1, len(asked)))
    steps = check.whole("steps", steps, 1)
    check.optional(check.whole, "threads", threads, 1)
    check.callback("on_progress", on_progress)
    with open_source(source) as opened, open_source(converted) as other:
        before, after = (
            {tensor.name: tensor for tensor in (single_file_names(one, {}) if one.path.is_dir() else one).tensors}
            for one in (opened, other)
        )
        both = [name for name in before if name in after]
        if not both:
            raise BadArgument(f"{converted}: has no tensor in common with {source}; is it made from that?")
        tell = _Teller(sum(before[name].elements for name in both), on_progress)
        errors = [_tensor_error(before[name], after[name], tell) for name in both]
    pictures = _paint(source, converted, asked, seed, steps, threads, on_progress) if asked else []
    return Quality(
        sorted(errors, key=lambda error: -error.relative_rmse),
        pictures,
        [name for name in before if name not in after],
        [name for name in after if name not in before],
    )


class _Teller:
    def __init__(self, total: int, on_progress: OnProgress | None) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self, n: int, what: str) -> None:
        self._done += n
        tell(self._on_progress, self._done, self._total, what, "the comparison was stopped")


def _tensor_error(before: Tensor, after: Tensor, tell: _Teller) -> TensorError:
    if math.prod(before.shape) != math.prod(after.shape) or before.row_length != after.row_length:
        raise BadArgument(f"{before.name}: is {list(before.shape)} in the source and {list(after.shape)} here")
    squares = errors = largest = 0.0
    step = max(1, PIECE // max(1, before.row_length))
    for first in range(0, before.rows, step):
        last = min(first + step, before.rows)
        a, b = before.floats(first, last), after.floats(first, last)
        difference = np.subtract(b, a, dtype=np.float64)
        squares += float(np.sum(np.square(a, dtype=np.float64)))
        errors += float(np.sum(np.square(difference)))
        largest = max(largest, float(np.max(np.abs(difference), initial=0.0)))
        tell.add((last - first) * before.row_length, before.name)
    return TensorError(before.name, before.type, after.type, before.elements, after.bytes, squares, errors, largest)


def _paint(
    source: AnyPath,
    converted: AnyPath,
    prompts: list[str],
    seed: int,
    steps: int,
    threads: int | None,
    on_progress: OnProgress | None,
) -> list[PictureError]:
    painted = []
    tell = _Teller(2 * len(prompts), on_progress)
    for path in (source, converted):
        with SDContext(path, threads=threads) as sd_ctx:
            pictures = []
            for k, prompt in enumerate(prompts):
                image = sd_ctx.generate(prompt, seed=seed + k, steps=steps)
                pictures.append(np.asarray(image, np.int16))
                tell.add(1, prompt)
            painted.append(pictures)
    return [_picture_error(prompts[k], seed + k, a, b) for k, (a, b) in enumerate(zip(*painted, strict=True))]


def _picture_error(prompt: str, seed: int, a: Any, b: Any) -> PictureError:
    difference = np.abs(a - b)
    rmse = float(np.sqrt(np.mean(np.square(difference, dtype=np.float64))))
    psnr = math.inf if rmse == 0 else 20 * math.log10(255 / rmse)
    return PictureError(prompt, seed, rmse, int(difference.max()), psnr)


def _ratio(errors: float, squares: float) -> float:
    if squares == 0:
        return 0.0 if errors == 0 else math.inf
    return math.sqrt(errors / squares)
