"""The independent truth for adapters: what each kind makes of its weight, in float64 and as plainly as formulas go.

Factors are a dict by role, which is what follows a module's stem in the files of kohya's and LyCORIS' trainers
("lora_down.weight", "hada_w1_a", "dora_scale", ...); shapes are numpy's, (out, in[, kh, kw]) for a weight. The
formulas are those of the papers: LoRA (arXiv 2106.09685), LoHa (FedPara, 2108.06098), LoKr (KronA, 2212.10650),
DoRA (2402.09353), IA3 (2205.05638), GLoRA (2306.07967), OFT (2306.07280), BOFT (2311.06243); where trainers
leave room, `tests/parity/test_lora.py` compares with peft and lycoris-lora themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Factors = dict[str, np.ndarray]
Makes = Callable[[np.random.Generator, np.ndarray], Factors]


# ---- formulas ------------------------------------------------------------------------------------------


def changed(weight: np.ndarray, factors: Mapping[str, np.ndarray], multiplier: float = 1.0) -> np.ndarray:
    """The weight with the adapter in force: float64, in the weight's shape."""
    w = np.asarray(weight, np.float64)
    f = {role: np.asarray(values, np.float64) for role, values in factors.items()}
    if "oft_blocks" in f and f["oft_blocks"].ndim == 4:
        return butterfly(w, f, multiplier)
    whole = _at_one(w, f)
    if "dora_scale" in f:
        whole = renormalised(
            whole, f["dora_scale"], of_inputs=f["dora_scale"].shape[0] == 1 and f["dora_scale"].ndim > 1
        )
    for role in MAGNITUDES_OF_ROWS:  # peft's of a convolution is (1, out, 1, 1), as LyCORIS' of inputs is (1, in, 1, 1)
        if role in f:
            whole = renormalised(whole, f[role], of_inputs=False)
    return w + multiplier * (whole - w)


def changed_bias(bias: np.ndarray, factors: Mapping[str, np.ndarray], multiplier: float = 1.0) -> np.ndarray:
    """The module's bias with the adapter in force: (out), float64."""
    out = np.asarray(bias, np.float64)
    for role in ("diff_b", "b_norm"):
        if role in factors:
            out = out + multiplier * np.asarray(factors[role], np.float64)
    if "lora_B.bias" in factors:
        out = out + multiplier * scale_of(factors) * np.asarray(factors["lora_B.bias"], np.float64)
    return out


MAGNITUDES_OF_ROWS = ("lora_magnitude_vector.weight", "lora_magnitude_vector", "magnitude")


def scale_of(factors: Mapping[str, np.ndarray]) -> float:
    """alpha / rank; 1 without an alpha, and for a Kronecker product of two full factors."""
    rank = rank_of(factors)
    if rank is None or "alpha" not in factors:
        return 1.0
    return float(np.asarray(factors["alpha"], np.float64).reshape(())) / rank


def rank_of(factors: Mapping[str, np.ndarray]) -> int | None:
    """The rank that alpha is divided by; None where there is none."""
    for role, axis in (
        ("lora_down.weight", 0),
        ("lora_A.weight", 0),
        ("hada_w1_b", 0),
        ("lokr_w2_b", 0),
        ("lokr_w1_b", 0),
        ("a2.weight", 0),
    ):
        if role in factors:
            values = factors[role]
            is_old = role == "a2.weight" and _is_old_glora(factors)
            return int(values.shape[1 if is_old else axis])
    return None


def _at_one(w: np.ndarray, f: Factors) -> np.ndarray:
    """The weight at multiplier 1, before DoRA."""
    s = scale_of(f)
    if "lora_A.weight" in f:
        return w + s * low_rank(f["lora_A.weight"], f["lora_B.weight"], None, w.shape)
    if "lora_down.weight" in f:
        return w + s * low_rank(f["lora_down.weight"], f["lora_up.weight"], f.get("lora_mid.weight"), w.shape)
    if "hada_w1_a" in f:
        return w + s * hadamard(f, w.shape)
    if "lokr_w1" in f or "lokr_w1_a" in f:
        return w + s * kronecker(f, w.shape)
    if "on_input" in f:
        return ia3(w, f["weight"], bool(f["on_input"].reshape(())))
    if "a1.weight" in f:
        return w + s * glora(w, f)
    if "oft_blocks" in f:
        return rotated_rows(w, f)
    if "oft_R.weight" in f:
        return rotated_inputs(w, f["oft_R.weight"])
    for role in ("diff", "w_norm"):
        if role in f:
            return w + f[role].reshape(w.shape)
    return w


def low_rank(down: np.ndarray, up: np.ndarray, mid: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """B A, or with a Tucker core sum over p, q of B[o, p] M[p, q, y, x] A[q, i]."""
    if mid is None:
        return (up.reshape(up.shape[0], -1) @ down.reshape(down.shape[0], -1)).reshape(shape)
    a, b = down.reshape(down.shape[:2]), up.reshape(up.shape[:2])
    return np.einsum("op,pqyx,qi->oiyx", b, mid, a)


def hadamard(f: Factors, shape: tuple[int, ...]) -> np.ndarray:
    """(w1_a w1_b) times (w2_a w2_b), element by element; with Tucker cores the a are transposed."""

    def half(n: int) -> np.ndarray:
        a, b, core = f[f"hada_w{n}_a"], f[f"hada_w{n}_b"], f.get(f"hada_t{n}")
        return (a @ b).reshape(shape) if core is None else np.einsum("ijyx,ip,jq->pqyx", core, a, b)

    return half(1) * half(2)


def kronecker(f: Factors, shape: tuple[int, ...]) -> np.ndarray:
    """W[a O2 + c, b I2 + d, y, x] = w1[a, b] w2[c, d, y, x], written as a loop over w1."""
    w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
    if "lokr_t2" in f:
        w2 = np.einsum("ijyx,ip,jq->pqyx", f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
    else:
        w2 = f["lokr_w2"] if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
        w2 = w2.reshape(w2.shape[0], shape[1] // w1.shape[1], *shape[2:])
    out = np.zeros(shape)
    rows, columns = w2.shape[:2]
    for a in range(w1.shape[0]):
        for b in range(w1.shape[1]):
            out[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns] = w1[a, b] * w2
    return out


def ia3(w: np.ndarray, scales: np.ndarray, on_input: bool) -> np.ndarray:
    """Columns (of an input) or rows (of an output) times 1 + scale."""
    along = [1] * w.ndim
    along[1 if on_input else 0] = -1
    return w * (1 + scales.reshape(along))


def glora(w: np.ndarray, f: Factors) -> np.ndarray:
    """(W a1) a2 + b1 b2, in the old layout (W a2) a1 + b2 b1, W per tap of the kernel."""
    a1, a2, b1, b2 = (f[f"{role}.weight"] for role in ("a1", "a2", "b1", "b2"))
    if _is_old_glora(f):
        a1, a2, b1, b2 = a2, a1, b2, b1
    a1, a2 = a1.reshape(a1.shape[:2]), a2.reshape(a2.shape[:2])
    through = np.einsum("oi...,ij,jk->ok...", w, a1, a2)
    return through + low_rank(b2, b1, f.get("bm.weight"), w.shape)


def _is_old_glora(f: Mapping[str, np.ndarray]) -> bool:
    """The old a1 is (r, in), the new one (in, r); ranks are below the number of inputs here."""
    return f["a1.weight"].shape[0] < f["a1.weight"].shape[1]


def renormalised(v: np.ndarray, magnitude: np.ndarray, of_inputs: bool) -> np.ndarray:
    """Each row of W + delta, or all that belongs to one input, brought to the magnitude as its norm."""
    axis = 1 if of_inputs else 0
    others = tuple(i for i in range(v.ndim) if i != axis)
    along = [1] * v.ndim
    along[axis] = -1
    return magnitude.reshape(along) * v / np.sqrt((v**2).sum(axis=others, keepdims=True))


def cayley(blocks: np.ndarray, constraint: float | None = None) -> np.ndarray:
    """(I + Q)(I - Q)^-1 of Q = B - B^T, whose norm over all blocks together is at most the constraint."""
    q = blocks - blocks.swapaxes(-1, -2)
    norm = np.linalg.norm(q)
    if constraint and norm > constraint:
        q = q * (constraint / norm)
    eye = np.eye(q.shape[-1])
    return (eye + q) @ np.linalg.inv(eye - q)


def _constraint(f: Factors, rows: int) -> float | None:
    return float(f["alpha"].reshape(())) * rows if "alpha" in f else None


def rotated_rows(w: np.ndarray, f: Factors) -> np.ndarray:
    """R^T W for each block of rows."""
    n, b, _ = f["oft_blocks"].shape
    r = cayley(f["oft_blocks"], _constraint(f, w.shape[0]))
    turned = np.einsum("kij,kil->kjl", r, w.reshape(n, b, -1)).reshape(w.shape)
    return turned * f["rescale"].reshape(-1, *[1] * (w.ndim - 1)) if "rescale" in f else turned


def butterfly(w: np.ndarray, f: Factors, multiplier: float) -> np.ndarray:
    """Stage i: rows 2^i b/2 apart stand side by side, blocks of b of them are turned, and all go back. The
    multiplier takes every stage's R towards I."""
    stages, _, b, _ = f["oft_blocks"].shape
    rows = w.shape[0]
    turns = multiplier * cayley(f["oft_blocks"], _constraint(f, rows)) + (1 - multiplier) * np.eye(b)
    flat = w.reshape(rows, -1)
    for i in range(stages):
        order = np.arange(rows).reshape(-1, 2, 2**i * b // 2).swapaxes(1, 2).reshape(-1, b)
        new = np.empty_like(flat)
        for block, members in enumerate(order):
            new[members] = turns[i, block] @ flat[members]
        flat = new
    out = flat.reshape(w.shape)
    if "rescale" in f:
        out = out * (1 + multiplier * (f["rescale"].reshape(-1, *[1] * (w.ndim - 1)) - 1))
    return out


def rotated_inputs(w: np.ndarray, triangles: np.ndarray, terms: int = 5) -> np.ndarray:
    """W R^T for each block of inputs (taps of a kernel count as inputs), R the series of PEFT's use_cayley_neumann:
    I + 2Q + 2Q^2 + ... + Q^(terms - 1), the last once. With terms 0 R = (I - Q)(I + Q)^-1 as without it."""
    n = triangles.shape[0]
    b = round((1 + np.sqrt(1 + 8 * triangles.shape[1])) / 2)
    q = np.zeros((n, b, b))
    upper = np.triu_indices(b, 1)
    q[:, upper[0], upper[1]] = triangles
    q -= q.swapaxes(1, 2)
    eye = np.eye(b)
    if terms == 0:
        r = (eye - q) @ np.linalg.inv(eye + q)
    else:
        r = np.zeros_like(q) + eye
        for k in range(1, terms):
            r += (1 if k == terms - 1 and k > 1 else 2) * np.linalg.matrix_power(q, k)
    flat = w.reshape(w.shape[0], -1, b)
    r = np.broadcast_to(r, (flat.shape[1], b, b))
    return np.einsum("okj,kij->oki", flat, r).reshape(w.shape)


# ---- random adapters -----------------------------------------------------------------------------------


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _sized(factors: Factors, role: str, weight: np.ndarray, share: float = 0.3) -> Factors:
    """The factors with one of them scaled, so that the change has this share of the weight's size: float32."""
    change = changed(weight, factors) - weight
    factors[role] = (factors[role] * (share * np.std(weight) / np.std(change))).astype(np.float32)
    return factors


def _alpha(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def lora(rng: np.random.Generator, w: np.ndarray, rank: int = 4, alpha: float | None = 2.0) -> Factors:
    """down (r, in, kh, kw) and up (out, r, 1, 1)."""
    ones = [1] * (w.ndim - 2)
    f = {"lora_down.weight": _normal(rng, rank, *w.shape[1:]), "lora_up.weight": _normal(rng, w.shape[0], rank, *ones)}
    if alpha is not None:
        f["alpha"] = _alpha(alpha)
    return _sized(f, "lora_up.weight", w)


def locon_tucker(rng: np.random.Generator, w: np.ndarray, rank: int = 4) -> Factors:
    f = {
        "lora_down.weight": _normal(rng, rank, w.shape[1], 1, 1),
        "lora_mid.weight": _normal(rng, rank, rank, *w.shape[2:]),
        "lora_up.weight": _normal(rng, w.shape[0], rank, 1, 1),
        "alpha": _alpha(3.0),
    }
    return _sized(f, "lora_up.weight", w)


def loha(rng: np.random.Generator, w: np.ndarray, rank: int = 4, alpha: float = 2.0) -> Factors:
    inputs = int(np.prod(w.shape[1:]))
    f = {
        "hada_w1_a": _normal(rng, w.shape[0], rank),
        "hada_w1_b": _normal(rng, rank, inputs),
        "hada_w2_a": _normal(rng, w.shape[0], rank),
        "hada_w2_b": _normal(rng, rank, inputs),
        "alpha": _alpha(alpha),
    }
    return _sized(f, "hada_w1_a", w)


def loha_tucker(rng: np.random.Generator, w: np.ndarray, rank: int = 4) -> Factors:
    f = {"alpha": _alpha(2.0)}
    for n in (1, 2):
        f[f"hada_t{n}"] = _normal(rng, rank, rank, *w.shape[2:])
        f[f"hada_w{n}_a"] = _normal(rng, rank, w.shape[0])
        f[f"hada_w{n}_b"] = _normal(rng, rank, w.shape[1])
    return _sized(f, "hada_t1", w)


def lokr(form: str, o1: int = 4, i1: int = 8, rank: int = 2) -> Makes:
    """LoKr with w1 (o1, i1): `form` tells which factors are pairs: "full", "w1", "w2", "both", "tucker"."""

    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        o2, i2, kernel = w.shape[0] // o1, w.shape[1] // i1, w.shape[2:]
        taps = int(np.prod(kernel))
        f = {"alpha": _alpha(3.0)}
        if form in ("w1", "both"):
            f["lokr_w1_a"], f["lokr_w1_b"] = _normal(rng, o1, rank), _normal(rng, rank, i1)
        else:
            f["lokr_w1"] = _normal(rng, o1, i1)
        if form == "tucker":
            f["lokr_t2"] = _normal(rng, rank, rank, *kernel)
            f["lokr_w2_a"], f["lokr_w2_b"] = _normal(rng, rank, o2), _normal(rng, rank, i2)
        elif form in ("w2", "both"):
            f["lokr_w2_a"], f["lokr_w2_b"] = _normal(rng, o2, rank), _normal(rng, rank, i2 * taps)
        else:
            f["lokr_w2"] = _normal(rng, o2, i2, *kernel)
        return _sized(f, "lokr_w1_a" if form in ("w1", "both") else "lokr_w1", w)

    return make


def full(rng: np.random.Generator, w: np.ndarray) -> Factors:
    return _sized({"diff": _normal(rng, *w.shape)}, "diff", w)


def full_with_bias(rng: np.random.Generator, w: np.ndarray) -> Factors:
    return {**full(rng, w), "diff_b": 0.1 * _normal(rng, w.shape[0])}


def norms(rng: np.random.Generator, w: np.ndarray) -> Factors:
    return {"w_norm": 0.3 * _normal(rng, *w.shape), "b_norm": 0.3 * _normal(rng, *w.shape)}


def ia3_of(on_input: bool) -> Makes:
    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        n = w.shape[1 if on_input else 0]
        scales = 0.3 * _normal(rng, n)
        if w.ndim == 4:
            scales = scales.reshape(1, n, 1, 1)
        elif on_input:
            scales = scales.reshape(n)
        return {"weight": scales, "on_input": np.array(on_input)}

    return make


def glora_of(old: bool = False, core: bool = False) -> Makes:
    def make(rng: np.random.Generator, w: np.ndarray, rank: int = 3) -> Factors:
        out, inputs, kernel = w.shape[0], w.shape[1], w.shape[2:]
        ones = [1] * len(kernel)
        a1, a2 = _normal(rng, inputs, rank, *ones) / np.float32(inputs), _normal(rng, rank, inputs, *ones)
        b1 = _normal(rng, out, rank, *ones) / np.float32(4 * inputs)
        b2 = _normal(rng, rank, inputs, *(ones if core else kernel))
        if old:
            a1, a2, b1, b2 = a2, a1, b2, b1
        f = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": _alpha(2.0)}
        if core:
            f["bm.weight"] = _normal(rng, rank, rank, *kernel)
        return f

    return make


def dora(inner: Makes, of_inputs: bool, role: str = "dora_scale") -> Makes:
    """`inner` with magnitudes near the weight's own norms, in the shape that the role has in files."""

    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        f = inner(rng, w)
        axis = 1 if of_inputs else 0
        others = tuple(i for i in range(w.ndim) if i != axis)
        norm = np.sqrt((w.astype(np.float64) ** 2).sum(axis=others))
        magnitude = (norm * rng.uniform(0.8, 1.25, norm.shape)).astype(np.float32)
        if role == "dora_scale":
            along = [1] * w.ndim
            along[axis] = -1
            magnitude = magnitude.reshape(along)
        elif w.ndim == 4:
            magnitude = magnitude.reshape(1, -1, 1, 1)
        return {**f, role: magnitude}

    return make


def oft(block: int = 8, alpha: float = 0.0, rescale: bool = False) -> Makes:
    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        n = w.shape[0] // block
        f = {"oft_blocks": 0.1 * _normal(rng, n, block, block), "alpha": _alpha(alpha)}
        if rescale:
            f["rescale"] = (1 + 0.2 * _normal(rng, w.shape[0])).reshape(-1, *[1] * (w.ndim - 1)).astype(np.float32)
        return f

    return make


def boft(block: int = 8, stages: int = 3, alpha: float = 0.0, rescale: bool = False) -> Makes:
    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        f = oft(block, alpha, rescale)(rng, w)
        f["oft_blocks"] = 0.1 * _normal(rng, stages, w.shape[0] // block, block, block)
        return f

    return make


def oft_inputs(block: int = 8, shared: bool = False) -> Makes:
    def make(rng: np.random.Generator, w: np.ndarray) -> Factors:
        n = int(np.prod(w.shape[1:])) // block
        return {"oft_R.weight": 0.05 * _normal(rng, 1 if shared else n, block * (block - 1) // 2)}

    return make


@dataclass(frozen=True)
class Kind:
    """A kind of adapter and where it may be: on Linear, 1x1 and larger convolutions, norms."""

    make: Makes
    linear: bool = True
    conv: bool = True  # of any kernel
    kernel: bool = True  # of a kernel larger than 1x1
    norm: bool = False

    def fits(self, weight: np.ndarray) -> bool:
        if weight.ndim == 1:
            return self.norm
        if weight.ndim == 2:
            return self.linear
        return self.conv and (self.kernel if weight.shape[2] > 1 else True)


KINDS: dict[str, Kind] = {
    "lora": Kind(lora),
    "lora-no-alpha": Kind(lambda rng, w: lora(rng, w, alpha=None)),
    "lora-rank-1": Kind(lambda rng, w: lora(rng, w, rank=1, alpha=1.0)),
    "locon-tucker": Kind(locon_tucker, linear=False),
    "loha": Kind(loha),
    "loha-tucker": Kind(loha_tucker, linear=False),
    "lokr-full": Kind(lokr("full")),
    "lokr-w1": Kind(lokr("w1")),
    "lokr-w2": Kind(lokr("w2")),
    "lokr-both": Kind(lokr("both")),
    "lokr-unsorted": Kind(lokr("full", o1=16, i1=4)),
    "lokr-tucker": Kind(lokr("tucker"), linear=False),
    "full": Kind(full),
    "full-with-bias": Kind(full_with_bias),
    "norms": Kind(norms, linear=False, conv=False, norm=True),
    "ia3-input": Kind(ia3_of(True)),
    "ia3-output": Kind(ia3_of(False)),
    "glora": Kind(glora_of()),
    "glora-old": Kind(glora_of(old=True), conv=False),
    "glora-core": Kind(glora_of(core=True), linear=False),
    "dora-rows": Kind(dora(lora, False)),
    "dora-inputs": Kind(dora(lora, True)),
    "dora-loha": Kind(dora(loha, False)),
    "dora-lokr-inputs": Kind(dora(lokr("w2"), True)),
    "oft": Kind(oft()),
    "oft-constrained": Kind(oft(alpha=0.01)),
    "oft-rescaled": Kind(oft(rescale=True)),
    "boft": Kind(boft()),
    "boft-constrained-rescaled": Kind(boft(alpha=0.01, rescale=True)),
    "oft-inputs": Kind(oft_inputs()),
    "oft-inputs-shared": Kind(oft_inputs(shared=True)),
}
