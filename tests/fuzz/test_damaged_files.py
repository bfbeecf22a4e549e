"""Damaged and lying checkpoints: whatever the bytes, there is a result or an SdcppError, never a crash."""

from __future__ import annotations

import json
import math
import random
import struct
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sdcpp_py import _native
from sdcpp_py.errors import BadArgument, BadFile, SdcppError, Unsupported

FLIPS = 1500
BYTES = {"f32": 4, "f16": 2, "bf16": 2, "f8_e4m3": 1, "i64": 8, "u8": 1, "bool": 1}  # of what we write here

many = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def safetensors(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def sound_safetensors() -> bytes:
    entries = {
        "__metadata__": {"format": "pt", "note": "\u00e9\u20ac"},
        "unet.down_blocks.0.attentions.0.to_q.weight": {
            "dtype": "F32",
            "shape": [2, 3],
            "data_offsets": [0, 24],
        },
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
        "video": {"dtype": "F16", "shape": [1, 2, 1, 2, 1], "data_offsets": [32, 40]},
        "empty": {"dtype": "BF16", "shape": [0, 4], "data_offsets": [40, 40]},
        "bytes": {"dtype": "F8_E4M3", "shape": [5], "data_offsets": [40, 45]},
    }
    return safetensors(entries, bytes(range(45)))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf_value(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: bytes, ne: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def gguf(values: list[bytes], tensors: list[bytes], data: bytes, counts: tuple[int, int] | None = None) -> bytes:
    n_tensors, n_values = counts or (len(tensors), len(values))
    header = b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_values) + b"".join(values) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


def sound_gguf() -> bytes:
    values = [
        gguf_value(b"general.architecture", 8, text(b"sd1")),
        gguf_value(b"general.alignment", 4, struct.pack("<I", 32)),
        gguf_value(b"scale", 6, struct.pack("<f", 0.18215)),
        gguf_value(b"tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"bc")),
        gguf_value(b"nested", 9, struct.pack("<IQIQ", 9, 1, 5, 2) + bytes(8)),
    ]
    tensors = [
        gguf_tensor(b"model.diffusion_model." + b"x" * 70, [32, 2], 8, 0),
        gguf_tensor(b"bias", [3], 0, 96),
        gguf_tensor(b"half", [2, 1, 2, 1], 1, 128),
    ]
    return gguf(values, tensors, bytes(range(136)))


SOUND = {"safetensors": sound_safetensors(), "gguf": sound_gguf()}
formats = pytest.mark.parametrize("kind", SOUND)


@pytest.fixture
def probe(tmp_path):
    """Probes a file of the given bytes; an error must be one sentence that begins with the file."""
    path = tmp_path / "some \u00e9.model"

    def run(data: bytes):
        path.write_bytes(data)
        try:
            return _native.probe_checkpoint(str(path), data=True)
        except SdcppError as error:
            message = str(error)
            assert message.startswith(str(path))
            assert not any(unicodedata.category(c) == "Cc" for c in message)
            assert len(message) < len(str(path)) + 700
            return error

    return run


def check_consistent(outcome, size: int) -> None:
    """Sound or not as a model: what is returned lies in the file and has the size that its shape says."""
    if isinstance(outcome, SdcppError):
        return
    assert sum(len(stored) for _, _, _, stored in outcome) <= size
    for _, kind, shape, stored in outcome:
        if kind in BYTES:
            assert len(stored) == math.prod(shape) * BYTES[kind]


@formats
def test_the_sound_files_are_read(probe, kind):
    tensors = probe(SOUND[kind])
    assert not isinstance(tensors, SdcppError), tensors
    check_consistent(tensors, len(SOUND[kind]))
    assert {len(shape) for _, _, shape, _ in tensors} >= {1, 2, 4}


@formats
def test_every_cut_is_an_error(probe, kind):
    """Of each length, so at every structural boundary too."""
    whole = SOUND[kind]
    for length in range(len(whole)):
        assert isinstance(probe(whole[:length]), BadFile), length


def test_a_long_file_that_was_cut_says_by_how_much(probe):
    whole = safetensors({"a": {"dtype": "F32", "shape": [1000, 1000], "data_offsets": [0, 4_000_000]}}, b"")
    error = probe(whole + bytes(1_000_000))
    total = len(whole) + 4_000_000
    assert f"ends after {len(whole) + 1_000_000:,} of {total:,} bytes; the download was probably cut" in str(error)


@formats
def test_flipped_bytes(probe, kind):
    draw = random.Random(7)
    whole = SOUND[kind]
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[draw.randrange(len(damaged))] = draw.choice((0, 0xFF, 0x7F, 0x80, draw.randrange(256)))
        check_consistent(probe(bytes(damaged)), len(damaged))


@formats
def test_bytes_that_went_missing_or_came_in(probe, kind):
    draw = random.Random(8)
    whole = SOUND[kind]
    for _ in range(FLIPS // 3):
        at, length = draw.randrange(len(whole)), draw.randrange(1, 40)
        check_consistent(probe(whole[:at] + whole[at + length :]), len(whole))
        check_consistent(probe(whole[:at] + draw.randbytes(length) + whole[at:]), len(whole) + length)


@formats
@pytest.mark.parametrize("value", [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1], ids=hex)
def test_extreme_numbers_at_every_place(probe, kind, value):
    whole = SOUND[kind]
    for at in range(0, len(whole) - 8):
        check_consistent(probe(whole[:at] + struct.pack("<Q", value) + whole[at + 8 :]), len(whole))


@pytest.mark.parametrize("length", [0, 1, 10**8, 10**8 + 1, 2**63 - 9, 2**63, 2**64 - 8, 2**64 - 1], ids=str)
def test_a_header_that_lies_about_its_length(probe, length):
    assert isinstance(probe(safetensors({}, bytes(64), length)), BadFile)


numbers = st.one_of(
    st.integers(-1, 20),
    st.sampled_from([2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64]),
    st.floats(),
    st.none(),
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F8_E4M3", "I64", "F4", ""]) | json_values,
        "shape": st.lists(numbers, max_size=6) | json_values,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | json_values,
    },
)


@many
@given(header=st.dictionaries(st.sampled_from(["a", "b", "\u00e9", "", "__metadata__"]), entries | json_values))
def test_headers_that_lie(probe, header):
    check_consistent(probe(safetensors(header, bytes(24))), 24)


@many
@given(
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=6), max_size=4),
    shift=st.integers(-1, 1),
    late=st.integers(0, 4),
)
def test_holes_and_overlaps_are_refused(probe, shapes, shift, late):
    """Tensors side by side are read; moved by a byte, or with a byte left over behind them, they are not."""
    header, end = {}, 0
    for i, shape in enumerate(shapes):
        size = math.prod(shape)
        begin = end + (shift if i == late else 0)
        header[f"t{i}"] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, begin + size]}
        end += size
    moved = shift != 0 and late < len(shapes)
    assert isinstance(probe(safetensors(header, bytes(end))), BadFile) == moved
    if not moved:
        assert isinstance(probe(safetensors(header, bytes(end + 1))), BadFile)


@many
@given(header=st.binary(max_size=60))
def test_headers_that_are_no_json(probe, header):
    check_consistent(probe(safetensors(b"{" + header, b"")), 0)


wide = st.integers(0, 40) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1])
kinds = st.sampled_from([0, 1, 2, 8, 12, 14, 24, 30, 39]) | st.integers(0, 2**32 - 1)
gguf_values = st.builds(gguf_value, st.binary(max_size=4), st.integers(0, 14), st.binary(max_size=30))
gguf_tensors = st.builds(
    gguf_tensor, st.binary(max_size=4), st.lists(wide, max_size=6), kinds, wide.map(lambda n: n * 32 % 2**64)
)


@many
@given(
    values=st.lists(gguf_values, max_size=3),
    tensors=st.lists(gguf_tensors, max_size=3),
    counts=st.none() | st.tuples(wide, wide),
    data=st.integers(0, 200),
)
def test_gguf_headers_that_lie(probe, values, tensors, counts, data):
    outcome = probe(gguf(values, tensors, bytes(data), counts))
    check_consistent(outcome, data)
    if counts and counts[0] > 2**31:
        assert isinstance(outcome, BadFile)


@many
@given(data=st.binary(max_size=200))
def test_anything_after_the_magic(probe, data):
    check_consistent(probe(b"GGUF" + struct.pack("<I", 3) + data), len(data))
    check_consistent(probe(data), len(data))


@pytest.mark.parametrize("depth", [70, 100_000])
def test_deep_nesting(probe, depth):
    assert isinstance(probe(safetensors(b'{"a":' + b"[" * depth + b"]" * depth + b"}", b"")), BadFile)
    nested = b"".join(struct.pack("<IQ", 9, 1) for _ in range(depth))
    assert isinstance(probe(gguf([gguf_value(b"k", 9, nested)], [], b"")), BadFile)


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02}q\x00", b"\x80\x04\x95"], ids=repr)
def test_pickles_are_refused_with_advice(probe, magic):
    error = probe(magic + b"archive/data.pkl" * 10)
    assert isinstance(error, Unsupported)
    assert "convert it with sdcpp convert, which runs nothing" in str(error)


def write_pipeline(root: Path, weight_map: object) -> None:
    (root / "unet").mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text("{}")
    (root / "unet" / "shard.safetensors").write_bytes(SOUND["safetensors"])
    index = root / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/hostname", "..", "a/../../outside.safetensors"])
def test_shards_come_from_their_own_folder(tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes(SOUND["safetensors"])
    write_pipeline(tmp_path / "p", {"scalar": name})
    with pytest.raises(BadFile, match="not in its own folder"):
        _native.probe_checkpoint(str(tmp_path / "p"))


@many
@given(
    weight_map=json_values | st.dictionaries(st.text(max_size=4), st.text(max_size=12) | st.just("shard.safetensors"))
)
def test_shard_tables_that_lie(tmp_path, weight_map):
    write_pipeline(tmp_path / "p", weight_map)
    try:
        tensors = _native.probe_checkpoint(str(tmp_path / "p"))
    except SdcppError:
        return
    assert all(name.startswith("unet.") for name, *_ in tensors)


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_configs_of_a_folder_that_were_cut(tmp_path, file):
    root = tmp_path / "p"
    write_pipeline(root, {"scalar": "shard.safetensors"})
    (root / file).parent.mkdir(exist_ok=True)
    whole = json.dumps({"sample_size": 64, "prediction_type": "epsilon", "list": [1, 2.5, "\u00e9", [None]]})
    for length in range(len(whole)):
        (root / file).write_text(whole[:length])
        with pytest.raises(BadFile, match=Path(file).name):
            _native.probe_checkpoint(str(root))
    (root / file).write_text(whole)
    assert len(_native.probe_checkpoint(str(root))) == 5


def test_what_is_no_file(tmp_path):
    with pytest.raises(SdcppError, match=r"none\.gguf: cannot be opened"):
        _native.probe_checkpoint(str(tmp_path / "none.gguf"))
    with pytest.raises(BadArgument, match=r"folder without model_index\.json"):
        _native.probe_checkpoint(str(tmp_path))
    with pytest.raises(SdcppError):
        _native.probe_checkpoint("/dev/null")
    with pytest.raises(SdcppError):
        _native.probe_checkpoint("x" * 100_000)
