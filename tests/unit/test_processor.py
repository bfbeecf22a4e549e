"""Processors that lack what this one has, emulated by qemu-user: a sentence, never an illegal instruction."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QEMU = shutil.which("qemu-x86_64")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="is about processors of x86"),
    pytest.mark.skipif(QEMU is None, reason="needs qemu-x86_64 (qemu-user)"),
]

PAINT = """
import sdcpp_py
try:
    with sdcpp_py.SDContext(threads=1) as sd_ctx:
        image = sd_ctx.generate("a red heart", steps=1, width=64, height=64, cfg_scale=1.0, seed=1)
        print(sd_ctx.info.kernels, sd_ctx.info.precision, image.size)
except sdcpp_py.Unsupported as error:
    print(error)
"""


def run_on(processor: str, folder: Path, *arguments: str, **environment: str) -> str:
    """What Python prints there. OpenBLAS of numpy looks at more than what the emulator tells, so it is told."""
    done = subprocess.run(
        [str(QEMU), "-cpu", processor, sys.executable, *arguments],
        env={**os.environ, "OPENBLAS_CORETYPE": "Nehalem", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(("processor", "lacks"), [("Nehalem", "AVX, F16C, FMA, AVX2"), ("SandyBridge", "FMA, AVX2")])
def test_a_processor_for_which_ggml_was_not_built(processor: str, lacks: str, tmp_path: Path) -> None:
    """ggml's wheel is for AVX2, and ends the process where that is missing; a build for the machine need not be."""
    told = run_on(processor, tmp_path, "-c", PAINT)
    assert "the installed ggml was built for processors with" in told
    assert lacks in told
    assert "GGML_NATIVE=ON" in told
    doctor = run_on(processor, tmp_path, "-m", "sdcpp_py", "doctor")
    assert "plain" in doctor
    assert "which this one lacks" in " ".join(doctor.split())


@pytest.mark.parametrize(("name", "want"), [("", "avx2 f32"), ("reference", "reference f32"), ("plain", "plain f32")])
def test_a_processor_with_avx2_alone(name: str, want: str, tmp_path: Path) -> None:
    """The emulator knows no AVX-512, so that any instruction of it would end the process."""
    told = run_on("Haswell", tmp_path, "-c", PAINT, SDCPP_KERNELS=name, SDCPP_PRECISION="auto")
    assert told.strip() == f"{want} (64, 64)"
