"""Every case of docs/lora_cases.md has a test that carries its number, or says what it waits for."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def table() -> dict[int, str]:
    """What each case waits for; "" where nothing is missing."""
    text = (ROOT / "docs" / "lora_cases.md").read_text(encoding="utf-8")
    return {int(row[0]): row[1].strip() for row in re.findall(r"^\| (\d+) \|.*\|([^|]*)\|$", text, re.MULTILINE)}


def numbers(words: str) -> set[int]:
    """ "1 to 5, 43" and "13_to_18" mean all between."""
    out: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:[ _]to[ _](\d+))?", words):
        out.update(range(int(first), int(last or first) + 1))
    return out


def cases_with_tests() -> set[int]:
    """The numbers in names of tests: of functions, of their parameters, and of native cases."""
    names = r"def test_cases?_((?:\d+(?:_to_|_and_)?)+)|id=\"case-(\d+)|TEST_CASE\(\"cases? ([^:]+):"
    out: set[int] = set()
    for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "tests").rglob("test_*.cpp")]:
        for found in re.findall(names, path.read_text(encoding="utf-8")):
            out |= numbers("".join(found))
    return out


def test_every_case_has_a_test_or_waits() -> None:
    cases = table()
    assert list(cases) == list(range(1, 62))
    assert {number for number, waits in cases.items() if not waits} - cases_with_tests() == set()


def test_no_case_waits_that_is_tested() -> None:
    assert {number for number, waits in table().items() if waits} & cases_with_tests() == set()
