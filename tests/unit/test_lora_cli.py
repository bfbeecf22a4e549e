"""The command line's LoRA tools: every example of docs/lora_tools.md is run, and what goes wrong is one sentence."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import flux_files
import lora_files
import pytest
from cases import SD1
from typer.testing import CliRunner

from sdcpp_py import SDContext
from sdcpp_py.cli import app

GUIDE = (Path(__file__).parents[2] / "docs" / "lora_tools.md").read_text(encoding="utf-8")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["lora", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_sd1: Path, tiny_folder: Callable) -> Path:
    """The files that the guide names."""
    monkeypatch.chdir(tmp_path)
    update = lora_files.random_update(lora_files.attention(), seed=1)
    lora_files.save(tmp_path / "monday.safetensors", lora_files.tensors_of(update))
    lora_files.save(
        tmp_path / "tuesday.safetensors", lora_files.peft(lora_files.random_update(lora_files.attention(), seed=2))
    )
    flux_files.ai_toolkit(tmp_path / "flux_a.safetensors", 1)
    flux_files.kohya(tmp_path / "flux_kohya.safetensors", 2)
    flux_files.lycoris(tmp_path / "flux_lycoris.safetensors", 3)
    (tmp_path / "base.safetensors").symlink_to(tiny_sd1)
    changed = lora_files.write_model(tmp_path / "tuned", tiny_folder(SD1), lora_files.merged((update, 1.0)))
    (tmp_path / "tuned.safetensors").symlink_to(changed)
    return tmp_path


def test_every_example_of_the_guide_runs(folder: Path) -> None:
    blocks = re.findall(r"```\n(.*?)```", GUIDE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line]
    assert len(lines) >= 11
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "sdcpp"
        run(*arguments[1:])
        if "-o" in arguments:
            assert (folder / arguments[arguments.index("-o") + 1]).exists(), line
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    exec(code, {})
    with SDContext(folder / "painted.gguf", threads=1) as sd_ctx:
        assert sd_ctx.info.family == "sd1"


def test_every_command_has_an_example() -> None:
    commands = {
        command.name or command.callback.__name__
        for group in app.registered_groups
        if group.name == "lora"
        for command in group.typer_instance.registered_commands
    }
    assert commands - {"inspect"} == set(re.findall(r"^sdcpp lora (\w+)", GUIDE, re.MULTILINE))


def test_json_tells_everything(folder: Path) -> None:
    told = json.loads(
        run("merge", "monday.safetensors", "tuesday.safetensors:0.5", "--json", "--rank", "3", "-o", "x.safetensors")
    )
    assert told["family"] == "sd1"
    assert told["residuals"]
    assert json.loads(run("diff", "monday.safetensors", "x.safetensors", "--json"))["difference"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "base.safetensors", "--to", "kohya", "-o", "x.safetensors"], "not a LoRA"),
        (["merge", "monday.safetensors:0.5", "flux_a.safetensors", "-o", "x.safetensors"], "made for FLUX"),
        (["convert", "monday.safetensors", "--to", "kohya", "-o", "none/x.safetensors"], "no folder"),
        (["resize", "monday.safetensors", "-o", "x.safetensors"], "give a rank"),
        (["prune", "monday.safetensors", "-o", "x.safetensors"], "give patterns"),
        (["extract", "base.safetensors", "monday.safetensors", "--rank", "2", "-o", "x.safetensors"], "no model of"),
        (["bake", "base.safetensors", "flux_a.safetensors", "-o", "x.gguf"], "FLUX"),
        (["bake", "base.safetensors", "monday.safetensors", "-o", "x.gguf", "--tensor-type", "q8_0"], "regex=type"),
    ],
)
def test_what_goes_wrong_is_one_sentence(folder: Path, arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(app, ["lora", *arguments])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert not (folder / "x.safetensors").exists()
    assert not (folder / "x.gguf").exists()
