"""The operators over the kernels: both plans, every gradient, dropout, opcheck, compile.

Through `fastlora.functional`, so that configs are chosen as a user's are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastlora import FastLoraLinear, env
from fastlora.functional import lora_add, lora_linear
from fastlora.ops import backend as ops
from fastlora.ops import plans
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.testing import assert_within_budget, farthest
from tests.support.plain import plain

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
    """y and all gradients of `plain` in ``dtype``, K taken in that order."""
    along_k = ("x", "weight", "lora_a")
    order, back = order.to(dy.device), order.argsort().to(dy.device)
    own = {
        name: (t.detach()[:, order] if name in along_k else t.detach()).to(dtype).requires_grad_()
        for name, t in tensors.items()
    }
    y = plain(**own, scaling=1.7)
    found = torch.autograd.grad(y, list(own.values()), dy.to(dtype))
    grads = zip(own, found, strict=True)
    return {"y": y.detach()} | {n: g[:, back] if n in along_k else g for n, g in grads}


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
        same = farthest((run[name] for run in runs), exact)
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


def test_add() -> None:
    """`lora_add` in place and out of place."""
    tensors = {n: t.detach() for n, t in operands(19, 40, 33, 3, torch.float32).items()}
    x, lora_a, lora_b = tensors["x"], tensors["lora_a"], tensors["lora_b"]
    y = torch.randn(19, 40, device=DEVICE)
    expected = y + 0.5 * x @ lora_a.t() @ lora_b.t()
    result = lora_add(y, x, lora_a, lora_b, 0.5, impl="triton")
    torch.testing.assert_close(result, expected)
    again = lora_add(y, x, lora_a, lora_b, 0.5, impl="triton", inplace=True)
    assert again.data_ptr() == y.data_ptr()
    assert torch.equal(y, result)


@pytest.mark.parametrize("plan", ["fused", "split"])
@pytest.mark.parametrize("m", [7, 130])
def test_dropout_mask_is_the_same_everywhere(m: int, plan: str) -> None:
    """Forward, d_lora_a and dx use one mask: Philox of seed, row and column, whatever the tile."""
    k, p = 48, 0.3
    x = torch.randn(m, k, device=DEVICE, requires_grad=True)
    eye = torch.eye(k, device=DEVICE, requires_grad=True)
    zero = torch.zeros(k, k, device=DEVICE)
    torch.manual_seed(11)
    y = lora_linear(x, zero, eye, eye.detach(), 1.0, dropout_p=p, impl="triton", plan=plan)
    torch.manual_seed(11)
    seed = ops.draw_seed(x, "triton")
    mask = philox_keep_mask(int(seed), m, k, p).to(DEVICE)
    torch.testing.assert_close(y, torch.where(mask, x / (1 - p), 0))
    dy = torch.randn(m, k, device=DEVICE)
    dx, d_lora_a = torch.autograd.grad(y, (x, eye), dy)
    torch.testing.assert_close(dx, torch.where(mask, dy / (1 - p), 0))
    torch.testing.assert_close(d_lora_a, dy.t() @ torch.where(mask, x / (1 - p), 0))


def test_poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of what the operators allocate is written: NaN there would show."""
    original = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        tensor = original(self, *size, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    tensors = {n: t.detach() for n, t in operands(37, 50, 2050, 7, torch.float32).items()}
    expected = lora_linear(**tensors, scaling=2.0, impl="eager")
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for plan in ("fused", "split"):
        result = lora_linear(**tensors, scaling=2.0, impl="triton", plan=plan)
        assert_within_budget(result, expected, exact_linear(tensors, 2.0))


def calls() -> dict[str, tuple[Any, ...]]:
    """One call of each operator."""
    tensors = {n: t.detach() for n, t in operands(20, 40, 48, 3, torch.float32).items()}
    x, lora_a, lora_b = tensors["x"], tensors["lora_a"], tensors["lora_b"]
    scaling = torch.tensor(0.5, device=DEVICE)
    seed = torch.tensor([7], device=DEVICE)
    s = torch.randn(20, 3, device=DEVICE)
    y = torch.randn(20, 40, device=DEVICE)
    base = (x, tensors["weight"], tensors["bias"], [])
    factors = ([lora_a, lora_b, None], scaling)
    return {
        "lora_shrink": (x, [], [lora_a], 1, seed, [0.5], "triton"),
        "lora_shrink of siblings": (x, [], [lora_a, lora_a[:2]], 2, None, [0.0] * 2, "triton"),
        "lora_linear": (*base, None, *factors, seed, [0.5], "triton", "fused"),
        "lora_linear of s": (*base, s, *factors, None, [0.0], "triton", "fused"),
        "lora_expand_": (y, s, [], [lora_b], [None], scaling, "triton"),
        "lora_dropout": (x, seed, 0.5),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_opcheck(name: str) -> None:
    """Schema, fake and dispatch of every operator agree with what its kernels do."""
    operator = getattr(torch.ops.fastlora, name.split()[0]).default
    torch.library.opcheck(operator, calls()[name])


def layer() -> FastLoraLinear:
    """A layer that insists on its kernels."""
    module = FastLoraLinear(48, 40, r=3, lora_dropout=0.3, device=DEVICE)
    torch.nn.init.normal_(module.lora_B["default"].weight)
    module.impl = "triton"
    return module


def gradients(function: Any, module: FastLoraLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients from a fixed random state."""
    torch.manual_seed(3)
    y = function(x)
    inputs = [p for p in module.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), inputs)]


def test_compile_and_checkpoint() -> None:
    """Compiled without a break, and recomputed, a layer over kernels gives the plain result."""
    module, x = layer(), torch.randn(20, 48, device=DEVICE, requires_grad=True)
    plain_run = gradients(module, module, x)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    again = gradients(lambda x: checkpoint(module, x, use_reentrant=False), module, x)
    for function in (gradients(compiled, module, x), again):
        for mine, expected in zip(function, plain_run, strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_kernel_refuses_fp64() -> None:
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
            assert plans.precision(torch.float32) == precision
            assert plans.precision(torch.bfloat16) == "ieee"
            result = lora_linear(**tensors, scaling=1.0, impl="triton")
            assert_within_budget(result, near[precision], exact)
    finally:
        matmul.fp32_precision = before
