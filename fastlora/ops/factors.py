"""Named tuples that describe a base layer, an adapter on it, and all its adapters.

Backends, and the functions that call backends, receive these tuples as arguments.

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

# Stands in for the address of DoRA scales that have not been computed yet. Rows that use it become
# NaN. Like a real address, it is a multiple of 16, which the kernels' alignment hints promise.
PENDING = 16


class Factors(NamedTuple):
    """An adapter's LoRA factors for a linear layer, together with the LoRA bias and the scaling.

    The tuple also contains the dropout probability and DoRA's magnitude. The factors can also be
    those of several adapters, concatenated along the rank.

    Attributes:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``; often a view with strides ``(1, N)``.
        scaling: A number, a tensor without dimensions, or a tensor with R elements.
        lora_bias: ``[N]``, not scaled, or None.
        dropout_p: Active dropout probability.
        magnitude: DoRA's magnitude ``[N]``, or None without DoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: Any  # A number or a tensor.
    lora_bias: torch.Tensor | None = None
    dropout_p: float = 0.0
    magnitude: torch.Tensor | None = None


class Base(NamedTuple):
    """The weight and bias of a base layer, in the form that backends accept.

    If the output of the base layer has already been computed, the tuple contains this output
    instead. The bias is optional.

    Attributes:
        weight: ``[N, K]``, or None if a module was called.
        bias: ``[N]`` or None.
        y: ``[..., N]``, the output of the module, or None if there is a weight.
        inplace: Whether y may be overwritten if no gradient is recorded.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    y: torch.Tensor | None = None
    inplace: bool = False

    def base_layer_output(self, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the base layer for the input x, without adapters.

        The shape is ``[..., N]``. If the output y is given instead of a weight, the result is y.
        """
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        if self.y is None:
            raise ValueError("neither a base weight nor a base output is given")
        return self.y

    def writable_y(self) -> torch.Tensor:
        """Return y, or a copy of y if y itself must not be overwritten.

        y is the output of the base layer. The result has the shape ``[M, N]``.
        """
        if self.y is None:
            raise ValueError("no base output is given")
        flat = self.y.reshape(-1, self.y.shape[-1])
        return flat if self.inplace or flat.data_ptr() != self.y.data_ptr() else flat.clone()


# The adapters of one linear layer by slot, with None for an adapter that does not adapt the layer.
Slots = list[Factors | None]


class LayerAdapterOperands(NamedTuple):
    """The LoRA operands of one linear layer, in the form that backends and operators accept.

    The operands include the factors, the scalings, and the dropout settings of the layer's
    adapters.

    Attributes:
        lora_a, lora_b, lora_bias: For each adapter a tensor ``[R, K]``, ``[N, R]``, and ``[N]`` or
            None, not scaled. An adapter that does not adapt the layer has rank 0.
        scaling: ``[S]``, one number per adapter. For a single adapter, it can also have no
            dimensions, or the shape ``[R]``.
        dropout_p: Active dropout probability of each adapter.
        seeds: Dropout seed of each adapter, int64 ``[S]``, or None if no dropout is active.
        slots: Slot of each adapter, or None if the slots are 0 to ``S - 1``.
    """

    lora_a: list[torch.Tensor]
    lora_b: list[torch.Tensor]
    lora_bias: list[torch.Tensor | None]
    scaling: torch.Tensor
    dropout_p: tuple[float, ...]
    seeds: torch.Tensor | None = None
    slots: tuple[int, ...] | None = None


class AddressTables(NamedTuple):
    """Tables of memory addresses of adapter factors.

    The tables have one row for each layer (G) and one column for each adapter's slot (S). Further
    tables of this shape contain the ranks and scalings.

    Attributes:
        a_address, b_address, bias_address: int64 ``[G, S]``, with 0 for a factor that does not
            exist. bias_address is None if no adapter has a lora_bias.
        rank: int32 ``[G, S]``, with 0 for an adapter that does not adapt the layer.
        scaling: fp32 ``[G, S]``.
        max_rank: Upper bound of all ranks.
        dtype: Dtype of the factors.
        scale_address: int64 ``[G, S]``, addresses of DoRA scales. None if no adapter uses DoRA.
        rows: Maps a layer's number in the model to the layer's row. None if each layer stores its
            own row.
        keepalive: Tensors at the addresses, if the tables keep them alive.
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
    keepalive: tuple[torch.Tensor, ...] = ()

    def operator_arguments(self) -> list[torch.Tensor]:
        """Return the list of tensors that operators take as their ``tables`` argument.

        The tensors are the tables of the factors' addresses, of the ranks, and of the scalings. If
        an adapter has a LoRA bias, the table of the biases' addresses follows. The operators read
        the factors and biases at these addresses.
        """
        found = [self.a_address, self.b_address, self.rank, self.scaling]
        if self.bias_address is not None:
            found.append(self.bias_address)
        return found


def address_tables_from_tensors(
    tables: Sequence[torch.Tensor], max_rank: int, dtype: torch.dtype
) -> AddressTables:
    """Build an `AddressTables` from the tensors in an operator's ``tables`` argument."""
    a_address, b_address, rank, scaling, *biases = tables
    bias_address = biases[0] if biases else None
    return AddressTables(a_address, b_address, bias_address, rank, scaling, max_rank, dtype)


def replace_missing_with_empty(factors: Sequence[Factor], rank_dim: int) -> list[torch.Tensor]:
    """Return the list of factors, with each missing factor replaced by an empty tensor.

    A missing factor is None, and the empty tensor has rank 0. ``rank_dim`` is the dimension of the
    rank: 0 for lora_a, and 1 for lora_b.
    """
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


def number_tensor_without_sync(
    values: tuple[Number, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Return a 1-D tensor with the given numbers, without synchronizing with the device.

    Results are cached.
    """
    # There is one tensor per stream, because the copy on another stream may not have finished.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _numbers(values, dtype, device, stream)


@functools.lru_cache(maxsize=8192)
def _numbers(
    values: tuple[Number, ...], dtype: torch.dtype, device: torch.device, stream: int
) -> torch.Tensor:
    # Many calls read the tensor, in inference mode and outside of it.
    with torch.inference_mode(False):
        if device.type != "cuda":
            return torch.tensor(values, dtype=dtype, device=device)
        pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=True)
        return pinned.to(device, non_blocking=True)
