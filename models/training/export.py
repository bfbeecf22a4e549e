"""Joins a trained diffusers folder into the GGUF file that ships, under Stable Diffusion's original names.

    python export.py FOLDER emoji.gguf

Convolutions and the embeddings of positions stay in f16, vectors in f32; matrices become q8_0 (8.5 bits a weight)
where their rows are whole blocks of 32, and the embeddings of the 49,408 tokens q4_0, or they would be half of the
file. The names come from the engine's own table of the model's weights, so nothing is listed here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

from sdcpp_py import _native
from sdcpp_py.files import data_dir

LICENCE = "OFL-1.1 (the pictures are of Noto Emoji); Unicode-3.0 (the words are of CLDR)"


def stored_form(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """The bytes and the type in which a weight is kept."""
    kind = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return values.astype(np.float32), kind.F32
    if "token_embedding" in name:
        return quantize(values.astype(np.float32), kind.Q4_0), kind.Q4_0
    if values.ndim == 2 and values.shape[1] % 32 == 0 and "position_embedding" not in name:
        return quantize(values.astype(np.float32), kind.Q8_0), kind.Q8_0
    return values.astype(np.float16), kind.F16


def export(folder: Path, output: Path) -> None:
    """Writes the file beside its place, then renames it."""
    context = _native.Context(str(folder), data_dir=str(data_dir()))
    stored = {
        f"{part}.{name}": values for part in ("unet", "vae", "text_encoder") for name, values in tensors(folder, part)
    }

    temporary = output.with_suffix(".part")
    writer = gguf.GGUFWriter(temporary, arch="sd1")
    writer.add_name("emoji")
    writer.add_license(LICENCE)
    config = json.loads((folder / "unet" / "config.json").read_text())
    writer.add_uint32("unet.sample_size", config["sample_size"])
    writer.add_string("prediction_type", "epsilon")
    for weight in _native.probe_weights(context):
        values = stored[weight["diffusers_name"]]
        if "first_stage_model" in weight["name"] and ".attn_1." in weight["name"] and values.ndim == 2:
            values = values[:, :, None, None]  # 1x1 convolutions in single files
        data, kind = stored_form(weight["name"], values)
        writer.add_tensor(weight["name"], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    temporary.replace(output)


def tensors(folder: Path, part: str) -> list[tuple[str, np.ndarray]]:
    """A component's weights, with CLIP's names as all releases but transformers 5's write them."""
    (file,) = (folder / part).glob("*.safetensors")
    prefix = "text_model." if part == "text_encoder" else ""
    return [(prefix + name.removeprefix(prefix), values) for name, values in load_file(file).items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    export(arguments.folder, arguments.output)
