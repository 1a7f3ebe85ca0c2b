"""SmolLM2-135M with up to 64 adapters in one batch: each row is what PEFT gives it alone."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import pytest
import torch

import fastlora
from fastlora import adapters
from fastlora.testing import summed_otherwise
from tests.support.tiny import with_adapters

peft = pytest.importorskip("peft", reason="compares with PEFT")

Result = TypeVar("Result")
# Adapters take these in turn: every rank, rsLoRA, lora_bias, different alphas and targets.
KINDS: list[dict[str, Any]] = [
    {"r": 1, "lora_alpha": 3, "target_modules": "all-linear"},
    {"r": 3, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    {"r": 8, "target_modules": "all-linear"},
    {"r": 16, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    {"r": 64, "lora_alpha": 16, "target_modules": ["v_proj", "up_proj", "gate_proj"]},
    {"r": 16, "use_rslora": True, "target_modules": ["o_proj", "q_proj"]},
]


def name_of(index: int) -> str:
    """Name of an adapter."""
    return f"adapter{index}"


def build(fresh: Callable[..., Any], count: int, dtype: torch.dtype = torch.float32) -> Any:
    """Our model with ``count`` adapters of KINDS, every factor at random."""
    model: Any = None
    for index in range(count):
        torch.manual_seed(index)
        config = fastlora.LoraConfig(**KINDS[index % len(KINDS)])
        if model is None:
            model = fastlora.get_peft_model(fresh(dtype), config, name_of(0))
        else:
            model.add_adapter(name_of(index), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


ORDERS = 8


def near(actual: torch.Tensor, plain: Callable[[int], torch.Tensor], exact: torch.Tensor) -> bool:
    """Whether the error against float64, as a norm, is at most twice PEFT's plus one rounding.

    PEFT's is the worst of its run as it is and, where that is not enough, of others that add in
    another order: a deep model makes of the last bit what chance will have.

    Args:
        actual: Our result.
        plain: PEFT's by the number of the run, 0 as it is.
        exact: PEFT's in float64.
    """
    error = (actual.double() - exact).norm()
    least = torch.finfo(torch.float32).eps * exact.norm()
    errors = ((plain(run).double() - exact).norm() for run in range(ORDERS + 1))
    return any(error <= 2 * (theirs + least) for theirs in errors)


class Solo:
    """PEFT's model with one adapter of each kind, which takes the weights of any of ours."""

    def __init__(self, fresh: Callable[..., Any], ours: Any) -> None:
        configs = {f"kind{i}": peft.LoraConfig(**config) for i, config in enumerate(KINDS)}
        self.model = with_adapters(fresh(), configs, peft)
        self.theirs = {
            name.replace(".base_layer.", "."): parameter
            for name, parameter in self.model.named_parameters()
        }
        self.ours: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in ours.named_parameters():
            for key in (part for part in name.split(".") if part.startswith("adapter")):
                self.ours.setdefault(key, {})[name] = parameter

    def take(self, name: str) -> dict[str, torch.nn.Parameter]:
        """Makes one of our adapters the active one; returns PEFT's parameters by our names."""
        kind = f"kind{int(name.removeprefix('adapter')) % len(KINDS)}"
        found = {}
        with torch.no_grad():
            for key, parameter in self.ours[name].items():
                found[key] = self.theirs[key.replace(f".{name}.", f".{kind}.")]
                found[key].copy_(parameter)
        self.model.set_adapter(kind)
        return found

    def exactly(self, run: Callable[[], Result]) -> Result:
        """Returns what ``run`` gives while the model is in float64."""
        self.model.double()
        result = run()
        self.model.float()
        return result

    def in_orders(self, run: Callable[[], Result]) -> Callable[[int], Result]:
        """Returns ``run`` by its number: 0 as it is, then with sums in other orders; each once."""

        @functools.cache
        def numbered(number: int) -> Result:
            with summed_otherwise(self.model, number) if number else contextlib.nullcontext():
                return run()

        return numbered

    def logits(self, ids: torch.Tensor, name: str | None) -> torch.Tensor:
        """Logits of rows with one adapter, or none."""
        if name is None:
            with self.model.disable_adapter():
                return self.model(input_ids=ids).logits
        self.take(name)
        return self.model(input_ids=ids).logits


class Sides(NamedTuple):
    """Our model with ``count`` adapters, and PEFT's."""

    count: int
    ours: Any
    solo: Solo


@pytest.fixture(scope="module", params=[1, 4, 16, 64])
def sides(request: pytest.FixtureRequest, fresh_smollm2: Callable[..., Any]) -> Sides:
    """Made once for gradients, which come first, and for rows."""

    def fresh(dtype: torch.dtype = torch.float32) -> Any:
        return fresh_smollm2(dtype, layers=30 if request.param == 4 else 10)

    ours = build(fresh, request.param)
    return Sides(request.param, ours, Solo(fresh, ours))


def test_gradients_are_pefts(sides: Sides) -> None:
    """Random mixes with base rows: gradients are those of PEFT and the rows alone."""
    count, model, solo = sides
    draw = random.Random(count)
    names = [name_of(draw.randrange(count)) for _ in range(max(6, count))]
    names.insert(2, "__base__")
    ids = torch.randint(0, 49_000, (len(names), 4))
    model.set_adapter([name_of(i) for i in range(count)])
    with adapters(model, names):
        model(input_ids=ids).logits.square().mean(dim=(1, 2)).sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    present = sorted(set(names) - {"__base__"})
    assert {key for name in present for key in solo.ours[name]} == set(found)

    # Adapters are compared one by one with PEFT, of large batches one of every kind.
    checked = [name for name in present if int(name.removeprefix("adapter")) < len(KINDS)]

    def gradients(filled: bool) -> dict[str, torch.Tensor]:
        found = {}
        for name in checked:
            solo.model.zero_grad()
            parameters = solo.take(name)
            own = [i for i, other in enumerate(names) if other == name]
            others = [i for i in range(len(names)) if i not in own]
            # As for the rows: in a batch of the same size.
            batch = ids[own + others] if filled else ids[own]
            logits = solo.model(input_ids=batch).logits[: len(own)]
            logits.square().mean(dim=(1, 2)).sum().backward()
            found |= {key: p.grad.clone() for key, p in parameters.items()}
        return found

    exact = solo.exactly(lambda: gradients(False))

    def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
        # As in test_real_model: the root mean square over all tensors of their relative errors.
        parts = [found[key].double() / exact[key].norm() for key in exact]
        return torch.cat([part.flatten() for part in parts])

    assert near(flat(found), solo.in_orders(lambda: flat(gradients(True))), flat(exact))


def test_rows_are_pefts(sides: Sides) -> None:
    """Random mixes with base rows: named, by slot, and once the factors are packed."""
    count, model, solo = sides
    model.eval()
    draw = random.Random(count)
    batch = max(6, count)
    slots = [draw.randrange(-1, count) for _ in range(batch)]
    names = [None if slot < 0 else name_of(slot) for slot in slots]
    ids = torch.randint(0, 49_000, (batch, 5))
    # Rows are compared one by one with PEFT, of large batches a part.
    rows = sorted(draw.sample(range(batch), min(batch, 8)))
    with torch.no_grad():
        outputs = []
        for given in (names, names, torch.tensor(slots)):
            with adapters(model, given):
                outputs.append(model(input_ids=ids).logits[rows])
        assert model.base_model.group.packs.nbytes > 0

        def exactly() -> torch.Tensor:
            return torch.cat([solo.logits(ids[i : i + 1], names[i]) for i in rows])

        def alone() -> torch.Tensor:
            # In a batch of the same size, where a CPU's BLAS adds in the same order: from 16
            # tokens on its error grows to about twice that of one row.
            whole = {name: solo.logits(ids, name) for name in {names[i] for i in rows}}
            return torch.stack([whole[names[i]][i] for i in rows])

        exact = solo.exactly(exactly)
        plain = solo.in_orders(alone)
        for logits in outputs:
            assert near(logits, plain, exact)
