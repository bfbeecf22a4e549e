"""Tokenizer files of any content give ids or a typed error, and never end the process."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path

import pytest
import t5_vocabulary
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdcpp_py import BadFile, SdcppError, Unsupported, _native

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = "a\u0301 \uff21 <extra_id_0> x\u00b2"


def varint(value: int) -> bytes:
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def piece(text: str, score: float, kind: int) -> bytes:
    return field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))


def charsmap() -> bytes:
    """ "\uff21" becomes "A": the root's children at 256 ^ byte, then 512, 768, and the replacement's place at 1024."""
    units = [0] * 1280
    units[0], at = 256 << 10, 256
    for byte, step, last in ((0xEF, 512, 0), (0xBC, 768, 0), (0xA1, 1024, 1)):
        at ^= byte
        units[at] = step << 10 | last << 8 | byte
        at ^= step
    units[at] = 1 << 31
    return struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + b"A\0"


PIECES = [("<pad>", 0, 3), ("</s>", 0, 3), ("<unk>", 0, 2), ("\u2581", -2, 1), ("a", -3, 1), ("A", -4, 1)]
SOUND = b"".join(piece(*p) for p in PIECES) + field(3, field(1, b"nmt_nfkc") + field(2, charsmap()))


ROOT = t5_vocabulary.tokenizer_json("new")
ROOT["model"]["vocab"] = [[text, score] for text, score, _ in PIECES]
ROOT["added_tokens"] = ROOT["added_tokens"][:4]
ROOT["normalizer"]["normalizers"].pop(0)


def small_json() -> dict:
    return copy.deepcopy(ROOT)


@pytest.fixture
def ids(tmp_path: Path):
    def read(content: bytes, text: str = TEXT) -> list[int] | SdcppError:
        path = tmp_path / "vocabulary"
        path.write_bytes(content)
        try:
            return _native.probe_t5_tokens(str(path), text).tolist()
        except SdcppError as error:
            return error

    return read


def test_the_sound_ones_are_read(ids):
    assert ids(SOUND, "a A\uff21") == [3, 4, 3, 5, 5]
    assert ids(SOUND, "<extra_id_0>") == [105]
    assert ids(json.dumps(small_json()).encode(), "a A") == [3, 4, 3, 5]


def test_every_length(ids):
    """A protocol buffer has no end of its own: where a field is whole, what is there is all."""
    for length in range(1, len(SOUND), 7):
        outcome = ids(SOUND[:length])
        assert isinstance(outcome, (BadFile, list))
    whole = json.dumps(small_json()).encode()
    for length in range(1, len(whole), 29):
        assert isinstance(ids(whole[:length]), BadFile)


@many
@given(at=st.integers(0, len(SOUND) - 1), byte=st.integers(0, 255))
def test_a_byte_that_is_another(ids, at, byte):
    ids(SOUND[:at] + bytes([byte]) + SOUND[at + 1 :])


@many
@given(units=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=600), tail=st.binary(max_size=40))
def test_tries_of_any_content(ids, units, tail):
    trie = struct.pack("<I", 4 * len(units)) + struct.pack(f"<{len(units)}I", *units) + tail
    ids(b"".join(piece(*p) for p in PIECES) + field(3, field(2, trie)))


@many
@given(data=st.binary(max_size=200))
def test_anything(ids, data):
    ids(data or b"\0")
    ids(b"\n" + data)
    ids(b"{" + data)


values = (
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=6) | st.just([]) | st.just({})
)


@many
@given(data=st.data())
def test_json_with_any_value_at_any_place(ids, data):
    root = place = small_json()
    for _ in range(data.draw(st.integers(0, 4))):
        inner = [
            value for value in (place.values() if isinstance(place, dict) else place) if value and not_a_leaf(value)
        ]
        place = data.draw(st.sampled_from(inner)) if inner else place
    keys = list(place) if isinstance(place, dict) else range(len(place))
    place[data.draw(st.sampled_from(keys))] = data.draw(values)
    ids(json.dumps(root).encode())


def not_a_leaf(value: object) -> bool:
    return isinstance(value, (dict, list))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["model"].update(type="BPE"), "model of the type BPE"),
        (lambda r: r["model"].update(byte_fallback=True), "falls back to bytes"),
        (lambda r: r.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer ByteLevel"),
        (lambda r: r.update(pre_tokenizer=None), "no pre_tokenizer Metaspace"),
        (lambda r: r["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"}), "normalizer Lowercase"),
        (lambda r: r["normalizer"]["normalizers"].reverse(), "normalizer Strip in a place"),
        (lambda r: r["pre_tokenizer"].update(prepend_scheme="last"), "prepend_scheme last"),
        (lambda r: r["added_tokens"][1].update(normalized=True), "</s>, which is single_word or normalized"),
    ],
)
def test_what_would_give_other_ids_is_refused(ids, change, message):
    root = small_json()
    change(root)
    error = ids(json.dumps(root).encode())
    assert isinstance(error, Unsupported)
    assert message in str(error)
