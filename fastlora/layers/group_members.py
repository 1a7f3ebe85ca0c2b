"""Selection of the layers of a shared-input group whose results one call computes.

Nothing is computed here. `fastlora.layers.group_forward` calls these functions. They also give the
reasons why other layers run alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch

from fastlora.deprecation import renamed_arguments
from fastlora.layers.adapter_factors import (
    factors_without_calling_modules,
    has_gradient_hooks,
    has_module_hooks,
    promoted_factor_dtype,
)
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora import find_dora_slots
from fastlora.layers.mixed_dispatch import slot_factors_for_compiled_graph, slot_factors_for_kernels
from fastlora.layers.shared_input import SharedInputGroup, known_group
from fastlora.ops.backend import MAX_LAYERS_PER_LAUNCH
from fastlora.ops.execution_mode import constant_when_compiled
from fastlora.ops.factors import Base, Factors, Slots
from fastlora.quantized_tensor import QuantizedTensor
from fastlora.validation import FastLoraError

if TYPE_CHECKING:
    from fastlora.layers.linear_with_adapters import BaseLinearWithAdapters

_IN_PYTORCH = "without kernels, each layer reads x separately"
_UNKNOWN = "no training forward pass yet"
_DROPOUT = "with dropout, each layer masks x separately"
# With map(), attrgetter reads an attribute of many tensors without a Python call for each.
_dtype_of, _trains = attrgetter("dtype"), attrgetter("requires_grad")


# --------------------------------------------------------------------------- one adapter, every y


@dataclass(slots=True, eq=False)  # Slots are read several times faster than a NamedTuple.
class PreparedGroupLaunch:
    """A prepared kernel launch for a group of layers that share an input.

    Later calls can reuse the launch. The launch consists of the arguments for computing the outputs
    of all its layers in one call. The launch covers the layer that is called first and layers that
    are called after it.

    Attributes:
        dtype, device: Dtype and device of x.
        base, own: The first layer's base layer and factors.
        owners: The ``id`` of each layer.
        operands: The operands of all layers, with None for the seeds. The tuple is empty if the
            first layer does not support such a call.
        dropout_p: Active dropout probability of each layer.
        tensors: The tensors that the outputs depend on, apart from x.
        dtypes: Dtype of each tensor. A tensor's dtype may change in place.
        others: For each layer but the first, its dropout probability and its part of ``tensors``.
        quantized: The quantized weights of the layers other than the first, to detect writes to
            them.
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
    quantized: list[QuantizedTensor]

    def can_be_reused_for(self, x: torch.Tensor, base: Base, own: Factors) -> bool:
        """Return whether the prepared launch can be reused for this input, base, and factors.

        The base layer ``base`` and the factors ``own`` must be the same as those of the call for
        which the launch was prepared. The input x may be a new tensor if its dtype and its device
        are the same. The dtypes of the launch's tensors and the quantized weights must be
        unchanged.
        """
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
            and (not self.quantized or all(weight.is_unmodified for weight in self.quantized))
        )

    def fits_one_autograd_node(self, x: torch.Tensor) -> bool:
        """Return whether the layers of the group can be computed in one autograd node for input x.

        The layers are those of the prepared launch. Since the launch was prepared, parameters may
        have been frozen or may have received hooks.
        """
        if not self.others:
            return True
        if has_gradient_hooks(self.tensors):
            return False
        if x.requires_grad:
            return True
        others = [any(map(_trains, tensors)) for _, tensors in self.others]
        own = any(map(_trains, operand_tensors(self.base, self.own)))
        return others == [own] * len(others)


def prepare_launch_with_later_layers(
    call: UniformCall | MixedCall, base: Base, own: Factors, group: SharedInputGroup
) -> PreparedGroupLaunch:
    """Prepare one launch that covers a layer and later layers in its shared-input group.

    Returns a `PreparedGroupLaunch`. The later layers are those that are called after the layer.
    Layers that need their own launch, idle layers, and layers beyond `MAX_LAYERS_PER_LAUNCH` are
    left out. If the layer's own parameters have gradient hooks, all later layers are left out. If
    the layer itself cannot be grouped, the launch has no operands.
    """
    layer, x = call.layer, call.original_x
    found: list[tuple[int, Base, Factors]] = []
    apart = torch.is_grad_enabled() and has_gradient_hooks(operand_tensors(base, own))
    for reference in group.members:
        member: Any = reference()
        if member is layer and _can_compute_output_with_group(member, x, base, own):
            found.append((id(layer), base, own))
        elif (
            found
            and not apart
            and member is not None
            and id(member) not in group.idle
            and len(found) < MAX_LAYERS_PER_LAUNCH
        ):
            like = _groupable_operands(member, call, base, own)
            # With dropout each layer has its own launches, which a layer without dropout does not
            # need.
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
    tensors = [operand_tensors(*each) for each in zip(bases, factors, strict=True)]
    return PreparedGroupLaunch(
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
        [base.weight for base in bases[1:] if isinstance(base.weight, QuantizedTensor)],
    )


def _groupable_operands(
    member: BaseLinearWithAdapters, call: UniformCall | MixedCall, first_base: Base, first: Factors
) -> tuple[Base, Factors] | None:
    """Return a member's operands for a kernel launch that the member shares with the first layer.

    The operands are the member's `Base` and `Factors`. Returns None if the member needs its own
    launch. The member can share the first layer's kernel launch if one call can compute the outputs
    of both layers, which depends on devices, dtypes, and shapes, among other things. With
    gradients, there are two more conditions. No parameter may have hooks, because the shared
    autograd node calls the hooks, with None, even for a y that was never used. If x needs no
    gradient, either both layers must train or neither, because autograd treats every output of a
    node as one that needs a gradient.
    """
    records, x = torch.is_grad_enabled(), call.original_x
    hooked = records and has_module_hooks(member)
    if hooked or member.impl != call.layer.impl:
        return None
    names, base = member._applied_adapters(), member._fusable_base()
    if len(names) != 1 or base is None:
        return None
    factors = factors_without_calling_modules(member, names[0], call)
    if factors is None or not _can_compute_output_with_group(member, x, base, factors):
        return None
    if records:
        tensors = operand_tensors(base, factors)
        if has_gradient_hooks(tensors):
            return None
        trains, wanted = map(_trains, tensors), map(_trains, operand_tensors(first_base, first))
        if not x.requires_grad and any(trains) != any(wanted):
            return None
    return base, factors


def _can_compute_output_with_group(
    layer: BaseLinearWithAdapters, x: torch.Tensor, base: Base, own: Factors
) -> bool:
    """Return whether a layer's output can be computed in one call with its group's outputs.

    The layer must have neither a lora_bias nor DoRA. Its tensors must be on x's device, and its
    base weight and bias must have x's dtype. With dropout, the layer must not be split, because a
    split layer does not use the drawn seed.
    """
    weight, bias, lora_a, lora_b = base.weight, base.bias, own.lora_a, own.lora_b
    if own.lora_bias is not None or own.magnitude is not None or weight is None:
        return False
    return (
        all(tensor.device == x.device for tensor in operand_tensors(base, own))
        and weight.dtype is x.dtype
        and (bias is None or bias.dtype is x.dtype)
        and lora_a.shape[1] == x.shape[-1] == weight.shape[1]
        and lora_a.shape[0] == lora_b.shape[1] > 0
        and own.scaling.numel() == 1
        and not (own.dropout_p and layer.is_split)
    )


def operand_tensors(base: Base, own: Factors) -> list[torch.Tensor]:
    """Return a layer's tensor operands as a list.

    The operands are the lora_a, lora_b, and scaling of the layer's factors, and the weight and bias
    of the base layer. The layer's output depends on these tensors and on x. A weight or bias of
    None is left out.
    """
    tensors = [own.lora_a, own.lora_b, own.scaling]
    for tensor in base[:2]:
        if tensor is not None:
            tensors.append(tensor)
    return tensors


# ------------------------------------------------------------------------------ by lists, every s


def select_sharing_layers(
    members: Sequence[BaseLinearWithAdapters | None], call: UniformCall | MixedCall, own: Slots
) -> tuple[list[tuple[Any, Slots]], str]:
    """Select the group members that can share one computation, along with the slots of each.

    The selected layers share the calling layer's pass over x. Returns a tuple (pairs, reason). Each
    pair is a layer and its `Slots`, a list of the layer's factors for each slot. If the calling
    layer itself cannot share its pass, the list of pairs is empty, and the reason explains why.
    Otherwise, the reason explains why the last layer that was left out cannot share the pass. The
    reason is an empty string if no layer was left out.
    """
    found: list[tuple[Any, Slots]] = []
    last = ""
    for member in members:
        if member is None:
            continue
        slots, reason = (own, "") if member is call.layer else _factors_or_reason(member, call)
        if slots is not None:
            reason = _reason_for_separate_pass(member, slots, own, call)
        if slots is not None and not reason:
            found.append((member, slots))
        elif member is call.layer:
            return [], reason
        else:
            last = f"in its group, {reason}"
    return found, last


def _factors_or_reason(
    member: BaseLinearWithAdapters, call: UniformCall | MixedCall
) -> tuple[Slots | None, str]:
    """Return a member's factors for each slot, or the reason why they cannot be used.

    The reason states why the member cannot share a pass over x. The result is a tuple (slots,
    reason). The reason applies only if slots is None.
    """
    if member.impl != call.layer.impl:
        return None, "the layers have different implementations"
    if isinstance(call, UniformCall):
        names = member._applied_adapters()
        if len(names) != 1:
            return None, f"{len(names)} adapters are active on a layer"
        magnitudes = member._modules.get("lora_magnitude_vector")
        if magnitudes is not None and names[0] in magnitudes._modules:
            return None, "a layer uses DoRA"
        factors = factors_without_calling_modules(member, names[0], call)
        if factors is None:
            return None, "a layer has a factor or dropout module with hooks, or a custom one"
        return [factors], ""
    if member.routing_group is not call.layer.routing_group:
        return None, "a layer belongs to another model"
    dora = find_dora_slots(member, call.routing)
    dropped = () if dora is None else dora.dropped
    if call.conditions.compiling:
        return slot_factors_for_compiled_graph(call, member, dropped), "a layer is not in the graph"
    try:
        slots = slot_factors_for_kernels(call, member, dropped)
    except (FastLoraError, ValueError):  # The layer's own call will raise it.
        return None, "a layer cannot run"
    return slots, "a layer runs without kernels"


def _reason_for_separate_pass(
    layer: BaseLinearWithAdapters, slots: Slots, own: Slots, call: UniformCall | MixedCall
) -> str:
    """Return the reason why a layer needs a separate pass over x.

    Returns an empty string if the layer can share a pass with its group.
    """
    x, mixed = call.original_x, isinstance(call, MixedCall)
    device, k, dropped, trains, elsewhere = x.device, x.shape[-1], False, False, False
    for factors in slots:
        if factors is not None:
            lora_a = factors.lora_a
            dropped = dropped or factors.dropout_p > 0.0
            trains = trains or lora_a.requires_grad
            if lora_a.device != device or lora_a.dim() != 2 or lora_a.shape[1] != k:
                elsewhere = True
    if has_module_hooks(layer):
        return "a layer has hooks"
    # The shared node calls a hook, with None, for an s that was never used.
    down = [tensor for tensor in lora_a_by_slot(slots) if tensor is not None]
    if not call.conditions.compiling and has_gradient_hooks(down):
        return "a layer has a factor with hooks"
    if dropped and mixed:
        return _DROPOUT
    if not trains:
        return "a layer is frozen, or no adapter of the batch is active on it"
    if elsewhere:
        return "a layer has factors on another device, or expects a different number of features"
    if mixed and promoted_factor_dtype(slots) != promoted_factor_dtype(own):
        return "the layers have factors with different dtypes"
    return ""


def lora_a_by_slot(slots: Slots) -> list[torch.Tensor | None]:
    """Return a list of each slot's lora_a.

    The entry of a slot without factors is None.
    """
    return [None if factors is None else factors.lora_a for factors in slots]


# ------------------------------------------------------------------------- fusion report


@constant_when_compiled
def has_shared_input_group(self: Any) -> bool:
    """Return whether the layer belongs to a shared-input group.

    The result is True once a forward pass has identified the group. `torch.compile` treats the
    result as a constant and does not recompile when it changes.
    """
    return known_group(self) is not None


@constant_when_compiled
@renamed_arguments(why="reason")
def record_compiled_fallback(self: Any, reason: str) -> None:
    """Record why a layer falls back to a separate computation under ``torch.compile``.

    The reason is recorded in the layer ``self``. The layer falls back to its own pass over x if it
    cannot use the pass that its shared-input group shares. The function is called while a graph is
    being compiled. The reason is an empty string if the layer shares a pass.
    """
    self.__dict__["_compiled_fallback_reason"] = reason


def describe_input_sharing(layer: BaseLinearWithAdapters, uses_kernels: bool) -> str:
    """Describe how a layer shares its input with other layers.

    The description is for the fusion report and applies to training. The returned text states how
    many layers share a pass over x, or the reason why the layer does not share a pass.
    ``uses_kernels`` tells whether Triton kernels compute the layer's output. With kernels, the
    description is ``"none"`` if no other layer has the same input.
    """
    if not uses_kernels:
        return _IN_PYTORCH
    group, compiled = known_group(layer), layer.__dict__.get("_compiled_fallback_reason")
    if group is not None and len(group.members) < 2:
        return "none"
    eager = _UNKNOWN
    if group is not None and id(layer) in group.fallback_reasons:
        eager = _describe_members(group, group.fallback_reasons[id(layer)])
    if compiled is None:
        return eager
    graph = f"not shared: {compiled}" if group is None else _describe_members(group, compiled)
    return eager if graph == eager else f"{eager}; compiled: {graph}"


def _describe_members(group: SharedInputGroup, reason: str) -> str:
    count = len(group.members)
    return f"{count} layers, not shared: {reason}" if reason else f"{count} layers share x"
