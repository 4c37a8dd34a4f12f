"""The live display of a co-design run, and the line that each design leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import MofNCompleteColumn

from ..search.progress import Outcome, Plan, TrialEvent
from .console import count_text
from .progress import BarDisplay, outcome_lines

if TYPE_CHECKING:
    from ..db.designs import DesignRecord
    from ..errors import NoConfigWorks
    from ..search.designs import Design


class CodesignDisplay(BarDisplay):
    """Implements `search.codesign.CodesignProgress`, and `search.progress.Progress` for the kernels of a design."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, MofNCompleteColumn(), "dense attention", None)
        self.num_failed = 0
        self._head = self._family = ""

    def begin(self, design: Design, number: int, total: int) -> None:
        """Name the design."""
        self._head = f"{number}/{total} {design_text(design)}"
        self._bar.update(
            self._task, description=design_text(design), total=total, completed=number - 1, state="quality"
        )

    def done(self, record: DesignRecord) -> None:
        """Print the design's line."""
        guess = " predicted" if record.kind == "predicted" else ""
        self.note(
            f"{self._head}: {record.latency_us:.1f} us{guess}, mass kept {record.mass_kept:.4f}, "
            f"output error {record.output_error:.4f}"
        )

    def failed(self, design: Design, error: NoConfigWorks) -> None:
        """Print why."""
        self.num_failed += 1
        self.note(f"{self._head}: {error}")

    def start(self, plan: Plan) -> None:
        """A kernel's turn."""
        self._family = plan.spec.family
        self._bar.update(self._task, state=self._family)

    def trial(self, event: TrialEvent) -> None:
        """A variant of the kernel."""
        best = f"best {event.best_us:.1f} us, " if event.best_us is not None else ""
        self._bar.update(self._task, state=f"{self._family}: {best}{count_text(event.number, 'trial')}")

    def finish(self, outcome: Outcome) -> None:
        """Say why a kernel has no config."""
        if outcome.kind == "failed":
            for line in outcome_lines(outcome):
                self.note(line)


def design_text(design: Design) -> str:
    """A design on one short line, with the paper's symbols."""
    names = {"l'": "select_block_size", "n": "num_selected", "w": "window_size"}
    names |= {"l": "compress_block_size", "d": "compress_stride", "G": "group_size"}
    return " ".join(f"{symbol}={design[name]}" for symbol, name in names.items())
