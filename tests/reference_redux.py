"""FLUX.1 Redux by transformers and diffusers, on the weights of tiny_redux."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import tiny_redux
import torch
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image


def _loaded(module: Any, tensors: dict[str, np.ndarray]) -> Any:
    own = module.state_dict()
    prefix = (
        "" if any(name.startswith("vision_model.") for name in own) else "vision_model."
    )  # dropped by transformers 5
    given = {name.removeprefix(prefix): torch.from_numpy(values) for name, values in tensors.items()}
    module.load_state_dict(given, strict=True)
    return module.eval()


@torch.no_grad()
def with_picture(tokens: Any, pooled: Any, picture: np.ndarray, strength: float = 1.0) -> Any:
    """The text's tokens and the picture's behind them, as FluxPriorReduxPipeline joins them."""
    context = tokens.shape[-1]
    config = transformers.SiglipVisionConfig(
        hidden_size=tiny_redux.WIDTH,
        intermediate_size=tiny_redux.HIDDEN,
        num_hidden_layers=tiny_redux.LAYERS,
        num_attention_heads=tiny_redux.HEADS,
        image_size=tiny_redux.SIDE,
        patch_size=tiny_redux.SQUARE,
        vision_use_head=False,
    )
    small = transformers.CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    side = {"height": tiny_redux.SIDE, "width": tiny_redux.SIDE}
    prior = diffusers.FluxPriorReduxPipeline(
        image_encoder=_loaded(transformers.SiglipVisionModel(config), tiny_redux.vision()),
        feature_extractor=transformers.SiglipImageProcessor(size=side),
        image_embedder=_loaded(ReduxImageEncoder(tiny_redux.WIDTH, context), tiny_redux.embedder(context)),
        text_encoder=transformers.CLIPTextModel(small),  # any, for the prompt comes as states
    )
    joined = prior(image=Image.fromarray(picture), prompt_embeds=tokens, pooled_prompt_embeds=pooled).prompt_embeds
    joined[:, tokens.shape[1] :] *= strength
    return joined
