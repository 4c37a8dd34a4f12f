"""Claim: the points of a co-design front are what `nsa-autotune bench` measures for the same constants.

Runs `nsa-autotune codesign` on activations, then the command that it names for every point of the front, and compares
the sums of the same kernels. Without --activations the example is trained first, with dense attention on text. Writes
`results/<date>-<gpu>-codesign.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forward import RESULTS, gpu_slug, results_folder, without_places, write_page

from nsa_autotune.cli.console import errors
from nsa_autotune.db.records import utc_now
from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.errors import NSAError

TRAIN = (
    "--task text --attention dense --seq 8192 --batch 2 --steps 400 --hidden 512 --heads 16 --kv-heads 1 --head-dim 64"
)
SEARCH = "--seq 8192 --top-n 4,8,16,32 --windows 128,256,512 --select-blocks 32,64,128"
CONSTANTS = {
    "l'": "select_block_size",
    "n": "num_selected",
    "w": "window_size",
    "l": "compress_block_size",
    "d": "compress_stride",
}
Found = dict[str, Any]  # a design as codesign prints it, with what bench measured as bench_us


def run(words: Sequence[str], captured: bool = False) -> str:
    """Run a command with this interpreter; its standard output if captured. Raises NSAError if it failed."""
    pipe = subprocess.PIPE if captured else sys.stderr
    done = subprocess.run([sys.executable, *words], stdout=pipe, text=True, check=False)
    if done.returncode:
        raise NSAError("a command failed", {"command": shlex.join(words), "exit code": done.returncode})
    return done.stdout or ""


def sum_of_parts(rows: Sequence[Mapping[str, Any]], parts: Mapping[str, float]) -> float:
    """us that bench measured for the kernels whose times made the design's latency."""
    found = {row["work"].partition(",")[0]: row["median_us"] for row in rows if row["kind"] == "branch"}
    missing = sorted(name for name in parts if found.get(name) is None)
    if missing:
        raise NSAError("bench measured not all kernels of the design", {"missing": ", ".join(missing)})
    return sum(float(found[name]) for name in parts)


def measure(options: argparse.Namespace, folder: Path) -> list[Found]:
    """The designs, those on the front measured again."""
    activations = options.activations
    if activations is None:
        activations = folder / "layer.pt"
        train = [*shlex.split(TRAIN), "--device", options.device, "--out", str(folder / "run")]
        script = str(Path(__file__).resolve().parents[1] / "examples/train.py")
        run([script, *train, "--dump-activations", str(activations)])
    where = ["--db", f"sqlite:///{folder / 'designs.sqlite'}", "--device", options.device]
    searched = [*shlex.split(SEARCH), "--designs", str(options.designs), "--minutes", str(options.minutes)]
    words = ["-m", "nsa_autotune", "codesign", "--activations", str(activations), *searched, *where]
    designs: list[Found] = json.loads(run([*words, "--trials", str(options.trials), "--format", "json"], captured=True))
    for design in designs:
        if design["on_front"]:
            again = folder / "again.json"
            words = ["-m", *shlex.split(design["bench"].replace("nsa-autotune", "nsa_autotune", 1)), *where]
            run([*words, "--rounds", "10", "--out", str(again)])
            rows = json.loads(again.read_text(encoding="utf-8"))["rows"]
            design["bench_us"] = sum_of_parts(rows, design["parts_us"])
    return designs


def page(designs: Sequence[Found], facts: Mapping[str, str], command: str, date: str) -> str:
    """The dated page."""
    front = [design for design in designs if design["on_front"]]
    head = ("latency us", "bench us", "apart", "mass kept", "output error", "locality", *CONSTANTS)
    lines = [
        f"# Co-design on {facts['gpu']}, {date}",
        "",
        f"`{command}`; without a file of activations after `python examples/train.py {TRAIN}`, searched `{SEARCH}`.",
        "; ".join(f"{name} {value}" for name, value in facts.items() if name != "gpu") + ".",
        "",
        f"The front of {len(designs)} designs. latency: the sum of the kernels' medians in the tuner's races; bench:",
        "that of the same kernels as `nsa-autotune bench` measured them afterwards, by the command of that point.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " ---: |" * len(head),
    ]
    for design in front:
        again = design["bench_us"]
        cells = [f"{design['latency_us']:.1f}", f"{again:.1f}", f"{again / design['latency_us'] - 1:+.1%}"]
        cells += [f"{design['mass_kept']:.4f}", f"{design['output_error']:.4f}", f"{design['locality'] or 0.0:.2f}"]
        lines.append("| " + " | ".join([*cells, *(str(design[name]) for name in CONSTANTS.values())]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Search, measure again, print and write; 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activations", type=Path, help=".pt or .safetensors with q, k, v")
    parser.add_argument("--designs", type=int, default=16)
    parser.add_argument("--trials", type=int, default=20, help="for each kernel of a design")
    parser.add_argument("--minutes", type=float, default=10.0, help="after these no design begins")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
    try:
        with tempfile.TemporaryDirectory() as folder:
            facts, designs = current(options.device).to_dict(), measure(options, Path(folder))
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    date = utc_now()[:10]
    text = page(designs, facts, shlex.join(["python", "benchmarks/codesign.py", *without_places(arguments)]), date)
    print(text)
    data = json.dumps({"facts": facts, "designs": designs}, indent=1) + "\n"
    for path in write_page(options.folder / f"{date}-{gpu_slug(facts['gpu'])}-codesign", text, data):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
