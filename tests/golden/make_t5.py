"""Stores what transformers and tokenizers say of T5: python tests/golden/make_t5.py

``t5.npz`` has states of the tiny encoder, ``t5_tokens.json`` the ids of tests/texts.py. Needs torch and transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import reference_t5
import t5_vocabulary
import tokenizers
import torch
import transformers
from cases_t5 import STATES, TEXTS


def main() -> None:
    answers = {case.name: reference_t5.encode(case.model, case.ids, case.mask) for case in STATES}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    np.savez_compressed(HERE / "t5.npz", **answers, versions=np.array(versions))

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(t5_vocabulary.tokenizer_json("new")))
    tokens = [[text, tokenizer.encode(text, add_special_tokens=False).ids] for text in TEXTS]
    golden = {"tokenizers": tokenizers.__version__, "tokens": tokens}
    (HERE / "t5_tokens.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
