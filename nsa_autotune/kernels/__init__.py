"""One spec file a family; discovery scans this folder and fails loudly."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from ..errors import UnknownName
from ..spec import KernelSpec

# order in which a training step, then a decode step uses the families; others follow by name
PIPELINE = (
    "cmp_pool_fwd",
    "cmp_mlp_fwd",
    "cmp_attn_fwd",
    "slc_select_fwd",
    "slc_attn_fwd",
    "win_attn_fwd",
    "gate_sum_fwd",
    "win_sum_fwd",
    "gate_sum_bwd",
    "win_attn_bwd_dq",
    "win_attn_bwd_dkv",
    "slc_attn_bwd_dq",
    "slc_attn_bwd_dkv",
    "cmp_attn_bwd_dq",
    "cmp_attn_bwd_dkv",
    "cmp_mlp_bwd",
    "cmp_pool_bwd",
    "kv_append_fwd",
    "cmp_pool_append_fwd",
    "cmp_mlp_append_fwd",
    "cmp_decode_fwd",
    "slc_win_decode_fwd",
)

# families that do the work of others in one kernel, where that was measured to be faster
FUSED: Mapping[str, tuple[str, ...]] = {"win_sum_fwd": ("win_attn_fwd", "gate_sum_fwd")}


@cache
def all_specs() -> dict[str, KernelSpec]:
    """Every family's spec by name, in pipeline order."""
    found: dict[str, KernelSpec] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name.startswith("_"):
            continue
        spec = importlib.import_module(f"{__name__}.{module.name}").SPEC
        if spec.family != module.name:
            raise UnknownName("a spec file is named after its family", {"file": module.name, "family": spec.family})
        found[spec.family] = spec
    order = {family: index for index, family in enumerate(PIPELINE)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def get_spec(family: str) -> KernelSpec:
    """The spec of one family; raises UnknownName with the nearest one."""
    specs = all_specs()
    if family not in specs:
        near = difflib.get_close_matches(family, specs, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Families: {', '.join(specs)}."
        raise UnknownName("no such kernel family", {"family": family}, remedy)
    return specs[family]
