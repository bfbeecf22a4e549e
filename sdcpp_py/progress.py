"""Telling a caller how far long work is, and stopping where the answer says so."""

from collections.abc import Callable
from typing import Any

from .errors import Cancelled

# Called with what is done, the whole, and the name of what was done last. What is false, but not None, stops.
OnProgress = Callable[[int, int, str], Any]


def tell(on_progress: OnProgress | None, done: int, total: int, name: str, stopped: str) -> None:
    """Calls `on_progress` where there is one; `stopped` is what to say where it stops the work.

    Raises:
        Cancelled: It did.
    """
    answer = None if on_progress is None else on_progress(done, total, name)
    if answer is not None and not answer:
        raise Cancelled(stopped)
