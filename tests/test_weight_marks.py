"""What a fused or compiled step of an optimizer ends, and what it leaves.

That everything kept of weights ends in time is held in `tests/conformance`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastlora
from fastlora.weight_marks import marks
from tests.support.tiny import TwoLayers, randomise, trainable

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> Iterator[Any]:
    """A DoRA adapter that trains, in evaluation."""
    torch.compiler.reset()
    config = fastlora.LoraConfig(r=4, target_modules=["q", "v"], use_dora=True)
    made = fastlora.get_peft_model(TwoLayers(), config)
    randomise(made)
    yield made.eval()
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_our_part_of_a_compiled_step_compiles_once(model: Any, kind: str) -> None:
    """Other marks are no reason to compile an optimizer's step again."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, **{kind: True})
    model(X).square().sum().backward()
    with torch.no_grad():
        model(X)
    step = torch.compile(optimizer.step, backend="aot_eager")
    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(3):
            mark = marks.trained
            step()
            assert marks.trained is not mark


def test_norms_of_a_frozen_base_weight_stay_through_steps(model: Any) -> None:
    """A step of the adapters leaves them as they are; computing them anew costs a read of W."""
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused=True)
    with torch.no_grad():
        model(X)
    kept = model.base_model.model.q._dora_norms.kept[None]
    model(X).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(X)
    assert model.base_model.model.q._dora_norms.kept[None] is kept
