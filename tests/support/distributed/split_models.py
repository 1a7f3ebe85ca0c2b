"""Models split over two processes, and what one forward and backward gives of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastlora
from fastlora.integrations.distributed import tensor_parallel
from fastlora.sharding import copy_full_tensor_, full_tensor
from fastlora.testing import assert_within_budget
from tests.support.distributed import steps

PLAN = {
    "model.layers.*.self_attn.q_proj": ColwiseParallel(),
    "model.layers.*.self_attn.k_proj": ColwiseParallel(),
    "model.layers.*.self_attn.v_proj": ColwiseParallel(),
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.gate_proj": ColwiseParallel(),
    "model.layers.*.mlp.up_proj": ColwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}
# The layouts that parallel styles can give what goes into a pair of linears and comes out of it.
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"up": ColwiseParallel(), "down": RowwiseParallel()},
    {
        "up": ColwiseParallel(output_layouts=Replicate()),
        "down": RowwiseParallel(input_layouts=Replicate()),
    },
    {
        "up": ColwiseParallel(input_layouts=Shard(0), use_local_output=False),
        "down": RowwiseParallel(output_layouts=Shard(0)),
    },
)
IDS = ["default", None, "b", "default", "b", None, "default", "b"]


class Pair(nn.Module):
    """Two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(17, 22), nn.Linear(22, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 17]`` to ``[..., 10]``."""
        return self.down(self.up(x).relu())


def mesh() -> DeviceMesh:
    """Both processes."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def pair(
    plan: dict[str, Any] | None,
    dtype: torch.dtype,
    dora: tuple[str, ...] = (),
    after: bool = False,
    **config: Any,
) -> Any:
    """Two adapters on a pair of linears, split before they come where there is a plan.

    Args:
        plan: None for the pair of one process.
        dtype: Of all parameters.
        dora: Adapters that use it; "default" has a lora_bias otherwise.
        after: Split the pair when it has its adapters.
        **config: Of both adapters.
    """
    torch.manual_seed(0)
    base = Pair().to(dtype)
    if plan is not None and not after:
        base = parallelize_module(base, mesh(), copy.deepcopy(plan))
        torch.manual_seed(steps.rank())  # processes may disagree about fresh factors
    config = {"target_modules": ["up", "down"], "lora_alpha": 6, **config}
    kinds = {n: {"use_dora": n in dora} for n in ("default", "b")}
    first = fastlora.LoraConfig(r=3, lora_bias="default" not in dora, **kinds["default"], **config)
    model = fastlora.get_peft_model(base, first)
    model.add_adapter("b", fastlora.LoraConfig(r=5, **kinds["b"], **config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                copy_full_tensor_(parameter, torch.randn(parameter.shape, generator=generator))
    model.set_adapter(["default", "b"])
    if plan is not None and after:
        tensor_parallel(model, mesh(), copy.deepcopy(plan))
    return model


def results(model: Any, dtype: torch.dtype, ids: Any, own: bool) -> dict[str, torch.Tensor]:
    """Output, and the gradients of the input and of all that trains.

    ``own`` says that each process has its half of the rows.
    """
    x = torch.randn(8, 17, generator=torch.Generator().manual_seed(3)).to(dtype)
    weights = torch.randn(8, 10, generator=torch.Generator().manual_seed(4)).to(dtype)
    part = slice(4 * steps.rank(), 4 * steps.rank() + 4) if own else slice(None)
    x = x[part].requires_grad_()
    if ids is None:
        y = model(x)
    else:
        with fastlora.adapters(model, ids):
            y = model.get_base_model()(x)  # the model itself would count this process's samples
    (y * weights[part]).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    if own:
        for name, tensor in found.items():
            parts = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(parts, tensor.contiguous())
            found[name] = torch.cat(parts)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if own or full_tensor(parameter) is not parameter:
                assert parameter.grad.placements == parameter.placements, name
            found[name.replace("base_layer.", "")] = full_tensor(parameter.grad)
    return found


def assert_same(found: Any, same: Any, truth: Any) -> None:
    """All values are within the budgets, and none is missing."""
    assert found.keys() == truth.keys()
    for name, tensor in found.items():
        assert_within_budget(tensor, same[name], truth[name], name)
