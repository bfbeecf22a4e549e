"""T5 against transformers' stored answers, the places where its vocabulary is found, and what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import t5_vocabulary
import tiny_t5
from cases_t5 import LOUD, STATES, T5
from closeness import assert_close
from safetensors.numpy import save_file

from sdcpp_py import BadFile, Io, Unsupported, _native
from sdcpp_py.files import data_dir

HERE = Path(__file__).parents[1] / "golden"
GOLDEN = np.load(HERE / "t5.npz")
TOKENS = json.loads((HERE / "t5_tokens.json").read_text())["tokens"]
IDS = np.zeros((1, 3), np.float32)


@pytest.mark.parametrize("case", STATES, ids=lambda case: case.name)
def test_states_are_those_of_transformers(tmp_path, case):
    """Float32 on both sides: what remains is the order of sums."""
    got = _native.probe_t5(str(tiny_t5.write_folder(case.model, tmp_path)), case.ids, case.mask)
    assert_close(got[0], GOLDEN[case.name], tolerance=1e-5)


@pytest.mark.parametrize("name", ["reference", "plain"])
def test_activations_beyond_half_precision(tmp_path, monkeypatch, name):
    """ggml's products with f16 weights, which other devices use, round what they multiply to f16."""
    monkeypatch.setenv("SDCPP_KERNELS", name)
    case = next(case for case in STATES if case.model == LOUD)
    got = _native.probe_t5(str(tiny_t5.write_folder(LOUD, tmp_path, "float16")), case.ids)
    assert_close(got[0], GOLDEN[case.name], tolerance=5e-3)


def test_every_layout_is_the_same_encoder(tmp_path):
    """Alone, inside a checkpoint, inside a diffusers folder's, with the table under its other name, llama.cpp's."""
    weights = tiny_t5.weights(T5)
    other = {name.replace("shared.", "encoder.embed_tokens."): values for name, values in weights.items()}
    both = {**weights, "encoder.embed_tokens.weight": weights["shared.weight"]}
    save_file(other, tmp_path / "other.safetensors")
    save_file(both, tmp_path / "both.safetensors")
    for prefix in ("text_encoders.t5xxl.transformer.", "text_encoder_3.", "text_encoder_2."):
        save_file({prefix + name: values for name, values in weights.items()}, tmp_path / f"{prefix}safetensors")
    tiny_t5.write_gguf(T5, tmp_path / "llama.gguf")
    tiny_t5.write_folder(T5, tmp_path / "folder")
    case = STATES[1]
    for path in tmp_path.iterdir():
        assert_close(_native.probe_t5(str(path), case.ids)[0], GOLDEN[case.name], tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda w: w.pop("shared.weight"), BadFile, "give it as t5xxl="),
        (lambda w: w.pop("encoder.block.1.layer.0.SelfAttention.o.weight"), BadFile, "1 of 30 weights are missing"),
        (
            lambda w: w.update({"encoder.block.0.layer.1.DenseReluDense.wi.weight": w.pop(WI_0)}),
            Unsupported,
            "first version",
        ),
        (lambda w: w.update({BIAS.replace(".0.", ".1.", 1): w[BIAS]}), Unsupported, "UMT5"),
        (
            lambda w: w.update({"encoder.final_layer_norm.weight": np.ones(65, np.float32)}),
            BadFile,
            "1 of 30 weights do not fit",
        ),
        (lambda w: w.update({BIAS: np.ones((32, 5), np.float32)}), Unsupported, "5 heads"),
        (lambda w: w.update({BIAS: np.ones((6, 3), np.float32)}), Unsupported, "6 buckets"),
    ],
)
def test_what_is_no_t5_is_refused(tmp_path, change, error, message):
    weights = tiny_t5.weights(T5)
    change(weights)
    save_file(weights, tmp_path / "t5.safetensors")
    with pytest.raises(error, match=message):
        _native.probe_t5(str(tmp_path / "t5.safetensors"), IDS)


WI_0 = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

# ---- token ids


def ids_of(path: Path, text: str) -> list[int]:
    return _native.probe_t5_tokens(str(path), text, str(data_dir())).tolist()


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory):
    """T5 files and folders, each with its vocabulary in another place."""
    root = tmp_path_factory.mktemp("vocabularies")
    weights = root / "weights"
    tiny_t5.write_folder(T5, weights)
    shutil.copytree(weights, root / "pipeline" / "text_encoder_3")
    (root / "pipeline" / "tokenizer_3").mkdir()
    t5_vocabulary.write_json(root / "pipeline" / "tokenizer_3" / "tokenizer.json", "new")
    shutil.copytree(weights, root / "alone")
    shutil.copy(t5_vocabulary.SPIECE, root / "alone" / "spiece.model")
    for with_charsmap in (True, False):
        describe = partial(t5_vocabulary.add_to_gguf, with_charsmap=with_charsmap)
        tiny_t5.write_gguf(T5, root / f"{with_charsmap}.gguf", describe=describe)
    return root


PLACES = ["weights", "pipeline/text_encoder_3", "alone/model.safetensors", "alone", "True.gguf", "False.gguf"]


@pytest.mark.parametrize("place", PLACES)
def test_ids_are_those_of_tokenizers(vocabularies, place):
    """One text of all, for a vocabulary is read at each call; U+0085 is a space to some forms, and a letter to T5."""
    texts = [(text, ids) for text, ids in TOKENS if "\x85" not in text]
    joined = " x ".join(text for text, _ in texts)
    got = ids_of(vocabularies / place, joined)
    want = [id for _, ids in texts for id in [*ids, 3, 226]][:-2]
    assert got == want


@pytest.mark.parametrize(
    ("tokens", "scores", "kinds", "message"),
    [
        (["<unk>", "a"], [0.0], [2, 1], "2 tokens, 1 scores and 2 types"),
        (["<unk>", "a"], [0.0, -1.0], [2], "2 tokens, 2 scores and 1 types"),
        (["<unk>", "a"], [0.0, -1.0], [2, 7], "token 1 of its tokenizer is of the unknown type 7"),
        (["<unk>", "a"], [0.0, -1.0], [1, 1], "no piece for what is unknown"),
        (["<unk>", "a"], [0.0, float("nan")], [2, 1], "'a' has the score nan"),
        ([1, 2], [0.0, -1.0], [2, 1], "0 tokens"),
    ],
)
def test_a_damaged_vocabulary_of_a_gguf_file_is_refused(tmp_path, tokens, scores, kinds, message):
    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_array("tokenizer.ggml.tokens", tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(kinds)

    tiny_t5.write_gguf(T5, tmp_path / "t5.gguf", describe=describe)
    with pytest.raises(BadFile, match=message):
        ids_of(tmp_path / "t5.gguf", "a")


def test_the_vocabulary_that_ships_may_be_missing(tmp_path):
    tiny_t5.write_folder(T5, tmp_path)
    with pytest.raises(Io, match=r"t5_spiece\.model"):
        _native.probe_t5_tokens(str(tmp_path), "a", str(tmp_path))
