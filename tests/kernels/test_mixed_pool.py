"""A pool's adapters on the Triton kernels where gradients are recorded, or the model trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

import fastlora  # noqa: E402
from fastlora import adapter_state, adapters  # noqa: E402
from fastlora.in_force import routed  # noqa: E402
from fastlora.inject import lora_layers  # noqa: E402
from fastlora.pool import batches  # noqa: E402
from fastlora.testing import assert_within_budget  # noqa: E402
from fastlora.validation import AdapterStateError  # noqa: E402

IDS = ["a1", None, "a0", "dora", "a1"]


class Block(nn.Module):
    """q and k fed by one tensor, and a base layer that is called as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(48, 32), nn.Linear(48, 32, bias=False)
        self.o = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 48]`` to ``[..., 16]``."""
        return self.o(self.q(x) * self.k(x).tanh())


def pool_over_block(lab: Any, dora: bool = True) -> tuple[Any, Any, Any]:
    """A model with a pool, the pool, and the same adapters as parameters, in PyTorch."""
    torch.manual_seed(0)
    base = Block().to(lab.device)
    base.o.register_forward_hook(lambda *_: None)  # so that it is called
    served = copy.deepcopy(base).eval()
    targets = ["q", "k", "o"]
    pool = fastlora.AdapterPool(served, target_modules=targets, max_adapters=4, max_rank=16)
    model: Any = None
    kinds = {"a0": {"r": 16}, "a1": {"r": 3, "lora_bias": True, "target_modules": ["q", "o"]}}
    for name, kind in (kinds | ({"dora": {"r": 4, "use_dora": True}} if dora else {})).items():
        config = fastlora.LoraConfig(
            **{"target_modules": targets, "init_lora_weights": False, **kind}
        )
        if model is None:
            model = fastlora.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        if kind.get("use_dora"):
            for key, parameter in model.named_parameters():
                if "magnitude" in key:
                    parameter.data *= 1.5
        state = adapter_state.collect(model, name, model.state_dict(), False)
        pool.load(name, state, config=config)
    for layer in lora_layers(model):
        layer.impl = "eager"
    for layer in lora_layers(served):
        layer.impl = "triton"
    return served, pool, model.eval()


@pytest.mark.parametrize("trains", [False, True])
def test_gradients_through_a_pool(lab: Any, trains: bool) -> None:
    """Rows and the gradient of x are those of the same adapters as parameters."""
    served, pool, model = pool_over_block(lab)
    served.train(trains)
    x = torch.randn(5, 2, 48, device=lab.device)

    def run(m: Any, owner: Any, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        with adapters(owner, IDS):
            y = m(x)
        y.square().sum().backward()
        return [y.detach(), x.grad]

    found, expected = run(served, pool, x), run(model, model, x)
    exact = run(model.double(), model, x.double())
    for mine, plain, truth in zip(found, expected, exact, strict=True):
        assert_within_budget(mine, plain, truth)


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
    served, pool, model = pool_over_block(lab, dora=False)
    names = ["a1", None, "a0", "a1"]
    ids = torch.tensor([-1 if n is None else pool.slot_of(n) for n in names]).to(lab.device)
    x = torch.randn(4, 48, device=lab.device)
    with torch.no_grad():
        expected = model(x, adapter_names=names)
        exact = model.double()(x.double(), adapter_names=names)
    for trains in (False, True):
        served.train(trains)
        with torch.no_grad(), routed(batches.captured_pool_routing(pool, ids)):
            assert_within_budget(served(x), expected, exact)
    wanted = x.clone().requires_grad_()
    with (
        routed(batches.captured_pool_routing(pool, ids)),
        pytest.raises(AdapterStateError, match=r"torch\.no_grad"),
    ):
        served(wanted)
    for layer in (served.q, served.o):
        inner = torch.randn(4, layer.in_features, device=lab.device)
        with (
            routed(batches.captured_pool_routing(pool, ids)),
            torch.autocast(inner.device.type, torch.bfloat16),
            torch.no_grad(),
            pytest.raises(AdapterStateError, match="autocast"),
        ):
            layer(inner)
