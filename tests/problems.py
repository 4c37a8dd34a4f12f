"""The problem that a test of every family asks a family for."""

from __future__ import annotations

from nsa_autotune.spec import KernelSpec, Problem


def served(spec: KernelSpec, problem: Problem) -> Problem:
    """The problem itself, or for a family of the paged cache a decode step of like sizes."""
    if problem.layout in spec.layouts:
        return problem
    return problem.replace(layout="paged", seq_q=1)
