"""What LoRAs cost: switching them, and a step with them; beside stable-diffusion-cpp-python and diffusers in one run.

    python tests/bench/checkpoint.py sd15-random.safetensors
    python tests/bench/loras.py sd15-random.safetensors [--precision f32] [--peer PYTHON] [--diffusers PYTHON] [--size 512]

The LoRAs are made here: four files in the kohya convention, of rank 32 on the 128 linears of all attentions. Prints
milliseconds, medians; a step's share is measured with and without LoRAs in alternation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from checkpoint import SD15

from sdcpp_py import SDContext

RANK, FILES = 32, 4

PEER = """
import json, sys, time
from stable_diffusion_cpp import StableDiffusion
model, folder, mode, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
context = StableDiffusion(model_path=model, lora_model_dir=folder, lora_apply_mode=mode, verbose=False)
def paint(prompt):
    marks = [time.perf_counter()]
    context.generate_image(prompt=prompt, width=size, height=size, sample_steps=2, cfg_scale=7.0, seed=1,
                           sample_method="euler", progress_callback=lambda *_: marks.append(time.perf_counter()))
    return 1e3 * (marks[-2] - marks[0]), 1e3 * (marks[-1] - marks[-2])
paint("a cat")
plain = paint("a cat")
first = paint("a cat<lora:x0:0.8>")
again = paint("a cat<lora:x0:0.5>")
drop = paint("a cat")
print("RESULT " + json.dumps({"first use": first[0] - plain[0], "other multiplier": again[0] - plain[0],
                              "drop": drop[0] - plain[0], "step, ratio": first[1] / plain[1]}))
"""

DIFFUSERS = """
import json, sys, time, warnings
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from peft import LoraConfig
warnings.simplefilter("ignore")
folder, size, dtype = sys.argv[2], int(sys.argv[4]), getattr(torch, sys.argv[3])
with torch.device("meta"):
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
unet.to_empty(device="cpu").to(dtype).eval()
for parameter in unet.parameters():
    torch.nn.init.normal_(parameter.data, std=0.02)
from safetensors.torch import load_file
def timed(work):
    begin = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - begin)
def load(i):
    state, _ = _convert_non_diffusers_lora_to_diffusers(load_file(f"{folder}/x{i}.safetensors"))
    unet.load_lora_adapter(state, prefix="unet", adapter_name=f"x{i}")
latent, text = torch.randn(2, 4, size // 8, size // 8, dtype=dtype), torch.randn(2, 77, 768, dtype=dtype)
def step():
    with torch.inference_mode():
        return timed(lambda: unet(latent, 500, encoder_hidden_states=text))
step()
plain = min(step() for _ in range(3))
results = {"first use": timed(lambda: load(0))}
one = min(step() for _ in range(3))
results["other multiplier"] = timed(lambda: unet.set_adapters(["x0"], [0.5]))
load(1)
results["other set"] = timed(lambda: unet.set_adapters(["x1"], [0.5]))
load(2), load(3)
unet.set_adapters([f"x{i}" for i in range(4)], [0.5] * 4)
four = min(step() for _ in range(3))
results["drop"] = timed(lambda: unet.disable_adapters() if hasattr(unet, "disable_adapters") else unet.disable_lora())
results["step with 1, ratio"], results["step with 4, ratio"] = one / plain, four / plain
print("RESULT " + json.dumps(results))
"""


def make_loras(folder: Path) -> None:
    """Four kohya files of random factors."""
    shapes = {name: shape for name, shape in tiny.unet_shapes(SD15).items() if ".attn" in name and len(shape) == 2}
    for i in range(FILES):
        generator = np.random.default_rng(i)
        tensors: dict[str, np.ndarray] = {}
        for name, (outputs, inputs) in shapes.items():
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            down, up = generator.standard_normal((RANK, inputs)), generator.standard_normal((outputs, RANK))
            tensors[f"{key}.lora_down.weight"] = (down / np.sqrt(inputs)).astype(np.float16)
            tensors[f"{key}.lora_up.weight"] = (up * 0.02).astype(np.float16)
            tensors[f"{key}.alpha"] = np.array(RANK, dtype=np.float16)
        save_file(tensors, folder / f"x{i}.safetensors")


def milliseconds(work: object) -> float:
    begin = time.perf_counter()
    work()  # type: ignore[operator]
    return 1e3 * (time.perf_counter() - begin)


def switching(model: Path, folder: Path, mode: str, precision: str) -> dict[str, float]:
    """Milliseconds of each kind of change, of the second that is made; the first has a cold cache."""
    with SDContext(model, lora_dir=folder, lora_mode=mode, precision=precision) as sd_ctx:
        apply = sd_ctx.apply_loras
        results = {"first use": milliseconds(lambda: apply({"x0": 0.8}))}
        apply({"x1": 0.8})
        results["other set"] = statistics.median(
            milliseconds(lambda name=name: apply({name: 0.8})) for name in ("x0", "x1", "x0", "x1", "x0")
        )
        results["other multiplier"] = statistics.median(
            milliseconds(lambda value=value: apply({"x0": value})) for value in (0.1, 0.2, 0.3, 0.4, 0.5)
        )
        results["drop"] = milliseconds(lambda: apply({}))
        return results


def steps(model: Path, folder: Path, precision: str, size: int, rounds: int) -> dict[str, float]:
    """Ratios of a step with LoRAs to one without."""
    with SDContext(model, lora_dir=folder, precision=precision) as sd_ctx:

        def step(loras: int) -> float:
            marks: list[float] = []
            prompt = "a cat" + "".join(f"<lora:x{i}:0.5>" for i in range(loras))
            options = {"width": size, "height": size, "steps": 4, "seed": 1, "sampler": "euler"}

            def on_step(*_: object) -> bool:
                marks.append(time.perf_counter())
                return len(marks) < 3  # the picture itself is not wanted

            try:
                sd_ctx.generate(prompt, on_step=on_step, **options)
            except Exception as error:
                if type(error).__name__ != "Cancelled":
                    raise
            return min(after - before for before, after in itertools.pairwise(marks))

        times: dict[int, list[float]] = {0: [], 1: [], 2: [], 4: []}
        for _ in range(rounds):
            for loras, of in times.items():
                of.append(step(loras))
        plain = min(times[0])
        return {f"step with {loras}, ratio": min(of) / plain for loras, of in times.items() if loras} | {
            "step, ms": 1e3 * plain
        }


def peer(python: str, code: str, *arguments: object) -> dict[str, float]:
    command = [python, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{python} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def show(title: str, results: dict[str, float]) -> None:
    print(f"{title}: " + ", ".join(f"{name} {value:.3g}" for name, value in results.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--precision", default="f32")
    parser.add_argument("--peer", help="a Python with stable-diffusion-cpp-python")
    parser.add_argument("--diffusers", help="a Python with diffusers and torch")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_loras(folder)
        for mode in ("runtime", "restore"):
            show(f"ours, {mode}", switching(arguments.model, folder, mode, arguments.precision))
        show(
            f"ours, {arguments.precision}",
            steps(arguments.model, folder, arguments.precision, arguments.size, arguments.rounds),
        )
        if arguments.peer:
            for mode in ("immediately", "at_runtime"):
                show(f"sd.cpp, {mode}", peer(arguments.peer, PEER, arguments.model, folder, mode, arguments.size))
        if arguments.diffusers:
            dtype = "bfloat16" if arguments.precision == "bf16" else "float32"
            show(
                f"diffusers, {dtype}",
                peer(arguments.diffusers, DIFFUSERS, arguments.model, folder, dtype, arguments.size),
            )


if __name__ == "__main__":
    main()
