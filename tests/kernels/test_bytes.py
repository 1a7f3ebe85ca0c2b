"""Bytes and FLOPs of every kernel, counted: equal to the closed forms, and near the floor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402

from fastlora.kernels import chips, configs  # noqa: E402
from fastlora.kernels.chips import Chip  # noqa: E402
from fastlora.kernels.configs import KernelConfig, cdiv  # noqa: E402
from fastlora.kernels.lora_dropout import launch_lora_dropout  # noqa: E402
from fastlora.kernels.lora_expand import launch_lora_expand  # noqa: E402
from fastlora.kernels.lora_linear import launch_lora_linear  # noqa: E402
from fastlora.kernels.lora_shrink import (  # noqa: E402
    launch_lora_shrink,
    launch_lora_shrink_reduce,
)
from tests.support.bytes.byte_counter import ELSEWHERE, ByteCounter, KernelCount  # noqa: E402

Bytes = dict[str, tuple[int, int]]
SCALING = 4  # bytes of one fp32


def check(count: KernelCount, loads: Bytes, stores: Bytes, flops: int = 0) -> None:
    """Each tensor's (distinct, issued) bytes are exactly these, and no other memory is touched."""
    assert count.loads == loads
    assert count.stores == stores
    assert count.flops == flops


# M, N, K, R: decode and a few tiles of rows, on the tile and off it in every dimension.
SHAPES = [(1, 64, 64, 16), (33, 70, 100, 24), (64, 128, 160, 8), (130, 40, 72, 3)]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_lora_shrink(
    lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int, splits: int
) -> None:
    x, lora_a = lab.rand(m, k, dtype=dtype), lab.rand(r, k, dtype=dtype)
    out = lab.rand(m, r, dtype=dtype) if splits == 1 else lab.rand(splits, m, r)
    config = KernelConfig(block_m=32, block_k=32, block_r=16, num_warps=4, splits=splits)
    with ByteCounter(x=[x], lora_a=[lora_a], out=[out]) as counter:
        launch_lora_shrink(out, x, lora_a, seed=None, dropout_p=0.0, config=config)
    count = counter.kernels["_lora_shrink_kernel"]
    e, tiles_m, tiles_r = x.element_size(), cdiv(m, 32), cdiv(r, 16)
    written = e * m * r if splits == 1 else 4 * splits * m * r
    check(
        count,
        loads={
            "x": (e * m * k, e * m * k * tiles_r),
            "lora_a": (e * r * k, e * r * k * tiles_m),
        },
        stores={"out": (written, written)},
        flops=2 * tiles_m * 32 * tiles_r * 16 * cdiv(k, 32) * 32,
    )
    assert count.distinct == e * (m * k + r * k) + written
    assert count.grids == [(tiles_m * tiles_r, splits, 1)]


def test_lora_shrink_with_dropout_reads_its_seed_besides(lab: Any) -> None:
    m, k, r = 33, 100, 24
    x, lora_a, out = lab.rand(m, k), lab.rand(r, k), lab.rand(m, r)
    seed = torch.tensor([7])
    config = KernelConfig(block_m=32, block_k=32, block_r=16, num_warps=4)
    with ByteCounter(x=[x], lora_a=[lora_a], out=[out], seed=[seed]) as counter:
        launch_lora_shrink(out, x, lora_a, seed=seed, dropout_p=0.5, config=config)
    assert counter.total.loads["seed"] == (8, 8 * 4)  # 2 tiles of rows, 2 of rank rows
    assert counter.total.distinct == 4 * (m * k + r * k + m * r) + 8


def test_lora_shrink_reduce(lab: Any, dtype: torch.dtype) -> None:
    splits, m, r = 4, 33, 24
    planes, s = lab.rand(splits, m, r), lab.rand(m, r, dtype=dtype)
    config = KernelConfig(block_m=32, block_k=32, block_r=16, num_warps=4, splits=splits)
    with ByteCounter(planes=[planes], s=[s]) as counter:
        launch_lora_shrink_reduce(s, planes, config=config)
    read, written = 4 * splits * m * r, s.element_size() * m * r
    check(counter.total, loads={"planes": (read, read)}, stores={"s": (written, written)})


@pytest.mark.parametrize("planes", [1, 4])
@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_lora_linear(
    lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int, planes: int
) -> None:
    """Planes come with a bias and with s written besides; one plane with neither."""
    x, weight = lab.rand(m, k, dtype=dtype), lab.rand(n, k, dtype=dtype)
    lora_b, y = lab.rand(n, r, dtype=dtype), lab.rand(m, n, dtype=dtype)
    s = lab.rand(m, r, dtype=dtype) if planes == 1 else lab.rand(planes, m, r)
    bias = lab.rand(n, dtype=dtype) if planes > 1 else None
    s_out = lab.rand(m, r, dtype=dtype) if planes > 1 else None
    scaling = torch.ones(1)
    config = KernelConfig(block_m=32, block_n=64, block_k=32, block_r=16, num_warps=4)
    counter = ByteCounter(x=[x], weight=[weight], s=[s], lora_b=[lora_b], scaling=[scaling], y=[y])
    if bias is not None and s_out is not None:
        counter.register("bias", bias)
        counter.register("s_out", s_out)
    with counter:
        launch_lora_linear(
            y,
            x,
            weight,
            s,
            lora_b,
            scaling,
            bias=bias,
            s_out=s_out,
            config=config,
            pdl=False,
        )
    count = counter.kernels["_lora_linear_kernel"]
    e, tiles_m, tiles_n = x.element_size(), cdiv(m, 32), cdiv(n, 64)
    shrunk = e * m * r if planes == 1 else 4 * planes * m * r
    loads = {
        "x": (e * m * k, e * m * k * tiles_n),
        "weight": (e * n * k, e * n * k * tiles_m),
        "s": (shrunk, shrunk * tiles_n),
        "lora_b": (e * n * r, e * n * r * tiles_m),
        "scaling": (SCALING, SCALING * r * tiles_m * tiles_n),
    }
    stores = {"y": (e * m * n, e * m * n)}
    distinct = e * (m * k + n * k + m * n) + e * n * r + shrunk + SCALING
    if planes > 1:
        loads["bias"] = (e * n, e * n * tiles_m)
        stores["s_out"] = (e * m * r, e * m * r)
        distinct += e * n + e * m * r
    tile = 2 * tiles_m * 32 * tiles_n * 64
    check(count, loads, stores, flops=tile * (cdiv(k, 32) * 32 + cdiv(r, 16) * 16))
    assert count.distinct == distinct
    assert count.grids == [(tiles_m * tiles_n, 1, 1)]


@pytest.mark.parametrize(("m", "n", "k", "r"), SHAPES)
def test_lora_expand(lab: Any, dtype: torch.dtype, m: int, n: int, k: int, r: int) -> None:
    y, s = lab.rand(m, n, dtype=dtype), lab.rand(m, r, dtype=dtype)
    lora_b = lab.rand(n, r, dtype=dtype)
    scaling = torch.ones(r)
    config = KernelConfig(block_m=32, block_n=64, block_r=16, num_warps=4)
    with ByteCounter(y=[y], s=[s], lora_b=[lora_b], scaling=[scaling]) as counter:
        launch_lora_expand(y, s, lora_b, scaling, config=config)
    count = counter.kernels["_lora_expand_kernel"]
    e, tiles_m, tiles_n = y.element_size(), cdiv(m, 32), cdiv(n, 64)
    check(
        count,
        loads={
            "y": (e * m * n, e * m * n),
            "s": (e * m * r, e * m * r * tiles_n),
            "lora_b": (e * n * r, e * n * r * tiles_m),
            "scaling": (SCALING * r, SCALING * r * tiles_m * tiles_n),
        },
        stores={"y": (e * m * n, e * m * n)},
        flops=2 * tiles_m * 32 * tiles_n * 64 * cdiv(r, 16) * 16,
    )
    assert count.distinct == e * (2 * m * n + m * r + n * r) + SCALING * r


def test_lora_dropout(lab: Any, dtype: torch.dtype) -> None:
    m, k = 19, 300
    x, out, seed = lab.rand(m, k, dtype=dtype), lab.rand(m, k, dtype=dtype), torch.tensor([7])
    config = KernelConfig(block_m=8, block_k=256, num_warps=4)
    with ByteCounter(x=[x], out=[out], seed=[seed]) as counter:
        launch_lora_dropout(out, x, seed=seed, dropout_p=0.5, config=config)
    size = x.element_size() * m * k
    check(
        counter.total,
        loads={"x": (size, size), "seed": (8, 8 * 3 * 2)},
        stores={"out": (size, size)},
    )


@pytest.mark.parametrize("layout", ["rows", "both"])
def test_gaps_between_strided_elements_are_not_touched(lab: Any, layout: str) -> None:
    y, s, lora_b = (lab.strided(lab.rand(*shape), layout) for shape in ((19, 45), (19, 6), (45, 6)))
    scaling = torch.ones(1)
    config = KernelConfig(block_m=16, block_n=32, block_r=16, num_warps=4)
    with ByteCounter(y=[y], s=[s], lora_b=[lora_b], scaling=[scaling]) as counter:
        launch_lora_expand(y, s, lora_b, scaling, config=config)
    assert counter.total.distinct == 4 * (2 * 19 * 45 + 19 * 6 + 45 * 6) + SCALING


@pytest.mark.parametrize("r", [8, 64])
@pytest.mark.parametrize(("m", "width"), [(16, 576), (64, 576), (16, 1536), (64, 1536)])
def test_fused_linear_moves_at_most_a_tenth_above_the_floor(
    lab: Any, monkeypatch: pytest.MonkeyPatch, m: int, width: int, r: int
) -> None:
    """Decode as an H100 would run it: one read of x is all that lies between count and floor."""
    chip = Chip("sm_90", 132)
    monkeypatch.setattr(chips, "chip_of", lambda device: chip)
    # Programmatic dependent launch: the interpreter has no order of launches to relax.
    for name in ("gdc_wait", "gdc_launch_dependents"):
        monkeypatch.setattr(tl.extra.cuda, name, lambda: None)
    half = torch.float16
    x, weight = lab.rand(m, width, dtype=half), lab.rand(width, width, dtype=half)
    lora_a, lora_b = lab.rand(r, width, dtype=half), lab.rand(width, r, dtype=half)
    scaling = torch.tensor(0.5)
    with ByteCounter(
        x=[x], weight=[weight], lora_a=[lora_a], lora_b=[lora_b], scaling=[scaling]
    ) as counter:
        y, s = torch.ops.fastlora.lora_linear(
            *(x, weight, None, [], None, [lora_a, lora_b, None], scaling, None, [0.0]),
            *("triton", "auto"),
        )
    counter.register("y", y)
    counter.register("s", s)
    splits = configs.choose(chip, "lora_shrink", half, m=m, k=width, r=r).splits
    assert splits > 1
    planes = 4 * splits * m * r
    floor = 2 * (width * width + 2 * r * width) + 2 * m * 2 * width
    additions = 2 * m * r + 2 * planes + SCALING  # s, and the planes written and read
    count = counter.total
    assert count.stores[ELSEWHERE].distinct == count.loads[ELSEWHERE].distinct == planes
    assert count.distinct == floor + additions + 2 * m * width
    assert count.distinct <= 1.1 * (floor + additions)
    assert {name: kernel.launches for name, kernel in counter.kernels.items()} == {
        "_lora_shrink_kernel": 1,
        "_lora_linear_kernel": 1,
    }


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


COPY: dict[str, Bytes] = {"loads": {"x": (80, 80)}, "stores": {"out": (80, 80)}}


def test_an_over_read_fails_the_check() -> None:
    check(copied(), **COPY)
    over = copied(extra=3)
    with pytest.raises(AssertionError):
        check(over, **COPY)
    assert over.loads == {"x": (80, 80), ELSEWHERE: (12, 12)}
    assert over.distinct == copied().distinct + 12


def test_a_repeated_read_is_issued_again_but_touches_nothing_new() -> None:
    again = copied(repeats=3)
    assert again.loads == {"x": (80, 240)}
    assert again.distinct == copied().distinct
    with pytest.raises(AssertionError):
        check(again, **COPY)


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
    check(count, loads={"x": (128, 128)}, stores={"out": (128, 128)})


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
    check(counter.total, loads={**both, "x": (20, 20)}, stores=both)


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
    check(counter.total, loads={"x": (20, 24)}, stores={"out": (4, 4)})


def test_register_refuses_what_it_cannot_attribute() -> None:
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
