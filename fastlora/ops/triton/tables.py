"""Tables on the device of what the host knows: addresses, ranks, offsets, numbers of dropout.

A table follows from the parameters alone, so it is kept for the next call with the same ones. It
goes to the device without waiting for it: a CUDA graph needs a warm-up run before its capture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from fastlora.ops.factors import Tables, numbers_on

if TYPE_CHECKING:  # imports Triton
    from fastlora.kernels.mixed_rows import DropoutTables


class Drop(NamedTuple):
    """Dropout of a launch: seeds int64 ``[S]`` on the device, None for none; of each slot its p."""

    seeds: torch.Tensor | None
    p: Sequence[float]

    def tables(self) -> DropoutTables | None:
        """Returns what kernels for mixed batches read."""
        if self.seeds is None:
            return None
        from fastlora.kernels.mixed_rows import DropoutTables

        thresholds = tuple(round(p * 65536) for p in self.p)
        inv_keep = tuple(1.0 / (1.0 - p) for p in self.p)
        device = self.seeds.device
        return DropoutTables(
            self.seeds,
            numbers_on(thresholds, torch.int32, device),
            numbers_on(inv_keep, torch.float32, device),
        )


NO_DROP = Drop(None, ())


class RankRows(NamedTuple):
    """Adapters' rank rows behind addresses: those of a shrink, or what adds them to rows of y.

    Tables are ``[G, S]`` for G modules of one launch, else those of one module, ``[S]``.

    Attributes:
        address: int64, where lora_a lies, or lora_b.
        bias_address: int64, where lora_bias lies, 0 for none; None if no adapter has one.
        rank: int32.
        scaling: fp32; None for 1.
        dtype: Of what lies behind the addresses.
        largest: No adapter has a larger rank.
        by_column: Whether lora_b lies as ``[N, rank]`` rather than as rank rows.
        kept: What must live until the launch.
    """

    address: torch.Tensor
    bias_address: torch.Tensor | None
    rank: torch.Tensor
    scaling: torch.Tensor | None
    dtype: torch.dtype
    largest: int
    by_column: bool = False
    kept: tuple[torch.Tensor | None, ...] = ()

    @classmethod
    def of_lora_a(
        cls, lora_a: Sequence[torch.Tensor], device: torch.device, shape: tuple[int, ...] = (-1,)
    ) -> RankRows:
        """Returns those of a shrink, in tables of a shape, or of a gradient of x."""
        blocks, ranks = aligned_blocks(lora_a), tuple(a.shape[0] for a in lora_a)
        address = addresses_of(blocks, device).view(shape)
        rank, dtype = numbers_on(ranks, torch.int32, device).view(shape), lora_a[0].dtype
        return cls(address, None, rank, None, dtype, max(ranks), False, tuple(blocks))

    @classmethod
    def of_lora_b(
        cls,
        lora_b: Sequence[torch.Tensor],
        lora_bias: Sequence[torch.Tensor | None],
        scaling: torch.Tensor,
    ) -> RankRows:
        """Returns those of a forward."""
        device, ranks = scaling.device, tuple(b.shape[1] for b in lora_b)
        blocks, biases = aligned_blocks(lora_b), aligned_blocks(lora_bias)
        bias_address = None
        if any(bias is not None for bias in biases):
            bias_address = addresses_of(biases, device)
        rank, address = numbers_on(ranks, torch.int32, device), addresses_of(blocks, device)
        own, kept = (address, bias_address, rank, scaling), (*blocks, *biases)
        return cls(*own, lora_b[0].dtype, max(ranks), True, kept)

    @classmethod
    def of_tables(cls, tables: Tables, index: int | slice) -> RankRows:
        """Returns those of a forward, of one module, or of neighbours in tables ``[G, S]``."""
        bias = None if tables.bias_address is None else tables.bias_address[index]
        own = tables.b_address[index], bias, tables.rank[index], tables.scaling[index]
        return cls(*own, tables.dtype, tables.max_rank)


def aligned_blocks(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Returns factors as kernels read them: contiguous, and at a multiple of 16 bytes."""
    return [
        t
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0)
        else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    ]


def addresses_of(blocks: Sequence[torch.Tensor | None], device: torch.device) -> torch.Tensor:
    """Returns where blocks lie, int64; 0 for None and for what has no elements."""
    values = tuple(0 if b is None or not b.numel() else b.data_ptr() for b in blocks)
    return numbers_on(values, torch.int64, device)


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
