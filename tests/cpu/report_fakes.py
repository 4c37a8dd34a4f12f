"""A database with made-up searches for the report: real families and problems, times drawn by seed, never measured."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sqlalchemy import update

from nsa_autotune.db.models import ProblemRow, VariantRow
from nsa_autotune.db.records import TrialRecord, WinnerRecord
from nsa_autotune.db.store import TuningStore
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.space import ConfigSpace
from nsa_autotune.spec import Config, Problem

FINGERPRINT = {
    "gpu": "NVIDIA H100 80GB HBM3",
    "capability": "9.0",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
}
DIGEST = "0" * 20
HOSTILE = "<script>document.title='hit'</script>\"'&</style>"
NO_LIBRARY: dict[str, object] = {"library": "", "library_median_us": None}
FIRST_DAY = datetime(2026, 11, 20, tzinfo=UTC)


def made_up_us(config: Config, base_us: float, rng: random.Random) -> float:
    """A time to which num_warps matters most, the tile a little, and chance hardly."""
    warps = abs(int(config.get("num_warps", 4)) - 4)
    return base_us * (1 + 0.2 * warps + 0.01 * int(config.get("num_stages", 2))) * rng.uniform(1, 1.02)


def search_records(
    family: str = "win_attn_fwd",
    problem: Problem | None = None,
    count: int = 60,
    seed: int = 0,
    policy: str = "eager-cold",
) -> list[TrialRecord]:
    """`count` trials of one problem, oldest first: one in ten fails."""
    spec, rng = get_spec(family), random.Random(seed)
    problem = problem or Problem()
    space, seen, records = ConfigSpace(spec, problem), set[str](), []
    for number in range(count):
        config = space.sample(rng, seen) or spec.default_config(problem)
        failed = number % 10 == 7
        time_us = None if failed else made_up_us(config, problem.seq_q / 32, rng)
        records.append(
            TrialRecord(
                fingerprint=FINGERPRINT,
                family=family,
                problem=problem.to_dict(),
                problem_key=spec.problem_key(problem),
                config=config,
                template_digest=DIGEST,
                status="compile" if failed else "ok",
                reason="made-up failure" if failed else "",
                samples_us=() if time_us is None else (time_us,),
                median_us=time_us,
                p20_us=time_us,
                p80_us=time_us,
                policy=policy,
                created=(FIRST_DAY + timedelta(seconds=number)).isoformat(timespec="microseconds"),
            )
        )
    return records


def winner_record(family: str = "win_attn_fwd", problem: Problem | None = None, **changes: object) -> WinnerRecord:
    """A winner in the default config that took 1 ms, with one tied rival and one that lost."""
    spec, problem = get_spec(family), problem or Problem()
    config = spec.default_config(problem)
    rivals = [
        {
            "config": {**config, "num_warps": 8},
            "tied": True,
            "blocks": 5,
            "log_ratio": 0.002,
            "low": -0.01,
            "high": 0.01,
        },
        {"config": {**config, "num_warps": 2}, "tied": False, "blocks": 5, "log_ratio": 0.2, "low": 0.1, "high": 0.3},
    ]
    record = WinnerRecord(
        fingerprint=FINGERPRINT,
        family=family,
        problem=problem.to_dict(),
        problem_key=spec.problem_key(problem),
        config=config,
        template_digest=DIGEST,
        median_us=1000.0,
        p20_us=990.0,
        p80_us=1020.0,
        samples_us=(990.0, 1000.0, 1020.0),
        default_config=config,
        default_median_us=1500.0,
        library="flex_attention",
        library_median_us=2000.0,
        verdict="confirmed",
        rivals=tuple(rivals),
        created="2026-11-21T00:00:00.000000+00:00",
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def hostile_winner() -> WinnerRecord:
    """A winner whose every free text tries to leave its place in a page."""
    names = dict.fromkeys(("gpu", "driver", "cuda", "torch", "triton", "assembler"), HOSTILE)
    return replace(
        winner_record(),
        fingerprint={**names, "capability": "9.0"},
        family=HOSTILE,
        library=HOSTILE,
        policy=HOSTILE,
        tool_version=HOSTILE,
        config={HOSTILE: HOSTILE},
        default_config={HOSTILE: HOSTILE},
        rivals=(),
    )


def fill(store: TuningStore, count: int = 60) -> None:
    """Searches of `count` trials of three problems, two policies, their winners, and hostile texts."""
    long = Problem(seq_q=65536, seq_k=65536)
    for family, problem, policy in (
        ("win_attn_fwd", Problem(), "eager-cold"),
        ("slc_attn_fwd", long, "eager-cold"),
        ("cmp_attn_fwd", long.replace(dtype="float16"), "graph-warm"),
    ):
        store.add_trials(search_records(family, problem, count, policy=policy))
        store.set_winner(winner_record(family, problem, policy=policy, median_us=problem.seq_q / 5, **NO_LIBRARY))
    store.set_winner(winner_record("gate_sum_fwd", median_us=250.0, rivals=(), **NO_LIBRARY))
    store.set_winner(replace(hostile_winner(), family="hostile"))
    store.add_trials([replace(r, family="hostile", reason=HOSTILE) for r in search_records(count=count // 2)])
    with store.transaction(write=True) as session:  # as earlier versions took them
        for table in (ProblemRow, VariantRow):
            session.execute(update(table).where(table.family == "hostile").values(family=HOSTILE))
