"""What drop-in users call, next to PEFT itself: its calls, their arguments, its files."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnsupportedLayerError,
)
from tests.support.peft_twins import assert_near, q_of, twins
from tests.support.tiny import TwoLayers, randomize, tiny_llama

peft = pytest.importorskip("peft", reason="compares with PEFT")
pytest.importorskip("transformers", reason="uses a Llama")

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("library", ["peft", "fastlora"])
def test_the_usual_snippet(library: str, tmp_path: Path) -> None:
    """PEFT's own quick start, with only the name of the library changed."""
    names: dict[str, Any] = {"base": tiny_llama, "ids": IDS, "out": str(tmp_path)}
    snippet = f"""
from {library} import LoraConfig, PeftModel, TaskType, get_peft_model

config = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.1, task_type=TaskType.CAUSAL_LM)
model = get_peft_model(base(), config)
model.print_trainable_parameters()
model(input_ids=ids, labels=ids).loss.backward()
model.save_pretrained(out)
model = PeftModel.from_pretrained(base(), out)
logits = model(input_ids=ids).logits
merged = model.merge_and_unload()
"""
    exec(snippet, names)
    assert torch.equal(names["logits"], tiny_llama().eval()(input_ids=IDS).logits)  # B is zero
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dora", [False, True])
def test_the_life_of_adapters(dora: bool) -> None:
    """Calls on models and tuners, patched ones too, have the effect that they have in PEFT."""
    models = twins(lambda: TwoLayers().double(), use_dora=dora)
    x = torch.randn(3, 16, dtype=torch.float64)

    def outputs() -> torch.Tensor:
        ours, theirs, patched = (model(x) for model in models)
        for found, whose in ((ours, "ours"), (patched, "patched")):
            assert_near(found, theirs, whose)
        return theirs

    for model, library in zip(models, (fastlora, peft, peft), strict=True):
        torch.manual_seed(3)
        model.add_adapter("plain", library.LoraConfig(r=2, target_modules=["q"]))
        # On a new module too.
        config = library.LoraConfig(r=3, target_modules=["q", "head"], use_dora=dora)
        model.add_adapter("b", config)
        randomize(model, seed=5)
    for action in (
        lambda m: m.base_model.set_adapter(["default", "plain", "b"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: q_of(m).scale_layer(3.0),
        lambda m: q_of(m).unscale_layer(3.0),
        lambda m: q_of(m).set_scale("b", 3.0),
        lambda m: m.merge_adapter(safe_merge=True),
        lambda m: m.base_model.unmerge_adapter(),
        lambda m: m.set_adapter("b"),
        lambda m: m.delete_adapter("default"),
    ):
        for model in models:
            action(model)
        expected = outputs()
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(model.disable_adapter())
        outputs()
    models = tuple(model.merge_and_unload() for model in models)
    assert_near(outputs(), expected, "merged")


def test_trainability_follows_peft() -> None:
    """set_adapter trains what it names and leaves the base alone; new adapters start frozen."""
    models = twins(TwoLayers)[:2]
    trains = []
    for model, library in zip(models, (fastlora, peft), strict=True):
        model.base_model.model.norm.weight.requires_grad_(True)
        model.set_adapter("default")
        states = [model.base_model.model.norm.weight.requires_grad]
        q_of(model).lora_A["default"].requires_grad_(False)
        model.add_adapter("b", library.LoraConfig(r=2, target_modules=["q"]))
        states += [p.requires_grad for n, p in model.named_parameters() if ".q.lora" in n]
        trains.append(states)
    assert trains[0] == trains[1]


def test_one_adapter_with_biases() -> None:
    """The base's biases belong to all adapters: a second adapter that trains them is refused."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"], bias="all"))
    with pytest.raises(AdapterStateError, match="'default' already trains the base model's biases"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["q"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]


def test_modules_to_save_corners() -> None:
    """Copies of adapted modules, two copies at once, and containers are refused."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(UnsupportedLayerError, match="has LoRA factors in this module"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["v"], modules_to_save=["q"]))
    for name in ("c", "d"):
        config = LoraConfig(r=2, target_modules=["v"], modules_to_save=["head"])
        model.add_adapter(name, config)
    with pytest.raises(AdapterStateError, match="train their own copies of the same module"):
        model.set_adapter(["c", "d"])
    assert model.active_adapters == ["default"]

    bare = TwoLayers()
    bare.stack = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(UnsupportedLayerError, match="got ModuleList"):
        get_peft_model(bare, LoraConfig(r=2, target_modules=["q"], modules_to_save=["stack"]))
    assert all(p.requires_grad for p in bare.parameters())


def test_names_that_modules_use_themselves() -> None:
    """An adapter cannot be called like a method of the table it is kept in."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    for name, words in (("keys", "nn.ModuleDict has an"), ("__base__", "the base model")):
        with pytest.raises(ConfigError, match=f"adapter_name cannot be '{name}', .*{words}"):
            model.add_adapter(name, LoraConfig(r=2, target_modules=["q"]))
        with pytest.raises(ConfigError, match=f"adapter_name cannot be '{name}', .*{words}"):
            q_of(model).add_adapter(name)
    assert q_of(model).r == {"default": 2}


def test_checkpointing_without_transformers_methods() -> None:
    """A model that says it is checkpointing but has no transformers methods is adapted."""
    model = TwoLayers()
    model.is_gradient_checkpointing = True
    get_peft_model(model, LoraConfig(r=2, target_modules=["q"]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_enabled_after_adapters_were_added(use_reentrant: bool) -> None:
    """The factors get gradients, as `Trainer` of transformers 4 enables checkpointing late."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = nn.Embedding(5, 16), TwoLayers()
            self.classifier = nn.Linear(5, 3)
            self.arguments: dict[str, bool] | None = None

        def get_input_embeddings(self) -> nn.Module:
            return self.embed

        def gradient_checkpointing_enable(self, arguments: dict[str, bool]) -> None:
            self.arguments = arguments

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            if self.arguments is None:
                return self.classifier(self.layers(x))
            return self.classifier(checkpoint(self.layers, x, **self.arguments))

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=["q"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = get_peft_model(Checkpointed(), config)
    ids = torch.arange(5)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(parameters) == 4
    expected = torch.autograd.grad(model(ids).square().sum(), list(parameters.values()))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model(ids).square().sum().backward()
    for (name, parameter), grad in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, grad), name


@pytest.mark.parametrize("enabled_before", [False, True])
def test_checkpointing_of_a_model_without_embeddings(enabled_before: bool) -> None:
    """As the audio and vision models of transformers 4, whose method raises an error."""

    class Audio(TwoLayers):
        def gradient_checkpointing_enable(self) -> None:
            self.is_gradient_checkpointing = True

        def enable_input_require_grads(self) -> None:
            raise NotImplementedError

    base = Audio()
    base.is_gradient_checkpointing = enabled_before
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"]))
    model.gradient_checkpointing_enable()
    assert model.get_base_model().is_gradient_checkpointing


def test_multihead_attention_is_unsupported() -> None:
    """nn.MultiheadAttention reads its output projection's weight and never calls it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedLayerError, match="without calling it"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"]))


def test_all_linear_leaves_out_what_is_never_called() -> None:
    """PEFT gives the output projections of attention factors without gradients."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = get_peft_model(
        nn.TransformerEncoder(layer, 2), LoraConfig(r=2, target_modules="all-linear")
    )
    names = {n.rpartition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}
    assert {name.rpartition(".")[2] for name in names} == {"linear1", "linear2"}
    model(torch.randn(2, 3, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_models_with_lazy_and_complex_layers() -> None:
    """Lazy layers must have run once; factors have no complex dtypes."""
    config = LoraConfig(r=2, target_modules=["0"])
    lazy = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(UnsupportedLayerError, match="the lazy module '1' is not initialized"):
        get_peft_model(lazy, config)
    lazy(torch.ones(2, 4))
    get_peft_model(lazy, config)
    with pytest.raises(UnsupportedLayerError, match="its weight has the dtype torch.complex64"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)), config)


def test_a_given_state_dict(tmp_path: Path) -> None:
    """A state without the base's biases is enough; one without a factor is refused by name."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"], bias="all"))
    state = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    model.save_pretrained(tmp_path, state_dict=state)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    del state["base_model.model.q.lora_A.default.weight"]
    with pytest.raises(CheckpointError, match=r"no key 'base_model.model.q.lora_A.default.weight'"):
        model.save_pretrained(tmp_path, state_dict=state)


def test_resized_embeddings_are_saved_along(tmp_path: Path) -> None:
    """With a vocabulary that is not the base folder's, the embeddings go with the adapter."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    def resized() -> Any:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model.resize_token_embeddings(101)
        return model

    model = get_peft_model(resized(), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[97:].fill_(0.5)
    with pytest.warns(UserWarning, match="has been resized"):
        model.save_pretrained(tmp_path / "ours")
    twin = peft.get_peft_model(resized(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    twin.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("ours", "theirs")]
    assert names[0] == names[1]
    again = LoraModel.from_pretrained(resized(), tmp_path / "ours")
    assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


@pytest.mark.parametrize("cached", [True, False])
def test_resized_embeddings_of_a_model_from_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """The original size is in the cached config; without it a warning says that it is unknown."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, commit = tmp_path / "hub" / "models--org--tiny", "a" * 40
    tiny_llama().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained("org/tiny")
    base.resize_token_embeddings(101)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    if not cached:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    message = "has been resized" if cached else "Could not find a config file in org/tiny"
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert any("embed_tokens" in key for key in saved) == cached


def test_fp8_base_weights_get_fp32_factors() -> None:
    """Factors are never in a dtype that cannot train."""

    class Cast(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    model = TwoLayers()
    model.q = Cast(16, 24).to(torch.float8_e4m3fn)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q"]))
    assert q_of(adapted).lora_A["default"].weight.dtype == torch.float32
    adapted(torch.randn(3, 16)).sum().backward()
    copy.deepcopy(adapted)
