"""What is set in vLLM's layers, and which adapters are refused, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastlora.integrations.vllm import layers

RANK = 8


class _Adapters:
    """Slots of adapters, and the contexts that were entered."""

    def __init__(self, order: list[Any]) -> None:
        self.lora_index_to_id = [7, None, 9]
        self.punica_wrapper_mapping = {"language_model": self, "visual": self}
        self.order = order

    def logits_of_one_request(self, adapter: int, adapter_of_slot: Any) -> Any:
        """Note the adapter."""
        assert adapter_of_slot == self.lora_index_to_id
        return _Note(self.order, adapter)


class _Note:
    def __init__(self, order: list[Any], adapter: int) -> None:
        self.order, self.adapter = order, adapter

    def __enter__(self) -> None:
        self.order.append(("enter", self.adapter))

    def __exit__(self, *_: object) -> None:
        self.order.append(("exit", self.adapter))


def test_prompt_logprobs_are_computed_for_one_request_at_a_time() -> None:
    """Each with its own adapter. Requests whose prompts are not finished stay."""
    order: list[Any] = []

    def get(self: Any, hidden_states: Any, num_scheduled_tokens: Any) -> dict[str, str]:
        (name,) = list(self.num_prompt_logprobs)
        order.append(name)
        if name == "unfinished":
            return {}
        del self.num_prompt_logprobs[name]
        return {name: f"logprobs of {name}"}

    wanted = {"first": 1, "unfinished": 2, "base": 0, "waits": 3}
    requests = {
        "first": SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=9)),
        "unfinished": SimpleNamespace(lora_request=SimpleNamespace(lora_int_id=7)),
        "base": SimpleNamespace(lora_request=None),
    }
    manager = SimpleNamespace(_adapter_manager=_Adapters(order))
    runner = SimpleNamespace(num_prompt_logprobs=wanted, requests=requests, lora_manager=manager)
    scheduled = {"base": 3, "first": 4, "unfinished": 5}
    found = layers.with_prompt_logprobs_by_request(get)(runner, None, scheduled)
    assert found == {"first": "logprobs of first", "base": "logprobs of base"}
    assert order == [
        *(("enter", 9), "first", ("exit", 9)),
        *(("enter", 7), "unfinished", ("exit", 7)),
        *(("enter", 0), "base", ("exit", 0)),
    ]
    assert runner.num_prompt_logprobs is wanted and list(wanted) == ["unfinished", "waits"]


def _manager() -> Any:
    def linear(outputs: int, **kwargs: Any) -> Any:
        base = SimpleNamespace(input_size=24, output_size=outputs, **kwargs)
        return SimpleNamespace(base_layer=base, n_slices=1)

    modules = {
        "model.o_proj": linear(24),
        "model.gate_up_proj": linear(40, output_sizes=[20, 20]),
        "model.in_proj": linear(40, output_sizes=[8, 12, 16, 4]),
    }
    packed = {
        "model.gate_up_proj": ["model.gate_proj", "model.up_proj"],
        "model.in_proj": ["model.in_proj_qkv", "model.in_proj_z"],
    }
    config = SimpleNamespace(max_lora_rank=RANK)
    return SimpleNamespace(modules=modules, packed_modules=packed, lora_config=config)


def _adapter(module: str, inputs: int, outputs: int) -> Any:
    weights = SimpleNamespace(lora_a=torch.ones(4, inputs), lora_b=torch.ones(outputs, 4))
    return SimpleNamespace(loras={module: weights})


@pytest.mark.parametrize(
    ("module", "outputs"),
    [
        ("model.o_proj", 24),
        ("o_proj", 24),
        ("model.up_proj", 20),
        ("up_proj", 20),
        ("model.gate_up_proj", 40),
        ("model.in_proj", 40),
        ("model.in_proj_qkv", 36),
        ("model.in_proj_z", 4),
        ("in_proj_z", 4),
    ],
)
def test_shapes_of_an_adapter_are_checked_by_every_name(module: str, outputs: int) -> None:
    """A pooling model's names lack the prefix, and an adapter may name a fused layer."""
    layers.check_factors_fit_model(_adapter(module, 24, outputs), _manager(), "good")
    with pytest.raises(ValueError, match=f"{module}.*23 inputs.*has 24 inputs"):
        layers.check_factors_fit_model(_adapter(module, 23, outputs), _manager(), "bad")
    with pytest.raises(ValueError, match=f"{module}.* and {outputs + 1} outputs, but"):
        layers.check_factors_fit_model(_adapter(module, 24, outputs + 1), _manager(), "bad")


@pytest.mark.parametrize("shards_already", [False, True])
def test_factors_that_are_shards_are_not_sharded_again(shards_already: bool) -> None:
    """vLLM's warm-up adapters have the shapes of one process's shard. It slices them again."""
    width, features, whole = 10, 12, slice(None)
    layer = SimpleNamespace(
        lora_a_stacked=(torch.zeros(2, 1, RANK, features),) * 2,
        lora_b_stacked=(torch.zeros(2, 1, width, RANK),) * 2,
    )
    processes = 1 if shards_already else 2
    lora_a, lora_b = torch.randn(4, processes * features), torch.randn(processes * width, 4)
    own_a, own_b = lora_a[:, features:], lora_b[width:]
    found_a, found_b = layers._shards(
        layer, [None, lora_a], [None, lora_b], [None, own_a], [None, own_b]
    )
    own = whole if shards_already else slice(features, None)
    assert found_a[0] is None and torch.equal(found_a[1], lora_a[:, own])
    own = whole if shards_already else slice(width, None)
    assert found_b[0] is None and torch.equal(found_b[1], lora_b[own])
