"""What SDContext takes, refuses and gives back; on the tiny model, where a picture takes milliseconds."""

import logging
import threading

import numpy as np
import pytest
from cases import SD1
from PIL import Image

from sdcpp_py import (
    BadArgument,
    BadFile,
    Busy,
    Cancelled,
    Io,
    OutOfMemory,
    PaintedImage,
    SDContext,
    SdcppError,
    Unsupported,
    samplers,
    schedulers,
)

SMALL = {"width": 32, "height": 32, "steps": 2, "seed": 7}


@pytest.fixture(scope="module")
def sd_ctx(tiny_sd1) -> SDContext:
    """One thread: nothing here is big, and threads that wait for each other are slow on a busy machine."""
    with SDContext(tiny_sd1, threads=1) as context:
        yield context


@pytest.fixture(scope="module")
def heart(sd_ctx) -> np.ndarray:
    return np.array(sd_ctx.generate("a heart", **SMALL))


def test_a_picture_tells_what_was_used(sd_ctx):
    image = sd_ctx.generate("a (red) heart", "blue", **SMALL, sampler="euler", scheduler="karras", cfg_scale=5)
    assert isinstance(image, PaintedImage)
    assert image.size == (32, 32)
    told = image.parameters
    assert (told.prompt, told.negative_prompt) == ("a (red) heart", "blue")
    assert (told.steps, told.sampler, told.scheduler, told.cfg_scale, told.seed) == (
        2,
        "euler",
        "karras",
        5,
        7,
    )
    assert (told.width, told.height, told.rng, told.model) == (32, 32, "cpu", "tiny-sd1")
    assert len(told.model_hash) == 10


def test_the_same_again_is_the_same(sd_ctx, heart):
    assert np.array_equal(sd_ctx.generate("a heart", **SMALL), heart)
    assert not np.array_equal(sd_ctx.generate("a heart", **{**SMALL, "seed": 8}), heart)


def test_a_batch_is_a_list_of_the_pictures_of_its_seeds(sd_ctx, heart):
    images = sd_ctx.generate("a heart", **SMALL, batch_size=2)
    assert [image.parameters.seed for image in images] == [7, 8]
    assert np.array_equal(images[0], heart)


def test_defaults_are_the_models(tiny_folder):
    with SDContext(tiny_folder(SD1), threads=1) as sd_ctx:
        image = sd_ctx.generate("a heart", steps=1)
        assert image.size == (sd_ctx.info.native_size, sd_ctx.info.native_size)
        assert image.parameters.sampler in samplers()
        assert image.parameters.scheduler in schedulers()


@pytest.mark.parametrize("seed", [None, -1])
def test_a_seed_that_is_not_given_is_a_new_one(sd_ctx, seed):
    seeds = {sd_ctx.generate("a", **{**SMALL, "steps": 1, "seed": seed}).parameters.seed for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize("kind", [np.int64, np.uint8, int])
def test_numbers_of_any_kind(sd_ctx, heart, kind):
    arguments = {name: kind(value) for name, value in SMALL.items()}
    assert np.array_equal(sd_ctx.generate("a heart", **arguments, cfg_scale=np.float32(7)), heart)


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("width", 0, "width 0: "),
        ("width", -8, "width -8: "),
        ("width", 30, "size 30 x 32: both must be multiples of 8; the nearest is"),
        ("width", 1 << 20, "size 1048576 x 32"),
        ("height", 1 << 40, "height 1099511627776: "),
        ("height", 32.0, "height 32.0: must be a whole number"),
        ("height", "32", "height '32': must be a whole number"),
        ("height", True, "height True: must be a whole number"),
        ("steps", 0, "steps 0: "),
        ("steps", 10**9, "steps 1000000000: "),
        pytest.param("steps", 10**5000, "steps of more than 60 digits: ", id="huge"),
        ("cfg_scale", float("nan"), "cfg_scale nan: must be a finite number"),
        ("cfg_scale", float("inf"), "cfg_scale inf: "),
        ("cfg_scale", 1e300, "cfg_scale 1e[+]300: "),
        ("cfg_scale", "7", "cfg_scale '7': "),
        ("seed", -2, "seed -2: "),
        ("seed", 1 << 64, "seed 18446744073709551616: "),
        ("seed", 1.5, "seed 1.5: "),
        ("batch_size", 0, "batch_size 0: "),
        ("batch_size", 5000, "batch_size 5000: "),
        ("strength", 1.5, "strength 1.5: must be between 0 and 1"),
        ("strength", -0.1, "strength -0.1: must be between 0 and 1"),
        ("eta", -1, "eta -1: "),
        ("eta", float("nan"), "eta nan: "),
        ("clip_skip", 0, "clip_skip 0: "),
        ("clip_skip", 99, "clip_skip 99: "),
        ("vae_tile", 3, "vae_tile 3: "),
        ("sampler", "eulr", "sampler 'eulr' is not known; did you mean 'euler'. there are: .*euler_a"),
        ("sampler", 3, "sampler 3 is not known; there are: "),
        ("scheduler", "KARRAS", "scheduler 'KARRAS' is not known; did you mean 'karras'"),
        ("rng", "gpu", "rng 'gpu' is not known; .*there are: cpu, cuda"),
        ("prompt", 3, "prompt: must be text, not int"),
        ("prompt", "a\0b", "prompt: has a NUL character at 1"),
        ("negative_prompt", None, "negative_prompt: must be text"),
        ("prompt", "(a:nan)", "prompt: the weight"),
        ("init_image", 3, "init_image: must be a path"),
        ("mask", np.zeros((32, 32), np.uint8), "mask: "),
    ],
)
def test_what_the_caller_can_mend_is_a_sentence(sd_ctx, argument, value, sentence):
    with pytest.raises(BadArgument, match=f"^{sentence}"):
        sd_ctx.generate(**{"prompt": "a heart", **SMALL, argument: value})


def test_the_context_stays_usable_after_an_error(sd_ctx, heart):
    with pytest.raises(BadArgument):
        sd_ctx.generate("a heart", **{**SMALL, "width": 30})
    with pytest.raises((OutOfMemory, BadArgument)):
        sd_ctx.generate("a heart", width=16384, height=16384, batch_size=1024)
    assert np.array_equal(sd_ctx.generate("a heart", **SMALL), heart)


def test_a_seed_leaves_room_for_the_batch(sd_ctx):
    last = (1 << 64) - 1
    assert sd_ctx.generate("a", **{**SMALL, "seed": last}).parameters.seed == last
    with pytest.raises(BadArgument, match="leaves no seeds for 2 pictures"):
        sd_ctx.generate("a", **{**SMALL, "seed": last}, batch_size=2)


@pytest.mark.parametrize(
    "prompt", ["", " ", "(", ")", "<", "[", "\\", "BREAK", "((a)", "a BREAK", "\udcff", "🫠" * 100, "\ufffe"]
)
def test_odd_prompts_are_painted(sd_ctx, prompt):
    assert sd_ctx.generate(prompt, prompt, **SMALL).size == (32, 32)


def test_a_lora_is_never_ignored(sd_ctx, caplog):
    with pytest.raises(SdcppError, match=r"LoRA.*pencil"):
        sd_ctx.generate("a heart <lora:pencil:0.8>", **SMALL)
    with caplog.at_level(logging.WARNING, "sdcpp_py"):
        sd_ctx.generate("a heart", "ugly <lora:pencil>", **SMALL)
    assert "'pencil' is left out" in caplog.text


# ---- pictures to start from ----------------------------------------------------------------------------


def test_a_picture_to_start_from_gives_the_size(sd_ctx, tmp_path):
    start = Image.new("RGB", (41, 70), "red")
    start.save(tmp_path / "start.png")
    image = sd_ctx.generate("a heart", init_image=tmp_path / "start.png", strength=0.5, steps=2, seed=1)
    assert image.size == (40, 72)
    assert image.parameters.strength == 0.5
    assert len(image.parameters.init_image_hash) == 10
    again = sd_ctx.generate("a heart", init_image=np.array(start), strength=0.5, steps=2, seed=1)
    assert np.array_equal(image, again)


def test_a_mask_keeps_what_is_black(sd_ctx):
    start = np.full((64, 64, 3), 200, np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    image = sd_ctx.generate("a heart", init_image=start, mask=Image.fromarray(mask), strength=1, steps=2, seed=1)
    other = sd_ctx.generate("a heart", init_image=start, mask=mask + 255, strength=1, steps=2, seed=1)
    assert not np.array_equal(image, other)
    assert image.parameters.mask_hash != other.parameters.mask_hash


# ---- the life of a call --------------------------------------------------------------------------------


def test_steps_are_told_with_a_preview_on_demand(sd_ctx, heart):
    seen = []

    def on_step(step, steps, preview):
        picture = preview()
        seen.append((step, steps, picture.shape, picture.dtype, preview(image=0).tobytes() == picture.tobytes()))

    image = sd_ctx.generate("a heart", **SMALL, on_step=on_step)
    assert seen == [(step, 2, (4, 4, 3), np.uint8, True) for step in (1, 2)]
    assert np.array_equal(image, heart)


def test_a_preview_lives_as_long_as_its_step(sd_ctx):
    kept = []
    sd_ctx.generate("a heart", **SMALL, on_step=lambda step, steps, preview: kept.append(preview))
    for preview in kept:
        with pytest.raises(BadArgument, match="only while on_step runs"):
            preview()


def test_a_preview_of_a_picture_that_is_not_there(sd_ctx):
    def on_step(step, steps, preview):
        preview(image=1)

    with pytest.raises(BadArgument, match="there is no image 1"):
        sd_ctx.generate("a heart", **SMALL, on_step=on_step)


@pytest.mark.parametrize("answer", [False, np.False_, 0])
def test_on_step_may_cancel(sd_ctx, heart, answer):
    steps_seen = []

    def on_step(step, steps, preview):
        steps_seen.append(step)
        return answer

    with pytest.raises(Cancelled, match="step 1 of 2"):
        sd_ctx.generate("a heart", **SMALL, on_step=on_step)
    assert steps_seen == [1]
    assert np.array_equal(sd_ctx.generate("a heart", **SMALL), heart)


def test_what_on_step_raises_comes_out(sd_ctx, heart):
    def on_step(step, steps, preview):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        sd_ctx.generate("a heart", **SMALL, on_step=on_step)
    assert np.array_equal(sd_ctx.generate("a heart", **SMALL), heart)


def test_painting_inside_on_step_is_busy(sd_ctx):
    def on_step(step, steps, preview):
        sd_ctx.generate("another", **SMALL)

    with pytest.raises(Busy):
        sd_ctx.generate("a heart", **SMALL, on_step=on_step)


def test_a_second_thread_waits(sd_ctx, heart):
    images: dict[int, np.ndarray] = {}

    def paint(k: int) -> None:
        images[k] = np.array(sd_ctx.generate("a heart", **SMALL))

    threads = [threading.Thread(target=paint, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(images[k], heart) for k in range(4))


def test_other_threads_run_while_it_paints(sd_ctx):
    """The GIL is released: another thread counts on during a picture of some tenths of a second."""
    counted = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal counted
        while not stop.wait(0.001):
            counted += 1

    thread = threading.Thread(target=count)
    thread.start()
    sd_ctx.generate("a heart", **SMALL | {"steps": 100})
    stop.set()
    thread.join()
    assert counted > 0


def test_several_contexts_run_side_by_side(tiny_sd1, sd_ctx, heart):
    with SDContext(tiny_sd1, threads=1) as other:
        assert np.array_equal(other.generate("a heart", **SMALL), heart)
        assert np.array_equal(sd_ctx.generate("a heart", **SMALL), heart)


def test_a_closed_context_says_so(tiny_sd1):
    context = SDContext(tiny_sd1)
    assert "closed" not in repr(context)
    context.close()
    context.close()
    assert "closed" in repr(context)
    for use in (
        lambda: context.generate("a"),
        lambda: context.info,
        context.fingerprint,
        lambda: context.count_tokens("a"),
    ):
        with pytest.raises(BadArgument, match="closed"):
            use()


def test_closing_inside_on_step_is_survived(tiny_sd1):
    context = SDContext(tiny_sd1)
    image = context.generate("a heart", **SMALL, on_step=lambda *_: context.close())
    assert image.size == (32, 32)


def test_logs_go_to_pythons_logging(tiny_sd1, caplog):
    with caplog.at_level(logging.DEBUG, "sdcpp_py"), SDContext(tiny_sd1):
        pass
    assert any(record.name == "sdcpp_py" and "sd1" in record.message for record in caplog.records)


def test_what_a_context_tells(sd_ctx):
    assert sd_ctx.info.family == "sd1"
    assert sd_ctx.info.latent_cell == 8
    assert len(sd_ctx.fingerprint()) == 64
    assert sd_ctx.count_tokens("a red heart") == 3


# ---- opening -------------------------------------------------------------------------------------------


def test_files_that_are_no_model(tmp_path):
    cases: dict[str, bytes] = {
        "empty.gguf": b"",
        "text.safetensors": b"hello world, no model",
        "zip.ckpt": b"PK\x03\x04" * 9,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises((BadFile, Unsupported), match=name):
            SDContext(tmp_path / name)
    with pytest.raises(SdcppError, match=tmp_path.name):
        SDContext(tmp_path)
    with pytest.raises(Io, match=r"none\.gguf: "):
        SDContext(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("argument", "value", "sentence"),
    [
        ("model", 3, "model: must be a path, not int"),
        ("model", "", "model: '' is no path"),
        ("model", "a\0b", "model: "),
        ("vae", b"x", "vae: must be a path, not bytes"),
        ("threads", 0, "threads 0: "),
        ("threads", "2", "threads '2': "),
        ("backend", "TPU9", ".*TPU9.*CPU"),
        ("backend", 3, "backend: must be text"),
        ("prediction", "x0", ".*x0.*eps"),
    ],
)
def test_what_cannot_be_opened_is_a_sentence(tiny_sd1, argument, value, sentence):
    with pytest.raises((BadArgument, Unsupported), match=f"^{sentence}"):
        SDContext(**{"model": tiny_sd1, argument: value})
