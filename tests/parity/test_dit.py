"""FLUX.1 and SD3 against diffusers, live: networks, f16 weights, whole runs, and the names of single files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases_dit
import lora_dit
import numpy as np
import pytest
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
def test_a_network_matches_diffusers(case: cases_dit.Case, dit: Callable[..., SDContext], truth: Any) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    want = truth(case.model).network(case)
    assert_close(
        _native.probe_run(dit(case.model)._native, case.network, **case.inputs).reshape(want.shape), want, 1e-5
    )


@pytest.mark.parametrize("case", [NETWORKS[0], NETWORKS[3], NETWORKS[7]], ids=lambda case: case.name)
def test_f16_weights_stay_close(case: cases_dit.Case, truth: Any, tmp_path: Path) -> None:
    """Weights rounded to 11 bits, and activations in products with them: 5e-4 each, several times that in all."""
    folder = lora_dit.family(case.model).write_folder(case.model, tmp_path, dtype="float16")
    with SDContext(folder, threads=1, precision="f32") as context:
        got = _native.probe_run(context._native, case.network, **case.inputs)
    assert_close(got, truth(case.model).network(case), 5e-3)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_matches_diffusers(run: cases_dit.Run, dit: Callable[..., SDContext], truth: Any) -> None:
    context = dit(run.model)
    context.generate(**run.request())
    assert_close(_native.probe_latent(context._native), truth(run.model).run(run), 1e-4)


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
