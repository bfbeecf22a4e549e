"""Headers of GGUF files, version 3 (github.com/ggml-org/ggml, docs/gguf.md), and their typed values.

The engine reads such files by itself; here are what a writer needs, and the values that it copies as they are.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from ..errors import BadFile, from_os_error
from .rules import Planned

ALIGNMENT: Final = 32
_U16, _U32, _I32, _STRING, _ARRAY = 2, 4, 5, 8, 9
_WIDTHS: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

# "general.file_type": the type of most weights, as llama.cpp numbers them.
FILE_TYPES: Final = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_K": 10, "q3_K": 12, "q4_K": 15,
    "q5_K": 17, "q6_K": 18, "iq2_xxs": 19, "iq2_xs": 20, "iq3_xxs": 23, "iq1_s": 24, "iq4_nl": 25, "iq3_s": 26,
    "iq2_s": 28, "iq4_xs": 30, "iq1_m": 31, "bf16": 32, "tq1_0": 36, "tq2_0": 37, "mxfp4": 38,
}  # fmt: skip

# Values that the writer decides itself.
OWN_KEYS: Final = ("general.alignment", "general.file_type", "general.quantization_version", "split.")
_NO_VALUES: Final = ("", "format")  # the latter tells readers of safetensors that torch can load them


@dataclass(frozen=True)
class Value:
    """A value as it stands in a file: the number of its type and its bytes."""

    type: int
    raw: bytes


def text(value: str) -> Value:
    return Value(_STRING, _string(value))


def u16(value: int) -> Value:
    return Value(_U16, struct.pack("<H", value))


def u32(value: int) -> Value:
    return Value(_U32, struct.pack("<I", value))


def i32(value: int) -> Value:
    return Value(_I32, struct.pack("<i", value))


def _string(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def header(values: Mapping[str, Value], tensors: Sequence[Planned]) -> bytes:
    """All that stands before the data, padded to the alignment."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        out.append(_string(key) + struct.pack("<I", value.type) + value.raw)
    offset = 0
    for planned in tensors:
        shape = planned.tensor.shape or (1,)
        out.append(_string(planned.tensor.name) + struct.pack("<I", len(shape)))
        out.append(struct.pack(f"<{len(shape)}Q", *reversed(shape)))
        out.append(struct.pack("<IQ", planned.type.number, offset))
        offset += planned.bytes + padding(planned.bytes)
    whole = b"".join(out)
    return whole + bytes(padding(len(whole)))


def padding(size: int) -> int:
    """Bytes that are missing to the next multiple of the alignment."""
    return -size % ALIGNMENT


def read_values(path: Path) -> dict[str, Value]:
    """The values of a file that the engine has read without complaint, but for those that a writer decides.

    Raises:
        BadFile: It is damaged.
        Io: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            magic, version, _, count = struct.unpack("<4sIQQ", file.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise BadFile(f"{path}: is no GGUF file of version 2 or 3")
            return dict(item for item in (_read_value(file) for _ in range(count)) if not item[0].startswith(OWN_KEYS))
    except OSError as error:
        raise from_os_error(path, error) from error
    except (struct.error, KeyError, UnicodeDecodeError) as error:
        raise BadFile(f"{path}: its header is damaged ({error})") from error


def _read_value(file: IO[bytes]) -> tuple[str, Value]:
    key = file.read(struct.unpack("<Q", file.read(8))[0]).decode("utf-8")
    (type,) = struct.unpack("<I", file.read(4))
    begin = file.tell()
    _skip(file, type)
    end = file.tell()
    file.seek(begin)
    return key, Value(type, file.read(end - begin))


def _skip(file: IO[bytes], type: int) -> None:
    if type == _STRING:
        file.seek(struct.unpack("<Q", file.read(8))[0], 1)
    elif type == _ARRAY:
        inner, count = struct.unpack("<IQ", file.read(12))
        if inner in _WIDTHS:
            file.seek(_WIDTHS[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(file, inner)
    else:
        file.seek(_WIDTHS[type], 1)


def values_of(metadata: Mapping[str, Any]) -> dict[str, Value]:
    """Texts as values, but for those that a writer decides."""
    return {
        key: text(str(value))
        for key, value in metadata.items()
        if key not in _NO_VALUES and not key.startswith(OWN_KEYS)
    }
