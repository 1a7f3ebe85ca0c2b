"""`Scalings`: a layer's dict of adapter scalings, which compiled graphs take as inputs.

For users, it maps an adapter name to a number, as in PEFT. A tensor with the same value is stored
with each number, and compiled graphs read the tensor. Another value or another adapter therefore
does not cause recompilation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastlora.weights_version import weights_versions

Scaling = float | torch.Tensor


class Scalings(dict[str, Scaling]):
    """Dict that maps the names of a layer's adapters to their scalings.

    A scaling is a number, or a tensor for PEFT's compiled hot swap. Changing an adapter's scaling
    invalidates the values that were cached with the old scaling, such as packed factors.

    Attributes:
        tensors: Maps an adapter name to a tensor with the same value. A new value creates a new
            tensor, because a backward pass may still need the old one. If the value is a tensor,
            the entry is that tensor. Entries of removed names may remain.
    """

    tensors: dict[str, torch.Tensor]

    def __new__(cls, *_: Any) -> Scalings:
        self = super().__new__(cls)
        self.tensors = {}  # Set it here: pickle fills in items before it restores anything else.
        return self

    def __init__(self, items: Mapping[str, Scaling] | Iterable[tuple[str, Scaling]] = ()) -> None:
        super().__init__()
        if items:
            self.update(items)

    def __copy__(self) -> Scalings:
        copied = Scalings()
        copied.tensors.update(self.tensors)  # Keep their devices and dtypes.
        copied.update(self)
        return copied

    def __setitem__(self, name: str, value: Scaling) -> None:
        changes = name in self
        super().__setitem__(name, value)
        before = self.tensors.get(name)
        device, dtype = (torch.device("cpu"), torch.float32)
        if before is not None:
            device, dtype = before.device, before.dtype
        self._make(name, device, dtype)
        if changes:
            weights_versions.invalidate_trainable_weights()

    def move_to_factor_device(self, name: str, factor: torch.Tensor) -> None:
        """Move an adapter's scaling tensor to the device of its factors.

        The dtype is fp64 if the factors are fp64, and fp32 otherwise. If the factors are on the
        meta device, the tensor is not moved, so that its value is not lost.
        """
        if factor.is_meta:
            return
        dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
        if (self.tensors[name].device, self.tensors[name].dtype) != (factor.device, dtype):
            self._make(name, factor.device, dtype)

    def _make(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        value = self[name]
        if not isinstance(value, torch.Tensor):
            with torch.inference_mode(False):  # A backward may save it later.
                value = torch.full((), value, dtype=dtype, device=device)
        self.tensors[name] = value

    def setdefault(self, name: str, value: Scaling | None = None) -> Scaling:
        """Set an adapter's scaling if it has not been set yet.

        The method works like `dict.setdefault`, and returns the adapter's scaling.

        Raises:
            TypeError: The scaling has not been set, and ``value`` is None.
        """
        if name not in self:
            if value is None:
                raise TypeError(f"the scaling of {name!r} is None; expected a number")
            self[name] = value
        return self[name]

    def update(self, *items: Any, **named: Any) -> None:
        """Set several scalings.

        The arguments are those of `dict.update`.
        """
        for name, value in dict(*items, **named).items():
            self[name] = value

    def __ior__(self, other: Mapping[str, Scaling]) -> Scalings:  # type: ignore[override,misc]
        self.update(other)
        return self
