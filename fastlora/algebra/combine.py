"""Ways to add tensors of several adapters: by weight, with small or disputed values left out.

Task arithmetic is https://arxiv.org/abs/2212.04089, TIES https://arxiv.org/abs/2306.01708, DARE
https://arxiv.org/abs/2311.03099. Names, and what each does in which order, are those of PEFT
0.21.2, ``utils/merge_utils.py``, so that the same seed gives the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from fastlora.validation import ConfigError

SVD = "_svd"


class Method(NamedTuple):
    """A way to add tensors.

    Attributes:
        prune: Makes a tensor sparse: tensor and density to tensor; None leaves it as it is.
        elects: Whether only values of the sign that most tensors have are added, and averaged.
    """

    prune: Callable[[torch.Tensor, float], torch.Tensor] | None = None
    elects: bool = False


def largest(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Returns a tensor of which only a share, the largest values, is not zero."""
    flat = tensor.flatten()
    kept = torch.zeros_like(flat)
    index = flat.abs().topk(int(density * flat.numel())).indices
    return kept.index_copy_(0, index, flat[index]).view_as(tensor)


def random_share(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Returns a tensor of which a share, drawn at random, is kept, and scaled by 1 / density."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density)) / density


METHODS = {
    "linear": Method(),
    "ties": Method(largest, elects=True),
    "dare_linear": Method(random_share),
    "dare_ties": Method(random_share, elects=True),
    "magnitude_prune": Method(largest),
}
# Of factors, or with the suffix of the updates that they make; ``cat`` puts factors side by side.
COMBINATIONS = (*METHODS, "svd", *(name + SVD for name in METHODS if name != "linear"), "cat")


def check_density(combination: str, density: float | None) -> None:
    """Raises `ConfigError` unless a way to add has the density that it needs."""
    method = METHODS.get(combination.removesuffix(SVD))
    if method is None or method.prune is None:
        return
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if not number or density is None or not 0.0 < density <= 1.0:
        raise ConfigError(
            f"combination_type={combination!r} needs a density in (0, 1], the share of values that "
            f"it keeps, got {density!r}"
        )


def combine(
    method: str,
    tensors: Sequence[torch.Tensor],
    weights: Sequence[float],
    density: float | None = None,
    majority_sign_method: str = "total",
) -> torch.Tensor:
    """Returns the weighted sum of tensors of one shape, after a method of `METHODS`.

    Args:
        method: Its name.
        tensors: At least one.
        weights: A number for each.
        density: In (0, 1], for a method that prunes.
        majority_sign_method: Whether signs are elected by the sum of values (``"total"``) or by
            the number of tensors that have them (``"frequency"``).
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
