"""Adapters on a stack of E weights in PyTorch, with separate products for the rows of each key.

Keys and shapes are as in `fastlora.ops.stacks`. Rows are sorted by key. Only keys that have rows
cost time, and nothing of the size of the stack is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.ops.execution_mode import has_unknown_values, raise_for_second_derivative
from fastlora.ops.library import define_operator, register_fake, register_implementation
from fastlora.ops.rows import Rows, Segment
from fastlora.ops.stacks import StackedWeightAdapterOperands
from fastlora.ops.torch import products, reference
from fastlora.validation import UnsupportedLayerError

# `torch.nn.functional.grouped_mm` requires that every stride is a multiple of this many bytes.
_ALIGNMENT = 16
_GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Up to this many rows per key on average, rows are converted to the dtype of the factors, and not
# the other way around. With 256 rows per key, both take the same time in bf16 on one Zen 5 core.
_FEW_ROWS = 128
# Maximum number of rows that are converted at a time. A key with more rows is converted at once.
_PART_ROWS = 512


class _KeyRangeAndRows(NamedTuple):
    """A range of (matrix, adapter) pairs, and the rows of a batch that use these pairs.

    Each pair of a matrix in the stack and an adapter has a key. The tuple contains a range of keys
    and the rows that have these keys.

    Attributes:
        keys: The range of keys.
        at: The range of the sorted positions of their rows.
        ends: int32, where the rows of each key end, counted from the first of these positions.
        segments: The keys that have rows.
    """

    keys: slice
    at: slice
    ends: torch.Tensor
    segments: Sequence[Segment]


class _RowsOfOneMatrixAndAdapter(NamedTuple):
    """The rows of a batch that use one matrix of the stack and one adapter.

    The rows share one key, which stands for this matrix and this adapter.

    Attributes:
        matrix: Index of the key's matrix in the stack.
        slot: Slot of the key's adapter.
        at: Range of the sorted positions of the rows.
        key: The key.
    """

    matrix: int
    slot: int
    at: slice
    key: int


def _rows_of_each_key(
    operands: StackedWeightAdapterOperands, rows: Rows
) -> Iterator[_RowsOfOneMatrixAndAdapter]:
    """Yield the rows of each key.

    A key stands for a pair of a matrix in the stack and an adapter. Keys without rows and keys
    whose adapter has rank 0 are omitted.
    """
    slots = len(operands.lora_a)
    for key, start, stop in rows.segments:
        matrix, slot = divmod(key, slots)
        if operands.lora_a[slot].shape[1]:
            yield _RowsOfOneMatrixAndAdapter(matrix, slot, slice(start, stop), key)


def _key_rows_after_dropout(
    x: torch.Tensor,
    operands: StackedWeightAdapterOperands,
    its: _RowsOfOneMatrixAndAdapter,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the rows of x that belong to one key, with dropout applied.

    A key stands for one matrix of the stack and one adapter. The rows are cast to ``dtype`` before
    the dropout of this adapter is applied. Every call for a key uses the same mask.
    """
    own, p = reference.cast(x[its.at], dtype), operands.dropout_p[its.slot]
    if operands.seeds is None or not p:
        return own
    return reference.lora_dropout(own, operands.seeds[its.key : its.key + 1].cpu(), p)


def add_updates_and_return_s_(
    y: torch.Tensor, x: torch.Tensor, operands: StackedWeightAdapterOperands, rows: Rows
) -> torch.Tensor:
    """Add each row's LoRA update to y in place, and return s.

    y is ``[P, N]``. s is ``[P, R]`` for the largest rank R, in `dtype_of_s`. Columns beyond a row's
    rank are not written.
    """
    dtype, columns = (
        _dtype_of_factor_products(x, operands, rows),
        max(a.shape[1] for a in operands.lora_a),
    )
    s = x.new_empty(x.shape[0], columns, dtype=dtype_of_s(x, operands))
    if _uses_grouped_mm(dtype, operands, rows):
        (lora_a,), (lora_b,) = operands.lora_a, operands.lora_b
        for part in _split_keys_into_parts(rows, dtype != x.dtype):
            own = reference.cast(x[part.at], dtype)
            product = F.grouped_mm(own, lora_a[part.keys].transpose(1, 2), offs=part.ends)
            s[part.at] = found = products.make_writable(product)
            _add_grouped_product_(y, found.mul_(operands.scaling.to(dtype)), lora_b, part)
        return s
    for its in _rows_of_each_key(operands, rows):
        lora_a = operands.lora_a[its.slot][its.matrix]
        lora_b = operands.lora_b[its.slot][its.matrix].t()
        own, scaling = s[its.at, : lora_a.shape[0]], operands.scaling[its.slot]
        found = reference.lora_shrink(_key_rows_after_dropout(x, operands, its, dtype), lora_a)
        own.copy_(found)
        if dtype == x.dtype:
            reference.lora_expand_(y[its.at], own, lora_b, scaling)
        else:
            y[its.at].add_(reference.lora_expand(found, lora_b, scaling, dtype))
    return s


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    s: torch.Tensor,
    operands: StackedWeightAdapterOperands,
    rows: Rows,
    wants_x: bool,
    wants: Sequence[bool],
    dx: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """Return the gradients of x and of the factors.

    The result is a tuple of dx ``[P, K]`` and a list of the factors' gradients.

    Args:
        dy: ``[P, N]``.
        x: ``[P, K]``, or None if no gradient of a lora_a is wanted.
        s: The result of `add_updates_and_return_s_`.
        operands: The adapters.
        rows: The sorted rows.
        wants_x: Whether dx is wanted.
        wants: Whether the gradients of lora_a and lora_b of each adapter in turn are wanted.
        dx: The dx of the base product, to which the dx of the LoRA update is added in place.
    """
    if wants_x and dx is None:
        dx = dy.new_zeros(dy.shape[0], operands.lora_a[0].shape[2])
    dtype = _dtype_of_factor_products(dy, operands, rows)
    if _uses_grouped_mm(dtype, operands, rows):
        return dx, _factor_gradients_by_grouped_mm(dy.contiguous(), x, s, operands, rows, dx, wants)
    pairs = zip(operands.lora_a, operands.lora_b, strict=True)
    factors = [factor for pair in pairs for factor in pair]
    found = [
        torch.zeros_like(factor) if wanted else None
        for factor, wanted in zip(factors, wants, strict=True)
    ]
    for its in _rows_of_each_key(operands, rows):
        scaling = operands.scaling[its.slot]
        lora_a = operands.lora_a[its.slot][its.matrix]
        d_lora_a, d_lora_b = found[2 * its.slot : 2 * its.slot + 2]
        own_dy, own_s = reference.cast(dy[its.at], dtype), s[its.at, : lora_a.shape[0]]
        if d_lora_b is not None:
            scaled = reference.cast(own_s, dtype) * scaling
            products.mm_into_(d_lora_b[its.matrix], scaled.t(), own_dy)
        if dx is None and d_lora_a is None:
            continue
        lora_b = operands.lora_b[its.slot][its.matrix].t()
        ds = reference.lora_ds(own_dy, lora_b, scaling)
        if d_lora_a is not None and x is not None:
            products.mm_into_(
                d_lora_a[its.matrix], ds.t(), _key_rows_after_dropout(x, operands, its, dtype)
            )
        if dx is not None:
            _add_dx_(dx[its.at], ds, reference.cast(lora_a, dtype), operands, its)
    return dx, found


def dtype_of_s(x: torch.Tensor, operands: StackedWeightAdapterOperands) -> torch.dtype:
    """Return the dtype of the shrink output s for adapters on a stack of weights.

    The dtype is fp32 if x is a 16-bit tensor on a CPU and a factor is in fp32. Otherwise, it is the
    dtype of x. The dtype does not depend on the rows, which have no values when a graph is traced.
    """
    factors = (*operands.lora_a, *operands.lora_b)
    is_wider = x.is_cpu and x.itemsize == 2 and any(f.dtype == torch.float32 for f in factors)
    return torch.float32 if is_wider else x.dtype


def _dtype_of_factor_products(
    x: torch.Tensor, operands: StackedWeightAdapterOperands, rows: Rows
) -> torch.dtype:
    """Return the dtype in which products with the factors are computed.

    This is `dtype_of_s` if keys have few rows, and otherwise the dtype of x. A few rows take less
    time to convert than the factors of their key.
    """
    has_few_rows = rows.m <= _FEW_ROWS * len(rows.segments)
    return dtype_of_s(x, operands) if has_few_rows else x.dtype


def _uses_grouped_mm(
    dtype: torch.dtype, operands: StackedWeightAdapterOperands, rows: Rows
) -> bool:
    """Return whether to compute grouped products with `torch.nn.functional.grouped_mm`.

    The products are those with lora_a and lora_b. The result is True only if there is a single
    adapter, which has no dropout and has factors in the dtype of the products. For 8,192 rows on
    128 matrices ``[384, 512]`` and rank 16 in fp32, a training step takes 11 % less time than with
    a product for each key.
    """
    (lora_a, *others), lora_b = operands.lora_a, operands.lora_b[0]
    _, rank, k = lora_a.shape
    sizes = rank, k, lora_b.shape[2]
    return (
        not others
        and operands.seeds is None
        and lora_a.is_cpu
        and lora_a.dtype == lora_b.dtype == dtype
        and _grouped_mm_is_fast_for_dtype(lora_a)
        and lora_a.stride(-1) == 1
        and lora_b.stride(-1) == 1
        and all(size and size * lora_a.itemsize % _ALIGNMENT == 0 for size in sizes)
        and not rows.has_rows_without_slot
    )


def _split_keys_into_parts(rows: Rows, converts_rows: bool) -> list[_KeyRangeAndRows]:
    """Split the keys into contiguous parts.

    The function returns a list of the parts, which are processed one by one. Each key stands for
    one matrix of the stack and one adapter. If ``converts_rows`` is False, there is one part with
    all keys. Otherwise, the rows of each part are converted to another dtype. A part then has up to
    `_PART_ROWS` rows, to limit the memory of the converted rows. A key with more rows is a part of
    its own.
    """
    ends = rows.slot_start[1:]
    if not converts_rows or rows.m <= _PART_ROWS:
        return [_KeyRangeAndRows(slice(0, rows.slots), slice(0, rows.m), ends, rows.segments)]
    parts, segments, key = list[_KeyRangeAndRows](), rows.segments, 0
    while segments:
        start = segments[0].start
        own = [each for each in segments if each.stop - start <= _PART_ROWS] or [segments[0]]
        segments = segments[len(own) :]
        keys = slice(key, own[-1].slot + 1 if segments else rows.slots)
        parts.append(_KeyRangeAndRows(keys, slice(start, own[-1].stop), ends[keys] - start, own))
        key = keys.stop
    return parts


def _add_grouped_product_(
    out: torch.Tensor, mat: torch.Tensor, factor: torch.Tensor, part: _KeyRangeAndRows
) -> None:
    """Add a grouped matrix product to a tensor in place.

    The product of ``mat`` and ``factor`` is added to ``out``. The rows of ``mat`` that share a key
    form a group, and are multiplied by the matrix of ``factor`` for this key. The keys are those of
    ``part``. ``factor`` is lora_b in the forward pass and lora_a in the backward pass. ``out``
    contains all rows, and ``mat`` contains only the rows of the part.
    """
    if out.dtype != mat.dtype:
        out[part.at].add_(F.grouped_mm(mat, factor[part.keys], offs=part.ends))
        return
    own_y = out[part.at]
    for key, start, stop in part.segments:  # A sum of two results would be another pass.
        at = slice(start - part.at.start, stop - part.at.start)
        own_y[at].addmm_(mat[at], factor[key])


def _factor_gradients_by_grouped_mm(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    s: torch.Tensor,
    operands: StackedWeightAdapterOperands,
    rows: Rows,
    dx: torch.Tensor | None,
    wants: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Return the gradients of stacked factors, computed with grouped matrix products.

    There must be only one adapter, whose lora_a and lora_b are the factors. The adapter's
    contribution is also added to dx in place, unless dx is None. The arguments are those of
    `gradients`. Each gradient of a factor takes one grouped product for all keys of a part.
    """
    (lora_a,), (lora_b,) = operands.lora_a, operands.lora_b
    dtype = lora_a.dtype
    scaling, parts = operands.scaling.to(dtype), _split_keys_into_parts(rows, dtype != dy.dtype)
    d_lora_a, d_lora_b = list[torch.Tensor](), list[torch.Tensor]()
    for part in parts:
        own_dy = reference.cast(dy[part.at], dtype)
        if wants[1]:
            scaled = reference.cast(s[part.at], dtype) * scaling
            d_lora_b.append(F.grouped_mm(scaled.t(), own_dy, offs=part.ends))
        if dx is None and not wants[0]:
            continue
        up = lora_b[part.keys].transpose(1, 2)
        ds = F.grouped_mm(own_dy, up, offs=part.ends).mul_(scaling)
        if wants[0] and x is not None:
            own_x = reference.cast(x[part.at], dtype)
            d_lora_a.append(F.grouped_mm(ds.t(), own_x, offs=part.ends))
        if dx is not None:
            _add_grouped_product_(dx, ds, lora_a, part)
    return [_concatenated_gradients(d_lora_a), _concatenated_gradients(d_lora_b)]


def _concatenated_gradients(parts: list[torch.Tensor]) -> torch.Tensor | None:
    """Concatenate the parts of a stacked factor's gradient.

    ``parts`` contains one part for each range of keys. The result is None if there are no parts.
    """
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0] if parts else None


def _add_dx_(
    dx: torch.Tensor,
    ds: torch.Tensor,
    lora_a: torch.Tensor,
    operands: StackedWeightAdapterOperands,
    its: _RowsOfOneMatrixAndAdapter,
) -> None:
    """Add the contribution of one key's LoRA update to dx in place.

    dx is the gradient with respect to x, and contains only the rows of the key. Dropout applies to
    the contribution, not to the values that dx already contains.
    """
    p = operands.dropout_p[its.slot]
    if operands.seeds is None or not p:
        products.addmm_(dx, ds, lora_a)
        return
    update, seed = products.mm(ds, lora_a), operands.seeds[its.key : its.key + 1].cpu()
    keep = reference.draw_keep_mask(update, seed, p)
    dx.add_(reference.zero_dropped_(update, keep), alpha=1 / (1 - p))


# ------------------------------------------------------------------------------- the base product


def grouped_linear(
    x: torch.Tensor, stack: torch.Tensor, rows: Rows, num_adapter_slots: int = 1
) -> torch.Tensor:
    """Multiply each row of x by its matrix from a stack, as in a grouped linear layer.

    The stack has one matrix for each group of rows. The result is a tensor ``[P, N]``, which
    contains the product of each row and the transpose of its group's matrix.

    Rows of x that belong to no matrix come last. The results of these rows and the gradients
    with respect to these rows are undefined, and may be uninitialized.

    Args:
        x: ``[P, K]``, sorted by key, in the dtype of the stack.
        stack: ``[E, N, K]``, any strides.
        rows: The sorted rows.
        num_adapter_slots: Number of adapters S, with which keys were made.
    """
    made: torch.Tensor = _GroupedMatmul.apply(x, stack, rows.slot_start[::num_adapter_slots])
    return made


def grouped_products(x: torch.Tensor, stack: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Multiply each group of rows of x by the group's own matrix in the stack.

    The matrix is transposed, as the weight of a linear layer is. The result is a tensor ``[P, N]``,
    as in `grouped_linear`, but autograd is not supported.

    ``starts [E + 1]`` contains the position at which the rows of each matrix start, followed by the
    number of rows that belong to any matrix.
    """
    if _supports_grouped_mm(x, stack):
        made = F.grouped_mm(x, stack.transpose(1, 2), offs=starts[1:].contiguous())
        return products.make_writable(made)
    y = x.new_zeros(x.shape[0], stack.shape[1])
    for matrix, at in _spans(starts):
        y[at] = products.linear(x[at], stack[matrix])
    return y


def _supports_grouped_mm(x: torch.Tensor, stack: torch.Tensor) -> bool:
    """Return whether `torch.nn.functional.grouped_mm` supports the operands.

    The result is also False if the processor emulates the dtype, because the functions in
    `fastlora.ops.torch.products` may be faster for such a dtype.
    """
    is_dense = stack.is_contiguous() or stack.transpose(1, 2).is_contiguous()
    if not _grouped_mm_is_fast_for_dtype(x) or not x.is_contiguous() or not is_dense:
        return False
    sizes = (x.shape[1], stack.shape[1], x.data_ptr(), stack.data_ptr())
    widths = x.itemsize, x.itemsize, 1, 1
    return all(size * width % _ALIGNMENT == 0 for size, width in zip(sizes, widths, strict=True))


def _grouped_mm_is_fast_for_dtype(x: torch.Tensor) -> bool:
    """Return whether `torch.nn.functional.grouped_mm` is fast for x's dtype.

    The result is False if PyTorch does not have `grouped_mm`, if `grouped_mm` does not support the
    dtype, or if the processor emulates the dtype.
    """
    emulated = x.dtype in products.EMULATED
    return x.dtype in _GROUPED_DTYPES and hasattr(F, "grouped_mm") and not emulated


class _GroupedMatmul(torch.autograd.Function):
    """Autograd function for the grouped matrix product of rows and stacked weights.

    Each row of x is multiplied by its matrix in the stack. The class implements `grouped_linear`,
    and accepts operands that `torch.nn.functional.grouped_mm` does not. Unlike the backward
    pass of `grouped_mm`, the backward pass of this class supports expanded gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, stack: torch.Tensor, starts: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x if stack.requires_grad else None, stack, starts)
        return grouped_products_or_operator(x)(x, stack, starts)

    @staticmethod
    def backward(
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        if torch.is_grad_enabled():
            raise_for_second_derivative()
        x, stack, starts = ctx.saved_tensors
        return *grouped_gradients(dy, x, stack, starts, *ctx.needs_input_grad[:2]), None


def grouped_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    stack: torch.Tensor,
    starts: torch.Tensor,
    wants_x: bool,
    wants_stack: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of `grouped_products` with respect to x and the stack.

    A gradient that is not wanted is None. x may be None if the gradient of the stack is not wanted.
    """
    dy = dy.contiguous()
    dx = grouped_products_or_operator(dy)(dy, stack.transpose(1, 2), starts) if wants_x else None
    if not wants_stack or x is None:
        return dx, None
    if has_unknown_values(dy):
        raise UnsupportedLayerError(
            "torch.compile does not support gradients of a stack of weights; freeze it"
        )
    d_stack = torch.zeros_like(stack)
    for matrix, at in _spans(starts):
        d_stack[matrix] = products.mm(dy[at].t(), x[at])
    return dx, d_stack


def grouped_products_or_operator(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return `grouped_products` or the registered operator of the same name.

    The operator is returned only if the values of x are unknown. The values are unknown if a
    compiler is tracing operations on x, or if x is on the meta device.
    """
    registered: Callable[..., torch.Tensor] = torch.ops.fastlora.grouped_products
    return registered if has_unknown_values(x) else grouped_products


define_operator("grouped_products(Tensor x, Tensor stack, Tensor starts) -> Tensor")
register_implementation("grouped_products")(grouped_products)


@register_fake("grouped_products")
def _(x: torch.Tensor, stack: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], stack.shape[1])


def _spans(matrix_starts: torch.Tensor) -> list[tuple[int, slice]]:
    """Return the range of rows of each matrix.

    The result is a list of tuples (index of the matrix, range of rows). Matrices without rows are
    omitted.
    """
    ends = matrix_starts.tolist()
    pairs = enumerate(zip(ends, ends[1:], strict=False))
    return [(matrix, slice(*pair)) for matrix, pair in pairs if pair[0] < pair[1]]
