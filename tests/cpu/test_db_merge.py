"""Merging: the same result in any order and however often, nothing measured is lost, and who serves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cpu.store_fakes import EXAMPLES, clear, contents, make_design, make_trial, make_winner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.db.designs import DesignRecord
from nsa_autotune.db.exchange import format_line
from nsa_autotune.db.rows import serving_rank
from nsa_autotune.errors import StoreError

MANY = settings(
    max_examples=max(12, EXAMPLES // 50),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DAYS = st.sampled_from(["2025-03-01T10:00:00+00:00", "2025-03-02T10:00:00.5+00:00", "2025-03-02T10:00:00.500000Z"])
NUMBERS = st.sampled_from([1.0, 2.0, 3.0])
WINNERS = st.builds(
    lambda key, us, config, created, verdict, source: make_winner(
        template_digest=key,
        samples_us=(us, us + 0.25),
        config={"BLOCK_M": config},
        created=created,
        verdict=verdict,
        source=source,
    ),
    st.sampled_from(["t1", "t2"]),
    NUMBERS,
    st.sampled_from([16, 32]),
    DAYS,
    st.sampled_from(["raced", "provisional", "confirmed", "carried"]),
    st.sampled_from(["local", "imported"]),
)
TRIALS = st.builds(lambda us, created: make_trial(median_us=us, created=created), NUMBERS, DAYS)
DESIGNS = st.builds(
    lambda us, window, kind, created: make_design(
        latency_us=us, nsa={"window_size": window}, kind=kind, created=created
    ),
    NUMBERS,
    st.sampled_from([256, 512]),
    st.sampled_from(["measured", "predicted"]),
    DAYS,
)
DATABASES = st.lists(st.one_of(WINNERS, TRIALS, DESIGNS), max_size=6)

Records = list[WinnerRecord | TrialRecord | DesignRecord]


@pytest.fixture(scope="module")
def stores() -> Iterator[list[TuningStore]]:
    """Five empty stores, made once: every example empties them."""
    opened = [TuningStore("sqlite://", import_shipped=False) for _ in range(5)]
    yield opened
    for store in opened:
        store.close()


def fill(store: TuningStore, records: Records) -> TuningStore:
    clear(store)
    for record in records:
        if isinstance(record, WinnerRecord):
            store.set_winner(record)
        elif isinstance(record, DesignRecord):
            store.add_design(record)
        else:
            store.add_trial(record)
    return store


def merged(into: TuningStore, *others: TuningStore, source: str | None = None) -> list[str]:
    clear(into)
    for other in others:
        into.merge(other, source=source)
    return contents(into)


@MANY
@given(DATABASES, DATABASES, DATABASES)
def test_any_order_any_grouping_any_number_of_times(
    stores: list[TuningStore], one: Records, two: Records, three: Records
) -> None:
    a, b, c, left, right = stores
    for store, records in zip((a, b, c), (one, two, three), strict=True):
        fill(store, records)
    assert merged(left, a) == contents(a), "merging into an empty database copies"
    both = merged(left, a, b)
    assert merged(right, b, a) == both, "commutative"
    assert merged(right, a, b, b, a) == both, "idempotent"
    all_three = merged(left, a, b, c)
    merged(right, b, c)
    assert merged(left, a, right) == all_three, "associative"
    imported = merged(left, a, b, c, source="imported")
    assert merged(right, c, b, a, source="imported") == imported, "imports come in any order"


@MANY
@given(DATABASES, DATABASES)
def test_nothing_measured_is_lost_and_the_greatest_serves(
    stores: list[TuningStore], one: Records, two: Records
) -> None:
    a, b, both, *_ = stores
    fill(a, one)
    fill(b, two)
    found, merged_all = [*a.winners(), *b.winners()], merged(both, a, b)
    kept = {(t.template_digest, t.samples_us) for t in both.trials()}
    serving = {winner.template_digest: winner for winner in both.winners()}
    for winner in found:
        best = max((w for w in found if w.digest == winner.digest), key=serving_rank)
        assert serving[winner.template_digest] == best
        assert winner.samples_us == best.samples_us or (winner.template_digest, winner.samples_us) in kept
    assert {t.digest for store in (a, b) for t in store.trials()} <= {t.digest for t in both.trials()}
    latencies = {(d.nsa["window_size"], d.latency_us) for d in both.designs()}
    assert {(d.nsa["window_size"], d.latency_us) for store in (a, b) for d in store.designs()} == latencies
    assert len(merged_all) == len(set(merged_all))


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


@pytest.fixture
def other() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


@pytest.mark.parametrize(
    ("here", "came", "serves"),
    [
        ({"source": "local", "verdict": "raced"}, {"source": "imported", "verdict": "confirmed"}, "here"),
        ({"source": "imported"}, {"source": "local"}, "came"),
        ({"verdict": "confirmed"}, {"verdict": "provisional", "created": "2026-03-01T10:00:00+00:00"}, "here"),
        ({"verdict": "provisional"}, {"verdict": "carried", "created": "2025-03-01T10:00:01+00:00"}, "came"),
        ({"verdict": "carried"}, {"verdict": "raced"}, "here"),
        ({"created": "2025-03-01T10:00:00+00:00"}, {"created": "2025-03-01T10:00:00.1+00:00"}, "came"),
    ],
    ids=str,
)
def test_who_serves(
    store: TuningStore, other: TuningStore, here: dict[str, str], came: dict[str, str], serves: str
) -> None:
    first = make_winner(median_us=5.0, samples_us=(5.0,), **here)
    second = make_winner(median_us=4.0, samples_us=(4.0,), **came)
    store.set_winner(first)
    other.set_winner(second)
    summary = store.merge(other, source=None)
    assert store.winners() == [first if serves == "here" else second]
    assert {t.samples_us for t in store.trials()} == {(5.0,), (4.0,)}
    (conflict,) = summary.conflicts
    assert (conflict.here_us, conflict.came_us, conflict.came_serves) == (5.0, 4.0, serves == "came")
    assert (summary.winners, summary.new) == (1, 0)
    assert (summary.kept, summary.replaced) == ((1, 0) if serves == "here" else (0, 1))


def test_winners_that_differ_in_nothing_but_time_serve_alike_in_any_order(
    store: TuningStore, other: TuningStore
) -> None:
    twins = [make_winner(median_us=us, samples_us=(us,)) for us in (4.0, 5.0)]
    served = []
    for order in (twins, twins[::-1]):
        clear(store)
        for winner in order:
            clear(other)
            other.set_winner(winner)
            store.merge(other)
        served.append(contents(store))
    assert served[0] == served[1]


def test_a_decision_made_here_replaces_and_keeps_the_samples_of_the_one_before(store: TuningStore) -> None:
    imported = make_winner(source="imported", verdict="confirmed", samples_us=(5.0,))
    store.set_winner(imported)
    store.set_winner(make_winner(samples_us=(6.0,)))
    assert [t.samples_us for t in store.trials(stage="final")] == [(5.0,)]
    assert [w.samples_us for w in store.winners()] == [(6.0,)]
    store.add_trial(make_trial(stage="final", samples_us=(6.0,)))
    store.set_winner(make_winner(samples_us=(7.0,)))  # the race of the one before is stored already
    assert sorted(t.samples_us for t in store.trials(stage="final")) == [(5.0,), (6.0,)]


def test_shipped_winners_stay_with_their_program(store: TuningStore, other: TuningStore) -> None:
    other.set_winner(make_winner(source="shipped"))
    other.set_winner(make_winner(template_digest="t2"))
    summary = store.merge(other)
    assert (summary.winners, summary.shipped) == (1, 1)
    assert [(w.template_digest, w.source) for w in store.winners()] == [("t2", "imported")]


def test_an_export_merges_like_its_database(store: TuningStore, other: TuningStore, tmp_path: Path) -> None:
    for record in (make_winner(), make_winner(template_digest="t2", source="shipped")):
        other.set_winner(record)
    other.add_trial(make_trial())
    other.add_design(make_design())
    assert other.export_jsonl(tmp_path / "all.jsonl") == 4
    with TuningStore("sqlite://", import_shipped=False) as again:
        again.merge(tmp_path / "all.jsonl")
        store.merge(other)
        assert contents(again) == contents(store) != []


def test_a_second_evaluation_of_a_design_is_set_aside(store: TuningStore, other: TuningStore) -> None:
    guess, measured = make_design(kind="predicted", latency_us=20.0), make_design(latency_us=30.0)
    store.add_design(guess)
    other.add_design(measured)
    store.merge(other)
    assert store.designs(study_digest=measured.study_digest) == [measured]
    (aside,) = (design for design in store.designs() if design.latency_us == 20.0)
    assert replace(aside, study=guess.study) == guess


def test_a_bad_row_of_the_other_changes_nothing(store: TuningStore, other: TuningStore) -> None:
    from sqlalchemy import text

    other.add_trial(make_trial())
    other.set_winner(make_winner())
    with other.transaction(write=True) as session:
        session.execute(text("UPDATE nsa_winners SET median_us = 'fast; DROP TABLE nsa_trials'"))
    with pytest.raises(StoreError, match=r"row 1 of nsa_winners is no valid record.*median_us.*Nothing was merged"):
        store.merge(other)
    assert contents(store) == []


def test_records_of_the_future_are_refused(store: TuningStore, tmp_path: Path) -> None:
    path = tmp_path / "future.jsonl"
    path.write_text(format_line(make_winner(created="9999-03-01T10:00:00+00:00")))
    with pytest.raises(StoreError, match="future"):
        store.import_jsonl(path)
    assert contents(store) == []


def test_an_import_leaves_a_shipped_winner_that_it_brings_again(
    store: TuningStore, other: TuningStore, tmp_path: Path
) -> None:
    path = tmp_path / "own.jsonl"
    store.set_winner(make_winner(source="shipped"))
    store.export_jsonl(path)
    summary = store.import_jsonl(path)
    assert (summary.winners, summary.new, summary.replaced, summary.kept) == (1, 0, 0, 0)
    assert [w.source for w in store.winners()] == ["shipped"] and store.trials() == []
    other.set_winner(make_winner(source="shipped", median_us=9.0))
    other.import_jsonl(path)
    assert [(w.source, w.median_us) for w in other.winners()] == [("imported", 11.0)], "another one came"


def test_counts_say_what_is_new(store: TuningStore, other: TuningStore) -> None:
    one, two = make_design(), make_design(latency_us=20.0, created="2024-01-01T00:00:00+00:00")
    fill(other, [one, make_trial(), make_trial(median_us=2.0), make_winner()])
    store.add_trial(make_trial())
    found = store.merge(other)
    assert (found.trials, found.new_trials, found.designs, found.new_designs) == (2, 1, 1, 1)
    assert (found.winners, found.new, found.is_empty) == (1, 1, False)
    found = store.merge(other)
    assert (found.new_trials, found.new_designs, found.new, found.replaced, found.kept) == (0, 0, 0, 0, 0)
    fill(other, [two])
    assert [store.merge(other).new_designs for _ in range(2)] == [1, 0], "an older evaluation is set aside once"
    assert store.merge(fill(other, [])).is_empty
