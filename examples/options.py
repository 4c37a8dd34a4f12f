"""The options of train.py, which generate.py takes as well."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from decoder import ATTENTIONS

COUNTS = ("seq", "start-seq", "batch", "steps", "log-every", "window", "num-selected")
COUNTS += ("hidden", "layers", "heads", "kv-heads", "head-dim")  # options that are at least 1


def parse(arguments: list[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The command line of train.py; ValueError for what cannot work."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("recall", "text"), default="recall")
    parser.add_argument("--attention", choices=ATTENTIONS, default="nsa")
    parser.add_argument("--text", type=Path, help="text file for --task text; default: LICENSE and README.md")
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/TASK-ATTENTION")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16, float32 on a CPU"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compression", choices=("mlp", "mean"), default="mlp", help="phi of compressed blocks (nsa)")
    parser.add_argument("--share-kv", action="store_true", help="the branches of nsa share their keys and values")
    parser.add_argument("--rope-theta", type=float, help="base of the rotary angles; default: no rotary")
    parser.add_argument("--stop-at", type=float, default=1.0, help="end when a record's mean accuracy reaches it")
    parser.add_argument("--start-seq", type=int, help="tokens of a sequence at first; doubled up to --seq (recall)")
    parser.add_argument("--double-at", type=float, default=0.9, help="mean accuracy of a record that doubles them")
    parser.add_argument("--dump-activations", type=Path, help="file for q, k, v of the last layer (codesign)")
    for name, value, meaning in (
        ("seq", 4096, "tokens of a sequence"),
        ("batch", 8, "sequences of a step"),
        ("steps", 2000, "steps of the optimizer"),
        ("log-every", 10, "steps between records"),
        ("seed", 0, "of weights and data"),
        ("pairs", 64, "key-value pairs of a sequence (recall)"),
        ("repeats", 8, "times that a pair is told, in a row (recall)"),
        ("keys", 512, "different keys there are (recall)"),
        ("window", 512, "sliding window, in tokens"),
        ("num-selected", 16, "selected blocks of 64 tokens, forced ones included"),
        ("hidden", 512, "width of the decoder"),
        ("layers", 2, "layers"),
        ("heads", 16, "query heads"),
        ("kv-heads", 2, "key and value heads"),
        ("head-dim", 64, "width of a head"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning} (default {value})")
    options = parser.parse_args(arguments)
    check(options)
    on_cpu = torch.device(options.device).type == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.start_seq = options.start_seq or (min(256, options.seq) if options.task == "recall" else options.seq)
    options.out = options.out or Path("runs") / f"{options.task}-{options.attention}"
    return options


def check_counts(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise ValueError for one of these options that is given and below 1."""
    for name in names:
        count = getattr(options, name.replace("-", "_"))
        if count is not None and count < 1:
            raise ValueError(f"--{name} must be at least 1, not {count}")


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for an option that would fail later, in words of the library that meets it."""
    check_counts(options, COUNTS)
    if options.heads % options.kv_heads:
        raise ValueError(f"--heads must be a multiple of --kv-heads, not {options.heads} of {options.kv_heads}")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:
        why = str(error).splitlines()[0]
        rule = "--device must be one that torch can use, such as cpu"
        raise ValueError(f"{rule}, not {options.device}: {why}") from error
