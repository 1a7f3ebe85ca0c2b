"""Invalidation of cached values that were computed from weights.

A cached value is valid as long as its weights are the same tensors in the same memory and have not
been written to. A `TensorStamp` records the memory, the shape, and the ``_version`` of each tensor.
It detects every replaced tensor.

The ``_version`` of a tensor counts only some of the writes to the tensor. Fused optimizers,
compiled code, and writes through ``.data`` do not change it. Each value that fastlora caches
between forward passes therefore also has a weights version (a `WeightsVersion`), and the value is
used only while that version is current. `ProcessWeightsVersions` contains three weights versions
for the whole process:

* ``trained`` is for weights that may be trained. It changes at every step of any PyTorch optimizer,
  when the forward pass of a LoRA layer runs with gradients outside compiled code, when a LoRA layer
  enters or leaves training mode, when an adapter's scaling changes, and at `fastlora.clear_caches`.
* ``frozen`` is for frozen base weights. Their norms are expensive to compute, and training an
  adapter does not change them. This version therefore changes only when an optimizer that has one
  of these weights among its parameters takes a step, at every compiled optimizer step, and at
  `fastlora.clear_caches`.
* ``step`` is for values that one layer computes in a forward pass with gradients for the layers
  that are called after it. It changes like ``trained``, except that forward passes do not change
  it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class UncopiedCache:
    """A cache that is not copied when its owner is copied or pickled.

    The owner is the object that has the cache as an attribute. This is the base class of such
    caches. Copying or unpickling a cache creates a new, empty cache. A shallow copy of the owner
    refers to the same cache.
    """

    def __deepcopy__(self, memo: dict[int, object]) -> UncopiedCache:
        return type(self)()

    def __reduce__(self) -> tuple[type[UncopiedCache], tuple[()]]:
        return type(self), ()


class TensorStamp:
    """A stamp of one or more tensors, which is used to detect whether they have changed.

    A stamp records the memory, the shape, and the ``_version`` of one or more tensors. A value that
    was computed from the tensors is cached with their stamp. The memory address and the
    ``_version`` of a tensor are not sufficient to detect all changes. PyTorch reuses freed memory,
    so a tensor that is replaced twice may have its first address again. A stamp therefore also
    compares the identity of the storage, and it has a weak reference to the storage. The weak
    reference does not keep the memory alive, but as long as it exists, no other storage can have
    the same identity.

    A stamp does not detect writes that leave ``_version`` unchanged. To detect such writes, the
    caller includes a `WeightsVersion` in ``context``. A stamp identifies tensors by their memory,
    not by their Python objects. If the objects matter, the caller includes their ``id`` in
    ``context``.

    Args:
        tensors: The tensors, which must have a ``_version``.
        context: Everything else that the value depends on, compared with ``==``.

    Raises:
        RuntimeError: One of the tensors is an inference tensor, which has no ``_version``.
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

    def matches(self, tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> bool:
        """Return whether the tensors and the context still match the stamp.

        The tensors and the context match the stamp if the context and the state of each tensor are
        equal to those that the stamp recorded. The stamp then detects no change.

        Args:
            tensors: The current tensors, in the same order.
            context: The current context.
        """
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


def stamp_tensors(
    tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()
) -> TensorStamp | None:
    """Return a `TensorStamp` of the tensors.

    The result is None if one of them is an inference tensor, which cannot be stamped.
    """
    try:
        return TensorStamp(tensors, context)
    except RuntimeError:
        return None


class WeightsVersion:
    """The version of a set of weights, by which caches detect that the weights may have changed.

    The set contains many weights of this process, such as all trainable weights. A cached value
    records the version that the weights had when it was cached. If the current version is a
    different object, the cached value is not used, because the weights may have changed. A version
    is a unique object rather than a number because a compiler that traces an optimizer's step also
    traces fastlora's hook. The compiler would guard on a number and recompile at each step.
    """


class ProcessWeightsVersions:
    """The process-wide versions of weights, by which caches detect changes to the weights.

    Each set of weights has a current `WeightsVersion`. A version is replaced when its weights may
    have changed. The replacement invalidates all values that were cached with the old version.

    Attributes:
        trained: Version of weights that may be trained.
        frozen: Version of frozen base weights.
        step: Version of weights that may be trained, for values computed in a forward pass with
            gradients. Forward passes do not change it.
    """

    def __init__(self) -> None:
        self.trained, self.frozen, self.step = WeightsVersion(), WeightsVersion(), WeightsVersion()
        # Maps the id of each storage to a weak reference to the storage, for the frozen base
        # weights that cached values depend on. The tensors themselves are not referenced, because
        # `torch.utils.swap_tensors` does not support tensors with weak references.
        self._watched: dict[int, StorageWeakRef] = {}
        self._purge_at = 1024
        self._hooked = False

    def version_of_trainable_weights(self) -> WeightsVersion:
        """Return the current version of the trainable weights.

        The version is stored with cached values that were computed from these weights.
        """
        self._watch_steps()
        return self.trained

    def version_for_group_outputs(self) -> WeightsVersion:
        """Return the current `WeightsVersion` for validating a layer group's cached outputs.

        The layers form a shared-input group. The version is stored with the cached outputs, which
        are valid only as long as this version is current.
        """
        self._watch_steps()
        return self.step

    def version_of_base_weight(self, weight: torch.Tensor) -> WeightsVersion:
        """Return the current version of the given base weight.

        The version is stored with cached values that were computed from the weight. All frozen
        weights share one version, and so do all trainable weights.
        """
        if weight.requires_grad:
            return self.version_of_trainable_weights()
        self.version_of_trainable_weights()
        if _storage_id(weight) not in self._watched:
            self._watch(weight)
        return self.frozen

    def invalidate_trainable_weights(self) -> None:
        """Invalidate all cached values that were computed from trainable weights."""
        self.trained, self.step = WeightsVersion(), WeightsVersion()

    def invalidate_all(self) -> None:
        """Invalidate all cached values that were computed from weights, including frozen weights.

        All versions are replaced.
        """
        self.trained, self.frozen, self.step = WeightsVersion(), WeightsVersion(), WeightsVersion()

    def invalidate_stepped_weights(self, optimizer: torch.optim.Optimizer) -> None:
        """Invalidate cached values computed from weights that an optimizer step may have changed.

        The versions of these weights are replaced.
        """
        self.trained, self.step = WeightsVersion(), WeightsVersion()
        # A compiled graph cannot look up weights by their storage.
        if torch.compiler.is_compiling() or self._holds_watched(optimizer):
            self.frozen = WeightsVersion()

    def _watch_steps(self) -> None:
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_post_hook(_after_step)

    def _watch(self, weight: torch.Tensor) -> None:
        if len(self._watched) >= self._purge_at:
            watched = list(self._watched.items())
            self._watched = {key: ref for key, ref in watched if not ref.expired()}
            self._purge_at = max(1024, 2 * len(self._watched))
        self._watched[_storage_id(weight)] = StorageWeakRef(weight.untyped_storage())

    def _holds_watched(self, optimizer: torch.optim.Optimizer) -> bool:
        groups = optimizer.param_groups
        return bool(self._watched) and any(
            _storage_id(weight) in self._watched for group in groups for weight in group["params"]
        )


def _storage_id(weight: torch.Tensor) -> int:
    """Return an integer that identifies a weight's storage.

    A sparse weight has no storage. For such a weight, the result is 0.
    """
    try:
        return weight.untyped_storage()._cdata
    except RuntimeError:
        return 0


weights_versions = ProcessWeightsVersions()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    weights_versions.invalidate_stepped_weights(optimizer)
