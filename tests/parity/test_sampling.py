"""Noise, noise levels and samplers against torch, scipy and diffusers as they are installed."""

from __future__ import annotations

import numpy as np
import pytest
import reference_sampling as ref

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
stats = pytest.importorskip("scipy.stats")

from golden import make_sampling as theirs  # noqa: E402

from sdcpp_py import _native  # noqa: E402

# diffusers hands torch tensors to numpy in ways that numpy will drop.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


@pytest.mark.parametrize("seed", theirs.SEEDS)
@pytest.mark.parametrize("n", [*theirs.COUNTS, 4 * 64 * 64, 4 * 128 * 128 + 3])
def test_cpu_noise_is_torchs(seed, n):
    got, want = _native.probe_noise("cpu", seed, n), theirs.torch_noise(seed, n)
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6)  # torch without AVX2 is 2e-6 away, with it 5e-7
    assert ref.relative_rmse(got, want) < 1e-6


@pytest.mark.parametrize("counts", [[3, 20, 3, 3], [16, 5, 5, 33], [1, 1, 1], [17, 17]], ids=str)
def test_the_twins_stream_goes_on_as_torchs(counts):
    """Also that numbers drawn one by one leave a spare one that a later block does not use up."""
    twin, generator = ref.CpuRandn(5), torch.Generator().manual_seed(5)
    for n in counts:
        np.testing.assert_allclose(twin(n), torch.randn(n, generator=generator).numpy(), rtol=0, atol=4e-6)


@pytest.mark.parametrize("seed", theirs.SEEDS)
@pytest.mark.parametrize("n", [4, 16384, 65536])
def test_cuda_noise_is_torchs(seed, n):
    """A GPU's fast sine is good to 5e-7 for angles around 0 and less far from it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator("cuda").manual_seed(seed)
    want = torch.randn(n, generator=generator, device="cuda").cpu().numpy()
    assert ref.relative_rmse(_native.probe_noise("cuda", seed, n), want) < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "steps"), [(name, n) for name, (_, steps) in theirs.DIFFUSERS_LEVELS.items() for n in steps]
)
def test_sigmas_are_diffusers(scheduler, steps):
    want = theirs.DIFFUSERS_LEVELS[scheduler][0](steps)
    got = _native.probe_sigmas(scheduler, steps)
    np.testing.assert_allclose(got, want, rtol=5e-5)
    assert ref.relative_rmse(got, want) < 1e-5


@pytest.mark.parametrize("steps", range(1, 139))
def test_beta_sigmas_are_scipys_quantiles(steps):
    """As ComfyUI takes them, rounded; from 139 steps on two would fall together, and ours are not rounded."""
    quantiles = stats.beta.ppf(1 - np.arange(steps) / steps, 0.6, 0.6)
    want = ref.TRAINED[np.rint(999 * quantiles).astype(int)]
    np.testing.assert_allclose(_native.probe_sigmas("beta", steps)[:-1], want, rtol=5e-7)


@pytest.mark.parametrize(("sampler", "spacing", "steps", "eta"), theirs.SAMPLER_CASES)
def test_samplers_are_diffusers(sampler, spacing, steps, eta):
    """The same sigmas, start and noise; the numpy twin is the third witness."""
    case, want = theirs.diffusers_sample(sampler, spacing, steps, eta)
    got = _native.probe_sample(
        case.sampler,
        np.array(case.sigmas, np.float32),
        lambda x, sigma: ref.toy_denoiser(x, sigma).astype(np.float32),
        case.start(),
        rng=case.rng,
        seed=case.seed,
        skip=case.size,
        eta=case.eta,
    )
    assert ref.relative_rmse(got, want) < 2e-6
    assert ref.relative_rmse(ref.sample(case), want) < 2e-6


def of_flow(scheduler, sigmas: tuple[float, ...], case: ref.Case) -> np.ndarray:
    """A run of diffusers on the toy flow with our noise and levels."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float64)
    draw = case.noise()
    noise = lambda *_, **__: torch.from_numpy(draw())  # noqa: E731
    x = torch.from_numpy(case.start()).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", noise)
        patch.setattr("diffusers.schedulers.scheduling_dpmsolver_multistep.randn_tensor", noise)
        for i, timestep in enumerate(scheduler.timesteps):
            velocity = (x - torch.from_numpy(ref.toy_flow(x.numpy(), sigmas[i]))) / sigmas[i]
            x = scheduler.step(velocity, timestep, x).prev_sample.double()
    return x.numpy()


@pytest.mark.parametrize(("sampler", "first"), [("euler", 1.0), ("lcm", 1.0), ("dpm++2m_sde", 0.95)])
def test_samplers_of_flows_are_diffusers(sampler, first):
    """LCM is what diffusers calls stochastic sampling. diffusers steps float32 numbers."""
    import diffusers

    sigmas = ref.flow_sigmas(8, first=first)
    case = ref.Case(sampler, sigmas, flow=True)
    scheduler = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
        "lcm": lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        "dpm++2m_sde": lambda: diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, algorithm_type="sde-dpmsolver++"
        ),
    }[sampler]()
    assert ref.relative_rmse(ref.sample(case), of_flow(scheduler, sigmas, case)) < 2e-6
