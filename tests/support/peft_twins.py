"""The same model with the same adapter three times: ours, PEFT's, and PEFT's patched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.tiny import randomise

peft = pytest.importorskip("peft", reason="compares with PEFT")


def twins(make: Callable[[], nn.Module], **config: Any) -> tuple[Any, Any, Any]:
    """One random adapter on the same model: ours, PEFT's, and PEFT's patched."""
    config = {"r": 4, "target_modules": ["q", "v"], **config}
    models = []
    for library in (fastlora, peft, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(make(), library.LoraConfig(**config))
        randomise(model)
        models.append(model)
    fastlora.patch(models[2])
    return tuple(models)


def q_of(model: Any) -> Any:
    """The adapted layer q of a TwoLayers."""
    return model.base_model.model.q
