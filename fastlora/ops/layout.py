"""Shapes on which operators, their fake implementations, and their callers agree.

In a batch of several slots, s and ds have the same number of columns for all slots. The gradients
of all lora_a are packed into one buffer, and so are the gradients of all lora_b and lora_bias.
`split_grad_a` and `split_grad_b` return views of these buffers. A list of factors contains None for
an adapter that does not adapt the layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.factors import Factor, replace_missing_with_empty

_Offsets = list[int]

# Each split of K adds a split-K partial sum of s. With at most four splits, the shrink is still
# short enough to hide behind a base GEMM.
_MAX_SPLITS = 4
# A split pays for an additional program if it has this many columns of K, and if the split-K
# partial sums have at most about this many rows together.
_SPLIT_COLUMNS = 256
_MAX_PARTIAL_ROWS = 16384


def max_rank(factors: Sequence[Factor], rank_dim: int) -> int:
    """Return the largest rank among the factors.

    The result is 1 if there are no factors.
    """
    return max(1, *(factor.shape[rank_dim] for factor in factors if factor is not None))


def rank_to_multiple_of_16(largest_rank: int) -> int:
    """Return the largest rank, rounded up to a multiple of 16.

    The result is at least 16. In a mixed batch, operators give s and ds this number of columns.
    """
    return max(-(-largest_rank // 16) * 16, 16)


def shrink_partials_shape(
    m: int, k: int, modules: int, largest: int, batch_invariant: bool = False
) -> tuple[int, int, int, int]:
    """Return the shape of the split-K partial sums of a shrink operation.

    The shape is (splits, modules, rows, columns). The number of splits depends neither on the chip
    nor on the adapters of the rows, so that a fake implementation can compute it. Sizes may be
    symbolic.
    """
    from fastlora.kernels.config_tables import MAX_PARTIAL_BYTES

    columns = -(-largest // 16) * 16
    splits = torch.sym_min(k // _SPLIT_COLUMNS, _MAX_SPLITS)
    if not batch_invariant:
        rows = torch.sym_max(m, 1)
        splits = torch.sym_min(splits, -(-_MAX_PARTIAL_ROWS // rows))
        size = torch.sym_max(4 * modules * rows * columns, 1)
        splits = torch.sym_min(splits, MAX_PARTIAL_BYTES // size)
    return torch.sym_max(splits, 1), modules, m, columns


def grad_a_buffer_layout(lora_a: Sequence[torch.Tensor]) -> tuple[_Offsets, int]:
    """Return the layout of a shared buffer for the gradients of all lora_a factors.

    The result is a tuple (offsets, size). ``offsets`` has the offset of each gradient in the
    buffer. All values are in elements.
    """
    return _offsets_aligned_to_16_bytes([a.numel() for a in lora_a], lora_a[0].itemsize)


def grad_b_buffer_layout(
    lora_b: Sequence[torch.Tensor], with_bias: Sequence[bool]
) -> tuple[_Offsets, _Offsets, int]:
    """Return the layout of a buffer into which all lora_b and lora_bias gradients are packed.

    The result is a tuple (lora_b offsets, lora_bias offsets, size). Each list contains one offset
    per slot, which is -1 for a lora_bias that does not exist. All values are in elements.
    """
    biases = [b.shape[0] if has else 0 for b, has in zip(lora_b, with_bias, strict=True)]
    offsets, end = _offsets_aligned_to_16_bytes(
        [*(b.numel() for b in lora_b), *biases], lora_b[0].itemsize
    )
    bias_offsets = [
        at if has else -1 for at, has in zip(offsets[len(lora_b) :], with_bias, strict=True)
    ]
    return offsets[: len(lora_b)], bias_offsets, end


def split_grad_b(
    packed: torch.Tensor, lora_b: Sequence[Factor], with_bias: Sequence[bool]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Split packed gradients into the lora_b gradient and the lora_bias gradient of each slot.

    The result has one pair (lora_b gradient, lora_bias gradient) for each item of ``lora_b``, which
    has one item per slot. The gradients are views of the buffer ``packed``. The second item of a
    pair is None if there is no lora_bias.
    """
    ups = replace_missing_with_empty(lora_b, 1)
    offsets, bias_offsets, _ = grad_b_buffer_layout(ups, with_bias)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for tensor, at, bias_at in zip(ups, offsets, bias_offsets, strict=True):
        gradient = packed[at : at + tensor.numel()].view(tensor.shape)
        bias = None if bias_at < 0 else packed[bias_at : bias_at + tensor.shape[0]]
        found.append((gradient, bias))
    return found


def split_grad_a(packed: torch.Tensor, lora_a: Sequence[Factor]) -> list[torch.Tensor]:
    """Split packed lora_a gradients into one gradient for each factor.

    Each gradient is a view ``[rank, K]`` of the buffer ``packed``.
    """
    downs = replace_missing_with_empty(lora_a, 0)
    offsets, _ = grad_a_buffer_layout(downs)
    return [
        packed[at : at + tensor.numel()].view(tensor.shape)
        for tensor, at in zip(downs, offsets, strict=True)
    ]


def _offsets_aligned_to_16_bytes(sizes: Sequence[int], itemsize: int) -> tuple[_Offsets, int]:
    """Return 16-byte-aligned offsets for blocks of the given sizes, and the total size.

    The result is a tuple, in elements of ``itemsize`` bytes.
    """
    each = 16 // itemsize
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // each) * each
    return offsets, end
