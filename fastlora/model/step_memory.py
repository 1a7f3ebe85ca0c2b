"""What a step of a model without weights would hold: every tensor that it makes, counted.

On the meta device tensors have sizes and no memory, so a model that fits nowhere can be asked.
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


def step_memory(step: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made in a call hold at once.

    Attention counts as a fused kernel does it: without the matrix of scores.

    Args:
        step: Forward and backward of a model on the meta device.
    """
    counter = _Counter()
    with _fused_attention(), counter:
        step()
    return counter.peak


class _Counter(TorchDispatchMode):
    """Counts the storages that operations make, from the first tensor on one to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation and counts what it made."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # no mask is all ones: padded batches are what is asked for
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
def _fused_attention() -> Iterator[None]:
    """Replaces attention by what keeps as much as a fused kernel; on the meta device there is none.

    A mode of functions would not reach what a checkpoint calls again in the backward.
    """
    own: Any = functional.scaled_dot_product_attention

    def kept(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        groups = query.shape[:-3] + (key.shape[-3], -1) + query.shape[-2:]
        if key.shape != value.shape or query.shape[-2:] != key.shape[-2:]:
            return own(query, key, value, *args, **kwargs)
        # The gradients of two products need three inputs and what lies between: as many as q, k, v
        # and the output of attention. Groups of heads share theirs, which are not copied.
        product = query.view(groups) * key.unsqueeze(-3) * value.unsqueeze(-3)
        return product.view(query.shape)

    functional.scaled_dot_product_attention = kept
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own


def _tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
