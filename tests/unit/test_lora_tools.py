"""The LoRA workbench against sums in float64: what is written, read back by the engine and by plain formulas."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import flux_files
import lora_files
import numpy as np
import pytest
import reference_lora
import tiny
import tiny_sdxl
from cases import SD1
from closeness import assert_close, relative_rmse

from sdcpp_py import SDContext, errors
from sdcpp_py.lora import algebra, bake, convert, diff, extract, merge, prune, resize, scale
from sdcpp_py.lora.outline import FAMILIES, outline_of
from sdcpp_py.lora.source import LoraSource
from sdcpp_py.lora.spelling import FORMATS

# Factors are float32; a sum over a rank of some tens rounds to a few 1e-7 of its size.
SUM = 1e-6
PARTS = "unet text_encoder text_encoder_2"


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(path)


def flux_changes(path: Path) -> flux_files.Changes:
    """What a file with diffusers' names adds to each module, by the plain formula."""
    tensors = tensors_of(path)
    return {
        name.removeprefix("transformer.").removesuffix(".lora_A.weight"): tensors[
            name.replace("lora_A", "lora_B")
        ].astype(np.float64)
        @ values
        for name, values in tensors.items()
        if name.endswith(".lora_A.weight")
    }


def assert_changes(got: flux_files.Changes, want: flux_files.Changes, tolerance: float = SUM) -> None:
    assert got.keys() == want.keys()
    for name, change in want.items():
        assert_close(got[name], change, tolerance)


@pytest.fixture
def flux(tmp_path: Path) -> dict[str, tuple[Path, flux_files.Changes]]:
    """FLUX LoRAs of three trainers, with what they change."""
    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "kohya", "lycoris")}
    return {
        "a": (files["a"], flux_files.ai_toolkit(files["a"], 1)),
        "b": (files["b"], flux_files.ai_toolkit(files["b"], 2, rank=8)),
        "kohya": (files["kohya"], flux_files.kohya(files["kohya"], 3)),
        "lycoris": (files["lycoris"], flux_files.lycoris(files["lycoris"], 4)),
    }


# ---- merging ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", [*FORMATS, None])
def test_a_merge_of_every_trainers_file_is_the_sum(flux: dict, tmp_path: Path, through: str | None) -> None:
    """Cases 50 and 51: split and fused, several kinds, a negative ratio, by way of every format."""
    ratios = {"a": 0.7, "b": -0.3, "kohya": 1.1, "lycoris": 0.5}
    merged = tmp_path / "merged.safetensors"
    merge([(flux[name][0], ratio) for name, ratio in ratios.items()], merged, to=through)
    convert(merged, tmp_path / "read.safetensors", to="diffusers")
    want = flux_files.weighted(*((flux[name][1], ratio) for name, ratio in ratios.items()))
    assert_changes(flux_changes(tmp_path / "read.safetensors"), want)


def test_kohya_fused_projections_come_back_bit_for_bit(flux: dict, tmp_path: Path) -> None:
    """Split for diffusers and fused again, the parts share their down again; the scale here is no power of two."""
    path = flux["kohya"][0]
    convert(path, tmp_path / "split.safetensors", to="diffusers")
    convert(tmp_path / "split.safetensors", tmp_path / "fused.safetensors", to="kohya")
    before, after = tensors_of(path), tensors_of(tmp_path / "fused.safetensors")
    assert before.keys() == after.keys()
    for name, values in before.items():
        if name.endswith("lora_down.weight"):
            np.testing.assert_array_equal(after[name], values)
    assert_changes(flux_changes(tmp_path / "split.safetensors"), flux["kohya"][1])


@pytest.mark.parametrize("to", FORMATS)
def test_converting_there_and_back_keeps_every_bit(tmp_path: Path, to: str) -> None:
    """alpha / rank is a power of two here, which no factor rounds by."""
    update = lora_files.random_update(lora_files.attention("unet" if to == "peft" else "unet text_encoder"))
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    convert(source, there, to=to)
    convert(there, back, to="diffusers")
    tensors = tensors_of(back)
    for path, factors in update.items():
        np.testing.assert_array_equal(tensors[f"{path}.lora_A.weight"], factors["lora_down.weight"])
        np.testing.assert_array_equal(tensors[f"{path}.lora_B.weight"], factors["lora_up.weight"] * np.float32(0.5))


ORIGINAL_PATHS = ("kohya-original", "comfy", "comfy-peft", "single-file", "single-file-peft", "gguf-llama.cpp")


@pytest.mark.parametrize("spelling", sorted({*lora_files.SPELLINGS} - {*ORIGINAL_PATHS}))
def test_every_spelling_merges(tmp_path: Path, spelling: str) -> None:
    how = lora_files.SPELLINGS[spelling]
    update = lora_files.random_update([path for path in lora_files.modules("linear conv") if how.covers(path)])
    merge([(how.write(update, tmp_path / "x.safetensors"), -0.4)], tmp_path / "y.safetensors", to="diffusers")
    tensors = tensors_of(tmp_path / "y.safetensors")
    for path, factors in update.items():
        weight = lora_files.base()[f"{path}.weight"]
        a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
        assert a.ndim == b.ndim == weight.ndim, "convolutions have four dimensions, as peft wants them"
        got = (b.reshape(b.shape[0], -1).astype(np.float64) @ a.reshape(a.shape[0], -1)).reshape(weight.shape)
        assert_close(got, -0.4 * (reference_lora.changed(weight, factors) - weight), SUM)


@pytest.mark.parametrize("spelling", ORIGINAL_PATHS)
def test_original_paths_of_a_models_own_structure(tmp_path: Path, tiny_sd1: Path, spelling: str) -> None:
    """The tiny model has fewer blocks than the numbers of SD 1.x count."""
    how = lora_files.SPELLINGS[spelling]
    update = lora_files.random_update([path for path in lora_files.modules("linear conv") if how.covers(path)])
    source = how.write(update, tmp_path / "x.safetensors")
    convert(source, tmp_path / "y.safetensors", to="diffusers", model=tiny_sd1)
    assert {name.rsplit(".lora_", 1)[0] for name in tensors_of(tmp_path / "y.safetensors")} == set(update)


KINDS: dict[str, reference_lora.Makes] = {
    "tucker": reference_lora.locon_tucker,
    "loha": reference_lora.loha,
    "loha-tucker": reference_lora.loha_tucker,
    "lokr": reference_lora.lokr("full"),
    "lokr-w1": reference_lora.lokr("w1"),
    "lokr-w2": reference_lora.lokr("w2"),
    "lokr-both": reference_lora.lokr("both"),
    "lokr-tucker": reference_lora.lokr("tucker"),
    "full": reference_lora.full_with_bias,
    "ia3-input": reference_lora.ia3_of(True),
    "ia3-output": reference_lora.ia3_of(False),
}
NEED_BASE = ("ia3-input", "ia3-output")


def own_modules(kind: str) -> list[str]:
    conv = [path for path in lora_files.modules("conv") if path.endswith((".conv1", ".conv2"))][:4]
    linear = [path for path in lora_files.modules("linear", "unet") if ".attn" in path][:4]
    return conv if "tucker" in kind else conv + linear


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_to_what_it_adds(
    kind: str, tmp_path: Path, tiny_sd1: Path, native: Callable, tiny_folder: Callable
) -> None:
    """Merged with a LoRA on the same modules, baked into the model, and compared with W + the sum of the changes."""
    update = lora_files.random_update(own_modules(kind), KINDS[kind])
    plain = lora_files.random_update(own_modules(kind), seed=3)
    x = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    y = lora_files.save(tmp_path / "y.safetensors", lora_files.tensors_of(plain))
    want = lora_files.merged((update, 0.7), (plain, -0.3))
    if kind in NEED_BASE:
        with pytest.raises(errors.BadArgument, match=r"name (its|the) model"):
            merge([(x, 0.7), (y, -0.3)], tmp_path / "z.safetensors")
    merge([(x, 0.7), (y, -0.3)], tmp_path / "z.safetensors", model=tiny_sd1 if kind in NEED_BASE else None)
    baked = bake(tiny_folder(SD1), [f"{tmp_path / 'z.safetensors'}:1"], tmp_path / "baked.safetensors")
    assert not [note for note in baked.notes if "does not have" in note]
    assert_weights(tmp_path / "baked.safetensors", want, native)


def assert_weights(path: Path, want: dict[str, np.ndarray], native: Callable, tolerance: float = 3e-7) -> None:
    from sdcpp_py import _native

    names = {w["diffusers_name"]: w["name"] for w in _native.probe_weights(native(SD1))}
    tensors = tensors_of(path)
    for name, values in want.items():
        assert_close(tensors[names[name]], values, tolerance)
    rest = {names[name]: values for name, values in lora_files.base().items() if name not in want}
    for name, values in rest.items():
        np.testing.assert_array_equal(tensors[name], values)


def test_a_kind_that_a_format_has_stays_as_it_is(tmp_path: Path) -> None:
    update = lora_files.random_update(own_modules("loha"), reference_lora.loha)
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    told = convert(source, tmp_path / "y.safetensors", to="comfy")
    assert told.kinds == {"loha": len(update)}
    after = tensors_of(tmp_path / "y.safetensors")
    assert {name.rpartition(".")[2] for name in after} == {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"}
    assert not diff(source, tmp_path / "y.safetensors").difference


@pytest.mark.parametrize("kind", ["dora-inputs", "dora-rows"])
def test_dora_keeps_its_norms_or_asks_for_the_model(
    kind: str, tmp_path: Path, tiny_folder: Callable, native: Callable
) -> None:
    rows = kind == "dora-rows"
    update = lora_files.random_update(own_modules("loha"), reference_lora.dora(reference_lora.lora, of_inputs=not rows))
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    convert(source, tmp_path / "kept.safetensors", to="kohya")
    bake(tiny_folder(SD1), [(tmp_path / "kept.safetensors", 1.0)], tmp_path / "baked.safetensors")
    assert_weights(tmp_path / "baked.safetensors", lora_files.merged((update, 1.0)), native)
    with pytest.raises(errors.SdcppError, match="DoRA"):
        merge([(source, 0.5)], tmp_path / "half.safetensors", to="kohya")
    assert not (tmp_path / "half.safetensors").exists()


KEPT: dict[str, reference_lora.Makes] = {
    **KINDS,
    "glora": reference_lora.glora_of(),
    "oft": reference_lora.oft(),
    "oft-rescale": reference_lora.oft(alpha=0.01, rescale=True),
    "boft": reference_lora.boft(),
    "norms": reference_lora.norms,
}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_kinds_that_are_kept_mean_the_same(
    kind: str, to: str, tmp_path: Path, tiny_sd1: Path, tiny_folder: Callable, native: Callable
) -> None:
    """Converted as they are, without a number changed, and then baked by the engine's own reading of them."""
    paths = lora_files.modules("norm", "unet")[:4] if kind == "norms" else own_modules(kind)
    update = lora_files.random_update(paths, KEPT[kind])
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    told = convert(source, tmp_path / "y.safetensors", to=to, model=tiny_sd1)
    assert "lora" not in told.kinds or kind == "tucker"
    bake(tiny_folder(SD1), [(tmp_path / "y.safetensors", 1.0)], tmp_path / "baked.safetensors")
    # rotations are products of inverses in float32
    tolerance = 2e-6 if "oft" in kind else 3e-7
    assert_weights(tmp_path / "baked.safetensors", lora_files.merged((update, 1.0)), native, tolerance)


def test_the_engine_paints_the_same_with_the_merged_file_as_with_both(tmp_path: Path, tiny_sd1: Path) -> None:
    first = lora_files.random_update(lora_files.modules("linear conv"), seed=1)
    second = lora_files.random_update(lora_files.attention(), seed=2)
    x = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(first))
    y = lora_files.save(tmp_path / "y.safetensors", lora_files.peft(second))
    merge([f"{x}:te=0.2:unet=0.7", f"{y}:-0.3"], tmp_path / "z.safetensors")

    def latent(sd_ctx: SDContext, loras: list) -> np.ndarray:
        from sdcpp_py import _native

        sd_ctx.generate("a cat", loras=loras, steps=2, width=64, height=64, seed=1)
        return _native.probe_latent(sd_ctx._native)

    with SDContext(tiny_sd1, threads=1, lora_mode="restore") as sd_ctx:
        both = latent(sd_ctx, [(x, {"te": 0.2, "unet": 0.7}), (y, -0.3)])
        one = latent(sd_ctx, [(tmp_path / "z.safetensors", 1.0)])
        none = latent(sd_ctx, [])
    assert relative_rmse(none, both) > 0.01
    assert_close(one, both, 1e-4)  # weights differ by roundings of float32, which two steps amplify


def test_block_weights_and_ratios_of_both_parts(tmp_path: Path) -> None:
    update = lora_files.random_update(
        [
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
            "text_encoder.text_model.encoder.layers.0.mlp.fc1",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        ]
    )
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    out = tmp_path / "y.safetensors"
    merge([f"{source}:te=0.5:unet=0.8:lbw=INALL"], out, to="diffusers")
    names = {name.rsplit(".lora_", 1)[0] for name in tensors_of(out)}
    assert names == {path for path in update if "mid_block" not in path}
    for path, ratio in zip(list(update)[:2], (0.8, 0.5), strict=True):
        up = tensors_of(out)[f"{path}.lora_B.weight"]
        np.testing.assert_allclose(up, update[path]["lora_up.weight"] * 0.5 * ratio, rtol=1e-6)


# ---- spellings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "stem"),
    [
        ("kohya", "lora_unet_single_blocks_0_linear1"),
        ("comfy", "diffusion_model.single_blocks.0.linear1"),
        ("onetrainer", "lora_transformer_single_transformer_blocks_0_attn_to_q"),
        ("diffusers", "transformer.single_transformer_blocks.0.attn.to_q"),
        ("ai-toolkit", "transformer.single_transformer_blocks.0.attn.to_q"),
    ],
)
def test_each_format_has_its_own_names_of_flux(flux: dict, tmp_path: Path, to: str, stem: str) -> None:
    convert(flux["a"][0], tmp_path / "x.safetensors", to=to)
    assert any(name.startswith(f"{stem}.lora_") for name in tensors_of(tmp_path / "x.safetensors"))


TEXT = {"clip": "text_model.encoder.layers.0.mlp.fc1", "t5": "encoder.block.0.layer.0.SelfAttention.q"}


@pytest.mark.parametrize(
    ("family", "to", "stems"),
    [
        ("flux", "kohya", {"lora_te1_": "clip", "lora_te3_": "t5"}),
        ("flux", "onetrainer", {"lora_te1_": "clip", "lora_te2_": "t5"}),
        ("flux", "diffusers", {"text_encoder.": "clip", "text_encoder_2.": "t5"}),
        ("sd3", "kohya", {"lora_te1_": "clip", "lora_te2_": "clip", "lora_te3_": "t5"}),
        ("sdxl", "comfy", {"text_encoders.clip_l.transformer.": "clip", "text_encoders.clip_g.transformer.": "clip"}),
    ],
)
def test_text_encoders_keep_their_place(family: str, to: str, stems: dict, tmp_path: Path) -> None:
    """The same number means another encoder from family to family and from tool to tool."""
    tensors = {}
    for prefix, kind in stems.items():
        path = TEXT[kind] if prefix.endswith(".") else TEXT[kind].replace(".", "_")
        ends = ("lora_A.weight", "lora_B.weight") if to == "diffusers" else ("lora_down.weight", "lora_up.weight")
        tensors |= {f"{prefix}{path}.{end}": np.ones((8, 8), np.float32) for end in ends}
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    source = lora_files.save(tmp_path / "x.safetensors", tensors)
    convert(source, there, to="kohya" if to != "kohya" else "comfy", family=family)
    convert(there, back, to=to, family=family)
    names = {name for name in tensors_of(back) if not name.endswith(".alpha")}
    assert names == set(tensors)


def test_only_the_last_block_of_sd3_swaps_its_halves(tmp_path: Path) -> None:
    """Case 30: shift and scale lie the other way round where a block has these two alone, and nowhere else."""
    width, rng = 16, np.random.default_rng(0)
    tensors = {}
    for block, rows in ((22, 6 * width), (23, 2 * width)):
        stem = f"transformer.transformer_blocks.{block}.norm1_context.linear"
        tensors[f"{stem}.lora_A.weight"] = rng.standard_normal((2, width)).astype(np.float32)
        tensors[f"{stem}.lora_B.weight"] = rng.standard_normal((rows, 2)).astype(np.float32)
    source = lora_files.save(tmp_path / "x.safetensors", tensors)
    convert(source, tmp_path / "y.safetensors", to="kohya", family="sd3")
    after = tensors_of(tmp_path / "y.safetensors")
    for block in (22, 23):
        up = after[f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1.lora_up.weight"]
        before = tensors[f"transformer.transformer_blocks.{block}.norm1_context.linear.lora_B.weight"]
        np.testing.assert_array_equal(up, np.roll(before, width, axis=0) if block == 23 else before)
    convert(tmp_path / "y.safetensors", tmp_path / "z.safetensors", to="diffusers", family="sd3")
    for name, values in tensors_of(tmp_path / "z.safetensors").items():
        np.testing.assert_array_equal(values, tensors[name])


# ---- lower ranks -----------------------------------------------------------------------------------------


def test_rank_16_of_8_and_32_is_the_best_there_is(flux: dict, tmp_path: Path) -> None:
    """Case 52: the error is the tail of the singular values, and is what the result tells."""
    names = ["single_transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.2"]
    a, b, out = (tmp_path / f"{name}.safetensors" for name in ("r8", "r32", "r16"))
    one, other = flux_files.ai_toolkit(a, 5, 8, names), flux_files.ai_toolkit(b, 6, 32, names)
    told = merge([(a, 0.7), (b, -0.3)], out, rank=16)
    got = flux_changes(out)
    for name, change in flux_files.weighted((one, 0.7), (other, -0.3)).items():
        values = np.linalg.svd(change, compute_uv=False)
        tail = np.sqrt(np.sum(values[16:] ** 2) / np.sum(values**2))
        assert relative_rmse(got[name], change) == pytest.approx(tail, rel=1e-4)
        assert told.residuals[f"transformer.{name}"] == pytest.approx(tail, rel=1e-4)
    assert told.ranks == {16: 2}


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_resize_by_energy_keeps_the_strength(flux: dict, tmp_path: Path, to: str) -> None:
    path, changes = flux["b"]
    told = resize(path, tmp_path / "small.safetensors", energy=0.9, to=to)
    assert 0 < told.residual <= np.sqrt(0.1)
    convert(tmp_path / "small.safetensors", tmp_path / "read.safetensors", to="diffusers")
    for name, change in flux_changes(tmp_path / "read.safetensors").items():
        assert relative_rmse(change, changes[name]) <= np.sqrt(0.1) * (1 + 1e-4) or to == "kohya"


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_other_methods_at_full_density(flux: dict, tmp_path: Path, method: str) -> None:
    """With nothing dropped dare is the sum, and ties of one file is the file."""
    out = tmp_path / "out.safetensors"
    if method == "dare":
        merge([(flux["a"][0], 0.5), (flux["b"][0], 0.25)], out, method=method, density=1.0)
        want = flux_files.weighted((flux["a"][1], 0.5), (flux["b"][1], 0.25))
    else:
        merge([(flux["a"][0], 0.5)], out, method=method, density=1.0)
        want = flux_files.weighted((flux["a"][1], 0.5))
    assert_changes(flux_changes(out), want)


@pytest.mark.parametrize("piece", [7, 1 << 20])
@pytest.mark.parametrize("keep", [1, 2, 500, 1151, 1152])
def test_the_smallest_of_the_largest_elements(keep: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a sort; numbers of every size, zeros and equal ones among them."""
    monkeypatch.setattr(algebra, "_PIECE", piece)
    rng = np.random.default_rng(0)
    delta = (rng.standard_normal((24, 48)) * 10.0 ** rng.integers(-40, 30, (24, 48))).astype(np.float32)
    delta[3], delta[5] = 0, 2.5
    want = np.sort(np.abs(delta).reshape(-1))[-keep]
    assert algebra._least(algebra.of_dense(delta), keep) == want
    assert algebra._least(algebra.of_dense(delta), 0) == np.inf


SHAPES = [(96, 160), (160, 96)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("rank", "energy"), [(8, None), (40, None), (None, None), (None, 0.5), (None, 0.9), (30, 0.99), (8, 0.99)]
)
def test_large_matrices_are_reduced_as_by_lapack(
    rank: int | None, energy: float | None, shape: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subspace iteration, and eigenvectors of the product with itself, against numpy's SVD in float64."""
    monkeypatch.setattr(algebra, "_EXACT_SIDE", 16)
    monkeypatch.setattr(algebra, "_TRIES", (6, 20))
    monkeypatch.setattr(algebra, "_PIECE", 1000)
    rng = np.random.default_rng(1)
    u, v = (np.linalg.qr(rng.standard_normal((side, min(shape))))[0] for side in shape)
    values = 0.9 ** np.arange(min(shape))
    delta = (u * values) @ v.T
    got = algebra.reduce_dense(delta.astype(np.float32), rank, energy)
    keep = rank or min(shape)
    if energy is not None:
        keep = min(keep, int(np.searchsorted(np.cumsum(values**2), energy * np.sum(values**2))) + 1)
    assert got.pair.rank == keep
    assert_close(got.pair.dense(), (u[:, :keep] * values[:keep]) @ v[:, :keep].T, 1e-4)  # vectors of near values mix
    want = np.sqrt(np.sum(values[keep:] ** 2) / np.sum(values**2))
    assert got.residual == pytest.approx(want, rel=1e-3, abs=1e-4)
    assert got.norm == pytest.approx(np.linalg.norm(values), rel=1e-6)


def test_dare_drops_the_same_with_the_same_seed(flux: dict, tmp_path: Path) -> None:
    outs = [tmp_path / f"{n}.safetensors" for n in range(3)]
    for out, seed in zip(outs, (1, 1, 2), strict=True):
        merge([(flux["a"][0], 1.0)], out, method="dare", density=0.5, seed=seed)
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    got, want = flux_changes(outs[0])["proj_out"], flux["a"][1]["proj_out"]
    kept = np.abs(got) > 1e-6
    assert 0.3 < kept.mean() < 0.7
    assert_close(got[kept], 2 * want[kept], SUM)


# ---- the other tools -------------------------------------------------------------------------------------


def test_scale_counts_once(flux: dict, tmp_path: Path) -> None:
    scale(flux["a"][0], tmp_path / "half.safetensors", -0.5)
    assert_changes(flux_changes(tmp_path / "half.safetensors"), flux_files.weighted((flux["a"][1], -0.5)))


def test_prune_by_patterns(flux: dict, tmp_path: Path) -> None:
    out = tmp_path / "pruned.safetensors"
    prune(flux["a"][0], out, keep=["denoiser.single_blocks.*"], drop=["*.linear2"])
    names = set(flux_changes(out))
    assert names == {n for n in flux["a"][1] if n.startswith("single_transformer_blocks") and "proj_out" not in n}
    with pytest.raises(errors.BadArgument, match="no module fits"):
        prune(flux["a"][0], out, drop=["clip.*"])


def test_diff_tells_what_a_conversion_does_not_change(flux: dict, tmp_path: Path) -> None:
    path = flux["kohya"][0]
    convert(path, tmp_path / "x.safetensors", to="diffusers")
    same = diff(path, tmp_path / "x.safetensors")
    assert same.difference < SUM
    assert same.cosine == pytest.approx(1)
    scale(path, tmp_path / "y.safetensors", 0.5)
    assert diff(path, tmp_path / "y.safetensors").difference == pytest.approx(0.5, abs=1e-5)
    other = diff(path, flux["a"][0])
    assert other.only_b
    assert abs(other.cosine) < 0.2
    assert json.loads(other.to_json())["family"] == "flux"


@pytest.fixture(scope="module")
def tuned(tiny_folder: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A model with a LoRA of rank 4 in its weights."""
    update = lora_files.random_update(lora_files.modules("linear conv"))
    changed = lora_files.merged((update, 1.0))
    return lora_files.write_model(tmp_path_factory.mktemp("tuned") / "m", tiny_folder(SD1), changed), update


@pytest.mark.parametrize("layout", ["folder", "single"])
def test_extract_finds_the_lora_that_went_in(
    layout: str, tuned: tuple, tiny_folder: Callable, tiny_sd1: Path, tmp_path: Path
) -> None:
    base = tiny_folder(SD1) if layout == "folder" else tiny_sd1
    told = extract(tuned[0], base, tmp_path / "x.safetensors", rank=4, type="f32", to="diffusers")
    assert told.modules == len(tuned[1])
    assert told.residual < 1e-5  # both models are float32
    tensors = tensors_of(tmp_path / "x.safetensors")
    for path, factors in tuned[1].items():
        weight = lora_files.base()[f"{path}.weight"]
        a, b = (tensors[f"{path}.lora_{side}.weight"] for side in "AB")
        got = (b.reshape(b.shape[0], -1) @ a.reshape(a.shape[0], -1)).reshape(weight.shape)
        assert_close(got, reference_lora.changed(weight, factors) - weight, 1e-5)


def test_extract_by_energy_and_of_models_that_do_not_match(tuned: tuple, tiny_folder: Callable, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    told = extract(tuned[0], tiny_folder(SD1), out, energy=0.8)
    assert 0 < told.residual <= np.sqrt(0.2)
    assert max(told.ranks) <= 4
    with pytest.raises(errors.BadArgument, match="does not differ"):
        extract(tuned[0], tuned[0], tmp_path / "y.safetensors", rank=4)
    other = tiny_folder(tiny.TinySD1(text_width=128))
    with pytest.raises(errors.BadArgument, match="do not match"):
        extract(tuned[0], other, tmp_path / "y.safetensors", rank=4)
    assert not (tmp_path / "y.safetensors").exists()


@pytest.mark.parametrize("model", ["folder", "single"])
def test_bake_sums_in_float32_and_quantises_once(
    model: str, tmp_path: Path, tiny_folder: Callable, tiny_sd1: Path
) -> None:
    import gguf

    update = lora_files.random_update(lora_files.modules("linear"))
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    base = tiny_folder(SD1) if model == "folder" else tiny_sd1
    bake(base, [f"{source}:0.8"], tmp_path / "f32.safetensors")
    bake(base, [f"{source}:0.8"], tmp_path / "q8.gguf", type="q8_0")
    exact = tensors_of(tmp_path / "f32.safetensors")
    quantised = 0
    for tensor in gguf.GGUFReader(tmp_path / "q8.gguf").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            quantised += 1
            want = gguf.quants.quantize(exact[tensor.name], gguf.GGMLQuantizationType.Q8_0)
            np.testing.assert_array_equal(tensor.data.reshape(-1), want.reshape(-1))
    assert quantised


# ---- names -----------------------------------------------------------------------------------------------


def test_outlines_name_each_weight_once() -> None:
    for family in FAMILIES:
        outline = outline_of(family)
        assert len(outline.place) == len(outline.modules)
        assert len(outline.part) == sum(len(module.parts) for module in outline.modules)


@pytest.mark.parametrize("model", [SD1, tiny.TinySD1(unet_widths=(32, 64, 64), unet_attends=(True, True, False))])
def test_the_outline_of_a_model_has_the_engines_names(
    model: tiny.TinySD1, tiny_folder: Callable, native: Callable
) -> None:
    """Both names of every weight of the denoiser and the text encoder, against the engine's own table."""
    from sdcpp_py import _native
    from sdcpp_py.lora.model import Model
    from sdcpp_py.lora.outline import DIFFUSERS

    with Model(tiny_folder(model)) as opened:
        outline = opened.outline
    ours = {
        f"{DIFFUSERS['sd1'][module.component]}.{module.parts[0].diffusers}.weight": module.name
        for module in outline.modules
    }
    homes = ("model.diffusion_model.", "cond_stage_model.transformer.")
    for weight in _native.probe_weights(native(model)):
        if weight["name"].startswith(homes) and weight["name"].endswith(".weight"):
            home = next(h for h in homes if weight["name"].startswith(h))
            assert f"{home}{ours[weight['diffusers_name']]}.weight" == weight["name"]


# ---- bad input -------------------------------------------------------------------------------------------


def test_families_do_not_mix(flux: dict, tmp_path: Path) -> None:
    update = lora_files.random_update(lora_files.attention())
    x = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    with pytest.raises(errors.BadArgument, match=r"x\.safetensors: made for SD1, but .*a\.safetensors is for FLUX"):
        merge([(flux["a"][0], 1.0), (x, 1.0)], tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_widths_do_not_mix(flux: dict, tmp_path: Path) -> None:
    key = "transformer.transformer_blocks.0.attn.to_q"
    wide = {f"{key}.lora_A.weight": np.ones((2, 96), np.float32), f"{key}.lora_B.weight": np.ones((96, 2), np.float32)}
    x = lora_files.save(tmp_path / "x.safetensors", wide)
    with pytest.raises(errors.BadArgument, match="different models"):
        merge([(flux["a"][0], 1.0), (x, 1.0)], tmp_path / "y.safetensors")


def test_what_means_nothing_is_refused_or_left_out(flux: dict, tmp_path: Path) -> None:
    tensors = tensors_of(flux["a"][0]) | {
        "transformer.nothing.lora_A.weight": np.ones((2, 8), np.float32),
        "transformer.nothing.lora_B.weight": np.ones((8, 2), np.float32),
    }
    x, out = lora_files.save(tmp_path / "x.safetensors", tensors), tmp_path / "y.safetensors"
    with pytest.raises(errors.BadFile, match=r"transformer\.nothing"):
        convert(x, out, to="kohya")
    assert convert(x, out, to="kohya", skip_unknown=True).unknown == ["transformer.nothing"]
    odd = {**tensors_of(flux["a"][0]), "transformer.proj_out.lora_C": np.ones((2, 8), np.float32)}
    with pytest.raises(errors.BadFile, match="lora_C"):
        convert(lora_files.save(tmp_path / "odd.safetensors", odd), out, to="kohya")


def test_a_bias_alone_has_no_place_in_pefts_format(tmp_path: Path) -> None:
    tensors = {"lora_unet_single_blocks_0_linear2.diff_b": np.ones(8, np.float32)}
    x = lora_files.save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(errors.Unsupported, match="a bias alone"):
        convert(x, tmp_path / "y.safetensors", to="diffusers")
    assert convert(x, tmp_path / "y.safetensors", to="comfy").kinds == {"bias": 1}


def test_damaged_files_and_pickles_are_sentences(flux: dict, tmp_path: Path) -> None:
    whole = flux["a"][0].read_bytes()
    out = tmp_path / "out.safetensors"
    for cut in (4, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(errors.BadFile):
            convert(tmp_path / "cut.safetensors", out, to="kohya")
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(errors.Unsupported, match="pickle"):
        convert(tmp_path / "x.pt", out, to="kohya")
    with pytest.raises(errors.SdcppError):
        convert(tmp_path / "missing.safetensors", out, to="kohya")
    assert not out.exists()


def test_a_lone_half_of_a_pair_is_named(flux: dict, tmp_path: Path) -> None:
    tensors = tensors_of(flux["a"][0])
    del tensors["transformer.proj_out.lora_B.weight"]
    x = lora_files.save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(errors.SdcppError, match=r"transformer\.proj_out"):
        convert(x, tmp_path / "y.safetensors", to="kohya")


def test_a_factor_that_is_no_number_is_named(flux: dict, tmp_path: Path) -> None:
    """Case 45."""
    tensors = dict(tensors_of(flux["a"][0]))
    bad = tensors["transformer.proj_out.lora_B.weight"].copy()
    bad[0, 0] = np.nan
    x = lora_files.save(tmp_path / "x.safetensors", tensors | {"transformer.proj_out.lora_B.weight": bad})
    with pytest.raises(errors.BadFile, match=r"transformer\.proj_out\.lora_B"):
        convert(x, tmp_path / "y.safetensors", to="kohya")


def test_what_a_file_brings_along_is_told(flux: dict, tmp_path: Path) -> None:
    extra = {"bundle_emb.mytoken.clip_l": np.ones((2, 768), np.float32)}
    x = lora_files.save(tmp_path / "x.safetensors", tensors_of(flux["a"][0]) | extra)
    (warning,) = convert(x, tmp_path / "y.safetensors", to="kohya").warnings
    assert "textual inversion" in warning


def test_interrupted_or_cancelled_nothing_is_left(flux: dict, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    out = tmp_path / "new" / "out.safetensors"
    with pytest.raises(errors.Cancelled, match="stopped after 3 of"):
        convert(flux["a"][0], out, to="kohya", on_step=lambda done, total, name: done < 3)

    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(flux["a"][0], out, to="kohya", on_step=interrupt)
    assert not list(out.parent.iterdir())


def test_a_full_disk_is_a_sentence(flux: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import shutil

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    (tmp_path / "new").mkdir()
    with pytest.raises(errors.Io, match="No space left"):
        convert(flux["a"][0], tmp_path / "new" / "out.safetensors", to="kohya")
    assert not list((tmp_path / "new").iterdir())


def test_sources_are_not_written(flux: dict, tmp_path: Path) -> None:
    path = flux["a"][0]
    with pytest.raises(errors.BadArgument, match="is one of the files to read"):
        convert(path, path, to="kohya")
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with pytest.raises(errors.BadArgument, match="is one of the files to read"):
        merge([(path, 1.0)], link)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank 0"),
        ({"energy": 1.5}, "energy 1.5"),
        ({"method": "svd"}, "'svd' is not known"),
        ({"method": "ties", "density": 0}, "density 0"),
        ({"density": 0.5}, "name a method"),
        ({"to": "webui"}, "'webui' is not known"),
        ({"type": "q8_0"}, "'q8_0' is not known"),
        ({"threads": 0}, "threads 0"),
        ({"family": "sd9"}, "'sd9' is not known"),
    ],
)
def test_options_out_of_range(flux: dict, tmp_path: Path, options: dict, says: str) -> None:
    with pytest.raises(errors.BadArgument, match=says):
        merge([(flux["a"][0], 1.0)], tmp_path / "y.safetensors", **options)


def test_a_ratio_that_is_no_number(flux: dict, tmp_path: Path) -> None:
    with pytest.raises(errors.BadArgument, match="finite"):
        merge([(flux["a"][0], float("nan"))], tmp_path / "y.safetensors")
    with pytest.raises(errors.SdcppError):
        merge([f"{flux['a'][0]}:abc"], tmp_path / "y.safetensors")


def test_types_are_kept_where_they_hold_the_values(tmp_path: Path) -> None:
    """bf16 stays where nothing is folded or folds exactly; 0.7 does not fit into it."""
    key = "transformer.transformer_blocks.0.attn.to_q"
    rng = np.random.default_rng(0)
    tensors = {
        f"{key}.lora_A.weight": lora_files.as_bf16(rng.standard_normal((4, 32))),
        f"{key}.lora_B.weight": lora_files.as_bf16(rng.standard_normal((32, 4))),
    }
    x = lora_files.save(tmp_path / "x.safetensors", tensors)

    def types(ratio: float, **options: str) -> list[str]:
        merge([(x, ratio)], tmp_path / "y.safetensors", **options)
        raw = (tmp_path / "y.safetensors").read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return [header[f"{key}.lora_{side}.weight"]["dtype"] for side in "AB"]

    assert types(0.5) == ["BF16", "BF16"]
    assert types(0.7) == ["BF16", "F32"]
    assert types(0.7, type="f16") == ["F16", "F16"]


def test_several_threads_write_the_same_bytes(flux: dict, tmp_path: Path) -> None:
    loras = [(path, 0.5) for path, _ in flux.values()]
    for threads in (1, 3):
        merge(loras, tmp_path / f"{threads}.safetensors", threads=threads, rank=5)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "3.safetensors").read_bytes()


def test_text_encoders_only(tmp_path: Path) -> None:
    update = lora_files.random_update(lora_files.attention("text_encoder"))
    x = lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update))
    assert convert(x, tmp_path / "y.safetensors", to="diffusers").modules == len(update)
    assert LoraSource(x).family == "sd1"


def test_a_base_of_another_size_is_refused(tmp_path: Path) -> None:
    update = lora_files.random_update(lora_files.attention("text_encoder"))
    source = LoraSource(lora_files.save(tmp_path / "x.safetensors", lora_files.tensors_of(update)))
    change = next(source.changes(source.modules()[0]))
    with pytest.raises(errors.BadArgument, match=r"the base of .* has 3 numbers, where \d+ x \d+ are wanted"):
        change.dense(np.zeros(3, np.float32))


@pytest.mark.parametrize("layout", ["folder", "single"])
@pytest.mark.parametrize("model", [tiny_sdxl.SD2, tiny_sdxl.SDXL], ids=["sd2", "sdxl"])
def test_baked_models_of_other_families_paint_as_with_the_lora(
    model: tiny.TinySD1, layout: str, tiny_folder: Callable, tmp_path: Path
) -> None:
    """OpenCLIP's fused and turned projections, and both text encoders of SDXL, in either layout of the model."""
    folder = tiny_folder(model)
    base = folder if layout == "folder" else tiny_sdxl.write_single(model, tmp_path / "base.safetensors")
    ends = (".to_q", ".to_v", ".q_proj", ".v_proj", ".fc1", ".conv1", ".text_projection")
    paths = [path for path in lora_files.modules("linear conv", PARTS, model) if path.endswith(ends)]
    assert ("text_encoder_2.text_projection" in paths) == (model is tiny_sdxl.SDXL)
    update = lora_files.random_update(paths, model=model)
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.peft(update))
    bake(base, [(source, 0.7)], tmp_path / "baked.safetensors")

    def latent(path: Path, loras: list) -> np.ndarray:
        from sdcpp_py import _native

        with SDContext(path, threads=1, lora_mode="restore") as sd_ctx:
            sd_ctx.generate("a cat", loras=loras, steps=1, width=64, height=64, seed=1)
            return _native.probe_latent(sd_ctx._native)

    want = latent(base, [(source, 0.7)])
    assert relative_rmse(latent(base, []), want) > 0.01
    assert_close(latent(tmp_path / "baked.safetensors", []), want, 1e-4)  # as above


def test_open_clips_projection_is_turned_on_both_ways(tiny_folder: Callable, tmp_path: Path) -> None:
    """Single files have it with rows for inputs: baked into one, and found against the folder."""
    module = "text_encoder_2.text_projection"
    model = tiny_sdxl.SDXL
    base = tiny_sdxl.write_single(model, tmp_path / "base.safetensors")
    update = lora_files.random_update([module], model=model)
    source = lora_files.save(tmp_path / "x.safetensors", lora_files.peft(update))
    bake(base, [(source, 0.7)], tmp_path / "tuned.safetensors")
    want = lora_files.merged((update, 0.7), model=model)[f"{module}.weight"]
    name = "conditioner.embedders.1.model.text_projection"
    assert_close(tensors_of(tmp_path / "tuned.safetensors")[name], want.T, SUM)
    told = extract(tmp_path / "tuned.safetensors", tiny_folder(model), tmp_path / "y.safetensors", rank=4, type="f32")
    assert told.modules == 1
    assert told.residual < 1e-4  # of a difference of float32
    found = tensors_of(tmp_path / "y.safetensors")
    down, up = (found[f"lora_te2_text_projection.lora_{side}.weight"] for side in ("down", "up"))
    assert_close(up @ down, want - lora_files.base(model)[f"{module}.weight"], 1e-4)
