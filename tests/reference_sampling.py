"""Noise, noise levels and samplers once more, in numpy and float64: slow, plain, from the formulas.

Nothing here shares code with the engine; where a formula can be written in two ways, this is the other one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Denoise = Callable[[Array, float], Array]


def relative_rmse(got, want) -> float:
    """Root mean square of the difference, relative to that of the truth."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


# ---------------------------------------------------------------------------------------------- noise


class CpuRandn:
    """torch.randn of a CPU generator: the bits come from numpy's own MT19937."""

    def __init__(self, seed: int):
        self.bits = np.random.MT19937()
        self.bits._legacy_seeding(seed % 2**32)
        self.spare: list[float] = []

    def __call__(self, n: int) -> Array:
        if n < 16:
            return np.array([self._one() for _ in range(n)])
        values = self._uniform(n)
        for start in range(0, n - 15, 16):
            values[start : start + 16] = self._block(values[start : start + 16])
        if n % 16:
            values[-16:] = self._block(self._uniform(16))
        return values

    def _uniform(self, n: int) -> Array:
        return (self.bits.random_raw(n) % 2**24) / 2.0**24

    @staticmethod
    def _block(uniform: Array) -> Array:
        radius, angle = np.sqrt(-2 * np.log(1 - uniform[:8])), 2 * np.pi * uniform[8:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])

    def _one(self) -> float:
        if not self.spare:
            high1, low1, high2, low2 = (int(bits) for bits in self.bits.random_raw(4))
            angle = 2 * math.pi * ((high1 << 32 | low1) % 2**53) / 2**53
            radius = math.sqrt(-2 * math.log1p(-((high2 << 32 | low2) % 2**53) / 2**53))
            self.spare = [radius * math.sin(angle), radius * math.cos(angle)]
        return self.spare.pop()


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon 2011) on Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


class CudaRandn:
    """torch.randn of a CUDA generator, for as many numbers as the device has threads."""

    def __init__(self, seed: int):
        self.key = (seed % 2**32, seed >> 32 & 0xFFFFFFFF)
        self.calls = 0

    def __call__(self, n: int) -> Array:
        bits = np.array([philox((self.calls, 0, i, 0), self.key)[:2] for i in range(n)], np.float64)
        self.calls += 1
        u, turn = (bits[:, 0] + 0.5) / 2**32, (bits[:, 1] + 0.5) / 2**32
        return np.sqrt(-2 * np.log(u)) * np.sin(2 * np.pi * turn)


RANDN = {"cpu": CpuRandn, "cuda": CudaRandn}

# --------------------------------------------------------------------------------------- noise levels

# sigma by timestep of Stable Diffusion 1.x
TRAINED = np.sqrt(1 / np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2) - 1)
# and of a model with zero terminal SNR: sqrt(alpha_bar) moved to end at 2^-12 (diffusers' stand-in for 0)
_KEPT = 1 / np.sqrt(1 + TRAINED**2)
_MOVED = (_KEPT - _KEPT[-1]) / (_KEPT[0] - _KEPT[-1]) * _KEPT[0]
ZERO_SNR = np.sqrt(1 / np.append(_MOVED[:-1], 2.0**-12) ** 2 - 1)
AYS_SD1 = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]


def sigma_at(timestep) -> Array:
    return np.exp(np.interp(timestep, np.arange(1000), np.log(TRAINED)))


def beta_quantiles(p: Array, a: float = 0.6) -> Array:
    """Quantiles of Beta(a, a), by quadrature of its density and bisection in the lower half."""
    points, weights = np.polynomial.legendre.leggauss(80)

    def mass(x: Array) -> Array:  # with t = u^(1/a), which takes the pole at 0 away
        u = (points + 1) / 2 * x[:, None] ** a
        return (weights * (1 - u ** (1 / a)) ** (a - 1)).sum(1) / 2 * x**a / a

    tail = np.minimum(p, 1 - p)
    share = tail * 2 * mass(np.array([0.5]))
    low, high = np.zeros_like(p), np.full_like(p, 0.5)
    for _ in range(55):
        middle = (low + high) / 2
        below = mass(middle) < share
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    lower = np.where(tail == 0.5, 0.5, low)
    return np.where(p > 0.5, 1 - lower, lower)


def _beta(n: int) -> Array:
    timesteps = 999 * beta_quantiles(1 - np.arange(n) / n)
    whole = np.rint(timesteps)
    return sigma_at(whole if len(set(whole)) == n else timesteps)


SIGMAS: dict[str, Callable[[int], Array]] = {
    "normal": lambda n: sigma_at(np.linspace(999, 0, n)),
    "karras": lambda n: np.linspace(TRAINED[-1] ** (1 / 7), TRAINED[0] ** (1 / 7), n) ** 7,
    "exponential": lambda n: np.geomspace(TRAINED[-1], TRAINED[0], n),
    "sgm_uniform": lambda n: sigma_at(np.linspace(999, 0, n + 1)[:-1]),
    "simple": lambda n: np.array([TRAINED[-(1 + int(k * (1000 / n)))] for k in range(n)]),
    "ddim_uniform": lambda n: TRAINED[(np.arange(n) * (1000 // n) + (n < 1000))[::-1]],
    "beta": _beta,
    "ays": lambda n: np.exp(np.interp(np.linspace(0, 10, n + 1), np.arange(11), np.log(AYS_SD1)))[:-1],
}


def sigmas(scheduler: str, steps: int) -> Array:
    return np.append(SIGMAS[scheduler](steps), 0.0)


# ------------------------------------------------------------------------------------------- samplers


def toy_denoiser(x, sigma: float, alpha: float = 1.0) -> Array:
    """The exact D(x, sigma) where every number of a clean latent is drawn from a mixture of two Gaussians, and x is
    alpha times that plus sigma times noise."""
    x = np.asarray(x, np.float64)[..., None]
    share, mean, variance = np.array([0.4, 0.6]), np.array([-0.5, 0.7]), np.array([0.25, 0.1])
    spread = alpha**2 * variance + sigma**2
    log_weight = np.log(share) - np.log(spread) / 2 - (x - alpha * mean) ** 2 / (2 * spread)
    weight = np.exp(log_weight - log_weight.max(-1, keepdims=True))
    estimate = (mean * sigma**2 + alpha * x * variance) / spread
    return (weight * estimate).sum(-1) / weight.sum(-1)


def toy_flow(x, sigma: float) -> Array:
    """The same of a rectified flow: x = (1 - sigma) x0 + sigma noise."""
    return toy_denoiser(x, sigma, 1 - sigma)


def _ancestral(sigma: float, following: float, eta: float) -> tuple[float, float]:
    up = min(following, eta * (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5)
    return (following**2 - up**2) ** 0.5, up


def _euler(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, up = _ancestral(now, following, eta)
        x = x + (x - denoise(x, now)) / now * (down - now)
        x = x + noise() * up if up else x
    return x


def _heun(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        slope = (x - denoise(x, now)) / now
        ahead = x + slope * (following - now)
        if following:
            slope = (slope + (ahead - denoise(ahead, following)) / following) / 2
        x = x + slope * (following - now)
    return x


def _dpm2(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, up = _ancestral(now, following, eta)
        slope = (x - denoise(x, now)) / now
        if down:
            half = math.exp((math.log(now) + math.log(down)) / 2)
            middle = x + slope * (half - now)
            slope = (middle - denoise(middle, half)) / half
        x = x + slope * (down - now)
        x = x + noise() * up if up else x
    return x


def _dpmpp_2s(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, up = _ancestral(now, following, eta)
        clean = denoise(x, now)
        if down:
            h = math.log(now) - math.log(down)
            half = math.exp(math.log(now) - h / 2)
            clean = denoise(half / now * x - math.expm1(-h / 2) * clean, half)
            x = down / now * x - math.expm1(-h) * clean
        else:
            x = clean
        x = x + noise() * up if up else x
    return x


def _dpmpp_2m(x, s, eta, denoise, noise):
    """In the scaled variables of the paper: alpha^2 + sigma^2 = 1, lambda = log(alpha / sigma)."""
    before = h_before = None
    for now, following in pairwise(s):
        clean = denoise(x, now)
        if following == 0:
            return clean
        a_now, a_next = (1 + now**2) ** -0.5, (1 + following**2) ** -0.5
        h = math.log(now) - math.log(following)
        y = (a_next * following) / (a_now * now) * math.exp(-eta * h) * (a_now * x)
        y = y + a_next * (1 - math.exp(-(1 + eta) * h)) * clean
        if before is not None:
            y = y + 0.5 * a_next * (1 - math.exp(-(1 + eta) * h)) * h / h_before * (clean - before)
        if eta:
            y = y + a_next * following * (1 - math.exp(-2 * eta * h)) ** 0.5 * noise()
        x, before, h_before = y / a_next, clean, h
    return x


def _lcm(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        x = denoise(x, now)
        x = x + following * noise() if following else x
    return x


def _tcd(x, s, eta, denoise, noise):
    """In the paper's variables: alpha x0 + beta noise, and timesteps."""

    def alpha_beta(sigma: float) -> tuple[float, float]:
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5

    for now, following in pairwise(s):
        clean = denoise(x, now)
        timestep = float(np.interp(math.log(following), np.log(TRAINED), np.arange(1000))) if following else 0.0
        beyond = following
        if eta and following:
            beyond = float(sigma_at(math.floor(max(0.0, 1 - eta) * timestep + 1e-3)))
            beyond = beyond if beyond < following * (1 - 1e-6) else following
        (a, b), (a_next, _) = alpha_beta(beyond), alpha_beta(following)
        y = a_next / a * (a * clean + b * (x - clean) / now)
        y = y + (1 - (a_next / a) ** 2) ** 0.5 * noise() if beyond < following else y
        x = y / a_next
    return x


def _unipc(x, s, eta, denoise, noise):
    """B(h) = e^h - 1 of Zhao 2023 with its linear system solved as such, whatever the order."""
    lam = [-math.log(sigma) if sigma else math.inf for sigma in s]
    clean: list[Array] = []
    start, order = x, 0

    def step(i: int, start: Array, order: int, ahead: Array | None) -> Array:
        """From level i to i + 1; with the estimate there, the corrector."""
        h = lam[i + 1] - lam[i]
        base = s[i + 1] / s[i] * start - math.expm1(-h) * clean[i]
        known = [(lam[i - k] - lam[i]) / h for k in range(1, order)]
        differences = [(clean[i - k] - clean[i]) / r for k, r in zip(range(1, order), known, strict=True)]
        if ahead is None:  # the order 2 predictor takes one half, by the paper's simplification
            return base - math.expm1(-h) * sum(0.5 * d for d in differences)
        known, differences = [*known, 1.0], [*differences, ahead - clean[i]]
        # phi_k of -h: phi_1 = e^-h - 1, phi_(k+1) = phi_k / -h - 1 / k!
        phi, right = math.expm1(-h), []
        for k in range(1, order + 1):
            phi = phi / -h - 1 / math.factorial(k)
            right.append(phi * math.factorial(k) / math.expm1(-h))
        rho = [0.5] if order == 1 else np.linalg.solve(np.vander(known, increasing=True).T, right)
        return base - math.expm1(-h) * sum(r * d for r, d in zip(rho, differences, strict=True))

    for i, now in enumerate(s[:-1]):
        estimate = denoise(x, now)
        if i:
            x = step(i - 1, start, order, estimate)
        clean.append(estimate)
        start, order = x, min(2, i + 1, len(s) - 1 - i)
        x = step(i, start, order, None)
    return x


# ---- rectified flows, x = (1 - sigma) x0 + sigma noise. Without noise they are stepped as above.


def _flow_renoise(now, following, eta):
    """How far down a step goes, what of it is kept, and how much noise brings the variance back to following^2."""
    down = following * max(0.0, 1 + eta * (following / now - 1))
    kept = (1 - following) / (1 - down)
    return down, kept, max(0.0, following**2 - (kept * down) ** 2) ** 0.5


def _flow_euler(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, kept, up = _flow_renoise(now, following, eta)
        velocity = (x - denoise(x, now)) / now
        x = kept * (x + (down - now) * velocity)
        x = x + up * noise() if up else x
    return x


def _flow_dpm2(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, kept, up = _flow_renoise(now, following, eta)
        velocity = (x - denoise(x, now)) / now
        if down:
            half = math.exp((math.log(now) + math.log(down)) / 2)
            middle = x + (half - now) * velocity
            velocity = (middle - denoise(middle, half)) / half
        x = kept * (x + (down - now) * velocity)
        x = x + up * noise() if up else x
    return x


def _flow_dpmpp_2s(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        down, kept, up = _flow_renoise(now, following, eta)
        clean = denoise(x, now)
        if down:
            logit = (math.log(now / (1 - now)) + math.log(down / (1 - down))) / 2 if now < 1 else math.inf
            half = 1 / (1 + math.exp(-logit)) if now < 1 else 0.9999
            clean = denoise(half / now * x + (1 - half / now) * clean, half)
        x = kept * (down / now * x + (1 - down / now) * clean)
        x = x + up * noise() if up else x
    return x


def _flow_dpmpp_2m(x, s, eta, denoise, noise):
    if not eta:
        return _dpmpp_2m(x, s, eta, denoise, noise)
    before = h_before = None
    for now, following in pairwise(s):
        clean = denoise(x, now)
        if following == 0:
            return clean
        # steps in log((1 - sigma) / sigma), of which the first from sigma = 1 is infinite
        h = math.log((1 - following) / following) - (math.log((1 - now) / now) if now < 1 else -math.inf)
        x = following / now * math.exp(-eta * h) * x + (1 - following) * -math.expm1(-(1 + eta) * h) * clean
        if before is not None:
            x = x - 0.5 * (1 - following) * math.expm1(-(1 + eta) * h) * h / h_before * (clean - before)
        x = x + following * (1 - math.exp(-2 * eta * h)) ** 0.5 * noise()
        before, h_before = clean, h
    return x


def _flow_lcm(x, s, eta, denoise, noise):
    for now, following in pairwise(s):
        x = (1 - following) * denoise(x, now)
        x = x + following * noise() if following else x
    return x


OF_FLOWS = {
    _euler: _flow_euler,
    _dpm2: _flow_dpm2,
    _dpmpp_2s: _flow_dpmpp_2s,
    _dpmpp_2m: _flow_dpmpp_2m,
    _lcm: _flow_lcm,
}


def flow_sigmas(steps: int, shift: float = 3.0, first: float = 1.0) -> tuple[float, ...]:
    """Evenly spaced ones from `first` to 0, shifted, in float32 as the engine takes them."""
    t = np.linspace(first, 0, steps + 1)
    return tuple((shift * t / (1 + (shift - 1) * t)).astype(np.float32).tolist())


# name: method, the sampler's own eta, whether the caller may choose another
SAMPLERS = {
    "euler": (_euler, 0.0, False),
    "euler_a": (_euler, 1.0, True),
    "heun": (_heun, 0.0, False),
    "dpm2": (_dpm2, 0.0, False),
    "dpm2_a": (_dpm2, 1.0, True),
    "dpm++2s_a": (_dpmpp_2s, 1.0, True),
    "dpm++2m": (_dpmpp_2m, 0.0, False),
    "dpm++2m_sde": (_dpmpp_2m, 1.0, True),
    "ddim": (_euler, 0.0, True),
    "lcm": (_lcm, 0.0, False),
    "tcd": (_tcd, 0.3, True),
    "unipc": (_unipc, 0.0, False),
}


class Case(NamedTuple):
    """One run of a sampler on the toy denoiser."""

    sampler: str
    sigmas: tuple[float, ...]
    eta: float = -1.0
    rng: str = "cpu"
    seed: int = 7
    images: int = 2
    size: int = 40  # numbers of an image; not a multiple of 16, which torch treats differently
    flow: bool = False

    def start(self) -> NDArray[np.float32]:
        """What generate() begins with: the first noise of each image's stream, times the first sigma."""
        noise = [RANDN[self.rng](self.seed + k)(self.size) for k in range(self.images)]
        return (self.sigmas[0] * np.stack(noise)).astype(np.float32)

    def noise(self) -> Callable[[], Array]:
        """The draws that follow: one of each image's stream per call."""
        streams = [RANDN[self.rng](self.seed + k) for k in range(self.images)]
        for stream in streams:
            stream(self.size)
        return lambda: np.stack([stream(self.size) for stream in streams])


def sample(case: Case, denoise: Denoise | None = None) -> Array:
    """The truth for a case, in float64."""
    method, own_eta, takes_eta = SAMPLERS[case.sampler]
    method = OF_FLOWS.get(method, method) if case.flow else method
    denoise = denoise or (toy_flow if case.flow else toy_denoiser)
    eta = case.eta if takes_eta and case.eta >= 0 else own_eta
    return method(case.start().astype(np.float64), list(case.sigmas), eta, denoise, case.noise())
