"""LoRA files of every trainer as changes of the modules that their family has, read one module at a time."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .. import _native, check
from ..errors import BadArgument, BadFile
from .library import LoraLibrary
from .outline import DIFFUSERS, FAMILIES, NORM, PLACES, TABLE, Module, Outline, outline_of
from .report import LoraReport

Floats = NDArray[np.float32]

_BASE_MODELS: Final = {"SD1": "sd1", "SD2": "sd2", "SDXL": "sdxl", "SD3": "sd3", "FLUX": "flux"}


def described(family: str) -> str:
    """A family's name for messages: "SDXL"."""
    return next(name for name, one in _BASE_MODELS.items() if one == family)


@dataclass(frozen=True)
class Size:
    """Of a module's weight as a matrix; 0: not known.

    Attributes:
        rows: Outputs.
        columns: Inputs times the taps of the kernel.
    """

    rows: int = 0
    columns: int = 0


def swapped_by_size(outline: Outline, sizes: Mapping[int, Size]) -> list[int]:
    """SD 3's last modulation of the text, which has no gates, and in diffusers the scale before the shift."""
    return [
        i
        for i, size in sizes.items()
        if outline.modules[i].name.endswith("context_block.adaLN_modulation.1") and size.rows == 2 * size.columns
    ]


@dataclass(frozen=True)
class Change:
    """What a file adds to some rows of one parameter.

    Attributes:
        source: Where it is from.
        stem: Its number there.
        number: Which of the stem's changes it is.
        module: What it changes.
        leaf: "weight", or "bias".
        first: The first row that it changes.
        rows: How many.
        columns: Of the weight as a matrix; 1 of a vector.
        kind: As the engine names kinds: "lora", "loha", "lokr", "diff", "replacement", "ia3", "glora", "oft", …
        scale: Multiplies the change once: alpha / rank by the rules of the file's format.
        factors: By role, as native/src/lora/lora_module.h lists them; DoRA's norms are "magnitude".
        swaps: Whether the file has the halves of these rows the other way round.
        flags: "on_input", "magnitude_of_columns", "constraint".
        type: The type that the file stores it in.
    """

    source: "LoraSource"
    stem: int
    number: int
    module: Module
    leaf: str
    first: int
    rows: int
    columns: int
    kind: str
    scale: float
    factors: Mapping[str, Floats] = field(repr=False)
    swaps: bool
    flags: Mapping[str, Any]
    type: str

    @property
    def needs_base(self) -> bool:
        """Whether it depends on the weight that it changes."""
        return "magnitude" in self.factors or self.kind in _OF_BASE

    def dense(self, base: Floats | None = None) -> Floats:
        """The whole change: (rows, columns), in the model's order of rows.

        Args:
            base: The pristine rows, for kinds that depend on them.

        Raises:
            BadArgument: It needs the base.
        """
        return self.source.native.delta(self.stem, self.number, self.rows, base)


_OF_BASE: Final = {"replacement", "ia3", "glora", "oft", "boft", "input oft"}


class LoraSource:
    """A LoRA file, opened; tensors are read when they are asked for.

    Attributes:
        path: Of the file or PEFT folder.
        report: What the file says without a model.
        fitting: The families that its keys may mean, the likeliest first.
        outline: The modules of the first of them.
        sizes: Of those that the file changes.
        unknown: Stems, and keys without a known ending, that mean nothing in the family.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        family: str | None = None,
        outline: Outline | None = None,
        sizes: Mapping[int, Size] | None = None,
    ) -> None:
        """Finds out what the file is for and which modules it changes.

        Args:
            path: A safetensors or GGUF file, or a folder that PEFT saved.
            family: What the file is for, where its keys leave that open.
            outline: A model's own modules, where it is at hand.
            sizes: Of the model's weights, which are needed where a kind states less than both sides.

        Raises:
            BadFile: The file is damaged, or is for none of the families.
            Unsupported: It is no LoRA, or a pickle.
            Io: It cannot be read.
        """
        self.path = LoraLibrary(None).locate(check.path("loras", path))
        self._os_path = os.fsencode(self.path)
        bare = _native.LoraFile(self._os_path, [])
        self.report = LoraReport.from_json(bare.report())
        self._stems = bare.stems()
        if not self._stems:
            raise BadFile(f"{self.path}: holds no update")
        self.fitting = (outline.family,) if outline else self._guess(family)
        self.outline = outline or outline_of(self.fitting[0], self.names)
        self._resolve()
        self.sizes = self._sizes(sizes or {})
        self.outline = self.outline.with_swaps(swapped_by_size(self.outline, self.sizes))
        used = sorted(self.sizes)
        self._used = [(i, leaf) for i in used for leaf in _leaves(self.outline.modules[i])]
        self.native = _native.LoraFile(
            self._os_path, [_entry(self.outline, i, leaf, self.sizes[i]) for i, leaf in self._used]
        )
        self._stems_of: dict[int, list[int]] = defaultdict(list)
        for number, stem in enumerate(self.native.stems()):
            if (at := max(stem["weight"], stem["bias"])) >= 0:
                self._stems_of[self._used[at][0]].append(number)

    @property
    def family(self) -> str:
        """One of FAMILIES."""
        return self.outline.family

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    @property
    def names(self) -> list[str]:
        """All stems of its keys."""
        return [stem["stem"] for stem in self._stems]

    @property
    def made_for(self) -> str:
        """Words for messages where the file's keys speak of another family."""
        other = _BASE_MODELS.get(self.report.base_model, self.family)
        return "" if other == self.family else f" (it looks made for {described(other)})"

    def modules(self) -> list[int]:
        """Indices of the modules that it changes, in the model's order."""
        return sorted(self._stems_of)

    def type_of(self, module: int) -> str:
        """The type of the largest tensor of a module."""
        return str(self._stems[self._stems_of[module][0]]["type"])

    def changes(self, module: int) -> Iterator[Change]:
        """Reads what the file does to a module.

        Raises:
            BadFile: A factor is missing, no number, or of a size that fits nothing.
        """
        seen: list[dict[str, Any]] = []
        for stem in self._stems_of.get(module, ()):
            for number, read in enumerate(self.native.read(stem)):
                if any(_same(read, other) for other in seen):
                    continue  # one module under two spellings, as careless merges have it
                seen.append(read)
                _, leaf = self._used[read["weight"]]
                is_vector = leaf == "bias" or self.outline.modules[module].form == NORM
                yield Change(
                    self,
                    stem,
                    number,
                    self.outline.modules[module],
                    leaf,
                    read["first_row"],
                    read["rows"],
                    1 if is_vector else self.sizes[module].columns,
                    read["kind"],
                    read["scale"],
                    read["factors"],
                    read["swap_halves"],
                    {key: read[key] for key in ("on_input", "magnitude_of_columns", "constraint")},
                    str(self._stems[stem]["type"]),
                )

    # ---- opening ---------------------------------------------------------------------------------------

    def _guess(self, family: str | None) -> tuple[str, ...]:
        """The families in which most of the stems mean something, the likeliest first."""
        if family is not None:
            return (check.one_of("family", family, FAMILIES),)
        found: Counter[str] = Counter()
        for one in FAMILIES:
            stems = _native.LoraFile(self._os_path, _probe(outline_of(one, self.names))).stems()
            found[one] = sum(max(stem["weight"], stem["bias"]) >= 0 for stem in stems)
        best = max(found.values())
        if best == 0:
            raise BadFile(
                f"{self.path}: none of its {len(self._stems):,} modules is known from SD1, SD2, SDXL, SD3 or FLUX, "
                f"first {self._stems[0]['stem']}"
            )
        told = {_BASE_MODELS.get(self.report.base_model), *map(self._by_width, self._stems)}
        return tuple(sorted((one for one in FAMILIES if found[one] == best), key=lambda one: one not in told))

    @staticmethod
    def _by_width(stem: Mapping[str, Any]) -> str | None:
        """What the width of a transformer tells, as both of these families call their first blocks the same."""
        is_block = "transformer_blocks" in stem["stem"] and stem["stem"].endswith(_WIDE)
        return {3072: "flux", 1536: "sd3", 2432: "sd3"}.get(stem["columns"]) if is_block else None

    def _resolve(self) -> None:
        """Finds the module and the units of rows of each stem."""
        probed = [(i, leaf) for i, module in enumerate(self.outline.modules) for leaf in _leaves(module)]
        stems = _native.LoraFile(self._os_path, _probe(self.outline)).stems()
        self._found: dict[int, list[tuple[dict[str, Any], int]]] = defaultdict(list)
        self.unknown: list[str] = list(self.report.unmatched)
        for stem in stems:
            at = max(stem["weight"], stem["bias"])
            if at < 0:
                self.unknown.append(stem["stem"])
                continue
            i, _ = probed[at]
            self._found[i].append((stem, stem["rows"] // _PROBE_ROWS))
        if not self._found:
            raise BadFile(
                f"{self.path}: none of its modules is one of {described(self.family)}{self.made_for}, "
                f"first {self.unknown[0]}"
            )

    def _sizes(self, known: Mapping[int, Size]) -> dict[int, Size]:
        return {i: self._size(i, found, known.get(i, Size())) for i, found in self._found.items()}

    def _size(self, i: int, found: list[tuple[dict[str, Any], int]], known: Size) -> Size:
        module = self.outline.modules[i]
        rows, columns = known.rows, known.columns
        for stem, units in found:
            out, across = stem["out"], stem["columns"]
            if units and out and not rows:
                if out % units:
                    raise BadFile(f"{self.path}: {stem['stem']} has {out} rows, which are no {units} equal parts")
                rows = out // units * module.units
            # A kernel that lies unfolded in the columns is counted there.
            columns = columns or across
        if module.form > 0 and columns % module.taps:
            raise BadFile(
                f"{self.path}: {found[0][0]['stem']} has {columns} columns, where {module.name} is a convolution of "
                f"{module.form}x{module.form}"
            )
        if rows == 0 or (columns == 0 and module.form >= 0 and not _is_bias_only(found)):
            raise BadArgument(
                f"{self.path}: {found[0][0]['stem']} does not state the size of its weight; name its model"
            )
        return Size(rows, columns)


# Modules of both SD 3 and FLUX that take the width of the network in.
_WIDE: Final = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "norm1.linear", "norm1_linear")
_PROBE_ROWS: Final = 2  # per unit, so that halves can be swapped


def _is_bias_only(found: list[tuple[dict[str, Any], int]]) -> bool:
    return all(stem["columns"] == 0 for stem, _ in found)


def _leaves(module: Module) -> tuple[str, ...]:
    return ("weight",) if module.form == TABLE or module.leaf == "scale" else ("weight", "bias")


def _probe(outline: Outline) -> list[tuple[Any, ...]]:
    return [
        _entry(outline, i, leaf, Size(_PROBE_ROWS * module.units, 2 * module.taps))
        for i, module in enumerate(outline.modules)
        for leaf in _leaves(module)
    ]


def _entry(outline: Outline, i: int, leaf: str, size: Size) -> tuple[Any, ...]:
    """A weight as the engine takes outlines."""
    module = outline.modules[i]
    component = DIFFUSERS[outline.family][module.component]
    end = module.leaf if leaf == "weight" else leaf
    inputs = max(1, size.columns // module.taps)
    is_vector = leaf == "bias" or module.form == NORM
    shape = (size.rows,) if is_vector else (size.rows, inputs, *module.kernel())
    unit = size.rows // module.units
    parts = [
        (f"{component}.{part.diffusers}.{leaf}", part.first * unit, part.units * unit, part.swaps)
        for part in module.parts
    ]
    whole = len(parts) == 1 and not module.parts[0].swaps
    name = f"{PLACES[module.component]}{module.name}.{end}"
    return (name, parts[0][0] if whole else "", shape, [] if whole else parts, module.form == TABLE)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return (
        all(a[key] == b[key] for key in a if key != "factors")
        and a["factors"].keys() == b["factors"].keys()
        and all(np.array_equal(a["factors"][role], b["factors"][role]) for role in a["factors"])
    )
