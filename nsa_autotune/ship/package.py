"""From a tuning database to a package in a folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..codegen.target import parse_target, target_of_capability
from ..db import TrialRecord, TuningStore, WinnerRecord
from ..errors import InvalidInput
from ..kernels import all_specs
from .choice import ProblemsOf, Wanted, choose_gpu, choose_kernels, choose_winners
from .compiled import compile_binaries
from .contents import Files, build, check_name, check_replaces_nothing, default_name

Report = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What to ship: a GPU by a part of its name, families (all if none), and for which targets to compile."""

    gpu: str
    wanted: Wanted
    problems_of: ProblemsOf
    families: tuple[str, ...] = ()
    name: str = ""  # of the package; from the GPU's if empty
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """What a package holds."""

    name: str
    gpu: str
    winners: int
    stale: int  # left out, since their template changed
    kernels: int
    binaries: int
    untuned: tuple[str, ...] = ()  # families of which the default config only is shipped
    foreign: tuple[str, ...] = ()  # targets whose binaries the GPU cannot load


def make_package(store: TuningStore, order: Order, out: Path, report: Report) -> Made:
    """Write the package's project to `out`, whole or not at all; raises InvalidInput, UnknownName or KernelError."""
    for target in order.targets:
        parse_target(target)  # a slip of the keyboard is told before anything is done
    check_free(out)
    known = [winner for winner in store.winners() if not winner.fingerprint["gpu"].startswith("target ")]
    gpu = choose_gpu((winner.fingerprint["gpu"] for winner in known), order.gpu)
    name = order.name or default_name(gpu)
    check_name(name)
    check_replaces_nothing(name)
    chosen = choose_winners(known, gpu, lambda s, w: s.family in (order.families or all_specs()) and order.wanted(s, w))
    kernels = choose_kernels(chosen.winners, order.families or tuple(all_specs()), order.problems_of)
    trials = {winner.digest: trials_of(store, winner) for winner in chosen.winners}
    binaries = compile_binaries(kernels, order.targets, report)
    write_folder(build(name, chosen, kernels, trials, binaries, order.targets), out)
    compiled = max(0, (len(binaries) - 1) // 2)  # two files each, and an index
    tuned = {winner.family for winner in chosen.winners}
    untuned = tuple(dict.fromkeys(each.spec.family for each in kernels if each.spec.family not in tuned))
    own = target_of_capability(chosen.winners[0].fingerprint["capability"])
    foreign = tuple(target for target in order.targets if target != own)
    return Made(name, gpu, len(chosen.winners), chosen.stale, len(kernels), compiled, untuned, foreign)


def trials_of(store: TuningStore, winner: WinnerRecord) -> Sequence[TrialRecord]:
    """The successful trials of the winner's variant for its problem on its fingerprint."""
    found = store.trials(
        family=winner.family,
        fingerprint_digest=winner.fingerprint_digest,
        problem_key=winner.problem_key,
        template_digest=winner.template_digest,
        status="ok",
    )
    return [trial for trial in found if trial.config == winner.config]


def check_free(out: Path) -> None:
    """Raise InvalidInput unless `out` is new or an empty folder: nothing is overwritten."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        rule = "a package is written to a new or an empty folder"
        raise InvalidInput(rule, {"--out": str(out)}, "Name another one, or delete it.")


def write_folder(files: Files, out: Path) -> None:
    """Write the files beside `out`, then give the folder its name; raises InvalidInput if that cannot be done."""
    made: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        made.chmod(0o755)
        for name, content in files.items():
            path = made / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        os.replace(made, out)  # an empty folder gives way
    except OSError as error:
        values = {"--out": str(out), "reason": error.strerror}
        remedy = "Name a folder that you may write."
        raise InvalidInput("the package cannot be written", values, remedy) from error
    finally:
        if made is not None and made.exists():
            shutil.rmtree(made)
