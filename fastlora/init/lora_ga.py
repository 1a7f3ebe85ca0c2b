"""LoRA-GA: initializes adapters so that their first step approximates that of full fine-tuning.

The method is from https://arxiv.org/abs/2407.05000, as implemented in PEFT. The function
`fastlora.model.calibration.preprocess_loraga` stores the gradient of each layer's weight as an
attribute of the layer's module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init.configs import LoraGAConfig
from fastlora.init.registry import (
    InitConfigField,
    InitInputs,
    InitResult,
    check_finite_for_init,
    register_init,
)
from fastlora.validation import InitializationError

DATA = "_peft_loraga_grad"  # PEFT's name, so that both libraries can share gradients


@register_init(
    "lora_ga",
    title="LoRA-GA",
    changes_base=True,
    converts=True,
    random="lora_ga",
    data=DATA,
    calibration="preprocess_loraga",
    must_repeat=False,
    settings=InitConfigField("lora_ga_config", LoraGAConfig, missing="later"),
)
def lora_ga(given: InitInputs) -> InitResult:
    """Compute the initial factors of a layer from the gradient of its weight, using LoRA-GA.

    With the singular value decomposition ``U S V^T`` of the weight's gradient, A consists of R rows
    of ``V^T``, and B consists of R columns of ``U S``. `LoraGAConfig.direction` selects the rows
    and columns, and `LoraGAConfig.scale` determines how the factors are scaled. The new base weight
    is the old one minus the update of these factors.

    Raises:
        InitializationError: The config or the gradient is missing, the gradient has values that are
            not finite or the wrong shape, or the weight has fewer than 2 R rows or columns.
    """
    config, gradient, rank = given.config, given.data, given.rank
    if not isinstance(config, LoraGAConfig):
        raise InitializationError(
            "lora_ga_config must be provided when init_lora_weights='lora_ga'. Please pass "
            "lora_ga_config=LoraGAConfig(...)"
        )
    weight = given.base_weight()
    if not isinstance(gradient, torch.Tensor):
        raise InitializationError(
            f"lora_ga needs a gradient tensor, got a {type(gradient).__name__}"
        )
    gradient = (gradient.T if given.transposed else gradient).to(weight)
    if gradient.shape != weight.shape:
        raise InitializationError(
            f"init_lora_weights='lora_ga': the gradient has shape {tuple(gradient.shape)}, "
            f"expected {tuple(weight.shape)}; run preprocess_loraga on this model"
        )
    check_finite_for_init(
        gradient, "init_lora_weights='lora_ga': the gradient from preprocess_loraga"
    )
    smaller = min(weight.shape)
    given.check_rank_limit(
        smaller // 2, f"half the smaller dimension of the weight {tuple(weight.shape)}"
    )
    u, s, v = torch.svd_lowrank(gradient, q=min(4 * rank, smaller), niter=4)
    a, b = _direction_indices(config.direction, rank)
    lora_a, lora_b = v.T[a], u[:, b] * s[b]
    if config.scale == "stable":
        lora_b = lora_b * (weight.shape[0] ** 0.25 / config.stable_gamma**0.5)
    elif config.scale == "weight_svd":
        _, of_weight, _ = torch.svd_lowrank(weight, q=rank, niter=4)
        if s[b][0] > 0:
            lora_b = lora_b * (of_weight[0] / s[b][0])
    elif config.scale == "gd_scale":
        lora_a, lora_b = lora_a / given.scaling, lora_b / given.scaling
    # Round first, so that the weight loses exactly the update that the stored factors make.
    lora_a, lora_b = lora_a.to(given.dtype).contiguous(), lora_b.to(given.dtype).contiguous()
    update = given.scaling * (lora_b.to(weight) @ lora_a.to(weight))
    return InitResult(lora_a, lora_b, weight - update)


def _direction_indices(direction: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the singular directions to use for A and for B.

    The result is a tuple (indices for A, indices for B).

    Args:
        direction: As in `LoraGAConfig`.
        rank: Number of directions for each factor, R.
    """
    first, second = torch.arange(2 * rank, device="cpu").split(rank)
    if direction == "ArB2r":
        return first, second
    if direction == "A2rBr":
        return second, first
    if direction == "ArBr":
        return 2 * first + 1, 2 * first
    drawn = torch.randperm(2 * rank, device="cpu")[:rank]
    return drawn, drawn


@contextlib.contextmanager
def recording_mean_gradients(
    model: nn.Module, modules: Mapping[str, nn.Module]
) -> Iterator[dict[str, torch.Tensor]]:
    """Record the mean gradient of each module's weight during a ``with`` block.

    No other parameter of the model receives a gradient. The context manager yields a dict that is
    empty at first. At the end of the block, the dict maps each module name to the mean gradient of
    its weight over all backward passes in the block. The ``requires_grad`` and ``grad`` attributes
    of the parameters are then restored.

    Args:
        model: The model.
        modules: Maps the name of each module to the module.

    Raises:
        InitializationError: A weight received no gradient, or a gradient that is not finite.
    """
    weights: dict[str, Any] = {name: module.weight for name, module in modules.items()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    held = {name: weight.grad for name, weight in weights.items()}
    counts = dict.fromkeys(weights, 0)
    found: dict[str, torch.Tensor] = {}

    def count(name: str) -> Callable[[torch.Tensor], None]:
        def counted(_: torch.Tensor) -> None:
            counts[name] += 1

        return counted

    for parameter in trained:
        parameter.requires_grad_(False)
    handles = []
    for name, weight in weights.items():
        weight.grad = None
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(count(name)))
    try:
        with torch.enable_grad():
            yield found
        for name, weight in weights.items():
            if weight.grad is None or not counts[name]:
                raise InitializationError(
                    f"layer {name!r}: its weight received no gradient; run the forward and "
                    "backward passes on the model that the adapter will be added to, or exclude "
                    "the layer with exclude_modules"
                )
            found[name] = weight.grad.detach() / counts[name]
            check_finite_for_init(found[name], f"layer {name!r}: the gradient of its weight")
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
        for name, weight in weights.items():
            weight.grad = held[name]
