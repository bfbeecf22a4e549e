"""What SDXL is asked for beside the prompt: the sizes that it is told, zero terminal SNR, and rescaled guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_flux
import tiny_sdxl
from cases import SD1, SDXL
from cases_dit import FLUX
from safetensors.numpy import load_file, save_file
from tiny_sdxl import SDXL_V
from typer.testing import CliRunner

from sdcpp_py import BadArgument, SDContext, Unsupported, _native
from sdcpp_py.cli import app
from sdcpp_py.image import parse_parameters, read_parameters

SMALL: dict[str, Any] = {"width": 32, "height": 48, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def sdxl(tiny_folder: Callable[..., Path]) -> Iterator[SDContext]:
    with SDContext(tiny_folder(SDXL), threads=1) as context:
        yield context


def latent(context: SDContext, **request: Any) -> np.ndarray:
    context.generate("a cat", "a dog", **{**SMALL, **request})
    return _native.probe_latent(context._native)


# ---- sizes ---------------------------------------------------------------------------------------------


def test_sizes_left_out_are_the_pictures_own(sdxl: SDContext) -> None:
    told = {"original_size": (32, 48), "crop_top_left": (0, 0), "target_size": [32, 48]}
    np.testing.assert_array_equal(latent(sdxl, **told), latent(sdxl))
    for name in told:
        np.testing.assert_array_equal(latent(sdxl, **{name: told[name]}), latent(sdxl))
    assert not np.array_equal(latent(sdxl, original_size=(48, 32)), latent(sdxl))  # width, then height


def test_negative_sizes_follow_the_others(sdxl: SDContext) -> None:
    told = {"original_size": (16, 24), "crop_top_left": (8, 4), "target_size": (64, 40)}
    want = latent(sdxl, **told)
    np.testing.assert_array_equal(latent(sdxl, **told, **{f"negative_{name}": told[name] for name in told}), want)
    for name in told:
        changed = latent(sdxl, **told, **{f"negative_{name}": (1, 2)})
        assert not np.array_equal(changed, want), name
        # Without guidance there is no negative prompt, and nothing that it could be told.
        plain = latent(sdxl, cfg_scale=1.0, **told)
        np.testing.assert_array_equal(latent(sdxl, cfg_scale=1.0, **told, **{f"negative_{name}": (1, 2)}), plain)


def test_every_picture_of_a_batch_is_told(sdxl: SDContext) -> None:
    told = {"original_size": (16, 24), "negative_target_size": (8, 8)}
    batch = latent(sdxl, batch_size=2, **told)
    np.testing.assert_array_equal(batch[1], latent(sdxl, seed=8, **told)[0])


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"original_size": (0, 5)}, "original_size 0: must be between 1"),
        ({"original_size": 1024}, "original_size 1024: must be two whole numbers, such as"),
        ({"target_size": "10"}, "target_size '10': must be two whole numbers"),
        ({"target_size": (1, 2, 3)}, "target_size of type tuple: must be two whole numbers"),
        ({"crop_top_left": (-1, 0)}, "crop_top_left -1: must be between 0"),
        ({"crop_top_left": (0.5, 0)}, "crop_top_left 0.5: must be a whole number"),
        (
            {"negative_crop_top_left": (0, 1 << 17)},
            "crop_top_left and target_size: 131072 pixels; there may be 0 to 65536",
        ),
        ({"guidance_rescale": 1.5}, "guidance_rescale 1.5: must be between 0 and 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale nan: must be a finite number"),
    ],
)
def test_what_cannot_be_told_is_a_sentence(sdxl: SDContext, told: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadArgument, match=sentence):
        sdxl.generate("a cat", **SMALL, **told)


@pytest.mark.parametrize("name", ["original_size", "crop_top_left", "target_size", "negative_original_size"])
def test_other_families_are_told_nothing(name: str, tiny_folder: Callable[..., Path]) -> None:
    with SDContext(tiny_folder(SD1), threads=1) as context:
        with pytest.raises(BadArgument, match="SDXL is told them, and this is a model of SD1; leave them out"):
            context.generate("a cat", **SMALL, **{name: (32, 48)})
        context.generate("a cat", **SMALL)


def test_a_picture_on_the_command_line_is_repeated_with_all_that_was_told(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["-m", str(tiny_folder(SDXL_V)), "--threads", "1", "-q"]
    words = ["--width", "32", "--height", "48", "--steps", "2", "--guidance-rescale", "0.5", "--no-zero-snr"]
    words += ["--original-size", "16", "24", "--crop-top-left", "8", "4", "--target-size", "64", "40"]
    result = CliRunner().invoke(app, ["generate", "a cat", "-o", "a.png", *model, *words])
    assert result.exit_code == 0, result.output
    told = parse_parameters(read_parameters("a.png"))
    assert (told.original_size, told.crop_top_left, told.target_size) == ((16, 24), (8, 4), (64, 40))
    assert (told.guidance_rescale, told.zero_snr) == (0.5, False)
    assert CliRunner().invoke(app, ["generate", "--like", "a.png", "-o", "b.png", *model]).exit_code == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()


# ---- zero terminal SNR ---------------------------------------------------------------------------------


def marked(path: Path, **marks: float) -> Path:
    """A single file of the tiny model with empty tensors of these names, as trainers mark v-prediction."""
    single = path.with_name("plain.safetensors")
    if not single.exists():
        tiny_sdxl.write_single(SDXL, single)
        save_file(load_file(single), single)  # without what write_single says of the prediction
    save_file({**load_file(single), **{name: np.zeros(0, np.float32) for name in marks}}, path)
    return path


def test_a_single_file_says_zero_terminal_snr_by_a_tensor(tmp_path: Path) -> None:
    with SDContext(marked(tmp_path / "noob.safetensors", v_pred=1, ztsnr=1), threads=1) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("v", True)
        defaults = context._native.defaults()
        assert (defaults["sampler"], defaults["scheduler"]) == ("euler", "simple")
        image = context.generate("a cat", **SMALL)
        assert image.parameters.zero_snr is None  # as the file says
    with SDContext(marked(tmp_path / "v.safetensors", v_pred=1), threads=1) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("v", False)
        assert context._native.defaults()["scheduler"] == "karras"


def test_arguments_say_what_a_file_does_not(tmp_path: Path) -> None:
    said, silent = marked(tmp_path / "said.safetensors", v_pred=1, ztsnr=1), marked(tmp_path / "silent.safetensors")
    with SDContext(said, threads=1) as context:
        want = latent(context)
    with SDContext(silent, prediction="v", zero_snr=True, threads=1) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("v", True)
        np.testing.assert_array_equal(latent(context), want)
        assert context.generate("a cat", **SMALL).parameters.zero_snr is True
    with SDContext(said, zero_snr=False, threads=1) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("v", False)
        assert not np.array_equal(latent(context, sampler="euler", scheduler="simple"), want)


def test_noise_alone_cannot_be_told_by_eps(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"eps\.safetensors: zero terminal SNR with prediction eps.*prediction 'v'"):
        SDContext(marked(tmp_path / "eps.safetensors", ztsnr=1))
    silent = marked(tmp_path / "silent.safetensors")
    with pytest.raises(BadArgument, match=r"zero terminal SNR with prediction eps.*or zero_snr false"):
        SDContext(silent, zero_snr=True)
    with SDContext(tmp_path / "eps.safetensors", zero_snr=False) as context:
        assert (context.info.prediction, context.info.zero_snr) == ("eps", False)


def test_rectified_flows_have_no_prediction_to_choose(tmp_path: Path) -> None:
    flux = tiny_flux.write_folder(FLUX, tmp_path / "flux")
    for options in ({"prediction": "v"}, {"zero_snr": True}):
        with pytest.raises(BadArgument, match="a model of FLUX is a rectified flow, which has neither"):
            SDContext(flux, **options)
    with SDContext(flux, zero_snr=False, threads=1) as context:
        assert context.info.prediction == "flow"


def test_conversion_keeps_what_a_file_says_of_itself(tmp_path: Path) -> None:
    from sdcpp_py.weights import convert

    source = marked(tmp_path / "noob.safetensors", v_pred=1, ztsnr=1)
    for name in ("out.gguf", "out.safetensors"):
        convert(source, tmp_path / name, type="f16")
        with SDContext(tmp_path / name, threads=1) as context:
            assert (context.info.prediction, context.info.zero_snr) == ("v", True), name


# ---- guidance ------------------------------------------------------------------------------------------


def test_rescaled_guidance(sdxl: SDContext) -> None:
    """0 is none; without guidance there is nothing to rescale; a picture of a batch is that picture alone."""
    np.testing.assert_array_equal(latent(sdxl, guidance_rescale=0), latent(sdxl))
    plain = latent(sdxl, cfg_scale=1.0)
    np.testing.assert_array_equal(latent(sdxl, cfg_scale=1.0, guidance_rescale=0.7), plain)
    batch = latent(sdxl, batch_size=2, guidance_rescale=0.7)
    np.testing.assert_array_equal(batch[1], latent(sdxl, seed=8, guidance_rescale=0.7)[0])
    assert np.std(latent(sdxl, cfg_scale=12.0, guidance_rescale=1.0)) < np.std(latent(sdxl, cfg_scale=12.0))
