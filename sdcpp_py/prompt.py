"""Prompts: weights and BREAK as stable-diffusion-webui writes them, and LoRA tags.

    a (red) heart            "red" counts 1.1 times; ((red)) 1.21 times
    a (red:1.3) heart        1.3 times
    a [red] heart            1/1.1 times
    a \\(red\\) heart          brackets that are text; \\[ \\] \\\\ likewise
    a red heart BREAK sky    what follows begins a new chunk of 75 tokens
    <lora:pencil:0.8>        a LoRA: <lora:NAME>, <lora:NAME:TE:UNET>, te=, te2=, te3=, unet=; see LoraTag

Brackets may nest, and weights multiply. A bracket that nothing closes counts to the end of the prompt, one
that closes nothing is text, a lone backslash disappears: all as webui does. Nothing is encoded here.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from .errors import BadArgument

ROUND: Final = 1.1  # what a plain bracket multiplies by
MOST: Final = 1e6  # of a weight: beyond it nothing but noise is left


class Span(NamedTuple):
    """A run of text and how strongly to follow it; 1 is plain. Without text: a BREAK."""

    text: str | None
    weight: float = 1.0


BREAK: Final = Span(None)


@dataclass(frozen=True)
class LoraTag:
    """A LoRA as a prompt names it: ``<lora:NAME[:TE[:UNET]][:key=value…]>``.

    Attributes:
        name: As written; not yet a file.
        te: Multiplier for the text encoders.
        unet: Multiplier for the denoiser.
        start: First step that it acts in: a whole number counts from 1, one with a fraction is a share of all.
        stop: Last step that it acts in, likewise.
        lbw: Weights per block, as text.
        te2: Multiplier for the second text encoder, CLIP-G; None: as te.
        te3: Multiplier for the third, T5; None: as te.
        other: Arguments that mean nothing to us, in order.
    """

    name: str
    te: float = 1.0
    unet: float = 1.0
    start: int | float | None = None
    stop: int | float | None = None
    lbw: str | None = None
    te2: float | None = None
    te3: float | None = None
    other: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What a prompt says: spans to encode, LoRAs to apply, and what the writer should hear about it."""

    spans: tuple[Span, ...]
    loras: tuple[LoraTag, ...] = ()
    warnings: tuple[str, ...] = field(default=(), compare=False)


def parse(text: str) -> Prompt:
    """Reads a prompt. A LoRA tag never reaches the text that is encoded.

    Raises:
        BadArgument: A weight or an argument of a tag is no finite number, or a tag has no name.
    """
    plain, loras, warnings = take_tags(text)
    return Prompt(tuple(parse_spans(plain)), tuple(loras), tuple(warnings))


def parse_negative(text: str) -> Prompt:
    """Reads a negative prompt. LoRAs have no effect there: their tags are taken out, with a warning."""
    prompt = parse(text)
    dropped = tuple(
        f"negative prompt: the LoRA {shown(tag.name)} is left out; name it in the prompt instead"
        for tag in prompt.loras
    )
    return Prompt(prompt.spans, (), prompt.warnings + dropped)


def escape(text: str) -> str:
    """Text that ``parse`` reads as exactly `text`, whatever it holds."""
    text = re.sub(r"[\\()\[\]]", r"\\\g<0>", text)
    text = re.sub(r"\bBREAK\b", r"B\\REAK", text)
    return re.sub(r"<(?=(?:lora|lyco|hypernet):)", r"<\\", text)


# ---- weights -------------------------------------------------------------------------------------------

_TOKEN = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)  # alone it is nothing
      | (?P<open>[(\[])
      | :\s*(?P<weight>[+-]?(?:[.\d]+|nan|inf(?:inity)?))\s*\)
      | (?P<close>[)\]])
      | (?P<text>[^\\()\[\]:]+|:)""",
    re.VERBOSE | re.IGNORECASE,
)
_BREAK = re.compile(r"\bBREAK\b")


@dataclass(eq=False)
class _Bracket:
    kind: str
    factor: float


_Piece = str | _Bracket | None  # text; a bracket, once where it opens and once where it closes; a BREAK


def parse_spans(text: str) -> list[Span]:
    """Reads weights, escapes and BREAK; a tag is text here. There is always at least one span.

    Raises:
        BadArgument: A weight is no finite number, or weights multiply to something absurd.
    """
    stream: list[_Piece] = []
    open_brackets: dict[str, list[_Bracket]] = {"(": [], "[": []}

    def close(kind: str, factor: float) -> None:
        bracket = open_brackets[kind].pop()
        bracket.factor = factor
        stream.append(bracket)

    for token in _TOKEN.finditer(text):
        if token["open"]:
            bracket = _Bracket(token[0], ROUND if token[0] == "(" else 1 / ROUND)
            open_brackets[token[0]].append(bracket)
            stream.append(bracket)
        elif token["weight"] and open_brackets["("] and not token["weight"].strip("+-."):  # (so:...)
            stream.append(token[0][:-1])
            close("(", ROUND)
        elif token["weight"] and open_brackets["("]:
            close("(", _weight(token["weight"], token[0]))
        elif token[0] == ")" and open_brackets["("]:
            close("(", ROUND)
        elif token[0] == "]" and open_brackets["["]:
            close("[", 1 / ROUND)
        elif token["escaped"] is not None:
            stream.append(token["escaped"])
        else:
            stream.extend(_split_at_breaks(token[0]))
    return _weigh(stream)


def _split_at_breaks(text: str) -> Iterator[str | None]:
    """The text between BREAKs, without the spaces about them, and None for each."""
    parts = _BREAK.split(text)
    for i, part in enumerate(parts):
        if i:
            yield None
            part = part.lstrip()
        yield part.rstrip() if i + 1 < len(parts) else part


def _weight(text: str, token: str) -> float:
    try:
        weight = float(text)
    except ValueError:  # 1.2.3
        weight = math.nan
    if not abs(weight) <= MOST:
        raise BadArgument(f"prompt: the weight in {shown(token)} must be a number from -{MOST:g} to {MOST:g}")
    return weight


def _weigh(stream: list[_Piece]) -> list[Span]:
    """Gives each piece the product of the brackets around it, and joins neighbours of equal weight."""
    runs: list[tuple[list[str] | None, float]] = []
    around: dict[str, list[_Bracket]] = {"(": [], "[": []}  # each kind nests in itself only
    products: dict[str, list[float]] = {"(": [1.0], "[": [1.0]}
    for item in stream:
        if isinstance(item, _Bracket):
            if around[item.kind] and around[item.kind][-1] is item:
                around[item.kind].pop()
                products[item.kind].pop()
            else:
                around[item.kind].append(item)
                products[item.kind].append(products[item.kind][-1] * item.factor)
            continue
        if item is None:
            runs.append((None, 1.0))
        elif item:
            weight = products["("][-1] * products["["][-1]
            if not abs(weight) <= MOST:
                raise BadArgument(
                    f"prompt: the brackets around {shown(item)} multiply to {weight:g}; the most is {MOST:g}"
                )
            if runs and runs[-1][0] is not None and runs[-1][1] == weight:
                runs[-1][0].append(item)
            else:
                runs.append(([item], weight))
    return [BREAK if words is None else Span("".join(words), weight) for words, weight in runs] or [Span("")]


# ---- tags ----------------------------------------------------------------------------------------------

_TAG = re.compile(r"<(lora|lyco|hypernet):([^<>]*)>")
_NEARLY_A_TAG = re.compile(r"<\s*(?:lora|lyco)\s*:", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
USUAL: Final = 10.0  # a multiplier beyond it is worth a warning


def take_tags(text: str) -> tuple[str, list[LoraTag], list[str]]:
    """Cuts the tags out of a prompt: the text without them, the tags in order, and warnings."""
    tags: list[LoraTag] = []
    warnings: list[str] = []

    def take(match: re.Match[str]) -> str:
        if match[1] == "hypernet":
            warnings.append(f"prompt: {shown(match[0])} is left out; hypernetworks are not supported")
        else:
            tags.append(_lora_tag(match[0], match[2], warnings))
        return ""

    plain = _TAG.sub(take, text)
    nearly = _NEARLY_A_TAG.search(plain)
    if nearly:
        words = shown(plain[nearly.start() :])
        warnings.append(f"prompt: {words} is read as words; a tag looks like <lora:name:0.8>")
    return plain, tags, warnings


def _lora_tag(tag: str, inside: str, warnings: list[str]) -> LoraTag:
    name, *arguments = inside.split(":")
    if not name.strip():
        raise BadArgument(f"prompt: {shown(tag)} names no LoRA; write <lora:name> or <lora:name:0.8>")
    positional: list[float] = []
    named: dict[str, float] = {}
    steps: dict[str, int | float] = {}
    lbw: str | None = None
    other: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals:
            positional.append(_number(tag, argument))
        elif key in ("te", "te2", "te3", "unet"):
            named[key] = _number(tag, value)
        elif key in ("start", "stop"):
            steps[key] = _step(tag, value)
        elif key == "lbw":
            lbw = value.strip()
        else:
            other.append(argument)
    if len(positional) > 2:  # the third is webui's dynamic rank
        other.extend(f"{number:g}" for number in positional[2:])
    warnings.extend(f"prompt: {shown(argument)} in {shown(tag)} has no effect" for argument in other)
    te = named.get("te", positional[0] if positional else 1.0)
    unet = named.get("unet", positional[1] if len(positional) > 1 else positional[0] if positional else te)
    warnings.extend(
        f"prompt: {multiplier:g} in {shown(tag)} is far beyond the usual 0 to 1"
        for multiplier in {*named.values(), te, unet}
        if abs(multiplier) > USUAL
    )
    te2, te3 = named.get("te2"), named.get("te3")
    return LoraTag(name, te, unet, steps.get("start"), steps.get("stop"), lbw, te2, te3, tuple(other))


def _number(tag: str, text: str) -> float:
    number = float(text) if _NUMBER.fullmatch(text.strip()) else math.nan
    if not abs(number) <= MOST:
        raise BadArgument(
            f"prompt: {shown(text)} in {shown(tag)} must be a number such as 0.8, from -{MOST:g} to {MOST:g}"
        )
    return number


def _step(tag: str, text: str) -> int | float:
    """A step, counted from 1, or with a dot a share of all steps."""
    if re.fullmatch(r"\s*(0?\.[0-9]{1,9}|[01]\.0*)\s*", text):
        return float(text)
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", text):
        raise BadArgument(f"prompt: {shown(text)} in {shown(tag)} must be a step such as 5, or a share such as 0.25")
    return int(text)


def shown(text: str) -> str:
    """A piece of a prompt as messages quote it: on one line, and short."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
