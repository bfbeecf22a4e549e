"""Every example about LoRAs in the documents runs: each fenced block of Python or of commands, each tag in a table.

They run in a folder that has what they name: a small model as v1-5.safetensors, and LoRAs that fit it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import lora_files
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from sdcpp_py import SDContext
from sdcpp_py.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = {"README": ROOT / "README.md", "lora": ROOT / "docs" / "lora.md"}
LORAS = ("loras/pencil", "loras/style/night", "loras/x", "elsewhere/ink")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, where it begins, and its lines."""

    document: str
    line: int
    language: str
    text: str


def blocks() -> list[Block]:
    """All fenced blocks of the documents."""
    out = []
    for document, path in DOCUMENTS.items():
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            out.append(Block(document, text[: found.start()].count("\n") + 1, found[1], found[2]))
    return out


def tags() -> list[str]:
    """The tags in the first column of a table."""
    return re.findall(r"^\| `(<[^`]+>)` \|", DOCUMENTS["lora"].read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def _workplace(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    assert SDContext.__init__.__kwdefaults__
    monkeypatch.setitem(SDContext.__init__.__kwdefaults__, "threads", 1)  # ggml's threads spin
    # At its own size of 64 pixels, where a file that says nothing means 512.
    save_file(load_file(tiny_sd1), "v1-5.safetensors", metadata={"unet.sample_size": "8"})
    for seed, name in enumerate(LORAS):
        update = lora_files.random_update(lora_files.attention(), seed=seed)
        lora_files.save(Path(f"{name}.safetensors"), lora_files.tensors_of(update))


def run_python(text: str) -> None:
    exec(compile("from sdcpp_py import SDContext\n" + text, "example", "exec"), {"__name__": "example"})


def run_console(text: str) -> None:
    """Commands begin with "$ "; other lines are what they print."""
    commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
    assert commands, "a console block without a command"
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "sdcpp", f"no way to run {command!r} here"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{command}: {result.output}"


RUN: dict[str, Callable[[str], None]] = {"python": run_python, "console": run_console}


@pytest.mark.usefixtures("_workplace")
@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.document}-line-{block.line}")
def test_a_block_runs(block: Block) -> None:
    assert block.language in RUN, f"a block in {block.language or 'no language'} is run by nothing"
    RUN[block.language](block.text)


@pytest.mark.usefixtures("_workplace")
def test_tags_of_the_table_mean_something() -> None:
    assert len(tags()) >= 7
    with SDContext("v1-5.safetensors", lora_dir="loras") as sd_ctx:
        for tag in tags():
            sd_ctx.generate(f"a cat {tag}", steps=10, width=32, height=32, cfg_scale=1.0)
            assert list(sd_ctx.lora_state) == ["x"], tag


def test_examples_are_found() -> None:
    found = {(block.document, block.language) for block in blocks()}
    assert found >= {("README", "python"), ("lora", "python"), ("lora", "console")}
