"""The run behind `nsa-autotune bench`: builds the calls, times them beside one another, and reports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime

import torch

from .. import __version__
from ..bench.failure import is_sticky
from ..bench.timing import Fn, Timing, make_clock, time_launches
from ..db.store import TuningStore
from ..dispatch.dispatcher import Dispatcher
from ..dispatch.fingerprint import current
from ..errors import InvalidInput, InvalidProblem, KernelError, NSAError
from ..kernels import all_specs
from ..spec import KernelSpec, Problem
from .bench_entries import TARGET_MS, Bench, Entry, Work, branch_entries, dense_entries, launches, whole_entries
from .bench_report import Rates, Report, Row, seq_text

MATRIX_WIDTH = 8192
COPY_BYTES = 1 << 30

Extra = Callable[[Bench, Problem], Entry]  # a line timed beside the whole forward


def run(
    plan: Sequence[Work],
    *,
    device: str,
    db: str | None,
    untuned: bool,
    rounds: int,
    command: str,
    extras: Sequence[Extra] = (),
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Measure the plan on a GPU; raises InvalidInput without one, InvalidProblem before anything is measured."""
    where = check_device(device)
    check_plan(plan)
    with open_bench(where, db=db, untuned=untuned, rounds=rounds, say=say) as bench:
        dtypes = dict.fromkeys(work.problem.dtype for work in plan)
        rates = {dtype: measure_rates(bench, dtype) for dtype in dtypes}
        rows = tuple(row for work in plan for row in measure(work, bench, extras))
    return make_report(bench, command, untuned, rates, rows)


@contextmanager
def open_bench(
    where: torch.device,
    *,
    db: str | None,
    untuned: bool,
    rounds: int,
    say: Callable[[str], None],
    target_ms: float = TARGET_MS,
) -> Iterator[Bench]:
    """What measures on a device; its dispatchers ask the database, unless `untuned`, while it is open."""
    with ExitStack() as stack:
        store = None if untuned else stack.enter_context(TuningStore(db, must_exist=True))
        stack.enter_context(each_warning_once(silent=untuned))

        def make_dispatcher(locality: float | None) -> Dispatcher:
            return Dispatcher(store) if locality is None else Dispatcher(store, locality=locality)

        yield Bench(where, make_clock(where), make_dispatcher, rounds, target_ms, say)


def make_report(bench: Bench, command: str, untuned: bool, rates: Mapping[str, Rates], rows: Sequence[Row]) -> Report:
    """The rows with what they were measured on, by which command, and when."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    facts = (current(str(bench.device)).to_dict(), command, now, __version__, bench.rounds, untuned)
    return Report(*facts, rates, tuple(rows))


def check_device(name: str) -> torch.device:
    """The CUDA device of this name; InvalidInput if there is none."""
    if not torch.cuda.is_available():
        raise InvalidInput(
            "bench measures, so it needs a CUDA GPU",
            {"device": name},
            "Without a GPU `nsa-autotune tune --target cuda:90` predicts.",
        )
    count = torch.cuda.device_count()
    known = [f"cuda:{index}" for index in range(count)]
    if name not in ("cuda", *known):
        raise InvalidInput("there is no such GPU", {"device": name}, f"Use {' or '.join(known)}.")
    return torch.device("cuda:0" if name == "cuda" else name)


def check_plan(plan: Sequence[Work]) -> None:
    """Raise InvalidProblem for a problem that a kernel cannot serve, or that has nothing to compress."""
    for work in plan:
        problem = work.problem
        if problem.layout != "batched" or problem.nsa.num_compressed(problem.seq_k) < 1:
            values = {"layout": problem.layout, "seq": problem.seq_k, "l": problem.nsa.compress_block_size}
            raise InvalidProblem("bench takes batched sequences of at least l tokens", values, "Use longer sequences.")
        for spec in benched_specs():
            for part in launches(spec, problem):
                spec.check_problem(part)


def benched_specs() -> list[KernelSpec]:
    """The families of a whole sequence; a decode step has a benchmark of its own."""
    return [spec for spec in all_specs().values() if "batched" in spec.layouts]


@contextmanager
def each_warning_once(*, silent: bool) -> Iterator[None]:
    """Every dispatcher of a run says what it serves; let each sentence through once, or none."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = text not in said and not silent
        said.add(text)
        return new

    logger = logging.getLogger("nsa_autotune")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)


def measure_rates(bench: Bench, dtype: str, width: int = MATRIX_WIDTH, copy_bytes: int = COPY_BYTES) -> Rates:
    """What the device reaches with a square matrix product and a large copy, interleaved."""
    bench.say(f"rates of {dtype}")
    a, b, out = (torch.randn(width, width, device=bench.device).to(getattr(torch, dtype)) for _ in range(3))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    product, copy = _timed([lambda: torch.mm(a, b, out=out), lambda: target.copy_(source)], bench)
    return Rates(tflops=2.0 * width**3 / product.median_us / 1e6, gbps=2.0 * copy_bytes / copy.median_us / 1e3)


def measure(work: Work, bench: Bench, extras: Sequence[Extra] = ()) -> Iterator[Row]:
    """The rows of one problem: each family by itself, then whole forwards and dense attention interleaved."""
    for spec in benched_specs():
        yield from time_group(branch_entries(spec, work, bench), bench)
    whole = [*whole_entries(work, bench), *dense_entries(work.problem, bench)]
    yield from time_group([*whole, *(extra(bench, work.problem) for extra in extras)], bench)


def time_group(entries: Sequence[Entry], bench: Bench) -> list[Row]:
    """Time the entries that run, interleaved; the others get their reason. Their tensors are freed afterwards."""
    first = entries[0]
    bench.say(f"{seq_text(first.problem.seq_k)} {first.problem.dtype}: {', '.join(entry.work for entry in entries)}")
    tried = [_try(entry, bench) for entry in entries]
    timings = iter(_timed([fn for fn, _ in tried if fn is not None], bench))
    rows = [
        _row(entry, None if fn is None else next(timings), reason)
        for entry, (fn, reason) in zip(entries, tried, strict=True)
    ]
    del tried
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _timed(fns: Sequence[Fn], bench: Bench) -> list[Timing]:
    if not fns:
        return []
    return time_launches(fns, clock=bench.clock, rounds=bench.rounds, target_ms=bench.target_ms)


def _try(entry: Entry, bench: Bench) -> tuple[Fn | None, str]:
    """The call after its first run, or None and why it does not run; raises KernelError if the GPU is lost."""
    try:
        fn = entry.prepare()
        bench.clock.elapsed_us(fn, 1, False)
    except (NSAError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        if is_sticky(error):
            values = {"work": entry.work, "reason": reason}
            raise KernelError("the GPU no longer answers", values, "Run again, without what broke it.") from error
        return None, reason
    return fn, ""


def _row(entry: Entry, timing: Timing | None, reason: str) -> Row:
    stats = {} if entry.dispatcher is None else entry.dispatcher.stats
    return Row(
        work=entry.work,
        kind=entry.kind,
        problem=entry.problem,
        locality=entry.locality,
        flops=entry.cost.flops,
        bytes_moved=entry.cost.bytes_moved,
        served={str(getattr(step, "name", step)).lower().replace("_", " "): n for step, n in stats.items()},
        reason=reason,
        **({} if timing is None else vars(timing)),
    )
