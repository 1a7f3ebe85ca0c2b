"""What callers give as a batch's adapters: names or slots, checked."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastlora.validation import AdapterNotFoundError, ConfigError, near_names

# PEFT's name for rows without an adapter; None means the same here.
BASE = "__base__"
NO_ADAPTER = -1
OUT_OF_RANGE = -2  # what a slot becomes that nobody has checked and that does not exist


def check_adapter_name(name: object) -> None:
    """Raises `ConfigError` unless an adapter of a model can have this name."""
    if not isinstance(name, str) or not name or "." in name:
        raise ConfigError(f"adapter_name must be a non-empty string without dots, got {name!r}")
    if name == BASE:
        raise ConfigError(
            f"adapter_name cannot be {name!r}, which stands for the base model without an adapter "
            "in a batch"
        )
    if hasattr(nn.ModuleDict, name):
        raise ConfigError(f"adapter_name cannot be {name!r}, a method of nn.ModuleDict")


def named_ids(
    known: Sequence[str] | None, ids: Sequence[str | None]
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Returns the adapters of a batch in one order for any batch, and the slot of each id.

    Args:
        known: Names of the model's adapters, which give the order; None for the alphabet's, where
            others check the names.
        ids: A name, or None or ``"__base__"``, for each sample.

    Raises:
        AdapterNotFoundError: A name that is not there.
        TypeError: ``ids`` is one string.
    """
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        what = f"the string {ids!r}" if isinstance(ids, str) else f"a {type(ids).__name__}"
        raise TypeError(f"ids is {what}, expected a sequence of one name for each sample")
    odd = next((name for name in ids if not (name is None or isinstance(name, str))), None)
    if odd is not None:
        raise TypeError(f"ids holds {odd!r}, expected names, None, or a tensor of slots")
    wanted = [None if name == BASE else name for name in ids]
    present = {name for name in wanted if name is not None}
    if known is None:
        names = tuple(sorted(present))
    else:
        place = {name: index for index, name in enumerate(known)}
        for name in wanted:
            if name is not None and name not in place:
                raise AdapterNotFoundError(
                    f"no adapter {name!r}; loaded are {list(known)[:20]}"
                    f"{near_names(str(name), known)}"
                )
        names = tuple(sorted(present, key=place.__getitem__))
    slot_of = {name: slot for slot, name in enumerate(names)}
    slots = [NO_ADAPTER if name is None else slot_of[name] for name in wanted]
    return names, torch.tensor(slots, dtype=torch.int64)


def checked_slots(ids: torch.Tensor, slots: Sequence[str | None]) -> torch.Tensor:
    """Returns ids that are slots as int64 after a check.

    Args:
        ids: Integers ``[B]``; -1 for none.
        slots: Adapter of each slot, None for an empty one.

    Raises:
        AdapterNotFoundError: A slot that is not there or empty.
        ValueError, TypeError: ``ids`` has other dimensions, or is not of integers.
    """
    check_slot_ids(ids)
    numbers = ids.to(device="cpu", dtype=torch.int64)
    for slot in torch.unique(numbers).tolist():
        known = NO_ADAPTER <= slot < len(slots)
        if not known or (slot != NO_ADAPTER and slots[slot] is None):
            names = [name for name in slots if name is not None]
            raise AdapterNotFoundError(
                f"no adapter in slot {slot}; expected -1 for none or 0 to {len(slots) - 1}, the "
                f"adapters {names[:20]}"
            )
    return numbers


def check_slot_ids(ids: torch.Tensor) -> None:
    """Raises `TypeError` or `ValueError` unless ids are integers ``[B]``."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids has dtype {ids.dtype}, expected integers")
    if ids.dim() != 1:
        raise ValueError(f"ids has shape {tuple(ids.shape)}, expected one dimension")


def fits(rows: int, ids: int) -> bool:
    """Whether so many rows are a whole number for each of so many ids; no ids are for no rows."""
    return not rows % ids if ids else not rows


def is_aligned(shape: Sequence[int], ids: int) -> bool:
    """Whether leading dimensions of a batch, flattened, end an id's rows where an entry ends.

    5 tokens of 2 samples, ``[5, 2]``, do not: the first 5 rows are those of 2.5 tokens.
    """
    for size in shape:
        if size % ids == 0:
            return True
        if ids % size:
            return False
        ids //= size
    return ids == 1


class _Pending(NamedTuple):
    """The flag of one batch; ``arrived`` is behind its way to the host, None where it is there."""

    flag: torch.Tensor
    arrived: torch.cuda.Event | None
    message: str


class Unchecked:
    """Batches of a model whose ids a GPU looked at and the host has not: nothing waits for them."""

    # Behind so many the oldest is waited for: a device that is so far behind costs no step more.
    _MOST = 64

    def __init__(self) -> None:
        self._pending: list[_Pending] = []
        self._lock = threading.Lock()

    def add(self, flag: torch.Tensor, message: str) -> None:
        """Sends a flag, bool ``[1]``, to the host; true is an id out of range."""
        arrived = None
        if flag.is_cuda:
            host = torch.empty(flag.shape, dtype=torch.bool, pin_memory=True)
            arrived, stream = torch.cuda.Event(), torch.cuda.current_stream(flag.device)
            flag = host.copy_(flag, non_blocking=True)
            arrived.record(stream)
        with self._lock:
            self._pending.append(_Pending(flag, arrived, message))

    def check(self) -> None:
        """Raises `AdapterNotFoundError` for a batch whose flag has arrived, once for each batch.

        A stream that is being captured may ask nothing: then a later block does.
        """
        if not self._pending:
            return
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return
        with self._lock:
            while self._pending:
                flag, arrived, message = self._pending[0]
                if arrived is not None and not arrived.query():
                    if len(self._pending) <= self._MOST:
                        return
                    arrived.synchronize()
                del self._pending[0]
                if flag.item():
                    raise AdapterNotFoundError(message)
