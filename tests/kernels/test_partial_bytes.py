"""The fp32 partial sums of one launch take at most 256 MB, whatever the shapes of a layer are."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fastlora.kernels import (
    chips,
    config_tables,
    configs,
    lora_expand,
    lora_grad_b,
    lora_linear,
    lora_shrink,
    mixed_lora_grad_reduce,
    plane_sums,
)
from fastlora.kernels.chips import Chip
from fastlora.kernels.config_tables import MAX_PARTIAL_BYTES, KernelConfig
from fastlora.ops.factors import AddressTables
from fastlora.ops.triton import backward, linear, shrink
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_grad_problem import GradProblem, mix
from tests.support.kernels.mixed_problem import OPS
from tests.support.kernels.one_adapter import Problem

BF16, FP32 = torch.bfloat16, torch.float32
CHIP_LIST = (Chip("sm_90", 132), Chip("sm_80", 108), Chip("gfx942", 304))
MANY = Chip("interpreter", 64)
LAUNCHERS = (
    (lora_shrink, "launch_lora_shrink"),
    (lora_shrink, "launch_mixed_lora_shrink"),
    (lora_linear, "launch_lora_linear"),
    (lora_expand, "launch_lora_expand"),
    (lora_expand, "launch_summed_lora_expand"),
    (lora_grad_b, "launch_lora_grad_b"),
    (lora_grad_b, "launch_mixed_lora_grad_b"),
    (mixed_lora_grad_reduce, "launch_mixed_lora_grad_reduce"),
    (plane_sums, "launch_plane_sums"),
)


class Written:
    """The bytes of partial sums that each launch writes, by the name of the launcher."""

    def __init__(self) -> None:
        self.bytes: list[tuple[str, int]] = []

    def launch_lora_shrink(self, out: torch.Tensor, *_: Any, **__: Any) -> None:
        self._add("s", out if out.dim() == 3 else None)

    def launch_mixed_lora_shrink(self, s: torch.Tensor, *_: Any, **__: Any) -> None:
        self._add("mixed s", s if s.shape[0] > 1 else None)

    def launch_lora_linear(self, modules: Any, *_: Any, **__: Any) -> None:
        self._add("y", *(module.y if module.y.dim() == 3 else None for module in modules))

    def launch_lora_grad_b(
        self, ds: Any, d_b: torch.Tensor, d_bias: Any, *_: Any, **__: Any
    ) -> None:
        sums = [t for t in (ds, d_b) if t is not None and t.dim() == 3]
        self._add("b", *sums, d_bias if d_bias is not None and d_bias.dim() == 2 else None)

    def launch_mixed_lora_grad_b(self, ds: Any, d_b: Any, d_bias: Any, *_: Any, **__: Any) -> None:
        self._add("mixed b", ds, d_b, d_bias)

    def launch_plane_sums(self, outs: Any, partials: Any, **_: Any) -> None:
        self._add("sums", *partials)

    def launch_lora_expand(self, *_: Any, **__: Any) -> None: ...

    def launch_summed_lora_expand(self, *_: Any, **__: Any) -> None: ...

    def launch_mixed_lora_grad_reduce(self, *_: Any, **__: Any) -> None: ...

    def _add(self, name: str, *partials: torch.Tensor | None) -> None:
        sums = [t for t in partials if t is not None]
        assert all(t.dtype == FP32 for t in sums)
        self.bytes.append((name, sum(t.numel() * 4 for t in sums)))


@contextlib.contextmanager
def writing(chip: Chip) -> Iterator[Written]:
    """The host code runs on tensors without memory, and launches write down what they write."""
    written = Written()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(chips, "chip_of", lambda device: chip))
        for module, name in LAUNCHERS:
            stack.enter_context(mock.patch.object(module, name, getattr(written, name)))
        yield written


def meta(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def size(draw: random.Random, largest: int) -> int:
    """Small and large sizes are equally likely."""
    return min(int(2 ** draw.uniform(0, largest.bit_length())), largest)


def run_one_adapter(draw: random.Random, m: int, n: int, k: int, r: int) -> None:
    """A forward of one linear or of siblings, and a backward with or without a bias."""
    count = draw.choice((1, 1, 3))
    x, scaling = meta(m, k), meta(1, dtype=FP32)
    weights, lora_a, lora_b = (
        [meta(*shape) for _ in range(count)] for shape in ((n, k), (r, k), (n, r))
    )
    nones = [None] * count
    plan = draw.choice(("auto", "fused", "split"))
    linear._linear_in_grouped_launches(
        *(x, weights, nones, None, lora_a, lora_b, [scaling] * count),
        plan=plan,
        with_s=draw.random() < 0.5,
    )
    shrink.shrink_one_adapter(x, lora_a, None, 0.0)
    dys, s = [meta(m, n) for _ in range(count)], meta(m, r)
    backward.grad_b(dys[0], s, [], 0, [lora_b[0]], [draw.random() < 0.5], scaling, True)
    operands = [*weights, *nones, *lora_a, *lora_b, *[scaling] * count, *nones]
    wants = (True, *(draw.random() < 0.5 for _ in range(4 * count)))
    backward.grouped_gradients(None, (0.0,) * count, wants, *dys, *operands, *[s] * count)


def run_mixed(draw: random.Random, m: int, n: int, k: int, r: int) -> None:
    """The shrink of decode and of training for siblings, and the gradient of lora_b."""
    slots, modules = draw.choice((1, 4, 64)), draw.choice((1, 3))
    ints, longs = (meta(modules, slots, dtype=kind) for kind in (torch.int32, torch.int64))
    rows = [meta(1, dtype=torch.int32) for _ in range(5)]
    tables = AddressTables(longs, longs, None, ints, meta(modules, slots, dtype=FP32), r, BF16)
    shrink.mixed_shrink_partials(meta(m, k), rows, tables, slice(0, modules))
    shrink.mixed_shrink(meta(m, k), rows, [meta(r, k)] * slots * modules, modules, None)
    chip, padded = chips.chip_of(torch.device("meta")), -(-r // 16) * 16
    config = configs.choose(chip, "mixed_lora_grad_b", BF16)
    run = configs.run_rows(chip, m, configs.cdiv(n, config.block_n), config.block_m)
    given = meta(m, n), meta(m, padded), rows, run, [meta(n, r)] * slots
    biased = [draw.random() < 0.5] * slots
    backward.grad_b(*given, biased, meta(slots, dtype=FP32), draw.random() < 0.8)


def test_partial_sums_of_random_shapes() -> None:
    """2,000 shapes on three chips; some are at the limit, which shows that it is in force."""
    draw, most = random.Random(0), dict[str, int]()
    for number in range(2000):
        m, n, k, r = (size(draw, largest) for largest in (131_072, 128_256, 128_256, 512))
        if number % 10 == 0:
            m, n = 131_072, 128_256
        with writing(draw.choice(CHIP_LIST)) as written:
            (run_mixed if number % 2 else run_one_adapter)(draw, m, n, k, r)
        for name, size_of in written.bytes:
            assert size_of <= MAX_PARTIAL_BYTES, (name, m, n, k, r, size_of)
            most[name] = max(most.get(name, 0), size_of)
    assert all(most[name] > MAX_PARTIAL_BYTES // 2 for name in ("b", "mixed b", "mixed s", "sums"))
    assert most["s"] > 0 and most["y"] > 0


@pytest.fixture
def limit_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the limit, on a chip with enough processors to split small sums."""
    monkeypatch.setattr(chips, "chip_of", lambda device: MANY)

    def limited(limit: int) -> None:
        for module in (configs, backward, config_tables):
            monkeypatch.setattr(module, "MAX_PARTIAL_BYTES", limit)
        configs.choose.cache_clear()

    yield limited
    configs.choose.cache_clear()


@pytest.mark.parametrize("factors", [True, False])
def test_a_mixed_gradient_in_several_launches(
    lab: Lab, dtype: torch.dtype, limit_of: Callable[[int], None], factors: bool
) -> None:
    """Launches for ds add to the partial sums of those before; launches for the factors follow."""
    limit_of(20_000)
    problem = GradProblem(lab, mix(40), 300, 40, dtype)
    with mock.patch.object(
        lora_grad_b, "launch_mixed_lora_grad_b", wraps=lora_grad_b.launch_mixed_lora_grad_b
    ) as launched:
        found = {}
        _, s = OPS.lora_linear(*problem.forward_arguments("fused"))
        ds, packed, _ = OPS.lora_grad_b(*problem.grad_b_arguments(s, factors=factors))
    kinds = [(call.args[0] is None, call.kwargs["adds_ds"]) for call in launched.call_args_list]
    assert kinds[:2] == [(False, False), (False, True)]
    assert (kinds[-1] == (True, False)) == factors
    for call in launched.call_args_list:
        sums = [t for t in call.args[:3] if t is not None]
        assert len(sums) == 1 or call.args[0] is None
    if factors:
        problem.take_b(found, packed)
    found["dx"] = OPS.lora_grad_x(*problem.grad_x_arguments(ds, "fused"))
    problem.check(found)


@pytest.mark.parametrize(
    ("launch", "limit"), [("shrink", 80_000), ("grad_b", 25_000), ("grad_a", 80_000)]
)
def test_one_adapter_with_fewer_partial_sums(
    lab: Lab, dtype: torch.dtype, limit_of: Callable[[int], None], launch: str, limit: int
) -> None:
    """Two parts instead of four or eight, and ds from another read of dy."""
    problem = Problem(lab, 520, 150, 600, 16, dtype)
    sizes = {"m": 520, "n": 150, "k": 600, "r": 16}

    def config() -> KernelConfig:
        return configs.choose(MANY, f"lora_{launch}", dtype, **sizes)

    before = config()
    if launch == "grad_b":
        assert not configs.reads_twice(before, 520, 150, 16, dtype.itemsize)
    limit_of(limit)
    assert before.splits > config().splits == 2
    found = getattr(problem, launch)(config())
    problem.check(found)
    if launch == "grad_b":
        assert configs.reads_twice(config(), 520, 150, 16, dtype.itemsize)
        given = problem.dy, problem.s, [], 0, [problem.lora_b], [False], problem.scaling
        ds, d_lora_b, _ = OPS.lora_grad_b(*given, True, "triton")
        problem.check({"ds": ds, "d_lora_b": d_lora_b})
