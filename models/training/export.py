"""Joins a trained diffusers folder into the GGUF file that ships, under Stable Diffusion's original names.

    python export.py FOLDER emoji.gguf

Convolutions and the embeddings of positions stay in f16, vectors in f32; matrices become q8_0 (8.5 bits a weight)
where their rows are whole blocks of 32, and the embeddings of the 49,408 tokens q4_0, or they would be half of the
file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sdcpp_py.weights import convert

LICENCE = "OFL-1.1 (the pictures are of Noto Emoji); Unicode-3.0 (the words are of CLDR)"


def export(folder: Path, output: Path) -> None:
    convert(
        folder,
        output,
        type="q8_0",
        tensor_types=[("token_embedding", "q4_0"), ("time_embed|emb_layers", "q8_0")],
        metadata={"general.name": "emoji", "general.license": LICENCE},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    export(arguments.folder, arguments.output)
