"""vLLM's layers on two tensor parallel processes, which two threads stand for."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm.lora import layers as lora_layers
from vllm.lora.layers import column_parallel_linear, row_parallel_linear
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from fastlora.testing import assert_within_budget
from tests.engine import vllm_layers
from tests.engine.vllm_layers import LINEAR, MIX, SLOTS, K

pytestmark = pytest.mark.usefixtures("one_process")
PROCESSES = 2
RANKS = (8, 3, 0, 16, 11)


class _Group:
    """The collectives of vLLM's layers, between threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.own, self.parts = threading.local(), [torch.empty(0)] * PROCESSES
        self.barrier = threading.Barrier(PROCESSES, timeout=60)
        for module in (linear, parameter):
            rank, size = "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size"
            monkeypatch.setattr(module, rank, lambda: self.own.rank)
            monkeypatch.setattr(module, size, lambda: PROCESSES)
        gather, reduce = "tensor_model_parallel_all_gather", "tensor_model_parallel_all_reduce"
        monkeypatch.setattr(column_parallel_linear, gather, lambda x: torch.cat(self._all(x), -1))
        monkeypatch.setattr(row_parallel_linear, reduce, lambda x: sum(self._all(x)))

    def _all(self, own: torch.Tensor) -> list[torch.Tensor]:
        self.parts[self.own.rank] = own.clone()
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def run(self, layers: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Call each layer in a thread of its own."""
        found: dict[int, torch.Tensor] = {}

        def call(rank: int) -> None:
            self.own.rank = rank
            with torch.inference_mode():
                found[rank] = layers[rank](inputs[rank])[0]

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(PROCESSES)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[rank] for rank in range(PROCESSES)]


def _own_columns(sizes: Sequence[int], rank: int) -> list[int]:
    """The columns of y that a process has: a part of each slice."""
    found, start = list[int](), 0
    for size in sizes:
        own = size // PROCESSES
        found += range(start + rank * own, start + (rank + 1) * own)
        start += size
    return found


@pytest.mark.parametrize(
    "name",
    [
        "ColumnParallelLinearWithLoRA",
        "RowParallelLinearWithLoRA",
        "QKVParallelLinearWithLoRA",
        "MergedColumnParallelLinearWithLoRA",
        "MergedQKVParallelLinearWithLoRA",
        "MergedColumnParallelLinearVariableSliceWithLoRA",
        "ColumnParallelLinearWithShardedLoRA",
        "RowParallelLinearWithShardedLoRA",
        "QKVParallelLinearWithShardedLoRA",
        "MergedColumnParallelLinearWithShardedLoRA",
        "MergedQKVParallelLinearWithShardedLoRA",
    ],
)
def test_each_process_has_its_part_of_the_update(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base layers have zero weights. Ranks of adapters may all be in the first shard."""
    group, wrapper = _Group(monkeypatch), vllm_layers.wrapper()
    make, sizes = LINEAR[name.replace("Sharded", "")]
    layers = list[Any]()
    for rank in range(PROCESSES):
        group.own.rank = rank
        base = make(torch.float32)
        for each in base.parameters():
            each.data.zero_()
        base.quant_method.process_weights_after_loading(base)
        layers.append(getattr(lora_layers, name)(base))
        settings = vllm_layers.config(fully_sharded_loras="Sharded" in name)
        layers[-1].create_lora_weights(SLOTS, settings)
        layers[-1].set_mapping(wrapper)
    case = vllm_layers.Case(layers[0], sizes)
    for slot, own_rank in enumerate(RANKS):
        if own_rank:
            # Both processes get the same adapter.
            for layer in layers:
                torch.manual_seed(slot)
                case.layer = layer
                vllm_layers.set_adapter(case, slot, own_rank)
    vllm_layers.start_batch(wrapper, MIX)
    x, slots = torch.randn(len(MIX), K), vllm_layers.slots_of(MIX)
    is_row = name.startswith("Row")
    inputs = list(x.chunk(PROCESSES, 1)) if is_row else [x] * PROCESSES
    truth = vllm_layers.updates(x, case, slots, torch.float64)
    same = vllm_layers.updates(x, case, slots, torch.float32)
    parts = (24, 8, 8) if "QKV" in name else sizes
    for rank, y in enumerate(group.run(layers, [each.contiguous() for each in inputs])):
        own = list(range(sum(sizes))) if is_row else _own_columns(parts, rank)
        assert_within_budget(y, same[:, own], truth[:, own])
