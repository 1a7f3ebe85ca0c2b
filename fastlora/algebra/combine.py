"""Methods that combine the tensors of several adapters into a weighted sum.

Some methods first drop small values, random values, or values whose sign is in the minority. The
methods are task arithmetic (https://arxiv.org/abs/2212.04089), TIES
(https://arxiv.org/abs/2306.01708), and DARE (https://arxiv.org/abs/2311.03099). Their names and the
order of their operations are those of PEFT 0.21.2, ``utils/merge_utils.py``, so the same random
seed gives the same values as in PEFT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastlora.validation import ConfigError

SVD = "_svd"


class CombinationMethodSpec(NamedTuple):
    """Specification of an adapter combination method.

    The specification contains the function with which the method prunes values, and an option that
    states whether the method elects signs. A method may prune values, elect signs, do both, or do
    neither. `METHODS` maps the name of each method, such as ``"ties"``, to its specification. Each
    method combines several tensors of the same shape into one tensor. The tensors are the adapters'
    factors or updates.

    Attributes:
        prune: Function that takes a tensor and a density and returns the tensor with some of its
            values set to zero, or None for no pruning.
        elects: Whether to average only the values that have the majority sign.
    """

    prune: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    elects: bool = False


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the values that have the largest magnitudes, and zero the others.

    The number of values that are kept is ``density`` times the number of all values, rounded down.
    Return the result as a new tensor.

    Args:
        tensor: The tensor.
        density: Fraction of the values to keep.
    """
    flat = tensor.flatten()
    result = torch.zeros_like(flat)
    index = flat.abs().topk(int(density * flat.numel())).indices
    return result.index_copy_(0, index, flat[index]).view_as(tensor)


def random_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Randomly drop values of a tensor so that, on average, a fraction ``density`` of them remains.

    Each value is kept with probability ``density``, and is then divided by ``density``. The dropped
    values become zero. Return the result as a new tensor.
    """
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


METHODS = {
    "linear": CombinationMethodSpec(),
    "ties": CombinationMethodSpec(magnitude_based_pruning, elects=True),
    "dare_linear": CombinationMethodSpec(random_pruning),
    "dare_ties": CombinationMethodSpec(random_pruning, elects=True),
    "magnitude_prune": CombinationMethodSpec(magnitude_based_pruning),
}
# Methods without the suffix combine the factors. Methods with the suffix combine the updates, the
# products of the factors. ``cat`` concatenates the factors.
COMBINATIONS = (*METHODS, "svd", *(name + SVD for name in METHODS if name != "linear"), "cat")


def check_required_density(combination: str, density: float | None) -> None:
    """Raise `ConfigError` if a combination type requires a density and none is given.

    The error is also raised if the required density is not a number in (0, 1].
    """
    method = METHODS.get(combination.removesuffix(SVD))
    if method is None or method.prune is None:
        return
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or density is None or not 0.0 < density <= 1.0:
        raise ConfigError(
            f"combination_type={combination!r} needs a density in (0, 1] (the fraction of values "
            f"to keep), got {density!r}"
        )


def combine(
    method: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float | None = None,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """Combine weighted tensors into one tensor, using the given method.

    The tensors must have the same shape. For ``ties`` and ``dare_ties``, the result is the mean of
    the weighted values that have the majority sign. For other methods, it is the weighted sum.

    Args:
        method: Name of the method, a key of `METHODS`.
        tensors: The tensors to combine, at least one.
        weights: The weight of each tensor.
        density: Fraction of the values to keep, in (0, 1], or None to keep all values. Methods that
            do not prune ignore it.
        majority_sign_method: How to determine the majority sign of each value: the sign of the sum
            over the tensors (``"total"``), or the sign that more tensors have (``"frequency"``).

    Returns:
        A new tensor of the same shape.
    """
    prune, elects = METHODS[method]
    if prune is not None and density is not None and density < 1:
        tensors = [prune(tensor, density) for tensor in tensors]
    if not elects:
        total = tensors[0] * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total += tensor * weight
        return total
    signs = [tensor.sign() for tensor in tensors]
    total, count = torch.zeros_like(tensors[0]), torch.zeros_like(tensors[0])
    for vote in tensors if majority_sign_method == "total" else signs:
        count += vote
    elected = torch.where(count >= 0, 1.0, -1.0)
    count.zero_()
    for tensor, sign, weight in zip(tensors, signs, weights, strict=True):
        agrees = sign == elected
        total += torch.where(agrees, tensor * weight, 0.0)
        count += agrees
    return total / count.clamp_(min=1.0)
