"""The independent truth for T5: transformers' encoder, in float32, and huggingface's tokenizers."""

from __future__ import annotations

import numpy as np
import tiny_t5
import torch
import transformers


@torch.no_grad()
def encode(
    c: tiny_t5.TinyT5, ids: np.ndarray, mask: np.ndarray | None = None, weights: dict[str, np.ndarray] | None = None
) -> np.ndarray:
    """States [N, n, width] of ids [N, n], with the config's own weights or with these."""
    config = transformers.T5Config(**{k: v for k, v in tiny_t5.config(c).items() if k != "architectures"})
    model = transformers.T5EncoderModel(config).eval()
    given = {name: torch.from_numpy(values.copy()) for name, values in (weights or tiny_t5.weights(c)).items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"}, missing  # tied to shared
    assert not unexpected, unexpected
    seen = None if mask is None else torch.from_numpy(mask)
    return model(torch.from_numpy(ids).long(), attention_mask=seen).last_hidden_state.numpy()
