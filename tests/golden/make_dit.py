"""Stores diffusers' and transformers' answers to the cases of tests/cases_dit.py.

    python tests/golden/make_dit.py

Needs torch, diffusers and transformers; run it when a case is added, and review what changes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cases_dit
import reference_dit
import reference_networks


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        answers = {case.name: reference_dit.truth(case.model, folder).network(case) for case in cases_dit.NETWORKS}
        for run in [*cases_dit.RUNS, cases_dit.REDUX]:
            answers[f"run-{run.name}"] = reference_dit.truth(run.model, folder).run(run)
    np.savez_compressed(HERE / "dit.npz", **answers, versions=np.array(reference_networks.versions()))


if __name__ == "__main__":
    main()
