"""From a batch's routing to the products of one layer.

Three ways, the same result to rounding, but for what a dropout draws:

- kernels: where the Triton kernels run, with gradients and dropout (`mixed_training`) or without.
- packed: without gradients elsewhere, from the second time on that a set of adapters comes
  (`mixed_packed`).
- shares: with gradients or dropout elsewhere, and the first time: each adapter's factors as they
  are.
"""

from __future__ import annotations

import torch

from fastlora import functional
from fastlora.autograd.linear import records_gradients
from fastlora.layers import (
    dora_rows,
    mixed_graph,
    mixed_kernels,
    mixed_packed,
    mixed_siblings,
    mixed_training,
)
from fastlora.layers.absent import with_absent, with_all_absent
from fastlora.layers.compute import NOT_OUR_GEMM
from fastlora.layers.factors import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.ops import schema as ops
from fastlora.ops.factors import Slots, Tables
from fastlora.ops.invariant import invariant_impl, is_batch_invariant, refuse_in_mode
from fastlora.ops.rows import Rows
from fastlora.ops.torch import packed_forward
from fastlora.routing.routing import Routing
from fastlora.validation import (
    AdapterStateError,
    ImplementationError,
    check_same_device,
)


def mixed_forward(
    layer: AdapterLayer,
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
    dora = dora_rows.dora_slots(layer, routing)
    dropped = () if dora is None else dora.dropped
    y = _mixed_forward(layer, x, weight, bias, routing, projection, dropped)
    return y if dora is None else _with_dora(layer, y, x, routing, dora, projection)


def _mixed_forward(
    layer: AdapterLayer,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    routing: Routing,
    projection: int,
    without: tuple[int, ...],
) -> torch.Tensor:
    """`mixed_forward` before DoRA's scales; slots of ``without`` get the base layer only."""
    y = mixed_packed.run_again(layer, x, weight, bias, routing, projection)
    if y is not None:
        return y
    check_unmerged(layer)
    given, dtype = x, functional.autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    elif weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    invariant = is_batch_invariant()
    bare = dtype is None and _without_gradients(layer, routing, x, weight, bias)
    if bare:
        tables = _tables(layer, x, routing)
        if tables is not None:
            plan = "invariant" if invariant else "auto"
            return mixed_kernels.linear(layer, x, weight, bias, routing, tables, projection, plan)
    _refuse_captured(routing, bare, dtype)
    if invariant:
        refuse_in_mode(layer, _why_not_kernels(bare, dtype))
    if not bare:
        own = mixed_training.slots_for_kernels(layer, x, routing, without)
        if own is not None:
            s = mixed_siblings.shared_shrink(layer, given, x, routing, projection, own)
            y = mixed_training.mixed_run(
                x, weight, bias, None, routing, projection, own, "triton", s=s
            )
            return with_all_absent(layer, y, x, routing)
    if bare:
        rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
        found = mixed_packed.find_packed(layer, x, routing, rows, projection)
        if found is not None:
            y = packed_forward.linear(mixed_packed.flat(x), weight, bias, rows, *found)
            return y.view(*x.shape[:-1], weight.shape[0])
    rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
    slots = _present(layer, x, routing, rows, without)
    if not bare:
        mixed_siblings.note_apart(layer, given)
    y = mixed_training.mixed_run(
        *(x, weight, bias, None, routing, projection, slots, "eager", rows.present), rows=rows
    )
    return with_absent(layer, y, routing, rows)


def check_unmerged(layer: AdapterLayer) -> None:
    """Raises `AdapterStateError` where adapters are merged into the weights of a layer."""
    if layer.merged_adapters:
        raise AdapterStateError(
            f"adapters {layer.merged_adapters} were merged into the base weights within the block, "
            "where every row shares them; unmerge them first"
        )


def mixed_added_forward(
    layer: AdapterLayer,
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
    dora = dora_rows.dora_slots(layer, routing)
    dropped = () if dora is None else dora.dropped
    y = _mixed_added_forward(layer, y, x, routing, projection, inplace, dropped)
    return y if dora is None else _with_dora(layer, y, x, routing, dora, projection)


def _mixed_added_forward(
    layer: AdapterLayer,
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
    given, dtype = x, functional.autocast_dtype(x)
    x = x.to(dtype or x.dtype)
    bare = dtype is None and y.dtype == x.dtype and _without_gradients(layer, routing, x, y)
    if bare:
        tables = _tables(layer, x, routing)
        if tables is not None:
            rows_y = _own_rows(y, inplace)
            return mixed_kernels.add_(layer, rows_y, x, routing, tables, projection).view(y.shape)
    _refuse_captured(routing, bare, dtype)
    if bare:
        rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
        found = mixed_packed.find_packed(layer, x, routing, rows, projection)
        if found is not None:
            return packed_forward.add_(_own_rows(y, inplace), rows, *found).view(y.shape)
    elif y.dtype == x.dtype:
        own = mixed_training.slots_for_kernels(layer, x, routing, without)
        if own is not None:
            s = mixed_siblings.shared_shrink(layer, given, x, routing, projection, own)
            y = mixed_training.mixed_run(x, None, None, y, routing, projection, own, "triton", s=s)
            return with_all_absent(layer, y, x, routing, own=any(own.own))
    elif layer.impl == "triton":
        raise ImplementationError(
            f"impl='triton' cannot run: the base layer returned {y.dtype} for x in {x.dtype}"
        )
    rows = routing.rows(x.numel() // x.shape[-1], x.device, host=True)
    slots = _present(layer, x, routing, rows, without)
    if not bare:
        mixed_siblings.note_apart(layer, given)
    y = mixed_training.mixed_run(
        *(x, None, None, y, routing, projection, slots, "eager", rows.present), rows=rows
    )
    return with_absent(layer, y, routing, rows, own=any(slots.own))


def _with_dora(
    layer: AdapterLayer,
    y: torch.Tensor,
    x: torch.Tensor,
    routing: Routing,
    slots: dora_rows.DoraSlots,
    projection: int,
) -> torch.Tensor:
    """Scales the rows of adapters that use DoRA, and runs those whose dropout acts."""
    x = x.to(functional.autocast_dtype(x) or x.dtype)
    if _by_pool_kernels(layer, y, x, routing):
        return dora_rows.scale_pool_rows_(layer, y, routing)
    return dora_rows.dora_rows(layer, y, x, routing, slots, projection)


def _without_gradients(
    layer: AdapterLayer, routing: Routing, *tensors: torch.Tensor | None
) -> bool:
    """Whether no gradient is recorded and no dropout can act."""
    if routing.captured:  # of a pool, whose adapters drop nothing
        return not records_gradients(*tensors)
    if layer.training:
        return False
    # A pool's factors have no gradients; those of parameters are not asked one by one.
    return not torch.is_grad_enabled() or (
        routing.residents is not None and not records_gradients(*tensors)
    )


def _tables(layer: AdapterLayer, x: torch.Tensor, routing: Routing) -> Tables | None:
    """Returns where kernels find the factors; None where kernels do not run."""
    if is_batch_invariant():
        invariant_impl(layer.impl, "auto", x)
    elif ops.resolve_impl(layer.impl, x) != "triton":
        return None
    tables = mixed_kernels.tables_of(routing, x)
    # The adapters of one routing lie on one device: a model on several runs in PyTorch.
    return tables if tables is not None and tables.rank.device == x.device else None


def _by_pool_kernels(
    layer: AdapterLayer, y: torch.Tensor, x: torch.Tensor, routing: Routing
) -> bool:
    """Whether kernels made y over a pool: then it may be written into."""
    if routing.residents is None or functional.autocast_dtype(x) is not None or y.dtype != x.dtype:
        return False
    bare = _without_gradients(layer, routing, x, y)
    return bare and _tables(layer, x, routing) is not None


def _refuse_captured(routing: Routing, bare: bool, dtype: torch.dtype | None) -> None:
    """Raises `AdapterStateError` where only kernels could look the adapters up, and do not run."""
    if not routing.captured:
        return
    if bare:
        why = "the layer runs without kernels"
    elif dtype is not None:
        why = f"autocast is on; give the model the dtype {dtype}"
    else:
        why = "gradients are recorded, or the base layer's output has another dtype than its input"
    raise AdapterStateError(
        f"a CUDA graph over a pool cannot be captured here: {why}; capture it within "
        "torch.no_grad() or torch.inference_mode()"
    )


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


def _present(
    layer: AdapterLayer,
    x: torch.Tensor,
    routing: Routing,
    rows: Rows,
    without: tuple[int, ...],
) -> Slots:
    """Returns the adapters that have rows; those of ``without`` are None."""
    slots = slots_of(routing.source, layer, rows.present, without)
    for factors in slots.own:
        if factors is not None and factors.lora_a.device != x.device:
            check_same_device(x, lora_a=factors.lora_a, lora_b=factors.lora_b)
    return slots
