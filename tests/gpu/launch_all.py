"""Launch every family's structural variants once on small problems, for a tool that watches: `make sanitize`."""

from __future__ import annotations

import sys

import torch

from nsa_autotune.bench.inputs import make_inputs
from nsa_autotune.codegen.golden import structural_configs
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.kernels import all_specs
from nsa_autotune.spec import Problem

PROBLEMS = (
    Problem(batch=2, seq_q=193, seq_k=193, num_q_heads=16, num_kv_heads=1, d_qk=64, d_v=64),
    Problem(batch=4, seq_q=301, seq_k=301, num_q_heads=10, num_kv_heads=2, d_qk=96, d_v=64, layout="packed"),
)


def main() -> int:
    """Launch and wait; a fault shows in the watching tool's report and exit code."""
    launched = 0
    for spec in all_specs().values():
        for problem in PROBLEMS:
            inputs = make_inputs(spec, problem, "cuda:0")
            for config in structural_configs(spec, problem):
                inputs.call(load(render(spec, problem, config)).launch)
                torch.cuda.synchronize()
                launched += 1
    print(f"launched {launched} variants of {len(all_specs())} families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
