"""DoRA's rows of a mixed batch in a compiled graph: found by their ids while it runs.

Where no dropout acts, a row finds its adapter's scale in a table. Under active dropout there is no
such scale, and rows have a second base product (`fastlora.autograd.mixed_dora_ops`). The norms of
all the model's DoRA adapters are made in every forward, of those without rows too, for which ones
have rows is the mix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlora.autograd import mixed_dora_ops  # noqa: F401 - registers operators
from fastlora.layers.dense import dense_weight
from fastlora.layers.dora_mixed import acts
from fastlora.layers.dora_norms import adapter_squares, magnitude_of
from fastlora.layers.factors import scaling_of, scaling_tensor
from fastlora.ops import schema as ops  # noqa: F401 - registers operators
from fastlora.ops.seeds import seeds_of_layer
from fastlora.routing.routing import Routing


class DoraSlots(NamedTuple):
    """Which of a model's adapters use DoRA on one layer, by their places in `Routing.names`.

    Attributes:
        scaled: Those whose rows are scaled after their LoRA term.
        dropped: Those whose dropout acts: they have no LoRA term before `add_dropped`.
    """

    scaled: tuple[int, ...]
    dropped: tuple[int, ...]


def dora_slots(layer: Any, batch: Routing) -> DoraSlots:
    """Returns which slots use DoRA on a layer."""
    magnitudes = layer._modules.get("lora_magnitude_vector")
    names = () if magnitudes is None else magnitudes._modules
    slots = [slot for slot, name in enumerate(batch.names) if name in names]
    dropouts = layer._modules["lora_dropout"]._modules
    dropped = tuple(slot for slot in slots if acts(dropouts[batch.names[slot]]))
    return DoraSlots(tuple(slot for slot in slots if slot not in dropped), dropped)


def _squares(layer: Any, name: str) -> torch.Tensor:
    factors = layer.lora_A[name].weight, layer.lora_B[name].weight
    return adapter_squares(layer, *factors, scaling_of(layer, name))


def add_dropped(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    batch: Routing,
    projection: int,
    slots: tuple[int, ...],
) -> torch.Tensor:
    """Returns ``y [..., N]`` with the rows of adapters whose dropout acts, as autograd traces it.

    Args:
        layer: Holds the adapters.
        y: The base layer's output in these rows.
        x: ``[..., K]``, in the dtype that the layer computes in.
        batch: Its ids are per sample or per token.
        projection: The layer's number in its model.
        slots: `DoraSlots.dropped`.
    """
    if not slots:
        return y
    names = [batch.names[slot] for slot in slots]
    scalings = [scaling_tensor(layer, name, scaling_of(layer, name), x) for name in names]
    return torch.ops.fastlora.mixed_dora_graph_dropped(
        y,
        x,
        dense_weight(layer.get_base_layer()),
        [layer.lora_A[name].weight for name in names],
        [layer.lora_B[name].weight for name in names],
        [magnitude_of(layer, name) for name in names],
        [_squares(layer, name) for name in names],
        torch.stack(scalings),
        batch.ids,
        seeds_of_layer(batch.seeds, projection),
        list(slots),
        [layer.lora_dropout[name].p for name in names],
        ops.resolve_impl(getattr(layer, "impl", "auto"), x),
    )


def scale_rows(layer: Any, y: torch.Tensor, batch: Routing, slots: tuple[int, ...]) -> torch.Tensor:
    """Returns ``y [..., N]`` with the rows of DoRA adapters scaled, as autograd traces it.

    Args:
        layer: Holds the adapters.
        y: Base layer's output, bias included, and every row's LoRA term.
        batch: Its ids are per sample or per token.
        slots: `DoraSlots.scaled`.
    """
    if not slots:
        return y
    scales = []
    for slot in slots:
        name = batch.names[slot]
        squares = _squares(layer, name)
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
