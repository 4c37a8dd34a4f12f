"""Pruning: what meets every condition goes, what a winner rests on stays, and a dry run tells the same numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cpu.store_fakes import EXAMPLES, H100, clear, contents, make_design, make_trial, make_winner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import func, select

from nsa_autotune.db import TuningStore
from nsa_autotune.db.models import FingerprintRow, ProblemRow, VariantRow
from nsa_autotune.db.prune import Pruning, prune
from nsa_autotune.errors import InvalidInput, StoreError

CURRENT = {"slc_attn_fwd": "t1"}
OLD, NEW = "2024-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00"
YEAR = "2025-01-01T00:00:00.000000+00:00"
OTHER = {**H100, "gpu": "NVIDIA H200"}


@pytest.fixture
def store() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


def config(number: int) -> dict[str, Any]:
    return {"config": {"BLOCK_M": number}}


TRIALS = {
    "old": make_trial(created=OLD, **config(1)),
    "new": make_trial(created=NEW, **config(2)),
    "stale": make_trial(created=NEW, template_digest="t0", **config(3)),
    "gone": make_trial(created=NEW, family="gone", template_digest="t9", **config(4)),
    "compile": make_trial(created=NEW, status="compile", **config(5)),
    "crash": make_trial(created=NEW, status="crash", **config(6)),
    "stale_crash": make_trial(created=NEW, status="crash", template_digest="t0", **config(7)),
    "twin": make_trial(created=NEW, status="same_code", **config(8)),
    "predicted": make_trial(created=OLD, kind="predicted", **config(9)),
    "library": make_trial(created=NEW, provider="cudnn", stage="baseline", config={}, template_digest=""),
    "elsewhere": make_trial(created=NEW, fingerprint=OTHER, **config(10)),
}


@pytest.mark.parametrize(
    ("pruning", "gone"),
    [
        (Pruning(before=YEAR), "old"),
        (Pruning(before=YEAR, predicted=True), "predicted"),
        (Pruning(stale=True), "gone stale stale_crash"),
        (Pruning(failed=True), "compile stale_crash"),
        (Pruning(failed=True, stale=True), "stale_crash"),
        (Pruning(family="gone"), "gone"),
        (Pruning(template_digest="t0"), "stale stale_crash"),
        (Pruning(gpu="NVIDIA H200"), "elsewhere"),
        (Pruning(fingerprint_digest=TRIALS["elsewhere"].fingerprint_digest), "elsewhere"),
        (Pruning(before=YEAR, stale=True), ""),
    ],
    ids=str,
)
def test_conditions(store: TuningStore, pruning: Pruning, gone: str) -> None:
    store.add_trials(list(TRIALS.values()))
    before = contents(store)
    counted = prune(store, pruning, CURRENT, dry_run=True)
    assert contents(store) == before, "a dry run only counts"
    assert prune(store, pruning, CURRENT) == counted
    left = [*store.trials(), *store.trials(kind="predicted")]
    assert sorted(name for name, trial in TRIALS.items() if trial not in left) == gone.split()
    assert counted.total == len(gone.split()) and counted.kept == 0


def test_a_condition_is_needed(store: TuningStore) -> None:
    for empty in (Pruning(), Pruning(predicted=True)):
        with pytest.raises(InvalidInput, match="needs a condition"):
            prune(store, empty, CURRENT)


def test_what_winners_rest_on_stays(store: TuningStore) -> None:
    winner = make_winner(created=OLD, template_digest="t0", **config(1))
    rests_on = [
        make_trial(created=OLD, template_digest="t0", stage="final", **config(1)),
        make_trial(created=OLD, template_digest="t0", stage="search", **config(1)),
        make_trial(created=OLD, template_digest="t0", stage="confirm", **config(2)),
        make_trial(created=OLD, provider="cudnn", stage="baseline", config={}, template_digest=""),
    ]
    others = [
        make_trial(created=OLD, template_digest="t0", stage="search", **config(2)),
        make_trial(created=OLD, template_digest="t0", stage="final", fingerprint=OTHER, **config(1)),
        make_trial(created=OLD, template_digest="t0", stage="final", problem_key='{"seq_k":1}', **config(1)),
        make_trial(created=OLD, template_digest="t0", stage="final", policy="graph-warm", **config(1)),
    ]
    store.add_trials([*rests_on, *others])
    store.set_winner(winner)
    store.add_design(make_design())
    found = prune(store, Pruning(before=YEAR), CURRENT)
    assert (found.total, found.kept) == (len(others), len(rests_on))
    assert {t.digest for t in store.trials()} == {t.digest for t in rests_on}
    assert store.winners() == [winner] and len(store.designs()) == 1


def test_rows_that_nothing_refers_to_go_too(store: TuningStore) -> None:
    store.add_trial(make_trial(fingerprint=OTHER, problem_key='{"seq_k":1}', **config(99)))
    store.set_winner(make_winner())
    store.add_design(make_design(fingerprint={**H100, "driver": "9"}))
    prune(store, Pruning(gpu="NVIDIA H200"), CURRENT)
    with store.transaction() as session:
        counts = [session.scalar(select(func.count(t.id))) for t in (FingerprintRow, ProblemRow, VariantRow)]
    assert counts == [2, 1, 1]


FREE = st.builds(
    make_trial,
    created=st.sampled_from([OLD, NEW]),
    status=st.sampled_from(["ok", "crash", "compile", "same_code"]),
    stage=st.sampled_from(["search", "final"]),
    config=st.sampled_from([{"BLOCK_M": 16}, {"BLOCK_M": 32}]),
    template_digest=st.sampled_from(["t0", "t1"]),
)
ASKED = st.builds(
    Pruning,
    before=st.sampled_from([None, YEAR]),
    stale=st.booleans(),
    failed=st.booleans(),
    family=st.just("slc_attn_fwd"),
)


@pytest.fixture(scope="module")
def shared() -> Iterator[TuningStore]:
    with TuningStore("sqlite://", import_shipped=False) as opened:
        yield opened


@settings(max_examples=max(20, EXAMPLES // 20), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(FREE, max_size=8), st.lists(st.sampled_from(["t0", "t1"]), max_size=2), ASKED)
def test_a_winner_never_changes(shared: TuningStore, trials: list[Any], templates: list[str], asked: Pruning) -> None:
    clear(shared)
    shared.add_trials(trials)
    for template in templates:
        shared.set_winner(make_winner(template_digest=template, config={"BLOCK_M": 16}))
    winners = shared.winners()
    own = [
        t
        for t in shared.trials()
        if any((t.config, t.template_digest) == (w.config, w.template_digest) for w in winners)
    ]
    counted = prune(shared, asked, CURRENT, dry_run=True)
    assert prune(shared, asked, CURRENT) == counted
    assert shared.winners() == winners
    assert {t.digest for t in own} <= {t.digest for t in shared.trials()}
    assert prune(shared, asked, CURRENT) == replace(counted, trials={}), "a second time finds nothing"


def test_a_store_for_reading_counts_only(store: TuningStore) -> None:
    store.add_trials(list(TRIALS.values()))
    store.read_only = True
    assert prune(store, Pruning(before=YEAR), CURRENT, dry_run=True).total == 1
    with pytest.raises(StoreError, match="reading only"):
        prune(store, Pruning(before=YEAR), CURRENT)
