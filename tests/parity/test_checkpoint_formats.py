"""What the safetensors and gguf packages write is read with the same names, types, shapes and bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from sdcpp_py import _native

LONG = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight"

# torch's name of a type, and ours.
SAFETENSORS_TYPES = [
    ("bool", "bool"),
    ("uint8", "u8"),
    ("int8", "i8"),
    ("float8_e4m3fn", "f8_e4m3"),
    ("float8_e5m2", "f8_e5m2"),
    ("uint16", "u16"),
    ("int16", "i16"),
    ("float16", "f16"),
    ("bfloat16", "bf16"),
    ("uint32", "u32"),
    ("int32", "i32"),
    ("float32", "f32"),
    ("uint64", "u64"),
    ("int64", "i64"),
    ("float64", "f64"),
]
SHAPES = [(), (1,), (7,), (2, 3), (4, 1, 3, 3), (0, 5)]


def draw(n: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(n)


@pytest.mark.parity
def test_every_type_of_safetensors(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch_file

    tensors, wanted = {}, {}
    for seed, (theirs, ours) in enumerate(SAFETENSORS_TYPES):
        for shape in SHAPES:
            tensor = torch.zeros(shape, dtype=getattr(torch, theirs))
            stored = draw(tensor.nbytes, seed)
            if stored and theirs != "bool":
                tensor = torch.frombuffer(bytearray(stored), dtype=tensor.dtype).reshape(shape)
            name = f"{ours} {shape} \u00e9"
            tensors[name] = tensor
            wanted[name] = (ours, shape, bytes(len(stored)) if theirs == "bool" else stored)
    path = tmp_path / "all.safetensors"
    save_torch_file(tensors, path, {"format": "pt"})

    got = {name: (kind, shape, stored) for name, kind, shape, stored in _native.probe_checkpoint(str(path))}
    assert got == wanted


def test_more_than_four_dimensions_do_not_disturb(tmp_path):
    path = tmp_path / "video.safetensors"
    save_file({"conv3d": np.zeros((2, 3, 1, 2, 2), np.float32), "plain": np.ones(3, np.float32)}, path)
    got = {name: stored for name, _, _, stored in _native.probe_checkpoint(str(path))}
    assert len(got["conv3d"]) == 96
    assert got["plain"] == np.ones(3, np.float32).tobytes()


@pytest.mark.parametrize("alignment", [None, 8, 128])
def test_every_type_of_gguf(tmp_path, alignment):
    path = tmp_path / "all.gguf"
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_string("text", "\u00e9" * 100)
    writer.add_array("tokens", [f"t{i}" for i in range(1000)])
    writer.add_array("scores", [0.5] * 1000)
    writer.add_float32("scale", 0.18215)
    if alignment:
        writer.add_custom_alignment(alignment)
    wanted = {}
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        if kind is gguf.GGMLQuantizationType.Q8_1:
            continue  # never in files; the package has its size from before ggml shortened it
        for rows in (1, 3):
            name = f"{LONG}.{kind.name}.{rows}"
            stored = np.frombuffer(draw(2 * rows * size, seed=int(kind)), np.uint8).reshape(rows, 2 * size)
            writer.add_tensor(name, stored, raw_dtype=kind)
            wanted[name] = (kind.name.lower(), (rows, 2 * block), stored.tobytes())
    plain = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    writer.add_tensor("four", plain)
    wanted["four"] = ("f32", (1, 2, 3, 4), plain.tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    got = {name: (kind.lower(), shape, stored) for name, kind, shape, stored in _native.probe_checkpoint(str(path))}
    assert got == wanted


@pytest.mark.parity
def test_clip_of_any_transformers_gets_its_usual_names(tmp_path):
    """transformers 5 saves a CLIPTextModel without "text_model.", earlier ones with it."""
    import transformers

    config = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20,
        max_position_embeddings=7, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    (tmp_path / "model_index.json").write_text("{}")
    transformers.CLIPTextModel(config).save_pretrained(tmp_path / "text_encoder")
    names = [name for name, *_ in _native.probe_checkpoint(str(tmp_path))]
    assert "text_encoder.text_model.final_layer_norm.weight" in names
    assert all(name.startswith("text_encoder.text_model.") for name in names)
