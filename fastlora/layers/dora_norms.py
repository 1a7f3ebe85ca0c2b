"""The row norms of the adapted weight, by which DoRA divides, and their cache."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.ops.torch.dora import (
    RowChunkedWeight,
    squared_row_norms,
    squared_row_norms_with_update,
)
from fastlora.sharding import fully_shard_was_called, is_dtensor, local_shard
from fastlora.weights_version import TensorStamp, UncopiedCache, stamp_tensors, weights_versions

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters

# Tensors and a context, from which a `TensorStamp` is made.
_StampArguments = tuple[Sequence[torch.Tensor], tuple[Hashable, ...]]


class DoraNormCache(UncopiedCache):
    """Cache of a layer's DoRA norms.

    These are the squared row norms of the base weight and of the adapted weights. Norms of adapted
    weights are cached only while gradients are disabled. Each entry is stored with a `TensorStamp`
    of the tensors that it was computed from. A stamp does not detect in-place writes through
    ``.data``; call `LoraLayer.clear_caches` after them. Nor does it detect that FSDP2 has gathered
    parameters, so nothing is cached in a process that uses FSDP2. A copied layer starts with an
    empty cache.

    Attributes:
        base: The stamp of the base weight.
        entries: Maps an adapter name to a stamp and the sums, and None to those of the base weight.
    """

    def __init__(self) -> None:
        self.base: TensorStamp | None = None
        self.entries: dict[str | None, tuple[TensorStamp, torch.Tensor]] = {}


def dora_magnitude_of(layer: BaseLinearWithAdapters, name: str) -> torch.Tensor:
    """Return an adapter's DoRA magnitude for a layer.

    The magnitude is ``[N]``, or ``[1, N, 1, ...]`` if the layer is a convolution.
    """
    magnitude: torch.Tensor = layer._modules["lora_magnitude_vector"]._modules[name].weight
    return magnitude


def is_device_capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is currently being captured on a device.

    New tensors, such as DoRA norms, must not be cached during the capture. The result is always
    False for a device that is not a CUDA device.
    """
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def base_weight_stamp(layer: BaseLinearWithAdapters) -> TensorStamp | None:
    """Return a stamp for detecting changes to a layer's base weight.

    The stamp is a `TensorStamp` that identifies the current state of the weight. Returns None if
    changes to the weight cannot be detected. The same stamp is returned until the weight changes or
    `clear_base_and_adapter_caches` clears the stamp.
    """
    watched = _base_stamp_arguments(layer)
    if watched is None:
        return None
    cache = _cache(layer)
    known = cache.base
    if known is None or not known.matches(*watched):
        known = cache.base = stamp_tensors(*watched)
    return known


def base_weight_rows(layer: BaseLinearWithAdapters) -> torch.Tensor | RowChunkedWeight:
    """Return the rows of a layer's base weight.

    The base weight ``[N, K]`` is returned as a matrix or, if quantized, as a `RowChunkedWeight`.
    """
    found = layer._local_weight_if_quantized()
    if found is None:
        return layer._local_weight()
    return RowChunkedWeight(found.dequantized_rows, found.dtype, found.codes().device)


def base_squared_norms(
    layer: BaseLinearWithAdapters, weight: torch.Tensor | RowChunkedWeight, compiling: bool = False
) -> torch.Tensor:
    """Return the squared row norms of a layer's base weight.

    The result has the shape ``[N]`` and is cached until the weight changes. If ``compiling`` is
    set, because a graph is being compiled, nothing is cached.
    """
    if compiling:
        return squared_row_norms(weight, in_one_pass=True)
    base = None
    if not is_device_capturing(weight.device):
        trains = not isinstance(weight, RowChunkedWeight) and weight.requires_grad
        if trains and torch.is_grad_enabled():
            # The weight trains: it will be written to soon, and not every optimizer changes its
            # version.
            _cache(layer).entries.pop(None, None)
        else:
            base = base_weight_stamp(layer)
    watched = None if base is None else ((), (base,))
    return _get_or_compute_squared_norms(layer, None, watched, lambda: squared_row_norms(weight))


def local_adapted_squared_norms(
    layer: BaseLinearWithAdapters,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    compiling: bool = False,
) -> torch.Tensor:
    """Return the squared row norms of this process's shard of the adapted weight.

    The norms are ``[N]``. The weight update is the product of ``lora_b [N, R]`` and
    ``lora_a [R, K]``. The sums are over this process's shard of the base weight, ``[N, K]``. If the
    scaling is a tensor, it is zero-dimensional.
    """
    weight = layer._local_weight() if compiling else base_weight_rows(layer)
    squares = base_squared_norms(layer, weight, compiling)
    return squared_row_norms_with_update(weight, squares, lora_a, lora_b, scaling)


def adapted_squared_norms(
    layer: BaseLinearWithAdapters,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    compiling: bool = False,
) -> torch.Tensor:
    """Return the squared row norms of a layer's adapted weight.

    The adapted weight is ``weight + scaling * lora_b @ lora_a``. The norms are ``[N]`` and are
    computed without storing the adapted weight. A norm of 0 is replaced by infinity. With tensor
    parallelism, the norms are summed over the processes.
    """
    return layer._reduce_squares_and_replace_zeros(
        [local_adapted_squared_norms(layer, lora_a, lora_b, scaling, compiling)]
    )[0]


def cached_adapted_squared_norms(
    layer: BaseLinearWithAdapters, name: str, scaling: torch.Tensor | float, compiling: bool
) -> torch.Tensor:
    """Return the squared row norms of a layer's adapted weight, from the cache if possible.

    The norms are those that `local_adapted_squared_norms` computes for the adapter ``name``. If
    gradients are disabled, and changes to the weights can be detected, cached norms are used until
    a weight or the scaling changes. If gradients are enabled, the norms are computed in every
    forward pass, because an optimizer may be about to step, and not all optimizers change the
    versions of tensors. The norms are not cached in a compiled or captured graph.
    """
    modules, watched = layer._modules, None
    lora_a = modules["lora_A"]._modules[name].weight
    lora_b = modules["lora_B"]._modules[name].weight
    may_cache = (
        not compiling
        and not is_device_capturing(lora_a.device)
        and not isinstance(scaling, torch.Tensor)
    )
    if may_cache and not torch.is_grad_enabled():
        base = base_weight_stamp(layer)
        if base is not None:
            version = weights_versions.version_of_trainable_weights()
            watched = _arguments_for_stamp_tensors((lora_a, lora_b), version, base, scaling)
    own = local_shard(lora_a), local_shard(lora_b)
    return _get_or_compute_squared_norms(
        layer, name, watched, lambda: local_adapted_squared_norms(layer, *own, scaling, compiling)
    )


def _base_stamp_arguments(layer: BaseLinearWithAdapters) -> _StampArguments | None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    found = layer._local_weight_if_quantized()
    if found is None:
        watched = _arguments_for_stamp_tensors((weight,))
        if watched is None:
            return None
        return watched[0], (*watched[1], weights_versions.version_of_base_weight(weight))
    return found.tensor_dependencies(), (
        found.non_tensor_dependencies(),
        weights_versions.version_of_base_weight(weight),
    )


def _arguments_for_stamp_tensors(
    tensors: Sequence[torch.Tensor], *context: Hashable
) -> _StampArguments | None:
    """Return the arguments for a call to `stamp_tensors`.

    The call creates a stamp of the given tensors and context. Returns None if a stamp cannot detect
    changes to the tensors.
    """
    if fully_shard_was_called():  # A newly gathered tensor may reuse the last one's memory.
        return None
    parts: list[torch.Tensor] = []
    # Another parameter over the same memory has its own version.
    context = (*context, *map(id, tensors))
    for tensor in tensors:
        part = tensor
        if is_dtensor(tensor) and not tensor.is_inference():
            part = local_shard(tensor)
            # A write to a DTensor changes its version or that of its local part.
            context = (*context, tensor._version)
        if type(part) not in (nn.Parameter, torch.Tensor):
            return None
        parts.append(part)
    return parts, context


def _get_or_compute_squared_norms(
    layer: BaseLinearWithAdapters,
    adapter_name: str | None,
    watched: _StampArguments | None,
    make: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Return the squared norms that DoRA needs for a layer, computing them if they are not cached.

    The norms are the squared row norms of the adapted weight of the adapter ``adapter_name``. If
    ``adapter_name`` is None, the norms are those of the base weight. The norms are computed and
    cached if the cache has no such norms with a valid stamp. If ``watched`` is None, or if no stamp
    can be created, the norms are always computed, and they are not cached.
    """
    if watched is None:
        return make()
    entries = _cache(layer).entries
    known = entries.get(adapter_name)
    if known is None or not known[0].matches(*watched):
        stamp = stamp_tensors(*watched)
        if stamp is None:
            return make()
        # A later backward pass may need the result.
        with torch.inference_mode(False), torch.no_grad():
            known = entries[adapter_name] = stamp, make()
    return known[1]


def _cache(layer: BaseLinearWithAdapters) -> DoraNormCache:
    cache: DoraNormCache | None = layer.__dict__.get("_dora_norms")
    if cache is None:
        cache = layer.__dict__["_dora_norms"] = DoraNormCache()
    return cache
