"""Initializations that do not depend on the base weight: True, False, and ``"gaussian"``.

Random values are drawn as in PEFT and in the same order, so the same seed gives the same factors.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fastlora.init.registry import InitInputs, InitResult, register_init


@register_init(True, supports_convolutions=True)
def kaiming(given: InitInputs) -> InitResult:
    """Return Kaiming-uniform random values for A, and zeros for B.

    The values of A are between ``-1 / sqrt(K)`` and ``1 / sqrt(K)``. This is the initialization of
    LoRA, https://arxiv.org/abs/2106.09685, as implemented in PEFT.
    """
    lora_a = nn.init.kaiming_uniform_(given.lora_a.detach(), a=math.sqrt(5))
    return InitResult(lora_a, torch.zeros_like(given.lora_b))


@register_init(False, supports_convolutions=True)
def random_nonzero_a_and_b(given: InitInputs) -> InitResult:
    """Return random values for both A and B.

    Both factors keep the values with which `nn.Linear` has initialized them. B and the initial
    update are therefore not zero.
    """
    return InitResult(given.lora_a, given.lora_b)


@register_init("gaussian", supports_convolutions=True)
def gaussian(given: InitInputs) -> InitResult:
    """Return normally distributed random values for A, and zeros for B.

    The standard deviation is ``1 / R``.
    """
    lora_a = nn.init.normal_(given.lora_a.detach(), std=1 / given.rank)
    return InitResult(lora_a, torch.zeros_like(given.lora_b))
