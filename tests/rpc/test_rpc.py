"""A device whose memory the host cannot touch, as CUDA's and Metal's: ggml's RPC backend on loopback.

Skipped where ggml was built without it; tests/rpc/run.py builds such a ggml and runs this.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import lora_files
import numpy as np
import pytest
import reference_lora
import tiny
from cases import NETWORKS, SD1, Case
from closeness import assert_close, relative_rmse

import sdcpp_py
from sdcpp_py import SDContext, _native
from sdcpp_py.files import data_dir

pytestmark = pytest.mark.rpc
GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "networks.npz")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert server.poll() is None, f"the server ended with {server.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the server does not listen after 30 s")


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """The name of a device that a server of our own offers."""
    try:
        sdcpp_py.add_rpc_devices("127.0.0.1:1")
    except sdcpp_py.Unsupported:
        pytest.skip("this ggml has no RPC backend: run tests/rpc/run.py")
    except sdcpp_py.Io:
        pass  # it has one, and nobody answers at that port
    endpoint = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen([sys.executable, Path(__file__).with_name("server.py"), endpoint])
    try:
        wait_for(int(endpoint.rpartition(":")[2]), server)
        before = {known["name"] for known in sdcpp_py.devices()}
        sdcpp_py.add_rpc_devices(endpoint)
        (added,) = {known["name"] for known in sdcpp_py.devices()} - before
        yield added
    finally:
        server.kill()
        server.wait()


def test_a_server_is_added_once(device: str) -> None:
    known = sdcpp_py.devices()
    (endpoint,) = [each["description"] for each in known if each["name"] == device]
    sdcpp_py.add_rpc_devices(endpoint)
    assert [each["name"] for each in sdcpp_py.devices()] == [each["name"] for each in known]


@pytest.mark.parametrize("endpoint", ["127.0.0.1:1", "", "nonsense", "127.0.0.1:", "127.0.0.1:99999999999"])
def test_where_no_server_answers(device: str, endpoint: str) -> None:
    with pytest.raises(sdcpp_py.Io, match="no RPC server answers there"):
        sdcpp_py.add_rpc_devices(endpoint)


# ---- the ladder ----------------------------------------------------------------------------------------


Opener = Callable[[tiny.TinySD1], _native.Context]


@pytest.fixture(scope="module")
def remote(device: str, tiny_folder: Callable[[tiny.TinySD1], Path]) -> Opener:
    """A tiny model on the device, opened once."""
    opened: dict[tiny.TinySD1, _native.Context] = {}

    def context(model: tiny.TinySD1) -> _native.Context:
        if model not in opened:
            folder = str(tiny_folder(model))
            opened[model] = _native.Context(folder, data_dir=str(data_dir()), backend=device, threads=1)
        return opened[model]

    return context


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_a_network_matches_diffusers_stored_answer(case: Case, remote: Opener) -> None:
    """The same tolerance as on the CPU, though convolution and attention take other ways here."""
    got = _native.probe_run(remote(case.model), case.network, **case.inputs)
    assert_close(got, GOLDEN[case.name], tolerance=1e-5)


def test_the_weights_there_are_those_of_the_file(remote: Opener, native: Opener) -> None:
    assert remote(SD1).fingerprint() == native(SD1).fingerprint()


@pytest.fixture(scope="module", params=["float16", "Q8_0"])
def smaller(request: pytest.FixtureRequest, tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with weights of fewer bits."""
    folder = tmp_path_factory.mktemp("smaller")
    if request.param == "float16":
        return tiny.write_folder(SD1, folder, dtype="float16")
    from safetensors.numpy import load_file

    kind = gguf.GGMLQuantizationType[request.param]
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "sd1")
    for name, values in load_file(tiny_sd1).items():
        if values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf"


def test_smaller_weights_give_what_they_give_on_the_cpu(
    smaller: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ggml's operations on both sides: with quantised weights they round activations, which our kernels do not."""
    monkeypatch.setenv("SDCPP_KERNELS", "reference")
    case = next(case for case in NETWORKS if case.name == "unet-square")
    there, here = (
        _native.Context(str(smaller), data_dir=str(data_dir()), backend=backend, threads=1)
        for backend in (device, "CPU")
    )
    assert there.fingerprint() == here.fingerprint()
    answers = [_native.probe_run(context, case.network, **case.inputs) for context in (there, here)]
    assert_close(*answers, tolerance=2e-3)


# ---- whole runs ----------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
MASK = np.zeros((64, 96), np.uint8)
MASK[:, 48:] = 255
RUNS = {
    "plain": {},
    "batch": {"batch_size": 2},
    "long-prompt": {"prompt": "a red heart BREAK (blue:1.3) sky"},
    "image": {"init_image": PICTURE, "strength": 0.6},
    "inpainting": {"init_image": PICTURE, "mask": MASK},
    "tiles": {"vae_tile": 32},
}


@pytest.fixture(scope="module")
def pair(device: str, tiny_folder: Callable[[tiny.TinySD1], Path]) -> Iterator[tuple[SDContext, SDContext]]:
    """The same model on the device and on the CPU."""
    there, here = (SDContext(tiny_folder(SD1), backend=name, threads=1) for name in (device, "CPU"))
    with there, here:
        yield there, here


@pytest.mark.parametrize("name", RUNS)
def test_a_picture_is_the_one_of_the_cpu(name: str, pair: tuple[SDContext, SDContext]) -> None:
    arguments = {"prompt": "a red heart", "steps": 4, "seed": 3, "width": 96, "height": 64, **RUNS[name]}
    pictures, latents = [], []
    for context in pair:
        painted = context.generate(**arguments)
        pictures.append(np.asarray(painted if isinstance(painted, list) else [painted], np.int16))
        latents.append(_native.probe_latent(context._native))
    assert relative_rmse(*latents) <= 1e-3
    assert np.mean(np.abs(pictures[0] - pictures[1]) <= 1) >= 0.999


def test_stopping_and_going_on(pair: tuple[SDContext, SDContext]) -> None:
    there, _ = pair
    with pytest.raises(sdcpp_py.Cancelled):
        there.generate("a", steps=5, seed=1, on_step=lambda step, steps, preview: step < 2)
    seen = []
    there.generate("a", steps=2, seed=1, on_step=lambda step, steps, preview: seen.append(preview().shape))
    assert seen == [(8, 8, 3)] * 2


# ---- adapters ------------------------------------------------------------------------------------------

KINDS = reference_lora.KINDS
# Modules of every sort of weight; each kind acts on those that it fits.
PATHS = [
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "unet.mid_block.attentions.0.proj_in",
    "unet.down_blocks.1.resnets.0.conv1",
    "unet.down_blocks.0.downsamplers.0.conv",
    "unet.down_blocks.0.resnets.0.norm1",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
]


@pytest.fixture(scope="module", params=["runtime", "restore", "diff"])
def adapted_pair(
    request: pytest.FixtureRequest, device: str, tiny_folder: Callable[[tiny.TinySD1], Path]
) -> Iterator[tuple[SDContext, SDContext]]:
    """A model on the device and one on the CPU, in one mode of adapters."""
    folder, mode = tiny_folder(SD1), request.param
    there, here = (SDContext(folder, backend=name, threads=1, lora_mode=mode) for name in (device, "CPU"))
    with there, here:
        yield there, here


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_acts_as_on_the_cpu_and_leaves_no_trace(
    kind: str, adapted_pair: tuple[SDContext, SDContext], tmp_path: Path
) -> None:
    paths = [path for path in PATHS if KINDS[kind].fits(lora_files.base()[f"{path}.weight"])]
    update = lora_files.random_update(paths, KINDS[kind].make)
    file = lora_files.save(tmp_path / "it.safetensors", lora_files.tensors_of(update))
    latents = []
    for context in adapted_pair:
        before = context.fingerprint()
        context.generate("a cat", steps=2, width=48, height=32, seed=3, loras={file: 0.7})
        latents.append(_native.probe_latent(context._native))
        context.reset_loras()
        assert context.fingerprint() == before
    assert_close(*latents, tolerance=1e-4)


# ---- less memory than the model needs ------------------------------------------------------------------


def moves(caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """How many components came and left since the last time."""
    came = sum(1 for record in caplog.records if " MB on " in record.message and "weights" not in record.message)
    left = sum(1 for record in caplog.records if "has left" in record.message)
    caplog.clear()
    return came, left


def test_components_come_once_where_there_is_room(
    device: str, tiny_sd1: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "sdcpp_py")
    with SDContext(tiny_sd1, backend=device, threads=1) as context:
        assert moves(caplog) == (0, 0)
        for prompt, want in (("a cat", (3, 0)), ("a cat", (0, 0)), ("a dog", (0, 0))):
            context.generate(prompt, steps=2, seed=1, width=64, height=64)
            assert moves(caplog) == want


@pytest.mark.parametrize("mode", ["runtime", "restore", "diff"])
def test_components_that_leave_come_back_as_they_were(
    mode: str, device: str, tiny_sd1: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With other LoRAs for each picture, whose weights are away when they are written, or leave afterwards."""
    caplog.set_level(logging.DEBUG, "sdcpp_py")
    files = []
    for seed, paths in enumerate((PATHS[:4], PATHS[3:])):
        kind = KINDS["lora"]
        update = lora_files.random_update([path for path in paths if "norm" not in path], kind.make)
        files.append(lora_files.save(tmp_path / f"{seed}.safetensors", lora_files.tensors_of(update)))
    wanted = [{}, {files[0]: 0.7}, {files[1]: 0.5}, {files[0]: 0.2, files[1]: -0.4}, {}]
    latents: list[list[np.ndarray]] = []
    prints: list[list[str]] = []
    for limit in (0, 16 << 20):  # text encoder 13 MB, UNet 4 MB, autoencoder 4 MB, and activations
        with SDContext(tiny_sd1, backend=device, threads=1, lora_mode=mode, memory_limit=limit) as context:
            latents.append([])
            prints.append([context.fingerprint()])
            for k, loras in enumerate(wanted):
                context.generate(f"a cat {k}", steps=2, seed=1, width=64, height=64, loras=loras)
                latents[-1].append(_native.probe_latent(context._native))
                prints[-1].append(context.fingerprint())
            context.reset_loras()
            prints[-1].append(context.fingerprint())
            assert prints[-1][-1] == prints[-1][0]
            came, left = moves(caplog)
            assert (left == 0) == (limit == 0)
            assert came == 3 if limit == 0 else came > 3
    np.testing.assert_array_equal(*latents)
    assert prints[0] == prints[1]


def test_a_device_without_room_says_so(device: str, tiny_sd1: Path) -> None:
    with (
        SDContext(tiny_sd1, backend=device, memory_limit=1 << 20) as context,
        pytest.raises(sdcpp_py.OutOfMemory, match=r"beside \d+ MB of weights, and 1 MB are free on"),
    ):
        context.generate("a cat", steps=1)
