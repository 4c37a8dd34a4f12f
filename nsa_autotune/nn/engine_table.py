"""EngineTable: what a serving engine keeps of its sequences, as a step of the cache sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.paged_checks import check_table, sequence_numbers, whole_number
from .page_table import Rows


class EngineTable:
    """The block table and lengths of a serving engine, which counts tokens and hands out pages itself."""

    def __init__(self, table: Tensor, lengths: Tensor, max_length: int | None) -> None:
        check_table(table, lengths, table)
        if max_length is not None:
            max_length = whole_number("max_length", max_length, least=1)
        self.table, self.lengths, self.max_length = table, lengths, max_length

    @property
    def max_batch(self) -> int:
        """Rows of the block table."""
        return self.table.shape[0]

    @property
    def host_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence; waits for the device."""
        return tuple(self.lengths.tolist())

    def begin(self, layer: int, num_new: int, sequences: Sequence[int] | None = None) -> Rows:
        """The engine has counted the new tokens already."""
        if sequences is None:
            return Rows(self.table, self.lengths, self.max_length)
        index = torch.tensor(sequence_numbers(sequences, self.max_batch), device=self.table.device)
        return Rows(self.table[index], self.lengths[index], self.max_length)

    def undo(self, layer: int) -> None:
        """Nothing was counted here."""
