"""Measure the memory that a training step needs, by running it on the meta device.

Tensors on the meta device have a size but no storage in memory. The measurement therefore works for
models that do not fit into the memory of this machine.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def measure_peak_of_created_tensors(step: Callable[[], object]) -> int:
    """Measure the peak memory of the tensors that a function creates.

    The function is run once. The result is in bytes. Attention is counted as in a fused kernel,
    which does not store the matrix of scores.

    Args:
        step: A function that runs the forward and the backward pass of a model on the meta device.
    """
    counter = _NewStoragePeakTracker()
    with _emulate_fused_attention(), counter:
        step()
    return counter.peak


class _NewStoragePeakTracker(TorchDispatchMode):
    """Dispatch mode that tracks the peak memory of tensor storages created while it is active.

    Each storage is counted until it is freed. Storages that already existed are not counted.

    Attributes:
        peak: The largest total size so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages that it created."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # for example "is the mask all ones?": assume that batches are padded
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known or key in given:
                continue
            self._known.add(key)
            self._held += size
            self.peak = max(self.peak, self._held)
            weakref.finalize(storage, self._release, key, size)
        return made

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._held -= size


@contextlib.contextmanager
def _emulate_fused_attention() -> Iterator[None]:
    """Emulate fused attention during a ``with`` block.

    Only its memory use is emulated, for tensors on the meta device. In the block,
    `scaled_dot_product_attention` is replaced with an operation that saves tensors of the same size
    for the backward pass.

    There is no fused kernel for the meta device. The function is patched because a
    ``TorchFunctionMode`` would not be active when activation checkpointing calls attention again in
    the backward pass.
    """
    own: Any = functional.scaled_dot_product_attention

    def fused_like_attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        groups = query.shape[:-3] + (key.shape[-3], -1) + query.shape[-2:]
        if key.shape != value.shape or query.shape[-2:] != key.shape[-2:]:
            return own(query, key, value, *args, **kwargs)
        # Two products save their three inputs and the intermediate result for the backward pass. A
        # fused kernel saves as much: q, k, v, and the output. Grouped heads share k and v, which
        # are broadcast and not copied.
        product = query.view(groups) * key.unsqueeze(-3) * value.unsqueeze(-3)
        return product.view(query.shape)

    functional.scaled_dot_product_attention = fused_like_attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
