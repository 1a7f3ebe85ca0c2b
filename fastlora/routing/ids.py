"""Validation of a batch's adapter ids, which callers pass as names or as slots."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastlora.validation import AdapterNotFoundError, ConfigError, near_names

# PEFT's name for rows without an adapter. None has the same meaning.
BASE = "__base__"
NO_ADAPTER = -1
# Replaces an unchecked slot that does not exist.
OUT_OF_RANGE = -2
# Layers store their adapters in such modules, by name.
_MODULE_DICT = nn.ModuleDict()


def check_adapter_name(name: object) -> None:
    """Raise `ConfigError` unless ``name`` is a valid adapter name."""
    if not isinstance(name, str) or not name or "." in name:
        raise ConfigError(f"adapter_name must be a non-empty string without dots, got {name!r}")
    if name == BASE:
        raise ConfigError(
            f"adapter_name cannot be {name!r}, which selects the base model without an adapter"
        )
    if hasattr(_MODULE_DICT, name):
        raise ConfigError(
            f"adapter_name cannot be {name!r}, because nn.ModuleDict has an attribute of that "
            "name; choose another name"
        )


def names_and_slots(
    loaded_names: Sequence[str] | None, ids: Sequence[str | None]
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Return the distinct adapter names in the ids, and the slot of each id.

    The result is a tuple (names, slots). The order of the names does not depend on the batch.

    Args:
        loaded_names: Names of the model's adapters, which determine the order. None for
            alphabetical order, if other code checks the names.
        ids: For each sample or token of the batch, the name of its adapter, or None or
            ``"__base__"`` for no adapter.

    Raises:
        AdapterNotFoundError: A name does not exist.
        TypeError: ``ids`` is a string or not a sequence, or an item is not a name or None.
    """
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        what = f"the string {ids!r}" if isinstance(ids, str) else f"a {type(ids).__name__}"
        raise TypeError(
            f"ids must be a sequence with an adapter name or None for each sample, got {what}"
        )
    odd = next((name for name in ids if not (name is None or isinstance(name, str))), None)
    if odd is not None:
        raise TypeError(
            f"ids contains {odd!r}; expected a sequence in which each item is an adapter name or "
            "None, or a tensor of slots"
        )
    wanted = [None if name == BASE else name for name in ids]
    present = {name for name in wanted if name is not None}
    if loaded_names is None:
        names = tuple(sorted(present))
    else:
        place = {name: index for index, name in enumerate(loaded_names)}
        for name in wanted:
            if name is not None and name not in place:
                raise AdapterNotFoundError(
                    f"there is no adapter named {name!r}; the loaded adapters are "
                    f"{list(loaded_names)[:20]}{near_names(str(name), loaded_names)}"
                )
        names = tuple(sorted(present, key=place.__getitem__))
    slot_of = {name: slot for slot, name in enumerate(names)}
    slots = [NO_ADAPTER if name is None else slot_of[name] for name in wanted]
    return names, torch.tensor(slots, dtype=torch.int64, device="cpu")


def check_slots_and_copy_to_cpu(ids: torch.Tensor, slots: Sequence[str | None]) -> torch.Tensor:
    """Check that integer ids are valid slots, and copy them to the CPU.

    An id is valid if it is within the range of ``slots`` and its slot is occupied. The id -1, which
    stands for no adapter, is valid too. The result is int64, and always a copy, because callers may
    overwrite their ids while a block is open or before its backward pass.

    Args:
        ids: Integers ``[B]``; -1 for none.
        slots: Adapter of each slot, or None for an empty slot.

    Raises:
        AdapterNotFoundError: A slot does not exist or is empty.
        ValueError, TypeError: ``ids`` does not have exactly one dimension, or does not have an
            integer dtype.
    """
    check_one_dimensional_integer_ids(ids)
    numbers = ids.to(device="cpu", dtype=torch.int64, copy=True)
    for slot in torch.unique(numbers).tolist():
        known = NO_ADAPTER <= slot < len(slots)
        if not known or (slot != NO_ADAPTER and slots[slot] is None):
            occupied = [(n, name) for n, name in enumerate(slots) if name is not None]
            raise AdapterNotFoundError(
                f"no adapter in slot {slot}; expected -1 for no adapter, or one of the slots "
                f"{dict(occupied[:20])}"
            )
    return numbers


def check_one_dimensional_integer_ids(ids: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless the ids are a 1-dimensional integer tensor."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise TypeError(f"ids must have an integer dtype, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"ids must have one dimension, got shape {tuple(ids.shape)}")


def ids_divide_rows(rows: int, ids: int) -> bool:
    """Return whether the rows can be divided evenly among the ids.

    This is the case if ``rows`` is a multiple of ``ids``. If ``ids`` is 0, ``rows`` must be 0 too.
    """
    return not rows % ids if ids else not rows


def each_id_covers_whole_entries(leading_shape: Sequence[int], num_ids: int) -> bool:
    """Return whether the rows of each id form whole slices along one of the leading dimensions.

    ``leading_shape`` contains the sizes of a tensor's leading dimensions. Each of the ``num_ids``
    ids has an equal share of consecutive flattened rows. Slices along the first dimension are
    usually samples. For example, the result is False for 2 ids and the shape ``[5, 2]``: the first
    5 of the 10 rows would cover 2.5 slices along the first dimension.
    """
    for size in leading_shape:
        if size % num_ids == 0:
            return True
        if num_ids % size:
            return False
        num_ids //= size
    return num_ids == 1


class _PendingIdCheck(NamedTuple):
    """A pending check of a batch's adapter ids.

    The result of the check has not been read yet. The result is read later, so that the host does
    not wait for the device. ``flag`` is true if an id is out of range, and ``message`` is the error
    message for this case. ``arrived`` is the CUDA event recorded after the flag's copy to the host,
    or None if the flag was on the CPU.
    """

    flag: torch.Tensor
    arrived: torch.cuda.Event | None
    message: str


class DeferredIdChecks:
    """Deferred checks of adapter ids.

    Checks are deferred to avoid synchronizing with the device. Their results are read later,
    usually without blocking the host.
    """

    # With more pending batches than this, wait for the oldest. If the device is this far behind,
    # waiting costs no time.
    _MOST = 64

    def __init__(self) -> None:
        self._pending: list[_PendingIdCheck] = []
        self._lock = threading.Lock()

    def add(self, out_of_range_flag: torch.Tensor, message: str) -> None:
        """Add an out-of-range flag and its error message to the pending checks of adapter ids.

        ``out_of_range_flag`` is a bool tensor ``[1]``, which is set if an adapter id of a batch is
        out of range. If the flag is set, a later call of `raise_pending_errors` raises an error
        with the given message. If the flag is on the GPU, this method starts to copy it to the
        host.
        """
        arrived = None
        if out_of_range_flag.is_cuda:
            host = torch.empty(
                out_of_range_flag.shape, dtype=torch.bool, device="cpu", pin_memory=True
            )
            arrived, stream = (
                torch.cuda.Event(),
                torch.cuda.current_stream(out_of_range_flag.device),
            )
            out_of_range_flag = host.copy_(out_of_range_flag, non_blocking=True)
            arrived.record(stream)
        with self._lock:
            self._pending.append(_PendingIdCheck(out_of_range_flag, arrived, message))

    def raise_pending_errors(self) -> None:
        """Raise an error if a pending check has found an adapter id that is out of range.

        The pending checks are those of earlier batches. The method reads their flags. Flags that
        have not arrived on the host yet are usually left to a later call. While a CUDA graph is
        being captured, events cannot be queried. A call during a capture therefore does nothing,
        and a later call reads the flags.

        Raises:
            AdapterNotFoundError: An id is out of range.
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
