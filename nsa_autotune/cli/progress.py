"""The live display of a tuning run, and the line that each problem leaves behind."""

from __future__ import annotations

from collections import Counter
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

from ..search.progress import WORKED, Outcome, Plan, TrialEvent
from .console import count_text, gain_text, problem_text

SHOWN_REASONS = 3  # most frequent reasons printed for a problem without a winner


class BarDisplay:
    """One bar with a description in front and a state behind, gone when it is left; lines above it stay."""

    def __init__(self, console: Console, progress: ProgressColumn, description: str, total: float | None) -> None:
        self.console = console
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), progress)
        self._bar = Progress(
            *columns, TextColumn("{task.fields[state]}"), TimeElapsedColumn(), console=console, transient=True
        )
        self._task = self._bar.add_task(description, total=total, state="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def note(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)


class TuneDisplay(BarDisplay):
    """Implements `search.progress.Progress`: a bar while a problem is under way, one line when it is done."""

    def __init__(self, console: Console, num_problems: int) -> None:
        super().__init__(console, TextColumn("{task.percentage:>3.0f}%"), "starting", 1.0)
        self.outcomes: list[Outcome] = []
        self._num_problems = num_problems
        self._failed = 0

    def say(self, text: str) -> None:
        """Describe what is done before the first problem."""
        self._bar.reset(self._task, description=text, total=None, state="")

    def start(self, plan: Plan) -> None:
        """Reset the bar."""
        self._failed = 0
        number = len(self.outcomes) + 1
        family = plan.spec.family
        title = f"{number}/{self._num_problems} {family} {problem_text(plan.problem.to_dict(), family)}"
        known = f"{count_text(plan.num_known, 'trial')} known" if plan.num_known else ""
        self._bar.reset(self._task, description=title, total=1.0, state=known)

    def trial(self, event: TrialEvent) -> None:
        """Move the bar."""
        self._failed += event.record.status not in WORKED
        best = f"best {event.best_us:.1f} us, " if event.best_us is not None else ""
        state = f"{best}{count_text(event.number, 'trial')}, {self._failed} failed"
        self._bar.update(self._task, completed=event.spent, state=state)

    def finish(self, outcome: Outcome) -> None:
        """Keep the outcome and print its line."""
        self.outcomes.append(outcome)
        for line in outcome_lines(outcome):
            self.note(line)


def outcome_lines(outcome: Outcome) -> list[str]:
    """How one problem ended; the reasons too, where it has no winner."""
    head = f"{outcome.spec.family}  {problem_text(outcome.problem.to_dict(), outcome.spec.family)}: "
    statuses = Counter(dict(outcome.statuses))
    told = ", ".join(f"{count} {status}" for status, count in outcome.statuses)
    counts = f" [{told}]" if told else ""
    winner = outcome.winner
    if winner is not None:
        gain = gain_text(winner.default_median_us, winner.median_us)
        versus = f", {gain} faster than the default" if gain else ""
        known = {"known": " (known; --retune measures again)", "elsewhere": " (found by another process)"}
        return [f"{head}{winner.median_us:.1f} us{versus}{known.get(outcome.kind, '')}{counts}"]
    why = "it was interrupted" if outcome.kind == "interrupted" else "the minutes were spent"
    rest = f", {count_text(outcome.left, 'config')} left when {why}: the same command goes on"
    left = rest if outcome.left else ""
    if outcome.kind == "failed" or (outcome.kind == "predicted" and not statuses["ok"]):
        reasons = [f"    {count}x {reason}" for reason, count in outcome.reasons[:SHOWN_REASONS]]
        return [f"{head}no config works{counts}{left}", *reasons]
    return [f"{head}{outcome.kind}{counts}{left}"]
