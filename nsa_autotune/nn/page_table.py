"""PageTable: block table and lengths of a batch on the device, for all layers of a model.

The host keeps a book of both (`pages`), so that nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CacheFull, InvalidConfig, InvalidInput
from ..ops.decode import length_bound
from ..ops.paged_checks import sequence_numbers, whole_number
from ..paged import CachePools, stored
from ..spec import PAGE_SIZES
from .pages import Changes, PageBook


@dataclass(frozen=True)
class Rows:
    """What a step works on: block table `[B, MP]` and lengths `[B]` of its sequences, the new tokens counted.

    None of them is longer than `max_length`, or will be when a graph of the step is replayed; None: the table's room.
    """

    table: Tensor
    lengths: Tensor
    max_length: int | None


@dataclass(frozen=True)
class _Step:
    """Tokens that every layer appends in its turn."""

    num_new: int
    named: tuple[int, ...] | None  # sequences that were named; None: all that were active
    grown: tuple[int, ...]
    woken: tuple[int, ...]  # those that were not active before
    view: Rows


class PageTable:
    """Block table, lengths and pages of up to `max_batch` sequences; the `KVCache` of every layer takes the same one.

    The first layer that appends in a step makes room for the tokens and counts them, the others follow it. Every
    sequence takes tokens until `free`; one that was freed comes back by naming it. With `adjacent` each sequence owns
    `max_tokens` worth of pages side by side from the start, and `num_pages` is not read.
    """

    @torch.inference_mode(False)  # else no step outside of it could change these tensors
    def __init__(
        self,
        *,
        max_batch: int,
        max_tokens: int,
        num_pages: int | None = None,
        page_size: int = 64,
        device: torch.device | str | None = None,
        adjacent: bool = False,
    ) -> None:
        _check_sizes(page_size, max_batch=max_batch, max_tokens=max_tokens)
        each = -(-max_tokens // page_size)
        self.page_size, self.max_batch, self.max_tokens = page_size, max_batch, max_tokens
        self.num_pages = max_batch * each if num_pages is None or adjacent else num_pages
        _check_sizes(page_size, num_pages=self.num_pages)
        self._book = PageBook(self.num_pages, page_size, max_batch, max_tokens, adjacent)
        own = torch.arange(max_batch * each, dtype=torch.int32).reshape(max_batch, each)
        self.table = (own if adjacent else torch.zeros_like(own)).to(device)
        self.lengths = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.active = torch.ones(max_batch, dtype=torch.int32, device=device)
        self._layers: list[CachePools] = []
        self._done: list[int] = []  # steps that each layer has taken
        self._steps = 0
        self._step: _Step | None = None
        self._captured: int | None = None  # tokens that the last graph is good for

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, as the host knows them."""
        return tuple(row.length for row in self._book.rows)

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return self._book.allocator.num_free

    def add_layer(self, pools: CachePools) -> int:
        """The number under which a layer appends; its pages are copied with those of the others."""
        if any(self.host_lengths):
            values = {"lengths": self.host_lengths}
            raise InvalidInput("a layer must join its page table before the first token", values, "Make it earlier.")
        self._layers.append(pools)
        self._done.append(self._steps)
        return len(self._layers) - 1

    def begin(self, layer: int, num_new: int, sequences: Sequence[int] | None = None) -> Rows:
        """Counts `num_new` tokens more in the active sequences, or in those named; once a step, whoever comes first.

        Raises CacheFull, or InvalidInput for a layer that appends other tokens than the one before it; then nothing
        has changed. While a CUDA graph is captured the host's book stays as it is: see `advance`.
        """
        num_new = whole_number("tokens", num_new)
        named = None if sequences is None else sequence_numbers(sequences, self.max_batch)
        if self._done[layer] == self._steps:
            self._level("begin another step")
            self._step = self._extend(num_new, named)
            self._steps += 1
        step = self._step
        if step is None or (step.num_new, step.named) != (num_new, named):
            asked = {"tokens": num_new, "sequences": named}
            first = {} if step is None else {"first layer's tokens": step.num_new, "its sequences": step.named}
            raise InvalidInput("all layers must append the same tokens in a step", asked | first)
        self._done[layer] += 1
        return step.view

    def undo(self, layer: int | None = None) -> None:
        """Takes back what `layer` began last, or for all layers the step that some have not taken yet.

        Its tokens are taken back with the last layer that has them.
        """
        if layer is not None:
            self._done[layer] -= 1
        elif any(done < self._steps for done in self._done):
            self._done = [min(done, self._steps - 1) for done in self._done]
        step = self._step
        if step is None or self._steps in self._done:
            return
        self._steps, self._step = self._steps - 1, None
        if not _capturing(self.lengths):
            for row in step.grown:
                self._set_length(row, self._book.rows[row].length - step.num_new)
        for row in step.woken:
            self._set_active(row, False)
        self._apply(self._book.trim(step.grown))

    def reserve(self, tokens: int) -> None:
        """Pages for `tokens` tokens in every sequence, later ones too: until then no step changes the table."""
        self._level("reserve")
        tokens = whole_number("tokens", tokens, least=0)
        self._book.check_capacity(tokens)
        before, self._book.reserved = self._book.reserved, max(tokens, self._book.reserved)
        try:
            self._grow(dict.fromkeys(self._book.active(), tokens))
        except BaseException:  # a capture refuses, too
            self._book.reserved = before
            raise

    def advance(self, num_new: int) -> None:
        """What the host must be told before it replays a graph in which each active sequence takes `num_new` tokens.

        Takes pages that are not reserved yet. Raises CacheFull where there is no room, or the graph was captured for
        fewer tokens: for what was reserved then, rounded up as `ops.decode.length_bound` does.
        """
        self._level("advance")
        num_new = whole_number("tokens", num_new)
        rows = self._book.active()
        most = max((self._book.rows[row].length + num_new for row in rows), default=0)
        if self._captured is not None and most > self._captured:
            values = {"tokens": most, "captured for": self._captured}
            remedy = "Call reserve(tokens) and capture again."
            raise CacheFull("a sequence must not outgrow the graph that was captured last", values, remedy)
        self._make_room(rows, num_new)
        for row in rows:
            self._book.rows[row].length += num_new

    def fork(self, source: int, target: int) -> None:
        """Gives `target`, which must be empty, the tokens of `source`: full pages are shared, a partial one copied."""
        self._level("fork")
        (source,), (target,) = self._book.numbers(source), self._book.numbers(target)
        self._apply(self._book.fork(source, target))
        self._set_length(target, self._book.rows[source].length)
        self._set_active(target, True)

    def truncate(self, sequence: int, length: int) -> None:
        """Takes the tokens from `length` on back; pages that held nothing else are free, unless reserved."""
        self._level("truncate")
        (sequence,), length = self._book.numbers(sequence), whole_number("length", length)
        now = self._book.rows[sequence].length
        if not 0 <= length <= now:
            values = {"length": length, "tokens": now}
            raise InvalidInput("a sequence can only be truncated to a length that it has passed", values)
        self._set_length(sequence, length)
        self._apply(self._book.trim((sequence,)))

    def free(self, sequence: int) -> None:
        """Empties a sequence and gives its pages back; it takes no tokens until it is named again.

        A `prefill` that names no sequences names all of them.
        """
        self._level("free")
        (sequence,) = self._book.numbers(sequence)
        self._set_length(sequence, 0)
        self._set_active(sequence, False)
        self._apply(self._book.trim((sequence,)))

    def _extend(self, num_new: int, named: tuple[int, ...] | None) -> _Step:
        if named is not None and _capturing(self.lengths):
            remedy = "Capture decode_step(), which names none."
            raise InvalidInput("a step of named sequences cannot be captured", {"sequences": named}, remedy)
        rows = self._book.active() if named is None else named
        self._make_room(rows, num_new)
        woken = tuple(row for row in rows if not self._book.rows[row].active)
        for row in woken:
            self._set_active(row, True)
        longest = max(max(row.length for row in self._book.rows) + num_new, self._book.reserved)
        bound = length_bound(longest, self.max_tokens)  # that of a capture too, so that steps before it warm it up
        capturing = _capturing(self.lengths)
        if capturing:
            self._captured = bound
        for row in () if capturing else rows:  # what is captured has not happened yet
            self._book.rows[row].length += num_new
        if named is None:
            self.lengths.add_(self.active, alpha=num_new)
            return _Step(num_new, named, rows, woken, Rows(self.table, self.lengths, bound))
        index = _to_device(rows, self.lengths)
        self.lengths.index_add_(0, index, torch.full_like(index, num_new, dtype=torch.int32))
        return _Step(num_new, named, rows, woken, Rows(self.table[index], self.lengths[index], bound))

    def _make_room(self, rows: Sequence[int], num_new: int) -> None:
        if num_new < 1:
            raise InvalidInput("a step must bring at least one token", {"tokens": num_new})
        self._grow({row: self._book.rows[row].length + num_new for row in rows})

    def _grow(self, targets: dict[int, int]) -> None:
        if _capturing(self.lengths):
            lacks, shared = self._book.lacking(targets)
            if any(lacks.values()) or shared:
                remedy = "Call reserve(tokens) before the capture."
                raise InvalidInput("no page can be taken while a CUDA graph is captured", {"tokens": targets}, remedy)
        self._apply(self._book.grow(targets))

    def _apply(self, changes: Changes) -> None:
        """Copies pages in all layers and writes entries of the block table."""
        if changes.copies:
            source, target = _to_device(list(zip(*changes.copies, strict=True)), self.table)
            for pages in (pages for pools in self._layers for pages in pools.distinct()):
                stored(pages.data)[target] = stored(pages.data)[source]
                if pages.scale is not None:
                    pages.scale[target] = pages.scale[source]
        if changes.entries:
            row, slot, page = _to_device(list(zip(*changes.entries, strict=True)), self.table)
            self.table[row, slot] = page.int()

    def _set_length(self, row: int, length: int) -> None:
        self._book.rows[row].length = length
        self.lengths[row].fill_(length)

    def _set_active(self, row: int, active: bool) -> None:
        if self._book.rows[row].active != active:
            self._book.rows[row].active = active
            self.active[row].fill_(int(active))

    def _level(self, act: str) -> None:
        behind = [layer for layer, done in enumerate(self._done) if done < self._steps]
        if behind:
            remedy = "Let them append, or take the step back with undo()."
            raise InvalidInput(f"all layers must have appended before you {act}", {"layers behind": behind}, remedy)


def _check_sizes(page_size: int, **counts: int) -> None:
    if page_size not in PAGE_SIZES:
        remedy = f"Use {', '.join(map(str, PAGE_SIZES))}."
        raise InvalidConfig("page_size must be a power of two from 16 to 256", {"page_size": page_size}, remedy)
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidConfig(f"{name} must be a positive int", {name: value})


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _to_device(values: Sequence[int] | Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """Host numbers as int64 beside `like`, without waiting for the device."""
    found = torch.tensor(values, dtype=torch.int64)
    return found.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else found.to(like.device)
