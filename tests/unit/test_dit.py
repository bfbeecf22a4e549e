"""FLUX.1 and SD3: each network and whole runs against diffusers' stored answers; tests/parity asks diffusers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lora_dit
import numpy as np
import pytest
import tiny_dit
from cases_dit import FLUX, FLUX_CONTROL, FLUX_FILL, FLUX_SCHNELL, NETWORKS, PICTURE, RUNS, SD3, TALL, Case, Model, Run
from closeness import assert_close, relative_rmse

from sdcpp_py import BadArgument, BadFile, SDContext, Unsupported, _native, sizes
from sdcpp_py.files import data_dir
from sdcpp_py.sizes import KONTEXT, kontext_size

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


BOTH = ("flux", "sd3", "sd3.5-medium")


@pytest.mark.parametrize("run", [run for run in RUNS if run.name in BOTH], ids=lambda run: run.name)
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


@pytest.mark.parametrize("sampler", [name for name in _native.samplers() if name != "tcd"])
def test_samplers_solve_flows(sampler: str, dit: Opens) -> None:
    """Small steps without noise end where small steps of Euler's end, whatever the method."""
    context = dit(FLUX_SCHNELL)
    context.generate("a heart", sampler="euler", **{**SMALL, "steps": 60})
    want = _native.probe_latent(context._native)
    context.generate("a heart", sampler=sampler, eta=0.0, **{**SMALL, "steps": 20})
    got = _native.probe_latent(context._native)
    assert np.all(np.isfinite(got))
    assert sampler == "lcm" or relative_rmse(got, want) < 0.05


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
    "reference-image-of-schnell": (FLUX_SCHNELL, {"reference_image": PICTURE}, "this model does not look at one"),
    "reference-image-of-fill": (FLUX_FILL, {"reference_image": PICTURE}, "FLUX.1 Kontext does"),
    "reference-image-of-sd3": (SD3, {"reference_image": PICTURE}, "FLUX.1 Kontext does"),
    "needless-control-image": (SD3, {"control_image": PICTURE}, "neither the model nor a LoRA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_painted_is_a_sentence(name: str, dit: Opens) -> None:
    model, arguments, words = REFUSED[name]
    with pytest.raises(BadArgument, match=words):
        dit(model).generate("a heart", **{**SMALL, **arguments})


# ---- prompts longer than T5's room


@pytest.mark.parametrize(
    ("model", "room"), [(FLUX, 511), (FLUX_SCHNELL, 255), (SD3, 255)], ids=["dev", "schnell", "sd3"]
)
def test_what_t5_has_no_room_for_is_told(model: Model, room: int, dit: Opens, caplog: pytest.LogCaptureFixture) -> None:
    arguments = {**SMALL, "steps": 1, "cfg_scale": 1.0}
    dit(model).generate("red " * room, **arguments)
    assert not caplog.records
    tail = "a Café, two-legged"
    n = len(_native.probe_t5_tokens(str(data_dir() / "t5_spiece.model"), tail))
    dit(model).generate(prompts=[f"{'red ' * room}({tail}:1.2)"] * 2, **arguments)
    (record,) = caplog.records
    told = f'T5 reads {room} tokens, and the prompt has {room + n}; left out: "{tail}"'
    assert (record.levelname, record.name) == ("WARNING", "sdcpp_py")
    assert record.message == told + (", which CLIP alone reads" if model is SD3 else "")


def test_what_is_left_out_of_a_negative_prompt_is_told_where_it_counts(
    dit: Opens, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = {**SMALL, "steps": 1, "negative_prompt": "red " * 256}
    dit(FLUX_SCHNELL).generate("a heart", **arguments)
    assert not caplog.records
    dit(FLUX_SCHNELL).generate("a heart", cfg_scale=2.0, **arguments)
    assert [record.message for record in caplog.records] == [
        'T5 reads 255 tokens, and the prompt has 256; left out: "red"'
    ]


# ---- what a folder's scheduler_config.json and a name say


def folder_with(model: Model, folder: Path, scheduler: dict[str, object]) -> Path:
    lora_dit.family(model).write_folder(model, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize(
    ("model", "scheduler", "shift"),
    [
        (SD3, {"shift": 1.7}, 1.7),
        (SD3, {}, 3.0),
        (FLUX_SCHNELL, {"shift": 2.5, "use_dynamic_shifting": False}, 2.5),
        (FLUX, {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0,
                "base_image_seq_len": 2, "max_image_seq_len": 10}, np.exp(0.2 + 1.8 * (6 - 2) / 8)),
        (SD3, {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 0.4}, np.exp(0.4)),
    ],
    ids=["sd3", "none", "schnell", "flux", "sd3-dynamic"],
)  # fmt: skip
def test_a_folder_states_its_shift(
    model: Model, scheduler: dict[str, object], shift: float, dit: Opens, tmp_path: Path
) -> None:
    """As a request with that shift: the same noise levels but for the last place."""
    request = {**SMALL, "scheduler": "simple"}
    with SDContext(folder_with(model, tmp_path, scheduler), threads=1, precision="f32") as context:
        context.generate("a heart", **request)
        got = _native.probe_latent(context._native)
    dit(model).generate("a heart", shift=shift, **request)
    assert_close(got, _native.probe_latent(dit(model)._native), tolerance=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "error", "words"),
    [
        ({"shift": -3}, BadFile, "scheduler_config.json has the shift '-3'; expected a number between 0.01 and 100"),
        ({"base_shift": "a"}, BadFile, "has the base_shift 'a'"),
        (
            {"use_dynamic_shifting": True, "base_image_seq_len": 9, "max_image_seq_len": 9},
            BadFile,
            "expected more than base_image_seq_len",
        ),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, Unsupported, "time_shift_type 'linear'"),
    ],
)
def test_a_schedule_without_sense_is_refused(
    scheduler: dict[str, object], error: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        SDContext(folder_with(FLUX_SCHNELL, tmp_path, scheduler))


@pytest.mark.parametrize(
    ("model", "name", "steps", "cfg_scale", "guidance"),
    [
        (SD3, "stable-diffusion-3.5-large-turbo", 4, 1.0, -1.0),
        (SD3, "stable-diffusion-3.5-large", 28, 7.0, -1.0),
        (FLUX, "flux1-dev-kontext", 28, 1.0, 2.5),
        (FLUX, "FLUX.1-Turbo", 8, 1.0, 3.5),
        (FLUX, "flux-hyper-16steps", 16, 1.0, 3.5),
        (FLUX_SCHNELL, "flux-schnell-turbo", 4, 1.0, -1.0),
    ],
)
def test_names_of_distilled_models_tell_their_defaults(
    model: Model, name: str, steps: int, cfg_scale: float, guidance: float, tmp_path: Path
) -> None:
    path = lora_dit.family(model).write_folder(model, tmp_path / name)
    with SDContext(path, threads=1) as context:
        defaults = context._native.defaults()
    assert (defaults["steps"], defaults["cfg_scale"], defaults["guidance"]) == (steps, cfg_scale, guidance)
    assert defaults["sampler"] == "euler"


# ---- a picture to look at


def test_a_reference_image_is_scaled_to_what_kontext_knows() -> None:
    assert kontext_size((1000, 1000)) == (1024, 1024)
    assert kontext_size((1920, 1080)) == (1392, 752)
    assert kontext_size((30, 900)) == (672, 1568)
    assert all(kontext_size(size, size[0] * size[1]) == size for size in KONTEXT)
    assert kontext_size((500, 500), 2048 * 2048) == (1024, 1024)
    assert kontext_size((300, 200), 512 * 512) == (624, 416)
    assert kontext_size((300, 200), 1) == (16, 16)


def test_a_picture_is_as_large_as_its_reference_unless_told(dit: Opens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "KONTEXT", [(96, 64), (64, 64), (64, 96)])
    monkeypatch.setattr(sizes, "KONTEXT_AREA", 64 * 64)
    context = dit(FLUX)
    assert context.generate("a heart", reference_image=TALL, steps=1).size == (64, 96)
    assert context.generate("a heart", reference_image=TALL, steps=1, width=32, height=32).size == (32, 32)
    assert context.generate("a heart", reference_image=TALL, init_image=PICTURE, steps=1).size == (96, 64)


def test_a_reference_image_is_told_in_the_parameters(dit: Opens) -> None:
    picture = dit(FLUX).generate("a heart", reference_image=PICTURE, **SMALL)
    other = dit(FLUX).generate("a heart", reference_image=TALL, **SMALL)
    assert picture.parameters.reference_hash != other.parameters.reference_hash
    assert "Reference image hash" in picture.info["parameters"]
    assert np.any(np.asarray(picture) != np.asarray(other))


def test_a_batch_looks_at_one_reference(dit: Opens) -> None:
    """Guided, so that each picture is denoised twice."""
    request = {**SMALL, "reference_image": PICTURE, "cfg_scale": 2.0, "negative_prompt": "blue"}
    both = dit(FLUX).generate("a heart", batch_size=2, **request)
    alone = dit(FLUX).generate("a heart", **{**request, "seed": 2})
    assert np.abs(np.asarray(both[1]).astype(int) - np.asarray(alone).astype(int)).max() <= 1


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
