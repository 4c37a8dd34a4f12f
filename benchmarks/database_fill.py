"""A SQLite file with many invented trials and winners, of the shape that tuning leaves behind; for database.py.

Families, problems and configs are real and legal; machines, times and failures are invented from a seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sqlite3
import statistics
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db import TuningStore
from nsa_autotune.errors import NSAError
from nsa_autotune.kernels import all_specs
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.spec import Config, KernelSpec, Problem, canonical_json, digest

GPUS = {"NVIDIA H100 80GB HBM3": "9.0", "NVIDIA H200": "9.0", "NVIDIA A100-SXM4-80GB": "8.0"}
GPUS |= {"NVIDIA L40S": "8.9", "NVIDIA B200": "10.0"}
VERSIONS = (  # driver, torch, triton, assembler, version of this tool; the last one is the newest
    ("570.1", "2.11.0", "3.6.0", "ptxas 12.8", "0.1.0"),
    ("580.2", "2.13.0", "3.9.0", "ptxas 13.0", "0.2.0"),
)
TRIALS_OF_A_RUN = 125  # measured for one problem on one machine with one set of versions
FINALISTS, CONFIGS = 8, 120
FAILURES = {"same_code": 100, "resource": 60, "compile": 30, "accuracy": 8, "timeout": 1, "crash": 1}  # of 200
FAIL_SHARE, NOISE, SAMPLES = 0.2, 0.01, 12
GRAPH_SHARE = 0.05  # of runs that time CUDA graphs
START = datetime(2025, 1, 1, tzinfo=UTC)
LENGTHS, HEADS, DIMS, LOCALITIES = [2**n for n in range(11, 18)], ((64, 4), (32, 8)), ((128, 128), (192, 128)), (0, 0.8)


SHARED = (
    *("fingerprint_id", "problem_id", "variant_id", "median_us", "p20_us", "p80_us", "samples_us", "policy"),
    *("resources", "created", "tool_version"),
)
TRIAL_COLUMNS = (
    *("id", "digest", "fingerprint_id", "problem_id", "variant_id", "status", "samples_us", "median_us"),
    *("p20_us", "p80_us", "reason", "kind", "provider", "stage", "resources", "max_error", "baseline_error"),
    *("policy", "environment", "created", "tool_version"),
)


@dataclass(frozen=True)
class Run:
    """What the trials of one run share."""

    key: tuple[int, int]  # row ids of machine and problem
    unit_us: float
    version: int
    policy: str


@dataclass(frozen=True)
class Filled:
    """What a file holds."""

    trials: int
    winners: int
    problems: int
    bytes: int


def fill(path: Path, num_trials: int, seed: int = 0) -> Filled:
    """Make the file, which must not exist; whole runs are written, so that there may be a few trials fewer."""
    TuningStore(f"sqlite:///{path}", import_shipped=False).close()  # the schema, by its migrations
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA synchronous=OFF")  # a crash costs a file that is made anew anyway
        machines = _insert_machines(db)
        runs = _runs(db, num_trials // (TRIALS_OF_A_RUN * len(machines)), random.Random(seed))
        number = itertools.count(1)
        for problem_id, tokens, variants in runs:
            for machine_id, (_, version) in machines.items():
                _insert_run(db, (machine_id, problem_id), tokens, variants[version], version, number)
    with closing(sqlite3.connect(path)) as db:
        trials, winners, problems = (
            db.execute(f"SELECT count(*) FROM nsa_{table}").fetchone()[0] for table in ("trials", "winners", "problems")
        )
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Filled(trials, winners, problems, path.stat().st_size)


def _insert_machines(db: sqlite3.Connection) -> dict[int, tuple[str, int]]:
    """Fingerprints; (GPU, index of its versions) by row id."""
    found = {}
    for row_id, (gpu, version) in enumerate(itertools.product(GPUS, range(len(VERSIONS))), start=1):
        driver, torch, triton, assembler, _ = VERSIONS[version]
        facts = {"gpu": gpu, "capability": GPUS[gpu], "driver": driver, "cuda": "12.8", "torch": torch}
        facts |= {"triton": triton, "assembler": assembler}
        row = (row_id, digest(facts), gpu, GPUS[gpu], canonical_json(facts))
        db.execute("INSERT INTO nsa_fingerprints VALUES (?,?,?,?,?)", row)
        found[row_id] = (gpu, version)
    return found


Variants = list[tuple[int, Config, float]]  # row id, config, its share of the time


def _runs(db: sqlite3.Connection, count: int, rng: random.Random) -> Iterator[tuple[int, int, list[Variants]]]:
    """Problems of all families in turns with their tokens; each with its variants of the old and the new template."""
    specs = [spec for spec in all_specs().values() if "batched" in spec.layouts]
    problems = {spec.family: list(_problems(spec, rng)) for spec in specs}
    variants: dict[str, list[Variants]] = {}
    ids = itertools.count(1)
    for number in range(count):
        spec, place = specs[number % len(specs)], number // len(specs)
        problem = problems[spec.family][place % len(problems[spec.family])]
        if place >= len(problems[spec.family]):
            problem = problem.replace(batch=1 << (place // len(problems[spec.family])))
        if spec.family not in variants:
            variants[spec.family] = _insert_variants(db, spec, problem, ids, rng)
        key, facts = spec.problem_key(problem), problem.to_dict()
        row = (number + 1, digest([spec.family, key, facts]), spec.family, key, canonical_json(facts))
        db.execute("INSERT INTO nsa_problems VALUES (?,?,?,?,?)", row)
        yield number + 1, problem.seq_k, variants[spec.family]


def _problems(spec: KernelSpec, rng: random.Random) -> Iterator[Problem]:
    shapes = list(itertools.product(LENGTHS, HEADS, DIMS, LOCALITIES))
    rng.shuffle(shapes)
    seen = set()
    for tokens, (heads, kv_heads), (d_qk, d_v), locality in shapes:
        shape: dict[str, Any] = {"seq_q": tokens, "seq_k": tokens, "num_q_heads": heads, "num_kv_heads": kv_heads}
        problem = Problem(**shape, d_qk=d_qk, d_v=d_v, locality=locality)
        try:
            spec.check_problem(problem)
        except NSAError:
            continue
        if spec.problem_key(problem) not in seen:
            seen.add(spec.problem_key(problem))
            yield problem


def _insert_variants(
    db: sqlite3.Connection, spec: KernelSpec, problem: Problem, ids: Iterator[int], rng: random.Random
) -> list[Variants]:
    space, configs = ConfigSpace(spec, problem), {}
    while len(configs) < CONFIGS and (config := space.sample(rng, configs)) is not None:
        configs[config_key(config)] = config
    found = []
    for template in ("an earlier template", template_digest(spec)):
        rows = [(next(ids), digest([spec.family, c, template]), spec.family, template, k) for k, c in configs.items()]
        db.executemany("INSERT INTO nsa_variants VALUES (?,?,?,?,?)", rows)
        shares = [rng.uniform(1, 4) for _ in rows]
        found.append([(r[0], c, share) for r, c, share in zip(rows, configs.values(), shares, strict=True)])
    return found


def _insert_run(
    db: sqlite3.Connection,
    key: tuple[int, int],
    tokens: int,
    variants: Variants,
    version: int,
    number: Iterator[int],
) -> None:
    """Search trials, finals and the winner of one problem on one machine."""
    rng = random.Random(repr(key))
    run = Run(
        key, tokens * rng.uniform(0.01, 0.02), version, "graph-cold" if rng.random() < GRAPH_SHARE else "eager-cold"
    )
    searched = [rng.choice(variants) for _ in range(TRIALS_OF_A_RUN - FINALISTS)]
    finalists = sorted(searched, key=lambda variant: variant[2])[:FINALISTS]
    rows = [_trial(next(number), run, v, "search", rng) for v in searched]
    rows += [_trial(next(number), run, v, "final", rng) for v in finalists]
    marks = ",".join("?" * len(rows[0]))
    db.executemany(f"INSERT INTO nsa_trials ({','.join(TRIAL_COLUMNS)}) VALUES ({marks})", rows)
    best = min((row for row in rows[-FINALISTS:]), key=lambda row: row[7])
    rivals = [
        {"config": v[1], "tied": i < 2, "blocks": 40, "log_ratio": 0.01 * i, "low": 0.01 * i - 0.01, "high": 0.01 * i}
        for i, v in enumerate(finalists)
    ]
    winner = {name: best[TRIAL_COLUMNS.index(name)] for name in SHARED}
    winner |= {"id": next(number), "trial_id": best[0], "library": "", "source": "local", "origin": ""}
    winner |= {"digest": _name("winner", best[0]), "verdict": "confirmed", "rivals": canonical_json(rivals)}
    winner |= {"default_median_us": best[7] * 1.5, "default_config": canonical_json(variants[0][1])}
    names = ",".join(winner)
    db.execute(f"INSERT INTO nsa_winners ({names}) VALUES ({','.join('?' * len(winner))})", list(winner.values()))


def _trial(
    number: int, run: Run, variant: tuple[int, Config, float], stage: str, rng: random.Random
) -> tuple[Any, ...]:
    """One row of nsa_trials, in the order of TRIAL_COLUMNS."""
    failed = stage == "search" and rng.random() < FAIL_SHARE
    created = (START + timedelta(days=365 * run.version, seconds=20 * number)).isoformat(timespec="microseconds")
    start = (number, _name("trial", number), *run.key, variant[0])
    end = (run.policy, _ENVIRONMENT, created, VERSIONS[run.version][-1])
    if failed:
        (status,) = rng.choices(list(FAILURES), list(FAILURES.values()))
        none = (None, None, None, f"{status}: what the compiler said, a line or two of it", "measured", "template")
        return (*start, status, "[]", *none, stage, None, None, None, *end)
    middle = run.unit_us * variant[2]
    samples = sorted(round(middle * rng.gauss(1, NOISE), 3) for _ in range(SAMPLES))
    times = (json.dumps(samples, separators=(",", ":")), statistics.median(samples), samples[2], samples[9], "")
    return (*start, "ok", *times, "measured", "template", stage, _RESOURCES, 0.01, 0.02, *end)


def _name(kind: str, number: int) -> str:
    return hashlib.sha256(f"{kind} {number}".encode()).hexdigest()[:20]


_ENVIRONMENT = canonical_json(
    {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 48, "power_w": 412.5, "throttled": "", "others": 0}
)
_RESOURCES = canonical_json(
    {
        "registers": 168,
        "shared_bytes": 98304,
        "spill_bytes": 0,
        "num_warps": 8,
        "occupancy": 0.25,
        "binary_sha": "0123456789abcdef0123",
        "launch_sha": "0123456789abcdef0123",
    }
)


def sizes(filled: Filled) -> Sequence[tuple[str, str]]:
    """A file's contents in words, for a page."""
    return (
        ("trials", f"{filled.trials:,}"),
        ("winners", f"{filled.winners:,}"),
        ("problems", f"{filled.problems:,}"),
        ("file", f"{filled.bytes / 1e6:,.0f} MB"),
    )
