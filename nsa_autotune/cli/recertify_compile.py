"""What `nsa-autotune recertify` compiles: the best few of all stale winners together, when the first is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ..spec import KernelSpec

if TYPE_CHECKING:
    from ..codegen.pool import CompileJob, CompileOutcome
    from ..db.store import TuningStore
    from ..search.drift import Stale
    from ..search.recertify import CompileAll


def find_compiler(
    target: str, processes: int, ahead: Sequence[CompileJob], say: Callable[[str], None]
) -> CompileAll | None:
    """Compiles for the target in child processes, `ahead` with whatever is asked for first; None for unknown targets.

    One after the other, each winner would wait for the slowest of a few. `say` is told how far it is.
    """
    from ..codegen import pool
    from ..codegen.target import SHARED_LIMITS_BYTES
    from ..kernels import all_specs
    from ..search.ahead import TIMEOUT_S

    if target not in SHARED_LIMITS_BYTES:
        return None
    known: dict[str, CompileOutcome] = {}

    def compile_all(wanted: Sequence[CompileJob]) -> Iterator[CompileOutcome]:
        if any(job.key not in known for job in wanted):
            missing = {job.key: job for job in (*wanted, *ahead) if job.key not in known}
            outcomes = pool.compile_many(dict(all_specs()), list(missing.values()), target, processes, TIMEOUT_S)
            say(f"compiling {len(missing)} configs")
            for done, outcome in enumerate(outcomes, 1):
                known[outcome.job.key] = outcome
                say(f"compiled {done} of {len(missing)} configs")
        return iter([known[job.key] for job in wanted])

    return compile_all


def jobs_of(stale: Iterable[Stale], specs: Mapping[str, KernelSpec], store: TuningStore) -> list[CompileJob]:
    """All candidates of the winners whose measured code is known; the others race whatever they compile to."""
    from ..search import recertify

    recorded = (item for item in stale if recertify.is_recorded(item, store))
    return [job for item in recorded for job in recertify.candidate_jobs(item, specs[item.winner.family], store)]
