"""Winners whose template changed keep serving only if they run the code that was measured."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from nsa_autotune.codegen.render import render, template_digest
from nsa_autotune.db import TuningStore
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def test_only_the_code_that_was_measured_is_restamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("restamp_winners")
    spec = get_spec("win_attn_fwd")
    monkeypatch.setattr(script, "compiles_alike", lambda *_: False)
    with TuningStore("sqlite://") as store:
        now = next(w for w in store.winners(family="win_attn_fwd") if not w.config["narrow_tail"])
    source = render(spec, Problem.from_dict(now.problem), now.config).source
    config = {name: value for name, value in now.config.items() if name != "narrow_tail"}  # from before that parameter
    old = replace(now, template_digest="of before", config=config)
    text = source.replace(template_digest(spec), "of before").replace('"narrow_tail":false,', "")
    kept = script.restamped(old, spec, [text])
    assert (kept.template_digest, kept.config, kept.samples_us) == (template_digest(spec), now.config, now.samples_us)
    assert script.restamped(old, spec, [text.replace("tl.exp2(", "tl.exp(")]) is None
    assert script.restamped(old, spec, [source]) is None, "the source of another template"
    assert script.restamped(old, spec, []) is None
    helper = text + "\n\ndef a_helper():\n    return 1\n"
    assert script.restamped(old, spec, [helper]) is None and script.restamped(old, spec, [helper], True) == kept
    assert script.restamped(old, spec, [text.replace("tl.exp2(", "tl.exp(")], True) is None
    monkeypatch.setattr(script, "compiles_alike", lambda *_: True)  # other text, the same machine code
    assert script.restamped(old, spec, [text.replace("tl.exp2(", "tl.exp(")]) == kept
    assert script.restamped(old, spec, [text.replace("warmup=False", "warmup=True")]) is None, "other host code"


def test_the_trial_that_proves_a_winner_ships_and_is_restamped_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script, ship = (importlib.import_module(name) for name in ("restamp_winners", "ship_winners"))
    spec = get_spec("win_attn_fwd")
    with TuningStore("sqlite://") as store:
        winner = store.winners(family="win_attn_fwd")[0]
        for error in (0.1, 0.3, 0.2):
            store.add_trial(replace(winner.as_trial(), max_error=error, baseline_error=1e-3))
        (pair,) = ship.proven(store, [winner])
        assert pair[1].max_error == 0.3, "the worst of them"
    table, folder = tmp_path / "sm_90.jsonl", tmp_path / "sm_90"
    ship.write_shipped([pair], table, folder)
    stamp = template_digest(spec)
    for path in (table, *folder.glob("*.py")):
        path.write_text(path.read_text(encoding="utf-8").replace(stamp, "0" * len(stamp)), encoding="utf-8")
    assert script.restamp(table, folder) == (1, [])
    with TuningStore("sqlite://", import_shipped=False) as store:
        store.import_jsonl(table, source=None)
        ((again, trial),) = ship.proven(store, store.winners())
    assert (again.template_digest, again.samples_us) == (stamp, winner.samples_us)
    assert (trial.template_digest, trial.max_error, trial.config) == (stamp, 0.3, winner.config)
