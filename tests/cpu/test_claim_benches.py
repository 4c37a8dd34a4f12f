"""benchmarks/recertify.py and benchmarks/codesign.py: what they change, what they add up, and their pages."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cpu.search_fakes import PROBLEM

from nsa_autotune.codegen import render as render_module
from nsa_autotune.codegen.host_code import launch_sha
from nsa_autotune.codegen.render import template_digest, template_dir
from nsa_autotune.errors import NSAError
from nsa_autotune.kernels import get_spec

FOLDER = Path(__file__).parents[2] / "benchmarks"
FACTS = {"gpu": "Fake 100", "triton": "3"}


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    """Both as modules; their neighbour is found as when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield {name: importlib.import_module(name) for name in ("recertify", "codesign")}
        for name in ("recertify", "codesign", "forward"):
            sys.modules.pop(name, None)


@pytest.fixture
def recertify(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["recertify"]


@pytest.fixture
def codesign(scripts: dict[str, ModuleType]) -> ModuleType:
    return scripts["codesign"]


def test_every_kernel_is_another_text_that_does_the_same(
    recertify: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "templates"
    shutil.copytree(template_dir(), copy)
    recertify.retouch(copy)
    for family in recertify.FAMILIES.split(","):
        spec = get_spec(family)
        how = (spec, PROBLEM, spec.default_config(PROBLEM))
        before, digest = render_module.render(*how).source, template_digest(spec)
        with monkeypatch.context() as patch:
            patch.setattr(render_module, "template_dir", lambda: copy)
            after = render_module.render(*how).source
            assert template_digest(spec) != digest
        kernels = [part.split("\n", 1)[0] for part in after.split("_kernel(\n")]
        assert after.count(recertify.COMMENT) >= len(kernels) - 1 > 0
        assert launch_sha(after) == launch_sha(before)


@pytest.mark.parametrize(("seconds", "verdict"), [(9.0, "met"), (11.0, "missed")])
def test_the_page_says_whether_a_tenth_was_enough(recertify: ModuleType, seconds: float, verdict: str) -> None:
    cost = recertify.Cost(100.0, seconds, "9 winners\n")
    text = recertify.page(cost, FACTS, "python benchmarks/recertify.py", "2026-01-02")
    assert f"| {seconds:.1f} | {seconds / 100:.1%} |" in text and f"Mark: 10%, {verdict}." in text
    assert "Fake 100, 2026-01-02" in text and "triton 3" in text and "9 winners\n```" in text


def design(**rest: Any) -> dict[str, Any]:
    """One as codesign prints it."""
    constants = {"select_block_size": 64, "num_selected": 16, "window_size": 512}
    constants |= {"compress_block_size": 32, "compress_stride": 16}
    found = {"latency_us": 100.0, "mass_kept": 0.9, "output_error": 0.1, "locality": None, "on_front": True}
    return {**found, **constants, **rest}


def test_the_sum_is_that_of_the_designs_kernels(codesign: ModuleType) -> None:
    rows = [
        {"work": "cmp_pool_fwd, k and v", "kind": "branch", "median_us": 5.0},
        {"work": "slc_attn_fwd", "kind": "branch", "median_us": 7.0},
        {"work": "gate_sum_bwd", "kind": "branch", "median_us": 50.0},
        {"work": "slc_attn_fwd", "kind": "whole", "median_us": 500.0},
    ]
    assert codesign.sum_of_parts(rows, {"cmp_pool_fwd": 1.0, "slc_attn_fwd": 1.0}) == 12.0
    with pytest.raises(NSAError, match="win_attn_fwd"):
        codesign.sum_of_parts(rows, {"slc_attn_fwd": 1.0, "win_attn_fwd": 1.0})


def test_the_page_has_the_front_alone(codesign: ModuleType) -> None:
    designs = [design(bench_us=103.0), design(on_front=False, latency_us=333.0)]
    text = codesign.page(designs, FACTS, "python benchmarks/codesign.py", "2026-01-02")
    assert "| 100.0 | 103.0 | +3.0% | 0.9000 | 0.1000 | 0.00 | 64 | 16 | 512 | 32 | 16 |" in text
    assert "333" not in text and "front of 2 designs" in text
