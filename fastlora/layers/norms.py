"""The row norms of the adapted weight, by which DoRA divides, and their cache."""

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

# Tensors and a context, from which a `Stamp` is made.
_Watched = tuple[Sequence[torch.Tensor], tuple[Hashable, ...]]


class NormCache(Kept):
    """One layer's cache of squared row norms: of the base weight W, and of each adapted weight.

    Norms of adapted weights are cached only while gradients are disabled. Each entry is stored with
    a `Stamp` of the tensors that it was computed from. A stamp does not detect in-place writes
    through ``.data``; call `LoraLayer.refresh` after them. Nor does it detect that FSDP2 has
    gathered parameters, so nothing is cached in a process that uses FSDP2. A copied layer starts
    with an empty cache.

    Attributes:
        base: The stamp of the base weight.
        kept: Maps an adapter name to a stamp and the sums, and None to those of the base weight.
    """

    def __init__(self) -> None:
        self.base: Stamp | None = None
        self.kept: dict[str | None, tuple[Stamp, torch.Tensor]] = {}


def magnitude_of(layer: AdaptedLayer, name: str) -> torch.Tensor:
    """Return an adapter's DoRA magnitude, ``[N]``."""
    magnitude: torch.Tensor = layer._modules["lora_magnitude_vector"]._modules[name].weight
    return magnitude


def may_keep(device: torch.device) -> bool:
    """Return whether new tensors on a device may be cached: not while a CUDA graph is captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def base_stamp(layer: AdaptedLayer) -> Stamp | None:
    """Return the stamp of a layer's base weight, or None if a stamp cannot detect changes.

    The same object is returned until the weight changes or `forget_weights` clears it.
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
    """Return the base weight ``[N, K]`` as a matrix, or as `InRows` if it is quantized."""
    found = layer._own_quantised()
    if found is None:
        return layer._own_weight()
    return InRows(found.rows, found.dtype, found.codes().device)


def base_squares(
    layer: AdaptedLayer, weight: torch.Tensor | InRows, compiling: bool = False
) -> torch.Tensor:
    """Return the squared row norms of the base weight, ``[N]``, cached until it changes.

    If ``compiling`` is set, because a graph is being compiled, nothing is cached.
    """
    if compiling:
        return square_norms(weight, at_once=True)
    base = None
    if may_keep(weight.device):
        trains = not isinstance(weight, InRows) and weight.requires_grad
        if trains and torch.is_grad_enabled():
            # The weight trains: it will be written to soon, and not every optimizer changes its
            # version.
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
    """Return the squared row norms of a layer's adapted weight, ``[N]``; see `adapted_sums`.

    The update is the product of ``lora_b [N, R]`` and ``lora_a [R, K]``. The sums are over this
    process's part of the base weight ``[N, K]``. If the scaling is a tensor, it has no dimensions.
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
    """Return the squared row norms of a layer's adapted weight, ``[N]``; 0 becomes infinity.

    With tensor parallelism, they are summed over the processes.
    """
    return layer._of_whole_rows([adapter_sums(layer, lora_a, lora_b, scaling, compiling)])[0]


def kept_sums(
    layer: AdaptedLayer, name: str, scaling: torch.Tensor | float, compiling: bool
) -> torch.Tensor:
    """Return `adapter_sums` for a named adapter, ``[N]``, cached if gradients are disabled.

    If gradients are enabled, the sums are computed in every forward pass, because an optimizer may
    be about to step, and not all optimizers change the versions of tensors.
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
    """Return arguments for `stamp_of` these tensors, or None if a stamp cannot detect changes."""
    if gathers_parameters():  # A newly gathered tensor may reuse the last one's memory.
        return None
    parts: list[torch.Tensor] = []
    # Another parameter over the same memory has its own version.
    context = (*context, *map(id, tensors))
    for tensor in tensors:
        part = tensor
        if is_sharded(tensor) and not tensor.is_inference():
            part = local(tensor)
            # A write to a DTensor changes its version or that of its local part.
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
    """Return a layer's cached value for ``name`` if its stamp is valid; otherwise compute it.

    If ``watched`` is None, nothing is cached.
    """
    if watched is None:
        return make()
    kept = _cache(layer).kept
    known = kept.get(name)
    if known is None or not known[0].holds(*watched):
        stamp = stamp_of(*watched)
        if stamp is None:
            return make()
        # A later backward pass may need the result.
        with torch.inference_mode(False), torch.no_grad():
            known = kept[name] = stamp, make()
    return known[1]


def _cache(layer: AdaptedLayer) -> NormCache:
    cache: NormCache | None = layer.__dict__.get("_dora_norms")
    if cache is None:
        cache = layer.__dict__["_dora_norms"] = NormCache()
    return cache
