"""`TensorParallelLoraLinear`: adapters on a linear layer that is split over a tensor-parallel mesh.

Shapes on one of T processes, after ``parallelize_module`` has split the base layer:

- column-parallel: ``x [..., K]`` unsharded, ``weight [N/T, K]``, ``lora_A [R, K]`` unsharded,
  ``lora_B [N/T, R]``, ``y [..., N/T]``;
- row-parallel: ``x [..., K/T]``, ``weight [N, K/T]``, ``lora_A [R, K/T]``, ``lora_B [N, R]``
  unsharded, ``y [..., N]``, to be summed across the processes.

In both cases, this process's part of the update is ``scaling * x @ lora_A.T @ lora_B.T`` on its
shards. It is added to this process's part of y. Products are linear, so the partial sums of s are
summed together with those of y: the forward pass communicates nothing beyond what the base layer
does. In the backward pass, dx joins the base layer's reduction, and only the gradient of the
unsharded factor is summed across the processes.

DoRA scales each output by ``g = magnitude / ||weight + scaling * lora_b @ lora_a||``, N numbers:

- column-parallel, each process stores whole rows of the weight. ``magnitude [N/T]`` is split in the
  same way, and nothing is communicated;
- row-parallel, each process stores a part of each row. ``magnitude [N]`` is unsharded, and the
  squared norms ``[N]`` are summed across the processes in every forward pass. Outputs are summed
  after the scale: g times a sum is the sum of g times each summand, so each process scales its own.

Only each process's own part of the norms is cached between forward passes. Whether a forward pass
communicates therefore does not depend on the cache, so no process that misses its cache waits for
one that hits.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.layers.adapter_factors import has_module_hooks, scaling_as_scalar_tensor
from fastlora.layers.base_layers import (
    COLUMN_PARALLEL,
    ROW_PARALLEL,
    is_tensor_parallel,
    tensor_parallel_style,
)
from fastlora.layers.call import MixedCall, UniformCall
from fastlora.layers.dora_norms import dora_magnitude_of
from fastlora.layers.fallback_reasons import (
    BASE_GEMM_VARIES,
    FusionStatus,
    reason_dora_prevents_fusion,
    uses_dora,
)
from fastlora.layers.layer_kinds import (
    LINEAR,
    LayerAdapterSettings,
    LayerKind,
    TensorShapes,
    linear_adapter_shapes,
    register_layer_kind,
)
from fastlora.layers.linear_forward import create_call, forward
from fastlora.layers.lora_layer import LoraLayer
from fastlora.layers.merge_target import DenseMergeTarget, MergeTarget
from fastlora.layers.quantized_base import clear_base_and_adapter_caches
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.ops.execution_mode import dispatch_mode_may_keep_results, execution_mode_of
from fastlora.ops.factors import Base, Factors
from fastlora.routing.active import active_routing
from fastlora.sharding import full_tensor, local_shard, to_local_summing_replicated_grads
from fastlora.validation import AdapterStateError, ImplementationError, UnsupportedLayerError

# The golden ratio in 62 bits: its products with different ranks are far apart.
_SEED_STEP = 0x278DDE6E5FD29F05


class TensorParallelLoraLinear(FastLoraWrapper):
    """LoRA layer for a tensor-parallel linear layer.

    The linear layer is split across several processes.

    The layer computes ``y = base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T``.

    The factors are DTensors over the base layer's mesh. In a column-parallel layer, lora_B is split
    along N and lora_A is replicated. In a row-parallel layer, lora_A is split along K and lora_B is
    replicated. The update is added between the base layer's product and the collectives after it.

    With dropout, all processes of a column-parallel layer use one mask, for which each forward pass
    broadcasts one number. In a row-parallel layer, each process draws a mask for its own columns,
    so the masks differ from those of a single process.

    Every process must call `add_adapter`; the first process's values are used. `add_adapter` raises
    `AdapterStateError` if FSDP2 shards the layer too.

    Args:
        base_layer: An `nn.Linear` that ``parallelize_module`` has split.

    Raises:
        UnsupportedLayerError: The base layer is not split, or is split in an unsupported way.
    """

    base_layer: Any  # an nn.Linear with DTensors as parameters
    is_split = True

    def __init__(self, base_layer: nn.Module) -> None:
        style = tensor_parallel_style(base_layer)
        if style is None:
            raise UnsupportedLayerError(f"{type(base_layer).__name__} is not tensor parallel")
        super().__init__(base_layer)
        self.style = style
        self._handle: Any = None

    # ----------------------------------------------------------------------------- adapters

    def move_adapters_from(self, layer: LoraLayer) -> None:
        """Move all adapters of another layer to this layer.

        The adapters' settings are moved too. The factors are distributed over the processes: each
        factor is either split or replicated.

        Args:
            layer: A LoRA layer over the same base weight. It must not be used afterwards.
        """
        for name in ("r", "lora_alpha", "scaling", "use_rslora"):
            setattr(self, name, copy.copy(getattr(layer, name)))
        for name in ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector"):
            setattr(self, name, getattr(layer, name))
        self._active_adapters, self._disabled = layer.active_adapters, layer.disable_adapters
        self.impl = layer.impl
        for name in self.lora_A:
            self._on_factors_added(name)

    def _remove_adapter(self, adapter_name: str) -> None:
        super()._remove_adapter(adapter_name)
        if not len(self.lora_A):
            self.release()

    def release(self) -> nn.Module:
        """Release the base layer from this layer, and return it.

        This layer's hook is removed from the base layer. Without the hook, the base layer no longer
        adds the LoRA update.
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        return self.base_layer

    def _on_factors_added(self, name: str) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = self.base_layer.weight.device_mesh
        by_output = self._per_output_placement()
        parts = [
            (self.lora_A[name], Replicate() if self.style == COLUMN_PARALLEL else Shard(1)),
            (self.lora_B[name], by_output),
        ]
        if name in self.lora_magnitude_vector:
            parts.append((self.lora_magnitude_vector[name], by_output))
        for holder, placement in parts:
            for key, parameter in list(holder.named_parameters(recurse=False)):
                # All processes get the first one's values, because their generators may differ.
                split = distribute_tensor(parameter.detach(), mesh, [placement])
                holder.register_parameter(key, nn.Parameter(split, parameter.requires_grad))
        if self._handle is None:
            # Prepend the hook to that of parallelize_module, so that it sees this process's part.
            self._handle = self.base_layer.register_forward_hook(
                self._local_update_forward_hook, prepend=True
            )

    def reset_magnitude(self, adapter_name: str) -> None:
        """Recompute an adapter's DoRA magnitude from the current weights.

        The magnitude is set to the row norms of the adapted weight. All processes must call this
        method.
        """
        from torch.distributed.tensor import DTensor

        super().reset_magnitude(adapter_name)
        holder: Any = self.lora_magnitude_vector[adapter_name]
        mesh, placements = self.base_layer.weight.device_mesh, [self._per_output_placement()]
        shape, stride = torch.Size([self.out_features]), (1,)
        magnitude = DTensor.from_local(
            holder.weight.detach(), mesh, placements, run_check=False, shape=shape, stride=stride
        )
        holder.weight = nn.Parameter(magnitude, requires_grad=False)

    def _per_output_placement(self) -> Any:
        """Return the DTensor placement for tensors with one element per output feature."""
        from torch.distributed.tensor import Replicate, Shard

        return Shard(0) if self.style == COLUMN_PARALLEL else Replicate()

    def _reference_for_new_factors(self) -> torch.Tensor | None:
        weight = self.base_layer.weight
        if weight.device_mesh.ndim != 1:
            raise AdapterStateError(
                "this layer's weight is sharded by tensor parallelism and by FSDP2 (a DTensor over "
                f"{weight.device_mesh}), but FSDP2 would not shard new factors; add adapters "
                "before you call fully_shard()"
            )
        return weight.to_local() if weight.is_floating_point() and weight.itemsize >= 2 else None

    # ------------------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output y for x.

        Both are in the layouts of its parallel style.
        """
        execution_mode_of(x, "eager").raise_if_batch_invariant(self, BASE_GEMM_VARIES)
        if not torch.is_inference_mode_enabled():
            return self.base_layer(x, *args, **kwargs)
        # In inference mode a DTensor's sums would be sent before the hook sees this process's
        # part.
        with torch.inference_mode(False), torch.no_grad():
            return self.base_layer(x, *args, **kwargs)

    def _local_update_forward_hook(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Forward hook that adds this process's part of the LoRA update to its local part of y.

        The hook runs before the collectives on y. It returns None, which leaves the output
        unchanged, if no adapter applies.
        """
        from torch.distributed.tensor import DTensor, Partial

        if self.impl == "triton" and not self._disabled and active_routing(self) is not None:
            raise ImplementationError(
                "impl='triton' cannot be used: a tensor-parallel layer computes mixed batches in "
                "PyTorch; use impl='auto'"
            )
        call = create_call(self, args[0])
        if isinstance(call, UniformCall) and not call.names:
            return None
        x: Any = call.x
        y: Any = output
        self._check_layouts(x, y)
        # Each process has all of x and a part of its gradient, or a part of both.
        partial = (Partial(),) if self.style == COLUMN_PARALLEL else x.placements
        own_x, own_y = x.to_local(grad_placements=partial), y.to_local()
        call = replace(call, original_x=own_x, x=own_x)
        inplace = not dispatch_mode_may_keep_results(own_y)
        result = forward(call, Base(y=own_y, inplace=inplace))
        return DTensor.from_local(
            result, y.device_mesh, y.placements, run_check=False, shape=y.shape, stride=y.stride()
        )

    def _check_layouts(self, x: torch.Tensor, y: torch.Tensor) -> None:
        to, out = (getattr(tensor, "placements", (None,))[0] for tensor in (x, y))
        last = x.dim() - 1
        if to is None or out is None:
            fits = False
        elif self.style == COLUMN_PARALLEL:
            fits = to.is_replicate() and out.is_shard(last)
        else:
            fits = to.is_shard(last) and out.is_partial()
        if not fits:
            raise UnsupportedLayerError(
                f"a {self.style} layer got input and output layouts {to} and {out}, expected "
                "the layouts of ColwiseParallel or RowwiseParallel"
            )

    # ---------------------------- interface of a forward pass: see `layers.linear_with_adapters`

    def _local_factors(
        self, name: str, call: UniformCall | MixedCall | None = None, *, with_dropout: bool = True
    ) -> Factors:
        """Return this process's shards of an adapter's factors.

        The shards are plain tensors. A factor that is not split is returned as a whole. The scaling
        is returned with the factors but is not multiplied into them.

        Raises:
            UnsupportedLayerError: The adapter's modules must be called.
        """
        up, dropout = self.lora_B[name], self.lora_dropout[name]
        for module in (self.lora_A[name], up, dropout):
            if type(module) not in (nn.Linear, nn.Dropout, nn.Identity) or has_module_hooks(module):
                raise UnsupportedLayerError(
                    f"adapter {name!r} has a {type(module).__name__} that has hooks or was "
                    "replaced, which tensor-parallel layers do not support"
                )
        lora_bias = None if up.bias is None else to_local_summing_replicated_grads(up.bias)
        if lora_bias is not None and self.style == ROW_PARALLEL:
            # All parts of y are summed, so only the first process adds the bias.
            lora_bias = lora_bias * (not self.base_layer.weight.device_mesh.get_local_rank())
        return Factors(
            to_local_summing_replicated_grads(self.lora_A[name].weight),
            to_local_summing_replicated_grads(up.weight),
            self.scaling[name] if call is None else scaling_as_scalar_tensor(self, name, call),
            lora_bias,
            dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )

    def _local_magnitude(self, name: str) -> torch.Tensor:
        return to_local_summing_replicated_grads(dora_magnitude_of(self, name))

    def _local_weight(self) -> torch.Tensor:
        return local_shard(self.base_layer.weight)

    def _local_base_bias(self) -> torch.Tensor | None:
        """Return this process's part of the base layer's bias.

        In a column-parallel layer, the part is this process's shard of the bias. In a row-parallel
        layer, all processes get equal parts: the bias divided by the number of processes. DoRA
        subtracts these parts before it scales y and adds them afterward, so that they sum to the
        bias in whichever process torch has added it. All parts may be trained. Returns None if the
        base layer has no bias.
        """
        bias = super()._local_base_bias()
        if bias is None or self.style == COLUMN_PARALLEL:
            return None if bias is None else to_local_summing_replicated_grads(bias)
        return to_local_summing_replicated_grads(bias) / self.base_layer.weight.device_mesh.size()

    def _local_dropout_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Derive the dropout seeds to use in this process from ``seed``.

        The seeds are int64 and have the shape of ``seed``. In a row-parallel layer, each process
        has its own seeds for masking its shard of x. In a column-parallel layer, x is not split, so
        all processes mask the same x with the same seeds.
        """
        mesh = self.base_layer.weight.device_mesh
        if self.style == ROW_PARALLEL:
            return seed ^ (mesh.get_local_rank() * _SEED_STEP % 2**62)
        shared = seed.to(mesh.device_type, copy=True)  # The block keeps its own.
        dist.broadcast(shared, group=mesh.get_group(), group_src=0)
        return shared.to(seed.device)

    def _reduce_squares_and_replace_zeros(
        self, squared_norms: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        if self.style == ROW_PARALLEL and squared_norms:
            joined = torch.stack(list(squared_norms))  # One message for all sums.
            dist.all_reduce(joined, group=self.base_layer.weight.device_mesh.get_group())
            squared_norms = joined.unbind()
        return super()._reduce_squares_and_replace_zeros(squared_norms)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The caller may write into the tensors' local parts, as dcp.load does. No version records
        # that.
        clear_base_and_adapter_caches(self)
        super()._save_to_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------------ merging, report

    def fusion(self, gathered: bool = False) -> FusionStatus:
        """Return the fusion status of the layer.

        The status states whether the layer is fused and, if not, the reason. A tensor-parallel
        layer is never fused.
        """
        reason = f"{self.style} tensor parallel: LoRA is added to each process's part of the output"
        names = self._applied_adapters()
        if uses_dora(self, names):
            further = reason_dora_prevents_fusion(self, names)
            reason += ", which DoRA scales" + (f"; {further}" if further else "")
        return FusionStatus(False, reason)

    def _weight_and_bias_to_merge(self) -> tuple[MergeTarget, torch.Tensor | None]:
        """Return the base weight and bias that adapters are merged into.

        Both are this process's shards. The bias is None if the base layer has no bias.
        """
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if weight.device_mesh.ndim != 1:
            raise UnsupportedLayerError(
                "cannot merge into this layer: its weight is sharded by tensor parallelism and by "
                f"FSDP2 (a DTensor over {weight.device_mesh}); save the adapter and merge it into "
                "an unsharded base model"
            )
        return DenseMergeTarget(local_shard(weight)), None if bias is None else local_shard(bias)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        lora_a, lora_b, lora_bias = super()._factors(name)
        return (
            local_shard(lora_a),
            local_shard(lora_b),
            None if lora_bias is None else local_shard(lora_bias),
        )

    def _true_in_all_processes(self, condition: bool) -> bool:
        mesh = self.base_layer.weight.device_mesh
        flag = torch.tensor(float(condition), device=mesh.device_type)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=mesh.get_group())
        return bool(flag.item())

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return an adapter's delta weight for the tensor-parallel layer.

        The delta weight ``[N, K]`` is the dense matrix ``scaling * B @ A`` for the whole layer and
        is not sharded. All processes must call this method, because the shards of the factors A and
        B are gathered from all processes.
        """
        self._check_has_adapter(adapter_name)
        lora_a, lora_b, _ = super()._factors(adapter_name)
        return self.scaling[adapter_name] * (full_tensor(lora_b) @ full_tensor(lora_a)).detach()


def _shapes(module: nn.Module, settings: LayerAdapterSettings) -> TensorShapes:
    linear: Any = module
    return linear_adapter_shapes(linear.in_features, linear.out_features, settings)


def _accept_all(module: nn.Module, settings: LayerAdapterSettings) -> None:
    """Accept all settings.

    `TensorParallelLoraLinear` checks its base layer itself.
    """


register_layer_kind(
    LayerKind(LINEAR, is_tensor_parallel, TensorParallelLoraLinear, _shapes, _accept_all)
)
