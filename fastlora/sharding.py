"""Tensors of which each process holds a part: `torch.distributed.tensor.DTensor`.

Parameters are that outside of a forward under FSDP2 (`fully_shard`), which gathers them for it, and
always under tensor parallelism. Nothing here imports `torch.distributed.tensor`, which takes 0.4 s,
before something else has.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.validation import CheckpointError, UnsupportedLayerError


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor, replicated ones included."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(parameter: Any) -> torch.Tensor:
    """Returns this process's part of a DTensor, in the graph where one is recorded through it.

    What is a part already, a plain tensor, comes back as it is.
    """
    if not is_sharded(parameter):
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        return parameter.to_local()
    with torch.no_grad():
        return parameter.to_local()


def own(parameter: Any) -> torch.Tensor:
    """Returns this process's part of a DTensor as a plain tensor.

    Of one that every process has whole, each has one summand of the gradient: they are added up in
    the backward.
    """
    is_whole = all(placement.is_replicate() for placement in parameter.placements)
    if not (is_whole and torch.is_grad_enabled() and parameter.requires_grad):
        return parameter.to_local()
    from torch.distributed.tensor import Partial

    # The redistribution changes nothing now; its backward turns the sum that is pending into one.
    whole = parameter.redistribute(parameter.device_mesh, parameter.placements)
    return whole.to_local(grad_placements=[Partial()])


def several_processes() -> bool:
    """Whether torch.distributed runs, with more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwrapped(model: Any) -> Any:
    """Returns the model inside DistributedDataParallel, or the model itself."""
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns all of a tensor. For a DTensor every process of its mesh must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the norm of all gradients together; every process of their meshes must call it.

    Args:
        gradients: Plain tensors and DTensors over any meshes, which torch cannot mix in one call.
    """
    norms = [whole(nn.utils.get_total_norm(part)) for part in _by_mesh(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_with_norm_(
    parameters: Sequence[torch.Tensor], max_norm: float, norm: torch.Tensor
) -> None:
    """Scales gradients in place by ``max_norm / norm``, where that is less than 1.

    Args:
        parameters: Plain tensors and DTensors; those without a gradient are left out.
        max_norm: Positive.
        norm: From `total_norm`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_sharded, gradients)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))


def _by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Returns plain tensors and those of each mesh apart, in the order of their first ones."""
    parts: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_sharded(tensor) else None  # type: ignore[attr-defined]
        parts.setdefault(mesh, []).append(tensor)
    return list(parts.values())


class Gathering:
    """One process of those that hold a model together writes it, and all learn how that went.

    Args:
        parameters: Of the model. Where none is a DTensor, each process is on its own.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        meshes = [p.device_mesh for p in parameters if is_sharded(p)]  # type: ignore[attr-defined]
        self._mesh: Any = max(meshes, key=lambda mesh: mesh.size()) if meshes else None

    @property
    def needed(self) -> bool:
        """Whether the model is sharded, so that every process must take part."""
        return self._mesh is not None

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes."""
        return self._mesh is None or not any(self._mesh.get_coordinate())

    def tensors(self, tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
        """Returns all of each tensor, on the CPU where it was a DTensor, gathered one at a time.

        Args:
            tensors: Every process must pass the same DTensors in the same order.
            keep: False takes part in gathering and returns none.

        Raises:
            CheckpointError: Tensors are whole, as far as their state dict goes, and one is not.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if self._mesh is None and is_sharded(tensor):
                raise CheckpointError(f"state_dict lacks {name!r}, of which the model has a shard")
            full = whole(tensor.detach()).cpu() if is_sharded(tensor) else tensor
            if keep:
                found[name] = full
        return found

    def finish(self, error: Exception | None) -> None:
        """Waits until every process is here.

        Raises:
            CheckpointError: Another process failed to write.
            Exception: ``error``, where this one did.
        """
        failed = error is not None
        if self._mesh is not None:
            flag = torch.tensor(float(failed), device=self._mesh.device_type)
            for dim in range(self._mesh.ndim):
                group = self._mesh.get_group(dim)
                dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=group)
            failed = bool(flag.item())
        if error is not None:
            raise error
        if failed:
            raise CheckpointError("the process that writes the files failed; see its error")


def copy_whole_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies ``source``, which every process has, into ``target``, whose dtype stays.

    Into a DTensor each process copies its own part, without a word to the others. A source that is
    one itself must be split alike.
    """
    if not is_sharded(target) or is_sharded(source):
        target.copy_(source)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    any_target: Any = target
    mesh = any_target.device_mesh
    source = source.to(device=any_target.device, dtype=target.dtype)
    copies = distribute_tensor(source, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    target.copy_(copies.redistribute(mesh, any_target.placements))


def gathers_parameters() -> bool:
    """Whether `fully_shard` was called in this process.

    A parameter that FSDP2 has gathered may then be new although its address and version are not.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and bool(fsdp.FSDPModule.__subclasses__())


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on this very module."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def refuse_shards(layer: nn.Module) -> None:
    """Raises `UnsupportedLayerError` where a layer is to compute with a shard of its weight."""
    weight: Any = layer._parameters.get("weight")
    if is_sharded(weight):
        raise UnsupportedLayerError(
            f"the base weight of a {type(layer).__name__} is a DTensor with placements "
            f"{weight.placements} in the forward. Under fully_shard(), call the module that it was "
            "called on (for other methods, register_fsdp_forward_method); for tensor parallelism, "
            "use fastlora.integrations.distributed.tensor_parallel"
        )
