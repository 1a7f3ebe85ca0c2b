"""The norms that DoRA divides by on one layer, and what is kept of them between forwards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastlora.ops.torch.norms import InRows, adapted_sums, square_norms
from fastlora.sharding import gathers_parameters, local
from fastlora.weight_marks import Kept, Mark, marks

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer

Stamp = tuple[int, int, int, Mark]


class NormCache(Kept):
    """The norms that one layer keeps: ``||W||^2``, and without gradients each adapter's own.

    They are looked up by mark, address and version of what they come from. Writes through ``.data``
    move none of them: `LoraLayer.refresh` is for these. Nor do FSDP2's gatherings: in a process
    that uses it nothing is kept. A copied layer starts with an empty cache.

    Attributes:
        kept: By adapter what its sums were computed from, and they; under None the base's squares.
    """

    def __init__(self) -> None:
        self.kept: dict[str | None, tuple[Hashable, torch.Tensor]] = {}


def magnitude_of(layer: CommonLayer, name: str) -> torch.Tensor:
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
    """Whether tensors made now may serve a later forward: not those of a graph being captured."""
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def base_stamp(layer: CommonLayer) -> tuple[Hashable, NormCache] | None:
    """Returns what changes when a layer's base weight does, or is said to (`forget_weights`)."""
    stamp = _stamp_of_base(layer)
    return None if stamp is None else (stamp, _cache(layer))


def rows_of(layer: CommonLayer) -> torch.Tensor | InRows:
    """Returns a layer's base weight ``[N, K]``: a matrix, or where it is quantised its rows."""
    found = layer._own_quantised()
    if found is None:
        return layer._own_weight()
    return InRows(found.rows, found.dtype, found.codes().device)


def base_squares(
    layer: CommonLayer, weight: torch.Tensor | InRows, compiling: bool = False
) -> torch.Tensor:
    """Returns ``||W||^2``, ``[N]``, of a layer's weight: kept while that stays what it is.

    ``compiling`` says that a graph is being compiled, which keeps nothing.
    """
    if compiling:
        return square_norms(weight, at_once=True)
    stamp = None
    if may_keep(weight.device):
        trains = not isinstance(weight, InRows) and weight.requires_grad
        if trains and torch.is_grad_enabled():
            # It trains: written to soon, and not every optimizer moves versions.
            _cache(layer).kept.pop(None, None)
        else:
            stamp = _stamp_of_base(layer)
    return _kept(layer, None, stamp, lambda: square_norms(weight))


def adapter_sums(
    layer: CommonLayer,
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
    layer: CommonLayer,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor | float,
    compiling: bool = False,
) -> torch.Tensor:
    """Returns an adapter's norms on a layer, squared, ``[N]``; infinity for 0. Computed now."""
    return layer._of_whole_rows([adapter_sums(layer, lora_a, lora_b, scaling, compiling)])[0]


def kept_sums(
    layer: CommonLayer, name: str, scaling: torch.Tensor | float, compiling: bool
) -> torch.Tensor:
    """Returns `adapter_sums` by name, ``[N]``; without gradients, kept until something changes.

    With gradients they are computed in every forward: an optimizer may be about to step, and not
    all of them move versions.
    """
    lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    key = None
    keeps = not compiling and may_keep(lora_a.device) and not isinstance(scaling, torch.Tensor)
    if keeps and not torch.is_grad_enabled():
        stamps = _stamp_of_base(layer), stamp_of(lora_a), stamp_of(lora_b)
        key = None if None in stamps else (*stamps, scaling)
    own = local(lora_a), local(lora_b)
    return _kept(layer, name, key, lambda: adapter_sums(layer, *own, scaling, compiling))


def _stamp_of_base(layer: CommonLayer) -> Hashable | None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    found = layer._own_quantised()
    if found is None:
        return stamp_of(weight, base=True)
    written = found.stamp()
    return None if written is None else (written, marks.of_base(weight))


def _kept(
    layer: CommonLayer, name: str | None, key: Hashable, make: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """Returns what a layer keeps under a name with this key, or makes it; None keeps nothing."""
    if key is None:
        return make()
    kept = _cache(layer).kept
    known = kept.get(name)
    if known is None or known[0] != key:
        with torch.inference_mode(False), torch.no_grad():  # for a backward one day
            known = kept[name] = key, make()
    return known[1]


def _cache(layer: CommonLayer) -> NormCache:
    cache: NormCache | None = layer.__dict__.get("_dora_norms")
    if cache is None:
        cache = layer.__dict__["_dora_norms"] = NormCache()
    return cache
