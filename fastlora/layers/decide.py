"""What one forward of one layer will do: decided once, in one place, as data.

Nothing here computes; `fastlora.layers.why` says why something better does not run.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.autograd.linear import records_gradients
from fastlora.layers.factors import slots_of
from fastlora.layers.protocol import AdapterLayer
from fastlora.layers.tables import tables_of
from fastlora.layers.why import NOT_OUR_GEMM, why_not_captured, why_not_lists, why_not_tables
from fastlora.ops import backend as ops
from fastlora.ops.factors import Base, Slots, Tables
from fastlora.ops.invariant import invariant_impl, is_batch_invariant, refuse_in_mode
from fastlora.ops.rows import Rows
from fastlora.ops.torch.packed import LayerPack
from fastlora.ops.torch.packed_forward import Plan
from fastlora.routing.in_force import is_captured
from fastlora.routing.routing import Routing
from fastlora.validation import AdapterStateError, ImplementationError, check_same_device
from fastlora.weight_marks import Mark, marks


class How(enum.Enum):
    """Who computes a mixed batch: kernels that find factors by their addresses, kernels that are
    given them, or PyTorch."""

    TABLES = enum.auto()
    LISTS = enum.auto()
    PYTORCH = enum.auto()


class Decision(NamedTuple):
    """What one forward of one layer in a mixed batch will do.

    Attributes:
        how: Who computes.
        is_bare: Whether neither gradients nor dropout nor autocast are in it.
        plan: As in `fastlora.functional.lora_linear`.
        tables: For `How.TABLES`.
        slots: For `How.LISTS`, all of them.
    """

    how: How
    is_bare: bool
    plan: str = "auto"
    tables: Tables | None = None
    slots: Slots | None = None


class KeptDecision(NamedTuple):
    """That a layer runs by packed factors: found once, and used again while it holds.

    Attributes:
        pack: The factors.
        plan: How to multiply.
        rows: The rows that the plan is for.
        dtype, device: Of x.
        impl: The layer's.
        mark: The set's.
    """

    pack: LayerPack
    plan: Plan
    rows: Rows
    dtype: torch.dtype
    device: torch.device
    impl: str
    mark: Mark | None

    def serves(self, x: torch.Tensor, impl: str) -> bool:
        """Whether it was found for such an input."""
        return x.dtype is self.dtype and x.device == self.device and impl == self.impl

    def holds(self, layer: AdapterLayer, x: torch.Tensor, base: Base) -> bool:
        """Whether `decide` would come to it again."""
        like = base.y if base.weight is None else base.weight
        return not (
            layer.training
            or torch.is_grad_enabled()
            or x.dtype is not self.dtype
            or x.device != self.device
            or layer.impl != self.impl
            or like is None
            or like.dtype is not self.dtype
            or (self.mark is not marks.trained and self.mark is not None)
            or layer.merged_adapters
            or x.numel() != self.rows.m * x.shape[-1]
            or is_batch_invariant()
            or torch.is_autocast_enabled(self.device.type)
            # What a captured graph reads is pinned where it is found.
            or is_captured(x)
        )


def decide(
    layer: AdapterLayer,
    x: torch.Tensor,
    base: Base,
    routing: Routing,
    autocast: torch.dtype | None,
    without: Sequence[int],
) -> Decision:
    """Returns what a forward in a mixed batch will do.

    Args:
        layer: Holds the adapters.
        x: In the dtype that is computed in.
        base: The base layer.
        routing: The batch's.
        autocast: The dtype of autocast, where it is on.
        without: Slots whose rows others compute.

    Raises:
        AdapterStateError: An adapter is merged, or a capture over a pool would need PyTorch.
        ImplementationError: ``impl="triton"`` or the batch-invariant mode cannot run, and why.
        TypeError: The base weight's dtype is not x's.
        UnsupportedLayerError: A factor is hooked, or not a plain linear: rows cannot share it.
    """
    check_unmerged(layer)
    invariant, fits = is_batch_invariant(), base.y is None or base.y.dtype == x.dtype
    if invariant and base.weight is None:
        refuse_in_mode(layer, NOT_OUR_GEMM)
    weight = base.weight
    if weight is not None and autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, expected {x.dtype}, the dtype of x")
    bare = autocast is None and fits and without_gradients(layer, routing, x, *base[:3])
    if bare:
        tables = tables_for(layer, x, routing)
        if tables is not None:
            return Decision(How.TABLES, True, "invariant" if invariant else "auto", tables)
    if routing.captured:
        raise AdapterStateError(why_not_captured(bare, autocast))
    if invariant:
        refuse_in_mode(layer, why_not_tables(bare, autocast))
    if not bare and fits:
        slots = slots_for_kernels(layer, x, routing, without)
        if slots is not None:
            return Decision(How.LISTS, False, slots=slots)
    elif not bare and base.y is not None and layer.impl == "triton":
        raise ImplementationError(
            f"impl='triton' cannot run: the base layer returned {base.y.dtype} for x in {x.dtype}"
        )
    return Decision(How.PYTORCH, bare)


def check_unmerged(layer: AdapterLayer) -> None:
    """Raises `AdapterStateError` where adapters are merged into the weights of a layer."""
    if layer.merged_adapters:
        raise AdapterStateError(
            f"adapters {layer.merged_adapters} were merged into the base weights within the block, "
            "where every row shares them; unmerge them first"
        )


def without_gradients(layer: AdapterLayer, routing: Routing, *tensors: torch.Tensor | None) -> bool:
    """Whether no gradient is recorded and no dropout can act."""
    if routing.captured:  # of a pool, whose adapters drop nothing
        return not records_gradients(*tensors)
    if layer.training:
        return False
    # A pool's factors have no gradients; those of parameters are not asked one by one.
    return not torch.is_grad_enabled() or (
        routing.source.residents is not None and not records_gradients(*tensors)
    )


def tables_for(layer: AdapterLayer, x: torch.Tensor, routing: Routing) -> Tables | None:
    """Returns where kernels find the factors; None where kernels do not run."""
    if is_batch_invariant():
        invariant_impl(layer.impl, "auto", x)
    elif ops.resolve_impl(layer.impl, x) != "triton":
        return None
    tables = tables_of(routing, x)
    # The adapters of one routing lie on one device: a model on several runs in PyTorch.
    return tables if tables is not None and tables.rank.device == x.device else None


def slots_for_kernels(
    layer: AdapterLayer,
    x: torch.Tensor,
    routing: Routing,
    without: Sequence[int] = (),
) -> Slots | None:
    """Returns the adapters of all slots for kernels; None where PyTorch runs.

    Raises:
        ImplementationError, UnsupportedLayerError: As `decide`.
        ValueError: A factor is on another device than x.
    """
    if ops.resolve_impl(layer.impl, x) != "triton":
        return None
    slots = slots_of(routing.source, layer, range(len(routing.names)), without)
    why = why_not_lists(routing, slots)
    if why and layer.impl == "triton":
        raise ImplementationError(f"impl='triton' cannot run a mixed batch with gradients: {why}")
    if why:
        return None
    check_devices(slots, x)
    return slots


def check_devices(slots: Slots, x: torch.Tensor) -> None:
    """Raises `ValueError` where a factor is on another device than x."""
    for factors in slots.own:
        if factors is not None and factors.lora_a.device != x.device:
            check_same_device(x, lora_a=factors.lora_a, lora_b=factors.lora_b)
