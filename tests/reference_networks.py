"""The independent truth for networks: diffusers and transformers on the same tiny weights, in float32."""

from __future__ import annotations

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


class Reference:
    """Opens tiny models with diffusers, each once, and answers cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open = cache(self._open)

    def _open(self, model: tiny.TinySD1) -> dict[str, Any]:
        path = tiny.write_folder(model, self.folder / f"{abs(hash(model)):x}")
        return {
            "unet": diffusers.UNet2DConditionModel.from_pretrained(path / "unet"),
            "vae": diffusers.AutoencoderKL.from_pretrained(path / "vae"),
            "text_encoder": transformers.CLIPTextModel.from_pretrained(path / "text_encoder"),
        }

    @torch.no_grad()
    def run(self, case: cases.Case) -> np.ndarray:
        """What the probe should give for this case, in its shape."""
        parts = self.open(case.model)
        inputs = {name: torch.from_numpy(values) for name, values in case.inputs.items()}
        if case.network == "denoise":
            return parts["unet"](inputs["latent"], inputs["time"], inputs["text"]).sample.numpy()
        if case.network == "vae_decode":
            return parts["vae"].decode(inputs["latent"]).sample.numpy()
        if case.network == "vae_encode":
            return parts["vae"].encode(inputs["image"]).latent_dist.parameters.numpy()
        states = parts["text_encoder"](inputs["ids"].long(), output_hidden_states=True).hidden_states
        text_model = getattr(parts["text_encoder"], "text_model", parts["text_encoder"])
        return text_model.final_layer_norm(states[-int(case.inputs["clip_skip"][0])]).numpy()[None]
