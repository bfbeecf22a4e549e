"""FLUX.1 and SD3 in 8-bit floats and in k-quants, and LoRAs on them, against the weights that the files mean.

gguf's own code says what blocks mean; codes of 8-bit floats are made here. The truth is the same model with these
weights, and with what the LoRA adds, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import lora_dit
import numpy as np
import pytest
import tiny_dit
from cases_dit import FLUX, SD35_MEDIUM
from closeness import assert_close
from lora_dit import Model, denoise, matrices, peft, split
from lora_files import Stored, as_e4m3, of_e4m3, save
from tiny_dit import Tensors
from tiny_flux import TinyFlux
from tiny_sd3 import TinySD3

from sdcpp_py import SDContext, _native
from sdcpp_py.weights import convert

# Rows of 256 and more, which a block of k-quants is, but for the inputs of 64 and 32.
WIDE_FLUX = TinyFlux(head_size=128, axes=(16, 56, 56), double_blocks=1, single_blocks=1)
WIDE_SD3 = TinySD3(heads=4, blocks=2, norms=True, dual=1)

EXACT = 1e-5  # float32 on both sides, and f16 holds every 8-bit float: the order of sums
ROUNDED = 2e-3  # times a scale an 8-bit float is rounded to f16: 2e-4 each, several times that in all

DitWith = Callable[..., SDContext]


def check(context: SDContext, model: Model, meant: Tensors, truth: DitWith, folder: Path, tolerance: float) -> None:
    """As the weights that are meant, without and with a LoRA on every matrix, and the same bits once it is gone."""
    update = lora_dit.random_update(model, split(model, matrices(model)))
    lora = lora_dit.write(peft("transformer.")(update), folder / "lora.safetensors")
    fingerprint, base = context.fingerprint(), denoise(context, model)
    with truth(model, meant) as plain:
        assert_close(base, denoise(plain, model), tolerance)
    with truth(model, lora_dit.merged(model, (update, 0.7), weights=meant)) as changed:
        want = denoise(changed, model)
    assert np.std(want - base) > 0.02 * np.std(base), "a change too small to be seen"
    context.apply_loras([(str(lora), 0.7)])
    report = context.lora_reports[0]
    assert (report.skipped, report.unmatched) == ([], [])
    assert_close(denoise(context, model), want, tolerance)
    context.apply_loras([])
    np.testing.assert_array_equal(denoise(context, model), base)
    assert context.fingerprint() == fingerprint


# ---- 8-bit floats


def as_e5m2(values: np.ndarray) -> Stored:
    """The upper half of each float16."""
    codes = (values.astype(np.float16).view(np.uint16) >> 8).astype(np.uint8)
    return Stored("F8_E5M2", values.shape, codes.tobytes())


def of_e5m2(stored: Stored) -> np.ndarray:
    codes = np.frombuffer(stored.data, np.uint8).reshape(stored.shape).astype(np.uint16)
    return (codes << 8).view(np.float16).astype(np.float32)


FLOATS: dict[str, tuple[Any, Any, float]] = {"e4m3": (as_e4m3, of_e4m3, 448), "e5m2": (as_e5m2, of_e5m2, 57344)}


def as_8_bits(weights: Tensors, kind: str, scaled: bool) -> tuple[dict[str, np.ndarray | Stored], Tensors]:
    """The matrices in 8 bits, and what they mean; scaled, each with another scale in the names of ComfyUI's tools."""
    make, read, most = FLOATS[kind]
    stored: dict[str, np.ndarray | Stored] = dict(weights)
    meant = dict(weights)
    for i, (name, values) in enumerate(weights.items()):
        if values.ndim != 2:
            continue
        scale = np.float32(np.abs(values).max() / most * (1 + i % 3)) if scaled else np.float32(1)
        stored[name] = make(values / scale)
        meant[name] = (read(stored[name]) * scale).astype(np.float32)
        if scaled:
            stored[name.removesuffix("weight") + "scale_weight"] = np.array([scale])
    if scaled:
        stored["scaled_fp8"] = Stored("F8_E4M3", (2,), bytes(2))
    return stored, meant


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("mode", ["runtime", "restore"])
@pytest.mark.parametrize("model", [FLUX, SD35_MEDIUM], ids=["flux", "sd3.5"])
def test_8_bit_floats(model: Model, mode: str, scaled: bool, kind: str, dit_with: DitWith, tmp_path: Path) -> None:
    """A diffusion model of its own, as it is shared. What "restore" writes is rounded to f16 as well."""
    stored, meant = as_8_bits(lora_dit.original(model), kind, scaled)
    file = save(tmp_path / "fp8.safetensors", stored)
    with dit_with(model, file, lora_mode=mode) as context:
        check(context, model, meant, dit_with, tmp_path, ROUNDED if scaled or mode == "restore" else EXACT)


def test_8_bit_floats_in_the_layout_of_diffusers(dit_with: DitWith, tmp_path: Path) -> None:
    """Parts of one matrix in memory, each with a scale of its own."""
    stored, meant = as_8_bits(lora_dit.family(FLUX).components(FLUX)["transformer"], "e4m3", scaled=True)
    file = save(tmp_path / "fp8.safetensors", stored)
    original = lora_dit.family(FLUX).original_transformer(FLUX, meant)
    with dit_with(FLUX, file) as context:
        check(context, FLUX, original, dit_with, tmp_path, ROUNDED)


# ---- quantised


def quantised(model: Model, kind: str, folder: Path) -> tuple[Path, Tensors]:
    """As our converter writes it, and what gguf reads in it."""
    source = tiny_dit.save(lora_dit.original(model), folder / "model.safetensors")
    convert(source, folder / "model.gguf", type=kind, threads=1)
    meant, rounded = {}, 0
    for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
        name = tensor.name.removeprefix("model.diffusion_model.")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        meant[name] = values.reshape(lora_dit.original(model)[name].shape)
        rounded += tensor.tensor_type.name.lower() == kind.lower()
    assert rounded > 10
    return folder / "model.gguf", meant


@pytest.mark.parametrize(
    ("model", "kind"),
    [(WIDE_FLUX, kind) for kind in ("q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "q8_0", "q5_1")]
    + [(WIDE_SD3, kind) for kind in ("q4_K", "q5_K", "q6_K", "q8_0")],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_quantised_weights(model: Model, kind: str, dit_with: DitWith, tmp_path: Path) -> None:
    """A LoRA adds to what the blocks mean, exactly, and they are never written."""
    file, meant = quantised(model, kind, tmp_path)
    with dit_with(model, file) as context:
        check(context, model, meant, dit_with, tmp_path, EXACT)


@pytest.mark.parametrize("requantise", [False, True])
def test_quantised_weights_that_are_written(requantise: bool, dit_with: DitWith, tmp_path: Path) -> None:
    """ "restore" holds touched weights in f16, or in their type again, and gives back the blocks of the file."""
    file, _ = quantised(WIDE_FLUX, "q4_K", tmp_path)
    update = lora_dit.random_update(WIDE_FLUX, split(WIDE_FLUX, matrices(WIDE_FLUX)))
    lora = lora_dit.write(peft("transformer.")(update), tmp_path / "lora.safetensors")
    with dit_with(WIDE_FLUX, file) as context:
        context.apply_loras([(str(lora), 0.7)])
        want = denoise(context, WIDE_FLUX)
    with dit_with(WIDE_FLUX, file, lora_mode="restore", requantise=requantise) as context:
        fingerprint = context.fingerprint()
        context.apply_loras([(str(lora), 0.7)])
        assert_close(denoise(context, WIDE_FLUX), want, 0.3 if requantise else ROUNDED)
        context.reset_loras()
        assert context.fingerprint() == fingerprint


def test_a_whole_picture_of_a_quantised_file(dit: Callable[..., SDContext], tmp_path: Path) -> None:
    """All in one file: the transformer in k-quants, T5's rows of 32 in f16, the autoencoder as it is."""
    source = tiny_dit.save(lora_dit.family(WIDE_FLUX).single_tensors(WIDE_FLUX), tmp_path / "all.safetensors")
    convert(source, tmp_path / "all.gguf", type="q6_K", threads=1)
    request: dict[str, Any] = {"width": 32, "height": 48, "steps": 3, "seed": 1}
    dit(WIDE_FLUX).generate("a heart", **request)
    want = _native.probe_latent(dit(WIDE_FLUX)._native)
    with SDContext(tmp_path / "all.gguf", threads=1, precision="f32") as context:
        context.generate("a heart", **request)
        assert_close(_native.probe_latent(context._native), want, 0.1)  # 6 bits a weight: 2 percent, and what it does
