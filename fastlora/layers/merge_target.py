"""`MergeTarget`, the interface through which merging reads and writes a base weight.

`DenseMergeTarget` implements the interface for floating-point weights, and
`fastlora.layers.quantized` for quantized weights. `fastlora.layers.base_layers` finds the
implementation for a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from fastlora.ops.torch.reference import INTEGERS
from fastlora.sharding import local_shard

Fingerprint = tuple[torch.Tensor, ...]

_ROWS = 64


class MergeTarget(Protocol):
    """A base weight into which adapters are merged.

    This protocol has methods that read, write, save, and restore the weight. As a matrix, the
    weight is ``[N, K]``.

    Attributes:
        in_place: Whether a write to the result of `dense` changes the weight itself.
        backend: PEFT's name for the quantization in a layer's status, or None.
    """

    in_place: bool
    backend: str | None

    def dense(self) -> torch.Tensor:
        """Return the weight as a dense matrix.

        The matrix is ``[N, K]``, and is a view or a new tensor.
        """

    def merge_buffer(self) -> torch.Tensor:
        """Return a buffer in which to compute the merged weight.

        The buffer is a dense matrix with the weight's current values. If ``in_place`` is set, the
        buffer is the weight itself or a view of it. Otherwise, the buffer is a new fp32 copy of the
        weight. Adapters are merged into the buffer before `write` is called.
        """

    def squared_distance_to(self, matrix: torch.Tensor) -> float:
        """Return the squared distance between the weight and a matrix.

        The distance is the Frobenius norm of the difference.
        """

    def check_writable(self) -> None:
        """Raise `UnsupportedLayerError` if merged values cannot be written to the weight.

        For example, fastlora cannot write to some quantized weights, because it cannot quantize a
        merged weight in the same way.
        """

    def write(self, dense: torch.Tensor) -> None:
        """Write a dense matrix to the weight.

        The matrix is ``[N, K]`` and replaces the weight's values. It is quantized in the same way
        as the weight.
        """

    def snapshot(self) -> object:
        """Return a snapshot of the weight's current state, for `restore`.

        The snapshot is a copy of all data that `write` changes.
        """

    def restore(self, snapshot: object) -> None:
        """Restore the weight from a snapshot.

        A result of `snapshot` restores the weight bit for bit. The weight stays on its current
        device.
        """

    def convert_snapshot_if_needed(
        self, snapshot: object, fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> object:
        """Convert a snapshot with ``fn`` if needed, and return the result.

        ``snapshot`` is a result of the method `snapshot`. ``fn`` is the function that
        ``nn.Module._apply`` applies to the module's tensors, for example to move the module to
        another device. The returned snapshot is for use after the module has been converted. If
        `restore` does not need a converted snapshot, an implementation may return ``snapshot``
        itself without applying ``fn``.
        """

    def snapshot_to_dense(self, snapshot: object) -> torch.Tensor:
        """Return the dense matrix that a snapshot represents.

        The matrix is ``[N, K]``. The snapshot is a result of `snapshot`.
        """

    def fingerprint(self) -> Fingerprint:
        """Return a fingerprint of the weight.

        The fingerprint changes whenever other code writes to the weight.
        """


class DenseMergeTarget:
    """A dense weight into which adapters are merged.

    Args:
        weight: The weight, a floating-point tensor of any shape.
        matrix: Returns a view of the weight as ``[N, K]``; None if it has that shape.
    """

    in_place = True
    backend: str | None = None

    def __init__(
        self, weight: torch.Tensor, matrix: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.weight, self._matrix = weight, matrix

    def dense(self) -> torch.Tensor:
        return self.snapshot_to_dense(self.weight)

    def merge_buffer(self) -> torch.Tensor:
        return self.dense().detach()

    def squared_distance_to(self, matrix: torch.Tensor) -> float:
        return float((self.dense() - matrix).square().sum(dtype=torch.float64))

    def check_writable(self) -> None:
        """Check that merged values can be written to the weight.

        Merged values can always be written to a floating-point weight.
        """

    def write(self, dense: torch.Tensor) -> None:
        """Write the merged matrix to the weight.

        The matrix must be the result of `merge_buffer`, which for this class is the weight itself
        or a view of it. The weight therefore already has the values of the matrix, and nothing
        needs to be copied or converted.
        """

    def snapshot(self) -> object:
        return self.weight.detach().clone()

    @torch.no_grad()
    def restore(self, snapshot: object) -> None:
        weight: Any = snapshot
        self.weight.copy_(weight)

    def convert_snapshot_if_needed(
        self, snapshot: object, fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> object:
        weight: Any = snapshot
        return fn(weight)

    def snapshot_to_dense(self, snapshot: object) -> torch.Tensor:
        weight: Any = snapshot
        made: torch.Tensor = weight if self._matrix is None else self._matrix(weight)
        return made

    def fingerprint(self) -> Fingerprint:
        return bit_sums(self.weight)


def bit_sums(tensor: torch.Tensor | None) -> Fingerprint:
    """Return a fingerprint of a tensor, computed by summing its bit patterns.

    The bits are read as integers and summed by row and by column. Any write changes the sums,
    whether or not it changes the tensor's version. Examples are writes by an optimizer, by compiled
    code, through ``.data``, or by ``load_state_dict``.
    """
    if tensor is None:
        return ()
    bits = local_shard(tensor.detach()).view(INTEGERS.get(tensor.itemsize, torch.int8))
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


def fingerprints_equal(first: Fingerprint, second: Fingerprint) -> bool:
    """Return whether two fingerprints are equal."""
    return len(first) == len(second) and all(map(torch.equal, first, second))
