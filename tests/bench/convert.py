"""Time, processor time and peak memory of converting a checkpoint, each in a process of its own.

python tests/bench/convert.py sd15-random.safetensors q8_0 q4_K
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def measure(source: Path, type: str, threads: int | None) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        target = Path(folder) / "converted.gguf"
        command = [sys.executable, "-m", "sdcpp_py", "convert", str(source), str(target), "--type", type, "-q"]
        command += ["--threads", str(threads)] if threads else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        begin = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        size = target.stat().st_size
    return f"| {type} | {size / 1e6:,.0f} MB | {seconds:.1f} s | {processor:.1f} s | {after.ru_maxrss / 1024:,.0f} MB |"


if __name__ == "__main__":
    print("| type | file | time | processor time | peak memory |\n|---|---|---|---|---|")
    for wanted in sys.argv[2:]:
        kind, _, count = wanted.partition("@")
        print(measure(Path(sys.argv[1]), kind, int(count) if count else None), flush=True)
