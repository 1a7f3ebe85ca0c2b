"""What invalidates an evaluation's caches, and what layers that share their input may share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from tests.support.conformance_cases import Case
from tests.support.conformance_models import SHAPES, Subject, direction
from tests.support.conformance_suite import invariant
from tests.support.conformance_truth import check


def changes(subject: Subject) -> dict[str, Callable[[], Any]]:
    """Ways to change what an evaluation may have cached something of."""
    case, places = subject.case, subject.places()
    adapted = [layer for layer in subject.layers().values() if "en" in layer.lora_A]
    own = {name: p for name, p in places.items() if name.count(".") == 2}

    def in_place() -> None:
        with torch.no_grad():
            for parameter in own.values():
                parameter.mul_(1.25)

    def base() -> None:
        with torch.no_grad():
            for layer in SHAPES:
                places[f"{layer}.weight"].mul_(0.75)

    @torch.enable_grad()
    def optimizer() -> None:
        subject.net.train()
        y = subject.forward(subject.x())
        y.backward(direction(y))
        torch.optim.SGD(own.values(), lr=0.01).step()
        subject.gradients()
        subject.net.eval()

    def load() -> None:
        state = {key: tensor * 0.75 for key, tensor in subject.call.state_dict().items()}
        subject.call.load_state_dict(state)

    def twice() -> None:
        config = subject.adapters["en"]
        twice = {**config, "lora_alpha": 2 * config["lora_alpha"]}
        subject.adapters = {**subject.adapters, "en": twice}

    def scale() -> None:
        for layer in adapted:
            layer.set_scale("en", 2.0)
        twice()

    def tensor() -> None:
        """Then written in place, then by an optimizer that moves no version."""
        for layer in adapted:
            scaling = layer.scaling["en"]
            if not isinstance(scaling, torch.Tensor):
                layer.scaling["en"] = torch.tensor(2.0 * scaling, dtype=torch.float64)
            elif scaling.grad is None:
                scaling.mul_(2)
                scaling.grad = -scaling
            else:
                torch.optim.SGD([scaling], lr=1.0, fused=True).step()
        twice()

    def data() -> None:
        for parameter in places.values():
            parameter.data.mul_(1.25)

    def refreshed() -> None:
        data()
        fastlora.clear_caches(
            subject.net if case.source == "pool" else subject.handle or subject.net
        )

    def in_training() -> None:
        subject.net.train()
        subject.forward(subject.x())
        data()
        subject.net.eval()

    def before_training() -> None:
        data()
        subject.net.train()
        subject.net.eval()

    @torch.enable_grad()
    def unknown_optimizer() -> None:
        subject.forward(subject.x())
        for parameter in places.values():
            if parameter.requires_grad:
                parameter.data.mul_(1.25)
        subject.net.eval()

    def storage() -> None:
        """Twice, so that the first memory is free for the second replacement."""
        for parameter in (own if case.source == "shards" else places).values():
            parameter.data = parameter.data * 2.5
            parameter.data = parameter.data * 0.5

    def dropped() -> None:
        for layer in adapted:
            layer.lora_dropout["en"] = nn.Dropout(1 - 1e-9).train()

    def replaced() -> None:
        for layer in adapted:
            module = layer.lora_B["en"]
            module.weight = nn.Parameter(module.weight.detach() * 0.75)

    def swapped() -> None:
        for name in list(subject.values):
            if ".en." in name:
                subject.values[name] = (subject.values[name] * 0.75).to(case.x_dtype).double()
        subject.load("en")

    def stepped() -> None:
        weights = [places[f"{layer}.weight"] for layer in SHAPES]
        for weight in weights:
            weight.grad = -0.25 * weight.detach()
        torch.optim.SGD(weights, lr=1.0, fused=True).step()
        subject.net.zero_grad()

    if case.source == "pool":
        return {f.__name__: f for f in (swapped, base, stepped, refreshed, before_training)}
    packs = case.rows == "mixed" and not case.dora

    def assigned() -> None:
        state = {key: 0.75 * tensor for key, tensor in subject.call.state_dict().items()}
        subject.call.load_state_dict(state, assign=True)

    def moved() -> None:
        subject.net.to(torch.float16).to(case.x_dtype)

    def written_while_merged() -> None:
        for layer in subject.layers().values():
            layer.merge()
            layer.weight.data.mul_(2)
            layer.unmerge()

    found = [in_place, base, optimizer, load, scale, tensor, refreshed, in_training]
    found += [before_training, unknown_optimizer, storage, replaced]
    if case.source in ("layer", "model"):
        found += [assigned, moved] if not case.factors else [assigned]
    if case.source == "layer" and case.feature != "bias":
        found.append(written_while_merged)
    return {f.__name__: f for f in found + [dropped] * packs}


@invariant(
    lambda case: case.source != "function" and case.rows != "several",
    per=("source", "rows", "base", "feature"),
)
def changes_are_seen(case: Case) -> None:
    """Nothing that an evaluation cached outlives a change of what it was made from."""
    ways = [(way, False) for way in changes(Subject(case))]
    if case.rows == "mixed" and case.trains:  # a pool's adapters stay in a block what they are
        # What PEFT's layers are told is looked for when a block begins.
        told = () if case.source == "patched" else ("load", "scale")
        trained = ("optimizer", "refreshed", "in_training", "unknown_optimizer")
        ways += [(way, True) for way in (*trained, *told)]
    for way, in_one_block in ways:
        if case.source == "shards" and way == "replaced":
            continue
        subject = Subject(case)
        subject.net.eval()
        x = subject.x()
        block = subject.block if in_one_block else contextlib.nullcontext
        forward = subject.call if in_one_block else subject.forward
        with torch.no_grad(), block():
            for _ in range(case.forwards):
                forward(x)
            for _ in range(3 if way == "tensor" else 1):
                changes(subject)[way]()
                if way != "swapped":
                    subject.read()
                if way == "dropped":  # all of it
                    subject.values |= {
                        name: torch.zeros_like(value)
                        for name, value in subject.values.items()
                        if name.endswith(".en.B")
                    }
                for _ in range(case.forwards):
                    check(subject, {"y": forward(x)}, x, masks={})


@invariant(
    lambda case: case.source != "function" and case.rows != "several",
    per=("source", "rows", "base", "feature"),
)
def written_between_group_members(case: Case) -> None:
    """A write into x or a factor between layers that x feeds is seen; a backward raises."""
    ways = [(False, "x"), (True, "x")]
    for record, what in ways + [(True, "factor")] * (case.trains and case.rows == "single"):
        subject, apart = Subject(case), Subject(case)
        x, factor = subject.x(), what == "factor"
        for each in (subject, apart):
            each.net.eval()
            with torch.set_grad_enabled(record):
                for _ in range(3):
                    each.forward(x)  # groups are known, and factors packed

        if factor:
            write(apart.net.k, None)
        else:
            apart.net.k = Scaled(apart.net.k)
        with torch.set_grad_enabled(record):
            expected = apart.forward(x).detach()
            written = (subject.net.k, None) if factor else (None, x)
            subject.net.between = functools.partial(write, *written)
            y = subject.forward(x)
        eps = torch.finfo(case.x_dtype).eps
        assert (y - expected).norm() <= 32 * eps * expected.norm()
        # x widened to fp32 is a copy, which nobody writes to.
        copied = case.x_dtype is torch.bfloat16 and case.factor_dtype is torch.float32
        if record and case.trains and not factor and not (copied and case.base == "called"):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@torch.no_grad()
def write(layer: Any, x: torch.Tensor | None) -> None:
    """Writes into a factor of a layer, into x, or into both."""
    if layer is not None:
        layer.lora_A["en"].weight.mul_(3)
    if x is not None:
        x.mul_(2)


class Scaled(nn.Module):
    """A module that gets its input twice as large."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles the input."""
        return self.module(2 * x)
