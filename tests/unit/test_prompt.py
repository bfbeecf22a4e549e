"""What a prompt says: weights, BREAK and LoRA tags."""

import re
import time

import pytest

from sdcpp_py import BadArgument
from sdcpp_py.prompt import BREAK, LoraTag, Span, escape, parse, parse_negative


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("((a))", [("a", 1.21)]),
        ("(a:1.3)", [("a", 1.3)]),
        ("(a: 1.3 )", [("a", 1.3)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        ("[a]", [("a", 1 / 1.1)]),
        ("[[a]]", [("a", 1 / 1.21)]),
        ("([a])", [("a", 1)]),
        ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1), (" c", 1 / 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("a:b", [("a:b", 1)]),
        ("a:1.3", [("a:1.3", 1)]),
        ("a:1.3)", [("a:1.3)", 1)]),
        ("(a:b:2)", [("a:b", 2)]),
        ("(so:...)", [("so:...", 1.1)]),
        ("[a:2]", [("a:2", 1 / 1.1)]),
        ("()", [("", 1)]),
        ("a()b", [("ab", 1)]),
        ("(a:0)", [("a", 0)]),
    ],
)
def test_weights(text, spans):
    assert parse(text).spans == tuple(Span(words, pytest.approx(weight)) for words, weight in spans)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("(", [("", 1)]),
        (")", [(")", 1)]),
        ("[", [("", 1)]),
        ("]", [("]", 1)]),
        ("a )b", [("a )b", 1)]),
        ("a (b", [("a ", 1), ("b", 1.1)]),
        ("a ((b) c", [("a ", 1), ("b", 1.21), (" c", 1.1)]),
        ("a [b", [("a ", 1), ("b", 1 / 1.1)]),
        ("(a]", [("a]", 1.1)]),
        ("<", [("<", 1)]),
        (">", [(">", 1)]),
        ("a < b > c", [("a < b > c", 1)]),
        ("<b>bold</b>", [("<b>bold</b>", 1)]),
        ("<lora:x", [("<lora:x", 1)]),
        ("<LORA:x>", [("<LORA:x>", 1)]),
    ],
)
def test_a_bracket_alone_does_what_it_does_in_webui(text, spans):
    assert parse(text).spans == tuple(Span(words, pytest.approx(weight)) for words, weight in spans)


@pytest.mark.parametrize(
    ("text", "words"),
    [(r"\(a\)", "(a)"), (r"\[a\]", "[a]"), (r"a\\b", r"a\b"), (r"a\b", "ab"), ("a\\", "a"), (r"\\\(", r"\(")],
)
def test_escapes(text, words):
    assert parse(text).spans == (Span(words),)


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("a BREAK b", [("a", 1), None, ("b", 1)]),
        ("a\nBREAK\nb", [("a", 1), None, ("b", 1)]),
        ("BREAK", [None]),
        ("BREAKFAST break aBREAK", [("BREAKFAST break aBREAK", 1)]),
        ("(a BREAK b:2)", [("a", 2), None, ("b", 2)]),
        ("a BREAK BREAK b", [("a", 1), None, None, ("b", 1)]),
    ],
)
def test_break_begins_a_new_chunk(text, spans):
    assert parse(text).spans == tuple(BREAK if span is None else Span(*span) for span in spans)


@pytest.mark.parametrize(
    "text", ["(a:nan)", "(a:inf)", "(a:-Infinity)", "(a:1.2.3)", "(a:" + "9" * 400 + ")", "(" * 200 + "a"]
)
def test_a_weight_that_is_no_finite_number_is_an_error(text):
    with pytest.raises(BadArgument, match="prompt: "):
        parse(text)


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        ("<lora:x>", LoraTag("x")),
        ("<lora:x:0.8>", LoraTag("x", 0.8, 0.8)),
        ("<lyco:x:.5>", LoraTag("x", 0.5, 0.5)),
        ("<lora:x:0.5:1>", LoraTag("x", 0.5, 1)),
        ("<lora:x:-1>", LoraTag("x", -1, -1)),
        ("<lora:x:0>", LoraTag("x", 0, 0)),
        ("<lora:x:1e-1>", LoraTag("x", 0.1, 0.1)),
        ("<lora:x: 0.8 >", LoraTag("x", 0.8, 0.8)),
        ("<lora:x:te=0.5>", LoraTag("x", 0.5, 0.5)),
        ("<lora:x:unet=0.5>", LoraTag("x", 1, 0.5)),
        ("<lora:x:te=0.5:unet=1>", LoraTag("x", 0.5, 1)),
        ("<lora:x:0.2:unet=1>", LoraTag("x", 0.2, 1)),
        ("<lora:x:te=0.5:te2=0.8:unet=1>", LoraTag("x", 0.5, 1, te2=0.8)),
        ("<lora:x:0.5:te2=0:te3=-1>", LoraTag("x", 0.5, 0.5, te2=0, te3=-1)),
        ("<lora:x:te3=0.25>", LoraTag("x", 1, 1, te3=0.25)),
        ("<lora:x:0.8:start=5:stop=10>", LoraTag("x", 0.8, 0.8, start=5, stop=10)),
        ("<lora:x:1:1:lbw=1,0,0.5>", LoraTag("x", lbw="1,0,0.5")),
        ("<lora:a=b:0.5>", LoraTag("a=b", 0.5, 0.5)),
        ("<lora:Some Name, v1.0 é>", LoraTag("Some Name, v1.0 é")),
        ("<lora:sub/x.safetensors:1>", LoraTag("sub/x.safetensors")),
    ],
)
def test_lora_tags(text, tag):
    prompt = parse(f"a {text}cat")
    assert prompt.loras == (tag,)
    assert prompt.spans == (Span("a cat"),)
    assert not prompt.warnings


def test_tags_keep_their_order_and_brackets_do_not_touch_them():
    prompt = parse("(a <lora:x:0.5>:1.5) <lora:y> b<lora:x:0.25>")
    assert [(tag.name, tag.unet) for tag in prompt.loras] == [("x", 0.5), ("y", 1), ("x", 0.25)]
    assert prompt.spans == (Span("a ", 1.5), Span("  b"))


BAD_ARGUMENTS = [
    "",
    "abc",
    "nan",
    "inf",
    "1_0",
    "0x1",
    "1e999",
    "٣",
    "te=",
    "te2=a",
    "te3=nan",
    "te=1=2",
    "start=-1",
    "stop=1.5",
]


@pytest.mark.parametrize("tag", ["<lora:>", "<lora: :1>", *(f"<lora:x:{text}>" for text in BAD_ARGUMENTS)])
def test_a_tag_that_cannot_be_meant_is_an_error(tag):
    with pytest.raises(BadArgument, match="<lora:"):
        parse(f"a cat {tag}")


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("<lora:x:1:1:8>", "'8' in '<lora:x:1:1:8>' has no effect"),
        ("<lora:x:dyn=8>", "'dyn=8' in .* has no effect"),
        ("<lora:x:20>", "20 in .* far beyond"),
        ("<lora:x:te2=-20>", "-20 in .* far beyond"),
        ("<hypernet:x:1>", "hypernetworks are not supported"),
        ("<Lora:x>", "read as words"),
        ("<lora:x", "read as words"),
    ],
)
def test_what_the_writer_should_hear(text, warning):
    (heard,) = parse(text).warnings
    assert re.search(warning, heard)


def test_a_lora_in_the_negative_prompt_is_left_out_with_a_warning():
    prompt = parse_negative("blurry <lora:x:1>")
    assert prompt.spans == (Span("blurry "),)
    assert not prompt.loras
    assert "'x' is left out" in prompt.warnings[0]


@pytest.mark.parametrize(
    "text",
    [
        "a (b) [c] \\ :1.3)",
        "a BREAK b",
        "<lora:x:1> <lyco:y> <hypernet:z>",
        "\\BREAK",
        "(BREAK)",
        "<lora:BREAK>",
    ],
)
def test_escaped_text_is_read_as_itself(text):
    assert parse(escape(text)).spans == (Span(text),)
    assert not parse(escape(text)).loras


def test_a_long_prompt_takes_no_longer_per_letter_than_a_short_one():
    """Brackets that nest, or never close, would cost a square otherwise."""
    began = time.process_time()
    parse("[(a)]" * 50_000)
    parse("(" * 50_000 + "a" + ":1)" * 50_000)
    parse("[" * 50_000)
    parse("<lora:" * 50_000)
    parse(" " * 50_000 + "(:" + "1" * 50_000 + "x)" + " " * 50_000 + "BREAK")
    assert time.process_time() - began < 5
