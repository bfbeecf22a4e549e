"""How far LoRAs of the past leave their trace: a thousand switches of the three that ship, in every mode.

    python tests/bench/drift.py drift.json

measures (some minutes; not again where the file is there), prints the table, and draws docs/images/drift.png.

After 1, 2, 5, 10, ... switches all LoRAs are dropped, and what is left is compared with a context that never had one:
the relative root mean square error of the weights that were touched, and that of the latent of a picture. The model
is the one that ships, its weights once in f16 and once in f32. Drawing needs matplotlib, which the package does not.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import shipped
from closeness import relative_rmse

from sdcpp_py import SDContext, _native
from sdcpp_py.files import shipped_model

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "drift.png"
TYPES: dict[str, type[np.floating]] = {"f16": np.float16, "f32": np.float32}
MODES = ("diff", "restore", "runtime")
LOOKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
RUN: dict[str, Any] = {"steps": 8, "seed": 7}


def latent(context: SDContext) -> np.ndarray:
    context.generate("a red heart", **RUN)
    return _native.probe_latent(context._native)


def measure(model: Path, mode: str) -> list[dict[str, float | int | bool]]:
    """One row per look."""
    options: dict[str, Any] = {"lora_dir": shipped_model().parent, "threads": 1}
    with SDContext(model, **options) as untouched:
        want, fingerprint = latent(untouched), untouched.fingerprint()
    rows: list[dict[str, float | int | bool]] = []
    with SDContext(model, lora_mode=mode, **options) as context:
        for i, state in enumerate(shipped.switches(max(LOOKS)), start=1):
            context.apply_loras(state)
            if i not in LOOKS:
                continue
            context.apply_loras({})
            rows.append(
                {
                    "switches": i,
                    "weights": context._native.lora_drift(),
                    "latent": relative_rmse(latent(context), want),
                    "same_weights": context.fingerprint() == fingerprint,
                }
            )
            context.apply_loras(state)
        context.reset_loras()
        assert context.fingerprint() == fingerprint, "reset_loras() left a trace"
        assert np.array_equal(latent(context), want), "reset_loras() left a trace"
    return rows


def measure_all() -> dict[str, list[dict[str, Any]]]:
    """By mode and type of the weights."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, dtype in TYPES.items():
            model = shipped.write_as(Path(folder) / f"{kind}.gguf", dtype)
            for mode in MODES:
                results[f"{mode} {kind}"] = measure(model, mode)
                print(mode, kind, results[f"{mode} {kind}"][-1], flush=True)
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """In Markdown: the drift of weights and of the latent, by switches."""
    lines = [
        "| switches | " + " | ".join(f"{name}: weights | latent" for name in results) + " |",
        "|---" * (1 + 2 * len(results)) + "|",
    ]
    for rows in zip(*results.values(), strict=True):
        cells = [f"{row[what]:.1e}" if row[what] else "0" for row in rows for what in ("weights", "latent")]
        lines.append(f"| {rows[0]['switches']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    colours = {"f16": "#c0392b", "f32": "#2563a8"}
    for axis, what, title in zip(
        axes, ("weights", "latent"), ("touched weights", "latent of a picture, 8 steps"), strict=True
    ):
        for name, rows in results.items():
            mode, kind = name.split()
            if mode == "diff":
                axis.plot(
                    [row["switches"] for row in rows], [row[what] for row in rows], "o-", color=colours[kind],
                    label=f"diff, weights in {kind}",
                )  # fmt: skip
        exact = [row for name, rows in results.items() if not name.startswith("diff") for row in rows]
        assert all(row[what] == 0 and row["same_weights"] for row in exact)
        axis.plot(
            LOOKS, [0] * len(LOOKS), "s-", color="#2e7d32", markersize=5, clip_on=False, zorder=5,
            label="restore and runtime, both types: not one bit",
        )  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("symlog", linthresh=1e-8, linscale=0.4)
        axis.set_ylim(0, 1e-1)
        ticks = [10.0**power for power in range(-8, 0)]
        axis.set_yticks([0, *ticks], ["0", *(f"$10^{{{power}}}$" for power in range(-8, 0))])
        axis.set_yticks([], minor=True)
        axis.set_xticks(LOOKS, [f"{look:,}" for look in LOOKS], rotation=45)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("switches before all LoRAs were dropped")
        axis.set_title(f"Left behind in the {title}", fontsize=11)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative RMSE (logarithmic above $10^{-8}$)")
    axes[0].legend(loc="upper left", fontsize=9)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file of what was measured")
    file = parser.parse_args().results
    if not file.exists():
        file.write_text(json.dumps(measure_all(), indent=1) + "\n", encoding="utf-8")
    results = json.loads(file.read_text(encoding="utf-8"))
    print(table(results))
    draw(results)


if __name__ == "__main__":
    main()
