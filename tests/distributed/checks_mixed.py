"""Mixed batches shared by processes, in DDP and FSDP2; run by test_processes.py."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import fastlora
from fastlora.sharding import full_tensor
from fastlora.testing import assert_within_budget
from fastlora.train import AdapterOptimizers, adapter_parameters, causal_lm_losses, count_tokens
from tests.support import mixed_training
from tests.support.distributed import steps

# Of each batch the first half is the first process's: adapters there only, here only, in both, in
# none, and a process with base rows alone.
BATCHES = [
    ["a", "b", None, "a", "c", "b", "d", None],
    ["d", "d", "a", "a", None, None, "__base__", None],
    [None, "c", "c", "b", "a", "c", "b", "b"],
]
OPTIMIZERS = {name: functools.partial(SGD, lr=0.3, momentum=0.9) for name in "abcd"}
NORMS = {"a": 0.05, "d": 0.1}


def optimizers_for(model: Any, **arguments: Any) -> AdapterOptimizers:
    """One for each adapter, two of them clipped."""
    return AdapterOptimizers(model, OPTIMIZERS, max_grad_norm=NORMS, **arguments)


def wrap(kind: str, model: Any) -> Any:
    """DDP, FSDP2, or FSDP2 with the copies of ``modules_to_save`` on their own."""
    if kind == "ddp":
        return DistributedDataParallel(model)
    base = model.get_base_model()
    if kind == "copies":
        for copy in base.head.modules_to_save.values():
            fully_shard(copy)
    fully_shard(base.q)
    fully_shard(base.v)
    return fully_shard(model)


def data(step: int, dtype: torch.dtype = torch.float32, *, half: bool) -> Any:
    """A batch, or this process's half of it."""
    x, labels, names = mixed_training.batch(BATCHES[step], step, dtype)
    if not half:
        return x, labels, names
    own = slice(0, 4) if steps.rank() == 0 else slice(4, 8)
    return x[own], labels[own], names[own]


def losses_of(model: Any, batch: Any, tokens: Any = None) -> Any:
    """The losses of one mixed forward."""
    x, labels, names = batch
    with fastlora.adapters(model, names):
        logits = model(x)
    return causal_lm_losses(logits, labels, names, tokens=tokens)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """All parameters of all adapters."""
    bare = model.module if hasattr(model, "module") else model
    named: dict[str, Any] = {}
    for name in mixed_training.CONFIGS:
        named |= adapter_parameters(bare, name)
    return {name: full_tensor(parameter.detach()).clone() for name, parameter in named.items()}


@functools.cache
def one_process(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What one process trains on the whole batches."""
    model = mixed_training.build(dtype)
    optimizers = optimizers_for(model, group=None)
    for step in range(len(BATCHES)):
        losses = losses_of(model, data(step, dtype, half=False))
        optimizers.backward(losses)
        assert set(optimizers.step().stepped) == set(losses.by_adapter)
        optimizers.zero_grad()
    return state_of(model)


def assert_as_one(model: Any) -> None:
    """The adapters are one process's, to rounding."""
    truth, same = one_process(torch.float64), one_process(torch.float32)
    before = state_of(mixed_training.build())
    for name, tensor in state_of(model).items():
        assert_within_budget(tensor, same[name], truth[name], name)
        assert not torch.equal(tensor, before[name]), name


def check_steps(folder: Path) -> None:
    """Processes with different adapters among their rows train what one process does."""
    for kind in ("ddp", "fsdp2", "copies"):
        model = mixed_training.build()
        wrapped = wrap(kind, model)
        optimizers = optimizers_for(model)
        for step, names in enumerate(BATCHES):
            optimizers.backward(losses_of(wrapped, data(step, half=True)))
            report = optimizers.step()
            assert set(report.stepped) == {n for n in names if n not in (None, "__base__")}
            optimizers.zero_grad()
        assert_as_one(model)
        counts = [None] * 2
        dist.all_gather_object(counts, optimizers.counts)
        assert counts[0] == counts[1]


def check_accumulation(folder: Path) -> None:
    """Single samples as micro-batches, only the last shared: the step of the whole batch."""
    for kind in ("ddp", "fsdp2"):
        model = mixed_training.build()
        wrapped = wrap(kind, model)
        optimizers = optimizers_for(model)
        for step in range(len(BATCHES)):
            x, labels, names = data(step, half=True)
            tokens = optimizers.total_tokens(count_tokens(labels, names))
            for i in range(len(names)):
                part = x[i : i + 1], labels[i : i + 1], names[i : i + 1]
                last = i == len(names) - 1
                if kind == "fsdp2":
                    wrapped.set_requires_gradient_sync(last)
                    optimizers.backward(losses_of(wrapped, part, tokens))
                elif last:
                    optimizers.backward(losses_of(wrapped, part, tokens))
                else:
                    with wrapped.no_sync():
                        optimizers.backward(losses_of(wrapped, part, tokens))
            optimizers.step()
            optimizers.zero_grad()
        assert_as_one(model)


def check_not_finite(folder: Path) -> None:
    """A NaN in one process's rows leaves its adapter out in both, and nothing else."""
    for kind in ("ddp", "fsdp2"):
        model, alone = mixed_training.build(), mixed_training.build()
        wrapped = wrap(kind, model)
        optimizers, expected = optimizers_for(model), optimizers_for(alone, group=None)
        for one, half, stepper in ((wrapped, True, optimizers), (alone, False, expected)):
            x, labels, names = data(0, half=half)
            if not half or steps.rank() == 0:
                x[0] = torch.nan  # a row of adapter "a", which has rows here only
            stepper.backward(losses_of(one, (x, labels, names)))
            report = stepper.step()
            assert report.left_out == ("a",)
            assert report.stepped == ("b", "c", "d")
        found, wanted = state_of(model), state_of(alone)
        for name, tensor in found.items():
            assert tensor.isfinite().all(), name
            # Both are fp32 sums of the same numbers in another order.
            assert_within_budget(tensor, wanted[name], wanted[name].double(), name)
        assert optimizers.counts == expected.counts


def check_set_aside(folder: Path) -> None:
    """What an adapter had before its loss was NaN is shared too, although DDP never sent it."""
    model, alone = mixed_training.build(), mixed_training.build()
    wrapped = wrap("ddp", model)
    optimizers, expected = optimizers_for(model), optimizers_for(alone, group=None)
    x, labels, names = data(2, half=True)
    tokens = optimizers.total_tokens(count_tokens(labels, names))
    with wrapped.no_sync():
        optimizers.backward(losses_of(wrapped, (x, labels, names), tokens))
    optimizers.backward(losses_of(wrapped, (x * torch.nan, labels, names), tokens))
    x, labels, names = data(2, half=False)
    expected.backward(losses_of(alone, (x, labels, names)))
    expected.backward(losses_of(alone, (x * torch.nan, labels, names)))
    reports = optimizers.step(), expected.step()
    assert reports[0].stepped == reports[1].stepped == ("a", "b", "c")
    assert reports[0].left_out == reports[1].left_out == ("a", "b", "c")
    found, wanted = state_of(model), state_of(alone)
    for name, tensor in found.items():
        assert_within_budget(tensor, wanted[name], wanted[name].double(), name)


def check_scaler(folder: Path) -> None:
    """Loss scales: the same steps; an overflow, if only in one shard, skips its adapter in both."""
    for kind in ("ddp", "fsdp2"):
        model = mixed_training.build()
        wrapped = wrap(kind, model)
        scaler = functools.partial(torch.amp.GradScaler, "cpu", init_scale=2.0**10)
        optimizers = optimizers_for(model, scaler=scaler)
        for step in range(len(BATCHES)):
            optimizers.backward(losses_of(wrapped, data(step, half=True)))
            assert not optimizers.step().skipped
            optimizers.zero_grad()
        assert_as_one(model)
        optimizers.backward(losses_of(wrapped, data(0, half=True)))
        gradient: Any = adapter_parameters(model, "a")["base_model.model.q.lora_A.a.weight"].grad
        if kind == "ddp" or steps.rank() == 0:
            (gradient if kind == "ddp" else gradient.to_local()).view(-1)[0] = torch.inf
        report = optimizers.step()
        assert report.skipped == ("a",) and report.stepped == ("b", "c", "d")
        scales = {n: state["scaler"]["scale"] for n, state in optimizers.state_dict().items()}
        assert scales == {"a": 2.0**9, "b": 2.0**10, "c": 2.0**10, "d": 2.0**10}


def check_zeros_for_unused_adapters(folder: Path) -> None:
    """An adapter without rows anywhere gets zeros; told so, a process computes none."""
    model = mixed_training.build()
    wrapped = wrap("ddp", model)
    x, labels, names = data(1, half=True)
    with fastlora.adapters(wrapped, names):
        wrapped(x).float().sum().backward()
    gradients = {n: p.grad for n, p in adapter_parameters(model, "b").items()}
    assert gradients and all(g is not None and not g.any() for g in gradients.values())
    assert all(p.grad.any() for p in adapter_parameters(model, "a").values())  # rank 0 has rows
    alone = mixed_training.build()
    with fastlora.adapters(alone, ["a"] * len(names), unused_gradients=False):
        alone(x).sum().backward()
    assert all(p.grad is None for p in adapter_parameters(alone, "b").values())


def check_dropout_and_checkpoints(folder: Path) -> None:
    """Masks differ between processes, and recomputed forwards in FSDP2 repeat theirs."""
    model = mixed_training.build(dropout=0.5)
    optimizers = optimizers_for(model)
    seeds: list[Any] = [None] * 2
    dist.all_gather_object(seeds, optimizers.draw_seeds(["a", "b"]))
    assert seeds[0].keys() == seeds[1].keys() == {"a", "b"}
    assert len({*seeds[0].values(), *seeds[1].values()}) == 4
    x, labels, names = data(0, half=True)
    optimizers = optimizers_for(fully_shard(model))  # made before, it would hold other parameters
    found = []
    for again in (False, True):
        with fastlora.adapters(model, names, seeds=dict.fromkeys("abcd", 5)):
            if again:
                logits = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            else:
                logits = model(x)
        optimizers.backward(causal_lm_losses(logits, labels, names))
        named = {n: p for a in "abcd" for n, p in adapter_parameters(model, a).items()}
        found.append({n: full_tensor(p.grad).clone() for n, p in named.items()})
        optimizers.zero_grad()
    assert mixed_training.same(*found)
