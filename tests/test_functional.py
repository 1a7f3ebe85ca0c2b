"""`fastlora.functional`: numerical derivatives, what is saved, who records, refusals."""

from __future__ import annotations

import pytest
import torch

from fastlora.autograd import adapter as autograd
from fastlora.functional import lora_add, lora_linear
from fastlora.validation import ConfigError, ImplementationError


def make(m: int, n: int, k: int, r: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """LayerAdapterOperands in ``dtype`` that all require gradients."""
    operands = {
        "x": torch.randn(m, k),
        "weight": torch.randn(n, k) / k**0.5,
        "bias": torch.randn(n),
        "lora_a": torch.randn(r, k) / k**0.5,
        "lora_b": torch.randn(n, r) / r**0.5,
    }
    return {name: t.to(dtype).requires_grad_() for name, t in operands.items()}


@pytest.fixture(params=["one node", "PyTorch's nodes"])
def nodes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who records small fp32 and fp64 layers: our function, or PyTorch."""
    if request.param == "one node":
        monkeypatch.setattr(autograd, "_FEW_ROWS", 0)


@pytest.mark.drawn(1 / 2)
@pytest.mark.parametrize("numbers", [[0.5, 2.0, 1 / 3], [1 / 3]], ids=["per rank row", "one"])
def test_gradcheck(numbers: list[float], nodes: None) -> None:
    """Numerical derivatives agree in float64, for linear and add."""
    operands = make(5, 9, 7, 3, torch.float64)
    scaling = torch.tensor(numbers, dtype=torch.float64)
    x, weight, bias, lora_a, lora_b = operands.values()

    def linear(*tensors: torch.Tensor) -> torch.Tensor:
        x, weight, bias, lora_a, lora_b = tensors
        return lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias)

    def dropped(*tensors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        x, weight, bias, lora_a, lora_b = tensors
        return lora_linear(x, weight, lora_a, lora_b, scaling, bias=bias, dropout_p=0.4)

    assert torch.autograd.gradcheck(linear, (x, weight, bias, lora_a, lora_b))
    assert torch.autograd.gradcheck(dropped, (x, weight, bias, lora_a, lora_b))
    # A wide layer, whose s is made again in the backward.
    assert torch.autograd.gradcheck(dropped, tuple(make(2, 200, 4, 3, torch.float64).values()))
    y = torch.randn(5, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y, x, a, b: lora_add(y, x, a, b, 0.5), (y, x, lora_a, lora_b)
    )


@pytest.mark.parametrize("n", [48, 256])
@pytest.mark.parametrize("shape", [(64,), (4, 16)], ids=str)
def test_pytorchs_nodes_are_the_same_layer(
    shape: tuple[int, ...], n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits of y, the same gradients, and nothing saved beyond x, s and parameters."""
    k, r = 32, 4
    found = []
    for few in (0, 512):
        monkeypatch.setattr(autograd, "_FEW_ROWS", few)
        torch.manual_seed(3)
        operands = make(64, n, k, r, torch.float32)
        x = operands.pop("x").detach().view(*shape, k).requires_grad_()
        for name in ("weight", "bias"):
            operands[name].requires_grad_(False)
        packed: list[torch.Tensor] = []
        hooks = lambda t: packed.append(t) or t, lambda t: t  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y = lora_linear(x, scaling=2.0, **operands)
        memory = {t.untyped_storage().data_ptr(): t.numel() for t in packed}
        y.square().sum().backward()
        found.append((y, sorted(memory.values()), x, operands["lora_a"], operands["lora_b"]))
    (y, saved, *leaves), (other, other_saved, *other_leaves) = found
    assert "LoraLinear" in y.grad_fn.name()
    assert "LoraLinear" not in other.grad_fn.name()
    assert torch.equal(y, other)
    assert saved == other_saved == sorted([64 * k, 64 * r, n * k, r * k, n * r, 1])
    for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
        torch.testing.assert_close(leaf.grad, other_leaf.grad)
    with torch.no_grad():
        other.add_(1.0)  # as one may write into the output of a linear
        assert torch.equal(y + 1.0, other)


@pytest.mark.parametrize("what", ["rows", "scaling", "dropout", "dtype", "factors", "strided"])
def test_one_node_where_pytorchs_are_not_enough(what: str) -> None:
    """Many rows, several scalings, dropout, casts and x's copies: our function."""
    m, n = 1024 if what == "rows" else 64, 48
    operands = make(m, n, 32, 4, torch.bfloat16 if what == "dtype" else torch.float32)
    if what == "factors":
        operands["lora_a"] = operands["lora_a"].detach().to(torch.bfloat16).requires_grad_()
    if what == "strided":  # nodes of PyTorch's would each save x as rows
        operands["x"] = operands["x"].detach().view(4, 16, 32)[:, 1:].requires_grad_()
    scaling = torch.ones(4) if what == "scaling" else 2.0
    y = lora_linear(**operands, scaling=scaling, dropout_p=0.5 if what == "dropout" else 0.0)
    assert "LoraLinear" in y.grad_fn.name()


def test_frozen_factors_save_no_activations(nodes: None) -> None:
    """A frozen adapter in a trained model keeps neither x nor s."""
    operands = make(64, 48, 32, 4, torch.float32)
    for name in ("weight", "bias", "lora_a", "lora_b"):
        operands[name].requires_grad_(False)
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = lora_linear(**operands, scaling=2.0)
    assert all(64 not in t.shape for t in packed)
    y.sum().backward()
    expected = operands["weight"] + 2.0 * operands["lora_b"] @ operands["lora_a"]
    torch.testing.assert_close(operands["x"].grad, expected.sum(0).expand(64, -1))


def test_add_in_place_and_out_of_place() -> None:
    """`lora_add` overwrites y only where it is told to and no gradient is recorded."""
    operands = make(16, 40, 24, 4, torch.float32)
    x, lora_a, lora_b = (operands[n].detach() for n in ("x", "lora_a", "lora_b"))
    y = torch.randn(16, 40)
    expected = y + 0.5 * x @ lora_a.t() @ lora_b.t()
    kept = y.clone()
    torch.testing.assert_close(lora_add(y, x, lora_a, lora_b, 0.5), expected)
    assert torch.equal(y, kept)
    result = lora_add(y, x, lora_a, lora_b, 0.5, inplace=True)
    assert result.data_ptr() == y.data_ptr()
    torch.testing.assert_close(y, expected)


BAD = {
    "lora_a": ({"lora_a": torch.zeros(4, 31)}, ValueError, r"lora_a has shape \(4, 31\)"),
    "lora_b": ({"lora_b": torch.zeros(40, 5)}, ValueError, r"lora_b has shape \(40, 5\)"),
    "weight": ({"weight": torch.zeros(41, 32)}, ValueError, r"weight has shape \(41, 32\)"),
    "bias": ({"bias": torch.zeros(39)}, ValueError, r"bias has shape \(39,\), expected \(40,\)"),
    "dtype": (
        {"weight": torch.zeros(40, 32).double()},
        TypeError,
        "weight has dtype torch.float64",
    ),
    "integer": ({"x": torch.zeros(8, 32).long()}, TypeError, "x has dtype torch.int64"),
    "device": ({"lora_b": torch.zeros(40, 4, device="meta")}, ValueError, "lora_b is on meta"),
    "rank": ({"lora_a": torch.zeros(0, 32), "lora_b": torch.zeros(40, 0)}, ValueError, "R >= 1"),
    "dropout": ({"dropout_p": 1.0}, ConfigError, r"in \[0, 1\), got 1.0"),
    "scaling": ({"scaling": torch.ones(3)}, ValueError, r"scaling has shape \(3,\)"),
    "impl": ({"impl": "cuda"}, ValueError, "impl must be one of"),
    "triton": ({"impl": "triton"}, ImplementationError, "impl='triton' cannot be used: "),
    "plan": ({"plan": "best"}, ValueError, "plan must be one of"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_errors_name_the_value(case: str) -> None:
    """Every wrong argument raises one typed error that says what was found and expected."""
    change, error, message = BAD[case]
    operands = make(8, 40, 32, 4, torch.float32)
    arguments = {n: t.detach() for n, t in operands.items()} | {"scaling": 1.0} | change
    with pytest.raises(error, match=message):
        lora_linear(**arguments)
