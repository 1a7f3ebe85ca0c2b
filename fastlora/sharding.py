"""Functions for tensors that are sharded over processes (`torch.distributed.tensor.DTensor`).

Under FSDP2 (`fully_shard`), parameters are DTensors except during a forward pass, for which FSDP2
gathers them. Under tensor parallelism, parameters are always DTensors. Importing
`torch.distributed.tensor` takes 0.4 s, so this module uses it only after other code has imported
it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.validation import CheckpointError, UnsupportedLayerError


def is_dtensor(tensor: object) -> bool:
    """Return whether a tensor is a DTensor.

    A replicated DTensor counts too.
    """
    # Another thread may be importing the module, which then has no attributes yet.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local_shard(parameter: Any) -> torch.Tensor:
    """Return this process's shard of a parameter.

    If the parameter is not a DTensor, the parameter itself is returned. If the parameter requires a
    gradient, autograd records the operation.
    """
    if not is_dtensor(parameter):
        return parameter
    if torch.is_grad_enabled() and parameter.requires_grad:
        return parameter.to_local()
    with torch.no_grad():
        return parameter.to_local()


def to_local_summing_replicated_grads(parameter: Any) -> torch.Tensor:
    """Return a parameter's local tensor; the backward pass sums a replicated parameter's gradients.

    The parameter is a DTensor, and the result is a plain tensor. If the parameter is replicated
    over the whole device mesh, the backward pass sums its gradients over all processes.
    """
    is_whole = all(placement.is_replicate() for placement in parameter.placements)
    if not (is_whole and torch.is_grad_enabled() and parameter.requires_grad):
        return parameter.to_local()
    from torch.distributed.tensor import Partial

    # The redistribution is a no-op in the forward pass. In the backward pass, it sums the partial
    # gradients.
    whole = parameter.redistribute(parameter.device_mesh, parameter.placements)
    return whole.to_local(grad_placements=[Partial()])


def has_multiple_processes() -> bool:
    """Return whether there is more than one distributed process.

    If so, `torch.distributed` is initialized.
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def unwrap_ddp(model: Any) -> Any:
    """Return the model that is wrapped by DistributedDataParallel.

    If ``model`` is not wrapped, ``model`` itself is returned.
    """
    return model.module if type(model).__name__ == "DistributedDataParallel" else model


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of a DTensor.

    A DTensor is gathered: every process of its device mesh must call this function. A plain tensor
    is returned unchanged.
    """
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the total norm of gradients.

    Some of the gradients may be DTensors. Every process of the DTensors' device meshes must call
    this function. Unlike `torch.nn.utils.get_total_norm`, it supports gradients on different
    meshes.

    Args:
        gradients: Plain tensors and DTensors, on any device meshes.
    """
    norms = [full_tensor(nn.utils.get_total_norm(part)) for part in _group_by_mesh(gradients)]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def clip_grads_with_norm_(
    parameters: Sequence[torch.Tensor], max_norm: float, norm: torch.Tensor
) -> None:
    """Scale gradients in place so that their total norm is at most ``max_norm``.

    Args:
        parameters: Parameters, plain tensors or DTensors. Parameters without a gradient are
            skipped.
        max_norm: Maximum total norm, positive.
        norm: Total norm of the gradients, from `total_norm`.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not any(map(is_dtensor, gradients)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch does
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device))


def _group_by_mesh(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Group tensors by their device mesh.

    The DTensors on the same mesh form a group. Plain tensors, which have no mesh, form a group of
    their own. The result is a list of the groups, in order of first appearance.
    """
    parts: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if is_dtensor(tensor) else None  # type: ignore[attr-defined]
        parts.setdefault(mesh, []).append(tensor)
    return list(parts.values())


class ShardedSaveCoordinator:
    """Coordinates the processes that save a sharded model.

    All processes gather the tensors together, and one process writes the files. Then all processes
    are informed whether the write succeeded.

    Args:
        parameters: Parameters of the model. If none of them is a DTensor, the processes are not
            coordinated, and each process writes files.
    """

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        meshes = [p.device_mesh for p in parameters if is_dtensor(p)]  # type: ignore[attr-defined]
        self._mesh: Any = max(meshes, key=lambda mesh: mesh.size()) if meshes else None

    @property
    def is_model_sharded(self) -> bool:
        """Whether the model is sharded.

        If so, every process must participate.
        """
        return self._mesh is not None

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the files."""
        return self._mesh is None or not any(self._mesh.get_coordinate())

    def gather_full_tensors(
        self, tensors: Mapping[str, torch.Tensor], return_tensors: bool
    ) -> dict[str, torch.Tensor]:
        """Gather the full tensors, and return them in a dict keyed by name.

        DTensors are gathered one at a time. Gathered tensors are on the CPU. Plain tensors are
        returned unchanged.

        Args:
            tensors: Maps names to tensors. Every process must pass the same DTensors in the same
                order.
            return_tensors: Whether to return the tensors. If False, the process participates in the
                gathering but returns an empty dict.

        Raises:
            CheckpointError: One of the tensors is a DTensor, but no parameter of the model is a
                DTensor.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if self._mesh is None and is_dtensor(tensor):
                raise CheckpointError(
                    f"state_dict does not contain {name!r}, and the model holds only a shard of "
                    "that tensor"
                )
            full = full_tensor(tensor.detach()).cpu() if is_dtensor(tensor) else tensor
            if return_tensors:
                found[name] = full
        return found

    def wait_for_all_or_raise(self, error: Exception | None) -> None:
        """Wait for all processes, and raise an error if any of them failed.

        A process waits until every process has called this method. A process has failed if it
        could not write the files.

        Args:
            error: The exception that occurred in this process while it wrote the files, or None.

        Raises:
            CheckpointError: The write failed in another process.
            Exception: ``error``, if it is not None.
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


def copy_full_tensor_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a full tensor into a plain tensor or a DTensor.

    The values are converted to the target's dtype. Every process must have all of ``source``. If
    ``target`` is a DTensor, each process copies its own shard without communication. ``source`` may
    be a DTensor only if it is sharded in the same way as ``target``.
    """
    if not is_dtensor(target) or is_dtensor(source):
        target.copy_(source)
        return
    from torch.distributed.tensor import Replicate, distribute_tensor

    any_target: Any = target
    mesh = any_target.device_mesh
    source = source.to(device=any_target.device, dtype=target.dtype)
    copies = distribute_tensor(source, mesh, [Replicate()] * mesh.ndim, src_data_rank=None)
    target.copy_(copies.redistribute(mesh, any_target.placements))


def fully_shard_was_called() -> bool:
    """Return whether `fully_shard` has been called in this process.

    The result is False if `fully_shard` has been imported but not called. If the function has been
    called, FSDP2 is in use: a parameter that FSDP2 gathers again may have new values at the same
    memory address and with the same ``_version``.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and bool(kind.__subclasses__())


def is_fsdp2_module(module: nn.Module) -> bool:
    """Return whether a module has been sharded with FSDP2's `fully_shard`.

    The function `fully_shard` must have been applied to the module itself. The result is False for
    a submodule of such a module, unless `fully_shard` has also been applied to the submodule.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, getattr(fsdp, "FSDPModule", ()))


def raise_if_base_weight_is_dtensor(layer: nn.Module) -> None:
    """Raise `UnsupportedLayerError` if the base weight of a layer is a DTensor.

    Such a weight is sharded. It is checked in the forward pass. Otherwise, the layer would compute
    its output with only a shard of the weight.
    """
    weight: Any = layer._parameters.get("weight")
    if is_dtensor(weight):
        raise UnsupportedLayerError(
            f"the base weight of a {type(layer).__name__} is a DTensor with placements "
            f"{weight.placements} in the forward pass. Under fully_shard(), call the module that "
            "fully_shard() was applied to (for other methods, use register_fsdp_forward_method); "
            "for tensor parallelism, use fastlora.integrations.distributed.tensor_parallel"
        )
