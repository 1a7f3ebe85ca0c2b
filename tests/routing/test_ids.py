"""What callers give as a batch's adapters, and what a device says about it later."""

from __future__ import annotations

import re

import pytest
import torch

from fastlora.routing.ids import (
    DeferredIdChecks,
    check_adapter_name,
    check_slots_and_copy_to_cpu,
    each_id_covers_whole_entries,
    ids_divide_rows,
    names_and_slots,
)
from fastlora.validation import AdapterNotFoundError, ConfigError


@pytest.mark.parametrize("name", ["keys", "type", "training", "_modules", "_forward_hooks"])
def test_attributes_of_a_module_dict_are_no_names(name: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot be '{name}', because nn.ModuleDict"):
        check_adapter_name(name)


def test_each_batch_is_told_once() -> None:
    unchecked = DeferredIdChecks()
    for invalid, message in ((False, "first"), (True, "second"), (False, "third"), (True, "last")):
        unchecked.add(torch.tensor([invalid]), message)
    for message in ("second", "last"):
        with pytest.raises(AdapterNotFoundError, match=message):
            unchecked.raise_pending_errors()
    unchecked.raise_pending_errors()


def test_names_are_slots_in_the_order_of_the_model() -> None:
    ids = ["c", None, "a", "__base__", "c"]
    for known, names, slots in (
        (["c", "b", "a"], ("c", "a"), [0, -1, 1, -1, 0]),
        (None, ("a", "c"), [1, -1, 0, -1, 1]),
    ):
        found, tensor = names_and_slots(known, ids)
        assert found == names and tensor.tolist() == slots and tensor.dtype == torch.int64
    with pytest.raises(
        AdapterNotFoundError, match=r"no adapter named 'c'; the loaded adapters are \['a'\]"
    ):
        names_and_slots(["a"], ids)


def test_slots_that_are_empty_raise() -> None:
    slots = ["a", None, "b"]
    ids = torch.tensor([2, -1, 0], dtype=torch.int32)
    assert check_slots_and_copy_to_cpu(ids, slots).tolist() == [2, -1, 0]
    for wrong in (1, 3, -2):
        with pytest.raises(AdapterNotFoundError, match=rf"slot {wrong};.* {{0: 'a', 2: 'b'}}"):
            check_slots_and_copy_to_cpu(torch.tensor([0, wrong]), slots)


def test_messages_have_twenty_names() -> None:
    """A model may have any number of adapters."""
    names = [f"n{index:02}" for index in range(25)]
    slots = re.escape(str(dict(enumerate(names[:20])))) + "$"
    with pytest.raises(AdapterNotFoundError, match=slots):
        check_slots_and_copy_to_cpu(torch.tensor([25]), names)
    with pytest.raises(AdapterNotFoundError, match=re.escape(f"adapters are {names[:20]}") + "$"):
        names_and_slots(names, ["other"])


@pytest.mark.parametrize(
    ("shape", "ids", "aligned"),
    [
        ((2, 5), 2, True),
        ((5, 2), 2, False),
        ((1, 4), 2, True),
        ((2, 2), 4, True),
        ((2, 3), 4, False),
        ((6,), 6, True),
        ((3,), 6, False),
        ((4, 3), 12, True),
        ((), 1, True),
    ],
)
def test_the_rows_of_an_id_end_with_an_entry(
    shape: tuple[int, ...], ids: int, aligned: bool
) -> None:
    assert each_id_covers_whole_entries(shape, ids) is aligned


def test_rows_fit_ids() -> None:
    assert (
        ids_divide_rows(6, 2)
        and ids_divide_rows(6, 6)
        and ids_divide_rows(0, 2)
        and ids_divide_rows(0, 0)
    )
    assert not ids_divide_rows(6, 4) and not ids_divide_rows(6, 0) and not ids_divide_rows(2, 6)
