"""The modules of one launch, which have the same input x, as kernel arguments.

A kernel receives the values of the first module under plain names (``y_ptr``, ``N``), and the
values of the others under numbered names (``y_1_ptr``, ``N_1``). On the device, `of_module` selects
the values of a tile's module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.arguments import numbered, padded, strides
from fastlora.kernels.config_tables import compiled_modules
from fastlora.kernels.weights import weight_loader_of
from fastlora.quantized_tensor import QuantizedData

# A dense matrix, or quantized data that a loader decodes.
Weight = torch.Tensor | QuantizedData


class Module(NamedTuple):
    """A module of a launch. With several modules, all tensors are contiguous.

    Attributes:
        y: ``[M, N]`` in x's dtype, or fp32 partial sums ``[splits, M, N]`` if programs share K.
        lora_b: ``[N, R]``, any strides, in x's dtype or in a dtype that is cast to it at the load.
        scaling: fp32 ``[1]``, or ``[R]`` with one value per rank row; None for 1.
        bias: ``[N]``, any floating-point dtype, or None.
        weight: ``[N, K]`` in x's dtype with any strides; or a quantized weight, of one kind for all
            modules; or None for a kernel that reads no weight.
    """

    y: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor | None
    bias: torch.Tensor | None = None
    weight: Weight | None = None


def named_modules(modules: Sequence[Module], *, weight: bool) -> dict[str, Any]:
    """Return the kernel arguments of 1 to `MAX_GROUP_SIZE` modules.

    A kernel for three modules also computes one or two. Each missing module has the tensors of the
    first, and no columns.
    """
    first = modules[0]
    whole = first.y.is_contiguous() and first.lora_b.is_contiguous()
    count = compiled_modules(len(modules), alone=not whole or first.scaling is None)
    weights = [own.weight for own in modules]
    blocks = [*(t for own in modules for t in (own.y, own.lora_b)), *pointers_of(weights)]
    scaling, bias = first.scaling, first.bias
    named = named_weights(weights, count) if weight else {}
    for name in Module._fields[:4]:
        named |= numbered(f"{name}{{}}_ptr", padded([getattr(own, name) for own in modules], count))
    ranks = [own.lora_b.shape[1] for own in modules]
    named |= numbered("N{}", [own.lora_b.shape[0] for own in modules], 0)
    named |= numbered("R{}", padded(ranks, count), 0)
    return {
        **named,
        **strides("b", "nr", first.lora_b),
        "stride_scaling": 0 if scaling is None or scaling.numel() == 1 else scaling.stride(0),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "NUM_MODULES": count,
        "ALIGNED": count > 1 and are_aligned(blocks),
        "HAS_BIAS": bias is not None,
    }


def named_weights(weights: Sequence[Weight | None], count: int) -> dict[str, Any]:
    """Return the kernel arguments that point to the weights of ``count`` modules.

    The weight of the first module also stands for missing ones.
    """
    weights = padded(weights, count)
    parts = [own.parts if isinstance(own, QuantizedData) else None for own in weights]
    return {
        **numbered("weight{}_ptr", pointers_of(weights)),
        **numbered("weight_parts{}_ptr", parts),
    }


def pointers_of(weights: Sequence[Weight | None]) -> list[torch.Tensor | None]:
    """Return the tensor of each weight: the dense matrix, or the quantized values."""
    return [own.codes if isinstance(own, QuantizedData) else own for own in weights]


def has_usual_strides(tensor: torch.Tensor) -> bool:
    """Return whether a vector or matrix is contiguous and has the strides of a new tensor.

    PyTorch also calls a matrix contiguous if the stride of a dimension of size 1 is arbitrary.
    """
    columns = tensor.shape[-1]
    return tensor.stride() == ((1,) if tensor.dim() == 1 else (columns, 1))


def are_of_a_kind(weights: Sequence[Weight]) -> bool:
    """Return whether one launch can read all weights: dense ones, or quantized ones of one kind."""
    kinds = {
        (own.kind, own.block if weight_loader_of(own.kind).by_block else 0, own.transposed)
        if isinstance(own, QuantizedData)
        else None
        for own in weights
    }
    return len(kinds) == 1


def weight_arguments(weight: Weight) -> dict[str, Any]:
    """Return the arguments that tell a kernel how to read the weights of a launch.

    All of them are like ``weight``.
    """
    if isinstance(weight, QuantizedData):
        loader = weight_loader_of(weight.kind)
        return {
            "stride_wn": 0,
            "stride_wk": 0,
            "WEIGHT": loader.function,
            "WEIGHT_BLOCK": weight.block if loader.by_block else 0,
            "WEIGHT_TRANSPOSED": weight.transposed,
            **({} if loader.fuses else {"enable_fp_fusion": False}),
        }
    return {
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "WEIGHT": None,
        "WEIGHT_BLOCK": 0,
        "WEIGHT_TRANSPOSED": False,
    }


def are_aligned(blocks: Sequence[torch.Tensor | None]) -> bool:
    """Return whether all tensors begin at multiples of 16 bytes.

    The compiler cannot know this of a tensor that is selected among modules.
    """
    return all(block is None or block.data_ptr() % 16 == 0 for block in blocks)


@triton.jit
def of_module(module, value_0, value_1, value_2, value_3, NUM_MODULES: tl.constexpr):
    """Return the value that belongs to a tile's module, in a grid over the tiles of all modules."""
    value = tl.where(module == 1, value_1, value_0)
    if NUM_MODULES > 2:
        value = tl.where(module == 2, value_2, value)
    if NUM_MODULES > 3:
        value = tl.where(module == 3, value_3, value)
    return value


@triton.jit
def module_of_tile(pid, rows, sizes, BLOCK_N: tl.constexpr, NUM_MODULES: tl.constexpr):
    """Return (module, its tile) for a grid in which the tiles of one module follow another's.

    A module has ``rows`` row tiles times its blocks of N. ``sizes`` are the N of all modules.
    """
    begin_1 = rows * tl.cdiv(sizes[0], BLOCK_N)
    begin_2 = begin_1 + rows * tl.cdiv(sizes[1], BLOCK_N)
    begin_3 = begin_2 + rows * tl.cdiv(sizes[2], BLOCK_N)
    module = (pid >= begin_1).to(tl.int32)
    if NUM_MODULES > 2:
        module += (pid >= begin_2).to(tl.int32)
    if NUM_MODULES > 3:
        module += (pid >= begin_3).to(tl.int32)
    return module, pid - of_module(module, 0, begin_1, begin_2, begin_3, NUM_MODULES)
