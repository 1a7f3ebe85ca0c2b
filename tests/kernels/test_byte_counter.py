"""The counter of bytes itself: what it must count, attribute, refuse and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastlora.bench.byte_forms import ELSEWHERE, Form  # noqa: E402
from tests.support.bytes.byte_counter import ByteCounter, KernelCount, check  # noqa: E402


@triton.jit
def _copy_kernel(out_ptr, x_ptr, N, EXTRA: tl.constexpr, REPEATS: tl.constexpr):
    """Copies N elements; reads EXTRA more than it should, everything REPEATS times."""
    offs = tl.program_id(0) * 16 + tl.arange(0, 16)
    x = tl.zeros((16,), dtype=tl.float32)
    for _ in range(REPEATS):
        x = tl.load(x_ptr + offs, mask=offs < N + EXTRA, other=1.0)
    tl.store(out_ptr + offs, x, mask=offs < N)


def copied(extra: int = 0, repeats: int = 1, n: int = 20) -> KernelCount:
    """Counts a copy of the first ``n`` of 64 elements, of which only those are registered."""
    x, out = torch.rand(64), torch.zeros(64)
    with ByteCounter(x=[x[:n]], out=[out[:n]]) as counter:
        _copy_kernel[(2,)](out, x, n, EXTRA=extra, REPEATS=repeats)
    assert torch.equal(out[:n], x[:n])
    assert not out[n:].any()
    return counter.total


COPY = Form(loads={"x": (80, 80)}, stores={"out": (80, 80)})


def test_an_over_read_fails_the_check() -> None:
    check(copied(), COPY)
    over = copied(extra=3)
    with pytest.raises(AssertionError):
        check(over, COPY)
    assert over.loads == {"x": (80, 80), ELSEWHERE: (12, 12)}
    assert over.distinct == copied().distinct + 12


def test_a_repeated_read_is_issued_again_but_touches_nothing_new() -> None:
    again = copied(repeats=3)
    assert again.loads == {"x": (80, 240)}
    assert again.distinct == copied().distinct
    with pytest.raises(AssertionError):
        check(again, COPY)


def test_launches_add_up_and_only_those_inside_count() -> None:
    x, out = torch.rand(16), torch.zeros(16)
    counter = ByteCounter(x=[x], out=[out])
    _copy_kernel[(1,)](out, x, 16, EXTRA=0, REPEATS=1)
    with counter:
        for _ in range(2):
            _copy_kernel[(1,)](out, x, 16, EXTRA=0, REPEATS=1)
    _copy_kernel[(1,)](out, x, 16, EXTRA=0, REPEATS=1)
    count = counter.kernels["_copy_kernel"]
    assert count.grids == [(1, 1, 1)] * 2
    check(count, Form({"x": (128, 128)}, {"out": (128, 128)}))


def test_the_interpreter_is_put_back() -> None:
    from triton.runtime import interpreter

    def state() -> dict[str, Any]:
        hooks = {k: v for k, v in vars(interpreter.interpreter_builder).items() if callable(v)}
        return {**hooks, "run": interpreter.InterpretedFunction.run}

    before = state()
    x = torch.rand(16)
    outer, inner = ByteCounter(x=[x]), ByteCounter(x=[x])
    with pytest.raises(KeyboardInterrupt), outer, inner:
        assert state() != before
        _copy_kernel[(1,)](torch.zeros(16), x, 16, EXTRA=0, REPEATS=1)
        raise KeyboardInterrupt
    assert state() == before
    assert outer.total == inner.total
    assert inner.total.loads == {"x": (64, 64)}


@triton.jit
def _atomics_kernel(sum_ptr, lock_ptr, x_ptr, N):
    offs = tl.arange(0, 16)
    x = tl.load(x_ptr + offs, mask=offs < N, other=0.0)
    tl.atomic_add(sum_ptr + offs % 2, x, mask=offs < N)
    tl.atomic_cas(lock_ptr, 0, 1)


def test_atomics_load_and_store() -> None:
    total, lock, x = torch.zeros(4), torch.zeros(1, dtype=torch.int32), torch.rand(16)
    with ByteCounter(total=[total], lock=[lock], x=[x]) as counter:
        _atomics_kernel[(1,)](total, lock, x, 5)
    both = {"total": (8, 20), "lock": (4, 4)}
    check(counter.total, Form({**both, "x": (20, 20)}, both))


@triton.jit
def _sum_rows_kernel(out_ptr, slots_ptr, address_ptr, rank_ptr, N: tl.constexpr):
    """Sums the rank rows of a slot, found by a table of absolute addresses."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    rank = tl.load(rank_ptr + slot)
    rows_ptr = tl.load(address_ptr + slot).to(tl.pointer_type(out_ptr.dtype.element_ty))
    offs_r = tl.arange(0, 16)
    offs = offs_r[:, None] * N + tl.arange(0, N)[None, :]
    rows = tl.load(rows_ptr + offs, mask=(offs_r < rank)[:, None], other=0.0)
    tl.store(out_ptr + tl.program_id(0) * N + tl.arange(0, N), tl.sum(rows.to(tl.float32), 0))


def test_tables_of_addresses_lead_to_the_tensors_they_name() -> None:
    """Distinct bytes grow by the bytes of the adapters that appear, each of its own rank."""
    ranks = (1, 3, 8, 16)
    images = [torch.rand(rank, 32).half() for rank in ranks]
    address = torch.tensor([image.data_ptr() for image in images])
    rank = torch.tensor(ranks, dtype=torch.int32)
    for adapters in ([2], [2, 0], [2, 0, 3], [0, 1, 2, 3]):
        slots = torch.tensor([adapters[i % len(adapters)] for i in range(6)])
        out = torch.zeros(6, 32, dtype=torch.float16)
        named = {f"adapter_{i}": [image] for i, image in enumerate(images)}
        counter = ByteCounter(out=[out], routing=[slots, address, rank], **named)
        with counter:
            _sum_rows_kernel[(6,)](out, slots, address, rank, N=32)
        loads = counter.total.loads
        assert loads.pop("routing") == (8 * 6 + 12 * len(adapters), 6 * (8 + 12))
        assert {name: traffic.distinct for name, traffic in loads.items()} == {
            f"adapter_{i}": 2 * 32 * ranks[i] for i in adapters
        }
        assert counter.total.grids == [(6, 1, 1)]


@triton.jit
def _two_widths_kernel(out_ptr, x_ptr, bytes_ptr):
    """Reads 4 floats from x, then 8 bytes from the last of them on."""
    x = tl.load(x_ptr + tl.arange(0, 4))
    y = tl.load(bytes_ptr + 12 + tl.arange(0, 8))
    tl.store(out_ptr, tl.sum(x, 0) + tl.sum(y.to(tl.float32), 0))


def test_bytes_read_in_two_widths_count_once() -> None:
    x, out = torch.ones(16), torch.zeros(1)
    with ByteCounter(x=[x], out=[out]) as counter:
        _two_widths_kernel[(1,)](out, x, x.view(torch.int8))
    check(counter.total, Form({"x": (20, 24)}, {"out": (4, 4)}))


def test_register_raises_for_what_it_cannot_attribute() -> None:
    x = torch.rand(4, 8)
    counter = ByteCounter(x=[x[:2]])
    with pytest.raises(ValueError, match="x and rest share memory"):
        counter.register("rest", x[1:])
    counter.register("rest", x[2:])
    with pytest.raises(ValueError, match="w is on meta, expected a CPU tensor"):
        ByteCounter(w=[torch.rand(1, device="meta")])


def test_outside_the_interpreter_nothing_is_counted_silently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), ByteCounter():
        pass
