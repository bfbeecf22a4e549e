"""Linear algebra of updates: exact low-rank forms of every kind, their sums, and sums of a lower rank."""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .. import check
from ..errors import BadArgument
from .source import Change, Floats

_EXACT_SIDE: Final = 1024  # up to this smaller side a whole SVD costs nothing
_TRIES: Final = (64, 256)  # ranks that may hold the energy that is asked for
_PATIENCE: Final = 3  # iterations until it is seen whether they do
_GRAM_ZERO: Final = 1e-8  # the root of what float64 resolves in a square
_PIECE: Final = 1 << 20  # elements that are converted to float64 at a time


@dataclass(frozen=True)
class Pair:
    """The update weight · up · down of some rows of a module.

    Attributes:
        down: (rank, columns)
        up: (rows, rank), in the model's order of rows.
        weight: What the product is multiplied by.
        first: The first of the rows.
    """

    down: Floats = field(repr=False)
    up: Floats = field(repr=False)
    weight: float = 1.0
    first: int = 0

    @property
    def rank(self) -> int:
        """Columns of up."""
        return int(self.down.shape[0])

    def dense(self, first: int = 0, last: int | None = None) -> Floats:
        """Rows first to last - 1 of those that it changes, all by default: (rows, columns)."""
        weight = np.float32(self.weight)
        if _is_identity(self.up) or _is_identity(self.down):
            other = self.down if _is_identity(self.up) else self.up
            return other[first:last] if weight == 1 else np.multiply(other[first:last], weight)
        up: Floats = self.up[first:last] * weight
        return up @ self.down

    def folded(self) -> "Pair":
        """The same with the weight in up."""
        return self if self.weight == 1 else replace(self, up=self.up * np.float32(self.weight), weight=1.0)


def _is_identity(matrix: Floats) -> bool:
    n = len(matrix)
    return matrix.shape == (n, n) and np.count_nonzero(matrix) == n and bool((np.diagonal(matrix) == 1).all())


# ---- kinds ---------------------------------------------------------------------------------------------


def exact_pair(change: Change, base: Floats | None = None) -> Pair:
    """A change of a matrix as one product, without loss but for rounding.

    LoRA, LoCon with a Tucker core, LoHa (rank r², Khatri-Rao) and LoKr (the product of both factors' ranks) keep
    what rank they have; anything else becomes the identity times the change itself.

    Args:
        change: Of a weight, not of a vector.
        base: The pristine rows that it changes, for kinds that depend on them.
    """
    f = change.factors
    if change.needs_base:
        pair = of_dense(change.dense(base))
    elif change.kind == "lora":
        pair = _unswapped(change, _tucker(f["mid"], f["down"]) if "mid" in f else _flat(f["down"]), f["up"])
    elif change.kind == "loha":
        (up1, down1), (up2, down2) = (_loha_half(change, n) for n in "12")
        up: Floats = np.einsum("oi,oj->oij", up1, up2).reshape(up1.shape[0], -1)
        down: Floats = np.einsum("ic,jc->ijc", down1, down2).reshape(-1, down1.shape[1])
        pair = _unswapped(change, down, up)
    elif change.kind == "lokr":
        (up1, down1), (up2, down2) = _lokr_half(change, "1"), _lokr_half(change, "2")
        if up1.shape[1] * up2.shape[1] >= min(change.rows, change.columns):
            return replace(of_dense(change.dense()), first=change.first)
        pair = _unswapped(change, np.kron(down1, down2), np.kron(up1, up2))
    else:
        pair = of_dense(change.dense())
    return replace(pair, first=change.first)


def _flat(factor: Floats) -> Floats:
    return factor.reshape(factor.shape[0], -1)


def _tucker(core: Floats, down: Floats) -> Floats:
    """sum over q of core[p, q, y, x] down[q, i], with rows p and columns (i, y, x)."""
    out: Floats = np.einsum("pqyx,qi->piyx", core, down.reshape(down.shape[:2]))
    return _flat(out)


def _loha_half(change: Change, n: str) -> tuple[Floats, Floats]:
    f = change.factors
    a, b, core = f[f"w{n}_a"], f[f"w{n}_b"], f.get(f"t{n}")
    return (a, _flat(b)) if core is None else (a.T, _tucker(core, b))


def _lokr_half(change: Change, n: str) -> tuple[Floats, Floats]:
    f = change.factors
    if f"w{n}" in f:
        whole = _flat(f[f"w{n}"])
        one = np.eye(min(whole.shape), dtype=np.float32)
        return (one, whole) if whole.shape[0] <= whole.shape[1] else (whole, one)
    a, b, core = f[f"w{n}_a"], f[f"w{n}_b"], f.get("t2") if n == "2" else None
    return (a, _flat(b)) if core is None else (a.T, _tucker(core, b))


def _unswapped(change: Change, down: Floats, up: Floats) -> Pair:
    return Pair(down, swap_halves(up) if change.swaps else up, change.scale)


def of_dense(delta: Floats, first: int = 0) -> Pair:
    """A dense change as a product with the identity."""
    rows, columns = delta.shape
    one = np.eye(min(rows, columns), dtype=np.float32)
    return Pair(delta, one, 1.0, first) if rows <= columns else Pair(one, delta, 1.0, first)


def swap_halves(rows: Floats) -> Floats:
    """With the upper half of the rows below the lower one."""
    return np.roll(rows, rows.shape[0] // 2, axis=0)


# ---- sums ----------------------------------------------------------------------------------------------


def within(pair: Pair, first: int, rows: int) -> Pair | None:
    """What a pair does to the rows [first, first + rows), as a pair of these rows; None: nothing.

    Parts that were fused as blocks of a diagonal get their own rank back.
    """
    begin, end = max(first, pair.first), min(first + rows, pair.first + pair.up.shape[0])
    if begin >= end:
        return None
    part = pair.up[begin - pair.first : end - pair.first]
    down = pair.down
    if part.shape[0] < pair.up.shape[0]:
        used = part.any(axis=0)
        if not used.any():
            return None
        if not used.all():
            part, down = part[:, used], down[used]
    if part.shape[0] < rows:
        whole = np.zeros((rows, part.shape[1]), np.float32)
        whole[begin - first : end - first] = part
        part = whole
    return Pair(down, part, pair.weight, first)


def total(pairs: Iterable[Pair]) -> Pair | None:
    """The sum of pairs of the same rows, exactly: factors side by side, and those with the same down in one."""
    shared: dict[bytes, Pair] = {}
    for pair in pairs:
        key = hashlib.blake2b(np.ascontiguousarray(pair.down).data, digest_size=16).digest()
        before = shared.get(key)
        if before is None:
            shared[key] = pair
        elif before.weight == pair.weight:
            shared[key] = replace(before, up=before.up + pair.up)
        else:
            shared[key] = replace(before.folded(), up=before.folded().up + pair.folded().up)
    kept = list(shared.values())
    if len(kept) < 2:
        return kept[0] if kept else None
    if len({pair.weight for pair in kept}) > 1:
        kept = [pair.folded() for pair in kept]
    down = np.concatenate([pair.down for pair in kept])
    return Pair(down, np.concatenate([pair.up for pair in kept], axis=1), kept[0].weight, kept[0].first)


def norm(pair: Pair) -> float:
    """The Frobenius norm of the product, by QR of both factors (float64), which loses nothing to cancellation."""
    if min(pair.up.shape[0], pair.down.shape[1]) <= pair.rank:
        return math.sqrt(sum(_squares(pair.dense(*run)) for run in _runs(pair.up.shape[0], pair.down.shape[1])))
    _, r_up = np.linalg.qr(pair.up.astype(np.float64))
    _, r_down = np.linalg.qr(pair.down.astype(np.float64).T)
    return abs(pair.weight) * float(np.linalg.norm(r_up @ r_down.T))


# ---- lower ranks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reduced:
    """A pair of a lower rank, and what was lost.

    Attributes:
        pair: Balanced: both factors carry the root of each singular value.
        residual: What was left out, relative to the whole: |rest| / |whole| (Frobenius).
        norm: |whole|.
    """

    pair: Pair
    residual: float
    norm: float


def cut(values: NDArray[np.float64], rank: int | None, energy: float | None, whole: float) -> int:
    """How many singular values to keep: at most `rank`, and no more than hold this share of `whole`, the sum of the
    squares of all that there are."""
    keep = len(values)
    if energy is not None:
        squares = np.cumsum(values**2)
        keep = int(np.searchsorted(squares, energy * whole * (1 - 1e-12))) + 1 if whole > 0 else 1
    if rank is not None:
        keep = min(keep, rank)
    return max(1, min(keep, len(values)))


def check_rank(rank: int | None, energy: float | None) -> None:
    """Raises BadArgument where they ask for nothing that there is."""
    if rank is not None:
        check.whole("rank", rank, 1)
    if energy is not None and not 0 < check.number("energy", energy) <= 1:
        raise BadArgument(f"energy {energy}: must be a share such as 0.95")


def reduce_pair(pair: Pair, rank: int | None, energy: float | None = None) -> Reduced:
    """The nearest pair of a lower rank: QR of both factors, SVD of the small product between (float64)."""
    q_up, r_up = np.linalg.qr(pair.up.astype(np.float64))
    q_down, r_down = np.linalg.qr(pair.down.astype(np.float64).T)
    u, s, vt = np.linalg.svd(pair.weight * (r_up @ r_down.T), full_matrices=False)
    return _reduced(q_up @ u, s, vt @ q_down.T, rank, energy, float(np.linalg.norm(s)), pair.first)


def reduce_dense(delta: Floats, rank: int | None, energy: float | None = None, first: int = 0) -> Reduced:
    """The nearest pair of a rank to a dense change (rows, columns), without another matrix of its size.

    A small matrix goes through LAPACK's SVD. Of a large one, the leading values come by subspace iteration where they
    are few; where they are many, by the eigenvectors of its product with itself in float64, which loses values below
    1e-8 of the largest, as float32 does.
    """
    side = min(delta.shape)
    norm = math.sqrt(sum(_squares(delta[slice(*run)]) for run in _runs(*delta.shape)))
    if side <= _EXACT_SIDE:
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        return _reduced(u, s.astype(np.float64), vt, rank, energy, norm, first)
    tries = _TRIES if energy is not None else () if rank is None else (rank,)
    for most in sorted({min(most, rank or side) for most in tries if 4 * min(most, rank or side) <= side}):
        enough = 0.0 if energy is None or most == rank else energy * norm**2
        found = _leading(delta, most, enough)
        if found is not None:
            return _reduced(*found, rank, energy, norm, first)
    return _reduced(*_by_gram(delta, rank, energy, norm), rank, energy, norm, first)


def _leading(
    delta: Floats, most: int, enough: float
) -> tuple[NDArray[np.floating], NDArray[np.float64], NDArray[np.floating]] | None:
    """u, s and vt of the largest values by subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4), until
    they stand still; None as soon as the sum of their squares does not look like becoming `enough`."""
    width = min(*delta.shape, most + max(16, most // 2))
    basis = np.linalg.qr(delta @ np.random.default_rng(0).standard_normal((delta.shape[1], width), np.float32))[0]
    before = np.zeros(most)
    for n in range(32):
        across = np.linalg.qr(delta.T @ basis)[0]
        basis, small = np.linalg.qr(delta @ across)
        values = np.linalg.svd(small, compute_uv=False)[:most].astype(np.float64)
        if n >= _PATIENCE and float(np.sum(values**2)) < enough:
            return None
        if np.abs(values - before).max() <= 1e-5 * max(values[0], 1e-30):
            break
        before = values
    u, s, vt = np.linalg.svd(basis.T @ delta, full_matrices=False)
    if float(np.sum(s[:most].astype(np.float64) ** 2)) < enough:
        return None
    return basis @ u, s.astype(np.float64), vt


def _by_gram(
    delta: Floats, rank: int | None, energy: float | None, norm: float
) -> tuple[Floats, NDArray[np.float64], Floats]:
    """u, s and vt of an SVD: all values, and as many vectors as are to be kept."""
    tall = delta if delta.shape[0] >= delta.shape[1] else delta.T
    gram = np.zeros((tall.shape[1], tall.shape[1]))
    for first, last in _runs(*tall.shape):
        wide = tall[first:last].astype(np.float64)
        gram += wide.T @ wide
    squares, vectors = np.linalg.eigh(gram)
    s = np.sqrt(np.maximum(squares[::-1], 0))
    s = s[: max(1, int(np.count_nonzero(s > _GRAM_ZERO * s[0])))]
    keep = cut(s, rank, energy, norm**2)
    across = np.ascontiguousarray(vectors[:, : -keep - 1 : -1], np.float32)
    along = (tall @ across) / np.maximum(s[:keep], np.finfo(np.float32).tiny).astype(np.float32)
    return (along, s, across.T) if tall is delta else (across, s, along.T)


def _reduced(
    u: NDArray[np.floating],
    s: NDArray[np.float64],
    vt: NDArray[np.floating],
    rank: int | None,
    energy: float | None,
    norm: float,
    first: int,
) -> Reduced:
    keep = cut(s, rank, energy, norm**2)
    root = np.sqrt(s[:keep])
    up = (u[:, :keep] * root).astype(np.float32)
    down = (root[:, None] * vt[:keep]).astype(np.float32)
    kept = float(np.sum(s[:keep] ** 2))
    rest = float(np.sum(s[keep:] ** 2)) if math.isclose(norm**2, float(np.sum(s**2)), rel_tol=1e-6) else norm**2 - kept
    return Reduced(Pair(down, up, 1.0, first), math.sqrt(max(0.0, rest)) / norm if norm else 0.0, norm)


# ---- other ways to merge ---------------------------------------------------------------------------------


def agreed(pairs: Sequence[Pair], method: str, density: float, rng: np.random.Generator) -> Floats:
    """Weighted changes of the same rows merged otherwise than by their sum: (rows, columns), made some rows at a time.

    Args:
        pairs: One from each file.
        method: "dare" (arXiv 2311.03099): elements drop out at random and the rest grows to make up for it; "ties"
            (arXiv 2306.01708, sections 3 and 4): the largest elements of each, averaged over those that agree with the
            sign of their sum; "dare-ties": what dare leaves, averaged so.
        density: The share of elements that stay.
        rng: Of what drops out.
    """
    rows, columns = pairs[0].up.shape[0], pairs[0].down.shape[1]
    least = [_least(pair, int(density * rows * columns)) if method == "ties" else np.float32(0) for pair in pairs]
    out: Floats = np.empty((rows, columns), np.float32)
    for first, last in _runs(rows, columns):
        deltas = [pair.dense(first, last) for pair in pairs]
        if method == "ties":
            deltas = [np.where(np.abs(delta) >= low, delta, 0) for delta, low in zip(deltas, least, strict=True)]
        else:
            deltas = [delta * (rng.random(delta.shape, np.float32) < density) / np.float32(density) for delta in deltas]
        out[first:last] = _elected(deltas) if method.endswith("ties") else np.sum(deltas, axis=0)
    return out


def _elected(deltas: Sequence[Floats]) -> Floats:
    """The mean of those elements that have the sign of the sum."""
    trimmed = np.stack(deltas)
    sign = np.sign(trimmed.sum(axis=0))
    agrees = (np.sign(trimmed) == sign) & (trimmed != 0)
    out: Floats = (trimmed * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1).astype(np.float32)
    return out


def _least(pair: Pair, keep: int) -> np.float32:
    """The smallest magnitude among so many largest elements, counted by the upper and then the lower halves of their
    bits, which lie in the order of the numbers."""
    rows, columns = pair.up.shape[0], pair.down.shape[1]
    if keep < 1:
        return np.float32(np.inf)
    upper, missing = 0, keep
    for is_lower in (False, True):
        counts = np.zeros(1 << 16, np.int64)
        for run in _runs(rows, columns):
            bits = np.abs(pair.dense(*run)).view(np.uint32).reshape(-1)
            halves = bits[bits >> 16 == upper] & 0xFFFF if is_lower else bits >> 16
            counts += np.bincount(halves, minlength=1 << 16)
        above = np.cumsum(counts[::-1])
        at = int(np.searchsorted(above, missing))
        if not is_lower:
            upper, missing = 0xFFFF - at, missing - int(above[at - 1] if at else 0)
    return np.float32(np.array(upper << 16 | 0xFFFF - at, np.uint32).view(np.float32))


def _squares(values: Floats) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _runs(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Rows of a matrix some at a time."""
    step = max(1, _PIECE // columns)
    return ((first, min(first + step, rows)) for first in range(0, rows, step))
