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
    with TuningStore("sqlite://") as store:
        now = store.winners(family="win_attn_fwd")[0]
    source = render(spec, Problem.from_dict(now.problem), now.config).source
    config = {name: value for name, value in now.config.items() if name != "narrow_tail"}  # from before that parameter
    old = replace(now, template_digest="of before", config=config)
    text = source.replace(template_digest(spec), "of before").replace('"narrow_tail":false,', "")
    kept = script.restamped(old, spec, [text])
    assert (kept.template_digest, kept.config, kept.samples_us) == (template_digest(spec), now.config, now.samples_us)
    assert script.restamped(old, spec, [text.replace("tl.exp2(", "tl.exp(")]) is None
    assert script.restamped(old, spec, [source]) is None, "the source of another template"
    assert script.restamped(old, spec, []) is None
