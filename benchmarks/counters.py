"""Claim: of each kernel, as the dispatcher serves it, the hardware's counters name the unit that it waits for.

Runs itself under Nsight Compute, which replays one launch of every family and locality (caches flushed before, clocks
left alone), and writes `results/<date>-<gpu>-counters.md` and `.json`: time, the busiest units, why warps wait.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from forward import RESULTS, gpu_slug, results_folder, without_places, write_page

from nsa_autotune.cli.bench import say
from nsa_autotune.cli.bench_entries import Work, branch_entries
from nsa_autotune.cli.bench_run import check_device, open_bench
from nsa_autotune.cli.console import errors
from nsa_autotune.cli.options import ProblemChoice, choose_specs, split
from nsa_autotune.dispatch.fingerprint import current
from nsa_autotune.errors import InvalidInput, NSAError

PRESET, LOCALITIES = "gqa16-d128", ("0", "0.8")
FAMILIES = (
    "cmp_attn_fwd,slc_select_fwd,slc_attn_fwd,win_attn_fwd,win_sum_fwd,"
    "cmp_attn_bwd_dq,cmp_attn_bwd_dkv,slc_attn_bwd_dq,slc_attn_bwd_dkv"
)
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
TIME = "gpu__time_duration.sum"
BUSY = ".avg.pct_of_peak_sustained_"  # a unit's share of what it can do, while active or in all
WAITS, PER_ISSUE = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
SUMMARIES = ("gpu__", "sm__throughput", "sm__memory_throughput", "sm__warps_active", "sm__instruction_throughput")
TO_NS = {"ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
CUT = "arange"  # the kernel of torch.arange, launched before each call, so that the list of kernels can be cut
MARK = "nsa-counters:"  # before a launch's name, on the child's standard output
SHOWN, SHORT_MS = 4, 0.05  # items of a cell; kernels that the page leaves out


@dataclass(frozen=True)
class Launch:
    """One profiled kernel: its time, the units' shares of their peak, and the cycles a warp waits for each reason."""

    name: str
    kernel: str
    ms: float
    busy: dict[str, float] = field(default_factory=dict)  # percent
    waits: dict[str, float] = field(default_factory=dict)  # cycles an instruction


def main(arguments: Sequence[str]) -> int:
    """Profile and write; 2 after a mistake."""
    options = parse(arguments)
    try:
        if options.launch:
            launch_all(options)
            return 0
        where = check_device(options.device)
        choose_specs(split([options.families]))  # a slip of the keyboard is told before anything is done
        options.folder.mkdir(parents=True, exist_ok=True)  # fail before measuring, not after
        found = read_launches(profile(arguments))
        command = shlex.join(["python", "benchmarks/counters.py", *without_places(arguments)])
        for path in write_results(found, current(str(where)).to_dict(), command, options.folder):
            print(path)
    except NSAError as error:
        errors().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 2
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; all have defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=PRESET)
    parser.add_argument("--seq", default="64k")
    parser.add_argument("--families", default=FAMILIES)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--db", default=None)
    parser.add_argument("--untuned", action="store_true", help="default configs only")
    parser.add_argument("--folder", type=results_folder, default=RESULTS)
    parser.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # the child's part
    return parser.parse_args(arguments)


def launch_all(options: argparse.Namespace) -> None:
    """Launch every family twice on its inputs, the second time inside the profiled range."""
    where = check_device(options.device)
    problems = [p for name in split([options.preset]) for p in ProblemChoice(name, options.seq).problems(PRESET)]
    with open_bench(where, db=options.db, untuned=options.untuned, rounds=5, say=say) as bench:
        for problem in problems:
            work = Work(problem.replace(locality=0.0), tuple(map(float, LOCALITIES)))
            for spec in choose_specs(split([options.families])):
                for entry in branch_entries(spec, work, bench):
                    call = entry.prepare()
                    call()  # compiles
                    torch.cuda.synchronize(where)
                    where_at = "" if entry.locality is None else f", locality {entry.locality:g}"
                    print(f"{MARK}{spec.family}, {problem.seq_k} tokens{where_at}", flush=True)
                    torch.cuda.profiler.start()
                    torch.arange(2, device=where)
                    call()
                    torch.cuda.synchronize(where)
                    torch.cuda.profiler.stop()
                    del call


def profile(arguments: Sequence[str]) -> str:
    """What Nsight Compute prints of this script's launches, as CSV among other lines."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise InvalidInput("counters are read by Nsight Compute", {"ncu": "not found"}, "Put `ncu` on the PATH.")
    sections = [word for name in SECTIONS for word in ("--section", name)]
    how = ["--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"]
    child = [sys.executable, __file__, *arguments, "--launch"]
    done = subprocess.run([ncu, *how, *sections, *child], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        values = {"exit code": done.returncode, "said": done.stdout[-500:]}
        raise InvalidInput("Nsight Compute could not profile the launches", values, "It may lack permission.")
    return done.stdout


def read_launches(text: str) -> list[Launch]:
    """The profiled kernels, each with the name of its call; names are printed in the order of the calls."""
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        raise InvalidInput("Nsight Compute profiled no launch", {"said": text[-500:]}, "See what it printed above.")
    names = iter([line.removeprefix(MARK) for line in lines[:first] if line.startswith(MARK)])
    units, *rows = csv.DictReader(line for line in lines[first:] if line.startswith('"'))
    name, found = "", []
    for row in rows:
        if CUT in row["Kernel Name"]:
            name = next(names, "")
        else:
            found.append(read_launch(name, row, units))
    return found


def read_launch(name: str, row: Mapping[str, str], units: Mapping[str, str]) -> Launch:
    """One line of the CSV."""
    numbers = {key: number for key, value in row.items() if (number := figure(value)) is not None}
    ms = numbers[TIME] * TO_NS[units[TIME]] / 1e6
    busy: dict[str, float] = {}
    for key, value in numbers.items():
        unit = key.partition(".")[0]
        if BUSY in key and not unit.startswith(SUMMARIES):  # those speak of several units, or of none
            busy[unit] = max(value, busy.get(unit, 0.0))
    waits = {
        key.removeprefix(WAITS).removesuffix(PER_ISSUE): value
        for key, value in numbers.items()
        if key.startswith(WAITS) and key.endswith(PER_ISSUE)
    }
    return Launch(name, row["Kernel Name"], ms, busy, waits)


def figure(text: str) -> float | None:
    """What a cell says, None if it is no finite number."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def ranked(shares: Mapping[str, float], count: int = SHOWN) -> str:
    """The largest, as a cell."""
    best = sorted(shares.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{name} {value:.3g}" for name, value in best)


def markdown(launches: Iterable[Launch], fingerprint: Mapping[str, str], command: str, date: str) -> str:
    """The page."""
    facts = [*fingerprint.items(), ("command", command), ("date", date)]
    lines = [f"# Counters on {fingerprint['gpu']}, {date[:10]}", "", "| what | found |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    lines += [
        "",
        "Percent of a unit's peak rate, the busiest first; cycles that a warp waits for an instruction, by reason.",
        "One launch each, replayed by Nsight Compute with flushed caches, so the times are not those of a benchmark.",
        f"Kernels of less than {SHORT_MS} ms stand in the JSON file only.",
        "",
        "| launch | kernel | ms | busiest units, % of peak | what warps wait for, cycles |",
        "| --- | --- | ---: | --- | --- |",
    ]
    lines += [
        f"| {one.name} | {one.kernel} | {one.ms:.3f} | {ranked(one.busy)} | {ranked(one.waits)} |"
        for one in launches
        if one.ms >= SHORT_MS
    ]
    return "\n".join(lines) + "\n"


def write_results(launches: Sequence[Launch], fingerprint: Mapping[str, str], command: str, folder: Path) -> list[Path]:
    """The dated page and the JSON behind it; returns their paths."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    stem = folder / f"{date[:10]}-{gpu_slug(fingerprint['gpu'])}-counters"
    data = {"fingerprint": dict(fingerprint), "command": command, "created": date, "launches": [*map(asdict, launches)]}
    return write_page(stem, markdown(launches, fingerprint, command, date), json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
