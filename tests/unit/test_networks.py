"""Each network of the tiny models against diffusers' stored answers; tests/parity asks diffusers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import NETWORKS, Case
from closeness import assert_close

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "networks.npz")


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)
def test_a_network_matches_diffusers_stored_answer(case: Case, probe: Callable[..., np.ndarray]) -> None:
    """Float32 on both sides: what remains is the order of sums, some 1e-6 over a few dozen layers."""
    assert_close(probe(case.model, case.network, **case.inputs), GOLDEN[case.name], tolerance=1e-5)
