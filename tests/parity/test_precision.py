"""bf16 products: as close to float32 as torch's own bfloat16 is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import NETWORKS, SD1, Case
from closeness import relative_rmse

from sdcpp_py import _native
from sdcpp_py.files import data_dir

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory):
    from reference_networks import Reference

    return Reference(tmp_path_factory.mktemp("exact"))


def torch_in_bfloat16(exact, case: Case) -> np.ndarray:
    """diffusers' answer with weights and activations of bfloat16."""
    parts = {name: copy.deepcopy(part).to(torch.bfloat16) for name, part in exact.open(case.model).items()}
    inputs = {
        name: torch.from_numpy(values).to(torch.bfloat16)
        if name in ("latent", "text", "image")
        else torch.from_numpy(values)
        for name, values in case.inputs.items()
    }
    with torch.no_grad():
        if case.network == "denoise":
            out = parts["unet"](inputs["latent"], inputs["time"], inputs["text"]).sample
        elif case.network == "vae_decode":
            out = parts["vae"].decode(inputs["latent"]).sample
        else:
            out = parts["vae"].encode(inputs["image"]).latent_dist.parameters
    return out.float().numpy()


@pytest.mark.parametrize(
    "case", [c for c in NETWORKS if c.model == SD1 and c.network != "text"], ids=lambda case: case.name
)
def test_bf16_loses_no_more_than_torch(case: Case, exact, tiny_folder: Callable[..., Path]) -> None:
    """Sums and norms stay float32 here, so that the error is smaller."""
    try:
        context = _native.Context(str(tiny_folder(case.model)), data_dir=str(data_dir()), threads=2, precision="bf16")
    except Exception as error:
        if "multiplies bf16" in str(error):
            pytest.skip(str(error))
        raise
    want = exact.run(case)
    ours = relative_rmse(_native.probe_run(context, case.network, **case.inputs), want)
    theirs = relative_rmse(torch_in_bfloat16(exact, case), want)
    assert ours <= theirs, f"{ours:.2e}, torch {theirs:.2e}"
