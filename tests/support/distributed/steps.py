"""Training steps that one process or two take over the same batches, and how to compare them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fastlora
from fastlora.sharding import full_tensor
from fastlora.testing import assert_within_budget
from tests.support.tiny import randomize, tiny_llama

CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": "all-linear", "lora_bias": True}
DORA = {"use_dora": True, "lora_bias": False}
SAMPLES, LENGTH = 4, 6
STEPS = 2


def raises(error: Any, match: str, function: Any, *args: Any, **kwargs: Any) -> None:
    """Asserts that a call raises, with a message that has ``match`` in it."""
    try:
        function(*args, **kwargs)
    except error as found:
        assert match in str(found), found
    else:
        raise AssertionError(f"{function} did not raise {error.__name__}")


def rank() -> int:
    """This process's number."""
    return dist.get_rank()


def build(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny Llama with an adapter, factors at random; the same at every call."""
    model = tiny_llama(tie_word_embeddings=False).to(dtype)
    torch.manual_seed(1)
    model = fastlora.get_peft_model(model, fastlora.LoraConfig(**{**CONFIG, **config}))
    randomize(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.1)
    return model.train()


def shard(model: Any, **arguments: Any) -> Any:
    """FSDP2 as a user applies it: each layer, then the rest."""
    arguments.setdefault("mesh", init_device_mesh("cpu", (dist.get_world_size(),)))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **arguments)
    return fully_shard(model, **arguments)


def tokens(step: int) -> torch.Tensor:
    """The token ids of a step, ``[SAMPLES, LENGTH]``."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 97, (SAMPLES, LENGTH), generator=generator)


def own_half(batch: torch.Tensor) -> torch.Tensor:
    """This process's samples."""
    return batch.chunk(dist.get_world_size())[rank()]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's loss on its own input."""
    return model(input_ids=ids, labels=ids).loss


def train(
    model: Any,
    half: bool,
    backward: Callable[[Any, torch.Tensor], None] | None = None,
    first: int = 0,
    optimizer: Any = None,
    clip: Callable[..., Any] = torch.nn.utils.clip_grad_norm_,
) -> Any:
    """Takes STEPS steps of clipped SGD with momentum on whole batches or this process's halves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None:
        optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9)
    for step in range(first, first + STEPS):
        ids = own_half(tokens(step)) if half else tokens(step)
        if backward is None:
            loss_of(model, ids).backward()
        else:
            backward(model, ids)
        clip(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def trained(model: Any) -> dict[str, torch.Tensor]:
    """All of what trains, by the names that the bare model has for it."""
    bare = model.module if hasattr(model, "module") else model
    return {n: full_tensor(p.detach()) for n, p in bare.named_parameters() if p.requires_grad}


@functools.cache
def one_process(
    dtype: torch.dtype, steps: int = STEPS, use_dora: bool = False
) -> dict[str, torch.Tensor]:
    """What one process trains on whole batches."""
    model = build(dtype, **(DORA if use_dora else {}))
    optimizer = train(model, half=False)
    if steps > STEPS:
        train(model, half=False, first=STEPS, optimizer=optimizer)
    return trained(model)


def assert_as_one(model: Any, steps: int = STEPS, use_dora: bool = False) -> None:
    """The trained parameters are one process's, to rounding, and have moved."""
    found = trained(model)
    truth, same = (one_process(d, steps, use_dora) for d in (torch.float64, torch.float32))
    before = trained(build(**(DORA if use_dora else {})))
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert not torch.equal(tensor, before[name]), name
        assert_within_budget(tensor, same[name], truth[name], name)


def check_mixed_precision_gradients(make: Callable[[], Any]) -> None:
    """Checks that bf16 in the forward and fp32 sums give bit for bit what a bf16 model computes."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    ids = tokens(0)
    model = shard(make(), mp_policy=policy)
    loss_of(model, own_half(ids)).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    expected = {name: torch.zeros(gradient.shape) for name, gradient in found.items()}
    for half in ids.chunk(2):
        whole = make()
        for parameter in whole.parameters():  # and not buffers, as FSDP2 does
            parameter.data = parameter.data.bfloat16()
        loss_of(whole, half).backward()
        for name, parameter in whole.named_parameters():
            if parameter.requires_grad:
                expected[name] += parameter.grad.float() / 2
    for name, gradient in found.items():
        assert torch.equal(gradient.full_tensor(), expected[name]), name
