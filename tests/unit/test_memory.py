"""Components that come and leave where memory is limited, and what is told of memory beforehand."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import reference_lora

from sdcpp_py import BadArgument, OutOfMemory, SDContext, _native
from sdcpp_py.weights import convert

RUN: dict[str, Any] = {"prompt": "a red heart", "steps": 2, "seed": 3, "width": 64, "height": 64}
SMALL = 9 << 20  # room for one component of the tiny model and its activations, not for all


@pytest.fixture(scope="module", params=["f32", "bf16"])
def model(request: pytest.FixtureRequest, tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as it is used where it lies, and with convolutions that have to be converted."""
    if request.param == "f32":
        return tiny_sd1
    path = tmp_path_factory.mktemp("bf16") / "tiny.gguf"
    convert(tiny_sd1, path, tensor_types=[(".", "bf16")])
    return path


def latent(context: SDContext, **options: Any) -> np.ndarray:
    context.generate(**{**RUN, **options})
    return _native.probe_latent(context._native)


def moves(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What came and left since the last time."""
    lines = [
        record.message for record in caplog.records if record.message.endswith(" MB") or " MB on " in record.message
    ]
    caplog.clear()
    return [line for line in lines if "weights" not in line]


def test_all_stay_where_there_is_room(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sdcpp_py")
    with SDContext(model, threads=1) as context:
        latent(context)
        assert not any("has left" in line for line in moves(caplog))
        latent(context, prompt="a cat")
        assert moves(caplog) == []


def test_a_limit_changes_nothing_but_who_is_there(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "sdcpp_py")
    with SDContext(model, threads=1) as free, SDContext(model, threads=1, memory_limit=SMALL) as limited:
        for prompt in ("a red heart", "a cat", "a red heart"):
            want, got = (latent(context, prompt=prompt) for context in (free, limited))
            np.testing.assert_array_equal(got, want)
        left = [line.split(":")[0] for line in moves(caplog) if "has left" in line]
        assert left.count("cond_stage_model.transformer") == 2  # the third prompt is known already
        assert limited.fingerprint() == free.fingerprint()


@pytest.mark.parametrize("mode", ["runtime", "restore", "diff"])
def test_loras_survive_that_their_weights_leave(
    mode: str, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another LoRA for each picture, of all components; then none."""
    caplog.set_level(logging.DEBUG, "sdcpp_py")
    loras: list[dict[Path, float]] = []
    for seed in (1, 2):
        update = lora_files.random_update(lora_files.modules(), reference_lora.lora)
        tensors = lora_files.tensors_of({path: of for k, (path, of) in enumerate(update.items()) if k % 2 == seed % 2})
        loras.append({lora_files.save(tmp_path / f"{seed}.safetensors", tensors): 0.5 * seed})
    with (
        SDContext(model, threads=1, lora_mode=mode) as free,
        SDContext(model, threads=1, lora_mode=mode, memory_limit=SMALL) as limited,
    ):
        before = limited.fingerprint()
        for wanted in (loras[0], loras[1], {**loras[0], **loras[1]}):
            want, got = (latent(context, prompt=f"a cat {len(wanted)}", loras=wanted) for context in (free, limited))
            np.testing.assert_array_equal(got, want)
            assert limited.fingerprint() == free.fingerprint()
        assert any("has left" in line for line in moves(caplog))
        for context in (free, limited):
            context.reset_loras()
            assert context.fingerprint() == before
        np.testing.assert_array_equal(*(latent(context, loras={}) for context in (free, limited)))


def test_files_in_ram_do_not_lose_their_bytes(model: Path) -> None:
    """Pages without a file behind them would come back as zeros."""
    with (
        SDContext(model, threads=1) as free,
        SDContext(model, threads=1, memory_limit=SMALL, base_copy="ram") as limited,
    ):
        for prompt in ("a cat", "a dog"):
            np.testing.assert_array_equal(*(latent(context, prompt=prompt) for context in (free, limited)))


def test_too_little_for_anything(model: Path) -> None:
    with SDContext(model, threads=1, memory_limit=1000) as context:
        for _ in range(2):
            with pytest.raises(OutOfMemory, match=r"activations of 'text1' need \d+ MB.* try a smaller picture"):
                context.generate(**RUN)
    with pytest.raises(BadArgument, match="memory_limit"):
        SDContext(model, memory_limit=-1)


# ---- what is told beforehand ---------------------------------------------------------------------------

MEASURED = """
import json, sys
from sdcpp_py import SDContext
def status():
    with open("/proc/self/status") as file:
        of = dict(line.split(":", 1) for line in file)
    return {key: 1024 * int(of[key].split()[0]) for key in ("VmHWM", "VmRSS")}
job = json.loads(sys.argv[1])
with SDContext(job["model"], threads=1) as context:
    context.generate("a", width=8, height=8, steps=1)  # so that what the process itself needs is there
    before = status()["VmRSS"]
    estimate = context.estimate_memory(**job["picture"])
    context.generate("a cat", steps=1, **job["picture"])
    weights = sum(network.weights for network in estimate.networks)
    print(json.dumps({"estimate": estimate.peak - weights, "measured": status()["VmHWM"] - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_is_what_a_picture_takes(tiny_sd1: Path, tmp_path: Path) -> None:
    """Activations, which count most of what this small model takes, within 10 %. On the host the picture comes on top:
    12 bytes of a pixel as floats, and 12 more of its copies in numpy and Pillow."""
    job = json.dumps({"model": str(tiny_sd1), "picture": {"width": 1024, "height": 896}})
    child = [sys.executable, "-c", MEASURED, job]
    done = subprocess.run(child, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    of = json.loads(done.stdout)
    assert of["estimate"] > 300e6
    pictures = 24 * 1024 * 896
    assert abs(of["measured"] - of["estimate"] - pictures) <= 0.1 * of["estimate"], of


def test_the_estimate_reads_and_changes_nothing(model: Path) -> None:
    with SDContext(model, threads=1) as context:
        before = latent(context)
        estimate = context.estimate_memory(width=96, height=64, batch_size=2)
        np.testing.assert_array_equal(_native.probe_latent(context._native), before)
        np.testing.assert_array_equal(latent(context), before)
        assert (estimate.width, estimate.height) == (96, 64)
        names = [network.name for network in estimate.networks]
        assert names == ["text1", "denoise", "vae_decode"]
        assert all(network.weights > 0 and network.activations > 0 for network in estimate.networks)
        larger = context.estimate_memory(width=192, height=128)
        assert larger.peak > estimate.peak
        assert context.estimate_memory(width=192, height=128, vae_tile=64).peak < larger.peak
        with pytest.raises(BadArgument, match="multiples of 8"):
            context.estimate_memory(width=33, height=64)


def test_the_estimate_knows_who_leaves(model: Path) -> None:
    peaks = []
    for limit in (0, SMALL):
        with SDContext(model, threads=1, memory_limit=limit) as context:
            peaks.append(context.estimate_memory(width=64, height=64).peak)
    assert peaks[1] <= peaks[0]
    assert peaks[1] <= SMALL


def test_info_tells_it(tiny_sd1: Path) -> None:
    from typer.testing import CliRunner

    from sdcpp_py.cli import app

    said = CliRunner().invoke(app, ["info", str(tiny_sd1), "--size", "128"])
    assert said.exit_code == 0, said.output
    assert "MB for a picture of 128 x 128" in said.output
    assert "memory vae_decode" in said.output
