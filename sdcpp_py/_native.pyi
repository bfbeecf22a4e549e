"""The compiled engine, as sdcpp.h offers it. Use SDContext instead; arguments are checked there.

Shapes are numpy's, the reverse of the header's: the same memory. What is None follows the model's family.
Every call may raise what errors.py defines.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import Buffer

_Spans = Sequence[tuple[str | None, float]]  # without text: a BREAK

class _ModelInfo(TypedDict):
    family: str
    prediction: str
    backend: str
    threads: int
    kernels: str
    precision: str
    size_multiple: int
    native_size: int
    latent_channels: int
    latent_cell: int
    input_channels: int
    weight_bytes: int
    n_weights: int
    zero_snr: bool
    redux_size: int

class _Defaults(TypedDict):
    width: int
    height: int
    steps: int
    cfg_scale: float
    guidance: float
    shift: float
    sampler: str | None
    scheduler: str | None
    rng: str | None
    eta: float
    clip_skip: int
    strength: float
    vae_tile: int

class _Lora(TypedDict):
    path: bytes
    te: float
    te2: float
    te3: float
    unet: float
    start: float
    stop: float
    blocks: list[tuple[str, float]]

class _Device(TypedDict):
    name: str
    description: str
    memory_free: int
    memory_total: int
    is_cpu: bool

class _Weight(TypedDict):
    name: str
    diffusers_name: str
    type: str
    file_type: str
    shape: tuple[int, ...]

class _Type(TypedDict):
    name: str
    number: int
    block: int
    block_bytes: int
    can_read: bool
    can_write: bool
    wants_importance: bool

class _Declared(TypedDict):
    name: str
    diffusers_name: str
    shape: tuple[int, ...]
    first_row: int
    rows: int
    swap_halves: bool
    table: bool

# name, type, shape, dims, path, offset, bytes, scale
_Stored = tuple[str, str, tuple[int, ...], int, bytes, int, int, float]

@final
class Preview:
    def __call__(self, image: int = 0) -> NDArray[np.uint8]: ...

class Context:
    def __init__(
        self,
        model: str | bytes,
        *,
        components: Mapping[str, str | bytes] = ...,
        data_dir: str | bytes,
        backend: str | None = None,
        threads: int = 0,
        precision: str | None = None,
        prediction: str | None = None,
        lora_mode: str | None = None,
        base_copy: str | None = None,
        requantise: bool = False,
        strict_loras: bool = False,
        lora_cache: int = 0,
        zero_snr: bool | None = None,
        memory_limit: int = 0,
    ) -> None: ...
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def info(self) -> _ModelInfo: ...
    def defaults(self) -> _Defaults: ...
    def fingerprint(self) -> str: ...
    def count_tokens(self, text: str) -> int: ...
    def collect_importance(self, on: bool) -> None: ...
    def importance(self) -> dict[str, tuple[NDArray[np.float64], int]]: ...
    def estimate_memory(
        self, *, width: int, height: int, batch_size: int, cfg_scale: float, vae_tile: int
    ) -> tuple[int, list[tuple[str, int, int]]]: ...
    def learn_words(self, words: Sequence[tuple[str, Sequence[NDArray[np.float32]]]]) -> None: ...
    def generate(
        self,
        *,
        prompts: Sequence[_Spans],
        negative_prompts: Sequence[_Spans],
        width: int,
        height: int,
        steps: int,
        cfg_scale: float,
        seed: int,
        batch_size: int,
        sampler: str | None,
        scheduler: str | None,
        rng: str | None,
        eta: float,
        clip_skip: int,
        init_image: NDArray[np.uint8] | None,
        strength: float,
        mask: NDArray[np.uint8] | None,
        vae_tile: int,
        on_step: Callable[[int, int, Preview], Any] | None,
        loras: Sequence[Sequence[_Lora]] = ...,
        guidance: float = -1.0,
        shift: float = 0.0,
        control_image: NDArray[np.uint8] | None = None,
        guidance_rescale: float = 0.0,
        sizes: tuple[int, int, int, int, int, int] = ...,
        negative_sizes: tuple[int, int, int, int, int, int] = ...,
        reference_image: NDArray[np.uint8] | None = None,
        redux_image: NDArray[np.uint8] | None = None,
        redux_strength: float = 1.0,
    ) -> NDArray[np.uint8]: ...
    def apply_loras(self, loras: Sequence[_Lora]) -> None: ...
    def reset_loras(self) -> None: ...
    def lora_state(self, image: int = 0) -> list[tuple[str, float, float, float, float, float, float]]: ...
    def lora_reports(self) -> list[str]: ...
    def inspect_lora(self, path: str | bytes) -> str: ...
    def lora_drift(self) -> float: ...

class LoraFile:
    def __init__(
        self,
        path: str | bytes,
        outline: Sequence[tuple[str, str, Sequence[int], Sequence[tuple[str, int, int, bool]], bool]],
    ) -> None: ...
    def report(self) -> str: ...
    def stems(self) -> list[dict[str, Any]]: ...
    def read(self, stem: int) -> list[dict[str, Any]]: ...
    def delta(
        self, stem: int, module: int, rows: int, base: NDArray[np.float32] | None = None, multiplier: float = 1.0
    ) -> NDArray[np.float32]: ...

def version() -> str: ...
def build_info() -> str: ...
def samplers() -> list[str]: ...
def schedulers() -> list[str]: ...
def rngs() -> list[str]: ...
def families() -> list[str]: ...
def devices() -> list[_Device]: ...
def add_rpc_devices(endpoint: str) -> None: ...

# Weights in files.
def types() -> list[_Type]: ...
def convert_rows(
    from_type: str,
    data: Buffer,
    to_type: str,
    rows: int,
    row_length: int,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint8]: ...
def list_tensors(
    model: str | bytes, components: Mapping[str, str | bytes] = ...
) -> tuple[list[_Stored], dict[str, str]]: ...
def list_weights(
    model: str | bytes, *, components: Mapping[str, str | bytes] = ..., data_dir: str | bytes
) -> tuple[str, list[_Declared]]: ...

# For tests and tools; free to change.
def probe_run(context: Context, network: str, **arrays: ArrayLike) -> NDArray[np.float32]: ...
def probe_text(context: Context, text: str) -> NDArray[np.float32]: ...
def probe_latent(context: Context) -> NDArray[np.float32]: ...
def probe_weights(context: Context) -> list[_Weight]: ...
def probe_profile(context: Context, on: bool) -> None: ...
def probe_operations(context: Context) -> list[tuple[str, str, int, float, float]]: ...
def probe_peak(context: Context) -> float: ...
def probe_clip_tokens(merges_path: str | bytes, text: str | bytes) -> NDArray[np.int32]: ...
def probe_t5_tokens(path: str | bytes, text: str | bytes, data_dir: str | bytes = "") -> NDArray[np.int32]: ...
def probe_t5(path: str | bytes, ids: ArrayLike, mask: ArrayLike | None = None) -> NDArray[np.float32]: ...
def probe_noise(rng: str, seed: int, n: int) -> NDArray[np.float32]: ...
def probe_sigmas(scheduler: str, steps: int, zero_snr: bool = False) -> NDArray[np.float32]: ...
def probe_sample(
    sampler: str,
    sigmas: ArrayLike,
    denoise: Callable[[NDArray[np.float32], float], ArrayLike],
    x: ArrayLike,
    *,
    rng: str = "cpu",
    seed: int = 0,
    skip: int = 0,
    eta: float = -1.0,
    flow: bool = False,
) -> NDArray[np.float32]: ...
def probe_checkpoint(path: str | bytes, data: bool = True) -> list[tuple[str, str, tuple[int, ...], bytes | int]]: ...
