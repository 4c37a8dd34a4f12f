"""Keep shipped winners whose template changed but not what it renders for them.

    python scripts/restamp_winners.py [--main-kernel]

A winner's readable source lies in kernels_generated/winners/<arch>. Where the present template, with the former values
of parameters that came since, renders the same code, or compiles to the machine code that was measured (with the Triton
that measured it on PYTHONPATH), the row of tuning_db/<arch>.jsonl gets the present digest and the source is written
anew. Where one renders other code, its table stays as it is: it has to be measured again.
With --main-kernel only the kernel named after the family and its constants are compared: after a change of helpers,
which a config does not choose, winners are still worth serving; their times stay those of before.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

from ship_winners import TUNING_DB, proven, write_shipped

from nsa_autotune.codegen.compile import compile_variant
from nsa_autotune.codegen.golden import WINNERS_DIR
from nsa_autotune.codegen.host_code import launch_sha
from nsa_autotune.codegen.render import render, template_digest
from nsa_autotune.codegen.target import SHARED_LIMITS_BYTES, target_of_capability
from nsa_autotune.db import TuningStore, WinnerRecord
from nsa_autotune.errors import NSAError
from nsa_autotune.kernels import all_specs
from nsa_autotune.search.drift import completed_winner
from nsa_autotune.spec import KernelSpec, Problem


def code_of(source: str, kernel: str = "") -> str:
    """What a source does: its syntax tree without the head and CONFIG; with `kernel` that one and constants only."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not (_is_text(node) or _is_told(node))]
    if kernel:
        tree.body = [n for n in tree.body if isinstance(n, ast.Assign) or getattr(n, "name", "") == kernel]
    return ast.dump(tree)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_told(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and [getattr(t, "id", "") for t in node.targets] == ["CONFIG"]


def head_of(source: str) -> dict[str, str]:
    """The lines `name: value` of a source's head."""
    lines = (ast.get_docstring(ast.parse(source)) or "").splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}


def restamped(
    winner: WinnerRecord, spec: KernelSpec, sources: list[str], main_kernel: bool = False
) -> WinnerRecord | None:
    """The winner under the present template, or None if that renders other code than one of the sources for it."""
    kernel = f"{spec.family}_kernel" if main_kernel else ""
    now, problem = completed_winner(winner, spec), Problem.from_dict(winner.problem)
    if spec.broken_constraint(problem, now.config) is not None:
        return None
    wanted = render(spec, problem, now.config).source
    for source in sources:
        head = head_of(source)
        measured = (head.get("template digest"), json.loads(head.get("config", "null")))
        if measured != (winner.template_digest, winner.config):
            continue
        same_text = code_of(source, kernel) == code_of(wanted, kernel)
        if same_text or (launch_sha(source) == launch_sha(wanted) and compiles_alike(now, spec, problem)):
            return replace(now, template_digest=template_digest(spec))
    return None


def compiles_alike(winner: WinnerRecord, spec: KernelSpec, problem: Problem) -> bool:
    """True if the machine code that was measured is what the present template compiles to here."""
    stored, target = (winner.resources or {}).get("binary_sha"), target_of_capability(winner.fingerprint["capability"])
    if not stored or target not in SHARED_LIMITS_BYTES:
        return False
    try:
        return compile_variant(spec, problem, winner.config, target).binary_sha == stored
    except NSAError:
        return False


def restamp(table: Path, folder: Path, main_kernel: bool = False) -> tuple[int, list[str]]:
    """Rewrite a table and its sources if no winner is lost; how many were restamped, and those that would be lost."""
    with TuningStore("sqlite://", import_shipped=False) as store:
        store.import_jsonl(table, source=None)
        winners = proven(store, store.winners())
    kept, lost, count = [], [], 0
    for winner, trial in winners:
        spec = all_specs()[winner.family]
        if winner.template_digest == template_digest(spec):
            kept.append((winner, trial))
            continue
        sources = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{winner.family}__*.py"))]
        found = restamped(winner, spec, sources, main_kernel)
        if found is None:
            lost.append(f"{winner.family} on {winner.fingerprint['gpu']}: {winner.problem_key}")
        else:
            stamp = {"config": found.config, "template_digest": found.template_digest}
            kept.append((found, None if trial is None else replace(trial, **stamp)))
            count += 1
    if lost:
        return 0, lost
    write_shipped(kept, table, folder)
    return count, []


def main() -> int:
    """All tables; 1 if a winner has other code now: then its table is left as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--main-kernel", action="store_true", help="compare the family's own kernel only")
    main_kernel, code = parser.parse_args().main_kernel, 0
    for table in sorted(TUNING_DB.glob("*.jsonl")):
        count, lost = restamp(table, WINNERS_DIR / table.stem, main_kernel)
        for line in lost:
            print(f"other code than was measured: {line}", file=sys.stderr)
        print(f"{table.name}: {count} winners restamped" if not lost else f"{table.name}: left as it is")
        code |= bool(lost)
    return code


if __name__ == "__main__":
    sys.exit(main())
