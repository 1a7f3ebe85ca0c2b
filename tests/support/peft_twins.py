"""The same adapter on the same model: ours, PEFT's, PEFT's patched; and what must agree of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.tiny import randomize

peft = pytest.importorskip("peft", reason="compares with PEFT")


def twins(make: Callable[[], nn.Module], **config: Any) -> tuple[Any, Any, Any]:
    """One random adapter on the same model: ours, PEFT's, and PEFT's patched."""
    config = {"r": 4, "target_modules": ["q", "v"], **config}
    models = []
    for library in (fastlora, peft, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(make(), library.LoraConfig(**config))
        randomize(model)
        models.append(model)
    fastlora.patch(models[2])
    return tuple(models)


def q_of(model: Any) -> Any:
    """The adapted layer q of a TwoLayers."""
    return model.base_model.model.q


Run = Callable[[Any], torch.Tensor]  # a model to its output


def bare_name(name: str) -> str:
    """The name of a parameter without layers around it, of which libraries have others."""
    return re.sub(r"base_layer\.|parameters_with_adapters\.[^.]+\.", "", name)


def gradients_of(model: nn.Module) -> dict[str, Any]:
    """The gradients of all that trains, by bare names."""
    return {bare_name(n): p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_same_training(ours: Any, theirs: Any, run: Run) -> torch.Tensor:
    """Outputs and every gradient agree; returns PEFT's output."""
    outputs = []
    for model in (ours, theirs):
        model.zero_grad()
        y = run(model)
        y.square().mean().backward()
        outputs.append(y.detach())
    assert_near(*outputs, "output")
    assert_same_gradients(gradients_of(ours), gradients_of(theirs))
    return outputs[1]


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """The error is at most 1e-5 of the norm."""
    assert found.shape == expected.shape, what
    error, norm = float((found - expected).norm()), float(expected.norm())
    assert error <= 1e-5 * norm + 1e-12, f"{what}: {error} of {norm}"


def assert_same_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """They are near, and none is missing."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None and found[name] is not None, name
        assert_near(found[name], gradient, name)


def assert_files_cross(
    models: Iterable[Any],
    fresh: Callable[[], nn.Module],
    run: Run,
    expected: torch.Tensor,
    folder: Path,
    libraries: Iterable[Any] = (fastlora, peft),
    **options: Any,
) -> None:
    """Each model is saved, and loaded by both libraries onto a fresh base: one output for all."""
    for number, model in enumerate(models):
        where = folder / f"saved{number}"
        model.save_pretrained(where, **options)
        for library in libraries:
            loaded = library.PeftModel.from_pretrained(fresh(), where).eval()
            assert_near(run(loaded).detach(), expected, f"{library.__name__} from {where}")


def assert_same_status(ours: Any, theirs: Any, views: int = 0) -> None:
    """Every field of every layer and of the model, by functions and by methods.

    ``views`` are the parameters that PEFT counts twice.
    """
    layers = fastlora.get_layer_status(ours), peft.get_layer_status(theirs)
    for mine, its in zip(*layers, strict=True):
        assert dataclasses.asdict(mine) == dataclasses.asdict(its)
    mine, its = (dataclasses.asdict(model.get_model_status()) for model in (ours, theirs))
    for count in ("trainable_params", "total_params"):
        its[count] -= views
    if any(layer.active_adapters == [] for layer in layers[0]):
        # PEFT calls a model irregular in which the active adapter has no copy of a module.
        assert (mine.pop("active_adapters"), its.pop("active_adapters")) == (["other"], "irregular")
    assert mine == its
    assert ours.get_layer_status() == layers[0]
    assert fastlora.get_model_status(ours) == ours.get_model_status()
