"""What the processes that share a training batch must agree about, adapter by adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fastlora.sharding import is_sharded, several_processes
from fastlora.train.losses import AdapterLosses


class Agreed(NamedTuple):
    """A batch's losses as all processes see them.

    Attributes:
        finite: Adapters with a loss somewhere, and none anywhere that is not finite.
        left_out: Adapters with a loss somewhere that is not finite.
        weights: What this process multiplies its loss of each adapter by, so that the mean of all
            processes' gradients is that of one process with the whole batch.
    """

    finite: tuple[str, ...]
    left_out: tuple[str, ...]
    weights: dict[str, float]


class Together:
    """Processes that share batches; or one on its own, which agrees with itself at no cost.

    Args:
        group: A process group, ``"auto"`` for all processes where torch.distributed runs, or None.
        names: The adapters, in one order for all processes.
        device: Where tensors are to lie to be sent.
    """

    def __init__(self, group: Any, names: Sequence[str], device: torch.device) -> None:
        if group == "auto":
            group = dist.group.WORLD if several_processes() else None
        self._group = group
        self._names = list(names)
        self._device = device
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    @property
    def alone(self) -> bool:
        """Whether nobody else takes part."""
        return self.size == 1

    def total(self, *counts: Mapping[str, float]) -> list[dict[str, float]]:
        """Returns the sums over all processes of numbers by adapter; missing ones are zeros."""
        rows = [[float(table.get(name, 0)) for name in self._names] for table in counts]
        if not self.alone:
            dtype = torch.float32 if self._device.type == "mps" else torch.float64
            sent = torch.tensor(rows, dtype=dtype, device=self._device)
            dist.all_reduce(sent, group=self._group)
            rows = sent.tolist()
        return [dict(zip(self._names, row, strict=True)) for row in rows]

    def losses(self, losses: AdapterLosses) -> Agreed:
        """Returns which losses count, the same in every process."""
        seen, bad, tokens = self.total(
            dict.fromkeys(losses.values, 1), dict.fromkeys(losses.non_finite, 1), losses.tokens
        )
        finite = tuple(name for name in self._names if seen[name] and not bad[name])
        left_out = tuple(name for name in self._names if bad[name])
        weights = dict.fromkeys(losses.values, float(self.size))
        if losses.own_divisors:
            # From means over own tokens to shares of the mean over everybody's.
            weights = {n: self.size * losses.tokens[n] / tokens[n] for n in losses.values}
        return Agreed(finite, left_out, weights)

    def names(self, names: Collection[str]) -> set[str]:
        """Returns the names that any process has."""
        (found,) = self.total(dict.fromkeys(names, 1))
        return {name for name, count in found.items() if count}

    def average_(self, parameters: Iterable[torch.Tensor]) -> None:
        """Replaces gradients by their means, which leaves those that are means already.

        Those of DTensors are always shared: FSDP2 keeps what is not elsewhere.
        """
        for parameter in parameters:
            if self.alone or is_sharded(parameter) or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self._group)
            parameter.grad /= self.size
