"""The parity ladder's networks against diffusers and transformers, live, in float32 and with f16 weights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tiny
from cases import NETWORKS, SD1, Case
from closeness import assert_close

from sdcpp_py import _native
from sdcpp_py.files import data_dir

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    from reference_networks import Reference

    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_a_network_matches_diffusers(case: Case, probe: Callable[..., np.ndarray], reference) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    assert_close(probe(case.model, case.network, **case.inputs), reference.run(case), tolerance=1e-5)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> _native.Context:
    folder = tiny.write_folder(SD1, tmp_path_factory.mktemp("half"), dtype="float16")
    return _native.Context(str(folder), data_dir=str(data_dir()), threads=2)


@pytest.mark.parametrize("case", [c for c in NETWORKS if c.model == SD1], ids=lambda case: case.name)
def test_f16_weights_stay_close(case: Case, half: _native.Context, reference) -> None:
    """ggml rounds activations to f16 in products with f16 weights: 5e-4 each, several times that in all."""
    assert_close(_native.probe_run(half, case.network, **case.inputs), reference.run(case), tolerance=5e-3)


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
