"""Opening models to read their tensors one by one: safetensors, GGUF, diffusers folders, and torch's own files."""

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from .. import _native, check
from ..errors import BadFile, Unsupported, from_os_error
from ..files import AnyPath, data_dir
from .families import Family, recognise
from .stand_in import engine_view
from .tensor import TYPES, Tensor
from .torch_file import is_torch_file, read_torch_file


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

    def declared(self, components: Mapping[str, AnyPath]) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """The family, and all weights that the engine looks for in the model, by both of their names.

        Raises:
            Unsupported: The engine knows no such family.
            BadFile: Weights are missing.
        """
        with engine_view(self.path, components, self._handles.read) as view:
            return _native.list_weights(
                os.fsencode(view.path), components=view.engine_components, data_dir=os.fsencode(data_dir())
            )

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
            diffusers folder, be it of .bin files. Files of torch are read without running anything that they hold.
        components: Files of "vae", "clip_l", … that replace or add to what ``path`` holds.

    Raises:
        BadFile: A file is damaged or no model.
        Unsupported: A file that would have to run programs, or of an unknown layout.
        BadArgument: No such component.
        Io: A file cannot be read.
    """
    given = check.path("model", path)
    components = None if components is None else check.paths_by_role("components", components)
    handles = Files()
    if is_torch_file(given) and not components:
        read = read_torch_file(given, handles.read)
        return Source(given, read.tensors, read.metadata, read.left_out, [given], handles)
    with engine_view(given, components, handles.read) as view:
        stored, metadata = _native.list_tensors(os.fsencode(view.path), view.engine_components)
    tensors = []
    for name, type, shape, dims, place, offset, size, scale in stored:
        if dims > 4:
            raise Unsupported(f"{given}: tensor {name!r} has {dims} dimensions; up to 4 are read here")
        file = os.fsdecode(place)
        if (file, offset, size) in view.tensors:
            tensor = replace(view.tensors[file, offset, size], name=name)
        else:
            tensor = _stored(handles, name, type, shape, str(view.files.get(file, [file])[0]), offset)
        tensors.append(tensor if scale == 1 else _scaled(tensor, np.float32(scale)))
    places = dict.fromkeys(os.fsdecode(place) for *_, place, _, _, _ in stored)
    files = [Path(file) for place in places for file in view.files.get(place, [place])]
    return Source(given, tensors, metadata, view.left_out, files, handles)


def _stored(handles: Files, name: str, type: str, shape: tuple[int, ...], file: str, offset: int) -> Tensor:
    tensor = Tensor(name, shape, type, lambda first, last: b"")
    width = TYPES[type].row_bytes(tensor.row_length)
    return replace(tensor, read=lambda first, last: handles.read(file, offset + first * width, (last - first) * width))


def _scaled(tensor: Tensor, scale: np.float32) -> Tensor:
    """8-bit floats that a number of their own multiplies; kept in f16, for their own type has no place for that."""
    return replace(tensor, kept="f16").changed(lambda _, rows: rows * scale)
