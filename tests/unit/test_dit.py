"""FLUX.1 and SD3: each network and whole runs against diffusers' stored answers; tests/parity asks diffusers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases_dit import NETWORKS, RUNS, Case, Run
from closeness import assert_close

from sdcpp_py import SDContext, _native

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "dit.npz")

Opens = Callable[..., SDContext]


def final_latent(context: SDContext, run: Run) -> np.ndarray:
    context.generate(**run.request())
    return _native.probe_latent(context._native)


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_a_network_matches_diffusers_stored_answer(case: Case, dit: Opens) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    got = _native.probe_run(dit(case.model)._native, case.network, **case.inputs)
    assert_close(got.reshape(GOLDEN[case.name].shape), GOLDEN[case.name], tolerance=1e-5)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_matches_diffusers_stored_latent(run: Run, dit: Opens) -> None:
    """From a prompt and a seed to the latent: the networks' error over a few steps, with guidance some times that."""
    assert_close(final_latent(dit(run.model), run), GOLDEN[f"run-{run.name}"], tolerance=1e-4)


@pytest.mark.parametrize("run", [RUNS[0], RUNS[6], RUNS[-1]], ids=lambda run: run.name)
def test_a_folder_and_a_single_file_are_the_same_model(run: Run, dit: Opens) -> None:
    """Fused and swapped in the one, split in the other, and the same bytes in memory."""
    folder, single = dit(run.model), dit(run.model, storage="single")
    assert folder.fingerprint() == single.fingerprint()
    np.testing.assert_array_equal(final_latent(folder, run), final_latent(single, run))


def test_what_a_request_takes_where_it_says_nothing(dit: Opens) -> None:
    picked = ("steps", "cfg_scale", "guidance", "sampler", "scheduler")

    def defaults(run: Run) -> tuple[Any, ...]:
        return tuple(dit(run.model)._native.defaults()[name] for name in picked)

    by_name = {run.name: run for run in RUNS}
    assert defaults(by_name["flux"]) == (28, 1.0, 3.5, "euler", "simple")
    assert defaults(by_name["flux-schnell"]) == (4, 1.0, -1.0, "euler", "simple")
    assert defaults(by_name["flux-fill"]) == (50, 1.0, 30.0, "euler", "simple")
    assert defaults(by_name["sd3"]) == (28, 7.0, -1.0, "euler", "normal")
    assert dit(by_name["sd3"].model).info.prediction == "flow"
