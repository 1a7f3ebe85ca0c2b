"""Bytes of a mixed batch, counted with 1 and 4 adapters.

A forward's equal the closed forms; a backward's are near the design's floor.
"""

from __future__ import annotations

import csv

import pytest

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from tests.support.bytes.byte_counter import ByteCounter, KernelCount
from tests.support.bytes.count_mixed_bytes import (
    ADAPTERS,
    H100,
    QUARTER,
    STEPS,
    TABLE,
    E,
    F,
    backward_by_stem,
    closed_form,
    count_backward,
    count_forward,
    floor,
    forms_of_forward,
    rows_of_table,
)

LAUNCHES = {
    "_mixed_lora_grad_b_kernel": 1,
    "_mixed_lora_grad_reduce_kernel": 2,
    "_mixed_lora_linear_kernel": 1,
    "_mixed_lora_grad_a_kernel": 1,
}
CASES = [(*sizes, adapters) for sizes in STEPS for adapters in ADAPTERS]


@pytest.fixture(scope="module")
def counted() -> dict[tuple[int, ...], ByteCounter]:
    """What each kernel of a backward did, by the sizes and the number of adapters."""
    return {case: count_backward(*case) for case in CASES}


@pytest.fixture(scope="module")
def forwards() -> dict[tuple[int, ...], dict[str, KernelCount]]:
    """What each kernel of a forward did."""
    return {case: count_forward(*case) for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_forward_issues_what_its_tiles_say(
    forwards: dict[tuple[int, ...], dict[str, KernelCount]], case: tuple[int, ...]
) -> None:
    """Every tensor's bytes and the FLOPs, exactly, of each kernel that a forward may take."""
    counted, forms = forwards[case], forms_of_forward(*case)
    assert counted.keys() == forms.keys()
    for name, form in forms.items():
        count = counted[name]
        loads = dict(count.loads)
        routing = loads.pop("routing")
        assert (loads, count.stores) == (form.loads, form.stores), name
        assert (count.launches, count.flops) == (1, form.flops), name
        # Beside them tables and routing: a number for each row, piece or adapter.
        assert routing.distinct <= 0.01 * form.distinct, name
        assert routing.issued <= 0.05 * form.issued, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_backward_moves_at_most_a_tenth_above_the_floor(
    counted: dict[tuple[int, ...], ByteCounter], case: tuple[int, ...]
) -> None:
    (m, k, n, r, adapters), counter = case, counted[case]
    kernels = counter.kernels
    assert {name: kernel.launches for name, kernel in kernels.items()} == LAUNCHES
    least = floor(m, k, n, r, adapters)
    touched, issued = closed_form(m, k, n, r, adapters, QUARTER)
    # Beside them tables and routing: a number for each row, piece or adapter.
    assert touched <= counter.total.distinct <= 1.01 * touched
    assert issued <= counter.total.issued <= 1.03 * issued
    assert counter.total.distinct <= 1.1 * least
    # One read of dy, one of x, and of each factor where it is used.
    first, dx = kernels["_mixed_lora_grad_b_kernel"], kernels["_mixed_lora_linear_kernel"]
    last = kernels["_mixed_lora_grad_a_kernel"]
    assert first.loads["dy"] == (E * m * n, E * m * n)
    assert last.loads["x"] == (E * m * k, E * m * k)
    assert first.loads["lora_b"].distinct == F * adapters * r * n
    assert dx.loads["lora_a"].distinct == F * adapters * r * k
    assert dx.loads["dy"].distinct == E * m * n
    assert dx.loads["weight"].distinct == E * n * k
    # Gradients are written once, ds too.
    reduce = kernels["_mixed_lora_grad_reduce_kernel"]
    assert reduce.stores["d_lora_b"] == (F * adapters * r * n,) * 2
    assert reduce.stores["d_lora_a"] == (F * adapters * r * k,) * 2
    assert reduce.stores["ds"] == (E * m * r, E * m * r)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_so_does_one_of_full_size_on_an_h100(case: tuple[int, ...]) -> None:
    """By the closed form, which the counts of the smaller steps confirm."""
    m, k, n, r, adapters = (4 * case[0], 4 * case[1], 4 * case[2], *case[3:])
    touched, _ = closed_form(m, k, n, r, adapters, H100)
    assert touched <= 1.1 * floor(m, k, n, r, adapters, H100)


def test_the_table_holds_what_is_counted(
    counted: dict[tuple[int, ...], ByteCounter],
    forwards: dict[tuple[int, ...], dict[str, KernelCount]],
) -> None:
    """`docs/mixed_kernel_bytes.csv` is what ``count_mixed_bytes.py --write`` writes."""
    with TABLE.open() as file:
        written = list(csv.DictReader(file))
    assert written == [
        row
        for case in CASES
        for row in rows_of_table(
            case[:4], case[4], {**forwards[case], **backward_by_stem(counted[case])}
        )
    ]
