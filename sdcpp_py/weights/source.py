"""Opening models to read their tensors one by one: safetensors, GGUF, diffusers folders, and torch's own files."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO

from .. import _native
from ..errors import BadFile, Unsupported, from_os_error
from .families import Family, recognise
from .tensor import TYPES, Tensor
from .torch_file import is_torch_file, read_torch_file

AnyPath = str | os.PathLike[str]


class Files:
    """Files that stay open while tensors are read from them."""

    def __init__(self) -> None:
        self._open: dict[str, IO[bytes]] = {}
        self._lock = threading.Lock()

    def read(self, path: str, offset: int, size: int) -> bytearray:
        """That many bytes from there.

        Raises:
            BadFile: The file ends before.
            Io: It cannot be read.
        """
        out = bytearray(size)
        try:
            with self._lock:
                if path not in self._open:
                    self._open[path] = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
                file = self._open[path]
                file.seek(offset)
                at = 0
                while at < size and (n := file.readinto(memoryview(out)[at:])):  # type: ignore[attr-defined]
                    at += n
                have = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise from_os_error(path, error) from error
        if at < size:
            raise BadFile(
                f"{path}: has {have:,} bytes, not the {offset + size:,} that it had; was it changed meanwhile?"
            )
        return out

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()


@dataclass
class Source:
    """A model's tensors and metadata. Nothing but headers is read before a tensor is asked for its rows.

    Attributes:
        path: The file or folder.
        tensors: In the order of the files.
        metadata: As text.
        left_out: What the file holds besides, in words.
        files: All files that the tensors lie in.
    """

    path: Path
    tensors: list[Tensor]
    metadata: dict[str, str]
    left_out: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    _handles: Files = field(default_factory=Files, repr=False)

    @property
    def family(self) -> Family | None:
        """What the names of the tensors tell; None where that is nothing known."""
        return recognise(self.tensors)

    def close(self) -> None:
        self._handles.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_source(path: AnyPath, components: Mapping[str, AnyPath] | None = None) -> Source:
    """Opens a model to read its tensors.

    Args:
        path: A .safetensors, .gguf, .ckpt, .pt, .pth or .bin file, the first of several that it was split into, or a
            diffusers folder. Files of torch are read without running anything that they hold.
        components: Files of "vae", "clip_l", … that replace or add to what ``path`` holds.

    Raises:
        BadFile: A file is damaged or no model.
        Unsupported: A file that would have to run programs, or of an unknown layout.
        BadArgument: No such component.
        Io: A file cannot be read.
    """
    given = Path(path)
    handles = Files()
    if is_torch_file(given):
        read = read_torch_file(given, handles.read)
        if components:
            raise BadFile(f"{given}: components can be added to safetensors, GGUF and folders; convert this file first")
        return Source(given, read.tensors, read.metadata, read.left_out, [given], handles)
    parts = {role: os.fsencode(Path(part)) for role, part in (components or {}).items()}
    stored, metadata = _native.list_tensors(os.fsencode(given), parts)
    tensors = []
    for name, type, shape, dims, file, offset, _ in stored:
        if dims > 4:
            raise Unsupported(f"{given}: tensor {name!r} has {dims} dimensions; up to 4 are read here")
        tensors.append(_stored(handles, name, type, shape, os.fsdecode(file), offset))
    files = [Path(os.fsdecode(file)) for file in dict.fromkeys(file for *_, file, _, _ in stored)]
    return Source(given, tensors, metadata, [], files, handles)


def _stored(handles: Files, name: str, type: str, shape: tuple[int, ...], file: str, offset: int) -> Tensor:
    tensor = Tensor(name, shape, type, lambda first, last: b"")
    width = TYPES[type].row_bytes(tensor.row_length)
    return replace(tensor, read=lambda first, last: handles.read(file, offset + first * width, (last - first) * width))
