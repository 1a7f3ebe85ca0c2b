"""A mixed batch with gradients as kernels read it: rows by slot, and dropout seeds of all layers.

Everything lies on the device and is made without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastlora.ops.row_groups import RowGroups, build_row_groups
from fastlora.routing.routing import _SEED_BITS

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def _signed(value: int) -> int:
    """Returns a 64-bit number as int64 holds it."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def layer_seeds(seeds: Sequence[int], projections: Sequence[int]) -> torch.Tensor:
    """Returns `fastlora.routing.layer_seed` of each layer and adapter, int64 ``[L, S]`` on the CPU.

    Args:
        seeds: S, of the adapters.
        projections: L, numbers of the layers.
    """
    steps = torch.tensor([_signed((p + 1) * _INCREMENT) for p in projections], dtype=torch.int64)
    own = torch.tensor([_signed(seed) for seed in seeds], dtype=torch.int64)
    return _mixed_bits(own[None, :] + steps[:, None])  # wraps, as 64-bit words do


def seeds_of_layer(seeds: torch.Tensor, projection: int) -> torch.Tensor:
    """Returns `layer_seeds` of one layer, int64 ``[S]``, for seeds that are a tensor ``[S]``."""
    return _mixed_bits(seeds + _signed((projection + 1) * _INCREMENT))


def _mixed_bits(z: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(multiplier)
    return _shifted(z ^ _shifted(z, 31), 64 - _SEED_BITS)


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Returns z moved to the right by ``bits``, with zeros coming in from the left."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@dataclass(frozen=True, eq=False)
class TrainingRouting:
    """A routing as the kernels of training read it.

    Attributes:
        ids: Slot of each sample or token, ``[B]``; -1 for none, -2 for an id out of range.
        seeds: Dropout seed of each slot, for this forward.
        projections: Numbers of the model's layers.
    """

    ids: torch.Tensor
    seeds: tuple[int, ...]
    projections: tuple[int, ...]
    _groups: dict[tuple[int, torch.device, int], RowGroups] = field(
        default_factory=dict, repr=False
    )
    _seeds: dict[tuple[torch.device, int], dict[int, torch.Tensor]] = field(
        default_factory=dict, repr=False
    )

    def groups(self, m: int, device: torch.device) -> RowGroups:
        """Returns the rows of a layer input sorted by slot, made once for each ``m`` and stream.

        Raises:
            ValueError: ``m`` is no multiple of the number of ids.
        """
        key = (m, device, _stream(device))
        known = self._groups.get(key)
        if known is None:
            known = self._groups[key] = build_row_groups(self.ids, m, len(self.seeds), device)
        return known

    def seeds_of(self, projection: int, device: torch.device) -> torch.Tensor:
        """Returns the dropout seeds of one layer, int64 ``[S]``; one copy brings all layers'."""
        key = (device, _stream(device))
        known = self._seeds.get(key)
        if known is None:
            made = layer_seeds(self.seeds, self.projections)
            if device.type == "cuda":
                made = made.pin_memory().to(device, non_blocking=True)
            known = dict(zip(self.projections, made.unbind(), strict=True))
            self._seeds[key] = known
        return known[projection]

    def found_invalid(self) -> bool:
        """Whether an id was out of range; waits for the GPU."""
        return any(bool(groups.invalid.item()) for groups in self._groups.values())
