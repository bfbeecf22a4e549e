"""What convert, merge, resize, scale and prune have in common: LoRA files in, module by module, one LoRA file out."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from .. import check
from ..errors import BadArgument, BadFile, Unsupported
from ..files import AnyPath, is_same
from ..progress import OnProgress
from . import algebra, spelling
from .algebra import Pair
from .blocks import Blocks
from .by_module import Made, Written, in_parallel, write_modules
from .model import Model
from .outline import NORM, Module
from .source import Change, Floats, LoraSource, described
from .spelling import Format, Unit
from .writer import TYPES, peft_folder, safetensors_file

METHODS: Final = ("sum", "ties", "dare", "dare-ties")


@dataclass(frozen=True)
class Input:
    """A file and how much of it goes into the sum.

    Attributes:
        source: The file.
        te: Ratio of what changes text encoders.
        unet: Ratio of what changes the denoiser.
        blocks: Paths of modules and factors for all below them, see blocks.py.
    """

    source: LoraSource
    te: float = 1.0
    unet: float = 1.0
    blocks: Blocks = ()

    @property
    def has_effect(self) -> bool:
        """Whether any of it goes into the sum."""
        return bool(self.te or self.unet)

    def weight(self, module: Module) -> float:
        """The ratio of one module."""
        is_denoiser = module.component == "denoiser"
        ratio = self.unet if is_denoiser else self.te
        path = f"model.diffusion_model.{module.name}" if is_denoiser else ""
        fitting = [(prefix, factor) for prefix, factor in self.blocks if _is_below(path, prefix)]
        return ratio * (max(fitting, key=lambda entry: len(entry[0]))[1] if fitting else 1.0)


def _is_below(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(f"{prefix}.")


@dataclass(frozen=True)
class Plan:
    """How the changes of a module become tensors.

    Attributes:
        format: What to write.
        rank: The highest rank to write; None: as many as it takes.
        energy: The share of the squared singular values to keep; None: all.
        method: One of METHODS.
        density: What share of elements "ties" and "dare" keep.
        seed: For what "dare" drops.
        type: One of writer.TYPES; None: the sources' where it is exact, else f32.
        threads: Modules at a time.
        keep: Says which modules to write; None: all.
    """

    format: Format
    rank: int | None = None
    energy: float | None = None
    method: str = "sum"
    density: float = 1.0
    seed: int = 0
    type: str | None = None
    threads: int = 1
    keep: Callable[[str], bool] | None = None


@dataclass
class Rewritten(Written):
    """What a tool wrote.

    Attributes:
        unknown: Stems of the sources that mean nothing and are not in it.
        warnings: What the sources hold besides, and else the user should hear.
    """

    unknown: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def rewrite(
    inputs: Sequence[Input],
    output: AnyPath,
    plan: Plan,
    *,
    model: Model | None = None,
    skip_unknown: bool = False,
    on_step: OnProgress | None = None,
) -> Rewritten:
    """Writes the weighted sum of LoRA files.

    Args:
        inputs: All for the same family.
        output: The file to write.
        plan: How.
        model: The base, for kinds that depend on it.
        skip_unknown: Leave out what means nothing in the family instead of refusing it.
        on_step: Called after each module, see progress.py.

    Raises:
        BadArgument: The files do not go together, or an option is out of range.
        BadFile: One of them is damaged.
        Unsupported: The format cannot hold what they do.
        Cancelled: `on_step` returned False.
        Io: The file cannot be written.
    """
    check_plan(plan)
    check.callback("on_step", on_step)
    target = check.path("output", output)
    _check_inputs(inputs, target, check.flag("skip_unknown", skip_unknown))
    sources = [one.source for one in inputs]
    outline = sources[0].outline
    names: dict[int, str] = {}
    for source in sources:
        for i in source.modules():
            if plan.keep is None or plan.keep(canonical(source, i)):
                names[i] = source.outline.modules[i].name
    if not names:
        raise BadArgument(f"{output}: nothing would be left to write")
    order = sorted(names)
    result = Rewritten(str(output), sources[0].family, plan.format.name)
    result.unknown = [stem for source in sources for stem in source.unknown]
    result.warnings = [f"{source.name}: {warning}" for source in sources for warning in source.report.warnings]
    told: dict[str, str] = {}

    def make(i: int) -> Made:
        with np.errstate(over="ignore"):  # the writer refuses what is no finite number
            return _make(inputs, i, plan, model)

    work = in_parallel(make, order, lambda i: _cost(sources, i), plan.threads)
    is_folder = plan.format.name == "peft"
    if is_folder and len(networks := sorted({outline.modules[i].component for i in order})) > 1:
        raise BadArgument(
            f"{target}: a folder of PEFT is for one network, and these are changes of {', '.join(networks)}; "
            f"take one after the other with prune --keep '{networks[-1]}.*'"
        )
    with (peft_folder if is_folder else safetensors_file)(target, told) as writer:
        write_modules(writer, work, [names[i] for i in order], result, on_step)
        if not writer.names:
            raise BadArgument(f"{output}: nothing would be left to write")
        told |= spelling.metadata(
            plan.format, outline.family, [s.report.metadata for s in sources], result.ranks, result.kinds
        )
        if len(sources) > 1:
            told["modelspec.merged_from"] = ", ".join(source.name for source in sources)
    return result


def canonical(source: LoraSource, i: int) -> str:
    """A module as --keep and --drop know it: "denoiser.double_blocks.0.img_attn.qkv"."""
    module = source.outline.modules[i]
    return f"{module.component}.{module.name}"


def check_plan(plan: Plan) -> None:
    """Raises BadArgument for numbers out of range."""
    algebra.check_rank(plan.rank, plan.energy)
    check.whole("seed", plan.seed, 0, (1 << 64) - 1)
    if not 0 < plan.density <= 1:
        raise BadArgument(f"density {plan.density}: must be a share such as 0.5")
    check.optional(check.one_of, "type", plan.type, TYPES)


def _check_inputs(inputs: Sequence[Input], output: Path, skip_unknown: bool) -> None:
    first = inputs[0].source
    for one in inputs:
        source = one.source
        if source.family != first.family:
            raise BadArgument(
                f"{source.path}: made for {described(source.family)}, but {first.path} is for {described(first.family)}"
            )
        if source.unknown and not skip_unknown:
            raise BadFile(
                f"{source.path}: {len(source.unknown):,} of its modules mean nothing in {described(source.family)}"
                f"{source.made_for}, first {source.unknown[0]}; skip_unknown leaves them out"
            )
        for i in set(first.sizes) & set(source.sizes):
            mine, theirs = source.sizes[i], first.sizes[i]
            if (mine.rows, mine.columns or theirs.columns) != (theirs.rows, theirs.columns or mine.columns):
                raise BadArgument(
                    f"{source.path}: changes a {mine.rows}x{mine.columns} {source.outline.modules[i].name}, and "
                    f"{first.path} one of {theirs.rows}x{theirs.columns}; they are for different models"
                )
        if is_same(output, source.path):
            raise BadArgument(f"{output}: is one of the files to read; write to another")


# ---- one module ------------------------------------------------------------------------------------------


def _make(inputs: Sequence[Input], i: int, plan: Plan, model: Model | None) -> Made:
    made = Made()
    present = [one for one in inputs if i in one.source.sizes]
    source = present[0].source
    module, size = source.outline.modules[i], source.sizes[i]
    if any(one.source.outline.modules[i] != module for one in present):
        module = next(m for one in present if (m := one.source.outline.modules[i]).parts[0].swaps)
    weighted = [
        (one.weight(module), n, change)
        for n, one in enumerate(present)
        for change in one.source.changes(i)
        if one.weight(module)
    ]
    type = _common_type([one.source.type_of(i) for one in present])
    matrices = [entry for entry in weighted if is_matrix(entry[2])]
    vectors = [entry for entry in weighted if not is_matrix(entry[2])]
    unit_rows = size.rows // module.units
    pairs: dict[int, Pair] = {}

    def pair_of(entry: tuple[float, int, Change]) -> Pair:
        weight, _, change = entry
        if id(change) not in pairs:
            pair = algebra.exact_pair(change, base_of(change, i, model))
            pairs[id(change)] = Pair(pair.down, pair.up, pair.weight * weight, pair.first)
        return pairs[id(change)]

    for unit in plan.format.units(source.outline, module):
        first, rows = unit.first * unit_rows, unit.units * unit_rows
        here = [entry for entry in matrices if first < entry[2].first + entry[2].rows and entry[2].first < first + rows]
        if here:
            _add_matrix(made, unit, module, here, pair_of, first, rows, plan, type)
        for leaf in ("weight", "bias"):
            sums = [
                (weight, change) for weight, _, change in vectors if change.leaf == leaf and change.first < first + rows
            ]
            total = _vector(sums, i, model, first, rows)
            if total is not None and total.any():
                made.add(unit, spelling.dense_tensors(plan.format, unit, module, leaf, total), plan.type, type)
                made.kinds["norm" if module.form == NORM else "bias"] += 1
        if f"{unit.stem}.lora_B.bias" in made.tensors and f"{unit.stem}.lora_A.weight" not in made.tensors:
            raise Unsupported(
                f"{unit.stem}: changes a bias alone, which {plan.format.name}'s format does not have; "
                f"write it as kohya or comfy"
            )
    return made


def is_matrix(change: Change) -> bool:
    """Whether it changes a matrix, not a bias or a norm."""
    return change.leaf == "weight" and change.module.form != NORM


def _add_matrix(
    made: Made,
    unit: Unit,
    module: Module,
    here: list[tuple[float, int, Change]],
    pair_of: Callable[[tuple[float, int, Change]], Pair],
    first: int,
    rows: int,
    plan: Plan,
    type: str,
) -> None:
    lowers = plan.rank is not None or plan.energy is not None
    weight, _, change = here[0]
    is_whole = len(here) == 1 and (change.first, change.rows) == (first, rows)
    if is_whole and not lowers and plan.method == "sum" and spelling.keeps_kind(plan.format, change):
        made.add(unit, spelling.kept_tensors(plan.format, unit, change, weight), plan.type, type)
        made.kinds[change.kind + (" with dora" if "magnitude" in change.factors else "")] += 1
        return
    pair = _combined(here, pair_of, first, rows, plan)
    if pair is None:
        return
    is_one_lora = len(here) == 1 and change.kind == "lora"  # which stays one, however high its rank
    side = min(rows, pair.down.shape[1])
    if lowers:
        if pair.rank < side:
            reduced = algebra.reduce_pair(pair, plan.rank, plan.energy)
        else:
            reduced = algebra.reduce_dense(pair.dense(), plan.rank, plan.energy, first)
        made.add_lost(unit, reduced)
        pair = reduced.pair
    elif not plan.format.peft and not is_one_lora and pair.up.size + pair.down.size > rows * pair.down.shape[1]:
        made.add(unit, spelling.dense_tensors(plan.format, unit, module, "weight", pair.dense()), plan.type, type)
        made.kinds["diff"] += 1
        return
    made.add(unit, spelling.pair_tensors(plan.format, unit, module, pair), plan.type, type)
    made.kinds["lora"] += 1
    made.ranks[pair.rank] += 1


def _combined(
    here: list[tuple[float, int, Change]],
    pair_of: Callable[[tuple[float, int, Change]], Pair],
    first: int,
    rows: int,
    plan: Plan,
) -> Pair | None:
    """The merged change of some rows of a module, as one pair."""

    def sum_of(entries: Iterable[tuple[float, int, Change]]) -> Pair | None:
        return algebra.total(part for entry in entries if (part := algebra.within(pair_of(entry), first, rows)))

    if plan.method == "sum":
        return sum_of(here)
    by_input = (sum_of([entry for entry in here if entry[1] == n]) for n in sorted({entry[1] for entry in here}))
    pairs = [pair for pair in by_input if pair is not None]
    if not pairs:
        return None
    module = here[0][2].module
    rng = np.random.default_rng([plan.seed, *f"{module.component}.{module.name}.{first}".encode()])
    return algebra.of_dense(algebra.agreed(pairs, plan.method, plan.density, rng), first)


def _vector(sums: list[tuple[float, Change]], i: int, model: Model | None, first: int, rows: int) -> Floats | None:
    """The change of some elements of a bias or a norm: (rows, 1)."""
    total: Floats | None = None
    for weight, change in sums:
        delta = change.dense(base_of(change, i, model)).reshape(-1, 1) * np.float32(weight)
        begin, end = max(first, change.first), min(first + rows, change.first + change.rows)
        if begin < end:
            total = np.zeros((rows, 1), np.float32) if total is None else total
            total[begin - first : end - first] += delta[begin - change.first : end - change.first]
    return total


def base_of(change: Change, i: int, model: Model | None) -> Floats | None:
    """The pristine rows that a change depends on; None where it does not.

    Raises:
        BadArgument: It does, and there is no model.
    """
    if not change.needs_base:
        return None
    if model is None:
        kind = "DoRA" if "magnitude" in change.factors else change.kind
        raise BadArgument(
            f"{change.source.path}: {change.module.name} is changed by {kind}, which depends on the model's own "
            f"weight; name the model"
        )
    rows = model.weight(change.source.outline.modules[i], change.leaf)
    return np.ascontiguousarray(rows[change.first : change.first + change.rows])


def _common_type(types: Iterable[str]) -> str:
    """The one type that all have, else f32."""
    kinds = set(types)
    return kinds.pop() if len(kinds) == 1 else "f32"


def _cost(sources: Sequence[LoraSource], i: int) -> int:
    """Of a module, in bytes."""
    return max(4 * size.rows * max(size.columns, 1) for source in sources if (size := source.sizes.get(i)))
