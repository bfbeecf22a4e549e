"""The shared library as other programs get it: built and installed without Python, used through its header.

Building takes a minute or two; SDCPP_LIBRARY, an installed folder (with include, lib and share), spares it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import pytest
import tiny
from cases import SD1

from sdcpp_py import SDContext, _native, errors
from sdcpp_py.files import data_dir

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "native" / "include" / "sdcpp.h"
PROMPT, STEPS, SEED = "a red heart", 3, 7  # the example's own seed

pytestmark = pytest.mark.slow


def tool(name: str) -> str:
    """The path of a program, also where it came with a package into an environment that is not activated."""
    found = shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))
    if not found:
        pytest.skip(f"needs {name}")
    return found


def run(*command: object, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1200,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def cmake_configure(source: Path, build: Path, *options: str) -> None:
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if shutil.which("ninja") else []
    run(tool("cmake"), "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", *generator, *options)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the library is installed into."""
    if given := os.environ.get("SDCPP_LIBRARY"):
        return Path(given)
    folder = tmp_path_factory.mktemp("library")
    options = [f"-DPython_EXECUTABLE={sys.executable}"]
    if ccache := shutil.which("ccache"):
        options.append(f"-DCMAKE_CXX_COMPILER_LAUNCHER={ccache}")
    cmake_configure(ROOT, folder / "build", *options)
    run(tool("cmake"), "--build", folder / "build", "--parallel", "2")
    # Not the prefix that it was configured for: what is installed finds its parts from where it lies.
    run(tool("cmake"), "--install", folder / "build", "--prefix", folder / "installed")
    return folder / "installed"


# ---- the example ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[tiny.TinySD1], Path]) -> Path:
    return tiny_folder(SD1)


@pytest.fixture(scope="module")
def from_python(model: Path) -> np.ndarray:
    with SDContext(model, threads=1) as sd_ctx:
        return np.asarray(sd_ctx.generate(PROMPT, steps=STEPS, seed=SEED))


def read_ppm(path: Path) -> np.ndarray:
    kind, size, _, pixels = path.read_bytes().split(b"\n", 3)
    assert kind == b"P6"
    width, height = map(int, size.split())
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def compile_with_pkg_config(prefix: Path, folder: Path) -> tuple[Path, str]:
    pkg_config = tool("pkg-config")
    library = next(prefix.rglob("sdcpp.pc")).parent
    flags = run(pkg_config, "--cflags", "--libs", "sdcpp", PKG_CONFIG_PATH=str(library)).split()
    data = run(pkg_config, "--variable=datadir", "sdcpp", PKG_CONFIG_PATH=str(library)).strip()
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-Wl,-rpath,{library.parent}"]
    run(tool("cc"), ROOT / "docs" / "example.c", *strict, *flags, "-o", folder / "example")
    return folder / "example", data


def compile_with_cmake(prefix: Path, folder: Path) -> tuple[Path, str]:
    (folder / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.21)
        project(example LANGUAGES C)
        find_package(sdcpp 0.1 REQUIRED)
        add_executable(example {(ROOT / "docs" / "example.c").as_posix()})
        target_link_libraries(example PRIVATE sdcpp::sdcpp)
        file(WRITE ${{CMAKE_BINARY_DIR}}/data_dir.txt "${{sdcpp_DATA_DIR}}")
        """)
    cmake_configure(folder, folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(tool("cmake"), "--build", folder / "build")
    return folder / "build" / "example", (folder / "build" / "data_dir.txt").read_text()


@pytest.mark.parametrize("build", [compile_with_pkg_config, compile_with_cmake], ids=["pkg-config", "cmake"])
def test_the_example_paints_what_python_paints(
    build: Callable[[Path, Path], tuple[Path, str]],
    prefix: Path,
    model: Path,
    from_python: np.ndarray,
    tmp_path: Path,
) -> None:
    example, data = build(prefix, tmp_path)
    assert (Path(data) / "clip_merges.txt").read_bytes() == (data_dir() / "clip_merges.txt").read_bytes()
    # On one core: threads that wait for each other spin, which takes minutes where others use the machine.
    taskset = shutil.which("taskset")
    one_core = [taskset, "-c", max(os.sched_getaffinity(0))] if taskset else []
    told = run(*one_core, example, model, data, PROMPT, tmp_path / "heart.ppm", STEPS)
    assert f"step {STEPS} of {STEPS}" in told
    np.testing.assert_array_equal(read_ppm(tmp_path / "heart.ppm"), from_python)

    failed = subprocess.run([example, "no-such-file", data, PROMPT, "x.ppm"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "no-such-file: " in failed.stderr


def test_only_the_surface_is_exported(prefix: Path) -> None:
    symbols = run(tool("nm"), "-D", "--defined-only", library_file(prefix))
    functions = {line.split()[-1] for line in symbols.splitlines() if line.split()[1] == "T"}
    declared = set(re.findall(r"\b(sd_\w+)\(", declarations()))
    assert declared <= functions
    assert {name for name in functions if not name.startswith("sd_probe_")} == declared


# ---- from the header's own text ------------------------------------------------------------------------


def declarations() -> str:
    """The header without what belongs to the preprocessor and to C++."""
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", HEADER.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"^#.*$|\bSD_API\b", "", text, flags=re.MULTILINE)


def library_file(prefix: Path) -> Path:
    return next(path for path in prefix.glob("lib*/libsdcpp.*") if path.suffix in (".so", ".dylib"))


class Sd:
    """libsdcpp through cffi, and one way to paint with it."""

    def __init__(self, library: Path) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(declarations())
        self.c = self.ffi.dlopen(str(library))

    def error(self) -> str:
        return self.ffi.string(self.c.sd_last_error()).decode(errors="replace")  # may repeat a file's name

    def open(self, **fields: Any) -> tuple[int, Any]:
        """A status and a context to close, which is NULL where the status is not SD_OK."""
        params = self.ffi.new("sd_open_params *", self.c.sd_default_open_params())
        params.threads = 1
        strings = {name: self.ffi.new("char[]", os.fsencode(value)) for name, value in fields.items()}
        for name, value in strings.items():
            setattr(params, name, value)
        ctx = self.ffi.new("sd_ctx **")
        status = self.c.sd_open(params, ctx)
        assert (ctx[0] == self.ffi.NULL) == (status != self.c.SD_OK)
        return status, ctx[0]

    def paint(self, ctx: Any, prompt: bytes = PROMPT.encode(), **fields: Any) -> tuple[int, np.ndarray]:
        """A status and what was painted; fields override those of the default request."""
        text = self.ffi.new("char[]", prompt)
        span = self.ffi.new("sd_span *", (text, 1.0))
        prompts = self.ffi.new("sd_prompt *", (span, 1))
        request = self.ffi.new("sd_request *", self.c.sd_default_request(ctx))
        request.width = request.height = 64
        request.prompts, request.n_prompts, request.steps, request.seed = prompts, 1, STEPS, SEED
        kept = []
        for name, value in fields.items():
            if isinstance(value, (bytes, np.ndarray)):
                data = value if isinstance(value, bytes) else value.tobytes()
                kind = "char[]" if isinstance(value, bytes) else "uint8_t[]"
                kept.append(value := self.ffi.new(kind, data))
            setattr(request, name, value)
        pixels = np.zeros((max(1, min(request.batch_size, 4)), 64, 64, 3), np.uint8)
        return self.c.sd_generate(ctx, request, self.ffi.from_buffer("uint8_t[]", pixels)), pixels


@pytest.fixture(scope="module")
def sd(prefix: Path) -> Sd:
    return Sd(library_file(prefix))


@pytest.fixture
def ctx(sd: Sd, model: Path) -> Iterator[Any]:
    status, ctx = sd.open(model=model, data_dir=data_dir())
    assert status == sd.c.SD_OK, sd.error()
    yield ctx
    sd.c.sd_close(ctx)


def test_the_library_is_what_python_has(sd: Sd, ctx: Any, model: Path, from_python: np.ndarray) -> None:
    assert sd.ffi.string(sd.c.sd_version()).decode() == _native.version()
    assert b"ggml" in sd.ffi.string(sd.c.sd_build_info())
    for table in ("sampler", "scheduler", "rng", "family"):
        name = getattr(sd.c, f"sd_{table}_name")
        wanted = [*getattr(_native, {"family": "families"}.get(table, f"{table}s"))()]
        assert [sd.ffi.string(name(i)).decode() for i in range(len(wanted))] == wanted
        assert name(len(wanted)) == name(-1) == sd.ffi.NULL

    info = sd.c.sd_get_model_info(ctx)
    assert (sd.ffi.string(info.family), info.size_multiple, info.latent_cell) == (b"sd1", 8, 8)
    status, pixels = sd.paint(ctx)
    assert status == sd.c.SD_OK, sd.error()
    assert sd.error() == ""
    np.testing.assert_array_equal(pixels[0], from_python)

    hex_digits = sd.ffi.new("char[65]")
    assert sd.c.sd_fingerprint(ctx, hex_digits) == sd.c.SD_OK
    with SDContext(model) as same:
        assert sd.ffi.string(hex_digits).decode() == same.fingerprint()
    count = sd.ffi.new("int *")
    assert sd.c.sd_count_tokens(ctx, PROMPT.encode(), count) == sd.c.SD_OK
    assert count[0] == 3


def test_every_status_has_a_number_that_python_knows(sd: Sd) -> None:
    names = {sd.c.SD_BAD_ARGUMENT: "BadArgument", sd.c.SD_BUSY: "Busy", sd.c.SD_INTERNAL: "Internal"}
    assert {status: errors.BY_STATUS[status].__name__ for status in names} == names


def test_devices_are_listed(sd: Sd) -> None:
    device = sd.ffi.new("sd_device *")
    names = []
    while sd.c.sd_get_device(len(names), device):
        names.append(sd.ffi.string(device.name).decode())
    assert names == [known["name"] for known in _native.devices()]
    assert not sd.c.sd_get_device(-1, device)
    assert not sd.c.sd_get_device(0, sd.ffi.NULL)


WRONG_FILES = [
    ({"model": "no-such-file.safetensors"}, "SD_IO", "no-such-file.safetensors: "),
    ({"model": str(HEADER)}, "SD_BAD_FILE", "sdcpp.h: "),
    ({"model": ""}, "SD_BAD_ARGUMENT", "no model given"),
    ({"model": b"\xff\xfe"}, "SD_IO", ""),
    ({"data_dir": "no-such-folder"}, "SD_IO", "clip_merges.txt"),
    ({"backend": "abacus"}, "SD_BAD_ARGUMENT", "'abacus' is not known; this ggml offers: "),
    ({"prediction": "tarot"}, "SD_BAD_ARGUMENT", "tarot"),
]


@pytest.mark.parametrize(("fields", "status", "words"), WRONG_FILES, ids=str)
def test_what_cannot_be_opened(sd: Sd, model: Path, fields: dict[str, Any], status: str, words: str) -> None:
    got, _ = sd.open(**{"model": model, "data_dir": data_dir(), **fields})
    assert got == getattr(sd.c, status), sd.error()
    assert words in sd.error()
    assert sd.error()


NAN = float("nan")
WRONG_REQUESTS = [
    ({"sampler": b"euler_b"}, "'euler_b' is not known; there are: euler, "),
    ({"scheduler": b"slow"}, "'slow' is not known"),
    ({"rng": b"dice"}, "'dice' is not known"),
    ({"width": 60}, "multiples of 8"),
    ({"width": 0}, "size 0 x 64"),
    ({"height": -64}, "size 64 x -64"),
    ({"height": 2**31 - 1}, "size 64 x 2147483647"),
    ({"steps": 0}, "steps 0"),
    ({"steps": -(2**31)}, "steps"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 2**31 - 1}, "batch_size"),
    ({"cfg_scale": NAN}, "cfg_scale"),
    ({"eta": NAN}, "eta"),
    ({"strength": NAN}, "strength"),
    ({"clip_skip": 99}, "clip_skip"),
    ({"clip_skip": -1}, "clip_skip"),
    ({"vae_tile": -8}, "vae_tile"),
    ({"n_prompts": 0}, "prompt"),
    ({"n_prompts": -5}, "prompt"),
    ({"n_prompts": 2, "prompts": None}, "NULL"),
    ({"n_negative_prompts": 1}, "NULL"),
    ({"mask": np.zeros((64, 64), np.uint8)}, "init_image"),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_REQUESTS, ids=str)
def test_what_cannot_be_painted(sd: Sd, shared: Any, fields: dict[str, Any], words: str) -> None:
    """An error, a sentence, and the context paints on."""
    fields = {name: sd.ffi.NULL if value is None else value for name, value in fields.items()}
    status, _ = sd.paint(shared, **fields)
    assert status == sd.c.SD_BAD_ARGUMENT, sd.error()
    assert words in sd.error()


@pytest.fixture(scope="module")
def shared(sd: Sd, model: Path) -> Iterator[Any]:
    """A context for what is refused; it must still paint when all is over."""
    status, ctx = sd.open(model=model, data_dir=data_dir())
    assert status == sd.c.SD_OK, sd.error()
    yield ctx
    assert sd.paint(ctx, steps=1)[0] == sd.c.SD_OK, sd.error()
    sd.c.sd_close(ctx)


def test_null_is_refused_everywhere(sd: Sd, shared: Any) -> None:
    c, null = sd.c, sd.ffi.NULL
    request = sd.ffi.new("sd_request *", c.sd_default_request(shared))
    params = sd.ffi.new("sd_open_params *", c.sd_default_open_params())
    calls = [
        lambda: c.sd_open(null, null),
        lambda: c.sd_open(params, null),
        lambda: c.sd_open(params, sd.ffi.new("sd_ctx **")),
        lambda: c.sd_generate(null, request, null),
        lambda: c.sd_generate(shared, null, null),
        lambda: c.sd_generate(shared, request, null),
        lambda: c.sd_fingerprint(null, sd.ffi.new("char[65]")),
        lambda: c.sd_fingerprint(shared, null),
        lambda: c.sd_count_tokens(null, b"a", sd.ffi.new("int *")),
        lambda: c.sd_count_tokens(shared, null, null),
        lambda: c.sd_preview(null, 0, null),
        lambda: c.sd_preview(shared, 0, sd.ffi.new("uint8_t[192]")),  # outside of on_step
        lambda: c.sd_add_rpc_devices(null),
        lambda: c.sd_apply_loras(null, null, 0),
        lambda: c.sd_apply_loras(shared, null, 1),
        lambda: c.sd_reset_loras(null),
        lambda: c.sd_inspect_lora(null, b"x", null),
        lambda: c.sd_inspect_lora(shared, null, null),
        lambda: c.sd_lora_drift(null, sd.ffi.new("double *")),
        lambda: c.sd_lora_drift(shared, null),
        lambda: c.sd_estimate_memory(null, request, null, null, null),
        lambda: c.sd_collect_importance(null, True),
        lambda: c.sd_learn_words(null, null, 0),
        lambda: c.sd_learn_words(shared, null, 1),
    ]
    for number, call in enumerate(calls):
        assert call() == c.SD_BAD_ARGUMENT, f"call {number}"
        assert sd.error()
    model = sd.ffi.new("char[]", b"x")
    params.model, params.n_components = model, 2
    assert c.sd_open(params, sd.ffi.new("sd_ctx **")) == c.SD_BAD_ARGUMENT
    assert c.sd_get_model_info(null).n_weights == 0
    assert c.sd_default_request(null).steps == 0
    assert not c.sd_get_lora(null, 0, 0, sd.ffi.new("sd_lora *"))
    assert not c.sd_get_lora(shared, 0, 0, null)
    assert c.sd_lora_report(null, 0) == null
    assert not c.sd_get_importance(null, 0, sd.ffi.new("sd_importance *"))
    c.sd_close(null)


def test_a_prompt_may_be_any_bytes(sd: Sd, shared: Any) -> None:
    """Bytes that are no UTF-8, control characters and a text of 10 KB: a picture or an error."""
    for prompt in (b"", b"\xff\xc0\x80", bytes(range(1, 256)), b"\xf0\x9f", b"word " * 2000):
        status, _ = sd.paint(shared, prompt, steps=1)
        assert status in (sd.c.SD_OK, sd.c.SD_BAD_ARGUMENT), sd.error()


def test_steps_previews_and_stopping(sd: Sd, ctx: Any) -> None:
    seen = []

    @sd.ffi.callback("sd_on_step")
    def stop_after_two(step: int, steps: int, user: Any) -> bool:
        preview = sd.ffi.new("uint8_t[192]")  # 8 x 8 latent cells
        seen.append((step, steps, sd.c.sd_preview(ctx, 0, preview), sd.c.sd_preview(ctx, 1, preview)))
        return step < 2

    status, _ = sd.paint(ctx, steps=5, on_step=stop_after_two)
    assert status == sd.c.SD_CANCELLED
    assert "step 2 of 5" in sd.error()
    assert seen == [(step, 5, sd.c.SD_OK, sd.c.SD_BAD_ARGUMENT) for step in (1, 2)]

    @sd.ffi.callback("sd_keep_going")
    def never(user: Any) -> bool:
        return False

    status, _ = sd.paint(ctx, steps=1000, keep_going=never)
    assert status == sd.c.SD_CANCELLED
    assert sd.paint(ctx, steps=1)[0] == sd.c.SD_OK


def test_a_second_thread_is_told_to_wait(sd: Sd, ctx: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()
    first: list[int] = []

    @sd.ffi.callback("sd_on_step")
    def wait(step: int, steps: int, user: Any) -> bool:
        inside.set()
        return go_on.wait(60)

    thread = threading.Thread(target=lambda: first.append(sd.paint(ctx, on_step=wait)[0]))
    thread.start()
    try:
        assert inside.wait(60)
        status, _ = sd.paint(ctx)
        message = sd.error()
        busy_fingerprint = sd.c.sd_fingerprint(ctx, sd.ffi.new("char[65]"))
    finally:
        go_on.set()
        thread.join(60)
    assert status == busy_fingerprint == sd.c.SD_BUSY
    assert "in use by another thread" in message
    assert first == [sd.c.SD_OK]


def test_log_lines_come_to_the_context_that_asked(sd: Sd, model: Path) -> None:
    lines: list[str] = []

    @sd.ffi.callback("sd_log_callback")
    def log(level: int, message: Any, user: Any) -> None:
        lines.append(f"{level} {sd.ffi.string(message).decode()} {sd.ffi.from_handle(user)}")

    params = sd.ffi.new("sd_open_params *", sd.c.sd_default_open_params())
    model_text, data = sd.ffi.new("char[]", os.fsencode(model)), sd.ffi.new("char[]", os.fsencode(data_dir()))
    mark = sd.ffi.new_handle("mine")
    params.model, params.data_dir, params.log, params.log_user = model_text, data, log, mark
    ctx = sd.ffi.new("sd_ctx **")
    assert sd.c.sd_open(params, ctx) == sd.c.SD_OK
    sd.c.sd_close(ctx[0])
    assert any("sd1" in line and line.startswith("1 ") and line.endswith(" mine") for line in lines)


# ---- weights in files ----------------------------------------------------------------------------------


def test_types_and_rows(sd: Sd) -> None:
    type = sd.ffi.new("sd_type *")
    names = []
    while sd.c.sd_get_type(len(names), type):
        names.append(sd.ffi.string(type.name).decode())
    assert {"f32", "q8_0", "iq2_xs"} <= set(names)
    values = np.linspace(-1, 1, 64, dtype=np.float32)
    out = np.zeros(68, np.uint8)
    numbers, bytes_ = sd.ffi.from_buffer(values), sd.ffi.from_buffer(out)
    assert sd.c.sd_convert_rows(b"f32", numbers, b"q8_0", bytes_, 2, 32, sd.ffi.NULL) == sd.c.SD_OK
    np.testing.assert_array_equal(out, _native.convert_rows("f32", values, "q8_0", 2, 32))
    assert sd.c.sd_convert_rows(b"f32", numbers, b"q8_0", bytes_, 2, 31, sd.ffi.NULL) == sd.c.SD_BAD_ARGUMENT
    assert "rows of 31 are no whole blocks of q8_0" in sd.error()
    assert sd.c.sd_convert_rows(b"f32", numbers, b"q9", bytes_, 2, 32, sd.ffi.NULL) == sd.c.SD_BAD_ARGUMENT
    assert sd.c.sd_convert_rows(sd.ffi.NULL, numbers, b"q8_0", bytes_, 2, 32, sd.ffi.NULL) == sd.c.SD_BAD_ARGUMENT


def test_tensors_are_listed_until_the_caller_stops(sd: Sd, model: Path) -> None:
    names: list[str] = []

    @sd.ffi.callback("sd_on_stored")
    def on_tensor(tensor: Any, user: Any) -> bool:
        names.append(sd.ffi.string(tensor.name).decode())
        return len(names) < 3

    path = os.fsencode(model)
    null = sd.ffi.NULL
    assert sd.c.sd_list_tensors(path, null, 0, on_tensor, null, null) == sd.c.SD_CANCELLED
    assert len(names) == 3
    assert sd.c.sd_list_tensors(path, null, 0, null, null, null) == sd.c.SD_OK


def test_words_are_learned_and_counted(sd: Sd, ctx: Any) -> None:
    vectors = np.ones((3, 64), np.float32)
    name = sd.ffi.new("char[]", b"zorglub")
    word = sd.ffi.new("sd_learned_word *")
    word.name, word.vectors = name, 3
    word.data[0] = sd.ffi.cast("float *", sd.ffi.from_buffer(vectors))
    word.width[0] = 64
    count = sd.ffi.new("int *")
    assert sd.c.sd_learn_words(ctx, word, 1) == sd.c.SD_OK
    assert sd.c.sd_count_tokens(ctx, b"a zorglub", count) == sd.c.SD_OK
    assert count[0] == 4
    word.width[0] = 32
    assert sd.c.sd_learn_words(ctx, word, 1) == sd.c.SD_BAD_ARGUMENT
    assert "embedding 'zorglub': its vectors have 32 numbers" in sd.error()
    assert sd.c.sd_learn_words(ctx, sd.ffi.NULL, 0) == sd.c.SD_OK
