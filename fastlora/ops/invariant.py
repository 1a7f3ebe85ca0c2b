"""The batch-invariant mode: a row's result does not depend on what else is in its batch.

``with fastlora.batch_invariant():`` holds for LoRA linears, of one adapter and of a mixed batch,
without gradients. Their rows come out the same, bit for bit, for any number of rows, at any place
among them, beside any adapters, whatever the largest rank, and whether siblings such as q, k and v
shared a shrink. Bit equality is claimed of GPUs only, and only as far as the native test was run.

Why it holds:

- One kernel, tile, split of K and plan for every batch (`fastlora.kernels.configs`): the
  base GEMM is Triton's too, since cuBLAS goes by M; x is laid out one way; splits are added in
  their order.
- Base GEMM and shrink: an element of a dot is made from its row of x, its column of the other
  operand and its accumulator, along K in the instruction's own order. That it does not matter at
  which row or column of a tile this happens is what is taken for granted of the hardware: a
  siblings' shrink moves columns, another batch moves rows.
- Up projection: the rank rows are the K of a dot, where the place does matter. Outside of the mode
  those of a tile's adapters stand side by side, so the blocks before a row's own decide in which
  step of which instruction its products are summed (gfx950 has one of 32 columns, and a layout may
  spread a thread's columns over several), and dots of zeros pass over its accumulator: -0.0 does
  not survive 0.0, and no vendor says that they round nothing. In the mode a dot holds 16 rank rows
  of one adapter from its first column on, zeros past its rank, and a row whose adapter it is not
  keeps its accumulator by selection: no arithmetic of others reaches it.

A call that cannot keep this raises `ImplementationError`, never does less: no Triton kernels for
the device (a CPU's BLAS treats batches below 16 rows in its own way), ``impl="eager"``, another
plan, dropout that acts (its mask goes by the row's place), a base layer that is called as it is or
runs in PyTorch alone, hooked factors, autocast or gradients in a mixed batch (that path is
PyTorch's GEMMs). One adapter trains in the mode: its forward is the mode's, its backward is not.

What is no LoRA linear (attention, norms, an unadapted lm_head) is PyTorch's, in the mode as
outside. One adapter and a mixed batch are two kernels: each is invariant, they are not equal.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

from fastlora import env
from fastlora.ops import schema as ops
from fastlora.validation import ImplementationError

_thread = threading.local()
_FROM_THE_START = env.batch_invariant()


def is_batch_invariant() -> bool:
    """Whether the mode is on in this thread."""
    return getattr(_thread, "on", _FROM_THE_START)


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """Turns the batch-invariant mode on, or off, for the forwards of this thread in the block.

    ``FASTLORA_BATCH_INVARIANT=1`` in the environment turns it on for all threads, which a forward
    that activation checkpointing repeats in the backward needs. The mode is slower; by how much was
    not measured.

    Args:
        enabled: False turns it off.
    """
    before = is_batch_invariant()
    _thread.on = enabled
    try:
        yield
    finally:
        _thread.on = before


def invariant_impl(impl: str, plan: str, x: torch.Tensor, dropout_p: float = 0.0) -> str:
    """Returns ``"triton"``, the implementation of the mode.

    Raises:
        ImplementationError: What was asked for cannot run in the mode.
        ValueError: ``impl`` does not exist.
    """
    if impl == "eager" or plan not in ("auto", "fused", "invariant"):
        asked = f"impl={impl!r}" if impl == "eager" else f"plan={plan!r}"
        raise ImplementationError(
            f"{asked} cannot run in the batch-invariant mode: PyTorch's GEMMs go by the number of "
            "rows"
        )
    if dropout_p:
        raise ImplementationError(
            f"dropout_p={dropout_p} cannot act in the batch-invariant mode: the mask of a row goes "
            "by its place in the batch; call eval()"
        )
    try:
        return ops.resolve_impl("triton" if impl == "auto" else impl, x)
    except ImplementationError as error:
        raise ImplementationError(
            f"the batch-invariant mode needs the Triton kernels: {error}"
        ) from None


def refuse_in_mode(layer: Any, why: str) -> None:
    """Raises `ImplementationError` for a layer that has to run otherwise, if the mode is on."""
    if is_batch_invariant():
        base = layer.get_base_layer()
        raise ImplementationError(
            f"{type(layer).__name__} over {type(base).__name__} ({layer.in_features} to "
            f"{layer.out_features} features) cannot run in the batch-invariant mode: {why}"
        )
