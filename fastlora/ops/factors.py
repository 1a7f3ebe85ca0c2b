"""A base layer, one adapter on it, and its adapters by slot: what functions and operators take.

Shapes: ``lora_a [R, K]``, ``lora_b [N, R]``, ``lora_bias`` and ``magnitude [N]``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

Factor = torch.Tensor | None
Number = int | float

# In place of an address of DoRA's scales that are yet to be made: its rows become NaN. A kernel's
# hints hold for it: a multiple of 16.
PENDING = 16


class Factors(NamedTuple):
    """One adapter on one linear.

    Attributes:
        lora_a: ``[R, K]``; several adapters are their rank rows side by side.
        lora_b: ``[N, R]``; rank rows side by side, often a view with strides ``(1, N)``.
        scaling: A number, or a tensor without dimensions, or one of R numbers.
        lora_bias: ``[N]``, not scaled, or None.
        dropout_p: Probability that acts now.
        magnitude: ``[N]`` of DoRA, or None.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: Any  # as above
    lora_bias: torch.Tensor | None = None
    dropout_p: float = 0.0
    magnitude: torch.Tensor | None = None


class Base(NamedTuple):
    """A base layer in one forward: a plain linear, or the output of a module that was called.

    Attributes:
        weight: ``[N, K]``; None where the module was called.
        bias: ``[N]`` or None.
        y: ``[..., N]``, what the module made; None with a weight.
        inplace: Whether y may be overwritten where no gradient is recorded.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    y: torch.Tensor | None = None
    inplace: bool = False

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``[..., N]`` of the base layer alone."""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        if self.y is None:
            raise ValueError("neither a base weight nor a base output is given")
        return self.y

    def rows_to_write(self) -> torch.Tensor:
        """Returns y as ``[M, N]``, in memory that may be written."""
        if self.y is None:
            raise ValueError("no base output is given")
        flat = self.y.reshape(-1, self.y.shape[-1])
        return flat if self.inplace or flat.data_ptr() != self.y.data_ptr() else flat.clone()


# The adapters of one linear by slot; None for one that leaves the linear alone.
Slots = list[Factors | None]


class Operands(NamedTuple):
    """The adapters of one linear as functions, backends and operators take them.

    Attributes:
        lora_a, lora_b, lora_bias: Of each adapter ``[R, K]``, ``[N, R]``, ``[N]`` or None, not
            scaled. An adapter that leaves the linear alone has rank 0.
        scaling: ``[S]``, one number an adapter; for a single adapter without dimensions or ``[R]``.
        dropout_p: Probability that acts on each.
        seeds: Dropout seed of each, int64 ``[S]``; None where no dropout acts.
        slots: Slot of each adapter; None where they are 0 to ``S - 1``.
    """

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    lora_bias: list[torch.Tensor | None]
    scaling: torch.Tensor
    dropout_p: tuple[float, ...]
    seeds: torch.Tensor | None = None
    slots: tuple[int, ...] | None = None


class Tables(NamedTuple):
    """Where adapters' factors lie: a row for each linear (G), a column for each adapter (S).

    Attributes:
        a_address, b_address, bias_address: int64 ``[G, S]``; 0 where there is nothing. No
            bias_address where no adapter has a lora_bias.
        rank: int32 ``[G, S]``; 0 where an adapter leaves the linear alone.
        scaling: fp32 ``[G, S]``.
        max_rank: No adapter has a larger one.
        dtype: Of the factors.
        scale_address: int64 ``[G, S]`` of DoRA's scales; None where no adapter uses DoRA.
        rows: Row of a linear by its number in the model; None where linears know their rows.
        kept: What lies behind the addresses, if it is the tables' to keep.
    """

    a_address: torch.Tensor
    b_address: torch.Tensor
    bias_address: torch.Tensor | None
    rank: torch.Tensor
    scaling: torch.Tensor
    max_rank: int
    dtype: torch.dtype
    scale_address: torch.Tensor | None = None
    rows: dict[int, int] | None = None
    kept: tuple[torch.Tensor, ...] = ()

    def tensors(self) -> list[torch.Tensor]:
        """Returns the operators' argument ``Tensor[] tables``."""
        found = [self.a_address, self.b_address, self.rank, self.scaling]
        if self.bias_address is not None:
            found.append(self.bias_address)
        return found


def tables_of(tensors: Sequence[torch.Tensor], max_rank: int, dtype: torch.dtype) -> Tables:
    """Returns what `Tables.tensors` gave to an operator."""
    a_address, b_address, rank, scaling, *biases = tensors
    bias_address = biases[0] if biases else None
    return Tables(a_address, b_address, bias_address, rank, scaling, max_rank, dtype)


def present(factors: Sequence[Factor], rank_dim: int) -> list[torch.Tensor]:
    """Returns factors of rank 0 for None. Ranks of lora_a are dimension 0, of lora_b 1."""
    found: list[torch.Tensor] = []
    for factor in factors:
        if factor is not None:
            found.append(factor)
    if len(found) == len(factors):
        return found
    shape = list(found[0].shape)
    shape[rank_dim] = 0
    none = found[0].new_empty(shape)
    return [none if factor is None else factor for factor in factors]


def numbers_on(
    values: tuple[Number, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Returns numbers as a tensor ``[len]`` on a device, without waiting for it."""
    # One for each stream: another stream's copy may still be on its way.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _numbers(values, dtype, device, stream)


@functools.lru_cache(maxsize=8192)
def _numbers(
    values: tuple[Number, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> torch.Tensor:
    # Read by many calls, in inference mode or out of it.
    with torch.inference_mode(False):
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)
        return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
