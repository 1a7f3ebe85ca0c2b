"""A pool's adapters on the Triton kernels where gradients are recorded, or the model trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.support.kernels.mixed_models import pool_of, use_impl
from tests.support.tiny import with_adapters

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora import adapters
from fastlora.env import triton_interpreted
from fastlora.model import adapter_state
from fastlora.pool import router as batches
from fastlora.routing.active import activate_routing
from fastlora.testing import assert_within_budget
from fastlora.validation import AdapterStateError
from tests.support.bytes.byte_counter import ByteCounter

IDS = ["a1", None, "a0", "dora", "a1"]
KINDS: dict[str, dict[str, Any]] = {
    "a0": {"r": 16},
    "a1": {"r": 3, "lora_bias": True, "target_modules": ["q", "o"]},
    "dora": {"r": 4, "use_dora": True},
}


class Block(nn.Module):
    """q and k fed by one tensor, and a base layer that is called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 32), nn.Linear(48, 32, bias=False)
        self.o = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 48]`` to ``[..., 16]``."""
        return self.o(self.q(x) * self.k(x).tanh())


def pool_over_block(lab: Any) -> tuple[Any, Any, Any]:
    """A model with a pool, the pool, and the same adapters as parameters, in PyTorch."""
    torch.manual_seed(0)
    base, targets = Block().to(lab.device), ["q", "k", "o"]
    base.o.register_forward_hook(lambda *_: None)  # so that it is called
    fields = {"target_modules": targets, "init_lora_weights": False}
    configs = {name: fastlora.LoraConfig(**{**fields, **kind}) for name, kind in KINDS.items()}
    model = with_adapters(base, configs)
    for key, parameter in model.named_parameters():
        if "magnitude" in key:
            parameter.data *= 1.5
    served, pool, _ = pool_of(model, *targets, max_adapters=4, max_rank=16)
    return served.eval(), pool, use_impl(model, "eager").eval()


def slots_of(pool: Any, names: list[str | None]) -> torch.Tensor:
    """Slots for names."""
    return torch.tensor([-1 if name is None else pool.slot_of(name) for name in names])


def captured(pool: Any, ids: torch.Tensor, served: Any, x: torch.Tensor) -> torch.Tensor:
    """What a CUDA graph of these slots would record, run once."""
    with torch.no_grad(), activate_routing(batches.graph_capture_routing(pool, ids)):
        return served(x)


def test_training_mode_without_gradients(lab: Any) -> None:
    """A pool drops nothing: rows are those of evaluation."""
    served, pool, _ = pool_over_block(lab)
    x = torch.randn(5, 48, device=lab.device)
    with torch.no_grad(), adapters(pool, IDS):
        expected = served(x)
        found = served.train()(x)
    torch.testing.assert_close(found, expected)


def test_a_captured_batch_never_falls_back(lab: Any) -> None:
    """What a CUDA graph would record is right in training mode, and refused with gradients."""
    served, pool, model = pool_over_block(lab)
    ids = slots_of(pool, IDS).to(lab.device)
    x = torch.randn(5, 48, device=lab.device)
    with torch.no_grad(), pool.lease(pool.names):
        expected = model(x, adapter_names=IDS)
        exact = model.double()(x.double(), adapter_names=IDS)
    for trains in (False, True):
        served.train(trains)
        assert_within_budget(captured(pool, ids, served, x), expected, exact)
    wanted = x.clone().requires_grad_()
    with (
        activate_routing(batches.graph_capture_routing(pool, ids)),
        pytest.raises(AdapterStateError, match=r"torch\.no_grad"),
    ):
        served(wanted)
    for layer in (served.q, served.o):
        inner = torch.randn(5, layer.in_features, device=lab.device)
        with (
            activate_routing(batches.graph_capture_routing(pool, ids)),
            torch.autocast(inner.device.type, torch.bfloat16),
            torch.no_grad(),
            pytest.raises(AdapterStateError, match="autocast"),
        ):
            layer(inner)


def test_a_captured_batch_finds_scales_of_its_day(lab: Any) -> None:
    """They are a lease's work: rows are NaN until then, and follow a swap and the base weights."""
    served, pool, model = pool_over_block(lab)
    ids, x = slots_of(pool, IDS).to(lab.device), torch.randn(5, 48, device=lab.device)

    def expected() -> torch.Tensor:
        with torch.no_grad():
            return model(x, adapter_names=IDS)

    unmade = captured(pool, ids, served, x)
    assert unmade[3].isnan().all()
    torch.testing.assert_close(unmade[[0, 1, 2, 4]], expected()[[0, 1, 2, 4]])
    pool.pin("dora")  # which is a lease
    torch.testing.assert_close(captured(pool, ids, served, x), expected())
    state = adapter_state.adapter_file_state_dict(model, "dora", model.state_dict(), False)
    doubled = {key: tensor * 2 for key, tensor in state.items()}
    pool.load("dora", doubled, config=model.peft_config["dora"])  # pinned: no lease need follow
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".dora." in key:
                parameter *= 2
    ids = slots_of(pool, IDS).to(lab.device)
    torch.testing.assert_close(captured(pool, ids, served, x), expected())
    with torch.no_grad():
        for layer in (served.q, model.base_model.model.q):
            layer.weight *= 1.5
    with pool.lease(["dora"]):
        torch.testing.assert_close(captured(pool, ids, served, x), expected())


def test_a_graph_captured_before_dora_has_no_such_slots(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no scales, so rows of an adapter with DoRA that came later are NaN, not wrong."""
    served, pool, model = pool_over_block(lab)
    ids, x = slots_of(pool, IDS).to(lab.device), torch.randn(5, 48, device=lab.device)
    with pool.lease(pool.names):
        monkeypatch.setattr(pool.tables, "uses_dora", False)
        y = captured(pool, ids, served, x)
    with torch.no_grad():
        expected = model(x, adapter_names=IDS)
    assert y[3].isnan().all()
    torch.testing.assert_close(y[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


@pytest.mark.skipif(not triton_interpreted(), reason="counts in the interpreter")
def test_scales_are_launched_where_dora_may_be(lab: Any) -> None:
    """Once a layer of a batch that has such rows, or of a graph that may come to have them."""
    served, pool, _ = pool_over_block(lab)
    x = torch.randn(5, 48)

    def launches(block: Any) -> int:
        with ByteCounter() as counter, torch.no_grad(), block:
            served(x)
        count = counter.kernels.get("_mixed_dora_scale_kernel")
        return 0 if count is None else count.launches

    assert launches(adapters(pool, IDS)) == 3
    assert launches(adapters(pool, ["a0", None, "a0", "a1", "a0"])) == 0
    slots = torch.full((5,), -1)
    assert launches(activate_routing(batches.graph_capture_routing(pool, slots))) == 3
    pool.tables.uses_dora = False
    assert launches(activate_routing(batches.graph_capture_routing(pool, slots))) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
def test_one_graph_replays_any_mix(lab: Any) -> None:
    """Other slots and inputs, a swapped adapter, another base weight, without another capture."""
    served, pool, model = pool_over_block(lab)
    ids = slots_of(pool, IDS).to(lab.device)
    x = torch.randn(5, 48, device=lab.device)
    state = adapter_state.adapter_file_state_dict(model, "dora", model.state_dict(), False)
    with pool.lease(pool.names), torch.no_grad():
        for _ in range(3):
            with adapters(pool, ids):
                served(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), adapters(pool, ids):
            y = served(x)
    for step in range(4):
        names = [IDS[(i + step) % 5] for i in range(5)] if step < 3 else [None] * 5
        with pool.lease(pool.names), torch.no_grad():
            ids.copy_(slots_of(pool, names))
            x.copy_(torch.randn_like(x))
            graph.replay()
            with adapters(pool, names):
                torch.testing.assert_close(y, served(x))
        swapped = {key: (step + 2) * tensor for key, tensor in state.items()}
        pool.load("dora", swapped, config=model.peft_config["dora"])
        with torch.no_grad():
            served.q.weight.mul_(1.5)
