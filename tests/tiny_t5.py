"""Tiny random T5 v1.1 encoders: the real structure, see tiny.py. Names and shapes are transformers'."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import tiny
from safetensors.numpy import save_file
from tiny import Shapes, linear


@dataclass(frozen=True)
class TinyT5:
    """Sizes of a tiny T5. `loud` makes what the feed-forward multiplies so much larger, as T5-XXL's is."""

    width: int = 64
    heads: int = 3
    head_size: int = 32
    hidden: int = 160
    layers: int = 3
    vocabulary: int = 320
    buckets: int = 32
    loud: float = 1.0


def shapes(c: TinyT5) -> Shapes:
    """What T5EncoderModel of these sizes holds."""
    inner = c.heads * c.head_size
    s: Shapes = {"shared.weight": (c.vocabulary, c.width)}
    for i in range(c.layers):
        attention = f"encoder.block.{i}.layer.0.SelfAttention"
        for part in ("q", "k", "v"):
            linear(s, f"{attention}.{part}", c.width, inner, bias=False)
        linear(s, f"{attention}.o", inner, c.width, bias=False)
        if i == 0:
            s[f"{attention}.relative_attention_bias.weight"] = (c.buckets, c.heads)
        feed = f"encoder.block.{i}.layer.1.DenseReluDense"
        linear(s, f"{feed}.wi_0", c.width, c.hidden, bias=False)
        linear(s, f"{feed}.wi_1", c.width, c.hidden, bias=False)
        linear(s, f"{feed}.wo", c.hidden, c.width, bias=False)
        for layer in (0, 1):
            s[f"encoder.block.{i}.layer.{layer}.layer_norm.weight"] = (c.width,)
    s["encoder.final_layer_norm.weight"] = (c.width,)
    return s


def weights(c: TinyT5) -> dict[str, np.ndarray]:
    """Queries are smaller by the root of a head's size, as in every T5: its attention does not divide by it."""
    drawn = tiny.weights("t5xxl", shapes(c))
    for i in range(c.layers):
        drawn[f"encoder.block.{i}.layer.0.SelfAttention.q.weight"] /= np.float32(np.sqrt(c.head_size))
        drawn[f"encoder.block.{i}.layer.1.layer_norm.weight"] *= np.float32(c.loud)
    return drawn


def config(c: TinyT5) -> dict[str, object]:
    """config.json, as transformers writes it."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": c.width,
        "d_kv": c.head_size,
        "d_ff": c.hidden,
        "num_heads": c.heads,
        "num_layers": c.layers,
        "vocab_size": c.vocabulary,
        "relative_attention_num_buckets": c.buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "is_encoder_decoder": False,
        "use_cache": False,
    }


def write_folder(c: TinyT5, folder: Path, dtype: str = "float32") -> Path:
    """As transformers saves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config(c)))
    save_file({name: values.astype(dtype) for name, values in weights(c).items()}, folder / "model.safetensors")
    return folder


LLAMA_LEAVES = {
    "layer.0.layer_norm": "attn_norm",
    "layer.0.SelfAttention.q": "attn_q",
    "layer.0.SelfAttention.k": "attn_k",
    "layer.0.SelfAttention.v": "attn_v",
    "layer.0.SelfAttention.o": "attn_o",
    "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
    "layer.1.layer_norm": "ffn_norm",
    "layer.1.DenseReluDense.wi_0": "ffn_gate",
    "layer.1.DenseReluDense.wi_1": "ffn_up",
    "layer.1.DenseReluDense.wo": "ffn_down",
}


def llama_name(name: str) -> str:
    """llama.cpp's name for a weight; the parity tests compare with the gguf package's own table."""
    if name.startswith("encoder.block."):
        number, leaf = name.removeprefix("encoder.block.").split(".", 1)
        return f"enc.blk.{number}.{LLAMA_LEAVES[leaf.removesuffix('.weight')]}.weight"
    return {"shared.weight": "token_embd.weight", "encoder.final_layer_norm.weight": "enc.output_norm.weight"}[name]


def write_gguf(
    c: TinyT5, path: Path, kind: str = "f32", describe: Callable[[gguf.GGUFWriter], None] = lambda _: None
) -> dict[str, np.ndarray]:
    """A file as llama.cpp's tools write it, its matrices of that type; returns what its weights mean: float32.

    `describe` adds metadata.
    """
    raw = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, arch="t5encoder")
    describe(writer)
    meant = {}
    for name, values in weights(c).items():
        fits = values.ndim == 2 and values.shape[1] % gguf.GGML_QUANT_SIZES[raw][0] == 0
        stored = gguf.quants.quantize(values, raw) if fits else values
        writer.add_tensor(llama_name(name), stored, raw_dtype=raw if fits else None)
        meant[name] = gguf.quants.dequantize(stored, raw).astype(np.float32) if fits else values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant
