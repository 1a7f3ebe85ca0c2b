"""The operators over the kernels: both plans, every gradient, precision, replay.

Through `fastlora.functional`, so that configs are chosen as a user's are.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn.functional import linear

from fastlora import env
from fastlora.functional import lora_linear
from fastlora.ops import execution_mode as ops
from fastlora.ops import plans
from fastlora.testing import assert_within_budget, run_with_largest_error
from fastlora.validation import ImplementationError
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import OPS
from tests.support.kernels.one_adapter import Problem

NATIVE = torch.cuda.is_available() and not env.triton_interpreted()
DEVICE = "cuda" if NATIVE else "cpu"
if not ops.triton_status(DEVICE)[0]:
    pytest.skip(f"no kernels here: {ops.triton_status(DEVICE)[1]}", allow_module_level=True)

# M, N, K, R: pairwise over sizes on and off the tiles.
SHAPES = [
    (0, 40, 48, 4),
    (1, 64, 48, 1),
    (15, 40, 33, 3),
    (16, 33, 64, 16),
    (17, 96, 200, 24),
    (127, 72, 96, 64),
    (130, 130, 65, 128),
    (70, 48, 2048, 8),
]


def operands(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Base in ``dtype``, factors fp32 masters, everything requiring gradients."""
    base = {
        "x": torch.randn(m, k).to(dtype),
        "weight": (torch.randn(n, k) / k**0.5).to(dtype),
        "bias": torch.randn(n).to(dtype),
    }
    factors = {"lora_a": torch.randn(r, k) / k**0.5, "lora_b": torch.randn(n, r) / r**0.5}
    # The factors' values are representable in dtype, so that all sides start from the same ones.
    factors = {name: t.to(dtype).float() for name, t in factors.items()}
    return {name: t.to(DEVICE).requires_grad_() for name, t in {**base, **factors}.items()}


def exact_linear(tensors: dict[str, Any], scaling: Any) -> torch.Tensor:
    """`lora_linear` in float64."""
    wide = {name: t if t is None else t.double() for name, t in tensors.items()}
    return lora_linear(**wide, scaling=scaling, impl="eager")


def plain_results(
    tensors: dict[str, torch.Tensor], dy: torch.Tensor, dtype: torch.dtype, order: torch.Tensor
) -> dict[str, torch.Tensor]:
    """y and all gradients of the plain expression in ``dtype``, K taken in that order."""
    along_k = ("x", "weight", "lora_a")
    order, back = order.to(dy.device), order.argsort().to(dy.device)
    own = {
        name: (t.detach()[:, order] if name in along_k else t.detach()).to(dtype).requires_grad_()
        for name, t in tensors.items()
    }
    update = linear(linear(own["x"], own["lora_a"]), own["lora_b"])
    y = linear(own["x"], own["weight"], own["bias"]) + update * 1.7
    found = torch.autograd.grad(y, list(own.values()), dy.to(dtype))
    grads = zip(own, found, strict=True)
    return {"y": y.detach()} | {n: g[:, back] if n in along_k else g for n, g in grads}


@pytest.mark.drawn(1 / 2)
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("plan", ["fused", "split"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, plan: str) -> None:
    """Within the error budget of the same-dtype expression, value and all five gradients."""
    tensors = operands(*shape, dtype)
    dy = torch.randn(shape[0], shape[1], device=DEVICE).to(dtype)
    whole = torch.arange(shape[2])
    truth = plain_results(tensors, dy, torch.float64, whole)
    orders = [whole, *(torch.randperm(shape[2]) for _ in range(7))]
    runs = [plain_results(tensors, dy, dtype, order) for order in orders]
    y = lora_linear(**tensors, scaling=1.7, impl="triton", plan=plan)
    y.backward(dy)
    for name, exact in truth.items():
        found = y.detach() if name == "y" else tensors[name].grad
        assert found is not None and found.dtype == (dtype if name == "y" else tensors[name].dtype)
        same = run_with_largest_error((run[name] for run in runs), exact)
        assert_within_budget(found, same, exact, name)


@pytest.mark.parametrize("plan", ["fused", "split"])
def test_layouts(plan: str) -> None:
    """Transposed, expanded and three-dimensional inputs, a scaling per rank row, no bias."""
    tensors = {n: t.detach() for n, t in operands(24, 40, 32, 5, torch.float32).items()}
    tensors["bias"] = None
    scaling = torch.rand(5, device=DEVICE)
    expected = lora_linear(**tensors, scaling=scaling, impl="eager")
    exact = exact_linear(tensors, scaling)
    x = tensors.pop("x")
    transposed = x.t().contiguous().t()
    factors = {**tensors, "lora_b": tensors["lora_b"].t().contiguous().t()}
    variants = {
        "transposed": lora_linear(transposed, **factors, scaling=scaling, impl="triton", plan=plan),
        "cube": lora_linear(
            x.view(2, 3, 4, 32), **tensors, scaling=scaling, impl="triton", plan=plan
        ).view(24, 40),
    }
    for name, result in variants.items():
        assert_within_budget(result, expected, exact, name)
    row = x[:1].expand(24, 32)
    result = lora_linear(row, **tensors, scaling=scaling, impl="triton", plan=plan)
    assert_within_budget(result, expected[:1].expand(24, 40), exact[:1].expand(24, 40))


def test_a_kernel_raises_for_fp64() -> None:
    """The kernels have no fp64; asked for by name, that is an error."""
    tensors = {n: t.detach().double() for n, t in operands(4, 8, 8, 2, torch.float32).items()}
    with pytest.raises(RuntimeError, match="fp16, bf16 and fp32, got torch.float64"):
        lora_linear(**tensors, scaling=1.0, impl="triton")


@pytest.mark.skipif(not NATIVE, reason="needs a GPU")
def test_cuda_graph() -> None:
    """A captured forward replays on new inputs."""
    tensors = {n: t.detach() for n, t in operands(16, 64, 128, 8, torch.float16).items()}
    lora_linear(**tensors, scaling=2.0, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lora_linear(**tensors, scaling=2.0, impl="triton")
    tensors["x"].copy_(torch.randn_like(tensors["x"]))
    graph.replay()
    expected = lora_linear(**tensors, scaling=2.0, impl="triton")
    assert torch.equal(y, expected)


def test_either_switch_for_tf32_is_understood() -> None:
    """torch's newer precision switch, after which the older one cannot be read any more."""
    tensors = {n: t.detach() for n, t in operands(4, 8, 8, 2, torch.float32).items()}
    exact = exact_linear(tensors, 1.0)
    # fp16 has as many bits as TF32.
    near = {
        precision: lora_linear(
            **{n: t.to(dtype) for n, t in tensors.items()}, scaling=1.0, impl="eager"
        )
        for precision, dtype in (("tf32", torch.float16), ("ieee", torch.float32))
    }
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for mode, precision in (("tf32", "tf32"), ("ieee", "ieee")):
            matmul.fp32_precision = mode
            assert plans.fp32_precision(torch.float32) == precision
            assert plans.fp32_precision(torch.bfloat16) == "ieee"
            result = lora_linear(**tensors, scaling=1.0, impl="triton")
            assert_within_budget(result, near[precision], exact)
    finally:
        matmul.fp32_precision = before


# ----------------------------------------------------------------- operators of a backward


# Draws on which one running sum, as the interpreter adds rows up, is 1.4 to 1.8 budgets off; of
# random ones that is 1 in 220.
@pytest.mark.parametrize("draw", [12811, 1409, 2630])
def test_sums_of_rows_are_as_good_as_pytorchs(draw: int) -> None:
    torch.manual_seed(draw)
    dy, s, lora_b = torch.randn(70, 40), torch.ones(70, 1), torch.randn(40, 1)
    dy, s, lora_b = (tensor.to(DEVICE) for tensor in (dy, s, lora_b))
    scaling = torch.tensor(1.0, device=DEVICE)
    _, _, d_bias = OPS.lora_grad_b(dy, s, [], 0, [lora_b], [True], scaling, True, "triton")
    assert_within_budget(d_bias, dy.sum(0), dy.double().sum(0), "d_bias")


@pytest.mark.parametrize(("m", "fused"), [(64, True), (65, False)])
def test_auto_is_fused_up_to_64_rows(m: int, fused: bool) -> None:
    """Above, the library's GEMM and an update in place."""
    from fastlora.kernels import lora_expand, lora_linear

    shapes = ((m, 8), (8, 16), (m, 4), (4, 16))
    dy, weight, ds, lora_a = (torch.randn(shape, device=DEVICE) for shape in shapes)
    with (
        mock.patch.object(lora_linear, "launch_lora_linear") as linear,
        mock.patch.object(lora_expand, "launch_lora_expand") as expand,
    ):
        OPS.lora_grad_x(dy, weight, ds, [], [lora_a], None, [0.0], "triton", "auto")
    assert (linear.call_count, expand.call_count) == ((1, 0) if fused else (0, 1))


def test_a_scaling_of_each_rank_row(lab: Lab) -> None:
    """ds and d_lora_b by each rank row's own, in fp32."""
    problem = Problem(lab, 70, 40, 16, 5)
    problem.scaling = torch.linspace(0.5, 2.0, 5).to(DEVICE)
    found = OPS.lora_grad_b(
        *(problem.dy, problem.s, [], 0, [problem.lora_b], [True], problem.scaling, True),
        "triton",
    )
    problem.check(dict(zip(("ds", "d_lora_b", "d_bias"), found, strict=True)))


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_forward_mode(dropout_p: float) -> None:
    """It runs without kernels, whose results have no tangents; asked for by name, they raise."""
    x, weight, lora_a, lora_b = (
        torch.randn(*shape, device=DEVICE) for shape in ((4, 16), (8, 16), (2, 16), (8, 2))
    )

    def run(x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
        torch.manual_seed(0)
        return lora_linear(x, weight, lora_a, lora_b, 0.5, dropout_p=dropout_p, impl=impl)

    expected = run(x, "eager")  # linear in x
    with mock.patch.object(ops, "KERNEL_DEVICES", (DEVICE,)):
        torch.testing.assert_close(torch.func.jvp(run, (x,), (x,))[1], expected)
        with torch.autograd.forward_ad.dual_level():
            y = run(torch.autograd.forward_ad.make_dual(x, x))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)
            with pytest.raises(ImplementationError, match="forward-mode"):
                run(x, "triton")
