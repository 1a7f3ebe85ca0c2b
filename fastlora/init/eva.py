"""EVA: initializes A with principal directions of a layer's inputs, and chooses the layers' ranks.

The method is from https://arxiv.org/abs/2410.07170, as implemented in PEFT. When an adapter is
added, B is zero and A is random. Then `fastlora.model.eva.initialize_lora_eva_weights` sets A to
the principal directions, and distributes a total rank among the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlora.init.configs import EvaConfig
from fastlora.init.registry import InitConfigField, InitInputs, InitResult, register_init

# A function of a layer's inputs, the prepared batch, and the layer's name. It returns the rows [M,
# K] of the inputs that EVA uses.
Prepare = Callable[[Any, Any, str], torch.Tensor]


@register_init(
    "eva",
    title="EVA",
    supports_convolutions=True,
    calibration="initialize_lora_eva_weights",
    settings=InitConfigField("eva_config", EvaConfig),
)
def eva_placeholder_factors(given: InitInputs) -> InitResult:
    """Return placeholder factors for EVA.

    The placeholder factors are used until `EvaDirectionSearch` has found the directions.
    """
    return InitResult(given.lora_a, torch.zeros_like(given.lora_b))


def flatten_first_input(layer_input: Any, _model_input: Any, layer_name: str) -> torch.Tensor:
    """Flatten the first input of a layer into a matrix.

    The matrix is ``[M, K]``, with one row per token.

    Args:
        layer_input: The inputs of the layer: a tensor, or a tuple or list of tensors.
        layer_name: Name of the layer, for error messages.

    Raises:
        TypeError: The input is not a tensor.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"layer {layer_name!r} has an input of type {type(x).__name__}, expected a "
            "tensor; pass a prepare_layer_inputs_fn that returns a tensor"
        )
    return x.flatten(0, -2) if x.dim() > 2 else x
