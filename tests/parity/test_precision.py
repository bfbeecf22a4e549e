"""bf16 products, which are the default where the processor has them: as close to float32 as torch's own bfloat16 is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import kernel_sets
import pytest
from cases import NETWORKS, Case
from closeness import relative_rmse
from kernel_sets import Kernels

from sdcpp_py import _native
from sdcpp_py.files import data_dir

torch = pytest.importorskip("torch", reason="parity compares with torch: pip install torch '.[parity]'")
pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory):
    from reference_networks import Reference

    return Reference(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize("bf16", kernel_sets.runnable("bf16"), ids=str)
@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_bf16_loses_no_more_than_torch(
    case: Case, bf16: Kernels, exact, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums and norms stay float32 here, so that the error is smaller."""
    monkeypatch.setenv("SDCPP_KERNELS", bf16.name)
    context = _native.Context(str(tiny_folder(case.model)), data_dir=str(data_dir()), threads=1, precision="bf16")
    want = exact.run(case)
    ours = relative_rmse(_native.probe_run(context, case.network, **case.inputs), want)
    theirs = relative_rmse(exact.run(case, torch.bfloat16), want)
    assert 1e-4 < ours <= theirs, f"{ours:.2e}, torch {theirs:.2e}"
