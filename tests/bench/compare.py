"""Ours beside stable-diffusion-cpp-python and diffusers, in alternation and in one run.

    python tests/bench/checkpoint.py sd15-random.safetensors
    python tests/bench/compare.py sd15-random.safetensors [--peer PYTHON] [--diffusers PYTHON] [--size 512] [--rounds 2]

`--peer` is a Python that has stable-diffusion-cpp-python, `--diffusers` one that has diffusers and torch; what is not
given is left out. Every measurement is a fresh process: opening the file warm, a picture of a few steps with
guidance, and the peak memory of the process. diffusers gets networks of the same shapes and its steps are UNet calls
on a batch of two. Prints medians, ratios to the first peer, and the share of the rate at which this processor
multiplies matrices that fit its cache, measured in the same run.
"""

from __future__ import annotations

import argparse
import itertools
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
context = SDContext(model, precision="PRECISION")
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

DIFFUSERS = (
    COMMON
    + """
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
dtype = torch.PRECISION
begin = time.perf_counter()
with torch.device("meta"):
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
for network in (unet, vae):
    network.to_empty(device="cpu").to(dtype).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
vae.to(memory_format=torch.channels_last)
opened = time.perf_counter() - begin
with torch.inference_mode():
    latent = torch.randn(2, 4, size // 8, size // 8, dtype=dtype)
    text = torch.randn(2, 77, 768, dtype=dtype)
    for _ in range(steps):
        unet(latent, 500, encoder_hidden_states=text)
        marks.append(time.perf_counter())
    vae.decode(latent[:1].to(memory_format=torch.channels_last))
finished = time.perf_counter()
report(opened)
"""
)

# Multiplications of matrices that stay in the cache, over and over: what this processor can do.
PEAK = """
import json, time
import torch
rates = {}
for name in ("float32", "bfloat16"):
    a, b = (torch.randn(512, 512, dtype=getattr(torch, name)) for _ in range(2))
    best = 0.0
    for _ in range(50):
        begin = time.perf_counter()
        a @ b
        best = max(best, 2 * 512**3 / (time.perf_counter() - begin) / 1e9)
    rates[name] = best
print("RESULT " + json.dumps(rates))
"""


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
    parser.add_argument("--diffusers", help="a Python with diffusers and torch")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    programs = {
        "ours f32": (sys.executable, OURS.replace("PRECISION", "f32")),
        "ours auto": (sys.executable, OURS.replace("PRECISION", "auto")),
    }
    if arguments.peer:
        programs["sd.cpp"] = (arguments.peer, PEER)
    if arguments.diffusers:
        programs["diffusers f32"] = (arguments.diffusers, DIFFUSERS.replace("PRECISION", "float32"))
        programs["diffusers bf16"] = (arguments.diffusers, DIFFUSERS.replace("PRECISION", "bfloat16"))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, (python, code) in programs.items():
            results[name].append(measure(python, code, arguments.model, arguments.size, arguments.steps))
            print(name, results[name][-1], flush=True)
    if arguments.diffusers:
        print("torch's products in the cache, GFLOP/s:", measure(arguments.diffusers, PEAK, arguments.model, 0, 0))

    print(f"\n{platform.platform()}, {arguments.size}x{arguments.size}, medians of {arguments.rounds}")
    print(f"{'':15} {'open s':>8} {'step s':>8} {'decode s':>9} {'peak GB':>8}")
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    for name, of in median.items():
        print(f"{name:15} {of['open']:8.2f} {of['step']:8.2f} {of['decode']:9.2f} {of['memory']:8.2f}")
    for peer in list(median)[2:]:
        for own in ("ours f32", "ours auto"):
            ratios = [f"{key} {median[peer][key] / median[own][key]:.2f}" for key in median[own]]
            print(f"{peer} / {own}: " + ", ".join(ratios))


if __name__ == "__main__":
    main()
