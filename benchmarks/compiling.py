"""Claim: variants are compiled faster than a GPU measures them: at least 12 a second on 16 cores.

Compiles --count random variants of every family into an empty cache, in --jobs processes as the tuner does, for the GPU
of --target, which need not be there. Writes `results/<date>-compiling-<target>.md` and `.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from forward import RESULTS, without_places, write_page

from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, choose_specs, split
from nsa_autotune.codegen.pool import CompileJob, compile_many
from nsa_autotune.codegen.target import parse_target
from nsa_autotune.db.records import utc_now
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import NSAError
from nsa_autotune.search.space import ConfigSpace
from nsa_autotune.spec import KernelSpec, Problem

FAMILIES = "gate_sum_fwd,cmp_pool_fwd,cmp_mlp_fwd,cmp_attn_fwd,slc_select_fwd,slc_attn_fwd,win_attn_fwd,win_sum_fwd"


@dataclass(frozen=True)
class Compiled:
    """What became of a family's variants, and the seconds from the first job to the last outcome."""

    family: str
    seconds: float
    statuses: dict[str, int]

    @property
    def count(self) -> int:
        """Variants."""
        return sum(self.statuses.values())


def draw(spec: KernelSpec, problem: Problem, count: int) -> list[CompileJob]:
    """Different legal configs at random, the same ones each time."""
    configs = list(ConfigSpace(spec, problem).configs())
    chosen = random.Random(0).sample(configs, min(count, len(configs)))
    return [CompileJob(spec.family, problem.to_dict(), config) for config in chosen]


def compile_family(spec: KernelSpec, problem: Problem, options: argparse.Namespace) -> Compiled:
    """Compile and count; starting the processes is part of the time."""
    jobs = draw(spec, problem, options.count)
    started = time.perf_counter()
    outcomes = Counter(o.status for o in compile_many({spec.family: spec}, jobs, options.target, options.jobs))
    found = Compiled(spec.family, time.perf_counter() - started, dict(outcomes))
    errors().print(f"{spec.family}: {found.count} in {found.seconds:.1f} s", markup=False)
    return found


def page(found: Sequence[Compiled], facts: Mapping[str, str], command: str, jobs: int, date: str) -> str:
    """The dated page."""
    lines = [
        f"# Compiling, {date}",
        "",
        f"`{command}`; {jobs} processes, {os.cpu_count()} cores.",
        "; ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        "| family | variants | seconds | a second | outcomes |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for one in found:
        outcomes = ", ".join(f"{count} {status}" for status, count in sorted(one.statuses.items()))
        lines.append(f"| {one.family} | {one.count} | {one.seconds:.1f} | {one.count / one.seconds:.1f} | {outcomes} |")
    count, seconds = sum(one.count for one in found), sum(one.seconds for one in found)
    lines.append(f"| all | {count} | {seconds:.1f} | {count / seconds:.1f} | |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Compile, print and write; 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gqa16-d128")
    parser.add_argument("--seq", default="8k")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--count", type=int, default=64, help="variants of a family")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--target", default="cuda:90")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before compiling, not after
    try:
        target, specs = parse_target(options.target), choose_specs(split([options.families]))
        (problem,) = ProblemChoice(options.preset, options.seq).problems(options.preset)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            found = [compile_family(spec, problem, options) for spec in specs]
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    facts = {name: value for name, value in for_target(target.name).to_dict().items() if value}
    date = utc_now()[:10]
    command = shlex.join(["python", "benchmarks/compiling.py", *without_places(arguments)])
    text = page(found, facts, command, options.jobs, date)
    print(text)
    data = json.dumps({"facts": facts, "jobs": options.jobs, "families": [asdict(one) for one in found]}, indent=1)
    for path in write_page(options.folder / f"{date}-compiling-{target.name.replace(':', '-')}", text, data + "\n"):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
