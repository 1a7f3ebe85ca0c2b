"""DoRA on one layer: odd magnitudes, what is saved, where training starts, what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint

from fastlora import FastLoraLinear, LoraConfig, adapters
from fastlora.layers import FastLoraWrapper
from fastlora.layers import dora as dora_layer
from fastlora.testing import assert_within_budget
from fastlora.validation import UnsupportedLayerError
from tests.support.dora_truth import dora, layer_of, make_problem, parameters_of
from tests.support.tiny import trainable, with_adapters


def gradients(
    y: torch.Tensor, tensors: list[torch.Tensor | None], dy: torch.Tensor
) -> list[torch.Tensor]:
    """Of those tensors that are there."""
    return list(torch.autograd.grad(y, [t for t in tensors if t is not None], dy.to(y.dtype)))


CASES = [
    (1, 64, 48, 1, torch.float32, "small"),
    (15, 33, 100, 4, torch.float32, "zero or negative"),
    (127, 130, 72, 16, torch.bfloat16, "zero or negative"),
    (2000, 48, 33, 3, torch.bfloat16, "small"),
    (16, 40, 65, 64, torch.float16, "norms"),
    (2000, 33, 48, 128, torch.float32, "norms"),
]


@pytest.mark.parametrize(("m", "n", "k", "r", "dtype", "magnitudes"), CASES, ids=str)
def test_values_and_every_gradient(
    m: int, n: int, k: int, r: int, dtype: torch.dtype, magnitudes: str
) -> None:
    """Against float64, over a frozen base, with dy of odd strides, of any magnitudes."""
    problem = make_problem(m, n, k, r, dtype, bias=False)
    if magnitudes == "small":
        problem.magnitude.mul_(2.0**-12)
    elif magnitudes != "norms":
        problem.magnitude[::3] = 0
        problem.magnitude[1::3] *= -1
    dy = torch.randn(n, m).to(dtype).t() if m == 127 else torch.randn(m, 1).to(dtype).expand(m, n)
    layer, x = layer_of(problem, 0.75 * r, 0.0), problem.x.detach().requires_grad_(True)
    layer.weight.requires_grad_(False)
    y = layer(x)
    found = [y.detach(), *gradients(y, [x, *parameters_of(layer)[2:]], dy)]
    expected = []
    for kind in (dtype, torch.float64):
        operands = problem.to(kind)
        plain = dora(operands, 0.75)
        wanted = [operands.x, operands.lora_a, operands.lora_b, operands.magnitude]
        expected.append([plain.detach(), *gradients(plain, wanted, dy)])
    for own, same, truth in zip(found, *expected, strict=True):
        assert own.dtype == dtype
        assert_within_budget(own, same, truth)


@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20)], ids=str)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_an_output_may_be_written_into(shape: tuple[int, ...], reentrant: bool | None) -> None:
    """As that of an `nn.Linear` may, and within and behind a checkpoint of either kind."""
    layer = layer_of(make_problem(1, 24, 20, 4, torch.float64, bias=False), 3, 0.0)
    x, results = torch.randn(*shape, dtype=torch.float64), []
    for copies in (True, False):
        own = x.clone().requires_grad_(True)

        def written(t: torch.Tensor, copies: bool = copies) -> torch.Tensor:
            y = layer(t)
            return (y.clone() if copies else y).mul_(3.0)

        if copies or reentrant is None:
            y = written(own)
        else:
            y = checkpoint(written, own, use_reentrant=reentrant)
        y.add_(1.0)
        layer.zero_grad()
        y.square().sum().backward()
        results.append([y.detach(), own.grad, *(p.grad for p in trainable(layer))])
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_forward_without_gradients_has_the_bits_of_one_with() -> None:
    """As a reentrant checkpoint's first forward must."""
    problem = make_problem(600, 700, 500, 8, torch.float32)
    layer = layer_of(problem, 6, 0.0)
    expected = layer(problem.x).detach()
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(layer(problem.x), expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_result_is_saved(p: float, frozen: bool) -> None:
    """Of y's size, and none at all where the magnitude is frozen."""
    problem = make_problem(48, 24, 20, 4, torch.bfloat16, bias=False)
    layer, saved = layer_of(problem, 6, p), list[torch.Tensor]()
    layer.weight.requires_grad_(False)
    layer.lora_magnitude_vector.requires_grad_(not frozen)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(problem.x)
    assert len([t for t in saved if t.shape == y.shape]) == (not frozen)
    assert y.untyped_storage().nbytes() == y.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_computes_in_its_dtype(dtype: torch.dtype) -> None:
    """Wider parameters under bf16 autocast: as a bf16 layer, and the norm as that of theirs."""
    problem = make_problem(12, 24, 20, 4, torch.bfloat16)
    layer = layer_of(problem.to(dtype), 6, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(problem.x.float())
    assert y.dtype == torch.bfloat16
    same = dora(problem, 1.5)
    truth = dora(problem.to(torch.float64), 1.5)
    assert_within_budget(y.detach(), same, truth)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_row_gives_zero(dtype: torch.dtype) -> None:
    """A row of the adapted weight that is 0 gives 0 and finite gradients, where PEFT gives NaN."""
    problem = make_problem(7, 6, 5, 2, dtype, bias=False)
    problem.weight[2], problem.lora_b[2], problem.magnitude[2] = 0, 0, 0
    problem.magnitude[4] = 0
    for p in (0.0, 0.5):
        layer = layer_of(problem, 2, p)
        x = problem.x.detach().requires_grad_(True)
        y = layer(x)
        if not p:
            assert (y[:, [2, 4]] == 0).all()
        found = gradients(y, [x, *parameters_of(layer)], torch.ones_like(y))
        assert all(bool(torch.isfinite(t).all()) for t in (y, *found))
        assert found[-1][2] == 0 and found[-1][4] != 0


def test_training_starts_at_the_base_layer() -> None:
    """The first magnitude is the norm of each row, as in PEFT, so the layer is its base layer."""
    linear = nn.Linear(20, 24)
    expected = linear(torch.ones(3, 20))
    layer = FastLoraLinear.from_linear(linear, r=4, use_dora=True)
    magnitude = layer.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, linear.weight.norm(dim=1))
    assert magnitude.requires_grad and magnitude.dtype == torch.float32
    torch.testing.assert_close(layer(torch.ones(3, 20)), expected)
    random = FastLoraLinear.from_linear(linear, r=4, use_dora=True, init_lora_weights=False)
    weight = linear.weight + random.get_delta_weight("default")
    torch.testing.assert_close(
        random.lora_magnitude_vector["default"].weight.detach(), weight.detach().norm(dim=1)
    )


def test_small_changes_of_a_16_bit_magnitude_count() -> None:
    """g is 1 + 3 * 2**-9 in bf16, where it would be rounded to 1 + 2**-7."""
    layer = FastLoraLinear(64, 2048, bias=False, r=1, use_dora=True, dtype=torch.bfloat16)
    layer.lora_magnitude_vector.float()
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    truth = x.double() @ layer.weight.double().t()
    norms = layer.weight.double().norm(dim=1)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.copy_(norms * (1 + 3 * 2**-9))
        ratio = (layer(x).double() * truth).sum() / truth.square().sum()
    assert abs(ratio - 1 - 3 * 2**-9) < 2**-11


def test_rows_without_dora_keep_their_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other adapters and of none, in a mixed batch over a bias."""
    torch.manual_seed(0)
    configs = {
        name: LoraConfig(target_modules=["0"], use_dora=dora, init_lora_weights=False)
        for name, dora in (("scaled", True), ("plain", False))
    }
    model = with_adapters(nn.Sequential(nn.Linear(20, 24)), configs).eval()
    nn.init.uniform_(model.base_model.model[0].lora_magnitude_vector["scaled"].weight)
    given, run = list[torch.Tensor](), dora_layer.apply_dora_to_rows
    monkeypatch.setattr(
        dora_layer,
        "apply_dora_to_rows",
        lambda call, y, slots: run(call, given.append(y.clone()) or y, slots),
    )
    with torch.no_grad(), adapters(model, ["plain", "scaled", None, "plain"]):
        y = model(torch.randn(4, 20))
    assert torch.equal(y[[0, 2, 3]], given[0][[0, 2, 3]])
    assert not torch.allclose(y[1], given[0][1])


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_rows_of_several_adapters_in_any_order(p: float) -> None:
    """Each row has its own adapter's scale, and the mask of that one's seed, as alone."""
    configs = {
        name: LoraConfig(
            target_modules=["0"],
            use_dora=True,
            init_lora_weights=False,
            lora_dropout=0.0 if name == "a" else p,
        )
        for name in "abc"
    }
    model = with_adapters(nn.Sequential(nn.Linear(20, 24)), configs).double()
    for module in model.base_model.model[0].lora_magnitude_vector.values():
        nn.init.uniform_(module.weight)
    x, ids = torch.randn(5, 20, dtype=torch.float64, requires_grad=True), [*"cabcb"]

    def run(rows: list[int]) -> torch.Tensor:
        with adapters(model, [ids[row] for row in rows], seeds={"b": 3, "c": 5}):
            return model(x[rows])

    y = run([*range(5)])
    for name in "abc":
        rows = [row for row, own in enumerate(ids) if own == name]
        torch.testing.assert_close(y[rows], run(rows))


def test_a_parametrized_magnitude() -> None:
    """Its parametrization acts as in PEFT; a mixed batch says why it cannot use the adapter."""

    class Doubled(nn.Module):
        def forward(self, magnitude: torch.Tensor) -> torch.Tensor:
            return magnitude * 2.0

    config = LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = with_adapters(nn.Sequential(nn.Linear(20, 24, bias=False)), {"a": config})
    layer, x = model.base_model.model[0], torch.randn(5, 20)
    expected = 2.0 * model(x)
    register_parametrization(layer.lora_magnitude_vector["a"], "weight", Doubled())
    torch.testing.assert_close(model(x), expected)
    reason = "adapter 'a' has a DoRA magnitude with a parametrization"
    assert layer.fusion() == (False, reason)
    with adapters(model, [*"aaaaa"]), pytest.raises(UnsupportedLayerError, match=reason):
        model(x)


def test_what_raises() -> None:
    """A weight that cannot be read; nothing has changed then."""

    class Opaque(nn.Module):
        in_features = out_features = 4

    wrapper = FastLoraWrapper(Opaque())
    with pytest.raises(UnsupportedLayerError, match="the weight of this Opaque is missing"):
        wrapper.add_adapter("a", use_dora=True)
    assert not wrapper.lora_A and not wrapper.r
