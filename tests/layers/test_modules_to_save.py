"""Modules that adapters own copies of, beside other adapters: never a target, whoever asks."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastlora import LoraConfig, LoraModel, adapters, get_peft_model
from fastlora.model.targets import find_target_modules
from fastlora.validation import UnsupportedLayerError
from tests.support.tiny import randomize, tiny_llama


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})


def adapted_names(model: LoraModel, adapter: str) -> set[str]:
    """The modules that an adapter has factors on."""
    modules = model.get_base_model().named_modules()
    return {name for name, module in modules if adapter in getattr(module, "lora_A", ())}


def names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules()}


def test_all_linear_beside_a_copied_head(tmp_path: Path) -> None:
    """The second adapter's modules are those that it has alone; both load alone, in any order."""
    pytest.importorskip("transformers")
    model = get_peft_model(
        tiny_llama(), config(target_modules="all-linear", modules_to_save=["lm_head"]), "a"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the head is no target anyway: nothing to say
        model.add_adapter("b", config(target_modules="all-linear", modules_to_save=["norm"]))
        model.add_adapter("c", config(target_modules="all-linear"))
    alone = get_peft_model(tiny_llama(), config(target_modules="all-linear"), "c")
    expected = adapted_names(alone, "c")
    assert len(expected) == 14
    for name in "abc":
        assert adapted_names(model, name) == expected
        targets = model.peft_config[name].target_modules
        assert targets == alone.peft_config["c"].target_modules

    randomize(model)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".modules_to_save." in key:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    x = torch.arange(12).reshape(2, 6)
    for first, second in ("ab", "ba", "cb", "ac"):
        loaded = LoraModel.from_pretrained(tiny_llama(), tmp_path / first, first)
        loaded.load_adapter(tmp_path / second, second)
        for name in (first, second):
            model.set_adapter(name)
            loaded.set_adapter(name)
            with torch.no_grad():
                assert torch.equal(model.eval()(x).logits, loaded.eval()(x).logits)
    model.load_adapter(tmp_path / "a", "a")  # and over what is there


def test_two_classifiers() -> None:
    """The head of a task is a copy for each; a saved list of targets has no path into one."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(**{**tiny_llama().config.to_dict(), "pad_token_id": 96})
    model = get_peft_model(
        transformers.LlamaForSequenceClassification(settings),
        config(target_modules="all-linear", task_type="SEQ_CLS"),
        "a",
    )
    model.add_adapter("b", config(target_modules="all-linear", task_type="SEQ_CLS"))
    for name in "ab":
        assert not [t for t in model.peft_config[name].target_modules if "score" in t]
        assert not [n for n in adapted_names(model, name) if "score" in n]
    assert list(model.get_base_model().score.modules_to_save) == ["a", "b"]


class Block(nn.Module):
    """A part with two linears, to be copied whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.down = nn.Linear(8, 8)


class Stack(nn.Module):
    """Many linears, so that saved names are shortened; and one known by two names."""

    def __init__(self, blocks: int = 12) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.again = self.shared


def test_all_linear_beside_a_copied_block() -> None:
    """What is left out is said, and the shortened names don't match it in a bare model either."""
    model = get_peft_model(
        Stack(), LoraConfig(r=2, target_modules=["shared"], modules_to_save=["blocks.3"]), "a"
    )
    with pytest.warns(UserWarning, match=r"leaves out 'blocks.3.up' and 1 more: it is inside 'bl"):
        model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear"))
    expected = {f"blocks.{i}.{part}" for i in range(12) for part in ("up", "down") if i != 3}
    assert adapted_names(model, "b") == expected | {"shared"}
    assert set(find_target_modules(Stack(), model.peft_config["b"])) == expected | {"shared"}


def test_a_copied_module_with_two_names() -> None:
    """As in the base model, its second name is no module of its own."""
    fields: dict[str, Any] = {"r": 2, "target_modules": ["up"], "modules_to_save": ["shared"]}
    model = get_peft_model(Stack(2), LoraConfig(**fields), "a")
    with pytest.warns(UserWarning, match="leaves out 'shared': it is a module that adapters"):
        model.add_adapter("b", LoraConfig(r=2, target_modules="all-linear"))
    assert adapted_names(model, "b") == {f"blocks.{i}.{p}" for i in (0, 1) for p in ("up", "down")}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["shared", "up"]}, r"target module 'blocks.1.up' is inside 'blocks.1'"),
        ({"target_modules": r"blocks\.\d\.up"}, r"'blocks.1.up' .* adapters \['a'\] own copies"),
        ({"target_modules": ["shared"], "modules_to_save": ["down"]}, "matches 'blocks.1.down'"),
        ({"target_modules": ["shared"], "modules_to_save": ["blocks"]}, "copies of 'blocks.1'"),
        ({"target_modules": ["modules_to_save.a.up", "shared", "head"]}, "'head' is a module that"),
    ],
)
def test_what_would_reach_into_a_copy_raises(fields: dict[str, Any], words: str) -> None:
    """By one typed error, before anything changes."""
    stack = nn.ModuleDict({"shared": nn.Linear(8, 8), "head": nn.Linear(8, 8)})
    stack["blocks"] = nn.Sequential(Block(), Block(), Block())
    model = get_peft_model(
        stack,
        LoraConfig(r=2, target_modules=["shared"], modules_to_save=["blocks.1", "head"]),
        "a",
    )
    before, adapters = names(model), list(model.peft_config)
    with pytest.raises(UnsupportedLayerError, match=words):
        model.add_adapter("b", LoraConfig(r=2, **fields))
    assert names(model) == before and list(model.peft_config) == adapters
    # Taken away by its own config, it is no target; neither is the inside of another's copy.
    own = {"target_modules": ["up", "modules_to_save.a.up"], "exclude_modules": ["blocks.1.up"]}
    with pytest.warns(UserWarning, match=r"entries \['modules_to_save.a.up'\]"):
        model.add_adapter("b", LoraConfig(r=2, **own))
    assert adapted_names(model, "b") == {"blocks.0.up", "blocks.2.up"}


class Halves(nn.Module):
    """Returns more than one tensor, and something else."""

    def __init__(self, scalar: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scalar = scalar

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return y[..., :4], {"rest": y[..., 4:], "none": None}, *([y.sum()] if self.scalar else [])


class OnHalves(nn.Module):
    def __init__(self, scalar: bool = False) -> None:
        super().__init__()
        self.lin, self.halves = nn.Linear(8, 8), Halves(scalar)

    def forward(self, x: torch.Tensor) -> Any:
        return self.halves(self.lin(x))


def saved_twice(base: nn.Module, saved: str = "halves") -> LoraModel:
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lin"]), "c")
    for name in "ab":
        model.add_adapter(name, LoraConfig(r=2, target_modules=["lin"], modules_to_save=[saved]))
        model.set_adapter(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
    return model


def test_several_tensors_in_a_mixed_batch() -> None:
    """Each of them has every sample's own copy's rows, and each copy the gradients of its own."""
    model, x = saved_twice(OnHalves()).double(), torch.randn(5, 3, 8, dtype=torch.float64)
    rows = ["b", None, "a", "c", "b"]

    def train() -> None:
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in key or "modules_to_save" in key)

    def gradients() -> dict[str, torch.Tensor]:
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {name: grad for name, grad in found.items() if grad.any()}

    train()
    first, others = model(x, adapter_names=rows)
    (first.square().sum() + others["rest"].square().sum()).backward()
    mixed = gradients()
    for i, name in enumerate(rows):
        with model.disable_adapter() if name is None else contextlib.nullcontext():
            if name is not None:
                model.set_adapter(name)
            train()
            one, other = model(x[i : i + 1])
        torch.testing.assert_close(first[i : i + 1], one)
        torch.testing.assert_close(others["rest"][i : i + 1], other["rest"])
        if name is not None:
            (one.square().sum() + other["rest"].square().sum()).backward()
    assert others["none"] is None
    torch.testing.assert_close(mixed, gradients())
    assert any(".a." in name for name in mixed) and any("lora_B.c" in name for name in mixed)
    with pytest.raises(UnsupportedLayerError, match=r"a Halves in modules_to_save .* shape \(\)"):
        saved_twice(OnHalves(scalar=True)).double()(x, adapter_names=rows)


class Masked(nn.Module):
    """Has an input for each sample and settings beside x."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: Any = None, setting: Any = None) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y if mask is None else y * mask


class OnMasked(nn.Module):
    """Its other inputs are for the module that is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.masked = nn.Linear(8, 8), Masked()

    def forward(self, x: torch.Tensor | None, **others: Any) -> Any:
        return self.masked(**others) if x is None else self.masked(self.lin(x), **others)


def test_masks_are_split_like_the_input() -> None:
    """By their first dimension, unless it may be another one of the input."""
    model, x = saved_twice(OnMasked(), "masked"), torch.randn(4, 3, 8)
    settings = {"a": (1, 2.0, [None]), "b": torch.Size([4]), "c": torch.float32}
    mask, rows = torch.randn(4, 3, 1), ["b", None, "a", "b"]
    mixed = model(x, mask=mask, setting=settings, adapter_names=rows)
    torch.testing.assert_close(mixed, mask * model(x, mask=torch.ones(1, 3, 1), adapter_names=rows))
    square = torch.randn(4, 4, 8)
    model(square, mask=torch.randn(4, 4, 8), adapter_names=rows)
    with pytest.raises(UnsupportedLayerError, match=r"shape \(4, 1\) for an input of shape \(4, 4"):
        model(square, mask=torch.randn(4, 1), adapter_names=rows)
    model(square, mask=torch.randn(4, 1), adapter_names=["a"] * 4)


def test_inputs_that_have_no_rows_to_split() -> None:
    """A cache that several copies would write to raises; one copy may have it."""
    transformers = pytest.importorskip("transformers")
    model, x = saved_twice(OnMasked(), "masked"), torch.randn(2, 3, 8)
    cache = transformers.DynamicCache()
    with pytest.raises(UnsupportedLayerError, match="Masked in modules_to_save got a DynamicCache"):
        model(x, setting=[cache], adapter_names=["a", "b"])
    model(x, setting=[cache], adapter_names=["a", "a"])
    with pytest.raises(UnsupportedLayerError, match="Masked in modules_to_save got a object"):
        model(x, setting=object(), adapter_names=["a", "b"])
    for other in (torch.tanh, lambda: 1, nn.ReLU(), slice(2), {1}, transformers.LlamaConfig()):
        model(x, setting=other, adapter_names=["a", "b"])


def test_a_bias_with_as_many_heads_as_samples_raises() -> None:
    """It is not split by sample."""
    model, x = saved_twice(OnMasked(), "masked"), torch.randn(2, 3, 8)
    for shape in ((2, 1, 1), (2, 1, 3), (2, 3, 3)):
        with pytest.raises(UnsupportedLayerError, match="whether the first dimension"):
            model(x, setting=torch.randn(shape), adapter_names=["a", "b"])
    for shape in ((2, 1, 3, 3), (2, 3), (2, 3, 4), (2, 1, 8), (2,), (1, 3, 1), (3, 8)):
        model(x, setting=torch.randn(shape), adapter_names=["a", "b"])
    square = torch.randn(2, 2, 8)
    for shape in ((2, 2), (2, 2, 4), (2,)):
        with pytest.raises(UnsupportedLayerError, match="whether the first dimension"):
            model(square, setting=torch.ones(shape).long(), adapter_names=["a", "b"])


def test_inputs_per_token_are_split_like_the_input() -> None:
    """With ids per token, the rows are all tokens."""
    model, x = saved_twice(OnMasked(), "masked"), torch.randn(2, 2, 8)
    mask, ids = torch.randn(2, 2, 1), torch.tensor([0, 1, 1, -1])
    with adapters(model, ids):
        mixed = model(x, mask=mask)
    with adapters(model, ids):
        torch.testing.assert_close(mixed, mask * model(x))


def test_a_copy_that_is_called_by_keyword() -> None:
    model = saved_twice(OnMasked(), "masked")
    with pytest.raises(UnsupportedLayerError, match="a tensor as its first positional argument"):
        model(None, mask=torch.randn(2, 8), adapter_names=["a", "b"])


@pytest.mark.parametrize("how", ["layers", "block"])
def test_nothing_trains_while_disabled(how: str) -> None:
    """And afterwards what did before, or what has been made active meanwhile."""
    model = saved_twice(OnHalves())

    def trains() -> set[str]:
        return {name for name, p in model.named_parameters() if p.requires_grad}

    before = trains()
    assert before and all(".b." in name for name in before)
    if how == "layers":
        for _ in range(2):
            model.disable_adapter_layers()
            assert not trains()
        model.enable_adapter_layers()
        assert trains() == before
        model.disable_adapter_layers()
        model.set_adapter("a")
        model.enable_adapter_layers()
    else:
        with model.disable_adapter():
            assert not trains()
        assert trains() == before
        with model.disable_adapter():
            model.set_adapter("a")
    assert trains() == {name.replace(".b.", ".a.") for name in before}
    model.set_adapter("a", inference_mode=True)
    with model.disable_adapter():
        pass
    assert not trains()  # PEFT would train it now


def test_targeted_module_names() -> None:
    """Those that have adapters, in the order of being added."""
    model = get_peft_model(Stack(1), LoraConfig(r=2, target_modules=["up"]), "a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["shared", "up"]))
    assert model.targeted_module_names == ["blocks.0.up", "shared"]
    assert model.targeted_parameter_names == []
    model.delete_adapter("b")
    assert model.targeted_module_names == ["blocks.0.up"]
