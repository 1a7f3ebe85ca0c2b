"""Siblings of one launch: modules that are fed by the same x, as the arguments of a kernel.

A kernel takes the first module's values under plain names (``y_ptr``, ``N``) and the others' under
numbered ones (``y_1_ptr``, ``N_1``). On the device `of_module` takes a tile's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.coded_weight import Coded
from fastlora.kernels.arguments import numbered, strides
from fastlora.kernels.weights import loader_of

# A matrix, or codes that a loader decodes.
Weight = torch.Tensor | Coded


class Module(NamedTuple):
    """A module of a launch. What siblings have is contiguous.

    Attributes:
        y: ``[M, N]`` in x's dtype; planes of it, fp32 ``[splits, M, N]``, where programs share K.
        lora_b: ``[N, R]``, any strides, x's dtype or one that is cast to it at the load.
        scaling: fp32 ``[1]``, or ``[R]`` with one value per rank row; None for 1.
        bias: ``[N]``, any floating-point dtype, or None.
        weight: ``[N, K]`` in x's dtype, any strides; codes, of siblings all of one kind; None for a
            kernel that reads none.
    """

    y: torch.Tensor
    lora_b: torch.Tensor
    scaling: torch.Tensor | None
    bias: torch.Tensor | None = None
    weight: Weight | None = None


def named_modules(modules: Sequence[Module], *, weight: bool) -> dict[str, Any]:
    """Returns the kernel arguments of 1 to `MAX_SIBLINGS` modules; None and 0 for those unused."""
    first, count = modules[0], len(modules)
    weights = [own.weight for own in modules]
    blocks = [*(t for own in modules for t in (own.y, own.lora_b)), *pointers_of(weights)]
    scaling, bias = first.scaling, first.bias
    named = named_weights(weights) if weight else {}
    for name in Module._fields[:4]:
        named |= numbered(f"{name}{{}}_ptr", [getattr(own, name) for own in modules])
    for place, size in enumerate("NR"):
        named |= numbered(f"{size}{{}}", [own.lora_b.shape[place] for own in modules], 0)
    return {
        **named,
        **strides("b", "nr", first.lora_b),
        "stride_scaling": 0 if scaling is None or scaling.numel() == 1 else scaling.stride(0),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "SIBLINGS": count,
        "ALIGNED": count > 1 and are_aligned(blocks),
        "HAS_BIAS": bias is not None,
    }


def named_weights(weights: Sequence[Weight | None]) -> dict[str, Any]:
    """Returns the kernel arguments that point to the weights of 1 to `MAX_SIBLINGS` modules."""
    parts = [own.parts if isinstance(own, Coded) else None for own in weights]
    return {
        **numbered("weight{}_ptr", pointers_of(weights)),
        **numbered("weight_parts{}_ptr", parts),
    }


def pointers_of(weights: Sequence[Weight | None]) -> list[torch.Tensor | None]:
    """Returns the tensor of each weight: the matrix, or its codes."""
    return [own.codes if isinstance(own, Coded) else own for own in weights]


def are_of_a_kind(weights: Sequence[Weight]) -> bool:
    """Whether one launch takes all of these: matrices, or codes that are read alike."""
    kinds = {
        (own.kind, own.block if loader_of(own.kind).by_block else 0, own.transposed)
        if isinstance(own, Coded)
        else None
        for own in weights
    }
    return len(kinds) == 1


def weight_arguments(weight: Weight) -> dict[str, Any]:
    """Returns how a kernel reads the weights of a launch, all of which are as one is."""
    if isinstance(weight, Coded):
        loader = loader_of(weight.kind)
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
    """Whether blocks lie at multiples of 16 bytes, which a choice between siblings hides."""
    return all(block is None or block.data_ptr() % 16 == 0 for block in blocks)


@triton.jit
def of_module(module, value_0, value_1, value_2, value_3, SIBLINGS: tl.constexpr):
    """Returns a value of the module that a tile belongs to, in a grid over siblings' tiles."""
    value = tl.where(module == 1, value_1, value_0)
    if SIBLINGS > 2:
        value = tl.where(module == 2, value_2, value)
    if SIBLINGS > 3:
        value = tl.where(module == 3, value_3, value)
    return value


@triton.jit
def module_of_tile(pid, rows, sizes, BLOCK_N: tl.constexpr, SIBLINGS: tl.constexpr):
    """Returns (module, its tile), where the tiles of one module come after the other's.

    Those of a module are ``rows`` row tiles by its blocks of N; ``sizes`` are every N.
    """
    begin_1 = rows * tl.cdiv(sizes[0], BLOCK_N)
    begin_2 = begin_1 + rows * tl.cdiv(sizes[1], BLOCK_N)
    begin_3 = begin_2 + rows * tl.cdiv(sizes[2], BLOCK_N)
    module = (pid >= begin_1).to(tl.int32)
    if SIBLINGS > 2:
        module += (pid >= begin_2).to(tl.int32)
    if SIBLINGS > 3:
        module += (pid >= begin_3).to(tl.int32)
    return module, pid - of_module(module, 0, begin_1, begin_2, begin_3, SIBLINGS)
