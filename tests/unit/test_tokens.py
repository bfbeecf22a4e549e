"""CLIP's token ids against what transformers said of the same texts."""

import json
from pathlib import Path

import pytest

from sdcpp_py import BadFile, Io, _native, files

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokens.json").read_text())["tokens"]
MERGES = str(files.data_dir() / "clip_merges.txt")


@pytest.mark.parametrize(("text", "ids"), GOLDEN, ids=[repr(text[:24]) for text, _ in GOLDEN])
def test_ids_are_those_of_transformers(text, ids):
    assert _native.probe_clip_tokens(MERGES, text).tolist() == ids


@pytest.mark.parametrize(
    "damaged",
    [b"\xff", b"a\xc3", b"\xf0\x9f\x9a", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\xe2\x82x"],
)
def test_bytes_that_are_no_utf8_become_what_python_makes_of_them(damaged):
    replaced = damaged.decode("utf-8", "replace")
    got, want = _native.probe_clip_tokens(MERGES, damaged), _native.probe_clip_tokens(MERGES, replaced)
    assert got.tolist() == want.tolist()


def test_a_file_that_is_no_vocabulary_is_an_error(tmp_path):
    with pytest.raises(Io, match=r"missing\.txt: No such file"):
        _native.probe_clip_tokens(str(tmp_path / "missing.txt"), "a")
    damaged = tmp_path / "merges.txt"
    damaged.write_bytes(Path(MERGES).read_bytes()[:5000])
    with pytest.raises(BadFile, match=r"merges\.txt: "):
        _native.probe_clip_tokens(str(damaged), "a")
    with pytest.raises(BadFile, match=r"line 1 "):
        _native.probe_clip_tokens(str(Path(MERGES).with_name("README.md")), "a")
