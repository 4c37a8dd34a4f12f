#!/usr/bin/env bash
# Install a wheel into a new environment and use it from an empty folder: render, look up, serve one forward on the CPU.
# Usage: wheel_smoke.sh PYTHON WHEEL   (PYTHON: an interpreter whose environment has the dependencies; they are reused)
set -euo pipefail

python=$(realpath -s "$1")
wheel=$(realpath "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
fresh="$work/venv/bin/python"
# The dependencies come from the first environment; appended after the new one's own folder, and an editable install is not a path.
deps=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$fresh" - "$deps" <<'PY'
import pathlib
import sys
import sysconfig

pathlib.Path(sysconfig.get_path("purelib"), "dependencies.pth").write_text(f"{sys.argv[1]}\n")
PY
"$fresh" -m pip install --quiet --no-deps --no-index --force-reinstall "$wheel"

mkdir "$work/empty" "$work/home"
cd "$work/empty"
env -u PYTHONPATH -u NSA_AUTOTUNE_DB -u NSA_AUTOTUNE_CACHE_DIR \
    HOME="$work/home" XDG_CACHE_HOME="$work/home/cache" XDG_DATA_HOME="$work/home/data" \
    "$fresh" - "$work" <<'PY'
import sys
from pathlib import Path

import torch

import nsa_autotune
from nsa_autotune import NativeSparseAttention, NSAConfig
from nsa_autotune.codegen.render import render
from nsa_autotune.db import TuningStore, WinnerRecord
from nsa_autotune.dispatch.dispatcher import Dispatcher
from nsa_autotune.dispatch.fingerprint import for_target
from nsa_autotune.kernels import all_specs

work = Path(sys.argv[1])
home = Path(nsa_autotune.__file__).resolve()
assert work.resolve() in home.parents, f"the wheel was not used: {home}"

for family, spec in all_specs().items():
    problem = spec.cases[0]
    rendered = render(spec, problem, spec.default_config(problem))
    assert f"def {family}_" in rendered.source and "def launch(" in rendered.source
    print(f"rendered {family}: {len(rendered.source.splitlines())} lines")

fingerprint = for_target("cuda:90")
with TuningStore() as store:
    print(f"database: {len(store.winners())} winners shipped")
    store.set_winner(
        WinnerRecord(
            fingerprint=fingerprint.to_dict(),
            family=spec.family,
            problem=problem.to_dict(),
            problem_key=spec.problem_key(problem),
            config=spec.default_config(problem),
            template_digest=rendered.template_digest,
            median_us=1.0,
            p20_us=1.0,
            p80_us=1.0,
            samples_us=(1.0,),
        )
    )
    choice = Dispatcher(store, strict=True, fingerprint=fingerprint).choose(spec, problem)
    print(f"looked up {spec.family}: {choice.step}")
assert any((work / "home").rglob("*.sqlite")), "the database does not lie in the user's data folder"

torch.manual_seed(0)
module = NativeSparseAttention(64, 4, 2, 16, config=NSAConfig(window_size=64))
y = module(torch.randn(1, 100, 64))
assert y.shape == (1, 100, 64) and torch.isfinite(y).all()
print("served one forward on the CPU")
PY
"$work/venv/bin/nsa-autotune" --help >/dev/null
env HOME="$work/home" XDG_DATA_HOME="$work/home/data" "$work/venv/bin/nsa-autotune" report --out "$work/home/report"
grep -q 'id="report-data"' "$work/home/report/index.html"
env HOME="$work/home" XDG_DATA_HOME="$work/home/data" "$work/venv/bin/nsa-autotune" ship --gpu H200 --seq 8k --out "$work/shipped"
"$fresh" -m pip uninstall --quiet --yes nsa-autotune
PYTHONPATH="$work/shipped" "$fresh" -c '
import nsa_tuned_h200, torch
y = nsa_tuned_h200.NativeSparseAttention(64, 4, 2, 16)(torch.randn(1, 100, 64))
assert torch.isfinite(y).all()
print("the shipped package served one forward without nsa-autotune")'
test -z "$(ls -A "$work/empty")" || { echo "files were left in the working folder: $(ls -A "$work/empty")" >&2; exit 1; }
echo "wheel smoke test passed"
