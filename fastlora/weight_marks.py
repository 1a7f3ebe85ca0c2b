"""Until when what was made from weights may be used again.

A cache of something made from weights is valid while the weights are the same tensors in the same
memory, and nothing has written to them. A `Stamp` records the tensors, their memory, and their
``_version``, and detects every replaced tensor.

A tensor's ``_version`` counts only some writes into it: fused optimizers, compiled code and writes
through ``.data`` move none. So whatever fastlora keeps of weights between forwards is kept with a
mark, beside a stamp, and is used only while its mark is the current one.

The mark of weights that may train ends at every step of any of PyTorch's optimizers, when a LoRA
layer's forward runs with gradients outside of compiled code, when a LoRA layer enters or leaves
training mode, and at `fastlora.refresh`. Norms of a frozen base weight are expensive, and steps of
its adapters leave them as they are: the mark of frozen weights ends only where an optimizer that
steps holds one of them. What a forward with gradients makes for a layer that is called next has a
mark that forwards do not end. All marks are the process's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook


class Kept:
    """What an object keeps and its copies do not have: they start with an empty one."""

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return type(self)()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return type(self), ()


class Stamp:
    """The tensors that something was made from, and their state at that time.

    An address and a version do not identify a tensor's memory: PyTorch reuses freed memory, so a
    tensor that is replaced twice may have its first address again. A stamp therefore compares the
    identity of the storage, and holds a weak reference to it. The weak reference keeps none of the
    memory alive, but as long as it exists no other storage gets the same identity.

    A stamp does not detect writes that move no version. Marks do, as part of the ``context``. Nor
    does it compare the tensors as objects: the ``context`` has the ``id`` of those that matter.

    Args:
        tensors: Tensors that count their versions.
        context: What else the thing was made from, compared by ``==``.

    Raises:
        RuntimeError: One of the tensors is an inference tensor, which counts no versions.
    """

    __slots__ = ("_context", "_memory", "_plain", "_states")

    def __init__(self, tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> None:
        self._context = context
        # A subclass may answer each question in Python (bitsandbytes' parameters do): microseconds.
        self._plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in tensors)
        with torch._C.DisableTorchFunctionSubclass():
            self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
            self._states = _states_of(tensors)

    def holds(self, tensors: Sequence[torch.Tensor], context: tuple[Hashable, ...] = ()) -> bool:
        """Whether these tensors have the same memory and versions, with an equal context."""
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
    """Returns a stamp of tensors; None where one of them counts no versions."""
    try:
        return Stamp(tensors, context)
    except RuntimeError:
        return None


class Mark:
    """Compared by identity.

    No number: a compiler that traces an optimizer's step, and our hook with it, would guard the
    number and compile again at each step.
    """


class Marks:
    """The current marks.

    Attributes:
        trained: Of weights that may train.
        frozen: Of base weights that are frozen.
        step: Of weights that may train, through the forwards with gradients between two steps.
    """

    def __init__(self) -> None:
        self.trained, self.frozen, self.step = Mark(), Mark(), Mark()
        # The memory of frozen base weights that something is kept of, by its identity. Not the
        # tensors: `torch.utils.swap_tensors` refuses a tensor that has a weak reference.
        self._watched: dict[int, StorageWeakRef] = {}
        self._purge_at = 1024
        self._hooked = False

    def of_trained(self) -> Mark:
        """Returns the mark to keep what was made from weights that may train with."""
        self._watch_steps()
        return self.trained

    def of_step(self) -> Mark:
        """Returns the mark to keep what one layer's forward with gradients makes for another's."""
        self._watch_steps()
        return self.step

    def of_base(self, weight: torch.Tensor) -> Mark:
        """Returns the mark to keep what was made from a base weight with."""
        if weight.requires_grad:
            return self.of_trained()
        self.of_trained()
        if _memory_of(weight) not in self._watched:
            self._watch(weight)
        return self.frozen

    def end_trained(self) -> None:
        """Ends what is kept of weights that may train."""
        self.trained, self.step = Mark(), Mark()

    def end_all(self) -> None:
        """Ends whatever is kept of weights."""
        self.trained, self.frozen, self.step = Mark(), Mark(), Mark()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Ends what an optimizer's step may have changed."""
        self.trained, self.step = Mark(), Mark()
        # A graph cannot look for weights by their memory.
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
    """Returns the identity of a weight's storage, or 0 for a sparse weight, which has none."""
    try:
        return weight.untyped_storage()._cdata
    except RuntimeError:
        return 0


marks = Marks()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    marks.after_step(optimizer)
