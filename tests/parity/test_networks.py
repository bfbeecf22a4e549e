"""The parity ladder's networks against diffusers and transformers, live, in float32 and with f16 weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_sdxl
from cases import NETWORKS, SD1, SD2, SD2_V_DEEP, SDXL, SDXL_DEEP, Case
from closeness import assert_close, relative_rmse
from kernel_sets import Kernels

from sdcpp_py import _native
from sdcpp_py.files import data_dir

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    from reference_networks import Reference

    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_a_network_matches_diffusers(case: Case, probe: Callable[..., np.ndarray], reference, once) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    want = once(lambda: reference.run(case))
    assert_close(probe(case.model, case.network, **case.inputs), want, tolerance=1e-5)


@pytest.fixture(scope="module")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tiny.TinySD1], Path]:
    return cache(lambda model: tiny.write_folder(model, tmp_path_factory.mktemp("half"), dtype="float16"))


@pytest.fixture(scope="module")
def half(kernels: Kernels, half_folder: Callable[[tiny.TinySD1], Path]) -> Callable[[tiny.TinySD1], _native.Context]:
    """A tiny model with weights of f16, opened at its first use."""

    @cache
    def context(model: tiny.TinySD1) -> _native.Context:
        return _native.Context(str(half_folder(model)), data_dir=str(data_dir()), threads=1)

    return context


@pytest.fixture(scope="module")
def half_reference(tmp_path_factory: pytest.TempPathFactory):
    from reference_networks import Reference

    return Reference(tmp_path_factory.mktemp("half_reference"), "float16")


@pytest.mark.parametrize("case", [c for c in NETWORKS if c.model in (SD1, SD2, SDXL)], ids=lambda case: case.name)
def test_f16_weights(
    case: Case, half: Callable[[tiny.TinySD1], _native.Context], reference, half_reference, once: Callable[..., Any]
) -> None:
    """Our kernels unpack f16 exactly, so 1e-5 as with float32. ggml's operations also round each activation that meets
    such a weight: as many roundings, of the same 2^-11, as those of the weights, whose effect on this network the two
    references tell. Twice that effect, for it is one sample."""
    context = half(case.model)
    want = once(lambda: half_reference.run(case), "half")
    exact = context.info()["kernels"] != "reference"
    tolerance = 1e-5 if exact else 2 * relative_rmse(want, once(lambda: reference.run(case)))
    assert_close(_native.probe_run(context, case.network, **case.inputs), want, tolerance)


def test_single_file_names_are_those_that_diffusers_converts(native, tiny_folder) -> None:
    """The engine's table of original names against diffusers' own converters of single files."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    table = _native.probe_weights(native(SD1))
    single = {w["name"]: torch.zeros(1) for w in table}
    for prefix, component, convert, network in (
        ("model.diffusion_model.", "unet", convert_ldm_unet_checkpoint, UNet2DConditionModel),
        ("first_stage_model.", "vae", convert_ldm_vae_checkpoint, AutoencoderKL),
    ):
        config = network.load_config(tiny_folder(SD1) / component)
        mine = {w["name"]: w["diffusers_name"] for w in table if w["name"].startswith(prefix)}
        # Each original name carries its own number through the converter, so a swap of two would show.
        marked = {name: torch.full((1,), float(i)) for i, name in enumerate(mine)}
        if component == "vae":
            marked = {name: values.reshape(1, 1, 1, 1) for name, values in marked.items()}
        converted = convert(checkpoint=dict(marked), config=dict(config))
        got = {f"{component}.{name}": int(values.flatten()[0]) for name, values in converted.items()}
        assert got == {mine[name]: i for i, name in enumerate(mine)}
    assert len(single) == len(table)


@pytest.mark.parametrize("model", [SD2, SD2_V_DEEP, SDXL, SDXL_DEEP], ids=["sd2", "sd2-deep", "sdxl", "sdxl-deep"])
def test_single_files_of_the_tests_are_what_diffusers_converts(model: tiny.TinySD1) -> None:
    """The folder's tensors come back from the single file: names, fused projections and the transposed one."""
    import torch
    import transformers
    from diffusers.loaders import single_file_utils

    single = {name: torch.from_numpy(np.ascontiguousarray(v)) for name, v in tiny_sdxl.single_tensors(model).items()}
    parts, configs = tiny.components(model), tiny.configs(model)
    assert same(single_file_utils.convert_ldm_unet_checkpoint(dict(single), configs["unet"]), parts["unet"])
    assert same(single_file_utils.convert_ldm_vae_checkpoint(dict(single), configs["vae"]), parts["vae"])
    if model.text_2_width:
        prefix, component, width = "conditioner.embedders.1.model.", "text_encoder_2", model.text_2_width
        first = "conditioner.embedders.0.transformer."
        clip_l = {name.removeprefix(first): v for name, v in single.items() if name.startswith(first)}
        assert same(clip_l, parts["text_encoder"])
    else:  # the file has one layer more
        prefix, component, width = "cond_stage_model.model.", "text_encoder", model.text_width
    network = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**configs[component]))
    if f"{prefix}text_projection" not in single:  # diffusers reads the width from it
        single[f"{prefix}text_projection"] = torch.zeros((width, width))
    converted = single_file_utils.convert_open_clip_checkpoint(network, dict(single), prefix=prefix)
    assert same({name: converted[name] for name in parts[component]}, parts[component])


def same(got: dict[str, Any], want: dict[str, np.ndarray]) -> bool:
    """Whether both hold the same tensors under the same names."""
    return got.keys() == want.keys() and all(np.array_equal(got[name].numpy(), want[name]) for name in want)
