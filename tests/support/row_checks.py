"""Models in mixed batches for which a layer raises, or that give each sample its own adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraConfig, adapters
from fastlora.validation import UnsupportedLayerError
from tests.support.tiny import randomize, with_adapters

D = 8
X = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(1))
IDS = ["a", "b"]
ROWS_SELECTED_ERROR = r"layer '{}' gets rows that the model selected"


def ours(base: nn.Module, targets: Any = ("w1", "w2")) -> Any:
    """Our model with random adapters a and b, in evaluation."""
    torch.manual_seed(0)
    targets = targets if isinstance(targets, str) else list(targets)
    made = LoraConfig(r=2, target_modules=targets)
    model = with_adapters(base, dict.fromkeys(IDS, made))
    randomize(model)
    return model.eval()


def check_raises(
    model: Any, name: str, x: torch.Tensor = X, target: Any = None, why: str = ROWS_SELECTED_ERROR
) -> None:
    """A mixed batch raises for a layer, in each block anew."""
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(UnsupportedLayerError, match=why.format(name)),
            adapters(model if target is None else target, IDS),
        ):
            model(x)


def routed(model: Any, x: torch.Tensor = X, names: Any = ("a", "b")) -> None:
    """A mixed batch gives each sample what its adapter alone gives, in three blocks."""
    model.eval()
    with torch.no_grad():
        expected = []
        for name, row in zip(names, x, strict=True):
            model.set_adapter(name)
            expected.append(model(row[None])[0])
        for _ in range(3):
            with adapters(model, list(names)):
                torch.testing.assert_close(model(x), torch.stack(expected))
