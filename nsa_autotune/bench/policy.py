"""Measurement policies: under which conditions a time is taken. A policy is part of the key of what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..spec import DEFAULT_POLICY, check_policy


@dataclass(frozen=True)
class Policy:
    """How launches reach the device, and what its second-level cache holds; locality is a field of the problem."""

    name: str
    graph: bool  # replayed from a CUDA graph, as decoding servers do; else launched one by one
    cold_l2: bool  # the cache is overwritten before every launch, as by the layers between two calls
    doc: str


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            Policy("eager-cold", False, True, "launched one by one, L2 overwritten before each: training, prefill"),
            Policy("eager-warm", False, False, "launched one by one, L2 as the launch before left it"),
            Policy("graph-cold", True, True, "replayed from a CUDA graph, L2 overwritten before each: decoding"),
            Policy("graph-warm", True, False, "replayed from a CUDA graph, L2 as the launch before left it"),
        )
    }
)


def get_policy(name: str = DEFAULT_POLICY) -> Policy:
    """The policy of this name; UnknownName with the known ones."""
    check_policy(name)
    return POLICIES[name]
