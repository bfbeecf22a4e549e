"""Textual inversions against diffusers: the same file, loaded by load_textual_inversion, and the same states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference_tokens
import tiny
from cases import SD1, noise
from closeness import assert_close
from safetensors.numpy import save_file

from sdcpp_py import SDContext, _native

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("vectors", [1, 3])
@pytest.mark.parametrize("layout", ["diffusers", "webui"])
def test_states_with_a_learned_word(
    vectors: int,
    layout: str,
    tiny_folder: Callable[[tiny.TinySD1], Path],
    once: Callable[..., Any],
    once_path: Path,
) -> None:
    """Both compute in float32; 1e-5 is twenty roundings of it."""
    folder = tiny_folder(SD1)
    words, want = once(lambda: learned_by_diffusers(vectors, layout, folder, once_path))
    with SDContext(folder, embedding_dir=words, threads=1) as context:
        text = "a photo of cattoy , red light"
        assert context.count_tokens(text) == 6 + vectors
        got = _native.probe_text(context._native, text)
    assert_close(got.reshape(want.shape), want, 1e-5)
    with SDContext(folder, threads=1) as without:
        plain = _native.probe_text(without._native, text).reshape(want.shape)
    assert float(np.abs(plain - want).max()) > 0.1, "the word matters"


def learned_by_diffusers(vectors: int, layout: str, folder: Path, words: Path) -> tuple[Path, np.ndarray]:
    """A folder with a file of the word, and the states of a prompt with it."""
    import diffusers
    import torch
    import transformers

    learned = noise("learned", vectors, SD1.text_width)
    path = words / ("cattoy.safetensors" if layout == "diffusers" else "cattoy.pt")
    if layout == "diffusers":
        save_file({"<cattoy>": learned}, path)
    else:
        torch.save(
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.from_numpy(learned)}, "name": "x"}, path
        )

    pipe = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=reference_tokens.clip_tokenizer(length=77),
        scheduler=diffusers.EulerDiscreteScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.load_textual_inversion(str(path), token="<cattoy>")
    with torch.no_grad():
        want, _ = pipe.encode_prompt("a photo of <cattoy> , red light", "cpu", 1, False)
    return words, want.numpy()
