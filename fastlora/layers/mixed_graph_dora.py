"""DoRA's rows of a mixed batch in a compiled graph: one scale for each adapter, found by row.

The scales of all the model's DoRA adapters are made in every forward, those without rows too, for
which ones have rows is the mix. Under active dropout there is no such scale: the base product of
these rows is one of their own (`fastlora.dora`), and the layer breaks the graph.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.graph_routing import GraphRouting
from fastlora.layers.branch import scaling_of
from fastlora.layers.dora import adapter_squares, magnitude_of
from fastlora.layers.dora_mixed import acts


def drops(layer: Any, batch: GraphRouting) -> bool:
    """Whether the dropout of a DoRA adapter of the layer acts."""
    dropouts = layer._modules["lora_dropout"]._modules
    return any(acts(dropouts[batch.names[slot]]) for slot in _slots(layer, batch))


def _slots(layer: Any, batch: GraphRouting) -> list[int]:
    magnitudes = layer._modules.get("lora_magnitude_vector")
    names = () if magnitudes is None else magnitudes._modules
    return [slot for slot, name in enumerate(batch.names) if name in names]


def scale_rows(layer: Any, y: torch.Tensor, batch: GraphRouting) -> torch.Tensor:
    """Returns ``y [..., N]`` with the rows of DoRA adapters scaled, as autograd traces it.

    Args:
        layer: Holds the adapters.
        y: Base layer's output, bias included, and every row's LoRA term.
        batch: Its ids are per sample or per token.
    """
    slots = _slots(layer, batch)
    if not slots:
        return y
    scales = []
    for slot in slots:
        name = batch.names[slot]
        factors = layer.lora_A[name].weight, layer.lora_B[name].weight
        squares = adapter_squares(layer, *factors, scaling_of(layer, name))
        scales.append(magnitude_of(layer, name).to(squares.dtype) * squares.rsqrt())
    table = torch.stack([*scales, torch.ones_like(scales[0])])
    known = [slots.index(slot) if slot in slots else len(slots) for slot in range(len(batch.names))]
    # The last is that of rows without an adapter, -1; -2 is an id that was out of range.
    places = torch.tensor([*known, len(slots)], device=batch.ids.device)[batch.ids.clamp(min=-1)]
    flat = y.reshape(-1, y.shape[-1])
    each = flat.shape[0] // batch.ids.shape[0]
    places = places.to(y.device).unsqueeze(1).expand(-1, each).reshape(-1)
    bias = getattr(layer.get_base_layer(), "bias", None)
    u = flat if bias is None else flat - bias.to(flat.dtype)
    scaled = (u * table.index_select(0, places)).to(flat.dtype)
    if bias is not None:
        scaled = scaled + bias.to(flat.dtype)
    return torch.where((places == len(slots)).unsqueeze(1), flat, scaled).view(y.shape)
