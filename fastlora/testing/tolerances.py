"""Tolerances for the numeric comparisons in this project's tests, derived from float64 references.

A result passes if its largest absolute error is at most ``2 * (error + eps * max|truth|)``. Here
``truth`` is the float64 reference, ``error`` is the largest absolute error of the plain PyTorch
expression in the dtype under test, and ``eps`` is the machine epsilon of that dtype. No tolerance
is chosen by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn


def error_budget(same_dtype: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the largest error that is allowed for a result.

    A result with this absolute error still passes.

    Args:
        same_dtype: PyTorch's result in the dtype under test. It may have any shape.
        truth: The float64 reference, of the same shape.
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
        same_dtype: PyTorch's result, of the same dtype and shape.
        truth: The float64 reference, of the same shape.
        what: The name of the quantity, for the error message.

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


def run_with_largest_error(runs: Iterable[torch.Tensor], truth: torch.Tensor) -> torch.Tensor:
    """Return the run with the largest absolute error.

    The result can be passed to `error_budget` as ``same_dtype``. Compute ``runs`` with PyTorch and
    with several orders of summation, because a single run may be exact by chance and would then
    leave almost no budget.

    Args:
        runs: Results in the dtype under test, of the same shape as ``truth``.
        truth: The float64 reference.
    """
    errors = ((run, (run.double() - truth).abs()) for run in runs)
    return max(errors, key=lambda pair: pair[1].max().item() if truth.numel() else 0.0)[0]


@contextlib.contextmanager
def random_summation_order(model: nn.Module, seed: int) -> Iterator[None]:
    """Randomize a model's order of summation during a ``with`` block.

    The sums in the model's linear layers are then computed in a random order. No order of summation
    is more accurate than another, but a deep model can amplify a difference in the last bit. The
    largest error over several random orders therefore shows how inaccurate PyTorch's own result can
    be. A single run does not show this. This context manager is not thread-safe.

    Args:
        model: The model. Its `torch.nn.Linear` modules then sum the output and the gradient of the
            input in a random order. Modules with another forward method, such as fastlora's layers,
            are not affected.
        seed: The seed of the random orders.
    """
    generator = torch.Generator().manual_seed(seed)

    def again(module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> torch.Tensor:
        assert isinstance(module, nn.Linear)
        weight, device = module.weight, y.device
        n, k = (
            torch.randperm(size, generator=generator, device="cpu").to(device)
            for size in weight.shape
        )
        shuffled = weight.index_select(0, n).index_select(1, k)
        y = F.linear(args[0].index_select(-1, k), shuffled).index_select(-1, n.argsort())
        return y if module.bias is None else y + module.bias

    linears = [
        module
        for module in model.modules()
        if type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    ]
    # Run before other hooks, which receive the output of this one.
    handles = [module.register_forward_hook(again, prepend=True) for module in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
