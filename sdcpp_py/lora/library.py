"""Names of LoRAs to files: what a prompt may name lies inside one folder, wherever links lead.

A name is looked up as it is, then with .safetensors and .gguf behind it, then as the stem of any file below
the folder. A folder that peft or diffusers saved an adapter to counts as a file.
"""

import difflib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .. import check
from ..errors import BadArgument, Io, Unsupported, from_os_error
from ..files import AnyPath
from ..prompt import shown

ENDINGS: Final = (".safetensors", ".gguf")  # in the order in which they are tried
PICKLES: Final = (".pt", ".ckpt", ".bin", ".pth")
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_FILES: Final = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors", ADAPTER_CONFIG)
_DEEPEST: Final = 16  # folders in folders
_SHOWN: Final = 5  # names in a message
_LONGEST: Final = 255  # characters of a name that are compared with others


class LoraLibrary:
    """The LoRAs in one folder and below it.

    Names come from prompts, which anyone may write: they are looked up inside the folder only. Paths that the
    caller's own code gives are taken as they are, see ``locate``.

    Example:
        >>> LoraLibrary("loras").find("style/pencil")  # doctest: +SKIP
        PosixPath('/home/me/loras/style/pencil.safetensors')
    """

    def __init__(self, folder: AnyPath | None) -> None:
        """`folder` None: no name is known.

        Raises:
            BadArgument: `folder` is no path.
            Io: There is no such folder.
        """
        self.folder: Path | None = None
        self._index: dict[str, list[Path]] = {}  # stems and inner paths without ending, to files
        self._changed: dict[Path, int] = {}  # folders of the index, to their times of change
        if folder is None:
            return
        try:
            self.folder = Path(os.path.realpath(check.path("lora_dir", folder), strict=True))
        except OSError as error:
            raise from_os_error(folder, error) from error
        if not self.folder.is_dir():
            raise Io(f"{folder}: is no folder; lora_dir is the folder that LoRAs lie in")

    def names(self) -> list[str]:
        """What prompts may call the LoRAs here, sorted: paths inside the folder, without the ending."""
        self._refresh()
        return sorted({self.name_of(path) for paths in self._index.values() for path in paths})

    def find(self, name: str) -> Path:
        """The real path of the LoRA that a prompt names.

        Raises:
            BadArgument: The name leads out of the folder, means several files or none, or there is no folder.
            Unsupported: It means a pickle.
        """
        name = check.text("LoRA", name)
        if self.folder is None:
            raise BadArgument(f"LoRA {shown(name)}: there is no folder of LoRAs; give lora_dir")
        _check_name(name)
        for candidate in _spellings(self.folder, name):
            found = self._inside(candidate, name)
            if found is not None:
                return found
        return self._by_stem(name)

    def locate(self, source: AnyPath) -> Path:
        """The real path of a LoRA that the caller's own code names, by a path of any place or as ``find``.

        A str that is no absolute path is a name first.

        Raises:
            BadArgument: It is neither, or no regular file.
            Unsupported: It is a pickle.
            Io: It cannot be read.
        """
        path = check.path("loras", source)
        if isinstance(source, os.PathLike) or path.is_absolute():
            return _trusted(path)
        try:
            return self.find(source)
        except BadArgument:
            if (path.suffix.lower() in ENDINGS and os.path.lexists(path)) or is_adapter_folder(path):
                return _trusted(path)
            raise

    def name_of(self, path: Path) -> str:
        """What to call a file in messages and pictures: its path inside the folder, else its own name."""
        if self.folder is not None and path.is_relative_to(self.folder):
            return _without_ending(path.relative_to(self.folder).as_posix())
        return _without_ending(path.name)

    # ---- inside the folder -----------------------------------------------------------------------------

    def _inside(self, candidate: Path, name: str) -> Path | None:
        """The real path where there is a LoRA that does not lead out of the folder; None: nothing there."""
        assert self.folder is not None
        try:
            real = Path(os.path.realpath(candidate, strict=True))
            mode = real.stat().st_mode
        except (OSError, ValueError):  # ValueError: the system cannot spell it
            return None
        if not real.is_relative_to(self.folder):
            raise BadArgument(f"LoRA {shown(name)}: leads out of {self.folder}; copy the file into it")
        if stat.S_ISDIR(mode):
            return self._adapter_folder(real, name)
        if not stat.S_ISREG(mode):
            raise BadArgument(f"LoRA {shown(name)}: {real} is a device or a pipe, and no file")
        return real

    def _adapter_folder(self, folder: Path, name: str) -> Path | None:
        assert self.folder is not None
        if folder == self.folder or not is_adapter_folder(folder):
            return None
        for file in ADAPTER_FILES:
            real = Path(os.path.realpath(folder / file))
            if not real.is_relative_to(self.folder):
                raise BadArgument(f"LoRA {shown(name)}: its {file} leads out of {self.folder}; copy it into it")
            if os.path.lexists(folder / file) and not os.path.isfile(real):
                raise BadArgument(f"LoRA {shown(name)}: {real} is no file")
        return folder

    def _by_stem(self, name: str) -> Path:
        found = self._known(name)
        if len(found) == 1:
            return found[0]
        if found:
            assert self.folder is not None
            names = ", ".join(repr(str(path.relative_to(self.folder).as_posix())) for path in found[:_SHOWN])
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise BadArgument(f"LoRA {shown(name)}: means several files, {names}{more}; name its folder as well")
        pickle = self._pickle(name)
        if pickle:
            raise _is_pickle(pickle)
        near = difflib.get_close_matches(name[:_LONGEST], self.names(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it holds {len(self.names())} LoRAs"
        raise BadArgument(f"no LoRA named {shown(name)} in {self.folder}; {hint}")

    def _known(self, name: str) -> list[Path]:
        """Files of that stem. What is not known, or is gone, is looked for on the disk once more."""
        for again in (False, True):
            self._refresh(again)
            files = {_without_ending(str(path)): path for path in self._index.get(_without_ending(name), [])}
            found = [self._inside(path, name) for path in files.values()]
            there = sorted({path for path in found if path is not None})
            if there:
                return there
        return []

    def _pickle(self, name: str) -> Path | None:
        assert self.folder is not None
        for ending in ("", *PICKLES):
            path = self.folder / (name + ending)
            if path.suffix.lower() in PICKLES and os.path.isfile(path):
                return path
        return None

    def _refresh(self, even_if_unchanged: bool = False) -> None:
        if self.folder is None or (self._changed and not even_if_unchanged and not self._is_old()):
            return
        self._index, self._changed = {}, {}
        for path in self._walk(self.folder, _DEEPEST):
            inner = _without_ending(path.relative_to(self.folder).as_posix())
            for key in {inner, _without_ending(path.name)}:
                self._index.setdefault(key, []).append(path)

    def _is_old(self) -> bool:
        try:
            return any(folder.stat().st_mtime_ns != time for folder, time in self._changed.items())
        except OSError:
            return True

    def _walk(self, folder: Path, depth: int) -> Iterator[Path]:
        """LoRAs at and below a folder; links to folders are not followed, so that there are no circles."""
        try:
            self._changed[folder] = folder.stat().st_mtime_ns
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:  # no permission, or gone
            return
        for entry in found:
            path = Path(entry.path)
            if entry.is_dir(follow_symlinks=False):
                if is_adapter_folder(path):
                    yield path
                elif depth:
                    yield from self._walk(path, depth - 1)
            elif path.suffix.lower() in ENDINGS and self._is_ours(path):
                yield path

    def _is_ours(self, path: Path) -> bool:
        assert self.folder is not None
        try:
            return os.path.isfile(path) and path.resolve().is_relative_to(self.folder)
        except (OSError, RuntimeError):  # a circle of links
            return False


def is_adapter_folder(path: Path) -> bool:
    """Whether peft or diffusers saved an adapter to this folder."""
    return any(os.path.isfile(path / name) for name in (ADAPTER_CONFIG, "pytorch_lora_weights.safetensors"))


def _check_name(name: str) -> None:
    """Refuses what could mean a place outside of the folder on any system.

    Raises:
        BadArgument: It could.
    """
    why = None
    if not name.strip():
        why = "is empty"
    elif "\0" in name:
        why = "has a NUL character"
    elif "\\" in name:
        why = "has a backslash; folders are separated by /"
    elif name.startswith("/") or re.match(r"[A-Za-z]:", name):
        why = "is a path of the whole system; name a file inside the folder of LoRAs"
    elif any(part in ("", ".", "..") for part in name.split("/")):
        why = "leads out of the folder of LoRAs" if ".." in name.split("/") else "has an empty part"
    if why:
        raise BadArgument(f"LoRA {shown(name)}: {why}")


def _spellings(folder: Path, name: str) -> Iterator[Path]:
    """The name itself where it has an ending or means a folder, then with endings."""
    exact = folder / name
    if exact.suffix.lower() in ENDINGS or os.path.isdir(exact):
        yield exact
    for ending in ENDINGS:
        yield folder / (name + ending)


def _without_ending(name: str) -> str:
    base, ending = os.path.splitext(name)
    return base if ending.lower() in ENDINGS else name


def _trusted(path: Path) -> Path:
    """A path of the caller's own code, which may be anywhere."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        mode = real.stat().st_mode
    except OSError as error:
        raise from_os_error(path, error) from error
    if real.suffix.lower() in PICKLES and stat.S_ISREG(mode):
        raise _is_pickle(real)
    if stat.S_ISDIR(mode) and not is_adapter_folder(real):
        raise BadArgument(f"{path}: is a folder without {ADAPTER_CONFIG}; name a LoRA file in it")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise BadArgument(f"{path}: is a device or a pipe, and no file")
    return real


def _is_pickle(path: Path) -> Unsupported:
    return Unsupported(
        f"{path}: is a pickle, which may run any program when it is opened; load it where you trust it "
        "and save it as .safetensors"
    )
