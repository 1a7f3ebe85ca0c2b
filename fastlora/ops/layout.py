"""What operators, their fakes and their callers know of shapes: columns of s, packed gradients.

Where many slots share a batch, s and ds have one number of columns, and the gradients of a kind of
factor come as one buffer, which `split_grad_a` and `split_grad_b` take apart. Lists of factors hold
None where an adapter leaves the layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastlora.ops.factors import Factor, present

# A split of K costs a plane of s. Four keep the shrink short enough to hide behind a base GEMM.
_MAX_SPLITS = 4
# Columns of K, and rows of all planes together, from which a split is worth a program.
_SPLIT_COLUMNS = 256
_PLANE_ROWS = 16384


def max_rank(factors: Sequence[Factor], rank_dim: int) -> int:
    """Returns the largest rank, 1 at least."""
    return max(1, *(factor.shape[rank_dim] for factor in factors if factor is not None))


def columns_of(largest: int) -> int:
    """Returns R, the columns of s and ds, for the largest rank."""
    return max(-(-largest // 16) * 16, 16)


def planes_shape(
    m: int, k: int, modules: int, largest: int, batch_invariant: bool = False
) -> tuple[int, int, int, int]:
    """Returns the shape of a shrink's planes: splits of K, modules, rows, ranks.

    The splits depend on no chip and no mix, so that a fake knows them. Sizes may be symbolic.
    """
    splits = torch.sym_min(k // _SPLIT_COLUMNS, _MAX_SPLITS)
    if not batch_invariant:
        splits = torch.sym_min(splits, -(-_PLANE_ROWS // torch.sym_max(m, 1)))
    return torch.sym_max(splits, 1), modules, m, -(-largest // 16) * 16


def layout(factors: Sequence[torch.Tensor]) -> tuple[list[int], int]:
    """Returns where the gradient of each factor begins in the buffer, and the buffer's end."""
    return _offsets([factor.numel() for factor in factors], factors[0].itemsize)


def layout_b(
    lora_b: Sequence[torch.Tensor], with_bias: Sequence[bool]
) -> tuple[list[int], list[int], int]:
    """Returns the offsets of lora_b's gradients and of lora_bias's, -1 for none, and the end."""
    biases = [b.shape[0] if has else 0 for b, has in zip(lora_b, with_bias, strict=True)]
    offsets, end = _offsets([*(b.numel() for b in lora_b), *biases], lora_b[0].itemsize)
    bias_offsets = [
        at if has else -1 for at, has in zip(offsets[len(lora_b) :], with_bias, strict=True)
    ]
    return offsets[: len(lora_b)], bias_offsets, end


def split_grad_b(
    packed: torch.Tensor, lora_b: Sequence[Factor], with_bias: Sequence[bool]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Returns d_lora_b ``[N, rank]`` and d_lora_bias ``[N]`` of each slot, views of ``packed``."""
    ups = present(lora_b, 1)
    offsets, bias_offsets, _ = layout_b(ups, with_bias)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for tensor, at, bias_at in zip(ups, offsets, bias_offsets, strict=True):
        gradient = packed[at : at + tensor.numel()].view(tensor.shape)
        bias = None if bias_at < 0 else packed[bias_at : bias_at + tensor.shape[0]]
        found.append((gradient, bias))
    return found


def split_grad_a(packed: torch.Tensor, lora_a: Sequence[Factor]) -> list[torch.Tensor]:
    """Returns d_lora_a ``[rank, K]`` of each slot and module, views of ``packed``."""
    downs = present(lora_a, 0)
    offsets, _ = layout(downs)
    return [
        packed[at : at + tensor.numel()].view(tensor.shape)
        for tensor, at in zip(downs, offsets, strict=True)
    ]


def _offsets(sizes: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Returns where blocks of so many elements begin, each at a multiple of 16 bytes; the end."""
    each = 16 // itemsize
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // each) * each
    return offsets, end
