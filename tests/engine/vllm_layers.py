"""vLLM's LoRA layers on a CPU, adapters for them, and the update of each row in a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.config.lora import LoRAConfig
from vllm.lora import layers as lora_layers
from vllm.lora.layers import LoRAMapping
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from fastlora.integrations.vllm.wrapper import FastLoraPunicaWrapper

SLOTS, MAX_RANK = 5, 16
K = 24
VOCABULARY = 40
# Adapter ID in each slot. Slot 2 is empty.
ADAPTERS: list[int | None] = [7, 3, None, 9, 4]
# Adapter ID of each row; 0 stands for no adapter.
MIX = (3, 0, 7, 7, 4, 9, 0, 3, 4, 4, 9, 9, 0, 7, 3, 3, 9)


@dataclass
class Case:
    """A LoRA layer with adapters.

    Attributes:
        layer: The layer.
        sizes: N of each slice.
        factors: For each slot and slice (lora_a ``[r, k]``, lora_b ``[N, r]``, scaling), or None.
        k: The number of inputs.
        strength: The standard deviation of factors and weights.
    """

    layer: Any
    sizes: tuple[int, ...]
    factors: dict[int, list[tuple[torch.Tensor, torch.Tensor, float] | None]] = field(
        default_factory=dict
    )
    k: int = K
    strength: float = 1.0


def config(**kwargs: Any) -> LoRAConfig:
    """vLLM's LoRA config with the slots and the rank of these tests."""
    dtype = kwargs.pop("lora_dtype", torch.float32)
    made = LoRAConfig(max_loras=SLOTS, max_lora_rank=MAX_RANK, lora_dtype=dtype, **kwargs)
    assert made.lora_dtype is dtype
    return made


def wrapper(rows: int = 64) -> FastLoraPunicaWrapper:
    """A wrapper for batches of up to this many rows."""
    return FastLoraPunicaWrapper(rows, 32, torch.device("cpu"), lora_config=config())


def start_batch(
    own: FastLoraPunicaWrapper, tokens: Sequence[int], sampled: Sequence[int] = ()
) -> None:
    """Start a batch with an adapter ID for each token and each sampled row."""
    mapping = LoRAMapping(tuple(tokens), tuple(sampled), is_prefill=True)
    own.update_metadata(mapping, ADAPTERS, SLOTS + 1, VOCABULARY)


def _merged(sizes: list[int], dtype: torch.dtype) -> Any:
    return linear.MergedColumnParallelLinear(K, sizes, bias=False, params_dtype=dtype)


def _qkv(dtype: torch.dtype) -> Any:
    return linear.QKVParallelLinear(K, 4, 6, 2, bias=False, params_dtype=dtype)


_QKV = (24, 8, 8)
# Name of the LoRA class: how its base layer is made, and N of each slice.
LINEAR: dict[str, tuple[Callable[[torch.dtype], Any], tuple[int, ...]]] = {
    "ReplicatedLinearWithLoRA": (
        lambda dtype: linear.ReplicatedLinear(K, 20, bias=True, params_dtype=dtype),
        (20,),
    ),
    "ColumnParallelLinearWithLoRA": (
        lambda dtype: linear.ColumnParallelLinear(K, 20, bias=False, params_dtype=dtype),
        (20,),
    ),
    "RowParallelLinearWithLoRA": (
        lambda dtype: linear.RowParallelLinear(K, 20, bias=True, params_dtype=dtype),
        (20,),
    ),
    "QKVParallelLinearWithLoRA": (_qkv, (sum(_QKV),)),
    "MergedColumnParallelLinearWithLoRA": (lambda dtype: _merged([20, 20], dtype), (20, 20)),
    "MergedQKVParallelLinearWithLoRA": (_qkv, _QKV),
    "MergedColumnParallelLinearVariableSliceWithLoRA": (
        lambda dtype: _merged([8, 12, 4, 4, 8, 4, 10], dtype),
        (8, 12, 4, 4, 8, 4, 10),
    ),
}


def linear_case(name: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Case:
    """A linear LoRA layer with an adapter in each slot but one."""
    make, sizes = LINEAR[name.replace("Sharded", "")]
    return loaded_case(name, make(dtype), sizes, **lora)


def loaded_case(
    name: str, base: Any, sizes: tuple[int, ...], strength: float = 1.0, **lora: Any
) -> Case:
    """A linear LoRA layer over a base layer, with an adapter in each slot but one."""
    for parameter in base.parameters():
        parameter.data.normal_(std=strength)
    dtype, k = base.params_dtype, base.weight.shape[1]
    base.quant_method.process_weights_after_loading(base)
    layer = getattr(lora_layers, name)(base)
    layer.create_lora_weights(SLOTS, config(lora_dtype=dtype, **lora))
    case = Case(layer, sizes, k=k, strength=strength)
    for slot, rank in enumerate((8, 3, 0, 16, 1)):
        if rank:
            missing = 1 if slot == 1 and len(sizes) > 1 else None
            set_adapter(case, slot, rank, missing)
    return case


def scaled(lora_b: torch.Tensor, scaling: float) -> torch.Tensor:
    """lora_b as vLLM's loader hands it on: with its scaling."""
    weights = LoRALayerWeights("module", lora_b.shape[1], 1, lora_b, lora_b, scaling)
    return weights.optimize().lora_b


def set_adapter(case: Case, slot: int, rank: int, missing: int | None = None) -> None:
    """Load a random adapter of this rank into a slot. It lacks one slice if asked."""
    dtype = case.layer.lora_b_stacked[0].dtype
    own: list[tuple[torch.Tensor, torch.Tensor, float] | None] = []
    for index, size in enumerate(case.sizes):
        lora_a = case.strength * torch.randn(rank, case.k, dtype=dtype)
        lora_b = case.strength * torch.randn(size, rank, dtype=dtype)
        own.append(None if index == missing else (lora_a, lora_b, 0.3 + slot + 0.1 * index))
    case.factors[slot] = own
    down = [None if each is None else each[0].clone() for each in own]
    up = [None if each is None else scaled(each[1].clone(), each[2]) for each in own]
    if len(own) == 1:
        case.layer.set_lora(slot, down[0], up[0])
    else:
        case.layer.set_lora(slot, down, up)


def slots_of(ids: Sequence[int]) -> list[int]:
    """The slot of each adapter ID, or -1."""
    return [ADAPTERS.index(each) if each else -1 for each in ids]


def updates(x: torch.Tensor, case: Case, slots: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """The update of each row ``[M, N]``, in a loop over rows, in a dtype."""
    out = torch.zeros(x.shape[0], sum(case.sizes), dtype=dtype)
    for row, slot in enumerate(slots):
        start = 0
        for index, size in enumerate(case.sizes):
            own = case.factors[slot][index] if slot in case.factors else None
            if own is not None:
                lora_a, lora_b, scaling = own
                s = x[row].to(dtype) @ lora_a.to(dtype).T
                out[row, start : start + size] = scaling * (s @ lora_b.to(dtype).T)
            start += size
    return out


def embedding_case() -> tuple[Any, torch.nn.Module]:
    """An embedding with LoRA, and its base layer."""
    base = VocabParallelEmbedding(VOCABULARY, K, params_dtype=torch.float32)
    base.weight.data.normal_()
    layer = lora_layers.VocabParallelEmbeddingWithLoRA(base)
    layer.create_lora_weights(SLOTS, config())
    return layer, base


def logits_case(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A logits processor with LoRA, and the output layer."""
    head = ParallelLMHead(VOCABULARY, K, params_dtype=dtype)
    head.weight.data.normal_()
    head.quant_method.process_weights_after_loading(head)
    layer = lora_layers.LogitsProcessorWithLoRA(
        LogitsProcessor(VOCABULARY), K, dtype, torch.device("cpu"), None
    )
    layer.create_lora_weights(SLOTS, config(lora_dtype=dtype))
    return layer, head
