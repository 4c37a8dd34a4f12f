"""What the specs share of kernels that are written in Gluon too, for Hopper: two switches and their constraints."""

from __future__ import annotations

from ..spec import ELEMENT_BYTES, Config, Constraint, Param, Problem, Value
from . import _common as c

GLUON = Param("gluon", (False, True), "the loop over key tiles in Gluon, for Hopper", structural=True, former=False)
Q_IN_REGISTERS = Param("q_in_registers", (False, True), "gluon's q in registers", structural=True, former=False)
PARAMS = (GLUON, Q_IN_REGISTERS)
DEFAULTS: Config = {"gluon": False, "q_in_registers": False}


def constraints(**needs: Value) -> tuple[Constraint, ...]:
    """What gluon needs: these values of other switches, tiles that wgmma takes, and room for its buffers."""
    return (
        *(_needs(name, value) for name, value in needs.items()),
        Constraint(
            "gluon takes 16 rows a warp of 4 or 8 warps, as Hopper's matrix instruction of four warps does",
            lambda p, x: not x["gluon"] or c.block_m(p, x) == 16 * int(x["num_warps"]) in (64, 128),
        ),
        Constraint("gluon's buffers, one for each stage, must fit in 227 KiB of shared memory", _buffers_fit),
        Constraint(
            "q_in_registers is for gluon: elsewhere the compiler decides",
            lambda p, x: bool(x["gluon"]) or not x["q_in_registers"],
        ),
    )


def _needs(name: str, value: Value) -> Constraint:
    return Constraint(f"gluon needs {name}={value!r}", lambda p, x: not x["gluon"] or x[name] == value)


def _buffers_fit(problem: Problem, config: Config) -> bool:
    """Key and value tiles of all stages, and q where it takes shared memory."""
    rows = int(config["num_stages"]) * int(config["BLOCK_N"]) * (problem.d_qk + problem.d_v)
    q = 0 if config["q_in_registers"] else c.block_m(problem, config) * problem.d_qk
    return not config["gluon"] or (rows + q) * ELEMENT_BYTES[problem.dtype] <= c.SHARED_LIMIT_BYTES
