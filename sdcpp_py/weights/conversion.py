"""Converting a model from one file format or type of weights to another."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .. import check
from ..errors import BadArgument
from ..files import AnyPath, is_same
from ..progress import OnProgress
from . import gguf_file
from .families import PARTS, bare_name, part_of, recognise
from .imatrix import read_imatrix
from .names import single_file_names, with_one_autoencoder
from .source import Source, open_source
from .tensor import Tensor
from .writing import Plan, plan, write


def convert(
    source: AnyPath,
    target: AnyPath,
    *,
    type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    components: Mapping[str, AnyPath] | None = None,
    only: str | None = None,
    drop: Sequence[str] = (),
    imatrix: AnyPath | None = None,
    split: int | None = None,
    metadata: Mapping[str, str] | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Converts a model; the new file takes its name once it is complete, and the source is never written.

    Args:
        source: A .safetensors, .gguf, .ckpt, .pt or .bin file, the first of several, or a diffusers folder.
        target: The file to write: .gguf or .safetensors.
        type: Of the matrices: "q8_0", "q4_K", "f16", …; None: as they are. See ``plan``.
        tensor_types: Pairs of a regular expression and a type, which come before it.
        components: Files with a "vae", "clip_l", … that replace or add to what the source holds.
        only: Write this part alone, as files of one part are named: "denoiser", "vae", "clip_l", "t5xxl", ….
        drop: Regular expressions of names to leave out.
        imatrix: A file that tells which columns of matrices matter, see imatrix.py.
        split: The largest size of a file in bytes; more are named NAME-00001-of-00003.
        metadata: Texts to write besides those of the source.
        threads: None: one per core.
        dry_run: Only plan.
        on_progress: Called with what is done, the whole, and the name of a tensor; False stops.

    Returns:
        What was, or would be, written.

    Raises:
        BadArgument: An argument that does not fit, or a number that the type cannot hold.
        BadFile: A damaged file.
        Unsupported: A file that would have to run programs, or of an unknown layout.
        Cancelled: ``on_progress`` said so.
        Io: A file cannot be read or written.
    """
    path = check.path("target", target)
    components = check.paths_by_role("components", {} if components is None else components)
    metadata = check.text_map("metadata", {} if metadata is None else metadata)
    check.flag("dry_run", dry_run)
    check.callback("on_progress", on_progress)
    with open_source(source, components) as opened:
        if opened.path.is_dir():
            opened = single_file_names(opened, components)
        family = opened.family
        tensors = _without(with_one_autoencoder(opened.tensors, family), check.texts("drop", drop))
        if only is not None:
            tensors = _part(tensors, only, opened.path)
            family = recognise(tensors) or family
        planned = plan(
            tensors,
            path,
            type=type,
            tensor_types=tensor_types,
            metadata={**_texts(opened, path), **metadata},
            values=_values(opened, path),
            family=family,
            importance=None if imatrix is None else read_imatrix(imatrix),
            split=split,
        )
        planned.notes[:0] = [f"left out: {what}" for what in opened.left_out]
        if any(part_of(tensor.name) == "ema" for tensor in tensors):
            planned.notes.append(
                "it holds averaged copies of weights that no one paints with; drop='^model_ema' leaves them out"
            )
        _keep_apart(planned, opened)
        if not dry_run:
            write(planned, threads=threads, on_progress=on_progress)
    return planned


def _without(tensors: Sequence[Tensor], drop: Sequence[str]) -> list[Tensor]:
    kept = list(tensors)
    for text in drop:
        try:
            pattern = re.compile(text)
        except re.error as error:
            raise BadArgument(f"drop: {text!r} is no regular expression ({error})") from error
        left = [tensor for tensor in kept if not pattern.search(tensor.name)]
        if len(left) == len(kept):
            raise BadArgument(f"drop: no tensor has a name that matches {text!r}")
        kept = left
    return kept


def _part(tensors: Sequence[Tensor], only: str, path: Path) -> list[Tensor]:
    check.one_of("only", only, tuple(PARTS))
    found = [tensor for tensor in tensors if part_of(tensor.name) == only]
    if not found:
        there = ", ".join(sorted({part_of(tensor.name) for tensor in tensors}))
        raise BadArgument(f"{path}: has no {only}; it has: {there}")
    return [replace(tensor, name=bare_name(tensor.name)) for tensor in found]


def _texts(source: Source, target: Path) -> dict[str, str]:
    """Metadata to write as texts: of a GGUF file that becomes one again, all values are copied as they are."""
    texts = {} if _stays_gguf(source, target) else source.metadata
    return {key: value for key, value in texts.items() if not key.startswith(gguf_file.OWN_KEYS)}


def _values(source: Source, target: Path) -> dict[str, gguf_file.Value]:
    return gguf_file.read_values(source.files[0]) if _stays_gguf(source, target) else {}


def _stays_gguf(source: Source, target: Path) -> bool:
    return source.path.suffix.lower() == target.suffix.lower() == ".gguf" and source.path.is_file()


def _keep_apart(planned: Plan, source: Source) -> None:
    for path in planned.paths:
        for file in source.files:
            if is_same(path, file):
                raise BadArgument(f"{path}: is a file of the source, which is never overwritten; give another name")
