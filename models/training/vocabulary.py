"""The words that captions use, so that only their embeddings need training.

CLIP's vocabulary has 49408 entries; the captions use about two thousand. Training runs on a
compact table of those; ``expand`` writes them back into a full text encoder, where every entry
that no caption uses gets the mean of the trained ones: an unknown word says nothing special.
"""

import torch
from data import variants
from transformers import CLIPTextConfig, CLIPTextModel


def text_config(vocab_size, width, layers):
    return CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=width,
        bos_token_id=min(49406, vocab_size - 2),
        eos_token_id=min(49407, vocab_size - 1),
        pad_token_id=min(49407, vocab_size - 1),
    )


class Vocabulary:
    """Maps CLIP token ids to rows of the compact table."""

    def __init__(self, tokenizer, glyphs):
        texts = [""]
        for g in glyphs:
            texts += [g["name"], *variants(g), *g["keywords"]]
            texts += [f"{before}, {after}" for k in g["keywords"] for before, after in ((g["name"], k), (k, "a"))]
            texts.append(f"{g['name']}, a")
        self.tokenizer = tokenizer
        self.used = sorted({i for ids in tokenizer(texts).input_ids for i in ids})
        self.row = torch.full((len(tokenizer),), -1)
        self.row[torch.tensor(self.used)] = torch.arange(len(self.used))

    def __call__(self, captions):
        """Captions to compact ids [B, 77]."""
        ids = self.tokenizer(captions, padding="max_length", max_length=77, truncation=True)
        rows = self.row[torch.tensor(ids.input_ids)]
        assert rows.min() >= 0, "a caption uses a word outside the vocabulary"
        return rows

    def expand(self, compact):
        """A text encoder of all 49408 entries from a compact one."""
        config = compact.config
        full = CLIPTextModel(text_config(len(self.row), config.hidden_size, config.num_hidden_layers))
        state = compact.state_dict()
        name = next(k for k in state if k.endswith("token_embedding.weight"))
        table = state[name].mean(dim=0).repeat(len(self.row), 1)
        table[torch.tensor(self.used)] = state[name]
        full.load_state_dict(state | {name: table})
        return full.eval()
