"""Which layers of a shared-input group one call takes together, and why others run alone.

Nothing here computes. `fastlora.layers.group_forward` asks, for layers that are fed by the same
tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.coded_weight import CodedWeight
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.decide import slots_for_kernels, slots_in_graph
from fastlora.layers.dora import dora_slots
from fastlora.layers.factors import dtype_of, factors_of, has_tensor_hooks, is_hooked
from fastlora.layers.shared_input import SharedInputGroup, known_group
from fastlora.ops.backend import MOST_SIBLINGS
from fastlora.ops.conditions import constant_when_compiled
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.validation import FastLoraError

if TYPE_CHECKING:
    from fastlora.layers.layer import AdaptedLayer

_IN_PYTORCH = "without kernels each of them has its own pass over x"
_UNKNOWN = "no training forward seen yet"
_DROPOUT = "under dropout each of them masks x for itself"
# In one call for many tensors.
_dtype_of, _trains = attrgetter("dtype"), attrgetter("requires_grad")


# --------------------------------------------------------------------------- one adapter, every y


class GroupLaunch(NamedTuple):
    """What the first layer of a group computes: itself, and those that are called after it.

    Attributes:
        dtype, device: Of x.
        base, own: The first's.
        owners: The ``id`` of each layer.
        operands: Of all, without seeds; empty where the first is not one for this.
        dropout_p: Probability that acts on each.
        tensors: What their outputs depend on beside x.
        dtypes: Of each, which may change in place.
        others: Of each but the first, the probability of dropout, and its part of the tensors.
        coded: The weights of others that are codes: a write to them is seen here.
    """

    dtype: torch.dtype
    device: torch.device
    base: Base
    own: Factors
    owners: list[int]
    operands: tuple[torch.Tensor | None, ...]
    dropout_p: tuple[float, ...]
    tensors: list[torch.Tensor]
    dtypes: list[torch.dtype]
    others: list[tuple[float, list[torch.Tensor]]]
    coded: list[CodedWeight]

    def serves(self, x: torch.Tensor, base: Base, own: Factors) -> bool:
        """Whether it was found for the very same layer and such an input."""
        before, known = self.own, self.base
        return (
            own.lora_a is before.lora_a
            and own.lora_b is before.lora_b
            and own.scaling is before.scaling
            and own.dropout_p == before.dropout_p
            and base.weight is known.weight
            and base.bias is known.bias
            and x.dtype is self.dtype
            and x.device == self.device
            and [*map(_dtype_of, self.tensors)] == self.dtypes
            and (not self.coded or all(weight.is_unwritten for weight in self.coded))
        )

    def fits_one_node(self, x: torch.Tensor) -> bool:
        """Whether one node of the graph still does for all of them; see `_operands_of`."""
        if not self.others:
            return True
        if has_tensor_hooks(self.tensors):
            return False
        if x.requires_grad:
            return True
        others = [any(map(_trains, tensors)) for _, tensors in self.others]
        own = any(map(_trains, tensors_of(self.base, self.own)))
        return others == [own] * len(others)


def launch_of(
    call: LayerCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> GroupLaunch:
    """Finds the layers that one call takes beside a layer."""
    layer, x = call.layer, call.given
    found: list[tuple[int, Base, Factors]] = []
    apart = torch.is_grad_enabled() and has_tensor_hooks(tensors_of(base, own))
    for reference in group.members:
        member: Any = reference()
        if member is layer and _fits(member, x, base, own):
            found.append((id(layer), base, own))
        elif (
            found
            and not apart
            and member is not None
            and id(member) not in group.idle
            and len(found) < MOST_SIBLINGS
        ):
            like = _operands_of(member, call, base, own)
            # Under dropout each has launches of its own, which nothing else is to have.
            if like is not None and bool(like[1].dropout_p) == bool(own.dropout_p):
                found.append((id(member), *like))
    bases, factors = [base for _, base, _ in found], [own for *_, own in found]
    dropout_p = tuple(own.dropout_p for own in factors)
    operands = (
        *(base.weight for base in bases),
        *(base.bias for base in bases),
        *(own.lora_a for own in factors),
        *(own.lora_b for own in factors),
        *(own.scaling for own in factors),
        *([None] * len(found)),
    )
    tensors = [tensors_of(*each) for each in zip(bases, factors, strict=True)]
    return GroupLaunch(
        x.dtype,
        x.device,
        base,
        own,
        [owner for owner, *_ in found],
        operands,
        dropout_p,
        [tensor for each in tensors for tensor in each],
        [tensor.dtype for each in tensors for tensor in each],
        list(zip(dropout_p, tensors, strict=True))[1:],
        [base.weight for base in bases[1:] if isinstance(base.weight, CodedWeight)],
    )


def _operands_of(
    member: AdaptedLayer, call: LayerCall | MixedCall, first_base: Base, first: Factors
) -> tuple[Base, Factors] | None:
    """Returns a sibling's base layer and adapter if one call takes them beside a layer's.

    With gradients not where a parameter has hooks: a node calls them for a y that nobody used, with
    None. Nor where x needs no gradient and only one of the two layers trains: autograd takes each
    output of a node for one that needs a gradient.
    """
    records, x = torch.is_grad_enabled(), call.given
    hooked = records and is_hooked(member)
    if hooked or member.impl != call.layer.impl:
        return None
    names, base = member._acting(), member._plain_base()
    if len(names) != 1 or base is None:
        return None
    factors = factors_of(member, names[0], call)
    if factors is None or not _fits(member, x, base, factors):
        return None
    if records:
        tensors = tensors_of(base, factors)
        if has_tensor_hooks(tensors):
            return None
        trains, wanted = map(_trains, tensors), map(_trains, tensors_of(first_base, first))
        if not x.requires_grad and any(trains) != any(wanted):
            return None
    return base, factors


def _fits(layer: AdaptedLayer, x: torch.Tensor, base: Base, own: Factors) -> bool:
    """Whether one call takes a layer: plain, in x's dtype, with a seed that is drawn for it."""
    weight, bias, lora_a, lora_b = base.weight, base.bias, own.lora_a, own.lora_b
    if own.lora_bias is not None or own.magnitude is not None or weight is None:
        return False
    return (
        all(tensor.device == x.device for tensor in tensors_of(base, own))
        and weight.dtype is x.dtype
        and (bias is None or bias.dtype is x.dtype)
        and lora_a.shape[1] == x.shape[-1] == weight.shape[1]
        and lora_a.shape[0] == lora_b.shape[1] > 0
        and own.scaling.numel() == 1
        and not (own.dropout_p and layer.is_split)
    )


def tensors_of(base: Base, own: Factors) -> list[torch.Tensor]:
    """Returns what a layer's output depends on beside x."""
    tensors = [own.lora_a, own.lora_b, own.scaling]
    for tensor in base[:2]:
        if tensor is not None:
            tensors.append(tensor)
    return tensors


# ------------------------------------------------------------------------------ by lists, every s


def sharing(
    members: Sequence[AdaptedLayer | None], call: LayerCall | MixedCall, own: Slots
) -> tuple[list[tuple[Any, Slots]], str]:
    """Returns the siblings that share a pass over x with a layer, and their adapters.

    The list is empty if the layer itself cannot share. The text says why the last sibling that was
    left out cannot.
    """
    found: list[tuple[Any, Slots]] = []
    last = ""
    for member in members:
        if member is None:
            continue
        slots, why = (own, "") if member is call.layer else _slots_of(member, call)
        if slots is not None:
            why = _why_not(member, slots, own, call)
        if slots is not None and not why:
            found.append((member, slots))
        elif member is call.layer:
            return [], why
        else:
            last = f"of its siblings, {why}"
    return found, last


def _slots_of(member: AdaptedLayer, call: LayerCall | MixedCall) -> tuple[Slots | None, str]:
    """Returns the adapters that a sibling will compute with, or None and why it does not share."""
    if member.impl != call.layer.impl:
        return None, "they have different implementations"
    if isinstance(call, LayerCall):
        names = member._acting()
        if len(names) != 1:
            return None, f"{len(names)} adapters act on one of them"
        magnitudes = member._modules.get("lora_magnitude_vector")
        if magnitudes is not None and names[0] in magnitudes._modules:
            return None, "one of them is DoRA"
        factors = factors_of(member, names[0], call)
        if factors is None:
            return None, "one of them has a factor or dropout that is hooked, or not plain"
        return [factors], ""
    if member.routed_by is not call.layer.routed_by:
        return None, "one of them is of another model"
    dora = dora_slots(member, call.routing)
    dropped = () if dora is None else dora.dropped
    if call.conditions.compiling:
        return slots_in_graph(call, member, dropped), "one of them is not in the graph"
    try:
        slots = slots_for_kernels(call, member, dropped)
    except (FastLoraError, ValueError):  # which its own call will raise
        return None, "one of them cannot run"
    return slots, "one of them runs without kernels"


def _why_not(layer: AdaptedLayer, slots: Slots, own: Slots, call: LayerCall | MixedCall) -> str:
    """Returns why a layer with these adapters has its own pass over x, or an empty string."""
    x, mixed = call.given, isinstance(call, MixedCall)
    device, k, dropped, trains, elsewhere = x.device, x.shape[-1], False, False, False
    for factors in slots:
        if factors is not None:
            lora_a = factors.lora_a
            dropped = dropped or factors.dropout_p > 0.0
            trains = trains or lora_a.requires_grad
            if lora_a.device != device or lora_a.dim() != 2 or lora_a.shape[1] != k:
                elsewhere = True
    if is_hooked(layer):
        return "one of them has hooks"
    # The node that they share calls a hook, with None, for an s that nobody used.
    down = [tensor for tensor in lora_a_of(slots) if tensor is not None]
    if not call.conditions.compiling and has_tensor_hooks(down):
        return "a factor of one of them has hooks"
    if dropped and mixed:
        return _DROPOUT
    if not trains:
        return "one of them is frozen, or no adapter of the batch acts on it"
    if elsewhere:
        return "one of them has its factors elsewhere, or takes another number of features"
    if mixed and dtype_of(slots) != dtype_of(own):
        return "they have factors of different dtypes"
    return ""


def lora_a_of(slots: Slots) -> list[torch.Tensor | None]:
    """Returns the lora_a of each slot; None for one without."""
    return [None if factors is None else factors.lora_a for factors in slots]


# ------------------------------------------------------------------------------ in the report


@constant_when_compiled
def knows_siblings(self: Any) -> bool:
    """Whether a forward has shown a layer's siblings; no reason to compile again once one has."""
    return known_group(self) is not None


@constant_when_compiled
def note_compiled(self: Any, why: str) -> None:
    """Keeps why a layer shares nothing in the graph that is being compiled, empty if it does."""
    self.__dict__["_compiled_alone"] = why


def sibling_note(layer: AdaptedLayer, kernels: bool) -> str:
    """Returns what the fusion report says of a layer's siblings in training.

    ``kernels`` says that they compute it.
    """
    if not kernels:
        return _IN_PYTORCH
    group, compiled = known_group(layer), layer.__dict__.get("_compiled_alone")
    if group is not None and len(group.members) < 2:
        return "none"
    eager = _UNKNOWN
    if group is not None and id(layer) in group.why_alone:
        eager = _verdict(group, group.why_alone[id(layer)])
    if compiled is None:
        return eager
    graph = f"not shared: {compiled}" if group is None else _verdict(group, compiled)
    return eager if graph == eager else f"{eager}; compiled: {graph}"


def _verdict(group: SharedInputGroup, why: str) -> str:
    count = len(group.members)
    return f"{count}, not shared: {why}" if why else f"{count} share x"
