"""Claim: after a change of template that leaves machine code as it is, recertifying costs a tenth of the tuning.

Tunes into an empty database with an empty cache of Triton, then runs `nsa-autotune recertify` on it after every kernel
got one more line of comment, so that all of them are compiled anew; both with a copy of the project that ships no
winners. Writes `results/<date>-<gpu>-recertify.md` and `.json`. What the commands print goes to the standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from forward import RESULTS, gpu_slug, results_folder, without_places, write_page

from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import choose_specs, split
from nsa_autotune.cores import usable_cores
from nsa_autotune.db.records import utc_now
from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.errors import NSAError

ROOT = Path(__file__).resolve().parents[1]
COPIED, SHIPPED = ("nsa_autotune", "templates", "tuning_db"), "*.jsonl"
FAMILIES = "cmp_pool_fwd,cmp_mlp_fwd,cmp_attn_fwd,slc_select_fwd,slc_attn_fwd,win_attn_fwd,gate_sum_fwd,win_sum_fwd"
SIGNATURE_END = re.compile(r"^\):\n", re.MULTILINE)  # of kernels, and of launch functions
COMMENT = "    # one line more\n"
BAR = 0.1  # of the time of the first tuning


@dataclass(frozen=True)
class Cost:
    """Seconds of the two commands, from start to exit, and what the second said last."""

    tune_seconds: float
    recertify_seconds: float
    said: str

    @property
    def share(self) -> float:
        """Of the first tuning."""
        return self.recertify_seconds / self.tune_seconds


def retouch(templates: Path) -> None:
    """Put a line of comment into every kernel, behind its parameters."""
    for path in templates.rglob("*.j2"):
        text = path.read_text(encoding="utf-8")
        path.write_text(SIGNATURE_END.sub(lambda end: end[0] + COMMENT, text), encoding="utf-8")


def run(words: Sequence[str], root: Path, cache: Path) -> tuple[float, str]:
    """Seconds that a command of the package under `root` took, and its standard output; NSAError if it failed."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "nsa_autotune", *words]
    started = time.perf_counter()
    done = subprocess.run(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.perf_counter() - started
    print(done.stdout, file=sys.stderr)
    if done.returncode:
        raise NSAError("a command failed", {"command": shlex.join(words), "exit code": done.returncode})
    return seconds, done.stdout


def measure(options: argparse.Namespace) -> Cost:
    """Copy, tune, retouch the copy's templates, recertify."""
    families = [spec.family for spec in choose_specs(split([options.families]))]
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        where = ["--db", f"sqlite:///{here / 'tuned.sqlite'}", "--device", options.device]
        chosen = ["--families", ",".join(families), *where]
        shape = ["--preset", options.preset, "--seq", options.seq, "--budget", options.budget]
        copy, left_out = here / "copy", shutil.ignore_patterns("__pycache__", SHIPPED)
        for name in COPIED:
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=left_out)
        first, _ = run(["tune", *shape, *chosen], copy, here / "cache")
        retouch(copy / "templates")
        again, said = run(["recertify", *chosen], copy, here / "cache")
    return Cost(first, again, said)


def page(cost: Cost, facts: Mapping[str, str], command: str, date: str) -> str:
    """The dated page."""
    verdict = "met" if cost.share <= BAR else "missed"
    lines = [
        f"# Recertifying on {facts['gpu']}, {date}",
        "",
        f"`{command}`; {usable_cores()} cores.",
        "; ".join(f"{name} {value}" for name, value in facts.items() if name != "gpu") + ".",
        "",
        "| command | seconds, from start to exit | share of the first |",
        "| --- | ---: | ---: |",
        f"| nsa-autotune tune, nothing known and nothing compiled before | {cost.tune_seconds:.1f} | |",
        f"| nsa-autotune recertify, every kernel compiled anew | {cost.recertify_seconds:.1f} | {cost.share:.1%} |",
        "",
        f"Mark: {BAR:.0%}, {verdict}. What the second command printed:",
        "",
        "```",
        *cost.said.rstrip().splitlines(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Measure, print and write; 0 if the mark is met, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gqa16-d128")
    parser.add_argument("--seq", default="8k")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
    try:
        facts, cost = current(options.device).to_dict(), measure(options)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    date = utc_now()[:10]
    text = page(cost, facts, shlex.join(["python", "benchmarks/recertify.py", *without_places(arguments)]), date)
    data = json.dumps({"facts": facts, **asdict(cost)}, indent=1) + "\n"
    print(text)
    for path in write_page(options.folder / f"{date}-{gpu_slug(facts['gpu'])}-recertify", text, data):
        print(path)
    return int(cost.share > BAR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
