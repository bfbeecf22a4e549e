"""Tiny random models of FLUX.1: the real structure, see tiny.py. Names and shapes are diffusers'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tiny
import tiny_dit
from tiny import Shapes, linear
from tiny_dit import Tensors


@dataclass(frozen=True)
class TinyFlux:
    """Sizes of a tiny FLUX.1. `inputs` are features of a 2 x 2 square: 64, Canny and Depth 128, Fill 384."""

    heads: int = 2
    head_size: int = 32
    axes: tuple[int, int, int] = (4, 14, 14)
    double_blocks: int = 2
    single_blocks: int = 2
    inputs: int = 64
    guidance: bool = True
    context: int = 32
    pooled: int = 64

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size


def transformer_shapes(c: TinyFlux) -> Shapes:
    """What FluxTransformer2DModel of these sizes holds."""
    s: Shapes = {}
    h = c.hidden
    linear(s, "x_embedder", c.inputs, h)
    linear(s, "context_embedder", c.context, h)
    embedders = {"timestep_embedder": 256, "text_embedder": c.pooled}
    if c.guidance:
        embedders["guidance_embedder"] = 256
    for name, inputs in embedders.items():
        linear(s, f"time_text_embed.{name}.linear_1", inputs, h)
        linear(s, f"time_text_embed.{name}.linear_2", h, h)
    for i in range(c.double_blocks):
        block = f"transformer_blocks.{i}"
        for norm, ff, projections, out, norms in (
            ("norm1", "ff", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k")),
            (
                "norm1_context",
                "ff_context",
                ("add_q_proj", "add_k_proj", "add_v_proj"),
                "to_add_out",
                ("norm_added_q", "norm_added_k"),
            ),
        ):
            linear(s, f"{block}.{norm}.linear", h, 6 * h)
            for part in (*projections, out):
                linear(s, f"{block}.attn.{part}", h, h)
            for part in norms:
                s[f"{block}.attn.{part}.weight"] = (c.head_size,)
            linear(s, f"{block}.{ff}.net.0.proj", h, 4 * h)
            linear(s, f"{block}.{ff}.net.2", 4 * h, h)
    for i in range(c.single_blocks):
        block = f"single_transformer_blocks.{i}"
        linear(s, f"{block}.norm.linear", h, 3 * h)
        for part in ("to_q", "to_k", "to_v"):
            linear(s, f"{block}.attn.{part}", h, h)
        for part in ("norm_q", "norm_k"):
            s[f"{block}.attn.{part}.weight"] = (c.head_size,)
        linear(s, f"{block}.proj_mlp", h, 4 * h)
        linear(s, f"{block}.proj_out", 5 * h, h)
    linear(s, "norm_out.linear", h, 2 * h)
    linear(s, "proj_out", h, 64)
    return s


@cache
def components(c: TinyFlux) -> dict[str, Tensors]:
    """All weights by component, as a diffusers folder names them."""
    return {
        "transformer": tiny.weights("transformer", transformer_shapes(c)),
        "vae": tiny.weights("vae", tiny_dit.vae_shapes()),
        "text_encoder": tiny.weights("text_encoder", tiny.clip_shapes(c.pooled, 2)),
        "text_encoder_2": tiny.weights("text_encoder_2", tiny_dit.t5_shapes(c.context)),
    }


def configs(c: TinyFlux) -> dict[str, dict[str, object]]:
    """The config.json of each component."""
    return {
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": c.inputs,
            "out_channels": 64,
            "num_layers": c.double_blocks,
            "num_single_layers": c.single_blocks,
            "attention_head_dim": c.head_size,
            "num_attention_heads": c.heads,
            "joint_attention_dim": c.context,
            "pooled_projection_dim": c.pooled,
            "guidance_embeds": c.guidance,
            "axes_dims_rope": list(c.axes),
        },
        "vae": tiny_dit.vae_config(0.3611, 0.1159),
        "text_encoder": tiny.clip_config(c.pooled, 2, quick=True),
        "text_encoder_2": tiny_dit.t5_config(c.context),
    }


def scheduler(c: TinyFlux) -> dict[str, object]:
    if not c.guidance:
        return {"shift": 1.0}
    return {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    }


def write_folder(c: TinyFlux, folder: Path, dtype: str = "float32") -> Path:
    """A diffusers folder of the tiny model."""
    parts = {part: {name: values.astype(dtype) for name, values in tensors.items()}
             for part, tensors in components(c).items()}  # fmt: skip
    return tiny_dit.write_folder(folder, parts, configs(c), scheduler(c), "FluxPipeline")


# Modules of a block by their diffusers names. Where several are one in the original, they are its rows in this order.
DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
}
SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
OTHERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
} | {
    f"{own}.{layer}_layer": (f"time_text_embed.{theirs}.linear_{i}",)
    for own, theirs in (
        ("time_in", "timestep_embedder"),
        ("vector_in", "text_embedder"),
        ("guidance_in", "guidance_embedder"),
    )
    for i, layer in ((1, "in"), (2, "out"))
}


def modules(c: TinyFlux) -> dict[str, tuple[str, ...]]:
    """Every module of the original, and what it is made of in diffusers."""
    out = {name: theirs for name, theirs in OTHERS.items() if c.guidance or not name.startswith("guidance_in")}
    for kind, count, table, prefix in (
        ("double_blocks", c.double_blocks, DOUBLE, "transformer_blocks"),
        ("single_blocks", c.single_blocks, SINGLE, "single_transformer_blocks"),
    ):
        for i in range(count):
            out |= {f"{kind}.{i}.{name}": tuple(f"{prefix}.{i}.{part}" for part in theirs)
                    for name, theirs in table.items()}  # fmt: skip
    return out


def original_transformer(c: TinyFlux, tensors: Tensors) -> Tensors:
    """The transformer's weights as Black Forest Labs' files have them."""
    out: Tensors = {}
    for name, theirs in modules(c).items():
        for leaf in ("weight", "bias"):
            if f"{theirs[0]}.{leaf}" not in tensors:
                continue
            values = np.concatenate([tensors[f"{part}.{leaf}"] for part in theirs])
            if name.startswith("final_layer.adaLN"):  # diffusers has the scale before the shift
                values = np.roll(values, len(values) // 2, axis=0)
            out[f"{name}.{'scale' if name.endswith('_norm') else leaf}"] = values
    return out


def single_tensors(c: TinyFlux) -> Tensors:
    """All weights in one file, as ComfyUI's checkpoints have them."""
    parts = components(c)
    out = {f"model.diffusion_model.{k}": v for k, v in original_transformer(c, parts["transformer"]).items()}
    out |= tiny_dit.original_vae(parts["vae"], "vae.")
    out |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in parts["text_encoder"].items()}
    return out | {f"text_encoders.t5xxl.transformer.{k}": v for k, v in parts["text_encoder_2"].items()}
