"""A LoRA out of the difference between two models."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .. import check
from ..errors import BadArgument
from ..files import AnyPath
from ..progress import OnProgress
from ..weights.writing import PIECE
from . import algebra, spelling
from .by_module import Made, Written, in_parallel, write_modules
from .model import Model
from .outline import NORM, TABLE
from .source import Floats, described
from .spelling import Format
from .tools import threads_of
from .writer import TYPES, safetensors_file


@dataclass
class Extracted(Written):
    """What was taken out of a model.

    Attributes:
        left_out: Parameters that differ and that the format does not have: norms, biases, tables of embeddings.
    """

    left_out: list[str] = field(default_factory=list)


def extract(
    tuned: AnyPath,
    base: AnyPath,
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str | None = None,
    type: str = "f16",
    threads: int | None = None,
    on_step: OnProgress | None = None,
) -> Extracted:
    """Writes the LoRA that brings `base` as near to `tuned` as its rank allows.

    Args:
        tuned: A model: a safetensors or GGUF file, or a diffusers folder.
        base: What it was tuned from, in any of these layouts.
        output: The safetensors file to write.
        rank: Of each module at the most.
        energy: The share of each module's squared singular values to hold, such as 0.95. Of both the lower rank counts.
        to: One of spelling.FORMATS; None: kohya for UNets, diffusers for SD 3 and FLUX.
        type: "f16", "bf16" or "f32".
        threads: Modules at a time; None: as many as there are cores, up to 4.
        on_step: Called with (done, all, name) after each module; False stops.

    Raises:
        BadArgument: The models do not match, do not differ, or an option is out of range.
        BadFile: One of them is damaged.
        Cancelled: `on_step` returned False.
        Io: A file cannot be read or written.
    """
    algebra.check_rank(rank, energy)
    if rank is None and energy is None:
        raise BadArgument("extract: give a rank such as 32, or an energy such as 0.95")
    check.one_of("type", type, TYPES)
    check.callback("on_step", on_step)
    target = check.path("output", output)
    with Model(tuned) as ours, Model(base) as theirs:
        shared = _shared(ours, theirs)
        usual = "kohya" if ours.family in ("sd1", "sd2", "sdxl") else "diffusers"
        format = spelling.format_of(usual if to is None else to, ours.family)
        if format.name == "peft":
            raise BadArgument("extract: writes files; convert --to peft makes a folder of one")
        out = Extracted(str(output), ours.family, format.name)
        told: dict[str, str] = {}

        def make(i: int) -> Made:
            return _make(ours, theirs, i, format, rank, energy, type)

        work = in_parallel(
            make, shared, lambda i: 4 * ours.sizes[i].rows * max(1, ours.sizes[i].columns), threads_of(threads)
        )
        with safetensors_file(target, told) as writer:
            names = [ours.outline.modules[i].name for i in shared]
            out.left_out = write_modules(writer, work, names, out, on_step)
            if not writer.names:
                raise BadArgument(f"{tuned}: does not differ from {base}; there is nothing to take out")
            told |= spelling.metadata(format, ours.family, [], out.ranks, ["lora"])
        return out


def _shared(tuned: Model, base: Model) -> list[int]:
    """The modules of both, which have to match."""
    if tuned.family != base.family:
        raise BadArgument(
            f"{tuned.path}: is a model of {described(tuned.family)}, and {base.path} one of {described(base.family)}"
        )
    names = tuned.outline.place
    if names.keys() != base.outline.place.keys():
        raise BadArgument(f"{tuned.path}: has another number of blocks than {base.path}; they do not match")
    shared = sorted(tuned.sizes.keys() & base.sizes.keys())
    for i in shared:
        mine, other = tuned.sizes[i], base.sizes[i]
        if mine != other:
            raise BadArgument(
                f"{tuned.path}: {tuned.outline.modules[i].name} is {mine.rows}x{mine.columns}, and "
                f"{other.rows}x{other.columns} in {base.path}; they do not match"
            )
    if not shared:
        raise BadArgument(f"{tuned.path}: has no weight in common with {base.path}")
    return shared


def _make(tuned: Model, base: Model, i: int, format: Format, rank: int | None, energy: float | None, type: str) -> Made:
    made = Made()
    module = tuned.outline.modules[i]
    for leaf in ("weight", "bias"):
        if (i, leaf) not in tuned.slices or (i, leaf) not in base.slices:
            continue
        is_vector = leaf == "bias" or module.form == NORM
        unit_rows = tuned.sizes[i].rows // module.units
        if module.form == TABLE or (is_vector and format.peft):
            pieces = _differences(tuned, base, i, leaf, 0, tuned.sizes[i].rows)
            if any(piece.any() for _, piece in pieces):
                made.left_out.append(f"{module.component}.{module.name}.{leaf}")
            continue
        for unit in format.units(tuned.outline, module):
            delta = _difference(tuned, base, i, leaf, unit.first * unit_rows, unit.units * unit_rows)
            if delta is not None:
                if is_vector:
                    made.add(unit, spelling.dense_tensors(format, unit, module, leaf, delta), type)
                    continue
                reduced = algebra.reduce_dense(delta, rank, energy)
                made.add(unit, spelling.pair_tensors(format, unit, module, reduced.pair), type)
                made.add_lost(unit, reduced)
                made.kinds["lora"] += 1
                made.ranks[reduced.pair.rank] += 1
    return made


def _difference(tuned: Model, base: Model, i: int, leaf: str, first: int, rows: int) -> Floats | None:
    """What `tuned` has more than `base` in some rows of a parameter: (rows, columns); None where they are equal."""
    out: Floats | None = None
    for at, piece in _differences(tuned, base, i, leaf, first, rows):
        if out is None and piece.any():
            out = np.zeros((rows, piece.shape[1]), np.float32)
        if out is not None:
            out[at - first : at - first + len(piece)] = piece
    return out


def _differences(tuned: Model, base: Model, i: int, leaf: str, first: int, rows: int) -> Iterator[tuple[int, Floats]]:
    """The same piece by piece, each with its first row."""
    step = max(1, PIECE // max(1, tuned.sizes[i].columns))
    for at in range(first, first + rows, step):
        end = min(at + step, first + rows)
        piece = tuned.weight(i, leaf, at, end) - base.weight(i, leaf, at, end)
        if not np.isfinite(piece).all():
            raise BadArgument(f"{tuned.path}: {tuned.outline.modules[i].name}.{leaf} differs by what is no number")
        yield at, piece
