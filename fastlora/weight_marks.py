"""Validity of cached values that were computed from weights.

A cached value is valid while its weights are the same tensors in the same memory and nothing has
written to them. A `Stamp` records the tensors, their memory, and their ``_version``. It detects
every replaced tensor.

A tensor's ``_version`` counts only some of the writes to it. Fused optimizers, compiled code, and
writes through ``.data`` do not change it. Each value that fastlora caches between forwards
therefore also has a weights version (a `Mark`), and it is used only while that version is current.
`Marks` holds three weights versions for the whole process:

* ``trained`` is for weights that may train. It changes at every step of any PyTorch optimizer, when
  a LoRA layer's forward runs with gradients outside compiled code, when a LoRA layer enters or
  leaves training mode, and at `fastlora.refresh`.
* ``frozen`` is for frozen base weights. Their norms are expensive to compute, and training an
  adapter does not change them. This version therefore changes only when an optimizer that holds one
  of these weights takes a step, at every compiled optimizer step, and at `fastlora.refresh`.
* ``step`` is for values that one layer's forward with gradients computes for the layers called
  after it. It changes like ``trained``, except that forwards do not change it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class Kept:
    """A cache held by an object. It starts empty in each copy of the object."""

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return type(self)()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return type(self), ()


class Stamp:
    """A record of tensors and of their state when a value was computed from them.

    An address and a ``_version`` do not identify a tensor's memory. PyTorch reuses freed memory, so
    a tensor that is replaced twice may return to its first address. A stamp therefore compares the
    identity of the storage and holds a weak reference to it. The weak reference does not keep the
    memory alive, but while it exists, no other storage gets the same identity.

    A stamp does not detect writes that leave ``_version`` unchanged. For those, the ``context``
    contains a `Mark`. A stamp does not compare the tensors as objects either. If their identity
    matters, the ``context`` contains their ``id``.

    Args:
        tensors: Tensors that count their versions.
        context: Everything else that the value depends on, compared by ``==``.

    Raises:
        RuntimeError: One of the tensors is an inference tensor, which does not count versions.
    """

    __slots__ = ("_context", "_memory", "_plain", "_states")

    def __init__(self, tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> None:
        self._context = context
        # A subclass may compute each attribute in Python, as bitsandbytes' parameters do. That
        # takes microseconds.
        self._plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        with torch._C.DisableTorchFunctionSubclass():
            self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
            self._states = _states_of(tensors)

    def holds(self, tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> bool:
        """Return whether memory and versions are as recorded, and the context is equal."""
        if context != self._context:
            return False
        try:
            if self._plain:
                return _states_of(tensors) == self._states
            with torch._C.DisableTorchFunctionSubclass():
                return _states_of(tensors) == self._states
        except RuntimeError:  # an inference tensor
            return False


def _states_of(tensors: Sequence[torch.Tensor]) -> list[tuple[object, ...]]:
    return [
        (t._version, t.untyped_storage()._cdata, t.data_ptr(), t.shape, t.stride()) for t in tensors
    ]


def stamp_of(tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> Stamp | None:
    """Return a stamp of the tensors, or None if one of them does not count versions."""
    try:
        return Stamp(tensors, context)
    except RuntimeError:
        return None


class Mark:
    """A weights version, compared by identity.

    It is an object and not a number because a compiler that traces an optimizer's step also traces
    fastlora's hook. It would guard on the number and recompile at each step.
    """


class Marks:
    """The current weights versions of this process.

    Attributes:
        trained: Version of weights that may train.
        frozen: Version of frozen base weights.
        step: Version of weights that may train. Forwards with gradients between two optimizer steps
            do not change it.
    """

    def __init__(self) -> None:
        self.trained, self.frozen, self.step = Mark(), Mark(), Mark()
        # Storage identity -> storage, for the frozen base weights that cached values depend on. The
        # tensors themselves are not referenced, because `torch.utils.swap_tensors` rejects a tensor
        # that has a weak reference.
        self._watched: dict[int, StorageWeakRef] = {}
        self._purge_at = 1024
        self._hooked = False

    def of_trained(self) -> Mark:
        """Return the version to store with a value computed from weights that may train."""
        self._watch_steps()
        return self.trained

    def of_step(self) -> Mark:
        """Return the version to store with a value that one layer's forward computes for others."""
        self._watch_steps()
        return self.step

    def of_base(self, weight: torch.Tensor) -> Mark:
        """Return the version to store with a value computed from a base weight."""
        if weight.requires_grad:
            return self.of_trained()
        self.of_trained()
        if _memory_of(weight) not in self._watched:
            self._watch(weight)
        return self.frozen

    def end_trained(self) -> None:
        """Invalidate the cached values of weights that may train."""
        self.trained, self.step = Mark(), Mark()

    def end_all(self) -> None:
        """Invalidate the cached values of all weights."""
        self.trained, self.frozen, self.step = Mark(), Mark(), Mark()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Invalidate the cached values that an optimizer's step may have made stale."""
        self.trained, self.step = Mark(), Mark()
        # A compiled graph cannot look up weights by their storage.
        if torch.compiler.is_compiling() or self._holds_watched(optimizer):
            self.frozen = Mark()

    def _watch_steps(self) -> None:
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_post_hook(_after_step)

    def _watch(self, weight: torch.Tensor) -> None:
        if len(self._watched) >= self._purge_at:
            watched = list(self._watched.items())
            self._watched = {key: ref for key, ref in watched if not ref.expired()}
            self._purge_at = max(1024, 2 * len(self._watched))
        self._watched[_memory_of(weight)] = StorageWeakRef(weight.untyped_storage())

    def _holds_watched(self, optimizer: torch.optim.Optimizer) -> bool:
        groups = optimizer.param_groups
        return bool(self._watched) and any(
            _memory_of(weight) in self._watched for group in groups for weight in group["params"]
        )


def _memory_of(weight: torch.Tensor) -> int:
    """Return the identity of a weight's storage, or 0 for a sparse weight, which has none."""
    try:
        return weight.untyped_storage()._cdata
    except RuntimeError:
        return 0


marks = Marks()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    marks.after_step(optimizer)
