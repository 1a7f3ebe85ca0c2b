"""A layer's scalings: a dict whose tensors are always of its values."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from fastlora import FastLoraLinear
from fastlora.layers.scalings import Scalings


def in_place_or(scalings: Scalings) -> None:
    """``|=``."""
    scalings |= {"a": 7.0, "b": 8.0}


CHANGES: dict[str, Callable[[Scalings], object]] = {
    "set": lambda s: s.__setitem__("a", 3.0),
    "update": lambda s: s.update({"a": 4.0}, c=5.0),
    "setdefault": lambda s: (s.setdefault("a", 9.0), s.setdefault("d", 6.0)),
    "or": in_place_or,
    "pop": lambda s: (s.pop("b"), s.pop("b", None)),
    "del": lambda s: s.__delitem__("b"),
    "popitem": lambda s: s.popitem(),
    "clear": lambda s: s.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_tensors_follow(change: str) -> None:
    """Whatever way a dict is changed, and in a copy alone."""
    scalings = Scalings({"a": 1.0, "b": 2.0})
    for changed in (
        copy.copy(scalings),
        copy.deepcopy(scalings),
        pickle.loads(pickle.dumps(scalings)),
    ):
        CHANGES[change](changed)
        assert {name: float(changed.tensors[name]) for name in changed} == changed
        assert scalings == {"a": 1.0, "b": 2.0} == scalings.tensors
    plain = {"a": 1.0, "b": 2.0}
    CHANGES[change](plain)  # type: ignore[arg-type]
    assert plain == changed


def test_a_tensor_is_stored_itself() -> None:
    """What is written into it acts."""
    value = torch.tensor(2.0)
    assert Scalings({"a": value}).tensors["a"] is value


def test_they_go_where_the_factors_go() -> None:
    """Another dtype or device, and there and back; a replaced tensor leaves the old one alone."""
    layer = FastLoraLinear(4, 4, r=2, lora_alpha=3)
    first = layer.scaling.tensors["default"]
    assert first.dtype == torch.float32
    assert layer.double().scaling.tensors["default"].dtype == torch.float64
    assert layer.half().scaling.tensors["default"].dtype == torch.float32
    assert layer.to("meta").scaling.tensors["default"] == 1.5  # a meta tensor would have lost it
    layer.to_empty(device="cpu").set_scale("default", 2.0)
    assert layer.scaling == {"default": 3.0} == layer.scaling.tensors
    assert first == 1.5
    layer.scaling = {"default": 0.25}
    assert layer.scaling.tensors["default"] == 0.25
    with torch.inference_mode():
        layer.set_scale("default", 1.0)
    assert not layer.scaling.tensors["default"].is_inference()


def test_they_follow_weights_that_are_assigned() -> None:
    """load_state_dict puts other parameters in place, of another dtype, from the meta device."""
    state = FastLoraLinear(4, 4, r=3, lora_alpha=1).double().state_dict()
    layer = copy.deepcopy(FastLoraLinear(4, 4, r=3, lora_alpha=1).to("meta"))
    layer.load_state_dict(state, assign=True)
    scaling = layer.scaling.tensors["default"]
    assert (scaling.dtype, scaling.item()) == (torch.float64, 1 / 3)
