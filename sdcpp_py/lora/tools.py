"""The LoRA workbench: convert, merge, scale, resize and prune LoRA files of every trainer, without a model or torch.

All of them read any format that the engine reads, keep within the memory of the largest modules, write beside the
output and rename at the end, and never touch what they read.
"""

import fnmatch
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypedDict

from .. import check
from ..errors import BadArgument
from ..files import AnyPath
from ..progress import OnProgress
from ..prompt import LoraTag, shown
from . import spelling
from .blocks import FAMILIES as FAMILIES_WITH_BLOCKS
from .blocks import Blocks, read_blocks
from .model import Model, model_at
from .outline import FAMILIES, outline_of
from .rewrite import METHODS, Input, Plan, Rewritten, canonical, rewrite
from .source import LoraSource, described

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A path with a ratio in it, see ``read_tag``; a path and a ratio; a path alone, for 1; or all that a tag can say.
AnyLora = str | tuple[AnyPath, float] | os.PathLike[str] | LoraTag


class Options(TypedDict, total=False):
    """What all tools that rewrite LoRA files take, as ``convert`` tells of it."""

    type: str | None
    family: str | None
    model: AnyPath | None
    skip_unknown: bool
    threads: int | None
    on_step: OnProgress | None


def convert(
    path: AnyPath,
    output: AnyPath,
    *,
    to: str,
    type: str | None = None,
    family: str | None = None,
    model: AnyPath | None = None,
    skip_unknown: bool = False,
    threads: int | None = None,
    on_step: OnProgress | None = None,
) -> Rewritten:
    """Writes a LoRA in another format.

    Factors keep their values and types; where a format has no place for the scale it goes into up, which is then
    written as f32 unless its own type holds it exactly. Projections of attention are cut apart or put together as
    the format has them; parts with the same down share it again.

    Args:
        path: A LoRA of any format.
        output: The safetensors file to write.
        to: One of spelling.FORMATS.
        type: "f16", "bf16" or "f32" for all tensors; None: see above.
        family: One of outline.FAMILIES, where the keys leave it open.
        model: The base, for kinds that depend on its weights where the format cannot hold them.
        skip_unknown: Leave out what means nothing in the family, instead of refusing it.
        threads: Modules at a time; None: as many as there are cores, up to 4.
        on_step: Called with (done, all, name) after each module; False stops.

    Raises:
        BadArgument: An option is out of range, or `output` is `path`.
        BadFile: The file is damaged, or means nothing in any family.
        Unsupported: It is a pickle, or the format cannot hold what it does.
        Cancelled: `on_step` returned False.
        Io: A file cannot be read or written.
    """
    with model_at(model) as base:
        source = open_lora(path, family, base)
        plan = Plan(spelling.format_of(to, source.family), type=type, threads=threads_of(threads))
        return rewrite([Input(source)], output, plan, model=base, skip_unknown=skip_unknown, on_step=on_step)


def merge(
    loras: Iterable[AnyLora],
    output: AnyPath,
    *,
    to: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "sum",
    density: float | None = None,
    seed: int = 0,
    type: str | None = None,
    family: str | None = None,
    model: AnyPath | None = None,
    skip_unknown: bool = False,
    threads: int | None = None,
    on_step: OnProgress | None = None,
) -> Rewritten:
    """Writes the sum of LoRAs, each times its ratio, as one file.

    Any mix of formats, kinds, ranks and alphas. By default the sum is exact: factors stand side by side, with the
    ratio in up, once; what has no low rank becomes a whole difference where the format has such, else a pair with
    the identity.

    Args:
        loras: Paths and ratios, or paths alone; or "a.safetensors:0.7", "b.safetensors:te=0.5:unet=1:lbw=OUTALL" as
            prompts have it.
        output: The safetensors file to write.
        to: One of spelling.FORMATS; None: as the first file.
        rank: Lowers each module's rank to this, by QR and SVD; the result tells what was lost.
        energy: Lowers it to what holds this share of the squared singular values.
        method: "sum"; "ties" (arXiv 2306.01708), "dare" (2311.03099) or "dare-ties" on the weighted changes.
        density: The share of elements that ties and dare keep. [default: 0.5]
        seed: Of what dare drops.

    The rest and what it raises is as for ``convert``.
    """
    with model_at(model) as base:
        inputs = open_together(read_loras(loras), family, base)
        first = inputs[0].source
        plan = Plan(
            spelling.format_of(default_format(first) if to is None else to, first.family),
            rank=rank,
            energy=energy,
            method=method,
            density=_density(method, density),
            seed=seed,
            type=type,
            threads=threads_of(threads),
        )
        return rewrite(inputs, output, plan, model=base, skip_unknown=skip_unknown, on_step=on_step)


def scale(
    path: AnyPath,
    output: AnyPath,
    ratio: float,
    *,
    te: float | None = None,
    to: str | None = None,
    **options: "Unpack[Options]",
) -> Rewritten:
    """Writes a LoRA that acts at 1 as this one at `ratio` (`te` for text encoders). The rest is as for ``merge``."""
    unet = check.number("ratio", ratio)
    text = unet if te is None else check.number("te", te)
    return merge([LoraTag(str(check.path("path", path)), text, unet)], output, to=to, **options)


def resize(
    path: AnyPath,
    output: AnyPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str | None = None,
    **options: "Unpack[Options]",
) -> Rewritten:
    """Writes the nearest LoRA of a lower rank; strength stays. The rest is as for ``merge``."""
    if rank is None and energy is None:
        raise BadArgument("resize: give a rank, or an energy such as 0.95")
    return merge([LoraTag(str(check.path("path", path)))], output, rank=rank, energy=energy, to=to, **options)


def prune(
    path: AnyPath,
    output: AnyPath,
    *,
    keep: Sequence[str] = (),
    drop: Sequence[str] = (),
    to: str | None = None,
    **options: "Unpack[Options]",
) -> Rewritten:
    """Writes some modules of a LoRA only.

    Args:
        path: A LoRA of any format.
        output: The safetensors file to write.
        keep: Patterns with * and ?, such as "denoiser.single_blocks.*"; () keeps all. A module is called by its
            component, "denoiser", "clip", "clip_2" or "t5", and its original path.
        drop: Patterns of what goes.
        to: One of spelling.FORMATS; None: as the file.
        options: As for ``convert``.

    Raises:
        BadArgument: No pattern, or one that no module of the file fits; and what ``convert`` raises.
    """
    keep, drop = check.texts("keep", keep), check.texts("drop", drop)
    if not keep and not drop:
        raise BadArgument("prune: give patterns to keep or to drop, such as --drop 'clip.*'")
    with model_at(options.get("model")) as base:
        source = open_lora(path, options.get("family"), base)
        names = [canonical(source, i) for i in source.modules()]
        for pattern in (*keep, *drop):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise BadArgument(f"{source.path}: no module fits {shown(pattern)}; there is, for instance, {names[0]}")

        def stays(name: str) -> bool:
            wanted = not keep or any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)
            return wanted and not any(fnmatch.fnmatchcase(name, pattern) for pattern in drop)

        plan = Plan(
            spelling.format_of(default_format(source) if to is None else to, source.family),
            type=options.get("type"),
            threads=threads_of(options.get("threads")),
            keep=stays,
        )
        skip_unknown, on_step = options.get("skip_unknown", False), options.get("on_step")
        return rewrite([Input(source)], output, plan, model=base, skip_unknown=skip_unknown, on_step=on_step)


def default_format(source: LoraSource) -> str:
    """The format that most of a file's modules have, or the nearest that is written."""
    known = Counter(_NEAREST.get(str(stem["format"]), "kohya") for stem in source.native.stems() if not stem["absent"])
    return known.most_common(1)[0][0]


_NEAREST = {
    "peft": "diffusers",
    "plain": "diffusers",
    "old diffusers": "diffusers",
    "attention processor": "diffusers",
    "comfy": "comfy",
    "onetrainer": "onetrainer",
}


# ---- arguments -------------------------------------------------------------------------------------------


def read_tag(text: str) -> LoraTag:
    """ "a.safetensors:0.7" or "a.safetensors:te=0.5:unet=1:lbw=OUTALL"; what is no number or option is the path.

    Raises:
        BadArgument: More than two ratios.
    """
    path = text
    options: list[str] = []
    while ":" in path:
        rest, _, last = path.rpartition(":")
        if not rest or not _is_option(last):
            break
        path, options = rest, [last, *options]
    positional = [float(option) for option in options if "=" not in option]
    named = dict(option.split("=", 1) for option in options if "=" in option)
    if len(positional) > 2:
        raise BadArgument(
            f"{shown(text)}: has {len(positional)} ratios; there are one for the text encoders and one for the rest"
        )
    te = positional[0] if positional else 1.0
    unet = positional[-1] if positional else 1.0
    te, unet = float(named.get("te", te)), float(named.get("unet", unet))
    return LoraTag(path, te, unet, lbw=named.get("lbw"))


def _is_option(text: str) -> bool:
    key, equals, value = text.partition("=")
    if not equals:
        value = key
    elif key == "lbw":
        return True
    elif key not in ("te", "unet"):
        return False
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


def read_loras(loras: Iterable[AnyLora]) -> list[LoraTag]:
    """LoRAs as an argument names them.

    Raises:
        BadArgument: One is named otherwise, there is none, or a ratio is no finite number.
    """
    tags = [_read_lora(lora) for lora in check.entries("loras", loras, "[('a.safetensors', 0.8)]")]
    if not tags:
        raise BadArgument("loras: there is none; name one or more")
    return tags


def _read_lora(lora: object) -> LoraTag:
    if isinstance(lora, LoraTag):
        return lora
    if isinstance(lora, str):
        return read_tag(lora)
    if isinstance(lora, os.PathLike):
        return LoraTag(str(check.path("loras", lora)))
    if not isinstance(lora, (tuple, list)) or len(lora) != 2:
        raise BadArgument(f"loras: {check.brief(lora)} is no LoRA; write (path, 0.8)")
    path = str(check.path("loras", lora[0]))
    ratio = check.number(f"{path}: ratio", lora[1])
    return LoraTag(path, ratio, ratio)


def open_together(tags: Sequence[LoraTag], family: str | None, model: Model | None) -> list[Input]:
    """Several LoRAs as changes of the same modules.

    Keys of which some files leave the family open follow the other files; where there is none that all may be for,
    each keeps its own.
    """
    sources = [open_lora(tag.name, family, model) for tag in tags]
    shared = [one for one in sources[0].fitting if all(one in source.fitting for source in sources)]
    if shared and model is None:
        certain = [source.family for source in sources if len(source.fitting) == 1]
        common = min(shared, key=lambda one: one not in certain)
        outline = outline_of(common, [name for source in sources for name in source.names])
        sources = [
            source if source.outline.place == outline.place else LoraSource(source.path, outline=outline)
            for source in sources
        ]
    return [_input(tag, source) for tag, source in zip(tags, sources, strict=True)]


def _input(tag: LoraTag, source: LoraSource) -> Input:
    blocks: Blocks = ()
    if tag.lbw is not None:
        if source.family not in FAMILIES_WITH_BLOCKS:
            raise BadArgument(f"{source.path}: there are no block weights for {described(source.family)}")
        blocks = read_blocks(tag.lbw, source.family)
    if tag.te2 is not None or tag.te3 is not None:
        raise BadArgument(f"{source.path}: te2 and te3 are for painting; here te is for all text encoders")
    te, unet = (check.number(f"{source.path}: {name}", getattr(tag, name)) for name in ("te", "unet"))
    return Input(source, te, unet, blocks)


def open_lora(path: AnyPath, family: str | None, model: Model | None) -> LoraSource:
    """A LoRA file, against a model's own modules where it is at hand."""
    check.optional(check.one_of, "family", family, FAMILIES)
    if model is None:
        return LoraSource(path, family=family)
    return LoraSource(path, outline=model.outline, sizes=model.sizes)


def _density(method: str, density: float | None) -> float:
    if check.one_of("method", method, METHODS) == "sum" and density is not None:
        raise BadArgument("density: is for ties and dare; name a method")
    return 0.5 if density is None else check.number("density", density)


def threads_of(threads: int | None) -> int:
    """How many modules to work on at a time."""
    return min(4, os.cpu_count() or 1) if threads is None else check.whole("threads", threads, 1)
