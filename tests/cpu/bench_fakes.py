"""Families whose kernels are PyTorch, right or wrong in a chosen way; also the toolchain of the worker's tests."""

from __future__ import annotations

import errno
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from nsa_autotune import reference
from nsa_autotune.config import NSAConfig
from nsa_autotune.layout import PackedLayout
from nsa_autotune.spec import Argument, Config, Cost, KernelSpec, Param, Problem

NSA = NSAConfig(
    compress_block_size=4,
    compress_stride=2,
    select_block_size=4,
    num_selected=5,
    num_initial=1,
    num_local=2,
    window_size=9,
)
SMALL = Problem(batch=2, seq_q=63, seq_k=63, num_q_heads=4, num_kv_heads=2, d_qk=16, d_v=8, dtype="float16", nsa=NSA)
PACKED = SMALL.replace(batch=4, seq_q=90, seq_k=90, layout="packed")
FAULTS = (
    *("right", "nan", "row", "scale", "lse_inf", "stray", "input", "tie", "order", "future", "greedy"),
    *("raise", "illegal", "oom", "exit", "kill", "kill_once", "hang", "print", "orphan", "late_kill"),
    *("before", "accumulate", "unwritten", "unused_row", "misaligned", "assert", "segv", "abort", "late_hang"),
    *("garbage", "flood", "lie", "deaf", "stop", "full_disk", "bomb"),
)


def _window(problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    o, lse = reference.window_attention(q, k, v, problem.nsa, positions=positions, layout=layout)
    return {"o": o, "lse": lse}


def _select(problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
    q, k, lse = inputs["q"], inputs["k"], inputs["lse"]
    blocks = reference.select_blocks(q, k, lse, problem.nsa, seq_k=problem.seq_k, positions=positions, layout=layout)
    return {"blocks": blocks}


def _pool(problem: Problem, inputs: dict[str, Any], layout: PackedLayout | None, positions: Any) -> dict[str, Any]:
    return {"out": reference.compress_mean(inputs["x"], problem.nsa, layout=layout)}


INDEX = tuple(Argument(name, (), "int32", fill=name) for name in ("q_pos", "k_start"))


def make_spec(family: str, run: Callable[..., Any], *arguments: Argument) -> KernelSpec:
    """A spec with one parameter, the fault of its kernel."""
    return KernelSpec(
        family=family,
        doc="a fake",
        arguments=arguments,
        problem_fields=("seq_q",),
        nsa_fields=(),
        params=(Param("fault", FAULTS, "what is wrong with the kernel"),),
        constraints=(),
        rules=(),
        defaults=lambda _: {"fault": "right"},
        cost=lambda _, __: Cost(1.0, 1.0),
        structure=lambda _, __: {},
        constants=lambda _, __: {},
        reference=run,
    )


WINDOW = make_spec(
    "fake_window",
    _window,
    Argument("q", ("Q", "HQ", "D_QK")),
    Argument("k", ("K", "H", "D_QK")),
    Argument("v", ("K", "H", "D_V")),
    Argument("o", ("Q", "HQ", "D_V"), fill="out"),
    Argument("lse", ("Q", "HQ"), "float32", fill="out"),
    *INDEX,
)
_SELECT = make_spec(
    "fake_select",
    _select,
    Argument("q", ("Q", "HQ", "D_QK")),
    Argument("k", ("C", "H", "D_QK")),
    Argument("lse", ("Q", "HQ"), "float32", fill="lse"),
    Argument("blocks", ("Q", "H", "N"), "int32", fill="out"),
    *INDEX,
)
SELECT = replace(_SELECT, scalars=("seq_k",))
POOL = make_spec(
    "fake_pool",
    _pool,
    Argument("x", ("K", "H", "D_QK")),
    Argument("out", ("C", "H", "D_QK"), fill="out"),
    Argument("cmp_source", (), "int32", fill="cmp_source"),
)
SPECS = {spec.family: spec for spec in (WINDOW, SELECT, POOL)}


@dataclass(frozen=True)
class Kernel:
    """A launch function: the reference in float32, then one fault."""

    spec: KernelSpec
    problem: Problem
    fault: str = "right"
    layout: PackedLayout | None = None
    calls: list[str] = field(default_factory=list)

    def __call__(self, seq_k: int = 0, **tensors: Any) -> None:
        """Fill the outputs."""
        self.calls.append(self.fault)
        _misbehave(self.fault, len(self.calls))
        problem = self.problem.replace(seq_k=seq_k) if seq_k else self.problem
        before = {name: t.clone() for name, t in tensors.items() if self.fault in ("accumulate", "unwritten")}
        wide = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
        if self.fault in ("tie", "greedy"):
            tensors["blocks"].copy_(_select_wrongly(self.fault, problem, wide))
        else:
            for name, value in self.spec.reference(problem, wide, self.layout, None).items():
                tensors[name].copy_(value)
        spoil(self.fault, tensors)
        for argument in self.spec.arguments:
            if argument.is_output and self.fault == "accumulate":
                tensors[argument.name].add_(0 * before[argument.name])  # as if what was there were zero
            elif argument.is_output and self.fault == "unwritten":
                tensors[argument.name][-1, -1] = before[argument.name][-1, -1]


def _select_wrongly(fault: str, problem: Problem, wide: dict[str, torch.Tensor]) -> torch.Tensor:
    """Blocks by scores that let the greater index win ties, or that turn good into bad."""
    q, k, lse = (wide[name].double() for name in ("q", "k", "lse"))
    scores = reference.importance(q, k, lse, problem.nsa, seq_k=problem.seq_k)
    nudge = 1.0 + 1e-12 * torch.arange(scores.shape[-1], dtype=torch.float64) if fault == "tie" else -1.0
    scores = (scores * nudge).masked_fill(scores == -math.inf, -math.inf)
    positions = torch.arange(problem.seq_k - q.shape[1], problem.seq_k)
    return reference.select_from_importance(scores, problem.nsa, positions)


def spoil(fault: str, tensors: dict[str, torch.Tensor]) -> None:
    """Make right outputs wrong."""
    out = tensors.get("o", tensors.get("blocks", tensors.get("out")))
    assert out is not None
    last = out.view(-1, *out.shape[-2:])[-1, -1]  # one row: the last token's last head
    if fault == "nan":
        last[-1] = math.nan
    elif fault == "row":
        last.copy_(out.view(-1, *out.shape[-2:])[-2, -1])
    elif fault == "scale":
        out.mul_(1.02)
    elif fault == "lse_inf":
        tensors["lse"].view(-1)[0] = -math.inf
    elif fault == "stray":
        out.view(-1).as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
    elif fault == "before":
        out.view(-1).as_strided((1,), (1,), out.storage_offset() - 1).zero_()
    elif fault == "unused_row":
        out[tensors["cmp_source"] < 0] = 1.0
    elif fault == "input":
        tensors["k"].view(-1)[0] = 0
    elif fault == "order":
        last[:2] = last[:2].flip(0).clone()
    elif fault == "future":
        last[-1] += 1


STICKY = {
    "illegal": "an illegal memory access was encountered",
    "misaligned": "misaligned address",
    "assert": "device-side assert triggered",
}
SIGNALS = {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT, "stop": signal.SIGSTOP}


def _misbehave(fault: str, calls: int) -> None:
    if fault in STICKY:
        raise RuntimeError(f"CUDA error: {STICKY[fault]}")
    late = fault == "late_kill" and calls > 2  # the gate calls twice, the clock afterwards
    if fault in SIGNALS or late or (fault == "kill_once" and _first_time()):
        print("last words", flush=True)
        os.kill(os.getpid(), SIGNALS.get(fault, signal.SIGKILL))
    if fault == "hang" or (fault == "late_hang" and calls == 2):
        time.sleep(600)
    _die_or_babble(fault)


def _die_or_babble(fault: str) -> None:
    if fault == "raise":
        raise RuntimeError("no such instruction")
    if fault == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory")
    if fault == "full_disk":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if fault == "exit":
        sys.exit(3)
    if fault == "print":
        os.write(1, b'{"results": []}\nnonsense\n' * 100)
    if fault in ("garbage", "flood", "lie"):
        answers = int(sys.argv[sys.argv.index("--answers") + 1])
        text = {"garbage": b"\xff\x00{]\n", "flood": b"x" * (1 << 25), "lie": b'{"results": []}\n'}[fault]
        while text:
            text = text[os.write(answers, text) :]
    if fault == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if fault == "orphan":
        print(f"sleeper {subprocess.Popen(['sleep', '600']).pid}", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "bomb":
        subprocess.Popen(["sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sh -c 'sleep 601 & sleep 601 & wait' & done; wait"])
        time.sleep(600)


def _first_time() -> bool:
    mark = os.environ["BENCH_FAKES_MARK"]
    if os.path.exists(mark):  # noqa: PTH110
        return False
    open(mark, "w").close()  # noqa: PTH123
    return True


def get_spec(family: str) -> KernelSpec:
    """The fake of this name."""
    return SPECS[family]


def render(spec: KernelSpec, problem: Problem, config: Config) -> SimpleNamespace:
    """What `load` needs."""
    return SimpleNamespace(spec=spec, problem=problem, fault=config["fault"])


def load(rendered: SimpleNamespace) -> SimpleNamespace:
    """A module with `launch`."""
    return SimpleNamespace(launch=Kernel(rendered.spec, rendered.problem, rendered.fault))


def explain(error: BaseException, rendered: SimpleNamespace) -> str:
    """The error with the name of its template."""
    return f"{rendered.spec.template}: {error}"


def check_device(device: torch.device) -> None:
    """Fails while the file that BENCH_FAKES_SICK names is there."""
    if os.path.exists(os.environ.get("BENCH_FAKES_SICK", "")):  # noqa: PTH110
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
