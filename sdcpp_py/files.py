"""Files: writing them whole or not at all, where what ships lies, and the hashes of models."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final

from .errors import Io, from_os_error

AnyPath = str | os.PathLike[str]

HASH_DIGITS: Final = 10  # what webui shows of a SHA-256


# ---- writing -------------------------------------------------------------------------------------------


def check_target(path: Path) -> None:
    """Says before long work what would fail after it.

    Raises:
        Io: There is no folder to write the file into, or it is a folder itself.
    """
    if not os.path.isdir(path.parent):
        raise Io(f"{path}: there is no folder {path.parent}; make it first")
    if os.path.isdir(path):
        raise Io(f"{path}: is a folder; name a file in it")


def check_regular(path: Path) -> None:
    """Refuses what is there and is no file: a pipe that nobody writes to would be waited for.

    Raises:
        Io: It is a folder, a device or a pipe.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise from_os_error(path, error) from error
    if not stat.S_ISREG(mode):
        raise Io(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'a device or a pipe'}, and no file")


def real_path(path: Path) -> Path:
    """Without links, as far as they lead anywhere."""
    return Path(os.path.realpath(path))


def is_same(a: Path, b: Path) -> bool:
    """Whether both are one file, by whatever names; not where one of them is missing."""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name only once it is complete: written beside and renamed."""
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with beside.open("xb") as stream:
            yield stream
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


# ---- what ships ----------------------------------------------------------------------------------------


def package_folders() -> list[Path]:
    """The folders of this package: one, or two where it is installed editable (sources and built files)."""
    package = sys.modules[__package__ or "sdcpp_py"]
    return [Path(folder) for folder in package.__path__]


def data_dir() -> Path:
    """The folder with the vocabularies."""
    for folder in package_folders():
        if (folder / "data" / "clip_merges.txt").is_file():
            return folder / "data"
    raise Io(f"{package_folders()[0]}: data/clip_merges.txt is missing; install sdcpp_py again")


def shipped_model() -> Path:
    """The small model that comes with the package.

    Raises:
        Io: It is not installed.
    """
    folders = [folder / "models" for folder in package_folders()]
    folders += [
        folder.parent / "models" for folder in package_folders() if (folder.parent / "CMakeLists.txt").is_file()
    ]
    for folder in folders:
        for path in sorted(folder.glob("*.gguf")):
            return path
    raise Io("the model that ships is not installed; name a model file, or install sdcpp_py again")


# ---- hashes --------------------------------------------------------------------------------------------


def model_hash(path: Path) -> str | None:
    """The first 10 digits of the SHA-256 of a model file, as webui's "Model hash".

    Of a diffusers folder it is that of its denoiser's file; None where there is none. Reading 2 GB takes
    seconds, so results are kept in the user's cache folder, by path, size and time of change; those of files that are
    gone are dropped when another one is added.

    Raises:
        Io: The file cannot be read.
    """
    file = _hashed_file(path)
    if file is None:
        return None
    try:
        key, state = os.path.realpath(file), _state(file)
        known = _read_cache()
        if known.get(key, [])[:2] != state:
            known = {name: value for name, value in known.items() if os.path.exists(name)}
            known[key] = [*state, _sha256(file)]
            _write_cache(known)
    except OSError as error:
        raise from_os_error(path, error) from error
    return str(known[key][2])[:HASH_DIGITS]


def state_of(path: Path) -> list[int] | None:
    """Size and time of change of the file that ``model_hash`` reads; None where there is none."""
    file = _hashed_file(path)
    try:
        return None if file is None else _state(file)
    except OSError:
        return None


def _hashed_file(path: Path) -> Path | None:
    return path if not os.path.isdir(path) else next(iter(sorted(path.glob("unet/*.safetensors"))), None)


def models_with_hash(short: str) -> Iterator[Path]:
    """Files that are known by an earlier use, still unchanged, and have this hash."""
    for key, value in _read_cache().items():
        path = Path(key)
        try:
            same = str(value[2]).startswith(short) and value[:2] == _state(path)
        except OSError:
            continue
        if same:
            yield path.parent.parent if path.parent.name == "unet" else path


def _state(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    block = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while n := file.readinto(block):
            digest.update(memoryview(block)[:n])
    return digest.hexdigest()


def _cache_file() -> Path:
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", "~/AppData/Local")
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sdcpp_py" / "hashes.json"


def _read_cache() -> dict[str, list[Any]]:
    """Size, time of change and SHA-256 of files, by their paths; not to be changed."""
    try:
        file = _cache_file()
        return _parsed(file, *_state(file))
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return {}


@lru_cache(maxsize=1)  # it is asked for with every picture
def _parsed(file: Path, size: int, changed: int) -> dict[str, list[Any]]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: value for key, value in known.items() if isinstance(value, list) and len(value) == 3}


def _write_cache(known: dict[str, list[Any]]) -> None:
    try:
        file = _cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as stream:
            stream.write(json.dumps(known).encode())
    except (OSError, RuntimeError):
        pass  # it is computed again next time
