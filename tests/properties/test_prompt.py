"""Laws of prompts, for any text."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sdcpp_py import BadArgument
from sdcpp_py.prompt import ROUND, Span, escape, parse, take_tags

texts = st.text(max_size=60)
syntax = st.lists(
    st.sampled_from(
        [
            "(",
            ")",
            "[",
            "]",
            ":",
            "\\",
            "1.3",
            "nan",
            "BREAK",
            " ",
            "a",
            "é",
            "<",
            ">",
            "<lora:",
            "x",
            "=",
            "te",
        ]
    ),
    max_size=30,
).map("".join)
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="()[]\\:<>"), min_size=1).filter(
    lambda text: "BREAK" not in text
)
weights = st.floats(-100, 100).map(lambda weight: round(weight, 3))


@given(texts | syntax)
def test_any_text_is_a_prompt_or_a_sentence(text):
    sentence = ""
    try:
        prompt = parse(text)
    except BadArgument as error:
        sentence = str(error)
    if sentence:
        assert sentence.startswith("prompt: ")
        return
    assert prompt.spans
    assert all(math.isfinite(weight) for _, weight in prompt.spans)
    assert "<lora:x>" not in "".join(words or "" for words, _ in prompt.spans)


@given(texts | syntax)
def test_escaping_makes_any_text_plain(text):
    prompt = parse(escape(text))
    assert prompt.spans == (Span(text),)
    assert prompt.loras == ()


@given(words, st.lists(weights | st.sampled_from(["round", "square"]), max_size=4))
def test_weights_multiply(word, around):
    text, weight = word, 1.0
    for bracket in around:
        if bracket == "round":
            text, weight = f"({text})", weight * ROUND
        elif bracket == "square":
            text, weight = f"[{text}]", weight / ROUND
        else:
            text, weight = f"({text}:{bracket:f})", weight * bracket
    try:
        (span,) = parse(text).spans
    except BadArgument:
        assert abs(weight) > 1e5
        return
    assert span.text == word
    assert math.isclose(span.weight, weight, rel_tol=1e-9, abs_tol=1e-9)


@given(words, words, weights)
def test_brackets_touch_nothing_else(before, inside, weight):
    spans = parse(f"{before}({inside}:{weight:f}){before}").spans
    assert "".join(text or "" for text, _ in spans) == before + inside + before
    assert {w for text, w in spans if text in (before,)} <= {1.0, weight}


@given(st.lists(words | st.sampled_from(["<lora:a:0.5>", "<lora:b>", "<lyco:c:te=1:unet=0>"]), max_size=8))
def test_tags_are_cut_out_exactly(parts):
    plain, tags, _ = take_tags("".join(parts))
    assert plain == "".join(part for part in parts if not part.startswith("<l"))
    assert len(tags) == sum(part.startswith("<l") for part in parts)
