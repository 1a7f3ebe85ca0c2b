"""CorDA: the adapter starts as the directions of the base weight that data uses most, or least.

Method: https://arxiv.org/abs/2406.05223, as in PEFT. `fastlora.model.calibration.preprocess_corda`
leaves the decomposition of each layer on its module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.init.configs import CordaConfig
from fastlora.init.data import hooked
from fastlora.init.registry import (
    Given,
    Settings,
    Start,
    check_finite,
    check_usable,
    register_init,
    without,
)
from fastlora.validation import InitialisationError

# PEFT's names, so that either library's calibration serves the other.
DATA, PARTS = "eigens", ("S_WC", "U_WC", "V_WC")


@dataclass
class CordaEigens:
    """A layer's decomposition: ``W C = U S V^T`` with C of its inputs; names are PEFT's.

    Attributes:
        S_WC: R singular values.
        U_WC: ``[N, R]``.
        V_WC: ``[K, R]``, with the inverse of C.
    """

    S_WC: torch.Tensor
    U_WC: torch.Tensor
    V_WC: torch.Tensor


@register_init(
    "corda",
    title="CorDA",
    changes_base=True,
    converts=True,
    data=DATA,
    calibration="preprocess_corda",
    settings=Settings("corda_config", CordaConfig),
)
def corda(given: Given) -> Start:
    """B is ``U sqrt(S / scaling)`` and A ``sqrt(S / scaling) V^T``.

    Raises:
        InitialisationError: The decomposition is of another shape, not finite, or of a lower rank.
    """
    weight = given.weight()
    eigens: Any = given.data  # `CordaEigens`, of either library
    s, u, v = (part.to(weight) for part in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    (n, k), rank = weight.shape, given.rank
    if (tuple(s.shape), tuple(u.shape), tuple(v.shape)) != ((rank,), (n, rank), (k, rank)):
        raise InitialisationError(
            f"init_lora_weights='corda': the decomposition has shapes {tuple(u.shape)}, "
            f"{tuple(s.shape)} and {tuple(v.shape)}, expected {(n, rank)}, {(rank,)} and "
            f"{(k, rank)}: run preprocess_corda with the config of the adapter, and on this model"
        )
    for name, part in (("singular values", s), ("directions", u), ("directions", v)):
        check_finite(part, f"init_lora_weights='corda': what preprocess_corda left as {name}")
    largest_first = s if s[0] >= s[-1] else s.flip(0)
    check_usable(given, largest_first, max(n, k))
    root = (s / given.scaling).sqrt()
    return without(given, weight, v.T * root[:, None], u * root)


class Covariances:
    """Sums up what layers get, ``[K, K]`` for each.

    Args:
        modules: The layers by name.
        low_precision: Sum in the inputs' dtype, not in fp32.

    Attributes:
        sums: Name to the sum over samples of ``X^T X`` with X divided by its maximum.
        counts: Name to the number of samples: sequences, or matrices where there are none.
    """

    def __init__(self, modules: Mapping[str, nn.Module], low_precision: bool) -> None:
        self.modules, self.low_precision = modules, low_precision
        self.sums: dict[str, torch.Tensor] = {}
        self.counts = dict.fromkeys(modules, 0)
        # Layers fed by one tensor share its product.
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Within the block every forward of the layers counts."""
        return hooked(self.modules, self._hook)

    def _hook(self, name: str) -> Callable[..., None]:
        def watch(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            if self._last is None or self._last[0] is not inputs[0]:
                self._last = inputs[0], self._product(x, name)
            product = self._last[1]
            self.counts[name] += 1 if x.dim() < 3 else x[..., 0, 0].numel()
            if name in self.sums:
                self.sums[name] += product
            else:
                self.sums[name] = product.clone()

        return watch

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        samples = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x[None, None]
        if not self.low_precision:
            samples = samples.float()
        largest = samples.amax(dim=(1, 2), keepdim=True).abs()
        rows = (samples / torch.where(largest == 0, 1.0, largest)).flatten(0, 1)
        product = rows.T @ rows
        check_finite(product, f"layer {name!r}: what the data gives it, squared,")
        return product

    def means(self) -> dict[str, torch.Tensor]:
        """Returns the covariances by name, and forgets them.

        Raises:
            InitialisationError: The data never got to a layer.
        """
        for name, count in self.counts.items():
            if not count:
                raise InitialisationError(
                    f"layer {name!r}: the data never got there, so that it has no covariance; run "
                    "the model that the adapter goes on, or leave it out (exclude_modules)"
                )
        self._last = None
        sums, self.sums = self.sums, {}
        return {name: total.div_(self.counts[name]) for name, total in sums.items()}


@torch.no_grad()
def decompose(
    weight: torch.Tensor, covariance: torch.Tensor, rank: int, method: str
) -> CordaEigens:
    """Returns the directions of a weight ``[N, K]`` that data with a covariance ``[K, K]`` uses.

    ``method`` is "ipm" for those used most, "kpm" for those used least. Raises
    `InitialisationError` where one of the two is not finite, or zero, or smaller than the rank.
    """
    weight, covariance = weight.float(), covariance.float()
    check_finite(weight, "the base weight")
    check_finite(covariance, "the covariance")
    if rank > min(weight.shape):
        raise InitialisationError(
            f"r={rank}, expected at most {min(weight.shape)}, the smaller side of the weight "
            f"{tuple(weight.shape)}"
        )
    mean = covariance.diagonal().mean()
    if not mean > 0:
        raise InitialisationError("the data gives it nothing but zeros")
    identity = torch.eye(len(covariance), device=covariance.device)
    damp, error = 0.01, torch.inf
    while error >= 0.05:  # more on the diagonal, until the inverse is one
        damped = covariance + identity * (mean * damp)
        inverse = torch.linalg.inv(damped)
        error = float(torch.dist(damped @ inverse, identity))
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(None, rank) if method == "ipm" else slice(-rank, None)
    v = (vh[chosen] @ inverse).T
    return CordaEigens(s[chosen].clone(), u[:, chosen].clone(), v.contiguous())
