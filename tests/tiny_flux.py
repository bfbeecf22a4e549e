"""Tiny random models of FLUX.1: the real structure, see tiny.py. Names and shapes are diffusers'."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file
from tiny import Shapes, linear


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
    vae_widths: tuple[int, ...] = (32, 32, 32, 64)
    vae_blocks: int = 1

    @property
    def hidden(self) -> int:
        return self.heads * self.head_size

    @property
    def vae(self) -> tiny.TinySD1:
        return tiny.TinySD1(vae_widths=self.vae_widths, vae_blocks=self.vae_blocks)


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


def vae_shapes(c: TinyFlux) -> Shapes:
    """What an AutoencoderKL of 16 channels without the two outer convolutions holds."""
    return tiny.vae_shapes_of(c.vae, channels=16, quant=False)


def components(c: TinyFlux) -> dict[str, dict[str, np.ndarray]]:
    """All weights by component, as a diffusers folder names them."""
    return {
        "transformer": tiny.weights("transformer", transformer_shapes(c)),
        "vae": tiny.weights("vae", vae_shapes(c)),
    }


def configs(c: TinyFlux) -> dict[str, dict[str, object]]:
    """The config.json of each component."""
    vae = tiny.configs(c.vae)["vae"] | {
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
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
        "vae": vae,
    }


def write_folder(c: TinyFlux, folder: Path, dtype: str = "float32") -> Path:
    """A diffusers folder of the tiny model."""
    for component, tensors in components(c).items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(configs(c)[component], indent=1))
        save_file(
            {name: values.astype(dtype) for name, values in tensors.items()},
            folder / component / "diffusion_pytorch_model.safetensors",
        )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder
