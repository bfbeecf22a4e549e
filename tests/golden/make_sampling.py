"""What torch and diffusers say about noise, noise levels and samplers; writes ``sampling.npz``.

``python tests/golden/make_sampling.py --make`` with the parity requirements installed. The parity tests call
the same functions live, the unit tests read the file.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import torch
from diffusers.schedulers import AysSchedules

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
import reference_sampling as ref

SD1 = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# ---------------------------------------------------------------------------------------------- noise

SEEDS = [0, 42, 2**32 - 1, 2**32 + 5, 2**63 + 7, 2**64 - 1]
COUNTS = [1, 15, 16, 17, 64, 1003]


def torch_noise(seed: int, n: int) -> np.ndarray:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).numpy()


# --------------------------------------------------------------------------------------- noise levels


def _levels(steps: int, **config) -> np.ndarray:
    scheduler = diffusers.EulerDiscreteScheduler(**SD1, **config)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.numpy()


# Ours: what it is in diffusers, and for which numbers of steps. For others diffusers rounds to whole
# timesteps or interpolates in sigma, not in log(sigma); its "beta" is another schedule.
DIFFUSERS_LEVELS = {
    "normal": (lambda n: _levels(n, timestep_spacing="linspace"), [2, 4, 10, 28, 38, 1000]),
    "karras": (lambda n: _levels(n, use_karras_sigmas=True), [2, 7, 20, 100]),
    "exponential": (lambda n: _levels(n, use_exponential_sigmas=True), [2, 7, 20, 100]),
    "sgm_uniform": (lambda n: np.delete(_levels(n + 1, timestep_spacing="linspace"), -2), [1, 3, 9, 27, 37]),
    "simple": (lambda n: _levels(n, timestep_spacing="trailing"), [1, 2, 8, 20, 50, 1000]),
    "ddim_uniform": (lambda n: _levels(n, timestep_spacing="leading", steps_offset=1), [1, 2, 7, 20, 30]),
    "ays": (lambda n: np.array(AysSchedules["StableDiffusionSigmas"]), [10]),
}

ZERO_SNR_LEVELS = {
    "normal": (lambda n: _levels(n, timestep_spacing="linspace", rescale_betas_zero_snr=True), [4, 10, 28]),
    "simple": (lambda n: _levels(n, timestep_spacing="trailing", rescale_betas_zero_snr=True), [1, 8, 20, 1000]),
    "karras": (lambda n: _levels(n, use_karras_sigmas=True, rescale_betas_zero_snr=True), [7, 20]),
}

# ------------------------------------------------------------------------------------------- samplers

# These step x / sqrt(1 + sigma^2).
VARIANCE_PRESERVING = {"dpm++2s_a", "dpm++2m", "dpm++2m_sde", "ddim", "lcm", "tcd", "unipc"}
TWO_CALLS = {"heun", "dpm2", "dpm2_a"}  # of step() for one step
MIDDLE = {"dpm2": 0, "dpm2_a": -1}  # where call i, if it is a second one, finds its sigma

LINSPACE = ("linspace", {"timestep_spacing": "linspace"}, 10)
TRAILING = ("trailing", {"timestep_spacing": "trailing"}, 7)
KARRAS = ("karras", {"use_karras_sigmas": True}, 12)
EXPONENTIAL = ("exponential", {"use_exponential_sigmas": True}, 12)
LEVELS = [LINSPACE, KARRAS]
DIFFUSERS_SAMPLERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}, LEVELS),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}, [LINSPACE, TRAILING]),
    "heun": (diffusers.HeunDiscreteScheduler, {}, LEVELS),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}, LEVELS),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}, LEVELS),
    # Without noise, and with the middles among the sigmas: in log(sigma) they must be evenly spaced.
    "dpm++2s_a": (diffusers.DPMSolverSinglestepScheduler, {}, [EXPONENTIAL]),
    "dpm++2m": (diffusers.DPMSolverMultistepScheduler, {}, LEVELS),
    "dpm++2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, LEVELS),
    "ddim": (
        diffusers.DDIMScheduler,
        {"clip_sample": False, "timestep_spacing": "leading", "steps_offset": 1},
        [("leading", {}, 10), ("leading", {}, 30)],
    ),
    "lcm": (diffusers.LCMScheduler, {}, [("lcm", {}, 4), ("lcm", {}, 8)]),
    "tcd": (diffusers.TCDScheduler, {}, [("tcd", {}, 4), ("tcd", {}, 8)]),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, LEVELS),
}
SAMPLER_CASES = [
    (sampler, spacing, steps, eta)
    for sampler, (_, _, levels) in DIFFUSERS_SAMPLERS.items()
    for spacing, _, steps in levels
    for eta in {"ddim": [0.0, 0.5, 1.0], "dpm++2s_a": [0.0], "tcd": [0.0, 0.3, 1.0]}.get(sampler, [-1.0])
]


def diffusers_sample(sampler: str, spacing: str, steps: int, eta: float) -> tuple[ref.Case, np.ndarray]:
    """A run of diffusers on the toy denoiser with our noise: the case as ours must run it, and the result."""
    kind, config, levels = DIFFUSERS_SAMPLERS[sampler]
    config = {**SD1, **config, **next(extra for name, extra, n in levels if (name, n) == (spacing, steps))}
    scheduler = kind(**config)
    scheduler.set_timesteps(steps)

    if sampler in ("ddim", "lcm", "tcd"):
        alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps]
        evaluated = torch.sqrt(1 / alpha_bar - 1)
        # TCD's scheduler ends at timestep 0, not at 0 noise.
        sigmas = [*evaluated.tolist(), ref.TRAINED[0] if sampler == "tcd" else 0.0]
    else:
        evaluated = scheduler.sigmas.double()
        sigmas = list(dict.fromkeys(evaluated.tolist()))  # Heun's and DPM2's are there twice
    if sampler == "dpm++2s_a":
        sigmas = sigmas[:-2:2]  # the last two steps are of first order in diffusers
        scheduler.timesteps = scheduler.timesteps[: 2 * len(sigmas) - 2]
    case = ref.Case(sampler, tuple(sigmas), eta)

    draw, drawn = case.noise(), []

    def noise_of_step(*_args, **_kwargs) -> torch.Tensor:
        while len(drawn) <= step:
            drawn.append(torch.from_numpy(draw()))
        return drawn[step]

    x = torch.from_numpy(case.start()).double()
    if sampler in VARIANCE_PRESERVING:
        x = x / (1 + sigmas[0] ** 2) ** 0.5
    module = import_module(kind.__module__)
    with patch.object(module, "randn_tensor", noise_of_step, create=True):
        for i, timestep in enumerate(scheduler.timesteps):
            step = i // 2 if sampler in TWO_CALLS else i
            scheduler.scale_model_input(x, timestep)  # it warns otherwise
            sigma = evaluated[i].item()
            if sampler in MIDDLE and i % 2:
                sigma = scheduler.sigmas_interpol[i + MIDDLE[sampler]].item()
            scale = (1 + sigma**2) ** 0.5 if sampler in VARIANCE_PRESERVING else 1.0
            noisy = x.double() * scale
            epsilon = (noisy - torch.from_numpy(ref.toy_denoiser(noisy.numpy(), sigma))) / sigma
            extra = {"eta": eta} if sampler in ("ddim", "tcd") else {}
            x = scheduler.step(epsilon, timestep, x.double(), **extra).prev_sample
    if sampler in VARIANCE_PRESERVING:
        x = x * (1 + sigmas[-1] ** 2) ** 0.5
    return case, x.numpy().astype(np.float32)


def sampler_key(sampler: str, spacing: str, steps: int, eta: float) -> str:
    return f"sample/{sampler}/{spacing}/{steps}/{eta:g}"


def make() -> None:
    golden = {"made_with": np.array(f"torch {torch.__version__}, diffusers {diffusers.__version__}")}
    for seed in SEEDS:
        for n in COUNTS:
            golden[f"noise/{seed}/{n}"] = torch_noise(seed, n)
    for scheduler, (levels, all_steps) in DIFFUSERS_LEVELS.items():
        for steps in all_steps:
            golden[f"sigmas/{scheduler}/{steps}"] = levels(steps).astype(np.float32)
    for scheduler, (levels, all_steps) in ZERO_SNR_LEVELS.items():
        for steps in all_steps:
            golden[f"zero-snr/{scheduler}/{steps}"] = levels(steps).astype(np.float32)
    for arguments in SAMPLER_CASES:
        case, result = diffusers_sample(*arguments)
        golden[sampler_key(*arguments)] = result
        golden[sampler_key(*arguments) + "/levels"] = np.array(case.sigmas, np.float32)
    np.savez_compressed(Path(__file__).with_name("sampling.npz"), **golden)


if __name__ == "__main__":
    if sys.argv[1:] != ["--make"]:
        sys.exit(__doc__)
    make()
