"""Stores diffusers' and transformers' answers to the cases of tests/cases.py.

    python tests/golden/make_networks.py

Needs torch, diffusers and transformers; run it when a case is added, and review what changes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import cases
import reference_networks


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        reference = reference_networks.Reference(Path(temporary))
        answers = {case.name: reference.run(case) for case in cases.NETWORKS}
    np.savez_compressed(HERE / "networks.npz", **answers, versions=np.array(reference_networks.versions()))


if __name__ == "__main__":
    main()
