"""Realistic, reproducible tensors for one trial, every one between guard bytes that show stray accesses."""

from __future__ import annotations

import itertools
import math
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..codegen.shapes import INDEX_FILLS, is_left_out, resolve_dtype, resolve_shape, symbol_sizes
from ..errors import InvalidInput
from ..layout import PackedLayout, packed_layout
from ..paged import positions_of
from ..spec import Argument, KernelSpec, Problem
from .fills import causal_lse, likely_lse, select_at_random
from .paged import PAGED_FILLS, fill_paged, fill_paged_blocks, trial_lengths
from .state import fill_state

GUARD_BYTES = 1 << 16  # on both sides of every tensor
POISONS = ((math.nan, -7777), (3e4, 1 << 20))  # (float, int): what no kernel writes
UNREAD_IF_UNUSED = ("dout",)
RANDOM_FILLS = ("normal", "weight", "gates", "bias", "delta")
LSE_FILLS = ("lse_cmp", "lse_slc", "lse_win")  # about what the branch's forward returns, for a backward
LSE_SPREAD = 0.1  # between the heads of a token


@dataclass(frozen=True)
class TrialInputs:
    """Launch arguments by name, outputs included; index tensors are None in a batched problem."""

    tensors: dict[str, Tensor | None]
    layout: PackedLayout | None
    scale: float
    scalars: dict[str, float | int]  # the numbers that the family's launch takes
    before: dict[str, Tensor] = field(default_factory=dict)  # copies of the tensors that a launch writes in parts

    def call(self, launch: Callable[..., Any]) -> Any:
        """One launch; index tensors of a batched problem are left to their default."""
        tensors = {name: tensor for name, tensor in self.tensors.items() if tensor is not None}
        return launch(**tensors, **self.scalars)


def make_inputs(spec: KernelSpec, problem: Problem, device: torch.device | str, seed: int = 0) -> TrialInputs:
    """Tensors for every argument of the family, drawn on the device and equal for equal seeds; outputs are poisoned."""
    device = torch.device(device)
    layout = make_layout(problem, device, seed) if problem.layout == "packed" else None
    sizes = symbol_sizes(problem)
    tensors: dict[str, Tensor | None] = {}
    scale = problem.d_qk**-0.5
    for argument in sorted(spec.arguments, key=lambda a: a.fill == "lse"):  # lse is computed from the others
        if is_left_out(argument, problem):
            tensors[argument.name] = None
            continue
        if argument.fill in INDEX_FILLS:
            tensors[argument.name] = guarded_copy(getattr(layout, argument.fill))
            continue
        tensor = empty_guarded(resolve_shape(argument, sizes), resolve_dtype(argument, problem), device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {argument.name}".encode()))
        if argument.fill == "blocks":
            _fill_blocks(tensor, problem, layout, generator)
        elif argument.fill == "lse":
            _fill_lse(tensor, spec, tensors, problem, layout, scale)
        elif argument.fill in LSE_FILLS:
            rows = likely_lse(argument.fill, query_positions(problem, layout, device), problem.nsa)
            tensor.normal_(0.0, LSE_SPREAD, generator=generator).add_(rows[:, None])
        elif argument.fill in RANDOM_FILLS:
            _fill_random(tensor, argument, generator)
        elif argument.fill in PAGED_FILLS:
            fill_paged(tensor, argument, problem, generator, seed)
        elif argument.is_state:
            fill_state(tensor, argument, problem, generator, seed)
        elif not argument.is_output:
            known = (*RANDOM_FILLS, *INDEX_FILLS, *LSE_FILLS, *PAGED_FILLS, "lse", "blocks", "out")
            raise InvalidInput(f"fill must be one of {', '.join(known)}", {argument.name: argument.fill})
        if layout is not None and argument.shape[:1] == ("C",) and not argument.is_output:
            fill_unused(tensor, argument.name, layout)
        tensors[argument.name] = tensor
    scalars = dict(spec.scalar_values(problem, scale))
    before = {a.name: t.clone() for a in spec.arguments if a.is_state and (t := tensors[a.name]) is not None}
    return TrialInputs({a.name: tensors[a.name] for a in spec.arguments}, layout, scale, scalars, before)


def fill_unused(tensor: Tensor, name: str, layout: PackedLayout) -> None:
    """Compressed rows that no window fills: zero, as the forward leaves them; a gradient of them may not be read."""
    tensor[layout.cmp_source < 0] = math.nan if name in UNREAD_IF_UNUSED else 0.0


def query_positions(problem: Problem, layout: PackedLayout | None, device: torch.device | str) -> Tensor:
    """Position of each query among the keys of its sequence: `[TQ]`, bottom-right aligned; `[B * Q]` if paged."""
    if layout is not None:
        return layout.q_pos
    if problem.layout == "paged":
        return positions_of(trial_lengths(problem, device), problem.seq_q).flatten()
    return torch.arange(problem.seq_k - problem.seq_q, problem.seq_k, device=device, dtype=torch.int32)


def packed_offsets(problem: Problem, seed: int) -> tuple[list[int], list[int]]:
    """Uneven `cu_seqlens_q` and `cu_seqlens_k`; three or more sequences include one of length 0 and one of length 1."""
    generator = random.Random(f"lengths {seed} {problem.batch}")
    special = [0, 1] if problem.batch >= 3 and problem.seq_k > 1 else []
    weights = [generator.uniform(0.4, 1.6) for _ in range(problem.batch - len(special))]
    total = problem.seq_k - sum(special)
    marks = [round(total * part / sum(weights)) for part in itertools.accumulate(weights, initial=0.0)]
    lengths = [stop - start for start, stop in itertools.pairwise(marks)] + special
    generator.shuffle(lengths)
    offsets_k = list(itertools.accumulate(lengths, initial=0))
    return [offset * problem.seq_q // problem.seq_k for offset in offsets_k], offsets_k  # never more queries than keys


def make_layout(problem: Problem, device: torch.device, seed: int) -> PackedLayout:
    """The layout of a packed problem with the lengths of `packed_offsets`."""
    if problem.seq_q > problem.seq_k:
        raise InvalidInput(
            "a trial's queries are aligned with the last keys, so seq_q <= seq_k must hold",
            {"seq_q": problem.seq_q, "seq_k": problem.seq_k},
        )
    offsets_q, offsets_k = (torch.tensor(o, device=device) for o in packed_offsets(problem, seed))
    return packed_layout(offsets_q, offsets_k, problem.seq_q, problem.seq_k, problem.nsa)


def empty_guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, which: int = 0) -> Tensor:
    """A contiguous tensor of poison (NaN, or a number no kernel writes) with GUARD_BYTES of the same around it."""
    numel, guard = torch.Size(shape).numel(), GUARD_BYTES // dtype.itemsize
    whole = torch.empty(numel + 2 * guard, dtype=dtype, device=device)
    poison(whole, which)
    return whole[guard : guard + numel].view(shape)


def guarded_copy(tensor: Tensor) -> Tensor:
    """A copy between guard bytes."""
    return empty_guarded(tuple(tensor.shape), tensor.dtype, tensor.device).copy_(tensor)


def storage_bytes(tensor: Tensor) -> Tensor:
    """All bytes behind a tensor, guards included, as a flat uint8 view."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def poison(tensor: Tensor, which: int = 0) -> None:
    """Overwrite with what no kernel writes."""
    float_value, int_value = POISONS[which]
    if tensor.is_floating_point():
        tensor.fill_(min(float_value, torch.finfo(tensor.dtype).max))  # of fp8, 448
    else:
        tensor.fill_(int_value)


def _fill_random(tensor: Tensor, argument: Argument, generator: torch.Generator) -> None:
    spread = {"weight": max(tensor.shape[0], 1) ** -0.5 if tensor.dim() else 1.0, "bias": 0.1, "delta": 0.1}
    tensor.normal_(0.0, spread.get(argument.fill, 1.0), generator=generator)
    if argument.fill == "gates":
        tensor.sigmoid_()


def _fill_blocks(tensor: Tensor, problem: Problem, layout: PackedLayout | None, generator: torch.Generator) -> None:
    if problem.layout == "paged":
        fill_paged_blocks(tensor, problem, generator)
        return
    positions = query_positions(problem, layout, tensor.device)
    batch = problem.batch if layout is None else 1
    blocks = select_at_random(positions, batch, problem.num_kv_heads, problem.nsa, problem.locality, generator)
    tensor.copy_(blocks.view(tensor.shape))


def _fill_lse(
    tensor: Tensor,
    spec: KernelSpec,
    tensors: dict[str, Tensor | None],
    problem: Problem,
    layout: PackedLayout | None,
    scale: float,
) -> None:
    q, k_cmp = find_vectors(spec, tensors, "Q"), find_vectors(spec, tensors, "C")
    if layout is None:
        tensor.copy_(causal_lse(q, k_cmp, query_positions(problem, None, q.device), problem.nsa, scale))
        return
    offsets = torch.stack([layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cmp_offsets]).T.tolist()
    for (q0, k0, c0), (q1, k1, _) in itertools.pairwise(offsets):
        keys = k_cmp[None, c0 : c0 + problem.nsa.num_compressed(k1 - k0)]
        if q1 > q0:
            tensor[q0:q1] = causal_lse(q[None, q0:q1], keys, layout.q_pos[q0:q1], problem.nsa, scale)[0]


def find_vectors(spec: KernelSpec, tensors: Mapping[str, Tensor | None], side: str) -> Tensor:
    """The input `[side, .., D_QK]`: queries for "Q", compressed keys for "C"; raises InvalidInput if there is none."""
    return _find(spec, tensors, side, lambda a: a.shape[:1] == (side,) and a.shape[-1] == "D_QK")


def find_filled(spec: KernelSpec, tensors: Mapping[str, Tensor | None], fill: str) -> Tensor:
    """The input with this fill; raises InvalidInput if there is none."""
    return _find(spec, tensors, fill, lambda a: a.fill == fill)


def _find(
    spec: KernelSpec, tensors: Mapping[str, Tensor | None], what: str, matches: Callable[[Argument], bool]
) -> Tensor:
    for argument in spec.arguments:
        tensor = tensors.get(argument.name)
        if not argument.is_output and tensor is not None and matches(argument):
            return tensor
    raise InvalidInput(
        "lse and importance need inputs [Q, .., D_QK], [C, .., D_QK] and lse", {"family": spec.family, "missing": what}
    )
