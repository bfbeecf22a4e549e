"""Tiny random models of every family: the real structure, a few thousand weights, nothing downloaded.

A weight is drawn from the hash of its own name, so C++, numpy and torch agree without files, and adding a
layer changes no other. Names and shapes are diffusers' and transformers' (numpy order, slowest dimension first).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class TinySD1:
    """Sizes of a tiny Stable Diffusion 1.x, and what 2.x and XL have otherwise (see tiny_sdxl.py).

    The vocabulary is CLIP's own: token ids are not remapped.
    """

    unet_widths: tuple[int, ...] = (32, 64)
    unet_attends: tuple[bool, ...] = (True, False)
    unet_depths: tuple[int, ...] = (1, 1, 1, 1)
    unet_up_depths: tuple[tuple[int, ...], ...] = ()  # by block and attention of the way up; else as the way down
    unet_middle: str = "whole"  # or "residual", one block without attention, or "none"
    unet_blocks: int = 1
    unet_inputs: int = 4
    text_width: int = 64
    text_layers: int = 2
    vae_widths: tuple[int, ...] = (32, 32, 32, 64)
    vae_blocks: int = 1
    vae_scale: float = 0.18215
    heads: int = 8
    prediction: str = "epsilon"
    zero_snr: bool = False
    open_clip: bool = False  # the only encoder is OpenCLIP's: gelu, and padded with "!"
    head_size: int = 0  # instead of `heads`; then proj_in and proj_out are matrices, too
    text_2_width: int = 0  # of XL's OpenCLIP-bigG
    text_2_layers: int = 3
    pipeline: str = "StableDiffusionPipeline"

    @property
    def context_width(self) -> int:
        return self.text_width + self.text_2_width

    @property
    def vector_width(self) -> int:
        """Of what XL is told of the picture as a whole: pooled text, and six numbers in 256 waves each."""
        return self.text_2_width + 6 * 256 if self.text_2_width else 0


def conv(shapes: Shapes, name: str, inputs: int, outputs: int, size: int) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs, size, size)
    shapes[f"{name}.bias"] = (outputs,)


def linear(shapes: Shapes, name: str, inputs: int, outputs: int, *, bias: bool = True) -> None:
    shapes[f"{name}.weight"] = (outputs, inputs)
    if bias:
        shapes[f"{name}.bias"] = (outputs,)


def norm(shapes: Shapes, name: str, width: int) -> None:
    shapes[f"{name}.weight"] = (width,)
    shapes[f"{name}.bias"] = (width,)


def unet_shapes(c: TinySD1) -> Shapes:
    """What UNet2DConditionModel of these sizes holds."""
    s: Shapes = {}
    time = 4 * c.unet_widths[0]

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(s, f"{name}.norm1", inputs)
        conv(s, f"{name}.conv1", inputs, outputs, 3)
        linear(s, f"{name}.time_emb_proj", time, outputs)
        norm(s, f"{name}.norm2", outputs)
        conv(s, f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(s, f"{name}.conv_shortcut", inputs, outputs, 1)

    def project(name: str, width: int) -> None:
        if c.head_size:
            linear(s, name, width, width)
        else:
            conv(s, name, width, width, 1)

    def transformer(name: str, width: int, depth: int) -> None:
        norm(s, f"{name}.norm", width)
        project(f"{name}.proj_in", width)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
            for attention, context in (("attn1", width), ("attn2", c.context_width)):
                linear(s, f"{block}.{attention}.to_q", width, width, bias=False)
                linear(s, f"{block}.{attention}.to_k", context, width, bias=False)
                linear(s, f"{block}.{attention}.to_v", context, width, bias=False)
                linear(s, f"{block}.{attention}.to_out.0", width, width)
            for i in (1, 2, 3):
                norm(s, f"{block}.norm{i}", width)
            linear(s, f"{block}.ff.net.0.proj", width, 8 * width)
            linear(s, f"{block}.ff.net.2", 4 * width, width)
        project(f"{name}.proj_out", width)

    width = c.unet_widths[0]
    conv(s, "conv_in", c.unet_inputs, width, 3)
    linear(s, "time_embedding.linear_1", width, time)
    linear(s, "time_embedding.linear_2", time, time)
    if c.vector_width:
        linear(s, "add_embedding.linear_1", c.vector_width, time)
        linear(s, "add_embedding.linear_2", time, time)
    skips = [width]
    last = len(c.unet_widths) - 1
    for level, out in enumerate(c.unet_widths):
        for i in range(c.unet_blocks):
            residual(f"down_blocks.{level}.resnets.{i}", width, out)
            width = out
            if c.unet_attends[level]:
                transformer(f"down_blocks.{level}.attentions.{i}", width, c.unet_depths[level])
            skips.append(width)
        if level < last:
            conv(s, f"down_blocks.{level}.downsamplers.0.conv", width, width, 3)
            skips.append(width)
    if c.unet_middle != "none":
        residual("mid_block.resnets.0", width, width)
    if c.unet_middle == "whole":
        transformer("mid_block.attentions.0", width, c.unet_depths[last])
        residual("mid_block.resnets.1", width, width)
    for index, out in enumerate(reversed(c.unet_widths)):
        for i in range(c.unet_blocks + 1):
            residual(f"up_blocks.{index}.resnets.{i}", width + skips.pop(), out)
            width = out
            if c.unet_attends[last - index]:
                depth = c.unet_up_depths[index][i] if c.unet_up_depths else c.unet_depths[last - index]
                transformer(f"up_blocks.{index}.attentions.{i}", width, depth)
        if index < last:
            conv(s, f"up_blocks.{index}.upsamplers.0.conv", width, width, 3)
    norm(s, "conv_norm_out", width)
    conv(s, "conv_out", width, 4, 3)
    return s


def vae_shapes(c: TinySD1) -> Shapes:
    """What AutoencoderKL of these sizes holds."""
    return vae_shapes_of(c, channels=4, quant=True)


def vae_shapes_of(c: TinySD1, *, channels: int, quant: bool) -> Shapes:
    """The same with so many channels of the latent, with or without the two outer convolutions."""
    s: Shapes = {}

    def residual(name: str, inputs: int, outputs: int) -> None:
        norm(s, f"{name}.norm1", inputs)
        conv(s, f"{name}.conv1", inputs, outputs, 3)
        norm(s, f"{name}.norm2", outputs)
        conv(s, f"{name}.conv2", outputs, outputs, 3)
        if inputs != outputs:
            conv(s, f"{name}.conv_shortcut", inputs, outputs, 1)

    def middle(name: str, width: int) -> None:
        residual(f"{name}.resnets.0", width, width)
        norm(s, f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(s, f"{name}.attentions.0.{part}", width, width)
        residual(f"{name}.resnets.1", width, width)

    width = c.vae_widths[0]
    last = len(c.vae_widths) - 1
    conv(s, "encoder.conv_in", 3, width, 3)
    for level, out in enumerate(c.vae_widths):
        for i in range(c.vae_blocks):
            residual(f"encoder.down_blocks.{level}.resnets.{i}", width, out)
            width = out
        if level < last:
            conv(s, f"encoder.down_blocks.{level}.downsamplers.0.conv", width, width, 3)
    middle("encoder.mid_block", width)
    norm(s, "encoder.conv_norm_out", width)
    conv(s, "encoder.conv_out", width, 2 * channels, 3)
    if quant:
        conv(s, "quant_conv", 2 * channels, 2 * channels, 1)
        conv(s, "post_quant_conv", channels, channels, 1)
    conv(s, "decoder.conv_in", channels, width, 3)
    middle("decoder.mid_block", width)
    for index, out in enumerate(reversed(c.vae_widths)):
        for i in range(c.vae_blocks + 1):
            residual(f"decoder.up_blocks.{index}.resnets.{i}", width, out)
            width = out
        if index < last:
            conv(s, f"decoder.up_blocks.{index}.upsamplers.0.conv", width, width, 3)
    norm(s, "decoder.conv_norm_out", width)
    conv(s, "decoder.conv_out", width, 3, 3)
    return s


def text_shapes(c: TinySD1) -> Shapes:
    """What the CLIPTextModel of these sizes holds, XL's CLIP-L included."""
    return clip_shapes(c.text_width, c.text_layers)


def clip_shapes(width: int, layers: int, projection: int = 0) -> Shapes:
    """What CLIPTextModel holds or, where a width of projection is given, CLIPTextModelWithProjection."""
    s: Shapes = {
        "text_model.embeddings.token_embedding.weight": (49408, width),
        "text_model.embeddings.position_embedding.weight": (77, width),
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(s, f"{layer}.self_attn.{part}", width, width)
        norm(s, f"{layer}.layer_norm1", width)
        norm(s, f"{layer}.layer_norm2", width)
        linear(s, f"{layer}.mlp.fc1", width, 4 * width)
        linear(s, f"{layer}.mlp.fc2", 4 * width, width)
    norm(s, "text_model.final_layer_norm", width)
    if projection:
        linear(s, "text_projection", width, projection, bias=False)
    return s


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of that name: float32, scaled so that signals neither die nor explode."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    leaf = name.rsplit(".", 1)[-1]
    if len(shape) == 1:
        return values * np.float32(0.1) + np.float32(1.0 if "norm" in name and leaf == "weight" else 0.0)
    if "embedding" in name and "time_embedding" not in name:
        return values
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def weights(component: str, shapes: Shapes) -> dict[str, np.ndarray]:
    return {name: draw(f"{component}.{name}", shape) for name, shape in shapes.items()}


def components(c: TinySD1) -> dict[str, dict[str, np.ndarray]]:
    """All weights by component, as a diffusers folder names them."""
    return {component: weights(component, shapes) for component, shapes in component_shapes(c).items()}


def component_shapes(c: TinySD1) -> dict[str, Shapes]:
    shapes = {"unet": unet_shapes(c), "vae": vae_shapes(c), "text_encoder": text_shapes(c)}
    if c.text_2_width:
        shapes["text_encoder_2"] = clip_shapes(c.text_2_width, c.text_2_layers, c.text_2_width)
    return shapes


def configs(c: TinySD1) -> dict[str, dict[str, object]]:
    """The config.json of each component, as diffusers and transformers write them."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in c.unet_attends]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(c.unet_attends)]
    levels = len(c.vae_widths)
    heads = [width // c.head_size for width in c.unet_widths] if c.head_size else c.heads
    unet: dict[str, object] = {"transformer_layers_per_block": list(c.unet_depths[: len(c.unet_widths)])}
    if c.unet_up_depths:
        unet["reverse_transformer_layers_per_block"] = [list(depths) for depths in c.unet_up_depths]
    if c.unet_middle != "whole":
        unet["mid_block_type"] = {"residual": "UNetMidBlock2D", "none": None}[c.unet_middle]
    if c.head_size:
        unet["use_linear_projection"] = True
    if c.vector_width:
        unet |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": c.vector_width,
        }
    parts: dict[str, dict[str, object]] = {
        "unet": {
            **unet,
            "_class_name": "UNet2DConditionModel",
            "sample_size": 8,
            "in_channels": c.unet_inputs,
            "out_channels": 4,
            "block_out_channels": list(c.unet_widths),
            "layers_per_block": c.unet_blocks,
            "down_block_types": down,
            "up_block_types": up,
            "cross_attention_dim": c.context_width,
            "attention_head_dim": heads,
            "norm_num_groups": 32,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": list(c.vae_widths),
            "layers_per_block": c.vae_blocks,
            "norm_num_groups": min(32, c.vae_widths[0] // 4),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "scaling_factor": c.vae_scale,
            "sample_size": 64,
        },
        "text_encoder": clip_config(c.text_width, c.text_layers, quick=not c.open_clip),
    }
    if c.text_2_width:
        parts["text_encoder_2"] = clip_config(c.text_2_width, c.text_2_layers, quick=False)
        parts["text_encoder_2"]["architectures"] = ["CLIPTextModelWithProjection"]
    return parts


def clip_config(width: int, layers: int, *, quick: bool) -> dict[str, object]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu" if quick else "gelu",
        "projection_dim": width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def write_folder(c: TinySD1, folder: Path, dtype: str = "float32") -> Path:
    """A diffusers folder of the tiny model."""
    for component, tensors in components(c).items():
        (folder / component).mkdir(parents=True, exist_ok=True)
        config = json.dumps(configs(c)[component], indent=1)
        (folder / component / "config.json").write_text(config)
        stem = "model" if component.startswith("text_encoder") else "diffusion_pytorch_model"
        save_file(
            {name: values.astype(dtype) for name, values in tensors.items()},
            folder / component / f"{stem}.safetensors",
        )
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": c.prediction}
    if c.zero_snr:
        scheduler["rescale_betas_zero_snr"] = True
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": c.pipeline}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_single(folder: Path, path: Path, native_context: object) -> Path:
    """The folder's weights in one file under the original (LDM) names, as the engine's own table has them.

    `tests/parity` checks that table against diffusers' converter.
    """
    from safetensors.numpy import load_file

    from sdcpp_py import _native

    tensors: dict[str, np.ndarray] = {}
    names = {w["diffusers_name"]: w["name"] for w in _native.probe_weights(native_context)}
    for component in ("unet", "vae", "text_encoder"):
        for file in (folder / component).glob("*.safetensors"):
            for name, values in load_file(file).items():
                original = names[f"{component}.{name}"]
                if original.startswith("first_stage_model.") and ".attn_1." in original and values.ndim == 2:
                    values = values[:, :, None, None]  # 1x1 convolutions in single files
                tensors[original] = values
    save_file(tensors, path)
    return path
