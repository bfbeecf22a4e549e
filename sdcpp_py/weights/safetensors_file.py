"""Headers of safetensors files (github.com/huggingface/safetensors, README)."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from .rules import Planned

NAMES: Final = {
    "f64": "F64", "f32": "F32", "f16": "F16", "bf16": "BF16", "f8_e4m3": "F8_E4M3", "f8_e5m2": "F8_E5M2",
    "i64": "I64", "i32": "I32", "i16": "I16", "i8": "I8", "u64": "U64", "u32": "U32", "u16": "U16", "u8": "U8",
    "bool": "BOOL",
}  # fmt: skip
_ALIGNMENT: Final = 8  # of the data in the file, so that what maps it can use it


def header(metadata: Mapping[str, str], tensors: Sequence[Planned]) -> bytes:
    """All that stands before the data."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for planned in tensors:
        end = offset + planned.bytes
        entries[planned.tensor.name] = {
            "dtype": NAMES[planned.type.name],
            "shape": list(planned.tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def in_order(tensors: Sequence[Planned]) -> list[Planned]:
    """The widest elements first, as the reference implementation writes them, so that all are aligned."""
    return sorted(tensors, key=lambda planned: (-planned.type.block_bytes, planned.tensor.name))


def index(paths: Sequence[Path], files: Sequence[Sequence[Planned]]) -> bytes:
    """The file that tells which of several holds what, as transformers and diffusers read it."""
    where = {one.tensor.name: path.name for path, file in zip(paths, files, strict=True) for one in file}
    size = sum(one.bytes for file in files for one in file)
    entries = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    return json.dumps(entries, indent=2).encode("utf-8")
