"""Generates with a cache: the prompt in chunks, then token by token, or several guessed tokens at a time.

python examples/train.py --task text && python examples/generate.py --run runs/text-nsa --prompt "Licensed" --draft 4
python examples/generate.py --run runs/recall-nsa --evaluate --cache-dtype fp8    # what the cache costs in accuracy
python examples/generate.py --tokens 20 --seq 256 --hidden 64 --heads 4 --kv-heads 1 --head-dim 16    # random weights

Without --run a model with random weights is made; options that are not listed here are those of train.py. --draft N
guesses the N tokens that followed the last two before (lookup in what was said) and checks them in one step.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import train
from cached import CachedDecoder
from decoder import Decoder
from options import check_counts
from tasks import IGNORED, Task, to_tokens

from nsa_autotune.errors import NSAError
from nsa_autotune.nn.cache import MAX_NEW

CACHE_DTYPES = {"model": None, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Generated:
    """All tokens, the prompt's included, and the steps that the new ones took."""

    tokens: list[int]
    steps: int


def greedy(decoder: CachedDecoder, prompt: list[int], count: int, *, chunk: int = 512, draft: int = 0) -> Generated:
    """The `count` likeliest tokens after the prompt, one after the other; `draft` of them may be guessed for a step."""
    device = decoder.model.embedding.weight.device
    found, steps = list(prompt), 0
    for part in torch.tensor([prompt], device=device).split(chunk, dim=1):
        logits = decoder(part)
    found.append(int(logits[0, -1].argmax()))
    while len(found) < len(prompt) + count:
        guess = lookup(found, draft)
        asked = torch.tensor([found[-1:] + guess], device=device)
        answers, steps = decoder(asked)[0].argmax(-1).tolist(), steps + 1
        right = next((i for i, token in enumerate(guess) if token != answers[i]), len(guess))
        found += answers[: right + 1]  # what was guessed rightly, and what follows it
        if right < len(guess):
            decoder.truncate(len(found) - 1)
    return Generated(found[: len(prompt) + count], steps)


def lookup(found: list[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the last two where these were said before."""
    for start in range(len(found) - 3, -1, -1):
        if found[start : start + 2] == found[-2:]:
            return found[start + 2 : start + 2 + count]
    return []


@torch.no_grad()
def evaluate(model: Decoder, task: Task, seq: int, cache_dtype: torch.dtype | None, *, batches: int, chunk: int) -> str:
    """Accuracy on fresh sequences: of the forward, and through a cache, the last half in steps of MAX_NEW tokens."""
    data, device = torch.Generator().manual_seed(1_000_003), model.embedding.weight.device
    right = {"forward": 0, "cache": 0}
    asked_count = 0
    for _ in range(batches):
        tokens, targets = (x.to(device) for x in task.batch(1, seq, data))
        decoder = CachedDecoder(model, seq, cache_dtype=cache_dtype)
        parts = [*tokens[:, : seq // 2].split(chunk, dim=1), *tokens[:, seq // 2 :].split(MAX_NEW, dim=1)]
        answers = {"forward": model(tokens), "cache": torch.cat([decoder(part) for part in parts], dim=1)}
        asked = targets != IGNORED
        asked_count += int(asked.sum())
        for name, logits in answers.items():
            right[name] += int(((logits.argmax(-1) == targets) & asked).sum())
    shares = ", ".join(f"{name} {count / max(asked_count, 1):.4f}" for name, count in right.items())
    return f"accuracy of {asked_count} answers: {shares}"


def load(options: argparse.Namespace, rest: list[str]) -> tuple[Decoder, Task, str, argparse.Namespace]:
    """Model, task, letters and options of a run of train.py, or of a model with random weights."""
    run: Path | None = options.run
    asked = train.parse(rest)
    if run is None:
        torch.manual_seed(asked.seed)
        task = train.make_task(asked)
        return train.make_model(asked, task.vocabulary), task, task.letters, asked
    if not (run / "model.pt").exists():
        raise ValueError(f"{run} has no model.pt; train.py writes it at the end of a run")
    named = json.loads((run / "options.json").read_text(encoding="utf-8"))
    made = argparse.Namespace(**{**vars(asked), **named, "device": asked.device, "dtype": asked.dtype})
    made.text = Path(made.text) if made.text else None
    saved = torch.load(run / "model.pt", map_location=made.device, weights_only=True)
    model = train.make_model(made, saved["weights"]["embedding.weight"].shape[0])
    model.load_state_dict(saved["weights"])
    return model, train.make_task(made), saved["letters"], made


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it is for train.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--prompt", default="Licensed under the ", help="of a text; recall draws a sequence")
    parser.add_argument("--tokens", type=int, default=100, help="to generate")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of a prompt that are read at once")
    parser.add_argument("--draft", type=int, default=0, help=f"tokens to guess for a step, up to {MAX_NEW - 1}")
    parser.add_argument("--cache-dtype", choices=CACHE_DTYPES, default="model")
    parser.add_argument("--evaluate", action="store_true", help="accuracy with and without the cache, no text")
    parser.add_argument("--batches", type=int, default=8, help="sequences of --evaluate")
    return parser.parse_known_args(arguments)


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for a number that makes no sense."""
    check_counts(options, ("tokens", "chunk", "batches"))
    if not 0 <= options.draft < MAX_NEW:
        raise ValueError(f"--draft must be from 0 to {MAX_NEW - 1}, not {options.draft}")


def generate(options: argparse.Namespace, rest: list[str]) -> str:
    """What the command prints."""
    check(options)
    model, task, letters, made = load(options, ["--task", "text", *rest])
    model = model.to(getattr(torch, made.dtype))
    dtype = CACHE_DTYPES[options.cache_dtype]
    if options.evaluate:
        return evaluate(model, task, made.seq, dtype, batches=options.batches, chunk=options.chunk)
    prompt = prompt_tokens(options.prompt, task, letters, made.seq)
    decoder = CachedDecoder(model, len(prompt) + options.tokens + MAX_NEW, cache_dtype=dtype)
    started = time.perf_counter()
    found = greedy(decoder, prompt, options.tokens, chunk=options.chunk, draft=options.draft)
    seconds = time.perf_counter() - started
    said = "".join(letters[token] for token in found.tokens) if letters else str(found.tokens[len(prompt) :])
    return f"{said}\n[{options.tokens} tokens in {found.steps} steps and {seconds:.2f} s, the prompt's chunks included]"


def prompt_tokens(text: str, task: Task, letters: str, seq: int) -> list[int]:
    """Of a text, or half a sequence of recall."""
    if letters and not text:
        raise ValueError("--prompt must have at least one character")
    if letters:
        return [int(token) for token in to_tokens(text, letters)]
    tokens, _ = task.batch(1, seq, torch.Generator().manual_seed(0))
    return [int(token) for token in tokens[0, : seq // 2]]


def main(arguments: list[str] | None = None) -> None:
    """Command line; a wrong option ends it with a sentence."""
    try:
        print(generate(*parse(arguments)))
    except (ValueError, NSAError) as error:
        raise SystemExit(f"generate.py: {error}") from error


if __name__ == "__main__":
    main()
