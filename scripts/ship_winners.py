"""Put the winners of one GPU into the repository: tuning_db/<arch>.jsonl, and readable sources beside the golden files.

    python scripts/ship_winners.py --gpu "NVIDIA H200" [--db URL] [--min-heads 16] [--cover 3%]

Only winners of the templates as they are now are taken, each with the trial that proves its accuracy; other GPUs'
shipped rows stay while current.
With --cover few configs are shipped that lose at most so much on any problem (`nsa-autotune cover` shows them).
Review both outputs with git diff before a commit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nsa_autotune.cli.cover import parse_loss
from nsa_autotune.codegen.golden import WINNERS_DIR, write_winner
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db import TrialRecord, TuningStore, WinnerRecord
from nsa_autotune.kernels import all_specs
from nsa_autotune.search.cover import choose_cover
from nsa_autotune.search.cross import covering_winners, load_tables
from nsa_autotune.ship.contents import worst_gated
from nsa_autotune.ship.package import trials_of
from nsa_autotune.spec import Problem

TUNING_DB = Path(__file__).resolve().parents[1] / "tuning_db"

Proven = list[tuple[WinnerRecord, TrialRecord | None]]  # a winner, and the trial that proves its accuracy


def current_winners(store: TuningStore, gpu: str | None, min_heads: int) -> list[WinnerRecord]:
    """Winners of one GPU, or of all, whose template has not changed since; toy problems left out."""
    digests = {family: template_digest(spec) for family, spec in all_specs().items()}
    found = store.winners(gpu=gpu)
    return [w for w in found if digests.get(w.family) == w.template_digest and w.problem["num_q_heads"] >= min_heads]


def covering(store: TuningStore, gpu: str, min_heads: int, bound: float) -> list[WinnerRecord]:
    """The same problems as those of `current_winners`, served by few configs that lose at most `bound` on each."""
    specs = all_specs().values()
    tables = load_tables(store, specs, gpu=gpu, wanted=lambda w: w.problem["num_q_heads"] >= min_heads)
    covers = [choose_cover(table, bound) for table in tables if table.fingerprint["gpu"] == gpu]
    return [winner for cover in covers for _, winner in covering_winners(cover)[0]]


def proven(store: TuningStore, winners: list[WinnerRecord]) -> Proven:
    """The winners with the trial of the largest error that passed the gate, where one is known."""
    return [(winner, worst_gated(trials_of(store, winner))) for winner in winners]


def shipped_of_others(path: Path, gpu: str) -> Proven:
    """What the file holds of other GPUs, as far as it is current."""
    with TuningStore("sqlite://", import_shipped=False) as shipped:
        if path.exists():
            shipped.import_jsonl(path, source=None)
        others = [winner for winner in current_winners(shipped, None, 0) if winner.fingerprint["gpu"] != gpu]
        return proven(shipped, others)


def write_shipped(winners: Proven, table: Path, folder: Path) -> None:
    """Replace an architecture's table, and the sources in its folder."""
    with TuningStore("sqlite://", import_shipped=False) as only:
        only.add_trials([trial for _, trial in winners if trial is not None])
        for winner, _ in winners:
            only.set_winner(winner)
        only.export_jsonl(table, records=("winner", "trial"))
    for old in folder.glob("*.py"):
        old.unlink()
    for winner, _ in winners:
        spec, problem = all_specs()[winner.family], Problem.from_dict(winner.problem)
        write_winner(spec, problem, winner.config, folder.name, folder.parent)


def main() -> int:
    """Write the files and say how many winners they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="the GPU's name, in full")
    parser.add_argument("--db", help="URL of the database; the default one if none")
    parser.add_argument("--min-heads", type=int, default=16, help="leave smaller problems out")
    parser.add_argument("--cover", type=parse_loss, help="what a problem may lose by sharing a config, such as 3%%")
    arguments = parser.parse_args()
    with TuningStore(arguments.db) as store:
        winners = current_winners(store, arguments.gpu, arguments.min_heads)
        if arguments.cover is not None:
            winners = covering(store, arguments.gpu, arguments.min_heads, arguments.cover)
        found = proven(store, winners)
    if not winners:
        print(f"no current winner of {arguments.gpu!r} in {arguments.db or 'the default database'}", file=sys.stderr)
        return 1
    arch = f"sm_{winners[0].fingerprint['capability'].replace('.', '')}"
    everything = [*found, *shipped_of_others(TUNING_DB / f"{arch}.jsonl", arguments.gpu)]
    write_shipped(everything, TUNING_DB / f"{arch}.jsonl", WINNERS_DIR / arch)
    print(f"{len(winners)} winners of {arguments.gpu}, {len(everything) - len(winners)} of other GPUs")
    print(f"tuning_db/{arch}.jsonl, sources in {WINNERS_DIR / arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
