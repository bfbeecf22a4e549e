"""LoRA files for the tiny FLUX.1 and SD3 models, and models that hold the same change in their weights.

An update is a dict: a module's path to factors by role, as reference_lora makes them. Paths are diffusers'
("transformer_blocks.0.attn.to_q") or the original's ("double_blocks.0.img_attn.qkv"), which fuses and swaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import reference_lora
import tiny_flux
import tiny_sd3
from cases import noise
from reference_lora import Factors
from safetensors.numpy import save_file
from tiny_dit import Tensors

from sdcpp_py import SDContext, _native

Update = dict[str, Factors]
Model = tiny_flux.TinyFlux | tiny_sd3.TinySD3


def family(c: Model) -> Any:
    """The module that makes such models."""
    return tiny_flux if isinstance(c, tiny_flux.TinyFlux) else tiny_sd3


def swapped(c: Model, module: str) -> bool:
    """Whether diffusers has the halves of its rows the other way round."""
    if isinstance(c, tiny_sd3.TinySD3):
        return tiny_sd3.swapped(c, module)
    return module.startswith("final_layer.adaLN")


def original(c: Model) -> Tensors:
    """The transformer's weights in the original layout: float32."""
    return family(c).original_transformer(c, family(c).components(c)["transformer"])


def matrices(c: Model) -> list[str]:
    """The original's modules that are matrices."""
    weights = original(c)
    return [m for m in family(c).modules(c) if weights.get(f"{m}.weight", np.zeros(1)).ndim == 2]


def split(c: Model, modules: Iterable[str]) -> list[str]:
    return [part for module in modules for part in family(c).modules(c)[module]]


def place(c: Model, path: str) -> tuple[str, slice]:
    """Where a module lies in the original layout: its name there, and its rows."""
    weights = family(c).components(c)["transformer"]
    for module, parts in family(c).modules(c).items():
        if path == module:
            return module, slice(None)
        if path in parts:
            first = sum(len(weights[f"{part}.weight"]) for part in parts[: parts.index(path)])
            return module, slice(first, first + len(weights[f"{path}.weight"]))
    raise AssertionError(f"no module {path}")


def change(c: Model, weights: Tensors, update: Update, multiplier: float = 1.0) -> Tensors:
    """What an update adds to the original's weights, each from the pristine one: float64."""
    out: Tensors = {}
    for path, factors in update.items():
        module, rows = place(c, path)
        swap = path != module and swapped(c, module)
        for leaf, changed in (("weight", reference_lora.changed), ("bias", reference_lora.changed_bias)):
            name = f"{module}.{leaf}"
            if module.endswith("_norm"):
                name = f"{module}.scale"
            if name not in weights or (leaf == "bias" and name.endswith(".scale")):
                continue
            whole = weights[name].astype(np.float64)
            base = whole[rows]
            theirs = np.roll(base, len(base) // 2, axis=0) if swap else base
            inputs = factors.get("lora_A.weight", factors.get("lora_down.weight"))
            if leaf == "weight" and inputs is not None and inputs.shape[1] < theirs.shape[1]:  # of the first inputs
                n = inputs.shape[1]
                part = theirs.copy()
                part[:, :n] = changed(theirs[:, :n], factors, multiplier)
                delta = part - theirs
            else:
                delta = changed(theirs, factors, multiplier) - theirs
            delta = np.roll(delta, len(delta) // 2, axis=0) if swap else delta
            out.setdefault(name, np.zeros(whole.shape))[rows] += delta
    return out


def merged(c: Model, *updates: tuple[Update, float], weights: Tensors | None = None) -> Tensors:
    """The original's weights with all changes: float32, rounded once."""
    weights = original(c) if weights is None else weights
    out = {name: values.astype(np.float64) for name, values in weights.items()}
    for update, multiplier in updates:
        for name, delta in change(c, weights, update, multiplier).items():
            out[name] += delta
    return {name: values.astype(np.float32) for name, values in out.items()}


def random_update(
    c: Model, paths: Iterable[str], make: reference_lora.Makes = reference_lora.lora, seed: int = 0
) -> Update:
    """An adapter of one kind on these modules."""
    rng = np.random.default_rng(seed)
    weights = original(c)
    out: Update = {}
    for path in paths:
        module, rows = place(c, path)
        name = f"{module}.scale" if module.endswith("_norm") else f"{module}.weight"
        out[path] = make(rng, weights[name][rows])
    return out


def denoise(context: SDContext, model: Model, channels: int = 0) -> np.ndarray:
    """One run of the transformer, of so many input channels."""
    is_flux = isinstance(model, tiny_flux.TinyFlux)
    inputs = {
        "latent": noise("latent", 1, channels or (model.inputs // 4 if is_flux else 16), 4, 6),
        "time": np.float32([731.0]),
        "text": noise("text", 1, 5, model.context),
        "pooled": noise("pooled", 1, model.pooled if is_flux else model.clip_l + model.clip_g),
    }
    if is_flux and model.guidance:
        inputs["guidance"] = np.float32([3.5])
    return _native.probe_run(context._native, "denoise", **inputs)


# ---- spellings -----------------------------------------------------------------------------------------


def kohya(prefix: str = "lora_unet_") -> Callable[[Update], Tensors]:
    """Paths with underscores, lora_down, lora_up and alpha."""

    def spell(update: Update) -> Tensors:
        return {f"{prefix}{path.replace('.', '_')}.{role}": values
                for path, factors in update.items() for role, values in factors.items()}  # fmt: skip

    return spell


def peft(prefix: str) -> Callable[[Update], Tensors]:
    """Paths with dots, lora_A and lora_B; alpha over the rank is in B, as trainers that store none have it."""

    def spell(update: Update) -> Tensors:
        out: Tensors = {}
        for path, factors in update.items():
            for role, values in factors.items():
                if role == "lora_down.weight":
                    out[f"{prefix}{path}.lora_A.weight"] = values
                elif role == "lora_up.weight":
                    out[f"{prefix}{path}.lora_B.weight"] = values * np.float32(reference_lora.scale_of(factors))
                elif role != "alpha":
                    out[f"{prefix}{path}.{role}"] = values
        return out

    return spell


def write(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata)
    return path
