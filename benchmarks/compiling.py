"""Claim: variants are compiled faster than a GPU measures them: at least 12 a second on 16 cores.

Compiles --count random variants of every family, mixed, into an empty cache, in --jobs processes as the tuner does, for
the GPU of --target, which need not be there. Writes `results/<date>-compiling-<target>.md` and `.json`.
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
from statistics import fmean

from forward import RESULTS, positive, results_folder, without_places, write_page

from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, choose_specs, split
from nsa_autotune.codegen.pool import CompileJob, CompileOutcome, compile_many
from nsa_autotune.codegen.target import parse_target
from nsa_autotune.cores import usable_cores
from nsa_autotune.db.records import utc_now
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.errors import NSAError
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.spec import Config, KernelSpec, Problem

BAR = 12  # variants a second, on 16 cores
FAMILIES = "gate_sum_fwd,cmp_pool_fwd,cmp_mlp_fwd,cmp_attn_fwd,slc_select_fwd,slc_attn_fwd,win_attn_fwd,win_sum_fwd"


@dataclass(frozen=True)
class Compiled:
    """What became of a family's variants, and the mean seconds that one of those that compiled took."""

    family: str
    statuses: dict[str, int]
    mean_seconds: float

    @property
    def count(self) -> int:
        """Variants."""
        return sum(self.statuses.values())


def draw(spec: KernelSpec, problem: Problem, count: int, rng: random.Random) -> list[CompileJob]:
    """Different legal configs at random; fewer if there are no more."""
    space, found = ConfigSpace(spec, problem), dict[str, Config]()
    while len(found) < count and (config := space.sample(rng, found)) is not None:
        found[config_key(config)] = config
    return [CompileJob(spec.family, problem.to_dict(), config) for config in found.values()]


def compile_all(
    specs: Sequence[KernelSpec], problem: Problem, options: argparse.Namespace
) -> tuple[list[Compiled], float]:
    """Compile and count; the seconds from the start of the processes to the last outcome."""
    rng = random.Random(0)
    jobs = [job for spec in specs for job in draw(spec, problem, options.count, rng)]
    rng.shuffle(jobs)
    by_family: dict[str, list[CompileOutcome]] = {spec.family: [] for spec in specs}
    started = time.perf_counter()
    for outcome in compile_many({spec.family: spec for spec in specs}, jobs, options.target, options.jobs):
        by_family[outcome.job.family].append(outcome)
    seconds = time.perf_counter() - started
    found = []
    for family, outcomes in by_family.items():
        taken = [o.resources.compile_ms / 1e3 for o in outcomes if o.resources is not None]
        found.append(Compiled(family, dict(Counter(o.status for o in outcomes)), fmean(taken) if taken else 0.0))
    return found, seconds


def page(
    found: Sequence[Compiled], seconds: float, facts: Mapping[str, str], command: str, jobs: int, date: str
) -> str:
    """The dated page."""
    count = sum(one.count for one in found)
    verdict = "met" if count / seconds >= BAR else "missed"
    lines = [
        f"# Compiling, {date}",
        "",
        f"`{command}`; {jobs} processes, {usable_cores()} cores.",
        "; ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        "",
        f"{count} variants in {seconds:.1f} s, the start of the processes included: {count / seconds:.1f} a second",
        f"(mark: {BAR}, {verdict}).",
        "",
        "| family | variants | outcomes | mean s of one |",
        "| --- | ---: | --- | ---: |",
    ]
    for one in found:
        outcomes = ", ".join(f"{count} {status}" for status, count in sorted(one.statuses.items()))
        lines.append(f"| {one.family} | {one.count} | {outcomes} | {one.mean_seconds:.2f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Compile, print and write; 0 if the mark is met, 1 if not, 2 after a mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="gqa16-d128")
    parser.add_argument("--seq", default="8k")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--count", type=positive, default=64, help="variants of a family")
    parser.add_argument("--jobs", type=positive, default=usable_cores(), help="processes")
    parser.add_argument("--target", default="cuda:90")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)  # fail before compiling, not after
    try:
        target, specs = parse_target(options.target), choose_specs(split([options.families]))
        (problem,) = ProblemChoice(options.preset, options.seq).problems(options.preset)
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            found, seconds = compile_all(specs, problem, options)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    facts = {name: value for name, value in for_target(target.name).to_dict().items() if value}
    date = utc_now()[:10]
    command = shlex.join(["python", "benchmarks/compiling.py", *without_places(arguments)])
    text = page(found, seconds, facts, command, options.jobs, date)
    print(text)
    numbers = {"jobs": options.jobs, "seconds": seconds, "families": [asdict(one) for one in found]}
    data = json.dumps({"facts": facts, **numbers}, indent=1)
    for path in write_page(options.folder / f"{date}-compiling-{target.name.replace(':', '-')}", text, data + "\n"):
        print(path)
    return int(sum(one.count for one in found) < BAR * seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
