"""The slot of each row of vLLM's current batch.

vLLM describes a batch by the adapter ID of each token and of each sampled row. The slots are
computed from these IDs on the host, once per batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastlora.ops.rows import NO_SLOT


def slots_of_rows(adapter_ids: Sequence[int], adapter_of_slot: Sequence[int | None]) -> np.ndarray:
    """Return the slot of each row's adapter.

    The result is an int64 array of shape ``[rows]``, with -1 for rows without an adapter.

    Args:
        adapter_ids: Adapter ID of each row. Zero stands for no adapter.
        adapter_of_slot: Adapter ID in each slot, or None for an empty slot.

    Raises:
        ValueError: A row's adapter is not in any slot.
    """
    ids = np.fromiter(adapter_ids, dtype=np.int64, count=len(adapter_ids))
    found = np.full(ids.shape, NO_SLOT, dtype=np.int64)
    for slot, adapter in enumerate(adapter_of_slot):
        if adapter is not None:
            found[ids == adapter] = slot
    missing = (ids > 0) & (found == NO_SLOT)
    if missing.any():
        raise ValueError(f"adapter {ids[missing][0]} is not in any slot: {list(adapter_of_slot)}")
    return found
