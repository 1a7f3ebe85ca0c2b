"""The norms that DoRA divides by on one layer, and what is kept of them between forwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.ops.torch.dora import InRows, adapted_sums, square_norms
from fastlora.sharding import gathers_parameters, is_sharded, local
from fastlora.weight_marks import Kept, Stamp, marks, stamp_of

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer

# Tensors and their context: what a `Stamp` is made of.
_Watched = tuple[Sequence[torch.Tensor], tuple[Hashable, ...]]


class NormCache(Kept):
    """The norms that one layer keeps: ``||W||^2``, and without gradients each adapter's own.

    Each is kept with a `Stamp` of what it was made from. In-place writes through ``.data`` change
    no stamp: `LoraLayer.refresh` is for these. Nor do FSDP2's gatherings: in a process that uses it
    nothing is kept. A copied layer starts with an empty cache.

    Attributes:
        base: The stamp of the base weight.
        kept: By adapter, its stamp and sums; under None, those of the base weight's squares.
    """

    def __init__(self) -> None:
        self.base: Stamp | None = None
        self.kept: dict[str | None, tuple[Stamp, torch.Tensor]] = {}


def magnitude_of(layer: AdaptedLayer, name: str) -> torch.Tensor:
    """Returns an adapter's magnitude, ``[N]``."""
    magnitude: torch.Tensor = layer._modules["lora_magnitude_vector"]._modules[name].weight
    return magnitude


def may_keep(device: torch.device) -> bool:
    """Whether tensors made now may serve a later forward: not those of a graph being captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def base_stamp(layer: AdaptedLayer) -> Stamp | None:
    """Returns the stamp of a layer's base weight; None where a stamp cannot detect changes.

    The same object until the weight changes, or is said to (`forget_weights`).
    """
    watched = _watched_base(layer)
    if watched is None:
        return None
    cache = _cache(layer)
    known = cache.base
    if known is None or not known.holds(*watched):
        known = cache.base = stamp_of(*watched)
    return known


def rows_of(layer: AdaptedLayer) -> torch.Tensor | InRows:
    """Returns a layer's base weight ``[N, K]``: a matrix, or where it is quantised its rows."""
    found = layer._own_quantised()
    if found is None:
        return layer._own_weight()
    return InRows(found.rows, found.dtype, found.codes().device)


def base_squares(
    layer: AdaptedLayer, weight: torch.Tensor | InRows, compiling: bool = False
) -> torch.Tensor:
    """Returns ``||W||^2``, ``[N]``, of a layer's weight: kept while that stays what it is.

    ``compiling`` says that a graph is being compiled, which keeps nothing.
    """
    if compiling:
        return square_norms(weight, at_once=True)
    base = None
    if may_keep(weight.device):
        trains = not isinstance(weight, InRows) and weight.requires_grad
        if trains and torch.is_grad_enabled():
            # It trains: written to soon, and not every optimizer moves versions.
            _cache(layer).kept.pop(None, None)
        else:
            base = base_stamp(layer)
    watched = None if base is None else ((), (base,))
    return _kept(layer, None, watched, lambda: square_norms(weight))


def adapter_sums(
    layer: AdaptedLayer,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    compiling: bool = False,
) -> torch.Tensor:
    """Returns `adapted_sums` of ``lora_a [R, K]`` and ``lora_b [N, R]`` on a layer, ``[N]``.

    Over this process's part of the base weight ``[N, K]``. A tensor of a scaling has no dimensions.
    """
    weight = layer._own_weight() if compiling else rows_of(layer)
    squares = base_squares(layer, weight, compiling)
    return adapted_sums(weight, squares, lora_a, lora_b, scaling)


def adapter_squares(
    layer: AdaptedLayer,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    compiling: bool = False,
) -> torch.Tensor:
    """Returns an adapter's norms on a layer, squared, ``[N]``; infinity for 0. Computed now."""
    return layer._of_whole_rows([adapter_sums(layer, lora_a, lora_b, scaling, compiling)])[0]


def kept_sums(
    layer: AdaptedLayer, name: str, scaling: torch.Tensor | float, compiling: bool
) -> torch.Tensor:
    """Returns `adapter_sums` by name, ``[N]``; without gradients, kept until something changes.

    With gradients they are computed in every forward: an optimizer may be about to step, and not
    all of them move versions.
    """
    modules, watched = layer._modules, None
    lora_a = modules["lora_A"]._modules[name].weight
    lora_b = modules["lora_B"]._modules[name].weight
    keeps = not compiling and may_keep(lora_a.device) and not isinstance(scaling, torch.Tensor)
    if keeps and not torch.is_grad_enabled():
        base = base_stamp(layer)
        if base is not None:
            watched = _watched((lora_a, lora_b), marks.of_trained(), base, scaling)
    own = local(lora_a), local(lora_b)
    return _kept(layer, name, watched, lambda: adapter_sums(layer, *own, scaling, compiling))


def _watched_base(layer: AdaptedLayer) -> _Watched | None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    found = layer._own_quantised()
    if found is None:
        watched = _watched((weight,))
        return None if watched is None else (watched[0], (*watched[1], marks.of_base(weight)))
    return found.watched(), (found.settings(), marks.of_base(weight))


def _watched(tensors: Sequence[torch.Tensor], *context: Hashable) -> _Watched | None:
    """Returns what a stamp of tensors is made of; None where a stamp cannot detect changes."""
    if gathers_parameters():  # it may be one that was gathered anew, where the last one lay
        return None
    parts: list[torch.Tensor] = []
    # Another parameter over the same memory has a version of its own.
    context = (*context, *map(id, tensors))
    for tensor in tensors:
        part = tensor
        if is_sharded(tensor) and not tensor.is_inference():
            part = local(tensor)
            # What writes into a DTensor moves its version, or that of the part.
            context = (*context, tensor._version)
        if type(part) not in (nn.Parameter, torch.Tensor):
            return None
        parts.append(part)
    return parts, context


def _kept(
    layer: AdaptedLayer,
    name: str | None,
    watched: _Watched | None,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Returns what a layer keeps under a name while its stamp holds, or makes it.

    None for ``watched`` keeps nothing.
    """
    if watched is None:
        return make()
    kept = _cache(layer).kept
    known = kept.get(name)
    if known is None or not known[0].holds(*watched):
        stamp = stamp_of(*watched)
        if stamp is None:
            return make()
        with torch.inference_mode(False), torch.no_grad():  # for a backward one day
            known = kept[name] = stamp, make()
    return known[1]


def _cache(layer: AdaptedLayer) -> NormCache:
    cache: NormCache | None = layer.__dict__.get("_dora_norms")
    if cache is None:
        cache = layer.__dict__["_dora_norms"] = NormCache()
    return cache
