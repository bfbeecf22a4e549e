"""What parity tests (transformers, live) and golden tests (its stored answers) ask of T5."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import texts
import tiny_t5

T5 = tiny_t5.TinyT5()
WIDE_HEADS = tiny_t5.TinyT5(width=32, heads=4, head_size=64, hidden=96, layers=1, vocabulary=100, buckets=16)
LOUD = tiny_t5.TinyT5(loud=1000.0)  # products of some millions: 65504 is the largest number that f16 holds


@dataclass(frozen=True)
class Case:
    """One run of the encoder."""

    name: str
    model: tiny_t5.TinyT5
    ids: np.ndarray = field(hash=False)
    mask: np.ndarray | None = field(hash=False, default=None)


def case(name: str, model: tiny_t5.TinyT5, n: int, prompts: int = 1, seen: tuple[int, ...] = ()) -> Case:
    """`seen`: of each prompt the number of tokens before its padding."""
    ids = np.random.default_rng(n).integers(0, model.vocabulary, (prompts, n)).astype(np.float32)
    mask = (np.arange(n) < np.array(seen)[:, None]).astype(np.float32) if seen else None
    return Case(name, model, ids, mask)


STATES = [
    case("one token", T5, 1),
    case("short", T5, 9),
    case("batch", T5, 20, 3),
    case("far", T5, 300),
    case("wide heads", WIDE_HEADS, 40, 2),
    case("loud", LOUD, 20, 2),
    case("masked", T5, 20, 3, seen=(5, 20, 1)),
    case("one masked", T5, 33, seen=(12,)),
]

# Neighbours that meet in rules: characters that normalisation changes, marks, what begins or ends a cluster, tokens.
NEIGHBOURS = [
    "a", "1", " ", "  ", "\n", "é", "e\u0301", "\u0301", "한", "猫", "\u200d", "Σ", "’s", "½", "Ａ", "²", "\u0316",
    "\u200b", "\u0600", "\r", "\r\n", "\u3000", "▁", "<extra_id_0>", "<extra_id_99>", "</s>", "<pad>", "＜pad＞",
    "<extra_id_100>", "🚀", "\u1100", "\u1161", "ﬁ", "\x85",
]  # fmt: skip
TEXTS = (*texts.TEXTS, *NEIGHBOURS, " ".join(NEIGHBOURS), "".join(NEIGHBOURS))
