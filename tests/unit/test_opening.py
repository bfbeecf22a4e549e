"""Opening models: layouts, types, components given apart, and what is wrong said in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from cases import NETWORKS, SD1
from closeness import assert_close
from safetensors.numpy import load_file, save_file

from sdcpp_py import BadArgument, BadFile, Io, SDContext, Unsupported, _native
from sdcpp_py.files import data_dir

DENOISE = next(case for case in NETWORKS if case.name == "unet-square")


def denoise(context: SDContext) -> np.ndarray:
    return _native.probe_run(context._native, DENOISE.network, **DENOISE.inputs)


def paint(context: SDContext) -> np.ndarray:
    return np.asarray(context.generate("a cat", steps=2, seed=1, width=32, height=32))


def edited(path: Path, to: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> Path:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, to)
    return to


def test_a_folder_and_a_single_file_are_the_same_model(sd_ctx: SDContext, tiny_folder: Any) -> None:
    with SDContext(tiny_folder(SD1)) as folder:
        assert folder.fingerprint() == sd_ctx.fingerprint()
        np.testing.assert_array_equal(denoise(folder), denoise(sd_ctx))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-6), ("float16", 5e-3)])
def test_other_float_types(dtype: str, tolerance: float, sd_ctx: SDContext, tiny_sd1: Path, tmp_path: Path) -> None:
    """f64 rounds to the same f32; ggml rounds activations to f16 where weights are."""

    def cast(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    with SDContext(edited(tiny_sd1, tmp_path / "other.safetensors", cast)) as other:
        assert_close(denoise(other), denoise(sd_ctx), tolerance)


# A product with weights of n bits has errors of about their rounding: half a step of 2^-n of the largest of a
# block, about 3 deviations, added over some 20 layers.
QUANTISED = {"Q8_0": 0.03, "Q5_1": 0.15, "Q4_0": 0.4}


@pytest.mark.parametrize("kind", QUANTISED)
def test_gguf_quantised(kind: str, sd_ctx: SDContext, tiny_sd1: Path, tmp_path: Path) -> None:
    """Matrices quantised by the gguf package; names of over 64 characters; convolutions in f16."""
    path = tmp_path / "model.gguf"
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch="sd1")
    for name, values in load_file(tiny_sd1).items():
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with SDContext(path) as context:
        types = {weight["type"] for weight in _native.probe_weights(context._native)}
        assert types == {"f32", "f16", kind.lower()}
        assert_close(denoise(context), denoise(sd_ctx), QUANTISED[kind])


def test_components_given_apart(sd_ctx: SDContext, tiny_sd1: Path, tiny_folder: Any, tmp_path: Path) -> None:
    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [n for n in tensors if n.startswith(("first_stage_model.", "cond_stage_model."))]:
            del tensors[name]

    only_unet = edited(tiny_sd1, tmp_path / "unet.safetensors", drop)
    with pytest.raises(BadFile, match="clip_l="):
        SDContext(only_unet)
    folder = tiny_folder(SD1)
    vae, clip = folder / "vae" / "diffusion_pytorch_model.safetensors", folder / "text_encoder" / "model.safetensors"
    with SDContext(only_unet, vae=vae, clip_l=clip) as context:
        np.testing.assert_array_equal(paint(context), paint(sd_ctx))


def test_extra_tensors_are_known_and_ignored(sd_ctx: SDContext, tiny_sd1: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model_ema.decay"] = np.ones(1, np.float32)
        tensors["alphas_cumprod"] = np.ones(1000, np.float32)
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]

    with SDContext(edited(tiny_sd1, tmp_path / "extra.safetensors", add)) as context:
        assert context.fingerprint() == sd_ctx.fingerprint()


def test_missing_and_misshapen_weights_are_reported_together(tiny_sd1: Path, tmp_path: Path) -> None:
    def damage(tensors: dict[str, np.ndarray]) -> None:
        del tensors["model.diffusion_model.time_embed.2.weight"]
        del tensors["first_stage_model.decoder.norm_out.bias"]
        tensors["model.diffusion_model.out.0.bias"] = np.zeros(31, np.float32)

    with pytest.raises(BadFile) as error:
        SDContext(edited(tiny_sd1, tmp_path / "damaged.safetensors", damage))
    message = str(error.value)
    assert "2 of 424 weights are missing" in message
    assert "time_embed.2.weight" in message
    assert "31 here, 32 in this architecture" in message


def test_a_denoiser_with_layers_that_nobody_declared_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.diffusion_model.label_emb.0.0.weight"] = np.zeros((8, 8), np.float32)

    with pytest.raises(Unsupported, match=r"label_emb\.0\.0"):
        SDContext(edited(tiny_sd1, tmp_path / "other.safetensors", add))


def test_what_is_no_model_is_refused_by_its_names(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    save_file({"prices": np.ones(3, np.float32)}, path)
    with pytest.raises(Unsupported, match="prices"):
        SDContext(path)
    (tmp_path / "notes").mkdir()
    with pytest.raises((BadArgument, BadFile, Unsupported), match="notes"):
        SDContext(tmp_path / "notes")
    with pytest.raises(Io, match=r"absent\.gguf"):
        SDContext(tmp_path / "absent.gguf")


def test_a_v_prediction_model_says_so(tmp_path: Path, tiny_sd1: Path) -> None:
    folder = tiny.write_folder(tiny.TinySD1(prediction="v_prediction"), tmp_path)
    with SDContext(folder) as context:
        assert context.info.prediction == "v"
    with SDContext(tiny_sd1, prediction="v") as context:
        assert context.info.prediction == "v"
    with pytest.raises(BadArgument, match="eps, v"):
        SDContext(tiny_sd1, prediction="flow")


def test_a_file_that_is_cut_while_open_is_noticed(tiny_sd1: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny_sd1.read_bytes())
    with SDContext(path) as context:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(Io, match="changed on disk"):
            context.generate("a cat", steps=1, width=16, height=16)


def test_unknown_backends_are_listed(tiny_sd1: Path) -> None:
    with pytest.raises(BadArgument, match="CPU"):
        SDContext(tiny_sd1, backend="abacus")


def test_data_holds_the_vocabulary() -> None:
    assert sum(1 for _ in (data_dir() / "clip_merges.txt").open(encoding="utf-8")) >= 48894
