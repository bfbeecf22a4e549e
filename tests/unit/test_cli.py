"""The command line, in a process of its own where it matters."""

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdcpp_py import __version__, files, samplers
from sdcpp_py.cli import app
from sdcpp_py.image import parse_parameters, read_parameters

SMALL = ["--width", "32", "--height", "32", "--steps", "2", "--seed", "7", "--threads", "1"]


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """An empty folder to work in, and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))


@pytest.fixture
def sdcpp(tiny_sd1):
    """Runs a command; generate gets the tiny model where none is named."""

    def run(*arguments: object):
        words = [str(argument) for argument in arguments]
        if words[0] == "generate" and not {"-m", "--model", "--like"} & set(words):
            words += ["-m", str(tiny_sd1)]
        return CliRunner().invoke(app, words)

    return run


def pngs() -> list[str]:
    return sorted(path.name for path in Path().iterdir() if not path.name.startswith(".cache"))


def test_generate(sdcpp):
    result = sdcpp("generate", "a red heart", "-o", "heart.png", *SMALL)
    assert result.exit_code == 0, result.output
    assert "heart.png (seed 7)" in result.output
    told = parse_parameters(read_parameters("heart.png"))
    assert (told.prompt, told.steps, told.width, told.seed) == ("a red heart", 2, 32, 7)


def test_every_option_reaches_the_picture(sdcpp):
    words = [
        "--negative-prompt",
        "blue",
        "--cfg-scale",
        "5",
        "--sampler",
        "dpm++2s_a",
        "--scheduler",
        "karras",
    ]
    more = ["--clip-skip", "2", "--rng", "cuda", "--eta", "0.5", "--backend", "CPU", "-q"]
    result = sdcpp("generate", "a heart", "-o", "a.png", *SMALL, *words, *more)
    assert result.exit_code == 0, result.output
    assert result.output == ""
    told = parse_parameters(read_parameters("a.png"))
    assert (told.negative_prompt, told.cfg_scale, told.sampler, told.scheduler) == (
        "blue",
        5,
        "dpm++2s_a",
        "karras",
    )
    assert (told.clip_skip, told.rng, told.eta) == (2, "cuda", 0.5)


def test_a_batch_is_numbered(sdcpp):
    assert sdcpp("generate", "a", "-o", "a.png", *SMALL, "--batch-size", "3").exit_code == 0
    assert pngs() == ["a-2.png", "a-3.png", "a.png"]
    assert [parse_parameters(read_parameters(name)).seed for name in ("a.png", "a-2.png", "a-3.png")] == [
        7,
        8,
        9,
    ]


def test_without_a_name_nothing_is_overwritten(sdcpp):
    for _ in range(2):
        assert sdcpp("generate", "a", *SMALL).exit_code == 0
    assert pngs() == ["sdcpp-7-2.png", "sdcpp-7.png"]


# ---- --like --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--sampler", "euler_a", "--scheduler", "exponential", "--cfg-scale", "3.3", "--rng", "cuda"],
        ["--negative-prompt", "a\nNegative prompt: (b", "--clip-skip", "2"],
        ["--batch-size", "2"],
    ],
    ids=["plain", "sampler", "prompts", "batch"],
)
def test_a_picture_is_repeated_bit_for_bit(sdcpp, tiny_sd1, options):
    assert sdcpp("generate", 'a "red", heart: (x:1.2)', "-o", "a.png", *SMALL, *options).exit_code == 0
    last = "a-2.png" if "--batch-size" in options else "a.png"
    result = sdcpp("generate", "--like", last, "-o", "again.png")  # the model is found by its hash
    assert result.exit_code == 0, result.output
    assert Path("again.png").read_bytes() == Path(last).read_bytes()


def test_options_change_single_things(sdcpp):
    assert sdcpp("generate", "a heart", "-o", "a.png", *SMALL).exit_code == 0
    assert sdcpp("generate", "a star", "--like", "a.png", "--seed", "8", "-o", "b.png").exit_code == 0
    told = parse_parameters(read_parameters("b.png"))
    assert (told.prompt, told.seed, told.steps, told.width) == ("a star", 8, 2, 32)


def test_a_picture_over_another_needs_that(sdcpp):
    assert sdcpp("generate", "a", "-o", "start.png", *SMALL).exit_code == 0
    over = ["--init-image", "start.png", "--strength", "0.6"]
    assert sdcpp("generate", "b", "-o", "a.png", *SMALL, *over).exit_code == 0
    result = sdcpp("generate", "--like", "a.png", "-o", "again.png")
    assert result.exit_code == 1
    assert "give that with --init-image" in result.output
    result = sdcpp("generate", "--like", "a.png", "--init-image", "start.png", "-o", "again.png")
    assert result.exit_code == 0, result.output
    assert Path("again.png").read_bytes() == Path("a.png").read_bytes()
    assert "not the same picture" not in result.output
    other = sdcpp("generate", "--like", "a.png", "--init-image", "a.png", "-o", "again.png")
    assert "not the same picture: the init image has hash" in other.output


def test_a_model_that_is_not_known_is_asked_for(sdcpp, tiny_sd1, tmp_path):
    model = tmp_path / "mine.safetensors"
    shutil.copy(tiny_sd1, model)
    assert sdcpp("generate", "a", "-m", model, "-o", "a.png", *SMALL).exit_code == 0
    model.unlink()
    result = sdcpp("generate", "--like", "a.png")
    assert result.exit_code == 1
    assert re.search(r"another model, mine \(hash [0-9a-f]{10}\); give its file with --model", result.output)
    result = sdcpp("generate", "--like", "a.png", "-m", tiny_sd1, "-o", "b.png")
    assert result.exit_code == 0, "the same bytes under another name"
    assert "not the same picture" not in result.output


# ---- errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "--sampler", "foo"], "sampler 'foo' is not known; there are: "),
        (["a", "--width", "30", "--height", "32"], "size 30 x 32: both must be multiples of 8"),
        (["a", "--steps", "0"], "steps 0: must be between 1"),
        (["a", "--cfg-scale", "nan"], "cfg_scale nan: must be a finite number"),
        (["a", "-o", "a.foo"], "a.foo: no picture is written with the ending '.foo'; try .png"),
        (["a", "-o", "no/a.png"], "no/a.png: there is no folder no; make it first"),
        (["a", "--like", "none.png"], "none.png: No such file or directory"),
        (["a", "--init-image", "none.png"], "none.png: No such file or directory"),
        (["a", "--mask", "none.png"], "mask: says where to repaint init_image, which is missing"),
        (["a", "-m", "none.gguf"], "none.gguf: "),
        (["a <lora:x>"], "LoRA"),
        (["(a:nan)"], "prompt: the weight in"),
    ],
)
def test_an_error_is_one_sentence(sdcpp, arguments, sentence):
    result = sdcpp("generate", *arguments)
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert pngs() == []


@pytest.mark.parametrize(
    "arguments", [["generate"], ["generate", "a", "--steps", "many"], ["generate", "a", "--foo"], ["x"]]
)
def test_wrong_usage_exits_with_2(sdcpp, arguments):
    assert sdcpp(*arguments).exit_code == 2


def run(*arguments: str, **options: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sdcpp_py", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # else inherited, and may be ignored
        **options,
    )


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_inside_a_step_and_writes_nothing(tiny_sd1):
    endless = ["--width", "64", "--height", "64", "--steps", "10000", "--threads", "1", "-v"]
    with run("generate", "a", "-m", str(tiny_sd1), "-o", "a.png", *endless) as process:
        try:
            assert process.stderr
            process.stderr.readline()  # what -v tells of the open model
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "stopped; nothing more is written"
    assert pngs() == []


# ---- info and doctor -----------------------------------------------------------------------------------


def test_info_of_a_picture_is_its_text(sdcpp):
    assert sdcpp("generate", "a red heart", "-o", "a.png", *SMALL).exit_code == 0
    assert sdcpp("info", "a.png").output == read_parameters("a.png") + "\n"


def test_info_of_a_model(sdcpp, tiny_sd1):
    output = sdcpp("info", tiny_sd1).output
    for words in (
        "sd1",
        "eps",
        "512 x 512",
        "paints",
        "type f32",
        "part denoiser",
        "part vae",
        files.model_hash(tiny_sd1),
    ):
        assert words in output


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nbroken", b"GGUF", b"no model at all"])
def test_info_of_what_is_neither(sdcpp, content):
    if content is not None:
        Path("x").write_bytes(content)
    result = sdcpp("info", "x")
    assert result.exit_code == 1
    assert result.stderr.startswith("x: ")


def test_doctor(sdcpp):
    output = sdcpp("doctor").output
    for words in ("sdcpp_py", __version__, "numpy", "CPU kernels", "precision auto", "GiB free", "ggml"):
        assert words in output
    options = "--no-cache-dir --force-reinstall --no-deps --no-binary libggml-python"
    assert re.search(rf'^  CMAKE_ARGS="-DGGML_CUDA=ON" pip install {options} libggml-python==\S+$', output, re.M)


def test_bench_tells_times_and_rates(sdcpp, tiny_sd1):
    shown = sdcpp("bench", "-m", str(tiny_sd1), "--steps", "2", "--threads", "1", "--profile").stdout
    for words in ("kernels", "peak memory", "step", "decode", "GFLOP/s", "convolution", "attention"):
        assert words in shown


def test_help_lists_what_the_engine_knows(sdcpp):
    assert "Paint" in sdcpp("--help").output
    assert sdcpp("--version").output == f"{__version__}\n"
    words = "".join(re.findall(r"[\w+]+|,", sdcpp("generate", "--help").output))
    for name in samplers():
        assert name in words


def test_python_m_is_the_same():
    process = run("--version")
    assert process.communicate()[0] == f"{__version__}\n"
    assert process.returncode == 0


# ---- weights -------------------------------------------------------------------------------------------


def test_convert_tells_what_it_wrote(sdcpp, tiny_sd1):
    result = sdcpp("convert", tiny_sd1, "a.gguf", "--type", "q4_K", "--tensor-type", "token_embedding=q8_0")
    assert result.exit_code == 0, result.output
    for words in ("a.gguf", "q8_0", "together", "no blocks of q4_K; they become q5_0"):
        assert words in result.output
    result = sdcpp("convert", tiny_sd1, "b.gguf", "--type", "q8_0", "--dry-run")
    assert "b.gguf" in result.output
    assert not Path("b.gguf").exists()
    result = sdcpp("convert", tiny_sd1, "b.gguf", "-q")
    assert result.output == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["none.ckpt", "a.gguf"], "none.ckpt: "),
        (["MODEL", "a.ckpt"], "a.ckpt: models are written as .gguf or .safetensors"),
        (["MODEL", "a.gguf", "--type", "q9"], "type 'q9': weights cannot be written so"),
        (["MODEL", "a.gguf", "--tensor-type", "x"], "tensor-type 'x': expected REGEX=TYPE"),
        (["MODEL", "a.gguf", "--split", "many"], "split 'many': expected a size such as 2G"),
        (["MODEL", "a.gguf", "--imatrix", "MODEL"], "is it an importance matrix?"),
    ],
)
def test_a_conversion_that_cannot_be_is_one_sentence(sdcpp, tiny_sd1, arguments, sentence):
    result = sdcpp("convert", *(str(tiny_sd1) if word == "MODEL" else word for word in arguments))
    assert result.exit_code == 1
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not Path("a.gguf").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_a_conversion_and_leaves_nothing(tiny_sd1, tmp_path):
    work = textwrap.dedent("""
        import signal, time
        from sdcpp_py import _native, cli
        signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background inherit that it is ignored
        convert = _native.convert_rows
        def slowly(*arguments):
            time.sleep(0.5)
            return convert(*arguments)
        _native.convert_rows = slowly
        print(flush=True)
        cli.main()
    """)
    arguments = ["convert", str(tiny_sd1), "a.gguf", "--type", "iq4_nl", "--threads", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", work, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdout.readline()
            while not any(path.suffix == ".part" for path in Path.cwd().iterdir()):
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1] == "stopped; nothing more is written"
    assert [path for path in Path.cwd().iterdir() if path.suffix in (".part", ".gguf")] == []


def test_quality_of_a_conversion(sdcpp, tiny_sd1):
    assert sdcpp("convert", tiny_sd1, "a.gguf", "--type", "q8_0", "--drop", "quant_conv").exit_code == 0
    result = sdcpp("quality", tiny_sd1, "a.gguf", "--worst", "1")
    assert result.exit_code == 0, result.output
    assert re.search(r"^q8_0 .* relative RMSE [45]\.\d+e-03", result.output, re.M)
    assert re.search(r"^f32 .* relative RMSE 0\.00e\+00", result.output, re.M)
    assert re.search(r"^  5\.\d+e-03  f32 to q8_0  \S+$", result.output, re.M)
    assert "only in A: 4 tensors" in result.output


def test_info_tells_what_is_missing(sdcpp, tiny_sd1):
    assert sdcpp("convert", tiny_sd1, "vae.safetensors", "--only", "vae").exit_code == 0
    output = sdcpp("info", "vae.safetensors").output
    assert re.search(r"^  family +vae$", output, re.M)
    assert re.search(r"^  paints +no: holds names such as ", output, re.M)
    assert sdcpp("convert", tiny_sd1, "part.safetensors", "--drop", "time_embed").exit_code == 0
    assert re.search(r"^  paints +no: .*time_embed", sdcpp("info", "part.safetensors").output, re.M)
