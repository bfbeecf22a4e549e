"""The CPU's kernels: every set computes what diffusers does, in any number of threads, on any type of weights."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import kernel_sets
import lora_files
import numpy as np
import pytest
import quantised
from cases import NETWORKS, SD1, Case
from closeness import assert_close, relative_rmse

from sdcpp_py import BadArgument, SDContext, Unsupported, _native
from sdcpp_py.files import data_dir

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "networks.npz")
CASES = [
    case for case in NETWORKS if case.name in ("unet-odd", "unet-batch", "text-skip-2", "decode-tall", "encode-wide")
]


def open_model(path: Path, **options: object) -> _native.Context:
    return _native.Context(str(path), data_dir=str(data_dir()), **options)


@pytest.mark.parametrize("name", [kernels.name for kernels in kernel_sets.runnable("f32")])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_set_matches_diffusers_stored_answer(
    case: Case, name: str, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32 on both sides, as in test_networks."""
    monkeypatch.setenv("SDCPP_KERNELS", name)
    context = open_model(tiny_folder(case.model), threads=2)
    assert context.info()["kernels"] == name
    assert context.info()["precision"] == "f32"
    assert_close(_native.probe_run(context, case.network, **case.inputs), GOLDEN[case.name], tolerance=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_number_of_threads_changes_no_bit(case: Case, tiny_folder: Callable[..., Path]) -> None:
    answers = {
        _native.probe_run(open_model(tiny_folder(case.model), threads=n), case.network, **case.inputs).tobytes()
        for n in (1, 3, 16)
    }
    assert len(answers) == 1


@pytest.mark.skipif(not kernel_sets.runnable("bf16"), reason="this processor multiplies no bf16")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bf16_is_as_close_as_its_eight_bits(case: Case, tiny_folder: Callable[..., Path]) -> None:
    """bf16 rounds factors by up to 2^-9; over the tiny networks that comes to some 1 %."""
    context = open_model(tiny_folder(case.model), threads=2, precision="bf16")
    assert context.info()["precision"] == "bf16"
    error = relative_rmse(_native.probe_run(context, case.network, **case.inputs), GOLDEN[case.name])
    assert 1e-4 < error <= 2e-2


@pytest.mark.parametrize("kind", quantised.TYPES)
def test_weights_of_any_type_count_with_their_exact_values(
    kind: str, native: Callable[..., _native.Context], tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """Kernels multiply by what a block decodes to; ggml's own operations round activations as well."""
    path, meant = quantised.write(tmp_path / "model.gguf", kind, native(SD1))
    folder = lora_files.write_model(tmp_path / "meant", tiny_folder(SD1), meant)
    case = next(case for case in CASES if case.name == "unet-odd")
    got, want = (
        _native.probe_run(open_model(model, threads=1), case.network, **case.inputs) for model in (path, folder)
    )
    assert_close(got, want, tolerance=1e-5)


def test_contexts_side_by_side_do_not_disturb_each_other(tiny_sd1: Path) -> None:
    options = {"prompt": "a cat", "steps": 3, "width": 64, "height": 64}
    with SDContext(tiny_sd1, threads=2) as alone:
        want = [alone.generate(**options, seed=seed).tobytes() for seed in range(3)]
    got: dict[int, bytes] = {}

    def paint(seed: int) -> None:
        with SDContext(tiny_sd1, threads=2) as sd_ctx:
            got[seed] = sd_ctx.generate(**options, seed=seed).tobytes()

    threads = [threading.Thread(target=paint, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[seed] for seed in range(3)] == want


def test_a_picture_tells_its_precision(sd_ctx: SDContext) -> None:
    painted = sd_ctx.generate("a cat", steps=1, width=64, height=64, seed=1)
    assert painted.parameters.precision == sd_ctx.info.precision == "f32"


def test_an_unknown_precision_lists_them(tiny_sd1: Path) -> None:
    with pytest.raises(BadArgument, match=r"precision 'fp16' is not known; there are: auto, f32, bf16"):
        SDContext(tiny_sd1, precision="fp16")


def test_bf16_where_kernels_have_none(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCPP_KERNELS", "plain")
    with pytest.raises(Unsupported, match=r"'bf16' needs a processor that multiplies bf16"):
        SDContext(tiny_sd1, precision="bf16")


def test_unknown_kernels_list_them(tiny_sd1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDCPP_KERNELS", "avx9000")
    with pytest.raises(BadArgument, match=r"kernels 'avx9000' are not known; there are: reference, .*plain"):
        SDContext(tiny_sd1)


def test_a_profile_counts_what_a_picture_does(sd_ctx: SDContext) -> None:
    with sd_ctx.profiling() as operations:
        sd_ctx.generate("a cat", steps=2, width=64, height=64, seed=1)
        rows = operations()
    denoiser = [row for row in rows if row[0] == "denoise"]
    assert {row[0] for row in rows} >= {"denoise", "vae_decode"}
    conv = [row for row in denoiser if row[1].startswith("convolution 3x3 4 -> 32, 128 rows")]
    assert [row[2] for row in conv] == [2]
    assert conv[0][4] == 2 * 2.0 * 128 * 9 * 4 * 32  # two runs of both halves of guidance
    assert all(row[3] >= 0 for row in rows)


MADE: list[int] = []


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.usefixtures("kernels")
def test_what_kernels_do_not_change_is_made_for_the_first_only(number: int, once: Callable[..., int]) -> None:
    """Under --kernels others or all, where there are several in one process."""
    assert once(lambda: MADE.append(number) or number) == number
    assert len(MADE) == len(set(MADE))
