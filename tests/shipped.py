"""The model and the LoRAs that ship: their weights as other programs take them, and long histories of switches."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np

from sdcpp_py.files import shipped_model

LORAS = ("line", "night", "pastel")


def weights() -> dict[str, np.ndarray]:
    """All weights by their names in the file, in float32, in numpy's shapes."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        .astype(np.float32)
        .reshape(tuple(int(n) for n in reversed(tensor.shape)))
        for tensor in gguf.GGUFReader(shipped_model()).tensors
    }


def write_as(path: Path, dtype: type[np.floating]) -> Path:
    """The same model with every matrix and kernel in this type; vectors stay float32."""
    reader = gguf.GGUFReader(shipped_model())
    writer = gguf.GGUFWriter(path, arch=reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0])
    for name, values in weights().items():
        writer.add_tensor(name, values if values.ndim == 1 else values.astype(dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def switches(n: int, seed: int = 0) -> list[dict[str, float]]:
    """States to go through, no two neighbours alike: none to three LoRAs, some strong, some negative."""
    rng = random.Random(seed)
    out: list[dict[str, float]] = [{}]
    while len(out) <= n:
        names = rng.sample(LORAS, rng.randint(0, len(LORAS)))
        state = {name: rng.choice((-0.3, 0.6, 1.0)) for name in names}
        if state != out[-1]:
            out.append(state)
    return out[1:]
