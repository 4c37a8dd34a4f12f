"""Dispatcher: a problem to a loaded kernel. Never tunes; after the first call of a shape it is a dictionary lookup."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import NSAConfig
from ..errors import InvalidInput, KernelError, NotTuned, NSAError
from ..kernels import FUSED
from ..spec import DEFAULT_LOCALITY, DEFAULT_POLICY, Config, KernelSpec, Problem, check_policy
from .fingerprint import Fingerprint, current
from .fusion import is_faster
from .ladder import Choice, Step, Winner, choose, choose_predicted
from .misses import Misses
from .self_test import require_prepared_launches
from .sources import default_kernels
from .triton_launch import FIRST_LAUNCHES
from .variant import KernelSource, Serve, Variant, WinnerSource

logger = logging.getLogger(__name__.partition(".")[0])

SERVING = "%s on %s: serving the %s; to tune it: %s (others like it: level INFO, export_misses())"

# Operators of torch.library take tensors, numbers and strings only, so a dispatcher goes by a number.
_numbers = itertools.count(1)
_dispatchers: weakref.WeakValueDictionary[int, Dispatcher] = weakref.WeakValueDictionary()


class Dispatcher:
    """Serves the best known variant of each problem.

    strict: raise NotTuned unless an exact winner is known. locality: how alike the selections of adjacent tokens are
    assumed to be (the tensors do not tell without a synchronisation); 0 is the worst case. policy: whose winners go
    first (decoding from CUDA graphs wants those of "graph-cold"). trusted: raises CannotPrepareError where launches
    must not be prepared (by default where they fail their self-test). kernels: where they come from (by default they
    are rendered). Winners are read once a family; `refresh` forgets them.
    """

    def __init__(
        self,
        source: WinnerSource | None = None,
        *,
        strict: bool = False,
        locality: float = DEFAULT_LOCALITY,
        policy: str = DEFAULT_POLICY,
        fingerprint: Fingerprint | None = None,
        trusted: Callable[[], None] = require_prepared_launches,
        kernels: KernelSource | None = None,
    ) -> None:
        check_policy(policy)
        if not 0.0 <= locality < 1.0:  # as a Problem's, which would say so in the first launch
            raise InvalidInput("locality is a probability", {"locality": locality}, "It lies in [0, 1); 0 is random.")
        self.number = next(_numbers)
        _dispatchers[self.number] = self
        self.strict = strict
        self.locality = locality
        self.policy = policy
        self.stats: Counter[str] = Counter()  # how many shapes stand on each step
        self.ordinary: Counter[str] = Counter()  # launches by Triton itself, by the reason why none was prepared
        self.misses = Misses()
        self._source = source
        self._fingerprint = fingerprint
        self._trusted = trusted
        self._kernels = default_kernels() if kernels is None else kernels
        self._plans: dict[Hashable, Serve] = {}
        self._fused: dict[Hashable, bool] = {}  # by shape
        self._winners: dict[str, Sequence[Winner]] = {}
        self._choices: dict[tuple[str, str], Choice] = {}  # by family and problem key: lengths of a bucket share one
        self._variants: dict[str, Variant] = {}
        self._said: set[str] = set()
        self._strict_twin: Dispatcher | None = None

    def __deepcopy__(self, memo: object) -> Dispatcher:
        """Itself: copies of a module share what is compiled, and the connection to the database."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """A saved module keeps where winners and kernels come from; what is compiled, and its number, are made anew."""
        return partial(Dispatcher, strict=self.strict, **self._options()), (self._source,)

    def _options(self) -> dict[str, Any]:
        """What it was made with, but for the source and strict."""
        return {
            "locality": self.locality,
            "policy": self.policy,
            "fingerprint": self._fingerprint,
            "trusted": self._trusted,
            "kernels": self._kernels,
        }

    def stricter(self) -> Dispatcher:
        """This dispatcher if it is strict, else its strict twin, which keeps plans of its own."""
        if self.strict:
            return self
        if self._strict_twin is None:
            self._strict_twin = Dispatcher(self._source, strict=True, **self._options())
            self._strict_twin.misses, self._strict_twin.ordinary = self.misses, self.ordinary
        return self._strict_twin

    def refresh(self) -> None:
        """Forget winners and plans: the next call of each shape asks the source again, as after tuning."""
        self._winners.clear()
        self._choices.clear()
        self._plans.clear()
        self._fused.clear()
        if self._strict_twin is not None:
            self._strict_twin.refresh()

    def export_misses(self, path: str | Path) -> int:
        """Write the problems served below the exact step, a JSON object a line, for `tune --from-misses`."""
        return self.misses.export(path)

    def launch(
        self, spec: KernelSpec, shape: Hashable, problem: Callable[[], Problem], device: Any, tensors: dict[str, Any]
    ) -> None:
        """Run the family's kernel; `shape` names the call, `problem()` describes it when it is new.

        Calls of one `shape` have tensors of equal sizes and dtypes on one device; strides and numbers may differ.
        """
        serve = self._plans.get(shape)
        if serve is None:
            with FIRST_LAUNCHES:
                serve = self._plans.get(shape)  # another thread may have been the first
                if serve is None:
                    self._plans[shape] = self._first_launch(spec, problem(), device, tensors)
                    return
        serve(tensors)

    def fuses(self, shape: Hashable, asked: Callable[[], Sequence[tuple[KernelSpec, Problem]]], device: Any) -> bool:
        """True if the first family that is asked for was measured to be faster than the others; no miss is counted."""
        known = self._fused.get(shape)
        if known is None:
            here = self._fingerprint or current(str(device))
            with FIRST_LAUNCHES:
                known = self._fused[shape] = self._fuses(asked(), here)
        return known

    def _fuses(self, asked: Sequence[tuple[KernelSpec, Problem]], here: Fingerprint) -> bool:
        try:
            fused, *parts = (self._choose(spec, problem, here, guess=False) for spec, problem in asked)
        except NSAError:  # what cannot be served tells why when it is launched
            return False
        return is_faster(fused, parts) and (fused.step is Step.EXACT or not self.strict)

    def split(self, shape: Hashable, error: KernelError) -> None:
        """Run the parts from now on, since the fused kernel of a shape that `fuses` was asked for does not run."""
        logger.warning("a fused kernel does not run here, so its parts are launched instead: %s", error)
        self._fused[shape] = False

    def _first_launch(self, spec: KernelSpec, problem: Problem, device: Any, tensors: dict[str, Any]) -> Serve:
        choice = self.choose(spec, problem, device)
        try:
            serve = self._load(spec, problem, choice.config).serve(self._trusted, self.ordinary)
            serve(tensors)
        except KernelError as error:
            if self.strict or choice.step is Step.DEFAULT or spec.family in FUSED:
                raise  # the parts of a fused kernel may be tuned
            logger.warning(
                "%s: the %s does not run here, using the default config: %s", spec.family, choice.step, error
            )
            choice = Choice(spec.default_config(problem), Step.DEFAULT)
            serve = self._load(spec, problem, choice.config).serve(self._trusted, self.ordinary)
            serve(tensors)
        self.stats[choice.step] += 1
        return serve if choice.step is Step.EXACT else self._counting(spec, problem, choice.step, serve)

    def _counting(self, spec: KernelSpec, problem: Problem, step: Step, serve: Serve) -> Serve:
        """`serve`, its launches counted as a miss."""
        miss = self.misses.note(spec, problem, step)
        miss.count += 1

        def serve_missed(tensors: Mapping[str, Any]) -> None:
            miss.count += 1
            serve(tensors)

        return serve_missed

    def choose(self, spec: KernelSpec, problem: Problem, device: Any = "cuda:0") -> Choice:
        """The config that serves the problem; raises NotTuned if strict and the ladder's first step is missed.

        Lower steps are logged: a family's first problem on each as a warning, with the command that tunes it.
        """
        here = self._fingerprint or current(str(device))
        self._kernels.check_gpu(here)
        spec.check_problem(problem)
        choice = self._choose(spec, problem, here)
        if choice.step is not Step.EXACT:
            self._report(spec, problem, choice, here)
        return choice

    def _choose(self, spec: KernelSpec, problem: Problem, here: Fingerprint, guess: bool = True) -> Choice:
        """The ladder's answer, predictions if `guess`; remembered for the bucket where it is legal for every length."""
        key = (spec.family, f"{here.gpu} {spec.problem_key(problem)}")
        known = self._choices.get(key)
        if known is not None and spec.broken_constraint(problem, known.config) is None:
            return replace(known, config=dict(known.config))
        if spec.family not in self._winners:
            self._winners[spec.family] = self._known_winners(spec.family)
        refusal = partial(self._kernels.refusal, spec, problem)
        how = (self._kernels.template_digest(spec), self.policy, lambda config: refusal(config) is None)
        choice = choose(spec, problem, self._winners[spec.family], here, *how)
        if choice.step is Step.DEFAULT and guess and not self.strict:
            choice = self._predicted(spec, problem, here) or choice
        refused = refusal(choice.config)
        if refused is not None:
            raise refused
        if choice.step is not Step.DEFAULT:  # a default is made for the very problem
            self._choices[key] = choice
        return replace(choice, config=dict(choice.config))

    def _known_winners(self, family: str) -> Sequence[Winner]:
        if self._source is None:
            return ()
        # a database gives the fields that the ladder reads in a fraction of the time that whole records take
        read: Callable[..., Sequence[Winner]] = getattr(self._source, "known_winners", self._source.winners)
        return read(family=family)

    def _predicted(self, spec: KernelSpec, problem: Problem, here: Fingerprint) -> Choice | None:
        """What a cost model takes for the fastest here, where the source has predictions."""
        predictions = getattr(self._source, "predictions", None)  # a source need not have any
        if predictions is None:
            return None
        digest = self._kernels.template_digest(spec)
        found = predictions(family=spec.family, capability=here.capability, template_digest=digest)
        return choose_predicted(spec, problem, found, here, digest)

    def _report(self, spec: KernelSpec, problem: Problem, choice: Choice, here: Fingerprint) -> None:
        command = tune_command(spec, problem)
        if self.strict:
            self.misses.note(spec, problem, None).count += 1
            values = {"family": spec.family, "gpu": here.gpu, "problem": spec.problem_key(problem)}
            raise NotTuned("strict=True serves exact winners only", values, f"Run: {command}")
        key = f"{spec.family} {spec.problem_key(problem)}"
        if key in self._said:
            return
        kind = f"{spec.family} {choice.step}"
        level = logging.INFO if kind in self._said else logging.WARNING  # a prompt's chunks are a problem each
        self._said |= {key, kind}
        logger.log(level, SERVING, spec.family, here.gpu, choice.step, command)

    def _load(self, spec: KernelSpec, problem: Problem, config: Config) -> Variant:
        spec.check_problem(problem)
        spec.check_config(problem, config)
        digest = spec.variant_digest(problem, config, self._kernels.template_digest(spec))
        if digest not in self._variants:  # a new length of a known variant loads nothing
            self._variants[digest] = self._kernels.load(spec, problem, config)
        return self._variants[digest]


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
    if problem.layout == "paged":
        parts.append(f"--page-size {problem.page_size} --cache-dtype {problem.cache_dtype}")
    usual = NSAConfig().to_dict()
    changed = {name: value for name, value in problem.nsa.to_dict().items() if value != usual[name]}
    parts += [f"--nsa {name}={value}" for name, value in changed.items()]
    if "locality" in spec.problem_fields:
        parts.append(f"--locality {problem.locality:g}")
    return " ".join(parts)
