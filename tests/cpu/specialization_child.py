"""Run by test_gate_code in a process of its own, where Triton compiles: prints what the gate would compile once more.

Keys of Triton's cache are read off the hook that may skip a compilation; none takes place.
"""

from __future__ import annotations

import json
from typing import Any

from problems import served
from triton import knobs

from nsa_autotune.bench.accuracy import gate_problem
from nsa_autotune.codegen.compile import meta_arguments
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.codegen.target import absent_gpu, parse_target
from nsa_autotune.config import NSAConfig
from nsa_autotune.kernels import all_specs
from nsa_autotune.spec import Config, KernelSpec, Problem

LONG = Problem(seq_q=65536, seq_k=65536, num_q_heads=64, num_kv_heads=4, d_qk=128, d_v=128)
PROBLEMS = (
    LONG,
    LONG.replace(layout="packed", batch=3),
    LONG.replace(d_qk=192, nsa=NSAConfig(window_size=100)),
    LONG.replace(layout="paged", seq_q=1, batch=8, cache_dtype="float8_e4m3fn"),
)


def keys(spec: KernelSpec, problem: Problem, config: Config) -> list[str]:
    """What Triton would look up in its cache for a launch."""
    found: list[str] = []

    def note(**told: Any) -> bool:
        found.append(f"{told['fn'].name} {told['key']}")
        return True  # do not compile

    knobs.runtime.jit_cache_hook = note
    launch = load(render(spec, problem, config)).launch
    with absent_gpu(parse_target("cuda:90")):
        launch(**meta_arguments(spec, problem), warmup=True)
    return found


def main() -> None:
    """Print each problem whose gate has keys of its own, and how many kernels were looked at."""
    odd, count = [], 0
    for family, spec in all_specs().items():
        for problem in {served(spec, p): None for p in PROBLEMS if p.layout in spec.layouts or p is LONG}:
            config = spec.default_config(problem)
            own, gates = (keys(spec, length, config) for length in (problem, gate_problem(problem)))
            count += len(own)
            if sorted(own) != sorted(gates):
                odd.append(f"{family} {problem.layout} {problem.d_qk}: {set(own) ^ set(gates)}")
    print(json.dumps({"odd": odd, "count": count}))


if __name__ == "__main__":
    main()
