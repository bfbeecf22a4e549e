"""Writing a LoRA module by module: several are made at a time, written in order, and told of."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, TypeVar

from ..progress import OnProgress, tell
from .algebra import Reduced
from .source import Floats
from .spelling import Unit
from .writer import SafetensorsWriter, narrowest

Key = TypeVar("Key")
Result = TypeVar("Result")

_IN_FLIGHT: Final = 1 << 28  # bytes of dense changes at a time, or one


@dataclass
class Written:
    """A LoRA that was written.

    Attributes:
        path: The file.
        family: What it is for.
        format: The format's name.
        modules: How many it changes, as it spells them.
        kinds: Modules by kind.
        ranks: Modules by rank.
        residuals: What lowering the rank left out of each module, |rest| / |whole| (Frobenius).
        residual: The same of all modules together.
    """

    path: str
    family: str
    format: str
    modules: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    residual: float = 0.0


@dataclass
class Made:
    """The tensors of one module of ours, and what is to be told of them."""

    tensors: dict[str, tuple[Floats, str]] = field(default_factory=dict)  # by their keys, each with its type
    stems: set[str] = field(default_factory=set)
    kinds: Counter[str] = field(default_factory=Counter)
    ranks: Counter[int] = field(default_factory=Counter)
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)  # |rest|, |whole|
    left_out: list[str] = field(default_factory=list)  # parameters that the format has no place for

    def add(self, unit: Unit, tensors: Mapping[str, Floats], type: str | None, source: str = "f32") -> None:
        """Tensors of a unit; `type` None: that of their source where it holds them exactly."""
        for name, values in tensors.items():
            is_number = values.size == 1
            chosen = "f32" if is_number else type or narrowest(values, source)
            self.tensors[name] = (values, chosen)
        self.stems.add(unit.stem)

    def add_lost(self, unit: Unit, reduced: Reduced) -> None:
        """What lowering the rank of a unit left out."""
        self.lost[unit.stem] = (reduced.residual * reduced.norm, reduced.norm)


def write_modules(
    writer: SafetensorsWriter,
    work: Iterable[Made],
    names: Sequence[str],
    result: Written,
    on_progress: OnProgress | None,
) -> list[str]:
    """Writes what is made of modules of these names, tells of it in `result`, and gives what was left out.

    Raises:
        BadArgument: A value that the type cannot hold.
        Cancelled: `on_progress` said so.
    """
    kinds: Counter[str] = Counter()
    ranks: Counter[int] = Counter()
    left_out: list[str] = []
    rest = whole = 0.0
    for done, (name, made) in enumerate(zip(names, work, strict=True), start=1):
        for key, (values, type) in made.tensors.items():
            writer.add(key, values, type)
        result.modules += len(made.stems)
        kinds += made.kinds
        ranks += made.ranks
        left_out += made.left_out
        for stem, (left, norm) in made.lost.items():
            result.residuals[stem] = left / norm if norm else 0.0
            rest, whole = rest + left**2, whole + norm**2
        stopped = f"{result.path}: stopped after {done:,} of {len(names):,} modules; nothing is written"
        tell(on_progress, done, len(names), name, stopped)
    result.kinds, result.ranks = dict(kinds), dict(sorted(ranks.items()))
    result.residual = (rest / whole) ** 0.5 if whole else 0.0
    return left_out


def in_parallel(
    work: Callable[[Key], Result], keys: Sequence[Key], cost: Callable[[Key], int], threads: int
) -> Iterator[Result]:
    """The results in order, as many at a time as there are threads and memory for; `cost` is in bytes."""
    if threads <= 1:
        yield from map(work, keys)
        return
    pool = ThreadPoolExecutor(threads)
    waiting = iter(keys)
    running: list[tuple[int, Future[Result]]] = []
    try:
        held: list[Key] = []
        while True:
            while len(running) < threads:
                held = held or list(islice(waiting, 1))
                if not held or (running and sum(c for c, _ in running) + cost(held[0]) > _IN_FLIGHT):
                    break
                running.append((cost(held[0]), pool.submit(work, held.pop())))
            if not running:
                return
            yield running.pop(0)[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
