"""Singular value decomposition of low-rank updates, and the error of reducing their rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastlora.validation import AdapterStateError

# The factors of an update ``lora_b @ lora_a`` [N, K]: lora_a [R, K] and lora_b [N, R].
FactorPair = tuple[torch.Tensor, torch.Tensor]


class Svd(NamedTuple):
    """The singular value decomposition of a matrix.

    The decomposed matrix ``[N, K]``, for example a delta weight, is ``u @ diag(s) @ vh``.

    Attributes:
        u: Left singular vectors, ``[N, R]``.
        s: Singular values in descending order, ``[R]``.
        vh: Right singular vectors, ``[R, K]``.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor

    def num_singular_values_to_keep(self, rank: int | float) -> int:
        """Return the number of singular values to keep for a given rank or fraction of the energy.

        The energy is the sum of the squares of all singular values. The result is at most R, the
        number of singular values of the decomposition.

        Args:
            rank: The number of singular values as an int, or a float in (0, 1]. For a float, the
                result is the smallest number of leading singular values whose squares add up to at
                least this fraction of the energy.
        """
        if isinstance(rank, int):
            return min(rank, self.s.numel())
        energy = self.s.double().square().cumsum(0)
        if not bool(energy[-1] > 0):
            return 1
        return min(int((energy < rank * energy[-1]).sum()) + 1, self.s.numel())

    def relative_truncation_error(self, rank: int) -> float:
        """Return the relative error of truncation to a given rank.

        The error is measured in the Frobenius norm.

        Args:
            rank: Number of singular values that remain.
        """
        energy = self.s.double().square()
        total = float(energy.sum())
        return (float(energy[rank:].sum()) / total) ** 0.5 if total else 0.0


def check_factors_finite(where: str, *tensors: torch.Tensor) -> None:
    """Raise `AdapterStateError` if any of the tensors contains NaN or infinite values.

    Such a tensor cannot be decomposed.

    Args:
        where: Description of the tensors, which starts the error message.
        tensors: The tensors to check.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise AdapterStateError(
            f"{where} contains NaN or infinite values, so it cannot be decomposed; find the "
            "training step that first produced them"
        )


def compute_svd(matrix: torch.Tensor, driver: str | None = None) -> Svd:
    """Return the singular value decomposition of a matrix.

    The matrix is ``[N, K]``. The decomposition is computed in fp32, or in fp64 for a matrix in
    fp64.

    Args:
        matrix: A matrix of any floating-point dtype.
        driver: cuSOLVER driver, as in `torch.linalg.svd`. It must be None for a matrix on a CPU.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    return Svd(*torch.linalg.svd(wide, full_matrices=False, driver=driver))


def svd_of_weighted_sum(
    pairs: Sequence[FactorPair], weights: Sequence[float], driver: str | None = None
) -> Svd:
    """Return the singular value decomposition of a weighted sum of low-rank products.

    The sum is ``sum(weight * lora_b @ lora_a)`` over all pairs. Let R be the sum of the pairs'
    ranks. If R is less than both N and K, the result is computed from the factors without forming
    the full ``[N, K]`` sum, and only an ``[R, R]`` matrix is decomposed. For any other R, the full
    sum is smaller than the factors, so the full sum is formed and decomposed directly.

    Args:
        pairs: Factor pairs (lora_a ``[R_i, K]``, lora_b ``[N, R_i]``).
        weights: The weight of each pair.
        driver: cuSOLVER driver, as in `compute_svd`.
    """
    dtype = torch.promote_types(pairs[0][0].dtype, torch.float32)
    lora_a = torch.cat([a.to(dtype) for a, _ in pairs])
    lora_b = torch.cat([b.to(dtype) * w for (_, b), w in zip(pairs, weights, strict=True)], dim=1)
    if lora_a.shape[0] >= min(lora_a.shape[1], lora_b.shape[0]):
        return compute_svd(lora_b @ lora_a, driver)
    left, upper = torch.linalg.qr(lora_b)
    right, lower = torch.linalg.qr(lora_a.t())
    inner = compute_svd(upper @ lower.t(), driver)
    return Svd(left @ inner.u, inner.s, inner.vh @ right.t())


def clamp_factors_to_quantile(
    lora_a: torch.Tensor, lora_b: torch.Tensor, quantile: float
) -> FactorPair:
    """Clamp an adapter's factors to a quantile of their values, as PEFT's ``svd_clamp`` does.

    Returns the clamped lora_a and lora_b. Both are clamped to ``[-bound, bound]``, where the bound
    is the quantile of the signed values of both factors together.

    Args:
        lora_a: ``[R, K]``.
        lora_b: ``[N, R]``.
        quantile: The quantile to use as the bound, as a probability in [0, 1].
    """
    values, index = torch.cat([lora_b.flatten(), lora_a.flatten()]).sort()[0], quantile
    # `torch.quantile` accepts at most 2 ** 24 values, so the quantile is computed here.
    place = index * (values.numel() - 1)
    below = int(place)
    above = min(below + 1, values.numel() - 1)
    bound = float(torch.lerp(values[below], values[above], place - below))
    return lora_a.clamp(-bound, bound), lora_b.clamp(-bound, bound)


def pad_factor(tensor: torch.Tensor, rank: int, dim: int) -> torch.Tensor:
    """Return a factor padded with zeros to size ``rank`` in dimension ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor
