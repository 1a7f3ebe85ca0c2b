"""Updates as factors of a low rank: singular value decomposition, and what a smaller rank loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.validation import AdapterStateError

# A factor pair: lora_a [R, K] and lora_b [N, R] of the update lora_b @ lora_a [N, K].
Pair = tuple[torch.Tensor, torch.Tensor]


class Decomposition(NamedTuple):
    """``u @ diag(s) @ vh``: u ``[N, R]``, s ``[R]`` from the largest, vh ``[R, K]``."""

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    def rank_for(self, rank: int | float) -> int:
        """Returns a rank: as it is, at most R, or the smallest with this share of the squares.

        Args:
            rank: A whole number, or a share in (0, 1].
        """
        if isinstance(rank, int):
            return min(rank, self.s.numel())
        energy = self.s.double().square().cumsum(0)
        if not bool(energy[-1] > 0):
            return 1
        return min(int((energy < rank * energy[-1]).sum()) + 1, self.s.numel())

    def error(self, rank: int) -> float:
        """Returns what cutting off at a rank loses, as a share of the Frobenius norm."""
        energy = self.s.double().square()
        total = float(energy.sum())
        return (float(energy[rank:].sum()) / total) ** 0.5 if total else 0.0


def check_finite(where: str, *tensors: torch.Tensor) -> None:
    """Raises `AdapterStateError` where a value is not finite: no decomposition takes that."""
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise AdapterStateError(
            f"{where} has values that are not finite, which cannot be decomposed; look for the "
            "step of its training that made them"
        )


def decompose(matrix: torch.Tensor, driver: str | None = None) -> Decomposition:
    """Returns the decomposition of a matrix ``[N, K]``, in fp32 or wider.

    Args:
        matrix: Of any floating-point dtype.
        driver: Of cuSOLVER, as in `torch.linalg.svd`; for matrices on a GPU only.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return Decomposition(*torch.linalg.svd(wide, full_matrices=False, driver=driver))


def decompose_pairs(
    pairs: Sequence[Pair], weights: Sequence[float], driver: str | None = None
) -> Decomposition:
    """Returns the decomposition of ``sum(weight * lora_b @ lora_a)``, by a matrix [R, R].

    R is the sum of the pairs' ranks. Where that is not less than N or K, the sum is decomposed.

    Args:
        pairs: lora_a ``[R_i, K]`` and lora_b ``[N, R_i]``.
        weights: A number for each.
        driver: As in `decompose`.
    """
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    lora_a = torch.cat([a.to(dtype) for a, _ in pairs])
    lora_b = torch.cat([b.to(dtype) * w for (_, b), w in zip(pairs, weights, strict=True)], dim=1)
    if lora_a.shape[0] >= min(lora_a.shape[1], lora_b.shape[0]):
        return decompose(lora_b @ lora_a, driver)
    left, upper = torch.linalg.qr(lora_b)
    right, lower = torch.linalg.qr(lora_a.t())
    inner = decompose(upper @ lower.t(), driver)
    return Decomposition(left @ inner.u, inner.s, inner.vh @ right.t())


def clamped(lora_a: torch.Tensor, lora_b: torch.Tensor, quantile: float) -> Pair:
    """Returns factors whose values lie within plus and minus the quantile of all of them."""
    values, index = torch.cat([lora_b.flatten(), lora_a.flatten()]).sort()[0], quantile
    # torch.quantile takes at most 2 ** 24 values.
    place = index * (values.numel() - 1)
    below = int(place)
    above = min(below + 1, values.numel() - 1)
    bound = float(torch.lerp(values[below], values[above], place - below))
    return lora_a.clamp(-bound, bound), lora_b.clamp(-bound, bound)


def padded(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Returns a factor with zeros behind its rank rows, so that there are ``rank``."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor
