"""Build CLIP's tokenizer folder from OpenAI's merge list ``bpe_simple_vocab_16e6.txt.gz``.

    python build_tokenizer.py --merges bpe_simple_vocab_16e6.txt.gz --out tokenizer

The vocabulary is, in order: 256 byte letters, the same 256 as word ends (``</w>``), one entry
per merge (the first 48894), then <|startoftext|> and <|endoftext|>: 49408 entries.
"""

import argparse
import gzip
import json
from pathlib import Path

from transformers import CLIPTokenizer

MERGES = 49152 - 256 - 2


def byte_letters():
    """GPT-2's 256 printable stand-ins for bytes: printable ones first, the others shifted."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256 - len(printable))
    return [chr(b) for b in printable] + [chr(256 + n) for n in others]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--merges", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    with gzip.open(args.merges, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : MERGES + 1]
    letters = byte_letters()
    words = letters + [c + "</w>" for c in letters] + ["".join(m.split()) for m in lines]
    words += ["<|startoftext|>", "<|endoftext|>"]
    assert len(words) == 49408
    args.out.mkdir(parents=True, exist_ok=True)
    vocab_file, merges_file = args.out / "vocab.json", args.out / "merges.txt"
    vocab_file.write_text(json.dumps({w: i for i, w in enumerate(words)}, ensure_ascii=False), "utf-8")
    merges_file.write_text("#version: 0.2\n" + "\n".join(lines) + "\n", "utf-8")
    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=77)
    tokenizer.save_pretrained(args.out)
    print(tokenizer("a dog's face, red heart", padding="max_length").input_ids[:12], len(tokenizer))


if __name__ == "__main__":
    main()
