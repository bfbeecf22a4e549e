"""T5's vocabulary, ours that ships, in the other forms in which files have it."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf

SPIECE = Path(__file__).parents[1] / "sdcpp_py" / "data" / "t5_spiece.model"
UNKNOWN, SENTINELS = 2, 100
SPACE = "\u2581"


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """A protocol buffer's fields: numbers, with 4 bytes for a float, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            value |= (message[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = 4 if key & 7 == 5 else varint()
            yield key >> 3, message[at : at + size]
            at += size


@cache
def pieces() -> list[tuple[str, float, int]]:
    """Text, score and kind (1 plain, 2 unknown, 3 control) of the file's pieces."""
    out = []
    for number, value in fields(SPIECE.read_bytes()):
        if number == 1:
            piece = dict(fields(value))
            out.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0], piece.get(3, 1)))
    return out


@cache
def charsmap() -> bytes:
    specification = next(value for number, value in fields(SPIECE.read_bytes()) if number == 3)
    return dict(fields(specification))[2]


def sentinels() -> list[str]:
    return [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]


def tokenizer_json(form: str, *, strips: bool = False) -> dict[str, Any]:
    """tokenizer.json as transformers wrote it: "old" until 4.37 and again from 5.0, "new" between.

    `strips`: sentinels take the spaces beside them along.
    """
    vocab = [[text, score] for text, score, _ in pieces()] + [[text, 0.0] for text in sentinels()]
    special = {0, 1, UNKNOWN, *range(len(pieces()), len(vocab))}
    precompiled = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap()).decode()}
    metaspace: dict[str, Any] = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}
    if form == "old":
        normalizer: dict[str, Any] = precompiled
        cutting: dict[str, Any] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    else:
        strip = {"type": "Strip", "strip_left": False, "strip_right": True}
        replace = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": SPACE}
        normalizer = {"type": "Sequence", "normalizers": [precompiled, strip, replace]}
        cutting = metaspace
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": vocab[i][0],
                "single_word": False,
                "lstrip": strips and i > UNKNOWN,
                "rstrip": strips and i > UNKNOWN,
                "normalized": False,
                "special": True,
            }
            for i in sorted(special)
        ],
        "normalizer": normalizer,
        "pre_tokenizer": cutting,
        "post_processor": None,
        "decoder": None,
        "model": {"type": "Unigram", "unk_id": UNKNOWN, "vocab": vocab, "byte_fallback": False},
    }


def write_json(path: Path, form: str, **options: bool) -> Path:
    path.write_text(json.dumps(tokenizer_json(form, **options), ensure_ascii=False), encoding="utf-8")
    return path


def add_to_gguf(writer: gguf.GGUFWriter, *, size: int = 32128, with_charsmap: bool = True) -> None:
    """What llama.cpp's converter adds: sentinels of the lowest score, and padding up to the table's size."""
    tokens = [text for text, _, _ in pieces()] + sentinels()
    scores = [score for _, score, _ in pieces()] + [-1000.0] * SENTINELS
    kinds = [kind for _, _, kind in pieces()] + [4] * SENTINELS
    padding = range(len(tokens), size)
    writer.add_tokenizer_model("t5")
    writer.add_token_list(tokens + [f"[PAD{i}]" for i in padding])
    writer.add_token_scores(scores + [-10000.0] * len(padding))
    writer.add_token_types(kinds + [5] * len(padding))
    if with_charsmap:
        writer.add_precompiled_charsmap(charsmap())
