"""The norms that DoRA divides by on one layer, and what is kept of them between forwards."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers.bases import dense_weight
from fastlora.ops.torch.norms import adapted_squares, adapted_sums, outside_autocast, square_norms
from fastlora.sharding import gathers_parameters, local
from fastlora.weight_marks import Mark, marks

Stamp = tuple[int, int, int, Mark]


class _Kept(NamedTuple):
    """An adapter's squared norms, and what they were computed from."""

    key: tuple[Any, ...]
    value: torch.Tensor


class NormCache:
    """The norms that one layer keeps: ``||W||^2``, and without gradients each adapter's own.

    They are looked up by mark, address and version of what they come from. Writes through ``.data``
    move none of them: `LoraLayer.refresh` is for these. Nor do FSDP2's gatherings: in a process
    that uses it nothing is kept. A copied layer starts with an empty cache.
    """

    def __init__(self) -> None:
        self.base: tuple[Stamp, torch.Tensor] | None = None
        self.adapters: dict[str, _Kept] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> NormCache:
        return NormCache()

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()


def forget_norms(layer: Any) -> None:
    """Drops what a layer keeps of norms."""
    layer.__dict__.pop("_dora_norms", None)


def magnitude_of(layer: Any, name: str) -> torch.Tensor:
    """Returns an adapter's magnitude, ``[N]``."""
    magnitude: torch.Tensor = layer._modules["lora_magnitude_vector"]._modules[name].weight
    return magnitude


def stamp_of(tensor: torch.Tensor, base: bool = False) -> Stamp | None:
    """Returns what changes when a tensor's contents do, or None where nothing tells.

    ``base`` says that it is a layer's base weight.
    """
    own = local(tensor)
    if type(own) not in (nn.Parameter, torch.Tensor):
        return None
    if own.is_inference() or tensor.is_inference():
        return None
    if gathers_parameters():  # it may be one that was gathered anew, where the last one lay
        return None
    mark = marks.of_base(tensor) if base else marks.of_trained()
    return id(tensor), own.data_ptr(), version_of(tensor), mark


def version_of(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written in place. It must not be an inference tensor."""
    own = local(tensor)
    # What writes into a DTensor moves its version, or that of the part.
    return own._version if own is tensor else own._version + tensor._version


def may_keep(device: torch.device) -> bool:
    """Whether tensors made now may serve a later forward: not those of a graph being recorded."""
    if torch.compiler.is_compiling():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def base_stamp(layer: Any) -> tuple[Stamp, NormCache] | None:
    """Returns what changes when a layer's base weight does, or is said to (`forget_norms`)."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    stamp = stamp_of(weight, base=True) if isinstance(weight, torch.Tensor) else None
    return None if stamp is None else (stamp, _cache(layer))


def adapter_squares(
    layer: Any,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: Any,
    own_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns `adapted_squares` of an adapter on a layer, ``[N]``, computed now.

    Args:
        layer: Its base layer has the W.
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        scaling: A number, or a tensor without dimensions.
        own_weight: This process's part of W, where it has some of the rows or columns: then
            `adapted_sums` comes back, of its columns.
    """
    weight = dense_weight(layer.get_base_layer()) if own_weight is None else own_weight
    compute = adapted_squares if own_weight is None else adapted_sums
    squares = base_squares(layer, weight)
    return outside_autocast(compute, weight, squares, lora_a, lora_b, scaling)


def base_squares(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """Returns ``||W||^2``, ``[N]``, of a layer's dense weight: kept while that stays what it is."""
    if not may_keep(weight.device):
        return square_norms(weight)
    if weight.requires_grad and torch.is_grad_enabled():
        # It trains: written to soon, and not every optimizer moves versions.
        _cache(layer).base = None
        return square_norms(weight)
    own = getattr(layer.get_base_layer(), "weight", None)
    stamp = stamp_of(own, base=True) if isinstance(own, torch.Tensor) else None
    if stamp is None:
        return square_norms(weight)
    cache = _cache(layer)
    known = cache.base
    if known is None or known[0] != stamp:
        with torch.inference_mode(False):  # for a backward one day
            known = cache.base = stamp, square_norms(weight.detach())
    return known[1]


def _cache(layer: Any) -> NormCache:
    cache = layer.__dict__.get("_dora_norms")
    if cache is None:
        cache = layer.__dict__["_dora_norms"] = NormCache()
    return cache


def cached_squares(
    layer: Any,
    name: str,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: Any,
    own_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`adapter_squares` of an adapter by name; without gradients, kept until something changes.

    With gradients they are computed in every forward: an optimizer may be about to step, and not
    all of them move versions. lora_a and lora_b may be DTensors beside ``own_weight``.
    """
    keeps = may_keep(lora_a.device) and not isinstance(scaling, torch.Tensor)
    stamps: list[Stamp | None] = [None]
    if keeps and not torch.is_grad_enabled():
        weight = layer.get_base_layer().weight
        stamps = [stamp_of(weight, base=True), stamp_of(lora_a), stamp_of(lora_b)]
    if own_weight is not None:
        lora_a, lora_b = local(lora_a), local(lora_b)
    if None in stamps:
        return adapter_squares(layer, lora_a, lora_b, scaling, own_weight)
    kept = _cache(layer).adapters
    key = (*stamps, scaling)
    known = kept.get(name)
    if known is None or known.key != key:
        with torch.inference_mode(False):
            value = adapter_squares(layer, lora_a.detach(), lora_b.detach(), scaling, own_weight)
        known = kept[name] = _Kept(key, value)
    return known.value
