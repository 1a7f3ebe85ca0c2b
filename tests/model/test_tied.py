"""Tied embeddings: what is one tensor, beside other adapters, and what is said and refused."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.model.hotswap import HotswapError
from fastlora.model.inject import modules_adapted_with_embedding
from fastlora.model.tied_weights import modules_tied_to_embedding
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    UnsupportedLayerError,
)
from tests.support.tiny import (
    in_a_wrapper,
    quantized_two_layers,
    randomize,
    tiny,
    tiny_llama,
    unchanged,
)

pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])


def config(**fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields})


def tied_copies(saved: list[str]) -> Any:
    return get_peft_model(tiny_llama(), config(modules_to_save=saved, ensure_weight_tying=True))


def tied_lora(targets: Any) -> Any:
    return get_peft_model(tiny_llama(), config(target_modules=targets, ensure_weight_tying=True))


def test_what_is_tied_is_one_tensor(tmp_path: Path) -> None:
    """A copy, also once it is loaded; and LoRA, of which the head has views, merged in silence."""
    model = tied_copies(["lm_head"])
    model.save_pretrained(tmp_path)
    for each in (model, LoraModel.from_pretrained(tiny_llama(), tmp_path)):
        base = each.get_base_model()
        copies = [m.modules_to_save["default"] for m in (base.model.embed_tokens, base.lm_head)]
        assert copies[0].weight is copies[1].weight
        assert (copies[1].in_features, copies[1].out_features) == (64, 97)
    model = tied_lora(["lm_head", "q_proj"])
    head, embedding = model.get_base_model().lm_head, model.get_base_model().model.embed_tokens
    for mine, own in ((head.lora_A, "lora_embedding_B"), (head.lora_B, "lora_embedding_A")):
        assert mine["default"].weight.data_ptr() == getattr(embedding, own)["default"].data_ptr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


def test_tied_lora_beside_other_adapters() -> None:
    """They agree, or are refused; a deleted one leaves both."""
    model = tied_lora(["lm_head"])
    model.add_adapter("b", config(target_modules=["lm_head"], ensure_weight_tying=True))
    model.add_adapter("c", config())
    model = copy.deepcopy(model)
    model.set_adapter("b")
    assert sum(p.requires_grad for p in model.parameters()) == 2
    model.delete_adapter("default")
    assert list(model.get_base_model().lm_head.r) == ["b"]
    with pytest.raises(
        UnsupportedLayerError, match="shares the input embedding's LoRA factors in other"
    ):
        model.add_adapter("d", config(target_modules=["lm_head"]))
    with pytest.raises(ConfigError, match="requires use_dora=False"):
        model.add_adapter(
            "d",
            config(target_modules=["lm_head"], ensure_weight_tying=True, use_dora=True),
        )
    other = get_peft_model(tiny_llama(), config(target_modules=["lm_head"]), "a")
    with pytest.raises(UnsupportedLayerError, match="without LoRA factors of its own"):
        other.add_adapter("b", config(target_modules=["embed_tokens"], ensure_weight_tying=True))
    assert list(other.peft_config) == ["a"]


def test_two_adapters_and_copies_of_the_model() -> None:
    model = tied_copies(["lm_head"])
    model.add_adapter("b", config(modules_to_save=["lm_head"], ensure_weight_tying=True))
    model = copy.deepcopy(model)
    base = model.get_base_model()
    owned = [base.model.embed_tokens.modules_to_save, base.lm_head.modules_to_save]
    for name in ("default", "b"):
        assert owned[0][name].weight is owned[1][name].weight
    assert owned[0]["b"].weight is not owned[0]["default"].weight
    model.delete_adapter("default")
    assert list(owned[1]) == ["b"]


def test_what_is_not_tied_is_said() -> None:
    """Each of PEFT's three warnings; the caller's config stays as it was."""
    for fields, tied, words in (
        ({"modules_to_save": ["lm_head"]}, True, "`ensure_weight_tying` is not set to True"),
        ({"target_modules": "lm_head"}, True, "`ensure_weight_tying` is not set to True"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, False, "no tied modules w"),
        ({"ensure_weight_tying": True}, True, "no tied modules are added"),
    ):
        given = config(**fields)
        before = given.to_dict()
        with pytest.warns(UserWarning, match=words):
            get_peft_model(tiny_llama(tie_word_embeddings=tied), given)
        assert given.to_dict() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(tiny_llama(tie_word_embeddings=False), config())
        get_peft_model(tiny_llama(), config())


@pytest.mark.filterwarnings("ignore:.*not set to True")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target_modules": ["lm_head", "q_proj"]}, r"lm_head shared .* now has its own weight"),
        ({"modules_to_save": ["lm_head"]}, "no longer tied"),
    ],
)
def test_what_merging_unties_is_said(fields: dict[str, Any], words: str) -> None:
    model = get_peft_model(tiny_llama(), config(**fields))
    with pytest.warns(UserWarning, match=words):
        model.merge_and_unload()


def test_copy_and_target_at_once() -> None:
    settings = config(
        target_modules=["lm_head"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    base = tiny_llama()
    with pytest.raises(
        UnsupportedLayerError, match=r"makes 'lm_head' share the copy of the input embedding"
    ):
        get_peft_model(base, settings)
    assert not any("modules_to_save" in name for name, _ in base.named_modules())


T5 = "T5ForConditionalGeneration"


@pytest.mark.parametrize("kind", [T5, "BartForConditionalGeneration", "GPT2LMHeadModel"])
def test_what_models_tie(kind: str) -> None:
    """By identity, among what transformers says."""
    from peft.utils.other import _get_module_names_tied_with_embedding

    model = tiny(kind)
    assert modules_tied_to_embedding(model) == _get_module_names_tied_with_embedding(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def drawn(model: Any, seed: int = 0) -> Any:
    """Gives all that trains random values; for evaluation."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def gpt2(library: Any = fastlora, **fields: Any) -> Any:
    """With the embedding called ``wte``, to which PEFT ties nothing."""
    settings = {"r": 2, "target_modules": ["c_attn"], "ensure_weight_tying": True, **fields}
    return drawn(library.get_peft_model(tiny("GPT2LMHeadModel"), library.LoraConfig(**settings)))


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize("fields", [{"modules_to_save": ["wte"]}, {"target_modules": ["wte"]}])
def test_files_say_what_is_tied_to_an_embedding_that_peft_does_not_know(
    fields: dict[str, Any], embeddings: bool, tmp_path: Path
) -> None:
    import peft

    theirs, ours = gpt2(peft, **fields), gpt2(**fields)
    for model, ties in ((theirs, False), (ours, True)):
        model.save_pretrained(tmp_path, save_embedding_layers=embeddings)
        loaded = LoraModel.from_pretrained(tiny("GPT2LMHeadModel"), tmp_path)
        assert (type(loaded.get_base_model().lm_head) is not nn.Linear) == ties
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("library", ["fastlora", "peft"])
@pytest.mark.parametrize(
    ("tied", "fields"),
    [
        (True, {"trainable_token_indices": [1, 5]}),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        (False, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ],
)
def test_files_with_base_embeddings(
    library: str, tied: bool, fields: dict[str, Any], tmp_path: Path
) -> None:
    """As PEFT saves them once the vocabulary was resized, with a second copy of what is tied."""
    made = pytest.importorskip(library)
    base = tiny_llama(tie_word_embeddings=tied)
    nn.init.normal_(base.lm_head.weight, std=0.3)
    settings = made.LoraConfig(r=2, target_modules=["q_proj"], **fields)
    model = drawn(made.get_peft_model(base, settings))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = LoraModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path)
    assert loaded.load_adapter(tmp_path, "again").missing_keys == []
    for name in ("default", "again"):
        loaded.set_adapter(name)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
@pytest.mark.parametrize(
    ("kind", "library"), [("gpt2", "fastlora"), ("llama", "peft"), ("rows", "peft")]
)
def test_files_load_into_wrapped_models(kind: str, library: str, how: str, tmp_path: Path) -> None:
    """The base model keeps its embedding, and what is tied stays tied."""
    made = pytest.importorskip(library)
    base = {"gpt2": lambda: tiny("GPT2LMHeadModel")}.get(kind, tiny_llama)
    fields: dict[str, Any] = {"trainable_token_indices": [1, 5]}
    if kind != "rows":
        fields = {"modules_to_save": ["wte" if kind == "gpt2" else "embed_tokens"]}
    fields["target_modules"] = ["c_attn" if kind == "gpt2" else "q_proj"]
    settings = made.LoraConfig(r=2, ensure_weight_tying=True, **fields)
    model = drawn(made.get_peft_model(base(), settings))
    model.save_pretrained(tmp_path, save_embedding_layers=kind == "rows")
    wrapped = base()
    part = wrapped.base_model_prefix
    setattr(wrapped, part, in_a_wrapper(how, getattr(wrapped, part))[0])
    loaded = LoraModel.from_pretrained(wrapped, tmp_path)
    expected = LoraModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert type(wrapped.lm_head) is type(expected.get_base_model().lm_head)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), logits(base()))


def test_saving_says_what_peft_will_not_tie(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="'lm_head' shares the LoRA factors .* but PEFT will"):
        gpt2(target_modules=["wte"]).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tied_lora(["embed_tokens"]).save_pretrained(tmp_path, save_embedding_layers=False)


COPIES = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
FACTORS = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "copies": ({"modules_to_save": ["lm_head"]}, {}, "has a copy of lm_head"),
    "lora_bias": ({"lora_bias": True}, {}, "lora_bias="),
    "bias": ({"bias": "lora_only"}, {}, "bias='(none|lora_only)'"),
    "ties of factors": (FACTORS, {**FACTORS, "ensure_weight_tying": False}, "ties '?lm_head"),
    "ties of copies": (COPIES, {"modules_to_save": ["embed_tokens", "lm_head"]}, "ties '?lm_head"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("over", [False, True], ids=["one over the other", "the other over one"])
@pytest.mark.parametrize("kind", UNLIKE)
def test_a_file_of_an_adapter_that_is_unlike_the_loaded_one(
    kind: str, over: bool, tmp_path: Path
) -> None:
    *fields, words = UNLIKE[kind]
    models = [drawn(get_peft_model(tiny_llama(), config(**each))) for each in fields]
    models[over].save_pretrained(tmp_path)
    with unchanged(models[not over]), pytest.raises(CheckpointError, match=words):
        models[not over].load_adapter(tmp_path, "default")
    if kind.startswith("ties"):
        with unchanged(models[not over]), pytest.raises(ConfigError, match=words):
            fastlora.hotswap_adapter(models[not over], tmp_path, "default")


@pytest.mark.parametrize("fields", [COPIES, FACTORS], ids=["copies", "factors"])
def test_an_adapter_beside_the_embedding_is_swapped_for_a_tied_one(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model, plain = (drawn(get_peft_model(tiny_llama(), config(**each))) for each in (fields, {}))
    plain.save_pretrained(tmp_path)
    fastlora.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_tied_factors_are_swapped(tmp_path: Path) -> None:
    """The head gets the rank and scaling of the embedding; nobody else's."""
    fields = {"target_modules": ["wte", "c_attn"], "alpha_pattern": {"lm_head": 5}}
    one, other = gpt2(**fields), gpt2(**fields, r=4, lora_alpha=3)
    other.save_pretrained(tmp_path)
    fastlora.hotswap_adapter(one, tmp_path, "default")
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)
    assert one.get_base_model().lm_head.r == {"default": 4}


@pytest.mark.parametrize("scaled", [False, True])
def test_a_swap_sets_the_initial_scaling_of_tied_heads(scaled: bool, tmp_path: Path) -> None:
    """It is what the embedding has, whatever `set_scale` had set, and what `set_scale` uses."""
    new = {"lora_alpha": 16} if scaled else {"use_rslora": True, "r": 4, "lora_alpha": 8}
    one, other = (drawn(get_peft_model(tiny_llama(), config(**FACTORS, **c))) for c in ({}, new))
    other.save_pretrained(tmp_path)
    if scaled:
        one.get_base_model().lm_head.set_scale("default", 2.0)
    fastlora.hotswap_adapter(one, tmp_path, "default")
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)
    for model in (one, other):
        model.get_base_model().lm_head.set_scale("default", 0.5)
    torch.testing.assert_close(logits(one), logits(other), rtol=1e-5, atol=1e-5)


def test_a_head_that_another_adapter_ties_is_not_left_out(tmp_path: Path) -> None:
    model = drawn(get_peft_model(tiny_llama(), config(**FACTORS)))
    model.add_adapter("b", config())
    get_peft_model(tiny_llama(), config(target_modules=["q_proj", "lm_head"])).save_pretrained(
        tmp_path
    )
    with (
        unchanged(model),
        pytest.raises(HotswapError, match=r"unexpected keys.*lm_head\.lora_A\.b"),
    ):
        fastlora.hotswap_adapter(model, tmp_path, "b")


def test_ties_of_wrapped_modules_are_compared(tmp_path: Path) -> None:
    base = tiny_llama()
    base.model = checkpoint_wrapper(base.model)
    model = drawn(get_peft_model(base, config(**FACTORS)))
    untied = config(**{**FACTORS, "ensure_weight_tying": False})
    get_peft_model(tiny_llama(), untied).save_pretrained(tmp_path)
    with unchanged(model), pytest.raises(ConfigError, match="ties 'lm_head'"):
        fastlora.hotswap_adapter(model, tmp_path, "default")


@pytest.mark.parametrize("left_out", ["lm_head", "model.embed_tokens"])
def test_a_file_with_only_one_of_the_tied_copies(left_out: str) -> None:
    model, new = (drawn(tied_copies(["lm_head"]), seed) for seed in (0, 1))
    tensors = dict(fastlora.get_peft_model_state_dict(new))
    del tensors[f"base_model.model.{left_out}.weight"]
    given = tensors, "default", new.peft_config["default"]
    fastlora.hotswap_adapter_from_state_dict(model, *given)
    torch.testing.assert_close(logits(model), logits(new), rtol=1e-5, atol=1e-5)


def weighted(model: Any) -> str:
    model.add_weighted_adapter(["default"], [1.0], "sum")
    return "sum"


def reduced(model: Any) -> str:
    return fastlora.reduce_rank(model, 1.0).adapter_name


def without_intruders(model: Any) -> str:
    fastlora.reduce_intruder_dimension(model, threshold_epsilon=0.0, logging_sink=None)
    return "intruder_reduced"


@pytest.mark.parametrize("compute", [weighted, reduced, without_intruders])
@pytest.mark.parametrize("fields", [COPIES, FACTORS], ids=["copies", "factors"])
def test_a_computed_adapter_is_tied_as_its_source(
    fields: dict[str, Any], compute: Any, tmp_path: Path
) -> None:
    model = drawn(get_peft_model(tiny_llama(), config(**fields)))
    expected, base = logits(model), model.get_base_model()
    name = compute(model)
    ties = [modules_adapted_with_embedding(base, each) for each in ("default", name)]
    assert ties[0] == ties[1] and any(ties[0])
    model.set_adapter(name)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    expected = logits(drawn(model, 1))  # as training changes what is tied
    model.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(tiny_llama(), tmp_path / name)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert modules_adapted_with_embedding(loaded.get_base_model(), "default") == ties[0]


def test_a_sum_of_adapters_of_which_only_some_are_tied() -> None:
    model = drawn(get_peft_model(tiny_llama(), config(**FACTORS)))
    model.add_adapter("b", config(target_modules=["embed_tokens"]))
    model.add_adapter("c", config())
    with unchanged(model), pytest.raises(AdapterStateError, match=r"adapters \['b'\] do not tie"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "sum")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_weighted_adapter(["default", "c"], [1.0, 1.0], "sum", "cat")
    assert model.get_base_model().lm_head.r == {"default": 2, "sum": 2}


def test_copies_on_the_meta_device_stay_tied(tmp_path: Path) -> None:
    source = drawn(tied_copies(["lm_head"]))
    source.save_pretrained(tmp_path)
    settings = config(modules_to_save=["lm_head"], ensure_weight_tying=True)
    model = get_peft_model(tiny_llama(), settings, low_cpu_mem_usage=True)
    model.load_adapter(tmp_path, "default")
    assert modules_adapted_with_embedding(model.get_base_model(), "default").copies == ("lm_head",)
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-5)


def test_ranks_of_tied_factors_are_padded() -> None:
    model = drawn(tied_lora(["embed_tokens", "q_proj"]))
    model.get_base_model().lm_head.set_scale("default", 2.0)
    expected = logits(model)
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert model.get_base_model().lm_head.r == {"default": 8}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def hooked_linear() -> nn.Module:
    linear = nn.Linear(16, 16)
    linear.register_forward_hook(lambda module, args, y: y.clone())
    return linear


ALIASED: dict[str, Any] = {
    "linear": lambda: nn.Linear(16, 16),
    "hooks": hooked_linear,
    "embedding": lambda: nn.Embedding(16, 16),
    "convolution": lambda: nn.Conv1d(3, 4, 3),
    "attention": lambda: nn.MultiheadAttention(16, 2),
    "4 bits": lambda: quantized_two_layers("bitsandbytes").q,
    "int8": lambda: quantized_two_layers("torchao").q,
}


@pytest.mark.parametrize("kind", ALIASED)
def test_a_module_with_two_names_is_untied_before_a_merge(kind: str) -> None:
    """Only one of the names has an adapter, before and after; a bias is merged into, too."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"q": ALIASED[kind]()})
    base["k"] = base["q"]
    q, lora_bias = base["q"], kind in ("linear", "hooks")
    x = torch.arange(16) if kind == "embedding" else torch.randn(3, 16)
    inputs = (x, x, x) if kind == "attention" else (x,)

    def output(name: str) -> torch.Tensor:
        y = base[name](*inputs)
        return (y[0] if isinstance(y, tuple) else y).detach()

    before = output("k")
    fields = {"lora_bias": lora_bias, "init_lora_weights": False}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q"], **fields))
    randomize(model)
    adapted = output("q")
    assert (adapted - before).abs().max() > 0.1
    with pytest.raises(AdapterStateError, match="'q' shares its weight with 'k'"):
        model.merge_adapter()
    assert torch.equal(output("q"), adapted)
    alone = copy.deepcopy(model).unload()
    assert alone["q"] is alone["k"]
    with pytest.warns(UserWarning, match="q shared its weight with k, and now has its own"):
        assert model.merge_and_unload() is base
    assert base["q"] is q and base["k"] is not q and type(base["k"]) is type(q)
    torch.testing.assert_close(output("k"), before, rtol=0, atol=0)
    error = (output("q") - adapted).norm() / (adapted - before).norm()
    assert error < (0.3 if kind in ("4 bits", "int8") else 1e-5)


def test_a_module_with_two_names_that_cannot_be_copied() -> None:
    """Its forward would keep calling the original module; nothing has changed then."""
    base = nn.ModuleDict({"q": nn.Linear(16, 16), "v": nn.Linear(16, 16)})
    forward = base["v"].forward
    base["v"].forward = lambda x: forward(x)  # type: ignore[method-assign]
    base["w"] = base["v"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q", "v"]))
    with unchanged(model), pytest.raises(AdapterStateError, match="'v' is also registered as 'w'"):
        model.merge_and_unload()


def test_blocks_with_two_names_share_their_adapters() -> None:
    base = nn.ModuleDict({"a": nn.Sequential(nn.Linear(16, 16))})
    base["b"] = base["a"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights="pissa"))
    randomize(model)
    x = torch.randn(3, 16)
    expected = base["b"](x).detach()
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()
    assert base["a"] is base["b"]
    torch.testing.assert_close(base["b"](x), expected)
