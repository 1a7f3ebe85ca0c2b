"""How a base layer stores the weight that adapters are merged into, and the plain way to do so.

Quantised ways are in `fastlora.layers.quantised`; `fastlora.layers.bases` finds that of a module.
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
    """A base layer's weight, ``[N, K]``.

    Attributes:
        in_place: Whether what is written into `dense` is in the weight at once.
        backend: What PEFT calls a kind of quantisation in a layer's status; None for none.
    """

    in_place: bool
    backend: str | None

    def dense(self) -> torch.Tensor:
        """Returns the weight as a matrix: a view of it, or a tensor that was just made."""

    def wide(self) -> torch.Tensor:
        """Returns what to merge into: the weight itself, or a matrix made in fp32."""

    def square_distance(self, matrix: torch.Tensor) -> float:
        """Returns the square of the Frobenius norm of what the weight and a matrix differ by."""

    def check_writable(self) -> None:
        """Raises `UnsupportedLayerError` where `write` would."""

    def write(self, dense: torch.Tensor) -> None:
        """Puts ``dense [N, K]`` in the weight's place, quantised as the weight was."""

    def keep(self) -> object:
        """Returns a copy of all that `write` changes."""

    def restore(self, kept: object) -> None:
        """Puts back what `keep` returned, bit for bit, on the weight's device."""

    def moved(self, kept: object, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """Returns what `keep` returned, once the module has applied ``fn`` to its tensors."""

    def dense_of(self, kept: object) -> torch.Tensor:
        """Returns the matrix that `keep` was called on."""

    def fingerprint(self) -> Fingerprint:
        """Returns what differs once somebody else has written to the weight."""


class Plain:
    """A floating-point weight that merging writes into.

    Args:
        weight: In any shape.
        matrix: A view of it, ``[N, K]``; None where it has that shape.
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
        """Never raises."""

    def write(self, dense: torch.Tensor) -> None:
        """Nothing is left to do: ``dense`` is the weight."""

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
    """Returns the sums of a tensor's rows and columns as integers, which a write changes.

    Whoever writes, and whatever counts it: optimizers, compiled code, ``.data``, a loaded state.
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
    # Some rows at a time: a sum in 64 bits copies all of what it sums.
    by_row, by_column = [], bits.new_zeros(bits.shape[1:], dtype=torch.int64)
    for rows in bits.split(_ROWS):
        by_column += rows.sum(0, dtype=torch.int64)
        by_row.append(rows.flatten(1).sum(1, dtype=torch.int64))
    return torch.cat(by_row) if by_row else by_column, by_column


def equal(some: Fingerprint, others: Fingerprint) -> bool:
    """Whether two fingerprints are the same."""
    return len(some) == len(others) and all(map(torch.equal, some, others))
