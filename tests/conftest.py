"""Tiny random models as session fixtures, and where the vocabulary lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kernel_sets
import numpy as np
import pytest
import tiny
from cases import SD1
from kernel_sets import Kernels

from sdcpp_py import SDContext, _native
from sdcpp_py.files import data_dir

# What tests compare with computes in float32; tests of bfloat16 ask for it.
os.environ.setdefault("SDCPP_PRECISION", "f32")

# Each core has a process of its own: several threads of torch's in each wait for one another four fifths of their time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Fixtures by which a test runs once for each kernel set, and the precisions of those.
KERNELS = {"kernels": ("f32",), "all_kernels": ("f32", "bf16")}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kernels",
        default="best",
        help="the CPU's kernel sets: best, all, a name, or others: all but the best, and no test without them",
    )


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture, precisions in KERNELS.items():
        if fixture in metafunc.fixturenames:
            sets = kernel_sets.chosen(metafunc.config.getoption("--kernels"), *precisions)
            metafunc.parametrize(fixture, sets, ids=str, indirect=True, scope="module")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--kernels") in ("best", "all"):
        return
    differ = [item for item in items if KERNELS.keys() & set(getattr(item, "fixturenames", ()))]
    config.hook.pytest_deselected(items=[item for item in items if item not in differ])
    items[:] = differ


def _on(kernels: Kernels) -> Iterator[Kernels]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDCPP_KERNELS", kernels.name)
        patch.setenv("SDCPP_PRECISION", kernels.precision)
        yield kernels


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """What contexts compute on that are opened meanwhile, in float32: each set that --kernels asks for.

    A fixture that keeps contexts has to ask for it too, so that they end with it.
    """
    yield from _on(request.param)


@pytest.fixture(scope="module")
def all_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    """The same in bf16 as well, where the processor multiplies it."""
    yield from _on(request.param)


@pytest.fixture(scope="module")
def _made() -> dict[object, Any]:
    return {}


@pytest.fixture
def once(request: pytest.FixtureRequest, _made: dict[object, Any]) -> Callable[..., Any]:
    """What a test needs that does not depend on the kernels, such as torch's answer: once(make) is made for the first
    set and kept for the others. Where a test needs several, each has a key: once(make, "pixels")."""
    # By identity: not every parameter can be hashed, and those of a module are the same for each set.
    case = {name: id(value) for name, value in request.node.callspec.params.items() if name not in KERNELS}

    def get(make: Callable[[], Any], key: object = None) -> Any:
        whole = (request.function.__name__, *sorted(case.items()), key)
        if whole not in _made:
            _made[whole] = make()
        return _made[whole]

    return get


@pytest.fixture
def once_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files of what `once` makes: it stays for the tests on other sets, as tmp_path does not."""
    return tmp_path_factory.mktemp(request.function.__name__)


def computing_on() -> tuple[str, str]:
    """What a context opened now computes on."""
    return os.environ.get("SDCPP_KERNELS", ""), os.environ["SDCPP_PRECISION"]


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
    """The engine's own handle on a tiny model's folder, opened once for each kernel set."""
    opened: dict[object, _native.Context] = {}

    def context(model: tiny.TinySD1) -> _native.Context:
        key = (model, computing_on())
        if key not in opened:
            opened[key] = _native.Context(str(tiny_folder(model)), data_dir=str(data_dir()), threads=1)
        return opened[key]

    return context


@pytest.fixture
def probe(native: Callable[..., _native.Context], kernels: Kernels) -> Callable[..., np.ndarray]:
    """Runs one network of a tiny model alone: probe(model, network, **inputs)."""

    def run(model: tiny.TinySD1, network: str, **inputs: np.ndarray) -> np.ndarray:
        assert native(model).info()["kernels"] == kernels.name
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
    """Contexts on tiny FLUX.1 and SD3 models by how they are stored, each opened once for each kernel set:
    dit(model, storage="single")."""
    import lora_dit
    import tiny_dit

    root = tmp_path_factory.mktemp("dit")
    paths: dict[object, Path] = {}
    opened: dict[object, SDContext] = {}

    def path_of(model: lora_dit.Model, storage: str) -> Path:
        if (model, storage) not in paths:
            family, path = lora_dit.family(model), root / f"model-{len(paths)}"
            if storage == "folder":
                family.write_folder(model, path)
            else:
                path = tiny_dit.save(family.single_tensors(model), path.with_suffix(".safetensors"))
            paths[model, storage] = path
        return paths[model, storage]

    def context(model: lora_dit.Model, storage: str = "folder") -> SDContext:
        key = (model, storage, computing_on())
        if key not in opened:
            opened[key] = SDContext(path_of(model, storage), threads=1)
        return opened[key]

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
        return SDContext(weights, vae=folder / "vae", **components, threads=1, **options)

    return context
