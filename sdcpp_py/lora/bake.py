"""LoRAs into a model's own weights, once and for all: summed in float32 from the unquantised source, then quantised."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from .. import check
from ..errors import BadArgument, Unsupported
from ..files import AnyPath, is_same
from ..prompt import LoraTag
from ..weights import TYPES, Plan, Tensor, plan, write
from ..weights.names import single_file_names
from . import algebra
from .library import LoraLibrary
from .model import Model, Slice
from .rewrite import Input, base_of, is_matrix
from .source import Floats
from .tools import AnyLora, open_together, read_loras

OnProgress = Callable[[int, int, str], Any]
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
    base = Model(model)
    library = LoraLibrary(None if lora_dir is None else check.path("lora_dir", lora_dir))
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
        source.tensors,
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


class _Sums:
    """What all LoRAs together add to a parameter; the last one asked for is kept, as its parts come one by one."""

    def __init__(self, model: Model, inputs: Sequence[Input]) -> None:
        self._model, self._inputs = model, inputs
        self.of = lru_cache(maxsize=1)(self._of)

    def units(self, i: int) -> int:
        """Units of rows of a module."""
        return self._model.outline.modules[i].units

    def _of(self, i: int, leaf: str) -> Floats | None:
        """(rows, columns) in the original order of rows, or None."""
        size, total = self._model.sizes[i], None
        for one in self._inputs:
            weight = one.weight(self._model.outline.modules[i])
            if i not in one.source.sizes or not weight:
                continue
            for change in one.source.changes(i):
                if change.leaf != leaf:
                    continue
                if total is None:
                    total = np.zeros((size.rows, size.columns if is_matrix(change) else 1), np.float32)
                base = base_of(change, i, self._model)
                pair = algebra.exact_pair(change, base) if change.kind == "lora" and base is None else None
                delta = (change.dense(base) if pair is None else pair.dense()).reshape(change.rows, -1)
                total[change.first : change.first + change.rows] += np.float32(weight) * delta
        return total


def _adding(sums: _Sums, tensor: Tensor, slices: Sequence[Slice]) -> Callable[[int, Floats], Floats]:
    @lru_cache(maxsize=1)
    def delta() -> Floats | None:
        out: Floats | None = None
        height = tensor.shape[0]
        for one in slices:
            whole = sums.of(one.module, one.leaf)
            if whole is None:
                continue
            at, of = one.part
            unit = whole.shape[0] // sums.units(one.module)
            rows = whole[one.first * unit : (one.first + one.units) * unit]
            if one.swaps:
                rows = algebra.swap_halves(rows)
            if out is None:
                out = np.zeros((height, math.prod(tensor.shape[1:])), np.float32)
            part = height // of
            out[at * part : (at + 1) * part] = rows
        return out

    def change(first: int, rows: Floats) -> Floats:
        added = delta()
        if added is not None:
            lines = added.reshape(-1, tensor.row_length)
            rows = rows + lines[first : first + len(rows)]
        if first + len(rows) >= tensor.rows:
            delta.cache_clear()
        return rows

    return change
