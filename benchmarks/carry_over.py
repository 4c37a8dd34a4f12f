"""How many shipped winners keep their machine code under another Triton: compiled with each, no GPU needed.

    python benchmarks/carry_over.py compile --out a.json                       # in an environment with one Triton
    python benchmarks/carry_over.py compile --out b.json                       # in an environment with another
    TRITON_PTXAS_PATH=... python benchmarks/carry_over.py compile --out c.json # with the first one's assembler
    python benchmarks/carry_over.py compile --touch-templates --out d.json     # a comment added to every template
    python benchmarks/carry_over.py compare a.json b.json [--page page.md]

A winner counts as carried over if `binary_sha` is equal: instructions, literals, registers, shared memory and warps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parents[1] / "tuning_db" / "sm_90.jsonl"
COMMENT = "{# a comment that changes nothing #}\n"
IGNORED_PTX = (".version", ".file", ".loc")  # directives without an effect on instructions
SHARES: Mapping[str, str] = {"same machine code": "binary_sha", "same PTX": "ptx_sha", "same launch": "launch_sha"}

Variant = dict[str, Any]


def shipped_variants(path: Path, gpu: str) -> list[Variant]:
    """Family, problem and config of the GPU's shipped winners, each once."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    winners = [line for line in lines if line["record"] == "winner" and line["fingerprint"]["gpu"] == gpu]
    names = ("family", "problem", "config")
    found = {name_of(winner): {name: winner[name] for name in names} for winner in winners}
    return [found[name] for name in sorted(found)]


def name_of(variant: Mapping[str, Any]) -> str:
    """Canonical JSON of what identifies a variant between two files."""
    return json.dumps([variant["family"], variant["problem"], variant["config"]], sort_keys=True)


def plain_ptx(text: str) -> str:
    """PTX without comments, empty lines and directives that change no instruction."""
    lines = (re.sub(r"//.*", "", line).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line and not line.startswith(IGNORED_PTX))


def compile_one(variant: Variant, target: str) -> Variant:
    """The variant with its identities, or with the error of its compilation."""
    from nsa_autotune.codegen.compile import meta_arguments, parse_target
    from nsa_autotune.codegen.host_code import launch_sha
    from nsa_autotune.codegen.load import load
    from nsa_autotune.codegen.machine_code import usage_of, variant_code_sha
    from nsa_autotune.codegen.render import render
    from nsa_autotune.codegen.target import absent_gpu
    from nsa_autotune.kernels import get_spec
    from nsa_autotune.spec import Problem

    spec, problem = get_spec(variant["family"]), Problem.from_dict(variant["problem"])
    try:
        rendered = render(spec, problem, variant["config"])
        with absent_gpu(parse_target(target)):
            kernels = load(rendered).launch(**meta_arguments(spec, problem), warmup=True)
    except Exception as error:  # a row of the result, not its end
        return {**variant, "error": f"{type(error).__name__}: {error}"[:500]}
    ptx = "\n".join(plain_ptx(kernel.asm["ptx"]) for kernel in kernels)
    return {
        **variant,
        "template_digest": rendered.template_digest,
        "binary_sha": variant_code_sha(kernels),
        "ptx_sha": hashlib.sha256(ptx.encode()).hexdigest()[:20],
        "launch_sha": launch_sha(rendered.source),
        "registers": max(usage_of(kernel).registers for kernel in kernels),
    }


def compile_all(variants: Sequence[Variant], target: str, jobs: int) -> list[Variant]:
    """All variants, in order, compiled in child processes with an empty cache of Triton's."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "NSA_AUTOTUNE_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1"}
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
            found = []
            for variant in pool.map(compile_one, variants, [target] * len(variants)):
                found.append(variant)
                print(f"\r{len(found)}/{len(variants)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def touch_templates(folder: Path) -> None:
    """Render from a copy of the templates in which every file begins with a comment; children inherit it."""
    from nsa_autotune.codegen import render
    from nsa_autotune.codegen.paths import template_dir

    shutil.copytree(template_dir(), folder, dirs_exist_ok=True)
    for path in folder.rglob("*.j2"):
        path.write_text(COMMENT + path.read_text(encoding="utf-8"), encoding="utf-8")
    render.template_dir = lambda: folder


def toolchain(target: str) -> dict[str, str]:
    """Versions of Triton and of the assembler that it calls for the target."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    return {"triton": triton.__version__, "assembler": f"ptxas {get_ptxas(int(target.split(':')[1])).version}"}


def shares(first: Iterable[Variant], second: Iterable[Variant]) -> list[dict[str, Any]]:
    """For each family, and for all: variants in both files, and how many are equal in each respect."""
    others = {name_of(variant): variant for variant in second}
    pairs = [(variant, others[name_of(variant)]) for variant in first if name_of(variant) in others]
    families = sorted({a["family"] for a, _ in pairs})
    groups = [(family, [pair for pair in pairs if pair[0]["family"] == family]) for family in families]
    return [{"family": name, "winners": len(group), **_equal(group)} for name, group in [*groups, ("all", pairs)]]


def _equal(pairs: Sequence[tuple[Variant, Variant]]) -> dict[str, int]:
    counts = {"fail": sum("error" in a or "error" in b for a, b in pairs)}
    return counts | {label: sum(a.get(key, 1) == b.get(key, 2) for a, b in pairs) for label, key in SHARES.items()}


def page(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Markdown: both tool chains and the table of shares."""
    rows = shares(first["variants"], second["variants"])
    head = [f"{label(first)} and {label(second)}, {first['target']}, winners of {first['gpu']}.", ""]
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join([*head, *lines, ""])


def label(told: Mapping[str, Any]) -> str:
    """The tool chain of a file in words."""
    touched = ", a comment added to each template" if told["touched"] else ""
    return f"Triton {told['triton']} with {told['assembler']}{touched}"


def as_text(told: Mapping[str, Any]) -> str:
    """JSON with one variant a line."""
    head = {name: value for name, value in told.items() if name != "variants"}
    lines = ",\n".join(json.dumps(variant, sort_keys=True) for variant in told["variants"])
    return f'{json.dumps(head, sort_keys=True)[:-1]}, "variants": [\n{lines}\n]}}\n'


def run_compile(arguments: argparse.Namespace) -> None:
    """Compile the winners and write the JSON."""
    variants = shipped_variants(arguments.winners, arguments.gpu)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.touch_templates:
            touch_templates(Path(folder))
        found = compile_all(variants, arguments.target, arguments.jobs)
    told = {**toolchain(arguments.target), "target": arguments.target, "gpu": arguments.gpu}
    told |= {"touched": arguments.touch_templates, "variants": found}
    Path(arguments.out).write_text(as_text(told), encoding="utf-8")
    print(f"{sum('error' not in variant for variant in found)} of {len(found)} winners compiled with {label(told)}")


def run_compare(arguments: argparse.Namespace) -> None:
    """Print the shares, and write them to a page if one is named."""
    first, second = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (arguments.first, arguments.second))
    text = page(first, second)
    print(text)
    if arguments.page:
        Path(arguments.page).write_text(text, encoding="utf-8")


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    compiling = commands.add_parser("compile")
    compiling.add_argument("--out", required=True, help="JSON to write")
    compiling.add_argument("--winners", type=Path, default=SHIPPED, help="JSON lines of winners")
    compiling.add_argument("--gpu", default="NVIDIA H100 80GB HBM3", help="whose winners, the name in full")
    compiling.add_argument("--target", default="cuda:90", help="what to compile for")
    compiling.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    compiling.add_argument("--touch-templates", action="store_true", help="add a comment to every template")
    compiling.set_defaults(run=run_compile)
    comparing = commands.add_parser("compare")
    comparing.add_argument("first")
    comparing.add_argument("second")
    comparing.add_argument("--page", help="Markdown to write")
    comparing.set_defaults(run=run_compare)
    arguments = parser.parse_args()
    run: Callable[[argparse.Namespace], None] = arguments.run
    run(arguments)


if __name__ == "__main__":
    main()
