"""How long a model takes here, and where the time goes."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from .context import SDContext


@dataclass(frozen=True)
class Operation:
    """What one kind of operation took in a whole picture: seconds and floating-point operations, of all together."""

    network: str
    operation: str
    count: int
    seconds: float
    flops: float


@dataclass(frozen=True)
class Timing:
    """Seconds, and bytes of the process at its largest; `step` is the median of the steps but the first."""

    text: float
    step: float
    decode: float
    peak_memory: int | None


def measure(sd_ctx: SDContext, *, size: int | None, steps: int, on_step: Callable[[int, int], None]) -> Timing:
    """Paints a picture of `size` pixels a side with guidance and takes the time; `steps` is at least 2."""
    marks: list[float] = []

    def step(number: int, of: int, preview: object) -> None:
        marks.append(time.perf_counter())
        on_step(number, of)

    begin = time.perf_counter()
    sd_ctx.generate("a cat", width=size, height=size, steps=steps, seed=1, sampler="euler", on_step=step)
    end = time.perf_counter()
    took = [after - before for before, after in itertools.pairwise(marks)]
    median = statistics.median(took)
    return Timing(marks[0] - begin - median, median, end - marks[-1], _peak_memory())


def profile(sd_ctx: SDContext, *, size: int | None) -> list[Operation]:
    """Every kind of operation in a picture of one step, the longest first. Each is waited for, so the sum is more than
    a picture takes."""
    with sd_ctx.profiling() as operations:
        sd_ctx.generate("a cat", width=size, height=size, steps=1, seed=1, sampler="euler")
        rows = [Operation(*row) for row in operations()]
    return sorted(rows, key=lambda row: -row.seconds)


def _peak_memory() -> int | None:
    if sys.platform == "win32":
        return None
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
