"""Writing models tensor by tensor: rows are read, converted by several threads, and written in order.

What is in memory at a time is some pieces of a million elements. A file takes its name once it is complete.
"""

import contextlib
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from .. import _native, check
from ..errors import BadArgument, Io, SdcppError, from_os_error
from ..files import check_target, whole_file
from ..progress import OnProgress, tell
from . import gguf_file, safetensors_file
from .families import Family
from .gguf_file import Value
from .rules import Planned, Rules
from .tensor import Floats, Tensor, element_type

PIECE: Final = 1 << 20  # elements that one thread converts at a time
MARGIN: Final = 1 << 20  # bytes of a header, for the check of free space


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        path: The file; of several, what their names are made of.
        container: "gguf" or "safetensors".
        files: The tensors of each file.
        values: Metadata.
        family: Of the model, or None.
        notes: What a user should know, in sentences.
    """

    path: Path
    container: str
    files: list[list[Planned]]
    values: dict[str, Value] | dict[str, str]
    family: Family | None
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> list[Planned]:
        return [planned for file in self.files for planned in file]

    @property
    def bytes(self) -> int:
        """Of all tensors, without headers."""
        return sum(planned.bytes for planned in self.tensors)

    @property
    def paths(self) -> list[Path]:
        """The files that will be written."""
        n = len(self.files)
        return [self.path if n == 1 else split_name(self.path, k + 1, n) for k in range(n)]

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Number of tensors and bytes of each type, the largest first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for planned in self.tensors:
            counts[planned.type.name] += 1
            sizes[planned.type.name] += planned.bytes
        return {name: (counts[name], size) for name, size in sizes.most_common()}


def split_name(path: Path, k: int, n: int) -> Path:
    """The name of file k of n, as llama.cpp and transformers write and expect it."""
    return path.with_name(f"{path.stem}-{k:05}-of-{n:05}{path.suffix}")


def container_of(path: Path) -> str:
    """The format that a file's ending asks for.

    Raises:
        BadArgument: None that is written here.
    """
    ending = path.suffix.lower().lstrip(".")
    if ending not in ("gguf", "safetensors"):
        raise BadArgument(f"{path}: models are written as .gguf or .safetensors, not as {path.suffix or 'a folder'!r}")
    return ending


def plan(
    tensors: Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    metadata: Mapping[str, str] | None = None,
    values: Mapping[str, Value] | None = None,
    family: Family | None = None,
    importance: Mapping[str, Floats] | None = None,
    split: int | None = None,
) -> Plan:
    """Decides how each tensor will be written, without reading any.

    Args:
        tensors: In the order in which they are read and, in GGUF files, written.
        path: The file to write; its ending says how.
        type: Of matrices: "q8_0", "q4_K", "f16", …; None: as they are. Vectors, convolutions and the weights that
            the family names as sensitive stay in 16 or 32 bits where a type is quantised.
        tensor_types: Pairs of a regular expression and a type that come before that; the first that matches counts.
        metadata: Texts to write into the file.
        values: Of GGUF files: values that are copied as they are.
        family: Of the model; see ``families.recognise``.
        importance: A weight per column by the name of a tensor.
        split: The largest size of a file in bytes; None: one file.

    Raises:
        BadArgument: An unknown type or ending, a type that a tensor does not fit, or two tensors of one name.
    """
    target = check.path("target", path)
    container = container_of(target)
    split = check.optional(check.whole, "split", split, 1, check.MOST_BYTES)
    tensor_types = check.text_pairs("tensor_types", tensor_types)
    names = Counter(tensor.name for tensor in tensors)
    if not tensors:
        raise BadArgument(f"{target}: there are no tensors to write")
    if twice := next((name for name, n in names.items() if n > 1), None):
        raise BadArgument(f"{target}: two tensors are called {twice!r}")
    planned = Rules(type, tensor_types, container, family, importance).plan(tensors)
    if container == "safetensors":
        files = _parted(safetensors_file.in_order(planned), split)
        return Plan(target, container, files, dict(metadata or {}), family, _notes(planned))
    kept = {**(values or {}), **gguf_file.values_of(metadata or {})}
    own = _told_first(kept, planned, family, type)
    files = _parted(planned, split)
    return Plan(
        target, container, files, {**own, **{k: v for k, v in kept.items() if k not in own}}, family, _notes(planned)
    )


def _told_first(
    values: Mapping[str, Value], planned: Sequence[Planned], family: Family | None, type: str | None
) -> dict[str, Value]:
    """What readers expect to be told about the file as a whole."""
    sizes: Counter[str] = Counter()
    for one in planned:
        sizes[one.type.name] += one.bytes
    most = sizes.most_common(1)[0][0] if type is None else element_type(type).name
    architecture = gguf_file.text(family.architecture if family else "unknown")
    own = {"general.architecture": values.get("general.architecture", architecture)}
    if most in gguf_file.FILE_TYPES:
        own["general.file_type"] = gguf_file.u32(gguf_file.FILE_TYPES[most])
    if any(one.type.is_quantised for one in planned):
        own["general.quantization_version"] = gguf_file.u32(2)
    return own


def _notes(planned: Sequence[Planned]) -> list[str]:
    notes = []
    narrow = Counter((one.why, one.type.name) for one in planned if one.why.startswith("no blocks"))
    for (why, type), n in narrow.items():
        notes.append(f"{n:,} matrices have rows that are {why}; they become {type}")
    if blind := [one for one in planned if one.why == "no importance matrix"]:
        kinds = ", ".join(sorted({one.type.name for one in blind}))
        notes.append(f"{len(blind):,} matrices become {kinds} without an importance matrix, which costs quality")
    return notes


def _parted(planned: list[Planned], split: int | None) -> list[list[Planned]]:
    if split is None:
        return [planned]
    files: list[list[Planned]] = [[]]
    size = 0
    for one in planned:
        if files[-1] and size + one.bytes > split:
            files.append([])
            size = 0
        files[-1].append(one)
        size += one.bytes
    if len(files) > 99999:
        raise BadArgument(f"split {split}: that makes {len(files):,} files; give a larger size")
    return files


def write(plan: Plan, *, threads: int | None = None, on_progress: OnProgress | None = None) -> list[Path]:
    """Writes the files of a plan and gives their paths.

    Args:
        plan: Of ``plan``.
        threads: That convert; None: one per core. Reading and writing are done by the calling thread.
        on_progress: Called with the elements that are done, all elements, and the name of a tensor; what is false
            but not None stops.

    Raises:
        Cancelled: ``on_progress`` said so; nothing is left behind.
        BadArgument: A number that the type cannot hold.
        BadFile: A source is damaged.
        Io: A file cannot be read or written.
    """
    workers = (os.cpu_count() or 1) if threads is None else check.whole("threads", threads, 1)
    check.callback("on_progress", on_progress)
    _check_space(plan)
    total = sum(planned.tensor.elements for planned in plan.tensors)
    done = 0
    with contextlib.ExitStack() as open_files, ThreadPoolExecutor(workers) as pool:
        for k, (path, planned) in enumerate(zip(plan.paths, plan.files, strict=True)):
            stream = open_files.enter_context(_file(path))
            _put(stream, path, _header(plan, k))
            for one, raw, n, is_last in _converted(planned, pool, workers):
                padding = gguf_file.padding(one.bytes) if is_last and plan.container == "gguf" else 0
                _put(stream, path, raw)
                _put(stream, path, bytes(padding))
                done += n
                tell(on_progress, done, total, one.tensor.name, f"{plan.path}: stopped; nothing was written")
        if plan.container == "safetensors" and len(plan.files) > 1:
            index = plan.path.with_suffix(".safetensors.index.json")
            _put(open_files.enter_context(_file(index)), index, safetensors_file.index(plan.paths, plan.files))
    return plan.paths


@contextlib.contextmanager
def _file(path: Path) -> Iterator[IO[bytes]]:
    try:
        with whole_file(path) as stream:
            yield stream
    except SdcppError:
        raise
    except OSError as error:
        raise from_os_error(path, error) from error


def _put(stream: IO[bytes], path: Path, raw: Any) -> None:
    try:
        stream.write(raw)
    except OSError as error:
        raise from_os_error(path, error) from error


def _header(plan: Plan, k: int) -> bytes:
    if plan.container == "safetensors":
        return safetensors_file.header(plan.values, plan.files[k])  # type: ignore[arg-type]
    values: dict[str, Value] = dict(plan.values) if k == 0 else {}  # type: ignore[arg-type]
    if len(plan.files) > 1:
        values["split.no"] = gguf_file.u16(k)
        values["split.count"] = gguf_file.u16(len(plan.files))
        values["split.tensors.count"] = gguf_file.i32(len(plan.tensors))
    return gguf_file.header(values, plan.files[k])


def _check_space(plan: Plan) -> None:
    folder = plan.path.parent
    check_target(plan.path)
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise from_os_error(folder, error) from error
    if plan.bytes + MARGIN > free:
        raise Io(f"{plan.path}: needs {plan.bytes / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB left")


def _converted(
    planned: Sequence[Planned], pool: ThreadPoolExecutor, workers: int
) -> Iterator[tuple[Planned, Any, int, bool]]:
    """The bytes of all tensors piece by piece, in order, the elements in each, and whether it is a tensor's last."""
    waiting: deque[tuple[Planned, Future[Any], int, bool]] = deque()

    def first_done() -> tuple[Planned, Any, int, bool]:
        one, future, n, is_last = waiting.popleft()
        return one, future.result(), n, is_last

    try:
        for one in planned:
            tensor = one.tensor
            step = max(1, PIECE // max(1, tensor.row_length))
            for first in range(0, max(1, tensor.rows), step):
                last = min(first + step, tensor.rows)
                raw = tensor.read(first, last)
                future = pool.submit(_convert, one, raw, first, last - first)
                waiting.append((one, future, (last - first) * tensor.row_length, last >= tensor.rows))
                if len(waiting) > workers:
                    yield first_done()
        while waiting:
            yield first_done()
    finally:
        for _, future, _, _ in waiting:
            future.cancel()


def _convert(one: Planned, raw: Any, first: int, rows: int) -> Any:
    tensor, target = one.tensor, one.type.name
    if tensor.type == target:
        return raw
    if not one.type.is_float:
        return _widened(raw, tensor.type, target)
    try:
        return _native.convert_rows(tensor.type, raw, target, rows, tensor.row_length, one.importance)
    except SdcppError as error:
        where = f"{tensor.name}, from row {first:,} on" if first else tensor.name
        raise type(error)(f"{where}: {error}") from error


def _widened(raw: Any, own: str, wider: str) -> Any:
    kinds = {"bool": "u1", "u8": "u1", "u16": "<u2", "u32": "<u4", "i8": "i1", "i16": "<i2", "i64": "<i8", "i32": "<i4"}
    return np.frombuffer(raw, kinds[own]).astype(kinds[wider])
