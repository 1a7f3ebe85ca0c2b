"""Bytes and FLOPs of every kernel, counted: equal to the closed forms, and near the floor."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from fastlora.kernels.chips import chip_of
from fastlora.kernels.configs import KernelConfig, cdiv, choose
from fastlora.kernels.lora_dropout import launch_lora_dropout
from fastlora.kernels.lora_expand import launch_lora_expand
from fastlora.kernels.lora_grad_a import launch_lora_grad_a
from fastlora.kernels.lora_grad_b import launch_lora_grad_b
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.lora_shrink import launch_lora_shrink, launch_lora_shrink_reduce
from fastlora.kernels.plane_sums import launch_plane_sums
from tests.support.bytes import byte_forms
from tests.support.bytes.byte_counter import ELSEWHERE, ByteCounter, KernelCount
from tests.support.bytes.byte_forms import SCALING, Batch, Form, Sizes, check
from tests.support.bytes.count_bytes import (
    FULL_STEPS,
    H100,
    OPS,
    STEPS,
    TABLE,
    Forms,
    Step,
    count,
    count_forward,
    floor,
    forms,
    forms_of_forward,
    is_bounded,
    on,
    rows_of_table,
)
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import MixedProblem

# ---------------------------------------------------------------- small tiles, off and on them


class Counted(NamedTuple):
    """A launch with its tensors by name, what it must count, and its grid where that is known."""

    launch: Callable[[], None]
    tensors: dict[str, Any]
    form: Form
    grid: tuple[int, ...] | None = None


CONFIG = KernelConfig(block_m=32, block_n=64, block_k=32, block_r=16, num_warps=4)
HALF = torch.float16


class Operands:
    """Of some sizes, fp16 with fp32 factors; "more" is with all that a launch can have."""

    def __init__(self, lab: Lab, sizes: Sizes, more: bool, rank_rows_first: bool) -> None:
        self.lab, self.sizes, self.more = lab, sizes, more
        m, n, k, r, *_ = sizes
        self.first = {"rank_rows_first": rank_rows_first}
        self.dtype = HALF if sizes.e == 2 else torch.float32
        self.x, self.y, self.dx = self.rand(m, k), self.rand(m, n), self.rand(m, k)
        self.dy, self.s, self.ds = self.rand(m, n), self.rand(m, r), self.rand(m, r)
        self.weight, self.bias = self.rand(n, k), self.rand(n)
        self.lora_a = self.rand(r, k, dtype=torch.float32)
        self.lora_b = self.rand(n, r, dtype=torch.float32)
        self.scaling = torch.ones(r if more else 1)
        self.seed = torch.tensor([7])

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """In the dtype of activations."""
        return self.lab.rand(*shape, dtype=dtype or self.dtype)

    def named(self, *names: str, **more: Any) -> dict[str, Any]:
        """Some of the operands, and others."""
        return {name: getattr(self, name) for name in names} | more

    def written(self, *shape: int, parts: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output, or its planes."""
        return self.rand(*shape, dtype=dtype) if parts == 1 else self.lab.rand(parts, *shape)

    def lora_shrink(self) -> Counted:
        """Into planes."""
        m, _, _, r, *_ = self.sizes
        config = replace(CONFIG, splits=4 if self.more else 1)
        s = self.written(m, r, parts=config.splits)
        return Counted(
            lambda: launch_lora_shrink(
                s, self.x, self.lora_a, seed=None, dropout_p=0.0, config=config
            ),
            self.named("x", "lora_a", s=s),
            byte_forms.shrink(self.sizes, config),
            (cdiv(m, 32) * cdiv(r, 16), config.splits, 1),
        )

    def lora_shrink_reduce(self) -> Counted:
        """Sums four planes."""
        planes = self.lab.rand(4, *self.s.shape)
        return Counted(
            lambda: launch_lora_shrink_reduce(self.s, planes, config=CONFIG),
            self.named("s", planes=planes),
            byte_forms.shrink_reduce(self.sizes, 4),
        )

    def lora_linear(self) -> Counted:
        """From planes, with a bias and with s written besides."""
        m, n, _, r, *_ = self.sizes
        planes = 4 if self.more else 1
        s, scaling = self.written(m, r, parts=planes), torch.ones(1)
        bias, s_out = (self.bias, self.s) if self.more else (None, None)
        return Counted(
            lambda: launch_lora_linear(
                self.y, self.x, self.weight, s, self.lora_b, scaling,
                bias=bias, s_out=s_out, config=CONFIG, pdl=False,
            ),
            self.named(
                "x", "weight", "lora_b", "y", *["bias"] * self.more,
                s=[s, *[self.s] * self.more], scaling=scaling,
            ),
            byte_forms.linear(self.sizes, CONFIG, planes, self.more),
            (cdiv(m, 32) * cdiv(n, 64), 1, 1),
        )  # fmt: skip

    def lora_expand(self) -> Counted:
        """With a scaling of each rank row."""
        return Counted(
            lambda: launch_lora_expand(self.y, self.s, self.lora_b, self.scaling, config=CONFIG),
            self.named("y", "s", "lora_b", "scaling"),
            byte_forms.expand(self.sizes, CONFIG, self.scaling.numel()),
        )

    def lora_dropout(self) -> Counted:
        """One read and one write."""
        return Counted(
            lambda: launch_lora_dropout(
                self.dx, self.x, seed=self.seed, dropout_p=0.5, config=CONFIG
            ),
            self.named("x", "seed", out=self.dx),
            byte_forms.dropout(self.sizes, CONFIG),
        )

    def lora_grad_b(self) -> Counted:
        """In splits, with the sums of columns and a scaling of each rank row."""
        m, n, _, r, *_ = self.sizes
        config = replace(CONFIG, block_m=16, block_n=32, splits=3 if self.more else 1, **self.first)
        ds = self.written(m, r, parts=cdiv(n, config.block_n))
        d_lora_b = self.written(n, r, parts=config.splits, dtype=torch.float32)
        d_bias = {"d_bias": self.lab.rand(3, n)} if self.more else {}
        return Counted(
            lambda: launch_lora_grad_b(
                ds, d_lora_b, d_bias.get("d_bias"), self.dy, self.s, self.lora_b, self.scaling,
                config=config,
            ),
            self.named("dy", "s", "lora_b", "scaling", ds=ds, d_lora_b=d_lora_b, **d_bias),
            byte_forms.grad_b(self.sizes, config, self.scaling.numel(), self.more),
        )  # fmt: skip

    def lora_grad_a(self) -> Counted:
        """In splits, of three siblings with their dropouts."""
        m, _, k, r, *_ = self.sizes
        ranks = [r, 1, r] if self.more else [r]
        config = replace(CONFIG, block_m=16, siblings=len(ranks), **self.first)
        config = replace(config, splits=3 if self.more else 1)
        ds = [self.rand(m, rank) for rank in ranks]
        outs = [self.written(rank, k, parts=config.splits, dtype=torch.float32) for rank in ranks]
        seeds = torch.arange(3) if self.more else None
        tensors = self.named("x", **({} if seeds is None else {"seeds": seeds}))
        for i, pair in enumerate(zip(ds, outs, strict=True)):
            tensors |= dict(zip((f"ds_{i}", f"d_lora_a_{i}"), pair, strict=True))
        return Counted(
            lambda: launch_lora_grad_a(
                outs, self.x, ds, seeds=seeds, dropout_p=[0.1] * len(ranks), config=config
            ),
            tensors,
            byte_forms.grad_a(self.sizes, config, ranks, self.more),
        )

    def lora_grad_x(self) -> Counted:
        """With dropout."""
        p = 0.5 if self.more else 0.0
        return Counted(
            lambda: launch_lora_linear(
                self.dx, self.dy, self.weight.t(), self.ds, self.lora_a.t(), None,
                bias=None, s_out=None, config=CONFIG, pdl=False, seed=self.seed, dropout_p=p,
            ),
            self.named("dy", "weight", "ds", "lora_a", "dx", "seed"),
            byte_forms.grad_x(self.sizes, CONFIG, self.more),
        )  # fmt: skip


STEMS = [name for name in vars(Operands) if name.startswith("lora_")]


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 64, 64, 16), (33, 70, 100, 24), (64, 128, 160, 8), (130, 40, 72, 3)]
)
def test_a_launch(lab: Lab, stem: str, m: int, n: int, k: int, r: int, more: bool) -> None:
    """Decode and a few tiles of rows, on the tile and off it in every dimension."""
    for e, f, rank_rows_first in ((2, 4, False), (4, 4, True)):
        counted = getattr(Operands(lab, Sizes(m, n, k, r, e, f), more, rank_rows_first), stem)()
        counter = ByteCounter()
        for name, tensors in counted.tensors.items():
            counter.register(name, *(tensors if isinstance(tensors, list) else [tensors]))
        with counter:
            counted.launch()
        check(counter.total, counted.form)
        assert counter.total.launches == 1
        assert counted.grid in (None, counter.total.grids[0])


def test_lora_shrink_with_dropout_reads_its_seed_besides(lab: Lab) -> None:
    m, k, r = 33, 100, 24
    x, lora_a, out = lab.rand(m, k), lab.rand(r, k), lab.rand(m, r)
    seed = torch.tensor([7])
    with ByteCounter(x=[x], lora_a=[lora_a], out=[out], seed=[seed]) as counter:
        launch_lora_shrink(out, x, lora_a, seed=seed, dropout_p=0.5, config=CONFIG)
    assert counter.total.loads["seed"] == (8, 8 * 4)  # 2 tiles of rows, 2 of rank rows
    assert counter.total.distinct == 4 * (m * k + r * k + m * r) + 8


def test_plane_sums(lab: Lab) -> None:
    planes = [lab.rand(3, 40, 7), lab.rand(1, 2000), lab.rand(5, 9)]
    outs = [lab.rand(40, 7, dtype=HALF), lab.rand(2000), lab.rand(9)]
    with ByteCounter(planes=planes, outs=outs) as counter:
        launch_plane_sums(outs, planes, config=choose(H100, "plane_sums", torch.float32))
    check(counter.total, byte_forms.plane_sums([(280, 3, 2), (2000, 1, 4), (9, 5, 4)]))


@pytest.mark.parametrize("layout", ["rows", "both"])
def test_gaps_between_strided_elements_are_not_touched(lab: Lab, layout: str) -> None:
    y, s, lora_b = (lab.strided(lab.rand(*shape), layout) for shape in ((19, 45), (19, 6), (45, 6)))
    scaling = torch.ones(1)
    with ByteCounter(y=[y], s=[s], lora_b=[lora_b], scaling=[scaling]) as counter:
        launch_lora_expand(y, s, lora_b, scaling, config=CONFIG)
    assert counter.total.distinct == 4 * (2 * 19 * 45 + 19 * 6 + 45 * 6) + SCALING


# ------------------------------------------------------------------------------ whole steps


@functools.cache
def counted_in(step: Step) -> dict[str, KernelCount]:
    """What each kernel of a step did."""
    return count(step)


def check_mixed(counted: dict[str, KernelCount], expected: Forms) -> None:
    """As `check`; tables and routing, a number for each row, piece or adapter, take little."""
    assert counted.keys() == expected.keys()
    for name, form in expected.items():
        found = counted[name]
        small = ("tables", "routing", ELSEWHERE)  # what operators allocate lies elsewhere
        loads, wanted = (
            {key: value for key, value in side.items() if key not in small}
            for side in (found.loads, form.loads)
        )
        assert (loads, found.stores) == (wanted, form.stores), name
        assert found.flops == form.flops or "grad" in name, name
    alone = [[name] for name in expected if "grad" not in name]
    for names in (*alone, [name for name in expected if "grad" in name]):
        for bytes_of, most in (("distinct", 1.01), ("issued", 1.05 if len(names) == 1 else 1.03)):
            least = sum(getattr(expected[name], bytes_of) for name in names)
            found_here = sum(getattr(counted[name], bytes_of) for name in names)
            assert least <= found_here <= most * least, (names, bytes_of)


@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_step(step: Step) -> None:
    """Every tensor's bytes as the tiles say; at most a tenth above the floor in all."""
    counted, expected = counted_in(step), forms(step)
    assert all(found.launches == 1 for found in counted.values())
    if step.adapters:
        check_mixed(counted, expected)
    else:
        assert {name: (c.distinct, c.issued, c.flops) for name, c in counted.items()} == {
            name: (form.distinct, form.issued, form.flops) for name, form in expected.items()
        }
    moved = sum(found.distinct for name, found in counted.items() if is_bounded(name, step))
    assert moved <= 1.1 * floor(step), (moved, floor(step))


@pytest.mark.parametrize("step", FULL_STEPS, ids=str)
def test_a_step_of_full_size_on_an_h100(step: Step) -> None:
    """By the closed forms, which the counts of the smaller steps confirm."""
    bounded = (form for name, form in forms(step, H100).items() if is_bounded(name, step))
    moved = sum(form.distinct for form in bounded)
    assert moved <= 1.1 * floor(step, H100), (moved, floor(step, H100))


def test_the_table_holds_what_is_counted() -> None:
    """`docs/kernel_bytes.csv` is what `tests.support.bytes.count_bytes` writes."""
    with TABLE.open() as file:
        written = list(csv.DictReader(file))
    assert written == [row for step in STEPS for row in rows_of_table(step, counted_in(step))]


@pytest.mark.parametrize("r", [8, 64])
@pytest.mark.parametrize(("m", "width"), [(16, 576), (64, 576), (16, 1536), (64, 1536)])
def test_fused_linear_moves_at_most_a_tenth_above_the_floor(
    lab: Lab, m: int, width: int, r: int
) -> None:
    """Decode as an H100 would run it: one read of x is all that lies between count and floor."""
    x, weight = lab.rand(m, width, dtype=HALF), lab.rand(width, width, dtype=HALF)
    lora_a, lora_b = lab.rand(r, width, dtype=HALF), lab.rand(width, r, dtype=HALF)
    scaling = torch.tensor(0.5)
    counter = ByteCounter(
        x=[x], weight=[weight], lora_a=[lora_a], lora_b=[lora_b], scaling=[scaling]
    )
    with on(H100), counter:
        y, s = OPS.lora_linear(
            *(x, weight, None, [], None, [lora_a, lora_b, None], scaling, None, [0.0]),
            *("triton", "auto"),
        )
    counter.register("y", y)
    counter.register("s", s)
    splits = choose(H100, "lora_shrink", HALF, m=m, k=width, r=r).splits
    assert splits > 1
    planes = 4 * splits * m * r
    floor = 2 * (width * width + 2 * r * width) + 2 * m * 2 * width
    additions = 2 * m * r + 2 * planes + SCALING  # s, and the planes written and read
    found = counter.total
    assert found.stores[ELSEWHERE].distinct == found.loads[ELSEWHERE].distinct == planes
    assert found.distinct == floor + additions + 2 * m * width
    assert found.distinct <= 1.1 * (floor + additions)
    assert {name: kernel.launches for name, kernel in counter.kernels.items()} == {
        "_lora_shrink_kernel": 1,
        "_lora_linear_kernel": 1,
    }


# ---------------------------------------------------------------------------- mixed batches

RANKS = [(8, 16, 64)[slot % 3] for slot in range(64)]
# Of each adapter that has rows: addresses of A, B, the bias and DoRA's scale, rank and scaling.
TABLE_BYTES = 4 * 8 + 4 + 4


@pytest.mark.parametrize("m", [72, 200])
def test_adapters_add_their_own_bytes_and_flops(lab: Lab, dtype: torch.dtype, m: int) -> None:
    """No adapter, 1, 3 and 64 of ranks 8, 16 and 64; base rows in each batch; sizes off the tiles.

    Every count in closed form. So FLOPs, and issued bytes of x, W and y, of the base GEMM are the
    same at 1 and at 64 adapters, and without any.
    """
    chip, size, counted = chip_of(lab.device), dtype.itemsize, {}
    for active in (0, 3, 64) if m == 72 else (0, 1, 64):
        ids = [row % (active + 1) - 1 for row in range(m)]
        problem = MixedProblem(lab, ids, [RANKS], 72, [88], dtype)
        counted[active] = found = count_forward(problem, chip)
        expected = forms_of_forward(Batch(ids, RANKS, 88, 72, size, size), chip, dtype)
        for name, form in expected.items():
            loads = {key: traffic for key, traffic in found[name].loads.items() if traffic.issued}
            small = [loads.pop(key, (0, 0)) for key in ("tables", "routing")]
            wanted = {key: traffic for key, traffic in form.loads.items() if traffic[1]}
            assert (loads, found[name].flops) == (wanted, form.flops), (active, name)
            stores = {key: traffic for key, traffic in form.stores.items() if traffic[1]}
            assert found[name].stores == stores, (active, name)
            # Only what says where factors are: tables by adapter, routing by segment and row.
            tables, routing = (traffic[0] for traffic in small)
            assert tables <= TABLE_BYTES * active, (active, name)
            assert routing <= 8 * (2 * active + 6) + 12 * m, (active, name)
    grids = [{name: found.grids for name, found in one.items()} for one in counted.values()]
    assert all(len(shown) == 4 and shown == grids[0] for shown in grids)
