"""DoRA where a weight is split over a tensor-parallel mesh: magnitudes, norms, scaled shares.

DoRA scales each output by ``g = magnitude / ||weight + scaling * lora_b @ lora_a||``, N numbers.
Shapes on one of T processes:

- column-wise: ``weight [N/T, K]`` has whole rows, so ``magnitude [N/T]`` is split along with them,
  and nothing is sent;
- row-wise: ``weight [N, K/T]`` has a part of each row. ``magnitude [N]`` is whole, and the squared
  norms ``[N]`` are summed over the processes in every forward. Outputs are summed behind it, and g
  times a sum is the sum of g times each summand: each process scales its own.

What is kept of norms between forwards is each process's own part: whether a forward sends does not
depend on it, and so no process waits for one that found its part where another did not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.autograd.dora import nonzero
from fastlora.layers.dora_mixed import DoraSlots, scale_rows, scale_segments, wants_segments
from fastlora.layers.dora_norms import cached_squares, forget_norms
from fastlora.layers.own_share import OwnShare, local, own
from fastlora.layers.wrapped import FastLoraWrapper
from fastlora.ops.rows import Rows
from fastlora.routing.routing import Routing
from fastlora.validation import UnsupportedLayerError

COLUMN_WISE, ROW_WISE = "column-wise", "row-wise"


class TensorParallelDora(FastLoraWrapper):
    """The half of `TensorParallelLora` that has magnitudes and norms.

    Attributes:
        style: How the base layer's weight is split.
    """

    base_layer: Any  # an nn.Linear whose parameters are DTensors
    style: str

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

    def _own_seed(self, seed: torch.Tensor) -> torch.Tensor:
        """Returns the seed that a dropout has in this process."""
        raise UnsupportedLayerError(f"{type(self).__name__} draws no seeds")

    # ------------------------------------------------------------------------------- forward

    def _dora_share(self, names: list[str], impl: str) -> OwnShare:
        """Returns what this process scales with for some adapters, all of them with DoRA."""
        by_column = self.style == COLUMN_WISE
        share = self._own_share(impl)
        squares = []
        for name in names:
            magnitude: Any = self.lora_magnitude_vector[name]
            share.magnitudes[name] = own(magnitude.weight, summed=not by_column)
            lora_a: Any = self.lora_A[name].weight
            lora_b: Any = self.lora_B[name].weight
            squares.append(cached_squares(share, name, lora_a, lora_b, part=not by_column))
        if not by_column:  # one message for all
            squares = list(self._of_whole_rows(torch.stack(squares)).unbind())
        share.squares.update(zip(names, squares, strict=True))
        return share

    def _scaled_mixed(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        routing: Routing,
        rows: Rows,
        slots: DoraSlots,
        branches: dict[int, Any],
        projection: int,
    ) -> torch.Tensor:
        """Scales this process's share of DoRA rows, all LoRA terms being in; see `dora_mixed`."""
        names = [routing.names[slot] for slot in (*slots.scaled, *slots.dropped)]
        share = self._dora_share(names, "eager")
        if not wants_segments(share, y, routing, slots):
            return scale_rows(share, y, routing, slots)
        return scale_segments(share, y, x, routing, rows, slots, branches, projection)

    # --------------------------------------------------------------------------------- norms

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Whoever gets the tensors may write into their parts, which no version tells of: dcp.load.
        forget_norms(self)
        super()._save_to_state_dict(*args, **kwargs)

    def _own_share(self, impl: str = "auto") -> OwnShare:
        return OwnShare(self, self._own_bias(), self._own_seed, impl)

    def _own_bias(self) -> torch.Tensor | None:
        """This process's share of the base bias in its share of y; all may be trained.

        Row-wise an equal part, as torch adds it. Taken out before the scale and put back behind
        it, the parts sum up to the bias wherever torch has added it.
        """
        bias = self.base_layer.bias
        if bias is None or self.style == COLUMN_WISE:
            return None if bias is None else own(bias, summed=False)
        return own(bias, summed=True) / self.base_layer.weight.device_mesh.size()

    def _of_whole_rows(self, sums: torch.Tensor) -> torch.Tensor:
        if self.style == ROW_WISE:
            sums = sums.clone()
            group = self.base_layer.weight.device_mesh.get_group()
            torch.distributed.all_reduce(sums, group=group)
        return nonzero(sums)

    def _own_magnitude(self, name: str) -> torch.Tensor:
        magnitude: Any = self.lora_magnitude_vector[name]
        return local(magnitude.weight)
