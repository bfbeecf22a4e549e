"""The examples of docs/weights.md, run one after another."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_dit
import tiny_flux
import torch_files
from cases import SD1
from cases_dit import FLUX
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from sdcpp_py.cli import app
from sdcpp_py.weights import convert

GUIDE = Path(__file__).parents[2] / "docs" / "weights.md"


def examples() -> Iterator[tuple[str, str]]:
    for language, text in re.findall(
        r"^```(console|python)\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S
    ):
        if language == "python":
            yield language, text
            continue
        for line in text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                yield language, line.removeprefix("$ ")


def test_every_example_runs(tiny_folder: Any, tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are tiny, and so are pictures: a prompt is painted in the fewest steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    half = {name: values.astype(np.float16) for name, values in load_file(tiny_sd1).items()}
    save_file(half, "model.safetensors")
    torch_files.save(tmp_path / "model.ckpt", half)
    shutil.copytree(tiny_folder(SD1), "pipeline")
    Path("embeddings").mkdir()
    save_file({"emb_params": np.ones((2, SD1.text_width), np.float32)}, "embeddings/easystyle.safetensors")
    flux = tiny_dit.save(tiny_flux.single_tensors(FLUX), tmp_path / "flux.safetensors")
    parts = {"denoiser": "flux-q4_K.gguf", "clip_l": "clip_l.safetensors", "t5xxl": "t5xxl-q8_0.gguf"}
    for part, name in {**parts, "vae": "ae.safetensors"}.items():
        convert(flux, name, only=part)
    ran = 0
    for language, text in examples():
        if language == "python":
            exec(compile(text, str(GUIDE), "exec"), {})
        else:
            command, *arguments = shlex.split(text)
            assert command == "sdcpp"
            if "--prompt" in arguments or "generate" in arguments:
                arguments += ["--steps", "1", "--threads", "1"]
            if "generate" in arguments:
                arguments += ["--width", "32", "--height", "32"]
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{text}: {result.output}"
        ran += 1
    assert ran > 10
