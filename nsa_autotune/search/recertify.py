"""Recertify one stale winner: same machine code carries its result over, other code races again, a loss is searched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..bench.result import TrialResult
from ..codegen.compile import Resources
from ..codegen.pool import CompileJob, CompileOutcome
from ..db.records import TrialRecord, WinnerRecord
from ..db.store import TuningStore
from ..spec import Config, KernelSpec, Problem
from .certify import Raced, Verdict, judge
from .drift import CODE_FIELDS, TEMPLATE, Stale, candidates, changed_fields, is_same_code, known_codes
from .space import config_key
from .task import Task
from .tuner import Measurer, race_configs

REAL_LOSS = math.log(1.03)  # log-ratio beyond which a loss is reported and worth a search
CACHED_MS = 100  # less was not compiled, but lay in Triton's cache
CARRIED_FROM = "carried_from"  # entry of a winner's resources: digest of the fingerprint that its samples come from
CARRIED_TEMPLATE = "carried_template"  # and the template's digest there

CompileAll = Callable[[Sequence[CompileJob]], Iterator[CompileOutcome]]
Search = Callable[[KernelSpec, Problem], WinnerRecord | None]
Ending = Literal["carried", "kept", "replaced", "failed"]


@dataclass(frozen=True)
class Loss:
    """What the new versions or template cost, as log-ratios; 0 or below is none."""

    slower: float  # the best of the race now against the winner then
    overtaken: float  # the old winner against the best now; infinite if it no longer works

    @property
    def is_real(self) -> bool:
        """True if it is more than the 3 % that races and boards differ by."""
        return max(self.slower, self.overtaken) > REAL_LOSS


@dataclass(frozen=True)
class Recertified:
    """How one stale winner ended; `winner` is the one that serves now, None if nothing works."""

    stale: Stale
    ending: Ending
    winner: WinnerRecord | None
    loss: Loss | None = None  # None if nothing was raced
    searched: bool = False


@dataclass(frozen=True)
class Compiled:
    """The candidates of a stale winner, with what was stored of their code and what it is now."""

    stale: Stale
    configs: list[Config]  # the default last
    then: Mapping[str, Mapping[str, object]]  # resources by config
    now: Mapping[str, CompileOutcome]  # by config; empty if nothing can be compiled for this GPU

    def is_same(self, config: Config) -> bool:
        """True if the config runs the code that was measured."""
        return is_same_code(self.then.get(config_key(config)), self.resources(config))

    def is_other(self, config: Config) -> bool:
        """True if it is known to run other code."""
        known = config_key(config) in self.then and self.resources(config) is not None
        return known and not self.is_same(config)

    def resources(self, config: Config) -> Resources | None:
        """What the config takes now, None if that is not known."""
        outcome = self.now.get(config_key(config))
        return None if outcome is None else outcome.resources

    @property
    def default(self) -> Config:
        """The default config."""
        return self.configs[-1]

    @property
    def runnable(self) -> list[Config]:
        """The candidates without those that do not compile."""
        return [config for config in self.configs if config_key(config) not in self._failed]

    @property
    def failures(self) -> list[Raced]:
        """Why the others do not."""
        return [
            (outcome.job.config, TrialResult(outcome.status, outcome.reason))  # type: ignore[arg-type]
            for outcome in self._failed.values()
        ]

    @property
    def _failed(self) -> dict[str, CompileOutcome]:
        return {key: outcome for key, outcome in self.now.items() if outcome.status != "ok"}


def stored_trials(stale: Stale, store: TuningStore) -> list[TrialRecord]:
    """Measured trials of a stale winner's origin: the same problem, fingerprint, template and policy; newest first."""
    winner = stale.winner
    found = store.trials(
        family=winner.family,
        fingerprint_digest=winner.fingerprint_digest,
        problem_key=winner.problem_key,
        template_digest=winner.template_digest,
        policy=winner.policy,
        provider="template",
    )
    return [trial for trial in found if trial.problem == winner.problem]


def compile_candidates(stale: Stale, spec: KernelSpec, store: TuningStore, compiler: CompileAll | None) -> Compiled:
    """Compile a stale winner's best few; without a compiler nothing is known of their code, and all of them race."""
    trials, configs = _trials_and_candidates(stale, spec, store)
    then = known_codes(stale, trials)
    outcomes = () if compiler is None else compiler(_jobs(stale, configs, then))
    now = {config_key(outcome.job.config): outcome for outcome in outcomes}
    return Compiled(stale, configs, then, now)


def candidate_jobs(stale: Stale, spec: KernelSpec, store: TuningStore) -> list[CompileJob]:
    """What `compile_candidates` asks the compiler for."""
    trials, configs = _trials_and_candidates(stale, spec, store)
    return _jobs(stale, configs, known_codes(stale, trials))


def _trials_and_candidates(
    stale: Stale, spec: KernelSpec, store: TuningStore
) -> tuple[list[TrialRecord], list[Config]]:
    trials = [replace(trial, config=spec.completed(trial.config)) for trial in stored_trials(stale, store)]
    return trials, candidates(stale, spec, trials)


def _jobs(stale: Stale, configs: Sequence[Config], then: Mapping[str, Mapping[str, object]]) -> list[CompileJob]:
    family, problem = stale.winner.family, stale.winner.problem
    return [CompileJob(family, problem, config, _compile_ms(then.get(config_key(config)))) for config in configs]


def _compile_ms(resources: Mapping[str, object] | None) -> float | None:
    taken = None if resources is None else resources.get("compile_ms")
    return float(taken) if isinstance(taken, int | float) and taken > CACHED_MS else None


def is_recorded(stale: Stale, store: TuningStore) -> bool:
    """True if the code that was measured is known: only then can it carry over."""
    return config_key(stale.winner.config) in known_codes(stale, stored_trials(stale, store))


def recertify_winner(
    stale: Stale,
    task: Task,
    *,
    measurer: Measurer,
    store: TuningStore,
    compiler: CompileAll | None,
    search: Search | None = None,
) -> Recertified:
    """Carry a winner over, or race the old best few and the default, and store what serves from now on.

    `task` is the winner's problem under the present fingerprint and template. `search` is called for a real loss; the
    winner is stored after it, so that an interrupted call leaves the problem stale and the next one goes on with it.
    A raced winner is provisional until `confirm.confirm_winner` has seen it.
    """
    compiled = compile_candidates(stale, task.spec, store, compiler)
    if compiled.is_same(stale.winner.config):
        winner = carry(compiled, task)
        store.set_winner(winner)
        return Recertified(stale, "carried", winner)
    raced = _race(compiled, task, measurer, store)
    verdict = judge(raced, compiled.default)
    loss = None if verdict is None else find_loss(compiled, verdict, raced)
    record = None if verdict is None else _raced_winner(task, verdict, raced, compiled.default)
    is_lost = record is None or (loss is not None and loss.is_real)
    found = search(task.spec, task.problem) if search is not None and is_lost else None
    best = _better(record, found)
    if best is not None and best is not found:
        store.set_winner(best)
    ending: Ending = "failed" if best is None else "kept" if _is_kept(stale, best) else "replaced"
    return Recertified(stale, ending, best, loss, searched=search is not None and is_lost)


def carry(compiled: Compiled, task: Task) -> WinnerRecord:
    """The winner under the present versions with the evidence that holds still: rivals and default of the same code.

    Its samples come from where it was measured first, which `resources` names; so does its source. The library's time
    stays only if torch, CUDA and driver did.
    """
    winner = compiled.stale.winner
    stored = compiled.then[config_key(winner.config)]
    origin = {CARRIED_FROM: winner.fingerprint_digest, CARRIED_TEMPLATE: winner.template_digest}
    origin |= {name: str(stored[name]) for name in origin if name in stored}  # carried before: that origin stays
    same_default = winner.default_config == compiled.default and compiled.is_same(compiled.default)
    same_library = set(compiled.stale.changed) <= {*CODE_FIELDS, TEMPLATE}
    return WinnerRecord(
        fingerprint=task.fingerprint,
        family=winner.family,
        problem=winner.problem,
        problem_key=task.key,
        config=winner.config,
        template_digest=task.template_digest,
        median_us=winner.median_us,
        p20_us=winner.p20_us,
        p80_us=winner.p80_us,
        samples_us=winner.samples_us,
        default_config=winner.default_config if same_default else None,
        default_median_us=winner.default_median_us if same_default else None,
        library=winner.library if same_library else "",
        library_median_us=winner.library_median_us if same_library else None,
        policy=winner.policy,
        verdict="carried",
        rivals=tuple(rival for rival in winner.rivals if compiled.is_same(rival["config"])),
        resources={**stored, **origin},
        source=winner.source,
    )


def find_loss(compiled: Compiled, verdict: Verdict, raced: Sequence[Raced]) -> Loss:
    """How much slower the best of a race is than the winner was, and how far the old winner fell behind.

    Times are compared through the default, which both races measured, since clocks and boards drift; absolute ones are
    where that tells nothing: the default is the winner itself, was not timed both times, or got other machine code.
    """
    old = compiled.stale.winner
    ratios = {config_key(rival["config"]): float(rival["log_ratio"]) for rival in verdict.rivals}
    ratios[config_key(verdict.config)] = 0.0
    behind = ratios.get(config_key(old.config), math.inf)  # log(config / best), paired
    default = config_key(compiled.default)
    paired = old.default_config == compiled.default != old.config and not compiled.is_other(compiled.default)
    if paired and old.default_median_us is not None and default in ratios:
        slower = -ratios[default] - math.log(old.median_us / old.default_median_us)
    else:
        slower = math.log((verdict.result.median_us or math.inf) / old.median_us)
    return Loss(slower, behind)


def _race(compiled: Compiled, task: Task, measurer: Measurer, store: TuningStore) -> list[Raced]:
    """Samples of all candidates that compile; every outcome is stored."""
    raced = race_configs(task, measurer, compiled.runnable, compiled.default) if compiled.runnable else []
    store.add_trials([task.trial(config, result, "final") for config, result in [*compiled.failures, *raced]])
    return raced


def _raced_winner(task: Task, verdict: Verdict, raced: Sequence[Raced], default: Config) -> WinnerRecord:
    default_us = next((result.median_us for config, result in raced if config == default), None)
    return task.winner(verdict, "provisional", default_us=default_us, library_us=None)


def _better(raced: WinnerRecord | None, found: WinnerRecord | None) -> WinnerRecord | None:
    """The raced winner or what a search found, whichever gains more over the default, which both measured."""
    if raced is None or found is None:
        return found or raced
    if raced.speedup is not None and found.speedup is not None:
        return raced if raced.speedup > found.speedup else found
    return raced if raced.median_us < found.median_us else found


def _is_kept(stale: Stale, winner: WinnerRecord) -> bool:
    """True if the old winner, or a member of its tie set, serves on or is tied with what does."""
    old = [config_key(config) for config in (stale.winner.config, *stale.winner.tied)]
    return config_key(winner.config) in old or old[0] in map(config_key, winner.tied)


def unconfirmed(
    winners: Sequence[WinnerRecord], here: Mapping[str, str], digests: Mapping[str, str]
) -> list[WinnerRecord]:
    """Provisional winners of the present that stand in for an older one, also those that an earlier call left."""
    old = [winner for winner in winners if changed_fields(winner, here, digests)]
    older = {(winner.family, winner.problem_key, winner.policy) for winner in old}
    new = [winner for winner in winners if not changed_fields(winner, here, digests)]
    mine = [winner for winner in new if winner.verdict == "provisional" and winner.source == "local"]
    return [winner for winner in mine if (winner.family, winner.problem_key, winner.policy) in older]


def forecast(compiled: Compiled) -> str:
    """What recertifying would do with a compiled winner, in words."""
    config = compiled.stale.winner.config
    outcome = compiled.now.get(config_key(config))
    if outcome is not None and outcome.status != "ok":
        return f"races without it: {outcome.status}"
    if config_key(config) not in compiled.then:
        return "races: its machine code was not recorded"
    return "carries over" if compiled.is_same(config) else "races: other machine code"
