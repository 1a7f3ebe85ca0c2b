"""Adapters on the experts of whole models: against PEFT in training, in files, and merged."""

from __future__ import annotations

import importlib
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors.torch import load_file

import fastlora
from fastlora import LoraModel
from fastlora.optimizers import create_lorafa_optimizer
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError
from tests.support.moe_models import (
    MODELS,
    copy_random_factors,
    file_gradients,
    file_parameters,
    moe_model,
    stacks_of,
)
from tests.support.peft_twins import peft
from tests.support.tiny import unchanged

DOUBLE = torch.float64


def batch(seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 32, (3, 7), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=batch() if ids is None else ids).logits
    return found


def adapted(kind: str, library: Any = fastlora, **config: Any) -> Any:
    """A float64 model with an adapter on its stacks and attention, the same in both libraries."""
    base = moe_model(kind, DOUBLE, "" if kind == "llama4_text" else "eager")
    torch.manual_seed(1)
    config = {"target_parameters": stacks_of(base), "target_modules": ["o_proj"], **config}
    settings = library.LoraConfig(**{"r": 3, "lora_alpha": 8, **config})
    return library.get_peft_model(base, settings)


@pytest.mark.parametrize("kind", MODELS)
def test_ten_losses_and_every_gradient_are_pefts(kind: str) -> None:
    losses, models = [], [adapted(kind), adapted(kind, peft)]
    ours, theirs = (file_parameters(model) for model in models)
    assert ours.keys() == theirs.keys()
    for key, factor in ours.items():
        assert torch.equal(factor, theirs[key]), key
    copy_random_factors(models)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        run = []
        for step in range(10):
            optimizer.zero_grad()
            loss = logits(model, batch(step)).square().mean()
            loss.backward()
            run.append(loss.detach())
            optimizer.step()
        losses.append(torch.stack(run))
    # transformers computes norms, routers, and sums of experts in fp32.
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = [file_gradients(model) for model in models]
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        expected = gradients[1][key]
        assert gradient is not None and expected is not None, key
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), key


@pytest.mark.parametrize("kind", MODELS)
def test_files_are_pefts_both_ways(kind: str, tmp_path: Path) -> None:
    ours, theirs = adapted(kind), adapted(kind, peft)
    copy_random_factors([ours, theirs])
    expected = logits(theirs).detach()
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    found, wanted = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs")
    )
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor, wanted[key]), key
    base = ours.unload(), theirs.unload()
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(base[1], tmp_path / "ours")), expected
    )
    loaded = LoraModel.from_pretrained(base[0], tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), expected)
    loaded.load_adapter(tmp_path / "ours", "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), expected)


@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4_text", "gpt_oss"])
def test_merging_is_undone_bit_for_bit(kind: str) -> None:
    model = adapted(kind)
    before = {n: p.clone() for n, p in model.named_parameters() if "lora" not in n}
    copy_random_factors([model])
    expected = logits(model).detach()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    for name, value in before.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    model.merge_adapter(keep_base=False)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_merged_weights_are_pefts() -> None:
    models = [adapted("gpt_oss"), adapted("gpt_oss", peft)]
    copy_random_factors(models)
    ours, theirs = (model.merge_and_unload().state_dict() for model in models)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ several adapters


def two_adapters(kind: str = "qwen3_moe", **second: Any) -> Any:
    """A model with the adapters default and second."""
    model = adapted(kind)
    config = {"target_modules": ["o_proj"], "target_parameters": stacks_of(moe_model(kind))}
    config |= second
    model.add_adapter("second", fastlora.LoraConfig(**{"r": 2, "lora_alpha": 3, **config}))
    copy_random_factors([model])
    copy_random_factors([model], "second", seed=10)
    return model.eval()


def merged_logits(model: Any, *names: str) -> torch.Tensor:
    """The logits with adapters merged by PEFT's formula, in float64."""
    model.merge_adapter(list(names))
    found = logits(model).detach()
    model.unmerge_adapter()
    return found


def test_several_active_adapters_and_none() -> None:
    model = two_adapters()
    expected = merged_logits(model, "default", "second")
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), expected)
    logits(model).sum().backward()
    for name in ("default", "second"):
        assert all(g is not None and g.any() for g in file_gradients(model, name).values())
    with model.disable_adapter():
        off = logits(model)
    torch.testing.assert_close(off, logits(moe_model("qwen3_moe", DOUBLE, "eager")))
    model.set_adapter("second")
    torch.testing.assert_close(logits(model), merged_logits(model, "second"))


def test_adapters_on_different_parameters(tmp_path: Path) -> None:
    """File names depend on the parameters of one adapter alone."""
    one = ["experts.gate_up_proj"]
    model = two_adapters(target_parameters=one, target_modules=[])
    model.set_adapter("second")
    expected = logits(model).detach()
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "second" / "adapter_model.safetensors").keys()
    assert keys and not [key for key in keys if "base_layer" in key]
    theirs = peft.PeftModel.from_pretrained(
        moe_model("qwen3_moe", DOUBLE, "eager"), tmp_path / "second"
    )
    torch.testing.assert_close(logits(theirs), expected)
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), expected)
    assert set(model.peft_config) == {"second"}
    model.delete_adapter("second")
    torch.testing.assert_close(logits(model), logits(moe_model("qwen3_moe", DOUBLE, "eager")))


def test_a_later_adapter_on_more_parameters() -> None:
    """Its stack is new on a layer that has run in mixed batches before."""
    one = stacks_of(moe_model("qwen3_moe"))[:1]
    model = adapted("qwen3_moe", target_parameters=one, target_modules=[])
    copy_random_factors([model])
    with fastlora.adapters(model, ["default", None, "default"]):
        logits(model)
    config = {"target_modules": [], "target_parameters": stacks_of(moe_model("qwen3_moe"))}
    model.add_adapter("second", fastlora.LoraConfig(r=2, lora_dropout=0.5, **config))
    copy_random_factors([model], "second", seed=10)
    assert len(model.base_model.targeted_parameter_names) == 4
    assert model.base_model.targeted_module_names == []
    with fastlora.adapters(model, ["second", None, "second"]):
        found = logits(model)
    model.set_adapter("second")
    torch.testing.assert_close(found[[0, 2]], logits(model)[[0, 2]])
    layers = fastlora.model.inject.lora_layers(model.base_model.model).values()
    numbers = [layer.routing_index for layer in layers]
    assert len(set(numbers)) == len(numbers) == 6
    model.delete_adapter("second")
    assert len(model.base_model.targeted_parameter_names) == 2


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_weighted_sums(kind: str) -> None:
    """Of equal adapters on all matrices, so that each kind is exact."""
    model = two_adapters(r=3)
    factors = [file_parameters(model, name) for name in ("default", "second")]
    if kind == "linear":  # exact if one factor is shared
        for key, factor in factors[1].items():
            factor.data.copy_(factors[0][key])
    options = {"svd_rank": 6} if kind == "svd" else {}
    weights = [0.5, 0.25] if kind == "linear" else [0.5, -2.0]
    model.add_weighted_adapter(["default", "second"], weights, "sum", kind, **options)
    assert model.peft_config["sum"].target_parameters
    expected = {}
    for name, layer in fastlora.model.inject.lora_layers(model.base_model.model).items():
        if layer.r:
            deltas = [layer.get_delta_weight(adapter) for adapter in ("default", "second")]
            expected[name] = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
            if kind == "linear":
                scales = [0.5 * layer.scaling["default"], 0.25 * layer.scaling["second"]]
                product = deltas[0] / layer.scaling["default"]
                expected[name] = product * sum(scale**0.5 for scale in scales) ** 2
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected[name])
    assert len(expected) == 6  # two layers, each with one linear and two stacks


def test_pefts_lora_layers_are_those_with_factors() -> None:
    """A loop over them finds the adapter of every parameter, as in PEFT."""
    found = []
    for library in (fastlora, peft):
        model = adapted("qwen3_moe", library)
        copy_random_factors([model])
        layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        assert [layer.r for layer in layers] == [{"default": 3}] * 6
        found.append([float(layer.get_delta_weight("default").detach().norm()) for layer in layers])
    torch.testing.assert_close(*(torch.tensor(sorted(norms)) for norms in found))


def test_reducing_the_rank() -> None:
    model = adapted("gpt_oss")
    copy_random_factors([model])
    report = fastlora.reduce_rank(model, 3, "default", "same")
    assert max(report.errors.values()) < 1e-12 and set(report.ranks.values()) == {3}
    before = logits(model).detach()
    model.set_adapter("same")
    torch.testing.assert_close(logits(model), before)
    report = fastlora.reduce_rank(model, 1, "default", "less")
    layer = fastlora.model.inject.lora_layers(model.base_model.model)
    for name, error in report.errors.items():
        full, less = (layer[name].get_delta_weight(a) for a in ("default", "less"))
        assert abs(float((full - less).norm() / full.norm()) - error) < 1e-9
        assert layer[name].r["less"] == 1


def test_hot_swap(tmp_path: Path) -> None:
    """Of an adapter of larger rank on one of the stacks."""
    one = ["experts.gate_up_proj"]
    other = adapted("qwen3_moe", r=5, target_parameters=one)
    copy_random_factors([other], seed=21)
    other.save_pretrained(tmp_path)
    model = adapted("qwen3_moe")
    copy_random_factors([model])
    fastlora.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(other))
    model.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(moe_model("qwen3_moe", DOUBLE, "eager"), tmp_path / "again")
    torch.testing.assert_close(logits(again), logits(other))


# ------------------------------------------------------------ weights of linear layers


Q, V = "q_proj.weight", "v_proj.weight"


def with_adapters(**configs: dict[str, Any]) -> LoraModel:
    """A float64 model with random adapters that are named as the arguments."""
    base = moe_model("qwen3_moe", DOUBLE, "eager")
    made = {name: fastlora.LoraConfig(**{"lora_alpha": 4, **c}) for name, c in configs.items()}
    first, *others = made
    model = fastlora.get_peft_model(base, made[first], first)
    for name in others:
        model.add_adapter(name, made[name])
    for seed, name in enumerate(made):
        copy_random_factors([model], name, seed)
    return model


def deltas(model: Any, adapter: str) -> dict[str, torch.Tensor]:
    layers = fastlora.model.inject.lora_layers(model.base_model.model).items()
    return {name: layer.get_delta_weight(adapter) for name, layer in layers if adapter in layer.r}


def check_files(model: Any, adapter: str, folder: Path) -> None:
    """Saves the adapter, and compares the logits of both libraries with the model's."""
    model.set_adapter(adapter)
    expected = logits(model).detach()
    assert float((expected - logits(moe_model("qwen3_moe", DOUBLE, "eager"))).abs().max()) > 1e-3
    model.save_pretrained(folder, selected_adapters=[adapter])
    folder = folder if adapter == "default" else folder / adapter
    for library in (LoraModel, peft.PeftModel):
        base = moe_model("qwen3_moe", DOUBLE, "eager")
        torch.testing.assert_close(logits(library.from_pretrained(base, folder)), expected)


@pytest.mark.parametrize("kind", ["cat", "svd"])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 3)])
@pytest.mark.parametrize(
    "targets",
    [
        ([Q], [V]),
        ([Q], ["experts.down_proj"]),
        (["0.self_attn.q_proj.weight", "experts.down_proj"], ["1.self_attn.q_proj.weight"]),
    ],
)
def test_weighted_sums_over_weights_of_linear_layers(
    targets: tuple[list[str], ...], ranks: tuple[int, int], kind: str, tmp_path: Path
) -> None:
    one, two = ({"r": r, "target_parameters": t} for r, t in zip(ranks, targets, strict=True))
    model = with_adapters(default=one, second=two)
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", kind)
    expected = {n: 0.5 * d for n, d in deltas(model, "default").items()}
    expected |= {n: -2.0 * d for n, d in deltas(model, "second").items()}
    torch.testing.assert_close(deltas(model, "sum"), expected)
    check_files(model, "sum", tmp_path)


def test_a_weighted_sum_that_lists_weights_of_linear_layers_as_modules(tmp_path: Path) -> None:
    """The adapters select layers in different ways, so the patterns name modules."""
    one = {"r": 2, "target_parameters": [Q], "layers_to_transform": [0]}
    model = with_adapters(default=one, second={"r": 3, "target_parameters": [V]})
    model.add_weighted_adapter(["default", "second"], [0.5, -2.0], "sum", "cat")
    expected = {n: 0.5 * d for n, d in deltas(model, "default").items()}
    expected |= {n: -2.0 * d for n, d in deltas(model, "second").items()}
    assert model.peft_config["sum"].target_modules == set(expected)
    torch.testing.assert_close(deltas(model, "sum"), expected)
    check_files(model, "sum", tmp_path)


@pytest.mark.parametrize("rank", [0.5, 0.9])
def test_reducing_the_rank_of_weights_of_linear_layers(rank: float, tmp_path: Path) -> None:
    config = {
        "r": 4,
        "target_parameters": [Q, "experts.down_proj", "gate.weight"],
        "rank_pattern": {"gate.weight": 1, Q: 2},
    }
    model = with_adapters(default=config)
    report = fastlora.reduce_rank(model, rank, "default", "less")
    full, less = deltas(model, "default"), deltas(model, "less")
    assert len(set(report.ranks.values())) > 1
    for name, error in report.errors.items():
        assert abs(float((full[name] - less[name]).norm() / full[name].norm()) - error) < 1e-9, name
    check_files(model, "less", tmp_path)


@pytest.mark.parametrize("pattern", [{"alpha_pattern": {Q: 20}}, {"rank_pattern": {Q: 1}}])
@pytest.mark.parametrize("other", [V, "experts.down_proj"])
def test_a_hot_swap_of_weights_of_linear_layers(
    other: str, pattern: dict[str, Any], tmp_path: Path
) -> None:
    targets = {"target_parameters": [Q, other]}
    source = with_adapters(default={"r": 4, **targets, **pattern})
    source.save_pretrained(tmp_path / "source")
    model = with_adapters(default={"r": 2, **targets})
    fastlora.hotswap_adapter(model, tmp_path / "source", "default")
    torch.testing.assert_close(logits(model), logits(source))
    check_files(model, "default", tmp_path / "again")


@pytest.mark.parametrize("modules", [[], ["v_proj"]])
def test_eva_on_weights_of_linear_layers(modules: list[str], tmp_path: Path) -> None:
    """One layer gets another rank, and one none."""
    torch.manual_seed(0)
    parameters = [Q] if modules else [Q, V]
    config = fastlora.LoraConfig(
        r=3, target_modules=modules, target_parameters=parameters, init_lora_weights="eva"
    )
    model = fastlora.get_peft_model(moe_model("qwen3_moe", DOUBLE, "eager"), config)
    ranks = {"0.self_attn.q_proj": 5, "0.self_attn.v_proj": 2, "1.self_attn.q_proj": 0}
    state = {
        f"base_model.model.model.layers.{name}": torch.randn(rank, 16, dtype=DOUBLE)
        for name, rank in {**ranks, "1.self_attn.v_proj": 3}.items()
    }
    fastlora.initialize_lora_eva_weights(model, eva_state_dict=state)
    copy_random_factors([model])
    assert len(deltas(model, "default")) == 3
    assert not [n for n in model.base_model.targeted_parameter_names if "1.self_attn.q" in n]
    check_files(model, "default", tmp_path)


# ------------------------------------------------------------ routers, and other modules


ROUTERS = {
    "qwen3_moe": "mlp.gate.weight",
    "gpt_oss": "mlp.router.weight",
    "llama4_text": "router.weight",  # of a linear layer that returns two tensors, in one layer
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_are_pefts(kind: str) -> None:
    """The outputs are discrete choices besides weights, and small updates do not change them."""
    targets = {"target_parameters": [ROUTERS[kind]], "target_modules": []}
    models = [adapted(kind, **targets), adapted(kind, peft, **targets)]
    copy_random_factors(models)
    for model in models:
        logits(model).square().sum().backward()
    torch.testing.assert_close(*map(logits, models))
    ours, theirs = map(file_gradients, models)
    assert ours.keys() == theirs.keys() and len(ours) == (2 if kind == "llama4_text" else 4)
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[key])
    assert "each adapted parameter replaced" in str(fastlora.fusion_report(models[0]))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_mixed_batches_of_whole_models(kind: str) -> None:
    """With experts and a router, against each adapter alone; samples in any order."""
    model = adapted(kind)
    extra = [ROUTERS[kind]] if kind in ROUTERS else []
    parameters = {"target_parameters": [*stacks_of(moe_model(kind)), *extra]}
    config = {"target_modules": ["o_proj"], "r": 2, "lora_alpha": 3, **parameters}
    model.add_adapter("second", fastlora.LoraConfig(**config))
    copy_random_factors([model])
    copy_random_factors([model], "second", seed=10)
    model.base_model.set_adapter(["default", "second"])
    rows, ids = ["second", None, "default", "second"], batch()[[0, 1, 2, 0]]
    with fastlora.adapters(model, rows):
        found = logits(model, ids)
    found.square().sum().backward()
    gradients = {name: file_gradients(model, name) for name in ("default", "second")}
    for name in ("default", "second"):
        model.zero_grad()
        model.set_adapter(name)
        own = [number for number, row in enumerate(rows) if row == name]
        alone = logits(model, ids[own])
        torch.testing.assert_close(found[own], alone)
        alone.square().sum().backward()
        for key, gradient in file_gradients(model, name).items():
            torch.testing.assert_close(gradients[name][key], gradient)
    with model.disable_adapter():
        torch.testing.assert_close(found[1:2], logits(model, ids[1:2]))


def routers_with_two_adapters(kind: str) -> Any:
    """A model whose routers have the adapters default and second."""
    config = {"target_parameters": ["mlp.gate.weight"], "target_modules": ["o_proj"]}
    model = adapted(kind, **config)
    model.add_adapter("second", fastlora.LoraConfig(r=2, lora_alpha=3, **config))
    copy_random_factors([model])
    copy_random_factors([model], "second", seed=10)
    model.base_model.set_adapter(["default", "second"])
    return model.eval()


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_router_logits_of_mixed_batches(kind: str) -> None:
    """transformers records them with forward hooks of the routers."""
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    model, ids = routers_with_two_adapters(kind), batch()[[0, 1, 2, 0]]
    rows, mask = ["second", None, "default", "second"], torch.ones_like(ids)
    mask[0, :3] = mask[2, :2] = 0  # The auxiliary loss depends on the order of the rows.
    inputs = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True}
    with fastlora.adapters(model, rows):
        found = model(**inputs)
    (found.logits.square().sum() + 100 * found.aux_loss).backward()
    gradients = [file_gradients(model, name) for name in ("default", "second")]
    model.zero_grad()
    alone = {}
    for name in ("default", "second"):
        model.base_model.set_adapter(name)
        alone[name] = model(**inputs)
    with model.disable_adapter():
        alone[None] = model(**inputs)
    model.base_model.set_adapter(["default", "second"])
    expected = tuple(
        torch.cat(
            [
                alone[name].router_logits[layer].unflatten(0, (4, 7))[i]
                for i, name in enumerate(rows)
            ]
        )
        for layer in range(2)
    )
    assert len(found.router_logits) == len(expected)
    for ours, wanted in zip(found.router_logits, expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    config = model.config
    count = getattr(config, "num_experts", None) or config.num_local_experts
    loss = modeling.load_balancing_loss_func(expected, count, config.num_experts_per_tok, mask)
    torch.testing.assert_close(found.aux_loss, loss)
    outputs = torch.stack([alone[name].logits[i] for i, name in enumerate(rows)])
    (outputs.square().sum() + 100 * loss).backward()
    for name, own in zip(("default", "second"), gradients, strict=True):
        for key, gradient in file_gradients(model, name).items():
            assert gradient is not None and own[key] is not None, key
            torch.testing.assert_close(own[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "rows",
    [["second", None, "default"], ["default"] * 3, [None] * 3, None],
    ids=["mixed", "one adapter", "no adapter", "no block"],
)
def test_hooks_of_routers_run_once_with_the_whole_batch(rows: list[str | None] | None) -> None:
    model = routers_with_two_adapters("qwen3_moe")
    router = model.base_model.model.model.layers[0].mlp.gate
    calls: dict[str, list[Any]] = {"wrapper": [], "before": [], "after": [], "backward": []}

    def halve(module: Any, args: Any, kwargs: Any) -> Any:
        calls["before"].append(args[0])
        return (args[0] / 2, *args[1:]), kwargs

    def double(module: Any, args: Any, output: Any) -> Any:
        calls["after"].append((args[0], output))
        return (output[0] * 2, *output[1:])

    def count(module: Any, grad_input: Any, grad_output: Any) -> None:
        calls["backward"].append(len(grad_input[0]))

    def run(x: torch.Tensor) -> Any:
        with fastlora.adapters(model, rows) if rows else nullcontext():
            return router(x)

    x = torch.randn(6, 16, dtype=DOUBLE, requires_grad=True)
    expected = run(x / 2)
    router.register_forward_hook(lambda module, args, output: calls["wrapper"].append(output))
    base = router.base_layer
    base.register_forward_pre_hook(halve, with_kwargs=True)
    base.register_forward_hook(double)
    base.register_full_backward_hook(count)
    found = run(x)
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted * 2 if wanted is expected[0] else wanted)
    assert [len(calls[name]) for name in ("wrapper", "before", "after")] == [1, 1, 1]
    assert torch.equal(calls["before"][0], x) and torch.equal(calls["after"][0][0], x / 2)
    for ours, wanted in zip(calls["after"][0][1], expected, strict=True):
        torch.testing.assert_close(ours, wanted)
    assert torch.equal(calls["wrapper"][0][0], found[0])
    found[0].square().sum().backward()
    assert sum(calls["backward"]) == len(x)


def test_a_module_with_other_outputs_is_refused_in_mixed_batches() -> None:
    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.table).sum(0)

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pooled = Pooled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.pooled(x)

    model = fastlora.get_peft_model(
        Outer(), fastlora.LoraConfig(target_modules=[], target_parameters=["pooled.table"])
    )
    copy_random_factors([model])
    x = torch.randn(3, 4)
    assert model(x).shape == (4,)
    error = r"module 'pooled' \(Pooled, target_parameters 'table'\).* does not support mixed"
    with (
        pytest.raises(UnsupportedLayerError, match=error),
        fastlora.adapters(model, ["default", None, "default"]),
    ):
        model(x)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=False"),
        ({"target_parameters": ["experts.gate_up_proj_bias"]}, "'gate_up_proj_bias' is not one of"),
        ({"target_parameters": ["router.bias"]}, "expected 2 or 3 dimensions"),
    ],
)
def test_what_stacks_do_not_support_is_refused(change: dict[str, Any], error: str) -> None:
    """By the name of the parameter, with nothing changed."""
    base = moe_model("gpt_oss")
    config = {"target_modules": [], "target_parameters": stacks_of(base), **change}
    with unchanged(base), pytest.raises(UnsupportedLayerError, match=error) as raised:
        fastlora.get_peft_model(base, fastlora.LoraConfig(**config))
    assert "layers.0.mlp" in str(raised.value)


def test_quantized_stacks_and_other_implementations_are_refused() -> None:
    base, config = moe_model("qwen3_moe"), {"target_parameters": ["experts.down_proj"]}
    settings = fastlora.LoraConfig(target_modules=[], **config)
    base.config._experts_implementation_internal = "deepgemm"
    with pytest.raises(UnsupportedLayerError, match="down_proj.*deepgemm.*grouped_mm"):
        fastlora.get_peft_model(base, settings)
    experts = base.model.layers[0].mlp.experts
    experts.down_proj = torch.nn.Parameter(experts.down_proj.to(torch.float8_e4m3fn), False)
    with pytest.raises(UnsupportedLayerError, match=r"experts.down_proj' has dtype .*float8"):
        fastlora.get_peft_model(base, settings)


def test_an_adapter_on_parameters_and_one_on_the_module_exclude_each_other() -> None:
    class Table(torch.nn.Embedding):
        pass

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Table(4, 4)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.table(ids)
            return found

    module = {"target_modules": ["table"]}
    parameter = {"target_modules": [], "target_parameters": ["table.weight"]}
    for first, second in ((module, parameter), (parameter, module)):
        model = fastlora.get_peft_model(Outer(), fastlora.LoraConfig(**first))
        ids = torch.arange(4)
        copy_random_factors([model])
        before = model(ids)
        with pytest.raises(UnsupportedLayerError, match="same kind of target|must target either"):
            model.add_adapter("second", fastlora.LoraConfig(**second))
        assert torch.equal(model(ids), before) and list(model.peft_config) == ["default"]


def test_a_shared_stack_is_untied_before_a_merge() -> None:
    model = adapted("qwen3_moe", target_modules=None, target_parameters=["experts.down_proj"])
    copy_random_factors([model])
    layers = model.base_model.model.model.layers
    first, second = (layer.mlp.experts.base_layer for layer in layers)
    second.down_proj = first.down_proj
    expected = logits(model)
    with pytest.raises(AdapterStateError, match="shares its weight"):
        model.merge_adapter()
    with pytest.warns(UserWarning, match="shared its weight"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)


@pytest.mark.parametrize("target", ["experts.down_proj", "mlp.gate.weight", "q_proj.weight"])
def test_a_merged_model_that_is_converted_unmerges_exactly(target: str) -> None:
    model = adapted("qwen3_moe", target_modules=None, target_parameters=[target])
    copy_random_factors([model])
    before = {
        name: p.detach().float() for name, p in model.named_parameters() if "lora" not in name
    }
    model.merge_adapter()
    model.float()
    model.unmerge_adapter()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_moe", "mixtral"])
def test_copies_of_experts_in_a_mixed_batch(kind: str) -> None:
    """Each row meets its adapter's copy of all experts; the router's choices go along."""
    config = {"target_parameters": None, "target_modules": ["q_proj"]}
    model = adapted(kind, **config, modules_to_save=["experts"])
    other = fastlora.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["experts"])
    model.add_adapter("other", other)
    model.add_adapter("plain", fastlora.LoraConfig(r=2, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    fastlora.train_adapters(model, ["default", "other", "plain"])
    ids = torch.randint(0, 30, (4, 6), generator=generator)
    names = ["other", "default", None, "plain"]
    found, grads = {}, {}
    for mixed in (True, False):
        model.zero_grad()
        if mixed:
            y = model(input_ids=ids, adapter_names=names).logits
        else:
            rows = []
            for row, name in zip(ids, names, strict=True):
                with fastlora.adapters(model, [name]):
                    rows.append(model(input_ids=row[None]).logits)
            y = torch.cat(rows)
        y.square().sum().backward()
        found[mixed] = y.detach()
        grads[mixed] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found[True], found[False])
    for row, name in enumerate(names):
        model.set_adapter(name or "plain")
        with torch.no_grad(), nullcontext() if name else model.disable_adapter():
            alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(found[True][row : row + 1], alone)
    assert any("modules_to_save.other.down_proj" in name for name in grads[True])
    for name, grad in grads[False].items():
        torch.testing.assert_close(grads[True][name], grad, msg=lambda m, name=name: f"{name}: {m}")


def test_copies_get_their_rows_of_other_inputs() -> None:
    """By position and by keyword, in lists; inputs of other sizes are the same for all copies."""

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

        def forward(self, x: Any, factors: Any, bias: Any, *, shifts: Any) -> Any:
            return x * self.weight * factors + bias * shifts[0]

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.scaled = torch.nn.Linear(8, 8), Scaled()

        def forward(self, x: Any) -> Any:
            rows = self.q(x).flatten(0, 1)
            factors, bias = torch.arange(len(rows)).view(-1, 1), torch.ones(8)
            shifts = [torch.arange(len(rows)).view(-1, 1)]
            return self.scaled(rows, factors, bias, shifts=shifts).view_as(x)

    config = fastlora.LoraConfig(r=2, target_modules=["q"], modules_to_save=["scaled"])
    model = fastlora.get_peft_model(Outer(), config)
    model.add_adapter("other", config)
    base: Any = model.get_base_model()
    with torch.no_grad():
        base.scaled.modules_to_save["default"].weight.fill_(3.0)
        base.scaled.modules_to_save["other"].weight.fill_(5.0)
    x = torch.randn(3, 2, 8)
    y = model(x, adapter_names=["other", None, "default"])
    rows = torch.arange(6.0).view(3, 2, 1)
    weights = torch.tensor([5.0, 1.0, 3.0]).view(3, 1, 1)
    torch.testing.assert_close(y, base.q(x) * weights * rows + rows)


def test_hooks_of_experts_run_with_adapters() -> None:
    model = adapted("qwen3_moe")
    copy_random_factors([model])
    expected, calls = logits(model), []
    experts = model.base_model.model.model.layers[0].mlp.experts
    experts.base_layer.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(logits(model), expected)
    assert calls
    model.add_adapter("other", fastlora.LoraConfig(target_parameters=["experts.down_proj"]))
    with (
        pytest.raises(UnsupportedLayerError, match="has hooks"),
        fastlora.adapters(model, ["default", "other", None]),
    ):
        logits(model)


def _bind(module: Any) -> None:
    forward = type(module).forward
    module.forward = types.MethodType(lambda self, *args: forward(self, *args), module)


def _wrap(module: Any) -> None:
    forward = module.forward
    module.forward = lambda *args: forward(*args)


def _hook_by_accelerate(module: Any) -> None:
    add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))


def _compile_in_place(module: Any) -> None:
    module.compile(backend="eager")


@pytest.mark.parametrize("replace", [_bind, _wrap, _hook_by_accelerate, _compile_in_place])
@pytest.mark.parametrize("target", ["experts.down_proj", "mlp.gate.weight"])
def test_a_forward_that_was_replaced_on_the_instance(target: str, replace: Any) -> None:
    """It runs with the adapter, as under `accelerate.dispatch_model`."""
    found = []
    for replaces in (False, True):
        base = moe_model("qwen3_moe", DOUBLE, "eager")
        if replaces:
            for name, module in base.named_modules():
                if name.endswith(target.split(".")[-2]):
                    replace(module)
        config = fastlora.LoraConfig(r=2, target_modules=[], target_parameters=[target])
        model = fastlora.get_peft_model(base, config)
        before = logits(model)
        copy_random_factors([model])
        y = logits(model)
        y.square().sum().backward()
        found.append((y.detach(), file_gradients(model)))
        assert not torch.allclose(y, before)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("replace", [_bind, _wrap, _hook_by_accelerate, _compile_in_place])
def test_a_router_whose_forward_was_replaced_in_a_mixed_batch(replace: Any) -> None:
    found = []
    for replaces in (False, True):
        model = adapted("qwen3_moe", target_modules=None, target_parameters=["mlp.gate.weight"])
        copy_random_factors([model])
        for name, module in model.named_modules():
            if replaces and name.endswith("gate.base_layer"):
                replace(module)
        with fastlora.adapters(model, ["default", None, "default"]):
            found.append(logits(model).detach())
    torch.testing.assert_close(*found)


def test_experts_with_hooks_refuse_dropout_in_training() -> None:
    model = adapted("qwen3_moe", lora_dropout=0.5)
    experts = model.base_model.model.model.layers[0].mlp.experts
    experts.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedLayerError, match="does not support lora_dropout"):
        logits(model.train())
    logits(model.eval())


def test_an_adapter_on_an_offloaded_parameter_is_refused() -> None:
    model = adapted("qwen3_moe", target_modules=None, target_parameters=["mlp.gate.weight"])
    gate = model.base_model.model.model.layers[0].mlp.gate.base_layer
    gate.weight = torch.nn.Parameter(gate.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="'weight' is on the meta device"):
        logits(model)


def test_an_attribute_that_a_router_sets_in_its_forward() -> None:
    """It is set on the module, where a model reads it."""

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.loss = torch.nn.Parameter(torch.randn(4, 6)), torch.zeros(())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight.T
            self.loss = y.square().sum()
            return y

    router = Router()
    config = fastlora.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight"])
    model = fastlora.get_peft_model(torch.nn.Sequential(router), config)
    copy_random_factors([model])
    y = model(torch.randn(3, 6))
    torch.testing.assert_close(router.loss, y.square().sum())
    router.loss.backward()
    assert all(gradient.abs().sum() > 0 for gradient in file_gradients(model).values())


@pytest.mark.parametrize("how", ["subclass", "class"])
def test_a_class_of_experts_with_a_forward_of_its_own(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs, with each parameter and its update added, instead of grouped products."""
    base = moe_model("qwen3_moe", DOUBLE, "eager")
    kind = type(base.model.layers[0].mlp.experts)
    forward = kind.forward

    def twice(self: Any, *args: Any) -> Any:
        return 2 * forward(self, *args)

    if how == "class":
        monkeypatch.setattr(kind, "forward", twice)
    else:
        for module in base.modules():
            if type(module) is kind:
                module.__class__ = type("Experts", (kind,), {"forward": twice})
    expected = logits(base)
    config = fastlora.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = fastlora.get_peft_model(base, config)
    torch.testing.assert_close(logits(model), expected)
    copy_random_factors([model])
    y = logits(model)
    assert not torch.allclose(y, expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), y)


def test_lora_fa_and_unusable_names_raise() -> None:
    with pytest.raises(ConfigError, match="LoRA-FA does not support adapters on param"):
        create_lorafa_optimizer(adapted("qwen3_moe"), r=3, lora_alpha=8, lr=0.1)

    class Keys(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys = torch.nn.Parameter(torch.randn(2, 4, 4))

    model = torch.nn.Sequential(Keys())
    with pytest.raises(UnsupportedLayerError, match="has the same name as an attribute"):
        fastlora.get_peft_model(model, fastlora.LoraConfig(target_parameters=["keys"]))
