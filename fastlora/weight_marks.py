"""Until when what was made from weights may be used again.

A tensor's ``_version`` counts only some writes into it: fused optimizers, compiled code and writes
through ``.data`` move none. So whatever fastlora keeps of weights between forwards is kept with a
mark, beside versions and addresses, and is used only while its mark is the current one.

The mark of weights that may train ends at every step of any of PyTorch's optimizers, when a LoRA
layer's forward runs with gradients outside of compiled code, when a LoRA layer enters or leaves
training mode, and at `fastlora.refresh`. Norms of a frozen base weight are expensive, and steps of
its adapters leave them as they are: the mark of frozen weights ends only where an optimizer that
steps holds one of them. What a forward with gradients makes for a layer that is called next has a
mark that forwards do not end. All marks are the process's.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class Kept:
    """What an object keeps and its copies do not have: they start with an empty one."""

    def __deepcopy__(self, memo: dict[int, object]) -> Kept:
        return type(self)()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return type(self), ()


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
        # Base weights that something is kept of, by id: tensors do not compare as keys must.
        self._watched: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()
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
        self._watched[id(weight)] = weight
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
        # A graph cannot look for weights by their ids.
        if torch.compiler.is_compiling() or self._holds_watched(optimizer):
            self.frozen = Mark()

    def _watch_steps(self) -> None:
        if not self._hooked:
            self._hooked = True
            register_optimizer_step_post_hook(_after_step)

    def _holds_watched(self, optimizer: torch.optim.Optimizer) -> bool:
        groups = optimizer.param_groups
        return any(
            self._watched.get(id(weight)) is weight
            for group in groups
            for weight in group["params"]
        )


marks = Marks()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    marks.after_step(optimizer)
