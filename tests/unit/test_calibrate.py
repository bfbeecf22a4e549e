"""Importance matrices: what is collected, written, read, and what it does to a quantised model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cases import NETWORKS, SD1
from closeness import relative_rmse

from sdcpp_py import BadArgument, BadFile, Cancelled, SDContext, _native
from sdcpp_py.calibrate import calibrate
from sdcpp_py.weights import convert, read_imatrix
from sdcpp_py.weights.imatrix import write_imatrix

UNET = "model.diffusion_model.middle_block.1.transformer_blocks.0."
SMALL: dict[str, Any] = {"steps": 2, "size": 32, "threads": 1}


def test_squares_are_those_of_what_goes_in(tiny_sd1: Path) -> None:
    """The keys of the cross attention are made of the text, which is known."""
    case = next(case for case in NETWORKS if case.name == "unet-square")
    assert case.model == SD1
    with SDContext(tiny_sd1, threads=1) as context:
        context._native.collect_importance(True)
        for _ in range(2):
            _native.probe_run(context._native, case.network, **case.inputs)
        found = context._native.importance()
        context._native.collect_importance(False)
        assert context._native.importance() == {}
    text = case.inputs["text"].reshape(-1, SD1.text_width).astype(np.float64)
    sums, rows = found[UNET + "attn2.to_k.weight"]
    assert rows == 2 * len(text)
    np.testing.assert_allclose(sums, 2 * np.sum(text**2, axis=0), rtol=1e-12)
    assert all(np.isfinite(sums).all() and (sums >= 0).all() and rows > 0 for sums, rows in found.values())


def test_a_picture_is_the_same_meanwhile(tiny_sd1: Path) -> None:
    def paint(context: SDContext) -> np.ndarray:
        return np.asarray(context.generate("a cat", steps=2, seed=1, width=32, height=32))

    with SDContext(tiny_sd1, threads=1) as context:
        want = paint(context)
        context._native.collect_importance(True)
        np.testing.assert_array_equal(paint(context), want)
        names = set(context._native.importance())
        matrices = {w["name"] for w in _native.probe_weights(context._native) if len(w["shape"]) == 2}
    not_run = {name for name in matrices if "embedding" in name or name.startswith("first_stage_model.encoder.")}
    assert names == matrices - not_run


def test_from_a_run_to_a_better_file(tiny_sd1: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    n = calibrate(
        tiny_sd1, tmp_path / "i.gguf", ["a cat", "a dog"], on_progress=lambda *call: told.append(call), **SMALL
    )
    importance = read_imatrix(tmp_path / "i.gguf")
    assert len(importance) == n > 20
    assert told == [(1, 4, "a cat"), (2, 4, "a cat"), (3, 4, "a dog"), (4, 4, "a dog")]
    fields = gguf.GGUFReader(tmp_path / "i.gguf").fields
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.chunk_count"].contents() == 2

    # The error that counts is that of the columns that matter.
    errors = []
    for options in ({}, {"imatrix": tmp_path / "i.gguf"}):
        convert(tiny_sd1, tmp_path / "q.gguf", type="q4_0", **options)
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
        tensor, weight = tensors[UNET + "ff.net.2.weight"], importance[UNET + "ff.net.2.weight"]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        convert(tiny_sd1, tmp_path / "f.gguf", type="f32")
        source = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "f.gguf").tensors}[tensor.name]
        errors.append(relative_rmse(values * np.sqrt(weight), source * np.sqrt(weight)))
    assert errors[1] < 0.95 * errors[0]


def test_stopping_writes_nothing(tiny_sd1: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="stopped; nothing was written"):
        calibrate(tiny_sd1, tmp_path / "i.gguf", ["a cat"], on_progress=lambda *_: False, **SMALL)
    with pytest.raises(BadArgument, match="name at least one picture"):
        calibrate(tiny_sd1, tmp_path / "i.gguf", [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("sums", "sentence"),
    [
        (np.array([1.0, np.nan]), "holds numbers that are no sums of squares"),
        (np.array([1.0, -1.0]), "holds numbers that are no sums of squares"),
    ],
)
def test_matrices_that_cannot_be(sums: np.ndarray, sentence: str, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", {"w": (sums, 3)}, 1)
    with pytest.raises(BadFile, match=sentence):
        read_imatrix(tmp_path / "i.gguf")


def test_one_of_another_model(tiny_sd1: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", {UNET + "ff.net.2.weight": (np.ones(32), 3)}, 1)
    with pytest.raises(BadArgument, match=r"has 32 columns for .*, which has 256; was it made with another model"):
        convert(tiny_sd1, tmp_path / "q.gguf", type="q4_0", imatrix=tmp_path / "i.gguf")
