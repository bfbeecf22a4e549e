"""Token ids are transformers' own, for any text."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import TEXTS

from sdcpp_py import _native, files

pytestmark = pytest.mark.parity
pytest.importorskip("transformers")

# transformers composes characters by an old Unicode, without the order of newer marks; a C string has no NUL.
OLD = unicodedata.ucd_3_2_0
letters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\0").filter(
    lambda c: not unicodedata.combining(c) or OLD.combining(c) == unicodedata.combining(c)
)
# Neighbours that meet in rules: contractions, digits, marks, Hangul, special tokens, spaces.
PIECES = [
    "'",
    "s",
    "S",
    "'ll",
    "1",
    "２",
    "é",
    "e\u0301",
    "\u0301",
    "\u0323",
    "İ",
    "Σ",
    "ᄒ",
    "ᅡ",
    "ᆫ",
    "한",
    "猫",
]
SPECIAL = [
    "<|",
    "|>",
    "!",
    "🚀",
    "\u200d",
    "<|endoftext|>",
    "<|startoftext|>",
    "<|ENDOFTEXT|>",
    "<|StartOfText|>",
    " ",
    "\n",
    "\x1f",
]
pieces = st.sampled_from(PIECES + SPECIAL)
anything = st.text(letters, max_size=40) | st.lists(pieces, max_size=14).map("".join)


@pytest.fixture(scope="module")
def both():
    """Ours and theirs: text to ids."""
    from reference_tokens import clip_tokenizer

    tokenizer = clip_tokenizer()
    merges = str(files.data_dir() / "clip_merges.txt")
    return (
        lambda text: _native.probe_clip_tokens(merges, text).tolist(),
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
    )


@pytest.mark.parametrize("text", TEXTS, ids=[repr(text[:24]) for text in TEXTS])
def test_nasty_texts(both, text):
    ours, theirs = both
    assert ours(text) == theirs(text)


def test_every_letter_of_the_first_planes(both):
    """All characters at once, each between words, so that classes, lower case and composition are seen."""
    ours, theirs = both
    characters = [chr(c) for c in range(1, 0x20000) if unicodedata.category(chr(c)) not in ("Cs", "Cn")]
    for first in range(0, len(characters), 4096):
        text = " ".join(f"a{c}b {c}1" for c in characters[first : first + 4096])
        assert ours(text) == theirs(text)


@settings(max_examples=100, deadline=None)
@given(text=anything)
def test_any_text(both, text):
    ours, theirs = both
    assert ours(text) == theirs(text)
