"""What became of every key of a LoRA file: as data, as a table, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from rich.table import Table

from ..errors import Internal

_SHOWN: Final = 5  # entries of a list in the table


@dataclass(frozen=True)
class LoraReport:
    """A LoRA file against a model.

    Attributes:
        path: Of the file.
        base_model: What the file was made for, as far as it tells; "" where it does not.
        settings: What it needs by its name, where it was distilled to paint in a few steps; else "".
        formats: Modules by the convention that their keys follow, such as "kohya" or "peft".
        kinds: Modules by kind, such as "lora" or "loha".
        ranks: Modules by rank.
        scale_min: The least of alpha / rank.
        scale_max: The greatest.
        text_modules: How many change a text encoder.
        unet_modules: How many change the denoiser.
        applied: The modules that fit, as the file spells them.
        padded: Those that know fewer inputs than the model has, and by how much.
        skipped: Those that do not fit, and why.
        unmatched: Keys that mean nothing in this model.
        absent: Keys for components that this model lacks.
        warnings: What else the user should hear.
        metadata: Of the file.
    """

    path: str
    base_model: str = ""
    settings: str = ""
    formats: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    scale_min: float = 0.0
    scale_max: float = 0.0
    text_modules: int = 0
    unet_modules: int = 0
    applied: list[str] = field(default_factory=list)
    padded: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> "LoraReport":
        """Reads what the engine, or ``to_json``, wrote.

        Raises:
            Internal: It is no such text.
        """
        try:
            members = json.loads(text)
            known = {f.name for f in fields(cls)}
            values: dict[str, Any] = {name: value for name, value in members.items() if name in known}
            values["ranks"] = {int(rank): n for rank, n in values.get("ranks", {}).items()}
            for name in ("scale_min", "scale_max"):
                if values.get(name) is None:
                    values.pop(name, None)
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise Internal(f"the engine's report of a LoRA cannot be read ({error}); please report it") from error

    def to_json(self, indent: int | None = 2) -> str:
        """One JSON object with a member for every field."""
        return json.dumps(asdict(self), indent=indent, ensure_ascii=False)

    @property
    def is_complete(self) -> bool:
        """Whether every key had an effect."""
        return not (self.skipped or self.unmatched or self.absent)

    def table(self) -> Table:
        """For a terminal, by Rich."""
        table = Table(title=self.path, show_header=False, title_justify="left", box=None, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows():
            table.add_row(name, _plain(value))
        return table

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("made for", self.base_model or "not said"),
            *([("settings", f"by its name {self.settings}")] if self.settings else []),
            ("modules", f"{self.unet_modules:,} in the denoiser, {self.text_modules:,} in the text encoder"),
            ("formats", _counted(self.formats)),
            ("kinds", _counted(self.kinds)),
        ]
        if self.ranks:
            rows.append(("ranks", _counted(self.ranks)))
        if self.applied:
            least, greatest = f"{self.scale_min:.4g}", f"{self.scale_max:.4g}"
            rows.append(("scale", least if least == greatest else f"{least} to {greatest}"))
        rows += [
            (name, _listed(entries))
            for name, entries in (
                ("padded", self.padded),
                ("skipped", self.skipped),
                ("unmatched", self.unmatched),
                ("absent", self.absent),
                ("warnings", self.warnings),
            )
            if entries
        ]
        told = {name: value for name, value in self.metadata.items() if name in _TOLD}
        return rows + [(_TOLD[name], value) for name, value in told.items() if value]


_TOLD: Final = {
    "ss_output_name": "name",
    "ss_base_model_version": "base version",
    "ss_network_module": "trained with",
    "modelspec.architecture": "architecture",
    "modelspec.title": "title",
}


def _counted(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name} ({n:,})" for name, n in counts.items()) or "none"


def _listed(entries: list[str]) -> str:
    lines = entries[:_SHOWN]
    if len(entries) > _SHOWN:
        lines = [*lines, f"… and {len(entries) - _SHOWN:,} more"]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Rich prints as it is, without control characters of a terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "?" for c in text))
