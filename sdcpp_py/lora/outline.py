"""What models of each family consist of, as far as names of weights go: the structure alone, no sizes.

LoRA files name modules as the original code does or as diffusers does. Each row of the tables below is one module:
its original path, and its path in diffusers, or those of the parts that its rows are there. With these names the
engine resolves every trainer's spelling of them (native/src/lora/lora_names.cpp), so that files of a family can be
rewritten without a model of it at hand. Where the engine knows a family, tests compare its names with these.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Final

FAMILIES: Final = ("sd1", "sd2", "sdxl", "sd3", "flux")

# Of the sizes of a module: what multiplies whole inputs (linear), a convolution with its kernel's side, a vector
# (norm), or a table of embeddings.
LINEAR, NORM, TABLE = 0, -1, -2


@dataclass(frozen=True)
class Part:
    """Rows of a module that are a module of their own in diffusers.

    Attributes:
        diffusers: Its path behind the component.
        first: The first of its rows, in units that all parts of the module share.
        units: How many units of rows it has.
        swaps: Whether diffusers has the two halves of its rows the other way round.
    """

    diffusers: str
    first: int = 0
    units: int = 1
    swaps: bool = False


@dataclass(frozen=True)
class Module:
    """A module as the original code has it.

    Attributes:
        component: "denoiser", "clip", "clip_2" or "t5".
        name: Its original path behind the component; text encoders have transformers' paths.
        parts: One that is all of it, or several.
        form: LINEAR, NORM, TABLE, or the side of a convolution's kernel.
        leaf: What its main parameter is called.
    """

    component: str
    name: str
    parts: tuple[Part, ...]
    form: int = LINEAR
    leaf: str = "weight"

    @property
    def units(self) -> int:
        """Units of rows of all parts together."""
        return sum(part.units for part in self.parts)

    @property
    def taps(self) -> int:
        """Columns per input."""
        return max(1, self.form) ** 2

    def kernel(self) -> tuple[int, ...]:
        """The last dimensions of the weight, (kh, kw) of a convolution."""
        return (self.form, self.form) if self.form > 0 else ()


# ---- FLUX and SD 3 -------------------------------------------------------------------------------------
# A row is "original diffusers". Several names are parts, which lie one after another and are as high as each other,
# but for one behind a 4, which is four times as high; ~ tells that the halves are swapped.

# Prefixes of a section's rows, with * for a block's number, and the rows.
_Table = dict[tuple[str, str], str]

_FLUX: Final[_Table] = {
    ("", ""): """
        img_in                  x_embedder
        txt_in                  context_embedder
        time_in.in_layer        time_text_embed.timestep_embedder.linear_1
        time_in.out_layer       time_text_embed.timestep_embedder.linear_2
        vector_in.in_layer      time_text_embed.text_embedder.linear_1
        vector_in.out_layer     time_text_embed.text_embedder.linear_2
        guidance_in.in_layer    time_text_embed.guidance_embedder.linear_1
        guidance_in.out_layer   time_text_embed.guidance_embedder.linear_2
        final_layer.adaLN_modulation.1  ~norm_out.linear
        final_layer.linear      proj_out
    """,
    ("double_blocks.*.", "transformer_blocks.*."): """
        img_mod.lin    norm1.linear
        txt_mod.lin    norm1_context.linear
        img_attn.qkv   attn.to_q attn.to_k attn.to_v
        txt_attn.qkv   attn.add_q_proj attn.add_k_proj attn.add_v_proj
        img_attn.proj  attn.to_out.0
        txt_attn.proj  attn.to_add_out
        img_mlp.0      ff.net.0.proj
        img_mlp.2      ff.net.2
        txt_mlp.0      ff_context.net.0.proj
        txt_mlp.2      ff_context.net.2
        img_attn.norm.query_norm.scale  attn.norm_q
        img_attn.norm.key_norm.scale    attn.norm_k
        txt_attn.norm.query_norm.scale  attn.norm_added_q
        txt_attn.norm.key_norm.scale    attn.norm_added_k
    """,
    ("single_blocks.*.", "single_transformer_blocks.*."): """
        modulation.lin         norm.linear
        linear1                attn.to_q attn.to_k attn.to_v 4proj_mlp
        linear2                proj_out
        norm.query_norm.scale  attn.norm_q
        norm.key_norm.scale    attn.norm_k
    """,
}

_SD3: Final[_Table] = {
    ("", ""): """
        x_embedder.proj     pos_embed.proj
        context_embedder    context_embedder
        t_embedder.mlp.0    time_text_embed.timestep_embedder.linear_1
        t_embedder.mlp.2    time_text_embed.timestep_embedder.linear_2
        y_embedder.mlp.0    time_text_embed.text_embedder.linear_1
        y_embedder.mlp.2    time_text_embed.text_embedder.linear_2
        final_layer.adaLN_modulation.1  ~norm_out.linear
        final_layer.linear  proj_out
    """,
    ("joint_blocks.*.x_block.", "transformer_blocks.*."): """
        adaLN_modulation.1  norm1.linear
        attn.qkv    attn.to_q attn.to_k attn.to_v
        attn.proj   attn.to_out.0
        attn.ln_q   attn.norm_q
        attn.ln_k   attn.norm_k
        attn2.qkv   attn2.to_q attn2.to_k attn2.to_v
        attn2.proj  attn2.to_out.0
        attn2.ln_q  attn2.norm_q
        attn2.ln_k  attn2.norm_k
        mlp.fc1     ff.net.0.proj
        mlp.fc2     ff.net.2
    """,
    ("joint_blocks.*.context_block.", "transformer_blocks.*."): """
        adaLN_modulation.1  norm1_context.linear
        attn.qkv   attn.add_q_proj attn.add_k_proj attn.add_v_proj
        attn.proj  attn.to_add_out
        attn.ln_q  attn.norm_added_q
        attn.ln_k  attn.norm_added_k
        mlp.fc1    ff_context.net.0.proj
        mlp.fc2    ff_context.net.2
    """,
}


def _rows(table: _Table, blocks: Mapping[str, int]) -> Iterator[Module]:
    for (original, diffusers), rows in table.items():
        for block in range(blocks[diffusers.partition(".")[0]] if diffusers else 1):
            for row in filter(None, map(str.split, rows.splitlines())):
                yield _row(row, original.replace("*", str(block)), diffusers.replace("*", str(block)))


def _row(row: list[str], original: str, diffusers: str) -> Module:
    name, leaf = original + row[0].removesuffix(".scale"), "scale" if row[0].endswith(".scale") else "weight"
    is_norm = leaf == "scale" or ".ln_" in name
    parts: list[Part] = []
    for spelled in row[1:]:
        mark = spelled[0] if spelled[0] in "~4" else ""
        first = parts[-1].first + parts[-1].units if parts else 0
        parts.append(Part(diffusers + spelled.removeprefix(mark), first, 4 if mark == "4" else 1, mark == "~"))
    form = NORM if is_norm else 2 if name == "x_embedder.proj" else LINEAR
    return Module("denoiser", name, tuple(parts), form, leaf)


# ---- UNets ---------------------------------------------------------------------------------------------

_RESNET: Final = (
    ("norm1", "in_layers.0", NORM),
    ("conv1", "in_layers.2", 3),
    ("time_emb_proj", "emb_layers.1", LINEAR),
    ("norm2", "out_layers.0", NORM),
    ("conv2", "out_layers.3", 3),
    ("conv_shortcut", "skip_connection", 1),
)
_BLOCK: Final = (
    *(
        f"{attention}.{projection}"
        for attention in ("attn1", "attn2")
        for projection in ("to_q", "to_k", "to_v", "to_out.0")
    ),
    "ff.net.0.proj",
    "ff.net.2",
)


@dataclass(frozen=True)
class UNet:
    """The structure of a UNet.

    Attributes:
        depths: Transformer blocks per attention, by level from the largest resolution; 0: no attention.
        middle: The same in the middle.
        blocks: Residual blocks per level on the way down; one more on the way up.
        projects: The form of proj_in and proj_out, a convolution's 1 or LINEAR.
        adds: Whether there is an embedding of sizes beside that of time.
    """

    depths: tuple[int, ...] = (1, 1, 1, 0)
    middle: int = 1
    blocks: int = 2
    projects: int = 1
    adds: bool = False

    def modules(self) -> Iterator[Module]:
        """By the rules of the conversion between both layouts, for any number of levels."""
        last = len(self.depths) - 1
        yield _same("input_blocks.0.0", "conv_in", 3)
        yield _same("time_embed.0", "time_embedding.linear_1")
        yield _same("time_embed.2", "time_embedding.linear_2")
        if self.adds:
            yield _same("label_emb.0.0", "add_embedding.linear_1")
            yield _same("label_emb.0.2", "add_embedding.linear_2")
        place = 1
        for level, depth in enumerate(self.depths):
            for i in range(self.blocks):
                yield from self._pair(f"input_blocks.{place}", f"down_blocks.{level}", i, depth)
                place += 1
            if level < last:
                yield _same(f"input_blocks.{place}.0.op", f"down_blocks.{level}.downsamplers.0.conv", 3)
                place += 1
        yield from self._resnet("middle_block.0", "mid_block.resnets.0")
        yield from self._transformer("middle_block.1", "mid_block.attentions.0", self.middle)
        yield from self._resnet("middle_block.2", "mid_block.resnets.1")
        for up, depth in enumerate(reversed(self.depths)):
            for i in range(self.blocks + 1):
                place = up * (self.blocks + 1) + i
                yield from self._pair(f"output_blocks.{place}", f"up_blocks.{up}", i, depth)
            if up < last:
                at = 2 if depth else 1
                yield _same(f"output_blocks.{place}.{at}.conv", f"up_blocks.{up}.upsamplers.0.conv", 3)
        yield _same("out.0", "conv_norm_out", NORM)
        yield _same("out.2", "conv_out", 3)

    def _pair(self, original: str, diffusers: str, i: int, depth: int) -> Iterator[Module]:
        yield from self._resnet(f"{original}.0", f"{diffusers}.resnets.{i}")
        if depth:
            yield from self._transformer(f"{original}.1", f"{diffusers}.attentions.{i}", depth)

    def _resnet(self, original: str, diffusers: str) -> Iterator[Module]:
        for theirs, ours, form in _RESNET:
            yield _same(f"{original}.{ours}", f"{diffusers}.{theirs}", form)

    def _transformer(self, original: str, diffusers: str, depth: int) -> Iterator[Module]:
        named = [("norm", NORM), ("proj_in", self.projects), ("proj_out", self.projects)]
        for block in range(depth):
            named += [(f"transformer_blocks.{block}.{name}", LINEAR) for name in _BLOCK]
            named += [(f"transformer_blocks.{block}.norm{i}", NORM) for i in (1, 2, 3)]
        for name, form in named:
            yield _same(f"{original}.{name}", f"{diffusers}.{name}", form)


def _same(original: str, diffusers: str, form: int = LINEAR, component: str = "denoiser") -> Module:
    return Module(component, original, (Part(diffusers),), form)


_UNETS: Final = {
    "sd1": UNet(),
    "sd2": UNet(projects=LINEAR),
    "sdxl": UNet(depths=(0, 2, 10), middle=10, projects=LINEAR, adds=True),
}

# ---- text encoders, as transformers names them -----------------------------------------------------------


def _clip(component: str, layers: int) -> Iterator[Module]:
    def named(name: str, form: int = LINEAR) -> Module:
        return _same(name, name, form, component)

    yield named("text_model.embeddings.token_embedding", TABLE)
    yield named("text_model.embeddings.position_embedding", TABLE)
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield named(f"{layer}.self_attn.{projection}")
        yield named(f"{layer}.mlp.fc1")
        yield named(f"{layer}.mlp.fc2")
        yield named(f"{layer}.layer_norm1", NORM)
        yield named(f"{layer}.layer_norm2", NORM)
    yield named("text_model.final_layer_norm", NORM)
    yield named("text_projection")


def _t5(blocks: int) -> Iterator[Module]:
    def named(name: str, form: int = LINEAR) -> Module:
        return _same(name, name, form, "t5")

    yield named("shared", TABLE)
    for i in range(blocks):
        block = f"encoder.block.{i}.layer"
        for projection in "qkvo":
            yield named(f"{block}.0.SelfAttention.{projection}")
        yield named(f"{block}.0.layer_norm", NORM)
        for projection in ("wi_0", "wi_1", "wo"):
            yield named(f"{block}.1.DenseReluDense.{projection}")
        yield named(f"{block}.1.layer_norm", NORM)
    yield named("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", TABLE)
    yield named("encoder.final_layer_norm", NORM)


# ---- families ------------------------------------------------------------------------------------------

# Where the engine looks for each component, and diffusers' names for them.
PLACES: Final = {
    "denoiser": "model.diffusion_model.",
    "clip": "text_encoders.clip_l.transformer.",
    "clip_2": "text_encoders.clip_g.transformer.",
    "t5": "text_encoders.t5xxl.transformer.",
}
_TEXT: Final = {"clip": "text_encoder", "clip_2": "text_encoder_2", "t5": "text_encoder_3"}
DIFFUSERS: Final = {
    "sd1": {"denoiser": "unet", "clip": "text_encoder"},
    "sd2": {"denoiser": "unet", "clip": "text_encoder"},
    "sdxl": {"denoiser": "unet", "clip": "text_encoder", "clip_2": "text_encoder_2"},
    "sd3": {"denoiser": "transformer", **_TEXT},
    "flux": {"denoiser": "transformer", "clip": "text_encoder", "t5": "text_encoder_2"},
}


@dataclass(frozen=True)
class Outline:
    """All modules of a family, and where each name leads.

    Attributes:
        family: One of FAMILIES.
        modules: In the model's order.
    """

    family: str
    modules: tuple[Module, ...] = field(repr=False)

    @cached_property
    def place(self) -> dict[tuple[str, str], int]:
        """Indices of modules by component and original path."""
        return {(module.component, module.name): i for i, module in enumerate(self.modules)}

    @cached_property
    def part(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Indices of modules and of their parts, by component and diffusers' path."""
        return {
            (module.component, part.diffusers): (i, k)
            for i, module in enumerate(self.modules)
            for k, part in enumerate(module.parts)
        }

    def with_swaps(self, indices: Iterable[int]) -> "Outline":
        """The same with swapped halves in these modules, which only their sizes tell."""
        swapped = set(indices)
        modules = (
            replace(module, parts=tuple(replace(part, swaps=True) for part in module.parts)) if i in swapped else module
            for i, module in enumerate(self.modules)
        )
        return Outline(self.family, tuple(modules)) if swapped else self


def outline_of(family: str, names: Iterable[str] = (), unet: UNet | None = None) -> Outline:
    """The outline of a family, with as many blocks as it usually has, or as these names of tensors tell.

    Args:
        family: One of FAMILIES.
        names: Keys of a LoRA file, or of a checkpoint.
        unet: The structure of the UNet where it is not the family's own.
    """
    return _outline(family, unet, tuple(sorted(_counts(names).items())))


@lru_cache(maxsize=16)
def _outline(family: str, unet: UNet | None, counted: tuple[tuple[str, int], ...]) -> Outline:
    count = Counter(dict(counted))
    double = max(count[word] for word in ("transformer_blocks", "double_blocks", "joint_blocks"))
    single = max(count[word] for word in ("single_transformer_blocks", "single_blocks"))
    denoiser: Iterator[Module]
    if family in _UNETS:
        denoiser = (unet or _UNETS[family]).modules()
    elif family == "flux":
        denoiser = _rows(_FLUX, {"transformer_blocks": max(19, double), "single_transformer_blocks": max(38, single)})
    else:
        denoiser = _rows(_SD3, {"transformer_blocks": max(24, double)})
    modules = list(denoiser)
    for component in DIFFUSERS[family]:
        if component in ("clip", "clip_2"):
            modules += _clip(
                component, max(32 if component == "clip_2" else 24 if family == "sd2" else 12, count["layers"])
            )
        elif component == "t5":
            modules += _t5(max(24, count["block"]))
    return Outline(family, tuple(modules))


_NUMBERED: Final = re.compile(
    r"(single_transformer_blocks|transformer_blocks|double_blocks|single_blocks|joint_blocks|layers|block)[._](\d{1,3})(?=[._])"
)


def _counts(names: Iterable[str]) -> dict[str, int]:
    """How many blocks of each kind the names tell of, at the least."""
    out: dict[str, int] = {}
    for name in names:
        for word, number in _NUMBERED.findall(name):
            out[word] = max(out.get(word, 0), int(number) + 1)
    return out
