"""CorDA: initializes adapters from the directions of a weight that the data uses most, or least.

The method is from https://arxiv.org/abs/2406.05223, as implemented in PEFT. The function
`fastlora.model.calibration.preprocess_corda` stores the decomposition of each layer as an attribute
of the layer's module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.init.calibration_data import forward_pre_hooks
from fastlora.init.configs import CordaConfig
from fastlora.init.registry import (
    InitConfigField,
    InitInputs,
    InitResult,
    check_finite_for_init,
    check_used_singular_values_nonzero,
    register_init,
    subtract_update,
)
from fastlora.validation import InitializationError

# PEFT's names, so that fastlora and PEFT can use each other's calibration results.
DATA, PARTS = "eigens", ("S_WC", "U_WC", "V_WC")


@dataclass
class CordaEigens:
    """Results of the decomposition from which CorDA computes a layer's initial factors.

    The decomposition is the singular value decomposition ``W C = U S V^T``, where W is the layer's
    weight and C is the covariance of the layer's inputs. The results are the singular values and
    the singular vectors of R directions. The class and its attributes have the same names as in
    PEFT.

    Attributes:
        S_WC: Singular values, ``[R]``.
        U_WC: Left singular vectors, ``[N, R]``.
        V_WC: Right singular vectors multiplied by the inverse of C, ``[K, R]``.
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
    settings=InitConfigField("corda_config", CordaConfig),
)
def corda(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer using CorDA.

    B is ``U sqrt(S / scaling)`` and A is ``sqrt(S / scaling) V^T``, with the parts of the layer's
    `CordaEigens`. The new base weight is the old one minus the update of these factors.

    Raises:
        InitializationError: The tensors of the decomposition have the wrong shapes or contain
            values that are not finite, or the rank of the decomposition is below R.
    """
    weight = given.base_weight()
    eigens: Any = given.data  # fastlora's or PEFT's `CordaEigens`
    s, u, v = (part.to(weight) for part in (eigens.S_WC, eigens.U_WC, eigens.V_WC))
    (n, k), rank = weight.shape, given.rank
    if (tuple(s.shape), tuple(u.shape), tuple(v.shape)) != ((rank,), (n, rank), (k, rank)):
        raise InitializationError(
            "init_lora_weights='corda': the tensors of the decomposition have shapes "
            f"{tuple(u.shape)}, {tuple(s.shape)}, and {tuple(v.shape)}, expected {(n, rank)}, "
            f"{(rank,)}, and {(k, rank)}; run preprocess_corda on this model with the adapter's "
            "config"
        )
    for name, part in (("S_WC", s), ("U_WC", u), ("V_WC", v)):
        check_finite_for_init(part, f"init_lora_weights='corda': {name} from preprocess_corda")
    largest_first = s if s[0] >= s[-1] else s.flip(0)
    check_used_singular_values_nonzero(given, largest_first, max(n, k))
    root = (s / given.scaling).sqrt()
    return subtract_update(given, weight, v.T * root[:, None], u * root)


class PerLayerCovarianceAccumulator:
    """Accumulates the covariance matrix of each layer's inputs.

    Each matrix has the shape ``[K, K]``.

    Args:
        modules: Maps the name of each layer to the layer.
        low_precision: Whether to sum in the dtype of the inputs instead of fp32.

    Attributes:
        sums: Maps each layer name to the sum of ``X^T X`` over samples, where each sample X is
            divided by its maximum.
        counts: Maps each layer name to the number of samples. A sample is one sequence, or the
            entire input if the input has fewer than three dimensions.
    """

    def __init__(self, modules: Mapping[str, nn.Module], low_precision: bool) -> None:
        self.modules, self.low_precision = modules, low_precision
        self.sums: dict[str, torch.Tensor] = {}
        self.counts = dict.fromkeys(modules, 0)
        # The last input and its product. Layers with the same input tensor reuse the product.
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None

    def recording_covariances(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager that records the covariance of the layers' inputs.

        Each call of a layer inside the ``with`` block adds the covariance of the layer's inputs to
        ``sums``.
        """
        return forward_pre_hooks(self.modules, self._hook)

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].detach()
            if self._last is None or self._last[0] is not inputs[0]:
                self._last = inputs[0], self._product(x, name)
            product = self._last[1]
            self.counts[name] += 1 if x.dim() < 3 else x[..., 0, 0].numel()
            if name in self.sums:
                self.sums[name] += product
            else:
                self.sums[name] = product.clone()

        return hook

    def _product(self, x: torch.Tensor, name: str) -> torch.Tensor:
        samples = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x[None, None]
        if not self.low_precision:
            samples = samples.float()
        largest = samples.amax(dim=(1, 2), keepdim=True).abs()
        rows = (samples / torch.where(largest == 0, 1.0, largest)).flatten(0, 1)
        product = rows.T @ rows
        check_finite_for_init(product, f"layer {name!r}: the covariance of its inputs")
        return product

    def pop_covariances(self) -> dict[str, torch.Tensor]:
        """Return the accumulated covariance matrices, and clear ``sums``.

        The result is a dict that maps each layer name to the layer's covariance matrix.

        Raises:
            InitializationError: The data did not reach one of the layers.
        """
        for name, count in self.counts.items():
            if not count:
                raise InitializationError(
                    f"layer {name!r}: the calibration data did not reach this layer; run the "
                    "calibration on the model that the adapter will be added to, or exclude the "
                    "layer with exclude_modules"
                )
        self._last = None
        sums, self.sums = self.sums, {}
        return {name: total.div_(self.counts[name]) for name, total in sums.items()}


@torch.no_grad()
def corda_decompose(
    weight: torch.Tensor, covariance: torch.Tensor, rank: int, method: str
) -> CordaEigens:
    """Decompose a layer's weight with CorDA, using the covariance of the layer's inputs.

    The result contains the singular values and vectors from which CorDA computes the initial
    factors. They belong to the ``rank`` directions that the inputs use most or least, which
    ``method`` chooses.

    Args:
        weight: Weight of the layer, ``[N, K]``.
        covariance: Covariance of the layer's inputs, ``[K, K]``.
        rank: Number of directions to return.
        method: ``"ipm"`` for the directions that are used most, or ``"kpm"`` for the directions
            that are used least.

    Raises:
        InitializationError: A matrix has values that are not finite, the covariance is zero, or the
            rank exceeds a dimension of the weight.
    """
    weight, covariance = weight.float(), covariance.float()
    check_finite_for_init(weight, "the base weight")
    check_finite_for_init(covariance, "the covariance")
    if rank > min(weight.shape):
        raise InitializationError(
            f"r={rank} is too large for a weight of shape {tuple(weight.shape)}: it can be at most "
            f"{min(weight.shape)}, the smaller dimension"
        )
    mean = covariance.diagonal().mean()
    if not mean > 0:
        raise InitializationError("the calibration data gives this layer only zero inputs")
    identity = torch.eye(len(covariance), device=covariance.device)
    damp, error = 0.01, torch.inf
    while error >= 0.05:  # damp until the inverse is accurate
        damped = covariance + identity * (mean * damp)
        inverse = torch.linalg.inv(damped)
        error = float(torch.dist(damped @ inverse, identity))
        damp *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    chosen = slice(None, rank) if method == "ipm" else slice(-rank, None)
    v = (vh[chosen] @ inverse).T
    return CordaEigens(s[chosen].clone(), u[:, chosen].clone(), v.contiguous())
