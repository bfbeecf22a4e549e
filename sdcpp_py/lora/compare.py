"""What differs between two LoRA files: in their changes of the model, whatever their formats."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from .. import check
from ..errors import BadArgument
from ..files import AnyPath
from ..progress import OnProgress, tell
from ..prompt import LoraTag
from . import algebra
from .algebra import Pair
from .model import Model, model_at
from .outline import NORM
from .rewrite import base_of
from .source import LoraSource, described
from .tools import open_together


@dataclass(frozen=True)
class ModuleDiff:
    """One parameter that both files change.

    Attributes:
        name: Its original path, behind its component.
        norm_a: The size of A's change (Frobenius).
        norm_b: Of B's.
        difference: |A - B| / max(|A|, |B|).
        cosine: Of the angle between both; 1: the same direction.
    """

    name: str
    norm_a: float
    norm_b: float
    difference: float
    cosine: float


@dataclass
class LoraDiff:
    """Two LoRA files.

    Attributes:
        a: The first file.
        b: The second.
        family: What both are for.
        difference: |A - B| / max(|A|, |B|) over all that they change.
        cosine: Of the angle between them.
        modules: What both change, those that differ most first.
        only_a: What only A changes.
        only_b: What only B changes.
        metadata: Keys whose values differ, with both values.
    """

    a: str
    b: str
    family: str
    difference: float = 0.0
    cosine: float = 1.0
    modules: list[ModuleDiff] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    metadata: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)

    def to_json(self, indent: int | None = 2) -> str:
        """One JSON object with a member for every field."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)


@dataclass
class _Squares:
    a: float = 0.0
    b: float = 0.0
    rest: float = 0.0

    def add(self, other: "_Squares") -> None:
        self.a, self.b, self.rest = self.a + other.a, self.b + other.b, self.rest + other.rest

    @property
    def difference(self) -> float:
        most = max(self.a, self.b)
        return float(np.sqrt(self.rest / most)) if most else 0.0

    @property
    def cosine(self) -> float:
        scale = np.sqrt(self.a * self.b)
        return float(np.clip((self.a + self.b - self.rest) / (2 * scale), -1, 1)) if scale else 0.0


def diff(
    a: AnyPath,
    b: AnyPath,
    *,
    family: str | None = None,
    model: AnyPath | None = None,
    on_step: OnProgress | None = None,
) -> LoraDiff:
    """Compares what two LoRAs do to a model.

    Args:
        a: A LoRA of any format.
        b: Another.
        family: One of outline.FAMILIES, where the keys leave it open.
        model: The base, for kinds that depend on its weights.
        on_step: Called with (done, all, name) after each module; False stops.

    Raises:
        BadArgument: They are for different families or models, or an option is out of range.
        BadFile: One of them is damaged.
        Cancelled: `on_step` returned False.
        Io: A file cannot be read.
    """
    check.callback("on_step", on_step)
    with model_at(model) as base:
        first, second = (one.source for one in open_together([_named(a), _named(b)], family, base))
        if first.family != second.family:
            raise BadArgument(
                f"{second.path}: made for {described(second.family)}, but {first.path} is for {described(first.family)}"
            )
        out = LoraDiff(str(Path(first.path)), str(Path(second.path)), first.family)
        told = first.report.metadata, second.report.metadata
        for key in sorted({*told[0], *told[1]}):
            if told[0].get(key) != told[1].get(key):
                out.metadata[key] = (told[0].get(key), told[1].get(key))
        whole = _Squares()
        modules = sorted({*first.modules(), *second.modules()})
        for done, i in enumerate(modules, start=1):
            module = first.outline.modules[i]
            ours, theirs = _sums(first, i, base), _sums(second, i, base)
            for leaf in sorted({*ours, *theirs}):
                name = f"{module.component}.{module.name}" + ("" if leaf == "weight" else f".{leaf}")
                squares = _compared(name, first, second, ours.get(leaf), theirs.get(leaf))
                whole.add(squares)
                if leaf not in ours or leaf not in theirs:
                    (out.only_a if leaf in ours else out.only_b).append(name)
                else:
                    out.modules.append(
                        ModuleDiff(name, squares.a**0.5, squares.b**0.5, squares.difference, squares.cosine)
                    )
            tell(on_step, done, len(modules), module.name, "the comparison was stopped")
        out.modules.sort(key=lambda entry: (-entry.difference, entry.name))
        out.difference, out.cosine = whole.difference, whole.cosine
        return out


def _named(path: AnyPath) -> LoraTag:
    return LoraTag(str(check.path("lora", path)))


def _sums(source: LoraSource, i: int, model: Model | None) -> dict[str, Pair]:
    """What a file does to a module, by parameter; vectors as pairs of rank 1."""
    parts: dict[str, list[Pair]] = {}
    for change in source.changes(i):
        base = base_of(change, i, model)
        if change.leaf == "bias" or change.module.form == NORM:
            one = np.ones((1, 1), np.float32)
            pair = Pair(one, change.dense(base).reshape(-1, 1), 1.0, change.first)
        else:
            pair = algebra.exact_pair(change, base)
        rows = source.sizes[i].rows
        whole = algebra.within(pair, 0, rows)
        if whole is not None:
            parts.setdefault(change.leaf, []).append(whole)
    return {leaf: total for leaf, pairs in parts.items() if (total := algebra.total(pairs)) is not None}


def _compared(name: str, first: LoraSource, second: LoraSource, a: Pair | None, b: Pair | None) -> _Squares:
    if a is None or b is None:
        square = algebra.norm(a or b) ** 2  # type: ignore[arg-type]
        return _Squares(square if a else 0.0, square if b else 0.0, square)
    if a.up.shape[0] != b.up.shape[0] or a.down.shape[1] != b.down.shape[1]:
        raise BadArgument(
            f"{name}: is {a.up.shape[0]}x{a.down.shape[1]} in {first.path} and {b.up.shape[0]}x{b.down.shape[1]} in "
            f"{second.path}; they are for different models"
        )
    rest = algebra.total([a, Pair(b.down, b.up, -b.weight, b.first)])
    assert rest is not None
    return _Squares(algebra.norm(a) ** 2, algebra.norm(b) ** 2, algebra.norm(rest) ** 2)
