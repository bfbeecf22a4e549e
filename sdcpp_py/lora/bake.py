"""LoRAs into a model's own weights, once and for all: summed in float32 from the unquantised source, then quantised."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from .. import check
from ..errors import BadArgument, Unsupported
from ..files import AnyPath, is_same
from ..progress import OnProgress
from ..prompt import LoraTag
from ..weights import TYPES, Plan, Tensor, plan, write
from ..weights.names import single_file_names, with_one_autoencoder
from . import algebra
from .library import LoraLibrary
from .model import Model, Slice
from .rewrite import Input, base_of, is_matrix
from .source import Change, Floats
from .tools import AnyLora, open_together, read_loras

_SHOWN: Final = 3  # names in a note


def bake(
    model: AnyPath,
    loras: Iterable[AnyLora],
    output: AnyPath,
    *,
    type: str | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    lora_dir: AnyPath | None = None,
    threads: int | None = None,
    dry_run: bool = False,
    on_progress: OnProgress | None = None,
) -> Plan:
    """Writes a model with LoRAs in it, to be used without them.

    Args:
        model: A safetensors or GGUF file, or a diffusers folder; not quantised where the LoRAs change it.
        loras: Paths and ratios, or paths alone; or "x.safetensors:0.7", "x:te=0.5:unet=1:lbw=OUTALL" as for
            ``tools.merge``.
        output: The file to write: .gguf or .safetensors.
        type: Of the matrices: "q8_0", "q4_K", "f16", …; None: as they are. See ``weights.plan``.
        tensor_types: Pairs of a regular expression and a type, which come before it.
        lora_dir: Where LoRAs lie that are named as prompts name them.
        threads: None: one per core.
        dry_run: Only plan.
        on_progress: Called with what is done, the whole, and the name of a tensor; False stops.

    Returns:
        What was, or would be, written, with notes on what the model has no weights for.

    Raises:
        BadArgument: An option is out of range, or a LoRA is for another family.
        BadFile: A file is damaged.
        Unsupported: The model is quantised.
        Cancelled: `on_progress` said so.
        Io: A file cannot be read or written.
    """
    check.callback("on_progress", on_progress)
    check.flag("dry_run", dry_run)
    with Model(model) as base:
        library = LoraLibrary(lora_dir)
        tags = [_located(tag, library) for tag in read_loras(loras)]
        inputs = open_together(tags, None, base)
        target = check.path("output", output)
        for path in (base.path, *(one.source.path for one in inputs)):
            if is_same(target, path):
                raise BadArgument(f"{target}: is one of the files to read; write to another")
        changed = {n: slices for n, slices in _by_tensor(base).items() if _is_changed(slices, inputs)}
        if not changed:
            raise BadArgument(f"{base.path}: has none of the weights that {inputs[0].source.path} changes")
        for n in changed:
            if TYPES[base.tensors[n].type].is_quantised:
                raise Unsupported(
                    f"{base.path}: {base.tensors[n].name} is {base.tensors[n].type}; bake into the model that it was "
                    f"quantised from, and let type= quantise the result"
                )
        sums = _Sums(base, inputs)
        tensors = [
            tensor.changed(_adding(sums, tensor, changed[n])) if n in changed else tensor
            for n, tensor in enumerate(base.tensors)
        ]
        source = replace(base.source, tensors=tensors)
        if base.path.is_dir():
            source = single_file_names(source, {})
        names = ", ".join(f"{one.source.name}:te={one.te:g}:unet={one.unet:g}" for one in inputs)
        planned = plan(
            with_one_autoencoder(source.tensors, source.family),
            target,
            type=type,
            tensor_types=tensor_types,
            metadata={**_texts(base), "modelspec.merged_from": names},
            family=source.family,
        )
        planned.notes.extend(_missing(base, inputs))
        if not dry_run:
            write(planned, threads=threads, on_progress=on_progress)
        return planned


def _located(tag: LoraTag, library: LoraLibrary) -> LoraTag:
    return replace(tag, name=str(library.locate(tag.name if library.folder else Path(tag.name))))


def _texts(model: Model) -> dict[str, str]:
    return {key: value for key, value in model.source.metadata.items() if key.startswith("modelspec.")}


def _by_tensor(model: Model) -> dict[int, list[Slice]]:
    out: dict[int, list[Slice]] = {}
    for slices in model.slices.values():
        for one in slices:
            out.setdefault(one.tensor, []).append(one)
    return out


def _is_changed(slices: Iterable[Slice], inputs: Iterable[Input]) -> bool:
    return any(one.module in lora.source.sizes and lora.has_effect for one in slices for lora in inputs)


def _missing(model: Model, inputs: Iterable[Input]) -> list[str]:
    notes = []
    for lora in inputs:
        absent = [i for i in lora.source.modules() if (i, "weight") not in model.slices]
        if absent:
            names = ", ".join(lora.source.outline.modules[i].name for i in absent[:_SHOWN])
            notes.append(f"{lora.source.name}: changes {len(absent):,} modules that the model does not have, {names} …")
    return notes


@dataclass(frozen=True)
class _Term:
    """What one LoRA adds to some rows of a parameter.

    Attributes:
        first: The first of the rows.
        rows: How many.
        read: Gives some of them: (rows, columns).
    """

    first: int
    rows: int
    read: Callable[[int, int], Floats]


class _Sums:
    """What all LoRAs together add to parameters, some rows at a time; factors of the last one asked for are kept."""

    def __init__(self, model: Model, inputs: Sequence[Input]) -> None:
        self._model, self._inputs = model, inputs
        self._terms = lru_cache(maxsize=1)(self._read)

    def add(self, i: int, leaf: str, first: int, rows: Floats) -> None:
        """Adds to the rows of a parameter from `first` on, (rows, columns), in the original order of rows."""
        for term in self._terms(i, leaf):
            begin, end = max(first, term.first), min(first + len(rows), term.first + term.rows)
            if begin < end:
                rows[begin - first : end - first] += term.read(begin - term.first, end - term.first)

    def _read(self, i: int, leaf: str) -> list[_Term]:
        module = self._model.outline.modules[i]
        present = [(weight, one) for one in self._inputs if i in one.source.sizes and (weight := one.weight(module))]
        return [
            _term(change, np.float32(weight), base_of(change, i, self._model))
            for weight, one in present
            for change in one.source.changes(i)
            if change.leaf == leaf
        ]


def _term(change: Change, weight: np.float32, base: Floats | None) -> _Term:
    """Factors are multiplied when rows are asked for; what has no low rank is made whole."""
    if change.kind == "lora" and base is None and is_matrix(change):
        pair = algebra.exact_pair(change).folded()
        return _Term(change.first, change.rows, lambda first, last: weight * (pair.up[first:last] @ pair.down))
    whole = change.dense(base).reshape(change.rows, -1)
    return _Term(change.first, change.rows, lambda first, last: weight * whole[first:last])


def _adding(sums: _Sums, tensor: Tensor, slices: Sequence[Slice]) -> Callable[[int, Floats], Floats]:
    width = math.prod(tensor.shape[1:])

    def added(top: int, bottom: int) -> Floats:
        """To rows top to bottom - 1 of the tensor as a matrix, (height, width)."""
        out = np.zeros((bottom - top, width), np.float32)
        for one in slices:
            rows, columns = one.shape(tensor).rows, one.shape(tensor).columns
            begin = one.part[0] * rows
            if one.turned:
                whole = np.zeros((rows, columns), np.float32)
                sums.add(one.module, one.leaf, 0, whole)
                out += whole.T[top:bottom]
                continue
            at, end = max(top, begin), min(bottom, begin + rows)
            for first, last in one.runs(at - begin, end - begin, rows) if at < end else ():
                sums.add(one.module, one.leaf, one.first * rows // one.units + first, out[at - top :][: last - first])
                at += last - first
        return out

    def change(first: int, rows: Floats) -> Floats:
        begin, end = first * tensor.row_length, (first + len(rows)) * tensor.row_length  # as elements
        top = begin // width
        flat = added(top, -(-end // width)).reshape(-1)
        rows += flat[begin - top * width : end - top * width].reshape(rows.shape)
        return rows

    return change
