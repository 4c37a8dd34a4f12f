"""The run behind `nsa-autotune codesign`: judge and time one design after the other, then print the front."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import StoreError, WorkerError
from .codesign_plan import Plan
from .codesign_report import draw, report
from .console import errors
from .tune_run import EXIT_INTERRUPTED
from .tune_suspects import settle

if TYPE_CHECKING:
    from ..bench.activations import Activations
    from ..bench.quality import Dense, Quality
    from ..db.store import TuningStore
    from ..search.codesign import Study
    from ..search.designs import Design
    from ..search.latency import KernelLatency
    from .codesign_display import CodesignDisplay

EXIT_NOTHING_WORKS = 1


def execute(plan: Plan) -> int:
    """Do it with a live display and print what came out, also after Ctrl-C; the exit code."""
    from ..codegen.load import require_caches
    from ..db.store import TuningStore
    from .codesign_display import CodesignDisplay

    require_caches()
    interrupted, display = False, CodesignDisplay(errors())
    lost: WorkerError | None = None
    activations = choose_activations(plan)
    study = make_study(plan, activations)
    with TuningStore(plan.db) as store:
        if store.read_only:
            values = {"database": str(store.location)}
            raise StoreError("co-design needs a database that can be written", values, "Name another one with --db.")
        display.note(f"{len(study.designs)} legal designs; activations: {origin_text(activations)}")
        try:
            search_designs(plan, study, activations, store, display)
        except KeyboardInterrupt:
            interrupted = True
        except WorkerError as error:  # the device is lost: what was found until then is shown first
            lost = error
        records = study.stored(store)
        if records:
            report(study, plan, records)
            if plan.plot is not None:
                draw(study, records, plan.plot)
        if interrupted:
            text = f"stopped; every design is kept in {store.location}; the same command resumes"
            errors().print(text, style="yellow", markup=False, soft_wrap=True)
            return EXIT_INTERRUPTED
    if lost is not None:
        raise lost
    return 0 if records else EXIT_NOTHING_WORKS


def search_designs(
    plan: Plan, study: Study, activations: Activations, store: TuningStore, display: CodesignDisplay
) -> None:
    """Evaluate designs under the live display."""
    from ..search.budget import Budget
    from ..search.codesign import codesign
    from ..search.latency import PassLatency

    with display, kernel_latency(plan, store, display) as kernel:
        codesign(
            study,
            quality=quality_of(plan, activations),
            latency=PassLatency(plan.specs, kernel),
            store=store,
            budget=Budget(plan.designs, plan.minutes),
            progress=display,
            seed=plan.seed,
        )


def choose_activations(plan: Plan) -> Activations:
    """The tokens that quality is judged on: the file's first, or made up in the problem's shape and dtype."""
    if plan.activations is not None:
        return plan.activations.first(plan.quality_tokens)
    from ..bench.synthetic import make_activations

    base = plan.base
    heads = (base.num_q_heads, base.num_kv_heads, base.d_qk, base.d_v)
    return make_activations(min(base.seq_k, plan.quality_tokens), *heads, dtype=base.dtype, seed=plan.seed)


def origin_text(activations: Activations) -> str:
    """Where the activations come from, on a line."""
    facts = {**activations.origin, "sha256": activations.origin["sha256"][:12], "tokens": activations.tokens}
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def make_study(plan: Plan, activations: Activations) -> Study:
    """What is searched and under which facts it is stored."""
    from ..dispatch.fingerprint import current, for_target
    from ..search.codesign import Study
    from ..search.designs import complete_choices, legal_designs

    machine = current(plan.device) if plan.target is None else for_target(plan.target)
    choices = complete_choices(plan.base, plan.values)
    return Study(
        base=plan.base,
        choices=choices,
        designs=legal_designs(plan.base, choices, plan.specs),
        facts=study_facts(plan, activations),
        fingerprint=machine.to_dict(),
        kind="measured" if plan.target is None else "predicted",
        objective=plan.objective,
    )


def study_facts(plan: Plan, activations: Activations) -> dict[str, Any]:
    """All that a design's numbers depend on besides itself and the machine; how long kernels are tuned is left out."""
    from ..bench.quality import DEFINITION
    from ..codegen.render import template_digest

    problem = plan.base.to_dict()
    for searched in ("nsa", "num_kv_heads"):
        del problem[searched]
    return {
        "problem": problem,
        "kernels": {spec.family: template_digest(spec) for spec in plan.specs},
        "activations": dict(activations.origin),
        "policy": plan.policy,
        "quality": {"definition": DEFINITION, "tokens": activations.tokens, "queries": plan.quality_queries},
    }


def quality_of(plan: Plan, activations: Activations) -> Callable[[Design], Quality]:
    """Judges designs on the activations; dense attention is computed once, when it is first needed."""
    from ..bench.quality import dense_attention, measure_quality, spread_positions

    device = "cpu" if plan.target is not None else plan.device

    @cache
    def dense() -> Dense:
        positions = spread_positions(activations.tokens, plan.quality_queries)
        return dense_attention(activations.to(device), positions)

    def judge(design: Design) -> Quality:
        return measure_quality(dense(), design.config(plan.base.nsa), design.group_size)

    return judge


@contextmanager
def kernel_latency(plan: Plan, store: TuningStore, display: CodesignDisplay) -> Iterator[KernelLatency]:
    """Tunes on the device, or predicts for the target."""
    from ..search.budget import Budget
    from ..search.latency import Predicted, Tuned

    budget = Budget(max_trials=plan.trials)
    if plan.target is not None:
        yield Predicted(plan.target, store, budget, display, plan.jobs)
        return
    from ..bench.journal import Journal
    from ..bench.worker import MeasureWorker
    from ..dispatch.fingerprint import current
    from ..search.ahead import compile_ahead
    from ..search.quarantine import context_of_run

    here = current(plan.device)
    with (
        compile_ahead(here.capability, plan.jobs) as preparer,
        Journal(plan.device, context=context_of_run(here.to_dict())) as journal,
        MeasureWorker(plan.device, policy=plan.policy, journal=journal) as worker,
    ):
        settle(journal, store, display)
        yield Tuned(worker, store, here.to_dict(), budget, display, preparer)
