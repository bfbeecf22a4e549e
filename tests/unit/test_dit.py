"""FLUX.1 and SD3: each network and whole runs against diffusers' stored answers; tests/parity asks diffusers itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_dit
import numpy as np
import pytest
import tiny_dit
from cases_dit import FLUX_CONTROL, FLUX_SCHNELL, NETWORKS, PICTURE, RUNS, SD3, Case, Run
from closeness import assert_close, relative_rmse

from sdcpp_py import BadArgument, BadFile, SDContext, Unsupported, _native

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


SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 3, "seed": 1}
NOISY = {"euler_a", "dpm2_a", "dpm++2s_a", "dpm++2m_sde", "lcm"}


@pytest.mark.parametrize("sampler", _native.samplers())
def test_samplers_solve_flows_or_say_that_they_do_not(sampler: str, dit: Opens) -> None:
    """Methods without noise end where small steps of Euler's end; those that add noise are refused."""
    context = dit(FLUX_SCHNELL)
    if sampler in NOISY:
        with pytest.raises(BadArgument, match=re.escape(f"sampler '{sampler}' adds noise")):
            context.generate("a heart", sampler=sampler, **SMALL)
        return
    context.generate("a heart", sampler="euler", **{**SMALL, "steps": 60})
    want = _native.probe_latent(context._native)
    context.generate("a heart", sampler=sampler, **{**SMALL, "steps": 20})
    assert relative_rmse(_native.probe_latent(context._native), want) < 0.05


@pytest.mark.parametrize("scheduler", _native.schedulers())
def test_schedulers_know_flows(scheduler: str, dit: Opens) -> None:
    if scheduler == "ays":
        with pytest.raises(Unsupported, match="no levels for this kind of model"):
            dit(FLUX_SCHNELL).generate("a heart", scheduler=scheduler, **SMALL)
        return
    dit(FLUX_SCHNELL).generate("a heart", scheduler=scheduler, **SMALL)
    assert np.all(np.isfinite(_native.probe_latent(dit(FLUX_SCHNELL)._native)))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "guidance-of-schnell": (FLUX_SCHNELL, {"guidance": 3.5}, "this model takes none; use cfg_scale"),
    "guidance-of-sd3": (SD3, {"guidance": 3.5}, "this model takes none"),
    "shift-below-0": (SD3, {"shift": -1}, "shift -1"),
    "size": (FLUX_SCHNELL, {"width": 40}, "multiples of 16; the nearest is 48 x 48"),
    "larger-than-its-positions": (SD3, {"width": 208}, "13 x 3 squares .* positions for 12 x 12"),
    "control-image": (FLUX_CONTROL, {}, "takes 128 input features, where the plain model has 64"),
    "needless-control-image": (SD3, {"control_image": PICTURE}, "neither the model nor a LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_painted_is_a_sentence(name: str, dit: Opens) -> None:
    model, arguments, words = REFUSED[name]
    with pytest.raises(BadArgument, match=words):
        dit(model).generate("a heart", **{**SMALL, **arguments})


def test_a_shift_is_for_flows(sd_ctx: SDContext) -> None:
    with pytest.raises(BadArgument, match="only models of rectified flows"):
        sd_ctx.generate("a heart", shift=2, **SMALL)


def test_parts_that_are_missing_are_named(dit: Opens, tmp_path: Path) -> None:
    bare = tiny_dit.save(lora_dit.original(FLUX_SCHNELL), tmp_path / "flux.safetensors")
    with pytest.raises(BadFile, match="without all that belongs to it; give the rest as clip_l=, t5xxl=, vae="):
        SDContext(bare)
    with pytest.raises(BadFile, match="clip_l=, clip_g=, t5xxl="):
        SDContext(tiny_dit.save(lora_dit.original(SD3), tmp_path / "sd3.safetensors"), vae=dit(SD3)._path / "vae")


def test_images_of_a_batch_are_those_alone(dit: Opens) -> None:
    """Each with its own prompt, noise and guidance."""
    context = dit(FLUX_SCHNELL)
    both = context.generate(prompts=["a heart", "a (blue:1.4) sea"], **SMALL)
    alone = context.generate("a (blue:1.4) sea", **{**SMALL, "seed": 2})
    levels = np.abs(np.asarray(both[1]).astype(int) - np.asarray(alone).astype(int))
    assert levels.max() <= 1
