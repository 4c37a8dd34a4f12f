"""Which pages each sequence of a cache holds, and which are free: the host's book, without any tensor.

What changes a block table or copies a page is returned as `Changes`, for `page_table` to carry out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import CacheFull, InvalidInput
from ..ops.paged_checks import sequence_numbers


class PageAllocator:
    """Pages 0 .. num_pages - 1 with reference counts. Asks nobody for room: callers look at `num_free` first."""

    def __init__(self, num_pages: int) -> None:
        self._holders = [0] * num_pages
        self._free = list(reversed(range(num_pages)))  # the lowest page is taken first, the last one given back next

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """`count` free pages, each held once from now on; there must be as many."""
        taken = [self._free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each page; a page without one is free."""
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)

    def is_shared(self, page: int) -> bool:
        """True if more than one sequence holds the page, so that nobody may write to it."""
        return self._holders[page] > 1


@dataclass(frozen=True)
class Changes:
    """What the device must follow: entries (row, slot, page) of the block table, and pages to copy (source, target)."""

    entries: list[tuple[int, int, int]] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class Row:
    """One sequence: its pages in order and its tokens. One that is not active takes no tokens, and has none."""

    pages: list[int] = field(default_factory=list)
    length: int = 0
    active: bool = True


class PageBook:
    """The pages of up to `max_batch` sequences. With `adjacent` each owns `max_tokens` worth of pages for good."""

    def __init__(self, num_pages: int, page_size: int, max_batch: int, max_tokens: int, adjacent: bool) -> None:
        self.num_pages, self.page_size, self.max_tokens, self.adjacent = num_pages, page_size, max_tokens, adjacent
        self.allocator = PageAllocator(num_pages)
        each = self.pages_for(max_tokens) if adjacent else 0
        self.rows = [Row(self.allocator.take(each)) for _ in range(max_batch)]
        self.reserved = 0  # tokens that every active sequence has pages for

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def active(self) -> tuple[int, ...]:
        """Numbers of the active sequences."""
        return tuple(number for number, row in enumerate(self.rows) if row.active)

    def numbers(self, *sequences: int) -> tuple[int, ...]:
        """The given numbers as ints, if each is one of a sequence, and named once."""
        return sequence_numbers(sequences, len(self.rows))

    def check_capacity(self, tokens: int) -> None:
        """A sequence may have so many tokens."""
        if tokens > self.max_tokens:
            values = {"tokens": tokens, "max_tokens": self.max_tokens}
            raise CacheFull("a sequence must not outgrow its cache", values, "Make a cache with more max_tokens.")

    def lacking(self, targets: dict[int, int]) -> tuple[dict[int, int], list[tuple[int, int]]]:
        """For so many tokens in each sequence: pages it lacks, and (row, slot) of those it may not write, being shared.

        Raises CacheFull if there is no room for them.
        """
        lacks: dict[int, int] = {}
        shared: list[tuple[int, int]] = []
        for number, tokens in targets.items():
            row, slot = self.rows[number], self.rows[number].length // self.page_size
            self.check_capacity(tokens)
            lacks[number] = max(0, self.pages_for(max(tokens, self.reserved)) - len(row.pages))
            if slot < len(row.pages) and self.allocator.is_shared(row.pages[slot]):
                shared.append((number, slot))
        self._check_free(sum(lacks.values()) + len(shared))
        return lacks, shared

    def grow(self, targets: dict[int, int]) -> Changes:
        """Pages for so many tokens in each sequence, none shared where tokens come next; CacheFull changes nothing."""
        lacks, shared = self.lacking(targets)
        changes = Changes()
        for number, slot in shared:
            pages, (page,) = self.rows[number].pages, self.allocator.take(1)
            changes.copies.append((pages[slot], page))
            changes.entries.append((number, slot, page))
            self.allocator.release([pages[slot]])
            pages[slot] = page
        for number, count in lacks.items():
            pages, taken = self.rows[number].pages, self.allocator.take(count)
            changes.entries.extend((number, len(pages) + i, page) for i, page in enumerate(taken))
            pages += taken
        return changes

    def trim(self, sequences: Sequence[int]) -> Changes:
        """Gives back the pages behind the tokens; of a sequence's own it keeps as many as are reserved."""
        changes = Changes()
        for number in () if self.adjacent else sequences:
            row = self.rows[number]
            used = self.pages_for(row.length)
            behind, reserved = row.pages[used:], self.pages_for(self.reserved) if row.active else 0
            own = [page for page in behind if not self.allocator.is_shared(page)]
            kept = own[: max(0, reserved - used)]
            self.allocator.release(page for page in behind if page not in kept)
            row.pages[used:] = kept
            changes.entries.extend((number, used + i, page) for i, page in enumerate(kept) if behind[i] != page)
        return changes

    def fork(self, source: int, target: int) -> Changes:
        """`target`, which must be empty, gets the full pages of `source` and a copy of its partial one."""
        giver, taker = self.rows[source], self.rows[target]
        if taker.length or source == target:
            values = {"target": target, "its tokens": taker.length}
            raise InvalidInput("a sequence must be forked into an empty one", values, "Call free(target) first.")
        used, full = self.pages_for(giver.length), 0 if self.adjacent else giver.length // self.page_size
        changes = Changes()
        if not self.adjacent:
            count = self.pages_for(max(giver.length, self.reserved)) - full
            self._check_free(count - len(taker.pages))
            self.allocator.release(taker.pages)
            self.allocator.share(giver.pages[:full])
            taker.pages = [*giver.pages[:full], *self.allocator.take(count)]
            changes.entries.extend((target, slot, page) for slot, page in enumerate(taker.pages))
        changes.copies.extend(zip(giver.pages[full:used], taker.pages[full:used], strict=True))
        taker.length = giver.length
        return changes

    def _check_free(self, count: int) -> None:
        if count > self.allocator.num_free:
            values = {"pages needed": count, "free": self.allocator.num_free, "of": self.num_pages}
            remedy = "Free or truncate a sequence, or make a cache with more pages."
            raise CacheFull("there must be a free page for new tokens", values, remedy)
