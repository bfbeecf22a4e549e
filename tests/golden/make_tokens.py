"""Writes tokens.json, what transformers makes of texts.py: python tests/golden/make_tokens.py"""

import json
import sys
from pathlib import Path

import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference_tokens import clip_tokenizer
from texts import TEXTS

if __name__ == "__main__":
    tokenizer = clip_tokenizer()
    tokens = [[text, tokenizer(text, add_special_tokens=False)["input_ids"]] for text in TEXTS]
    golden = {"transformers": transformers.__version__, "tokens": tokens}
    Path(__file__).with_name("tokens.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
