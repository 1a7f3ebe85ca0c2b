"""Adapters on stacks of experts' weights: against PEFT, in mixed batches, merged, and compiled."""

from __future__ import annotations

import contextlib
import copy
import pickle
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig
from fastlora.ops.rows import sort_rows
from fastlora.testing import assert_within_budget, run_with_largest_error
from fastlora.validation import UnsupportedLayerError
from tests.support.expert_batches import (
    EACH,
    RANKS,
    ROWS,
    batch_inputs,
    looped,
    mixed_block,
    run_rows,
    tokens_of,
)
from tests.support.moe_models import (
    ExpertBlock,
    copy_random_factors,
    file_gradients,
    file_parameters,
    moe_model,
    routed_tokens,
    stacks_of,
)
from tests.support.peft_twins import peft

# Transposed or not, with and without a gate, a bias, and a gate of their own.
KINDS = ["qwen3_moe", "gpt_oss", "nemotron_h"]
DOUBLE = torch.float64


def block(
    kind: str,
    dtype: torch.dtype = DOUBLE,
    library: Any = fastlora,
    implementation: str = "eager",
    wide: bool = True,
    **config: Any,
) -> Any:
    """A block of experts with an adapter, the same in both libraries."""
    base = ExpertBlock(kind, dtype, implementation)
    torch.manual_seed(1)
    config = {"target_parameters": stacks_of(base), "target_modules": [], **config}
    settings = library.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})
    model = library.get_peft_model(base, settings, autocast_adapter_dtype=wide)
    copy_random_factors([model])
    return model


def step(model: Any, tokens: int = 24, run: Any = None) -> dict[str, torch.Tensor]:
    """The output and every gradient of a step."""
    model.zero_grad()
    dtype = next(p for n, p in model.named_parameters() if "experts" in n and "lora" not in n).dtype
    x, index, weights = routed_tokens(tokens, dtype)
    y = model(x, index, weights) if run is None else run(model, x, index, weights)
    generator = torch.Generator().manual_seed(4)
    (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum().backward()
    found = {"y": y.detach(), "x": x.grad, "weights": weights.grad, **file_gradients(model)}
    assert all(value is not None for value in found.values())
    return found  # type: ignore[return-value]


def as_truth(model: Any) -> Any:
    """The same model in float64."""
    return copy.deepcopy(model).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_values_and_every_gradient_are_within_the_budget(
    kind: str, implementation: str, dtype: torch.dtype, wide: bool
) -> None:
    if dtype == torch.float32 and not wide:
        pytest.skip("the factors are fp32 in both cases")
    ours = block(kind, dtype, implementation=implementation, wide=wide)
    theirs = block(kind, dtype, peft, wide=wide)
    for key, factor in file_parameters(ours).items():
        assert torch.equal(factor, file_parameters(theirs)[key]), key
        assert factor.dtype == (torch.float32 if wide else dtype)
    truth, runs, found = step(as_truth(theirs)), [step(theirs)], step(ours)
    if not wide:  # PEFT rounds the sum of weight and update, and not the update alone.
        runs.append(step(ours, run=looped))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        same = run_with_largest_error([run[name] for run in runs], truth[name])
        assert value.dtype == same.dtype
        assert_within_budget(value, same, truth[name], name)


@pytest.mark.parametrize("init", [True, False, "gaussian"])
def test_the_same_seed_gives_pefts_initial_values(init: Any) -> None:
    ours, theirs = (
        library.get_peft_model(base, config)
        for library in (fastlora, peft)
        for base in [ExpertBlock("gpt_oss", torch.float32)]
        for config in [
            library.LoraConfig(
                r=3,
                target_modules=[],
                target_parameters=["experts.down_proj", "experts.gate_up_proj"],
                init_lora_weights=init,
            )
        ]
        if torch.manual_seed(5)
    )
    found, expected = file_parameters(ours), file_parameters(theirs)
    assert list(found) and found.keys() == expected.keys()
    for key, factor in found.items():
        assert torch.equal(factor, expected[key]), key


# ------------------------------------------------------------------------------- mixed batches


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_mixed_batch_is_each_adapter_alone(kind: str, dropout: float) -> None:
    model = mixed_block(kind, dropout)
    inputs = batch_inputs()
    y, dx, gradients = run_rows(model, ROWS, *inputs)
    for name in (None, *RANKS):
        samples = [number for number, row in enumerate(ROWS) if row == name]
        own = tokens_of(samples)
        alone = run_rows(model, [name] * len(samples), *(t[own] for t in inputs))
        torch.testing.assert_close(y[own], alone[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dx[own], alone[1], rtol=1e-12, atol=1e-12)
        if name is None:
            with model.disable_adapter():
                torch.testing.assert_close(y[own], model(*(t[own] for t in inputs)).detach())
            continue
        for key, gradient in gradients[name].items():
            assert gradient is not None and gradient.abs().max() > 0, key
            torch.testing.assert_close(gradient, alone[2][name][key], rtol=1e-11, atol=1e-11)
        others = [g for other in RANKS if other != name for g in alone[2][other].values()]
        assert all(gradient is None for gradient in others)  # They have no rows.
        if not dropout:
            model.set_adapter(name)
            expected = model(*(t[own] for t in inputs)).detach()
            torch.testing.assert_close(y[own], expected, rtol=1e-12, atol=1e-12)
            model.set_adapter(list(RANKS))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_interleaving_samples_of_different_adapters_changes_nothing(dropout: float) -> None:
    """With dropout, the samples of one adapter keep their order."""
    model = mixed_block("qwen3_moe", dropout)
    inputs = batch_inputs()
    order = [4, 6, 0, 2, 3, 1, 5, 7] if dropout else [7, 5, 1, 0, 6, 2, 4, 3]
    moved = tokens_of(order)
    y, dx, gradients = run_rows(model, ROWS, *inputs)
    found = run_rows(model, [ROWS[sample] for sample in order], *(t[moved] for t in inputs))
    torch.testing.assert_close(found[0], y[moved], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], dx[moved], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[2], gradients, rtol=1e-11, atol=1e-11)


def test_dropout_acts_on_adapters_alone_and_only_in_training() -> None:
    model = mixed_block("qwen3_moe", 0.5)
    inputs = batch_inputs()
    trained = run_rows(model, ROWS, *inputs)[0]
    model.eval()
    evaluated = run_rows(model, ROWS, *inputs)[0]
    changed = (trained - evaluated).abs().amax(1).unflatten(0, (-1, EACH)).amax(1) > 1e-6
    assert changed.tolist() == [row is not None for row in ROWS]
    model.train().set_adapter("a")
    torch.manual_seed(0)
    first = model(*inputs)
    torch.manual_seed(0)
    assert torch.equal(first, model(*inputs)) and not torch.equal(first, model(*inputs))


def test_each_pass_of_a_block_has_its_own_masks() -> None:
    model, inputs, found = mixed_block("qwen3_moe", 0.5), batch_inputs(), []

    def passes(x: torch.Tensor, *routed: torch.Tensor) -> torch.Tensor:
        found.extend(model(x, *routed) for _ in range(2))
        return found[0]

    first = run_rows(model, ROWS, *inputs)[0]
    y = run_rows(model, ROWS, *inputs, run=passes)[0]
    assert torch.equal(y, first) and not torch.allclose(found[0], found[1])


def test_nan_in_an_adapter_stays_in_its_rows() -> None:
    model = mixed_block("gpt_oss")
    inputs = batch_inputs()
    expected = run_rows(model, ROWS, *inputs)
    for factor in file_parameters(model, "c").values():
        factor.data.fill_(float("nan"))
    y, dx, gradients = run_rows(model, ROWS, *inputs)
    others = tokens_of([number for number, row in enumerate(ROWS) if row != "c"])
    assert torch.equal(y[others], expected[0][others])
    assert torch.equal(dx[others], expected[1][others])
    assert y[tokens_of([3])].isnan().all()
    for name in ("a", "b", "d"):
        torch.testing.assert_close(gradients[name], expected[2][name], rtol=0, atol=0)


def test_unused_adapters_get_zeros_for_other_processes() -> None:
    model = mixed_block("qwen3_moe")
    inputs = [t.detach() for t in routed_tokens(2 * EACH, DOUBLE)]
    with fastlora.adapters(model, ["a", None], unused_gradients=True):
        model(inputs[0].unflatten(0, (2, EACH)), *inputs[1:]).sum().backward()
    for name in RANKS:
        for key, gradient in file_gradients(model, name).items():
            assert gradient is not None and bool(gradient.any()) == (name == "a"), (name, key)


# ----------------------------------------------------- compiled, checkpointed, and under autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_graph(dtype: torch.dtype) -> None:
    """With a trainable scaling of PEFT's, another value does not recompile."""
    torch._dynamo.reset()
    model = block("gpt_oss", dtype, implementation="grouped_mm")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 2.0):
        for layer in model.base_model.model.experts.adapted_parameters():
            layer.set_scale("default", scale)
        expected = step(model)
        with torch._dynamo.config.patch(error_on_recompile=scale > 1):
            found = step(model, run=lambda _, *inputs: compiled(*inputs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    x, index, weights = routed_tokens(24, dtype)
    index[3, 1] = 4  # An index out of range makes the output of its token NaN.
    y = compiled(x, index, weights)
    assert y[3].isnan().all() and not y[[2, 4]].isnan().any()


@pytest.mark.parametrize(("dropout", "dtype"), [(0.0, torch.bfloat16), (0.2, torch.float32)])
def test_one_graph_for_every_mix(dropout: float, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    model = mixed_block("qwen3_moe", dropout, dtype)
    inputs = batch_inputs(dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (ROWS, ["c", "a", None, "d", "b", "b", None, "c"]):
        expected = run_rows(model, rows, *inputs)
        with torch._dynamo.config.patch(error_on_recompile=rows is not ROWS):
            found = run_rows(model, rows, *inputs, run=compiled)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_operators() -> None:
    """Fake results have the shapes, strides, and dtypes of real ones."""
    x, stack = torch.randn(6, 8), torch.randn(3, 12, 8)
    rows = sort_rows(torch.tensor([0, 4, 1, 3, 3, 0]), 6, 6)
    factors = [[torch.randn(3, r, n) for r in (2, 3)] for n in (8, 12)]
    seeds = torch.arange(6)
    given = (*factors, torch.ones(2), [0.5, 0.0], seeds, rows.operator_arguments(), "eager")
    y = torch.randn(6, 12)
    operators, checks = torch.ops.fastlora, ("test_schema", "test_faketensor")
    starts = rows.slot_start[::2].contiguous()
    opcheck(operators.grouped_products.default, (x, stack, starts), test_utils=checks)
    opcheck(operators.stacked_updates.default, (y, x, *given), test_utils=checks)
    s = torch.randn(6, 3)
    wants = (True, [True, True, False, True])
    for dx in (None, torch.randn(6, 8)):
        arguments = (y, x, s, *given, *wants, dx)
        opcheck(operators.stacked_gradients.default, arguments, test_utils=checks)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    """The repeated forward draws the same dropout masks."""
    model = block("gpt_oss", lora_dropout=0.3).train()

    def checkpointed(_: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, *inputs, use_reentrant=reentrant)

    torch.manual_seed(3)
    expected = step(model)
    torch.manual_seed(3)
    torch.testing.assert_close(step(model, run=checkpointed), expected, rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints_of_mixed_batches(reentrant: bool) -> None:
    """Every adapter has its own masks and gradients, also in a backward after the block."""
    model, inputs = mixed_block("qwen3_moe", 0.3), batch_inputs()

    def checkpointed(*given: torch.Tensor) -> torch.Tensor:
        return checkpoint(model, *given, use_reentrant=reentrant)

    expected = run_rows(model, ROWS, *inputs)
    torch.testing.assert_close(run_rows(model, ROWS, *inputs, run=checkpointed), expected)


def test_autocast_of_mixed_batches() -> None:
    """As one adapter at a time, within the rounding of the outputs."""
    model, inputs = mixed_block("gpt_oss", dtype=torch.float32), batch_inputs(torch.float32)
    # Base rows alone run in the implementation of the model. Autocast affects the eager one.
    model.base_model.model.experts.base_layer.config._experts_implementation = "grouped_mm"

    def under_autocast(*given: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made: torch.Tensor = model(*given)
        return made

    y, dx, gradients = run_rows(model, ROWS, *inputs, run=under_autocast)
    for name in (None, *RANKS):
        samples = [number for number, row in enumerate(ROWS) if row == name]
        own = tokens_of(samples)
        given = [name] * len(samples), *(t[own] for t in inputs)
        alone = run_rows(model, *given, run=under_autocast)  # type: ignore[arg-type]
        torch.testing.assert_close((y[own], dx[own]), alone[:2])
        if name is not None:
            torch.testing.assert_close(gradients[name], alone[2][name], rtol=1e-4, atol=1e-4)


def test_autocast_computes_in_the_dtype_of_the_weights() -> None:
    model, theirs = (block("qwen3_moe", torch.float32, lib) for lib in (fastlora, peft))
    theirs.base_model.model.experts.get_base_layer().config._experts_implementation = "grouped_mm"

    def under_autocast(own: Any, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            made: torch.Tensor = own(*inputs)
        return made

    found, expected = (step(own, run=under_autocast) for own in (model, theirs))
    for name, value in found.items():
        assert value.dtype == expected[name].dtype == torch.float32
        torch.testing.assert_close(value, expected[name], msg=name)


# --------------------------------------------------------------------------- inputs, and caches


def test_no_tokens_and_choices_out_of_range() -> None:
    model = block("gpt_oss")
    x, index, weights = routed_tokens(4, DOUBLE)
    y = model(x[:0], index[:0], weights[:0])
    assert y.shape == (0, 16)
    y.sum().backward()
    assert not any(g is not None and g.any() for g in file_gradients(model).values())
    index[1, 1] = 7
    with pytest.raises(ValueError, match="top_k_index contains 7, expected .* 4 experts"):
        model(x, index, weights)
    index[1, 1] = -1
    with pytest.raises(ValueError, match="top_k_index contains -1"):
        model(x, index, weights)


def test_mixed_batches_without_tokens_and_with_choices_out_of_range() -> None:
    """The error names the value, and later batches are right."""
    model, (x, index, weights) = mixed_block("gpt_oss"), batch_inputs()
    expected = run_rows(model, ROWS, x, index, weights)[0]
    y, dx, gradients = run_rows(model, ["a", None], x[:0], index[:0], weights[:0], each=0)
    assert y.shape == dx.shape == (0, 16)
    assert not any(g is not None and g.any() for own in gradients.values() for g in own.values())
    for bad in (4, -1):
        chosen = index.clone()
        chosen[1, 1] = bad
        with pytest.raises(ValueError, match=f"top_k_index contains {bad}, expected .* 4 experts"):
            run_rows(model, ROWS, x, chosen, weights)
    assert torch.equal(run_rows(model, ROWS, x, index, weights)[0], expected)


def test_the_report_names_the_implementation_that_is_replaced() -> None:
    report = str(fastlora.fusion_report(block("qwen3_moe", implementation="grouped_mm")))
    words = "grouped products with LoRA replace experts_implementation='grouped_mm'"
    assert words in " ".join(report.split())


def test_sentinels_of_expert_parallelism_add_nothing() -> None:
    model = block("gpt_oss")
    x, index, weights = routed_tokens(4, DOUBLE)
    weights = weights.detach().clone()
    weights[1, 1] = 0.0
    expected = model(x, index, weights).detach()
    model.base_model.model.experts.base_layer._is_expert_parallel = True
    index[1, 1] = 4
    weights.requires_grad_()
    y = model(x, index, weights)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert weights.grad is not None and weights.grad[1, 1] == 0 and weights.grad[0, 0] != 0


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("kind", KINDS)
def test_sentinels_of_expert_parallelism_get_nothing_of_any_expert(
    kind: str, dtype: torch.dtype
) -> None:
    """NaN in the last expert, and in memory that is not written, stays out of all gradients."""
    model = block(kind, dtype, implementation="grouped_mm")
    experts = model.base_model.model.experts
    experts.base_layer._is_expert_parallel = True
    x, index, weights = routed_tokens(4, dtype)
    index[index == 3] = 4  # No token chooses the last expert.
    index[2] = 4
    chosen = model(x, index, weights)
    chosen.sum().backward()
    expected = [x.grad.clone(), *(g.clone() for g in file_gradients(model).values())]
    model.zero_grad()
    x.grad = None
    with torch.no_grad():
        for parameter in experts.base_layer.parameters():
            parameter[3] = float("nan")
    y = model(x, index, weights)
    assert torch.equal(y, chosen) and not y[2].any()
    y.sum().backward()
    for actual, wanted in zip([x.grad, *file_gradients(model).values()], expected, strict=True):
        assert torch.equal(actual, wanted)
    assert x.grad[0].any() and not x.grad[2].any()


def test_the_copy_of_lora_b_follows_every_write() -> None:
    """It is kept in evaluation. A write through ``.data`` changes no version."""
    model = block("qwen3_moe", torch.float32)
    layer = model.base_model.model.experts.adapted_parameters()[0]
    inputs = routed_tokens(8, torch.float32)

    def run() -> torch.Tensor:
        with torch.no_grad():
            made: torch.Tensor = model(*inputs)
        return made

    def kept() -> torch.Tensor:
        found: torch.Tensor = layer.rank_rows("default", layer.factors_in_file_shapes("default"))[1]
        return found

    model.eval()
    first, weight = run(), layer.lora_B["default"].weight
    with torch.no_grad():
        assert kept() is kept()
        weight.mul_(2.0)
        assert not torch.equal(run(), first)
        weight.mul_(0.5)
        assert torch.equal(run(), first)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(run(), first)
    weight.data.add_(1.0)
    fastlora.clear_caches(model)
    torch.testing.assert_close(run(), first)
    before = weakref.ref(kept())
    model.delete_adapter("default")
    assert before() is None


# ------------------------------------------------------------------------------ patched layers


@pytest.mark.parametrize("kind", KINDS)
def test_patched_layers_of_peft(kind: str) -> None:
    theirs, patched = block(kind, library=peft), block(kind, library=peft)
    report = fastlora.patch(patched)
    assert "FastLoraExperts computes it with its module" in str(report)
    wrapper = peft.tuners.lora.layer.ParamWrapper
    layer = patched.base_model.model.experts
    with mock.patch.object(
        peft.tuners.lora.layer.ParamWrapper, "forward", side_effect=AssertionError
    ):
        found = step(patched)
    torch.testing.assert_close(found, step(theirs), rtol=1e-11, atol=1e-11)
    assert layer.state_dict().keys() == theirs.base_model.model.experts.state_dict().keys()
    for model in (theirs, patched):
        targets = stacks_of(ExpertBlock(kind, DOUBLE))
        torch.manual_seed(2)
        model.add_adapter(
            "second", peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
        )
        copy_random_factors([model], "second", seed=12)
        model.base_model.set_adapter(["default", "second"])
        for module in model.modules():
            if isinstance(module, wrapper):
                module.scaling["second"] = 1.5
    inputs = [t.detach() for t in routed_tokens(12, DOUBLE)]
    torch.testing.assert_close(patched(*inputs), theirs(*inputs))
    with patched.disable_adapter():
        torch.testing.assert_close(patched(*inputs), ExpertBlock(kind, DOUBLE, "eager")(*inputs))
    with (
        pytest.raises(UnsupportedLayerError, match="ParamWrapper"),
        fastlora.adapters(patched, ["default"] * 12),
    ):
        patched(*inputs)
    patched.merge_adapter()
    torch.testing.assert_close(patched(*inputs), theirs(*inputs))
    patched.unmerge_adapter()
    torch.testing.assert_close(copy.deepcopy(patched)(*inputs), theirs(*inputs))
    fastlora.unpatch(patched)
    assert type(layer) is wrapper
    torch.testing.assert_close(patched(*inputs), theirs(*inputs))


# -------------------------------------------------------- experts of all tokens, routers, copies


class AllTokens(nn.Module):
    """Llama 4's experts, which get every token."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = moe_model("llama4_text", DOUBLE).model.layers[1].feed_forward.experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., H]`` to ``[..., H]``, by the sum of all experts."""
        y: torch.Tensor = self.experts(x.reshape(-1, x.shape[-1]).repeat(4, 1))
        return y.view(4, *x.shape).sum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_all_tokens_are_within_the_budget(dtype: torch.dtype) -> None:
    """Values and every gradient, with the factors in fp32."""
    models = []
    for library in (fastlora, peft):
        base = AllTokens().to(dtype)
        config = library.LoraConfig(r=4, target_modules=[], target_parameters=stacks_of(base))
        torch.manual_seed(1)
        models.append(library.get_peft_model(base, config))
    copy_random_factors(models)

    def run(model: Any) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        dtype = model.base_model.model.experts.get_base_layer().down_proj.dtype
        x = torch.randn(24, 16, generator=generator).bfloat16().to(dtype).requires_grad_()
        y = model(x)
        (y * torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)).sum().backward()
        return {"y": y.detach(), "x": x.grad, **file_gradients(model)}  # type: ignore[dict-item]

    truth = run(as_truth(models[1]))
    found, same = map(run, models)
    assert found.keys() == truth.keys()
    for name, value in found.items():
        assert value.dtype == same[name].dtype
        assert_within_budget(value, same[name], truth[name], name)


def all_tokens() -> Any:
    """With two adapters that train."""
    base, model = AllTokens(), None
    targets = stacks_of(base)
    for r, name in ((3, "default"), (2, "second")):
        config = LoraConfig(r=r, target_modules=[], target_parameters=targets)
        if model is None:
            model = fastlora.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
        copy_random_factors([model], name, seed=r)
    assert model is not None
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize("rows", [None, ["second", None, "default"]])
def test_experts_of_all_tokens_in_one_graph(rows: list[str | None] | None) -> None:
    torch._dynamo.reset()
    model, x, found = all_tokens(), torch.randn(3, 5, 16, dtype=DOUBLE), []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with contextlib.nullcontext() if rows is None else fastlora.adapters(model, rows):
            y = run(x)
        y.square().sum().backward()
        gradients = [file_gradients(model, name) for name in ("default", "second")]
        found.append((y.detach(), *gradients))
    torch.testing.assert_close(*found)
    for sample, name in enumerate(rows or ()):
        with model.disable_adapter() if name is None else contextlib.nullcontext():
            model.base_model.set_adapter(name or "default")
            torch.testing.assert_close(found[0][0][sample], model(x)[sample].detach())


def test_a_router_in_one_graph() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = moe_model("qwen3_moe").model.layers[0].mlp.gate

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.gate(x)[0]
            return logits

    torch._dynamo.reset()
    config = LoraConfig(r=3, target_modules=[], target_parameters=["gate.weight"])
    model, x = fastlora.get_peft_model(Routed(), config), torch.randn(6, 16)
    before = model(x)
    copy_random_factors([model])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(model(x), before)


def test_copies_have_stacks_of_their_own() -> None:
    model, x = all_tokens(), torch.randn(3, 5, 16, dtype=DOUBLE)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            other.base_model.model.experts.base_layer.down_proj.mul_(2.0)
        assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)
        other.merge_adapter()
        assert torch.equal(model(x), expected)
    model.to(torch.float32)
    torch.testing.assert_close(model(x.float()).double(), expected, rtol=1e-4, atol=1e-4)
