"""The CPU's kernels that this processor runs, each in float32 and, where it multiplies bf16, in that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Kernels:
    """A set by its name in SDCPP_KERNELS, and its precision."""

    name: str
    precision: str = "f32"

    def __str__(self) -> str:
        return self.name if self.precision == "f32" else f"{self.name}-{self.precision}"

    def tolerance(self, in_f32: float, of_torch: float = 0.0) -> float:
        """That of float32, or 2e-2: bf16 rounds factors by up to 2^-9, which comes to some 1 % over a network. Where
        torch's own bfloat16 is further than that from its float32, so may ours be; a tenth is left to luck."""
        return in_f32 if self.precision == "f32" else max(2e-2, 1.1 * of_torch)


AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
# The best of each precision last; "reference" and "plain" run everywhere.
NEEDED: dict[Kernels, set[str]] = {
    Kernels("reference"): set(),
    Kernels("plain"): set(),
    Kernels("avx2"): AVX2,
    Kernels("avx512"): AVX512,
    Kernels("avx512", "bf16"): AVX512 | {"avx512_bf16"},
    Kernels("amx", "bf16"): AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"},
}


def features() -> set[str]:
    """What the processor has, as Linux names it."""
    cpuinfo = Path("/proc/cpuinfo")
    return set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()


def runnable(*precisions: str) -> list[Kernels]:
    """The sets of these precisions that run here, the best last."""
    here = features()
    return [kernels for kernels, needed in NEEDED.items() if kernels.precision in precisions and needed <= here]


def chosen(option: str, *precisions: str) -> list[Kernels]:
    """Those that --kernels asks for: "best", "others" (all but that), "all", or a name."""
    *others, best = runnable(*precisions) or [None]
    if option in ("best", "others", "all"):
        some = {"best": [best], "others": others, "all": [*others, best]}[option]
        return [kernels for kernels in some if kernels]
    named = [kernels for kernels in runnable(*precisions) if str(kernels) == option]
    if option not in map(str, NEEDED):
        known = ", ".join(map(str, runnable("f32", "bf16")))
        raise pytest.UsageError(f"--kernels {option}: not known; there are best, others, all, {known}")
    return named
