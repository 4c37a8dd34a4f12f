"""A second opinion on winners: the race again, in another process and at another time."""

from __future__ import annotations

from collections.abc import Sequence

from ..bench.result import TrialResult
from ..db.records import TrialRecord, WinnerRecord
from ..db.store import TuningStore
from .certify import Raced, again, judge, settle
from .space import config_key
from .task import Task, known_winner, result_of
from .tuner import Measurer, race_configs


def confirm_winner(task: Task, *, measurer: Measurer, store: TuningStore) -> WinnerRecord | None:
    """Race a provisional winner, its ties and the default again, and store what both races say together.

    The caller gives the measurer a new process before. A winner that is settled already, imported, or whose race is
    not in the database is returned as it is; None if the problem has no winner.
    """
    winner = known_winner(store, task)
    if winner is None or winner.verdict != "provisional" or winner.source != "local":
        return winner
    default = task.spec.default_config(task.problem)
    first = last_race(store.trials(**task.filters(), stage="final"), winner)
    verdict = judge(first, default)
    if verdict is None:
        return winner
    second = race_configs(task, measurer, again(verdict, default), default)
    store.add_trials([task.trial(config, result, "confirm") for config, result in second])
    settled = settle(first, second, default)
    assert settled is not None  # the first race was judged above
    store.set_winner(task.winner(*settled, default_us=winner.default_median_us, library_us=winner.library_median_us))
    return known_winner(store, task)


def last_race(trials: Sequence[TrialRecord], winner: WinnerRecord) -> list[Raced]:
    """The race that made the winner: the newest trial of it and of each rival; `trials` come newest first."""
    members = [winner.config, *(rival["config"] for rival in winner.rivals)]
    newest: dict[str, TrialResult] = {}
    for trial in trials:
        newest.setdefault(config_key(trial.config), result_of(trial))
    return [(config, newest[config_key(config)]) for config in members if config_key(config) in newest]
