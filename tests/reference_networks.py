"""The independent truth for networks: diffusers and transformers on the same tiny weights, in float32."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import cases
import diffusers
import numpy as np
import tiny
import torch
import transformers


def versions() -> str:
    return f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"


def open_parts(folder: Path) -> dict[str, Any]:
    """The networks of a diffusers folder."""
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    if (folder / "text_encoder_2").is_dir():
        second = transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
        parts["text_encoder_2"] = second
    return parts


class Reference:
    """Opens tiny models with diffusers, each once, and answers cases from weights rounded to `dtype`."""

    def __init__(self, folder: Path, dtype: str = "float32") -> None:
        self.folder = folder
        self.dtype = dtype
        self.open = cache(self._open)

    def _open(self, model: tiny.TinySD1) -> dict[str, Any]:
        path = tiny.write_folder(model, self.folder / f"{abs(hash(model)):x}", self.dtype)
        return {name: part.float() for name, part in open_parts(path).items()}

    def run(self, case: cases.Case, precision: torch.dtype = torch.float32) -> np.ndarray:
        """What the probe should give for this case, in its shape, computed in that precision."""
        parts = self.open(case.model)
        if precision != torch.float32:  # which rounds the weights
            parts = {name: copy.deepcopy(part).to(precision) for name, part in parts.items()}
        return self._run(case, parts, precision).float().numpy()

    @torch.no_grad()
    def _run(self, case: cases.Case, parts: dict[str, Any], precision: torch.dtype) -> torch.Tensor:
        exact = ("time", "sizes", "ids", "ids_2")
        inputs = {
            name: torch.from_numpy(values).to(torch.float32 if name in exact else precision)
            for name, values in case.inputs.items()
        }
        if case.network == "denoise":
            told = {"text_embeds": inputs.get("pooled"), "time_ids": inputs.get("sizes")}
            run = parts["unet"](inputs["latent"], inputs["time"], inputs["text"], added_cond_kwargs=told)
            return run.sample
        if case.network == "vae_decode":
            return parts["vae"].decode(inputs["latent"]).sample
        if case.network == "vae_encode":
            return parts["vae"].encode(inputs["image"]).latent_dist.parameters
        skip = int(case.inputs["clip_skip"][0])
        first = parts["text_encoder"](inputs["ids"].long(), output_hidden_states=True)
        if "text_encoder_2" in parts:
            second = parts["text_encoder_2"](inputs["ids_2"].long(), output_hidden_states=True)
            if case.network == "pooled":
                return second.text_embeds[None, None]
            return torch.cat((first.hidden_states[-skip], second.hidden_states[-skip]), dim=-1)[None]
        skip -= 1 if case.model.open_clip else 0  # folders come without the last layer of OpenCLIP's
        text_model = getattr(parts["text_encoder"], "text_model", parts["text_encoder"])
        return text_model.final_layer_norm(first.hidden_states[-skip])[None]
