"""Converting models: what others read of our files, what stays exact, and what goes wrong said in a sentence."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
import tiny_sdxl
import torch_files
from cases import SD1, SD2, SDXL
from closeness import relative_rmse
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from sdcpp_py import BadArgument, BadFile, Cancelled, Io, SDContext, SdcppError, Unsupported, _native
from sdcpp_py.weights import TYPES, convert, from_array, names, open_source, plan, write
from sdcpp_py.weights.imatrix import write_imatrix
from sdcpp_py.weights.names import Part
from sdcpp_py.weights.tensor import Tensor

QUANTISED = [kind.name for kind in TYPES.values() if kind.can_write and kind.is_quantised]

# What gguf quantises itself; all others it only reads, and two it does not know.
MADE_BY_GGUF = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "mxfp4")
TOO_NEW = ("q1_0", "q2_0")

# Their tables of grids take seconds to make.
SLOW = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")
EACH = [pytest.param(type, marks=pytest.mark.slow) if type in SLOW else type for type in QUANTISED]

# The root mean square error of normal numbers, relative to theirs: measured, rounded up by a tenth.
ERRORS = {
    "q8_0": 0.0059, "q6_K": 0.019, "q5_K": 0.04, "q5_1": 0.042, "q5_0": 0.047, "q4_K": 0.079, "iq4_nl": 0.084,
    "iq4_xs": 0.085, "q4_1": 0.086, "q4_0": 0.096, "nvfp4": 0.11, "mxfp4": 0.12, "q3_K": 0.17, "iq3_s": 0.19,
    "iq3_xxs": 0.24, "iq2_s": 0.29, "q2_K": 0.32, "iq2_xs": 0.33, "iq2_xxs": 0.38, "iq1_s": 0.53, "iq1_m": 0.66,
    "q1_0": 0.66, "q2_0": 0.79, "tq1_0": 0.9, "tq2_0": 0.9,
}  # fmt: skip


def normal(rows: int = 8, columns: int = 512, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32)


def as_type(values: np.ndarray, type: str, **options: Any) -> np.ndarray:
    return _native.convert_rows("f32", values, type, *values.shape, **options)


def floats(raw: np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    return _native.convert_rows(type, raw, "f32", *shape).view(np.float32).reshape(shape)


def paint(path: Path) -> np.ndarray:
    with SDContext(path, threads=1) as sd_ctx:
        return np.asarray(sd_ctx.generate("a cat", steps=2, seed=1, width=32, height=32))


def fingerprint(path: Path) -> str:
    with SDContext(path, threads=1) as sd_ctx:
        return sd_ctx.fingerprint()


@pytest.fixture(scope="module")
def half(tiny_sd1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in f16."""
    path = tmp_path_factory.mktemp("half") / "half.safetensors"
    save_file({name: values.astype(np.float16) for name, values in load_file(tiny_sd1).items()}, path)
    return path


# ---- types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", EACH)
def test_quantised_rows_are_what_gguf_makes_and_reads(type: str) -> None:
    """Bit for bit what gguf quantises, where it can; of all types, what it reads; errors within the type's own."""
    values = normal()
    raw = as_type(values, type)
    back = floats(raw, type, values.shape)
    assert relative_rmse(back, values) < ERRORS[type]
    if type in TOO_NEW:
        return
    kind = gguf.GGMLQuantizationType(TYPES[type].number)
    assert (TYPES[type].block, TYPES[type].block_bytes) == gguf.GGML_QUANT_SIZES[kind]
    np.testing.assert_array_equal(back, dequantize(raw.reshape(values.shape[0], -1), kind))
    try:
        want = quantize(values, kind).reshape(-1)
    except NotImplementedError:
        assert type not in MADE_BY_GGUF
    else:
        assert type in MADE_BY_GGUF
        np.testing.assert_array_equal(raw, want)


@pytest.mark.parametrize("type", ["f16", "bf16"])
def test_halves_are_gguf_s(type: str) -> None:
    values = np.concatenate([normal(), normal() * np.float32(1e-6)])
    np.testing.assert_array_equal(
        as_type(values, type), quantize(values, gguf.GGMLQuantizationType[type.upper()]).view(np.uint8).reshape(-1)
    )


@pytest.mark.parametrize(("type", "largest"), [("f8_e4m3", 448), ("f8_e5m2", 57344)])
def test_8_bit_floats_are_the_nearest(type: str, largest: float) -> None:
    """Against a search among all 256; a tie goes to the even code."""
    codes = np.arange(256, dtype=np.uint8)
    all_values = floats(codes, type, (1, 256))[0]
    finite = codes[np.isfinite(all_values)]
    values = np.concatenate([normal().reshape(-1) * scale for scale in (1e-4, 0.01, 1, 30)] + [all_values[finite]])
    values = np.concatenate([values, [0.0, -0.0, largest, -largest]]).astype(np.float32)
    order = finite[np.argsort(finite & 1, kind="stable")]  # even codes first: argmin takes the first of equals
    nearest = order[np.argmin(np.abs(all_values[order][None].astype(np.float64) - values[:, None]), axis=1)]
    got = floats(as_type(values[None], type), type, (1, values.size))[0]
    np.testing.assert_array_equal(got, all_values[nearest])
    with pytest.raises(BadArgument, match=rf"row 0, column 0 holds \S+, but {type} ends at {largest}"):
        as_type(np.full((1, 1), largest * 1.2, np.float32), type)


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    values = normal(64)
    importance = np.ones(512, np.float32)
    importance[::8] = 100
    for type in ("q4_0", "q2_K", "iq3_xxs", "iq4_xs"):
        plain, told = (floats(as_type(values, type, importance=w), type, values.shape) for w in (None, importance))
        weighted = [float(np.mean(importance * (got - values) ** 2)) for got in (plain, told)]
        assert weighted[1] < 0.95 * weighted[0], type


@pytest.mark.parametrize("type", EACH)
def test_no_numbers_end_the_process(type: str) -> None:
    """Tiny, huge, equal, sparse, and importance of nothing."""
    rows = [normal(1, seed=50 + k) * np.float32(10.0**k) for k in range(-44, 4)]
    sparse = normal(1) * (np.arange(512) % 97 == 0)
    rows += [np.zeros((1, 512)), np.full((1, 512), 65504.0), np.full((1, 512), 1e-40), sparse, np.eye(2, 512)]
    values = np.concatenate(rows).astype(np.float32)
    for importance in (None, np.zeros(512, np.float32), (np.arange(512) < 3).astype(np.float32) * np.float32(1e30)):
        raw = as_type(values, type, importance=importance)
        assert np.isfinite(floats(raw, type, values.shape)).all()
    for wrong in (np.nan, np.inf, 1e6):
        values[3, 7] = wrong
        with pytest.raises(BadArgument, match="row 3, column 7 holds"):
            as_type(values, type)


# ---- files ---------------------------------------------------------------------------------------------


def test_gguf_reads_our_files(tiny_sd1: Path, tmp_path: Path) -> None:
    made = convert(tiny_sd1, tmp_path / "a.gguf", type="q4_0", metadata={"general.name": "täny"})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    field = {key: value.contents() for key, value in reader.fields.items()}
    assert (field["general.architecture"], field["general.name"]) == ("sd1", "täny")
    assert (field["general.file_type"], field["general.quantization_version"]) == (2, 2)
    source = load_file(tiny_sd1)
    assert {tensor.name for tensor in reader.tensors} == set(source)
    for tensor, planned in zip(reader.tensors, made.tensors, strict=True):
        values = source[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == values.shape
        assert tensor.tensor_type == planned.type.number
        assert tensor.data_offset % 32 == 0
        want = quantize(values, gguf.GGMLQuantizationType(planned.type.number))
        np.testing.assert_array_equal(tensor.data.view(np.uint8).reshape(-1), want.view(np.uint8).reshape(-1))


def test_an_f16_gguf_paints_the_same_picture(half: Path, tmp_path: Path) -> None:
    convert(half, tmp_path / "a.gguf", type="f16")
    assert fingerprint(tmp_path / "a.gguf") == fingerprint(half)
    np.testing.assert_array_equal(paint(tmp_path / "a.gguf"), paint(half))


def test_there_and_back_is_exact(half: Path, tmp_path: Path) -> None:
    convert(half, tmp_path / "a.gguf", type="f16")
    convert(tmp_path / "a.gguf", tmp_path / "b.safetensors", type="f16")
    convert(tmp_path / "b.safetensors", tmp_path / "c.gguf")
    convert(tmp_path / "c.gguf", tmp_path / "d.safetensors")
    for name in ("b", "d"):
        back = load_file(tmp_path / f"{name}.safetensors")
        for key, values in load_file(half).items():
            np.testing.assert_array_equal(back[key], values)
            assert back[key].dtype == np.float16
    with safe_open(tmp_path / "d.safetensors", "numpy") as file:
        assert file.metadata()["format"] == "pt"


def test_quantised_weights_are_copied_as_they_are(tiny_sd1: Path, tmp_path: Path) -> None:
    convert(tiny_sd1, tmp_path / "a.gguf", type="q4_0")
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf")
    a, b = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    assert all(np.array_equal(x.data, y.data) for x, y in zip(a.tensors, b.tensors, strict=True))
    convert(tmp_path / "b.gguf", tmp_path / "c.safetensors", type="f32")
    c = load_file(tmp_path / "c.safetensors")
    assert all(np.array_equal(dequantize(x.data, x.tensor_type).reshape(c[x.name].shape), c[x.name]) for x in a.tensors)


def test_values_of_a_gguf_file_are_copied_with_their_types(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", arch="flux")
    writer.add_array("x.strings", ["a", "bc"])
    writer.add_array("x.numbers", [1, 2, 3])
    writer.add_float32("x.f", 0.5)
    writer.add_bool("x.b", True)
    writer.add_tensor("w", normal(2, 64))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    convert(tmp_path / "a.gguf", tmp_path / "b.gguf", type="q8_0", metadata={"x.new": "1"})
    before, after = (gguf.GGUFReader(tmp_path / name).fields for name in ("a.gguf", "b.gguf"))
    for key in ("general.architecture", "x.strings", "x.numbers", "x.f", "x.b"):
        assert after[key].contents() == before[key].contents()
        assert after[key].types == before[key].types
    assert after["x.new"].contents() == "1"


@pytest.mark.parametrize("model", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_a_folder_becomes_a_file_of_original_names(model: tiny.TinySD1, tiny_folder: Any, tmp_path: Path) -> None:
    """Against a table of names of its own, with fused, turned and unused weights."""
    convert(tiny_folder(model), tmp_path / "a.safetensors")
    got, want = load_file(tmp_path / "a.safetensors"), tiny_sdxl.single_tensors(model)
    assert {name for name in want if name not in got} <= {name for name in want if name.endswith("logit_scale")}
    assert all(np.array_equal(got[name], want[name]) and got[name].shape == want[name].shape for name in got)
    np.testing.assert_array_equal(paint(tmp_path / "a.safetensors"), paint(tiny_folder(model)))


def test_what_configs_say_stays_with_the_weights(tiny_folder: Any, tmp_path: Path) -> None:
    v = tiny.TinySD1(prediction="v_prediction")
    convert(tiny_folder(v), tmp_path / "v.gguf")
    with SDContext(tmp_path / "v.gguf", threads=1) as sd_ctx:
        assert sd_ctx.info.prediction == "v"
    np.testing.assert_array_equal(paint(tmp_path / "v.gguf"), paint(tiny_folder(v)))


def test_a_checkpoint_of_torch(half: Path, tmp_path: Path) -> None:
    torch_files.save(tmp_path / "a.ckpt", load_file(half))
    with pytest.raises(Unsupported, match="convert it with sdcpp convert, which runs nothing"):
        SDContext(tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "a.gguf", type="f16")
    assert fingerprint(tmp_path / "a.gguf") == fingerprint(half)


@pytest.mark.parametrize("ending", ["gguf", "safetensors"])
def test_split_and_merged(ending: str, half: Path, tmp_path: Path) -> None:
    made = convert(half, tmp_path / f"a.{ending}", split=1_000_000)
    n = len(made.paths)
    assert n > 2
    assert [path.name for path in made.paths] == [f"a-{k + 1:05}-of-{n:05}.{ending}" for k in range(n)]
    assert all(
        path.stat().st_size < 1_100_000 or len(file) == 1 for path, file in zip(made.paths, made.files, strict=True)
    )
    np.testing.assert_array_equal(paint(made.paths[0]), paint(half))
    if ending == "gguf":
        fields = gguf.GGUFReader(made.paths[1]).fields
        values = [fields[f"split.{key}"].contents() for key in ("no", "count", "tensors.count")]
        assert values == [1, n, len(made.tensors)]
    else:
        index = json.loads((tmp_path / "a.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == load_file(half).keys()
        assert index["metadata"]["total_size"] == made.bytes
    convert(made.paths[1], tmp_path / "b.safetensors", type="f16")
    back, want = load_file(tmp_path / "b.safetensors"), load_file(half)
    assert all(np.array_equal(back[name], want[name]) for name in want)
    made.paths[-1].unlink()
    with pytest.raises(BadFile, match=rf"is one of {n} files, but {made.paths[-1].name} is missing"):
        SDContext(made.paths[0])


def test_parts_alone_and_put_together(half: Path, tmp_path: Path) -> None:
    for part in ("denoiser", "vae", "clip_l"):
        convert(half, tmp_path / f"{part}.safetensors", only=part)
    assert "input_blocks.0.0.weight" in load_file(tmp_path / "denoiser.safetensors")
    parts = {"vae": tmp_path / "vae.safetensors", "clip_l": tmp_path / "clip_l.safetensors"}
    with SDContext(half, threads=1, **parts) as sd_ctx:
        assert sd_ctx.fingerprint() == fingerprint(half)
    convert(half, tmp_path / "whole.gguf", components=parts)
    assert fingerprint(tmp_path / "whole.gguf") == fingerprint(half)


# ---- which type ----------------------------------------------------------------------------------------


def test_what_stays_in_16_and_32_bits(tiny_sd1: Path, tmp_path: Path) -> None:
    made = {
        one.tensor.name: one.type.name
        for one in convert(tiny_sd1, tmp_path / "a.gguf", type="q8_0", dry_run=True).tensors
    }
    unet = "model.diffusion_model."
    assert made[unet + "middle_block.1.transformer_blocks.0.attn2.to_k.weight"] == "q8_0"
    assert made[unet + "middle_block.1.norm.weight"] == "f32"
    assert made[unet + "middle_block.1.proj_in.weight"] == "f16"
    assert made[unet + "time_embed.0.weight"] == "f16"
    assert made["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] == "f16"
    assert {type for name, type in made.items() if name.startswith("first_stage_model")} == {"f16", "f32"}
    assert not (tmp_path / "a.gguf").exists()


def test_rules_come_first_and_the_first_counts(tiny_sd1: Path, tmp_path: Path) -> None:
    rules = [(r"attn1\.to_q", "q5_1"), (r"attn1\.", "f32"), ("token_embedding", "q4_0")]
    made = convert(tiny_sd1, tmp_path / "a.gguf", type="q8_0", tensor_types=rules, dry_run=True)
    types = {one.tensor.name: one.type.name for one in made.tensors}
    block = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1."
    assert (types[block + "to_q.weight"], types[block + "to_k.weight"]) == ("q5_1", "f32")
    assert types[block + "to_out.0.bias"] == "f32"
    assert made.by_type()["q4_0"][0] == 1


def test_rows_that_are_no_blocks_get_a_type_of_smaller_ones(tiny_sd1: Path, tmp_path: Path) -> None:
    made = convert(tiny_sd1, tmp_path / "a.gguf", type="q4_K", dry_run=True)
    for one in made.tensors:
        if one.type.name in ("q4_K", "q5_0"):
            assert (one.type.name == "q4_K") == (one.tensor.row_length % 256 == 0)
    assert any("no blocks of q4_K; they become q5_0" in note for note in made.notes)


def test_types_without_importance_are_told(tiny_sd1: Path, tmp_path: Path) -> None:
    made = convert(tiny_sd1, tmp_path / "a.gguf", type="iq2_xs", dry_run=True)
    assert any("iq2_xs without an importance matrix" in note for note in made.notes)


def test_an_importance_matrix_is_read(tiny_sd1: Path, tmp_path: Path) -> None:
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"
    columns = np.random.default_rng(0).random(256, dtype=np.float32) * 10
    save = plan(
        [from_array(f"{name}.in_sum2", columns[None] * 7), from_array(f"{name}.counts", np.full((1, 1), 7.0))],
        tmp_path / "i.gguf",
    )
    write(save)
    convert(tiny_sd1, tmp_path / "a.gguf", type="q4_K", imatrix=tmp_path / "i.gguf")
    values = load_file(tiny_sd1)[name]
    (tensor,) = [tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors if tensor.name == name]
    np.testing.assert_array_equal(tensor.data.reshape(-1), as_type(values, "q4_K", importance=columns))


def test_an_importance_matrix_of_another_model(tiny_sd1: Path, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "i.gguf", {"blk.0.attn_q.weight": (np.ones(32), 3)}, 1)
    with pytest.raises(BadArgument, match=r"importance matrix: the model has no blk\.0\.attn_q\.weight"):
        convert(tiny_sd1, tmp_path / "a.gguf", type="q4_0", imatrix=tmp_path / "i.gguf")


def test_whole_numbers_stay_whatever_the_rules_say(tmp_path: Path) -> None:
    save_file({"w": normal(2, 64), "position_ids": np.arange(77)[None]}, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", type="f16", tensor_types=[(".", "bf16")])
    with safe_open(tmp_path / "b.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("position_ids"), np.arange(77)[None])
        assert file.get_slice("w").get_dtype() == "BF16"


def test_8_bit_floats_with_a_scale_of_their_own(tmp_path: Path) -> None:
    """As ComfyUI writes them: the numbers are multiplied, and the scale is no tensor of its own any more."""
    values = normal(4, 64) * np.float32(100)
    raw = as_type(values, "f8_e4m3").reshape(values.shape)
    header = {
        "w.weight": {"dtype": "F8_E4M3", "shape": [4, 64], "data_offsets": [0, 256]},
        "w.scale_weight": {"dtype": "F32", "shape": [], "data_offsets": [256, 260]},
    }
    text = json.dumps(header).encode()
    scale = np.float32(0.003)
    whole = len(text).to_bytes(8, "little") + text + raw.tobytes() + scale.tobytes()
    (tmp_path / "a.safetensors").write_bytes(whole)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", type="f32")
    want = floats(raw.reshape(-1), "f8_e4m3", values.shape) * scale
    np.testing.assert_array_equal(load_file(tmp_path / "b.safetensors")["w.weight"], want)


# ---- names ---------------------------------------------------------------------------------------------


@settings(deadline=None)  # of time, where other work holds the cores
@given(st.data())
def test_rows_of_a_fused_weight_come_from_their_parts(data: st.DataObject) -> None:
    """Any piece of it, of parts of which some have their halves the other way round."""
    sizes = data.draw(
        st.lists(st.tuples(st.integers(1, 4).map(lambda n: 2 * n), st.booleans()), min_size=1, max_size=4)
    )
    total = sum(rows for rows, _ in sizes)
    parts, want, first = [], [], 0
    for rows, swap in sizes:
        values = np.arange(first, first + rows, dtype=np.float32)[:, None] * np.ones(3, np.float32)
        parts.append(Part(from_array(str(first), values), first, rows, swap))
        want.append(np.roll(values, rows // 2, axis=0) if swap else values)
        first += rows
    joined = names._joined("w", (total, 3), data.draw(st.permutations(parts)))
    begin = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(begin + 1, total))
    np.testing.assert_array_equal(joined.floats(begin, end), np.concatenate(want)[begin:end])
    vector = [replace(part, tensor=from_array("b", part.tensor.array()[:, 0])) for part in parts]
    np.testing.assert_array_equal(names._joined("b", (total,), vector).array(), np.concatenate(want)[:, 0])


# ---- the core ------------------------------------------------------------------------------------------


def test_values_can_change_on_the_way(half: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def twice(first: int, rows: np.ndarray) -> np.ndarray:
        seen.append(first)
        rows *= 2
        return rows

    with open_source(half) as source:
        write(plan([tensor.changed(twice) for tensor in source.tensors], tmp_path / "a.safetensors"))
    want = load_file(half)
    got = load_file(tmp_path / "a.safetensors")
    assert all(np.array_equal(got[name], 2 * want[name]) and got[name].dtype == np.float16 for name in want)


def test_threads_and_pieces_do_not_matter(tiny_sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert(tiny_sd1, tmp_path / "a.gguf", type="q4_K", threads=1)
    monkeypatch.setattr("sdcpp_py.weights.writing.PIECE", 5000)
    convert(tiny_sd1, tmp_path / "b.gguf", type="q4_K", threads=5)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_progress_counts_up_to_the_whole(half: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    convert(half, tmp_path / "a.gguf", type="q8_0", on_progress=lambda *call: calls.append(call))
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == calls[-1][1] == sum(values.size for values in load_file(half).values())


# ---- what goes wrong -----------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("split", [None, 1_000_000])
def test_cancelling_leaves_nothing(split: int | None, half: Path, tmp_path: Path) -> None:
    with pytest.raises(Cancelled, match="stopped; nothing was written"):
        convert(
            half, tmp_path / "a.gguf", type="q8_0", split=split, on_progress=lambda done, total, _: done < total / 2
        )
    assert left(tmp_path) == []


def test_an_interrupt_leaves_nothing(half: Path, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(half, tmp_path / "a.gguf", on_progress=interrupt)
    assert left(tmp_path) == []


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(half: Path, tmp_path: Path) -> None:
    import resource
    import signal

    (tmp_path / "a.gguf").write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
        with pytest.raises(Io, match=r"a\.gguf: File too large"):
            convert(half, tmp_path / "a.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path) == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


def test_too_little_space_is_told_beforehand(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 2_000_000))
    with pytest.raises(Io, match=r"a\.gguf: needs \d+ MB, but .* has 2 MB left"):
        convert(half, tmp_path / "a.gguf")


def test_the_source_is_never_overwritten(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shutil.copy(half, path)
    os.symlink(path, tmp_path / "b.safetensors")
    for target in (path, tmp_path / "b.safetensors", tmp_path / ".." / tmp_path.name / "a.safetensors"):
        with pytest.raises(BadArgument, match="is a file of the source, which is never overwritten"):
            convert(path, target)
    assert path.read_bytes() == half.read_bytes()


def test_numbers_without_a_place_are_named(tmp_path: Path) -> None:
    values = normal(4, 64)
    values[2, 5] = 1e5
    save_file({"w": values}, tmp_path / "a.safetensors")
    with pytest.raises(
        BadArgument, match=r"w: row 2, column 5 holds 100000, but f16 ends at 65504 here; keep this tensor"
    ):
        convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", type="f16")
    convert(tmp_path / "a.safetensors", tmp_path / "b.gguf", type="f16", tensor_types=[("w", "bf16")])


def test_a_source_that_shrinks_is_told(half: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    shutil.copy(half, path)

    def cut(*_: object) -> None:
        os.truncate(path, 300_000)

    with pytest.raises(BadFile, match=r"has 300,000 bytes, not the [0-9,]+ that it had"):
        convert(path, tmp_path / "b.gguf", on_progress=cut, threads=1)
    assert left(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"type": "q9"}, "type 'q9': weights cannot be written so; there are: f32, f16"),
        ({"type": "q8_K"}, "weights cannot be written so"),
        ({"type": "i8"}, "weights cannot be written so"),
        ({"type": "f8_e4m3"}, "gguf files have no such elements; write .safetensors"),
        ({"tensor_types": [("(", "f16")]}, "is no regular expression"),
        ({"tensor_types": [("xyz", "f16")]}, "no tensor has a name that matches 'xyz'"),
        ({"tensor_types": [("norm", "q8_0")]}, "no matrix has a name that matches 'norm'"),
        ({"tensor_types": [("to_q", "q4_K")]}, "has rows of 32, no whole blocks of q4_K"),
        ({"drop": ["("]}, "is no regular expression"),
        ({"drop": ["xyz"]}, "no tensor has a name that matches 'xyz'"),
        ({"only": "lora"}, "only 'lora' is not known; there are: denoiser"),
        ({"only": "t5xxl"}, "has no t5xxl; it has: clip_l, denoiser, vae"),
        ({"split": 0}, "split 0: must be between 1"),
        ({"threads": 0}, "threads 0: must be between 1"),
        ({"components": {"lora": "x"}}, "component 'lora' is not known"),
    ],
)
def test_bad_arguments(options: dict[str, Any], sentence: str, half: Path, tmp_path: Path) -> None:
    with pytest.raises(BadArgument) as caught:
        convert(half, tmp_path / "a.gguf", **options)
    assert sentence in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        ("a.bin", "models are written as .gguf or .safetensors"),
        ("no/a.gguf", "there is no folder"),
        ("d.gguf", "is a folder"),
    ],
)
def test_targets_that_cannot_be(target: str, sentence: str, half: Path, tmp_path: Path) -> None:
    (tmp_path / "d.gguf").mkdir()
    with pytest.raises(SdcppError, match=sentence):
        convert(half, tmp_path / target)


def test_no_two_tensors_of_one_name(tmp_path: Path) -> None:
    twice: list[Tensor] = [from_array("w", normal()), from_array("w", normal())]
    with pytest.raises(BadArgument, match="two tensors are called 'w'"):
        plan(twice, tmp_path / "a.gguf")
