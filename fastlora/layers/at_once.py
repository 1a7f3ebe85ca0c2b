"""The first of siblings computes them all: one call makes q, k and v, and one node their gradients.

For one adapter on kernels, with gradients and without; a layer that has no sibling is computed the
same way. The others find their output at their own calls. Who is a sibling was seen before, and
what was left is taken by the tensor's identity: see `fastlora.routing.siblings`. Each compares what
it would compute from with what was computed from, tensor by tensor; so the first may trust what it
found of its siblings at an earlier call.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.autograd.siblings import run_siblings
from fastlora.coded_weight import CodedWeight
from fastlora.layers.call import LayerCall
from fastlora.layers.factors import factors_of, has_tensor_hooks, is_hooked
from fastlora.layers.sharing import why_not_now
from fastlora.ops.backend import BACKENDS, MOST_SIBLINGS, Siblings, draw_seed
from fastlora.ops.factors import Base, Factors
from fastlora.routing.siblings import (
    Family,
    drop_shares,
    has_shares,
    keep_shares,
    take_share,
    withdraw_share,
)
from fastlora.weight_marks import marks

if TYPE_CHECKING:
    from fastlora.layers.common import CommonLayer

_Key = tuple[Any, ...]
# In one call for many tensors.
_version_of, _dtype_of = attrgetter("_version"), attrgetter("dtype")
_trains, _device_of = attrgetter("requires_grad"), torch.Tensor.get_device
# A key holds the memory until the share is taken: no other tensor can get it.
_memory_of = torch.Tensor.untyped_storage


class _Launch(NamedTuple):
    """What the first of siblings computes: itself, and those that are called after it.

    Attributes:
        dtype, device: Of x.
        base, own: The first's.
        owners: The ``id`` of each layer.
        siblings: Their operands, without seeds; None where the first is not one for this.
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
    siblings: Siblings | None
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
        own = any(map(_trains, _tensors_of(self.base, self.own)))
        return others == [own] * len(others)


def output_at_once(
    call: LayerCall, base: Base, own: Factors, family: Family
) -> torch.Tensor | None:
    """Returns a layer's output, which a sibling may have made; None where it is not one for this.

    For a call on kernels with one adapter, ``own``.
    """
    layer, x, records, conditions = call.layer, call.given, torch.is_grad_enabled(), call.conditions
    if base.weight is None or own.lora_bias is not None or own.magnitude is not None:
        return None
    if not family.unwritten or conditions.autocast is not None or conditions.invariant:
        return None
    if records and why_not_now(call):
        return None
    # A checkpoint's first run may record nothing; its repetition draws each seed at its layer.
    if own.dropout_p and not records:
        return None
    if family.idle and id(layer) in family.idle:
        family.idle.discard(id(layer))
        family.at_once.clear()
    # Part of each key, as numbers differ in identity.
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    if len(family.members) > 1 and has_shares():
        key = _key(stream, own.dropout_p, _tensors_of(base, own), records)
        context = _context(x, family, records)
        left: torch.Tensor | None = None
        if key is not None:
            left = take_share(x, id(layer), context, key)
        if left is not None:
            if records:
                family.why_not[id(layer)] = ""
            return left
        if withdraw_share(id(layer)):
            family.at_once.clear()  # it computes other than the first took it to
    return _compute(call, base, own, family, stream)


def _compute(
    call: LayerCall, base: Base, own: Factors, family: Family, stream: int
) -> torch.Tensor | None:
    """Computes a layer and those siblings that have yet to be called; returns its own output."""
    layer, x, impl = call.layer, call.given, call.conditions.backend
    records = torch.is_grad_enabled()
    drop_shares()  # of a sibling that was not called, or computes other than before
    launch: _Launch | None = family.at_once.get(id(layer))
    if (
        launch is None
        or not launch.serves(x, base, own)
        or (records and not launch.fits_one_node(x))
    ):
        family.at_once.clear()  # another one's is as old
        launch = family.at_once[id(layer)] = _launch_of(call, base, own, family)
    siblings = launch.siblings
    if siblings is None or not BACKENDS[impl].computes_siblings(x):
        return None
    if records:
        if not launch.others and len(family.members) > 1:
            return None  # it may still share s
        family.why_not[id(layer)] = ""
    if {*map(_device_of, launch.tensors)} != {x.get_device()}:  # moved as they are
        return None
    keys = [_key(stream, *other, records) for other in launch.others]
    if None in keys:
        return None
    if own.dropout_p:
        operands, dropout_p = siblings
        seeds = [draw_seed(x, impl) for _ in dropout_p]
        siblings = Siblings((*operands[: -len(seeds)], *seeds), dropout_p)
    y, *ys = run_siblings(x, siblings, impl)
    if ys:
        shares = zip(launch.owners[1:], zip(keys, ys, strict=True), strict=True)
        keep_shares(x, _context(x, family, records), dict(shares))
    return y


def _launch_of(call: LayerCall, base: Base, own: Factors, family: Family) -> _Launch:
    """Finds the siblings that one call takes beside a layer."""
    layer, x = call.layer, call.given
    found: list[tuple[int, Base, Factors]] = []
    apart = torch.is_grad_enabled() and has_tensor_hooks(_tensors_of(base, own))
    for reference in family.members:
        member: Any = reference()
        if member is layer and _fits(member, x, base, own):
            found.append((id(layer), base, own))
        elif (
            found
            and not apart
            and member is not None
            and id(member) not in family.idle
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
    tensors = [_tensors_of(*each) for each in zip(bases, factors, strict=True)]
    return _Launch(
        x.dtype,
        x.device,
        base,
        own,
        [owner for owner, *_ in found],
        Siblings(operands, dropout_p) if found else None,
        [tensor for each in tensors for tensor in each],
        [tensor.dtype for each in tensors for tensor in each],
        list(zip(dropout_p, tensors, strict=True))[1:],
        [base.weight for base in bases[1:] if isinstance(base.weight, CodedWeight)],
    )


def _operands_of(
    member: CommonLayer, call: LayerCall, first_base: Base, first: Factors
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
        tensors = _tensors_of(base, factors)
        if has_tensor_hooks(tensors):
            return None
        trains, wanted = map(_trains, tensors), map(_trains, _tensors_of(first_base, first))
        if not x.requires_grad and any(trains) != any(wanted):
            return None
    return base, factors


def _fits(layer: CommonLayer, x: torch.Tensor, base: Base, own: Factors) -> bool:
    """Whether one call takes a layer: plain, in x's dtype, with a seed that is drawn for it."""
    weight, bias, lora_a, lora_b = base.weight, base.bias, own.lora_a, own.lora_b
    if own.lora_bias is not None or own.magnitude is not None or weight is None:
        return False
    return (
        all(tensor.device == x.device for tensor in _tensors_of(base, own))
        and weight.dtype is x.dtype
        and (bias is None or bias.dtype is x.dtype)
        and lora_a.shape[1] == x.shape[-1] == weight.shape[1]
        and lora_a.shape[0] == lora_b.shape[1] > 0
        and own.scaling.numel() == 1
        and not (own.dropout_p and layer.is_split)
    )


def _tensors_of(base: Base, own: Factors) -> list[torch.Tensor]:
    """Returns what a layer's output depends on beside x."""
    tensors = [own.lora_a, own.lora_b, own.scaling]
    for tensor in base[:2]:
        if tensor is not None:
            tensors.append(tensor)
    return tensors


def _context(x: torch.Tensor, family: Family, records: bool) -> tuple[object, ...]:
    """Returns what all outputs of siblings depend on; of x what may change with no write."""
    return (family, marks.of_step(), x.requires_grad) if records else (family, marks.trained)


def _key(
    stream: int, dropout_p: float, tensors: Sequence[torch.Tensor], records: bool
) -> _Key | None:
    """Returns what an output depends on beside x, unchanged since; None where nobody counts."""
    trains = map(_trains, tensors) if records else ()
    ids, memory = map(id, tensors), map(_memory_of, tensors)
    try:
        return (stream, dropout_p, *ids, *map(_version_of, tensors), *memory, *trains)
    except RuntimeError:  # an inference tensor's writes are not counted
        return None
