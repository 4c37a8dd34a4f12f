"""The tensors that a launch takes, in numbers: symbols of `Argument.shape` and dtypes resolved for one problem."""

from __future__ import annotations

import torch

from ..errors import InvalidInput
from ..layout import packed_cmp_rows
from ..spec import Argument, Problem

INDEX_FILLS = {  # tensors of the packed layout and the symbol that counts their rows; None when batched
    "q_pos": "Q",
    "k_start": "Q",
    "cmp_start": "Q",
    "cmp_source": "C",
    "win_begin": "K",
    "win_end": "K",
    "cmp_begin": "C",
    "cmp_end": "C",
    "slc_first": "NB",
    "slc_end": "NB",
    "k_pos": "K",
    "k_cmp": "K",
}


SPARE_PAGES = 3  # of a trial's cache: no sequence owns them


def is_left_out(argument: Argument, problem: Problem) -> bool:
    """True for a tensor that the problem's launch does without: index tensors if batched, scales if not fp8."""
    if argument.fill in INDEX_FILLS:
        return problem.layout != "packed"
    return argument.fill in ("page_scale", "state_scale") and not problem.has_fp8_cache


def symbol_sizes(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Dimensions behind each symbol of `Argument.shape`."""
    nsa, packed = problem.nsa, problem.layout == "packed"
    batch = () if packed else (problem.batch,)
    num_cmp = packed_cmp_rows(problem.seq_k, problem.batch, nsa) if packed else nsa.num_compressed(problem.seq_k)
    ratio = nsa.select_block_size // nsa.compress_stride
    single = {
        "NB": num_cmp // ratio if packed else nsa.num_select_blocks(problem.seq_k),
        "HQ": problem.num_q_heads,
        "H": problem.num_kv_heads,
        "G": problem.group_size,
        "D_QK": problem.d_qk,
        "D_V": problem.d_v,
        "N": nsa.num_selected,
        "L": nsa.compress_block_size,
        "L_DQK": nsa.compress_block_size * problem.d_qk,
        "L_DV": nsa.compress_block_size * problem.d_v,
        "HIDDEN": problem.phi_hidden,
    }
    if problem.layout == "paged":
        pages = -(-problem.seq_k // problem.page_size)  # of the longest sequence
        single |= {
            "B": problem.batch,
            "TABLE": pages,
            "PAGES": problem.batch * pages + SPARE_PAGES,
            "PAGE": problem.page_size,
            "CELLS": problem.page_size // nsa.compress_stride,
        }
    rows = {"Q": (*batch, problem.seq_q), "K": (*batch, problem.seq_k), "C": (*batch, num_cmp)}
    return {**rows, **{name: (size,) for name, size in single.items()}}


def resolve_shape(argument: Argument, sizes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of an argument in numbers."""
    shape: list[int] = []
    for symbol in argument.shape:
        if isinstance(symbol, int):
            shape.append(symbol)
        elif symbol in sizes:
            shape.extend(sizes[symbol])
        else:
            raise InvalidInput(f"a shape's symbol must be one of {', '.join(sizes)}", {argument.name: argument.shape})
    return tuple(shape)


def resolve_dtype(argument: Argument, problem: Problem) -> torch.dtype:
    """The torch dtype of an argument; 'problem' stands for the problem's, 'cache' for that of its pages."""
    name = problem.cache_dtype if argument.dtype == "cache" else argument.dtype
    dtype = getattr(torch, problem.dtype if name == "problem" else name, None)
    if not isinstance(dtype, torch.dtype):
        rule = "an argument's dtype must be 'problem', 'cache' or a torch dtype"
        raise InvalidInput(rule, {argument.name: argument.dtype})
    return dtype
