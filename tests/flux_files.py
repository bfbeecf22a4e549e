"""LoRA files for a tiny FLUX as its trainers write them, and the changes that they stand for: numpy alone.

A change is by diffusers' module names: (rows, columns), float64. The sizes keep FLUX's proportions, as projections
lie in fused weights by them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import lora_files
import numpy as np
import reference_lora

WIDTH, TEXT, POOLED, CHANNELS, LAYERS = 32, 24, 16, 8, 2
Changes = dict[str, np.ndarray]

# What the transformer of these sizes has: (outputs, inputs), by diffusers' names.
_TOP = {
    "x_embedder": (WIDTH, CHANNELS),
    "context_embedder": (WIDTH, TEXT),
    "time_text_embed.timestep_embedder.linear_1": (WIDTH, 256),
    "time_text_embed.text_embedder.linear_1": (WIDTH, POOLED),
    "time_text_embed.guidance_embedder.linear_2": (WIDTH, WIDTH),
    "norm_out.linear": (2 * WIDTH, WIDTH),
    "proj_out": (CHANNELS, WIDTH),
}
_DOUBLE = {
    "norm1.linear": (6 * WIDTH, WIDTH),
    "norm1_context.linear": (6 * WIDTH, WIDTH),
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")},
    "attn.to_out.0": (WIDTH, WIDTH),
    "attn.to_add_out": (WIDTH, WIDTH),
    "ff.net.0.proj": (4 * WIDTH, WIDTH),
    "ff.net.2": (WIDTH, 4 * WIDTH),
    "ff_context.net.0.proj": (4 * WIDTH, WIDTH),
    "ff_context.net.2": (WIDTH, 4 * WIDTH),
}
_SINGLE = {
    "norm.linear": (3 * WIDTH, WIDTH),
    **{f"attn.{name}": (WIDTH, WIDTH) for name in ("to_q", "to_k", "to_v")},
    "proj_mlp": (4 * WIDTH, WIDTH),
    "proj_out": (WIDTH, 5 * WIDTH),
}
SHAPES: dict[str, tuple[int, int]] = {
    **_TOP,
    **{f"transformer_blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in _DOUBLE.items()},
    **{f"single_transformer_blocks.{i}.{name}": shape for i in range(LAYERS) for name, shape in _SINGLE.items()},
}

# The original's fused weights, as the authors' code concatenates projections.
FUSED: dict[str, list[str]] = {
    **{
        f"double_blocks.{i}.{stream}_attn.qkv": [f"transformer_blocks.{i}.attn.{name}" for name in names]
        for i in range(LAYERS)
        for stream, names in {
            "img": ("to_q", "to_k", "to_v"),
            "txt": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }.items()
    },
    **{
        f"single_blocks.{i}.linear1": [
            f"single_transformer_blocks.{i}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
        for i in range(LAYERS)
    },
}
WHOLE: dict[str, str] = {
    **{f"double_blocks.{i}.img_mlp.0": f"transformer_blocks.{i}.ff.net.0.proj" for i in range(LAYERS)},
    **{f"double_blocks.{i}.txt_attn.proj": f"transformer_blocks.{i}.attn.to_add_out" for i in range(LAYERS)},
    **{f"single_blocks.{i}.linear2": f"single_transformer_blocks.{i}.proj_out" for i in range(LAYERS)},
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
}


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def ai_toolkit(path: Path, seed: int, rank: int = 4, names: Iterable[str] = tuple(SHAPES)) -> Changes:
    """lora_A and lora_B of every module, no alpha."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    changes: Changes = {}
    for name in names:
        rows, columns = SHAPES[name]
        a, b = _normal(rng, rank, columns), _normal(rng, rows, rank)
        tensors[f"transformer.{name}.lora_A.weight"], tensors[f"transformer.{name}.lora_B.weight"] = a, b
        changes[name] = b.astype(np.float64) @ a
    lora_files.save(path, tensors, {"format": "pt"})
    return changes


def kohya(path: Path, seed: int, rank: int = 6, alpha: float = 2.0) -> Changes:
    """sd-scripts' keys: fused projections, an alpha each, and the halves of the last modulation as the original's."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    changes: Changes = {}

    def add(stem: str, rows: int, columns: int) -> np.ndarray:
        a, b = _normal(rng, rank, columns), _normal(rng, rows, rank)
        key = f"lora_unet_{stem.replace('.', '_')}"
        tensors.update(
            {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": np.array(alpha, np.float32)}
        )
        return alpha / rank * b.astype(np.float64) @ a

    for stem, parts in FUSED.items():
        rows = [SHAPES[part][0] for part in parts]
        change = add(stem, sum(rows), SHAPES[parts[0]][1])
        changes.update(zip(parts, np.split(change, np.cumsum(rows)[:-1]), strict=True))
    for stem, name in WHOLE.items():
        changes[name] = add(stem, *SHAPES[name])
    shift, scale = np.split(add("final_layer.adaLN_modulation.1", *SHAPES["norm_out.linear"]), 2)
    changes["norm_out.linear"] = np.concatenate([scale, shift])
    lora_files.save(path, tensors, {"ss_network_module": "networks.lora_flux"})
    return changes


def lycoris(path: Path, seed: int, make: reference_lora.Makes = reference_lora.loha) -> Changes:
    """The wrapper's keys over diffusers' names, of any kind that needs no base."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    changes: Changes = {}
    for name in (n for n, shape in SHAPES.items() if min(shape) >= WIDTH):
        zeros = np.zeros(SHAPES[name])
        factors = make(rng, rng.standard_normal(SHAPES[name]).astype(np.float32))
        tensors.update({f"lycoris_{name.replace('.', '_')}.{role}": values for role, values in factors.items()})
        changes[name] = reference_lora.changed(zeros, factors)
    lora_files.save(path, tensors)
    return changes


def weighted(*changes: tuple[Mapping[str, np.ndarray], float]) -> Changes:
    """The sum of ratio times change, by module."""
    out: Changes = {}
    for change, ratio in changes:
        for name, delta in change.items():
            out[name] = out.get(name, 0) + ratio * delta
    return out
