"""Weights as ComfyUI's tools store them: 8-bit floats with a scale, and blocks across the rows of a tensor."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import lora_files
import numpy as np
import pytest
import quantised
import tiny
import tiny_t5
from cases import NETWORKS, SD1
from cases_t5 import STATES, T5
from closeness import assert_close
from lora_files import Stored, as_e4m3, of_e4m3, save
from safetensors.numpy import save_file

from sdcpp_py import BadFile, SdcppError, Unsupported, _native
from sdcpp_py.files import data_dir

Tensors = dict[str, np.ndarray | Stored]
Names = Callable[[str], Mapping[str, str]]

OLD = {"weight": "scale_weight", "input": "scale_input"}
NEW = {"weight": "weight_scale", "input": "input_scale"}


def scaled(weights: Mapping[str, np.ndarray], names: Mapping[str, str]) -> tuple[Tensors, dict[str, np.ndarray]]:
    """The matrices in 8 bits, each with another scale, and what they mean: float32."""
    stored: Tensors = dict(weights)
    meant = dict(weights)
    for i, (name, values) in enumerate(weights.items()):
        if values.ndim != 2 or not name.endswith(".weight"):
            continue
        place = name.removesuffix(".weight")
        scale = np.float32(np.abs(values).max() / 448 * (1 + i % 3))
        stored[name] = as_e4m3(values / scale)
        meant[name] = of_e4m3(stored[name]) * scale
        stored[f"{place}.{names['weight']}"] = np.array(scale) if i % 2 else np.array([scale])
        stored[f"{place}.{names['input']}"] = np.array([0.5], np.float32)
        if names is NEW:
            stored[f"{place}.comfy_quant"] = np.frombuffer(json.dumps({"format": "float8_e4m3fn"}).encode(), np.uint8)
    if names is OLD:
        stored["scaled_fp8"] = Stored("F8_E4M3", (2,), bytes(2))
    return stored, meant


def open_unet(folder: Path, unet: Path, **options: object) -> _native.Context:
    return _native.Context(str(folder), components={"unet": str(unet)}, data_dir=str(data_dir()), threads=1, **options)


def act(context: _native.Context, lora: Path | None) -> None:
    whole = {"te": 1.0, "te2": 1.0, "te3": 1.0, "unet": 1.0, "start": 0.0, "stop": 1.0, "blocks": []}
    context.apply_loras([] if lora is None else [{"path": os.fsencode(lora), **whole}])


def write_lora(folder: Path) -> Path:
    update = lora_files.random_update(["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"])
    return save(folder / "lora.safetensors", lora_files.tensors_of(update))


def check_as(context: _native.Context, plain: _native.Context, lora: Path, tolerance: float) -> None:
    """Both answer the same, without and with a LoRA, which leaves no trace."""
    before = context.fingerprint()
    for each in (None, lora):
        act(context, each)
        act(plain, each)
        got, want = (_native.probe_run(one, "denoise", **NETWORKS[0].inputs) for one in (context, plain))
        assert_close(got, want, tolerance)
    context.reset_loras()
    assert context.fingerprint() == before


@pytest.mark.parametrize("names", [OLD, NEW], ids=["scale_weight", "weight_scale"])
def test_a_scaled_t5(tmp_path, names):
    stored, meant = scaled(tiny_t5.weights(T5), names)
    save(tmp_path / "scaled.safetensors", stored)
    save_file(meant, tmp_path / "meant.safetensors")
    got, want = (_native.probe_t5(str(tmp_path / f"{name}.safetensors"), STATES[2].ids) for name in ("scaled", "meant"))
    assert_close(got, want, tolerance=5e-3)


@pytest.mark.parametrize("mode", ["runtime", "restore"])
def test_a_scaled_unet_with_a_lora(tmp_path, tiny_folder, mode):
    """A LoRA that is taken away leaves what was loaded, for the base is read with its scale."""
    folder = tiny_folder(SD1)
    stored, meant = scaled(tiny.components(SD1)["unet"], OLD)
    save(tmp_path / "scaled.safetensors", stored)
    save_file(meant, tmp_path / "meant.safetensors")
    context, plain = (
        open_unet(folder, tmp_path / f"{name}.safetensors", lora_mode=mode) for name in ("scaled", "meant")
    )
    check_as(context, plain, write_lora(tmp_path), tolerance=5e-3)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("scale_weight", np.ones(2, np.float32), Unsupported, "has 2 numbers"),
        ("scale_weight", np.array(np.nan, np.float32), BadFile, "is nan"),
        ("weight_scale", np.array([1], np.int32), BadFile, "of type i32"),
        ("comfy_quant", np.frombuffer(b'{"format": "nvfp4"}', np.uint8), Unsupported, "'nvfp4'"),
        ("comfy_quant", np.frombuffer(b"\xff{", np.uint8), BadFile, "comfy_quant"),
    ],
)
def test_scales_of_another_form_are_refused(tmp_path, name, value, error, message):
    path = save(tmp_path / "a.safetensors", {"x.weight": as_e4m3(np.ones((2, 2), np.float32)), f"x.{name}": value})
    with pytest.raises(error, match=message):
        _native.probe_checkpoint(str(path))


def test_what_only_looks_like_a_scale_stays(tmp_path):
    tensors = {"a.weight": np.ones((2, 2), np.float32), "a.scale_weight": np.ones(1, np.float32)}
    path = save(tmp_path / "a.safetensors", tensors)
    assert {name for name, *_ in _native.probe_checkpoint(str(path))} == set(tensors)


# ---- ComfyUI-GGUF


def write_reshaped(path: Path, native: _native.Context, kind: str) -> dict[str, np.ndarray]:
    """The UNet as ComfyUI-GGUF stores it: rows that are no whole blocks are quantised in rows that are."""
    original = {
        w["diffusers_name"]: w["name"].removeprefix("model.diffusion_model.") for w in _native.probe_weights(native)
    }
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    writer = gguf.GGUFWriter(path, arch="sd1")
    meant = {}
    reshaped = 0
    for name, values in tiny.components(SD1)["unet"].items():
        place = original[f"unet.{name}"]
        meant[name] = values
        if values.ndim == 1 or values.size % block:
            writer.add_tensor(place, values)
            continue
        rows = values if values.ndim == 2 and values.shape[1] % block == 0 else values.reshape(-1, block)
        if rows is not values:
            writer.add_array(f"comfy.gguf.orig_shape.{place}", list(values.shape))
            reshaped += 1
        blocks, decoded = quantised.store(name, rows, kind)
        writer.add_tensor(place, blocks, raw_dtype=gguf.GGMLQuantizationType[kind.upper()])
        meant[name] = decoded.reshape(values.shape)
    assert reshaped > 20
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


@pytest.mark.parametrize("kind", ["q8_0", "q4_K"])
def test_tensors_that_were_quantised_in_another_shape(tmp_path, tiny_folder, native, kind):
    folder = tiny_folder(SD1)
    meant = write_reshaped(tmp_path / "unet.gguf", native(SD1), kind)
    context = open_unet(folder, tmp_path / "unet.gguf", lora_mode="restore")
    save_file(meant, tmp_path / "meant.safetensors")
    plain = open_unet(folder, tmp_path / "meant.safetensors", lora_mode="restore")
    shapes = {w["name"]: w["shape"] for w in _native.probe_weights(plain)}
    assert {w["name"]: w["shape"] for w in _native.probe_weights(context)} == shapes

    check_as(context, plain, write_lora(tmp_path), tolerance=5e-3)  # of f16, in which ragged rows are resident


@pytest.mark.parametrize("shape", [[3, 3], [64, 0], [-64, -1], [2**31 - 1] * 4, [1] * 20, []])
def test_shapes_that_do_not_fit_are_refused(tmp_path, shape):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", arch="sd1")
    if shape:
        writer.add_array("comfy.gguf.orig_shape.a", shape)
    else:
        writer.add_array("comfy.gguf.orig_shape.a", ["64"])
    writer.add_tensor("a", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(SdcppError, match="its shape is said to have been"):
        _native.probe_checkpoint(str(tmp_path / "a.gguf"))
