"""Adapters on experts in DistributedDataParallel and FSDP2; run by test_processes.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import fastlora
from fastlora.sharding import copy_full_tensor_, full_tensor
from fastlora.testing import assert_within_budget
from fastlora.train import AdapterOptimizers, causal_lm_losses, train_adapters
from fastlora.validation import AdapterStateError, UnsupportedLayerError
from tests.support.distributed import steps
from tests.support.distributed.steps import raises
from tests.support.moe_models import copy_random_factors, moe_model
from tests.support.tiny import with_adapters

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"r": 3, "target_parameters": STACKS, "target_modules": ["q_proj"]},
    "b": {"r": 4, "target_parameters": ["experts.down_proj"]},
    "c": {"r": 1, "target_parameters": ["experts.gate_up_proj"], "target_modules": ["q_proj"]},
}
# Of each batch the first half is the first process's: adapters there only, here only, in none.
BATCHES = [["default", None, "b", "b"], [None, None, "default", "c"]]


def build(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = ("default",)) -> Any:
    """A tiny Qwen3-MoE of 8 experts with adapters, factors at random; the same at every call."""
    base = moe_model("qwen3_moe", dtype, vocab_size=97, num_experts=8)
    configs = {name: fastlora.LoraConfig(lora_alpha=6, **CONFIGS[name]) for name in names}
    torch.manual_seed(1)
    model = with_adapters(base, configs, autocast_adapter_dtype=False)
    for name in names:
        copy_random_factors([model], name)
    train_adapters(model, list(names))
    return model.train()


def experts_of(model: Any) -> list[Any]:
    """The LoRA layers of a model's experts."""
    return [layer.mlp.experts for layer in model.get_base_model().model.layers]


def shard_experts(model: Any) -> Any:
    """FSDP2 on each layer of experts by itself, with its stacks and factors, then on the rest."""
    for layer in experts_of(model):
        fully_shard(layer)
    return steps.shard(model)


def record_experts(model: Any) -> list[torch.Tensor]:
    """Returns a list that gets the experts of each router's tokens."""
    found: list[torch.Tensor] = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.gate.register_forward_hook(lambda m, args, out: found.append(out[-1]))
    return found


@functools.cache
def one_process(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What one process trains on whole batches."""
    model = build(dtype)
    steps.train(model, half=False)
    return steps.trained(model)


def assert_as_one(model: Any) -> None:
    """The trained parameters are one process's, to rounding, and have moved."""
    before = steps.trained(build())
    for name, tensor in steps.trained(model).items():
        assert not torch.equal(tensor, before[name]), name
        assert_within_budget(
            tensor, one_process(torch.float32)[name], one_process(torch.float64)[name], name
        )


def check_steps(folder: Path) -> None:
    """Two processes with half of each batch train what one does with all of it."""
    for wrap in (DistributedDataParallel, steps.shard, shard_experts):
        model = build()
        wrapped = wrap(model)
        for name, parameter in model.named_parameters():
            assert (wrap is DistributedDataParallel) != isinstance(parameter, DTensor), name
        steps.train(wrapped, half=True)
        assert_as_one(model)


def check_experts_without_tokens(folder: Path) -> None:
    """The one gradient of a stack has zeros for experts that no token of a process chose."""
    for wrap in (DistributedDataParallel, steps.shard):
        model = build()
        chosen, wrapped = record_experts(model), wrap(model)
        ids = steps.own_half(steps.tokens(0))[:1, :3]
        steps.loss_of(wrapped, ids).backward()
        both: list[Any] = [None] * 2  # Nothing is predicted from the last token.
        dist.all_gather_object(both, [set(experts[:-1].flatten().tolist()) for experts in chosen])
        for layer, first, second in zip(experts_of(model), *both, strict=True):
            assert first != second and len(first | second) < 8
            for adapted in layer.adapted_parameters():
                pair = adapted.lora_A["default"], adapted.lora_B["default"]
                a, b = (full_tensor(factor.weight.grad) for factor in pair)
                for gradient in (a.view(8, -1), b.reshape(-1, 8).t()):
                    assert {e for e in range(8) if gradient[e].any()} == first | second


def check_mixed_batches(folder: Path) -> None:
    """Adapters with rows in one process, or in none, train as in one process."""
    names = tuple(CONFIGS)

    def train(model: Any, wrap: Any) -> dict[str, torch.Tensor]:
        half = wrap is not None
        wrapped = wrap(model) if half else model
        optimizers = AdapterOptimizers(
            model,
            {name: functools.partial(SGD, lr=0.3, momentum=0.9) for name in names},
            max_grad_norm={"b": 0.05},
            **({} if half else {"group": None}),
        )
        for step, batch in enumerate(BATCHES):
            ids = steps.own_half(steps.tokens(step)) if half else steps.tokens(step)
            rows = batch[2 * steps.rank() :][:2] if half else batch
            with fastlora.adapters(wrapped, rows):
                logits = wrapped(input_ids=ids).logits
            optimizers.backward(causal_lm_losses(logits, ids, rows))
            assert set(optimizers.step().stepped) == {n for n in batch if n is not None}
            optimizers.zero_grad()
        return steps.trained(model)

    same, truth = (train(build(d, names), None) for d in (torch.float32, torch.float64))
    before = steps.trained(build(names=names))
    for wrap in (DistributedDataParallel, steps.shard):
        for name, tensor in train(build(names=names), wrap).items():
            assert_within_budget(tensor, same[name], truth[name], name)
            assert not torch.equal(tensor, before[name]), name


def check_unused_adapters(folder: Path) -> None:
    """An adapter without rows in any process gets zeros, as on linear layers."""
    model = build(names=tuple(CONFIGS))
    wrapped = DistributedDataParallel(model)
    ids = steps.own_half(steps.tokens(0))
    with fastlora.adapters(wrapped, ["default"] * 2 if steps.rank() == 0 else ["b"] * 2):
        wrapped(input_ids=ids).logits.sum().backward()
    for layer in experts_of(model):
        for adapted in layer.adapted_parameters():
            for name, lora_b in adapted.lora_B.items():
                assert bool(lora_b.weight.grad.any()) == (name != "c"), name


def check_mixed_precision(folder: Path) -> None:
    """bf16 in the forward, fp32 masters and fp32 sums: bit for bit what a bf16 model computes."""
    steps.check_mixed_precision_gradients(build)


def check_evaluation_follows_shards(folder: Path) -> None:
    """What FSDP2 gathers lies where it lay before, at the version it had: no factor is kept."""
    model, whole = steps.shard(build()).eval(), build().eval()
    ids = steps.tokens(0)
    pairs = list(zip(model.named_parameters(), whole.parameters(), strict=True))
    with torch.no_grad():
        for step in range(6):
            found, expected = (one(input_ids=ids).logits for one in (model, whole))
            assert torch.equal(found, expected), step
            for (name, shard), parameter in pairs:
                if "lora_B" in name:
                    parameter.mul_(1.25)
                    copy_full_tensor_(shard, parameter)


def check_adapter_files(folder: Path) -> None:
    """Adapters save from shards as from whole parameters, and load into shards again."""
    model, whole = steps.shard(build()), build()
    model.save_pretrained(folder / "sharded")
    if steps.rank() == 0:
        whole.save_pretrained(folder / "whole")
    dist.barrier()
    saved, expected = (
        load_file(folder / name / "adapter_model.safetensors") for name in ("sharded", "whole")
    )
    assert saved.keys() == expected.keys() and sum("experts" in key for key in saved) == 8
    assert all(torch.equal(saved[key], tensor) for key, tensor in expected.items())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_adapter(folder / "sharded", "default", is_trainable=True)
    found, original = steps.trained(model), steps.trained(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def check_errors(folder: Path) -> None:
    """What is still sharded in the forward pass is an error that names it."""
    inputs = torch.randn(4, 16), torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2)
    model = steps.shard(build())
    match = "parameter 'gate_up_proj' is sharded (a DTensor) in the forward pass"
    raises(AdapterStateError, match, experts_of(model)[0], *inputs)
    config = fastlora.LoraConfig(**CONFIGS["b"])
    raises(AdapterStateError, "before you call fully_shard", model.add_adapter, "b", config)
    raises(UnsupportedLayerError, "sharded", model.merge_adapter)
    # Nothing gathers the parameters of modules that are not called.
    model = build()
    fully_shard(experts_of(model)[0].base_layer)
    raises(AdapterStateError, match, steps.loss_of, model, steps.tokens(0))
    for part in (lambda layer: layer, lambda layer: layer.lora_B["default"]):
        model = build()
        fully_shard(part(experts_of(model)[0].parameters_with_adapters["down_proj"]))
        raises(UnsupportedLayerError, "'down_proj'", steps.loss_of, model, steps.tokens(0))
