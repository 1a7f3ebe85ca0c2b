"""A layer's scalings, which compiled graphs take as inputs.

To whoever sets or reads one, a number by adapter name, as in PEFT. Beside each there is a tensor of
that value, which a graph reads in its place: another value, or another adapter, compiles nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

Scaling = float | torch.Tensor


class Scalings(dict[str, Scaling]):
    """Adapter name to a number, or to a tensor without dimensions (PEFT's compiled hot swap).

    Attributes:
        tensors: Adapter name to a tensor of that value, replaced when the value changes: backwards
            may still need the old one. A value that is a tensor is here itself. Of a name that went
            one may stay.
    """

    tensors: dict[str, torch.Tensor]

    def __new__(cls, *_: Any) -> Scalings:
        self = super().__new__(cls)
        self.tensors = {}  # pickle fills in items before anything else
        return self

    def __init__(self, items: Mapping[str, Scaling] | Iterable[tuple[str, Scaling]] = ()) -> None:
        super().__init__()
        if items:
            self.update(items)

    def __copy__(self) -> Scalings:
        copied = Scalings()
        copied.tensors.update(self.tensors)  # whose devices and dtypes are to stay
        copied.update(self)
        return copied

    def __setitem__(self, name: str, value: Scaling) -> None:
        super().__setitem__(name, value)
        before = self.tensors.get(name)
        device, dtype = (torch.device("cpu"), torch.float32)
        if before is not None:
            device, dtype = before.device, before.dtype
        self._make(name, device, dtype)

    def fit(self, name: str, factor: torch.Tensor) -> None:
        """Puts the tensor of a number where an adapter's factors are; fp64 beside such, or fp32.

        Beside factors on the meta device it stays where it is, for it has contents.
        """
        if factor.is_meta:
            return
        dtype = torch.float64 if factor.dtype == torch.float64 else torch.float32
        if (self.tensors[name].device, self.tensors[name].dtype) != (factor.device, dtype):
            self._make(name, factor.device, dtype)

    def _make(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        value = self[name]
        if not isinstance(value, torch.Tensor):
            with torch.inference_mode(False):  # it will be saved for a backward one day
                value = torch.full((), value, dtype=dtype, device=device)
        self.tensors[name] = value

    def setdefault(self, name: str, value: Scaling | None = None) -> Scaling:
        """As a dict's, but that there is no None."""
        if name not in self:
            if value is None:
                raise TypeError(f"scaling of {name!r} is None, expected a number")
            self[name] = value
        return self[name]

    def update(self, *items: Any, **named: Any) -> None:
        """As a dict's."""
        for name, value in dict(*items, **named).items():
            self[name] = value

    def __ior__(self, other: Mapping[str, Scaling]) -> Scalings:  # type: ignore[override,misc]
        self.update(other)
        return self
