"""Winners that other versions or another template made: which they are, what to compile again, what it may cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..bench.timing import MIN_ROUNDS
from ..bench.worker import RACE_TARGET_MS
from ..codegen.compile import Resources
from ..cores import usable_cores
from ..db.records import TrialRecord, WinnerRecord
from ..spec import Config, KernelSpec, Problem
from .space import ConfigSpace, config_key

# What decides on machine code beside template and config. Kernels reach the driver as finished machine code, so driver,
# CUDA and torch may change without touching them.
CODE_FIELDS = ("triton", "assembler")
TEMPLATE = "template"
BEST = 8  # configs of a stale winner that are compiled, beside the default
COMPILE_S = 1.5  # of one config in one process
GATE_S = 1.0  # of one config before it is raced: loading, inputs, accuracy

Key = tuple[str, str, str, str]  # GPU, family, problem key, policy


@dataclass(frozen=True)
class Stale:
    """The best evidence for a problem that has no winner under the present versions and template."""

    winner: WinnerRecord
    changed: tuple[str, ...]  # fields of the fingerprint that differ, and "template"

    @property
    def reason(self) -> str:
        """What changed since, in words."""
        return ", ".join(self.changed)

    @property
    def other_template(self) -> bool:
        """True if it is not even served, since its template has changed."""
        return TEMPLATE in self.changed

    @property
    def has_code(self) -> bool:
        """True if it may carry over: its record says which machine code was measured."""
        return _tells_code(self.winner.resources, self.other_template)


def stale_winners(
    winners: Iterable[WinnerRecord],
    here: Mapping[str, str],
    specs: Mapping[str, KernelSpec],
    digests: Mapping[str, str],
) -> list[Stale]:
    """One for each (GPU, family, problem, policy) without a current winner; newest first.

    Of several it is the newest of the present template, else the newest.
    `here` holds the fields of a fingerprint that have to be equal, `digests` the present template digest of each
    family. Winners of families that are gone cannot be recertified and are left out.
    """
    groups: dict[Key, list[WinnerRecord]] = {}
    for winner in winners:
        if winner.family in specs:
            key = specs[winner.family].problem_key(Problem.from_dict(winner.problem))
            group = (winner.fingerprint["gpu"], winner.family, key, winner.policy)
            groups.setdefault(group, []).append(winner)
    found = []
    for members in groups.values():
        if all(changed_fields(winner, here, digests) for winner in members):
            best = max(members, key=lambda w: (w.template_digest == digests.get(w.family), w.created))
            found.append(Stale(completed_winner(best, specs[best.family]), changed_fields(best, here, digests)))
    return sorted(found, key=lambda stale: stale.winner.created, reverse=True)


def completed_winner(winner: WinnerRecord, spec: KernelSpec) -> WinnerRecord:
    """The winner as it would have been stored with the parameters that came since."""
    rivals = tuple({**rival, "config": spec.completed(rival["config"])} for rival in winner.rivals)
    default = winner.default_config and spec.completed(winner.default_config)
    return replace(winner, config=spec.completed(winner.config), default_config=default, rivals=rivals)


def changed_fields(winner: WinnerRecord, here: Mapping[str, str], digests: Mapping[str, str]) -> tuple[str, ...]:
    """Names of what differs between a winner's origin and the present, fields of the fingerprint first."""
    machine = tuple(name for name, value in here.items() if winner.fingerprint.get(name, "") != value)
    same = digests.get(winner.family) == winner.template_digest
    return machine if same else (*machine, TEMPLATE)


def candidates(stale: Stale, spec: KernelSpec, trials: Iterable[TrialRecord], count: int = BEST) -> list[Config]:
    """Legal configs worth a race, at most `count` and the default, which stands last.

    The winner, its ties, the rivals behind, then the fastest of the stored `trials` of its origin.
    """
    winner, problem = stale.winner, Problem.from_dict(stale.winner.problem)
    rivals = sorted(winner.rivals, key=lambda rival: (not rival["tied"], rival["log_ratio"]))
    timed = [trial for trial in trials if trial.status == "ok" and trial.median_us is not None]
    timed.sort(key=lambda trial: trial.median_us or 0.0)
    wanted = [winner.config, *(rival["config"] for rival in rivals), *(trial.config for trial in timed)]
    space, default = ConfigSpace(spec, problem), spec.default_config(problem)
    legal = {config_key(config): config for config in wanted if space.is_legal(config)}
    return [*[config for config in legal.values() if config != default][:count], default]


def known_codes(stale: Stale, trials: Iterable[TrialRecord]) -> dict[str, Mapping[str, object]]:
    """Stored resources by config, of those whose record says which code was measured; the winner's own first."""
    winner = stale.winner
    told = [(winner.config, winner.resources), *((t.config, t.resources) for t in trials if t.status == "ok")]
    found: dict[str, Mapping[str, object]] = {}
    for config, resources in told:
        if resources is not None and _tells_code(resources, stale.other_template):
            found.setdefault(config_key(config), resources)
    return found


def is_same_code(then: Mapping[str, object] | None, now: Resources | None) -> bool:
    """True if machine code and host code are those that were measured; host code counts where it is known."""
    if then is None or now is None:
        return False
    return then["binary_sha"] == now.binary_sha and then.get("launch_sha", now.launch_sha) == now.launch_sha


def _tells_code(resources: Mapping[str, object] | None, other_template: bool) -> bool:
    """Another template may launch the same machine code on another grid: there the host code must be known too."""
    needed = {"binary_sha", "launch_sha"} if other_template else {"binary_sha"}
    return resources is not None and needed <= resources.keys()


@dataclass(frozen=True)
class Cost:
    """What recertifying takes at most, and how many of the winners need no race if their machine code is the same."""

    winners: int
    configs: int  # to compile
    may_carry: int
    compile_s: float
    race_s: float  # if every winner has to race

    @property
    def minutes(self) -> float:
        """Of all at most, without new searches."""
        return (self.compile_s + self.race_s) / 60


def expected_cost(stale: Sequence[Stale], processes: int | None = None) -> Cost:
    """An upper estimate from stored medians; nothing is compiled or read for it."""
    configs = (BEST + 1) * len(stale)
    compile_s = COMPILE_S * configs / (processes or usable_cores())
    race_s = sum((BEST + 1) * (GATE_S + _timing_s(item.winner.median_us)) for item in stale)
    return Cost(len(stale), configs, sum(item.has_code for item in stale), compile_s, race_s)


def _timing_s(median_us: float) -> float:
    return max(RACE_TARGET_MS / 1e3, MIN_ROUNDS * median_us / 1e6)
