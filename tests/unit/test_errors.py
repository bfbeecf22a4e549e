"""Every status of the header has its exception."""

import re
from pathlib import Path

import pytest

import sdcpp_py
from sdcpp_py import errors

HEADER = Path(__file__).parents[2] / "native" / "include" / "sdcpp.h"


def statuses() -> list[str]:
    enum = re.search(r"typedef enum sd_status \{(.*?)\}", HEADER.read_text(), re.DOTALL)
    assert enum
    return re.findall(r"\bSD_([A-Z_]+)\b", enum[1])


def test_every_status_has_its_class():
    """Io for SD_IO, BadFile for SD_BAD_FILE, in the same order."""
    names = ["".join(word.capitalize() for word in status.split("_")) for status in statuses()]
    assert names[0] == "Ok"
    assert [kind.__name__ for kind in errors.BY_STATUS[1:]] == names[1:]


@pytest.mark.parametrize("kind", errors.BY_STATUS)
def test_all_are_public_and_one_family(kind):
    assert issubclass(kind, sdcpp_py.SdcppError)
    assert getattr(sdcpp_py, kind.__name__) is kind


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(errors.BadArgument, ValueError), (errors.OutOfMemory, MemoryError), (errors.Io, OSError)],
)
def test_pythons_own_classes_catch_them(kind, builtin):
    with pytest.raises(builtin, match="a sentence"):
        raise kind("a sentence")


def test_from_status():
    assert type(errors.from_status(1, "x")) is errors.BadArgument
    assert str(errors.from_status(1, "x")) == "x"
    assert type(errors.from_status(99, "x")) is errors.Internal
    assert type(errors.from_status(-1, "x")) is errors.Internal
    assert "without a message" in str(errors.from_status(2, ""))


def test_from_os_error():
    try:
        Path("/no/such/file").read_bytes()
    except OSError as error:
        refusal = errors.from_os_error("/no/such/file", error)
    assert str(refusal) == "/no/such/file: No such file or directory"
