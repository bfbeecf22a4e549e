"""What matrices are multiplied with, against hooks on the linear layers of diffusers' and transformers' networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from cases import NETWORKS, SD1
from closeness import assert_close

from sdcpp_py import SDContext, _native

pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


def hooked(network: Any) -> dict[str, np.ndarray]:
    """Sums of squares of what goes into each linear layer, filled while the network runs."""
    import torch

    sums: dict[str, np.ndarray] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: Any, inputs: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).double().numpy()
            sums[name] = sums.get(name, 0) + np.sum(x**2, axis=0)

        return see

    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    return sums


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["unet-square", "text"])
def test_sums_of_squares(name: str, tiny_folder: Callable[[tiny.TinySD1], Path]) -> None:
    """Both compute in float32; a sum over some hundred rows has their error, 1e-5 at the most."""
    import diffusers
    import torch
    import transformers

    case = next(case for case in NETWORKS if case.name.startswith(name) and case.model == SD1)
    folder = tiny_folder(SD1)
    inputs = {key: torch.from_numpy(np.asarray(value)) for key, value in case.inputs.items()}
    with torch.no_grad():
        if case.network == "denoise":
            part = "unet"
            network = diffusers.UNet2DConditionModel.from_pretrained(folder / part)
            want = hooked(network)
            network(inputs["latent"], inputs["time"], inputs["text"])
        else:
            part = "text_encoder"
            network = transformers.CLIPTextModel.from_pretrained(folder / part)
            want = hooked(network)
            network(inputs["ids"].long())

    with SDContext(folder, threads=1) as context:
        context._native.collect_importance(True)
        _native.probe_run(context._native, case.network, **case.inputs)
        got = context._native.importance()
        names = {w["name"]: w["diffusers_name"] for w in _native.probe_weights(context._native)}
    compared = 0
    for single, (sums, _) in got.items():
        theirs = names[single].removeprefix(f"{part}.")
        found = want.get(theirs, want.get(theirs.removeprefix("text_model.")))
        if found is not None:
            assert_close(sums, found, 1e-5)
            compared += 1
    assert compared >= (10 if part == "text_encoder" else 30)
