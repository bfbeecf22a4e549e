"""Tags of a prompt and the argument loras= brought to one list: which files, how strongly, when, where.

The same file twice counts with the sum of its multipliers, whatever name it was given.
"""

import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from ..errors import BadArgument
from ..files import AnyPath
from ..prompt import LoraTag, shown
from .blocks import FAMILIES, Blocks, read_blocks
from .library import LoraLibrary

if TYPE_CHECKING:
    from .. import _native

log = logging.getLogger("sdcpp_py")

USUAL: Final = 10.0  # a multiplier beyond it is worth a warning
MOST: Final = 3e38  # what the engine can hold
_KEYS: Final = ("te", "unet", "start", "stop", "lbw")

Step = int | float  # a whole number counts steps from 1; one with a fraction is a share of all, from 0 to 1


class LoraOptions(TypedDict, total=False):
    """What loras= may say of one LoRA besides a plain multiplier; as in a tag."""

    te: float
    unet: float
    start: Step | None
    stop: Step | None
    lbw: str | None


Strength = float | LoraOptions
Loras = Mapping[AnyPath, Strength] | Sequence[AnyPath | tuple[AnyPath, Strength]]


@dataclass(frozen=True)
class LoraUse:
    """One LoRA in force.

    Attributes:
        path: Of the file, without links.
        te: Multiplier for the text encoders.
        unet: Multiplier for the denoiser.
        start: Share of the steps before which the denoiser runs without it, from 0 to 1.
        stop: Share of the steps from which on it runs without it again.
        blocks: Paths of modules and factors for all below them, see blocks.py.
    """

    path: Path
    te: float = 1.0
    unet: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    blocks: Blocks = ()

    def native(self) -> "_native._Lora":
        """What ``_native.Context`` takes."""
        return {
            "path": os.fsencode(self.path),
            "te": self.te,
            "unet": self.unet,
            "start": self.start,
            "stop": self.stop,
            "blocks": list(self.blocks),
        }


def read_uses(
    library: LoraLibrary,
    *,
    tags: Iterable[LoraTag] = (),
    loras: Loras = (),
    family: str = "sd1",
    steps: int | None = None,
) -> list[LoraUse]:
    """What a prompt's tags and the argument loras= ask for together, in a canonical order.

    Args:
        library: Finds the files.
        tags: Of the prompt; their names stay inside the library's folder.
        loras: Names or paths with a multiplier or LoraOptions each; a path may be anywhere.
        family: Of the model, for lbw.
        steps: How many a run has; None: steps cannot be counted, only shares given.

    Raises:
        BadArgument: A name that leads nowhere or out of the folder, a multiplier that is no finite number, an
            unknown option, an empty range of steps.
        Unsupported: A pickle.
        Io: A path that cannot be read.
    """
    wanted = [(tag, True) for tag in tags] + [(tag, False) for tag in _as_tags(loras)]
    parts: dict[LoraUse, list[tuple[float, float]]] = {}  # by all but the multipliers
    paths: dict[tuple[object, bool], Path] = {}
    places: dict[str | None, Blocks] = {None: ()}
    for tag, from_prompt in wanted:
        source = (tag.name, from_prompt)
        if source not in paths:
            paths[source] = library.find(tag.name) if from_prompt else library.locate(tag.name)
        if tag.lbw not in places:
            places[tag.lbw] = _blocks(tag, family)
        use = _use(tag, paths[source], places[tag.lbw], steps)
        parts.setdefault(replace(use, te=0.0, unet=0.0), []).append((use.te, use.unet))
    # fsum rounds once, so that the order of tags does not matter.
    sums = [
        replace(use, te=math.fsum(te for te, _ in both), unet=math.fsum(unet for _, unet in both))
        for use, both in parts.items()
    ]
    uses = [use for use in sums if use.te or use.unet]
    for use in uses:
        _check_multipliers(library.name_of(use.path), use.te, use.unet)
    return sorted(uses, key=lambda use: (str(use.path), use.start, use.stop, use.blocks))


def multipliers(library: LoraLibrary, uses: Iterable[LoraUse]) -> dict[str, dict[str, Any]]:
    """What is in force, by name: te and unet, and start, stop and blocks where they say anything."""
    state: dict[str, dict[str, Any]] = {}
    for use in uses:
        name, n = library.name_of(use.path), 2
        unique = name
        while unique in state:
            unique, n = f"{name} ({n})", n + 1
        entry: dict[str, Any] = {"te": use.te, "unet": use.unet}
        if (use.start, use.stop) != (0.0, 1.0):
            entry.update(start=use.start, stop=use.stop)
        if use.blocks:
            entry["blocks"] = dict(use.blocks)
        state[unique] = entry
    return state


def lora_tags(library: LoraLibrary, loras: Loras) -> list[str]:
    """The argument loras= as a prompt would name it, for the parameters of a picture."""
    tags = []
    for tag in _as_tags(loras):
        options = [f"{key}={value}" for key in ("start", "stop", "lbw") if (value := getattr(tag, key)) is not None]
        name = library.name_of(library.locate(tag.name))
        tags.append(":".join([f"<lora:{name}", f"{tag.te:g}", f"{tag.unet:g}", *options]) + ">")
    return tags


# ---- the argument loras= -------------------------------------------------------------------------------


def _as_tags(loras: object) -> list[LoraTag]:
    """The argument in the form of tags; their names may be paths of the caller's own."""
    if isinstance(loras, (str, os.PathLike)):
        raise BadArgument(f"loras: must be a list, such as [({shown(str(loras))}, 0.8)]")
    if isinstance(loras, Mapping):
        entries: list[object] = list(loras.items())
    elif isinstance(loras, Iterable):
        entries = list(loras)
    else:
        raise BadArgument(f"loras: must be a list or a dict, not {type(loras).__name__}")
    return [_as_tag(entry) for entry in entries]


def _as_tag(entry: object) -> LoraTag:
    if isinstance(entry, (str, os.PathLike)):
        entry = (entry, 1.0)
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise BadArgument(f"loras: {_brief(entry)} is no LoRA; write (name, 0.8)")
    name, strength = entry
    if not isinstance(name, (str, os.PathLike)):
        raise BadArgument(f"loras: a LoRA is named by text or a path, not {type(name).__name__}")
    what = f"loras: {shown(str(name))}"
    if not isinstance(strength, Mapping):
        both = _multiplier(what, strength)
        return LoraTag(name, both, both)  # type: ignore[arg-type]
    unknown = [str(key) for key in strength if key not in _KEYS]
    if unknown:
        raise BadArgument(f"{what}: {shown(unknown[0])} is not known; there are: {', '.join(_KEYS)}")
    te = _multiplier(what, strength.get("te", 1.0))
    unet = _multiplier(what, strength.get("unet", te))
    lbw = strength.get("lbw")
    if lbw is not None and not isinstance(lbw, str):
        raise BadArgument(f"{what}: lbw must be text, such as 'OUTALL', not {type(lbw).__name__}")
    return LoraTag(name, te, unet, strength.get("start"), strength.get("stop"), lbw)  # type: ignore[arg-type]


def _multiplier(what: str, value: object) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= MOST:
        raise BadArgument(f"{what}: the multiplier {_brief(value)} must be a finite number")
    if abs(number) > USUAL:
        log.warning("%s: the multiplier %g is far beyond the usual 0 to 1", what, number)
    return number


def _brief(value: object) -> str:
    return shown(value) if isinstance(value, str) else shown(repr(value))


# ---- one use -------------------------------------------------------------------------------------------


def _use(tag: LoraTag, path: Path, blocks: Blocks, steps: int | None) -> LoraUse:
    _check_multipliers(str(tag.name), tag.te, tag.unet)
    start = _share(tag, "start", tag.start, steps)
    stop = _share(tag, "stop", tag.stop, steps)
    if start is not None and stop is not None and start > stop:
        raise BadArgument(
            f"LoRA {shown(str(tag.name))}: start {tag.start} lies behind stop {tag.stop}; it would never act"
        )
    return LoraUse(path, tag.te, tag.unet, 0.0 if start is None else start, 1.0 if stop is None else stop, blocks)


def _share(tag: LoraTag, which: str, at: object, steps: int | None) -> float | None:
    """A step, or a share of the steps, as a share: step 1 starts at 0, and the last one stops at 1."""
    if at is None:
        return None
    what = f"LoRA {shown(str(tag.name))}: {which} {_brief(at)}"
    if isinstance(at, bool) or not isinstance(at, (int, float)):
        raise BadArgument(f"{what} must be a step such as 5, or a share of the steps such as 0.2")
    if isinstance(at, float):
        if not 0 <= at <= 1:
            raise BadArgument(f"{what} must be a share of the steps, 0.0 to 1.0; a whole number is a step")
        return at
    if at < 0:
        raise BadArgument(f"{what} must be 0 or more")
    if steps is None:
        raise BadArgument(f"{what} counts steps, and there is no run yet; give a share such as 0.2")
    return min(max(at - 1, 0) if which == "start" else at, steps) / steps


def _blocks(tag: LoraTag, family: str) -> Blocks:
    assert tag.lbw is not None
    if family not in FAMILIES:
        log.warning("LoRA %s: lbw has no effect on %s models", shown(str(tag.name)), family)
        return ()
    return read_blocks(tag.lbw, family)


def _check_multipliers(name: str, te: float, unet: float) -> None:
    for number in (te, unet):
        if not abs(number) <= MOST:
            raise BadArgument(f"LoRA {shown(name)}: its multipliers add up to {number}; they must be finite")
