"""Bytes and FLOPs of every kernel, counted: equal to the closed forms, and near the floor."""

from __future__ import annotations

import csv
import functools
from dataclasses import replace

import pytest
import torch

from fastlora.env import triton_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not triton_interpreted():
    pytest.skip("bytes are counted with TRITON_INTERPRET=1", allow_module_level=True)

from fastlora.bench import byte_forms, launch_forms
from fastlora.bench.byte_forms import ELSEWHERE, SCALING, Batch, Form, Sizes
from fastlora.kernels.chips import chip_of
from fastlora.kernels.config_tables import KernelConfig, cdiv
from fastlora.kernels.configs import choose
from fastlora.kernels.lora_expand import launch_lora_expand, launch_summed_lora_expand
from fastlora.kernels.lora_linear import launch_lora_linear
from fastlora.kernels.lora_shrink import launch_lora_shrink
from fastlora.kernels.modules import Module
from fastlora.kernels.plane_sums import launch_plane_sums
from tests.support.bytes.byte_counter import ByteCounter, KernelCount, check
from tests.support.bytes.count_bytes import (
    FULL_STEPS,
    GROUPS,
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
    forms_of_prefill,
    is_bounded,
    on,
    rows_of_prefills,
    rows_of_table,
)
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import MixedProblem
from tests.support.kernels.one_adapter import Problem

# ---------------------------------------------------------------- small tiles, off and on them


CONFIG = KernelConfig(block_m=32, block_n=64, block_k=32, block_r=16, num_warps=4)
HALF = torch.float16
# Of each of a problem's launches: the kernel, and what it reads.
LAUNCHES = {
    "shrink": ("lora_shrink", ("x", "lora_a")),
    "linear": ("lora_linear", ("x", "weight", "s", "lora_b", "scaling", "bias")),
    "expand": ("lora_expand", ("s", "lora_b", "scaling")),
    "dropout": ("lora_dropout", ("x",)),
    "grad_b": ("lora_grad_b", ("dy", "s", "lora_b", "scaling")),
    "grad_a": ("lora_grad_a", ("x",)),
    "grad_x": ("lora_linear", ("dy", "weight", "ds", "lora_a")),
}


def expected(problem: Problem, launch: str, more: bool, config: KernelConfig) -> Form:
    """What a launch must count; "more" is with all that it can have."""
    widths = problem.x.itemsize, problem.lora_a.itemsize
    sizes = Sizes(problem.m, problem.n, problem.k, problem.r, *widths)
    if launch == "linear":
        return byte_forms.linear(sizes, config, 4 if more else 1, more)
    if launch == "expand":
        return byte_forms.expand(sizes, config, problem.scaling.numel())
    if launch == "grad_b":
        return byte_forms.grad_b(sizes, config, problem.scaling.numel(), True)
    if launch == "grad_a":
        return byte_forms.grad_a(sizes, config, [ds.shape[1] for ds in problem.all_ds], more)
    if launch == "grad_x":
        return byte_forms.grad_x(sizes, config, more)
    return {"shrink": byte_forms.shrink, "dropout": byte_forms.dropout}[launch](sizes, config)


def test_partial_sums_of_a_linear_and_of_what_an_expand_reads(lab: Lab) -> None:
    """Siblings on one grid, whose linear splits K, and whose expand makes y from planes of s."""
    m, k, r, ns = 33, 128, 16, (70, 64)
    x, s, scaling = lab.rand(m, k, dtype=HALF), lab.rand(4, m, 2 * r), torch.ones(1)
    weights = [lab.rand(n, k, dtype=HALF) for n in ns]
    lora_b = [lab.rand(n, r) for n in ns]
    ys = [torch.empty(m, n, dtype=HALF) for n in ns]
    planes = [torch.empty(2, m, n) for n in ns]
    config = replace(CONFIG, splits=2)
    with on(H100), ByteCounter() as linear:
        own = zip(planes, lora_b, weights, strict=True)
        modules = [Module(y, b, scaling, None, weight) for y, b, weight in own]
        launch_lora_linear(modules, x, s, s_out=None, config=config, pdl=False)
    with on(H100), ByteCounter() as expand:
        modules = [Module(y, b, scaling) for y, b in zip(ys, lora_b, strict=True)]
        launch_lora_expand(modules, s, s_out=None, reads_y=False, config=CONFIG)
    sizes = [Sizes(m, n, k, r) for n in ns]
    forms = [byte_forms.linear(each, config, 4) for each in sizes]
    for form in forms:
        form.stores.pop("s")
    found = launch_forms.together(forms)
    # They share a scaling here.
    assert linear.total.issued == found.issued
    assert linear.total.distinct == found.distinct - SCALING
    assert linear.total.flops == found.flops
    found = launch_forms.together([byte_forms.expand(each, CONFIG, 1, 4, False) for each in sizes])
    assert expand.total.issued == found.issued
    assert expand.total.distinct == found.distinct - SCALING


@pytest.mark.parametrize("more", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 64, 64, 16), (33, 70, 100, 24), (64, 128, 160, 8), (130, 40, 72, 3)]
)
def test_a_launch(
    lab: Lab, dtype: torch.dtype, launch: str, m: int, n: int, k: int, r: int, more: bool
) -> None:
    """Decode and a few tiles of rows, on the tile and off it in every dimension.

    More are splits and planes, a bias and s written besides, a scaling of each rank row, siblings,
    and dropout where a launch of the backward has it.
    """
    drops = launch == "dropout" or more and launch in ("grad_a", "grad_x")
    problem = Problem(lab, m, n, k, r, dtype, 0.5 * drops, (1, r) if more else ())
    problem.lora_a, problem.lora_b = problem.lora_a.float(), problem.lora_b.float()
    problem.scaling = torch.ones(r if more and launch != "linear" else 1)
    config = replace(CONFIG, group_size=len(problem.all_ds), rank_rows_first=dtype == HALF)
    if more and launch in ("shrink", "grad_b", "grad_a"):
        config = replace(config, splits=3)
    kernel, names = LAUNCHES[launch]
    counter, s_out = ByteCounter(), lab.rand(m, r, dtype=dtype)
    if launch == "linear" and more:
        problem.s = lab.rand(4, m, r)
        counter.register("s", s_out)
    elif launch == "linear":
        problem.bias, names = None, names[:-1]
    counter.register("seed", problem.seed)
    counter.register("seeds", problem.seeds)
    for i, ds in enumerate(problem.all_ds if launch == "grad_a" else ()):
        counter.register(f"ds_{i}", ds)
    for name in names:
        counter.register(name, getattr(problem, name))
    with counter:
        if launch == "linear" and more:
            problem.linear(config, s_out)
        else:
            getattr(problem, launch)(config)
    for name, tensor in problem.written.items():
        counter.register({"dropped": "out", "y_added": "y"}.get(name, name), tensor)
    count = counter.kernels[f"_{kernel}_kernel"]
    check(count, expected(problem, launch, more, config))
    tiles_m, tiles_n, blocks_r = cdiv(m, 32), cdiv(n, 64), cdiv(r, 16)
    grids = {"shrink": (tiles_m * blocks_r, config.splits, 1), "linear": (tiles_m * tiles_n, 1, 1)}
    assert count.grids == [grids.get(launch, count.grids[0])]
    sums = [name for name in counter.kernels if name != f"_{kernel}_kernel"]
    assert sums in ([], ["_plane_sums_kernel"])


def test_lora_shrink_with_dropout_reads_its_seed_besides(lab: Lab) -> None:
    m, k, r = 33, 100, 24
    x, lora_a, out = lab.rand(m, k), lab.rand(r, k), lab.rand(m, r)
    seed = torch.tensor([7])
    with ByteCounter(x=[x], lora_a=[lora_a], out=[out], seed=[seed]) as counter:
        launch_lora_shrink(out, x, [lora_a], seed=seed, dropout_p=0.5, config=CONFIG)
    assert counter.total.loads["seed"] == (8, 8 * 4)  # 2 tiles of rows, 2 of rank rows
    assert counter.total.distinct == 4 * (m * k + r * k + m * r) + 8


def test_plane_sums(lab: Lab) -> None:
    planes = [lab.rand(3, 40, 7), lab.rand(1, 2000), lab.rand(5, 9)]
    outs = [lab.rand(40, 7, dtype=HALF), lab.rand(2000), lab.rand(9)]
    with ByteCounter(partials=planes, outs=outs) as counter:
        launch_plane_sums(outs, planes, config=choose(H100, "plane_sums", torch.float32))
    check(counter.total, byte_forms.plane_sums([(280, 3, 2), (2000, 1, 4), (9, 5, 4)]))


@pytest.mark.parametrize("layout", ["rows", "both"])
def test_gaps_between_strided_elements_are_not_touched(lab: Lab, layout: str) -> None:
    y, s, lora_b = (lab.strided(lab.rand(*shape), layout) for shape in ((19, 45), (19, 6), (45, 6)))
    scaling = torch.ones(1)
    with ByteCounter(y=[y], s=[s], lora_b=[lora_b], scaling=[scaling]) as counter:
        launch_lora_expand([Module(y, lora_b, scaling)], s, reads_y=True, config=CONFIG)
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


@pytest.mark.drawn(1 / 6)
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
        written = [row for row in csv.DictReader(file) if " of nf4" not in row["kernel"]]
    counted = [row for step in STEPS for row in rows_of_table(step, counted_in(step))]
    assert written == [*counted, *rows_of_prefills()]


@pytest.mark.parametrize(("r", "most"), [(16, 1.25), (64, 1.75), (128, 2.95)])
@pytest.mark.parametrize("group", GROUPS)
def test_an_expand_of_prefill_issues_little_more_than_its_floor(
    group: str, r: int, most: float
) -> None:
    """y and lora_b once, and s once in 16 bits; at rank 128, wider tiles spill.

    The scaling is one number, and counts neither here nor there. Ratios have two decimals.
    """
    ns, k = GROUPS[group]
    for m in (128, 512, 2048, 8192):
        form = forms_of_prefill(m, r, 1, ns, k)["lora_expand"]
        issued = form.issued - sum(v[1] for name, v in form.loads.items() if "scaling" in name)
        ratio = round(issued / (2 * (m * sum(ns) + m * r * len(ns) + r * sum(ns))), 2)
        if m > 128:
            assert 1 < ratio <= most, m
        elif r == 16:
            assert 1 < ratio <= 1.35


def test_the_terms_of_one_expand(lab: Lab) -> None:
    """Each s once per tile of N, each lora_b once per tile of M, and one y."""
    m, n, ranks = 70, 130, (16, 8, 24)
    y = torch.empty(m, n, dtype=HALF)
    s = [lab.rand(m, r, dtype=HALF) for r in ranks]
    lora_a = [lab.rand(r, n) for r in ranks]
    counter = ByteCounter(y=[y])
    for i, (own, a) in enumerate(zip(s, lora_a, strict=True)):
        counter.register(f"s_{i}", own)
        counter.register(f"lora_b_{i}", a)
    with counter:
        launch_summed_lora_expand(y, [a.t() for a in lora_a], s, config=CONFIG)
    expected = byte_forms.summed_expand(Sizes(m, n, 0, 0), CONFIG, ranks)
    check(counter.total, expected)


@pytest.mark.drawn(1 / 6)
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


def test_decode_of_many_adapters_reads_each_factor_once(lab: Lab) -> None:
    """64 rows of as many adapters as an H100 runs them, beside a base product of the library's.

    What is asked for twice is s, by every tile of N; all in all a tenth above what cannot be
    avoided at most.
    """
    m = slots = 64
    problem = MixedProblem(lab, [*range(m)], [[16] * slots], 2048, [2048], HALF)
    factors = problem.factors[0]
    counter = ByteCounter(
        x=[problem.x],
        lora_a=[own.lora_a for own in factors],
        lora_b=[own.lora_b for own in factors],
    )
    with on(H100), counter:
        (y,) = OPS.lora_linear_at(*problem.linear_arguments())
    counter.register("y", y)
    problem.check(y)
    assert {name: found.launches for name, found in counter.kernels.items()} == {
        "_mixed_lora_shrink_kernel": 1,
        "_mixed_lora_expand_kernel": 1,
    }
    once = [2 * m * 2048, 2 * slots * 16 * 2048]
    loads, stores = counter.total.loads, counter.total.stores
    for name, least in (("x", once[0]), ("lora_a", once[1]), ("lora_b", once[1]), ("y", once[0])):
        assert loads[name] == (least, least), name
    assert stores["y"] == (once[0], once[0])
    floor = 3 * once[0] + 2 * once[1]
    assert floor < counter.total.issued <= 1.1 * floor
    batch = Batch([*range(m)], [16] * slots, 14336, 4096, 2, 2)
    wide = [forms_of_forward(batch, H100)[f"mixed_lora_{end}"] for end in ("shrink", "expand")]
    floor = 2 * (once[0] + once[1]) + 14336 * (2 * 2 * m + 2 * slots * 16)
    assert floor < sum(form.issued for form in wide) <= 1.1 * floor


RANKS = [(8, 16, 64)[slot % 3] for slot in range(64)]
# Of each adapter that has rows: addresses of A, B, the bias and DoRA's scale, rank and scaling.
TABLE_BYTES = 4 * 8 + 4 + 4


@pytest.mark.drawn(1 / 3)
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
