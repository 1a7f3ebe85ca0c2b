"""Tolerances from a float64 truth: the one way this project's tests compare numbers.

A result passes when its error is at most twice that of the plain PyTorch expression in the same
dtype, plus one rounding of the largest value. No tolerance is picked by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


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


def farthest(runs: Iterable[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Returns the run with the largest error, of PyTorch's own in several orders of summation.

    One order may be right to the last bit by chance, and no budget would be left.

    Args:
        runs: Results in the dtype under test, of truth's shape.
        truth: The float64 result.
    """
    errors = ((run, (run.double() - truth).abs()) for run in runs)
    return max(errors, key=lambda pair: pair[1].max().item() if truth.numel() else 0.0)[0]


@contextlib.contextmanager
def summed_otherwise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within the block every linear adds its products in another order, drawn at random.

    The result is as good as that of any order. Where a deep model makes of the last bit what chance
    will have, the worst of several orders says what PyTorch's own result may be off by; a single
    run does not.

    Args:
        model: Its `torch.nn.Linear` modules take part, backwards included. Not thread-safe.
        seed: Of the orders.
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
    # Before other hooks, which work on what this one returns.
    handles = [module.register_forward_hook(again, prepend=True) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
