"""Pictures and the parameters they carry."""

import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from sdcpp_py import BadArgument, BadFile, Io, PaintedImage, Parameters, _native
from sdcpp_py.image import (
    RNGS,
    SAMPLERS,
    SCHEDULERS,
    format_parameters,
    is_picture,
    open_picture,
    parse_parameters,
    pixels,
    read_parameters,
)

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)

OURS = Parameters(
    prompt="a (red:1.3) heart",
    negative_prompt="blurry, dark",
    steps=20,
    sampler="euler_a",
    scheduler="karras",
    cfg_scale=7.0,
    seed=7,
    width=512,
    height=768,
    model_hash="6ce0161689",
    model="v1-5",
    clip_skip=1,
    rng="cpu",
    version="sdcpp_py 0.1.0",
)

# As stable-diffusion-webui 1.10 writes it.
WEBUI = """masterpiece, (best quality:1.2)
castle on a hill
Negative prompt: lowres, bad anatomy,
worst quality
Steps: 28, Sampler: DPM++ 2M SDE, Schedule type: Karras, CFG scale: 5.5, Seed: 2345678901, Size: 512x768, \
Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: "vae, ft: mse.safetensors", \
Denoising strength: 0.4, Clip skip: 2, Hires upscale: 2, TI hashes: "pencil: 0123456789ab, ink: ba987", \
Version: v1.10.1"""


def test_what_a_picture_says():
    assert format_parameters(OURS) == (
        "a (red:1.3) heart\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 7, Size: 512x768, "
        "Model hash: 6ce0161689, Model: v1-5, Clip skip: 1, RNG: CPU, Version: sdcpp_py 0.1.0"
    )
    assert parse_parameters(format_parameters(OURS)) == OURS


def test_what_webui_says():
    read = parse_parameters(WEBUI)
    assert read.prompt == "masterpiece, (best quality:1.2)\ncastle on a hill"
    assert read.negative_prompt == "lowres, bad anatomy,\nworst quality"
    assert (read.steps, read.sampler, read.scheduler, read.cfg_scale) == (28, "dpm++2m_sde", "karras", 5.5)
    assert (read.seed, read.width, read.height) == (2345678901, 512, 768)
    assert (read.model, read.model_hash) == ("v1-5-pruned-emaonly", "6ce0161689")
    assert (read.vae, read.strength, read.clip_skip, read.rng) == ("vae, ft: mse.safetensors", 0.4, 2, None)
    assert read.other["TI hashes"] == "pencil: 0123456789ab, ink: ba987"
    assert read.other["Hires upscale"] == "2"


@pytest.mark.parametrize(
    ("line", "sampler", "scheduler"),
    [
        ("Sampler: DPM++ 2M Karras", "dpm++2m", "karras"),
        ("Sampler: Euler a", "euler_a", None),
        ("Sampler: Euler a, Schedule type: Automatic", "euler_a", None),
        ("Sampler: Euler, Schedule type: Uniform", "euler", "normal"),
        ("Sampler: DDIM, Schedule type: DDIM", "ddim", "ddim_uniform"),
        ("Sampler: DPM fast", "DPM fast", None),
        ("Sampler: dpm++ 2s a", "dpm++2s_a", None),
    ],
)
def test_samplers_by_webuis_names(line, sampler, scheduler):
    read = parse_parameters(f"x\nSteps: 20, {line}, Seed: 1")
    assert (read.sampler, read.scheduler) == (sampler, scheduler)


def test_every_name_of_the_engine_has_webuis_spelling():
    assert set(_native.samplers()) <= set(SAMPLERS)
    assert set(_native.schedulers()) <= set(SCHEDULERS)
    assert set(_native.rngs()) <= set(RNGS)
    assert len({name.casefold() for name in SAMPLERS.values()}) == len(SAMPLERS)


@pytest.mark.parametrize(
    "text", ["", "\n", "a", "a: b", "Steps: 20, Seed: 7", ",,,", 'a: "', '"', "Steps:,Seed:,Size:,"]
)
def test_any_text_can_be_read(text):
    read = parse_parameters(text)
    assert read.seed is None


def test_numbers_that_are_none_are_left_out():
    read = parse_parameters("x\nSteps: many, CFG scale: nan, Eta: inf, Seed: 1.5, Size: big, Clip skip: " + "9" * 5000)
    assert read == Parameters(prompt="x")


@pytest.mark.parametrize(
    "prompt",
    [
        "a\nNegative prompt: b",
        "Negative prompt:",
        "a\n",
        "\na",
        "a\nSteps: 1, Seed: 2, Size: 8x8",
        "é 猫 \u2028",
    ],
)
def test_prompts_that_look_like_the_form_survive(prompt):
    parameters = Parameters(prompt=prompt, negative_prompt=prompt, steps=1, seed=2)
    assert parse_parameters(format_parameters(parameters)) == parameters


# ---- files ---------------------------------------------------------------------------------------------


@pytest.fixture
def picture() -> PaintedImage:
    return PaintedImage.from_pixels(RGB, "a heart\nSteps: 1, Sampler: Euler, Seed: 7")


def test_a_saved_picture_tells_how_it_was_made(picture, tmp_path):
    path = tmp_path / "heart.png"
    picture.save(path)
    assert read_parameters(path) == picture.info["parameters"]
    assert np.array_equal(Image.open(path), RGB)
    assert picture.parameters.seed == 7
    assert os.listdir(tmp_path) == ["heart.png"]


@pytest.mark.parametrize("kind", [str, os.fsencode, Path])
def test_paths_of_any_kind(picture, tmp_path, kind):
    path = tmp_path / "héart.PNG"
    picture.save(kind(path))
    assert "a heart" in read_parameters(path)


def test_other_targets(picture, tmp_path):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    assert Image.open(stream).info["parameters"] == picture.info["parameters"]
    picture.save(tmp_path / "heart.jpg", quality=90)
    assert Image.open(tmp_path / "heart.jpg").format == "JPEG"
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("mine", "only")
    picture.save(tmp_path / "own.png", pnginfo=chunks)
    assert "parameters" not in Image.open(tmp_path / "own.png").info


def test_text_of_any_script_is_kept(tmp_path):
    text = "猫 é 🚀\nNegative prompt: ß\nSteps: 1, Sampler: Euler, Seed: 7"
    PaintedImage.from_pixels(RGB, text).save(tmp_path / "a.png")
    assert read_parameters(tmp_path / "a.png") == text


def test_a_picture_is_an_ordinary_pillow_picture(picture):
    assert picture.resize((3, 2)).size == (3, 2)
    assert np.array_equal(picture, RGB)
    assert picture.copy().info["parameters"] == picture.info["parameters"]


@pytest.mark.parametrize("name", ["heart", "heart.foo", "heart.txt", ".png/"])
def test_an_ending_that_is_no_picture(picture, tmp_path, name):
    with pytest.raises((BadArgument, Io), match=r"heart|png"):
        picture.save(tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(picture, tmp_path):
    with pytest.raises(Io, match=r"heart\.png: No such file or directory"):
        picture.save(tmp_path / "no" / "heart.png")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_no_space_on_the_disk(picture):
    with pytest.raises(Io, match="No space left"):
        picture.save("/dev/full", "PNG")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode), "a device is written to, not replaced"


def test_nothing_half_written_stays(picture, tmp_path, monkeypatch):
    path = tmp_path / "heart.png"
    path.write_bytes(b"before")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(Io, match="No space left"):
        picture.save(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["heart.png"]


@pytest.mark.parametrize("cut", [0, 4, 20, 60, 100])
def test_a_damaged_picture_is_an_error(picture, tmp_path, cut):
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    path = tmp_path / "cut.png"
    path.write_bytes(whole.getvalue()[:cut])
    with pytest.raises(BadFile, match=r"cut\.png"):
        read_parameters(path)


def test_pictures_without_parameters(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "plain.png")
    with pytest.raises(BadFile, match="carries no parameters"):
        read_parameters(tmp_path / "plain.png")
    with pytest.raises(Io, match="No such file"):
        read_parameters(tmp_path / "none.png")


def test_what_begins_as_pictures_do(picture, tmp_path):
    picture.save(tmp_path / "a.png")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert is_picture(tmp_path / "a.png")
    assert not is_picture(tmp_path / "a.gguf")
    assert not is_picture(tmp_path)
    with pytest.raises(Io):
        is_picture(tmp_path / "none")


# ---- pictures to start from ----------------------------------------------------------------------------


def test_pictures_are_taken_in_any_form(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(RGB), RGB):
        assert np.array_equal(pixels(open_picture(source, "init_image"), "RGB", (6, 4)), RGB)


def test_pictures_are_scaled_and_transparency_is_white():
    assert pixels(open_picture(RGB, "x"), "RGB", (12, 8)).shape == (8, 12, 3)
    assert pixels(open_picture(RGB, "x"), "L", (3, 2)).shape == (2, 3)
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    assert (pixels(clear, "RGB", (2, 2)) == 255).all()


def test_a_picture_that_breaks_while_it_is_read():
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(whole, "PNG")
    with pytest.raises(BadFile, match="init_image: is damaged"):
        open_picture(Image.open(io.BytesIO(whole.getvalue()[:3000])), "init_image")


@pytest.mark.parametrize(
    "source", [3, None, b"bytes", RGB.astype(np.float32), RGB[None], np.zeros((2, 2, 5), np.uint8)]
)
def test_what_is_no_picture(source):
    with pytest.raises(BadArgument, match="init_image: "):
        open_picture(source, "init_image")
