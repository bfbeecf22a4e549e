"""Files as torch.save writes them, made by hand: torch need not be there, and hostile ones are made as easily."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value) if -(2**31) <= value < 2**31 else b"\x8a\x08" + struct.pack("<q", value)


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def call(function: str, arguments: bytes) -> bytes:
    """A call of "module.name" with a tuple."""
    module, _, name = function.rpartition(".")
    return f"c{module}\n{name}\n".encode() + arguments + b"R"


def tensor(key: str, kind: str, elements: int, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> bytes:
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(elements) + b"tQ"
    hooks = call("collections.OrderedDict", b")")
    return call(
        "torch._utils._rebuild_tensor_v2",
        b"(" + storage + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + hooks + b"t",
    )


def array(key: str, values: np.ndarray) -> bytes:
    strides = [stride // values.itemsize for stride in values.strides]
    return tensor(key, STORAGES[values.dtype.name], values.size, values.shape, strides)


def program(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def archive(path: Path, code: bytes, storages: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The zip file of a program and its storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as members:
        members.writestr("archive/data.pkl", code)
        members.writestr("archive/byteorder", "little")
        for key, raw in storages.items():
            members.writestr(f"archive/data/{key}", raw)
        members.writestr("archive/version", "3\n")
    path.write_bytes(buffer.getvalue())
    return path


def save(path: Path, tensors: Mapping[str, np.ndarray], *, below: str | None = "state_dict") -> Path:
    """A checkpoint with these tensors, in a dictionary of their own."""
    items = {name: array(str(k), values) for k, (name, values) in enumerate(tensors.items())}
    body = dictionary(items) if below is None else dictionary({below: dictionary(items), "epoch": number(3)})
    storages = {str(k): np.ascontiguousarray(values).tobytes() for k, values in enumerate(tensors.values())}
    return archive(path, program(body), storages)
