"""NSAConfig: the constants of Native Sparse Attention, validated; the only owner of their defaults."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields

from .errors import InvalidConfig


@dataclass(frozen=True)
class NSAConfig:
    """Constants of the three branches (arXiv 2502.11089, section 3); sizes are in tokens unless said otherwise.

    `num_selected` counts the forced blocks: the `num_initial` first and the `num_local` last, the token's own included.
    """

    compress_block_size: int = 32  # l
    compress_stride: int = 16  # d
    select_block_size: int = 64  # l'
    num_selected: int = 16  # n, in blocks
    num_initial: int = 1  # in blocks
    num_local: int = 2  # in blocks
    window_size: int = 512  # w

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidConfig(f"{field.name} must be an int", {field.name: value})
            if value < (0 if field.name == "num_initial" else 1):
                raise InvalidConfig(f"{field.name} must be positive", {field.name: value})
        l, d, l_sel = self.compress_block_size, self.compress_stride, self.select_block_size  # noqa: E741
        if l % d or l_sel % d:
            raise InvalidConfig(
                "compress_stride (d) must divide compress_block_size (l) and select_block_size (l')",
                {"l": l, "d": d, "l'": l_sel},
                "Use for example l=32, d=16, l'=64.",
            )
        if l > l_sel:
            raise InvalidConfig(
                "compress_block_size (l) must not exceed select_block_size (l')",
                {"l": l, "l'": l_sel},
                "Eq. 9 of the paper needs l <= l'.",
            )
        if self.num_initial + self.num_local > self.num_selected:
            raise InvalidConfig(
                "num_selected (n) counts the forced blocks, so num_initial + num_local <= num_selected must hold",
                {"num_initial": self.num_initial, "num_local": self.num_local, "num_selected": self.num_selected},
                "Raise num_selected or force fewer blocks.",
            )

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Computed once: a config is part of the key of every launch."""
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def num_compressed(self, tokens: int) -> int:
        """Number of whole compressed blocks in `tokens` tokens: floor((T - l) / d) + 1, at least 0 (Eq. 7)."""
        if tokens < self.compress_block_size:
            return 0
        return (tokens - self.compress_block_size) // self.compress_stride + 1

    def num_select_blocks(self, tokens: int) -> int:
        """Number of selection blocks that cover `tokens` tokens: ceil(T / l')."""
        return -(-tokens // self.select_block_size)

    def to_text(self) -> str:
        """The constants in their order, with commas between: what operators take and tracing can follow."""
        return (
            f"{self.compress_block_size},{self.compress_stride},{self.select_block_size},{self.num_selected},"
            f"{self.num_initial},{self.num_local},{self.window_size}"
        )

    @staticmethod
    @functools.lru_cache(maxsize=64)  # every operator of every step asks for the same few
    def from_text(text: str) -> NSAConfig:
        """What `to_text` wrote."""
        return NSAConfig(*map(int, text.split(",")))

    def to_dict(self) -> dict[str, int]:
        """The constants by name, ready for JSON."""
        return asdict(self)
