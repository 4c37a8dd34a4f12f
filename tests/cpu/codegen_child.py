"""Run by test_codegen in a process of its own, where Triton compiles: prints one JSON object with what it saw.

`python codegen_child.py compile TEMPLATES` compiles and runs jobs in the pool; TEMPLATES is a folder with two mistakes.
`python codegen_child.py forever` runs jobs that never end, until it is interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import nsa_autotune.codegen.render as render_module
from nsa_autotune.codegen.compile import compile_variant
from nsa_autotune.codegen.pool import CompileJob, compile_many
from nsa_autotune.config import NSAConfig
from nsa_autotune.errors import KernelError
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Config, KernelSpec, Problem, Value

PROBLEM = Problem(batch=1, seq_q=256, seq_k=256, num_q_heads=4, num_kv_heads=1, d_qk=64, d_v=64)


def default(family: str) -> Config:
    """The default config of the problem."""
    return get_spec(family).default_config(PROBLEM)


def message(family: str) -> str:
    """What the compiler's error says."""
    try:
        compile_variant(get_spec(family), PROBLEM, default(family))
    except KernelError as error:
        return str(error)
    return "compiled"


def saboteur(act: Callable[[], object]) -> KernelSpec:
    """gate_sum_fwd, but computing its constants does something terrible."""
    honest = get_spec("gate_sum_fwd")

    def constants(problem: Problem, config: Config) -> dict[str, Value]:
        act()
        return honest.constants(problem, config)

    return replace(honest, constants=constants)


def hang_with_a_child() -> None:
    """As a compiler whose assembler hangs."""
    subprocess.run(["sleep", "1000"], check=False)


def raise_bug() -> None:
    """A bug of ours."""
    raise ZeroDivisionError("a bug")


def run_pool() -> list[dict[str, Any]]:
    """Every way a job can end, in two processes."""
    problem = PROBLEM.to_dict()
    specs = {
        "gate_sum_fwd": get_spec("gate_sum_fwd"),
        "cmp_attn_fwd": get_spec("cmp_attn_fwd"),
        "win_attn_fwd": replace(get_spec("win_attn_fwd"), family="no_such_template"),
        "killed": saboteur(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        "hanging": saboteur(hang_with_a_child),
        "buggy": saboteur(raise_bug),
    }
    small = default("gate_sum_fwd")
    jobs = [
        CompileJob("hanging", problem, small),
        CompileJob("killed", problem, small),
        CompileJob("gate_sum_fwd", problem, small),
        CompileJob("gate_sum_fwd", problem, {**small, "BLOCK": 7}),
        CompileJob("win_attn_fwd", problem, default("win_attn_fwd")),
        CompileJob("buggy", problem, small),
    ]
    outcomes = [*compile_many(specs, jobs, "cuda:90", processes=2, timeout_s=10.0)]
    wide = PROBLEM.replace(d_qk=128, d_v=128).to_dict()
    large = {**default("cmp_attn_fwd"), "BLOCK_N": 128, "num_stages": 3}  # fits sm_90, but not sm_86
    outcomes += compile_many(specs, [CompileJob("cmp_attn_fwd", wide, large)], "cuda:86")
    return [
        {
            "family": outcome.job.family,
            "status": outcome.status,
            "reason": outcome.reason,
            "registers": outcome.resources.registers if outcome.resources else None,
        }
        for outcome in outcomes
    ]


def left_over() -> list[str]:
    """Command lines of the processes that this one started, directly or not, and that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue
        marker = f"CODEGEN_CHILD={os.environ['CODEGEN_CHILD']}".encode()
        if marker in environment and int(folder.name) != os.getpid():
            found.append(command)
    return found


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1] == "forever":
        job = CompileJob("gate_sum_fwd", PROBLEM.to_dict(), default("gate_sum_fwd"))
        print("started", flush=True)
        for _ in compile_many({"gate_sum_fwd": saboteur(lambda: time.sleep(1000))}, [job] * 3, processes=2):
            pass
    gate_sum = get_spec("gate_sum_fwd")
    seen: dict[str, Any] = {
        target: asdict(compile_variant(gate_sum, PROBLEM, default("gate_sum_fwd"), target))
        for target in ("cuda:80", "cuda:90")
    }
    union = {**default("slc_attn_fwd"), "loop_order": "union", "BLOCK_T": 4}
    seen["union"] = asdict(compile_variant(get_spec("slc_attn_fwd"), PROBLEM, union))
    one_block = PROBLEM.replace(nsa=NSAConfig(num_selected=1, num_initial=0, num_local=1))
    select = {**get_spec("slc_select_fwd").default_config(one_block), "BLOCK_T": 1}
    seen["one_block"] = asdict(compile_variant(get_spec("slc_select_fwd"), one_block, select))
    window = default("win_attn_fwd")
    seen["window"] = asdict(compile_variant(get_spec("win_attn_fwd"), PROBLEM, window))
    seen["amd"] = asdict(compile_variant(get_spec("win_attn_fwd"), PROBLEM, window, "hip:gfx942"))
    (capped,) = compile_many(
        {"win_attn_fwd": get_spec("win_attn_fwd")},
        [CompileJob("win_attn_fwd", PROBLEM.to_dict(), {**window, "maxnreg": 128})],
        "hip:gfx942",
    )
    seen["capped_amd"] = (capped.status, capped.reason)
    step = PROBLEM.replace(layout="paged", seq_q=1)
    early = {**get_spec("kv_append_fwd").default_config(step), "launch_pdl": True}
    for target in ("cuda:89", "cuda:90"):
        job = CompileJob("kv_append_fwd", step.to_dict(), early)
        (outcome,) = compile_many({"kv_append_fwd": get_spec("kv_append_fwd")}, [job], target)
        seen[f"early_{target}"] = (outcome.status, outcome.reason)
    seen["pool"] = run_pool()
    seen["left_over"] = left_over()
    render_module.template_dir = lambda: Path(sys.argv[2])
    seen["kernel_mistake"] = message("gate_sum_fwd")
    seen["macro_mistake"] = message("win_attn_fwd")
    seen["launch_mistake"] = message("cmp_pool_fwd")
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
