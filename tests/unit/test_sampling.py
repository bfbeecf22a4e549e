"""Noise, noise levels and samplers against their numpy twins, and what torch and diffusers said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_sampling as ref

from sdcpp_py import _native

ONES = np.ones((2, 40), np.float32)
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "sampling.npz")


def keys(kind: str) -> list[str]:
    return [key for key in GOLDEN.files if key.startswith(kind + "/") and not key.endswith("/levels")]


def toy(x: np.ndarray, sigma: float) -> np.ndarray:
    return ref.toy_denoiser(x, sigma).astype(np.float32)


def toy_flow(x: np.ndarray, sigma: float) -> np.ndarray:
    return ref.toy_flow(x, sigma).astype(np.float32)


def run(case: ref.Case, denoise=None, x=None) -> np.ndarray:
    return _native.probe_sample(
        case.sampler,
        np.array(case.sigmas, np.float32),
        denoise or (toy_flow if case.flow else toy),
        case.start() if x is None else x,
        rng=case.rng,
        seed=case.seed,
        skip=case.size,
        eta=case.eta,
        flow=case.flow,
    )


def engine_sigmas(scheduler: str, steps: int) -> tuple[float, ...]:
    return tuple(_native.probe_sigmas(scheduler, steps).tolist())


# ---------------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("key", keys("noise"))
def test_cpu_noise_is_torchs(key):
    """The same bits; logarithm, sine and cosine differ from torch's vector ones in the last places."""
    _, seed, n = key.split("/")
    np.testing.assert_allclose(_native.probe_noise("cpu", int(seed), int(n)), GOLDEN[key], rtol=0, atol=2e-6)


@pytest.mark.parametrize("rng", ref.RANDN)
@pytest.mark.parametrize("seed", [0, 3, 2**32 + 5, 2**64 - 1])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1003])
def test_noise_matches_its_twin(rng, seed, n):
    np.testing.assert_allclose(_native.probe_noise(rng, seed, n), ref.RANDN[rng](seed)(n), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rng", ref.RANDN)
@pytest.mark.parametrize("n", [5, 17, 32])
def test_later_noise_goes_on_in_the_same_stream(rng, n):
    """LCM with a denoiser that says 0 is handed sigma times fresh noise at every step."""
    seen = []

    def denoise(x, sigma):
        seen.append(x / sigma)
        return np.zeros_like(x)

    run(ref.Case("lcm", (5.0, 4.0, 3.0, 2.0, 0.0), rng=rng, images=1, size=n), denoise)
    stream = ref.RANDN[rng](7)
    np.testing.assert_allclose(seen, [[stream(n)] for _ in range(4)], rtol=0, atol=2e-6)


def test_philox_gives_the_published_answers():
    """Random123's known answers, for the twin; the engine's numbers are compared with the twin's."""
    assert ref.philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert ref.philox((2**32 - 1,) * 4, (2**32 - 1,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert ref.philox((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == (
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1,
    )  # fmt: skip


def test_cuda_noise_is_what_torch_printed_on_gpus():
    """torch.manual_seed(0) and (42), randn(..., device="cuda"), as in torch's issues and documentation."""
    seed_0 = [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284]  # fmt: skip
    np.testing.assert_allclose(_native.probe_noise("cuda", 0, 8), seed_0, rtol=0, atol=5.1e-5)
    seed_42 = _native.probe_noise("cuda", 42, 4096)  # the first rows of [64, 2048]: pytorch issue 158398
    np.testing.assert_allclose(seed_42[:3], [0.1940, 2.1614, -0.1721], rtol=0, atol=5.1e-5)
    np.testing.assert_allclose(seed_42[2045:2049], [1.4540, -2.7733, -0.8932, -0.4574], rtol=0, atol=5.1e-5)


# --------------------------------------------------------------------------------------- noise levels


@pytest.mark.parametrize("scheduler", ref.SIGMAS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 20, 30, 98, 100, 138, 139, 333, 1000])
def test_sigmas_match_their_twin(scheduler, steps):
    got = _native.probe_sigmas(scheduler, steps)
    np.testing.assert_allclose(got, ref.sigmas(scheduler, steps), rtol=5e-7)


@pytest.mark.parametrize("key", keys("sigmas"))
def test_sigmas_match_diffusers(key):
    """diffusers multiplies its alphas in float32, which shows in the smallest sigmas (to 2e-5)."""
    _, scheduler, steps = key.split("/")
    got = _native.probe_sigmas(scheduler, int(steps))
    np.testing.assert_allclose(got, GOLDEN[key], rtol=5e-5)
    assert ref.relative_rmse(got, GOLDEN[key]) < 1e-5


@pytest.mark.parametrize("key", keys("zero-snr"))
def test_zero_snr_sigmas_match_diffusers(key):
    """In float32 diffusers' highest alphas but the last keep four digits: so far from 0 is what is left of them."""
    _, scheduler, steps = key.split("/")
    got = _native.probe_sigmas(scheduler, int(steps), zero_snr=True)
    np.testing.assert_allclose(got, GOLDEN[key], rtol=2e-3)


def test_zero_snr_sigmas_match_their_twin():
    np.testing.assert_allclose(_native.probe_sigmas("simple", 1000, zero_snr=True)[:-1], ref.ZERO_SNR[::-1], rtol=5e-7)


@pytest.mark.parametrize("scheduler", ref.SIGMAS)
@pytest.mark.parametrize("steps", [1, 2, 150, 999, 1000, 1001, 10000])
def test_sigmas_fall_to_zero_or_a_sentence_says_why_not(scheduler, steps):
    if steps > 1000 and scheduler in ("simple", "ddim_uniform"):
        with pytest.raises(Exception, match=rf"steps {steps}: scheduler '{scheduler}' picks from 1000"):
            _native.probe_sigmas(scheduler, steps)
    else:
        sigmas = _native.probe_sigmas(scheduler, steps)
        assert sigmas.shape == (steps + 1,)
        assert sigmas[-1] == 0
        assert (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("steps", [-1, 0, 10001])
def test_a_run_needs_between_one_and_ten_thousand_steps(steps):
    with pytest.raises(Exception, match=f"steps {steps}: must be between 1 and 10000"):
        _native.probe_sigmas("normal", steps)


# ------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
@pytest.mark.parametrize("rng", ref.RANDN)
@pytest.mark.parametrize("eta", [-1.0, 0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("scheduler", "steps"), [("normal", 7), ("karras", 12), ("beta", 50), ("simple", 1)])
def test_samplers_match_their_twins(sampler, rng, eta, scheduler, steps):
    case = ref.Case(sampler, engine_sigmas(scheduler, steps), eta, rng)
    assert ref.relative_rmse(run(case), ref.sample(case)) < 2e-6


@pytest.mark.parametrize("key", keys("sample"))
def test_samplers_match_diffusers(key):
    _, sampler, _, _, eta = key.split("/")
    case = ref.Case(sampler, tuple(GOLDEN[key + "/levels"].tolist()), float(eta))
    assert ref.relative_rmse(run(case), GOLDEN[key]) < 2e-6


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
def test_an_image_of_a_batch_is_that_image_alone(sampler):
    together = run(ref.Case(sampler, engine_sigmas("karras", 8), images=3))
    for k in range(3):
        alone = run(ref.Case(sampler, engine_sigmas("karras", 8), images=1, seed=7 + k))
        np.testing.assert_array_equal(together[k], alone[0])


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
def test_a_single_step_to_zero_is_the_denoiser(sampler):
    case = ref.Case(sampler, (3.0, 0.0))
    np.testing.assert_array_equal(run(case), toy(case.start(), 3.0))


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
def test_a_run_may_begin_and_end_between(sampler):
    """As image-to-image does: the last levels of a longer run; or leaving noise for another run."""
    sigmas = engine_sigmas("normal", 20)
    for part in (sigmas[15:], sigmas[:6], sigmas[4:6]):
        case = ref.Case(sampler, part)
        assert ref.relative_rmse(run(case), ref.sample(case)) < 2e-6
    untouched = ref.Case(sampler, sigmas[-1:])
    np.testing.assert_array_equal(run(untouched, x=ONES), ONES)


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
@pytest.mark.parametrize("scheduler", ref.SIGMAS)
def test_nothing_is_ever_nan(sampler, scheduler):
    for steps in (1, 2, 3, 1000):
        assert np.isfinite(run(ref.Case(sampler, engine_sigmas(scheduler, steps), images=1, size=4))).all()


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
def test_samples_are_distributed_as_the_data(sampler):
    """The toy denoiser is exact, so samplers draw from its mixture: mean 0.22, standard deviation 0.711."""
    if sampler == "lcm":
        pytest.skip("LCM's consistency function is not the posterior mean")
    eta = (
        0.01 if sampler == "tcd" else -1.0
    )  # its own leads far beyond the next level, as a consistency function allows
    x = run(ref.Case(sampler, engine_sigmas("karras", 60), eta, images=1, size=20000))
    assert x.mean() == pytest.approx(0.22, abs=0.03)
    assert x.std() == pytest.approx(0.711, rel=0.05)  # euler_a, of first order, is 3.5 percent low


@pytest.mark.parametrize("sampler", ref.SAMPLERS)
def test_what_the_denoiser_raises_comes_out(sampler):
    def denoise(x, sigma):
        if sigma < 3:
            raise KeyError("stop here")
        return toy(x, sigma)

    with pytest.raises(KeyError, match="stop here"):
        run(ref.Case(sampler, engine_sigmas("karras", 8)), denoise)


def test_eta_is_ignored_by_samplers_without_noise():
    for sampler, (_, _, takes_eta) in ref.SAMPLERS.items():
        case = ref.Case(sampler, engine_sigmas("karras", 8))
        assert np.array_equal(run(case), run(case._replace(eta=0.4))) != takes_eta


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(Exception, match="sampler 'euler_b' is not known; there are: euler, euler_a, heun"):
        run(ref.Case("euler_b", (1.0, 0.0)))
    with pytest.raises(Exception, match="scheduler 'cosine' is not known; there are: normal, karras"):
        _native.probe_sigmas("cosine", 10)
    with pytest.raises(Exception, match="rng 'gpu' is not known; there are: cpu, cuda"):
        _native.probe_noise("gpu", 0, 4)


@pytest.mark.parametrize("sigmas", [(1.0, 2.0, 0.0), (1.0, 1.0, 0.0), (1.0, -1.0), (np.nan, 0.0), (np.inf, 1.0)])
def test_sigmas_that_do_not_fall_are_refused(sigmas):
    with pytest.raises(Exception, match="each must be below the one before"):
        run(ref.Case("euler", sigmas), x=ONES)


def test_eta_that_is_no_number_is_refused():
    with pytest.raises(Exception, match="eta is"):
        run(ref.Case("euler_a", (1.0, 0.0), eta=np.nan))


# -------------------------------------------------------------------------------------- rectified flows


FLOW_SAMPLERS = [sampler for sampler in ref.SAMPLERS if sampler != "tcd"]


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("eta", [-1.0, 0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("steps", "shift", "first"), [(4, 1.0, 1.0), (9, 3.0, 1.0), (28, 3.15, 0.8), (1, 3.0, 1.0)])
def test_samplers_of_flows_match_their_twins(sampler, eta, steps, shift, first):
    case = ref.Case(sampler, ref.flow_sigmas(steps, shift, first), eta, flow=True)
    assert ref.relative_rmse(run(case), ref.sample(case)) < 2e-6


@pytest.mark.parametrize("sampler", [sampler for sampler in FLOW_SAMPLERS if sampler != "lcm"])
def test_samples_of_flows_are_distributed_as_the_data(sampler):
    """As above, from pure noise to the mixture of mean 0.22 and standard deviation 0.711; not of LCM, whose consistency
    function is not the posterior mean."""
    x = run(ref.Case(sampler, ref.flow_sigmas(120), images=1, size=20000, flow=True))
    assert x.mean() == pytest.approx(0.22, abs=0.03)
    assert x.std() == pytest.approx(0.711, rel=0.05)  # euler_a, of first order, is 3.5 percent low


@pytest.mark.parametrize("sampler", ["dpm++2s_a", "dpm++2m_sde", "lcm"])
def test_samplers_of_flows_are_those_of_the_scaled_latent(sampler):
    """x / (1 - sigma) is x0 + s noise, with s = sigma / (1 - sigma): these step in log(s), whichever is asked."""
    sigmas = np.array(ref.flow_sigmas(9, first=0.9))
    scaled = ref.Case(sampler, tuple(sigmas / (1 - sigmas)), 0.0 if sampler == "dpm++2s_a" else -1.0)
    flow = scaled._replace(sigmas=tuple(sigmas), flow=True)
    assert ref.relative_rmse(ref.sample(flow), ref.sample(scaled)) < 1e-6
    assert ref.relative_rmse(run(flow), ref.sample(scaled)) < 2e-6


def test_tcd_is_not_for_flows():
    with pytest.raises(
        Exception, match="sampler 'tcd' counts in timesteps of a diffusion, which a rectified flow has not"
    ):
        run(ref.Case("tcd", (1.0, 0.0), flow=True), x=ONES)


def test_sigmas_of_flows_end_at_1():
    with pytest.raises(Exception, match=r"sigma 1 of 2 is 1\.5: those of a rectified flow are at most 1"):
        run(ref.Case("euler_a", (1.5, 0.0), flow=True), x=ONES)
