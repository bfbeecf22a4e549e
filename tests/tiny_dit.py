"""What tiny FLUX.1 and SD3 models have in common: T5, an autoencoder of 16 channels, and their files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import tiny
import tiny_sdxl
from safetensors.numpy import save_file
from tiny import Shapes, linear

Tensors = dict[str, np.ndarray]

VAE = tiny.TinySD1()  # for the widths of its autoencoder
T5_LAYERS = 2


def t5_shapes(width: int) -> Shapes:
    """What T5EncoderModel holds: T5 v1.1 of two layers and four heads of 16, with the vocabulary of T5 itself."""
    s: Shapes = {"shared.weight": (32128, width)}
    for i in range(T5_LAYERS):
        attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for part in "qkv":
            linear(s, f"{attention}.SelfAttention.{part}", width, 64, bias=False)
        linear(s, f"{attention}.SelfAttention.o", 64, width, bias=False)
        s[f"{attention}.layer_norm.weight"] = s[f"{feed}.layer_norm.weight"] = (width,)
        linear(s, f"{feed}.DenseReluDense.wi_0", width, 2 * width, bias=False)
        linear(s, f"{feed}.DenseReluDense.wi_1", width, 2 * width, bias=False)
        linear(s, f"{feed}.DenseReluDense.wo", 2 * width, width, bias=False)
    s["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    s["encoder.final_layer_norm.weight"] = (width,)
    return s


def t5_config(width: int) -> dict[str, object]:
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": width,
        "d_kv": 16,
        "d_ff": 2 * width,
        "num_layers": T5_LAYERS,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
    }


def vae_shapes() -> Shapes:
    """What an AutoencoderKL of 16 channels holds, without the two outer convolutions."""
    return tiny.vae_shapes_of(VAE, channels=16, quant=False)


def vae_config(scale: float, shift: float) -> dict[str, object]:
    return tiny.configs(VAE)["vae"] | {
        "latent_channels": 16,
        "scaling_factor": scale,
        "shift_factor": shift,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def original_vae(tensors: Tensors, prefix: str) -> Tensors:
    """The autoencoder as single files have it."""
    out: Tensors = {}
    for name, values in tensors.items():
        is_matrix = ".attentions.0.to_" in name and values.ndim == 2
        original = f"{prefix}{tiny_sdxl.vae_name(name, len(VAE.vae_widths))}"
        out[original] = values[:, :, None, None] if is_matrix else values  # 1x1 convolutions there
    return out


def write_folder(
    folder: Path,
    parts: dict[str, Tensors],
    configs: dict[str, dict[str, object]],
    scheduler: dict[str, object],
    name: str,
) -> Path:
    """A diffusers folder."""
    for component, tensors in parts.items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        (folder / component / "config.json").write_text(json.dumps(configs[component], indent=1))
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(tensors, folder / component / f"{stem}.safetensors")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", **scheduler}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def save(tensors: Tensors, path: Path, dtype: str = "float32") -> Path:
    save_file({name: np.ascontiguousarray(values.astype(dtype)) for name, values in tensors.items()}, path)
    return path
