"""Tiny random models of Stable Diffusion 2.x and XL, and single files of them under the original names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny
from safetensors.numpy import save_file

SD2 = tiny.TinySD1(unet_widths=(64, 128), head_size=64, open_clip=True)
# As the models for 768 pixels, with more blocks and levels, and inpainting inputs.
SD2_V_DEEP = tiny.TinySD1(
    unet_widths=(64, 64, 128),
    unet_attends=(True, True, False),
    unet_blocks=2,
    unet_inputs=9,
    head_size=64,
    text_width=128,
    text_layers=3,
    open_clip=True,
    prediction="v_prediction",
)
SDXL = tiny.TinySD1(
    unet_widths=(64, 128),
    unet_attends=(False, True),
    unet_depths=(1, 2),
    head_size=64,
    text_2_width=128,
    vae_scale=0.13025,
    pipeline="StableDiffusionXLPipeline",
)
SDXL_DEEP = tiny.TinySD1(
    unet_widths=(64, 64, 128),
    unet_attends=(False, True, True),
    unet_depths=(1, 2, 3),
    unet_blocks=2,
    unet_inputs=9,
    head_size=64,
    text_2_width=64,
    text_layers=3,
    vae_scale=0.13025,
    pipeline="StableDiffusionXLPipeline",
)

# As Segmind's SSD-1B: no attention in the middle, and other depths on the way up than on the way down.
SSD_1B = tiny.TinySD1(
    unet_widths=(64, 64, 128),
    unet_attends=(False, True, True),
    unet_depths=(1, 2, 3),
    unet_up_depths=((3, 3, 4), (2, 1, 1), (1, 1, 1)),
    unet_middle="residual",
    unet_blocks=2,
    head_size=64,
    text_2_width=128,
    vae_scale=0.13025,
    pipeline="StableDiffusionXLPipeline",
)
# As KOALA-700M: one block a level, and nothing in the middle.
KOALA = replace(SSD_1B, unet_blocks=1, unet_up_depths=(), unet_middle="none")
# As NoobAI's v-prediction model.
SDXL_V = replace(SDXL, prediction="v_prediction", zero_snr=True)

Tensors = dict[str, np.ndarray]


def open_clip(hf: Tensors, layers: int) -> Tensors:
    """A CLIPTextModel's tensors as OpenCLIP has them: fused projections, and its last matrix transposed."""
    text = "text_model."
    out = {
        "positional_embedding": hf[text + "embeddings.position_embedding.weight"],
        "token_embedding.weight": hf[text + "embeddings.token_embedding.weight"],
        "ln_final.weight": hf[text + "final_layer_norm.weight"],
        "ln_final.bias": hf[text + "final_layer_norm.bias"],
        "logit_scale": np.float32(4.6).reshape(()),
    }
    names = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for i in range(layers):
        from_layer, to_layer = f"{text}encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for leaf in ("weight", "bias"):
            parts = [hf[f"{from_layer}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            out[f"{to_layer}attn.in_proj_{leaf}"] = np.concatenate(parts)
            for theirs, ours in names.items():
                out[f"{to_layer}{ours}.{leaf}"] = hf[f"{from_layer}{theirs}.{leaf}"]
    if "text_projection.weight" in hf:
        out["text_projection"] = np.ascontiguousarray(hf["text_projection.weight"].T)
    return out


def unet_name(name: str, model: tiny.TinySD1) -> str:
    """A UNet's tensor as the original checkpoints call it."""
    import lora_files

    module, _, leaf = name.rpartition(".")
    return f"{lora_files.original(f'unet.{module}', model)}.{leaf}"


def vae_name(name: str, levels: int) -> str:
    """An autoencoder's tensor as the original checkpoints call it."""
    words = name.split(".")
    if "mid_block" in words:
        at = words.index("mid_block")
        place = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}
        words[at : at + 3] = ["mid", place[".".join(words[at + 1 : at + 3])]]
    elif "down_blocks" in words:
        words[1] = "down"
        words[3:5] = ["block", words[4]] if words[3] == "resnets" else ["downsample"]
    elif "up_blocks" in words:
        words[1:3] = ["up", str(levels - 1 - int(words[2]))]
        words[3:5] = ["block", words[4]] if words[3] == "resnets" else ["upsample"]
    elif "conv_norm_out" in words:
        words[1] = "norm_out"
    inner = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    return ".".join(inner.get(word, word) for word in words).replace("to_out.0", "proj_out")


def single_tensors(model: tiny.TinySD1, parts: dict[str, Tensors] | None = None) -> Tensors:
    """All weights of a model under the names of the original single files."""
    parts = parts or tiny.components(model)
    out = {f"model.diffusion_model.{unet_name(name, model)}": values for name, values in parts["unet"].items()}
    for name, values in parts["vae"].items():
        is_matrix = ".attentions.0.to_" in name and values.ndim == 2
        original = f"first_stage_model.{vae_name(name, len(model.vae_widths))}"
        out[original] = values[:, :, None, None] if is_matrix else values  # 1x1 convolutions in single files
    if model.text_2_width:
        second = open_clip(parts["text_encoder_2"], model.text_2_layers)
        out |= {f"conditioner.embedders.0.transformer.{name}": values for name, values in parts["text_encoder"].items()}
        out |= {f"conditioner.embedders.1.model.{name}": values for name, values in second.items()}
    elif model.open_clip:
        text = open_clip(parts["text_encoder"], model.text_layers)
        last = f"transformer.resblocks.{model.text_layers - 1}."  # and one more, which nothing uses
        unused = {name.replace(last, f"transformer.resblocks.{model.text_layers}."): np.zeros_like(values)
                  for name, values in text.items() if name.startswith(last)}  # fmt: skip
        out |= {f"cond_stage_model.model.{name}": values for name, values in (text | unused).items()}
    else:
        out |= {f"cond_stage_model.transformer.{name}": values for name, values in parts["text_encoder"].items()}
    return out


def write_single(model: tiny.TinySD1, path: Path, dtype: str = "float32") -> Path:
    """A single file, as the originals were published."""
    tensors = {name: np.ascontiguousarray(values.astype(dtype)) for name, values in single_tensors(model).items()}
    save_file(tensors, path, {"prediction_type": model.prediction})
    return path
