"""What `benchmarks/counters.py` reads of Nsight Compute's output."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from nsa_autotune.errors import InvalidInput

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COLUMNS = (
    "ID",
    "Kernel Name",
    "gpu__time_duration.sum",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "dram__a.avg.pct_of_peak_sustained_active",
    "gpu__b.avg.pct_of_peak_sustained_elapsed",
)
HEAD = ",".join(f'"{name}"' for name in COLUMNS)
SAID = f"""==PROF== Connected to process 7
nsa-counters:slc_attn_fwd, 8192 tokens, locality 0
nsa-counters:win_attn_fwd, 8192 tokens
{HEAD}
"","","ns","%","inst","%","%"
"0","void elementwise<arange_cuda_out>()","900","1","0","0","99"
"1","slc_union_kernel","40,000","10.5","2.25","n/a","99"
"2","slc_attn_fwd_kernel","1,200,000.5","70","1","30","99"
"3","void elementwise<arange_cuda_out>()","900","1","0","0","99"
"4","win_attn_fwd_kernel","320000","60","0.5","61","99"
"""


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("counters")


def test_kernels_get_the_name_of_their_call(counters: ModuleType) -> None:
    union, selected, window = counters.read_launches(SAID)
    assert union.name == selected.name == "slc_attn_fwd, 8192 tokens, locality 0"
    assert window.name == "win_attn_fwd, 8192 tokens"
    assert (union.ms, selected.ms) == pytest.approx((0.04, 1.2000005))
    assert union.busy == {"lts__throughput": 10.5} and union.waits == {"barrier": 2.25}  # n/a is no figure
    assert window.busy == {"lts__throughput": 60.0, "dram__a": 61.0}  # what sums up several units is left out


def test_the_page_names_the_busiest_first_and_leaves_short_kernels_out(counters: ModuleType) -> None:
    page = counters.markdown(counters.read_launches(SAID), {"gpu": "NVIDIA X"}, "command", "2026-01-02T03:04:05")
    assert (
        "| win_attn_fwd, 8192 tokens | win_attn_fwd_kernel | 0.320 | dram__a 61, lts__throughput 60 | barrier 0.5 |"
        in page
    )
    assert "slc_union_kernel" not in page and "# Counters on NVIDIA X, 2026-01-02" in page


def test_output_without_a_launch_is_shown(counters: ModuleType) -> None:
    with pytest.raises(InvalidInput, match=r"profiled no launch.*ERR_NVGPUCTRPERM"):
        counters.read_launches("==ERROR== ERR_NVGPUCTRPERM\n")
