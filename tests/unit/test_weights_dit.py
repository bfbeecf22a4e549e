"""FLUX.1 and SD 3 through the workbench: converted, quantised, baked, extracted, and the same networks afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import lora_dit
import numpy as np
import pytest
import tiny_dit
from cases_dit import FLUX, FLUX_SCHNELL, SD3, SD3_WITHOUT_T5, SD35_MEDIUM, Model
from closeness import assert_close, relative_rmse
from safetensors.numpy import load_file
from tiny_flux import TinyFlux

from sdcpp_py import SDContext, _native
from sdcpp_py.lora import bake, extract
from sdcpp_py.weights import convert, describe

Opens = Callable[..., SDContext]
MODELS = {"flux": FLUX, "schnell": FLUX_SCHNELL, "sd3": SD3, "sd3-without-t5": SD3_WITHOUT_T5, "sd3.5": SD35_MEDIUM}
each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def latent(path: Path, **options: object) -> np.ndarray:
    with SDContext(path, threads=1, precision="f32", **options) as sd_ctx:
        sd_ctx.generate("a red heart", width=32, height=48, steps=2, seed=3)
        return _native.probe_latent(sd_ctx._native)


def fingerprint(path: Path, **options: object) -> str:
    with SDContext(path, threads=1, **options) as sd_ctx:
        return sd_ctx.fingerprint()


@each
@pytest.mark.parametrize("storage", ["folder", "single"])
def test_a_gguf_file_is_the_same_model(model: Model, storage: str, dit: Opens, tmp_path: Path) -> None:
    """Fused and swapped on the way from a folder; bit for bit in memory, so the same picture."""
    source = dit(model, storage=storage)
    made = convert(source._path, tmp_path / "a.gguf")
    assert fingerprint(tmp_path / "a.gguf") == source.fingerprint()
    read = gguf.GGUFReader(tmp_path / "a.gguf")
    architecture = "flux" if isinstance(model, TinyFlux) else "sd3"
    assert read.fields["general.architecture"].contents() == architecture
    single = lora_dit.family(model).single_tensors(model)
    assert {tensor.name for tensor in read.tensors} == single.keys()
    for tensor in read.tensors:
        want = single[tensor.name]
        assert tuple(reversed(tensor.shape)) == (want.shape or (1,))
        np.testing.assert_array_equal(tensor.data.reshape(-1), want.astype(np.float32).reshape(-1))
    assert made.family.architecture == architecture
    assert describe(tmp_path / "a.gguf").paints


@pytest.mark.parametrize("model", [FLUX, SD35_MEDIUM], ids=["flux", "sd3.5"])
def test_quantised_matrices_and_sensitive_ones(model: Model, dit: Opens, tmp_path: Path) -> None:
    """From a folder as from one file; what embeds and what ends the network stays in 16 bits."""
    files = []
    for storage in ("folder", "single"):
        files.append(tmp_path / f"{storage}.gguf")
        convert(dit(model, storage=storage)._path, files[-1], type="q8_0")
    first, second = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in files)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tensor_type == second[name].tensor_type, name
        np.testing.assert_array_equal(tensor.data, second[name].data, name)
    types = {name.removeprefix("model.diffusion_model."): tensor.tensor_type.name for name, tensor in first.items()}
    is_flux = isinstance(model, TinyFlux)
    inner = "double_blocks.0.img_attn.qkv.weight" if is_flux else "joint_blocks.0.x_block.attn.qkv.weight"
    outer = [
        "final_layer.linear.weight",
        *(["img_in.weight", "txt_in.weight"] if is_flux else ["context_embedder.weight"]),
    ]
    assert types[inner] == "Q8_0"
    assert {types[name] for name in [*outer, "final_layer.linear.weight"]} == {"F16"}
    assert types["text_encoders.t5xxl.transformer.shared.weight"] == "F16"
    want = latent(dit(model)._path)
    assert relative_rmse(latent(files[0]), want) < 0.05  # 8 bits a weight are off by 0.6 %


@pytest.mark.parametrize("model", [FLUX, SD3], ids=["flux", "sd3"])
def test_parts_of_their_own_paint_as_the_whole(model: Model, dit: Opens, tmp_path: Path) -> None:
    """Named and marked as programs look for them that load parts: bare names, and an architecture of each."""
    source = dit(model, storage="single")
    marks = {
        "denoiser": ("double_blocks.0.img_attn.qkv.weight", "flux"),
        "vae": ("decoder.mid.block_1.conv1.weight", "vae"),
        "clip_l": ("text_model.encoder.layers.0.mlp.fc1.weight", "clip"),
        "t5xxl": ("encoder.block.0.layer.0.SelfAttention.q.weight", "t5"),
    }
    if model is SD3:
        marks["denoiser"] = ("joint_blocks.0.x_block.attn.qkv.weight", "sd3")
        marks["clip_g"] = ("text_model.encoder.layers.0.mlp.fc1.weight", "clip")
    files = {part: tmp_path / f"{part}.gguf" for part in marks}
    for part, (name, architecture) in marks.items():
        convert(source._path, files[part], only=part)
        read = gguf.GGUFReader(files[part])
        assert name in {tensor.name for tensor in read.tensors}
        assert read.fields["general.architecture"].contents() == architecture
    denoiser = files.pop("denoiser")
    assert fingerprint(denoiser, **files) == source.fingerprint()
    convert(denoiser, tmp_path / "whole.gguf", components=files)
    assert fingerprint(tmp_path / "whole.gguf") == source.fingerprint()


# ---- LoRAs -------------------------------------------------------------------------------------------------


def modules(model: Model, *, fused: bool) -> list[str]:
    """All matrices of the transformer, as the original or as diffusers has them."""
    weights, table = lora_dit.original(model), lora_dit.family(model).modules(model)
    there = [name for name in table if weights.get(f"{name}.weight", np.zeros(1)).ndim == 2]
    return there if fused else [part for name in there for part in table[name]]


SPELLINGS = {"kohya": (True, lora_dit.kohya()), "peft": (False, lora_dit.peft("transformer."))}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("storage", ["folder", "single"])
@pytest.mark.parametrize("model", [FLUX, SD35_MEDIUM], ids=["flux", "sd3.5"])
def test_baked_weights_are_the_sums(model: Model, storage: str, spelling: str, dit: Opens, tmp_path: Path) -> None:
    """Fused LoRAs in split files and the other way round, halves swapped where diffusers has them so."""
    fused, spell = SPELLINGS[spelling]
    updates = [lora_dit.random_update(model, modules(model, fused=fused), seed=seed) for seed in (1, 2)]
    loras = [lora_dit.write(spell(update), tmp_path / f"{k}.safetensors") for k, update in enumerate(updates)]
    bake(dit(model, storage=storage)._path, [(loras[0], 0.7), (loras[1], -0.3)], tmp_path / "baked.safetensors")
    got = load_file(tmp_path / "baked.safetensors")
    for name, values in lora_dit.merged(model, (updates[0], 0.7), (updates[1], -0.3)).items():
        assert_close(got[f"model.diffusion_model.{name}"].reshape(values.shape), values, 1e-6)  # float32's sums
    assert np.isfinite(latent(tmp_path / "baked.safetensors")).all()


@pytest.mark.parametrize("model", [FLUX, SD3], ids=["flux", "sd3"])
def test_extract_finds_what_was_baked(model: Model, dit: Opens, tmp_path: Path) -> None:
    """Of a folder and a file, which cut their matrices differently; loaded, it makes the tuned model of the base."""
    update = lora_dit.random_update(model, modules(model, fused=False), seed=1)
    x = lora_dit.write(SPELLINGS["peft"][1](update), tmp_path / "x.safetensors")
    bake(dit(model, storage="single")._path, [(x, 1.0)], tmp_path / "tuned.safetensors")
    folder = dit(model)._path
    for to in ("diffusers", "kohya"):
        out = tmp_path / f"{to}.safetensors"
        told = extract(tmp_path / "tuned.safetensors", folder, out, rank=16, type="f32", to=to)
        assert told.residual < 1e-5  # float32
        bake(folder, [(out, 1.0)], tmp_path / "again.safetensors")
        got, want = load_file(tmp_path / "again.safetensors"), load_file(tmp_path / "tuned.safetensors")
        for name, values in want.items():
            assert_close(got[name].reshape(values.shape), values, 1e-5)


def test_a_large_file_takes_little_memory_to_bake(tmp_path: Path) -> None:
    """Less than the tensor that changes would take alone in float32."""
    import tracemalloc

    side = 4096
    rng = np.random.default_rng(0)
    name = "double_blocks.0.img_attn.proj"
    weight = rng.standard_normal((side, side), np.float32).astype(np.float16)
    base = tiny_dit.save({f"model.diffusion_model.{name}.weight": weight}, tmp_path / "base.safetensors", "float16")
    factors = {
        "lora_down.weight": rng.standard_normal((4, side), np.float32),
        "lora_up.weight": rng.standard_normal((side, 4), np.float32),
    }
    x = lora_dit.write(lora_dit.kohya()({name: factors}), tmp_path / "x.safetensors")
    tracemalloc.start()
    try:
        bake(base, [(x, 0.5)], tmp_path / "baked.safetensors", threads=1)
        baking = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        extract(tmp_path / "baked.safetensors", base, tmp_path / "y.safetensors", rank=4, threads=1)
        extracting = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = 4 * side * side
    assert baking < whole / 2
    assert extracting < 1.5 * whole
