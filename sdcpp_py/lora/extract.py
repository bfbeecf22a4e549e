"""A LoRA out of the difference between two models."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from .. import check
from ..errors import BadArgument
from ..files import AnyPath
from ..weights.writing import PIECE
from . import algebra, spelling
from .model import Model
from .outline import NORM, TABLE, Module
from .rewrite import OnStep, in_parallel, step
from .source import Floats, described
from .spelling import Format, Unit
from .tools import threads_of
from .writer import TYPES, safetensors_file


@dataclass
class Extracted:
    """What was taken out of a model.

    Attributes:
        path: The file.
        family: What it is for.
        format: The format's name.
        modules: How many it changes, as it spells them.
        ranks: Modules by rank.
        residuals: What lowering the rank left out of each, |rest| / |whole| (Frobenius).
        residual: The same of all together.
        left_out: Parameters that differ and that the format does not have: norms, biases, tables of embeddings.
    """

    path: str
    family: str
    format: str
    modules: int = 0
    ranks: dict[int, int] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)
    residual: float = 0.0
    left_out: list[str] = field(default_factory=list)


@dataclass
class _Made:
    tensors: dict[str, Floats] = field(default_factory=dict)
    ranks: Counter[int] = field(default_factory=Counter)
    lost: dict[str, tuple[float, float]] = field(default_factory=dict)
    stems: set[str] = field(default_factory=set)
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
    on_step: OnStep | None = None,
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
    if type not in TYPES:
        raise BadArgument(f"type {type!r} is not known; there are: {', '.join(TYPES)}")
    ours, theirs = Model(tuned), Model(base)
    shared = _shared(ours, theirs)
    format = spelling.format_of(to or ("kohya" if ours.family in ("sd1", "sd2", "sdxl") else "diffusers"), ours.family)
    if format.name == "peft":
        raise BadArgument("extract: writes files; convert --to peft makes a folder of one")
    out = Extracted(str(output), ours.family, format.name)
    ranks: Counter[int] = Counter()
    rest = whole = 0.0
    told: dict[str, str] = {}

    def make(i: int) -> _Made:
        return _make(ours, theirs, i, format, rank, energy)

    work = in_parallel(
        make, shared, lambda i: 4 * ours.sizes[i].rows * max(1, ours.sizes[i].columns), threads_of(threads)
    )
    with safetensors_file(check.path("output", output), told) as writer:
        for done, (i, made) in enumerate(zip(shared, work, strict=True), start=1):
            for name, values in made.tensors.items():
                writer.add(name, values, "f32" if values.size == 1 else type)
            out.modules += len(made.stems)
            out.left_out += made.left_out
            ranks += made.ranks
            for stem, (left, norm) in made.lost.items():
                out.residuals[stem] = left / norm if norm else 0.0
                rest, whole = rest + left**2, whole + norm**2
            step(on_step, done, len(shared), ours.outline.modules[i].name, str(output))
        if not writer.names:
            raise BadArgument(f"{tuned}: does not differ from {base}; there is nothing to take out")
        told |= spelling.metadata(format, ours.family, [], ranks, ["lora"])
    out.ranks, out.residual = dict(sorted(ranks.items())), (rest / whole) ** 0.5 if whole else 0.0
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


def _make(tuned: Model, base: Model, i: int, format: Format, rank: int | None, energy: float | None) -> _Made:
    made = _Made()
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
                made.stems.add(unit.stem)
                if is_vector:
                    made.tensors |= spelling.dense_tensors(format, unit, module, leaf, delta)
                else:
                    _add_pair(made, format, unit, module, delta, rank, energy)
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


def _add_pair(
    made: _Made, format: Format, unit: Unit, module: Module, delta: Floats, rank: int | None, energy: float | None
) -> None:
    reduced = algebra.reduce_dense(delta, rank, energy)
    made.tensors |= spelling.pair_tensors(format, unit, module, reduced.pair)
    made.ranks[reduced.pair.rank] += 1
    made.lost[unit.stem] = (reduced.residual * reduced.norm, reduced.norm)
