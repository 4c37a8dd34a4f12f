"""Trains a small decoder with native sparse or dense attention.

python examples/train.py --task recall --attention nsa     # and again with --attention dense, then curves.py
python examples/train.py --device cpu --seq 256 --pairs 8 --steps 3 --hidden 64 --heads 4 --kv-heads 1 --head-dim 16

The folder --out gets options.json, log.jsonl (a record every --log-every steps), result.json (on fresh data), model.pt
(for generate.py), and curves.png where matplotlib is installed. On a CPU the reference implementation runs. Ctrl-C ends
a run after its step and keeps log.jsonl and model.pt; the same command begins at step 0 again and writes over them.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import curves
import torch
from activations import save_activations
from decoder import Decoder, Sizes
from options import parse
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tasks import IGNORED, Recall, Task, recall_task, text_task
from torch import Tensor
from torch.nn import functional as F

from nsa_autotune import NSAConfig
from nsa_autotune.errors import NSAError

Record = dict[str, Any]
EXIT_INTERRUPTED = 130


def make_task(options: argparse.Namespace) -> Task:
    """The task that the options name."""
    if options.task == "text":
        return text_task(options.seq, options.text)
    names = ("seq", "pairs", "keys", "window", "repeats")
    return recall_task(Recall(**{name: getattr(options, name) for name in names}))


def make_model(options: argparse.Namespace, vocabulary: int) -> Decoder:
    """The decoder, with float32 weights on the device; --dtype is that of its products."""
    nsa = replace(NSAConfig(), window_size=options.window, num_selected=options.num_selected)
    sizes = Sizes(
        vocabulary=vocabulary,
        hidden=options.hidden,
        layers=options.layers,
        heads=options.heads,
        kv_heads=options.kv_heads,
        head_dim=options.head_dim,
        rope_theta=options.rope_theta,
        compression=options.compression,
        share_kv=options.share_kv,
        nsa=nsa,
    )
    return Decoder(sizes, options.attention).to(options.device)


@dataclass
class Trainer:
    """One run: model, data and optimizer.

    Sequences begin with --start-seq tokens and double up to --seq, each time the model has learned them: matching
    keys is found among few of them, and stays found among many. A step has the same number of tokens throughout.
    """

    options: argparse.Namespace
    task: Task
    model: Decoder

    def __post_init__(self) -> None:
        self.stopped = False
        self.device, self.seq = torch.device(self.options.device), self.options.start_seq
        self.data = torch.Generator().manual_seed(self.options.seed + 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.options.lr, betas=(0.9, 0.95))
        warmup = max(1, self.options.steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / self.options.steps)),
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.dtype == "float16")

    def precision(self) -> AbstractContextManager[Any]:
        """Products in --dtype."""
        if self.options.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.options.dtype))

    def score(self) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of a fresh batch, on the device."""
        size = self.options.batch * self.options.seq // self.seq
        tokens, targets = (t.to(self.device) for t in self.task.batch(size, self.seq, self.data))
        with self.precision():
            logits = self.model(tokens)
        asked = targets != IGNORED
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        return loss, ((logits.argmax(-1) == targets) & asked).sum() / asked.sum()

    def step(self) -> tuple[Tensor, Tensor]:
        """One step on fresh data: loss and accuracy, on the device."""
        loss, right = self.score()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.detach(), right

    def stop(self, *_: object) -> None:
        """Ctrl-C: the step under way is the last one, so that weights and log agree; a second one ends it at once."""
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def records(self) -> Iterator[Record]:
        """Train; a record of means over every --log-every steps. Only a record waits for the device."""
        losses, rights, started = [], [], time.perf_counter()
        for step in range(1, self.options.steps + 1):
            loss, right = self.step()
            losses.append(loss)
            rights.append(right)
            if step % self.options.log_every and step != self.options.steps and not self.stopped:
                continue
            means = {"loss": float(torch.stack(losses).mean()), "accuracy": float(torch.stack(rights).mean())}
            seconds = time.perf_counter() - started
            tokens = len(losses) * self.options.batch * self.options.seq
            yield {
                "step": step,
                "seq": self.seq,
                **means,
                "tokens_per_s": round(tokens / seconds),
                "peak_memory_bytes": self.peak_memory(),
            }
            if self.stopped:
                return
            if self.seq < self.options.seq:
                if means["accuracy"] >= self.options.double_at:
                    self.seq = min(2 * self.seq, self.options.seq)
            elif means["accuracy"] >= self.options.stop_at:
                return
            losses, rights, started = [], [], time.perf_counter()

    def evaluate(self, batches: int = 8) -> Record:
        """Means over batches that training never saw."""
        self.data, self.seq = torch.Generator().manual_seed(self.options.seed + 1_000_003), self.options.seq
        with torch.no_grad():
            found = [torch.stack(self.score()) for _ in range(batches)]
        loss, accuracy = torch.stack(found).mean(0).tolist()
        return {"evaluation_loss": loss, "evaluation_accuracy": accuracy, "evaluation_batches": batches}

    def dump_activations(self, path: Path) -> None:
        """Write q, k and v of the last layer on one sequence that training never saw."""
        data = torch.Generator().manual_seed(self.options.seed + 2_000_003)
        tokens, _ = self.task.batch(1, self.options.seq, data)
        with self.precision():
            save_activations(self.model, tokens.to(self.device), -1, path)

    def peak_memory(self) -> int | None:
        """Most bytes that tensors held on the GPU so far; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def learn(trainer: Trainer, console: Console) -> list[Record]:
    """Train and log until the steps are done, the model is accurate enough, or Ctrl-C; the records."""
    options, records = trainer.options, list[Record]()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    before = signal.signal(signal.SIGINT, trainer.stop)
    try:
        with (
            Progress(*columns, console=console) as progress,
            (options.out / "log.jsonl").open("w", encoding="utf-8") as log,
        ):
            name = f"{options.task}, {options.attention}"
            bar = progress.add_task(name, total=options.steps)
            for record in trainer.records():
                records.append(record)
                log.write(json.dumps(record) + "\n")
                log.flush()
                state = f"{record['seq']} tokens  loss {record['loss']:.3f}  accuracy {record['accuracy']:.3f}"
                state += f"  {record['tokens_per_s']:,} tokens/s"
                progress.update(bar, completed=record["step"], description=f"{name}: {state}")
    finally:
        signal.signal(signal.SIGINT, before)
    return records


def train(options: argparse.Namespace, console: Console) -> list[Record]:
    """Run, log and draw; the records."""
    torch.manual_seed(options.seed)
    task = make_task(options)
    trainer = Trainer(options, task, make_model(options, task.vocabulary))
    make_folders(options)
    named = {name: str(v) if isinstance(v, Path) else v for name, v in vars(options).items() if name != "out"}
    (options.out / "options.json").write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    started = time.perf_counter()
    records = learn(trainer, console)
    torch.save({"weights": trainer.model.state_dict(), "letters": task.letters}, options.out / "model.pt")
    if trainer.stopped:
        kept = f"{options.out} has log.jsonl and model.pt until then"
        raise KeyboardInterrupt(f"stopped after step {records[-1]['step']}; {kept}; the same command begins anew")
    result = {"seconds": round(time.perf_counter() - started, 1), **records[-1], **trainer.evaluate()}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(json.dumps(result))
    if options.dump_activations is not None:
        trainer.dump_activations(options.dump_activations)
        console.print(f"wrote {options.dump_activations}")
    drawn = curves.draw([options.out], options.out / "curves.png")
    console.print(f"wrote {options.out}" + ("" if drawn else " (no curves.png: matplotlib is not installed)"))
    return records


def make_folders(options: argparse.Namespace) -> None:
    """The run's folder, without the result of an earlier run; ValueError now if a file could not be written later."""
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "result.json").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--out must be a folder that can be written: {error}") from error
    dump: Path | None = options.dump_activations
    if dump is not None and not dump.parent.is_dir():
        raise ValueError(f"--dump-activations must be a file in a folder that is there, not {dump}")


def main(arguments: list[str] | None = None) -> None:
    """Command line; a wrong option ends it with a sentence, Ctrl-C with what is kept."""
    try:
        train(parse(arguments, __doc__), Console())
    except (ValueError, NSAError, OSError) as error:
        raise SystemExit(f"train.py: {error}") from error
    except KeyboardInterrupt as stop:
        print(f"train.py: {str(stop) or 'stopped'}", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from stop


if __name__ == "__main__":
    main()
