"""Tiny random models of Stable Diffusion 3 and 3.5: the real structure, in diffusers' names; see tiny.py."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import tiny
import tiny_dit
from tiny import Shapes, conv, linear
from tiny_dit import Tensors


@dataclass(frozen=True)
class TinySD3:
    """Sizes of a tiny SD3. `dual` blocks look at the picture twice, as the first of SD 3.5 medium."""

    heads: int = 1
    blocks: int = 3
    dual: int = 0
    norms: bool = False
    positions: int = 12
    context: int = 160  # more than both CLIPs side by side
    clip_l: int = 64
    clip_g: int = 64
    encoders: tuple[str, ...] = ("text_encoder", "text_encoder_2", "text_encoder_3")

    @property
    def hidden(self) -> int:
        return 64 * self.heads


def transformer_shapes(c: TinySD3) -> Shapes:
    """What SD3Transformer2DModel of these sizes holds."""
    s: Shapes = {"pos_embed.pos_embed": (1, c.positions**2, c.hidden)}
    h = c.hidden
    conv(s, "pos_embed.proj", 16, h, 2)
    linear(s, "context_embedder", c.context, h)
    for name, inputs in (("timestep_embedder", 256), ("text_embedder", c.clip_l + c.clip_g)):
        linear(s, f"time_text_embed.{name}.linear_1", inputs, h)
        linear(s, f"time_text_embed.{name}.linear_2", h, h)
    for i in range(c.blocks):
        block, last, dual = f"transformer_blocks.{i}", i == c.blocks - 1, i < c.dual
        linear(s, f"{block}.norm1.linear", h, (9 if dual else 6) * h)
        linear(s, f"{block}.norm1_context.linear", h, (2 if last else 6) * h)
        outs = ["to_out.0"] if last else ["to_out.0", "to_add_out"]
        for part in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", *outs):
            linear(s, f"{block}.attn.{part}", h, h)
        for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k") if c.norms else ():
            s[f"{block}.attn.{part}.weight"] = (64,)
        if dual:
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(s, f"{block}.attn2.{part}", h, h)
            for part in ("norm_q", "norm_k") if c.norms else ():
                s[f"{block}.attn2.{part}.weight"] = (64,)
        for part in ("ff",) if last else ("ff", "ff_context"):
            linear(s, f"{block}.{part}.net.0.proj", h, 4 * h)
            linear(s, f"{block}.{part}.net.2", 4 * h, h)
    linear(s, "norm_out.linear", h, 2 * h)
    linear(s, "proj_out", h, 64)
    return s


def component_shapes(c: TinySD3) -> dict[str, Shapes]:
    texts = {
        "text_encoder": tiny.clip_shapes(c.clip_l, 3, c.clip_l),
        "text_encoder_2": tiny.clip_shapes(c.clip_g, 3, c.clip_g),
        "text_encoder_3": tiny_dit.t5_shapes(c.context),
    }
    parts = {"transformer": transformer_shapes(c), "vae": tiny_dit.vae_shapes()}
    return parts | {name: shapes for name, shapes in texts.items() if name in c.encoders}


@cache
def components(c: TinySD3) -> dict[str, Tensors]:
    """All weights by component, as a diffusers folder names them."""
    return {component: tiny.weights(component, shapes) for component, shapes in component_shapes(c).items()}


def configs(c: TinySD3) -> dict[str, dict[str, object]]:
    """The config.json of each component."""
    projected = {"architectures": ["CLIPTextModelWithProjection"]}
    return {
        "transformer": {
            "_class_name": "SD3Transformer2DModel",
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": c.blocks,
            "attention_head_dim": 64,
            "num_attention_heads": c.heads,
            "joint_attention_dim": c.context,
            "caption_projection_dim": c.hidden,
            "pooled_projection_dim": c.clip_l + c.clip_g,
            "pos_embed_max_size": c.positions,
            "dual_attention_layers": list(range(c.dual)),
            "qk_norm": "rms_norm" if c.norms else None,
        },
        "vae": tiny_dit.vae_config(1.5305, 0.0609),
        "text_encoder": tiny.clip_config(c.clip_l, 3, quick=True) | projected,
        "text_encoder_2": tiny.clip_config(c.clip_g, 3, quick=False) | projected,
        "text_encoder_3": tiny_dit.t5_config(c.context),
    }


def write_folder(c: TinySD3, folder: Path, dtype: str = "float32") -> Path:
    """A diffusers folder of the tiny model."""
    parts = {part: {name: values.astype(dtype) for name, values in tensors.items()}
             for part, tensors in components(c).items()}  # fmt: skip
    return tiny_dit.write_folder(folder, parts, configs(c), {"shift": 3.0}, "StableDiffusion3Pipeline")


# Modules by their diffusers names; where several are one in the original, they are its rows in this order.
IMAGE = {
    "adaLN_modulation.1": ("norm1.linear",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "attn.ln_q": ("attn.norm_q",),
    "attn.ln_k": ("attn.norm_k",),
    "attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "attn2.proj": ("attn2.to_out.0",),
    "attn2.ln_q": ("attn2.norm_q",),
    "attn2.ln_k": ("attn2.norm_k",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
TEXT = {
    "adaLN_modulation.1": ("norm1_context.linear",),
    "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "attn.proj": ("attn.to_add_out",),
    "attn.ln_q": ("attn.norm_added_q",),
    "attn.ln_k": ("attn.norm_added_k",),
    "mlp.fc1": ("ff_context.net.0.proj",),
    "mlp.fc2": ("ff_context.net.2",),
}
OTHERS = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}


def modules(c: TinySD3) -> dict[str, tuple[str, ...]]:
    """Every module of the original, and what it is made of in diffusers; some are absent from some sizes."""
    out = dict(OTHERS)
    for i in range(c.blocks):
        for side, table in (("x_block", IMAGE), ("context_block", TEXT)):
            out |= {f"joint_blocks.{i}.{side}.{name}": tuple(f"transformer_blocks.{i}.{part}" for part in theirs)
                    for name, theirs in table.items()}  # fmt: skip
    return out


def swapped(c: TinySD3, module: str) -> bool:
    """Whether diffusers has the scale before the shift, where the original has the shift first."""
    last = f"joint_blocks.{c.blocks - 1}.context_block.adaLN_modulation.1"
    return module in (last, "final_layer.adaLN_modulation.1")


def original_transformer(c: TinySD3, tensors: Tensors) -> Tensors:
    """The transformer's weights as Stability AI's files have them."""
    out: Tensors = {"pos_embed": tensors["pos_embed.pos_embed"]}
    for name, theirs in modules(c).items():
        for leaf in ("weight", "bias"):
            if f"{theirs[0]}.{leaf}" in tensors:
                values = np.concatenate([tensors[f"{part}.{leaf}"] for part in theirs])
                out[f"{name}.{leaf}"] = np.roll(values, len(values) // 2, axis=0) if swapped(c, name) else values
    return out


def single_tensors(c: TinySD3) -> Tensors:
    """All weights in one file, as they were published."""
    parts = components(c)
    out = {f"model.diffusion_model.{k}": v for k, v in original_transformer(c, parts["transformer"]).items()}
    out |= tiny_dit.original_vae(parts["vae"], "first_stage_model.")
    places = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
    for component in c.encoders:
        out |= {f"text_encoders.{places[component]}.transformer.{k}": v for k, v in parts[component].items()}
    return out
