"""16-bit products in fp32, on a processor that is told it emulates them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import FastLoraLinear, LoraConfig
from fastlora.bench import measure
from fastlora.ops.torch import products
from fastlora.testing import assert_within_budget
from tests.support.pool_adapters import Blocks, make_folder
from tests.support.tiny import randomize, with_adapters

HALVES = (torch.bfloat16, torch.float16)
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot")


@pytest.fixture(autouse=True)
def emulating(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "EMULATED", dict.fromkeys(HALVES, products.DOTS))
    yield


class HalfProducts(TorchDispatchMode):
    """Collects the products that PyTorch is asked for in 16 bits, and how many in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.wide = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS and any(isinstance(a, torch.Tensor) and a.dim() > 1 for a in args):
            dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
            if dtypes & set(HALVES):
                self.found.append(f"{func} {[tuple(a.shape) for a in args]}")
            self.wide += not dtypes & set(HALVES)
        return func(*args, **(kwargs or {}))


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# In parts of the right operand, of the left one, and whole; nothing, few rows, and no sum.
SHAPES = [
    *((17, 1200, 300), (2000, 300, 24), (2000, 24, 300), (15, 33, 100)),
    *((0, 8, 8), (1, 40, 24), (3, 40, 24), (4, 40, 24), (3, 0, 5)),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_product_is_as_near_to_the_truth_as_pytorchs(
    m: int, k: int, n: int, dtype: torch.dtype, transposed: bool
) -> None:
    a, b, y, bias = operands(dtype, (m, k), (n, k) if transposed else (k, n), (m, n), (n,))
    b = b.t() if transposed else b
    a3, b3, y3 = operands(dtype, (5, m, k), (5, k, n), (5, m, n))
    if transposed:
        a3 = a3.transpose(0, 1).contiguous().transpose(0, 1)
    cases: list[tuple[Callable[..., Any], Callable[..., Any], tuple[torch.Tensor, ...]]] = [
        (products.mm, torch.mm, (a, b)),
        (lambda *o: products.addmm_(o[0].clone(), *o[1:]), torch.addmm, (y, a, b)),
        (products.bmm, torch.bmm, (a3, b3)),
        (lambda *o: products.baddbmm_(o[0].clone(), *o[1:]), torch.baddbmm, (y3, a3, b3)),
        (products.linear, F.linear, (a, b.t())),
        (products.linear, F.linear, (a, b.t(), bias)),
    ]
    for ours, plain, args in cases:
        actual, truth = ours(*args), plain(*(t.double() for t in args))
        assert actual.dtype == dtype
        assert_within_budget(actual, plain(*args), truth, f"{plain.__name__} of {len(args)}")


def test_results_are_written_in_place_and_operands_are_not() -> None:
    a, b, wide = operands(torch.bfloat16, (6, 8), (8, 10), (6, 20))
    y, before = wide[:, ::2], [t.clone() for t in (a, b, wide)]
    assert products.addmm_(y, a, b) is y
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    assert torch.equal(wide[:, 1::2], before[2][:, 1::2])
    assert not torch.equal(y, before[2][:, ::2])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_result_that_is_narrower_than_its_operands_is_rounded_once(dtype: torch.dtype) -> None:
    """Operands below the smallest and above the largest fp16 number have a product within them."""
    a, b = torch.rand(6, 8) * 1e-9, torch.rand(8, 10) * 1e6
    y = torch.empty(6, 10, dtype=dtype)
    assert products.mm_into_(y, a, b) is y
    assert torch.equal(y, (a @ b).to(dtype)) and y.all()


def test_a_gradient_that_is_expanded() -> None:
    dy, weight = torch.ones((), dtype=torch.bfloat16).expand(33, 20), torch.randn(20, 12).bfloat16()
    actual = products.mm(dy, weight)
    assert_within_budget(actual, dy @ weight, dy.double() @ weight.double())


def layer(**options: Any) -> FastLoraLinear:
    torch.manual_seed(0)
    made = FastLoraLinear.from_linear(
        nn.Linear(48, 96, bias=False, dtype=torch.bfloat16), r=8, **options
    )
    randomize(made)
    return made


def assert_no_half_products(step: Callable[[], Any]) -> None:
    with HalfProducts() as counted:
        step()
    assert counted.wide, "nothing was computed"
    assert not counted.found


@pytest.mark.parametrize("way", ["frozen base", "base trained too", "autocast"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_training_step_has_no_16_bit_product(use_dora: bool, p: float, way: str) -> None:
    made, half = layer(use_dora=use_dora, lora_dropout=p), way != "autocast"
    made.weight.requires_grad_(way == "base trained too")
    made = made if half else made.float()
    x = torch.randn(20, 48, dtype=made.weight.dtype, requires_grad=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            y = made(x)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()

    assert_no_half_products(step)
    assert x.grad is not None and made.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_a_mixed_batch_has_no_16_bit_product(use_dora: bool, p: float) -> None:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"lora_dropout": p, "use_dora": use_dora, "target_modules": ["0", "1"]}
    configs = {name: LoraConfig(r=r, **fields) for name, r in (("a", 8), ("b", 4), ("c", 8))}
    model = with_adapters(nn.Sequential(nn.Linear(48, 96), nn.Linear(96, 48)), configs)
    randomize(model)
    fastlora.train.train_adapters(model.bfloat16().train(), ["a", "b", "c"])
    x = torch.randn(24, 24, 48, dtype=torch.bfloat16, requires_grad=True)
    names = ["a", "b", None, "c"] * 6

    def step() -> None:
        with fastlora.adapters(model, names):
            model(x[:, :5]).float().square().sum().backward()

    assert_no_half_products(step)
    model.eval()
    for tokens in (1, 24):
        with torch.no_grad(), fastlora.adapters(model, names):
            assert_no_half_products(lambda x=x[:, :tokens]: model(x))


def test_serving_from_a_pool_has_no_16_bit_product(tmp_path: Path) -> None:
    model = Blocks().bfloat16().eval()
    model.head = nn.Identity()
    pool = fastlora.AdapterPool(model, target_modules=["q", "v"])
    for seed in range(3):
        make_folder(tmp_path / f"a{seed}", seed, r=4)
    pool.register_folder(tmp_path)
    ids = torch.randint(0, 11, (8, 3))
    with torch.no_grad(), fastlora.adapters(pool, ["a0", "a1", None, "a2"] * 2):
        assert_no_half_products(lambda: model(ids))


def test_temporaries_are_chunks() -> None:
    """The weight, 16 MiB in fp32, is never widened whole, be it the right operand or the left."""
    x, weight = operands(torch.bfloat16, (64, 1024), (4096, 1024))
    result, wide = 2 * 64 * 4096, 4 * 64 * 1024
    for product in (partial(products.linear, x, weight), partial(products.mm, weight, x.t())):
        peak = measure.peak_step_bytes(product)
        assert result <= peak < weight.nbytes
        assert peak <= result + wide + 2 * 4 * (64 * 4096 + 64 * 1024)


def test_only_a_processor_without_the_instructions_widens(monkeypatch: pytest.MonkeyPatch) -> None:
    capability, has_avx512_bf16, has = "AVX2", False, {"bf16": False, "fp16": False}
    mkldnn, backends = torch.ops.mkldnn, torch.backends
    monkeypatch.setattr(backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(backends.mkldnn, "is_available", lambda: True)
    for name in has:
        monkeypatch.setattr(mkldnn, f"_is_mkldnn_{name}_supported", lambda name=name: has[name])
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
    assert products._cpu_emulated_dtypes() == dict.fromkeys(HALVES, products.DOTS)
    has["bf16"] = True  # oneDNN says so of what it emulates with AVX512, too
    assert products._cpu_emulated_dtypes() == {torch.float16: products.DOTS}
    capability, has_avx512_bf16 = "AVX512", False
    both = {torch.bfloat16: products.ONEDNN, torch.float16: products.DOTS}
    assert products._cpu_emulated_dtypes() == both
    has_avx512_bf16 = True
    assert products._cpu_emulated_dtypes() == {torch.float16: products.DOTS}
    has["fp16"] = True
    assert not products._cpu_emulated_dtypes()
    capability, has = "AVX2", {"bf16": False, "fp16": False}
    monkeypatch.setattr(backends.mkldnn, "is_available", lambda: False)
    assert not products._cpu_emulated_dtypes()
    capability = "DEFAULT"
    monkeypatch.setattr(backends.mkldnn, "is_available", lambda: True)
    assert not products._cpu_emulated_dtypes()


def test_what_stays_with_pytorch() -> None:
    """fp32; graphs and traces, which must not see parts; and the error of mixed dtypes."""
    a, b = operands(torch.float32, (6, 8), (8, 10))
    assert torch.equal(products.mm(a, b), a @ b)
    half = a.bfloat16()
    assert not products.can_use_fp32_for_emulated_dtype(a)
    assert products.can_use_fp32_for_emulated_dtype(half)
    wanted = half.clone().requires_grad_()
    assert products.mm(wanted, b.bfloat16()).requires_grad
    with torch.no_grad():
        assert products.can_use_fp32_for_emulated_dtype(wanted)
    with pytest.raises(RuntimeError, match="same dtype"):
        products.mm(half, b)


def test_a_trace_serves_other_numbers_of_rows() -> None:
    made = layer().eval()
    x = torch.randn(20, 48, dtype=torch.bfloat16)
    with torch.no_grad():
        traced = torch.jit.trace(made, (x,), check_trace=False)
        other = torch.randn(9000, 48, dtype=torch.bfloat16)
        exact = copy.deepcopy(made).double()(other.double())
        assert_within_budget(traced(other), made(other), exact)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_few_rows_are_read_by_pytorch(dtype: torch.dtype) -> None:
    """A weight of which every row is read once; but not the weight as it meets a gradient."""
    for rows, expected in ((1, 1), (3, 1), (4, 0)):
        x, weight = operands(dtype, (rows, 40), (24, 40))
        with HalfProducts() as counted:
            products.linear(x, weight)
        assert len(counted.found) == expected
        with HalfProducts() as counted:
            products.mm(x[:, :24], weight)
        assert not counted.found


@pytest.mark.parametrize("transposed", [False, True])
def test_onednn_keeps_fewer_than_64_rows(transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It emulates bf16 in any layout, alone and in batches; and no part has above 256 KiB."""
    monkeypatch.setattr(products, "EMULATED", {torch.bfloat16: products.ONEDNN})
    for rows, expected in ((63, 5), (64, 0)):
        x, b = operands(torch.bfloat16, (rows, 40), (24, 40) if transposed else (40, 24))
        b = b.t() if transposed else b
        with HalfProducts() as counted:
            y = products.mm(x, b)
            products.linear(x, b.t())
            products.addmm_(y, x, b)
            products.baddbmm_(products.bmm(x[None], b[None]), x[None], b[None])
        assert len(counted.found) == expected
    x, weight = operands(torch.bfloat16, (64, 256), (4096, 256))
    peak = measure.peak_step_bytes(partial(products.linear, x, weight))
    assert peak <= 2 * 64 * 4096 + 4 * 64 * 256 + 2 * 4 * (1 << 16)


LOWERED = """
import torch
from fastlora.ops.torch import products
assert products.EMULATED.keys() == {torch.bfloat16, torch.float16}, products.EMULATED
a, b = torch.randn(8, 40).bfloat16(), torch.randn(40, 24).bfloat16()
assert torch.equal(products.mm(a, b), (a.float() @ b.float()).bfloat16())
"""


@pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx2", False) or not torch.backends.mkldnn.is_available(),
    reason="needs x86 with AVX2, and oneDNN",
)
def test_a_machine_that_says_it_has_avx2_only() -> None:
    """Whatever it has: libraries and we go by what the environment lowers it to."""
    lowered = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", LOWERED]
    done = subprocess.run(
        command, env={**os.environ, **lowered}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
