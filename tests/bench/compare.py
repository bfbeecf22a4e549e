"""Ours beside stable-diffusion-cpp-python, diffusers and OpenVINO, in alternation and in one run.

    python tests/bench/checkpoint.py sd15-random.safetensors
    python tests/bench/compare.py sd15-random.safetensors [--peer PYTHON] [--diffusers PYTHON] [--openvino PYTHON]
    python tests/bench/compare.py sdxl-random.safetensors --family sdxl --size 512 --steps 2 --rounds 1 ...
    python tests/bench/compare.py FOLDER --family flux --size 256 --steps 2 --rounds 1 ...

`--peer` is a Python that has stable-diffusion-cpp-python, `--diffusers` one that has diffusers and torch, `--openvino`
one that has OpenVINO as well; what is not given is left out. Every measurement is a fresh process: opening the file
warm, a picture of a few steps, with guidance where the family has it, and the largest resident memory of the process
and of its part that no file stands behind. Networks of diffusers have the same shapes, and a step of theirs is a UNet
call on a batch of two. Prints medians, ratios, and the rate at which torch multiplies matrices that fit the cache,
measured in the same run. FLUX is for ours and stable-diffusion.cpp: in torch's types it takes 24 GB alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import checkpoint
import tiny

COMMON = """
import json, resource, sys, threading, time
job = json.loads(sys.argv[1])
size, steps = job["size"], job["steps"]
marks, anonymous = [], [0]
def watch():
    while True:
        with open("/proc/self/status") as status:
            of = dict(line.split(":", 1) for line in status)
        anonymous[0] = max(anonymous[0], int(of["RssAnon"].split()[0]))
        time.sleep(0.05)
if sys.platform == "linux":
    threading.Thread(target=watch, daemon=True).start()
def report(opened, **more):
    times = [b - a for a, b in zip(marks, marks[1:])]
    print("RESULT " + json.dumps({
        "open": opened, "step": min(times) if times else None, "decode": finished - marks[-1],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, "without files": anonymous[0] / 1e6,
        **more}))
"""

OURS = (
    COMMON
    + """
from sdcpp_py import SDContext
begin = time.perf_counter()
context = SDContext(**job["ours"], precision="PRECISION")
opened = time.perf_counter() - begin
estimate = context.estimate_memory(width=size, height=size).peak
context.generate("a cat", width=size, height=size, steps=steps, seed=1, sampler="euler", **job["options"],
                 on_step=lambda *_: marks.append(time.perf_counter()))
finished = time.perf_counter()
report(opened, estimate=estimate / 1e9)
"""
)

PEER = (
    COMMON
    + """
from stable_diffusion_cpp import StableDiffusion
begin = time.perf_counter()
context = StableDiffusion(**job["peer"], verbose=False)
opened = time.perf_counter() - begin
context.generate_image(prompt="a cat", width=size, height=size, sample_steps=steps, seed=1, sample_method="euler",
                       **job["options"], progress_callback=lambda *_: marks.append(time.perf_counter()))
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
    unet = UNet2DConditionModel.from_config(job["unet"])
    vae = AutoencoderKL.from_config(job["vae"])
for network in (unet, vae):
    network.to(dtype).to_empty(device="cpu").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
vae.to(memory_format=torch.channels_last)
opened = time.perf_counter() - begin
with torch.inference_mode():
    latent = torch.randn(2, 4, size // 8, size // 8, dtype=dtype)
    text = torch.randn(2, 77, unet.config.cross_attention_dim, dtype=dtype)
    vector = {"text_embeds": torch.randn(2, 1280, dtype=dtype), "time_ids": torch.ones(2, 6, dtype=dtype)}
    for _ in range(steps):
        unet(latent, 500, encoder_hidden_states=text, added_cond_kwargs=vector)
        marks.append(time.perf_counter())
    vae.decode(latent[:1].to(memory_format=torch.channels_last))
finished = time.perf_counter()
report(opened)
"""
)

# diffusers' networks compiled by OpenVINO for shapes that do not change.
OPENVINO = (
    DIFFUSERS[: DIFFUSERS.index("with torch.inference_mode")].replace("torch.PRECISION", "torch.float32")
    + """
import openvino
options = {"INFERENCE_PRECISION_HINT": "KIND"}
latent = torch.randn(2, 4, size // 8, size // 8)
text = torch.randn(2, 77, 768)
class Decoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.vae = vae
    def forward(self, latent):
        return self.vae.decode(latent).sample
unet.requires_grad_(False), vae.requires_grad_(False)
with torch.no_grad():
    example = {"sample": latent, "timestep": torch.tensor(500), "encoder_hidden_states": text}
    unet_model = openvino.convert_model(unet, example_input=example, input=[list(latent.shape), [], list(text.shape)])
    decoder_model = openvino.convert_model(Decoder(), example_input=latent[:1], input=[[1, *latent.shape[1:]]])
del unet
compiled, decoder = (openvino.compile_model(model, "CPU", options) for model in (unet_model, decoder_model))
for _ in range(steps):
    compiled([latent.numpy(), 500, text.numpy()])
    marks.append(time.perf_counter())
decoder([latent[:1].numpy()])
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


@dataclass(frozen=True)
class Family:
    """How each program is given the files of a family, {} standing for the path; what a picture is asked for; sizes."""

    ours: dict[str, str]
    peer: dict[str, str]
    options: dict[str, float]
    sizes: tiny.TinySD1 | None = field(default=None)


FAMILIES = {
    "sd15": Family({"model": "{}"}, {"model_path": "{}"}, {"cfg_scale": 7.0}, checkpoint.SD15),
    "sdxl": Family({"model": "{}"}, {"model_path": "{}"}, {"cfg_scale": 7.0}, checkpoint.SDXL),
    "flux": Family(
        {
            "model": "{}/flux-TYPE.gguf",
            "clip_l": "{}/clip_l.safetensors",
            "t5xxl": "{}/t5xxl-q8_0.gguf",
            "vae": "{}/ae.safetensors",
        },
        {
            "diffusion_model_path": "{}/flux-TYPE.gguf",
            "clip_l_path": "{}/clip_l.safetensors",
            "t5xxl_path": "{}/t5xxl-q8_0.gguf",
            "vae_path": "{}/ae.safetensors",
        },
        {"cfg_scale": 1.0},
    ),
}


def job(family: Family, path: Path, kind: str, size: int, steps: int) -> str:
    """What a program is told, as JSON."""

    def filled(files: dict[str, str]) -> dict[str, str]:
        return {name: file.replace("{}", str(path)).replace("TYPE", kind) for name, file in files.items()}

    configs = tiny.configs(family.sizes) if family.sizes else {"unet": {}, "vae": {}}
    of = {"ours": filled(family.ours), "peer": filled(family.peer), "options": family.options}
    return json.dumps({**of, "unet": configs["unet"], "vae": configs["vae"], "size": size, "steps": steps})


def measure(python: str, code: str, job: str) -> dict[str, float]:
    """One fresh process; seconds, and gigabytes of resident memory."""
    done = subprocess.run([python, "-c", textwrap.dedent(code), job], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{python} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the file; of FLUX the folder that checkpoint.py made")
    parser.add_argument("--family", choices=tuple(FAMILIES), default="sd15")
    parser.add_argument("--type", default="q4_K", help="of FLUX's transformer")
    parser.add_argument("--precision", action="append", help="of ours, may be repeated [default: f32 and auto]")
    parser.add_argument("--peer", help="a Python with stable-diffusion-cpp-python")
    parser.add_argument("--diffusers", help="a Python with diffusers and torch")
    parser.add_argument("--openvino", help="a Python with diffusers, torch and openvino")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()

    family = FAMILIES[arguments.family]
    if (not family.sizes and arguments.diffusers) or (arguments.family != "sd15" and arguments.openvino):
        parser.error(f"there is no {arguments.family} of diffusers or OpenVINO here")
    told = job(family, arguments.model, arguments.type, arguments.size, arguments.steps)
    precisions = arguments.precision or ["f32", "auto"]
    programs = {f"ours {name}": (sys.executable, OURS.replace("PRECISION", name)) for name in precisions}
    if arguments.peer:
        programs["sd.cpp"] = (arguments.peer, PEER)
    if arguments.diffusers:
        programs["diffusers f32"] = (arguments.diffusers, DIFFUSERS.replace("PRECISION", "float32"))
        programs["diffusers bf16"] = (arguments.diffusers, DIFFUSERS.replace("PRECISION", "bfloat16"))
    if arguments.openvino:
        programs["OpenVINO f32"] = (arguments.openvino, OPENVINO.replace("KIND", "f32"))
        programs["OpenVINO bf16"] = (arguments.openvino, OPENVINO.replace("KIND", "bf16"))
    results: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, (python, code) in programs.items():
            results[name].append(measure(python, code, told))
            print(name, results[name][-1], flush=True)
    if arguments.diffusers:
        print("torch's products in the cache, GFLOP/s:", measure(arguments.diffusers, PEAK, told))

    print(f"\n{platform.platform()}, {arguments.size}x{arguments.size}, medians of {arguments.rounds}")
    print(f"{'':15} {'open s':>8} {'step s':>8} {'decode s':>9} {'peak GB':>8} {'without files':>14} {'estimate':>9}")
    median = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in results.items()
    }
    for name, of in median.items():
        estimate = f"{of['estimate']:9.2f}" if "estimate" in of else ""
        print(f"{name:15} {of['open']:8.2f} {of['step']:8.2f} {of['decode']:9.2f} {of['memory']:8.2f} "
              f"{of['without files']:14.2f} {estimate}")  # fmt: skip
    for peer in list(median)[len(precisions) :]:
        for own in list(median)[: len(precisions)]:
            ratios = [f"{key} {median[peer][key] / median[own][key]:.2f}" for key in median[peer]]
            print(f"{peer} / {own}: " + ", ".join(ratios))


if __name__ == "__main__":
    main()
