"""What callers give, brought to what the engine can take; anything else is a BadArgument that names the argument."""

import difflib
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, TypeVar

import numpy as np

from .errors import BadArgument
from .prompt import shown

Value = TypeVar("Value")
Rest = ParamSpec("Rest")

MOST: Final = 3e38  # of a number with a fraction
MOST_WHOLE: Final = (1 << 31) - 1
MOST_BYTES: Final = (1 << 63) - 1


def optional(
    check: Callable[Concatenate[str, object, Rest], Value],
    argument: str,
    value: object,
    *rest: Rest.args,
    **more: Rest.kwargs,
) -> Value | None:
    """None, or what another of these checks says of the value."""
    return None if value is None else check(argument, value, *rest, **more)


def text(argument: str, value: object) -> str:
    """Text; a lone surrogate, such as an undecodable argument has, becomes "?"."""
    if not isinstance(value, str):
        raise BadArgument(f"{argument}: must be text, not {type(value).__name__}")
    if "\0" in value:
        raise BadArgument(f"{argument}: has a NUL character at {value.index(chr(0))}; take it out")
    return value.encode("utf-8", "replace").decode("utf-8")


def entries(argument: str, values: object, such_as: str) -> list[object]:
    """What a list or any other series holds; a text is none."""
    try:
        if isinstance(values, (str, bytes, os.PathLike)):
            raise TypeError
        return list(values)  # type: ignore[call-overload, no-any-return]
    except TypeError:
        raise BadArgument(f"{argument}: must be a list, such as {such_as}, not {type(values).__name__}") from None


def texts(argument: str, values: object) -> list[str]:
    """A list of texts, which one text alone is not."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise BadArgument(f"{argument}: must be a list of texts, not {type(values).__name__}")
    return [text(argument, value) for value in values]


def path(argument: str, value: object) -> Path:
    """A path; what is there is not looked at."""
    try:
        given = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        given = None
    if not isinstance(given, str):
        raise BadArgument(f"{argument}: must be a path, not {type(value).__name__}")
    try:
        is_path = given != "" and b"\0" not in os.fsencode(given)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise BadArgument(f"{argument}: {shown(given)} is no path")
    return Path(given)


def whole(argument: str, value: object, least: int, most: int = MOST_WHOLE) -> int:
    """A whole number in this range."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise BadArgument(f"{argument} {brief(value)}: must be a whole number")
    if not least <= number <= most:
        raise BadArgument(f"{argument} {brief(number)}: must be between {least} and {most}")
    return number


def pair(argument: str, value: object, least: int) -> tuple[int, int]:
    """Two whole numbers, `least` or more."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
        raise BadArgument(f"{argument} {brief(value)}: must be two whole numbers, such as (1024, 1024)")
    return whole(argument, value[0], least), whole(argument, value[1], least)


def number(argument: str, value: object, least: float = -MOST) -> float:
    """A finite number that 32 bits hold, `least` or more."""
    try:
        found = None if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        found = None
    if found is None or not least <= found <= MOST:
        raise BadArgument(f"{argument} {brief(value)}: must be a finite number" + (", 0 or more" if least == 0 else ""))
    return found


def flag(argument: str, value: object) -> bool:
    """True or False; "no" is neither."""
    if not isinstance(value, (bool, np.bool_)):
        raise BadArgument(f"{argument} {brief(value)}: must be True or False")
    return bool(value)


def callback(argument: str, value: object) -> None:
    """None, or what can be called."""
    if value is not None and not callable(value):
        raise BadArgument(f"{argument}: must be a function, not {type(value).__name__}")


def text_map(argument: str, values: object) -> dict[str, str]:
    """A dict of texts by texts."""
    if not isinstance(values, Mapping):
        raise BadArgument(f"{argument}: must be a dict, not {type(values).__name__}")
    return {text(argument, key): text(argument, value) for key, value in values.items()}


def paths_by_role(argument: str, values: object) -> dict[str, Path]:
    """A dict of paths by what the files are for."""
    if not isinstance(values, Mapping):
        raise BadArgument(
            f"{argument}: must be a dict such as {{'vae': 'vae.safetensors'}}, not {type(values).__name__}"
        )
    return {text(argument, role): path(f"{argument}: {role}", value) for role, value in values.items()}


def text_pairs(argument: str, values: object) -> list[tuple[str, str]]:
    """A list of pairs of texts."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise BadArgument(f"{argument}: must be a list of pairs of texts, not {type(values).__name__}")
    for value in values:
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence) or len(value) != 2:
            raise BadArgument(f"{argument}: {brief(value)} is no pair of texts, such as ('attn2', 'q8_0')")
    return [(text(argument, first), text(argument, second)) for first, second in values]


def one_of(argument: str, name: object, known: Sequence[str]) -> str:
    """One of these names."""
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(name.lower(), known, n=1) if isinstance(name, str) else []
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise BadArgument(f"{argument} {brief(name)} is not known; {hint}there are: {', '.join(known)}")


def brief(value: object) -> str:
    """A value as messages show it."""
    if isinstance(value, str):
        return shown(value)
    if not isinstance(value, (int, float)):
        return f"of type {type(value).__name__}"
    if isinstance(value, int) and abs(value) >= 10**60:
        return "of more than 60 digits"  # Python itself prints no more than thousands
    return str(value)
