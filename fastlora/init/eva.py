"""EVA: A starts as the main directions of a layer's inputs, and layers share out the ranks.

Method: https://arxiv.org/abs/2410.07170, as in PEFT. An adapter starts with B zero and A random;
`fastlora.model.eva.initialize_lora_eva_weights` then gives it directions and ranks.
"""

from __future__ import annotations

import torch

from fastlora.init.configs import EvaConfig
from fastlora.init.registry import Given, Settings, Start, register_init


@register_init("eva", title="EVA", any_kind=True, settings=Settings("eva_config", EvaConfig))
def eva(given: Given) -> Start:
    """A as `nn.Linear` draws it, B zero."""
    return Start(given.lora_a, torch.zeros_like(given.lora_b))
