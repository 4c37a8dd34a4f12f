"""A family of 950 legal configs with known times, and measurers and compilers that answer from them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from nsa_autotune.bench.result import TrialResult
from nsa_autotune.codegen.compile import Resources
from nsa_autotune.codegen.pool import CompileJob, CompileOutcome
from nsa_autotune.search.budget import Budget
from nsa_autotune.search.progress import Outcome, Plan, TrialEvent
from nsa_autotune.search.space import ConfigSpace, config_key
from nsa_autotune.spec import DEFAULT_POLICY, Config, Constraint, Cost, KernelSpec, Param, Problem

PARAMS = (
    Param("order", ("query", "union"), "loop order", structural=True),
    Param("BLOCK_T", (1, 2, 4, 8, 16), "tokens a tile"),
    Param("BLOCK_N", (16, 32, 64, 128), "keys a tile"),
    Param("num_warps", (1, 2, 4, 8, 16), "warps"),
    Param("num_stages", (1, 2, 3, 4, 5), "stages"),
    Param("swap", (False, True), "operand order", structural=True),
    Param("pad", (0,), "one value only"),
)
CONSTRAINTS = (
    Constraint("union needs two tokens, query one", lambda p, c: (c["order"] == "union") == (int(c["BLOCK_T"]) > 1)),
    Constraint(
        "tiles must fit",
        lambda p, c: int(c["BLOCK_T"]) * int(c["BLOCK_N"]) * int(c["num_stages"]) <= 8 * 128 * 4,
    ),
)
DEFAULT: Config = {
    "order": "query",
    "BLOCK_T": 1,
    "BLOCK_N": 32,
    "num_warps": 4,
    "num_stages": 2,
    "swap": False,
    "pad": 0,
}
PROBLEM = Problem(seq_q=512, seq_k=512, num_q_heads=8, num_kv_heads=2, d_qk=64, d_v=64)
FINGERPRINT = {"gpu": "Fake 100", "capability": "9.0", "driver": "1", "cuda": "12", "torch": "2", "triton": "3"}


def make_spec(family: str = "toy_fwd", params: Sequence[Param] = PARAMS, library: str = "") -> KernelSpec:
    """A family without a template."""
    return KernelSpec(
        family=family,
        doc="toy",
        arguments=(),
        problem_fields=("batch", "seq_q", "seq_k", "num_q_heads", "num_kv_heads", "d_qk", "d_v", "dtype", "locality"),
        nsa_fields=("window_size",),
        params=tuple(params),
        constraints=CONSTRAINTS,
        rules=(),
        defaults=lambda problem: dict(DEFAULT),
        cost=lambda problem, config: Cost(1e9, 1e6, 1e6 / int(config["BLOCK_T"]), 1e9),
        structure=lambda problem, config: {},
        constants=lambda problem, config: {},
        reference=lambda problem, inputs: {},
        library=library,
    )


SPEC = make_spec()
SPACE = ConfigSpace(SPEC, PROBLEM)


def digest_of(spec: KernelSpec) -> str:
    """In the place of the digest of a template."""
    return f"digest of {spec.family}"


def make_landscape(seed: int, fail_share: float = 0.1) -> Callable[[Config], float | None]:
    """Times in us with one valley, interactions and ruggedness; None for the configs that fail."""
    rng = random.Random(seed)
    names = [param.name for param in PARAMS]
    valley = {param.name: rng.randrange(len(param.values)) for param in PARAMS}
    slope = {name: rng.uniform(0.03, 0.25) for name in names}
    pairs = [(a, b, rng.uniform(-0.05, 0.05)) for i, a in enumerate(names) for b in names[:i]]
    legal = [config_key(config) for config in SPACE.configs()]
    rugged = {key: rng.gauss(0, 0.03) for key in legal}
    broken = {key for key in legal if rng.random() < fail_share} - {config_key(DEFAULT)}

    def time_us(config: Config) -> float | None:
        key = config_key(config)
        if key in broken:
            return None
        off = {param.name: param.values.index(config[param.name]) - valley[param.name] for param in PARAMS}
        steps = sum(slope[name] * abs(off[name]) for name in names)
        return 100 * math.exp(steps + sum(x * off[a] * off[b] / 3 for a, b, x in pairs) + rugged[key])

    return time_us


def timed(time_us: float | None, samples: int = 3) -> TrialResult:
    """The result of a measurement, or of a failure."""
    if time_us is None:
        return TrialResult("accuracy", "wrong by 3 times the baseline\nsecond line", max_error=0.3, baseline_error=0.1)
    return TrialResult(
        "ok",
        samples_us=(time_us,) * samples,
        median_us=time_us,
        p20_us=0.99 * time_us,
        p80_us=1.01 * time_us,
        max_error=0.01,
        baseline_error=0.01,
        resources={"registers": 64},
    )


@dataclass
class FakeMeasurer:
    """Answers from a landscape; counts, can raise at a given trial, and can change its mind in the race."""

    time_us: Callable[[Config], float | None]
    race_us: Callable[[Config], float | None] | None = None
    raise_at: dict[int, BaseException] = field(default_factory=dict)
    measured: list[str] = field(default_factory=list)
    races: list[list[Config]] = field(default_factory=list)
    sentinels: list[int | None] = field(default_factory=list)
    policy: str = DEFAULT_POLICY
    space: ConfigSpace = SPACE

    def measure(self, family: str, problem: Problem, config: Config) -> TrialResult:
        """One trial."""
        assert self.space.is_legal(config), f"an illegal config reached the measurer: {config}"
        if len(self.measured) in self.raise_at:
            raise self.raise_at.pop(len(self.measured))
        self.measured.append(config_key(config))
        return timed(self.time_us(config))

    def race(
        self,
        family: str,
        problem: Problem,
        configs: Sequence[Config],
        rounds: int = 7,
        *,
        sentinel: int | None = None,
    ) -> list[TrialResult]:
        """All configs, in order."""
        self.sentinels.append(sentinel)
        if -1 in self.raise_at:
            raise self.raise_at.pop(-1)
        self.races.append(list(configs))
        return [timed((self.race_us or self.time_us)(config), rounds) for config in configs]


@dataclass
class Listener:
    """Keeps what it is told."""

    plans: list[Plan] = field(default_factory=list)
    events: list[TrialEvent] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def start(self, plan: Plan) -> None:
        """Keep."""
        self.plans.append(plan)

    def trial(self, event: TrialEvent) -> None:
        """Keep."""
        self.events.append(event)

    def finish(self, outcome: Outcome) -> None:
        """Keep."""
        self.outcomes.append(outcome)


@dataclass
class FakeClock:
    """Seconds that pass by `step_s` with every look."""

    step_s: float
    now_s: float = 0.0

    def __call__(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@dataclass
class FakeCompiler:
    """Compiles to resources that a function names; counts the jobs it finished."""

    judge: Callable[[Config], Resources | tuple[str, str]]
    compiled: list[str] = field(default_factory=list)
    closed: bool = False
    raise_at: int = -1

    def __call__(
        self,
        specs: dict[str, KernelSpec],
        jobs: Sequence[CompileJob],
        target: str = "",
        processes: int | None = None,
        timeout_s: float = 0.0,
    ) -> Iterator[CompileOutcome]:
        """Outcomes, one after the other."""
        try:
            for job in jobs:
                assert job.family in specs
                if len(self.compiled) == self.raise_at:
                    raise KeyboardInterrupt
                self.compiled.append(config_key(job.config))
                found = self.judge(job.config)
                if isinstance(found, Resources):
                    yield CompileOutcome(job, "ok", resources=found)
                else:
                    yield CompileOutcome(job, *found)
        finally:
            self.closed = True


def trials(count: int) -> Budget:
    """A budget of trials alone."""
    return Budget(max_trials=count)
