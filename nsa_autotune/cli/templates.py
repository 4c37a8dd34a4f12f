"""What tells that a record is stale."""

from __future__ import annotations


def current_templates() -> dict[str, str]:
    """The present template digest of each family."""
    from ..codegen.render import template_digest
    from ..kernels import all_specs

    return {family: template_digest(spec) for family, spec in all_specs().items()}
