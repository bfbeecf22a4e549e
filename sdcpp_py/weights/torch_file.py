"""Files that torch.save wrote (.ckpt, .pt, .pth, .bin), read without running anything that they hold.

Such a file is a zip archive: ``NAME/data.pkl`` is a program that builds dictionaries of tensors, see torch_pickle.py,
and ``NAME/data/K`` are the bytes of storage K.
"""

import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..errors import BadFile, Unsupported, from_os_error
from .tensor import TYPES, Tensor
from .torch_pickle import Laid, Machine, Opaque

LARGEST_PROGRAM: Final = 256 << 20  # bytes; that of a checkpoint with its optimizer is 2 MB
DEEPEST: Final = 100  # containers in containers
MOST_VALUES: Final = 500_000  # in containers; a container may stand in another more than once
LONGEST_NAME: Final = 1000

Read = Callable[[str, int, int], bytearray]


@dataclass
class TorchFile:
    """What a file holds."""

    tensors: list[Tensor]
    metadata: dict[str, str]
    left_out: list[str]


def is_torch_file(path: Path) -> bool:
    """Whether a file begins as torch's do, of this format or of older ones.

    Raises:
        Io: It cannot be read.
    """
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError as error:
        raise from_os_error(path, error) from error
    return begin.startswith(b"PK\x03\x04") or _is_pickle(begin) or _is_tar(begin)


def _is_safetensors(begin: bytes) -> bool:
    """A header of 640 bytes, for one, begins as a pickle does."""
    return begin[8:9] == b"{"


def _is_pickle(begin: bytes) -> bool:
    return len(begin) > 1 and begin[0] == 0x80 and begin[1] <= 5 and not _is_safetensors(begin)


def _is_tar(begin: bytes) -> bool:
    return begin[257:262] == b"ustar"


def read_torch_file(path: Path, read: Read) -> TorchFile:
    """The tensors of a file, under the names of the dictionaries that they stand in, joined by dots.

    Where there is a "state_dict", as training programs write it, its content alone counts.

    Args:
        path: The file.
        read: Gives bytes of a file: path, offset, size.

    Raises:
        BadFile: It is damaged.
        Unsupported: It calls a function that makes no tensor, or is of a format of before torch 1.6.
        Io: It cannot be read.
    """
    root, archive = read_object(path)
    tensors: list[Tensor] = []
    left_out: list[str] = []
    if isinstance(root, dict) and isinstance(root.get("state_dict"), dict):
        besides = {key: sum(1 for _ in _leaves(value, path)) for key, value in root.items() if key != "state_dict"}
        left_out = [f"{key} ({n:,} tensors)" for key, n in besides.items() if n]
        root = root["state_dict"]
    for name, laid in named_tensors(root, path):
        tensors.append(archive.tensor(name, laid, read))
    if not tensors:
        raise BadFile(f"{path}: holds no tensors; is it a model?")
    return TorchFile(tensors, {}, left_out)


def read_object(path: Path) -> "tuple[Any, Archive]":
    """What the program of a file makes, and the archive that its tensors lie in."""
    archive = Archive(path)
    return Machine(path).run(archive.program()), archive


def named_tensors(root: Any, path: Path) -> list[tuple[str, Laid]]:
    """All tensors below an object, by the path of keys that leads to them."""
    out: dict[str, Laid] = {}
    for keys, laid in _leaves(root, path):
        name = ".".join(map(str, keys))
        if len(name) > LONGEST_NAME:
            raise BadFile(f"{path}: holds a tensor with a name of {len(name):,} characters; the file is damaged")
        if out.setdefault(name, laid) is not laid:
            raise BadFile(f"{path}: holds two tensors by the name {name!r}; the file is damaged")
    return list(out.items())


def _leaves(root: Any, path: Path) -> Iterator[tuple[tuple[str | int, ...], Laid]]:
    """The tensors below an object and the keys that lead to them, in order."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), root)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return
        keys, value = waiting.pop()
        if isinstance(value, Laid):
            yield keys, value
        inside = value.state if isinstance(value, Opaque) else value
        if not isinstance(inside, (dict, list, tuple)):
            continue
        if len(keys) >= DEEPEST:
            raise BadFile(f"{path}: has containers in containers beyond {DEEPEST}; the file is damaged")
        children = list(inside.items() if isinstance(inside, dict) else enumerate(inside))
        waiting += [((*keys, key), child) for key, child in reversed(children) if isinstance(key, (str, int))]
    raise BadFile(f"{path}: has more than {MOST_VALUES:,} values in its containers; it is no model")


# ---- the archive ---------------------------------------------------------------------------------------


class Archive:
    """The zip archive: where its members lie. Members are stored, never compressed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                begin = file.read(512)
                if _is_pickle(begin) or _is_tar(begin):
                    what = "a bare pickle" if _is_pickle(begin) else "a tar archive"
                    raise Unsupported(
                        f"{path}: is {what}, the format of torch before 1.6 (2020) or a pickle of another program; "
                        "it is not read here. Load it with torch.load(…, weights_only=True) and save it as safetensors"
                    )
                with zipfile.ZipFile(file) as archive:
                    members = {info.filename: info for info in archive.infolist()}
                    if len(members) != len(archive.infolist()):
                        raise BadFile(f"{path}: has two members of one name in its archive; the file is damaged")
                    self._members = {name: self._place(file, info) for name, info in members.items()}
        except OSError as error:
            raise from_os_error(path, error) from error
        except (zipfile.BadZipFile, struct.error, UnicodeDecodeError, ValueError, NotImplementedError) as error:
            raise BadFile(f"{path}: its archive is damaged ({error}); the download was probably cut") from error
        programs = [name for name in self._members if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(programs) != 1:
            raise BadFile(f"{path}: is a zip archive without a data.pkl; is it a model that torch saved?")
        self._root = programs[0].removesuffix("data.pkl")
        order = self._members.get(f"{self._root}byteorder")
        if order and self._bytes(*order) != b"little":
            raise Unsupported(f"{path}: was saved on a big-endian machine; convert it there")

    def _place(self, file: Any, info: zipfile.ZipInfo) -> tuple[int, int]:
        """Offset and size of a member's bytes."""
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Unsupported(f"{self._path}: {info.filename} is compressed; torch saves without, so save it anew")
        file.seek(info.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise BadFile(f"{self._path}: has no member at byte {info.header_offset:,}; the file is damaged")
        name, extra = struct.unpack("<HH", header[26:30])
        begin = info.header_offset + 30 + name + extra
        if begin + info.file_size > self._path.stat().st_size:
            raise BadFile(f"{self._path}: ends inside of {info.filename}; the download was probably cut")
        return begin, info.file_size

    def _bytes(self, offset: int, size: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise from_os_error(self._path, error) from error

    def program(self) -> bytes:
        offset, size = self._members[f"{self._root}data.pkl"]
        if size > LARGEST_PROGRAM:
            raise BadFile(f"{self._path}: its pickle has {size:,} bytes; those of models have some megabytes at most")
        return self._bytes(offset, size)

    def tensor(self, name: str, laid: Laid, read: Read) -> Tensor:
        """A tensor that reads its rows from the archive.

        Raises:
            BadFile: It does not lie inside of its storage.
        """
        where = f"{self._path}: tensor {name!r}"
        kind = TYPES[laid.storage.type]
        member = self._members.get(f"{self._root}data/{laid.storage.key}")
        if member is None:
            raise BadFile(f"{where} lies in storage {laid.storage.key!r}, which is missing; the file is damaged")
        begin, size = member
        have = size // kind.block_bytes
        elements = math.prod(laid.shape)
        reach = sum((length - 1) * stride for length, stride in zip(laid.shape, laid.strides, strict=True))
        if elements and (laid.offset + reach >= have or elements > have):
            raise BadFile(
                f"{where} of shape {list(laid.shape)} reaches beyond the {have:,} elements of its storage; "
                "the file is damaged"
            )
        if len(laid.shape) > 4:
            raise Unsupported(f"{where} has {len(laid.shape)} dimensions; up to 4 are read here")
        path, width = str(self._path), kind.block_bytes
        begin += laid.offset * width
        length = laid.shape[-1] if laid.shape else 1

        def rows(first: int, last: int) -> Any:
            return read(path, begin + first * length * width, (last - first) * length * width)

        def strided(first: int, last: int) -> Any:
            raw = np.frombuffer(read(path, begin, (reach + 1) * width), f"V{width}")
            steps = [stride * width for stride in laid.strides]
            whole = np.lib.stride_tricks.as_strided(raw, laid.shape, steps, writeable=False)
            return whole.reshape(-1, length)[first:last].tobytes()

        return Tensor(name, laid.shape, kind.name, rows if elements == 0 or _is_contiguous(laid) else strided)


def _is_contiguous(laid: Laid) -> bool:
    step = 1
    for length, stride in zip(reversed(laid.shape), reversed(laid.strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True
