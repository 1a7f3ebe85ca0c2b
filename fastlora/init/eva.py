"""EVA: A starts from the principal directions of a layer's inputs, and layers share a rank budget.

Method: https://arxiv.org/abs/2410.07170, as in PEFT. An adapter starts with B zero and A random.
`fastlora.model.eva.initialize_lora_eva_weights` then sets its directions and ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastlora.init.configs import EvaConfig
from fastlora.init.registry import Given, Settings, Start, register_init

# A function of a layer's inputs, the prepared batch, and the layer's name. It returns the rows [M,
# K] of the inputs that EVA uses.
Prepare = Callable[[Any, Any, str], torch.Tensor]


@register_init(
    "eva",
    title="EVA",
    any_kind=True,
    calibration="initialize_lora_eva_weights",
    settings=Settings("eva_config", EvaConfig),
)
def eva(given: Given) -> Start:
    """Return A as `nn.Linear` draws it, and B zero."""
    return Start(given.lora_a, torch.zeros_like(given.lora_b))


def as_rows(layer_input: Any, _model_input: Any, layer_name: str) -> torch.Tensor:
    """Return a layer's first input as rows ``[M, K]``.

    Raises:
        TypeError: The input is not a tensor.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"layer {layer_name!r} has an input of type {type(x).__name__}, expected a "
            "tensor; pass a prepare_layer_inputs_fn that converts it to rows"
        )
    return x.flatten(0, -2) if x.dim() > 2 else x
