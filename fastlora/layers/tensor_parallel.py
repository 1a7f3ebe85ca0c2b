"""`TensorParallelLora`: adapters on a linear whose weight is split over a tensor-parallel mesh.

Shapes on one of T processes, where ``parallelize_module`` split the base layer:

- column-wise: ``x [..., K]`` whole, ``weight [N/T, K]``, ``lora_A [R, K]`` whole,
  ``lora_B [N/T, R]``, ``y [..., N/T]``;
- row-wise: ``x [..., K/T]``, ``weight [N, K/T]``, ``lora_A [R, K/T]``, ``lora_B [N, R]`` whole,
  ``y [..., N]``, to be summed over the processes.

In both, this process's share of the update is ``scaling * x @ lora_A.T @ lora_B.T`` on what it has,
added to its share of y. A product is linear, so partial sums of s ride along in those of y: the
forward sends nothing that the base layer does not. In the backward dx joins the base layer's
reduction, and only the whole factor's gradient is summed over the processes.

DoRA scales each output by ``g = magnitude / ||weight + scaling * lora_b @ lora_a||``, N numbers:

- column-wise the weight has whole rows, so ``magnitude [N/T]`` is split along with them, and
  nothing is sent;
- row-wise it has a part of each row. ``magnitude [N]`` is whole, and the squared norms ``[N]`` are
  summed over the processes in every forward. Outputs are summed behind it, and g times a sum is the
  sum of g times each summand: each process scales its own.

What is kept of norms between forwards is each process's own part: whether a forward sends does not
depend on it, and so no process waits for one that found its part where another did not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastlora.layers.base import LoraLayer
from fastlora.layers.bases import COLUMN_WISE, ROW_WISE, is_parallel, parallel_style
from fastlora.layers.call import LayerCall, MixedCall
from fastlora.layers.coded_base import forget_weights
from fastlora.layers.factors import is_hooked, scaling_beside
from fastlora.layers.forward import begin, forward
from fastlora.layers.kinds import LINEAR, Kind, Settings, Shapes, linear_shapes, register_kind
from fastlora.layers.norms import magnitude_of
from fastlora.layers.stored import Plain, Stored
from fastlora.layers.why import NOT_OUR_GEMM, uses_dora, why_dora_not_fused
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.ops.conditions import conditions_of
from fastlora.ops.factors import Base, Factors
from fastlora.routing.in_force import routing_of
from fastlora.sharding import local, own, whole
from fastlora.validation import AdapterStateError, ImplementationError, UnsupportedLayerError

# Apart from each other after a multiplication by any rank: the golden ratio in 62 bits.
_SEED_STEP = 0x278DDE6E5FD29F05


class TensorParallelLora(FastLoraWrapper):
    """``y = base_layer(x) + scaling * dropout(x) @ lora_A.T @ lora_B.T`` over several processes.

    The factors are DTensors over the base layer's mesh: column-wise lora_B is split along N and
    lora_A whole, row-wise lora_A is split along K and lora_B whole. The update is added between the
    base layer's product and the collectives behind it.

    With dropout, column-wise processes draw one mask (a broadcast of one number for each forward);
    row-wise each draws its own for its columns, so that masks differ from those of one process.

    Every process must call `add_adapter`; the first one's values count. It raises
    `AdapterStateError` where FSDP2 shards the layer too.

    Args:
        base_layer: An `nn.Linear` that ``parallelize_module`` has split.

    Raises:
        UnsupportedLayerError: It is split in a way that adapters cannot follow, or not at all.
    """

    base_layer: Any  # an nn.Linear whose parameters are DTensors
    is_split = True

    def __init__(self, base_layer: nn.Module) -> None:
        style = parallel_style(base_layer)
        if style is None:
            raise UnsupportedLayerError(f"{type(base_layer).__name__} is not tensor parallel")
        super().__init__(base_layer)
        self.style = style
        self._handle: Any = None

    # ----------------------------------------------------------------------------- adapters

    def take_adapters(self, layer: LoraLayer) -> None:
        """Moves another layer's adapters here, with all that they have.

        Args:
            layer: A LoRA layer over the same base weight, of no use afterwards.
        """
        for name in ("r", "lora_alpha", "scaling", "use_rslora"):
            setattr(self, name, copy.copy(getattr(layer, name)))
        for name in ("lora_dropout", "lora_A", "lora_B", "lora_magnitude_vector"):
            setattr(self, name, getattr(layer, name))
        self._active_adapters, self._disabled = layer.active_adapters, layer.disable_adapters
        self.impl = layer.impl
        for name in self.lora_A:
            self._place(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """See `LoraLayer.delete_adapter`."""
        super().delete_adapter(adapter_name)
        if not len(self.lora_A):
            self.release()

    def release(self) -> nn.Module:
        """Returns the base layer as it was before the first adapter came."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        return self.base_layer

    def _place(self, name: str) -> None:
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = self.base_layer.weight.device_mesh
        by_output = self._output_placement()
        parts = [
            (self.lora_A[name], Replicate() if self.style == COLUMN_WISE else Shard(1)),
            (self.lora_B[name], by_output),
        ]
        if name in self.lora_magnitude_vector:
            parts.append((self.lora_magnitude_vector[name], by_output))
        for holder, placement in parts:
            for key, parameter in list(holder.named_parameters(recurse=False)):
                # Sent from the first process, so that all start alike whatever their generators.
                split = distribute_tensor(parameter.detach(), mesh, [placement])
                holder.register_parameter(key, nn.Parameter(split, parameter.requires_grad))
        if self._handle is None:
            # Before the hook that parallelize_module registered: it sees this process's share.
            self._handle = self.base_layer.register_forward_hook(self._add_update, prepend=True)

    def reset_magnitude(self, adapter_name: str) -> None:
        """See `LoraLayer.reset_magnitude`; every process must call it."""
        from torch.distributed.tensor import DTensor

        super().reset_magnitude(adapter_name)
        holder: Any = self.lora_magnitude_vector[adapter_name]
        mesh, placements = self.base_layer.weight.device_mesh, [self._output_placement()]
        shape, stride = torch.Size([self.out_features]), (1,)
        magnitude = DTensor.from_local(
            holder.weight.detach(), mesh, placements, run_check=False, shape=shape, stride=stride
        )
        holder.weight = nn.Parameter(magnitude, requires_grad=False)

    def _output_placement(self) -> Any:
        """How what has one number for each output is spread over the processes."""
        from torch.distributed.tensor import Replicate, Shard

        return Shard(0) if self.style == COLUMN_WISE else Replicate()

    def _factor_like(self) -> torch.Tensor | None:
        weight = self.base_layer.weight
        if weight.device_mesh.ndim != 1:
            raise AdapterStateError(
                f"FSDP2 shards this layer's weight too (a DTensor over {weight.device_mesh}), and "
                "would not shard new factors: add adapters before fully_shard()"
            )
        return weight.to_local() if weight.is_floating_point() and weight.itemsize >= 2 else None

    # ------------------------------------------------------------------------------ forward

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Maps x to y as the base layer does, in the layouts that its parallel style has."""
        conditions_of(x, "eager").refuse(self, NOT_OUR_GEMM)
        if not torch.is_inference_mode_enabled():
            return self.base_layer(x, *args, **kwargs)
        # There a DTensor's sums are sent before the hook sees a share of them.
        with torch.inference_mode(False), torch.no_grad():
            return self.base_layer(x, *args, **kwargs)

    def _add_update(
        self, _: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Adds this process's share of the update to its share of y, between the collectives."""
        from torch.distributed.tensor import DTensor, Partial

        if self.impl == "triton" and not self._disabled and routing_of(self) is not None:
            raise ImplementationError(
                "impl='triton' cannot run: a tensor-parallel layer computes mixed batches in "
                "PyTorch; expected impl='auto'"
            )
        call = begin(self, args[0])
        if isinstance(call, LayerCall) and not call.names:
            return None
        x: Any = call.x
        y: Any = output
        self._check_layouts(x, y)
        # Each process has the whole x and a part of its gradient, or a part of both.
        partial = (Partial(),) if self.style == COLUMN_WISE else x.placements
        own_x, own_y = x.to_local(grad_placements=partial), y.to_local()
        call = call._replace(given=own_x, x=own_x)
        result = forward(call, Base(y=own_y, inplace=True))
        return DTensor.from_local(
            result, y.device_mesh, y.placements, run_check=False, shape=y.shape, stride=y.stride()
        )

    def _check_layouts(self, x: torch.Tensor, y: torch.Tensor) -> None:
        to, out = (getattr(tensor, "placements", (None,))[0] for tensor in (x, y))
        last = x.dim() - 1
        if to is None or out is None:
            fits = False
        elif self.style == COLUMN_WISE:
            fits = to.is_replicate() and out.is_shard(last)
        else:
            fits = to.is_shard(last) and out.is_partial()
        if not fits:
            raise UnsupportedLayerError(
                f"a {self.style} layer got input and output in the layouts {to} and {out}, which "
                "are not those of ColwiseParallel or RowwiseParallel"
            )

    # ------------------------------------------- what a forward asks of it: see `layers.common`

    def _own_factors(
        self, name: str, call: LayerCall | MixedCall | None = None, *, drops: bool = True
    ) -> Factors:
        """Returns this process's share of an adapter as plain tensors; all of it unscaled.

        Raises:
            UnsupportedLayerError: Its modules must be called.
        """
        up, dropout = self.lora_B[name], self.lora_dropout[name]
        for module in (self.lora_A[name], up, dropout):
            if type(module) not in (nn.Linear, nn.Dropout, nn.Identity) or is_hooked(module):
                raise UnsupportedLayerError(
                    f"adapter {name!r} has a {type(module).__name__} that is hooked or replaced, "
                    "which a tensor-parallel layer cannot run"
                )
        lora_bias = None if up.bias is None else own(up.bias)
        if lora_bias is not None and self.style == ROW_WISE:
            # All shares of y are summed: the bias goes into the first one.
            lora_bias = lora_bias * (not self.base_layer.weight.device_mesh.get_local_rank())
        return Factors(
            own(self.lora_A[name].weight),
            own(up.weight),
            self.scaling[name] if call is None else scaling_beside(self, name, call),
            lora_bias,
            dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0,
        )

    def _own_magnitude(self, name: str) -> torch.Tensor:
        return own(magnitude_of(self, name))

    def _own_weight(self) -> torch.Tensor:
        return local(self.base_layer.weight)

    def _own_bias(self) -> torch.Tensor | None:
        """This process's share of the base bias in its share of y; all may be trained.

        Row-wise an equal part, as torch adds it. Taken out before the scale and put back behind
        it, the parts sum up to the bias wherever torch has added it.
        """
        bias = super()._own_bias()
        if bias is None or self.style == COLUMN_WISE:
            return None if bias is None else own(bias)
        return own(bias) / self.base_layer.weight.device_mesh.size()

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Returns one seed for all where all have the same columns of x, else one for each."""
        mesh = self.base_layer.weight.device_mesh
        if self.style == ROW_WISE:
            return seed ^ (mesh.get_local_rank() * _SEED_STEP % 2**62)
        shared = seed.to(mesh.device_type, copy=True)  # the block keeps its own
        dist.broadcast(shared, group=mesh.get_group(), group_src=0)
        return shared.to(seed.device)

    def _of_whole_rows(self, sums: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.style == ROW_WISE and sums:
            joined = torch.stack(list(sums))  # one message for all
            dist.all_reduce(joined, group=self.base_layer.weight.device_mesh.get_group())
            sums = joined.unbind()
        return super()._of_whole_rows(sums)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Whoever gets the tensors may write into their parts, which no version tells of: dcp.load.
        forget_weights(self)
        super()._save_to_state_dict(*args, **kwargs)

    # ------------------------------------------------------------------------ merging, report

    def fusion(self, gathered: bool = False) -> tuple[bool, str]:
        """Not fused; says so, and what DoRA adds to that."""
        why = f"{self.style} tensor parallel: added to each process's share of the output"
        names = self._acting()
        if uses_dora(self, names):
            further = why_dora_not_fused(self, names)
            why += ", which DoRA scales" + (f"; {further}" if further else "")
        return False, why

    def _mergeable(self) -> tuple[Stored, torch.Tensor | None]:
        """This process's share of the base weight, which takes its share of the update."""
        weight, bias = self.base_layer.weight, self.base_layer.bias
        if weight.device_mesh.ndim != 1:
            raise UnsupportedLayerError(
                f"cannot merge into this layer: FSDP2 shards its weight too (a DTensor over "
                f"{weight.device_mesh}); save the adapter and merge it into an unsharded base model"
            )
        return Plain(local(weight)), None if bias is None else local(bias)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        lora_a, lora_b, lora_bias = super()._factors(name)
        return local(lora_a), local(lora_b), None if lora_bias is None else local(lora_bias)

    def _all_agree(self, holds: bool) -> bool:
        mesh = self.base_layer.weight.device_mesh
        flag = torch.tensor(float(holds), device=mesh.device_type)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=mesh.get_group())
        return bool(flag.item())

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Returns ``scaling * B @ A``, all of ``[N, K]``; every process must call it."""
        self._check_known(adapter_name)
        lora_a, lora_b, _ = super()._factors(adapter_name)
        return self.scaling[adapter_name] * (whole(lora_b) @ whole(lora_a)).detach()


def _shapes(module: nn.Module, asked: Settings) -> Shapes:
    linear: Any = module
    return linear_shapes(linear.in_features, linear.out_features, asked)


def _check(module: nn.Module, asked: Settings) -> None:
    """Refuses nothing: a layer that exists may be loaded anew, and a new one looks when made."""


register_kind(Kind(LINEAR, is_parallel, TensorParallelLora, _shapes, _check))
