"""benchmarks/carry_over.py and the identity of host code: a change of template that changes nothing carries over."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nsa_autotune.codegen.host_code import launch_sha, launch_sha_of
from nsa_autotune.codegen.load import load
from nsa_autotune.codegen.render import render
from nsa_autotune.kernels import get_spec
from nsa_autotune.spec import Problem

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "carry_over.py"
SMALL = Problem(seq_q=256, seq_k=256, num_q_heads=4, num_kv_heads=2, d_qk=16, d_v=16)
FAMILIES = ("gate_sum_fwd", "win_attn_fwd")
COMPILE_TWICE = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import carry_over
variants = json.loads(sys.argv[2])
found = [carry_over.compile_one(variant, "cuda:90") for variant in variants]
carry_over.touch_templates(pathlib.Path(sys.argv[3]))
print(json.dumps([found, [carry_over.compile_one(variant, "cuda:90") for variant in variants]]))
"""


def small_variant(family: str) -> dict[str, Any]:
    """The default config of a problem that compiles fast, as a line of the shipped winners names it."""
    spec = get_spec(family)
    names = {"problem_key": spec.problem_key(SMALL), "config": spec.default_config(SMALL)}
    return {"family": family, "problem": SMALL.to_dict(), **names}


@pytest.fixture
def script() -> ModuleType:
    """The benchmark as a module."""
    spec = importlib.util.spec_from_file_location("carry_over", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_comment_in_every_template_changes_digests_and_neither_machine_code_nor_launch(
    script: ModuleType, tmp_path: Path
) -> None:
    variants = json.dumps([small_variant(family) for family in FAMILIES])
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "NSA_AUTOTUNE_CACHE_DIR": str(tmp_path / "ours")}
    command = [sys.executable, "-c", COMPILE_TWICE, str(SCRIPT.parent), variants, str(tmp_path / "templates")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert all(a["template_digest"] != b["template_digest"] for a, b in zip(first, second, strict=True))
    assert script.shares(first, second)[-1] == {
        "family": "all",
        "winners": 2,
        "fail": 0,
        "same machine code": 2,
        "same PTX": 2,
        "same launch": 2,
    }


def test_shares_count_by_family_and_errors_are_equal_to_nothing(script: ModuleType) -> None:
    base = {"problem": {}, "config": {}, "ptx_sha": "p", "launch_sha": "l"}
    first = [{**base, "family": "a", "binary_sha": "1"}, {**base, "family": "b", "binary_sha": "1"}]
    second = [{**base, "family": "a", "binary_sha": "2"}, {"problem": {}, "config": {}, "family": "b", "error": "no"}]
    rows = {row["family"]: row for row in script.shares(first, second)}
    assert [rows["a"][name] for name in ("winners", "fail", "same machine code", "same PTX")] == [1, 0, 0, 1]
    assert [rows["b"][name] for name in ("winners", "fail", "same machine code", "same PTX")] == [1, 1, 0, 0]
    assert [rows["all"][name] for name in ("winners", "fail", "same PTX", "same launch")] == [2, 1, 1, 1]


def test_ptx_is_compared_without_comments_and_versions(script: ModuleType) -> None:
    text = "// a note\n.version 8.7\n\n  add.s32 %r1, %r2, 1; // more\n.loc 1 2 3\n"
    assert script.plain_ptx(text) == "add.s32 %r1, %r2, 1;"


SOURCE = '''
"""Digest 1."""
import triton
CONSTANTS = {"BLOCK": 64}
@triton.jit(do_not_specialize=["n"])
def kernel(x, n):
    x + 1
if True:
    @gluon.jit
    def other_kernel(x):
        x - 3
    LAYOUTS = {}
def launch(x):
    """Fills x."""
    # a comment
    kernel.run(x, grid=(x.shape[0], 2), **CONSTANTS)
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("Digest 1", "Digest 2", True),
        ("Fills x.", "Fills it.", True),
        ("# a comment", "# another", True),
        ("x + 1", "x + 2", True),
        ("x - 3", "x - 4", True),
        ("LAYOUTS = {}", "LAYOUTS = []", False),
        ("shape[0], 2", "shape[0], 4", False),
        ('"BLOCK": 64', '"BLOCK": 32', False),
        ("@triton.jit(", "@other.jit(", False),
        ("@gluon.jit", "@other.jit", False),
    ],
)
def test_host_code_is_all_but_kernels_comments_and_docstrings(old: str, new: str, same: bool) -> None:
    assert (launch_sha(SOURCE) == launch_sha(SOURCE.replace(old, new))) == same


def test_a_loaded_variant_tells_the_identity_of_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSA_AUTOTUNE_CACHE_DIR", str(tmp_path))
    spec = get_spec("gate_sum_fwd")
    rendered = render(spec, SMALL, spec.default_config(SMALL))
    assert launch_sha_of(load(rendered).launch) == launch_sha(rendered.source)
