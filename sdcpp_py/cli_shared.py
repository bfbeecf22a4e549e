"""What all commands share: errors as one sentence, progress, rows of words, the log."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from . import check
from .errors import BadArgument, SdcppError

console = Console(stderr=True)
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "m": 10**6, "g": 10**9, "K": 10**3}


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        typer.echo(f"  {name:<{width}}  {value}")


def read_size(option: str, text: str) -> int:
    """Bytes, of a size as people write it."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKmMgG]?)B?", text)
    if not found:
        raise BadArgument(f"{option} {text!r}: expected a size such as 2G or 500M")
    return check.whole(option, int(Decimal(found[1]) * _UNITS[found[2]]), 0, check.MOST_BYTES)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Errors become a sentence on stderr and an exit code."""
    try:
        yield
    except SdcppError as error:
        _fail(str(error), 1)
    except MemoryError:
        _fail("there is not enough memory; paint smaller or fewer pictures", 1)
    except KeyboardInterrupt:
        _fail("stopped; nothing more is written", 130)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def steps_bar(quiet: bool) -> Iterator[Callable[[int, int, Any], None]]:
    """A bar of the steps of a picture, for on_step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("opening", total=None)

        def on_step(step: int, steps: int, preview: object) -> None:
            progress.update(task, description="painting", completed=step, total=steps)

        yield on_step


@contextlib.contextmanager
def work_bar(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of what is done of a whole, with the time left, for on_progress."""
    columns = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def on_progress(done: int, total: int, what: str) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield on_progress


def set_up_log(verbose: bool) -> None:
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False, markup=False)
    logging.basicConfig(level=logging.DEBUG if verbose else logging.WARNING, format="%(message)s", handlers=[handler])
