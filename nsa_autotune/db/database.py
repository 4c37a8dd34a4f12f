"""TuningDatabase: questions to what was measured, answered with flat rows that name their evidence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy.orm import Session

from ..errors import InvalidInput, UnknownName
from .best import best_rows
from .compare import Values, compare_configs, compare_gpus, compare_versions
from .counts import count_rows
from .history import Between, check_between, history_rows, regression_rows
from .models import TrialRow
from .names import check_about, check_config, check_versions, count_about
from .narrow import About, trials_about, winners_about
from .query import query_rows
from .records import TrialRecord, WinnerRecord
from .rows import select_trials, select_winners, trial_of, winner_of
from .statement import Answer, ask
from .store import TuningStore

BY = ("seq",)
DEFAULT_LOSS = 0.03  # of a newer winner that counts as a regression
SQL_LIMIT = 1000  # rows of a statement

Row = dict[str, Any]
Problem = Mapping[str, object]
Found = TypeVar("Found")


class TuningDatabase:
    """Questions to a database; it only reads. Open an existing one by URL, or ask a TuningStore, which stays open.

    Rows are dicts of texts, numbers, booleans and None, the same names in all rows of an answer, ready for
    pandas.DataFrame. Shared arguments: `gpu` is a part of the name in any case; `problem` holds values of problem
    fields, constants of NSA among them; `current_templates` (family to digest) tells what is stale, and makes winners
    of the present templates come before later ones of others.
    Methods raise UnknownName or InvalidInput for a question that has no sense or names what no record has, StoreError
    as TuningStore does.
    """

    def __init__(
        self, database: str | TuningStore | None = None, *, current_templates: Mapping[str, str] | None = None
    ) -> None:
        self._owns = not isinstance(database, TuningStore)
        self.store = database if isinstance(database, TuningStore) else TuningStore(database, must_exist=True)
        self.current_templates = current_templates

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the store, if this opened it."""
        if self._owns:
            self.store.close()

    def best(
        self,
        *,
        gpu: str = "",
        family: str = "",
        problem: Problem | None = None,
        policy: str = "",
        by: str | None = None,
        limit: int | None = None,
    ) -> list[Row]:
        """The winner of each problem on each GPU, newest first.

        by='seq' orders them by sequence length instead and adds `growth`, the time over that of the next shorter
        length, and `config_change`.
        """
        if by is not None and by not in BY:
            raise UnknownName(f"by must be one of {', '.join(BY)}", {"by": by})
        about = About(gpu, family, problem or {}, policy)
        with self.store.reading() as session:
            rows = best_rows(session, about, self.current_templates, by=by, limit=limit)
            return self._checked(session, about, rows)

    def compare(
        self,
        *,
        gpus: Sequence[str] = (),
        between: Between | None = None,
        configs: Sequence[Values] = (),
        gpu: str = "",
        family: str = "",
        problem: Problem | None = None,
        policy: str = "",
        limit: int | None = None,
    ) -> list[Row]:
        """Two sides of each problem, with `ratio`, how many times as long `other` takes, and what the spreads allow.

        gpus: winners of the first beside those of each other one; all that have winners if nothing is compared.
        between: (version, old, new), such as ("triton", "3.6.0", "3.9.0"). configs: two sets of parameters, whose
        fastest measurements are compared.
        """
        if sum(map(bool, (gpus, between, configs))) > 1:
            raise InvalidInput("one thing is compared at a time", {}, "Name GPUs, versions or configs.")
        if configs and len(configs) != 2:
            raise InvalidInput("two configs are compared", {"configs": len(configs)}, "Name two.")
        check_between(between)
        about = About(gpu, family, problem or {}, policy)
        with self.store.reading() as session:
            if between is not None:
                rows = compare_versions(session, about, between)
            elif configs:
                rows = compare_configs(session, about, *configs)
            else:
                rows = compare_gpus(session, about, gpus, self.current_templates)
            return self._checked(session, about, rows, between, configs)[:limit]

    def history(
        self,
        *,
        gpu: str = "",
        family: str = "",
        problem: Problem | None = None,
        policy: str = "",
        limit: int | None = None,
    ) -> list[Row]:
        """What was best under each set of versions, newest first, each with its `ratio` to the one before it.

        Where a later winner took a winner's place, the fastest of its final race stands for it, with verdict `final`.
        """
        with self.store.reading() as session:
            about = About(gpu, family, problem or {}, policy)
            return self._checked(session, about, history_rows(session, about, limit))

    def regressions(
        self,
        *,
        loss: float = DEFAULT_LOSS,
        between: Between | None = None,
        gpu: str = "",
        family: str = "",
        problem: Problem | None = None,
        policy: str = "",
        limit: int | None = None,
    ) -> list[Row]:
        """Rows of `history` that take more than `loss` longer than the one before it, the greatest loss first.

        between: compares the newest of two values of one version instead, such as ("tool_version", "0.1.0", "0.2.0").
        """
        if not 0 <= loss < 10:
            raise InvalidInput("a loss is a share from 0 to 10", {"loss": loss}, "0.03 is 3 %.")
        check_between(between)
        with self.store.reading() as session:
            about = About(gpu, family, problem or {}, policy)
            return self._checked(session, about, regression_rows(session, about, loss, between, limit), between)

    def stats(self, *, gpu: str = "", family: str = "", problem: Problem | None = None, policy: str = "") -> list[Row]:
        """Numbers of trials by status, predictions and winners by verdict, for each GPU and family.

        `problems` were measured or have a winner, `tuned` have one; `coverage` is their ratio.
        """
        with self.store.reading() as session:
            about = About(gpu, family, problem or {}, policy)
            return self._checked(session, about, count_rows(session, about))

    def query(
        self,
        *,
        table: str = "winners",
        gpu: str = "",
        family: str = "",
        problem: Problem | None = None,
        status: str | None = None,
        kind: str = "measured",
        limit: int | None = None,
    ) -> list[Row]:
        """Winners or trials, newest first; see TuningStore.query."""
        with self.store.reading() as session:
            rows = query_rows(
                session,
                gpu=gpu,
                family=family,
                problem=problem,
                status=status,
                kind=kind,
                table=table,
                limit=limit,
                current_templates=self.current_templates,
            )
            return self._checked(session, About(gpu, family, problem or {}), rows)

    def counts(
        self, *, gpu: str = "", family: str = "", problem: Problem | None = None, policy: str = ""
    ) -> dict[str, int]:
        """Numbers of winners, measured trials and predictions: what there is where another answer is empty."""
        with self.store.reading() as session:
            return count_about(session, About(gpu, family, problem or {}, policy))

    def winners(
        self, *, gpu: str = "", family: str = "", problem: Problem | None = None, policy: str = ""
    ) -> list[WinnerRecord]:
        """Winners as whole records, newest first."""
        with self.store.reading() as session:
            about = About(gpu, family, problem or {}, policy)
            rows = session.execute(select_winners(winners_about(session, about)))
            return self._checked(session, about, [winner_of(*row) for row in rows])

    def trials(
        self, *, gpu: str = "", family: str = "", problem: Problem | None = None, policy: str = ""
    ) -> list[TrialRecord]:
        """Measured trials as whole records, newest first."""
        with self.store.reading() as session:
            about = About(gpu, family, problem or {}, policy)
            where = [TrialRow.kind == "measured", *trials_about(session, about)]
            return self._checked(session, about, [trial_of(*row) for row in session.execute(select_trials(where))])

    def sql(self, text: str, *, limit: int = SQL_LIMIT) -> Answer:
        """The first `limit` rows of one SELECT; InvalidInput if it would write, or is not understood."""
        if limit < 1:
            raise InvalidInput("limit is a number of rows", {"limit": limit}, f"The default is {SQL_LIMIT}.")
        with self.store.reading() as session:
            return ask(session, self.store.location, text, limit)

    def _checked(
        self,
        session: Session,
        about: About,
        rows: list[Found],
        between: Between | None = None,
        configs: Sequence[Values] = (),
    ) -> list[Found]:
        """The rows; without one UnknownName if the question names what nothing in the database has."""
        if not rows:
            check_about(session, about, self.current_templates or ())
            if between is not None:
                check_versions(session, between[0], between[1:])
            for values in configs:
                check_config(session, about.family, values)
        return rows
