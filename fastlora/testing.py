"""Tolerances from a float64 truth: the one way this project's tests compare numbers.

A result passes when its error is at most twice that of the plain PyTorch expression in the same
dtype, plus one rounding of the largest value. No tolerance is picked by hand.
"""

from __future__ import annotations

import torch


def error_budget(same_dtype: torch.Tensor, truth: torch.Tensor) -> float:
    """Returns the largest error that a result may have.

    Args:
        same_dtype: What PyTorch computes in the dtype under test, any shape.
        truth: The float64 result, same shape.
    """
    eps = torch.finfo(same_dtype.dtype).eps
    reference_error = (same_dtype.double() - truth).abs().max().item() if truth.numel() else 0.0
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return 2.0 * (reference_error + eps * largest)


def assert_within_budget(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, what: str = "result"
) -> None:
    """Raises `AssertionError` unless ``actual`` is as near to ``truth`` as PyTorch's own result.

    Args:
        actual: The result under test.
        same_dtype: What PyTorch computes in the same dtype, same shape.
        truth: The float64 result, same shape.
        what: Name of the quantity, for the message.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"truth must be float64, got {truth.dtype}")
    if actual.shape != truth.shape:
        raise AssertionError(f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    if not truth.numel():
        return
    budget = error_budget(same_dtype, truth)
    error = (actual.double().cpu() - truth.cpu()).abs().max().item()
    if not error <= budget:  # also catches NaN
        raise AssertionError(f"{what}: error {error:.3e} exceeds the budget {budget:.3e}")
