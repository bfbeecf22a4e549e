"""FLUX.1 and SD3 against diffusers, live: networks, f16 weights, whole runs, and the names of single files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases_dit
import lora_dit
import numpy as np
import pytest
import tiny_redux
from cases_dit import FLUX, FLUX_FILL, NETWORKS, RUNS, SD3, SD35_MEDIUM
from closeness import assert_close

from sdcpp_py import SDContext, _native

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Callable[[cases_dit.Model], Any]:
    from reference_dit import truth

    root = tmp_path_factory.mktemp("truth")
    return lambda model: truth(model, root)


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
@pytest.mark.usefixtures("kernels")
def test_a_network_matches_diffusers(
    case: cases_dit.Case, dit: Callable[..., SDContext], truth: Any, once: Callable[..., Any]
) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    want = once(lambda: truth(case.model).network(case))
    assert_close(
        _native.probe_run(dit(case.model)._native, case.network, **case.inputs).reshape(want.shape), want, 1e-5
    )


@pytest.mark.parametrize("case", [NETWORKS[0], NETWORKS[3], NETWORKS[7]], ids=lambda case: case.name)
@pytest.mark.usefixtures("kernels")
def test_f16_weights_stay_close(case: cases_dit.Case, truth: Any, once: Callable[..., Any], tmp_path: Path) -> None:
    """Weights rounded to 11 bits, and activations in products with them: 5e-4 each, several times that in all."""
    folder = lora_dit.family(case.model).write_folder(case.model, tmp_path, dtype="float16")
    with SDContext(folder, threads=1) as context:
        got = _native.probe_run(context._native, case.network, **case.inputs)
    assert_close(got, once(lambda: truth(case.model).network(case)), 5e-3)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
@pytest.mark.usefixtures("kernels")
def test_a_run_matches_diffusers(
    run: cases_dit.Run, dit: Callable[..., SDContext], truth: Any, once: Callable[..., Any]
) -> None:
    context = dit(run.model)
    context.generate(**run.request())
    want = once(lambda: truth(run.model).run(run))
    assert_close(_native.probe_latent(context._native), want, 1e-4)


@pytest.mark.usefixtures("kernels")
def test_redux_matches_diffusers(
    dit: Callable[..., SDContext], truth: Any, once: Callable[..., Any], tmp_path: Path
) -> None:
    """SigLIP and the embedder alone, then a whole run."""
    import reference_redux

    files = tiny_redux.write(FLUX.context, tmp_path)
    picture = np.ascontiguousarray(cases_dit.PICTURE[: tiny_redux.SIDE, : tiny_redux.SIDE])
    image = (picture / np.float32(127.5) - 1).transpose(2, 0, 1)[None]
    empty = torch.zeros(1, 0, FLUX.context)
    with SDContext(dit(FLUX)._path, **files, threads=1) as context:
        want = reference_redux.with_picture(empty, torch.zeros(1, FLUX.pooled), picture).numpy()
        assert_close(_native.probe_run(context._native, "redux", image=image).reshape(want.shape), want, 1e-5)
        context.generate(**cases_dit.REDUX.request())
        want = once(lambda: truth(FLUX).run(cases_dit.REDUX))
        assert_close(_native.probe_latent(context._native), want, 1e-4)


@pytest.mark.parametrize(
    ("model", "pipeline", "scheduler"),
    [
        (SD3, "StableDiffusion3Pipeline", {"shift": 1.7}),
        (SD3, "StableDiffusion3Pipeline", {"use_dynamic_shifting": True, "base_shift": 0.3, "max_shift": 2.0}),
        (FLUX, "FluxPipeline", {"use_dynamic_shifting": True, "max_shift": 2.0, "max_image_seq_len": 300}),
        (FLUX, "FluxPipeline", {"shift": 2.5}),
    ],
    ids=["sd3-shift", "sd3-dynamic", "flux-dynamic", "flux-shift"],
)
@pytest.mark.usefixtures("kernels")
def test_a_folders_schedule_is_followed(
    model: cases_dit.Model,
    pipeline: str,
    scheduler: dict[str, object],
    once: Callable[..., Any],
    once_path: Path,
) -> None:
    from reference_dit import Truth

    run = cases_dit.Run("schedule", model, pipeline, {"cfg_scale": 4.0} if model is SD3 else {})

    def followed() -> tuple[Path, np.ndarray]:
        truth = Truth(model, once_path)
        (once_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        return once_path, truth.run(run)

    folder, want = once(followed)
    arguments = {**run.arguments, "scheduler": "normal" if model is SD3 else "simple"}
    with SDContext(folder, threads=1) as context:
        context.generate(**{**run.request(), **arguments})
        assert_close(_native.probe_latent(context._native), want, 1e-4)


@pytest.mark.parametrize("model", [FLUX, FLUX_FILL, SD3, SD35_MEDIUM], ids=["flux", "fill", "sd3", "sd3.5"])
def test_original_names_are_those_that_diffusers_converts(model: cases_dit.Model) -> None:
    """The tests' own tables of original names, fused rows and swapped halves, against diffusers' converters."""
    from diffusers.loaders import single_file_utils

    is_flux = isinstance(model, cases_dit.TinyFlux)

    def shown(values: np.ndarray) -> np.ndarray:
        """Its converter for FLUX counts on 3072 rows where the tiny model has 64: one column of each, 48 times."""
        return np.repeat(values.reshape(len(values), -1)[:, :1], 48, axis=0) if is_flux else values

    tensors = {name: torch.from_numpy(shown(values).copy()) for name, values in lora_dit.original(model).items()}
    convert = f"convert_{'flux' if is_flux else 'sd3'}_transformer_checkpoint_to_diffusers"
    got = getattr(single_file_utils, convert)(tensors)
    want = lora_dit.family(model).components(model)["transformer"]
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_array_equal(got[name].numpy(), shown(values), err_msg=name)


@pytest.mark.parametrize(
    ("model", "pipeline"),
    [(FLUX, "FluxPipeline"), (FLUX_FILL, "FluxFillPipeline"), (SD35_MEDIUM, "StableDiffusion3Pipeline")],
    ids=["flux", "turbo-on-fill", "sd3.5"],
)
@pytest.mark.usefixtures("kernels")
def test_loras_act_as_diffusers_has_them(
    model: cases_dit.Model,
    pipeline: str,
    dit: Callable[..., SDContext],
    once: Callable[..., Any],
    once_path: Path,
) -> None:
    """On all modules of the plain model; on Fill diffusers fills the missing input features up with zeros."""
    case = cases_dit.denoise("lora", model, 6, 4, [500.0])
    file, want = once(lambda: adapted_by_diffusers(model, pipeline, case, once_path))
    context = dit(model)
    context.apply_loras([(str(file), 0.7)])
    got = _native.probe_run(context._native, case.network, **case.inputs)
    context.apply_loras([])
    assert_close(got, want, 1e-5)


def adapted_by_diffusers(
    model: cases_dit.Model, pipeline: str, case: cases_dit.Case, folder: Path
) -> tuple[Path, np.ndarray]:
    """A LoRA on all modules, and what the network answers with it."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from reference_dit import Truth

    plain = FLUX if isinstance(model, cases_dit.TinyFlux) else model
    weights, modules = lora_dit.original(plain), lora_dit.family(plain).modules(plain)
    paths = [p for m, parts in modules.items() if weights.get(f"{m}.weight", np.zeros(1)).ndim == 2 for p in parts]
    update = lora_dit.random_update(plain, paths)
    file = lora_dit.write(lora_dit.peft("transformer.")(update), folder / "lora.safetensors")

    truth = Truth(model, folder / "model")
    pipe = truth.pipe(pipeline, FlowMatchEulerDiscreteScheduler())
    pipe.load_lora_weights(str(folder), weight_name=file.name, adapter_name="one")
    pipe.set_adapters("one", 0.7)
    return file, truth.network(case)
