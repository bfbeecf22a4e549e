"""What callers give, brought to what the engine can take; anything else is a BadArgument that names the argument."""

import difflib
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from .errors import BadArgument
from .prompt import shown

MOST: Final = 3e38  # of a number with a fraction
MOST_WHOLE: Final = (1 << 31) - 1


def text(argument: str, value: object) -> str:
    """Text; a lone surrogate, such as an undecodable argument has, becomes "?"."""
    if not isinstance(value, str):
        raise BadArgument(f"{argument}: must be text, not {type(value).__name__}")
    if "\0" in value:
        raise BadArgument(f"{argument}: has a NUL character at {value.index(chr(0))}; take it out")
    return value.encode("utf-8", "replace").decode("utf-8")


def texts(argument: str, values: object) -> list[str]:
    """A list of texts, which one text alone is not."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise BadArgument(f"{argument}: must be a list of texts, not {type(values).__name__}")
    return [text(argument, value) for value in values]


def path(argument: str, value: object) -> Path:
    """A path; what is there is not looked at."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(given := os.fspath(value), str):
        raise BadArgument(f"{argument}: must be a path, not {type(value).__name__}")
    if not given or "\0" in given:
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


def pair(argument: str, value: object, least: int) -> tuple[int, int] | None:
    """None, or two whole numbers, `least` or more."""
    if value is None:
        return None
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


def one_of(argument: str, name: object, known: Sequence[str]) -> None:
    """None, or one of these names."""
    if name is None or name in known:
        return
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise BadArgument(f"{argument} {brief(name)} is not known; {hint}there are: {', '.join(known)}")


def brief(value: object) -> str:
    """A value as messages show it."""
    if isinstance(value, str):
        return shown(value)
    if not isinstance(value, (int, float)):
        return f"of type {type(value).__name__}"
    try:
        return str(value)
    except ValueError:  # more digits than Python prints
        return "of thousands of digits"
