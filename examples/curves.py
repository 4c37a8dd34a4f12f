"""Draws loss and accuracy of runs into one picture: python examples/curves.py RUN [RUN ...] --out curves.png."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def read_log(run: Path) -> list[dict[str, Any]]:
    """The records of a run, in order of steps."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def draw(runs: list[Path], file: Path) -> bool:
    """Write the picture; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")  # no window
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run in runs:
        records = read_log(run)
        for axis, name in zip(axes, ("loss", "accuracy"), strict=True):
            axis.plot([r["step"] for r in records], [r[name] for r in records], label=run.name)
    for axis, name in zip(axes, ("loss (nats)", "accuracy"), strict=True):
        axis.set_xlabel("step")
        axis.set_ylabel(name)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders that train.py wrote")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    options = parser.parse_args()
    if not draw(options.runs, options.out):
        parser.exit(1, "curves need matplotlib: pip install matplotlib\n")


if __name__ == "__main__":
    main()
