"""Recorded spaces of real families with invented times: what an H100 would export, for tests without one.

The configs are real and legal. Registers, shared memory and machine code are invented from the tiles. The time is no
roofline: it is a valley in the logarithms of the parameters, whose place moves with the length of the problem, plus
interactions of neighbouring parameters, a ruggedness of 2% a config, and a fixed share of failures. Samples scatter
by 1%. All of it depends on the family, the problem and a seed only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from nsa_autotune.db.records import TrialRecord
from nsa_autotune.dispatch.fingerprint import Fingerprint
from nsa_autotune.kernels import get_spec
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.spec import Config, KernelSpec, Problem, digest

H100 = Fingerprint("NVIDIA H100 80GB HBM3", "9.0", "570.1", "12.8", "2.11.0", "3.6.0", "ptxas 12.8").to_dict()
A100 = Fingerprint("NVIDIA A100-SXM4-80GB", "8.0", "570.1", "12.8", "2.11.0", "3.6.0", "ptxas 12.8").to_dict()
TEMPLATE = "digest of a template"
CREATED = "2026-01-01T00:00:00.{:06d}+00:00"


def some_configs(spec: KernelSpec, problem: Problem, count: int) -> list[Config]:
    """The default and a seeded sample of the legal configs; the same for every problem that allows them."""
    default, space = spec.default_config(problem), ConfigSpace(spec, problem)
    if space.num_points > 50_000:  # too many to list
        rng, found = random.Random(0), {config_key(default): default}
        while len(found) < count:
            config = space.sample(rng, found)
            assert config is not None
            found[config_key(config)] = config
        return list(found.values())
    legal = [config for config in space.configs() if config != default]
    legal.sort(key=lambda config: digest(config_key(config)))
    return [default, *legal[: count - 1]]


def invented_resources(config: Config) -> dict[str, Any]:
    """Demands that grow with the tiles, as a compiler's do."""
    tile = math.prod(int(config.get(name, 1)) for name in ("BLOCK_T", "BLOCK_N"))
    warps = int(config["num_warps"])
    registers = min(255, 32 + 2 * tile // warps)
    if config.get("maxnreg"):
        registers = min(registers, int(config["maxnreg"]))
    shared = min(225_000, 1024 * int(config.get("num_stages", 1)) * int(config.get("BLOCK_N", 16)) // 2)
    return {
        "registers": min(registers, 65_536 // (32 * warps) // 8 * 8),
        "shared_bytes": shared,
        "spill_bytes": 0,
        "num_warps": warps,
        "num_programs": 4 * 8192 // int(config.get("BLOCK_T", 1)),
    }


def invented_time(spec: KernelSpec, problem: Problem, seed: int = 0) -> Callable[[Config], float]:
    """Time in us of a config; see above."""
    rng = random.Random(f"{spec.family} {seed}")
    names = [param.name for param in spec.params]
    valley = {param.name: rng.uniform(0, len(param.values) - 1) for param in spec.params}
    drift = {name: rng.uniform(-0.2, 0.2) for name in names}  # places a doubling of the length
    slope = {name: rng.uniform(0.05, 0.3) for name in names}
    bend = {name: rng.uniform(-0.05, 0.05) for name in names}
    octaves = math.log2(problem.seq_k / 8192)
    local = f"{spec.family} {problem.seq_k} {seed}"

    def time_us(config: Config) -> float:
        off = [
            param.values.index(config[param.name]) - valley[param.name] - drift[param.name] * octaves
            for param in spec.params
        ]
        steps = sum(slope[name] * abs(x) for name, x in zip(names, off, strict=True))
        twists = sum(bend[name] * a * b for name, a, b in zip(names, off, off[1:], strict=False))
        rugged = random.Random(f"{local} {config_key(config)}").gauss(0, 0.02)
        return 200 * 2**octaves * math.exp(steps + twists + rugged)

    return time_us


def invented_records(
    family: str,
    problem: Problem,
    count: int = 300,
    *,
    seed: int = 0,
    fail_share: float = 0.1,
    fingerprint: dict[str, str] = H100,
    time_us: Callable[[Config], float] | None = None,
) -> list[TrialRecord]:
    """A whole recorded space: one trial a config with 9 samples, or a failure."""
    spec = get_spec(family)
    judge = time_us or invented_time(spec, problem, seed)
    shared = {
        "fingerprint": fingerprint,
        "family": family,
        "problem": problem.to_dict(),
        "problem_key": spec.problem_key(problem),
        "template_digest": TEMPLATE,
    }
    records = []
    for number, config in enumerate(some_configs(spec, problem, count)):
        rng = random.Random(f"{family} {problem.seq_k} {seed} {number} noise")
        made = {**shared, "config": config, "created": CREATED.format(number)}
        if number and rng.random() < fail_share:
            records.append(TrialRecord(**made, status="accuracy", reason="wrong"))
            continue
        samples = tuple(judge(config) * math.exp(rng.gauss(0, 0.01)) for _ in range(9))
        low, *_, high = sorted(samples)
        middle = sorted(samples)[4]
        times = {"samples_us": samples, "median_us": middle, "p20_us": low, "p80_us": high}
        records.append(TrialRecord(**made, status="ok", **times, resources=invented_resources(config)))
    return records
