"""Calls of PEFT's that our models answer: loading with its arguments, state dicts, flags."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoraModel, adapters, get_peft_model, patch
from fastlora.validation import CheckpointError, ConfigError, UnsupportedLayerError
from tests.support.tiny import TwoLayers, tiny_llama

peft = pytest.importorskip("peft", reason="compares with PEFT")

CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False}


def made(seed: int = 1, **changes: Any) -> LoraModel:
    """A model with one adapter."""
    torch.manual_seed(seed)
    return get_peft_model(TwoLayers(), LoraConfig(**{**CONFIG, **changes}))


def of_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}


def test_load_adapter_answers(tmp_path: Path) -> None:
    """It returns missing and unexpected keys, and a trainable adapter trains though not active."""
    made().save_pretrained(tmp_path)
    model = made(2)
    result = model.load_adapter(tmp_path, "other", is_trainable=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert model.active_adapters == ["default"] and model.training
    assert all(p.requires_grad for p in of_adapter(model).values())
    model.load_adapter(tmp_path, "frozen")
    frozen = [p for n, p in model.named_parameters() if ".frozen." in n]
    assert len(frozen) == 4 and not any(p.requires_grad for p in frozen)


def test_arguments_of_loading(tmp_path: Path) -> None:
    """A subfolder, and PEFT's placement arguments, which have no effect; others are refused."""
    saved = made()
    saved.add_adapter("b", LoraConfig(r=4, target_modules=["q"]))
    saved.save_pretrained(tmp_path)
    idle = {"device_map": {"": "cpu"}, "low_cpu_mem_usage": True, "revision": None}
    torch.manual_seed(1)
    model = LoraModel.from_pretrained(TwoLayers(), tmp_path, torch_device="cpu", **idle)
    x = torch.randn(3, 16)
    assert torch.equal(model(x), saved.eval()(x))
    model.load_adapter(tmp_path, "b", subfolder="b", ignore_mismatched_sizes=False)
    assert model.base_model.model.q.r == {"default": 2, "b": 4}
    for call, options in (
        (LoraModel.from_pretrained, {"model": TwoLayers(), "model_id": tmp_path}),
        (model.load_adapter, {"model_id": tmp_path, "adapter_name": "c"}),
        (model.save_pretrained, {"save_directory": tmp_path}),
    ):
        with pytest.raises(TypeError, match="unexpected"):
            call(**options, strict=True)


class Renamed(nn.Module):
    """`TwoLayers` after its modules moved."""

    _checkpoint_conversion_mapping = {"^(q|v)": r"inner.\1"}

    def __init__(self) -> None:
        super().__init__()
        self.inner = TwoLayers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As that of `TwoLayers`."""
        return self.inner(x)


def test_old_names_are_mapped(tmp_path: Path) -> None:
    """A file with old names loads by the model's mapping or one that is given; as in PEFT."""
    saved = made()
    saved.save_pretrained(tmp_path)
    x = torch.randn(3, 16)
    torch.manual_seed(1)
    loaded = LoraModel.from_pretrained(Renamed(), tmp_path)
    assert torch.equal(loaded(x), saved.eval()(x))
    torch.manual_seed(1)
    theirs = peft.PeftModel.from_pretrained(Renamed(), tmp_path)
    torch.testing.assert_close(loaded(x), theirs(x))
    loaded.load_adapter(tmp_path, "b", key_mapping={"^q": "inner.q", "^v": "inner.v"})
    assert torch.equal(loaded.inner.q.lora_A["b"].weight, saved.q.lora_A["default"].weight)
    with pytest.raises(CheckpointError, match=r"missing 4 tensor\(s\)"):
        loaded.load_adapter(tmp_path, "c", key_mapping={"^nothing": ""})
    assert list(loaded.peft_config) == ["default", "b"]


def test_ignore_mismatched_sizes(tmp_path: Path) -> None:
    """Tensors of another size are refused by name, or skipped with a warning that names them."""
    made(modules_to_save=["head"]).save_pretrained(tmp_path)
    base = TwoLayers()
    base.head = nn.Linear(16, 7)
    with pytest.raises(CheckpointError, match=r"head.bias.*\(5,\).*ignore_mismatched_sizes"):
        LoraModel.from_pretrained(base, tmp_path)
    assert type(base.q) is nn.Linear
    with pytest.warns(UserWarning, match="head.bias.*mismatched tensors keep their initial values"):
        model = LoraModel.from_pretrained(base, tmp_path, ignore_mismatched_sizes=True)
    assert torch.equal(model.head.weight, base.head.original_module.weight)
    with pytest.warns(UserWarning, match="mismatched tensors keep their initial values"):
        result = model.load_adapter(tmp_path, "b", ignore_mismatched_sizes=True)
    assert sorted(result.missing_keys) == [f"base_model.model.head.{n}" for n in ("bias", "weight")]


@pytest.mark.parametrize("cls", [LoraModel, peft.PeftModel])
def test_from_pretrained_on_a_model_of_ours(tmp_path: Path, cls: Any) -> None:
    """It adds an adapter to the model, which then acts; a config of its own is refused."""
    saved = made()
    saved.save_pretrained(tmp_path)
    model = made(2)
    again = cls.from_pretrained(model, tmp_path, "second")
    assert again is model and model.active_adapters == ["second"]
    assert torch.equal(model.q.lora_A["second"].weight, saved.q.lora_A["default"].weight)
    with pytest.raises(ConfigError, match="config="):
        cls.from_pretrained(model, tmp_path, "third", config=LoraConfig(**CONFIG))


@pytest.mark.parametrize("change", [{}, {"use_dora": True}])
def test_without_storage_until_loaded(change: dict[str, Any]) -> None:
    """`low_cpu_mem_usage` leaves factors on meta; PEFT's state-dict call brings them."""
    state = peft.get_peft_model_state_dict(made(**change))
    torch.manual_seed(1)
    config = LoraConfig(**CONFIG, **change)
    model = get_peft_model(TwoLayers(), config, low_cpu_mem_usage=True)
    assert {p.device.type for p in of_adapter(model).values()} == {"meta"}
    result = peft.set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    assert not result.unexpected_keys and not result.missing_keys
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(p.requires_grad for p in of_adapter(model).values())
    x = torch.randn(3, 16)
    assert torch.equal(model(x), made(**change)(x))


def test_a_config_given_to_from_pretrained_is_not_copied(tmp_path: Path) -> None:
    """It is the model's own from then on, as in PEFT; where loading fails it is as it was."""
    made().save_pretrained(tmp_path)
    config = LoraConfig(**CONFIG)
    model = LoraModel.from_pretrained(TwoLayers(), tmp_path, config=config)
    assert model.peft_config["default"] is config and config.inference_mode
    other = LoraConfig(r=2, target_modules=["q"])
    with pytest.raises(CheckpointError, match="no parameter for it"):
        LoraModel.from_pretrained(TwoLayers(), tmp_path, config=other)
    assert other == LoraConfig(r=2, target_modules=["q"])


def test_the_class_of_the_base_model_is_in_the_file(tmp_path: Path) -> None:
    """Without a task type the config names the base model's class, as PEFT's does."""
    found = []
    for model in (made(), peft.get_peft_model(TwoLayers(), peft.LoraConfig(**CONFIG))):
        model.save_pretrained(tmp_path)
        found.append(LoraConfig.from_json_file(tmp_path / "adapter_config.json")["auto_mapping"])
    assert found[0] == found[1] and found[0]["base_model_class"] == "TwoLayers"
    assert found[0]["parent_library"] == "tests.support.tiny"


@pytest.mark.parametrize("outer", [True, False])
def test_state_dict_of_a_compiled_model(outer: bool) -> None:
    """`torch.compile` around the model, or around a part, changes no key of its adapter."""
    model = made(modules_to_save=["head"])
    expected = peft.get_peft_model_state_dict(model)
    if outer:
        wrapped: Any = torch.compile(model)
    else:
        base = TwoLayers()
        torch.manual_seed(1)
        wrapped = get_peft_model(
            torch.compile(base), LoraConfig(**CONFIG, modules_to_save=["head"])
        )
    found = peft.get_peft_model_state_dict(wrapped)
    assert found.keys() == expected.keys() and len(found) == 6
    state = {key: torch.full_like(tensor, 3.0) for key, tensor in found.items()}
    assert not peft.set_peft_model_state_dict(wrapped, state).unexpected_keys
    assert all((p == 3.0).all() for p in of_adapter(wrapped).values())


def test_base_model_state_dict() -> None:
    """PEFT's functions give and take the base model's tensors under its own keys."""
    base = TwoLayers()
    expected = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**CONFIG, modules_to_save=["head"]))
    model.add_adapter("b", LoraConfig(r=4, target_modules=["v"], use_dora=True))
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    changed = {key: tensor + 1 for key, tensor in expected.items()}
    peft.set_base_model_state_dict(model, changed)
    assert torch.equal(model.q.weight, changed["q.weight"])
    assert torch.equal(model.base_model.model.head.original_module.weight, changed["head.weight"])
    tokens = tiny_llama()
    keys = list(tokens.state_dict())
    config = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    found = peft.get_base_model_state_dict(get_peft_model(tokens, LoraConfig(**config)))
    assert sorted(found) == sorted(keys)
    del changed["q.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*q.weight"):
        peft.set_base_model_state_dict(model, changed)
    missing = peft.set_base_model_state_dict(model, changed, strict=False).missing_keys
    assert missing == ["q.weight"]


def test_requires_grad_while_disabled() -> None:
    """Within `disable_adapter` nothing trains; afterwards what did before, as in PEFT."""
    model = made(modules_to_save=["head"])
    model.add_adapter("b", LoraConfig(**CONFIG))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert any(before.values())
    model.base_model.disable_adapter_layers()
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.enable_adapter_layers()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    with model.disable_adapter():
        model.set_adapter("b")
    training = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(training) == 4 and all(".b." in name for name in training)


def test_set_requires_grad() -> None:
    """Adapters train or not, whether they act or not, and others stay as they are; as in PEFT."""
    found = []
    for library, config in ((peft, peft.LoraConfig), (__import__("fastlora"), LoraConfig)):
        model = library.get_peft_model(TwoLayers(), config(**CONFIG))
        model.add_adapter("b", config(**CONFIG))
        model.set_requires_grad("b")
        model.set_requires_grad(["default"], requires_grad=False)
        found.append(
            {n.replace("base_layer.", "") for n, p in model.named_parameters() if p.requires_grad}
        )
    assert found[0] == found[1] and len(found[0]) == 4
    with pytest.raises(ValueError, match="no adapter named 'c'"):
        model.set_requires_grad("c")


def test_rescale_adapter_scale() -> None:
    """PEFT's helper scales our layers, and puts their scalings back."""
    from peft.helpers import rescale_adapter_scale

    model, x = made().eval(), torch.randn(3, 16)
    y = model(x)
    with model.disable_adapter():
        base = model(x)
    with rescale_adapter_scale(model, 0.0):
        torch.testing.assert_close(model(x), base)
    assert torch.equal(model(x), y) and not torch.allclose(y, base)


def test_disable_input_dtype_casting() -> None:
    """PEFT's helper reaches factors that are called as modules: their input keeps its dtype."""
    from peft.helpers import disable_input_dtype_casting

    model, seen = made().to(torch.float64), []
    model.q.lora_A["default"].register_forward_pre_hook(lambda m, x: seen.append(x[0].dtype))
    model.q.weight.data, model.q.bias.data = model.q.weight.data.float(), model.q.bias.data.float()
    model.q(torch.randn(3, 16))
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
        model.q(torch.randn(3, 16))
    assert seen == [torch.float64, torch.float32]


class Pair(nn.Module):
    """A head that returns a named shape of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 5), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
        """Returns two outputs, one of them in a mapping."""
        return self.a(x), {"b": self.b(x), "none": None}


def test_a_copy_that_returns_tuples_in_a_mixed_batch() -> None:
    """Each row is that of its own adapter alone, in every tensor of the output."""
    base = TwoLayers()
    base.head = Pair()
    config = {"r": 2, "target_modules": ["q"], "modules_to_save": ["head"]}
    model = get_peft_model(base, LoraConfig(**config), "a")
    model.add_adapter("b", LoraConfig(**config))
    for parameter in of_adapter(model).values():
        nn.init.normal_(parameter)
    model.eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        with adapters(model, ["a", None, "b"]):
            first, rest = model(x)
        for row, name in enumerate(["a", None, "b"]):
            with adapters(model, [name] * 3):
                one, other = model(x)
            torch.testing.assert_close(first[row], one[row])
            torch.testing.assert_close(rest["b"][row], other["b"][row])
    assert rest["none"] is None and first.shape == (3, 5)


def test_patched_classes_print_as_pefts() -> None:
    """`repr` and PEFT's status name the classes of a patched model as before."""
    model = peft.get_peft_model(TwoLayers(), peft.LoraConfig(**CONFIG))
    before = repr(model), peft.get_model_status(model), peft.get_layer_status(model)
    patch(model)
    assert (repr(model), peft.get_model_status(model), peft.get_layer_status(model)) == before


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_jit_trace_and_the_old_exporter(change: dict[str, Any]) -> None:
    """A trace is plain PyTorch, holds for other numbers of rows, and the ONNX exporter takes it."""
    model, x = made(**change).eval(), torch.randn(40, 16)
    traced = torch.jit.trace(model, (torch.randn(3, 16),))
    graph = str(traced.inlined_graph)
    assert "PythonOp" not in graph and "fastlora::" not in graph
    torch.testing.assert_close(traced(x), model(x))
    torch.jit.save(traced, io.BytesIO())
    try:
        torch.onnx.export(model.get_base_model(), (x,), io.BytesIO(), dynamo=False)
    except torch.onnx.OnnxExporterError as error:  # it is asked for once all is converted
        assert "Module onnx is not installed" in str(error)  # noqa: PT017


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("strict", [True, False])
def test_export(change: dict[str, Any], strict: bool) -> None:
    """An exported program computes the model's output, also after the weights have changed."""
    model, x = made(**change).eval(), torch.randn(9, 16)
    with torch.no_grad():
        before = model(x)  # fills the caches
    sizes = ({0: torch.export.Dim("rows", min=1, max=64)},)
    base, example = model.get_base_model(), torch.randn(5, 16)
    program = torch.export.export(base, (example,), dynamic_shapes=sizes, strict=strict).module()
    torch.testing.assert_close(program(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    after = model(x)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(program(x), after)


def test_export_of_a_mixed_batch() -> None:
    """The adapters of the rows are constants of the program."""
    model, x = made().eval(), torch.randn(3, 16)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    with adapters(model, ["b", None, "default"]):
        expected = model(x)
        program = torch.export.export(model, (x,), strict=True).module()
        with pytest.raises(UnsupportedLayerError, match="only with strict=True"):
            torch.export.export(model, (x,), strict=False)
    torch.testing.assert_close(program(x), expected)
    base = TwoLayers().eval()
    prefix = "base_model.model.q."
    state = {
        prefix + "lora_A.weight": torch.randn(2, 16),
        prefix + "lora_B.weight": torch.randn(24, 2),
    }
    with fastlora.AdapterPool(base, target_modules=["q"]) as pool:
        pool.load("a", state, config={"r": 2, "target_modules": ["q"]})
        with torch.no_grad(), adapters(base, ["a", None, "a"]):
            expected = base(x)
            program = torch.export.export(base, (x,), strict=False).module()
        torch.testing.assert_close(program(x), expected)  # reads the pool's tensors


@pytest.mark.parametrize("change", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("ours", [True, False], ids=["ours", "patched"])
def test_nested_tensors(change: dict[str, Any], ours: bool) -> None:
    """Samples of other lengths in one tensor come out as they do one by one, with gradients."""
    model: Any = made(**change)
    if not ours:
        model = peft.get_peft_model(TwoLayers(), peft.LoraConfig(**(CONFIG | change)))
        patch(model)
    samples = [torch.randn(3, 16), torch.randn(5, 16)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.cat([model(x) for x in samples])
    grads = torch.autograd.grad(expected.sum(), parameters)
    y = model(torch.nested.nested_tensor(samples, layout=torch.jagged))
    torch.testing.assert_close(y.values(), expected)
    torch.testing.assert_close(torch.autograd.grad(y.values().sum(), parameters), grads)


def test_pipelines_take_models_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    """A pipeline says nothing about a model of ours."""
    transformers = pytest.importorskip("transformers")
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))

    class Tokenizer(transformers.PreTrainedTokenizerBase):
        """What a pipeline needs to be made."""

    transformers.utils.logging.enable_propagation()
    transformers.pipeline("text-generation", model=model, tokenizer=Tokenizer(), device="cpu")
    assert "not supported" not in caplog.text
    transformers.pipeline(
        "text-classification", model=model.get_base_model(), tokenizer=Tokenizer(), device="cpu"
    )
    assert "not supported" in caplog.text


def test_layers_answer_under_pefts_names() -> None:
    """A linear shows its bare base layer, its adapters, and a switch of its own."""
    model, x = made(), torch.randn(3, 16)
    layer = model.base_model.model.q
    assert type(layer.base_layer) is nn.Linear and layer.base_layer.weight is layer.weight
    assert layer.adapter_layer_names == ("lora_A", "lora_B")
    assert layer._all_available_adapter_names() == layer.active_adapter == ["default"]
    plain = layer.base_layer(x)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), plain) and not layer.lora_A["default"].weight.requires_grad
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), plain) and layer.lora_A["default"].weight.requires_grad


def test_merging_twice_says_so() -> None:
    """The second merge changes nothing and warns, in PEFT's words; deleting is refused in them."""
    model = made()
    model.merge_adapter()
    weight = model.q.weight.clone()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter()
    assert torch.equal(model.q.weight, weight)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['default'\] while they"):
        model.delete_adapter("default")


def test_biases_of_a_state_dict_are_loaded() -> None:
    """Trained biases in a state dict reach a model whose own config trains none; as in PEFT."""
    found = []
    for library, config in ((peft, peft.LoraConfig), (__import__("fastlora"), LoraConfig)):
        torch.manual_seed(1)
        source = library.get_peft_model(TwoLayers(), config(**CONFIG, bias="all"))
        state = peft.get_peft_model_state_dict(source)
        state = {k: t + 1 if k.endswith("bias") else t for k, t in state.items()}
        torch.manual_seed(1)
        model = library.get_peft_model(TwoLayers(), config(**CONFIG))
        assert not peft.set_peft_model_state_dict(model, state).unexpected_keys
        found.append([p for n, p in model.named_parameters() if n.endswith("bias")])
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_what_is_unfrozen_stays_so_beside_another_adapter() -> None:
    """A second adapter freezes nothing that somebody trains, and unfreezes nothing."""
    model = made()
    model.base_model.model.head.weight.requires_grad_(True)
    model.q.lora_A["default"].weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q"], bias="lora_only"))
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(before[name] == after[name] for name in before)
    assert not any(after[name] for name in set(after) - set(before))


def test_disabling_a_model_of_which_a_part_is_disabled() -> None:
    """There is a warning, and afterwards every layer acts, as in PEFT."""
    model = made()
    model.base_model.model.q.enable_adapters(False)
    message = "some adapter layers that are enabled"
    with pytest.warns(UserWarning, match=message), model.disable_adapter():
        assert model.base_model.disabled
    assert not model.base_model.model.q.disable_adapters
    assert not model.base_model.model.v.disable_adapters


def test_copies_answer_under_pefts_names() -> None:
    """A module that adapters own copies of has the switches that layers have."""
    model, x = made(modules_to_save=["head"]), torch.randn(3, 16)
    wrapper = model.base_model.model.head
    nn.init.normal_(wrapper.modules_to_save["default"].weight)
    copied = wrapper(x)
    assert wrapper.active_adapters == wrapper.active_adapter == ["default"]
    assert wrapper.adapter_layer_names == ("modules_to_save",)
    wrapper.enable_adapters(False)
    assert torch.equal(wrapper(x), wrapper.original_module(x))
    wrapper.enable_adapters(True)
    assert torch.equal(wrapper(x), copied)
    wrapper.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in wrapper.parameters())


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_a_model_of_pefts_from_our_config_is_saved(task: str | None, tmp_path: Path) -> None:
    """The files are PEFT's, and PEFT loads them."""
    base = TwoLayers()
    base.config = {"model_type": "custom"}
    config = CONFIG if task is None else CONFIG | {"task_type": task}
    if task is not None:
        base.prepare_inputs_for_generation = None
    model = peft.get_peft_model(copy.deepcopy(base), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(3, 16)
    torch.testing.assert_close(again.base_model.model(x), model.base_model.model(x))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    theirs.save_pretrained(tmp_path / "theirs")
    files = [
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, tmp_path / "theirs")
    ]
    assert files[0]["auto_mapping"] == files[1]["auto_mapping"]
