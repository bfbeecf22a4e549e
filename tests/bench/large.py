"""Time and peak memory of the tools on weights as wide as FLUX.1's, each in a process of its own.

python tests/bench/large.py FOLDER [--double 1] [--single 1]

Writes some gigabytes to the folder: a denoiser of 3,072 in f16 with so many blocks, two LoRAs of it, and what the tools
make of them. More blocks take more time and should take no more memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_flux

from sdcpp_py.weights import Tensor, plan, write


def of_flux(double: int, single: int) -> tiny_flux.TinyFlux:
    return tiny_flux.TinyFlux(24, 128, (16, 56, 56), double, single, context=4096, pooled=768)


def shapes(model: tiny_flux.TinyFlux) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as Black Forest Labs' files have them."""
    theirs = tiny_flux.transformer_shapes(model)
    for name, parts in tiny_flux.modules(model).items():
        for leaf in ("weight", "bias"):
            if f"{parts[0]}.{leaf}" in theirs:
                rows = sum(theirs[f"{part}.{leaf}"][0] for part in parts)
                end = "scale" if name.endswith("_norm") else leaf
                yield f"model.diffusion_model.{name}.{end}", (rows, *theirs[f"{parts[0]}.{leaf}"][1:])


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normal numbers in f16, drawn while they are written."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    scale = np.float32(shape[-1] ** -0.5)
    return Tensor(
        name,
        shape,
        "f32",
        lambda first, last: generator.standard_normal((last - first, shape[-1]), np.float32) * scale,
        "f16",
    )


def lora(model: tiny_flux.TinyFlux, path: Path, rank: int, seed: str) -> None:
    """Of every linear, as AI-Toolkit writes it."""
    tensors: list[Tensor] = []
    for name, shape in tiny_flux.transformer_shapes(model).items():
        if len(shape) == 2:
            stem = f"transformer.{name.removesuffix('.weight')}"
            tensors += [
                random(f"{stem}.lora_A.weight{seed}", (rank, shape[1])),
                random(f"{stem}.lora_B.weight{seed}", (shape[0], rank)),
            ]
    named = [Tensor(t.name.removesuffix(seed), t.shape, t.type, t.read, t.kept) for t in tensors]
    write(plan(named, path))


def measure(what: str, *arguments: Any) -> str:
    """One row of the table."""
    command = [sys.executable, "-m", "sdcpp_py", *map(str, arguments), "-q"]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - begin
    return f"| {what} | {seconds:.1f} s | {used.ru_utime + used.ru_stime:.1f} s | {used.ru_maxrss / 1024:,.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=1)
    parser.add_argument("--only", help="rows whose name has this")
    arguments = parser.parse_args()

    model = of_flux(arguments.double, arguments.single)
    folder = arguments.folder
    base, tuned, a, b = (folder / f"{name}.safetensors" for name in ("base", "tuned", "a", "b"))
    all_shapes = dict(shapes(model))
    write(plan([random(*entry) for entry in all_shapes.items()], base))
    lora(model, a, 16, "a")
    lora(model, b, 32, "b")
    if arguments.only:  # the others may need what this one writes
        measure("", "lora", "bake", base, f"{a}:0.8", f"{b}:0.3", "-o", tuned)
    out = folder / "out.safetensors"
    gguf = out.with_suffix(".gguf")
    rows = {
        "convert to q8_0": ("convert", base, gguf, "--type", "q8_0"),
        "convert to q4_K": ("convert", base, gguf, "--type", "q4_K"),
        "lora bake, two": ("lora", "bake", base, f"{a}:0.8", f"{b}:0.3", "-o", tuned),
        "lora bake to q8_0": ("lora", "bake", base, f"{a}:0.8", "-o", gguf, "--type", "q8_0"),
        "lora extract --rank 48": ("lora", "extract", tuned, base, "--rank", 48, "-o", out),
        "lora extract --energy 0.9": ("lora", "extract", tuned, base, "--energy", 0.9, "-o", out),
        "lora convert": ("lora", "convert", a, "--to", "kohya", "-o", out),
        "lora merge": ("lora", "merge", f"{a}:0.8", f"{b}:0.3", "-o", out),
        "lora merge --rank 16": ("lora", "merge", f"{a}:0.8", f"{b}:0.3", "--rank", 16, "-o", out),
        "lora merge, ties": ("lora", "merge", a, b, "--method", "ties", "--rank", 16, "-o", out),
        "lora merge, dare": ("lora", "merge", a, b, "--method", "dare", "--rank", 16, "-o", out),
        "lora merge, dare-ties": ("lora", "merge", a, b, "--method", "dare-ties", "--rank", 16, "-o", out),
        "lora resize --energy 0.9": ("lora", "resize", b, "--energy", 0.9, "-o", out),
    }
    largest = max(float(np.prod(shape)) for shape in all_shapes.values())
    print(f"{base.stat().st_size / 1e6:,.0f} MB; the largest tensor in float32 is {largest * 4 / 2**20:,.0f} MB")
    print("| tool | time | processor time | peak memory |\n|---|---|---|---|")
    for what, command in rows.items():
        if arguments.only is None or arguments.only in what:
            print(measure(what, *command), flush=True)


if __name__ == "__main__":
    main()
