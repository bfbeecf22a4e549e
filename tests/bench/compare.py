"""Ours beside stable-diffusion-cpp-python on the same checkpoint, in alternation and in one run.

    python tests/bench/checkpoint.py sd15-random.safetensors
    python tests/bench/compare.py sd15-random.safetensors [--peer PYTHON] [--size 512] [--rounds 2]

`--peer` is a Python that has stable-diffusion-cpp-python; without it only ours is measured. Every measurement is a
fresh process: opening the file warm, a picture of a few steps with guidance, and the peak memory of the process.
Prints medians and the ratios to the peer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

COMMON = """
import json, resource, sys, time
model, size, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
marks = []
def report(opened):
    times = [b - a for a, b in zip(marks, marks[1:])]
    print("RESULT " + json.dumps({
        "open": opened, "step": min(times) if times else None, "decode": finished - marks[-1],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))
"""

OURS = (
    COMMON
    + """
from sdcpp_py import SDContext
begin = time.perf_counter()
context = SDContext(model)
opened = time.perf_counter() - begin
context.generate("a cat", width=size, height=size, steps=steps, cfg_scale=7.0, seed=1, sampler="euler",
                 on_step=lambda *_: marks.append(time.perf_counter()))
finished = time.perf_counter()
report(opened)
"""
)

PEER = (
    COMMON
    + """
from stable_diffusion_cpp import StableDiffusion
begin = time.perf_counter()
context = StableDiffusion(model_path=model, verbose=False)
opened = time.perf_counter() - begin
context.generate_image(prompt="a cat", width=size, height=size, sample_steps=steps, cfg_scale=7.0, seed=1,
                       sample_method="euler", progress_callback=lambda *_: marks.append(time.perf_counter()))
finished = time.perf_counter()
report(opened)
"""
)


def measure(python: str, code: str, model: Path, size: int, steps: int) -> dict[str, float]:
    """One fresh process; seconds, and gigabytes of peak resident memory."""
    command = [python, "-c", textwrap.dedent(code), str(model), str(size), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{python} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--peer", help="a Python with stable-diffusion-cpp-python")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    programs = {"sdcpp_py": (sys.executable, OURS)}
    if arguments.peer:
        programs["sd.cpp"] = (arguments.peer, PEER)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, (python, code) in programs.items():
            results[name].append(measure(python, code, arguments.model, arguments.size, arguments.steps))
            print(name, results[name][-1], flush=True)

    print(f"\n{platform.platform()}, {arguments.size}x{arguments.size}, medians of {arguments.rounds}")
    print(f"{'':10} {'open s':>8} {'step s':>8} {'decode s':>9} {'peak GB':>8}")
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    for name, of in median.items():
        print(f"{name:10} {of['open']:8.2f} {of['step']:8.2f} {of['decode']:9.2f} {of['memory']:8.2f}")
    if "sd.cpp" in median:
        ratios = [f"{key} {median['sd.cpp'][key] / median['sdcpp_py'][key]:.2f}" for key in median["sdcpp_py"]]
        print("peer / ours: " + ", ".join(ratios))


if __name__ == "__main__":
    main()
