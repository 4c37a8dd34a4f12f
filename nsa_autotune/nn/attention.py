"""NativeSparseAttention: projections, rotary, gates and output around `ops.nsa_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..config import NSAConfig
from ..dispatch.dispatcher import Dispatcher
from ..errors import InvalidConfig, InvalidInput
from ..ops import paged_checks
from ..ops.checks import check_cu_seqlens
from ..ops.decode import decode_attention
from ..ops.prefill import prefill_attention
from ..paged import positions_of
from .cache import MAX_NEW, KVCache
from .page_table import Rows
from .phi import Phi

COMPRESSIONS = ("mlp", "mean")


class NativeSparseAttention(nn.Module):
    """Causal self-attention with three gated branches (arXiv 2502.11089): compressed, selected, sliding window.

    Each branch has keys and values of its own unless `share_kv`. Rotary (halves, angles in float32) is applied to
    the queries and to the keys of every branch, before these are compressed; `rope_theta=None` leaves it out.
    Raises InvalidConfig for sizes that cannot work; `forward` raises InvalidInput, and with `strict` NotTuned rather
    than serve an untuned kernel on a GPU. `recompute` trades memory for time in training, as in `ops.nsa_attention`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        d_qk: int,
        d_v: int | None = None,
        *,
        config: NSAConfig | None = None,
        compression: str = "mlp",
        phi_hidden: int = 128,
        rope_theta: float | None = 10000.0,
        share_kv: bool = False,
        bias: bool = False,
        dispatcher: Dispatcher | None = None,
        strict: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.num_q_heads, self.num_kv_heads = hidden_size, num_q_heads, num_kv_heads
        self.d_qk, self.d_v = d_qk, d_qk if d_v is None else d_v
        self.config = NSAConfig() if config is None else config
        self.compression, self.rope_theta, self.share_kv = compression, rope_theta, share_kv
        self.dispatcher, self.strict, self.recompute = dispatcher, strict, recompute
        self._check_sizes(phi_hidden)
        branches = ("cmp",) if share_kv else ("cmp", "slc", "win")
        self.q_proj = nn.Linear(hidden_size, num_q_heads * self.d_qk, bias=bias)
        self.k_proj = _per_branch(branches, hidden_size, num_kv_heads * self.d_qk, bias)
        self.v_proj = _per_branch(branches, hidden_size, num_kv_heads * self.d_v, bias)
        self.gate_proj = nn.Linear(hidden_size, num_q_heads * 3, bias=bias)
        self.out_proj = nn.Linear(num_q_heads * self.d_v, hidden_size, bias=bias)
        learned = compression == "mlp"
        self.phi_k = Phi(self.config.compress_block_size, self.d_qk, phi_hidden) if learned else None
        self.phi_v = Phi(self.config.compress_block_size, self.d_v, phi_hidden) if learned else None

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """x `[B, T, hidden]`, or packed `[T, hidden]` with int32 `cu_seqlens` `[S + 1]`; returns the shape of x."""
        self._check_input(x, cu_seqlens)
        q, gates, keys = self._project(x, token_positions(x, cu_seqlens))
        phi_k, phi_v = (None if phi is None else phi.weights(q.dtype) for phi in (self.phi_k, self.phi_v))
        o = ops.nsa_attention(
            *(q, keys.pop("k"), keys.pop("v"), gates),
            **keys,
            config=self.config,
            phi_k=phi_k,
            phi_v=phi_v,
            cu_seqlens=cu_seqlens,
            dispatcher=self.dispatcher,
            strict=self.strict,
            recompute=self.recompute,
        )
        out: Tensor = self.out_proj(o.flatten(-2))
        return out

    @torch.no_grad()
    def prefill(self, x: Tensor, cache: KVCache, sequences: Sequence[int] | None = None) -> Tensor:
        """Appends the tokens x `[B, T, hidden]` and attends; T may be a whole prompt or the next chunk of one.

        Rows of x belong to `sequences`, by default to all of the cache, those that were freed included. Returns the
        shape of x; raises CacheFull or InvalidInput, and then the cache is as it was.
        """
        self._check_step(x, cache)
        named = tuple(range(cache.max_batch))
        if sequences is not None:
            named = paged_checks.sequence_numbers(sequences, cache.max_batch)
        _check_rows(x, len(named), "Name those that x has rows for: prefill(x, cache, [0, 2]), say.")
        with cache.step(x.shape[1], named) as rows:
            now = cache.host_lengths
            lengths = [now[row] for row in named]
            capacity = rows.table.shape[1] * cache.pools.page_size
            limit = paged_checks.length_limit(rows.max_length, capacity, x.shape[1])
            paged_checks.check_held(lengths, rows.table, x.shape[1], len(named), limit)  # before anything is written
            q, gates = self._append(x, cache, rows, folded=False)
            how: dict[str, Any] = {"config": self.config, "dispatcher": self.dispatcher, "strict": self.strict}
            o = prefill_attention(q, gates, cache.pools, rows.table, lengths, **how)
            out: Tensor = self.out_proj(o.flatten(-2))
        return out

    @torch.no_grad()
    def decode_step(self, x: Tensor, cache: KVCache) -> Tensor:
        """Appends 1 to 8 tokens x `[B, Q, hidden]` to the sequences of the cache and attends; returns the shape of x.

        Rows of sequences that were freed are not read, and what is returned for them means nothing. A CUDA graph can
        hold it: `cache.reserve` before, `cache.advance` before each replay. Raises CacheFull or InvalidInput, and then
        the cache is as it was.
        """
        self._check_step(x, cache)
        _check_rows(x, cache.max_batch, "A step has rows for all, those that were freed included, which are not read.")
        if x.shape[1] > MAX_NEW:
            remedy = "Use prefill() for more."
            raise InvalidInput(f"a decode step takes up to {MAX_NEW} tokens", {"tokens": x.shape[1]}, remedy)
        with cache.step(x.shape[1]) as rows:
            q, gates = self._append(x, cache, rows, folded=True)
            o = decode_attention(
                *(q, gates, cache.pools, rows.table, rows.lengths),
                config=self.config,
                counters=cache.counters,
                max_length=rows.max_length,
                dispatcher=self.dispatcher,
                strict=self.strict,
                debug=cache.debug,
            )
            out: Tensor = self.out_proj(o.flatten(-2))
        return out

    def cache_sizes(self) -> dict[str, Any]:
        """What `KVCache.paged` and `contiguous` must know of the module; `dtype` may be replaced by float8_e4m3fn.

        Within torch.autocast the dtype is the one of its products, as the keys' will be.
        """
        weight = self.q_proj.weight
        kind, dtype = weight.device.type, weight.dtype
        if dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        sizes = {"num_kv_heads": self.num_kv_heads, "d_qk": self.d_qk, "d_v": self.d_v, "config": self.config}
        return {**sizes, "share_kv": self.share_kv, "dtype": dtype, "device": weight.device}

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Queries, gates (cmp, slc, win), and k, v, k_slc, v_slc, k_win, v_win as far as they are kept apart."""
        q = self.q_proj(x).unflatten(-1, (self.num_q_heads, self.d_qk))
        k = [proj(x).unflatten(-1, (self.num_kv_heads, self.d_qk)) for proj in self.k_proj.values()]
        v = [proj(x).unflatten(-1, (self.num_kv_heads, self.d_v)) for proj in self.v_proj.values()]
        if self.rope_theta is not None:
            cos, sin = rotary_angles(positions, self.d_qk, self.rope_theta, x.dtype)
            # one chain of small operators for all branches
            q, k = rotate(q, cos, sin), list(rotate(torch.stack(k), cos, sin).unbind())
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (self.num_q_heads, 3))
        names = ("", "_slc", "_win")[: len(k)]
        keys = {f"k{name}": part for name, part in zip(names, k, strict=True)}
        return q, gates, keys | {f"v{name}": part for name, part in zip(names, v, strict=True)}

    def _append(self, x: Tensor, cache: KVCache, rows: Rows, folded: bool) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of x to the cache, at the positions that its lengths tell; q and gates.

        `folded` weights of phi are ready for the kernels of a step; the others round as `forward` does.
        """
        q, gates, keys = self._project(x, positions_of(rows.lengths, x.shape[1]))
        phi_k, phi_v = (
            None if phi is None else phi.folded(q.dtype) if folded else phi.weights(q.dtype)
            for phi in (self.phi_k, self.phi_v)
        )
        cache.write(rows, keys, phi_k, phi_v, dispatcher=self.dispatcher, strict=self.strict)
        return q, gates

    def extra_repr(self) -> str:
        """What the projections do not show."""
        kv = "shared" if self.share_kv else "per branch"
        return f"d_qk={self.d_qk}, d_v={self.d_v}, kv {kv}, compression={self.compression}, {self.config}"

    def _check_sizes(self, phi_hidden: int) -> None:
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_q_heads", "num_kv_heads", "d_qk", "d_v")}
        for name, value in {**sizes, "phi_hidden": phi_hidden}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidConfig(f"{name} must be a positive int", {name: value})
        if self.num_q_heads % self.num_kv_heads:
            heads = {"num_q_heads": self.num_q_heads, "num_kv_heads": self.num_kv_heads}
            remedy = "Every kv head serves the same number of query heads."
            raise InvalidConfig("num_q_heads must be a multiple of num_kv_heads", heads, remedy)
        if not isinstance(self.config, NSAConfig):
            values = {"config": type(self.config).__name__}
            raise InvalidConfig("config must be an NSAConfig", values, "Use NSAConfig(window_size=...), say.")
        if self.compression not in COMPRESSIONS:
            known = f"Use {' or '.join(map(repr, COMPRESSIONS))}."
            raise InvalidConfig("compression must name a known phi", {"compression": self.compression}, known)
        theta: object = self.rope_theta
        number = isinstance(theta, int | float) and not isinstance(theta, bool) and 0 < theta < math.inf
        if theta is not None and (self.d_qk % 2 or not number):
            values = {"d_qk": self.d_qk, "rope_theta": theta}
            raise InvalidConfig("rotary needs an even d_qk and a positive theta", values, "Or pass rope_theta=None.")
        if self.dispatcher is not None and not isinstance(self.dispatcher, Dispatcher):
            values = {"dispatcher": type(self.dispatcher).__name__}
            raise InvalidConfig("dispatcher must be a Dispatcher", values, "Leave it out for the default database's.")

    def _check_step(self, x: Tensor, cache: KVCache) -> None:
        self._check_input(x, None)
        if not isinstance(cache, KVCache):
            values = {"cache": type(cache).__name__}
            raise InvalidInput("cache must be a KVCache", values, "Make it by KVCache.paged(.., **cache_sizes()).")
        if cache.config != self.config:
            values = {"module": str(self.config), "cache": str(cache.config)}
            raise InvalidInput("the cache must be made for the module's NSA constants", values, "Use cache_sizes().")

    def _check_input(self, x: Tensor, cu_seqlens: Tensor | None) -> None:
        if not isinstance(x, Tensor):
            raise InvalidInput("x must be a torch.Tensor", {"x": type(x).__name__}, "Use torch.as_tensor().")
        shape, weight = tuple(x.shape), self.q_proj.weight
        if cu_seqlens is None and x.ndim != 3:
            remedy = "Pass cu_seqlens with packed tokens [T, hidden]." if x.ndim == 2 else "Reshape x."
            raise InvalidInput("x must be [B, T, hidden]", {"shape": shape}, remedy)
        if cu_seqlens is not None and x.ndim != 2:
            raise InvalidInput(
                "with cu_seqlens, x must be packed: [T, hidden]",
                {"shape": shape},
                "Flatten x, or leave cu_seqlens out.",
            )
        if x.shape[-1] != self.hidden_size:
            values = {"shape": shape, "hidden_size": self.hidden_size}
            raise InvalidInput(
                "the last dimension of x must be hidden_size", values, "Build the module for this width."
            )
        if cu_seqlens is None and x.shape[1] < 1:
            raise InvalidInput("x must have at least one token", {"shape": shape}, "Skip empty batches.")
        if x.device != weight.device:
            devices = {"x": str(x.device), "module": str(weight.device)}
            raise InvalidInput("x must be on the device of the module", devices, "Move one of them with .to(device).")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            dtypes = {"x": str(x.dtype), "module": str(weight.dtype)}
            raise InvalidInput("x must have the dtype of the module", dtypes, "Use .to(dtype), or torch.autocast.")
        if cu_seqlens is not None:
            check_cu_seqlens("cu_seqlens", cu_seqlens, x)


def token_positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token in its sequence, int64 `[T]`."""
    tokens = torch.arange(x.shape[-2], device=x.device)
    if cu_seqlens is None:
        return tokens
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return tokens - cu_seqlens[sequence.clamp(max=cu_seqlens.numel() - 2)]


def rotary_angles(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/dim), `[.., T, 1, dim / 2]` in float32, or float64 for float64."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    rates = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=exact) / dim)
    angles = positions[..., None, None].to(exact) * rates
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (i, i + D/2) of x `[.., T, H, D]` in the dtype of the angles; keeps the dtype of x."""
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _check_rows(x: Tensor, sequences: int, remedy: str) -> None:
    if x.shape[0] != sequences:
        values = {"shape": tuple(x.shape), "sequences": sequences}
        raise InvalidInput("x must have a row for each sequence of the cache", values, remedy)


def _per_branch(branches: tuple[str, ...], hidden_size: int, width: int, bias: bool) -> nn.ModuleDict:
    return nn.ModuleDict({branch: nn.Linear(hidden_size, width, bias=bias) for branch in branches})
