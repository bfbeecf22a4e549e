"""What a newcomer, or somebody who means harm, may give: each is a typed error with a sentence, and quickly."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import lora_files
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdcpp_py import (
    BadArgument,
    BadFile,
    Cancelled,
    Io,
    OutOfMemory,
    SDContext,
    SdcppError,
    Unsupported,
    add_rpc_devices,
    files,
    lora,
    weights,
)
from sdcpp_py.calibrate import calibrate
from sdcpp_py.cli_lora import _separate
from sdcpp_py.cli_shared import read_size
from sdcpp_py.cli_weights import _lines
from sdcpp_py.embeddings import EmbeddingLibrary, read_embedding
from sdcpp_py.image import PaintedImage, is_picture, open_picture, pixels, read_parameters
from sdcpp_py.quality import compare
from sdcpp_py.weights.tensor import Tensor

LONG = "x" * 5000


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    """One that nobody writes to."""
    if sys.platform == "win32":
        pytest.skip("Windows has no pipes among its files")
    os.mkfifo(tmp_path / "pipe.png")
    return tmp_path / "pipe.png"


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    """A link to itself."""
    path = tmp_path / "circle.safetensors"
    path.symlink_to(path)
    return path


# ---- paths -----------------------------------------------------------------------------------------------


def test_a_model_behind_a_circle_of_links(circle: Path) -> None:
    with pytest.raises(Io, match="symbolic links"):
        SDContext(circle)
    with pytest.raises(Io, match="symbolic links"):
        SDContext(vae=circle)


@pytest.mark.parametrize("argument", ["model", "vae", "lora_dir", "embedding_dir"])
def test_names_that_no_system_can_have(argument: str) -> None:
    with pytest.raises(Io):
        SDContext(**{argument: LONG})


@pytest.mark.parametrize("tool", ["convert", "merge", "resize", "bake", "extract", "diff"])
def test_paths_of_the_tools(tool: str, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    calls: dict[str, Callable[[object], object]] = {
        "convert": lambda path: lora.convert(path, out, to="kohya"),
        "merge": lambda path: lora.merge([(path, 1.0)], out),
        "resize": lambda path: lora.resize(path, out, rank=1),
        "bake": lambda path: lora.bake(path, ["x"], out),
        "extract": lambda path: lora.extract(path, path, out, rank=1),
        "diff": lambda path: lora.diff(path, path),
    }
    for path in ("", "a\0b", 5, None, b"a", [], {}, 3.5):
        with pytest.raises(BadArgument, match="path"):
            calls[tool](path)
    assert not out.exists()


@pytest.mark.parametrize("value", [5, None, 3.5, [], object()])
def test_a_lora_to_inspect(sd_ctx: SDContext, value: object) -> None:
    with pytest.raises(BadArgument, match="must be a path"):
        sd_ctx.inspect_lora(value)


# ---- pictures --------------------------------------------------------------------------------------------


def test_a_pipe_is_no_picture(pipe: Path) -> None:
    for read in (is_picture, read_parameters, lambda path: open_picture(path, "mask")):
        with pytest.raises(Io, match=r"pipe\.png: is a device or a pipe, and no file"):
            read(pipe)


@pytest.mark.parametrize(
    "source", [np.zeros((0, 0, 3), np.uint8), np.zeros((0, 5), np.uint8), Image.new("RGB", (0, 3)), "", "a\0b"]
)
def test_pictures_of_nothing(source: object) -> None:
    with pytest.raises(BadArgument, match="mask: "):
        open_picture(source, "mask")


@pytest.mark.parametrize(("mode", "wanted"), [("LAB", "L"), ("La", "RGB")])
def test_a_mode_that_pillow_cannot_convert(mode: str, wanted: str) -> None:
    with pytest.raises(BadArgument, match=f"mode {mode} cannot be read"):
        pixels(Image.new(mode, (8, 8)), wanted, (8, 8))


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_greys_of_16_bits_keep_their_shades(kind: type, tmp_path: Path) -> None:
    """Maps of depths are often stored so."""
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp.astype(kind)).save(tmp_path / "depth.tiff")
    got = pixels(open_picture(tmp_path / "depth.tiff", "control_image"), "L", (8, 8))
    assert np.array_equal(got, (ramp / 257).round())


def test_a_name_with_a_nul_for_a_picture() -> None:
    painted = PaintedImage.from_pixels(np.zeros((8, 8, 3), np.uint8), "")
    with pytest.raises(BadArgument, match="is no path"):
        painted.save("\0.png")


# ---- arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_step": 5}, "on_step: must be a function, not int"),
        ({"prompt": None, "prompts": b"a"}, "prompts: must be a list of texts, not bytes"),
    ],
)
def test_arguments_of_generate(sd_ctx: SDContext, options: dict, says: str) -> None:
    with pytest.raises(BadArgument, match=says):
        sd_ctx.generate(**{"prompt": "a", "steps": 1, "width": 32, "height": 32, **options})


@pytest.mark.parametrize("flag", ["requantise", "strict_loras"])
def test_words_are_no_flags(tiny_sd1: Path, flag: str) -> None:
    with pytest.raises(BadArgument, match=f"{flag} 'no': must be True or False"):
        SDContext(tiny_sd1, **{flag: "no"})


def test_one_prompt_is_no_list_of_them(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="prompts: must be a list of texts, not str"):
        compare(tiny_sd1, tiny_sd1, prompts="a cat")
    with pytest.raises(BadArgument, match="prompts: must be a list of texts, not str"):
        calibrate(tiny_sd1, tmp_path / "x.gguf", "a cat")


def test_what_cannot_be_written_is_said_before_the_work(tiny_sd1: Path, tmp_path: Path) -> None:
    painted: list[object] = []
    for target, error in (("none/x.gguf", Io), ("x.safetensors", BadArgument), ("", BadArgument)):
        with pytest.raises(error):
            calibrate(tiny_sd1, tmp_path / target, ["a"], steps=1, on_progress=lambda *told: painted.append(told))
    assert not painted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": "4"}, "rank '4': must be a whole number"),
        ({"rank": 2.5}, "rank 2.5: must be a whole number"),
        ({"energy": "1"}, "energy '1': must be a finite number"),
        ({"energy": float("nan")}, "energy nan"),
        ({"threads": "1"}, "threads '1': must be a whole number"),
        ({"method": "dare", "seed": -1}, "seed -1: must be between 0"),
        ({"method": "ties", "density": "x"}, "density 'x': must be a finite number"),
    ],
)
def test_options_of_the_tools(options: dict, says: str, update: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=says):
        lora.merge([update], tmp_path / "y.safetensors", **options)
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("loras", ["x.safetensors", Path("x.safetensors"), 5, None, [], [5], [("x",)], [("x", "1")]])
def test_loras_of_the_tools(loras: object, tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match=r"loras: |ratio"):
        lora.merge(loras, tmp_path / "y.safetensors")
    with pytest.raises(BadArgument, match=r"loras: |ratio"):
        lora.bake(tiny_sd1, loras, tmp_path / "y.safetensors")


def test_a_ratio_that_no_file_can_hold(update: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument, match="no finite number; is a ratio too large"):
        lora.scale(update, tmp_path / "y.safetensors", 3e38)
    assert not (tmp_path / "y.safetensors").exists()


def test_an_ending_that_says_something_else(update: Path, tmp_path: Path) -> None:
    for name in ("y.gguf", "y"):
        with pytest.raises(BadArgument, match=r"written as \.safetensors"):
            lora.merge([update], tmp_path / name)


def test_a_path_alone_is_a_lora_at_1(update: Path, tmp_path: Path) -> None:
    lora.merge([update], tmp_path / "a.safetensors")
    lora.merge([(update, 1.0)], tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.fixture
def update(tmp_path: Path) -> Path:
    change = lora_files.random_update(lora_files.attention())
    return lora_files.save(tmp_path / "update.safetensors", lora_files.tensors_of(change))


@pytest.mark.parametrize("tag", [f"<lora:{LONG}>", f"<lora:x:{'9' * 5000}>", f"<lora:x:start={'9' * 5000}>"])
def test_sentences_stay_short(sd_ctx: SDContext, tag: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(SdcppError) as refused:
        sd_ctx.generate(tag, steps=1, width=32, height=32)
    assert len(str(refused.value)) < 400
    sd_ctx.generate("a", negative_prompt=f"<lora:{LONG}>", steps=1, width=32, height=32)
    assert max(len(message) for message in caplog.messages) < 400


# ---- files -----------------------------------------------------------------------------------------------


def test_a_tensor_without_elements_has_no_rows() -> None:
    """However many its shape states, nothing goes through them one by one."""
    tensor = Tensor("x", (1 << 40, 0), "f32", lambda first, last: b"")
    assert (tensor.rows, tensor.bytes, tensor.elements) == (0, 0, 0)


@pytest.mark.skipif(not os.path.exists("/dev/zero"), reason="there is no file without end here")
def test_a_file_of_prompts_without_end() -> None:
    with pytest.raises(BadFile, match="is it a list of prompts"):
        _lines(Path("/dev/zero"))


def test_a_scale_that_32_bits_do_not_hold(sd_ctx: SDContext, update: Path) -> None:
    tensors = dict(load_file(update))
    for key in [key for key in tensors if key.endswith(".alpha")]:
        stem = key.removesuffix(".alpha")
        tensors |= {f"{stem}.scale": np.float32([3e38]), f"{stem}.scalar": np.float32([3e38])}
    save_file(tensors, update)
    with pytest.raises(BadFile, match=r"its scale is 9e\+76, which is more than 32 bits hold"):
        sd_ctx.inspect_lora(update)


def test_factors_of_nothing_whose_sizes_are_beyond_64_bits(sd_ctx: SDContext, tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    empty = {"dtype": "F32", "shape": [1 << 40, 0], "data_offsets": [0, 0]}
    header = json.dumps({f"{stem}.lokr_w1": empty, f"{stem}.lokr_w2": empty}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(BadFile, match="lokr_w1 is empty"):
        sd_ctx.inspect_lora(path)
    with pytest.raises(SdcppError):
        lora.convert(path, tmp_path / "y.safetensors", to="kohya")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(files, "_cache_file", lambda: tmp_path / "hashes.json")
    return tmp_path / "hashes.json"


def test_hashes_are_read_once_and_forget_what_is_gone(cache: Path, tmp_path: Path, monkeypatch) -> None:
    one, two = tmp_path / "one.bin", tmp_path / "two.bin"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    first = files.model_hash(one)
    read = []
    monkeypatch.setattr(files.json, "loads", lambda text, loads=files.json.loads: read.append(text) or loads(text))
    assert [files.model_hash(one) for _ in range(3)] == [first] * 3
    assert len(read) <= 1
    one.unlink()
    files.model_hash(two)
    assert str(one) not in cache.read_text(encoding="utf-8")
    one.write_bytes(b"3")
    assert files.model_hash(one) != first


CUT_WHILE_READ = """
import sys, threading, time
from pathlib import Path
from sdcpp_py import Io, SDContext, SdcppError

path, whole = Path(sys.argv[2]), Path(sys.argv[2]).read_bytes()
until, read, refused = time.monotonic() + 2, 0, 0

def cut():
    while time.monotonic() < until:
        path.write_bytes(whole)
        time.sleep(0.005)
        with path.open("r+b") as file:
            file.truncate(1)

with SDContext(sys.argv[1], threads=1) as sd_ctx:
    threading.Thread(target=cut, daemon=True).start()
    while time.monotonic() < until:
        try:
            sd_ctx.apply_loras([path])
            read += 1
        except SdcppError:
            refused += 1
print(read, refused)
"""


def test_a_lora_that_is_cut_while_it_is_read(tiny_sd1: Path, tmp_path: Path) -> None:
    """A mapped file that loses its end would end the process with SIGBUS."""
    rank = 4096  # 12 MB, which are read for long enough
    tensors = lora_files.tensors_of(lora_files.random_update(lora_files.attention()))
    tall = {key: np.ones((rank, v.shape[1]), np.float32) for key, v in tensors.items() if key.endswith("down.weight")}
    wide = {key: np.ones((v.shape[0], rank), np.float32) for key, v in tensors.items() if key.endswith("up.weight")}
    path = lora_files.save(tmp_path / "x.safetensors", {**tall, **wide})
    child = [sys.executable, "-c", CUT_WHILE_READ, str(tiny_sd1), str(path)]
    done = subprocess.run(child, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) > 0, "nothing was cut"


# ---- more than a picture can hold --------------------------------------------------------------------------


def test_a_prompt_without_end(sd_ctx: SDContext) -> None:
    with pytest.raises(BadArgument, match="fills 5000 chunks of tokens, where 256 are the most"):
        sd_ctx.generate("BREAK " * 5000, steps=1, width=32, height=32)


def test_a_picture_that_would_be_black(sd_ctx: SDContext) -> None:
    with pytest.raises(BadArgument, match=r"is no number after 3 steps.*cfg_scale 3e\+38"):
        sd_ctx.generate("a", steps=3, width=32, height=32, cfg_scale=3e38)
    sd_ctx.generate("a", steps=1, width=32, height=32)


# ---- values that no argument takes -------------------------------------------------------------------------


class Pathless(os.PathLike):
    """What has no path to give."""

    def __fspath__(self) -> int:
        return 5


ODD = (10**5000, float("nan"), np.array([1, 2]), np.array(0.5), Decimal("sNaN"), "a\0", "\ud800", [None], Pathless())
ODD_IDS = ("digits", "nan", "array", "scalar", "signalling", "nul", "surrogate", "list", "pathless")


def arguments(function: Callable[..., object], *but: str) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", *but)]


def refused(call: Callable[[], object]) -> None:
    """Whether it is done or refused, it is in our words."""
    with contextlib.suppress(BadArgument, BadFile, Io, Unsupported, OutOfMemory):
        call()


@pytest.mark.parametrize("value", ODD, ids=ODD_IDS)
def test_any_argument_of_a_context(sd_ctx: SDContext, tiny_sd1: Path, update: Path, value: object) -> None:
    run = {"prompt": "a", "steps": 1, "width": 32, "height": 32}
    for name in arguments(SDContext.generate):
        refused(lambda name=name: sd_ctx.generate(**{**run, name: value}))
    for name in arguments(SDContext.estimate_memory):
        refused(lambda name=name: sd_ctx.estimate_memory(**{"width": 32, "height": 32, name: value}))
    for name in arguments(SDContext.__init__, "model"):
        refused(lambda name=name: SDContext(tiny_sd1, **{"threads": 1, name: value}).close())
    for call in (SDContext, sd_ctx.count_tokens, sd_ctx.inspect_lora, sd_ctx.apply_loras, add_rpc_devices):
        refused(lambda call=call: call(value))
    for key in ("te", "te2", "unet", "start", "lbw"):
        refused(lambda key=key: sd_ctx.apply_loras({update: {key: value}}))
    refused(lambda: sd_ctx.generate(**{**run, "prompt": None}, prompts=["a", "b"], batch_size=value))
    refused(lambda: sd_ctx.generate(**run, on_step=lambda step, steps, preview: preview(value)))


@pytest.mark.parametrize("value", ODD[2::3], ids=ODD_IDS[2::3])
def test_any_argument_of_the_tools(tiny_sd1: Path, update: Path, tmp_path: Path, value: object) -> None:
    out, gguf = tmp_path / "y.safetensors", tmp_path / "y.gguf"
    tools: dict[Callable[..., object], dict[str, object]] = {
        lora.merge: {"loras": [update], "output": out, "family": "sd1"},
        lora.scale: {"path": update, "output": out, "ratio": 1},
        lora.prune: {"path": update, "output": out, "keep": ["*"]},
        lora.extract: {"tuned": tiny_sd1, "base": tiny_sd1, "output": out, "rank": 1},
        lora.bake: {"model": tiny_sd1, "loras": [update], "output": gguf, "dry_run": True},
        lora.diff: {"a": update, "b": update},
        weights.convert: {"source": tiny_sd1, "target": gguf, "dry_run": True},
        weights.describe: {"path": tiny_sd1},
        weights.element_type: {"name": "f16"},
        compare: {"source": tiny_sd1, "converted": tiny_sd1, "prompts": ["a"]},
        calibrate: {"model": tiny_sd1, "target": gguf, "prompts": ["a"]},
    }
    for tool, given in tools.items():
        for name in arguments(tool, "options", "on_step", "on_progress"):
            refused(lambda tool=tool, given=given, name=name: tool(**{**given, name: value}))
    for call in (lora.LoraLibrary, EmbeddingLibrary, weights.open_source, read_embedding, read_parameters):
        refused(lambda call=call: call(value))
    refused(lambda: PaintedImage.from_pixels(value, ""))


@pytest.mark.parametrize("callback", ["on_step", "on_progress"])
def test_what_cannot_be_called(tiny_sd1: Path, update: Path, tmp_path: Path, callback: str) -> None:
    out = tmp_path / "y.gguf"
    calls: dict[str, list[Callable[[], object]]] = {
        "on_step": [
            lambda: lora.merge([update], out.with_suffix(".safetensors"), on_step=5),
            lambda: lora.extract(tiny_sd1, tiny_sd1, out.with_suffix(".safetensors"), rank=1, on_step=5),
            lambda: lora.diff(update, update, on_step=5),
        ],
        "on_progress": [
            lambda: weights.convert(tiny_sd1, out, on_progress=5),
            lambda: lora.bake(tiny_sd1, [update], out, on_progress=5),
            lambda: compare(tiny_sd1, tiny_sd1, on_progress=5),
            lambda: calibrate(tiny_sd1, out, ["a"], on_progress=5),
        ],
    }
    for call in calls[callback]:
        with pytest.raises(BadArgument, match=f"{callback}: must be a function, not int"):
            call()


@pytest.mark.parametrize("answer", [False, np.False_, 0])
def test_every_false_answer_stops(update: Path, tmp_path: Path, answer: object) -> None:
    with pytest.raises(Cancelled, match="stopped"):
        lora.convert(update, tmp_path / "y.safetensors", to="kohya", on_step=lambda done, of, name: answer)
    assert not (tmp_path / "y.safetensors").exists()


def test_more_than_two_gigabytes(tiny_sd1: Path) -> None:
    with SDContext(tiny_sd1, threads=1, memory_limit=8 << 30, lora_cache=4 << 30) as context:
        assert context.estimate_memory(width=32, height=32).peak > 0


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * 10**9), ("2.5M", 2_500_000), ("9007199254740993", (1 << 53) + 1)]
)
def test_sizes(text: str, size: int) -> None:
    assert read_size("split", text) == size


def test_a_size_without_end() -> None:
    with pytest.raises(BadArgument, match="split of more than 60 digits: must be between"):
        read_size("split", "9" * 400)


def test_loras_in_one_argument_that_are_no_path() -> None:
    assert _separate(f"{LONG} {LONG}") == [LONG, LONG]
