"""Launch every family's structural variants and every shipped winner once on small problems, for a tool that watches.

`make sanitize` runs it under compute-sanitizer. A winner's problem shrinks to BATCH, TOKENS and one kv head.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.golden import structural_configs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.errors import InvalidConfig
from nsa_autotune.kernels import all_specs, get_spec
from nsa_autotune.spec import Config, KernelSpec, Problem

TOKENS, BATCH = 1000, 4
WINNERS = Path(__file__).resolve().parents[2] / "tuning_db"
PROBLEMS = (
    Problem(batch=2, seq_q=193, seq_k=193, num_q_heads=16, num_kv_heads=1, d_qk=64, d_v=64),
    Problem(batch=4, seq_q=301, seq_k=301, num_q_heads=10, num_kv_heads=2, d_qk=96, d_v=64, layout="packed"),
    Problem(batch=4, seq_q=3, seq_k=1100, num_q_heads=10, num_kv_heads=2, d_qk=96, d_v=64, layout="paged"),
)
STEP = PROBLEMS[-1]
PROBLEMS = (
    *PROBLEMS,
    STEP.replace(seq_q=1, num_q_heads=32, page_size=16, cache_dtype="float8_e4m3fn"),
    STEP.replace(batch=2, seq_k=9000),  # blocks in two chunks, whose best are merged
)
Work = tuple[KernelSpec, Problem, Config]


def structures() -> Iterator[Work]:
    """Every structural variant on the problems that its family serves."""
    for spec in all_specs().values():
        for problem in (p for p in PROBLEMS if p.layout in spec.layouts):
            yield from ((spec, problem, config) for config in structural_configs(spec, problem))


def winners(major: int, minor: int) -> Iterator[Work]:
    """The shipped winners of all GPUs of a capability, each config of a family and head dim once."""
    file, seen = WINNERS / f"sm_{major}{minor}.jsonl", set()
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    for row in (row for row in rows if row.get("record") == "winner"):
        problem = Problem.from_dict(row["problem"])
        queries = problem.seq_q if problem.layout == "paged" else TOKENS
        small = replace(problem, seq_q=queries, seq_k=TOKENS, num_q_heads=problem.group_size, num_kv_heads=1)
        small = replace(small, batch=min(small.batch, BATCH))
        if get_spec(row["family"]).broken_constraint(small, row["config"]) is not None:  # kv heads side by side, say
            small = replace(small, num_q_heads=2 * problem.group_size, num_kv_heads=2)
        key = (row["family"], problem.d_qk, problem.d_v, json.dumps(row["config"], sort_keys=True))
        if key not in seen:
            seen.add(key)
            yield get_spec(row["family"]), small, row["config"]


def main(arguments: list[str]) -> int:
    """Launch and wait; a fault shows in the watching tool's report. `i/n`: every n-th; then families: only theirs."""
    part, parts = map(int, (arguments or ["0/1"])[0].split("/"))
    families = arguments[1:] or list(all_specs())
    work = [w for w in (*structures(), *winners(*torch.cuda.get_device_capability(0))) if w[0].family in families]
    launched = 0
    for spec, problem, config in work[part::parts]:
        try:
            make_inputs(spec, problem, "cuda:0").call(load(render(spec, problem, config)).launch)
        except InvalidConfig as error:
            print(f"left out: {error}")
            continue
        torch.cuda.synchronize()
        launched += 1
    print(f"launched {launched} variants of {len(families)} families")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
