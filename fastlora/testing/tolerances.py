"""Tolerances derived from a float64 truth, for every numeric comparison in this project's tests.

A result passes if its error is at most ``2 * (error + eps * max|truth|)``. Here ``error`` is the
error of the plain PyTorch expression in the same dtype, and ``eps`` belongs to that dtype. No
tolerance is chosen by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def error_budget(same_dtype: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest absolute error that a result may have.

    Args:
        same_dtype: PyTorch's result in the dtype under test, any shape.
        truth: The float64 result, same shape.
    """
    eps = torch.finfo(same_dtype.dtype).eps
    reference_error = (same_dtype.double() - truth).abs().max().item() if truth.numel() else 0.0
    largest = truth.abs().max().item() if truth.numel() else 0.0
    return 2.0 * (reference_error + eps * largest)


def assert_within_budget(
    actual: torch.Tensor, same_dtype: torch.Tensor, truth: torch.Tensor, what: str = "result"
) -> None:
    """Raise `AssertionError` if the error of ``actual`` exceeds its error budget.

    Args:
        actual: The result under test.
        same_dtype: PyTorch's result in the same dtype, same shape.
        truth: The float64 result, same shape.
        what: Name of the quantity, for the error message.

    Raises:
        AssertionError: The shapes differ, or the error exceeds the budget of `error_budget`.
        TypeError: ``truth`` is not float64.
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


def farthest(runs: Iterable[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Return the run with the largest error.

    Pass PyTorch's own results with several orders of summation. A single order may be exact by
    chance and would leave almost no budget.

    Args:
        runs: Results in the dtype under test, with the shape of ``truth``.
        truth: The float64 result.
    """
    errors = ((run, (run.double() - truth).abs()) for run in runs)
    return max(errors, key=lambda pair: pair[1].max().item() if truth.numel() else 0.0)[0]


@contextlib.contextmanager
def summed_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Make every linear layer add its products in a random order within the block.

    The result is as accurate as with any other order. A deep model can amplify a difference in the
    last bit. The worst of several orders then shows how far PyTorch's own result may be off, which
    a single run does not.

    Args:
        model: The model. All of its `torch.nn.Linear` modules are affected, including their
            backward. Not thread-safe.
        seed: Seed of the random orders.
    """
    generator = torch.Generator().manual_seed(seed)

    def again(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        weight, device = module.weight, y.device
        n, k = (torch.randperm(size, generator=generator).to(device) for size in weight.shape)
        shuffled = weight.index_select(0, n).index_select(1, k)
        y = F.linear(args[0].index_select(-1, k), shuffled).index_select(-1, n.argsort())
        return y if module.bias is None else y + module.bias

    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # Run before other hooks, which receive the output of this one.
    handles = [module.register_forward_hook(again, prepend=True) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
