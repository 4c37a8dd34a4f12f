"""What the specs share of kernels that are written in Gluon too, for Hopper: their switches and constraints."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ..spec import ELEMENT_BYTES, Config, Constraint, Param, Problem, Value
from . import _common as c


def _switch(name: str, doc: str) -> Param:
    return Param(name, (False, True), doc, structural=True, former=False)


GLUON = _switch("gluon", "the loop over key tiles in Gluon, for Hopper")
FORWARD = (GLUON, _switch("q_in_registers", "gluon's q in registers"))
DQ = (
    GLUON,
    _switch("do_in_registers", "gluon's do in registers"),
    _switch("q_in_registers", "gluon's q in registers too"),
)


def defaults(params: tuple[Param, ...]) -> Config:
    """None of them."""
    return {param.name: False for param in params}


def structure(params: tuple[Param, ...], config: Config) -> dict[str, Any]:
    """All of them are structural."""
    return {param.name: config[param.name] for param in params}


def constraints(params: tuple[Param, ...], **needs: Value) -> tuple[Constraint, ...]:
    """What gluon needs: these values of other switches, tiles that wgmma takes, and room for its buffers."""
    return (
        *(_needs("gluon", name, value) for name, value in needs.items()),
        Constraint(
            "gluon takes 16 rows a warp of 4 or 8 warps, as Hopper's matrix instruction of four warps does",
            lambda p, x: not x["gluon"] or c.block_m(p, x) == 16 * int(x["num_warps"]) in (64, 128),
        ),
        Constraint("gluon's buffers, one for each stage, must fit in 227 KiB of shared memory", _buffers_fit),
        *(_needs(after.name, before.name, True) for before, after in pairwise(params)),
    )


def _needs(switch: str, name: str, value: Value) -> Constraint:
    return Constraint(f"{switch} needs {name}={value!r}", lambda p, x: not x[switch] or x[name] == value)


def _buffers_fit(problem: Problem, config: Config) -> bool:
    """Key and value tiles of all stages, and of q and do what takes shared memory."""
    width = 0 if config["q_in_registers"] else problem.d_qk
    width += 0 if config.get("do_in_registers", True) else problem.d_v
    walked = int(config["num_stages"]) * int(config["BLOCK_N"]) * (problem.d_qk + problem.d_v)
    size = ELEMENT_BYTES[problem.dtype] * (c.block_m(problem, config) * width + walked)
    return not config["gluon"] or size <= c.SHARED_LIMIT_BYTES
