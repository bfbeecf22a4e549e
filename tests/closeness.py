"""How close two results are, as every tolerance of the tests is stated: relative root mean square error."""

from __future__ import annotations

import numpy as np


def relative_rmse(got: np.ndarray, want: np.ndarray) -> float:
    """|got - want| / |want| in float64, both as root mean squares."""
    got64, want64 = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got64.shape == want64.shape, f"shape {got64.shape}, not {want64.shape}"
    return float(np.sqrt(np.mean((got64 - want64) ** 2) / np.mean(want64**2)))


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Fails where the relative RMSE is above the tolerance, or is no number."""
    error = relative_rmse(got, want)
    assert error <= tolerance, f"relative RMSE {error:.3e}, above {tolerance:.1e}"
