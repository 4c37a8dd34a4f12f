"""Draws how many times faster than dense attention we are, by length: `python benchmarks/speedup.py`.

Reads the JSON of `training.py` and `decode.py` in results/; of a work and length the newest measurement counts. Dense
attention is the fastest library of the same run. Writes docs/speedup.svg; needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forward import RESULTS, results_folder

DOCS = Path(__file__).resolve().parents[1] / "docs"
GPU = "h200"
WORKS = {"forward": "forward", "backward": "backward", "step": "decode step in a CUDA graph, 512k tokens in all"}
PLAIN = (None, "problem")  # dtypes of a cache that are no fp8
DECODED_TOKENS = 512 * 1024  # batch times length of the decode line: 64 x 8k to 4 x 128k


@dataclass(frozen=True)
class Point:
    """How many times faster than the fastest dense attention of its run."""

    work: str
    tokens: int
    ratio: float
    date: str


def points_of(data: dict[str, Any]) -> Iterator[Point]:
    """The points of one file; head dim 128 only, so that a line compares like with like."""
    for row in [*data.get("rows", ()), *data.get("lines", ())]:
        problem, gains = row["problem"], row.get("speedup_over") or {}
        gains = gains.get("graph", gains)
        if row["work"] not in WORKS or not gains or problem["d_qk"] != 128 or problem.get("cache_dtype") not in PLAIN:
            continue
        if row["work"] == "step" and problem["batch"] * problem["seq_k"] != DECODED_TOKENS:
            continue
        yield Point(row["work"], problem["seq_k"], min(gains.values()), data["created"][:10])


def newest(points: Sequence[Point]) -> list[Point]:
    """One for each work and length, ordered by length."""
    found: dict[tuple[str, int], Point] = {}
    for point in sorted(points, key=lambda p: p.date):
        found[point.work, point.tokens] = point
    return sorted(found.values(), key=lambda p: (p.work, p.tokens))


def draw(points: Sequence[Point], file: Path, title: str) -> None:
    """One line for each work."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "speedup"  # equal data, equal file
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for work, label in WORKS.items():
        mine = [point for point in points if point.work == work]
        axis.plot([p.tokens // 1024 for p in mine], [p.ratio for p in mine], marker="o", label=label)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set_xscale("log", base=2)
    ticks = sorted({point.tokens // 1024 for point in points})
    axis.set_xticks(ticks, [f"{tick}k" for tick in ticks])
    axis.set(xlabel="tokens", ylabel="times faster than the fastest dense attention", title=title)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str]) -> int:
    """Draw and print the points; 1 if there is nothing to draw or no matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default=GPU, help="part of the results' file names")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    parser.add_argument("--out", type=Path, default=DOCS / "speedup.svg")
    options = parser.parse_args(arguments)
    files = [*options.folder.glob(f"*{options.gpu}-training.json"), *options.folder.glob(f"*{options.gpu}-decode.json")]
    points = newest([p for file in files for p in points_of(json.loads(file.read_text(encoding="utf-8")))])
    if not points:
        print(f"no results of {options.gpu} in {options.folder}", file=sys.stderr)
        return 1
    for point in points:
        print(f"{point.work:9} {point.tokens // 1024:5}k  {point.ratio:5.2f}x  {point.date}")
    try:
        draw(points, options.out, f"{options.gpu}, 64 heads, 4 kv heads, d 128, bfloat16")
    except ImportError:
        print("the plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
