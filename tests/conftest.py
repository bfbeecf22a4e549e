"""Tiny random models as session fixtures, and where the vocabulary lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cases import SD1

from sdcpp_py import SDContext, _native
from sdcpp_py.files import data_dir

# What tests compare with computes in float32; tests of bfloat16 ask for it.
os.environ.setdefault("SDCPP_PRECISION", "f32")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hashes of files that tests make are kept beside them, not in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.TinySD1], Path]:
    """A tiny model's diffusers folder, made at its first use."""
    root = tmp_path_factory.mktemp("models")
    made: dict[tiny.TinySD1, Path] = {}

    def folder(model: tiny.TinySD1) -> Path:
        if model not in made:
            made[model] = tiny.write_folder(model, root / f"model-{len(made)}")
        return made[model]

    return folder


@pytest.fixture(scope="session")
def native(tiny_folder: Callable[[tiny.TinySD1], Path]) -> Callable[..., _native.Context]:
    """The engine's own handle on a tiny model's folder, opened once."""
    opened: dict[tiny.TinySD1, _native.Context] = {}

    def context(model: tiny.TinySD1) -> _native.Context:
        if model not in opened:
            opened[model] = _native.Context(str(tiny_folder(model)), data_dir=str(data_dir()), threads=2)
        return opened[model]

    return context


@pytest.fixture(scope="session")
def probe(native: Callable[..., _native.Context]) -> Callable[..., np.ndarray]:
    """Runs one network of a tiny model alone: probe(model, network, **inputs)."""

    def run(model: tiny.TinySD1, network: str, **inputs: np.ndarray) -> np.ndarray:
        return _native.probe_run(native(model), network, **inputs)

    return run


@pytest.fixture(scope="session")
def tiny_sd1(
    tiny_folder: Callable[[tiny.TinySD1], Path],
    native: Callable[..., _native.Context],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A tiny Stable Diffusion 1.x in one safetensors file under the original names, float32."""
    path = tmp_path_factory.mktemp("single") / "tiny-sd1.safetensors"
    return tiny.write_single(tiny_folder(SD1), path, native(SD1))


@pytest.fixture(scope="module")
def sd_ctx(tiny_sd1: Path) -> SDContext:
    """A context on the tiny single-file model, shared by the tests of a module."""
    with SDContext(tiny_sd1) as context:
        yield context


@pytest.fixture(scope="session")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SDContext]:
    """Contexts on tiny FLUX.1 and SD3 models by how they are stored, each opened once: dit(model, storage="single")."""
    import lora_dit
    import tiny_dit

    root = tmp_path_factory.mktemp("dit")
    opened: dict[object, SDContext] = {}

    def context(model: lora_dit.Model, storage: str = "folder") -> SDContext:
        if (model, storage) not in opened:
            family, path = lora_dit.family(model), root / f"model-{len(opened)}"
            if storage == "folder":
                family.write_folder(model, path)
            else:
                path = tiny_dit.save(family.single_tensors(model), path.with_suffix(".safetensors"))
            opened[model, storage] = SDContext(path, threads=1, precision="f32")
        return opened[model, storage]

    return context


@pytest.fixture(scope="session")
def dit_with(dit: Callable[..., SDContext], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SDContext]:
    """A model with other weights in its transformer, which is a file of its own in the original's bare names."""
    import tiny_dit
    from tiny_flux import TinyFlux

    root = tmp_path_factory.mktemp("changed")

    def context(model: Any, weights: Any, **options: Any) -> SDContext:
        folder = dit(model)._path
        if not isinstance(weights, Path):
            weights = tiny_dit.save(weights, root / f"{len(list(root.iterdir()))}.safetensors")
        parts = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2"}
        if not isinstance(model, TinyFlux):
            parts = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
        components = {role: folder / name for role, name in parts.items()}
        return SDContext(weights, vae=folder / "vae", **components, threads=1, precision="f32", **options)

    return context
