"""Time, processor time and peak memory of converting a checkpoint, beside stable-diffusion-cpp-python.

    python tests/bench/convert.py sd15-random.safetensors q8_0 q4_K [--peer PYTHON] [--rounds 3]

Each conversion is a process of its own; with `--peer`, a Python that has stable-diffusion-cpp-python, both take turns.
Prints medians. `--threads` is for ours; the peer takes one thread per core.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys
from stable_diffusion_cpp import stable_diffusion_cpp as library
source, target, kind = sys.argv[1].encode(), sys.argv[2].encode(), getattr(library.GGMLType, "SD_TYPE_" + sys.argv[3])
assert library.convert(source, b"", target, kind.value, b"", True)
"""


def measure(command: list[str], target: Path) -> tuple[float, float, float, float]:
    """Seconds, processor seconds, and megabytes of memory and of the file."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    size = target.stat().st_size / 1e6
    target.unlink()
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("types", nargs="+")
    parser.add_argument("--peer", help="a Python with stable-diffusion-cpp-python")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()

    print("| type | | file | time | processor time | peak memory |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=arguments.source.parent) as folder:
        target = Path(folder) / "converted.gguf"
        for kind in arguments.types:
            ours = [sys.executable, "-m", "sdcpp_py", "convert", str(arguments.source), str(target)]
            programs = {"ours": [*ours, "--type", kind, "-q"]}
            if arguments.threads:
                programs["ours"] += ["--threads", str(arguments.threads)]
            if arguments.peer:
                programs["sd.cpp"] = [arguments.peer, "-c", PEER, str(arguments.source), str(target), kind.upper()]
            runs: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in programs}
            for _ in range(arguments.rounds):
                for name, command in programs.items():
                    runs[name].append(measure(command, target))
            for name, of in runs.items():
                seconds, processor, memory, size = map(statistics.median, zip(*of, strict=True))
                print(
                    f"| {kind} | {name} | {size:,.0f} MB | {seconds:.1f} s | {processor:.1f} s | {memory:,.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
