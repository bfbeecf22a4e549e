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

import numpy as np

from .. import check
from ..errors import BadArgument
from ..files import AnyPath
from ..prompt import LoraTag, shown
from .blocks import FAMILIES, Blocks, read_blocks
from .library import LoraLibrary

if TYPE_CHECKING:
    from .. import _native

log = logging.getLogger("sdcpp_py")

USUAL: Final = 10.0  # a multiplier beyond it is worth a warning
_KEYS: Final = ("te", "te2", "te3", "unet", "start", "stop", "lbw")
# Text encoders that a family has beside the one that "te" names; see engine's TextEncoder.
_MORE_ENCODERS: Final = {"sdxl": ("te2",), "sd3": ("te2", "te3"), "flux": ("te3",)}

Step = int | float  # a whole number counts steps from 1; one with a fraction is a share of all, from 0 to 1


class LoraOptions(TypedDict, total=False):
    """What loras= may say of one LoRA besides a plain multiplier; as in a tag."""

    te: float
    te2: float | None
    te3: float | None
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
        te: Multiplier for the text encoders: for CLIP-L or the only one.
        unet: Multiplier for the denoiser.
        start: Share of the steps before which the denoiser runs without it, from 0 to 1.
        stop: Share of the steps from which on it runs without it again.
        blocks: Paths of modules and factors for all below them, see blocks.py.
        te2: Multiplier for CLIP-G; None: as te.
        te3: Multiplier for T5; None: as te.
    """

    path: Path
    te: float = 1.0
    unet: float = 1.0
    start: float = 0.0
    stop: float = 1.0
    blocks: Blocks = ()
    te2: float | None = None
    te3: float | None = None

    def multipliers(self) -> "_Multipliers":
        """For the text encoders and the denoiser: te, te2, te3, unet."""
        te2, te3 = (self.te if te is None else te for te in (self.te2, self.te3))
        return self.te, te2, te3, self.unet

    def with_multipliers(self, te: float, te2: float, te3: float, unet: float) -> "LoraUse":
        """The same with others; those that are as te are not said."""
        return replace(self, te=te, te2=None if te2 == te else te2, te3=None if te3 == te else te3, unet=unet)

    def native(self) -> "_native._Lora":
        """What ``_native.Context`` takes."""
        te, te2, te3, unet = self.multipliers()
        return {
            "path": os.fsencode(self.path),
            "te": te,
            "te2": te2,
            "te3": te3,
            "unet": unet,
            "start": self.start,
            "stop": self.stop,
            "blocks": list(self.blocks),
        }


_Multipliers = tuple[float, float, float, float]


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
        family: Of the model, for lbw, te2 and te3.
        steps: How many a run has; None: steps cannot be counted, only shares given.

    Raises:
        BadArgument: A name that leads nowhere or out of the folder, a multiplier that is no finite number, an
            unknown option, an empty range of steps.
        Unsupported: A pickle.
        Io: A path that cannot be read.
    """
    wanted = [(tag, True) for tag in tags] + [(tag, False) for tag in _as_tags(loras)]
    parts: dict[LoraUse, list[_Multipliers]] = {}  # by all but the multipliers
    paths: dict[tuple[object, bool], Path] = {}
    places: dict[str | None, Blocks] = {None: ()}
    for tag, from_prompt in wanted:
        source = (tag.name, from_prompt)
        if source not in paths:
            paths[source] = library.find(tag.name) if from_prompt else library.locate(tag.name)
        if tag.lbw not in places:
            places[tag.lbw] = _blocks(tag, family)
        use = _use(_for_family(tag, family), paths[source], places[tag.lbw], steps)
        parts.setdefault(use.with_multipliers(0.0, 0.0, 0.0, 0.0), []).append(use.multipliers())
    # fsum rounds once, so that the order of tags does not matter.
    sums = [use.with_multipliers(*map(math.fsum, zip(*all_of, strict=True))) for use, all_of in parts.items()]
    uses = [use for use in sums if any(use.multipliers())]
    for use in uses:
        _check_multipliers(library.name_of(use.path), use.multipliers())
    return sorted(uses, key=lambda use: (str(use.path), use.start, use.stop, use.blocks))


def multipliers(library: LoraLibrary, uses: Iterable[LoraUse]) -> dict[str, dict[str, Any]]:
    """What is in force, by name: te and unet, and te2, te3, start, stop and blocks where they say anything."""
    state: dict[str, dict[str, Any]] = {}
    for use in uses:
        name, n = library.name_of(use.path), 2
        unique = name
        while unique in state:
            unique, n = f"{name} ({n})", n + 1
        entry: dict[str, Any] = {"te": use.te, "unet": use.unet}
        entry.update({key: te for key in ("te2", "te3") if (te := getattr(use, key)) not in (None, use.te)})
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
        options = [f"{key}={te:g}" for key in ("te2", "te3") if (te := getattr(tag, key)) is not None]
        options += [f"{key}={value}" for key in ("start", "stop", "lbw") if (value := getattr(tag, key)) is not None]
        name = library.name_of(library.locate(tag.name))
        tags.append(":".join([f"<lora:{name}", f"{tag.te:g}", f"{tag.unet:g}", *options]) + ">")
    return tags


# ---- the argument loras= -------------------------------------------------------------------------------


def entries(loras: object) -> list[Any]:
    """What the argument holds, as a list that may be read more than once, which generators may not.

    Raises:
        BadArgument: It is no list of LoRAs.
    """
    named = str(loras) if isinstance(loras, (str, os.PathLike)) else "pencil"
    series = loras.items() if isinstance(loras, Mapping) else loras
    return check.entries("loras", series, f"[({shown(named)}, 0.8)]")


def _as_tags(loras: object) -> list[LoraTag]:
    """The argument in the form of tags; their names may be paths of the caller's own."""
    return [_as_tag(entry) for entry in entries(loras)]


def _as_tag(entry: object) -> LoraTag:
    if isinstance(entry, (str, os.PathLike)):
        entry = (entry, 1.0)
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        raise BadArgument(f"loras: {check.brief(entry)} is no LoRA; write (name, 0.8)")
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
    te2, te3 = (None if strength.get(key) is None else _multiplier(what, strength[key]) for key in ("te2", "te3"))
    lbw = strength.get("lbw")
    if lbw is not None and not isinstance(lbw, str):
        raise BadArgument(f"{what}: lbw must be text, such as 'OUTALL', not {type(lbw).__name__}")
    return LoraTag(name, te, unet, strength.get("start"), strength.get("stop"), lbw, te2, te3)  # type: ignore[arg-type]


def _multiplier(what: str, value: object) -> float:
    number = check.number(f"{what}: the multiplier", value)
    if abs(number) > USUAL:
        log.warning("%s: the multiplier %g is far beyond the usual 0 to 1", what, number)
    return number


# ---- one use -------------------------------------------------------------------------------------------


def _use(tag: LoraTag, path: Path, blocks: Blocks, steps: int | None) -> LoraUse:
    start = _share(tag, "start", tag.start, steps)
    stop = _share(tag, "stop", tag.stop, steps)
    if start is not None and stop is not None and start > stop:
        raise BadArgument(
            f"LoRA {shown(str(tag.name))}: start {tag.start} lies behind stop {tag.stop}; it would never act"
        )
    times = 0.0 if start is None else start, 1.0 if stop is None else stop
    use = LoraUse(path, tag.te, tag.unet, *times, blocks, tag.te2, tag.te3)
    _check_multipliers(str(tag.name), use.multipliers())
    return use


def _share(tag: LoraTag, which: str, at: object, steps: int | None) -> float | None:
    """A step, or a share of the steps, as a share: step 1 starts at 0, and the last one stops at 1."""
    if at is None:
        return None
    what = f"LoRA {shown(str(tag.name))}: {which} {check.brief(at)}"
    if isinstance(at, (bool, np.bool_)) or not isinstance(at, (int, float, np.integer, np.floating)):
        raise BadArgument(f"{what} must be a step such as 5, or a share of the steps such as 0.2")
    if isinstance(at, (float, np.floating)):
        if not 0 <= at <= 1:
            raise BadArgument(f"{what} must be a share of the steps, 0.0 to 1.0; a whole number is a step")
        return float(at)
    at = int(at)
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


def _for_family(tag: LoraTag, family: str) -> LoraTag:
    """Without the multipliers of text encoders that models of this family lack."""
    for key, encoder in (("te2", "CLIP-G, of SDXL and SD3"), ("te3", "T5, of SD3 and FLUX")):
        if getattr(tag, key) is not None and key not in _MORE_ENCODERS.get(family, ()):
            log.warning("LoRA %s: %s is for %s; it has no effect here", shown(str(tag.name)), key, encoder)
            tag = replace(tag, te2=None) if key == "te2" else replace(tag, te3=None)
    return tag


def _check_multipliers(name: str, numbers: Iterable[float]) -> None:
    for number in numbers:
        if not abs(number) <= check.MOST:
            raise BadArgument(f"LoRA {shown(name)}: its multipliers add up to {number}; they must be finite")
