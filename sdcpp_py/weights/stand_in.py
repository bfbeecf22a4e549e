"""How the engine, which opens no pickles, comes to know a model of torch's files: by stand-ins.

A stand-in is a safetensors file with the same tensors in its header and a hole for their data. The engine lists its
tensors, with all that it knows about components and names, and what is read comes from the file that it stands for.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..errors import BadFile, SdcppError, from_os_error
from ..files import AnyPath
from . import safetensors_file
from .rules import Planned
from .tensor import TYPES, Tensor
from .torch_file import Read, is_torch_file, read_torch_file

_COMPONENTS: Final = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3", "scheduler")
_BEFORE: Final = ("diffusion_pytorch_model", "pytorch_model")  # as diffusers and transformers saved pickles
_LARGEST_CONFIG: Final = 16 << 20


@dataclass
class View:
    """What to give to the engine in place of files.

    Attributes:
        path: Of the model.
        components: By their roles.
        tensors: Those of torch, by file, offset and bytes in a stand-in.
        files: The file that each stand-in is for; with several, the others follow.
        left_out: What files of torch hold besides, in words.
    """

    path: Path
    components: dict[str, Path]
    tensors: dict[tuple[str, int, int], Tensor] = field(default_factory=dict)
    files: dict[str, list[Path]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def engine_components(self) -> dict[str, bytes]:
        return {role: os.fsencode(path) for role, path in self.components.items()}


@contextlib.contextmanager
def engine_view(path: AnyPath, components: Mapping[str, AnyPath] | None, read: Read) -> Iterator[View]:
    """Stand-ins, as long as the engine needs them, for what is torch's; anything else stays as it is.

    Args:
        path: Of a model.
        components: Files or folders by their roles.
        read: Gives bytes of a file: path, offset, size.

    Raises:
        BadFile: A file of torch is damaged.
        Unsupported: It would have to run programs.
        Io: A file cannot be read.
    """
    given = {"": Path(path), **{role: Path(part) for role, part in (components or {}).items()}}
    with contextlib.ExitStack() as stack:
        view = View(given[""], {role: part for role, part in given.items() if role})
        named: dict[str, Path] = {}  # what errors shall say instead
        for number, (role, part) in enumerate(given.items()):
            if not (is_torch_file(part) or _has_pickles(part)):
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sdcpp-")))
            try:
                at = _stand_for(part, folder / f"{number}", view, read)
            except OSError as error:
                raise from_os_error(part, error) from error
            named[str(at)] = part
            if role:
                view.components[role] = at
            else:
                view.path = at
        try:
            yield view
        except SdcppError as error:
            text = str(error)
            for at_text, part in named.items():
                text = text.replace(at_text, str(part))
            raise type(error)(text) from error


def _has_pickles(folder: Path) -> bool:
    """Whether it is a diffusers folder, or one component of such, with weights that only torch's files hold."""
    return folder.is_dir() and any(_pickles(part) for part in _parts(folder))


def _parts(folder: Path) -> list[Path]:
    return [folder, *(folder / name for name in _COMPONENTS if (folder / name).is_dir())]


def _pickles(folder: Path) -> list[Path]:
    """The files of torch that hold a component's weights; none where safetensors files do."""
    if any(folder.glob("*.safetensors")):
        return []
    for stem in _BEFORE:
        index = folder / f"{stem}.bin.index.json"
        if index.is_file():
            return [folder / name for name in _listed(index)]
        for ending in (".bin", ".fp16.bin"):
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
    return []


def _listed(index: Path) -> list[str]:
    """The files that an index names, which lie beside it."""
    try:
        where = json.loads(index.read_bytes()[:_LARGEST_CONFIG])["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadFile(f"{index}: has no weight_map of file names; the file is damaged") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise BadFile(f"{index}: names the file {name!r}, which is not in its own folder; refused")
    return names


def _stand_for(part: Path, at: Path, view: View, read: Read) -> Path:
    if not part.is_dir():
        target = at.with_suffix(".safetensors")
        _write(target, [part], view, read)
        return target
    for folder in _parts(part):
        inner = at / folder.relative_to(part)
        inner.mkdir(parents=True, exist_ok=True)
        for config in folder.glob("*.json"):
            if config.stat().st_size <= _LARGEST_CONFIG:
                shutil.copyfile(config, inner / config.name)
        for file in folder.glob("*.safetensors"):
            _link(file, inner / file.name)
            view.files[str(inner / file.name)] = [file]
        if pickles := _pickles(folder):
            _write(inner / "model.safetensors", pickles, view, read)
    return at


def _write(target: Path, files: Sequence[Path], view: View, read: Read) -> None:
    """A stand-in for all tensors of some files of torch."""
    tensors: list[Tensor] = []
    for file in files:
        opened = read_torch_file(file, read)
        tensors += opened.tensors
        view.left_out += opened.left_out
    names = Counter(tensor.name for tensor in tensors)
    if twice := next((name for name, n in names.items() if n > 1), None):
        raise BadFile(f"{files[0].parent}: two of its files hold the tensor {twice!r}; one of them has to go")
    planned = safetensors_file.in_order([Planned(tensor, TYPES[tensor.type]) for tensor in tensors])
    header = safetensors_file.header({}, planned)
    offset = len(header)
    with target.open("wb") as stream:
        stream.write(header)
        for one in planned:
            view.tensors[str(target), offset, one.bytes] = one.tensor
            if one.tensor.elements == 1:  # the engine looks into these: they may be scales of 8-bit floats
                stream.seek(offset)
                stream.write(bytes(one.tensor.read(0, 1)))
            offset += one.bytes
        stream.truncate(offset)
    view.files[str(target)] = list(files)


def _link(file: Path, target: Path) -> None:
    try:
        target.symlink_to(file.absolute())
    except (OSError, NotImplementedError):  # Windows lets few users make links
        shutil.copyfile(file, target)
