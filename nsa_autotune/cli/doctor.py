"""`nsa-autotune doctor`: what this machine has, what is tuned for it, and what no longer fits."""

from __future__ import annotations

import math
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from .. import __version__
from ..errors import NSAError
from . import options
from .console import count_text, errors, make_table, output
from .templates import current_templates

if TYPE_CHECKING:
    from ..db.records import TrialRecord, WinnerRecord
    from ..db.store import TuningStore
    from ..search.drift import Cost, Stale

PACKAGES = ("torch", "triton", "numpy", "jinja2", "optuna", "sqlalchemy", "alembic")
COMPILERS = ("cc", "gcc", "clang")
GIB = 1 << 30
MAX_REASONS, MAX_REASON_CHARS = 3, 100

Fact = tuple[str, str]


def doctor(db: options.DbOption = None) -> None:
    """Print GPU, versions, database, what is tuned and what is stale."""
    from ..db.store import TuningStore

    output().print(make_table("this machine", ("what", "found"), [*machine_facts(), *gpu_facts()]))
    try:
        with TuningStore(db, must_exist=True) as store:
            output().print(make_table("database", ("what", "found"), database_facts(store)))
            _print_winners(store.winners())
            print_drift(store)
    except NSAError:
        errors().print("the database cannot be used:", style="red")
        raise


def machine_facts() -> Iterator[Fact]:
    """Versions, the C compiler that Triton's launchers need, and the folders in use."""
    from ..codegen.paths import generated_dir, template_dir

    yield "nsa-autotune", __version__
    yield "python", f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        yield name, metadata.version(name)
    compiler = os.environ.get("CC") or next((path for path in map(shutil.which, COMPILERS) if path), None)
    yield "C compiler", compiler or "none: Triton needs one to launch kernels; install gcc or set CC"
    yield "templates", str(template_dir())
    yield "rendered kernels", str(generated_dir())


def gpu_facts() -> Iterator[Fact]:
    """The devices that torch sees, or what works without one."""
    import torch

    if not torch.cuda.is_available():
        yield "GPU", "no CUDA device: `tune` predicts, and the module runs the reference"
        if torch.version.cuda is None:
            yield "", "this torch is a CPU build; on a machine with a GPU install a CUDA build"
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        facts = f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / GIB:.0f} GiB"
        yield f"GPU {index}", f"{facts}, {found.multi_processor_count} multiprocessors"
    yield "CUDA of torch", str(torch.version.cuda)


def database_facts(store: TuningStore) -> Iterator[Fact]:
    """Where the database lies, its schema, and how much it holds."""
    from ..db.counts import count_statuses, count_winners, troubled_trials
    from ..db.migrate import head_revision  # an open store always has it

    yield "location", f"{store.location}{' (read-only)' if store.read_only else ''}"
    yield "schema", head_revision()
    with store.reading() as session:
        winners, troubled = count_winners(session), troubled_trials(session)
        statuses, predicted = (count_statuses(session, kind) for kind in ("measured", "predicted"))
    yield "winners", str(winners)
    yield "measured trials", ", ".join(f"{count} {status}" for status, count in statuses.items()) or "none"
    yield "in quarantine", quarantine_text(troubled)
    yield "predictions", str(sum(predicted.values()))


def quarantine_text(trials: Sequence[TrialRecord]) -> str:
    """How many variants are not tried again, and why most of them are not."""
    from ..search.quarantine import all_quarantined

    reasons = all_quarantined(trials, current_templates())
    common = Counter(reason.splitlines()[0][:MAX_REASON_CHARS] for reason in reasons).most_common(MAX_REASONS)
    return "; ".join([str(len(reasons)), *(f"{count} x {reason}" for reason, count in common)])


def gpu_name() -> str | None:
    """The first device's name, None without one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def stale_winners(winners: Sequence[WinnerRecord]) -> list[WinnerRecord]:
    """Winners whose template has changed, or whose family is gone: they are no longer served."""
    current = current_templates()
    return [winner for winner in winners if current.get(winner.family) != winner.template_digest]


def _print_winners(winners: Sequence[WinnerRecord]) -> None:
    here = gpu_name()
    stale = stale_winners(winners)
    good = Counter((w.fingerprint["gpu"], w.family) for w in winners)
    bad = Counter((w.fingerprint["gpu"], w.family) for w in stale)
    rows = [
        (gpu + (" (this GPU)" if gpu == here else ""), family, count - bad[gpu, family], bad[gpu, family])
        for (gpu, family), count in sorted(good.items())
    ]
    numbers = ("template current", "template changed")
    if rows:
        output().print(make_table("winners", ("GPU", "family", *numbers), rows, numbers))
    if here is not None and not any(gpu == here for gpu, _ in good):
        output().print(f"nothing is tuned for {here}: nsa-autotune tune", markup=False)
    if not rows and here is None:
        output().print("no winners: nothing is tuned and none are shipped", markup=False)
    if stale:
        families = ",".join(dict.fromkeys(w.family for w in stale))
        text = f"{count_text(len(stale), 'winner is', 'winners are')} stale, as templates have changed, and not served"
        output().print(
            f"{text}; on their GPU: nsa-autotune recertify --families {families}", markup=False, soft_wrap=True
        )


def print_drift(store: TuningStore) -> None:
    """What other versions or templates made for the GPU at hand: by cause, and what recertifying takes at most."""
    from ..kernels import all_specs
    from ..search.drift import expected_cost, stale_winners

    name = gpu_name()
    if name is None:
        text = "without a GPU `nsa-autotune recertify --dry-run` compiles stale winners and tells what would carry over"
        output().print(text, markup=False, soft_wrap=True)
        return
    from ..dispatch.fingerprint import current

    here, specs = current("cuda:0").to_dict(), all_specs()
    stale = stale_winners(store.winners(gpu=name), here, specs, current_templates())
    if not stale:
        return
    columns = ("changed", "then", "now", "winners")
    output().print(make_table("stale winners of this GPU", columns, drift_rows(stale, here), ("winners",)))
    for line in drift_lines(stale, expected_cost(stale)):
        output().print(line, markup=False, soft_wrap=True)


def drift_rows(stale: Sequence[Stale], here: Mapping[str, str]) -> list[tuple[object, ...]]:
    """Each change with the number of winners that it concerns; one winner may count in several rows."""
    counts = Counter(
        (name, item.winner.fingerprint.get(name, ""), here.get(name, "")) for item in stale for name in item.changed
    )
    return [(*change, count) for change, count in sorted(counts.items())]


def drift_lines(stale: Sequence[Stale], cost: Cost) -> list[str]:
    """What serves meanwhile, what recertifying takes, and that its gain is not known before."""
    refused = sum(item.other_template for item in stale)
    meanwhile = f"{cost.winners - refused} are served meanwhile, as measured with other versions"
    if refused:
        meanwhile += f"; {refused} are not, their template has changed: a neighbour's winner or the default stands in"
    takes = f"compiles up to {cost.configs} configs, takes at most about {math.ceil(cost.minutes)} min without searches"
    return [
        f"{cost.winners} problems are stale: {meanwhile}. What that loses is unknown until they are raced.",
        f"nsa-autotune recertify: {takes}; {cost.may_carry} may carry over: which machine code was measured is known.",
    ]
