"""Imbalance while a model is trained: ``python benchmarks/curves.py LABEL=metrics.csv … --picture curves.png``.

Draws what the callback `IndexHealth` and a CSVLogger have left of one or more runs.
"""

import argparse
import csv
from pathlib import Path

import common  # noqa: F401, finds the package
from matplotlib.figure import Figure

from lightning_knnmt.evaluation.report import table

PANELS = {
    "val/loss": "negative log-likelihood per token (nats)",
    "val/imbalance_factor": "imbalance factor",
    "val/mean_resultant_length": "mean resultant length",
}


def read_run(path: Path) -> list[dict[str, float]]:
    """The validations of a run, in the order of its steps."""
    with path.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/imbalance_factor")]
    if not rows:
        raise ValueError(f"{path} has no val/imbalance_factor; train with the callback IndexHealth and a CSVLogger")
    return [{name: float(row[name]) for name in ("step", *PANELS)} for row in rows]


def draw(runs: dict[str, list[dict[str, float]]], path: Path) -> None:
    """One panel for each measure, over steps."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        for run, rows in runs.items():
            axes.plot([row["step"] + 1 for row in rows], [row[name] for row in rows], marker=".", label=run)
        axes.set(xlabel="optimizer steps", ylabel=label, ylim=(1 if name == "val/imbalance_factor" else 0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    """Print the first, middle and last validation of each run, and draw all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=FILE")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args(arguments)
    runs = {label: read_run(Path(file)) for label, file in (run.rsplit("=", 1) for run in options.runs)}
    rows = [["run", "step", "loss per token", "imbalance factor", "mean resultant length"]]
    for label, found in runs.items():
        for number in sorted({0, len(found) // 2, len(found) - 1}):
            row = found[number]
            rows.append([label, f"{row['step'] + 1:,.0f}", *(f"{row[name]:.2f}" for name in PANELS)])
    print(table(rows))
    if options.picture is not None:
        draw(runs, options.picture)


if __name__ == "__main__":
    main()
