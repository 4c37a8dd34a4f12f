"""Variants that are not tried again: what crashed twice, or hung once, on this fingerprint and has not worked since."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ..bench.journal import Suspect, is_suspicion
from ..bench.result import TrialResult
from ..bench.worker import MAX_CRASHES
from ..codegen.render import template_digest
from ..db.records import TrialRecord
from ..db.store import TuningStore
from ..kernels import all_specs
from ..spec import Config, Problem
from .space import config_key
from .task import Task

FAULTS = ("crash", "timeout")
SURVIVED = ("ok", "accuracy")  # the kernel ran to its end


class Measurer(Protocol):
    """Measures variants without ever raising for one that fails."""

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult: ...


def quarantined(store: TuningStore, task: Task) -> dict[str, str]:
    """Reason by config key of the configs that must not be launched for the task's problem and its bucket."""
    return faulty(_measured(store, task))


def suspected(store: TuningStore, task: Task) -> list[Config]:
    """Configs that a journal suspects once, with no other result since: to be tried once more, after all others."""
    counts: dict[str, tuple[Config, int]] = {}
    for key, trials in _by_config(_measured(store, task)).items():
        faults = _faults_since_it_worked(trials)
        if faults and all(is_suspicion(trial.reason) for trial in faults):
            counts[key] = (faults[0].config, len(faults))
    return [config for config, count in counts.values() if count < MAX_CRASHES]


def faulty(trials: Iterable[TrialRecord]) -> dict[str, str]:
    """`quarantined` for trials of one family, bucket, fingerprint and template."""
    found = {}
    for key, of_config in _by_config(trials).items():
        faults = _faults_since_it_worked(of_config)
        if any(trial.status == "timeout" for trial in faults) or sum(map(_crashes, faults)) >= MAX_CRASHES:
            found[key] = f"{faults[0].status}: {faults[0].reason}"
    return found


def all_quarantined(trials: Iterable[TrialRecord], templates: Mapping[str, str]) -> list[str]:
    """Reasons of everything in quarantine on any fingerprint; `templates` has the current digest of each family."""
    groups: dict[tuple[str, ...], list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.provider == "template" and templates.get(trial.family) == trial.template_digest:
            groups[trial.fingerprint_digest, trial.family, trial.problem_key].append(trial)
    return [reason for group in groups.values() for reason in faulty(group).values()]


def context_of_run(fingerprint: Mapping[str, str]) -> dict[str, Any]:
    """What a journal must say of a run, so that `store_suspects` can store what killed it."""
    templates = {family: template_digest(spec) for family, spec in all_specs().items()}
    return {"fingerprint": dict(fingerprint), "templates": templates}


def store_suspects(store: TuningStore, suspects: Sequence[Suspect]) -> int:
    """Store what a journal left unfinished as crashed trials and return their number; twice stores them once.

    Libraries, and families that are gone, are left out: there is no config to keep away from.
    """
    specs, records = all_specs(), []
    for suspect in suspects:
        spec, templates = specs.get(suspect.family), suspect.context.get("templates", {})
        if spec is not None and spec.family in templates and not suspect.provider:
            fingerprint = dict(suspect.context["fingerprint"])
            task = Task(spec, Problem.from_dict(dict(suspect.problem)), fingerprint, templates[spec.family])
            record = task.trial(suspect.config, suspect.result(), "search")
            records.append(replace(record, created=suspect.when))  # so that storing it again adds nothing
    return len(store.add_trials(records)) if records else 0


def retry_suspected(store: TuningStore, task: Task, measurer: Measurer) -> list[TrialRecord]:
    """Measure what a journal suspects once more, and store it: it works, or is in quarantine, or kills again."""
    found = []
    for config in suspected(store, task):
        result = measurer.measure(task.spec.family, task.problem, config)
        found.append(task.trial(config, result, "search"))
        store.add_trial(found[-1])
    return found


def _measured(store: TuningStore, task: Task) -> list[TrialRecord]:
    """Trials of the bucket's problems on the task's fingerprint and template, newest first, under any policy."""
    return store.trials(**{**task.filters(), "policy": None}, provider="template")


def _by_config(trials: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    found: dict[str, list[TrialRecord]] = defaultdict(list)
    for trial in sorted(trials, key=lambda trial: trial.created, reverse=True):
        found[config_key(trial.config)].append(trial)
    return found


def _faults_since_it_worked(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Newest first, as the trials are."""
    since = itertools.takewhile(lambda trial: trial.status not in SURVIVED, trials)
    return [trial for trial in since if trial.status in FAULTS]


def _crashes(trial: TrialRecord) -> int:
    """How often the variant crashed by the time of this record: the worker tries twice before it gives up."""
    return 1 if is_suspicion(trial.reason) else MAX_CRASHES
