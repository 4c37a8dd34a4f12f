"""What the parameters of a family are worth for one problem, from its measured trials."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import optuna
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from ..db.records import TrialRecord
from ..errors import InvalidInput
from ..spec import Config, KernelSpec, Problem, Value, canonical_json
from .progress import WORKED
from .space import ConfigSpace
from .study import quiet_optuna

FANOVA, PED_ANOVA = "fANOVA", "PED-ANOVA"
LEAST_CONFIGS = 20  # of which anything can be said


@dataclass(frozen=True)
class ParamWorth:
    """A parameter's share of what decides on the time, and what it costs to keep off its best value."""

    param: str
    importance: float  # all of a problem's add up to 1
    best_value: Value
    loss_without: float | None  # fastest config with another value over the fastest of all, less 1; None if none ran
    values: int  # that were measured


@dataclass(frozen=True)
class Worth:
    """The parameters of one problem on one machine, the most important first, and the evidence."""

    family: str
    problem_key: str
    fingerprint: dict[str, str]
    template_digest: str
    policy: str
    evaluator: str  # FANOVA or PED_ANOVA, whichever this environment has
    configs: int  # that worked, each counted once
    best_us: float
    newest: str
    params: tuple[ParamWorth, ...]


def parameter_worth(spec: KernelSpec, trials: Sequence[TrialRecord], seed: int = 0) -> Worth:
    """Importance of each parameter for the logarithm of the time.

    `trials` are of one problem, fingerprint, template and policy. Configs that failed, and values in the reserve, are
    left out. InvalidInput if fewer than 20 configs worked.
    """
    first = _one_origin(spec, trials)
    space = ConfigSpace(spec, Problem.from_dict(first.problem))
    times = _times_us(space, trials)
    if len(times) < LEAST_CONFIGS:
        values = {"family": spec.family, "problem": first.problem_key, "configs": len(times)}
        rule = f"importance needs {LEAST_CONFIGS} configs that worked"
        raise InvalidInput(rule, values, "Record more with `nsa-autotune tune --budget full`.")
    evaluator, shares = _importance(space, list(times.values()), seed)
    best_config, best_us = min(times.values(), key=lambda found: found[1])
    params = [_param(name, share, best_config[name], best_us, list(times.values())) for name, share in shares.items()]
    return Worth(
        family=spec.family,
        problem_key=first.problem_key,
        fingerprint=dict(first.fingerprint),
        template_digest=first.template_digest,
        policy=first.policy,
        evaluator=evaluator,
        configs=len(times),
        best_us=best_us,
        newest=max(trial.created for trial in trials),
        params=tuple(sorted(params, key=lambda found: (-found.importance, found.param))),
    )


Timed = tuple[Config, float]  # config and its median in us


def _one_origin(spec: KernelSpec, trials: Sequence[TrialRecord]) -> TrialRecord:
    keys = {(t.problem_key, canonical_json(t.fingerprint), t.template_digest, t.policy) for t in trials}
    if len(keys) != 1 or trials[0].family != spec.family:
        values = {"family": spec.family, "trials": len(trials), "origins": len(keys)}
        raise InvalidInput("importance is of one problem, machine, template and policy", values, "Name more of them.")
    return trials[0]


def _times_us(space: ConfigSpace, trials: Sequence[TrialRecord]) -> dict[str, Timed]:
    """Median over the trials of each usual config that worked."""
    found: dict[str, tuple[Config, list[float]]] = {}
    for trial in trials:
        timed = trial.status in WORKED and trial.median_us is not None and trial.provider == "template"
        if timed and space.is_legal(trial.config) and space.is_usual(trial.config):
            _, times = found.setdefault(canonical_json(trial.config), (trial.config, []))
            times.append(trial.median_us or 0.0)
    return {key: (config, median(times)) for key, (config, times) in found.items() if median(times) > 0}


def _importance(space: ConfigSpace, timed: Sequence[Timed], seed: int) -> tuple[str, dict[str, float]]:
    """The evaluator's name and the share of each parameter that was varied."""
    distributions = {
        name: distribution
        for name, distribution in space.distributions().items()
        if len({canonical_json(config[name]) for config, _ in timed}) > 1
    }
    if not distributions:
        raise InvalidInput("no parameter was varied", {"family": space.spec.family}, "Tune with a larger budget.")
    with quiet_optuna():
        study = optuna.create_study(direction="minimize")
        for config, time_us in timed:
            params = {name: value for name, value in space.to_params(config).items() if name in distributions}
            study.add_trial(
                create_trial(
                    state=TrialState.COMPLETE, value=math.log(time_us), params=params, distributions=distributions
                )
            )
        try:
            name, found = FANOVA, FanovaImportanceEvaluator(seed=seed).evaluate(study)
        except ImportError:  # it needs scikit-learn, which is no dependency
            name, found = PED_ANOVA, PedAnovaImportanceEvaluator().evaluate(study)
    total = sum(found.values())
    return name, {param: value / total if total > 0 else 0.0 for param, value in found.items()}


def _param(name: str, share: float, best_value: Value, best_us: float, timed: Sequence[Timed]) -> ParamWorth:
    others = [time_us for config, time_us in timed if config[name] != best_value]
    values = len({canonical_json(config[name]) for config, _ in timed})
    return ParamWorth(name, share, best_value, min(others) / best_us - 1 if others else None, values)
