"""`Stored`, the interface through which merging reads and writes a base weight, and `Plain`.

`Plain` implements the interface for floating-point weights, and `fastlora.layers.quantised` for
quantized weights. `fastlora.layers.bases` finds the implementation for a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastlora.ops.torch.reference import INTEGERS
from fastlora.sharding import local

Fingerprint = tuple[torch.Tensor, ...]

_ROWS = 64


class Stored(Protocol):
    """Protocol through which merging reads and writes a base layer's weight, ``[N, K]``.

    Attributes:
        in_place: Whether a write to the result of `dense` changes the weight itself.
        backend: PEFT's name for the quantization in a layer's status, or None.
    """

    in_place: bool
    backend: str | None

    def dense(self) -> torch.Tensor:
        """Return the weight as a matrix, either a view of it or a new tensor."""

    def wide(self) -> torch.Tensor:
        """Return the matrix into which adapters are merged: the weight, or a new fp32 copy."""

    def square_distance(self, matrix: torch.Tensor) -> float:
        """Return the squared Frobenius norm of the difference between the weight and a matrix."""

    def check_writable(self) -> None:
        """Raise `UnsupportedLayerError` if `write` would."""

    def write(self, dense: torch.Tensor) -> None:
        """Replace the weight by ``dense [N, K]``, quantized as the weight was."""

    def keep(self) -> object:
        """Return a copy of all data that `write` changes, for `restore`."""

    def restore(self, kept: object) -> None:
        """Restore the result of `keep`, bit for bit, on the weight's device."""

    def moved(self, kept: object, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """Return a result of `keep`, converted as ``fn`` has converted the module's tensors."""

    def dense_of(self, kept: object) -> torch.Tensor:
        """Return the matrix ``[N, K]`` that a result of `keep` represents."""

    def fingerprint(self) -> Fingerprint:
        """Return a tuple of tensors that change whenever other code writes to the weight."""


class Plain:
    """A floating-point weight that merging writes into.

    Args:
        weight: The weight, in any shape.
        matrix: Returns a view of the weight as ``[N, K]``; None if it has that shape.
    """

    in_place = True
    backend: str | None = None

    def __init__(
        self, weight: torch.Tensor, matrix: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.weight, self._matrix = weight, matrix

    def dense(self) -> torch.Tensor:
        return self.dense_of(self.weight)

    def wide(self) -> torch.Tensor:
        return self.dense().detach()

    def square_distance(self, matrix: torch.Tensor) -> float:
        return float((self.dense() - matrix).square().sum(dtype=torch.float64))

    def check_writable(self) -> None:
        """Do nothing, because a plain weight is always writable."""

    def write(self, dense: torch.Tensor) -> None:
        """Do nothing, because ``dense`` is the weight itself."""

    def keep(self) -> object:
        return self.weight.detach().clone()

    @torch.no_grad()
    def restore(self, kept: object) -> None:
        weight: Any = kept
        self.weight.copy_(weight)

    def moved(self, kept: object, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        weight: Any = kept
        return fn(weight)

    def dense_of(self, kept: object) -> torch.Tensor:
        weight: Any = kept
        made: torch.Tensor = weight if self._matrix is None else self._matrix(weight)
        return made

    def fingerprint(self) -> Fingerprint:
        return sums_of_bits(self.weight)


def sums_of_bits(tensor: torch.Tensor | None) -> Fingerprint:
    """Return the sums of a tensor's bits, as integers, over its rows and over its columns.

    Any write changes the sums, whether or not it changes the tensor's version. Examples are writes
    by an optimizer, by compiled code, through ``.data``, or by ``load_state_dict``.
    """
    if tensor is None:
        return ()
    bits = local(tensor.detach()).view(INTEGERS.get(tensor.itemsize, torch.int8))
    if bits.dim() < 2:
        return (
            (bits.sum(dtype=torch.int64),)
            if bits.dim() == 0
            else (bits.to(torch.int64, copy=True),)
        )
    # Process some rows at a time, because a 64-bit sum copies its whole input.
    by_row, by_column = [], bits.new_zeros(bits.shape[1:], dtype=torch.int64)
    for rows in bits.split(_ROWS):
        by_column += rows.sum(0, dtype=torch.int64)
        by_row.append(rows.flatten(1).sum(1, dtype=torch.int64))
    return torch.cat(by_row) if by_row else by_column, by_column


def equal(some: Fingerprint, others: Fingerprint) -> bool:
    """Return whether two fingerprints are equal."""
    return len(some) == len(others) and all(map(torch.equal, some, others))
