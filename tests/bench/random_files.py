"""Model files of any size with random weights, written tensor by tensor: what is in memory at a time is one tensor.

Weights are slices of one pool of normal numbers, scaled so that signals neither die nor explode. Of quantised types the
pool is quantised once, and its blocks are dealt out with scaled steps: a transformer of 12 G parameters takes a minute.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
POOL = 1 << 22
STEPS = {"q8_0": 1, "q4_K": 2}  # f16 numbers at the head of a block that scale all of it


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a weight, as tiny.draw has them."""
    leaf = name.rsplit(".", 1)[-1]
    if len(shape) < 2:
        return (1.0 if "norm" in name and leaf in ("weight", "scale") else 0.0), 0.1
    if "embed" in name or "shared" in name or "token_embd" in name:
        return 0.0, 1.0
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


class Draws:
    """Random weights of any shape."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._normal = self._rng.standard_normal(POOL, dtype=np.float32)
        self._blocks: dict[str, np.ndarray] = {}

    def floats(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        mean, deviation = spread(name, shape)
        n = math.prod(shape)
        pool = np.roll(self._normal, int(self._rng.integers(POOL)))[:n]
        return np.resize((pool * np.float32(deviation) + np.float32(mean)).astype(dtype), n).reshape(shape)

    def blocks(self, name: str, shape: tuple[int, ...], kind: str) -> np.ndarray:
        """Bytes: [rows, bytes of a row]."""
        raw = gguf.GGMLQuantizationType[kind.upper()]
        size, width = gguf.GGML_QUANT_SIZES[raw]
        if kind not in self._blocks:
            self._blocks[kind] = quantised(self._normal, kind).reshape(-1, width)
        scaled = self._blocks[kind].copy()
        steps = scaled[:, : 2 * STEPS[kind]].copy().view(np.float16)
        scaled[:, : 2 * STEPS[kind]] = (steps * np.float16(spread(name, shape)[1])).view(np.uint8)
        chosen = self._rng.integers(len(scaled), size=math.prod(shape) // size)
        return scaled[chosen].reshape(*shape[:-1], -1)


def quantised(values: np.ndarray, kind: str) -> np.ndarray:
    """By ggml's own routines, through the engine's converter."""
    import tempfile

    from safetensors.numpy import save_file

    from sdcpp_py.weights import convert

    with tempfile.TemporaryDirectory() as temporary:
        source, target = Path(temporary) / "pool.safetensors", Path(temporary) / "pool.gguf"
        save_file({"pool.weight": values.reshape(-1, 4096)}, source)
        convert(source, target, tensor_types=[("pool", kind)])
        return np.array(gguf.GGUFReader(target).tensors[0].data).reshape(-1)


def write_safetensors(path: Path, shapes: Shapes, dtype: str = "float16") -> None:
    kind = {"float16": "F16", "float32": "F32"}[dtype]
    header, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    draws = Draws()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            draws.floats(name, shape, dtype).tofile(file)


def write_gguf(path: Path, arch: str, shapes: Shapes, kind: str) -> None:
    """Matrices whose rows are whole blocks are of this type, other matrices f16, vectors f32."""
    raw = gguf.GGMLQuantizationType[kind.upper()]
    size, _ = gguf.GGML_QUANT_SIZES[raw]
    f16, f32 = gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32
    types = {name: f32 if len(shape) < 2 else raw if shape[-1] % size == 0 else f16 for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, arch=arch)
    for name, shape in shapes.items():
        block, width = gguf.GGML_QUANT_SIZES[types[name]]
        nbytes = math.prod(shape) // block * width
        row = (*shape[:-1], shape[-1] // block * width)  # the writer counts bytes of a row of blocks
        writer.add_tensor_info(name, row if types[name] == raw else shape,
                               np.dtype({f32: np.float32, f16: np.float16}.get(types[name], np.uint8)),
                               nbytes, types[name] if types[name] == raw else None)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draws = Draws()
    for name, shape in shapes.items():
        if types[name] == raw:
            writer.write_tensor_data(draws.blocks(name, shape, kind))
        else:
            writer.write_tensor_data(draws.floats(name, shape, "float16" if types[name] == f16 else "float32"))
    writer.close()
