"""The tiny SD1 model as GGUF files of every weight type that LoRAs have to act on.

What gguf cannot quantise to is made of random blocks, which are as valid as any; what a type's blocks do not fit stays
f16. Beside each file comes what its weights mean, in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import lora_files
import numpy as np
import tiny
from cases import SD1

TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_K", "q6_K")

_GGML = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_K": gguf.GGMLQuantizationType.Q4_K,
    "q6_K": gguf.GGMLQuantizationType.Q6_K,
}
_HALVES = {"q4_K": (0, 2), "q6_K": (208,)}  # where in a block its f16 scales are


def write(path: Path, kind: str, native_context: object) -> tuple[Path, dict[str, np.ndarray]]:
    """A single file under the original names, and the values of its weights by diffusers' names: float32."""
    from sdcpp_py import _native

    names = {w["diffusers_name"]: w["name"] for w in _native.probe_weights(native_context)}  # type: ignore[arg-type]
    writer = gguf.GGUFWriter(path, arch="sd1")
    decoded: dict[str, np.ndarray] = {}
    for component, tensors in tiny.components(SD1).items():
        for name, values in tensors.items():
            whole = f"{component}.{name}"
            as_kind = kind if kind in ("f32", "f16") or (component != "vae" and _fits(values, kind)) else "f16"
            as_kind = "f32" if values.ndim == 1 else as_kind
            stored, meant = _store(whole, values, as_kind)
            if names[whole].startswith("first_stage_model.") and ".attn_1." in names[whole] and values.ndim == 2:
                stored = stored[:, :, None, None]
            raw = None if as_kind in ("f32", "f16") else _GGML[as_kind]
            writer.add_tensor(names[whole], stored, raw_dtype=raw)
            decoded[whole] = meant
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {name: values for name, values in decoded.items() if name in lora_files.base()}


def write_tensors(path: Path, kind: str, tensors: Mapping[str, np.ndarray]) -> Path:
    """A single file of these tensors: networks in this type, the autoencoder and what no block fits in f16."""
    writer = gguf.GGUFWriter(path, arch="sd")
    for name, values in tensors.items():
        fits = not name.startswith("first_stage_model.") and "text_projection" not in name and _fits(values, kind)
        as_kind = "f32" if values.ndim < 2 else kind if fits else "f16"
        stored, _ = _store(name, np.atleast_1d(values), as_kind)
        writer.add_tensor(name, stored, raw_dtype=None if as_kind in ("f32", "f16") else _GGML[as_kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _fits(values: np.ndarray, kind: str) -> bool:
    """Rows of a matrix are whole blocks; tables of embeddings and convolutions stay as they are."""
    block, _ = gguf.GGML_QUANT_SIZES[_GGML[kind]]
    return values.ndim == 2 and values.shape[0] < 10000 and values.shape[1] % block == 0


def _store(name: str, values: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """As the file has it, and what it means."""
    if kind in ("f32", "f16"):
        stored = values.astype(np.float32 if kind == "f32" else np.float16)
        return stored, stored.astype(np.float32)
    raw = _random_blocks(name, values, kind) if kind in _HALVES else gguf.quants.quantize(values, _GGML[kind])
    return raw, gguf.quants.dequantize(raw, _GGML[kind]).astype(np.float32)


def _random_blocks(name: str, values: np.ndarray, kind: str) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[_GGML[kind]]
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (values.shape[0], values.shape[1] // block, size), dtype=np.uint8)
    share: Any = np.float16({"q4_K": 2e-4, "q6_K": 2e-5}[kind])
    for at in _HALVES[kind]:
        blocks[..., at : at + 2] = np.frombuffer(share.tobytes(), np.uint8)
    return blocks.reshape(values.shape[0], -1)
