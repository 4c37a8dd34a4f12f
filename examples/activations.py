"""Queries, keys and values of a decoder's layer as a file, for `nsa-autotune codesign --activations`."""

from __future__ import annotations

from pathlib import Path

import torch
from decoder import Decoder
from torch import Tensor, nn

from nsa_autotune.nn.attention import rotary_angles, rotate


def layer_activations(model: Decoder, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """q `[B, T, HQ, D]`, k and v `[B, T, H, D]` of a layer's attention, after rotary; with NSA those of selection."""
    attention, seen = model.layers[layer].attention, list[Tensor]()
    hook = attention.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(tokens)
        hook.remove()
        projections = {"q": attention.q_proj, "k": _keys(attention.k_proj), "v": _keys(attention.v_proj)}
        head_dim = getattr(attention, "head_dim", None) or attention.d_qk
        found = {name: proj(seen[0]).unflatten(-1, (-1, head_dim)) for name, proj in projections.items()}
        if attention.rope_theta is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device)
            angles = rotary_angles(places, head_dim, attention.rope_theta, found["q"].dtype)
            found |= {name: rotate(found[name], *angles) for name in ("q", "k")}
    return found


def save_activations(model: Decoder, tokens: Tensor, layer: int, path: Path) -> None:
    """Write a layer's activations on `tokens` `[B, T]`; the layer may count from the end."""
    found = layer_activations(model, tokens, layer)
    torch.save({name: tensor.cpu().contiguous() for name, tensor in found.items()}, path)


def _keys(projection: nn.Module) -> nn.Module:
    """Of keys or values: the only one, or that of selected attention."""
    if not isinstance(projection, nn.ModuleDict):
        return projection
    return projection["slc" if "slc" in projection else "cmp"]
