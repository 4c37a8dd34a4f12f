"""Every Python block of the pages about the module runs as it is pasted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nsa_autotune.nn import page_table

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, fence: str = "python") -> list[str]:
    """The blocks of a page that are fenced as `fence`."""
    return re.findall(rf"^```{fence}\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    ("page", "index", "shapes"),
    [
        ("inference.md", 0, {"y": (1, 1, 512)}),
        ("inference.md", 1, {}),
        ("inference.md", 2, {"o": (2, 1, 8, 64)}),
        ("inference.md", 3, {}),
        ("module.md", 0, {"y": (300, 256)}),
    ],
)
def test_each_block_runs_alone(page: str, index: int, shapes: dict[str, tuple[int, ...]]) -> None:
    found: dict[str, Any] = {}
    exec(blocks(page)[index], found)
    assert {name: tuple(found[name].shape) for name in shapes} == shapes


def test_no_block_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(blocks("inference.md")) == 4 and len(blocks("inference.md", "python gpu")) == 1
    assert len(blocks("module.md")) == 1
    exec(blocks("inference.md")[1], found := {})
    assert "a free page for new tokens {'pages needed': 10, 'free': 8, 'of': 8}" in capsys.readouterr().out
    assert found["first"].host_lengths == (0,)


def test_the_block_for_a_gpu_calls_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a graph that captures by running the step at once and replays nothing."""
    replays = []

    class Graph:
        def replay(self) -> None:
            replays.append(1)

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(page_table, "_capturing", lambda x: True)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    found: dict[str, Any] = {}
    (block,) = blocks("inference.md", "python gpu")
    exec(block.replace('"cuda"', '"cpu"'), found)
    assert len(replays) == 20 and found["cache"].host_lengths == (321,) and found["out"].shape == (1, 1, 512)
