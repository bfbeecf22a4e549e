"""Every tool that writes weights, stopped at any moment or out of space: no half file, and its sources as they were."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lora_files
import numpy as np
import pytest
from cases import SD1
from safetensors.numpy import load_file, save_file

from sdcpp_py import Io
from sdcpp_py.lora import bake, extract, merge, prune
from sdcpp_py.lora import convert as convert_lora
from sdcpp_py.weights import convert
from sdcpp_py.weights.imatrix import write_imatrix

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs the alarms and limits of POSIX")

# Each writes about a megabyte or more, so that there is something to stop.
TOOLS: dict[str, Callable[[Path, Path], object]] = {
    "convert.gguf": lambda at, out: convert(at / "base.safetensors", out, type="q8_0"),
    "convert.safetensors": lambda at, out: convert(at / "folder", out, type="f16"),
    "split.gguf": lambda at, out: convert(at / "base.safetensors", out, split=1_000_000),
    "imatrix.gguf": lambda at, out: write_imatrix(out, {"w": (np.ones(1_000_000), 1)}, 1),
    "bake.gguf": lambda at, out: bake(at / "base.safetensors", [(at / "x.safetensors", 0.5)], out),
    "merge.safetensors": lambda at, out: merge([(at / "x.safetensors", 0.5), (at / "y.safetensors", 1.0)], out),
    "lora-convert.safetensors": lambda at, out: convert_lora(at / "x.safetensors", out, to="kohya"),
    "prune.safetensors": lambda at, out: prune(at / "x.safetensors", out, drop=["clip.*"]),
    "extract.safetensors": lambda at, out: extract(at / "tuned.safetensors", at / "folder", out, rank=32, type="f32"),
}
each_tool = pytest.mark.parametrize("tool", TOOLS)


@pytest.fixture(scope="module")
def sources(tiny_sd1: Path, tiny_folder: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "base.safetensors").symlink_to(tiny_sd1)
    (folder / "folder").symlink_to(tiny_folder(SD1))
    for seed, name in enumerate("xy"):
        update = lora_files.random_update(lora_files.attention(), seed=seed)
        wide = {key: np.tile(value, (16, 1)) if key.endswith("lora_down.weight") and value.ndim == 2 else value
                for key, value in lora_files.tensors_of(update).items()}  # fmt: skip
        wide = {key: np.tile(value, (1, 16)) if key.endswith("lora_up.weight") and value.ndim == 2 else value
                for key, value in wide.items()}  # fmt: skip
        lora_files.save(folder / f"{name}.safetensors", wide)
    weights = load_file(tiny_sd1)
    save_file({name: values * np.float32(1.01) for name, values in weights.items()}, folder / "tuned.safetensors")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for top in (folder, folder / "folder")
        for path in top.rglob("*")
        if path.is_file()
    }


@contextmanager
def interrupt_after(seconds: float) -> Iterator[None]:
    """As Ctrl-C does it, once, after so much processor time; not within garbage collection, where it would be lost."""
    gc.disable()
    before = signal.signal(signal.SIGPROF, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        gc.enable()


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "imatrix.gguf"])  # which is done in no time
def test_an_interrupt_at_any_moment_leaves_nothing(tool: str, sources: Path, tmp_path: Path) -> None:
    before = hashes(sources)
    out = tmp_path / tool
    TOOLS[tool](sources, out)  # the first time, modules are imported
    begin = time.process_time()
    TOOLS[tool](sources, out)
    whole = time.process_time() - begin
    complete = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        path.unlink()
    stopped = 0
    for share in (0.05, 0.4, 0.8):
        try:
            with interrupt_after(max(share * whole, 1e-4)):
                TOOLS[tool](sources, out)
        except KeyboardInterrupt:
            stopped += 1
        left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert left.items() <= complete.items(), sorted(left)
        for path in tmp_path.iterdir():
            path.unlink()
    assert stopped
    assert hashes(sources) == before


@each_tool
@pytest.mark.parametrize("room", [0, 10_000, 300_000])
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tool: str, room: int, sources: Path, tmp_path: Path) -> None:
    import resource

    out = tmp_path / tool
    if tool != "split.gguf":
        out.write_bytes(b"old")
    before = hashes(sources)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
        with pytest.raises(Io, match=rf"{out.stem}.*: File too large"):
            TOOLS[tool](sources, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ([] if tool == "split.gguf" else [tool])
    assert tool == "split.gguf" or out.read_bytes() == b"old"
    assert hashes(sources) == before


@each_tool
def test_files_are_closed_by_those_who_opened_them(tool: str, sources: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ResourceWarning)
        TOOLS[tool](sources, tmp_path / tool)
        gc.collect()
    assert not [str(warning.message) for warning in told]
