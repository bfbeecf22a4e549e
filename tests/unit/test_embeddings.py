"""Textual inversions: files of every layout, words in prompts, and what does not fit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch_files
from cases import SD1, SDXL, noise
from safetensors.numpy import save_file

from sdcpp_py import BadArgument, BadFile, Io, SDContext, Unsupported, _native
from sdcpp_py.embeddings import read_embedding

WIDTH = SD1.text_width
VECTORS = noise("embedding", 3, WIDTH)


def write(folder: Path, name: str, vectors: np.ndarray = VECTORS) -> Path:
    save_file({"emb_params": vectors}, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one embedding of three vectors."""
    write(tmp_path, "easyStyle")
    return tmp_path


@pytest.fixture
def sd_ctx(folder: Path, tiny_sd1: Path) -> Any:
    with SDContext(tiny_sd1, embedding_dir=folder, threads=1) as context:
        yield context


def states(context: SDContext, text: str) -> np.ndarray:
    """What the denoiser is told of a prompt."""
    context.count_tokens(text)  # makes the words known
    return _native.probe_text(context._native, text)


def paint(context: SDContext, prompt: str, **options: Any) -> np.ndarray:
    return np.asarray(context.generate(prompt, steps=1, seed=1, width=32, height=32, **options))


# ---- files ---------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Path]:
    """The same vectors in every layout."""
    out = {"emb_params": write(folder, "a")}
    out["token"] = folder / "b.safetensors"
    save_file({"<cat-toy>": VECTORS}, out["token"])
    array = torch_files.array("0", VECTORS)
    raw = {"0": VECTORS.tobytes()}
    out["diffusers"] = torch_files.archive(
        folder / "c.bin", torch_files.program(torch_files.dictionary({"<cat-toy>": array})), raw
    )
    webui = {
        "string_to_token": torch_files.dictionary({"*": torch_files.number(265)}),
        "string_to_param": torch_files.dictionary({"*": array}),
        "name": torch_files.text("d"),
        "step": torch_files.number(1000),
    }
    out["webui"] = torch_files.archive(folder / "d.pt", torch_files.program(torch_files.dictionary(webui)), raw)
    out["clip_l"] = folder / "e.safetensors"
    save_file({"clip_l": VECTORS}, out["clip_l"])
    return out


@pytest.mark.parametrize("layout", ["emb_params", "token", "diffusers", "webui", "clip_l"])
def test_every_layout_is_read(layout: str, tmp_path: Path) -> None:
    path = files(tmp_path)[layout]
    embedding = read_embedding(path)
    assert embedding.name == path.stem
    assert embedding.token == ("<cat-toy>" if layout in ("token", "diffusers") else "")
    (vectors,) = embedding.for_family("sd1")
    np.testing.assert_array_equal(vectors, VECTORS)


def test_one_vector_without_a_row_of_its_own(tmp_path: Path) -> None:
    save_file({"<x>": VECTORS[0]}, tmp_path / "x.safetensors")
    (vectors,) = read_embedding(tmp_path / "x.safetensors").for_family("sd1")
    np.testing.assert_array_equal(vectors, VECTORS[:1])


# ---- words ---------------------------------------------------------------------------------------------


def test_a_word_takes_the_room_of_its_vectors(sd_ctx: SDContext) -> None:
    plain = sd_ctx.count_tokens("a drawing by")
    assert sd_ctx.count_tokens("a drawing by easystyle") == plain + 3
    assert sd_ctx.count_tokens("a drawing by embedding:easyStyle") == plain + 3
    assert sd_ctx.count_tokens("easystyle, EASYSTYLE easyStyle") == 10


def test_the_encoder_gets_the_vectors(sd_ctx: SDContext, tiny_sd1: Path) -> None:
    """A word whose vectors are those of tokens is those tokens."""
    ids = _native.probe_clip_tokens(str(_data_dir() / "clip_merges.txt"), "red heart soft light")
    table = _token_table(tiny_sd1)
    assert sd_ctx._embeddings.folder is not None
    write(sd_ctx._embeddings.folder, "fourWords", table[ids])
    np.testing.assert_array_equal(states(sd_ctx, "a fourwords, big"), states(sd_ctx, "a red heart soft light, big"))


def _data_dir() -> Path:
    from sdcpp_py.files import data_dir

    return data_dir()


def _token_table(path: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(path)["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"]


def test_letters_case_and_spelling_do_not_matter(sd_ctx: SDContext) -> None:
    want = paint(sd_ctx, "a cat by easyStyle, big")
    assert np.array_equal(paint(sd_ctx, "a cat by EASYSTYLE, big"), want)
    assert np.array_equal(paint(sd_ctx, "a cat by embedding:easystyle, big"), want)
    assert np.array_equal(paint(sd_ctx, "a cat by embedding:easystyle.safetensors, big"), want)
    assert not np.array_equal(paint(sd_ctx, "a cat by easy style1, big"), want)


def test_weights_and_negative_prompts(sd_ctx: SDContext) -> None:
    want = paint(sd_ctx, "a cat (easyStyle:1.2)")
    assert np.array_equal(paint(sd_ctx, "a cat (embedding:easyStyle:1.2)"), want)
    assert not np.array_equal(paint(sd_ctx, "a cat easyStyle"), want)
    assert not np.array_equal(paint(sd_ctx, "a cat", negative_prompt="easyStyle"), paint(sd_ctx, "a cat"))


def test_a_prompt_without_the_word_is_as_if_there_were_none(sd_ctx: SDContext, tiny_sd1: Path) -> None:
    with SDContext(tiny_sd1, threads=1) as other:
        want = paint(other, "a cat")
    paint(sd_ctx, "a cat by easyStyle")
    np.testing.assert_array_equal(paint(sd_ctx, "a cat"), want)


def test_a_word_is_not_torn_between_chunks(sd_ctx: SDContext) -> None:
    text = "a " * 74 + "easyStyle"  # 74 and 3
    assert sd_ctx.count_tokens(text) == 77
    assert states(sd_ctx, text).shape[-2] == 2 * 77
    np.testing.assert_array_equal(
        states(sd_ctx, text).reshape(2, 77, WIDTH)[1], states(sd_ctx, "easyStyle").reshape(77, WIDTH)
    )


def test_the_longest_name_counts(sd_ctx: SDContext) -> None:
    assert sd_ctx._embeddings.folder is not None
    write(sd_ctx._embeddings.folder, "easyStyle-neg", VECTORS[:1])
    assert sd_ctx.count_tokens("easystyle-neg") == 1
    assert sd_ctx.count_tokens("easystyle neg") == 3 + sd_ctx.count_tokens("neg")


def test_a_file_s_own_word(sd_ctx: SDContext) -> None:
    assert sd_ctx._embeddings.folder is not None
    save_file({"<cat-toy>": VECTORS[:2]}, sd_ctx._embeddings.folder / "learned.safetensors")
    assert sd_ctx.count_tokens("a <cat-toy> here") == 4
    assert sd_ctx.count_tokens("a learned here") == 4


def test_a_changed_file_is_read_again(sd_ctx: SDContext) -> None:
    before = paint(sd_ctx, "easyStyle")
    assert sd_ctx._embeddings.folder is not None
    write(sd_ctx._embeddings.folder, "easyStyle", VECTORS[:1])
    assert sd_ctx.count_tokens("easyStyle") == 1
    assert not np.array_equal(paint(sd_ctx, "easyStyle"), before)


def test_a_lora_brings_its_own(tiny_sd1: Path, tmp_path: Path) -> None:
    key = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    lora = {
        f"{key}.lora_down.weight": noise("down", 4, 64),
        f"{key}.lora_up.weight": noise("up", 64, 4),
        "bundle_emb.inside.string_to_param.*": VECTORS,
    }
    save_file(lora, tmp_path / "style.safetensors")
    write(tmp_path, "outside")
    with SDContext(tiny_sd1, lora_dir=tmp_path, embedding_dir=tmp_path, threads=1) as context:
        with_word = paint(context, "a inside <lora:style:0.1>")
        np.testing.assert_array_equal(with_word, paint(context, "a embedding:inside <lora:style:0.1>"))
        np.testing.assert_array_equal(with_word, paint(context, "a outside <lora:style:0.1>"))
        with pytest.raises(BadArgument, match=r"embedding 'inside': .* has no such file"):
            paint(context, "a embedding:inside")


def test_two_text_encoders(tiny_folder: Any, tmp_path: Path) -> None:
    save_file(
        {"clip_l": noise("l", 2, SDXL.text_width), "clip_g": noise("g", 2, SDXL.text_2_width)},
        tmp_path / "both.safetensors",
    )
    write(tmp_path, "one", noise("one", 2, SDXL.text_width))
    with SDContext(tiny_folder(SDXL), embedding_dir=tmp_path, threads=1) as context:
        assert context.count_tokens("a both") == 3
        assert not np.array_equal(states(context, "a both"), states(context, "a cat sat"))
        with pytest.raises(BadArgument, match=r"sdxl needs clip_l and clip_g; it was made for another family"):
            paint(context, "embedding:one")


# ---- what goes wrong -----------------------------------------------------------------------------------


def test_names_that_are_none(sd_ctx: SDContext, tiny_sd1: Path) -> None:
    with pytest.raises(BadArgument, match=r"embedding 'nothing': .* has no such file; there are: easyStyle"):
        paint(sd_ctx, "a embedding:nothing")
    with SDContext(tiny_sd1, threads=1) as other, pytest.raises(BadArgument, match="give embedding_dir"):
        paint(other, "a embedding:nothing")
    with pytest.raises(Io, match="is no folder"):
        SDContext(tiny_sd1, embedding_dir="nowhere")


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (noise("wide", 2, 96), "its vectors have 96 numbers, and the model's text encoder takes 64"),
        (noise("many", 76, WIDTH), "has 76 vectors; a chunk of a prompt has room for 1 to 75"),
        (np.full((1, WIDTH), np.nan, np.float32), "holds what is no finite number"),
    ],
)
def test_what_does_not_fit_raises_where_it_is_asked_for(
    vectors: np.ndarray, sentence: str, sd_ctx: SDContext, caplog: pytest.LogCaptureFixture
) -> None:
    assert sd_ctx._embeddings.folder is not None
    write(sd_ctx._embeddings.folder, "heart", vectors)
    before = paint(sd_ctx, "easyStyle")
    with pytest.raises(BadArgument) as caught:
        paint(sd_ctx, "embedding:heart")
    assert sentence in str(caught.value)
    np.testing.assert_array_equal(paint(sd_ctx, "easyStyle"), before)
    with caplog.at_level(logging.WARNING, "sdcpp_py"):
        paint(sd_ctx, "a red heart")  # a word that happens to be a file's name
    assert sentence in caplog.text


@pytest.mark.parametrize(
    "content", [b"", b"no embedding", b"\x80\x02}.", b"PK\x03\x04broken"], ids=["empty", "text", "pickle", "zip"]
)
def test_damaged_files(content: bytes, sd_ctx: SDContext, caplog: pytest.LogCaptureFixture) -> None:
    assert sd_ctx._embeddings.folder is not None
    (sd_ctx._embeddings.folder / "broken.pt").write_bytes(content)
    with pytest.raises((BadFile, Unsupported), match=r"broken\.pt: "):
        paint(sd_ctx, "embedding:broken")
    with caplog.at_level(logging.WARNING, "sdcpp_py"):
        paint(sd_ctx, "a broken heart")
    assert "broken.pt: " in caplog.text


def test_a_model_is_no_embedding(tiny_sd1: Path) -> None:
    with pytest.raises(BadFile, match="is no embedding; is it a LoRA or a model"):
        read_embedding(tiny_sd1)
