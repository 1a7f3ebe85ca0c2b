"""What drop-in users run into: the calls and habits of PEFT's users, next to PEFT itself."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize, prune

sys.path.insert(0, str(Path(__file__).parent))
from tiny import TwoLayers, randomise, tiny_llama

import fastlora
from fastlora import FastLoraLinear, LoraConfig, LoraModel, get_peft_model
from fastlora.layers import FastLoraWrapper
from fastlora.testing import assert_within_budget
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnsupportedLayerError,
)

peft = pytest.importorskip("peft", reason="compares with PEFT")
pytest.importorskip("transformers", reason="uses a Llama")

IDS = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))


def twins(make: Callable[[], nn.Module], **config: Any) -> tuple[Any, Any, Any]:
    """One random adapter on the same model: ours, PEFT's, and PEFT's patched."""
    config = {"r": 4, "target_modules": ["q", "v"], **config}
    models = []
    for library in (fastlora, peft, peft):
        torch.manual_seed(1)
        model = library.get_peft_model(make(), library.LoraConfig(**config))
        randomise(model)
        models.append(model)
    fastlora.patch(models[2])
    return tuple(models)


def q_of(model: Any) -> Any:
    """The adapted layer q of a TwoLayers."""
    return model.base_model.model.q


# ------------------------------------------------------------------------------------ numbers


def test_autocast_of_a_whole_model() -> None:
    """Under bf16 autocast, layers that get bf16 inputs over fp32 weights compute and train."""
    ours, theirs, patched = twins(tiny_llama, target_modules="all-linear")
    # transformers' own loss is fp32.
    logits = copy.deepcopy(theirs).double()(input_ids=IDS).logits[:, :-1]
    exact = nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten())
    losses = []
    for model in (ours, theirs, patched):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(losses[0], losses[2])
    assert_within_budget(losses[0], losses[1].bfloat16(), exact.detach())
    grads = [p.grad for n, p in ours.named_parameters() if "lora_" in n]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


def test_backward_inside_autocast() -> None:
    """A forward outside autocast can have its backward inside, in the forward's dtype."""
    ours, theirs, _ = twins(TwoLayers)
    x = torch.randn(3, 16)
    y = ours(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.sum().backward()
    # The layers after q run their backward in bf16.
    models = copy.deepcopy(theirs).bfloat16(), theirs.double()
    for model in models:
        model(x.to(q_of(model).weight.dtype)).sum().backward()
    gradients = [q_of(model).lora_A["default"].weight.grad for model in (ours, *models)]
    assert gradients[0].dtype == torch.float32
    assert_within_budget(*gradients)


def test_training_after_inference_mode() -> None:
    """Nothing made in inference mode is kept for a later backward."""
    for model in twins(TwoLayers):
        with torch.inference_mode():
            model(torch.randn(3, 16))
        model(torch.randn(3, 16)).sum().backward()


def test_fp16_keeps_its_range() -> None:
    """A large scaling on a large s overflows fp16 only where the result does."""
    x, lora_a = torch.full((1, 256), 200.0).half(), torch.full((1, 256), 0.05)
    lora_b, weight = torch.full((4, 1), 1e-3), torch.zeros(4, 256).half()
    y = fastlora.functional.lora_linear(x, weight, lora_a, lora_b, 32.0)
    near, exact = (
        (x.to(kind) @ lora_a.to(kind).t()) @ (32 * lora_b.to(kind)).t()
        for kind in (torch.float16, torch.float64)
    )
    assert y.dtype == torch.float16
    assert_within_budget(y, near, exact)


# --------------------------------------------------------- modules that users and libraries change


def change_hooks(layer: Any) -> None:
    """A hook that doubles what lora_B returns."""
    layer.lora_B["default"].register_forward_hook(lambda _, __, y: 2 * y)


def change_norm(layer: Any) -> None:
    """A weight norm with its gain at zero switches the adapter off."""
    nn.utils.weight_norm(layer.lora_A["default"])
    layer.lora_A["default"].weight_g.data.zero_()


class Tenfold(nn.Module):
    """In place of dropout."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ten times x."""
        return 10 * x


def change_dropout(layer: Any) -> None:
    """A module of the user's in place of dropout."""
    layer.lora_dropout["default"] = Tenfold()


@pytest.mark.parametrize("change", [change_hooks, change_norm, change_dropout])
def test_changed_factor_modules_are_called(change: Callable[[Any], None]) -> None:
    """Hooks and replacements on factors and dropout act, and the report says so."""
    models = twins(TwoLayers)
    for model in models:
        change(q_of(model))
    x = torch.randn(3, 16)
    ours, theirs, patched = (model(x) for model in models)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(patched, theirs)
    for model in (models[0], models[2]):
        report = fastlora.fusion_report(model)
        assert [row.fused for row in report.rows] == [False, True]
        assert "adapter 'default'" in report.rows[0].reason


def test_offloaded_after_wrapping() -> None:
    """accelerate's offload hooks on factors are honoured."""
    accelerate = pytest.importorskip("accelerate")
    model = get_peft_model(TwoLayers(), LoraConfig(r=4, target_modules=["q", "v"]))
    randomise(model)
    x = torch.randn(3, 16)
    expected = model(x)
    accelerate.cpu_offload(model, execution_device="cpu")
    torch.testing.assert_close(model(x), expected)


def test_factors_on_another_device_are_refused() -> None:
    """Never garbage: a factor left on the meta device raises."""
    layer = FastLoraLinear(8, 8, r=2)
    layer.lora_A["default"].to("meta")
    with pytest.raises(ValueError, match="lora_a is on meta, expected cpu"):
        layer(torch.randn(2, 8))


def test_a_linear_with_more_than_a_weight_stays_as_it_is() -> None:
    """Extra state survives, and unloading gives the very module back."""
    model = TwoLayers()
    model.q.register_buffer("statistics", torch.ones(3))
    q, v = model.q, model.v
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q", "v"]))
    assert isinstance(adapted.base_model.model.q, FastLoraWrapper)
    assert "base_model.model.q.base_layer.statistics" in adapted.state_dict()
    bare = adapted.unload()
    assert bare.q is q
    assert bare.v is v


def test_wrapper_shows_the_weight() -> None:
    """Models that look at ``layer.weight`` (T5's ``wo``) find the base layer's."""
    model = TwoLayers()
    model.q.register_forward_hook(lambda *_: None)
    weight = model.q.weight
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q"]))
    assert adapted.base_model.model.q.weight is weight
    assert adapted.base_model.model.q.bias is model.q.bias


def test_a_base_that_keeps_its_output_is_not_overwritten() -> None:
    """A base layer of unknown kind may have kept what it returned."""

    class Keeps(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = super().forward(x)
            return self.kept

    layer = FastLoraWrapper(Keeps(8, 8))
    layer.add_adapter("default", r=2)
    layer.set_adapter("default")
    nn.init.normal_(layer.lora_B["default"].weight)
    with torch.no_grad():
        y = layer(torch.randn(3, 8))
    assert not torch.equal(y, layer.base_layer.kept)


# ------------------------------------------------------------------------------------- merging


def test_merging_a_name_twice_counts_once() -> None:
    """The same name twice in one call is one merge."""
    layer = FastLoraLinear(8, 8, r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, 8)
    expected = layer(x)
    layer.merge(adapter_names=["default", "default"])
    torch.testing.assert_close(layer(x), expected)


def test_set_adapter_while_disabled_and_merged() -> None:
    """After the block the adapter set in it acts, not the one merged before."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q"]))
    randomise(model)
    x = torch.randn(3, 16)
    model.set_adapter("b")
    expected = model(x)
    model.set_adapter("default")
    model.merge_adapter()
    with model.disable_adapter():
        model.set_adapter("b")
    assert torch.equal(model(x), expected)


def test_unmerge_keeps_what_was_written_meanwhile() -> None:
    """A state loaded into a merged layer is not undone by unmerge."""
    layer = FastLoraLinear(8, 8, r=2)
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.merge()
    delta = layer.get_delta_weight("default")
    with torch.no_grad():
        layer.weight.copy_(torch.ones(8, 8))
    layer.unmerge()
    torch.testing.assert_close(layer.weight, torch.ones(8, 8) - delta)


@pytest.mark.parametrize("how", ["parametrize", "prune"])
def test_merging_a_computed_weight_is_refused(how: str) -> None:
    """A weight that other parameters give cannot take an update."""
    layer = FastLoraLinear(8, 8, r=2)
    if how == "prune":
        prune.l1_unstructured(layer, "weight", 0.2)
    else:
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(UnsupportedLayerError, match="parametrization or pruning"):
        layer.merge()
    assert not layer.merged


def test_merging_a_tied_head_by_name() -> None:
    """Also for adapters given by name, the embedding keeps its weight."""
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lm_head"]))
    randomise(model)
    embedding = model.get_input_embeddings().weight.clone()
    with pytest.warns(UserWarning, match="its own now"):
        merged = model.merge_and_unload(adapter_names=["b"])
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert not torch.equal(merged.lm_head.weight, embedding)


# ------------------------------------------------------------------- PEFT's calls and arguments


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


def test_calls_on_the_tuner() -> None:
    """``model.base_model`` has what PEFT's tuner has, with the same effect."""
    ours, theirs, _ = twins(TwoLayers)
    x = torch.randn(3, 16)
    for model, library in ((ours, fastlora), (theirs, peft)):
        torch.manual_seed(3)
        model.add_adapter("b", library.LoraConfig(r=2, target_modules=["q"]))
        randomise(model, seed=5)
        model.base_model.set_adapter(["default", "b"])
    exact = copy.deepcopy(theirs).double()

    def compare(*models: Any) -> None:
        mine, other, wide = models
        assert_within_budget(mine(x), other(x), wide(x.double()))

    compare(ours, theirs, exact)
    for action in (
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: q_of(m).scale_layer(3.0),
        lambda m: q_of(m).unscale_layer(3.0),
        lambda m: m.base_model.merge_adapter(),
        lambda m: m.base_model.unmerge_adapter(),
        lambda m: m.base_model.delete_adapter("b"),
    ):
        for model in (ours, theirs, exact):
            action(model)
        compare(ours, theirs, exact)
    compare(*(model.base_model.merge_and_unload() for model in (ours, theirs, exact)))


def test_arguments_of_loading(tmp_path: Path) -> None:
    """subfolder, config and the arguments without effect are taken; unknown ones are refused."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["q"]))
    model.save_pretrained(tmp_path)
    fresh = LoraModel.from_pretrained(
        TwoLayers(), tmp_path, torch_device="cpu", low_cpu_mem_usage=True, revision=None
    )
    fresh.load_adapter(tmp_path, "b", subfolder="b", ignore_mismatched_sizes=False)
    assert q_of(fresh).r == {"default": 2, "b": 4}
    for call in (
        lambda: fresh.load_adapter(tmp_path, "c", nonsense=4),
        lambda: fresh.load_adapter(tmp_path, "c", ignore_mismatched_sizes=True),
        lambda: fresh.save_pretrained(tmp_path, nonsense=3),
    ):
        with pytest.raises(TypeError, match="unexpected|ignore_mismatched"):
            call()


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


def test_a_frozen_loaded_adapter_can_be_trained(tmp_path: Path) -> None:
    """Loaded for inference it is frozen, until set_adapter says otherwise."""
    get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"])).save_pretrained(tmp_path)
    for library in (LoraModel, peft.PeftModel):
        model = library.from_pretrained(TwoLayers(), tmp_path)
        assert not any(p.requires_grad for p in model.parameters())
        model.set_adapter("default")
        assert any(p.requires_grad for p in model.parameters())


def test_one_adapter_with_biases() -> None:
    """The base's biases belong to all adapters: a second adapter that trains them is refused."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"], bias="all"))
    with pytest.raises(AdapterStateError, match="'default' trains the base model's biases"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["q"], bias="lora_only"))
    assert list(model.peft_config) == ["default"]


def test_modules_to_save_corners() -> None:
    """Copies of adapted modules, two copies at once, and containers are refused."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    with pytest.raises(UnsupportedLayerError, match="adapts with LoRA"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["v"], modules_to_save=["q"]))
    for name in ("c", "d"):
        config = LoraConfig(r=2, target_modules=["v"], modules_to_save=["head"])
        model.add_adapter(name, config)
    with pytest.raises(AdapterStateError, match="each own a copy"):
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
    with pytest.raises(ConfigError, match="a method of nn.ModuleDict"):
        model.add_adapter("keys", LoraConfig(r=2, target_modules=["q"]))
    assert q_of(model).r == {"default": 2}


def test_checkpointing_without_transformers_methods() -> None:
    """A model that says it is checkpointing but has no transformers methods is adapted."""
    model = TwoLayers()
    model.is_gradient_checkpointing = True
    get_peft_model(model, LoraConfig(r=2, target_modules=["q"]))


def test_multihead_attention_is_refused() -> None:
    """nn.MultiheadAttention reads its output projection's weight and never calls it."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(UnsupportedLayerError, match="never calls it"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["out_proj"]))


# --------------------------------------------------------------------------------------- files


def test_a_given_state_dict(tmp_path: Path) -> None:
    """A state without the base's biases is enough; one without a factor is refused by name."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"], bias="all"))
    state = {n: t for n, t in model.state_dict().items() if "lora_" in n}
    model.save_pretrained(tmp_path, state_dict=state)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2
    del state["base_model.model.q.lora_A.default.weight"]
    with pytest.raises(CheckpointError, match=r"no 'base_model.model.q.lora_A.default.weight'"):
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
    with pytest.warns(UserWarning, match="embeddings are saved along"):
        model.save_pretrained(tmp_path / "ours")
    twin = peft.get_peft_model(resized(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    twin.save_pretrained(tmp_path / "theirs")
    names = [set(load_file(tmp_path / f / "adapter_model.safetensors")) for f in ("ours", "theirs")]
    assert names[0] == names[1]
    again = LoraModel.from_pretrained(resized(), tmp_path / "ours")
    assert torch.equal(again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


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
