"""`sample_routings_from_parameters`: the routings that `warm_up` compiles kernels for."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import nn

from fastlora import LoraConfig, LoraModel, get_peft_model


@pytest.fixture(scope="module")
def model() -> LoraModel:
    """Two linear layers, a convolution with an adapter of its own, and a module with a copy."""
    base = nn.ModuleDict({"q": nn.Linear(8, 8), "v": nn.Linear(8, 8), "c": nn.Conv1d(8, 8, 1)})
    base["head"] = nn.Linear(8, 8)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"]))
    model.add_adapter("large", LoraConfig(r=4, target_modules=["v"], rank_pattern={"v": 4}))
    model.add_adapter("same", LoraConfig(r=2, target_modules=["q"]))
    config = LoraConfig(r=8, target_modules=["c"], modules_to_save=["head"])
    model.add_adapter("convolution", config)
    return model


@pytest.mark.parametrize(
    ("adapters", "ranks", "expected"),
    [
        (
            None,
            None,
            [("default",), ("default", "same"), ("large",), ("large", "default", "same")],
        ),
        (2, None, [("default",), ("default", "same"), ("large",), ("large", "default")]),
        (1, None, [("default",), ("large",)]),
        (1, [4], [("large",)]),
        (1, [2, 8], [("default",)]),
        (None, [], []),
    ],
)
def test_names(
    model: LoraModel,
    adapters: int | None,
    ranks: Sequence[int] | None,
    expected: list[tuple[str, ...]],
) -> None:
    """Each rank of a linear layer alone, and with adapters of at most this rank."""
    found = model.base_model.sample_routings(adapters, ranks)
    assert [routing.names for routing in found] == expected
    assert all(routing.ids.tolist() == [0] for routing in found)
