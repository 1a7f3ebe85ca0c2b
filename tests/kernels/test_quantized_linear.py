"""Linears over quantized weights, on kernels: the same as over the matrix, within one rounding.

Forward, grouped layers, gradients and mixed batches of every kind; few rows read codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")

from fastlora.kernels import lora_linear, mixed_lora_linear
from fastlora.ops.backend import BACKENDS, BackwardArguments
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.quantized_tensor import QuantizedTensor, dequantize
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_grad_problem import GradProblem
from tests.support.kernels.quantized_linear import at, check_linear, of_tables
from tests.support.kernels.quantized_weights import make_quantized_weight

TRITON = BACKENDS["triton"]
KINDS = ("nf4", "nf4 nested", "fp4", "int8", "e4m3", "e5m2")


@pytest.fixture
def launches(calls_of: Callable[..., None]) -> list[str]:
    """The loader's name, or "plain", of each linear's launch."""
    seen: list[str] = []

    def noted(kernel: Any, grid: Any, **given: Any) -> str:
        loader = given.get("WEIGHT")
        return "plain" if loader is None else loader.__name__

    for module in (lora_linear, mixed_lora_linear):
        calls_of(module, "launch", noted, seen)
    return seen


# Rows, outputs, inputs, rank and dropout: off the tiles, and on them.
ONE, FEW, MANY = (1, 45, 192, 8, 0.0), (17, 80, 64, 3, 0.3), (64, 33, 320, 40, 0.3)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("nf4", ONE), ("nf4", MANY), ("nf4 nested", FEW), ("nf4 nested", MANY), ("fp4", FEW)),
        *(("int8", ONE), ("int8", MANY), ("e4m3", FEW), ("e5m2", MANY)),
    ],
    ids=str,
)
def test_one_adapter(
    lab: Lab, dtype: torch.dtype, launches: list[str], kind: str, shape: tuple[Any, ...]
) -> None:
    m, n, k, r, p = shape
    check_linear(lab, make_quantized_weight(kind, lab.rand(n, k, dtype=dtype)), m, r, p)
    assert len(launches) == 2 and "plain" not in launches


@pytest.mark.parametrize("m", [65, 130])
def test_many_rows_take_the_matrix(lab: Lab, launches: list[str], m: int) -> None:
    check_linear(lab, make_quantized_weight("nf4", lab.rand(48, 128)), m)
    assert set(launches) <= {"plain"}


@pytest.mark.parametrize("block", [128, 256])
def test_blocks_wider_than_a_tile(lab: Lab, launches: list[str], block: int) -> None:
    check_linear(lab, make_quantized_weight("nf4 nested", lab.rand(40, 512), block), 5)
    assert launches == ["load_table4_nested"] * 2


def test_rows_are_the_weight_bit_for_bit(lab: Lab, dtype: torch.dtype) -> None:
    """Rows of the identity, and an adapter of zeros."""
    for kind in KINDS:
        weight = make_quantized_weight(kind, lab.rand(50, 128, dtype=dtype))
        x = torch.eye(128, dtype=dtype, device=lab.device)
        zeros = torch.zeros(4, 128, dtype=dtype), torch.zeros(50, 4, dtype=dtype)
        own = [[t.to(lab.device)] for t in zeros]
        operands = LayerAdapterOperands(*own, [None], torch.tensor(1.0), (0.0,))
        parts = [
            TRITON.forward(rows, Base(weight), operands, None, None, "auto")[0]
            for rows in x.split(64)
        ]
        assert torch.equal(torch.cat(parts), dequantize(weight).t()), kind


def test_programs_share_out_k(lab: Lab, launches: list[str], monkeypatch: Any) -> None:
    """As on a chip that such a small linear does not fill; the planes of y are summed."""
    from fastlora.kernels import chips

    monkeypatch.setattr(chips, "chip_of", lambda device: chips.Chip("gfx942", 304))
    check_linear(lab, make_quantized_weight("nf4", lab.rand(40, 1024, dtype=torch.float16)), 16)
    assert launches == ["load_table4"] * 2


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
def test_grouped_layers(lab: Lab, dtype: torch.dtype, launches: list[str], kind: str) -> None:
    """One launch for all; each has a scale, a table and a size of its own."""
    sizes, k, m, r = (64, 33, 40), 128, 9, (8, 4, 16)
    weights = [
        make_quantized_weight(kind, (i + 1) * lab.rand(n, k, dtype=dtype))
        for i, n in enumerate(sizes)
    ]
    x = lab.rand(m, k, dtype=dtype)
    biases = [lab.rand(n, dtype=dtype) for n in sizes]
    lora_a = [lab.rand(own, k, dtype=dtype) for own in r]
    lora_b = [lab.rand(n, own, dtype=dtype) for n, own in zip(sizes, r, strict=True)]
    scalings = [torch.tensor([0.5 + i], device=lab.device) for i in range(3)]
    operands = [*weights, *biases, *lora_a, *lora_b, *scalings, None, None, None]
    dys = [lab.rand(m, n, dtype=dtype) for n in sizes]
    with torch.no_grad():
        *ys, s = TRITON.grouped_forward(x, operands, (0.0,) * 3, True)
        assert launches == [f"load_{'int8' if kind == 'int8' else weights[0].quantized_data.kind}"]
        wants = (True, *[False] * 6, *[True] * 6)
        dx, *_ = TRITON.grouped_gradients(dys, x, operands, (0.0,) * 3, [s], wants)
    assert len(launches) == 4 and "plain" not in launches

    def by_torch(kept: torch.dtype) -> list[torch.Tensor]:
        made, total = [], torch.zeros(m, k, dtype=kept, device=lab.device)
        for i in range(3):
            w, a, b = (t.to(kept) for t in (dequantize(weights[i]), lora_a[i], lora_b[i]))
            c, dy = scalings[i].to(kept), dys[i].to(kept)
            made.append(x.to(kept) @ w.t() + biases[i].to(kept) + c * (x.to(kept) @ a.t()) @ b.t())
            total = total + (dy @ w + c * (dy @ b) @ a)
        return [*made, total]

    for actual, near, exact in zip(
        [*ys, dx], by_torch(dtype), by_torch(torch.float64), strict=True
    ):
        assert_within_budget(actual, near, exact, "y or dx")


def test_grouped_layers_of_several_kinds_have_a_launch_each(lab: Lab, launches: list[str]) -> None:
    weights = [make_quantized_weight("nf4", lab.rand(32, 64)), lab.rand(32, 64), lab.rand(32, 64)]
    weights[1] = make_quantized_weight("int8", weights[1])
    x, none = lab.rand(3, 64), [None] * 3
    lora_a, lora_b = [lab.rand(4, 64)] * 3, [lab.rand(32, 4)] * 3
    scalings = [torch.ones(1, device=lab.device)] * 3
    with torch.no_grad():
        ys = TRITON.grouped_forward(
            x, [*weights, *none, *lora_a, *lora_b, *scalings, *none], (0.0,) * 3
        )
    assert sorted(launches) == ["load_int8", "load_table4", "plain"]
    for y, weight in zip(ys, weights, strict=True):
        dense = dequantize(weight) if isinstance(weight, QuantizedTensor) else weight
        expected = x @ dense.t() + x @ lora_a[0].t() @ lora_b[0].t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "e4m3"])
@pytest.mark.parametrize("adapters", [3, 9])
def test_mixed_batches(
    lab: Lab, dtype: torch.dtype, launches: list[str], kind: str, adapters: int
) -> None:
    """Few adapters in the linear's epilogue, many by pieces; rows without one, and of rank 0."""
    ids = [(5 * row) % (adapters + 1) - 1 for row in range(21)]
    ranks = [[(8, 3, 0, 16)[slot % 4] for slot in range(adapters)]]
    problem = of_tables(lab, kind, ids, ranks, dtype)
    problem.check(at(problem))
    assert len(launches) == 1 and launches[0] != "plain"


@pytest.mark.parametrize("adapters", [2, 6])
def test_mixed_grouped_layers(
    lab: Lab, dtype: torch.dtype, launches: list[str], adapters: int
) -> None:
    from fastlora.ops.triton import forward

    ids = [row % (adapters + 1) - 1 for row in range(11)]
    problem = of_tables(lab, "nf4", ids, [[8] * adapters, [4] * adapters, [1] * adapters], dtype)
    codes = [own.quantized_data for own in problem.quantized]
    for first in (0, 1):  # in the tables
        ys = forward.mixed_grouped_forward(
            *(problem.x, codes[first:], problem.biases[first:], problem.rows()),
            *(problem.all_tables, first, problem.max_rank, problem.factor_dtype),
        )
        for g, y in enumerate(ys, first):
            problem.check(y, g)
    assert launches == ["load_table4"] * 2


def test_mixed_training(lab: Lab, dtype: torch.dtype, launches: list[str]) -> None:
    """Forward and gradients of adapters as lists, dropout in them, over codes."""
    ids = [(3 * row) % 5 - 1 for row in range(30)]
    problem = GradProblem(lab, ids, 48, 64, dtype, ranks=(8, 0, 3, 16), dropout=True)
    weight = make_quantized_weight("nf4", problem.weight)
    problem.weight = dequantize(weight)
    dropout_p, rows = tuple(problem.ps), problem.groups
    operands = LayerAdapterOperands(
        *(problem.lora_a, problem.lora_b, problem.lora_bias, problem.scaling),
        *(dropout_p, problem.seeds),
    )
    wants = True, False, False, [True] * 12
    with torch.no_grad():
        y, s = TRITON.forward(problem.x, Base(weight), operands, rows, None, "auto")
        given = problem.dy, weight, problem.x, operands, rows, s, "auto"
        dx, _, _, factors = TRITON.gradients(BackwardArguments(*given, *wants))
    results = {"y": y, "dx": dx}
    for slot in range(4):
        results[f"d_lora_a {slot}"], results[f"d_lora_b {slot}"] = factors[3 * slot :][:2]
    problem.check({name: made for name, made in results.items() if made is not None})
    assert launches == ["load_table4"] * 2


@pytest.mark.usefixtures("row_wise_dots")
@pytest.mark.parametrize("mixed", [False, True])
def test_the_batch_invariant_mode_has_one_kernel_over_codes(
    lab: Lab, dtype: torch.dtype, launches: list[str], mixed: bool
) -> None:
    """Whatever the number of rows; a row's bits are its own."""
    if mixed:
        problem = of_tables(lab, "nf4", [row % 3 - 1 for row in range(70)], [[8, 4]], dtype)
        whole = at(problem, "invariant")
        problem.check(whole)
        few = of_tables(lab, "nf4", [row % 3 - 1 for row in range(5)], [[8, 4]], dtype)
        for name in ("quantized", "biases", "factors", "images", "scaling"):
            setattr(few, name, getattr(problem, name))
        few.lora_a_address, few.lora_b_address = problem.lora_a_address, problem.lora_b_address
        few.lora_bias_address, few.x = problem.lora_bias_address, problem.x[:5].clone()
        assert torch.equal(at(few, "invariant"), whole[:5])
    else:
        weight = make_quantized_weight("nf4", lab.rand(48, 128, dtype=dtype))
        x, own = lab.rand(70, 128, dtype=dtype), [lab.rand(8, 128, dtype=dtype)]
        operands = LayerAdapterOperands(
            own, [lab.rand(48, 8, dtype=dtype)], [None], torch.tensor(1.0), (0.0,)
        )
        whole, part = (
            TRITON.forward(rows, Base(weight), operands, None, None, "invariant")[0]
            for rows in (x, x[:5].clone())
        )
        assert torch.equal(part, whole[:5])
    assert len(launches) == 2 and set(launches) == {"load_table4"}
