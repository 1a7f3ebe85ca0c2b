"""What the operators of `fastlora.ops.mixed_grad_ops` know on the host: tables, layouts, runs of
rows.

A table is a tensor of numbers that follow from the parameters alone, so it is kept for the next
call with the same ones.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from fastlora.ops.rows import Rows
from fastlora.ops.schema import _precision

# Order, segment_of, segment_slot.
Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def train_pieces(rows: Rows) -> torch.Tensor:
    """Returns ``pieces`` of the forward's operators."""
    from fastlora.kernels.configs import TRAIN_PIECE_ROWS

    return rows.pieces(TRAIN_PIECE_ROWS)


def runs_b(rows: Rows, dtype: torch.dtype, n: int) -> tuple[torch.Tensor, int]:
    """Returns ``pieces`` and ``rows`` of `mixed_lora_grad_b` for dy ``[M, n]``."""
    from fastlora.kernels import chips, configs

    chip, precision = chips.chip_of(rows.order.device), _precision(dtype)
    config = configs.choose(chip, "mixed_lora_grad_b", dtype, input_precision=precision)
    run = configs.run_rows(chip, rows.m, configs.cdiv(n, config.block_n), config.block_m)
    return rows.pieces(run), run


def runs_a(rows: Rows, dtype: torch.dtype, k: int) -> tuple[torch.Tensor, int]:
    """Returns ``pieces`` and ``rows`` of `mixed_lora_grad_a` for x ``[M, k]``."""
    from fastlora.kernels import chips, configs

    chip, precision = chips.chip_of(rows.order.device), _precision(dtype)
    config = configs.choose(chip, "mixed_lora_grad_a", dtype, input_precision=precision)
    run = configs.run_rows(chip, rows.m, configs.cdiv(k, config.block_k), config.block_m)
    return rows.pieces(run), run


def split_grad_b(
    packed: torch.Tensor, lora_b: Sequence[torch.Tensor], with_bias: Sequence[bool]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Returns d_lora_b ``[N, rank]`` and d_lora_bias ``[N]`` of each slot, views of ``packed``."""
    offsets, bias_offsets, _ = layout_b(lora_b, with_bias)
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for tensor, at, bias_at in zip(lora_b, offsets, bias_offsets, strict=True):
        gradient = packed[at : at + tensor.numel()].view(tensor.shape)
        bias = None if bias_at < 0 else packed[bias_at : bias_at + tensor.shape[0]]
        found.append((gradient, bias))
    return found


def split_grad_a(packed: torch.Tensor, lora_a: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Returns d_lora_a ``[rank, K]`` of each slot and module, views of ``packed``."""
    offsets, _ = layout([tensor.numel() for tensor in lora_a], lora_a[0].itemsize)
    return [
        packed[at : at + tensor.numel()].view(tensor.shape)
        for tensor, at in zip(lora_a, offsets, strict=True)
    ]


def columns_of(max_rank: int) -> int:
    """Returns R, the columns of s and ds."""
    return max(-(-max_rank // 16) * 16, 16)


def layout(sizes: Sequence[int], itemsize: int) -> tuple[list[int], int]:
    """Returns where blocks of so many elements begin, each at a multiple of 16 bytes; the end."""
    each = 16 // itemsize
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // each) * each
    return offsets, end


def layout_b(
    lora_b: Sequence[torch.Tensor], with_bias: Sequence[bool]
) -> tuple[list[int], list[int], int]:
    """Returns the offsets of lora_b's gradients and of lora_bias's, -1 for none, and the end."""
    biases = [b.shape[0] if has else 0 for b, has in zip(lora_b, with_bias, strict=True)]
    offsets, end = layout([*(b.numel() for b in lora_b), *biases], lora_b[0].itemsize)
    bias_offsets = [
        at if has else -1 for at, has in zip(offsets[len(lora_b) :], with_bias, strict=True)
    ]
    return offsets[: len(lora_b)], bias_offsets, end


def table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Returns numbers as a tensor ``[len]`` on a device, without waiting for it."""
    # One for each stream: another stream's copy may still be on its way.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _table(values, dtype, device, stream)


@functools.lru_cache(maxsize=8192)
def _table(
    values: tuple[Any, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> torch.Tensor:
    # Read by many calls, in inference mode or out of it.
    with torch.inference_mode(False):
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def aligned_blocks(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Returns factors as kernels read them: contiguous, and at a multiple of 16 bytes."""
    return [
        t
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0)
        else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]


def addresses_of(blocks: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    values = tuple(0 if b is None or not b.numel() else b.data_ptr() for b in blocks)
    return table(values, torch.int64, device)


def ranks_of(lora_a: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return table(tuple(a.shape[0] for a in lora_a), torch.int32, device)


def max_rank_of(lora_a: Sequence[torch.Tensor]) -> int:
    return max(1, *(a.shape[0] for a in lora_a))


def dropout_tables(
    slot_start: torch.Tensor, seeds: torch.Tensor | None, dropout_p: Sequence[float]
) -> Any:
    """Returns the kernels' `DropoutTables`, or None."""
    if seeds is None:
        return None
    from fastlora.kernels.mixed_rows import DropoutTables

    thresholds = tuple(round(p * 65536) for p in dropout_p)
    inv_keep = tuple(1.0 / (1.0 - p) for p in dropout_p)
    return DropoutTables(
        slot_start,
        seeds,
        table(thresholds, torch.int32, seeds.device),
        table(inv_keep, torch.float32, seeds.device),
    )


def max_columns_of(lora_a: Sequence[torch.Tensor], slots: int, modules: int) -> int:
    """Returns the most rank rows of an adapter in so many neighbouring modules, each in fours."""
    filled = [-(-a.shape[0] // 4) * 4 for a in lora_a]
    starts = range(0, len(filled), modules * slots)
    sums = [
        sum(filled[start + slot : start + modules * slots : slots])
        for start in starts
        for slot in range(slots)
    ]
    return max(1, *sums)
