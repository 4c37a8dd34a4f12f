"""Dispatcher: a problem to a loaded kernel. Never tunes; after the first call of a shape it is a dictionary lookup."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch

from ..codegen.load import explain, load
from ..codegen.render import render, template_digest
from ..config import NSAConfig
from ..errors import InvalidInput, KernelError, NotTuned
from ..spec import DEFAULT_LOCALITY, Config, KernelSpec, Problem
from .fingerprint import Fingerprint, current
from .ladder import Choice, Step, Winner, choose, choose_predicted

logger = logging.getLogger("nsa_autotune")

Launch = Callable[..., Any]
# Operators of torch.library take tensors, numbers and strings only, so a dispatcher goes by a number.
_numbers = itertools.count(1)
_dispatchers: weakref.WeakValueDictionary[int, Dispatcher] = weakref.WeakValueDictionary()


class WinnerSource(Protocol):
    """Where winners come from: the tuning database, or a list in a test."""

    def winners(self, *, family: str) -> Sequence[Winner]:
        """All winners of one family."""


class Dispatcher:
    """Serves the best known variant of each problem.

    strict: raise NotTuned unless an exact winner is known. locality: how alike the selections of adjacent tokens are
    assumed to be (the tensors do not tell without a synchronisation); 0 is the worst case.
    """

    def __init__(
        self,
        source: WinnerSource | None = None,
        *,
        strict: bool = False,
        locality: float = DEFAULT_LOCALITY,
        fingerprint: Fingerprint | None = None,
    ) -> None:
        self.number = next(_numbers)
        _dispatchers[self.number] = self
        self.strict = strict
        self.locality = locality
        self.stats: Counter[str] = Counter()  # how many shapes stand on each step
        self._source = source
        self._fingerprint = fingerprint
        self._plans: dict[Hashable, Launch] = {}
        self._modules: dict[str, Launch] = {}
        self._said: set[str] = set()
        self._strict_twin: Dispatcher | None = None

    def __deepcopy__(self, memo: object) -> Dispatcher:
        """Itself: copies of a module share what is compiled, and the connection to the database."""
        return self

    def stricter(self) -> Dispatcher:
        """This dispatcher if it is strict, else its strict twin, which keeps plans of its own."""
        if self.strict:
            return self
        if self._strict_twin is None:
            self._strict_twin = Dispatcher(
                self._source, strict=True, locality=self.locality, fingerprint=self._fingerprint
            )
        return self._strict_twin

    def launch(
        self, spec: KernelSpec, shape: Hashable, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        """Run the family's kernel; `shape` names the call, `problem()` describes it when it is new."""
        plan = self._plans.get(shape)
        if plan is None:
            self._plans[shape] = self._first_launch(spec, problem(), device, tensors)
        else:
            plan(**tensors)

    def _first_launch(self, spec: KernelSpec, problem: Problem, device: Any, tensors: dict[str, Any]) -> Launch:
        choice = self.choose(spec, problem, device)
        try:
            plan = self._load(spec, problem, choice.config)
            plan(**tensors)
        except KernelError as error:
            if self.strict or choice.step is Step.DEFAULT:
                raise
            logger.warning(
                "%s: the %s does not run here, using the default config: %s", spec.family, choice.step, error
            )
            choice = Choice(spec.default_config(problem), Step.DEFAULT)
            plan = self._load(spec, problem, choice.config)
            plan(**tensors)
        self.stats[choice.step] += 1
        return plan

    def choose(self, spec: KernelSpec, problem: Problem, device: Any = "cuda:0") -> Choice:
        """The config that serves the problem; logs once below the first step, raises NotTuned if strict."""
        here = self._fingerprint or current(str(device))
        spec.check_problem(problem)
        winners = self._source.winners(family=spec.family) if self._source is not None else ()
        choice = choose(spec, problem, winners, here, template_digest(spec))
        predictions = getattr(self._source, "predictions", None)  # a source need not have any
        if choice.step is Step.DEFAULT and predictions is not None and not self.strict:
            current_digest = template_digest(spec)
            guesses = predictions(family=spec.family, capability=here.capability, template_digest=current_digest)
            choice = choose_predicted(spec, problem, guesses, here, current_digest) or choice
        if choice.step is not Step.EXACT:
            self._report(spec, problem, choice, here)
        return choice

    def _report(self, spec: KernelSpec, problem: Problem, choice: Choice, here: Fingerprint) -> None:
        command = tune_command(spec, problem)
        if self.strict:
            values = {"family": spec.family, "gpu": here.gpu, "problem": spec.problem_key(problem)}
            raise NotTuned("strict=True serves exact winners only", values, f"Run: {command}")
        key = f"{spec.family} {spec.problem_key(problem)}"
        if key not in self._said:
            self._said.add(key)
            logger.warning("%s on %s: serving the %s; to tune it: %s", spec.family, here.gpu, choice.step, command)

    def _load(self, spec: KernelSpec, problem: Problem, config: Config) -> Launch:
        rendered = render(spec, problem, config)
        if rendered.digest not in self._modules:
            raw: Launch = load(rendered).launch

            def launch(**tensors: Any) -> Any:
                try:
                    return raw(**tensors)
                except torch.OutOfMemoryError:
                    raise  # the caller's to mend: no other config would need less
                except Exception as error:  # the compiler's own errors name generated lines; say which template lines
                    raise KernelError(f"{spec.family} failed: {explain(error, rendered)}") from error

            self._modules[rendered.digest] = launch
        return self._modules[rendered.digest]


def by_number(number: int) -> Dispatcher:
    """The living dispatcher with this number."""
    try:
        return _dispatchers[number]
    except KeyError:
        rule = "a compiled model serves kernels by the dispatcher that it was compiled with"
        raise InvalidInput(rule, {"dispatcher": f"number {number}, which is gone"}, "Keep a reference to it.") from None


def tune_command(spec: KernelSpec, problem: Problem) -> str:
    """The command that tunes this problem."""
    parts = [
        "nsa-autotune tune",
        f"--families {spec.family}",
        f"--seq {problem.seq_k}",
        f"--heads {problem.num_q_heads}",
        f"--kv-heads {problem.num_kv_heads}",
        f"--d-qk {problem.d_qk}",
        f"--d-v {problem.d_v}",
        f"--dtype {problem.dtype}",
    ]
    if "seq_q" in spec.problem_fields and problem.seq_q != problem.seq_k:
        parts.append(f"--seq-q {problem.seq_q}")
    if "phi_hidden" in spec.problem_fields:
        parts.append(f"--phi-hidden {problem.phi_hidden}")
    if problem.batch != 1:
        parts.append(f"--batch {problem.batch}")
    if problem.layout != "batched":
        parts.append(f"--layout {problem.layout}")
    usual = NSAConfig().to_dict()
    changed = {name: value for name, value in problem.nsa.to_dict().items() if value != usual[name]}
    parts += [f"--nsa {name}={value}" for name, value in changed.items()]
    if "locality" in spec.problem_fields:
        parts.append(f"--locality {problem.locality:g}")
    return " ".join(parts)
