"""Whatever was asked for before: the weights and the picture are those of a fresh context with the last prompt only.

Sequences of prompts, of apply_loras and reset_loras, of refused and cancelled runs, over every weight type in both
exact modes, and over every family. The hypothesis profile "ci" (pytest --hypothesis-profile=ci) runs more than 300 of
them, any other a few.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_dit
import lora_files
import numpy as np
import pytest
import quantised
import reference_lora
import tiny
import tiny_sdxl
from cases import SD1, SD2, SDXL
from cases_dit import FLUX, SD35_MEDIUM
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from kernel_sets import Kernels

from sdcpp_py import BadArgument, Cancelled, SDContext, SdcppError, _native

RUN: dict[str, Any] = {
    "steps": 1, "cfg_scale": 1.0, "width": 32, "height": 32, "seed": 3, "sampler": "euler", "scheduler": "normal",
}  # fmt: skip
IN_CI = settings.get_current_profile_name() == "ci"
TYPES = quantised.TYPES if IN_CI else ("f16", "q8_0", "q4_K")
FAMILIES: dict[str, tiny.TinySD1] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL}
TRANSFORMERS: dict[str, lora_dit.Model] = {"flux": FLUX, "sd3": SD35_MEDIUM}
OTHERS = [("sd2", "q8_0"), ("sd2", "f16"), ("sdxl", "f16"), ("sdxl", "q8_0")]
OTHERS += [("flux", "f16"), ("flux", "q8_0"), ("sd3", "f16"), ("sd3", "q8_0")]
MODELS = [("sd1", kind) for kind in TYPES] + (OTHERS if IN_CI else [OTHERS[i] for i in (0, 3, 5)])
SEQUENCES = 22 if IN_CI else 2  # of each type and mode

NAMES = ("pairs", "mixed", "sub/text")
# What a tag says behind the name. 0 and absent are the same state, reached in another way.
MULTIPLIERS: dict[str, dict[str, float]] = {
    "0.5": {"te": 0.5},
    "1.0": {"te": 1.0},
    "-0.3": {"te": -0.3},
    "0.0": {"te": 0.0},
    "te=0.5:te2=-0.25:te3=1:unet=0.75": {"te": 0.5, "te2": -0.25, "te3": 1.0, "unet": 0.75},
}
states = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(sorted(MULTIPLIERS)), max_size=3)


def write_loras(folder: Path, model: tiny.TinySD1) -> Path:
    """Low-rank pairs everywhere; kinds that depend on W, and norms; the text encoders alone."""
    encoders = " ".join(part for part in tiny.component_shapes(model) if part.startswith("text_encoder"))

    def modules(kinds: str, parts: str = "unet") -> list[str]:
        return lora_files.modules(kinds, parts, model)

    def update(paths: list[str], make: reference_lora.Makes, seed: int) -> lora_files.Update:
        return lora_files.random_update(paths, make, seed, model)

    pairs = update(modules("linear conv")[::2], reference_lora.lora, seed=1)
    some = modules("linear")
    mixed = {
        **update(some[0::4], reference_lora.dora(reference_lora.lora, False), seed=2),
        **update(some[1::4], reference_lora.loha, seed=3),
        **update(some[2::4], reference_lora.ia3_of(False), seed=4),
        **update(modules("norm", f"unet {encoders}")[::3], reference_lora.norms, seed=5),
        **update(modules("conv")[1::3], reference_lora.lokr("w2", 4, 4), seed=6),
    }
    mixed = {path: factors for path, factors in mixed.items() if not path.endswith(("conv_in", "conv_out"))}
    text = update(modules("linear", encoders), reference_lora.lora, seed=7)
    for name, made in zip(NAMES, (pairs, mixed, text), strict=True):
        lora_files.save(folder / f"{name}.safetensors", lora_files.tensors_of(made, lora_files.numbered))
    (folder / "bad.safetensors").write_bytes(b"no file at all")
    return folder


def write_transformer_loras(folder: Path, model: lora_dit.Model) -> Path:
    """The same of a diffusion transformer: fused and split modules, and CLIP-L and T5 alone."""
    weights = lora_dit.original(model)
    fused = [
        name for name in lora_dit.family(model).modules(model) if weights.get(f"{name}.weight", np.zeros(1)).ndim == 2
    ]
    split = [part for name in fused for part in lora_dit.family(model).modules(model)[name]]
    pairs = lora_dit.peft("transformer.")(lora_dit.random_update(model, split[::2], seed=1))
    mixed = {
        **lora_dit.random_update(model, split[1::6], reference_lora.dora(reference_lora.lora, False), seed=2),
        **lora_dit.random_update(model, split[3::6], reference_lora.loha, seed=3),
        **lora_dit.random_update(model, split[5::6], reference_lora.ia3_of(False), seed=4),
        **lora_dit.random_update(model, fused[2::5], reference_lora.lokr("w2", 4, 4), seed=5),
    }
    rng = np.random.default_rng(6)
    text = {}
    for stem, width in (
        ("lora_te1_text_model_encoder_layers_0_mlp_fc1", 64),
        ("lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0", model.context),
    ):
        out = 4 * width if "te1" in stem else 2 * width
        text[f"{stem}.lora_down.weight"] = rng.standard_normal((4, width)).astype(np.float32)
        text[f"{stem}.lora_up.weight"] = rng.standard_normal((out, 4)).astype(np.float32) / 8
    (folder / "sub").mkdir(parents=True)
    for name, tensors in zip(NAMES, (pairs, lora_dit.kohya("lycoris_")(mixed), text), strict=True):
        lora_dit.write(tensors, folder / f"{name}.safetensors")
    (folder / "bad.safetensors").write_bytes(b"no file at all")
    return folder


State = dict[str, str]


def prompt_of(state: State) -> str:
    return "a cat" + "".join(f"<lora:{name}:{multiplier}>" for name, multiplier in state.items())


def argument_of(state: State) -> dict[str, dict[str, float]]:
    return {name: MULTIPLIERS[multiplier] for name, multiplier in state.items()}


def named_in(state: State) -> set[tuple[str, str]]:
    return {(name, multiplier) for name, multiplier in state.items() if any(MULTIPLIERS[multiplier].values())}


def latent(context: SDContext, prompt: str) -> bytes:
    context.generate(prompt, **RUN)
    return _native.probe_latent(context._native).tobytes()


class World:
    """A model of one weight type in one mode, a context with a long history, and what fresh ones answer."""

    def __init__(self, model: Path, loras: Path, mode: str) -> None:
        self.options: dict[str, Any] = {"lora_dir": loras, "lora_mode": mode, "threads": 1}
        self.model, self.loras, self.mode = model, loras, mode
        self.context = SDContext(model, **self.options)
        self.answers: dict[frozenset[tuple[str, str]], tuple[bytes, str]] = {}
        self.base = self.fresh({})

    def fresh(self, state: State) -> tuple[bytes, str]:
        """The latent and the fingerprint of a context that was asked for this only."""
        key = frozenset(named_in(state))
        if key not in self.answers:
            with SDContext(self.model, **self.options) as context:
                self.answers[key] = latent(context, prompt_of(state)), context.fingerprint()
        return self.answers[key]


class LoraMachine(RuleBasedStateMachine):
    """Does to a context what users do."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.context = world, world.context
        self.context.apply_loras({})
        self.wanted: State = {}

    @rule(state=states)
    def paint(self, state: State) -> None:
        latent(self.context, prompt_of(state))
        self.wanted = state

    @rule(state=states)
    def paint_with_the_argument(self, state: State) -> None:
        self.context.generate("a cat", loras=argument_of(state), **RUN)
        self.wanted = state

    @rule(state=states)
    def apply(self, state: State) -> None:
        self.context.apply_loras(argument_of(state))
        self.wanted = state

    @rule()
    def reset(self) -> None:
        self.context.reset_loras()
        self.wanted = {}

    @rule(
        state=states, tag=st.sampled_from(["<lora:nothing:1>", "<lora:bad:1>", "<lora:../pairs:1>", "<lora:pairs:nan>"])
    )
    def paint_what_is_refused(self, state: State, tag: str) -> None:
        with pytest.raises(SdcppError):
            self.context.generate(prompt_of(state) + tag, **RUN)

    @rule(state=states)
    def paint_and_cancel(self, state: State) -> None:
        with pytest.raises(Cancelled):
            self.context.generate(prompt_of(state), on_step=lambda step, steps, preview: False, **{**RUN, "steps": 2})
        self.wanted = state

    @rule(state=states)
    def paint_what_cannot_be_painted(self, state: State) -> None:
        before = self.context.lora_state
        with pytest.raises(BadArgument):
            self.context.generate(prompt_of(state), **{**RUN, "width": 7})
        self.wanted = state if self.context.lora_state != before else self.wanted

    @rule(name=st.sampled_from(NAMES))
    def touch(self, name: str) -> None:
        """The file looks new, so that it is read again."""
        os.utime(self.world.loras / f"{name}.safetensors")

    @invariant()
    def state_is_what_was_asked_for(self) -> None:
        assert set(self.context.lora_state) == {name for name, _ in named_in(self.wanted)}
        if self.world.mode == "runtime":
            assert self.context.fingerprint() == self.world.base[1]

    def teardown(self) -> None:
        want_latent, want_fingerprint = self.world.fresh(self.wanted)
        assert self.context.fingerprint() == want_fingerprint
        assert latent(self.context, prompt_of(self.wanted)) == want_latent
        assert self.context.fingerprint() == want_fingerprint
        base_latent, base_fingerprint = self.world.base
        assert latent(self.context, "a cat") == base_latent
        assert self.context.fingerprint() == base_fingerprint


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("loras")

    def folder(family: str) -> Path:
        path = root / family
        if path.exists():
            return path
        if family in TRANSFORMERS:
            return write_transformer_loras(path, TRANSFORMERS[family])
        return write_loras(path, FAMILIES[family])

    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, native: Callable[..., Any]) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("types")

    def model(family: str, kind: str) -> Path:
        path = folder / f"{family}-{kind}.gguf"
        if path.exists():
            return path
        if family in TRANSFORMERS:
            model = TRANSFORMERS[family]
            return quantised.write_tensors(path, kind, lora_dit.family(model).single_tensors(model))
        if family == "sd1":
            return quantised.write(path, kind, native(SD1))[0]
        return quantised.write_tensors(path, kind, tiny_sdxl.single_tensors(FAMILIES[family]))

    return model


@pytest.fixture(params=[(*model, mode) for model in MODELS for mode in ("runtime", "restore")], ids="-".join)
def world(
    request: pytest.FixtureRequest,
    all_kernels: Kernels,
    models: Callable[[str, str], Path],
    loras: Callable[[str], Path],
) -> Iterator[World]:
    family, kind, mode = request.param
    made = World(models(family, kind), loras(family), mode)
    yield made
    made.context.close()


def test_history_leaves_no_trace(world: World) -> None:
    """The context goes on from one sequence to the next, so its history only grows."""
    run_state_machine_as_test(
        lambda: LoraMachine(world),
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=8,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_loras_of_the_machine_act(world: World) -> None:
    """Each changes the picture, or the machine would show nothing."""
    seen = {world.fresh({name: "1.0"})[0] for name in NAMES} | {world.base[0]}
    assert len(seen) == 1 + len(NAMES)
    assert all(np.isfinite(np.frombuffer(latent, np.float32)).all() for latent in seen)
    fingerprints = {world.fresh({name: "1.0"})[1] for name in NAMES}
    assert len(fingerprints) == (1 if world.mode == "runtime" else len(NAMES))
