"""Writing safetensors files while their tensors come in: nothing but the one at hand is in memory."""

import contextlib
import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ..errors import BadArgument, Io, Unsupported, from_os_error
from ..files import check_target, whole_file

TYPES: Final = ("f32", "f16", "bf16")
_NAMES: Final = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    out: NDArray[np.uint16] = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return out


def encode(values: NDArray[np.float32], type: str) -> NDArray[np.generic]:
    """The values as a type of TYPES stores them; bf16 as 16-bit integers.

    Raises:
        BadArgument: One is no finite number, or beyond what f16 holds.
    """
    if not np.isfinite(values).all():
        raise BadArgument("a value would be no finite number; is a ratio too large?")
    if type == "bf16":
        return _to_bf16(values)
    if type == "f16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise BadArgument(f"f16 ends at 65504, and a value is {np.abs(values).max():g}; write bf16 or f32")
        return half
    return np.ascontiguousarray(values, np.float32)


def narrowest(values: NDArray[np.float32], type: str) -> str:
    """The source's type where it holds the values exactly, else f32."""
    if type == "f16" and np.abs(values).max(initial=0) <= 65504:
        return "f16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "f32"
    if type == "bf16":
        return "f32" if (np.ascontiguousarray(values).view(np.uint32) & 0xFFFF).any() else "bf16"
    return "f32"


class SafetensorsWriter:
    """Takes tensors one by one and keeps their bytes beside the file until all are there."""

    def __init__(self, data: "tempfile._TemporaryFileWrapper[bytes]") -> None:
        self._data = data
        self._header: dict[str, dict[str, Any]] = {}
        self._size = 0

    @property
    def names(self) -> list[str]:
        """What was written so far."""
        return list(self._header)

    def add(self, name: str, values: NDArray[np.float32], type: str) -> None:
        """Appends a tensor.

        Raises:
            BadArgument: There is one of that name.
        """
        if name in self._header:
            raise BadArgument(f"{name}: would be written twice")
        try:
            raw = encode(values, type)
        except BadArgument as error:
            raise BadArgument(f"{name}: {error}") from error
        self._data.write(raw.tobytes())
        self._header[name] = {
            "dtype": _NAMES[type],
            "shape": list(values.shape),
            "data_offsets": [self._size, self._size + raw.nbytes],
        }
        self._size += raw.nbytes

    def ranks(self) -> dict[str, int]:
        """The rank of each module that has factors in PEFT's names."""
        return {
            name.removesuffix(end): int(entry["shape"][0])
            for name, entry in self._header.items()
            for end in (".lora_A.weight", ".lora_embedding_A")
            if name.endswith(end)
        }

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """The file up to its data."""
        text = json.dumps({"__metadata__": dict(metadata), **self._header}, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


@contextlib.contextmanager
def safetensors_file(path: Path, metadata: Mapping[str, str]) -> Iterator[SafetensorsWriter]:
    """A safetensors file that takes its name only once it is complete.

    Args:
        path: Of the file; what is there is replaced.
        metadata: Read at the end, so that it may tell what was written.

    Raises:
        BadArgument: It has another ending.
        Io: It cannot be written; nothing of it is left then.
    """
    if path.suffix.lower() != ".safetensors":
        raise BadArgument(f"{path}: LoRAs are written as .safetensors, not as {path.suffix or 'a folder'!r}")
    check_target(path)
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part") as data:
            writer = SafetensorsWriter(data)
            yield writer
            with whole_file(path) as stream:
                stream.write(writer.header(metadata))
                data.seek(0)
                shutil.copyfileobj(data, stream, 1 << 20)
                stream.flush()
                os.fsync(stream.fileno())
    except OSError as error:
        if isinstance(error, Io):
            raise
        raise from_os_error(path, error) from error


PEFT_PREFIX: Final = "base_model.model."


@contextlib.contextmanager
def peft_folder(path: Path, metadata: Mapping[str, str]) -> Iterator[SafetensorsWriter]:
    """A folder as PEFT saves adapters: tensors, and a config with the rank of each module. Scales are in lora_B.

    Raises:
        BadArgument: There is something of that name.
        Unsupported: A change has no place there.
        Io: It cannot be written; nothing of it is left then.
    """
    if os.path.lexists(path):
        raise BadArgument(f"{path}: is there already; PEFT's adapters are folders of their own, so name a new one")
    check_target(path)
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        beside.mkdir()
        with safetensors_file(beside / "adapter_model.safetensors", metadata) as writer:
            yield writer
        (beside / "adapter_config.json").write_text(json.dumps(_peft_config(writer), indent=2), encoding="utf-8")
        beside.replace(path)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, Io):
            raise from_os_error(path, error) from error
        raise


def _peft_config(writer: SafetensorsWriter) -> dict[str, object]:
    ranks = {name.removeprefix(PEFT_PREFIX): rank for name, rank in writer.ranks().items()}
    with_norms = {name for name in writer.names if name.endswith(".lora_magnitude_vector")}
    if with_norms and len(with_norms) < len(ranks):
        raise Unsupported(
            "PEFT has DoRA in all modules of an adapter or in none; give a rank, or write it as diffusers"
        )
    if biases := [name for name in writer.names if name.endswith(".bias")]:
        raise Unsupported(f"{biases[0]}: PEFT's folders have no place for some biases alone; write it as diffusers")
    usual = max(ranks.values(), key=list(ranks.values()).count)
    # The first pattern that ends a module's name counts, so "proj_out" comes after "blocks.0.proj_out".
    patterns = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    patterns = {} if set(ranks.values()) == {usual} else patterns
    return {
        "peft_type": "LORA",
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "use_dora": bool(with_norms),
        "bias": "none",
        "inference_mode": True,
    }
