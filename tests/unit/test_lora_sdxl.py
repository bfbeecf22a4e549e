"""LoRAs on SD 2.x and SDXL: every kind on fused projections, the encoders by their names, and LoRAs of others.

Numbers in names (test_case_38_...) are those of the cases in the catalogue of LoRA files, section 9.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import lora_files
import numpy as np
import pytest
import reference_lora
import tiny
import tiny_sdxl
from cases import SD2, SDXL, denoise, text
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels
from lora_files import Update, random_update, save, tensors_of
from rich.console import Console
from tiny_sdxl import SSD_1B

from sdcpp_py import BadFile, SDContext, _native

LAYER = "text_model.encoder.layers.1"
BLOCK = "unet.mid_block.attentions.0.transformer_blocks"


@dataclass
class Model:
    """A tiny model of one family in a single file, where projections are fused, in each mode."""

    tiny: tiny.TinySD1
    folder: Path
    contexts: dict[str, SDContext]
    fingerprint: str
    plain: dict[str, np.ndarray]

    @property
    def encoder(self) -> str:
        """The component whose projections are fused."""
        return "text_encoder_2" if self.tiny.text_2_width else "text_encoder"

    def paths(self, kind: reference_lora.Kind) -> list[str]:
        """Modules of which this kind can be, of the fused encoder and of the UNet."""
        paths = [f"{self.encoder}.{LAYER}.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.fc2")]
        paths += [f"{self.encoder}.{LAYER}.layer_norm1", f"{BLOCK}.0.attn2.to_k"]
        paths += ["unet.down_blocks.0.resnets.0.conv1", "unet.up_blocks.1.resnets.0.norm1"]
        if self.tiny.text_2_width:
            paths += ["text_encoder_2.text_projection", "unet.add_embedding.linear_1", f"{BLOCK}.1.attn1.to_q"]
        weights = lora_files.base(self.tiny)
        return [path for path in paths if kind.fits(weights[f"{path}.weight"])]

    def update(self, paths: list[str], make: reference_lora.Makes = reference_lora.lora, seed: int = 0) -> Update:
        return random_update(paths, make, seed, self.tiny)

    def answers(self, mode: str, loras: dict[Path, Any]) -> dict[str, np.ndarray]:
        self.contexts[mode].apply_loras(loras)
        return answers(self.tiny, self.contexts[mode])


def answers(model: tiny.TinySD1, context: SDContext) -> dict[str, np.ndarray]:
    """What the denoiser and the text encoders give for one input each."""
    cases = [denoise("lora", model, 8, 6, [250.0]), text("lora", model, 2, n=1)]
    if model.text_2_width:
        cases.append(text("lora", model, 2, "pooled", n=1))
    return {case.network: _native.probe_run(context._native, case.network, **case.inputs) for case in cases}


def assert_same_answers(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    """Float32 on both sides, with other orders of sums."""
    for network, there in want.items():
        assert_close(got[network], there, tolerance)


@pytest.fixture(scope="module", params=[SD2, SDXL], ids=["sd2", "sdxl"])
def model(
    request: pytest.FixtureRequest,
    kernels: Kernels,
    tiny_folder: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Model]:
    single = tiny_sdxl.write_single(request.param, tmp_path_factory.mktemp("single") / "model.safetensors")
    contexts = {mode: SDContext(single, threads=1, lora_mode=mode) for mode in ("runtime", "restore")}
    plain = answers(request.param, contexts["runtime"])
    yield Model(request.param, tiny_folder(request.param), contexts, contexts["runtime"].fingerprint(), plain)
    for context in contexts.values():
        context.close()


@pytest.fixture(autouse=True)
def _leaves_no_trace(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "model" in request.fixturenames:
        model = request.getfixturevalue("model")
        for context in model.contexts.values():
            context.apply_loras({})
            assert context.fingerprint() == model.fingerprint


_numbers = count()


@pytest.fixture
def model_with(tmp_path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """What a folder answers whose weights hold the changes: W + delta in float64, rounded once."""

    def run(model: Model, *updates: tuple[Update, float]) -> dict[str, np.ndarray]:
        changed = lora_files.merged(*updates, model=model.tiny, weights=lora_files.base(model.tiny))
        path = lora_files.write_model(tmp_path / f"model-{next(_numbers)}", model.folder, changed, model.tiny)
        with SDContext(path, threads=1) as context:
            return answers(model.tiny, context)

    return run


def is_complete(context: SDContext) -> bool:
    return all(report.is_complete for report in context.lora_reports)


# Of each way in which kinds act on a weight one; the others are as on any other weight.
TYPICAL = ("lora", "lokr-w2", "full-with-bias", "norms", "ia3-output", "dora-inputs", "oft-rescaled")
KINDS = [pytest.param(kind, marks=() if kind in TYPICAL else pytest.mark.slow) for kind in reference_lora.KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_the_change_that_its_formula_says(
    kind: str, model: Model, model_with: Callable[..., dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Also where the module is some rows of a fused weight, or a transposed one.

    With rescaled OFT one unit of the last place in each changed weight moves the answer by 2e-6 to 8e-6, whatever the
    kernels, and a delta is rounded once more than a weight that comes changed.
    """
    makes = reference_lora.KINDS[kind]
    update = model.update(model.paths(makes), makes.make)
    file = save(tmp_path / "lora.safetensors", tensors_of(update, lora_files.numbered))
    want = model_with(model, (update, 0.8))
    for network in want if makes.linear or makes.norm else ["denoise"]:
        assert relative_rmse(want[network], model.plain[network]) > 1e-3
    for mode, context in model.contexts.items():
        assert_same_answers(model.answers(mode, {file: 0.8}), want, 2e-5 if kind == "oft-rescaled" else 1e-5)
        (report,) = context.lora_reports
        assert report.is_complete
        assert len(report.applied) == len(update)


def test_case_38_the_projections_of_a_weight_change_by_themselves(
    model: Model, model_with: Callable[..., dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Queries and values have ranks and scales of their own in one fused weight; keys have none."""
    layer = f"{model.encoder}.{LAYER}.self_attn"
    update = {
        **model.update([f"{layer}.q_proj"], lambda rng, w: reference_lora.lora(rng, w, rank=2, alpha=8.0), seed=1),
        **model.update([f"{layer}.v_proj"], lambda rng, w: reference_lora.lora(rng, w, rank=5, alpha=None), seed=2),
    }
    file = save(tmp_path / "qv.safetensors", tensors_of(update, lora_files.numbered))
    for mode in model.contexts:
        assert_same_answers(model.answers(mode, {file: 1.0}), model_with(model, (update, 1.0)))


def sgm(model: tiny.TinySD1, path: str) -> str:
    """kohya's for SDXL: the UNet's original names."""
    is_text = path.startswith("text")
    return lora_files.numbered(path) if is_text else f"lora_unet_{lora_files.flat(lora_files.original(path, model))}"


def comfy(model: tiny.TinySD1, path: str) -> str:
    component, _, _ = path.partition(".")
    prefixes = {
        "text_encoder": "text_encoders.clip_l.transformer",
        "text_encoder_2": "text_encoders.clip_g.transformer",
    }
    return f"{prefixes.get(component, 'diffusion_model')}.{lora_files.original(path, model)}"


SPELLINGS: dict[str, Callable[[tiny.TinySD1, str], str]] = {
    "hf": lambda model, path: lora_files.numbered(path),
    "sgm": sgm,
    "diffusers": lambda model, path: path,
    "comfy": comfy,
    "lycoris-unet": lambda model, path: f"lycoris_{lora_files.flat(path.partition('.')[2])}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_module_is_found_by_every_spelling(spelling: str, model: Model, tmp_path: Path) -> None:
    """kohya's with both names of the UNet's blocks, diffusers', ComfyUI's, and the wrapper's own."""
    parts = "unet" if spelling.endswith("unet") else " ".join(p for p in tiny.components(model.tiny) if p != "vae")
    update = model.update(lora_files.modules("linear conv", parts, model.tiny), seed=2)
    tensors = (
        tensors_of(update, partial(SPELLINGS[spelling], model.tiny))
        if spelling != "diffusers"
        else lora_files.peft(update)
    )
    file = save(tmp_path / f"{spelling}.safetensors", tensors)
    reference = save(tmp_path / "reference.safetensors", tensors_of(update, lora_files.numbered))
    report = model.contexts["runtime"].inspect_lora(file)
    assert report.is_complete
    assert report.unet_modules + report.text_modules == len(update)
    assert_same_answers(model.answers("runtime", {file: 0.5}), model.answers("runtime", {reference: 0.5}))


def test_encoders_have_their_own_multiplier(tmp_path: Path, model: Model) -> None:
    """Both text encoders take the first number of a tag, the UNet the second."""
    parts = {part: lora_files.modules("linear", part, model.tiny)[::3] for part in tiny.components(model.tiny)}
    update = model.update([path for paths in parts.values() for path in paths], seed=4)
    unet = {path: factors for path, factors in update.items() if path in parts["unet"]}
    text = {path: factors for path, factors in update.items() if path not in unet}
    file, of_unet, of_text = (
        save(tmp_path / f"{i}.safetensors", tensors_of(some, lora_files.numbered))
        for i, some in enumerate((update, unet, text))
    )
    for told, alone in (({"te": 0.7, "unet": 0.0}, of_text), ({"te": 0.0, "unet": 0.7}, of_unet)):
        assert_same_answers(model.answers("runtime", {file: told}), model.answers("runtime", {alone: 0.7}))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mode", ["runtime", "restore"])
def test_each_text_encoder_of_sdxl_by_itself(
    mode: str, tiny_folder: Callable[..., Path], model_with: Callable[..., dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """te, te2 and unet of one tag are three multipliers; te alone is of both encoders."""
    parts = {part: lora_files.modules("linear", part, SDXL)[::3] for part in tiny.components(SDXL)}
    updates = {part: random_update(paths, seed=4, model=SDXL) for part, paths in parts.items() if part != "vae"}
    whole = {path: factors for update in updates.values() for path, factors in update.items()}
    save(tmp_path / "x.safetensors", tensors_of(whole, lora_files.numbered))
    model = Model(SDXL, tiny_folder(SDXL), {}, "", {})
    with SDContext(tiny_folder(SDXL), threads=1, lora_mode=mode, lora_dir=tmp_path) as context:
        for tag, (te, te2, unet) in {
            "te=0.4:te2=0.9:unet=-0.5": (0.4, 0.9, -0.5),
            "0.7:te2=0": (0.7, 0.0, 0.7),
            "0:te2=0.7": (0.0, 0.7, 0.0),
            "0.6": (0.6, 0.6, 0.6),
        }.items():
            told = {"text_encoder": te, "text_encoder_2": te2, "unet": unet}
            want = model_with(model, *((update, told[part]) for part, update in updates.items()))
            request = {"steps": 1, "cfg_scale": 1.0, "width": 32, "height": 32, "seed": 1}
            context.generate(f"a cat <lora:x:{tag}>", **request)
            assert_same_answers(answers(SDXL, context), want)
        context.generate("a cat", **request)


@pytest.mark.usefixtures("kernels")
def test_loras_of_sdxl_with_blocks_removed(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """SSD-1B's by both names of its UNet; of those for a whole SDXL, what there is, and a warning."""
    update = random_update(lora_files.modules("linear conv", "unet", SSD_1B), seed=8, model=SSD_1B)
    hf = save(tmp_path / "hf.safetensors", tensors_of(update, lora_files.numbered))
    original = save(tmp_path / "sgm.safetensors", tensors_of(update, partial(sgm, SSD_1B)))
    middle = {"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": next(iter(update.values()))}
    whole = save(tmp_path / "whole.safetensors", tensors_of({**update, **middle}, lora_files.numbered))
    changed = lora_files.merged((update, 0.6), model=SSD_1B, weights=lora_files.base(SSD_1B))
    path = lora_files.write_model(tmp_path / "changed", tiny_folder(SSD_1B), changed, SSD_1B)
    with SDContext(path, threads=1) as context:
        want = answers(SSD_1B, context)
    with SDContext(tiny_folder(SSD_1B), threads=1) as context:
        for file in (hf, original, whole):
            context.apply_loras({file: 0.6})
            (report,) = context.lora_reports
            assert len(report.applied) == len(update)
            assert (len(report.unmatched) > 0) == (file == whole)
            # At its deepest level are 2 x 2 cells, which norms of so few make worse: torch's float32 is 2e-5 away.
            assert_close(answers(SSD_1B, context)["denoise"], want["denoise"], 1e-4)
    strict = SDContext(tiny_folder(SSD_1B), threads=1, strict_loras=True)
    with strict, pytest.raises(BadFile, match="fit nothing in this model"):
        strict.apply_loras({whole: 1.0})


# ---- LoRAs that want settings of their own -------------------------------------------------------------

NAMES_THAT_TELL = {
    "lcm-lora-sdxl": "LCM, made for steps 4, cfg_scale 1, sampler 'lcm' and scheduler 'simple'",
    "sdxl_lightning_8step_lora": "Lightning, made for steps 8, cfg_scale 1, sampler 'euler'",
    "Hyper-SDXL-8steps-lora": "Hyper, made for steps 8, cfg_scale 1, sampler 'euler'",
    "Hyper-SDXL-12steps-CFG-lora": "Hyper, made for steps 12, cfg_scale 6, ",
    "sd_xl_turbo_lora_v1": "Turbo, made for steps 4, cfg_scale 1, sampler 'euler_a'",
    "TCD-SDXL-LoRA": "TCD, made for steps 4, cfg_scale 1, sampler 'tcd'",
    "dmd2_sdxl_4step_lora": "DMD2, made for steps 4, cfg_scale 1, sampler 'lcm'",
}


@pytest.mark.parametrize("name", [*NAMES_THAT_TELL, "pencil", "hyperrealism", "lightning bolts", "turbo-car-lora"])
def test_a_distilled_lora_says_its_settings(
    name: str, tiny_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, where a picture is asked for with the usual ones; and in its report."""
    update = random_update(["unet.conv_in"], seed=1, model=SDXL)
    save(tmp_path / f"{name}.safetensors", tensors_of(update, lora_files.numbered))
    size = {"width": 32, "height": 32}
    with SDContext(tiny_folder(SDXL), threads=1, lora_dir=tmp_path) as context:
        report = context.inspect_lora(name)
        assert bool(report.settings) == (name in NAMES_THAT_TELL)
        context.generate(f"a cat <lora:{name}>", steps=4, cfg_scale=1.0, **size)
        context.generate(f"a cat <lora:{name}:1:0>", **size)  # acts on no denoiser
        assert not caplog.records
        for _ in range(2):
            context.generate(f"a cat <lora:{name}>", **size)
        assert len(caplog.records) == (name in NAMES_THAT_TELL)
        if name in NAMES_THAT_TELL:
            assert re.search(rf"{name}.*: by its name {NAMES_THAT_TELL[name]}", caplog.text)
            assert "this picture has steps 30, cfg_scale 6 and multiplier 1" in caplog.text
            assert re.search(NAMES_THAT_TELL[name], report.settings)
            console = Console(file=io.StringIO(), width=200)
            console.print(report.table())
            assert "by its name" in console.file.getvalue()


# ---- LoRAs of other models -----------------------------------------------------------------------------

TEXT_WIDTHS = {"SD1": 768, "SD2": 1024, "SDXL": 2048}


def test_case_42_a_lora_of_another_family_is_refused_by_its_name(model: Model, tmp_path: Path) -> None:
    """Widths as real files have them: they tell what a LoRA was made for."""
    family = model.contexts["runtime"].info.family.upper()
    for made_for, width in TEXT_WIDTHS.items():
        if made_for == family:
            continue
        tensors: dict[str, np.ndarray] = {}
        for block in ("down_blocks_1_attentions_0", "mid_block_attentions_0"):
            for part in ("k", "v"):
                stem = f"lora_unet_{block}_transformer_blocks_0_attn2_to_{part}"
                tensors[f"{stem}.lora_down.weight"] = np.ones((4, width), np.float32)
                tensors[f"{stem}.lora_up.weight"] = np.ones((128, 4), np.float32)
        file = save(tmp_path / f"{made_for}.safetensors", tensors)
        for context in model.contexts.values():
            with pytest.raises(BadFile, match=f"made for {made_for}, but the model is {family} "):
                context.apply_loras({file: 1.0})


# ---- weights per block ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_weights_per_block(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """lbw of SDXL's layouts acts by the original names of blocks; BASE is the encoders, and time and size."""
    update = random_update(lora_files.modules("linear", "unet text_encoder_2", SDXL), seed=6, model=SDXL)
    inside = {path: v for path, v in update.items() if path.startswith("unet.mid_block.")}
    save(tmp_path / "all.safetensors", tensors_of(update, lora_files.numbered))
    save(tmp_path / "mid.safetensors", tensors_of(inside, lora_files.numbered))
    with SDContext(tiny_folder(SDXL), threads=1, lora_dir=tmp_path) as context:
        context.apply_loras({"all": {"lbw": "0,0,0,0,0,1,0,0,0,0,0,0"}})
        got = answers(SDXL, context)
        context.apply_loras({"mid": 1.0})
        assert_same_answers(got, answers(SDXL, context))
