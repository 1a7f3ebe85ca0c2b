"""Evaluations on a CPU for which bitsandbytes repacks 4-bit codes, and training behind them."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.layers.quantized import quantized_weight_of
from fastlora.layers.quantized_base import fallback_reason_base_called
from fastlora.testing import assert_within_budget
from tests.support.peak_bytes import peak_bytes
from tests.support.peft_twins import peft
from tests.support.quantized import dequantized, gated, quantize_linear
from tests.support.tiny import randomize, trainable

TARGETS = ["gate", "up", "down"]
KINDS = ["nf4", "nf4 nested", "fp4"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Nothing is warned of but what a test expects."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def repacks() -> None:
    """Skips where bitsandbytes repacks nothing."""
    if not pytest.importorskip("bitsandbytes.functional").has_avx512bf16():
        pytest.skip("bitsandbytes repacks nothing on this CPU")


def adapted(base: nn.Module, library: Any = fastlora, **config: Any) -> Any:
    """A model with a random adapter; ``patched`` is PEFT's, patched."""
    source = peft if library == "patched" else library
    torch.manual_seed(1)
    fields = {"r": 4, "target_modules": TARGETS, **config}
    model = source.get_peft_model(base, source.LoraConfig(**fields), autocast_adapter_dtype=False)
    randomize(model)
    if library == "patched":
        fastlora.patch(model)
    return model


def rows(count: int, like: nn.Module, width: int = 64) -> torch.Tensor:
    """The same x at every call, in a model's dtype."""
    dtype = next(p.dtype for p in like.parameters() if p.is_floating_point())
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2)).to(dtype)


def step(model: Any, count: int = 5) -> list[torch.Tensor]:
    """Output and gradients of a training forward; x goes through all layers."""
    x = rows(count, model).requires_grad_()
    y = model.train()(x)
    return [y.detach(), *torch.autograd.grad(y.pow(2).sum(), [x, *trainable(model)])]


@torch.no_grad()
def evaluated(model: Any, count: int = 5) -> torch.Tensor:
    """What a model makes of some rows in evaluation."""
    y: torch.Tensor = model.eval()(rows(count, model))
    return y


def copies(model: Any) -> list[torch.Tensor]:
    """The repacked codes that a model's layers keep."""
    kept = [m.__dict__.get("_kernel_weights") for m in model.modules()]
    found = [k.repacked for k in kept if k is not None and k.repacked is not None]
    return [each._copied[0] for each in found if each._copied is not None]


@pytest.mark.usefixtures("repacks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_is_bitsandbytes_own(kind: str, dtype: torch.dtype) -> None:
    """Bit for bit without adapters, and with one within PEFT's error; in x's dtype."""
    model, theirs = adapted(gated(kind, dtype)), adapted(gated(kind, dtype), peft)
    truth = dequantized(gated(kind, dtype))
    for count in (1, 5, 64):
        mine, other = evaluated(model, count), evaluated(theirs, count)
        assert_within_budget(mine, other, evaluated(adapted_truth(model, truth), count))
        assert len(copies(model)) == 3
        with model.disable_adapter(), theirs.disable_adapter():
            assert torch.equal(evaluated(model, count), evaluated(theirs, count))
    assert mine.dtype is dtype


def adapted_truth(model: Any, plain: nn.Module) -> Any:
    """The same adapter over plain linears in float64."""
    twin = adapted(copy.deepcopy(plain)).double()
    own = {n: p.double() for n, p in model.named_parameters() if "lora_" in n}
    twin.load_state_dict(own, strict=False)
    return twin


@pytest.mark.usefixtures("repacks")
def test_a_patched_model_whose_adapters_rest() -> None:
    """Disabled or merged, it is the base model in evaluation; the former gives a gradient."""
    model, bare = adapted(gated("nf4"), "patched"), gated("nf4")
    with model.disable_adapter():
        assert torch.equal(evaluated(model), evaluated(bare)) and len(copies(model)) == 3
        x = rows(5, model).requires_grad_()
        y = model(x)
        assert torch.equal(y, gated("nf4").train()(x)) and not copies(model)
        y.sum().backward()
        assert x.grad is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    merged = evaluated(model)
    assert len(copies(model)) == 3 and not torch.equal(merged, evaluated(bare))
    with model.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluated(model)  # PEFT unmerges
    assert not model.base_model.model.gate.merged


@pytest.mark.usefixtures("repacks")
def test_x_in_another_dtype_than_the_products() -> None:
    """As after PEFT's preparation, which leaves norms in fp32."""
    base = quantize_linear(nn.Linear(64, 96), "nf4 nested", torch.bfloat16)
    model, bare = adapted(nn.Sequential(copy.deepcopy(base)), target_modules=["0"]), base.eval()
    x = torch.randn(2, 3, 64)
    with torch.no_grad(), model.disable_adapter():
        mine, expected = model.eval()(x), bare(x)
    assert len(copies(model)) == 1
    assert mine.dtype is torch.float32 and torch.equal(mine, expected)


@pytest.mark.usefixtures("repacks")
def test_many_rows_in_bf16_and_odd_shapes_are_called() -> None:
    """Where repacked codes are slower, and where bitsandbytes cannot repack, and raises."""
    model = adapted(gated("nf4", torch.bfloat16))
    reference = copy.deepcopy(model)
    for module in reference.modules():
        module.__dict__.pop("_fastlora_keeps_layout", None)  # called in any case
    assert torch.equal(evaluated(model, 65), evaluated(reference, 65)) and not copies(model)
    narrow = nn.Sequential(quantize_linear(nn.Linear(64, 48), "nf4"))
    with pytest.raises(AssertionError, match="divisible"):
        evaluated(copy.deepcopy(narrow))
    assert evaluated(adapted(narrow, target_modules=["0"])).shape == (5, 48)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", [fastlora, "patched"])
def test_training_behind_evaluations(kind: str, library: Any) -> None:
    """As if there had been none, in any order, through layers without adapters too."""

    def made() -> Any:
        return adapted(gated(kind), library, target_modules=["gate", "up"])

    expected, model = step(made()), made()
    first = evaluated(model)
    for _ in range(2):
        for mine, own in zip(step(model), expected, strict=True):
            assert torch.equal(mine, own)
        assert torch.equal(evaluated(model), first)
        x = rows(5, model).requires_grad_()
        y = model(x)  # in evaluation, with gradients
        grads = torch.autograd.grad(y.pow(2).sum(), [x, *trainable(model)])
        for mine, own in zip([y.detach(), *grads], expected, strict=True):
            assert torch.equal(mine, own)


@pytest.mark.usefixtures("repacks")
@pytest.mark.parametrize("library", [fastlora, "patched"])
def test_what_ends_a_copy(library: Any) -> None:
    """Training, a gradient, a merge and clear_caches; nothing else holds it."""
    model = adapted(gated("nf4 nested"), library)

    def gradient() -> None:
        model(rows(2, model).requires_grad_())

    def merge() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what rounding again loses
            model.merge_adapter()
            model.unmerge_adapter()

    ends = [model.train, gradient, merge]
    if library is fastlora:
        ends.append(lambda: fastlora.clear_caches(model))
    for end in ends:
        evaluated(model)
        held = [weakref.ref(codes) for codes in copies(model)]
        assert len(held) == 3
        end()
        assert not copies(model) and all(ref() is None for ref in held)


@pytest.mark.usefixtures("repacks")
def test_a_step_behind_an_evaluation_peaks_as_pefts() -> None:
    """And what an evaluation keeps is half a byte a weight, and scales in bf16."""
    model = adapted(gated("nf4 nested", torch.bfloat16, 256))
    theirs = adapted(gated("nf4 nested", torch.bfloat16, 256), peft)

    def run(side: Any) -> None:
        x = torch.zeros(8, 256, dtype=torch.bfloat16, requires_grad=True)
        side.train()(x).sum().backward()

    run(model), run(theirs)
    x = torch.zeros(8, 256, dtype=torch.bfloat16)
    with torch.no_grad():
        model.eval()(x)
    weights = 3 * 256 * 512
    assert sum(codes.numel() for codes in copies(model)) == weights // 2
    assert peak_bytes(lambda: run(model)) <= peak_bytes(lambda: run(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_while_it_evaluates(kind: str) -> None:
    """The state dict is that of before, bit for bit."""
    model = adapted(gated(kind))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluated(model)
    now = model.state_dict()
    assert before.keys() == now.keys() and any("absmax" in name for name in now)
    assert all(torch.equal(now[name], value) for name, value in before.items())


@pytest.mark.usefixtures("repacks")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_and_unmerged_between_evaluations(kind: str) -> None:
    """Each evaluation is that of the codes that are there; the first ones come back."""
    model = adapted(gated(kind))
    gate = model.base_model.model.gate.base_layer
    found = quantized_weight_of(gate)
    assert found is not None
    codes, first = gate.weight.data.clone(), evaluated(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
    merged = evaluated(model)
    assert len(copies(model)) == 3
    bare = copy.deepcopy(model.base_model.model)
    for name in TARGETS:
        module = getattr(bare, name).base_layer
        module.support_avx512bf16_for_cpu = True
        setattr(bare, name, module)
    assert torch.equal(merged, evaluated(bare)) and not torch.equal(merged, first)
    model.unmerge_adapter()
    assert torch.equal(gate.weight.data, codes)
    assert torch.equal(evaluated(model), first)


def alone(base: nn.Module) -> Any:
    """A model of one linear with a random adapter."""
    return adapted(nn.Sequential(base), target_modules=["0"])


def base_of(model: Any) -> Any:
    """That linear."""
    return model.base_model.model[0].base_layer


@pytest.mark.usefixtures("repacks")
def test_a_module_that_does_more_is_called() -> None:
    """A subclass, which may have a forward of its own."""
    base: Any = quantize_linear(nn.Linear(64, 96), "nf4")

    class Doubled(type(base)):  # type: ignore[misc]  # known at run time
        def forward(self, x: torch.Tensor) -> Any:
            return 2 * super().forward(x)

    base.__class__ = Doubled
    model = alone(base)
    with torch.no_grad():
        expected = model.train()(rows(5, model))
    assert torch.equal(evaluated(model), expected) and not copies(model)


@pytest.mark.usefixtures("repacks")
def test_scales_that_were_written() -> None:
    """Twice as large, they make everything but the bias twice as large."""
    model = alone(quantize_linear(nn.Linear(64, 96, bias=False), "nf4"))
    with model.disable_adapter():
        before = evaluated(model)
        base_of(model).weight.quant_state.absmax.mul_(2)
        assert torch.equal(evaluated(model), 2 * before)


@pytest.mark.usefixtures("repacks")
def test_weights_that_follow_each_other() -> None:
    """A later one may have the address that an earlier one had, and as many writes."""
    model = alone(quantize_linear(nn.Linear(64, 96, bias=False), "nf4"))
    base = base_of(model)
    with model.disable_adapter():
        for _ in range(3):
            before = evaluated(model)
            for _ in range(2):
                base.weight = quantize_linear(nn.Linear(64, 96, bias=False), "nf4").weight
            now = evaluated(model)
            assert not torch.allclose(now, before, atol=0.1)
            with torch.no_grad():
                torch.testing.assert_close(now, model.train()(rows(5, model)), rtol=0.02, atol=0.02)


@pytest.mark.usefixtures("repacks")
def test_a_model_from_another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one without AVX512 bf16 bitsandbytes' product would take the codes for others."""
    model = alone(quantize_linear(nn.Linear(64, 96), "nf4"))
    with torch.no_grad():
        expected = model.train()(rows(5, model))
    monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: False)
    assert torch.equal(evaluated(model), expected) and not copies(model)


@pytest.mark.usefixtures("repacks")
def test_a_mixed_batch() -> None:
    """Every row is that of its own adapter alone."""
    model = adapted(gated("nf4 nested"))
    model.add_adapter("other", fastlora.LoraConfig(r=2, target_modules=TARGETS))
    randomize(model, 3)
    names = ["default", "other"]
    alone = []
    for name in names:
        model.set_adapter(name)
        alone.append(evaluated(model, 6))
    with torch.no_grad(), fastlora.adapters(model, [*names, None] * 2):
        mixed = model(rows(6, model))
    for row in (0, 1, 3, 4):
        torch.testing.assert_close(mixed[row], alone[row % 3][row])
    assert len(copies(model)) == 3


@pytest.mark.usefixtures("repacks")
def test_codes_that_were_repacked_before() -> None:
    """It says so: where adapters are added, patched, or made to train later."""
    for library in (fastlora, "patched"):
        model = adapted(gated("nf4"), library, inference_mode=True)
        evaluated(model)  # by bitsandbytes itself: no copy
        assert not copies(model)
        assert "repacked" in fallback_reason_base_called(model.base_model.model.gate)
        model.base_model.model.gate.lora_A["default"].weight.requires_grad_()
        match = "repacked 4-bit weights .* load the base model again"
        # Over a bias bitsandbytes raises in the end.
        with pytest.warns(UserWarning, match=match), contextlib.suppress(RuntimeError):
            model.train()(torch.randn(5, 64))
    base = gated("nf4")
    evaluated(base)
    with pytest.warns(UserWarning, match="repacked 4-bit weights"):
        adapted(base)
    theirs = adapted(gated("nf4"), peft)
    evaluated(theirs)
    with pytest.warns(UserWarning, match="repacked 4-bit weights"):
        fastlora.patch(theirs)
