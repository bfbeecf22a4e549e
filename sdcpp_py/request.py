"""What ``SDContext.generate`` is asked for: arguments checked, and completed by what the model usually does."""

import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import _native, check
from .errors import BadArgument
from .files import AnyPath
from .image import open_picture, pixels
from .sizes import kontext_size, nearest_multiple

if TYPE_CHECKING:
    from ._native import _Defaults, _ModelInfo

Pair = tuple[int, int]
Picture = AnyPath | Image.Image | NDArray[np.uint8]

SEEDS: Final = 1 << 64


def prompts_of(prompt: object, prompts: object, batch_size: object) -> list[str]:
    """One prompt for all pictures, or one for each."""
    if prompts is None:
        return [check.text("prompt", prompt)]
    if prompt is not None:
        raise BadArgument("prompt: is given, and prompts as well; one of them says what to paint")
    texts = check.texts("prompts", prompts)
    if not texts:
        raise BadArgument("prompts: must be a list of texts, one for each picture")
    if check.whole("batch_size", batch_size, 1) not in (1, len(texts)):
        raise BadArgument(f"batch_size: is {batch_size}, but there are {len(texts)} prompts; leave it out")
    return texts


def seed_of(seed: object, batch_size: int) -> int:
    """The first picture's seed; None or -1: a new one."""
    number = -1 if seed is None else check.whole("seed", seed, -1, SEEDS - 1)
    if number == -1:
        return secrets.randbelow(1 << 32)
    if number + batch_size > SEEDS:
        raise BadArgument(f"seed {number}: leaves no seeds for {batch_size} pictures; the last is 2**64 - 1")
    return number


def size_of(width: object, height: object, like: Pair | None, info: "_ModelInfo") -> Pair:
    """Width and height in pixels: what is None is as near to those of `like` as the model paints, else the model's."""
    multiple, native = info["size_multiple"], info["native_size"]
    usual = tuple(nearest_multiple(side, multiple) for side in like) if like else (native, native)
    return (
        usual[0] if width is None else check.whole("width", width, 1),
        usual[1] if height is None else check.whole("height", height, 1),
    )


# ---- numbers and names ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to paint, as ``SDContext.generate`` explains it; None: not said."""

    steps: int | None = None
    cfg_scale: float | None = None
    guidance_rescale: float | None = None
    guidance: float | None = None
    shift: float | None = None
    sampler: str | None = None
    scheduler: str | None = None
    rng: str | None = None
    eta: float | None = None
    strength: float | None = None
    clip_skip: int | None = None
    redux_strength: float | None = None
    vae_tile: int | None = None

    def checked(self) -> "Settings":
        """The same in the types that the engine takes.

        Raises:
            BadArgument: A number out of range, or an unknown name.
        """
        return Settings(
            steps=check.optional(check.whole, "steps", self.steps, 1),
            cfg_scale=check.optional(check.number, "cfg_scale", self.cfg_scale),
            guidance_rescale=check.optional(check.number, "guidance_rescale", self.guidance_rescale, 0),
            guidance=check.optional(check.number, "guidance", self.guidance, 0),
            shift=check.optional(check.number, "shift", self.shift, 0),
            sampler=check.optional(check.one_of, "sampler", self.sampler, _native.samplers()),
            scheduler=check.optional(check.one_of, "scheduler", self.scheduler, _native.schedulers()),
            rng=check.optional(check.one_of, "rng", self.rng, _native.rngs()),
            eta=check.optional(check.number, "eta", self.eta, 0),
            strength=check.optional(check.number, "strength", self.strength),
            clip_skip=check.optional(check.whole, "clip_skip", self.clip_skip, 1),
            redux_strength=check.optional(check.number, "redux_strength", self.redux_strength),
            vae_tile=check.optional(check.whole, "vae_tile", self.vae_tile, 1),
        )

    def completed(self, defaults: "_Defaults", has_redux: bool) -> "Settings":
        """With the model's own where nothing was said; `has_redux`: there is a redux_image."""
        own_guidance = defaults["guidance"] if defaults["guidance"] >= 0 else None
        return replace(
            self,
            steps=self.steps or defaults["steps"],
            cfg_scale=defaults["cfg_scale"] if self.cfg_scale is None else self.cfg_scale,
            guidance=own_guidance if self.guidance is None else self.guidance,
            sampler=self.sampler or defaults["sampler"],
            scheduler=self.scheduler or defaults["scheduler"],
            strength=defaults["strength"] if self.strength is None else self.strength,
            clip_skip=self.clip_skip or defaults["clip_skip"] or None,
            redux_strength=1.0 if has_redux and self.redux_strength is None else self.redux_strength,
        )

    def native(self) -> dict[str, Any]:
        """As ``_native.Context.generate`` takes them, with its numbers for what is not said."""
        return {name: _NOT_SAID.get(name) if value is None else value for name, value in asdict(self).items()}


_NOT_SAID: Final = {
    "guidance_rescale": 0.0,
    "guidance": -1.0,
    "shift": 0.0,
    "eta": -1.0,
    "clip_skip": 0,
    "redux_strength": 1.0,
    "vae_tile": 0,
}


def told_sizes(
    original_size: object, crop_top_left: object, target_size: object, which: str = ""
) -> dict[str, Pair | None]:
    """The sizes that SDXL is told, checked, by the names of their arguments, which begin with `which`."""
    return {
        f"{which}original_size": check.optional(check.pair, f"{which}original_size", original_size, 1),
        f"{which}crop_top_left": check.optional(check.pair, f"{which}crop_top_left", crop_top_left, 0),
        f"{which}target_size": check.optional(check.pair, f"{which}target_size", target_size, 1),
    }


def native_sizes(told: Mapping[str, Pair | None]) -> tuple[int, int, int, int, int, int]:
    """The same as ``_native.Context.generate`` takes them, with its numbers for what is not said."""
    original, crop, target = told.values()
    return (*(original or (0, 0)), *(crop or (-1, -1)), *(target or (0, 0)))


# ---- pictures ------------------------------------------------------------------------------------------


def open_pictures(given: Mapping[str, object]) -> dict[str, Image.Image]:
    """Those that are given, by the names of their arguments.

    Raises:
        BadArgument: One is no picture, or a mask has nothing to mask.
        BadFile: One is damaged.
        Io: A file cannot be read.
    """
    if given["mask"] is not None and given["init_image"] is None:
        raise BadArgument("mask: says where to repaint init_image, which is missing")
    return {name: open_picture(source, name) for name, source in given.items() if source is not None}


def size_to_follow(opened: Mapping[str, Image.Image]) -> Pair | None:
    """The width and height that a picture made from these has where nothing else is said."""
    if "init_image" in opened:
        return opened["init_image"].size
    return kontext_size(opened["reference_image"].size) if "reference_image" in opened else None


def native_pictures(
    opened: Mapping[str, Image.Image], width: int, height: int, info: "_ModelInfo"
) -> dict[str, NDArray[np.uint8]]:
    """As ``_native.Context.generate`` takes them: of the size to paint, but for those that the model has a size for."""
    out = {}
    for name, picture in opened.items():
        if name == "reference_image":
            size = kontext_size(picture.size, width * height, info["size_multiple"])
            out[name] = pixels(picture, "RGB", size)
        elif name == "redux_image":
            side = info["redux_size"] or 1
            out[name] = pixels(picture, "RGB", (side, side), bicubic=True)
        else:
            out[name] = pixels(picture, "L" if name == "mask" else "RGB", (width, height))
    return out
