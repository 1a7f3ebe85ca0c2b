"""What a forward needs of a base layer: its weight, for a product of ours, or what it made."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class Base(NamedTuple):
    """A base layer in one forward: a plain linear, or the output of a module that was called.

    Attributes:
        weight: ``[N, K]``; None where the module was called.
        bias: ``[N]`` or None.
        y: ``[..., N]``, what the module made; None with a weight.
        inplace: Whether y may be overwritten where no gradient is recorded.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    y: torch.Tensor | None = None
    inplace: bool = False

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ``[..., N]`` of the base layer alone."""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        if self.y is None:
            raise ValueError("neither a base weight nor a base output is given")
        return self.y

    def rows_to_write(self) -> torch.Tensor:
        """Returns y as ``[M, N]``, in memory that may be written."""
        if self.y is None:
            raise ValueError("no base output is given")
        flat = self.y.reshape(-1, self.y.shape[-1])
        return flat if self.inplace or flat.data_ptr() != self.y.data_ptr() else flat.clone()
