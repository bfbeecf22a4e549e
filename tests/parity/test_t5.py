"""T5's states and token ids against transformers and tokenizers, live."""

from __future__ import annotations

import unicodedata

import pytest
import t5_vocabulary
import tiny_t5
from cases_t5 import LOUD, NEIGHBOURS, STATES, T5, TEXTS
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from sdcpp_py import _native

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity

BATCH = next(case for case in STATES if case.name == "batch")


@pytest.fixture(scope="module")
def encode():
    from reference_t5 import encode

    return encode


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
@pytest.mark.usefixtures("kernels")
def test_states_are_those_of_transformers(tmp_path, encode, once, case):
    """Float32 on both sides: what remains is the order of sums."""
    got = _native.probe_t5(str(tiny_t5.write_folder(case.model, tmp_path)), case.ids, case.mask)
    want = once(lambda: encode(case.model, case.ids, case.mask))
    assert_close(got[0], want, tolerance=1e-5)


# ggml's own products, which other devices use, round activations as weights are: to 11 bits for f16, to 8 for bf16, and
# for quantised types to 127 steps of a block's largest, some 5e-3 a product.
ROUNDED = {"f16": 5e-3, "bf16": 1e-2, "q8_0": 4e-2, "q4_0": 4e-2}


@pytest.mark.parametrize("kind", ["f32", *ROUNDED])
def test_files_of_llama_cpp(tmp_path, encode, kind, kernels):
    tolerance = ROUNDED.get(kind, 1e-5) if kernels.name == "reference" else 1e-5
    meant = tiny_t5.write_gguf(T5, tmp_path / "t5.gguf", kind)
    ids = BATCH.ids
    assert_close(_native.probe_t5(str(tmp_path / "t5.gguf"), ids)[0], encode(T5, ids, weights=meant), tolerance)


@pytest.mark.usefixtures("kernels")
def test_weights_in_half_precision(tmp_path, encode):
    """Of the network whose activations are beyond it."""
    ids = BATCH.ids
    got = _native.probe_t5(str(tiny_t5.write_folder(LOUD, tmp_path, "float16")), ids)
    assert_close(got[0], encode(LOUD, ids), tolerance=5e-3)


# ---- token ids

# A C string has no NUL. What was assigned since this Python's Unicode is left out, for its clusters may differ.
letters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0")
anything = st.text(letters, max_size=40) | st.lists(st.sampled_from(NEIGHBOURS), max_size=14).map("".join)
FORMS = {"old": ("old", {}), "new": ("new", {}), "sentinels strip": ("new", {"strips": True})}


@pytest.fixture(scope="module", params=FORMS)
def both(request, tmp_path_factory):
    """Ours and theirs: text to ids."""
    import tokenizers

    form, options = FORMS[request.param]
    path = str(t5_vocabulary.write_json(tmp_path_factory.mktemp("t5") / "tokenizer.json", form, **options))
    tokenizer = tokenizers.Tokenizer.from_file(path)
    return (
        lambda text: _native.probe_t5_tokens(path, text).tolist(),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def test_nasty_texts(both):
    ours, theirs = both
    for text in TEXTS:
        assert ours(text) == theirs(text)


def test_every_letter(both):
    """All characters, between words and in clusters."""
    ours, theirs = both
    characters = [chr(c) for c in range(1, 0x110000) if unicodedata.category(chr(c)) not in ("Cs", "Cn", "Co")]
    for first in range(0, len(characters), 1 << 14):
        text = " ".join(f"a{c}b {c}1\u00b2{c}\u0316" for c in characters[first : first + (1 << 14)])
        assert ours(text) == theirs(text)


@settings(max_examples=50, deadline=None)
@given(text=anything)
def test_any_text(both, text):
    ours, theirs = both
    assert ours(text) == theirs(text)


@settings(max_examples=60, deadline=None)
@given(text=anything)
def test_transformers_own_tokenizer(text):
    """T5's tokenizer as transformers 5 makes it of a vocabulary, and ours of spiece.model."""
    assert _native.probe_t5_tokens(str(t5_vocabulary.SPIECE), text).tolist() == transformers_ids(text)


def transformers_ids(text: str) -> list[int]:
    if not hasattr(transformers_ids, "tokenizer"):
        import transformers

        data = t5_vocabulary.tokenizer_json("old")["model"]["vocab"]
        transformers_ids.tokenizer = transformers.T5Tokenizer(
            vocab=[(piece, score) for piece, score in data], _spm_precompiled_charsmap=t5_vocabulary.charsmap()
        )
    return transformers_ids.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_our_table_of_llama_names_is_ggufs():
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5.layers)
    for name in tiny_t5.shapes(T5):
        if name != "shared.weight":  # of decoders as well, and named by the converter itself
            assert names.get_name(name, try_suffixes=(".weight",)) == tiny_t5.llama_name(name)
