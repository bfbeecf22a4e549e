"""What a model file holds: family, parts, types, sizes, metadata, and what is missing to paint with it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from .. import _native, check
from ..errors import BadFile, SdcppError, Unsupported
from ..files import AnyPath, data_dir
from .families import part_of
from .source import open_source

LONGEST_VALUE = 200  # characters of a metadata value that are shown


@dataclass(frozen=True)
class Holdings:
    """How much of something a file holds."""

    tensors: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class FileInfo:
    """What a model file holds.

    Attributes:
        family: As the names of its tensors tell: "sd1"; None where they tell nothing known.
        paints: Whether the engine can paint with it and the components given apart.
        missing: Why not, in a sentence; "".
        whole: All of it.
        parts: By part of the model: "denoiser", "vae", "clip_l", …
        types: By type of elements.
        metadata: As text.
        left_out: What the file holds besides, in words.
    """

    family: str | None
    paints: bool
    missing: str
    whole: Holdings
    parts: dict[str, Holdings]
    types: dict[str, Holdings]
    metadata: dict[str, str]
    left_out: list[str]


def describe(path: AnyPath, components: Mapping[str, AnyPath] = MappingProxyType({})) -> FileInfo:
    """Looks into a model file or folder; reads nothing but headers.

    Args:
        path: The file or folder.
        components: Files that the engine would be given beside it, by role: "vae", "clip_l", …

    Raises:
        BadFile: It is damaged.
        Unsupported: It would have to run programs.
        Io: It cannot be read.
    """
    apart = check.paths_by_role("components", components)
    with open_source(path) as source:
        family = source.family
        parts: dict[str, list[tuple[int, int]]] = {}
        types: dict[str, list[tuple[int, int]]] = {}
        for tensor in source.tensors:
            size = (tensor.elements, tensor.bytes)
            parts.setdefault(part_of(tensor.name), []).append(size)
            types.setdefault(tensor.type, []).append(size)
        missing = _missing(source.path, apart)
        return FileInfo(
            family.name if family else None,
            not missing,
            missing,
            _sum([size for sizes in types.values() for size in sizes]),
            _largest_first(parts),
            _largest_first(types),
            source.metadata,
            source.left_out,
        )


def _missing(path: Path, components: Mapping[str, Path]) -> str:
    """What the engine says against painting with it; the path in front of its sentence is left out."""
    try:
        apart = {role: os.fsencode(of) for role, of in components.items()}
        _native.list_weights(os.fsencode(path), components=apart, data_dir=os.fsencode(data_dir()))
    except (BadFile, Unsupported) as error:
        return str(error).removeprefix(f"{path}: ")
    except SdcppError as error:
        return str(error)
    return ""


def _sum(sizes: list[tuple[int, int]]) -> Holdings:
    return Holdings(len(sizes), sum(elements for elements, _ in sizes), sum(size for _, size in sizes))


def _largest_first(groups: dict[str, list[tuple[int, int]]]) -> dict[str, Holdings]:
    summed = {name: _sum(sizes) for name, sizes in groups.items()}
    return dict(sorted(summed.items(), key=lambda item: -item[1].bytes))
