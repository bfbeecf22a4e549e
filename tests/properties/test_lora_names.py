"""No text that a prompt can hold names a file outside of the folder of LoRAs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from sdcpp_py.errors import BadArgument, Unsupported
from sdcpp_py.lora.library import LoraLibrary
from sdcpp_py.prompt import parse

pieces = st.sampled_from(
    [
        "..",
        ".",
        "/",
        "//",
        "\\",
        "C:",
        "\x00",
        "~",
        "sub",
        "x",
        "secret",
        "away",
        "out",
        "pipe",
        "adapter",
        ".safetensors",
        ".gguf",
        " ",
        "%2e%2e",
        "\u2025",
        "\uff0f",
        "\ud800",
        "\u202e",
        "con",
        "$HOME",
        "*",
        "\n",
    ]
)
names = st.one_of(
    st.text(max_size=40), st.lists(pieces, max_size=8).map("".join), st.lists(pieces, max_size=8).map("/".join)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoraLibrary, Path]:
    """A folder with sound files and with everything that leads out of it."""
    top = tmp_path_factory.mktemp("names")
    root = top / "loras"
    (root / "sub").mkdir(parents=True)
    (root / "adapter").mkdir()
    (top / "secret").mkdir()
    for path in (
        root / "x.safetensors",
        root / "sub" / "y.gguf",
        top / "secret.safetensors",
        top / "secret" / "x.safetensors",
    ):
        path.write_bytes(b"x")
    (root / "out.safetensors").symlink_to(top / "secret.safetensors")
    (root / "away").symlink_to(top)
    (root / "sub" / "away").symlink_to("/")
    (root / "adapter" / "adapter_config.json").symlink_to(top / "secret.safetensors")
    os.mkfifo(root / "pipe.safetensors")
    return LoraLibrary(root), root.resolve()


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
@example("../secret")
@example("away/secret")
@example("sub/away/etc/passwd")
@example("adapter")
def test_no_name_leads_out_of_the_folder(place: tuple[LoraLibrary, Path], name: str) -> None:
    library, root = place
    with contextlib.suppress(BadArgument, Unsupported):
        found = library.find(name)
        real = Path(os.path.realpath(found))
        assert real == found
        assert real.is_relative_to(root)
        assert real.is_file()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=names)
def test_no_tag_leads_out_of_the_folder(place: tuple[LoraLibrary, Path], name: str) -> None:
    library, root = place
    with contextlib.suppress(BadArgument, Unsupported):
        for tag in parse(f"a <lora:{name}:1> b").loras:
            assert library.find(tag.name).is_relative_to(root)
