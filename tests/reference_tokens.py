"""transformers' CLIP tokenizer with our copy of the vocabulary, as diffusers loads it from a folder."""

import json
import tempfile
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parents[1] / "sdcpp_py" / "data" / "clip_merges.txt"


def vocabulary() -> dict[str, int]:
    """OpenAI's order: bytes, bytes that end a word, merges, the two special tokens."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    letters = [chr(byte) for byte in printing] + [chr(0x100 + i) for i in range(len(others))]
    merged = [line.replace(" ", "") for line in MERGES.read_text(encoding="utf-8").splitlines()]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(pad: str = "<|endoftext|>", length: int = 1 << 30) -> Any:
    """`pad` is "!" for OpenCLIP's encoders."""
    import transformers

    def special(text: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": text, **flags}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "vocab.json").write_text(json.dumps(vocabulary()))
        (path / "merges.txt").write_text("#version: 0.2\n" + MERGES.read_text(encoding="utf-8"), encoding="utf-8")
        config = {
            "bos_token": special("<|startoftext|>"),
            "eos_token": special("<|endoftext|>"),
            "unk_token": special("<|endoftext|>"),
            "pad_token": pad,
            "model_max_length": length,
            "tokenizer_class": "CLIPTokenizer",
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        fast = getattr(transformers, "CLIPTokenizerFast", transformers.CLIPTokenizer)
        return fast.from_pretrained(folder)
