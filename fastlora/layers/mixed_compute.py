"""From a batch's routing to the products of one layer.

Three ways, the same result to rounding, but for what a dropout draws:

- kernels: where the Triton kernels run, with gradients and dropout (`mixed_training`) or without.
- packed: without gradients elsewhere, from the second time on that a set of adapters comes.
- shares: with gradients or dropout elsewhere, and the first time: each adapter's factors as they
  are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora import functional, mixed, ops, packed, packed_forward
from fastlora.batch_invariant import invariant_impl, is_batch_invariant, refuse_in_mode
from fastlora.layers import dora_mixed, mixed_graph, mixed_kernels, mixed_training
from fastlora.layers.absent import with_absent, with_all_absent
from fastlora.layers.compute import (
    NOT_OUR_GEMM,
    Branch,
    branch_of,
    plain_weight,
    why_not_fused,
)
from fastlora.layers.watch import Watch
from fastlora.packed import Factors, LayerPack, SetPack
from fastlora.routing import KernelRouting, Routing, RowRouting, layer_seed
from fastlora.siblings import share, shared
from fastlora.validation import (
    AdapterStateError,
    ImplementationError,
    UnsupportedLayerError,
    check_same_device,
)


def mixed_forward(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
) -> torch.Tensor:
    """Runs a plain linear base layer, each row with its own adapter.

    Args:
        layer: Holds the adapters; rows whose adapter it lacks are base rows.
        x: ``[..., K]``.
        weight: Base weight ``[N, K]``.
        bias: Base bias ``[N]`` or None.
        routing: The batch's.
        projection: The layer's number in its model, which makes its dropout its own.
    """
    if torch.compiler.is_compiling():
        made = mixed_graph.linear(layer, x, weight, bias, routing, projection)
        if made is not None:
            return made
    dora = dora_mixed.dora_slots(layer, routing)
    dropped = () if dora is None else dora.dropped
    y = _mixed_forward(layer, x, weight, bias, routing, projection, dropped)
    return y if dora is None else _with_dora(layer, y, x, routing, dora, projection)


def _mixed_forward(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
    without: tuple[int, ...],
) -> torch.Tensor:
    """`mixed_forward` before DoRA's scales; slots of ``without`` get the base layer only."""
    y = _again(layer, x, weight, bias, routing, projection)
    if y is not None:
        return y
    check_unmerged(layer)
    dtype = functional.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    invariant = is_batch_invariant()
    bare = dtype is None and _without_gradients(layer, routing, x, weight, bias)
    if bare:
        kernels = _kernels(layer, x, routing)
        if kernels is not None:
            plan = "invariant" if invariant else "auto"
            return mixed_kernels.linear(layer, x, weight, bias, routing, kernels, projection, plan)
    if invariant:
        refuse_in_mode(layer, _why_not_kernels(bare, dtype))
    if not bare:
        parts = mixed_training.parts_for_kernels(layer, x, routing, without)
        if parts is not None:
            y = mixed_training.linear(x, weight, bias, routing, projection, parts)
            return with_all_absent(layer, y, x, routing)
    if bare:
        rows = routing.rows(x.numel() // x.shape[-1], x.device)
        found = _packed(layer, x, routing, rows, projection)
        if found is not None:
            y = packed_forward.linear(_flat(x), weight, bias, rows, *found)
            return y.view(*x.shape[:-1], weight.shape[0])
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    shares, factors = _shares(layer, x, routing, rows, projection, without)
    if _wants_grad(x, weight, bias, *factors):
        routing.group.packs.clear()  # an optimizer may be about to write into the factors
        y = mixed.MixedLoraLinear.apply(x, weight, bias, rows, shares, *factors)
    else:
        y = mixed.forward_linear(x, weight, bias, rows, shares, factors)[0]
    return with_absent(layer, y, routing, rows)


class _Ready(NamedTuple):
    """A layer's packed factors and how to multiply, found once for a routing.

    Attributes:
        pack: The factors.
        plan: How to multiply.
        rows: The rows that the plan is for.
        dtype, device: Of x.
        impl: The layer's.
        generation: The packs', once factors may have changed another.
    """

    pack: LayerPack
    plan: packed_forward.Plan
    rows: RowRouting
    dtype: torch.dtype
    device: torch.device
    impl: str
    generation: int

    def serves(self, x: torch.Tensor, impl: str) -> bool:
        """Whether it was found for such an input."""
        return x.dtype is self.dtype and x.device == self.device and impl == self.impl


def _again(
    layer: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    number: int,
) -> torch.Tensor | None:
    """Runs what an earlier forward of this routing found for the layer; None if it no longer holds.

    Most of a decode step is spent here, where the host's own time counts.
    """
    ready: _Ready | None = routing.ready.get(number)
    if (
        ready is None
        or layer.training
        or torch.is_grad_enabled()
        or not ready.serves(x, getattr(layer, "impl", "auto"))
        or weight.dtype is not ready.dtype
        or ready.generation != routing.group.packs.generation
        or layer.merged_adapters
        or x.numel() != ready.rows.slots.numel() * x.shape[-1]
        or is_batch_invariant()
        or torch.is_autocast_enabled(ready.device.type)
    ):
        return None
    pack = ready.pack
    shrunk = _shrunk(x, number, ready.rows, pack, ready.plan)
    y = packed_forward.linear(_flat(x), weight, bias, ready.rows, pack, ready.plan, shrunk)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def check_unmerged(layer: Any) -> None:
    """Raises `AdapterStateError` where adapters are merged into the weights of a layer."""
    if layer.merged_adapters:
        raise AdapterStateError(
            f"adapters {layer.merged_adapters} were merged into the base weights within the block, "
            "where every row shares them; unmerge them first"
        )


def mixed_added_forward(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    inplace: bool = False,
) -> torch.Tensor:
    """Adds each row's own adapter to the output ``y`` of a base layer called as it is.

    ``inplace`` says whether y may be overwritten where no gradient is recorded.
    """
    if torch.compiler.is_compiling():
        made = mixed_graph.add(layer, y, x, routing, projection)
        if made is not None:
            return made
    dora = dora_mixed.dora_slots(layer, routing)
    dropped = () if dora is None else dora.dropped
    y = _mixed_added_forward(layer, y, x, routing, projection, inplace, dropped)
    return y if dora is None else _with_dora(layer, y, x, routing, dora, projection)


def _mixed_added_forward(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    projection: int,
    inplace: bool,
    without: tuple[int, ...],
) -> torch.Tensor:
    """`mixed_added_forward` before DoRA's scales; slots of ``without`` add nothing."""
    refuse_in_mode(layer, NOT_OUR_GEMM)
    check_unmerged(layer)
    dtype = functional.autocast_dtype(x)
    x = x.to(dtype or x.dtype)
    if dtype is None and y.dtype == x.dtype and _without_gradients(layer, routing, x, y):
        kernels = _kernels(layer, x, routing)
        if kernels is not None:
            return mixed_kernels.add_(layer, _own_rows(y, inplace), x, kernels).view(y.shape)
        rows = routing.rows(x.numel() // x.shape[-1], x.device)
        found = _packed(layer, x, routing, rows, projection)
        if found is not None:
            return packed_forward.add_(_own_rows(y, inplace), rows, *found).view(y.shape)
    elif y.dtype == x.dtype:
        parts = mixed_training.parts_for_kernels(layer, x, routing, without)
        if parts is not None:
            own = any(parts)
            y = mixed_training.add(y, x, routing, projection, parts)
            return with_all_absent(layer, y, x, routing, own=own)
    elif getattr(layer, "impl", "auto") == "triton":
        raise ImplementationError(
            f"impl='triton' cannot run: the base layer returned {y.dtype} for x in {x.dtype}"
        )
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    shares, factors = _shares(layer, x, routing, rows, projection, without)
    if not shares:
        return with_absent(layer, y, routing, rows, own=False)
    if _wants_grad(y, x, *factors):
        routing.group.packs.clear()
        y = mixed.MixedLoraAdd.apply(y, x, None, rows, shares, *factors)
    else:
        y = mixed.forward_add(y, x, rows, shares, factors)[0]
    return with_absent(layer, y, routing, rows)


def _with_dora(
    layer: Any,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    slots: dora_mixed.DoraSlots,
    projection: int,
) -> torch.Tensor:
    """Scales the rows of adapters that use DoRA, and runs those whose dropout acts."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    if not dora_mixed.wants_segments(layer, y, routing, slots):
        return dora_mixed.scale_rows(layer, y, routing, slots)
    rows = routing.rows(x.numel() // x.shape[-1], x.device)
    found = [(slot, _branch(layer, x, routing, slot)) for slot in slots.dropped]
    branches = {slot: branch for slot, branch in found if branch is not None}
    return dora_mixed.scale_segments(layer, y, x, routing, rows, slots, branches, projection)


def _without_gradients(layer: Any, routing: Routing, *tensors: torch.Tensor | None) -> bool:
    """Whether no gradient is recorded and no dropout can act."""
    if layer.training:
        return False
    # A pool's factors have no gradients; those of parameters are not asked one by one.
    return not torch.is_grad_enabled() or (
        routing.residents is not None and not _wants_grad(*tensors)
    )


def _kernels(layer: Any, x: torch.Tensor, routing: Routing) -> KernelRouting | None:
    impl = getattr(layer, "impl", "auto")
    if is_batch_invariant():
        invariant_impl(impl, "auto", x)
    elif ops.resolve_impl(impl, x) != "triton":
        return None
    kernels = mixed_kernels.kernel_routing(routing)
    # The adapters of one routing lie on one device: a model on several runs in PyTorch.
    return kernels if kernels is not None and kernels.device == x.device else None


def _why_not_kernels(bare: bool, dtype: torch.dtype | None) -> str:
    """Returns why a mixed batch runs in PyTorch's GEMMs although there are kernels."""
    if dtype is not None:
        return f"autocast is on; give the model the dtype {dtype}"
    if not bare:
        return (
            "the kernels of mixed batches with gradients choose their tiles by the batch; call "
            "eval() and use torch.no_grad(), or train one adapter at a time"
        )
    return "an adapter has a factor that is hooked, not a plain linear, or on another device"


def _own_rows(y: torch.Tensor, inplace: bool) -> torch.Tensor:
    """Returns ``y [M, N]`` to write into: itself where that is allowed."""
    flat = y.reshape(-1, y.shape[-1])
    return flat if inplace or flat.data_ptr() != y.data_ptr() else flat.clone()


# ------------------------------------------------------------------------------------- packed


def _packed(
    layer: Any, x: torch.Tensor, routing: Routing, rows: RowRouting, number: int
) -> tuple[LayerPack, packed_forward.Plan, packed_forward.Shrunk] | None:
    """Returns the layer's packed factors, how to multiply, and its s; None where not packed."""
    group = routing.group
    members = group.siblings.of(layer, number, x)
    if not rows.segments:
        return None
    sets = routing.set_of(rows.key, Watch)
    impl = getattr(layer, "impl", "auto")
    ready = sets.ready_for(rows)
    known: _Ready | None = ready.get(number)
    if known is not None and known.serves(x, impl):
        routing.ready.update(ready)  # for all layers: the next ones need not come here
        return known.pack, known.plan, _shrunk(x, number, rows, known.pack, known.plan)
    many_rows = packed.has_many_rows(rows.slots.numel(), x.dtype)
    pack, due = sets.get(number, x.dtype, many_rows)
    if due and members is not None:
        pack = _pack(sets, members, x, routing, rows)[members.index(number)]
    if pack is None:
        return None
    plan = packed_forward.plan_for(rows, pack.layout, x.dtype)
    if plan is None:
        return None
    found = _Ready(pack, plan, rows, x.dtype, x.device, impl, sets.generation)
    routing.ready[number] = ready[number] = found
    return pack, plan, _shrunk(x, number, rows, pack, plan)


def _shrunk(
    x: torch.Tensor, number: int, rows: RowRouting, pack: LayerPack, plan: packed_forward.Plan
) -> packed_forward.Shrunk:
    """Returns s of a layer and its siblings, which the first of them computes."""
    if len(pack.members) == 1:
        return packed_forward.shrink(_flat(x), pack, plan)
    key = (rows, pack.lora_a)
    found = shared(x, number, key)
    if found is None:
        found = packed_forward.shrink(_flat(x), pack, plan)
        share(x, number, pack.members, key, found)
    return found


def _pack(
    sets: SetPack,
    members: tuple[int, ...],
    x: torch.Tensor,
    routing: Routing,
    rows: RowRouting,
) -> list[LayerPack | None]:
    """Packs the batch's adapters for a layer and its siblings."""
    many_rows = packed.has_many_rows(rows.slots.numel(), x.dtype)
    layers = [routing.group.siblings.layers[number]() for number in members]
    names = [routing.names[segment.slot] for segment in rows.segments]
    found = [_factors(member, x, routing, rows) for member in layers]
    bare = [factors for factors in found if factors is not None]
    packs: list[LayerPack | None] = [None] * len(members)
    if len(bare) == len(found):
        packs = packed.pack_layers(members, bare, x.dtype, many_rows)
    if sets.watch is not None:
        for member in filter(None, layers):
            sets.watch.add(member, names)
    sets.put(members, x.dtype, many_rows, packs)
    return packs


def _factors(
    layer: Any, x: torch.Tensor, routing: Routing, rows: RowRouting
) -> list[Factors | None] | None:
    """Returns the factors of each adapter with rows; None where they are not bare tensors."""
    if layer is None:
        return None
    slots = [segment.slot for segment in rows.segments]
    if routing.residents is not None:
        found = [routing.residents[slot].factors(layer.table_row) for slot in slots]
        return [None if f is None else Factors(f[0], f[1].t(), f[2], f[3]) for f in found]
    present, factors = layer._modules["lora_A"]._modules, list[Factors | None]()
    for slot in slots:
        name = routing.names[slot]
        if name not in present:
            factors.append(None)
            continue
        lora_b = layer.lora_B[name]
        lora_a, weight_b = plain_weight(present[name]), plain_weight(lora_b)
        dropout, scaling = layer.lora_dropout[name], layer.scaling[name]
        acts = dropout.training and type(dropout) is not nn.Identity
        if lora_a is None or weight_b is None or acts or lora_a.device != x.device:
            return None
        factors.append(Factors(lora_a, weight_b, float(scaling), lora_b.bias))
    return factors


# ------------------------------------------------------------------------------------- shares


def _shares(
    layer: Any,
    x: torch.Tensor,
    routing: Routing,
    rows: RowRouting,
    projection: int,
    without: tuple[int, ...] = (),
) -> tuple[list[mixed.Share], tuple[torch.Tensor, ...]]:
    """Returns what each adapter with rows here contributes, and all their factors in turn."""
    shares: list[mixed.Share] = []
    factors: list[torch.Tensor | None] = []
    for segment in rows.segments:
        branch = None if segment.slot in without else _branch(layer, x, routing, segment.slot)
        if branch is None:
            continue
        if branch.lora_a.device != x.device:
            check_same_device(x, lora_a=branch.lora_a, lora_b=branch.lora_b)
        seed = None
        if branch.dropout_p:
            seed = layer_seed(routing.seeds[segment.slot], projection)
        shares.append(mixed.Share(segment, branch.scaling, seed, branch.dropout_p))
        # lora_bias is scaled already.
        factors += [branch.lora_a, branch.lora_b, branch.lora_bias]
    return shares, tuple(factors)  # type: ignore[arg-type]  # a lora_bias may be None


def _branch(layer: Any, x: torch.Tensor, routing: Routing, slot: int) -> Branch | None:
    """Returns one adapter's branch, or None where the layer lacks it."""
    if routing.residents is not None:
        found = routing.residents[slot].factors(layer.table_row)
        if found is None:
            return None
        lora_a, rank_rows, scaling, lora_bias = found[:4]
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        tensor = torch.full((), scaling, dtype=exact, device=x.device)
        if lora_bias is not None:
            lora_bias = lora_bias * scaling
        return Branch(lora_a, rank_rows.t(), tensor, lora_bias, 0.0)
    name = routing.names[slot]
    if name not in layer._modules["lora_A"]._modules:
        return None
    branch = branch_of(layer, name, x)
    if branch is None:
        raise UnsupportedLayerError(why_not_fused(layer, [name]) + ", which rows cannot share")
    return branch


def _wants_grad(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
