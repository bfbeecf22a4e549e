"""A checkpoint's weights by the modules of its family, read one at a time: what LoRAs are taken from and put into."""

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np

from .. import check
from ..errors import BadFile
from ..files import AnyPath
from ..weights import Tensor, open_source
from ..weights.names import swapped_runs
from .outline import DIFFUSERS, LINEAR, Module, UNet, outline_of
from .source import Floats, Size, swapped_by_size

# Where files keep each component, under original names.
_HOMES: Final = {
    "denoiser": ("model.diffusion_model.", "diffusion_model.", ""),
    "clip": (
        "cond_stage_model.transformer.",
        "conditioner.embedders.0.transformer.",
        "text_encoders.clip_l.transformer.",
    ),
    "clip_2": ("text_encoders.clip_g.transformer.",),
    "t5": ("text_encoders.t5xxl.transformer.",),
}
_OPEN_CLIP: Final = {
    "clip": "cond_stage_model.model.",
    "clip_2": "conditioner.embedders.1.model.",
}
_OPEN_CLIP_LAYERS: Final = "transformer.resblocks."
_OPEN_CLIP_NAMES: Final = {
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
}
# Beside its layers; the projection is a parameter without a layer, with rows for inputs.
_OPEN_CLIP_OTHERS: Final = {
    "token_embedding.weight": ("text_model.embeddings.token_embedding", "weight"),
    "positional_embedding": ("text_model.embeddings.position_embedding", "weight"),
    "ln_final.weight": ("text_model.final_layer_norm", "weight"),
    "ln_final.bias": ("text_model.final_layer_norm", "bias"),
    "text_projection": ("text_projection", "weight"),
}


@dataclass(frozen=True)
class Slice:
    """Where a parameter, or a part of its rows, lies.

    Attributes:
        tensor: Its number in the checkpoint.
        module: The module that it belongs to.
        leaf: "weight" or "bias".
        first: The first row of the module that it holds, in units.
        units: How many units of rows.
        swaps: Whether it has the halves of these rows the other way round.
        part: Which part of the tensor it is, and of how many; (0, 1) is all of it.
        turned: Whether the tensor has columns for rows.
    """

    tensor: int
    module: int
    leaf: str
    first: int
    units: int
    swaps: bool
    part: tuple[int, int] = (0, 1)
    turned: bool = False

    def shape(self, tensor: Tensor) -> Size:
        """Of what it holds, as a matrix; vectors have no columns."""
        rows, *others = tensor.shape[::-1] if self.turned else tensor.shape
        return Size(rows // self.part[1], math.prod(others) if others else 0)

    def runs(self, first: int, last: int, rows: int) -> list[tuple[int, int]]:
        """Where rows first to last - 1 of the so many that it holds lie in it, and the other way round."""
        return swapped_runs(first, last, rows) if self.swaps else [(first, last)]


class Model:
    """A checkpoint, opened until ``close``.

    Attributes:
        path: The file, or the diffusers folder.
        outline: The modules of its family, in its own structure.
        sizes: Of the weights that it has.
        tensors: Everything in it.
    """

    def __init__(self, path: AnyPath) -> None:
        """Finds out which weight is where; reads none.

        Raises:
            BadFile: It is damaged, or no model of a known family.
            Unsupported: It is a pickle.
            Io: It cannot be read.
        """
        self.path = check.path("model", path)
        self.source = open_source(self.path)
        try:
            self._outline()
        except BaseException:
            self.close()
            raise

    def _outline(self) -> None:
        self.tensors = self.source.tensors
        names = [tensor.name for tensor in self.tensors]
        self.outline = outline_of(*_structure(self.path, names, [tensor.shape for tensor in self.tensors]))
        self.slices: dict[tuple[int, str], list[Slice]]
        self.sizes: dict[int, Size]
        self._place(names)
        if late := swapped_by_size(self.outline, self.sizes):
            self.outline = self.outline.with_swaps(late)
            self._place(names)

    def close(self) -> None:
        """Closes its files; nothing can be read any more."""
        self.source.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def family(self) -> str:
        """One of outline.FAMILIES."""
        return self.outline.family

    def weight(self, module: int | Module, leaf: str, first: int = 0, last: int | None = None) -> Floats:
        """Rows first to last - 1 of a parameter, all by default, in the original order: (rows, columns); vectors have
        one column.

        Raises:
            BadFile: The model has no such weight, or not all of its parts.
        """
        i = module if isinstance(module, int) else self.outline.place[module.component, module.name]
        found = sorted(self.slices.get((i, leaf), ()), key=lambda one: one.first)
        ours = self.outline.modules[i]
        if sum(one.units for one in found) != ours.units:
            raise BadFile(f"{self.path}: has no {ours.name}.{leaf}, or not all of it")
        parts: list[Floats] = []
        start = 0
        for one in found:
            rows = one.shape(self.tensors[one.tensor]).rows
            begin, end = max(first - start, 0), rows if last is None else min(last - start, rows)
            if begin < end:
                parts += [self._rows(one, *run) for run in one.runs(begin, end, rows)]
            start += rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows(self, one: Slice, first: int, last: int) -> Floats:
        tensor = self.tensors[one.tensor]
        begin = one.part[0] * one.shape(tensor).rows
        if one.turned or len(tensor.shape) < 2:
            values = tensor.array()
            return (values.T if one.turned else values.reshape(-1, 1))[begin + first : begin + last]
        lines = math.prod(tensor.shape[1:-1])
        return tensor.floats((begin + first) * lines, (begin + last) * lines).reshape(last - first, -1)

    # ---- opening ---------------------------------------------------------------------------------------

    def _place(self, names: list[str]) -> None:
        self.slices = {}
        for one in self._slices(names):
            self.slices.setdefault((one.module, one.leaf), []).append(one)
        self.sizes = dict(self._sizes())

    def _slices(self, names: list[str]) -> Iterator[Slice]:
        components = {f"{name}.": component for component, name in DIFFUSERS[self.family].items()}
        for number, name in enumerate(names):
            if not self.tensors[number].shape or not self.tensors[number].elements:
                continue
            yield from self._open_clip(number, name)
            path, _, leaf = name.rpartition(".")
            leaf = "weight" if leaf == "scale" else leaf
            if leaf not in ("weight", "bias"):
                continue
            for component, homes in _HOMES.items():
                for home in homes:
                    i = self.outline.place.get((component, path[len(home) :])) if path.startswith(home) else None
                    if i is not None:
                        yield Slice(number, i, leaf, 0, self.outline.modules[i].units, False)
                        break
            for prefix, component in components.items():
                found = self.outline.part.get((component, path[len(prefix) :])) if path.startswith(prefix) else None
                if found is not None:
                    part = self.outline.modules[found[0]].parts[found[1]]
                    yield Slice(number, found[0], leaf, part.first, part.units, part.swaps)

    def _open_clip(self, number: int, name: str) -> Iterator[Slice]:
        for component, home in _OPEN_CLIP.items():
            if not name.startswith(home):
                continue
            inner = name[len(home) :]
            if inner in _OPEN_CLIP_OTHERS:
                path, leaf = _OPEN_CLIP_OTHERS[inner]
                i = self.outline.place.get((component, path))
                if i is not None:
                    yield Slice(number, i, leaf, 0, 1, False, turned=inner == "text_projection")
            if not inner.startswith(_OPEN_CLIP_LAYERS):
                continue
            layer, _, rest = inner[len(_OPEN_CLIP_LAYERS) :].partition(".")
            path = f"text_model.encoder.layers.{layer}"
            if rest.startswith("attn.in_proj_"):
                for k, projection in enumerate(("q_proj", "k_proj", "v_proj")):
                    i = self.outline.place.get((component, f"{path}.self_attn.{projection}"))
                    if i is not None:
                        yield Slice(number, i, rest.removeprefix("attn.in_proj_"), 0, 1, False, (k, 3))
                continue
            for theirs, ours in _OPEN_CLIP_NAMES.items():
                i = self.outline.place.get((component, f"{path}.{ours[:-1]}"))
                if rest.startswith(theirs) and i is not None:
                    yield Slice(number, i, rest[len(theirs) :], 0, 1, False)

    def _sizes(self) -> Iterator[tuple[int, Size]]:
        for (i, leaf), found in self.slices.items():
            if leaf != "weight":
                continue
            held = [one.shape(self.tensors[one.tensor]) for one in found]
            rows, units = sum(size.rows for size in held), sum(one.units for one in found)
            yield i, Size(rows // units * self.outline.modules[i].units, held[0].columns)


@contextlib.contextmanager
def model_at(path: AnyPath | None) -> Iterator[Model | None]:
    """A model as long as it is needed; None where there is none."""
    if path is None:
        yield None
        return
    with Model(path) as model:
        yield model


# ---- families ------------------------------------------------------------------------------------------


def _structure(path: Path, names: list[str], shapes: list[tuple[int, ...]]) -> tuple[str, list[str], UNet | None]:
    """The family, the names, and the structure of the UNet where there is one."""
    every = " ".join(names)
    if "double_blocks." in every or "single_transformer_blocks." in every:
        return "flux", names, None
    if "joint_blocks." in every or "transformer.transformer_blocks." in every:
        return "sd3", names, None
    shape_of = dict(zip(names, shapes, strict=True))
    unet = _original_unet(names) if "input_blocks.0.0." in every else _diffusers_unet(names)
    if unet is None:
        raise BadFile(f"{path}: is no model of SD1, SD2, SDXL, SD3 or FLUX")
    projects = [shape for name, shape in shape_of.items() if name.endswith(".proj_in.weight")]
    linear = bool(projects) and len(projects[0]) == 2
    adds = "label_emb." in every or "add_embedding." in every
    texts = [shape for name, shape in shape_of.items() if name.endswith("attn2.to_k.weight")]
    is_open_clip = "cond_stage_model.model." in every or (bool(texts) and texts[0][1] == 1024)
    family = "sdxl" if adds else "sd2" if is_open_clip else "sd1"
    blocks, depths, middle = unet
    return family, names, UNet(depths, middle, blocks, LINEAR if linear else 1, adds)


_Found = tuple[int, tuple[int, ...], int]  # residual blocks per level, depth by level, depth in the middle


def _original_unet(names: Iterable[str]) -> _Found:
    downs: set[int] = set()
    last = 0
    depth: dict[int, int] = {}
    middle = 0
    for name in names:
        if match := re.search(r"(?:^|\.)input_blocks\.(\d+)\.(\d)\.(op\.)?(?:transformer_blocks\.(\d+)\.)?", name):
            n = int(match[1])
            last = max(last, n)
            if match[3]:
                downs.add(n)
            if match[4]:
                depth[n] = max(depth.get(n, 0), int(match[4]) + 1)
        elif match := re.search(r"(?:^|\.)middle_block\.1\.transformer_blocks\.(\d+)\.", name):
            middle = max(middle, int(match[1]) + 1)
    blocks = min(downs) - 1 if downs else last
    levels = len(downs) + 1
    return blocks, tuple(depth.get(1 + level * (blocks + 1), 0) for level in range(levels)), middle


def _diffusers_unet(names: Iterable[str]) -> _Found | None:
    blocks, levels, middle = 0, 0, 0
    depth: dict[int, int] = {}
    for name in names:
        if match := re.search(
            r"^(?:unet\.)?down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(?:transformer_blocks\.(\d+)\.)?", name
        ):
            level = int(match[1])
            levels, blocks = max(levels, level + 1), max(blocks, int(match[3]) + 1)
            if match[4]:
                depth[level] = max(depth.get(level, 0), int(match[4]) + 1)
        elif match := re.search(r"^(?:unet\.)?mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.", name):
            middle = max(middle, int(match[1]) + 1)
    return (blocks, tuple(depth.get(level, 0) for level in range(levels)), middle) if levels else None
