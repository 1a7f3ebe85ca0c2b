"""Implementations of the registered operators for mixed batches in PyTorch.

Compiled graphs call them, because they cannot read the rows of a mixed batch. The arguments are as
in `fastlora.ops.schema`, and `fastlora.ops.torch.segments` computes the products. Addresses in
tables must be addresses of this process's memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from fastlora.ops.factors import (
    PENDING,
    Base,
    Factor,
    LayerAdapterOperands,
    replace_missing_with_empty,
)
from fastlora.ops.layout import (
    grad_a_buffer_layout,
    grad_b_buffer_layout,
    split_grad_a,
    split_grad_b,
)
from fastlora.ops.rows import Rows, rows_from_tensors
from fastlora.ops.torch import reference, segments

_Tensors = Sequence[torch.Tensor]
_Factors = Sequence[Factor]
_DsPackedGradBEmpty = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def keep(
    like: torch.Tensor, seed: torch.Tensor, dropout_p: float, dependency: torch.Tensor | None
) -> torch.Tensor:
    """Return the mask of the elements that dropout keeps.

    It is the PyTorch implementation's mask for the shape and dtype of ``like``.
    """
    return reference.draw_keep_mask(like, seed, dropout_p)


def _operands_per_module(
    lora_a: _Factors, modules: int, seeds: torch.Tensor | None, dropout_p: Sequence[float]
) -> list[LayerAdapterOperands]:
    """Split an operator's arguments into one group of operands per module.

    The operands of a module contain the lora_a factors, the dropout seeds, and the dropout
    probabilities of the adapters on this module.
    """
    downs, slots = replace_missing_with_empty(lora_a, 0), len(lora_a) // modules
    found = []
    for start in range(0, len(downs), slots):
        own = slice(start, start + slots)
        own_seeds = None if seeds is None else seeds[own]
        found.append(segments.shrink_operands(downs[own], own_seeds, dropout_p[own]))
    return found


def shrink(
    x: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    modules: int,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> torch.Tensor:
    """Return the shrink output s, computed with each row's own adapter.

    s contains the shrink outputs of all modules. For G modules, s has the shape ``[G, M, R]``.
    """
    return segments.shrink(
        x, _operands_per_module(lora_a, modules, seeds, dropout_p), rows_from_tensors(rows)
    )


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: _Tensors,
    s: torch.Tensor | None,
    factors: _Factors,
    scaling: torch.Tensor,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    plan: str,
) -> list[torch.Tensor]:
    """Compute the output of a linear layer, including the LoRA update of each row's adapter.

    The batch is mixed: its rows may use different adapters. The result is a list of the output y
    and, unless s is given, the shrink output s.
    """
    own = shrink(x, rows, factors[::3], 1, seeds, dropout_p)[0] if s is None else s
    operands = segments.expand_operands(
        replace_missing_with_empty(factors[1::3], 1), factors[2::3], scaling
    )
    y, _ = segments.forward(x, Base(weight, bias), operands, rows_from_tensors(rows), own)
    return [y, own] if s is None else [y]


def expand_(
    y: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    lora_b: _Factors,
    lora_bias: _Factors,
    scaling: torch.Tensor,
) -> None:
    """Add the LoRA update of each row's adapter to y in place, including the LoRA bias.

    The update of a row is ``scaling * (s @ lora_b.T + lora_bias)``.

    Args:
        y: ``[M, N]``.
        s: The shrink output.
        rows, lora_b, lora_bias: As in `fastlora.ops.schema`.
        scaling: One number per adapter.
    """
    # x is not read if s is given.
    _add_(
        y,
        y,
        segments.expand_operands(replace_missing_with_empty(lora_b, 1), lora_bias, scaling),
        rows_from_tensors(rows),
        s,
    )


def _add_(
    y: torch.Tensor,
    x: torch.Tensor,
    operands: LayerAdapterOperands,
    rows: Rows,
    s: torch.Tensor | None = None,
) -> None:
    segments.forward(x, Base(y=y, inplace=True), operands, rows, s)


def grad_b(
    dy: torch.Tensor,
    s: torch.Tensor,
    rows: _Tensors,
    run: int,
    lora_b: _Factors,
    with_bias: Sequence[bool],
    scaling: torch.Tensor,
    with_factors: bool,
) -> _DsPackedGradBEmpty:
    """Return ds and the packed gradients of lora_b and lora_bias for a mixed batch.

    The result is a tuple of three items. The first item, ds, is the gradient of s. The second item
    is one buffer into which all gradients of lora_b and lora_bias are packed. The buffer is empty
    unless ``with_factors`` is set. The third item stands for the column sums of dy. This tensor is
    empty for a mixed batch, because the operator returns column sums only for one slot.
    """
    batch, ups = rows_from_tensors(rows), replace_missing_with_empty(lora_b, 1)
    packed = ups[0].new_zeros(grad_b_buffer_layout(ups, with_bias)[2] if with_factors else 0)
    # Only the dtype of a lora_bias is read.
    biases = [b if has else None for b, has in zip(ups, with_bias, strict=True)]
    operands, wants = (
        segments.expand_operands(ups, biases, scaling),
        [with_factors] * (3 * len(ups)),
    )
    ds, *found = segments.grad_b(batch.sorted(dy), s, operands, batch, wants)
    if with_factors:
        parts = zip(*split_grad_b(packed, ups, with_bias), strict=True)
        for own_parts, own in zip(parts, found, strict=True):
            _write(own_parts, own)
    return ds, packed, dy.new_empty(0, dtype=torch.float32)


def grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor | None,
    ds: torch.Tensor,
    rows: _Tensors,
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
    plan: str,
) -> torch.Tensor:
    """Return the gradient of x.

    If weight is None, the result is only the adapters' contribution to the gradient.
    """
    operands, batch = (
        segments.shrink_operands(replace_missing_with_empty(lora_a, 0), seeds, dropout_p),
        rows_from_tensors(rows),
    )
    return segments.grad_x(batch.sorted(dy), weight, ds, operands, batch)


def grad_a(
    x: torch.Tensor,
    ds: _Tensors,
    rows: _Tensors,
    run: int,
    lora_a: _Factors,
    seeds: torch.Tensor | None,
    dropout_p: Sequence[float],
) -> list[torch.Tensor]:
    """Return the gradients of the adapters' lora_a.

    The result is a list that contains one buffer with the gradients of all modules.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    packed, layers = (
        downs[0].new_zeros(grad_a_buffer_layout(downs)[1]),
        _operands_per_module(downs, len(ds), seeds, dropout_p),
    )
    found = segments.grad_a(x, ds, layers, rows_from_tensors(rows), [True] * len(downs))
    _write(split_grad_a(packed, downs), found)
    return [packed]


def _write(parts: _Factors, gradients: _Factors) -> None:
    for part, gradient in zip(parts, gradients, strict=True):
        if part is not None and gradient is not None:
            part.copy_(gradient)


# ------------------------------------------------------------------------------- factors by address


def add_at_(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: _Tensors,
    tables: _Tensors,
    index: int,
    max_rank: int,
    factor_dtype: torch.dtype,
) -> None:
    """Add each row's LoRA update to y in place, using tables of the factors' addresses.

    Each row of y gets the update of its own adapter, which is computed from the same row of the
    layer's input x. ``index`` is the layer's row in the tables.
    """
    a_address, b_address, ranks, _, *biases = (table[index].tolist() for table in tables)
    batch, k, n = rows_from_tensors(rows), x.shape[1], y.shape[1]
    slots = tuple(slot for slot in batch.used_slots if ranks[slot])
    lora_a = [
        cpu_tensor_at_address(a_address[slot], (ranks[slot], k), factor_dtype) for slot in slots
    ]
    lora_b = [
        cpu_tensor_at_address(b_address[slot], (ranks[slot], n), factor_dtype).t() for slot in slots
    ]
    lora_bias: list[Factor] = [None] * len(slots)
    for place, slot in enumerate(slots):
        if biases and biases[0][slot]:
            lora_bias[place] = cpu_tensor_at_address(biases[0][slot], (n,), factor_dtype)
    scaling, none = tables[3][index, list(slots)], (0.0,) * len(slots)
    _add_(y, x, LayerAdapterOperands(lora_a, lora_b, lora_bias, scaling, none, None, slots), batch)


def scale_(
    y: torch.Tensor,
    included_bias: torch.Tensor | None,
    rows: _Tensors,
    dora_scale_address: torch.Tensor,
    index: int,
) -> None:
    """Scale the rows of y in place by the DoRA scales of their adapters.

    The bias that is included in y stays unscaled. Only rows of DoRA adapters are changed. Each of
    these rows becomes ``(y - included_bias) * scale + included_bias``, because y includes the base
    layer's bias. If ``included_bias`` is None, y includes no bias. Rows of adapters with the
    address `PENDING` become NaN.
    """
    if not y.numel():
        return
    batch, shift = (
        rows_from_tensors(rows),
        None if included_bias is None else included_bias.to(y.dtype),
    )
    for slot, start, stop in batch.segments:
        own, address = batch.order[start:stop].long(), int(dora_scale_address[index, slot])
        if address == PENDING:
            y[own] = float("nan")
        elif address:
            scale, part = cpu_tensor_at_address(address, (y.shape[1],), torch.float32), y[own]
            part = part if shift is None else part - shift
            # Without a wider copy of the rows, and rounded once.
            scaled = torch.mul(part, scale, out=torch.empty_like(part))
            y[own] = scaled if shift is None else scaled.add_(shift)


def cpu_tensor_at_address(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor that is a view of the process's memory at an address."""
    raw = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype).view(shape)
