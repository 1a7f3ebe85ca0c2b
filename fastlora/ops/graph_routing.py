"""A batch's routing as compiled graphs read it: tensors, and what does not depend on the mix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fastlora.ops.row_groups import NO_SLOT


class GraphRouting(NamedTuple):
    """A routing as compiled graphs read it: another mix is other contents of the same tensors.

    Attributes:
        names: All adapters of the model.
        ids: Index among them of each sample's or token's adapter, ``[B]`` int64; -1 for none.
        seeds: Dropout seed of each for this forward, int64 on the CPU.
    """

    names: tuple[str, ...]
    ids: torch.Tensor
    seeds: torch.Tensor


class PoolGraphRouting(NamedTuple):
    """The same over a pool: another mix, a load or a hot swap are other contents of tensors.

    Attributes:
        columns: Column in the tables of each sample or token, ``[B]``; -1 for none.
        tables: The pool's.
        max_rank: No adapter has a larger one.
        dtype: Of the factors.
    """

    columns: torch.Tensor
    tables: Any
    max_rank: int
    dtype: torch.dtype


def graph_routing(
    known: tuple[str, ...], names: tuple[str, ...], ids: torch.Tensor, seeds: tuple[int, ...]
) -> GraphRouting:
    """Returns a routing over ``names`` as one over all adapters that a model has.

    Args:
        known: Those.
        names: Adapter of each slot.
        ids: Slots ``[B]``; negative ones are none.
        seeds: Of each slot.
    """
    place = {name: index for index, name in enumerate(known)}
    places = [place[name] for name in names]
    all_seeds = torch.zeros(len(known), dtype=torch.int64)
    if any(seeds):
        all_seeds[places] = torch.tensor(seeds)
    if names == known or not names:
        # A copy: whether it is a tensor that the routing has elsewhere too would be guarded.
        return GraphRouting(known, ids.clone(), all_seeds)
    table = torch.tensor([*places, NO_SLOT], device=ids.device)
    return GraphRouting(known, table[ids.clamp(min=NO_SLOT)], all_seeds)
