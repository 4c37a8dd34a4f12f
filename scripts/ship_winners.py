"""Put the winners of one GPU into the repository: tuning_db/<arch>.jsonl, and readable sources beside the golden files.

    python scripts/ship_winners.py --gpu "NVIDIA H200" [--db URL] [--min-heads 16]

Only winners of the templates as they are now are taken; other GPUs' shipped rows stay while current.
Review both outputs with git diff before a commit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nsa_autotune.codegen.golden import WINNERS_DIR, write_winner
from nsa_autotune.codegen.render import template_digest
from nsa_autotune.db import TuningStore, WinnerRecord
from nsa_autotune.kernels import all_specs
from nsa_autotune.spec import Problem

TUNING_DB = Path(__file__).resolve().parents[1] / "tuning_db"


def current_winners(store: TuningStore, gpu: str | None, min_heads: int) -> list[WinnerRecord]:
    """Winners of one GPU, or of all, whose template has not changed since; toy problems left out."""
    digests = {family: template_digest(spec) for family, spec in all_specs().items()}
    found = store.winners(gpu=gpu)
    return [w for w in found if digests.get(w.family) == w.template_digest and w.problem["num_q_heads"] >= min_heads]


def shipped_of_others(path: Path, gpu: str) -> list[WinnerRecord]:
    """What the file holds of other GPUs, as far as it is current."""
    with TuningStore("sqlite://", import_shipped=False) as shipped:
        if path.exists():
            shipped.import_jsonl(path, source=None)
        return [winner for winner in current_winners(shipped, None, 0) if winner.fingerprint["gpu"] != gpu]


def main() -> int:
    """Write the files and say how many winners they hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", required=True, help="the GPU's name, in full")
    parser.add_argument("--db", help="URL of the database; the default one if none")
    parser.add_argument("--min-heads", type=int, default=16, help="leave smaller problems out")
    arguments = parser.parse_args()
    with TuningStore(arguments.db) as store:
        winners = current_winners(store, arguments.gpu, arguments.min_heads)
    if not winners:
        print(f"no current winner of {arguments.gpu!r} in {arguments.db or 'the default database'}", file=sys.stderr)
        return 1
    arch = f"sm_{winners[0].fingerprint['capability'].replace('.', '')}"
    everything = [*winners, *shipped_of_others(TUNING_DB / f"{arch}.jsonl", arguments.gpu)]
    with TuningStore("sqlite://", import_shipped=False) as only:
        for winner in everything:
            only.set_winner(winner)
        only.export_jsonl(TUNING_DB / f"{arch}.jsonl", records=("winner",))
    for old in (WINNERS_DIR / arch).glob("*.py"):
        old.unlink()
    for winner in everything:
        spec, problem = all_specs()[winner.family], Problem.from_dict(winner.problem)
        write_winner(spec, problem, winner.config, arch)
    print(f"{len(winners)} winners of {arguments.gpu}, {len(everything) - len(winners)} of other GPUs")
    print(f"tuning_db/{arch}.jsonl, sources in {WINNERS_DIR / arch}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
