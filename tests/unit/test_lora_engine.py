"""LoRAs in the engine: every kind against weights that hold the same change, every spelling, every mode, bad files.

Numbers in names (test_case_07_...) are those of docs/lora_cases.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import reference_lora
import tiny
from cases import SD1
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels
from lora_files import Stored, Update, random_update, save, tensors_of

from sdcpp_py import BadArgument, BadFile, SDContext, SdcppError, Unsupported, _native

# Two steps, so that ranges of steps can be told apart; no guidance, which only costs time.
RUN: dict[str, Any] = {
    "steps": 2, "cfg_scale": 1.0, "width": 48, "height": 32, "seed": 3, "sampler": "euler", "scheduler": "normal",
}  # fmt: skip
MODES = ("runtime", "restore")

PLACES = {
    "linear": [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "unet.time_embedding.linear_1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ],
    "conv": [
        "unet.mid_block.attentions.0.proj_in",
        "unet.down_blocks.1.resnets.0.conv_shortcut",
        "unet.down_blocks.1.resnets.0.conv1",
        "unet.down_blocks.0.downsamplers.0.conv",
        "unet.up_blocks.0.upsamplers.0.conv",
    ],
    "norm": [
        "unet.down_blocks.0.resnets.0.norm1",
        "unet.mid_block.attentions.0.norm",
        "unet.mid_block.attentions.0.transformer_blocks.0.norm2",
        "text_encoder.text_model.encoder.layers.1.layer_norm1",
    ],
}
TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
TO_V = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
PROJ_IN = "unet.mid_block.attentions.0.proj_in"
STRIDED = "unet.down_blocks.0.downsamplers.0.conv"
CONV = "unet.down_blocks.1.resnets.0.conv1"
NORM = "unet.down_blocks.0.resnets.0.norm1"


def latent(context: SDContext, prompt: str = "a cat", **options: Any) -> np.ndarray:
    context.generate(prompt, **{**RUN, **options})
    return _native.probe_latent(context._native)


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Bit for bit."""
    assert got.shape == want.shape
    assert got.tobytes() == want.tobytes(), f"relative RMSE {relative_rmse(got, want):.1e}"


@pytest.fixture(scope="session")
def folder(tiny_folder: Callable[[tiny.TinySD1], Path]) -> Path:
    return tiny_folder(SD1)


@pytest.fixture(scope="module")
def contexts(folder: Path, kernels: Kernels) -> Iterator[dict[str, SDContext]]:
    """A context of each mode on the tiny model."""
    opened = {mode: SDContext(folder, threads=1, lora_mode=mode) for mode in (*MODES, "diff")}
    assert {context.info.kernels for context in opened.values()} == {kernels.name}
    yield opened
    for context in opened.values():
        context.close()


@pytest.fixture(scope="module")
def plain(contexts: dict[str, SDContext]) -> dict[str, Any]:
    """What the base model paints, and its fingerprint."""
    return {"latent": latent(contexts["runtime"]), "fingerprint": contexts["runtime"].fingerprint()}


@pytest.fixture(autouse=True)
def _leaves_no_trace(contexts: dict[str, SDContext], plain: dict[str, Any]) -> Iterator[None]:
    """After every test, without its LoRAs: the base's weights, bit for bit, whatever went wrong."""
    yield
    for mode in MODES:
        contexts[mode].apply_loras({})
        assert contexts[mode].lora_state == {}
        assert contexts[mode].fingerprint() == plain["fingerprint"]


_numbers = count()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a LoRA of these tensors, or of an update in kohya's spelling."""

    def to_file(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None, name: str = "") -> Path:
        if all(isinstance(value, dict) for value in tensors.values()):
            tensors = tensors_of(dict(tensors))
        return save(tmp_path / (name or f"{next(_numbers)}.safetensors"), tensors, metadata)

    return to_file


@pytest.fixture
def model_with(folder: Path, tmp_path: Path) -> Callable[..., np.ndarray]:
    """What a model paints whose file holds the changes already: W + delta in float64, rounded once."""

    def paint(*updates: tuple[Update, float], prompt: str = "a cat", **options: Any) -> np.ndarray:
        changed = lora_files.merged(*updates)
        path = lora_files.write_model(tmp_path / f"model-{next(_numbers)}", folder, changed)
        with SDContext(path, threads=1) as context:
            return latent(context, prompt, **options)

    return paint


def assert_acts(got: np.ndarray, plain: dict[str, Any]) -> None:
    assert relative_rmse(got, plain["latent"]) > 1e-4, "the LoRA has no effect"


# ---- every kind ----------------------------------------------------------------------------------------

KIND_PLACES = [
    (kind, place)
    for kind in reference_lora.KINDS
    for place, paths in PLACES.items()
    if any(reference_lora.KINDS[kind].fits(lora_files.base()[f"{path}.weight"]) for path in paths)
]


def changes_of(kind: str, paths: Iterable[str]) -> Update:
    """An adapter of that kind on those of the modules that it fits."""
    makes = reference_lora.KINDS[kind]
    return random_update([path for path in paths if makes.fits(lora_files.base()[f"{path}.weight"])], makes.make)


def changes_everywhere(kind: str) -> Update:
    return changes_of(kind, [path for paths in PLACES.values() for path in paths])


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize(("kind", "place"), KIND_PLACES)
def test_a_kind_is_the_change_that_its_formula_says(
    kind: str,
    place: str,
    multiplier: float,
    contexts: dict[str, SDContext],
    plain: dict[str, Any],
    write: Callable[..., Path],
    model_with: Callable[..., np.ndarray],
) -> None:
    update = changes_of(kind, PLACES[place])
    file = write(update)
    want = model_with((update, multiplier))
    assert_acts(want, plain)
    for mode in MODES:
        assert_close(latent(contexts[mode], loras=[(file, multiplier)]), want, 1e-5)
        (report,) = contexts[mode].lora_reports
        assert len(report.applied) == len(update)
        assert report.is_complete


@pytest.mark.parametrize("kind", reference_lora.KINDS)
def test_multiplier_zero_is_no_lora(
    kind: str, contexts: dict[str, SDContext], plain: dict[str, Any], write: Callable[..., Path]
) -> None:
    file = write(changes_everywhere(kind))
    for mode in MODES:
        assert_same(latent(contexts[mode], loras=[(file, 0.0)]), plain["latent"])
        latent(contexts[mode], loras=[(file, 1.0)])
        assert_same(latent(contexts[mode], loras=[(file, 0.0)]), plain["latent"])
        assert contexts[mode].fingerprint() == plain["fingerprint"]


@pytest.mark.parametrize("kind", ["lora", "lokr-w2", "loha", "dora-rows", "ia3-input", "norms", "boft"])
def test_what_is_dropped_leaves_no_trace(
    kind: str, contexts: dict[str, SDContext], plain: dict[str, Any], write: Callable[..., Path]
) -> None:
    file = write(changes_everywhere(kind))
    for mode in MODES:
        for multiplier in (1.0, -0.3, 0.7):
            latent(contexts[mode], loras=[(file, multiplier)])
        assert_same(latent(contexts[mode]), plain["latent"])
        assert contexts[mode].fingerprint() == plain["fingerprint"]


def test_modes_agree_and_restore_holds_the_merged_weights(
    contexts: dict[str, SDContext], write: Callable[..., Path], folder: Path, tmp_path: Path, plain: dict[str, Any]
) -> None:
    """In restore mode the resident weights are those of a file that holds W + delta, nearly all to the last bit."""
    update = random_update(lora_files.attention(), seed=4)
    file = write(update)
    contexts["restore"].apply_loras({file: 0.7})
    assert contexts["restore"].fingerprint() != plain["fingerprint"]
    contexts["runtime"].apply_loras({file: 0.7})
    assert contexts["runtime"].fingerprint() == plain["fingerprint"]
    got = [latent(contexts[mode], loras=[(file, 0.7)]) for mode in MODES]
    assert_close(got[0], got[1], 1e-5)


# ---- every spelling ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere() -> Update:
    """alpha / rank is 1/2: exact also where a spelling has to fold it into a factor."""
    return random_update(
        [*lora_files.attention(), *PLACES["linear"], *PLACES["conv"], "unet.conv_in", "unet.conv_out"], seed=9
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", lora_files.SPELLINGS)
def test_the_same_update_means_the_same_in_every_spelling(
    name: str, mode: str, contexts: dict[str, SDContext], plain: dict[str, Any], everywhere: Update, tmp_path: Path
) -> None:
    spelling = lora_files.SPELLINGS[name]
    update = {path: factors for path, factors in everywhere.items() if spelling.covers(path)}
    assert update
    got = latent(contexts[mode], loras=[(spelling.write(update, tmp_path / "it.safetensors"), 0.75)])
    (report,) = contexts[mode].lora_reports
    assert len(report.applied) == len(update)
    assert not report.unmatched
    assert not report.skipped
    assert (report.scale_min, report.scale_max) in ((0.5, 0.5), (1.0, 1.0))
    want = latent(contexts[mode], loras=[(save(tmp_path / "kohya.safetensors", tensors_of(update)), 0.75)])
    assert_acts(want, plain)
    assert_same(got, want)


@pytest.mark.parametrize("name", lora_files.MAGNITUDES)
def test_dora_in_every_spelling(
    name: str, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """Magnitudes of rows: LyCORIS (out, 1), peft (out) or (1, out, 1, 1)."""
    update = random_update([TO_Q, PROJ_IN, CONV, STRIDED], reference_lora.dora(reference_lora.lora, False))
    role = lora_files.MAGNITUDES[name]
    spelled: Update = {}
    for path, factors in update.items():
        magnitude = factors["dora_scale"].reshape(-1)
        if name == "lycoris":
            magnitude = factors["dora_scale"]
        elif name.startswith("peft") and factors["dora_scale"].ndim == 4:
            magnitude = magnitude.reshape(1, -1, 1, 1)
        spelled[path] = {**{r: v for r, v in factors.items() if r != "dora_scale"}, role: magnitude}
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_acts(want, plain)
    assert_same(latent(contexts["runtime"], loras=[(write(spelled), 1.0)]), want)


@pytest.mark.parametrize("dtype", ["float16", "float64", "BF16", "F8_E4M3"])
def test_case_44_factors_of_any_type(
    dtype: str, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """Decoded to what the stored numbers are: the same as those numbers stored in f32."""
    stored: dict[str, Any] = {}
    exact: dict[str, Any] = {}
    for key, values in tensors_of(random_update([TO_Q, CONV], seed=2)).items():
        assert isinstance(values, np.ndarray)
        if dtype == "BF16":
            stored[key] = lora_files.as_bf16(values)
            exact[key] = lora_files.of_bf16(stored[key])
        elif dtype == "F8_E4M3":
            stored[key] = lora_files.as_e4m3(values)
            exact[key] = lora_files.of_e4m3(stored[key]).astype(np.float32)
        else:
            stored[key] = values.astype(dtype)
            exact[key] = stored[key].astype(np.float32)
    want = latent(contexts["runtime"], loras=[(write(exact), 1.0)])
    assert_acts(want, plain)
    assert_same(latent(contexts["runtime"], loras=[(write(stored), 1.0)]), want)


# ---- the cases of the catalogue ------------------------------------------------------------------------


def scale_in_report(context: SDContext, file: Path) -> float:
    context.apply_loras({file: 1.0})
    (report,) = context.lora_reports
    assert report.scale_min == report.scale_max
    return report.scale_min


@pytest.mark.parametrize(
    ("alpha", "rank", "want"),
    [
        pytest.param(np.array(2, np.float32), 4, 0.5, id="case-01"),
        pytest.param(None, 4, 1.0, id="case-02"),
        pytest.param(Stored("BF16", (1,), b"\x80\x40"), 4, 1.0, id="case-03"),
        pytest.param(np.array(4, np.int64), 4, 1.0, id="case-04"),
        pytest.param(np.array(1, np.float32), 128, 1 / 128, id="case-05"),
        pytest.param(np.array(1, np.float16), 1, 1.0, id="case-43"),
    ],
)
def test_cases_01_to_05_and_43_scale(
    alpha: Any, rank: int, want: float, contexts: dict[str, SDContext], write: Callable[..., Path],
    model_with: Callable[..., np.ndarray],
) -> None:  # fmt: skip
    """alpha of any type, absent, small beside the rank, and rank 1."""
    update = random_update([TO_Q], lambda rng, w: reference_lora.lora(rng, w, rank=rank, alpha=None))
    tensors = tensors_of(update)
    if alpha is not None:
        tensors[f"{lora_files.kohya(TO_Q)}.alpha"] = alpha
    file = write(tensors)
    assert scale_in_report(contexts["runtime"], file) == want
    update[TO_Q]["alpha"] = np.array(want * rank)
    assert_close(latent(contexts["runtime"], loras=[(file, 1.0)]), model_with((update, 1.0)), 1e-5)


def test_case_06_an_alpha_of_nan_rejects_its_module(
    contexts: dict[str, SDContext], write: Callable[..., Path], folder: Path
) -> None:
    update = random_update([TO_Q, TO_V])
    sound = write({TO_V: update[TO_V]})
    update[TO_Q]["alpha"] = np.array(np.nan, np.float32)
    file = write(update)
    got = latent(contexts["runtime"], loras=[(file, 1.0)])
    (report,) = contexts["runtime"].lora_reports
    assert len(report.applied) == 1
    assert len(report.skipped) == 1
    assert lora_files.kohya(TO_Q) in report.skipped[0]
    assert_same(got, latent(contexts["runtime"], loras=[(sound, 1.0)]))
    with SDContext(folder, threads=1, strict_loras=True) as strict, pytest.raises(BadFile, match="strict_loras"):
        strict.apply_loras({file: 1.0})


def test_case_07_a_linear_pair_on_a_convolution_1x1(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    """Case 8, the reverse, has its place where a family has linear projections there; see the next test."""
    update = random_update([PROJ_IN])
    squeezed = {
        path: {r: v.reshape(v.shape[:2]) if v.ndim == 4 else v for r, v in f.items()} for path, f in update.items()
    }
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_same(latent(contexts["runtime"], loras=[(write(squeezed), 1.0)]), want)
    assert_close(want, model_with((update, 1.0)), 1e-5)


def test_case_08_a_convolution_pair_on_a_linear(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    update = random_update([TO_Q])
    wide = {
        path: {r: v.reshape(*v.shape, 1, 1) if v.ndim == 2 else v for r, v in f.items()} for path, f in update.items()
    }
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_same(latent(contexts["runtime"], loras=[(write(wide), 1.0)]), want)


def test_case_11_a_tucker_core(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    update = random_update([CONV], reference_lora.locon_tucker)
    assert_close(latent(contexts["runtime"], loras=[(write(update), 1.0)]), model_with((update, 1.0)), 1e-5)


@pytest.mark.parametrize("make", [reference_lora.lora, reference_lora.locon_tucker, reference_lora.loha_tucker])
def test_case_12_runtime_is_merged_with_a_stride(
    make: reference_lora.Makes, contexts: dict[str, SDContext], write: Callable[..., Path]
) -> None:
    file = write(random_update([STRIDED], make))
    runtime, restore = (latent(contexts[mode], loras=[(file, 1.0)]) for mode in MODES)
    assert_close(runtime, restore, 1e-5)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        pytest.param(lambda rng, w: reference_lora.loha(rng, w, 4, 2.0), TO_Q, id="case-13"),
        pytest.param(lambda rng, w: reference_lora.loha_tucker(rng, w, 4), CONV, id="case-14"),
        pytest.param(lambda rng, w: reference_lora.loha_tucker(rng, w, 32), STRIDED, id="case-14-r-is-out"),
        pytest.param(reference_lora.lokr("full", 8, 8), TO_Q, id="case-15"),
        pytest.param(reference_lora.lokr("w2", 4, 4, 2), TO_Q, id="case-16"),
        pytest.param(reference_lora.lokr("full", 4, 8), CONV, id="case-17"),
        pytest.param(reference_lora.lokr("full", 16, 4), TO_Q, id="case-18"),
    ],
)
def test_cases_13_to_18_products(
    make: reference_lora.Makes, path: str, contexts: dict[str, SDContext], write: Callable[..., Path],
    model_with: Callable[..., np.ndarray], plain: dict[str, Any],
) -> None:  # fmt: skip
    update = random_update([path], make)
    want = model_with((update, 1.0))
    assert_acts(want, plain)
    assert_close(latent(contexts["runtime"], loras=[(write(update), 1.0)]), want, 1e-5)


def test_case_15_the_outer_factor_is_w1(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    """Swapped factors of one size are another product."""
    update = random_update([TO_Q], reference_lora.lokr("full", 4, 4))
    factors = {**update[TO_Q]}
    factors["lokr_w1"], factors["lokr_w2"] = factors["lokr_w2"], factors["lokr_w1"]
    got = latent(contexts["runtime"], loras=[(write({TO_Q: factors}), 1.0)])
    assert_close(got, model_with(({TO_Q: factors}, 1.0)), 1e-5)
    assert relative_rmse(got, model_with((update, 1.0))) > 1e-3


@pytest.mark.parametrize("of_inputs", [pytest.param(False, id="case-19"), pytest.param(True, id="case-20")])
def test_cases_19_and_20_dora_on_a_square_weight(
    of_inputs: bool, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any],
    model_with: Callable[..., np.ndarray],
) -> None:  # fmt: skip
    """(n, 1) are rows and (1, n) inputs; multiplier 0 is inert, 1 exact, 1/2 half of the way."""
    update = random_update([TO_Q], reference_lora.dora(reference_lora.lora, of_inputs))
    weight = reference_lora.changed(lora_files.base()[f"{TO_Q}.weight"], update[TO_Q])
    norms = np.linalg.norm(weight, axis=0 if of_inputs else 1)
    np.testing.assert_allclose(norms, update[TO_Q]["dora_scale"].reshape(-1), rtol=1e-6)
    file = write(update)
    for mode in MODES:
        assert_same(latent(contexts[mode], loras=[(file, 0.0)]), plain["latent"])
        for multiplier in (0.5, 1.0):
            got = latent(contexts[mode], loras=[(file, multiplier)])
            assert_close(got, model_with((update, multiplier)), 1e-5)


def test_case_21_pefts_dora_with_its_config(
    contexts: dict[str, SDContext], write: Callable[..., Path], tmp_path: Path
) -> None:
    update = random_update([TO_Q], reference_lora.dora(reference_lora.lora, False))
    folder = tmp_path / "adapter"
    stem = f"base_model.model.{TO_Q.removeprefix('unet.')}"
    tensors = {
        f"{stem}.lora_A.weight": update[TO_Q]["lora_down.weight"],
        f"{stem}.lora_B.weight": update[TO_Q]["lora_up.weight"],
        f"{stem}.lora_magnitude_vector": update[TO_Q]["dora_scale"].reshape(-1),
    }
    save(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 2, "use_dora": True})
    )
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_same(latent(contexts["runtime"], loras=[(folder, 1.0)]), want)


@pytest.mark.parametrize("on_input", [True, False])
def test_case_22_ia3(
    on_input: bool, contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    path = PLACES["linear"][2]
    update = random_update([path], reference_lora.ia3_of(on_input))
    assert_close(latent(contexts["runtime"], loras=[(write(update), 1.0)]), model_with((update, 1.0)), 1e-5)
    whole = write(
        {f"{lora_files.kohya(TO_Q)}.weight": np.ones((32, 1), np.float32), **tensors_of(random_update([TO_V]))}
    )
    contexts["runtime"].apply_loras({whole: 1.0})
    (report,) = contexts["runtime"].lora_reports
    assert len(report.applied) == 1, "a lone .weight is not IA3"


def test_case_23_norm_deltas(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    update = random_update([NORM], reference_lora.norms)
    for mode in MODES:
        assert_close(latent(contexts[mode], loras=[(write(update), 0.5)]), model_with((update, 0.5)), 1e-5)


def test_case_24_differences_of_biases(
    contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """Of a convolution by two spellings, of a norm, and of a weight that has no bias."""
    rng = np.random.default_rng(1)
    bias = rng.standard_normal(64).astype(np.float32)
    one = write({f"{lora_files.kohya(CONV)}.diff_b": bias})
    two = write({f"{lora_files.comfy(CONV)}.diff_b": bias})
    want = latent(contexts["runtime"], loras=[(one, 1.0)])
    assert_acts(want, plain)
    assert_same(latent(contexts["runtime"], loras=[(two, 1.0)]), want)
    norm = write({f"{lora_files.kohya(NORM)}.diff": bias[:32], f"{lora_files.kohya(NORM)}.diff_b": bias[:32]})
    same = write({f"{lora_files.kohya(NORM)}.w_norm": bias[:32], f"{lora_files.kohya(NORM)}.b_norm": bias[:32]})
    assert_same(*(latent(contexts["runtime"], loras=[(file, 1.0)]) for file in (norm, same)))
    missing = write({f"{lora_files.kohya(TO_Q)}.diff_b": bias[:32], **tensors_of(random_update([TO_V]))})
    contexts["runtime"].apply_loras({missing: 1.0})
    (report,) = contexts["runtime"].lora_reports
    assert len(report.applied) == 1
    assert any(lora_files.kohya(TO_Q) in line for line in report.skipped + report.unmatched)


def test_case_39_te1_means_the_only_text_encoder(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    update = random_update(lora_files.attention("text_encoder"))
    files = [write(tensors_of(update, stem)) for stem in (lora_files.kohya, lora_files.kohya_te1)]
    assert_same(*(latent(contexts["runtime"], loras=[(file, 1.0)]) for file in files))


@pytest.mark.parametrize("prefix", ["unet.", ""])
def test_case_41_processors(prefix: str, contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    path = TO_Q.replace("to_q", "to_out.0")
    update = random_update([path], lambda rng, w: reference_lora.lora(rng, w, alpha=None))
    stem = f"{prefix}{path.removeprefix('unet.').removesuffix('.to_out.0')}.processor.to_out_lora"
    file = write(
        {f"{stem}.down.weight": update[path]["lora_down.weight"], f"{stem}.up.weight": update[path]["lora_up.weight"]}
    )
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_same(latent(contexts["runtime"], loras=[(file, 1.0)]), want)


@pytest.mark.parametrize("inputs", [1024, 2048])
def test_case_42_a_lora_of_another_family(
    inputs: int, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """attn2 takes as many inputs as the text encoder is wide; nothing of the file is used."""
    tensors = {}
    for path in lora_files.attention("unet"):
        out, into = lora_files.base()[f"{path}.weight"].shape
        into = inputs if ".attn2.to_k" in path or ".attn2.to_v" in path else 10 * into
        tensors[f"{lora_files.kohya(path)}.lora_down.weight"] = np.ones((4, into), np.float32)
        tensors[f"{lora_files.kohya(path)}.lora_up.weight"] = np.ones((10 * out, 4), np.float32)
    file = write(tensors)
    for mode in MODES:
        with pytest.raises(BadFile, match=r"made for SD(2|XL), but the model is SD1 \(.*takes \d+ inputs here"):
            contexts[mode].generate("a cat", loras=[(file, 1.0)], **RUN)
        assert contexts[mode].fingerprint() == plain["fingerprint"]
        assert_same(latent(contexts[mode]), plain["latent"])


def test_case_45_a_nan_names_its_tensor(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    update = random_update([TO_Q, TO_V])
    update[TO_V]["lora_up.weight"][3, 1] = np.nan
    file = write(update)
    with pytest.raises(BadFile, match=rf"{file.name}.*{lora_files.kohya(TO_V)}\.lora_up\.weight"):
        contexts["runtime"].apply_loras({file: 1.0})


def test_case_46_only_a_text_encoder(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    update = random_update(lora_files.modules("linear", "text_encoder"))
    file = write(update)
    assert_close(latent(contexts["runtime"], loras=[(file, 1.0)]), model_with((update, 1.0)), 1e-5)
    (report,) = contexts["runtime"].lora_reports
    assert (report.unet_modules, report.text_modules) == (0, len(update))


@pytest.mark.parametrize(("rslora", "others"), [(False, 2.0), (True, 8.0)])
def test_case_47_scale_by_metadata(
    rslora: bool,
    others: float,
    contexts: dict[str, SDContext],
    write: Callable[..., Path],
    model_with: Callable[..., np.ndarray],
) -> None:
    """r 16, alpha 32, and patterns for to_q; rsLoRA divides by the root of the rank."""
    to_k = TO_Q.replace("to_q", "to_k")
    update = {
        TO_Q: random_update([TO_Q], lambda rng, w: reference_lora.lora(rng, w, 8, None))[TO_Q],
        to_k: random_update([to_k], lambda rng, w: reference_lora.lora(rng, w, 16, None))[to_k],
    }
    config = {
        "r": 16,
        "lora_alpha": 32,
        "rank_pattern": {"attn1.to_q": 8},
        "alpha_pattern": {"attn1.to_q": 8},
        "use_rslora": rslora,
    }
    told = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
    file = write(lora_files.peft(update), told)
    contexts["runtime"].apply_loras({file: 1.0})
    (report,) = contexts["runtime"].lora_reports
    first = 8 / np.sqrt(8) if rslora else 1.0
    assert (report.scale_min, report.scale_max) == (pytest.approx(first), pytest.approx(others))
    update[TO_Q]["alpha"], update[to_k]["alpha"] = np.array(first * 8), np.array(others * 16)
    assert_close(latent(contexts["runtime"], loras=[(file, 0.25)]), model_with((update, 0.25)), 1e-5)


def test_case_48_an_alpha_of_the_file_wins_over_its_metadata(
    contexts: dict[str, SDContext], write: Callable[..., Path]
) -> None:
    update = random_update([TO_Q])
    tensors = {**lora_files.peft_unfolded(update), f"{TO_Q}.alpha": update[TO_Q]["alpha"]}
    told = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 64})}
    assert scale_in_report(contexts["runtime"], write(tensors, told)) == 0.5
    (report,) = contexts["runtime"].lora_reports
    assert len(report.warnings) == 1


def test_case_49_one_module_under_two_spellings(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    """Equal tensors apply once, others add up; both with a warning."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    update = random_update([path])
    twice = {**tensors_of(update), **tensors_of(update, lora_files.kohya_original)}
    want = latent(contexts["runtime"], loras=[(write(update), 1.0)])
    assert_same(latent(contexts["runtime"], loras=[(write(twice), 1.0)]), want)
    assert contexts["runtime"].lora_reports[0].warnings
    other = random_update([path], seed=1)
    both = write({**tensors_of(update), **tensors_of(other, lora_files.kohya_original)})
    got = latent(contexts["runtime"], loras=[(both, 1.0)])
    assert contexts["runtime"].lora_reports[0].warnings
    assert_close(got, latent(contexts["runtime"], loras=[(write(update), 1.0), (write(other), 1.0)]), 1e-5)


@pytest.fixture
def named(folder: Path, tmp_path: Path) -> Iterator[SDContext]:
    """A context with a folder of LoRAs: x, y, sub/z, and one whose name has dots and spaces."""
    root = tmp_path / "loras"
    for seed, name in enumerate(("x", "y", "sub/z", "my lora v1.0")):
        save(root / f"{name}.safetensors", tensors_of(random_update(lora_files.attention(), seed=seed)))
    with SDContext(folder, threads=1, lora_dir=root) as context:
        yield context


def test_case_53_the_same_lora_twice_is_loaded_once_with_the_sum(named: SDContext) -> None:
    got = latent(named, "a <lora:x:0.75> b <lora:x:0.25>")
    assert named.lora_state == {"x": {"te": 1.0, "unet": 1.0}}
    assert len(named.lora_reports) == 1
    assert_same(got, latent(named, "a <lora:x> b "))


def test_loras_that_can_be_read_only_once_are_for_every_picture(named: SDContext) -> None:
    small = {"width": 32, "height": 32, "steps": 1, "cfg_scale": 1.0}
    both = named.generate(prompts=["a", "b"], loras=(lora for lora in [("x", 8.0)]), seed=1, **small)
    alone = named.generate("b", loras=[("x", 8.0)], seed=2, **small)
    np.testing.assert_array_equal(both[1], alone)
    assert both[1].parameters.prompt == alone.parameters.prompt == "b <lora:x:8:8>"


@pytest.mark.parametrize(
    ("tag", "te", "unet"),
    [
        ("<lora:x>", 1.0, 1.0),
        ("<lora:x:te=0.5:unet=1>", 0.5, 1.0),
        ("<lora:x:0.5:1>", 0.5, 1.0),
        ("<lyco:x:0.5>", 0.5, 0.5),
    ],
)
def test_case_54_multipliers_of_a_tag(named: SDContext, tag: str, te: float, unet: float) -> None:
    got = latent(named, f"a cat{tag}")
    assert named.lora_state == {"x": {"te": te, "unet": unet}}
    assert_same(got, latent(named, "a cat", loras=[("x", {"te": te, "unet": unet})]))


@pytest.mark.parametrize("value", ["nan", "abc", "0.5:0.7junk", "inf", "1e999", ""])
def test_case_55_multipliers_that_are_none(named: SDContext, value: str) -> None:
    before = latent(named, "a <lora:y:0.5>")
    state = named.lora_state
    with pytest.raises(ValueError, match="must be a number"):
        latent(named, f"a <lora:x:{value}>")
    assert named.lora_state == state
    assert_same(latent(named, "a <lora:y:0.5>"), before)


@pytest.mark.parametrize("name", ["../../etc/x", "../x", "/abs/x", "C:\\x", "away/x", "out", "folder"])
def test_case_56_names_that_lead_out(named: SDContext, name: str, tmp_path: Path) -> None:
    root = tmp_path / "loras"
    (tmp_path / "x.safetensors").write_bytes(b"")
    (root / "away").symlink_to(tmp_path)
    (root / "out.safetensors").symlink_to(tmp_path / "x.safetensors")
    (root / "folder").mkdir()
    with pytest.raises(BadArgument):
        latent(named, f"a <lora:{name}:1>")
    assert named.lora_state == {}


@pytest.mark.parametrize("name", ["sub/z", "z", "my lora v1.0", "x.safetensors"])
def test_case_57_names_with_folders_dots_and_spaces(named: SDContext, name: str) -> None:
    latent(named, f"a <lora:{name}:1>")
    assert len(named.lora_state) == 1


def test_case_58_without_tags_or_with_zero(named: SDContext, plain: dict[str, Any]) -> None:
    assert_same(latent(named, "a cat"), plain["latent"])
    assert_same(latent(named, "a cat<lora:x:0>"), plain["latent"])
    latent(named, "a cat<lora:x:1>")
    assert_same(latent(named, "a cat<lora:x:0>"), plain["latent"])
    assert_same(latent(named, "a cat"), plain["latent"])


@pytest.mark.parametrize("mode", MODES)
def test_case_59_the_order_of_loras_changes_no_bit(
    mode: str, contexts: dict[str, SDContext], write: Callable[..., Path]
) -> None:
    kinds = [
        reference_lora.lora,
        reference_lora.loha,
        reference_lora.lokr("w2"),
        reference_lora.dora(reference_lora.lora, False),
    ]
    files = [write(random_update([TO_Q, TO_V, CONV, PROJ_IN], make, seed=i)) for i, make in enumerate(kinds)]
    loras = [(file, 0.3 + 0.17 * i) for i, file in enumerate(files)]
    want = latent(contexts[mode], loras=loras)
    for order in (loras[::-1], loras[2:] + loras[:2]):
        latent(contexts[mode])
        assert_same(latent(contexts[mode], loras=order), want)


def test_cases_50_and_59_several_add_up(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    """W + 0.7 D1 - 0.3 D2, each from the pristine W, a kind that depends on W among them."""
    one = random_update([TO_Q, CONV, PROJ_IN], seed=1)
    two = random_update(
        [TO_Q, CONV, NORM],
        lambda rng, w: reference_lora.norms(rng, w) if w.ndim == 1 else reference_lora.loha(rng, w),
        seed=2,
    )
    three = random_update([TO_Q, CONV], reference_lora.dora(reference_lora.lora, False), seed=3)
    updates = [(one, 0.7), (two, -0.3), (three, 0.5)]
    want = model_with(*updates)
    files = [(write(update), multiplier) for update, multiplier in updates]
    for mode in MODES:
        assert_close(latent(contexts[mode], loras=files), want, 1e-5)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_case_60_quantised_weights(
    kind: str,
    write: Callable[..., Path],
    model_with: Callable[..., np.ndarray],
    folder: Path,
    tmp_path: Path,
    native: Any,
) -> None:
    """runtime is exact: W as dequantised, plus the update in f32; restore holds the touched weights as f16."""
    import quantised

    base, decoded = quantised.write(tmp_path / f"{kind}.gguf", kind, native(SD1))
    update = random_update(lora_files.attention(), seed=6)
    file = write(update)
    exact = lora_files.merged((update, 0.8), weights=decoded)
    path = lora_files.write_model(tmp_path / "exact", folder, {**decoded, **exact})
    with SDContext(path, threads=1) as context:
        want = latent(context)
    # ggml rounds activations to 8 bits for products with quantised weights.
    with SDContext(base, threads=1, lora_mode="runtime") as context:
        before = latent(context), context.fingerprint()
        assert_close(latent(context, loras=[(file, 0.8)]), want, 2e-2)
        assert context.fingerprint() == before[1]
        assert_same(latent(context), before[0])
    with SDContext(base, threads=1, lora_mode="restore") as context:
        assert_close(latent(context, loras=[(file, 0.8)]), want, 2e-2)
        assert context.fingerprint() != before[1]
        assert_same(latent(context), before[0])
        assert context.fingerprint() == before[1]


def test_case_61_a_file_of_which_nothing_fits(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    tensors = {f"lora_unet_nothing_{i}.lora_down.weight": np.ones((4, 8), np.float32) for i in range(5)}
    tensors |= {f"lora_unet_nothing_{i}.lora_up.weight": np.ones((8, 4), np.float32) for i in range(5)}
    with pytest.raises(BadFile, match="lora_unet_nothing_0"):
        contexts["runtime"].apply_loras({write(tensors): 1.0})
    with pytest.raises((BadFile, Unsupported), match="some_key"):
        contexts["runtime"].apply_loras({write({"some_key": np.ones(3, np.float32)}): 1.0})


# ---- when, where, for which image ----------------------------------------------------------------------


def test_text_and_denoiser_have_multipliers_of_their_own(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    text, unet = (random_update(lora_files.attention(part), seed=i) for i, part in enumerate(("text_encoder", "unet")))
    file = write({**text, **unet})
    want = model_with((text, 0.25), (unet, 1.5))
    for mode in MODES:
        assert_close(latent(contexts[mode], loras=[(file, {"te": 0.25, "unet": 1.5})]), want, 1e-5)


def test_a_range_of_steps(contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]) -> None:
    """All steps, none, and each half; counted in steps or as shares, in tags or arguments."""
    context = contexts["runtime"]
    file = write(random_update(lora_files.attention("unet")))
    whole = latent(context, loras=[(file, 1.0)])
    assert_same(latent(context, loras=[(file, {"start": 0.0, "stop": 1.0})]), whole)
    assert_same(latent(context, loras=[(file, {"start": 1, "stop": 2})]), whole)
    assert_same(latent(context, loras=[(file, {"stop": 0.0})]), plain["latent"])
    first = latent(context, loras=[(file, {"stop": 0.5})])
    second = latent(context, loras=[(file, {"start": 0.5})])
    assert_same(latent(context, loras=[(file, {"stop": 1})]), first)
    assert_same(latent(context, loras=[(file, {"start": 2})]), second)
    for one, other in ((first, second), (first, whole), (second, whole), (first, plain["latent"])):
        assert one.tobytes() != other.tobytes()
    assert_same(latent(context, loras=[(file, {"stop": 0.5}), (file, {"start": 0.5})]), whole)


def test_a_range_of_steps_needs_runtime(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    file = write(random_update([TO_Q]))
    with pytest.raises(BadArgument, match="needs lora_mode 'runtime'"):
        latent(contexts["restore"], loras=[(file, {"stop": 0.5})])


def test_weights_of_blocks(contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]) -> None:
    """The tiny model has input_blocks 0 to 3 and output_blocks 0 to 3."""
    update = random_update(lora_files.modules("linear conv"))
    file = write(update)
    zeros = ["0"] * 26
    for mode in MODES:
        assert_same(latent(contexts[mode], loras=[(file, {"lbw": "NONE"})]), plain["latent"])
        assert_same(latent(contexts[mode], loras=[(file, {"lbw": "ALL"})]), latent(contexts[mode], loras=[(file, 1.0)]))
        half = latent(contexts[mode], loras=[(file, {"lbw": "ALL0.5"})])
        assert_close(half, latent(contexts[mode], loras=[(file, 0.5)]), 1e-6)
        for slot, begins in ((2, "input_blocks.1."), (13, "middle_block."), (16, "output_blocks.2.")):
            numbers = ",".join([*zeros[:slot], "0.5", *zeros[slot + 1 :]])
            part = {
                p: f for p, f in update.items() if p.startswith("unet.") and lora_files.original(p).startswith(begins)
            }
            want = latent(contexts[mode], loras=[(write(part), 0.5)])
            assert_acts(want, plain)
            assert_close(latent(contexts[mode], loras=[(file, {"lbw": numbers})]), want, 1e-6)


def test_each_image_of_a_batch_has_its_own_loras(named: SDContext) -> None:
    prompts = ["a cat <lora:x:0.8>", "a dog", "a cat <lora:y:0.5> <lora:x:-0.2>"]
    named.generate(prompts=prompts, **{**RUN, "seed": 3})
    together = _native.probe_latent(named._native)
    assert together.shape[0] == 3
    for k, prompt in enumerate(prompts):
        assert_close(together[k : k + 1], latent(named, prompt, seed=3 + k), 1e-5)


def test_images_with_other_loras_need_runtime(contexts: dict[str, SDContext], folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "x.safetensors", tensors_of(random_update([TO_Q])))
    with SDContext(folder, threads=1, lora_dir=tmp_path, lora_mode="restore") as context:
        with pytest.raises(BadArgument, match="need lora_mode 'runtime'"):
            context.generate(prompts=["a <lora:x:1>", "b"], **RUN)
        context.generate(prompts=["a <lora:x:1>", "b <lora:x:1>"], **RUN)


def test_guidance_with_loras(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    """Both runs of a step are with them."""
    update = random_update(lora_files.attention())
    got = latent(contexts["runtime"], loras=[(write(update), 0.8)], cfg_scale=5.0, negative_prompt="blurry")
    assert_close(got, model_with((update, 0.8), cfg_scale=5.0, negative_prompt="blurry"), 2e-5)


def test_a_tag_never_reaches_the_tokenizer(named: SDContext) -> None:
    assert_same(latent(named, "a <lora:x:0.5>cat"), latent(named, "a cat", loras=[("x", 0.5)]))
    assert_same(
        latent(named, "a cat", negative_prompt="b<lora:x:1>", cfg_scale=3.0),
        latent(named, "a cat", negative_prompt="b", cfg_scale=3.0),
    )


def test_a_tag_without_a_folder(contexts: dict[str, SDContext]) -> None:
    with pytest.raises(BadArgument, match="give lora_dir"):
        latent(contexts["runtime"], "a <lora:x:1>")


# ---- state, cache, diff --------------------------------------------------------------------------------


def test_state_is_what_was_asked_for_last(named: SDContext) -> None:
    named.apply_loras({"x": 0.5, "y": {"te": 0.0, "unet": 1.0}})
    assert named.lora_state == {"x": {"te": 0.5, "unet": 0.5}, "y": {"te": 0.0, "unet": 1.0}}
    assert [Path(report.path).stem for report in named.lora_reports] == ["x", "y"]
    latent(named, "a <lora:y:1>")
    assert list(named.lora_state) == ["y"]
    latent(named)
    assert named.lora_state == {}
    assert named.lora_reports == []


@pytest.mark.parametrize("mode", ["runtime", "restore", "diff"])
def test_reset_brings_the_base_back(
    mode: str, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    context = contexts[mode]
    file = write(
        random_update(
            lora_files.modules()[::5],
            lambda rng, w: reference_lora.norms(rng, w) if w.ndim == 1 else reference_lora.lora(rng, w),
        )
    )
    for multiplier in (0.3, -1.0, 0.7):
        latent(context, loras=[(file, multiplier)])
    context.reset_loras()
    assert context.lora_state == {}
    assert context.fingerprint() == plain["fingerprint"]
    assert_same(latent(context), plain["latent"])


def test_diff_drifts_little(contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]) -> None:
    """It adds differences to what is there: after twenty changes a little is left, and reset_loras() takes it away."""
    files = [write(random_update(lora_files.attention(), seed=i)) for i in range(3)]
    context = contexts["diff"]
    want = latent(contexts["restore"], loras=[(files[0], 0.5)])
    for i in range(20):
        latent(context, loras=[(files[i % 3], 0.1 * i), (files[(i + 1) % 3], -0.5)])
    assert_close(latent(context, loras=[(files[0], 0.5)]), want, 1e-4)
    assert_close(latent(context), plain["latent"], 1e-4)
    context.reset_loras()
    assert context.fingerprint() == plain["fingerprint"]


def test_text_that_drifted_is_not_kept_beyond_a_reset(
    contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """What prompts mean is kept while nothing changes: rounding that `diff` leaves in a text encoder is a change."""
    context = contexts["diff"]
    files = [write(random_update(lora_files.attention("text_encoder"), seed=i)) for i in range(2)]
    seen = set()
    for begin in (0.37, 0.73):
        for i in range(20):
            context.apply_loras({files[i % 2]: begin + i / 10})
        seen.add(latent(context).tobytes())
        context.reset_loras()
        assert_same(latent(context), plain["latent"])
    assert len(seen | {plain["latent"].tobytes()}) == 3


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))


def replaced(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(b"another")
    other.replace(path)


LOSSES: dict[str, Callable[[Path], Any]] = {
    "deleted": Path.unlink,
    "replaced": replaced,
    "cut": lambda path: os.truncate(path, 100),
    "written-over": written_over,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", [*MODES, "diff"])
def test_base_copy_ram_paints_on_without_the_file(
    mode: str, loss: str, folder: Path, tmp_path: Path, write: Callable[..., Path], native: Any
) -> None:
    """To the last bit, with LoRAs that were known before and with one that has to read the base for the first time."""
    path = tiny.write_single(folder, tmp_path / "model.safetensors", native(SD1))
    known = write(random_update([TO_Q, CONV, NORM], lambda rng, w: reference_lora.KINDS["full"].make(rng, w)))
    fresh = write(random_update([TO_V, CONV], reference_lora.dora(reference_lora.lora, False)))
    states: list[dict[Path, float]] = [{}, {known: 0.7}, {known: 0.3, fresh: 1.0}, {fresh: -0.5}, {}]

    def run(vanishes: bool) -> list[tuple[bytes, str]]:
        with SDContext(path, threads=1, lora_mode=mode, base_copy="ram") as context:
            seen = []
            for i, state in enumerate(states):
                if vanishes and i == 2:
                    LOSSES[loss](path)
                seen.append((latent(context, loras=state).tobytes(), context.fingerprint()))
            context.reset_loras()
            return [*seen, (latent(context).tobytes(), context.fingerprint())]

    want = run(vanishes=False)
    assert want[-1] == want[0]
    assert run(vanishes=True) == want


def test_a_picture_has_no_hash_of_a_file_that_did_not_paint_it(folder: Path, tmp_path: Path, native: Any) -> None:
    path = tiny.write_single(folder, tmp_path / "model.safetensors", native(SD1))
    with SDContext(path, threads=1, base_copy="ram") as context:
        assert "Model hash: " in context.generate("a cat", **RUN).info["parameters"]
        replaced(path)
        assert "Model hash: " not in context.generate("a cat", **RUN).info["parameters"]


@pytest.mark.parametrize("loss", ["cut", "written-over"])
@pytest.mark.parametrize("mode", [*MODES, "diff"])
def test_a_mapped_model_that_changes_is_noticed(
    mode: str, loss: str, folder: Path, tmp_path: Path, write: Callable[..., Path], native: Any
) -> None:
    """Every call that would read it refuses: what it holds is not the base any more, or not there at all."""
    path = tiny.write_single(folder, tmp_path / "model.safetensors", native(SD1))
    file = write(random_update([TO_Q]))
    with SDContext(path, threads=1, lora_mode=mode) as context:
        context.apply_loras({file: 1.0})
        state = context.lora_state
        time.sleep(0.02)  # beyond the clock tick of file systems
        LOSSES[loss](path)
        for call in (
            lambda: context.generate("a cat", **RUN),
            lambda: context.apply_loras({file: 0.5}),
            context.reset_loras,
            context.fingerprint,
            lambda: context._native.lora_drift(),
        ):
            with pytest.raises(SdcppError, match=r"was changed on disk while the model was open; .*base_copy"):
                call()
        assert context.lora_state == state


def test_a_file_that_is_replaced_is_noticed(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    one, two = (tensors_of(random_update(lora_files.attention(), seed=i)) for i in range(2))
    file = write(one, name="it.safetensors")
    first = latent(contexts["runtime"], loras=[(file, 1.0)])
    time.sleep(0.02)
    beside = write(two, name="beside.safetensors")
    want = latent(contexts["runtime"], loras=[(beside, 1.0)])
    beside.replace(file)
    assert_same(latent(contexts["runtime"], loras=[(file, 1.0)]), want)
    assert relative_rmse(first, want) > 1e-4


# ---- bad input -----------------------------------------------------------------------------------------


def broken(tensors: dict[str, np.ndarray], key: str, values: np.ndarray | None) -> dict[str, np.ndarray]:
    """A sound LoRA with one tensor replaced, or taken away."""
    out = {name: value for name, value in tensors.items() if name != key}
    return out if values is None else {**out, key: values}


def with_pair(tensors: dict[str, Any], down: np.ndarray, up: np.ndarray) -> dict[str, Any]:
    return {**tensors, f"{STEM}.lora_down.weight": down, f"{STEM}.lora_up.weight": up}


STEM = lora_files.kohya(TO_V)
BAD: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nan-in-up": lambda t: broken(t, f"{STEM}.lora_up.weight", np.full((32, 4), np.nan, np.float32)),
    "inf-in-down": lambda t: broken(t, f"{STEM}.lora_down.weight", np.full((4, 32), np.inf, np.float32)),
    "f16-overflow": lambda t: broken(t, f"{STEM}.lora_down.weight", np.full((4, 32), np.inf, np.float16)),
    "missing-up": lambda t: broken(t, f"{STEM}.lora_up.weight", None),
    "missing-down": lambda t: broken(t, f"{STEM}.lora_down.weight", None),
    "rank-0": lambda t: with_pair(t, np.zeros((0, 32), np.float32), np.zeros((32, 0), np.float32)),
    "ranks-differ": lambda t: broken(t, f"{STEM}.lora_up.weight", np.ones((32, 5), np.float32)),
    "wrong-inputs": lambda t: broken(t, f"{STEM}.lora_down.weight", np.ones((4, 33), np.float32)),
    "wrong-outputs": lambda t: broken(t, f"{STEM}.lora_up.weight", np.ones((31, 4), np.float32)),
    "transposed": lambda t: with_pair(t, np.ones((32, 4), np.float32), np.ones((4, 32), np.float32)),
    "one-dimension": lambda t: broken(t, f"{STEM}.lora_down.weight", np.ones(128, np.float32)),
    "five-dimensions": lambda t: broken(t, f"{STEM}.lora_down.weight", np.ones((4, 32, 1, 1, 1), np.float32)),
    "alpha-of-many": lambda t: broken(t, f"{STEM}.alpha", np.ones(7, np.float32)),
    "dora-of-wrong-size": lambda t: {**t, f"{STEM}.dora_scale": np.ones((33, 1), np.float32)},
    "integers": lambda t: broken(t, f"{STEM}.lora_up.weight", np.ones((32, 4), np.int64)),
}  # fmt: skip


def refusal(context: SDContext, file: Path) -> SdcppError | None:
    try:
        context.apply_loras({file: 1.0})
    except SdcppError as error:
        return error
    return None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BAD)
def test_a_damaged_module_changes_nothing_by_itself(
    name: str, mode: str, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """A typed error that names file and tensor, or a report of the module with the rest in force; never a crash. The
    state before stays where it is refused, and the next picture is right."""
    context = contexts[mode]
    sound = write(random_update([TO_Q], seed=8))
    before = latent(context, loras=[(sound, 0.5)])
    state, fingerprint = context.lora_state, context.fingerprint()
    file = write(BAD[name](tensors_of(random_update([TO_Q, TO_V]))))
    refused = refusal(context, file)
    if refused:
        assert isinstance(refused, (BadFile, Unsupported))
        assert file.name in str(refused)
        assert STEM in str(refused)
        assert context.lora_state == state
        assert context.fingerprint() == fingerprint
    else:
        (report,) = context.lora_reports
        assert name not in ("nan-in-up", "inf-in-down", "f16-overflow")
        assert any(STEM in line for line in report.skipped + report.unmatched + report.warnings)
    assert_same(latent(context, loras=[(sound, 0.5)]), before)
    assert_same(latent(context), plain["latent"])


def lying_files() -> dict[str, bytes]:
    """Files that are no LoRA, or no file at all."""
    sound = {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 512]}
    name = f"{STEM}.lora_down.weight"
    make = lora_files.safetensors_bytes
    return {
        "empty": b"",
        "short": b"\x08\0\0",
        "text": b"this is no LoRA",
        "pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
        "zip-pickle": b"PK\x03\x04" + b"\0" * 60,
        "header-beyond-the-file": (1 << 40).to_bytes(8, "little") + b"{}",
        "data-beyond-the-file": make({name: {**sound, "data_offsets": [0, 1 << 40]}}, b""),
        "lying-shape": make({name: {**sound, "shape": [4, 1 << 40]}}, b"\0" * 512),
        "overlap": make({name: sound, f"{STEM}.lora_up.weight": {**sound, "shape": [32, 4]}}, b"\0" * 512),
        "negative-offset": make({name: {**sound, "data_offsets": [-512, 0]}}, b"\0" * 512),
        "unknown-type": make({name: {**sound, "dtype": "F13"}}, b"\0" * 512),
        "no-object": b"\x02\0\0\0\0\0\0\0[]",
        "not-json": b"\x08\0\0\0\0\0\0\0{{{{{{{{",
        "no-tensors": make({}, b""),
        "gguf-cut": b"GGUF\x03\0\0\0" + b"\xff" * 16,
    }


@pytest.mark.parametrize("name", lying_files())
def test_files_that_are_none(name: str, contexts: dict[str, SDContext], tmp_path: Path, plain: dict[str, Any]) -> None:
    file = tmp_path / "bad.safetensors"
    file.write_bytes(lying_files()[name])
    for mode in MODES:
        with pytest.raises((BadFile, Unsupported), match=r"bad\.safetensors"):
            contexts[mode].generate("a cat", loras=[(file, 1.0)], **RUN)
        assert_same(latent(contexts[mode]), plain["latent"])


def test_files_cut_anywhere(
    contexts: dict[str, SDContext], write: Callable[..., Path], tmp_path: Path, plain: dict[str, Any]
) -> None:
    whole = write(random_update([TO_Q, TO_V])).read_bytes()
    file = tmp_path / "cut.safetensors"
    for cut in range(0, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:cut])
        with pytest.raises((BadFile, Unsupported), match=r"cut\.safetensors"):
            contexts["runtime"].apply_loras({file: 1.0})
    assert_same(latent(contexts["runtime"]), plain["latent"])


def test_pickles_are_never_opened(contexts: dict[str, SDContext], tmp_path: Path) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    for ending in (".pt", ".ckpt", ".bin", ".safetensors"):
        file = tmp_path / f"trap{ending}"
        file.write_bytes(pickle.dumps(Trap()))
        with pytest.raises((BadFile, Unsupported)):
            contexts["runtime"].apply_loras({file: 1.0})
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["unet:0:up", "unet:0:down"], "cloneofsimo"),
        (["lllite_unet_input_blocks_1.down.0.weight"], "LLLite"),
        (["emb_params"], "textual inversion"),
        (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "IP-Adapter"),
        (["lora_controlnet", "input_blocks.0.0.weight"], "Control"),
        (["down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"], "AnimateDiff"),
    ],
)
def test_what_is_no_lora_is_refused_by_its_name(
    keys: list[str], what: str, contexts: dict[str, SDContext], write: Callable[..., Path]
) -> None:
    with pytest.raises(Unsupported, match=what):
        contexts["runtime"].apply_loras({write({key: np.ones((4, 4), np.float32) for key in keys}): 1.0})


def test_one_bad_lora_of_several_changes_nothing(
    contexts: dict[str, SDContext], write: Callable[..., Path], tmp_path: Path, plain: dict[str, Any]
) -> None:
    """All in one transaction."""
    good = [write(random_update(lora_files.attention(), seed=i)) for i in range(2)]
    bad = tmp_path / "zzz.safetensors"
    bad.write_bytes(b"no")
    for mode in MODES:
        before = latent(contexts[mode], loras=[(good[0], 0.5)])
        state, fingerprint = contexts[mode].lora_state, contexts[mode].fingerprint()
        with pytest.raises(BadFile):
            latent(contexts[mode], loras=[(good[0], 0.9), (good[1], 1.0), (bad, 1.0)])
        assert contexts[mode].lora_state == state
        assert contexts[mode].fingerprint() == fingerprint
        assert_same(latent(contexts[mode], loras=[(good[0], 0.5)]), before)


def test_a_file_that_vanishes_or_shrinks(
    contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    for mode in MODES:
        file = write(random_update(lora_files.attention()))
        first = latent(contexts[mode], loras=[(file, 1.0)])
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(BadFile):
            latent(contexts[mode], loras=[(file, 0.5)])
        file.unlink()
        with pytest.raises(SdcppError, match="No such file"):
            latent(contexts[mode], loras=[(file, 0.5)])
        assert_same(latent(contexts[mode]), plain["latent"])
        file.write_bytes(whole)
        assert_same(latent(contexts[mode], loras=[(file, 1.0)]), first)


@pytest.mark.parametrize("loss", ["deleted", "cut", "replaced"])
@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_lost_while_it_paints(
    loss: str, mode: str, contexts: dict[str, SDContext], write: Callable[..., Path], plain: dict[str, Any]
) -> None:
    """The picture under way is finished, with its hash; the next one that names the file is refused."""
    context, file = contexts[mode], write(random_update(lora_files.attention()))
    want = latent(context, loras=[(file, 1.0)])

    def lose(*_: Any) -> None:
        if file.exists():
            LOSSES[loss](file)

    image = context.generate("a cat", loras=[(file, 1.0)], on_step=lose, **RUN)
    assert_same(_native.probe_latent(context._native), want)
    assert f'Lora hashes: "{file.stem}: ' in image.info["parameters"]
    with pytest.raises(SdcppError, match=file.stem):
        latent(context, loras=[(file, 1.0)])
    assert_same(latent(context), plain["latent"])


NO_ROOM = """
import resource, sys
from sdcpp_py import OutOfMemory, SDContext, _native
model, small, large, mode, room = sys.argv[1:]
with SDContext(model, threads=1, lora_mode=mode) as context:
    def latent(file):
        context.generate("a cat", loras=[(file, 1.0)], seed=3, steps=1, width=32, height=32, cfg_scale=1.0)
        return _native.probe_latent(context._native).tobytes()
    before, state, fingerprint = latent(small), context.lora_state, context.fingerprint()
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (int(room) << 20), -1))
    try:
        latent(large)
    except OutOfMemory as error:
        assert "large.safetensors" in str(error), error
    else:
        raise AssertionError("there was room")
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    assert (context.lora_state, context.fingerprint()) == (state, fingerprint)
    assert latent(small) == before
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its own memory as only Linux can")
@pytest.mark.parametrize("room", [8, 24])
@pytest.mark.parametrize("mode", MODES)
def test_no_memory_for_a_lora(mode: str, room: int, folder: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """Neither for its file, nor for its 64 MB of factors: an error that names it, and all goes on as before."""
    small = write(random_update([TO_Q]))
    paths = lora_files.attention("unet")
    wide = random_update(paths, lambda rng, w: reference_lora.lora(rng, w, rank=4000))
    large = write({f"{k}": v.astype(np.float16) for k, v in tensors_of(wide).items()}, name="large.safetensors")
    assert large.stat().st_size > 10 << 20
    arguments = [str(argument) for argument in (folder, small, large, mode, room)]
    given_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # what was freed is no room
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path,
        env={**os.environ, **given_back},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_lora_of_flux_by_diffusers_names(contexts: dict[str, SDContext], write: Callable[..., Path]) -> None:
    """SD 3 and FLUX call their blocks alike; their widths differ."""
    for width, model in ((3072, "FLUX"), (1536, "SD3")):
        stem = "transformer.transformer_blocks.0.attn.to_q"
        pair = {f"{stem}.lora_A.weight": np.ones((4, width)), f"{stem}.lora_B.weight": np.ones((width, 4))}
        with pytest.raises(BadFile, match=f"made for {model}, but the model is SD1"):
            contexts["runtime"].apply_loras({write({k: v.astype(np.float16) for k, v in pair.items()}): 1.0})


def test_what_does_not_act_is_told_once(
    contexts: dict[str, SDContext], write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA of which a part is left out paints, but not in silence."""
    file = write(
        with_pair(tensors_of(random_update([TO_Q])), np.ones((4, 33), np.float32), np.ones((32, 4), np.float32))
    )
    for multiplier in (1.0, 0.5):
        contexts["runtime"].apply_loras({file: multiplier})
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert file.name in message
    assert f"1 modules act, 1 modules or keys fit nothing in this model, first {STEM}" in message


@pytest.mark.parametrize("multiplier", [float("nan"), float("inf"), 1e39, "1", None])
def test_multipliers_that_are_no_finite_numbers(
    multiplier: Any, contexts: dict[str, SDContext], write: Callable[..., Path]
) -> None:
    file = write(random_update([TO_Q]))
    for wrong in (multiplier, {"te": multiplier}, {"unet": multiplier}):
        with pytest.raises(BadArgument, match="finite"):
            contexts["runtime"].apply_loras({file: wrong})


def test_ten_thousand_tags(named: SDContext) -> None:
    tags = "".join(f"<lora:{'xy'[i % 2]}:{1 / 8192}>" for i in range(10_000))
    started = time.perf_counter()
    got = latent(named, f"a cat{tags}")
    assert time.perf_counter() - started < 20
    assert_same(got, latent(named, "a cat", loras=[("x", 5000 / 8192), ("y", 5000 / 8192)]))


def test_a_hundred_loras_at_once(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    """Together their ranks are far above the weight's own."""
    updates = [(random_update([TO_Q, CONV], seed=i), 0.02) for i in range(100)]
    files = [(write(update), multiplier) for update, multiplier in updates]
    for mode in MODES:
        assert_close(latent(contexts[mode], loras=files), model_with(*updates), 1e-5)


def test_a_rank_above_the_weights_own(
    contexts: dict[str, SDContext], write: Callable[..., Path], model_with: Callable[..., np.ndarray]
) -> None:
    update = random_update([TO_Q], lambda rng, w: reference_lora.lora(rng, w, rank=100, alpha=50.0))
    assert_close(latent(contexts["runtime"], loras=[(write(update), 1.0)]), model_with((update, 1.0)), 1e-5)
    assert contexts["runtime"].lora_reports[0].warnings


@pytest.mark.parametrize("options", [{"lora_mode": "merge"}, {"base_copy": "disk"}])
def test_unknown_modes(options: dict[str, str], folder: Path) -> None:
    with pytest.raises(BadArgument, match=r"not known.*there are"):
        SDContext(folder, **options)


# ---- pictures carry their LoRAs ------------------------------------------------------------------------


def test_parameters_name_loras_with_hashes(named: SDContext) -> None:
    image = named.generate("a cat <lora:x:0.8>", loras=[("y", 0.5)], **RUN)
    text = image.info["parameters"]
    assert "<lora:x:0.8>" in text
    assert "Lora hashes:" in text
