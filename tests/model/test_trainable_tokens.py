"""`trainable_token_indices`: several adapters, options of embeddings, files, and refusals."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.layers import TrainableTokensWrapper
from fastlora.validation import (
    AdapterStateError,
    CheckpointError,
    ConfigError,
    TargetNotFoundError,
    UnsupportedLayerError,
)
from tests.support.peft_twins import assert_files_cross, assert_same_training, peft
from tests.support.tiny import randomize, tiny, tiny_llama, trainable, unchanged

pytest.importorskip("transformers")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])


def logits(model: Any) -> torch.Tensor:
    """A model's output."""
    return model(input_ids=IDS).logits


def config(tokens: Any, **fields: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **fields}
    return LoraConfig(trainable_token_indices=tokens, **settings)


def train_rows(model: nn.Module, seed: int = 3) -> Any:
    """Gives every row that trains, and every lora_B, a random value."""
    randomize(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


def test_several_adapters() -> None:
    """Each has its own rows, alone, switched, and in one batch, in training too."""
    base = tiny_llama()
    model = get_peft_model(base, config([1, 5, 9]), "a")
    model.add_adapter("b", config([9, 20]))
    model.add_adapter("c", config(None))
    train_rows(model)
    ids = IDS[:1].repeat(4, 1)
    alone, gradients = {}, {}
    for name in "abc":
        model.set_adapter(name)
        trains = {n for n, p in model.named_parameters() if p.requires_grad}
        assert all(f".{name}" in n for n in trains)
        assert any("tokens_delta" in n for n in trains) == (name != "c")
        y = alone[name] = model(input_ids=ids[:1]).logits
        y.square().sum().backward()
        gradients |= {n: p.grad for n, p in model.named_parameters() if n in trains}
        model.zero_grad()
    with model.disable_adapter():
        assert not trainable(model)
        alone["none"] = model(input_ids=ids[:1]).logits
        assert torch.equal(alone["none"], tiny_llama()(input_ids=ids[:1]).logits)
    assert len(trainable(model)) == 4
    rows = ["b", None, "a", "c"]
    for name in "abc":
        for module in model.modules():
            if hasattr(module, "adapter_parameters") and not isinstance(module, LoraModel):
                for parameter in module.adapter_parameters(name):
                    parameter.requires_grad_(True)
    together = model(input_ids=ids, adapter_names=rows).logits
    for i, name in enumerate(rows):
        torch.testing.assert_close(together[i : i + 1], alone[name or "none"], rtol=1e-4, atol=3e-5)
    together.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-3)
    # Ids for each token.
    with torch.no_grad(), fastlora.adapters(model, [*"bbb", None, *"aa"]):
        y = model.get_input_embeddings()(ids[:1])
        at = {name: model.get_input_embeddings().token_adapter for name in "ab"}
        assert torch.equal(y[0, 4], at["a"].trainable_tokens_delta["a"][0])
        assert torch.equal(y[0, 2], at["b"].trainable_tokens_delta["b"][0])
        assert torch.equal(y[0, 0], at["a"].base_layer.weight[1])
    model.delete_adapter("a")
    assert not any(".a" in name for name, _ in model.named_parameters())
    model.add_adapter("a", config([2, 3]))  # other rows under the same name
    model.set_adapter("a")
    train_rows(model, seed=4)
    y = model.get_input_embeddings()(torch.tensor([1, 2]))
    weight = model.get_input_embeddings().token_adapter.base_layer.weight
    assert torch.equal(y[0], weight[1]) and not torch.equal(y[1], weight[2])


BASES: dict[str, Callable[[], Any]] = {
    "encoder-decoder": lambda: tiny("T5ForConditionalGeneration", decoder_start_token_id=0),
    "decoder-only": tiny_llama,
    "untied": lambda: tiny_llama(tie_word_embeddings=False),
}


def life(library: Any, base: str, first: list[int] | None, folder: Path) -> list[Any]:
    """Returns logits and the rows that train, after each step of several adapters' lives."""
    found: list[Any] = []

    def record(model: Any) -> None:
        more = {"decoder_input_ids": IDS} if base == "encoder-decoder" else {}
        rows = {n for n, p in model.named_parameters() if "_delta" in n and p.requires_grad}
        with torch.no_grad():
            found.append((model(input_ids=IDS, **more).logits, rows))

    def made(tokens: list[int] | None) -> Any:
        target = "q" if base == "encoder-decoder" else "q_proj"
        return library.LoraConfig(r=2, target_modules=[target], trainable_token_indices=tokens)

    model = library.get_peft_model(BASES[base](), made(first)).eval()
    for adapter, tokens in (("b", [5, 9]), ("c", [2])):
        model.add_adapter(adapter, made(tokens))
        for name, parameter in model.named_parameters():
            if name.endswith(f"_delta.{adapter}"):
                generator = torch.Generator().manual_seed(ord(adapter))
                torch.nn.init.normal_(parameter, generator=generator)
        record(model)
        model.merge_adapter()
        record(model)
        model.unmerge_adapter()
    for adapter in ("default", "b", "c"):
        model.set_adapter(adapter)
        record(model)
    model.save_pretrained(folder, selected_adapters=["b"])
    loaded = library.get_peft_model(BASES[base](), made(None)).eval()
    loaded.load_adapter(folder / "b", "b")
    record(loaded)
    loaded.set_adapter("default")
    record(loaded)
    return found


@pytest.mark.parametrize("first", [None, [1, 5]], ids=["no rows", "rows"])
@pytest.mark.parametrize("base", BASES)
def test_an_adapter_that_was_added_acts_as_in_peft(base: str, first: Any, tmp_path: Path) -> None:
    """`trainable_token_indices` acts as in PEFT, before an adapter is set and afterwards."""
    lives = (life(library, base, first, tmp_path) for library in (fastlora, peft))
    for (ours, trains), (theirs, expected) in zip(*lives, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert trains == expected


def test_two_that_act_raise() -> None:
    model = get_peft_model(tiny_llama(), config([1]), "a")
    model.add_adapter("b", config([2]))
    with pytest.raises(AdapterStateError, match="own rows of the same module"):
        model.set_adapter(["a", "b"])
    assert model.active_adapters == ["a"]


def test_merging_several() -> None:
    """Adapters without a token in common merge; others are refused, at once or one by one."""
    model = get_peft_model(tiny_llama(), config([1, 2]), "a")
    model.add_adapter("b", config([2, 3]))
    model.add_adapter("c", config([4]))
    train_rows(model)
    weight = model.get_input_embeddings().token_adapter.base_layer.weight
    before = weight.detach().clone()
    with pytest.raises(AdapterStateError, match=r"'b' are already defined .* \[2\]"):
        model.merge_adapter(adapter_names=["a", "b"])
    model.merge_adapter(adapter_names=["a"])
    with pytest.raises(ValueError, match="'b' are already defined"):
        model.merge_adapter(adapter_names=["b"])
    model.merge_adapter(adapter_names=["c"])
    model.add_adapter("d", config([1, 4, 6]))  # starts from the weight without merges
    rows = model.get_input_embeddings().token_adapter.trainable_tokens_delta
    assert torch.equal(rows["d"], before[[1, 4, 6]])
    assert torch.equal(weight[[1, 2, 4]], torch.cat((rows["a"], rows["c"])))
    model.unmerge_adapter()
    assert torch.equal(weight, before)
    with torch.no_grad():
        rows["a"][0, 0] = float("nan")
    with pytest.raises(AdapterStateError, match="non-finite values"):
        model.merge_adapter(adapter_names=["a"], safe_merge=True)
    assert torch.equal(weight, before)


class Words(nn.Module):
    """An embedding with every option, and a head that is tied to it and has a bias."""

    def __init__(self, tied: bool, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(12, 8, **options)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12)
        self.config = {"tie_word_embeddings": tied}
        if tied:
            self.head.weight = self.words.weight
            self._tied_weights_keys = {"head.weight": "words.weight"}

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids ``[...]`` to ``[..., 12]``."""
        return self.head(self.inner(self.words(ids)))


@pytest.mark.parametrize(
    "options",
    [{}, {"padding_idx": 2}, {"max_norm": 1.5}, {"scale_grad_by_freq": True}],
    ids=lambda options: next(iter(options), "plain"),
)
def test_options_of_an_embedding(options: dict[str, Any]) -> None:
    """Those that change what it gives, or its gradients."""
    ids = torch.tensor([[2, 3, 3, 7, 2, 0], [3, 1, 7, 7, 7, 5]])
    models = []
    for library in (fastlora, peft):
        settings = library.LoraConfig(
            r=2, target_modules=["inner"], trainable_token_indices={"words": [7, 2, 3]}
        )
        torch.manual_seed(1)
        models.append(train_rows(library.get_peft_model(Words(False, **options), settings)))
    assert_same_training(*models, lambda model: model.double()(ids))


def test_a_tied_head_keeps_its_bias() -> None:
    """PEFT drops the bias of a head whose rows are trained; truth is the merged model."""
    model = get_peft_model(
        Words(True), LoraConfig(r=2, target_modules=["inner"], trainable_token_indices=[7, 2])
    )
    ids = torch.tensor([[2, 3, 7]])
    expected = train_rows(model)(ids)
    assert model.get_base_model().head.weight.requires_grad  # with the rows in place
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.words.weight
    torch.testing.assert_close(merged(ids), expected)


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids ``[...]`` to ``[..., D]``."""
        return super().forward(ids) * self.embed_scale


def test_scaled_embeddings_and_16_bits() -> None:
    """Rows are scaled as the others are, and kept in fp32 unless told otherwise."""
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        models = []
        for library in (fastlora, peft):
            words = Words(False)
            words.words = Scaled(12, 8)
            torch.manual_seed(1)
            nn.init.normal_(words.words.weight)
            settings = library.LoraConfig(
                r=2, target_modules=["inner"], trainable_token_indices=[7, 2]
            )
            model = library.get_peft_model(
                words.bfloat16(), settings, autocast_adapter_dtype=autocast
            )
            models.append(train_rows(model))
        ids = torch.arange(12)
        ours, theirs = (model.get_input_embeddings() for model in models)
        assert torch.equal(ours(ids), theirs(ids))
        rows = [m.token_adapter.trainable_tokens_delta["default"] for m in (ours, theirs)]
        assert rows[0].dtype == rows[1].dtype == dtype
        merged = models[0].merge_and_unload()
        assert torch.equal(merged.words(ids), theirs(ids))


@pytest.mark.parametrize(
    ("tokens", "fields", "error", "words"),
    [
        ([], {}, ConfigError, "must be a list of token ids"),
        ([1, 1], {}, ConfigError, "each token id at most once, got 1 twice"),
        ([-1], {}, ConfigError, "non-negative token ids, got -1"),
        ({}, {}, ConfigError, "must name at least one module"),
        ({"embed_tokens": 3}, {}, ConfigError, r"\['embed_tokens'\] must be a list"),
        ([97], {}, ConfigError, "contains 97, but the module has only 97 rows"),
        ({"embed_tokenz": [1]}, {}, TargetNotFoundError, "close names: embed_tokens"),
        ({"norm": [1]}, {}, UnsupportedLayerError, "needs an nn.Embedding or nn.Linear"),
        (
            [1],
            {"modules_to_save": ["embed_tokens"]},
            UnsupportedLayerError,
            "already marked to be trained f",
        ),
        ([1], {"target_modules": ["lm_head"]}, UnsupportedLayerError, "already adapted with LoRA"),
        (
            {"lm_head": [1], "embed_tokens": [2]},
            {"ensure_weight_tying": True},
            ConfigError,
            "Cannot ensure weight tying",
        ),
    ],
)
def test_errors(tokens: Any, fields: dict[str, Any], error: type, words: str) -> None:
    base = tiny_llama()
    with unchanged(base), pytest.raises(error, match=words):
        get_peft_model(base, config(tokens, **fields))


def test_errors_beside_other_adapters() -> None:
    """What another adapter has of the module, and what would tie it otherwise."""
    model = get_peft_model(tiny_llama(), config([1]), "a")
    assert isinstance(model.get_input_embeddings(), TrainableTokensWrapper)
    for tokens, fields, words in (
        ({"lm_head": [1], "embed_tokens": [2]}, {}, "must be tied in all adapters of a model"),
        (None, {"target_modules": ["lm_head"]}, "in which adapters train rows"),
        (
            None,
            {"modules_to_save": ["embed_tokens"]},
            "in which adapters train rows",
        ),
    ):
        with unchanged(model), pytest.raises(UnsupportedLayerError, match=words):
            model.add_adapter("b", config(tokens, **fields))
    other = get_peft_model(tiny_llama(), config(None, modules_to_save=["embed_tokens"]), "a")
    with pytest.raises(
        UnsupportedLayerError, match=r"adapts this module with a full copy \(modules_to_save\)"
    ):
        other.add_adapter("b", config([1]))


# Ways to train the embeddings: rows, LoRA, and copies, tied and not.
WAYS: dict[str, dict[str, Any]] = {
    "rows": {"tokens": [1, 3]},
    "rows apart": {"tokens": {"embed_tokens": [1], "lm_head": [2]}},
    "lora": {"tokens": None, "target_modules": ["q_proj", "embed_tokens"]},
    "copy": {"tokens": None, "modules_to_save": ["embed_tokens"]},
    "lora head": {"tokens": None, "target_modules": ["q_proj", "lm_head"]},
}
WAYS |= {f"tied {way}": {**WAYS[way], "ensure_weight_tying": True} for way in ("lora", "copy")}


@pytest.mark.parametrize("later", WAYS)
@pytest.mark.parametrize("deleted", WAYS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_deleted_adapter_leaves_its_modules_to_others(deleted: str, later: str) -> None:
    model = get_peft_model(tiny_llama(), config(**WAYS[deleted]), "a")
    model(input_ids=IDS, adapter_names=["a", None])
    model.delete_adapter("a")
    torch.testing.assert_close(logits(model), logits(tiny_llama()))
    model.add_adapter("b", config(**WAYS[later]))
    model.set_adapter("b")
    fresh = get_peft_model(tiny_llama(), config(**WAYS[later]), "b")
    for each in (model, fresh):
        for module in each.modules():
            module.eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in sorted(each.named_parameters()):
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
    torch.testing.assert_close(logits(model), logits(fresh))
    ids = ["b", None]
    mixed = model(input_ids=IDS, adapter_names=ids).logits
    torch.testing.assert_close(mixed, fresh(input_ids=IDS, adapter_names=ids).logits)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_deleted_adapter_leaves_hooks_where_they_are(way: str) -> None:
    """Such as the hook that gradient checkpointing needs."""
    model = get_peft_model(tiny_llama(), config(**WAYS[way]), "a")
    model.get_input_embeddings().register_forward_hook(lambda _, args, y: y * 2.0)
    before = logits(model)
    model.delete_adapter("a")
    for tokens in ([1], None):
        with contextlib.suppress(UnsupportedLayerError):
            model.add_adapter("rows" if tokens else "lora", config(tokens))
    torch.testing.assert_close(logits(model), before)


def test_a_failed_addition_puts_the_layer_of_a_deleted_adapter_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = get_peft_model(tiny_llama(), config(**WAYS["lora"]), "a")
    model.delete_adapter("a")

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(TrainableTokensWrapper, "add_adapter", fail)
    with unchanged(model), pytest.raises(RuntimeError, match="no memory"):
        model.add_adapter("b", config([1]))
    model.add_adapter("c", config(**WAYS["lora"]))


def test_files(tmp_path: Path) -> None:
    """A resized embedding is saved along; other rows are no place for an adapter."""
    base = tiny_llama()
    base.resize_token_embeddings(99)
    model = train_rows(get_peft_model(base, config([1, 98])))

    def fresh() -> Any:
        resized = tiny_llama()
        resized.resize_token_embeddings(99)
        with torch.no_grad():
            resized.get_input_embeddings().weight[2:].zero_()
        return resized

    expected = logits(model).detach()
    assert_files_cross((model,), fresh, logits, expected, tmp_path, save_embedding_layers=True)
    with pytest.raises(ConfigError, match="contains 98, but the module has only 97 rows"):
        LoraModel.from_pretrained(tiny_llama(), tmp_path / "saved0")
    model.load_adapter(tmp_path / "saved0", "default")
    other = train_rows(get_peft_model(tiny_llama(), config([1, 2, 3])))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="load the new adapter under another name"):
        model.load_adapter(tmp_path / "other", "default")
    pool = fastlora.AdapterPool(tiny_llama(), target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match="do not support trainable_token_indices"):
        pool.load("a", tmp_path / "other")


def test_copies_stay_tied() -> None:
    model = copy.deepcopy(train_rows(get_peft_model(tiny_llama(), config([1, 5]))))
    base = model.get_base_model()
    assert base.lm_head.token_adapter.tied_adapter is base.model.embed_tokens.token_adapter
    expected = model(input_ids=IDS).logits
    train_rows(model, seed=9)
    assert not torch.equal(model(input_ids=IDS).logits, expected)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
