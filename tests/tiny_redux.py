"""A tiny random FLUX.1 Redux: SigLIP's image tower and the two layers behind it, in the names of their files."""

from __future__ import annotations

from pathlib import Path

import tiny
import tiny_dit
from tiny import Shapes, linear
from tiny_dit import Tensors

WIDTH, HIDDEN, LAYERS, HEADS = 144, 200, 2, 2  # heads of 72, as so400m's
SQUARE, SIDE = 14, 42


def vision_shapes() -> Shapes:
    """What SiglipVisionModel of these sizes holds, but for its pooling."""
    s: Shapes = {
        "vision_model.embeddings.patch_embedding.weight": (WIDTH, 3, SQUARE, SQUARE),
        "vision_model.embeddings.patch_embedding.bias": (WIDTH,),
        "vision_model.embeddings.position_embedding.weight": ((SIDE // SQUARE) ** 2, WIDTH),
    }
    norms = ["vision_model.post_layernorm"]
    for i in range(LAYERS):
        layer = f"vision_model.encoder.layers.{i}"
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(s, f"{layer}.self_attn.{part}", WIDTH, WIDTH)
        linear(s, f"{layer}.mlp.fc1", WIDTH, HIDDEN)
        linear(s, f"{layer}.mlp.fc2", HIDDEN, WIDTH)
    for norm in norms:
        s[f"{norm}.weight"] = s[f"{norm}.bias"] = (WIDTH,)
    return s


def embedder_shapes(context: int) -> Shapes:
    s: Shapes = {}
    linear(s, "redux_up", WIDTH, 3 * context)
    linear(s, "redux_down", 3 * context, context)
    return s


def vision() -> Tensors:
    return tiny.weights("clip_vision", vision_shapes())


def embedder(context: int) -> Tensors:
    return tiny.weights("redux", embedder_shapes(context))


def write(context: int, folder: Path) -> dict[str, Path]:
    """Both files, by the arguments that take them."""
    return {
        "clip_vision": tiny_dit.save(vision(), folder / "clip_vision.safetensors"),
        "redux": tiny_dit.save(embedder(context), folder / "redux.safetensors"),
    }
