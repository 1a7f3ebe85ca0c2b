"""Hot swap: outputs of the new adapter, nothing compiled anew, and a model as it was on failure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.hotswap import HotswapError
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
)
from tests.support.compiled import graph_count
from tests.support.peft_twins import assert_files_cross, peft
from tests.support.tiny import adapted, in_a_wrapper, randomize, tiny_llama, two_layers, unchanged

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))


def saved(folder: Path, **config: Any) -> torch.Tensor:
    """Saves another adapter, and returns what a model with it computes."""
    model = adapted(peft, **{"seed": 2, **config})
    if model.peft_config["default"].modules_to_save:
        with torch.no_grad():
            model.base_model.model.head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(folder)
    y: torch.Tensor = model(X).detach()
    return y


SWAPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({}, {"r": 2, "lora_alpha": 32}),
    ({"r": 2}, {"r": 7, "rank_pattern": {"v": 3}, "alpha_pattern": {"q": 5}}),
    ({}, {"target_modules": ["v"], "use_rslora": True}),
    ({"use_dora": True}, {"use_dora": True, "r": 3, "target_modules": ["q"]}),
    ({"lora_bias": True}, {"lora_bias": True, "r": 3}),
    ({"modules_to_save": ["head"]}, {"modules_to_save": ["head"]}),
    ({"modules_to_save": ["head"]}, {}),
]


@pytest.mark.parametrize("old, new", SWAPS, ids=[f"{old} {new}" for old, new in SWAPS])
@pytest.mark.parametrize("padded", [False, True])
def test_the_new_adapter_acts(
    old: dict[str, Any], new: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    """With other ranks, alphas and targets too; saved, it loads in PEFT and computes the same."""
    expected = saved(tmp_path / "new", **new)
    model = adapted(**old)
    before = model(X).detach()
    if padded:
        fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(model(X).detach(), before)
    parameters = dict(model.named_parameters())
    fastlora.hotswap_adapter(model, tmp_path / "new", "default")
    torch.testing.assert_close(model(X).detach(), expected, rtol=1e-4, atol=1e-5)
    if padded:
        assert all(p is parameters[name] for name, p in model.named_parameters())
    assert_files_cross((model,), two_layers, lambda each: each(X), expected, tmp_path)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dora", [False, True])
def test_nothing_is_compiled_anew(dora: bool, tmp_path: Path) -> None:
    """In a graph for evaluation and in one that trains, over adapters of three ranks and alphas."""
    folders, outputs = [], []
    for index, (r, alpha) in enumerate(((2, 3), (8, 8), (5, 20))):
        folders.append(tmp_path / str(index))
        config = {"seed": index + 2, "r": r, "lora_alpha": alpha, "use_dora": dora}
        outputs.append(saved(folders[-1], **config))
    model = adapted(use_dora=dora)
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
    compiled(X).sum().backward()
    count = graph_count()
    for folder, expected in zip(folders, outputs, strict=True):
        fastlora.hotswap_adapter(compiled, folder, "default")
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), expected, rtol=1e-4, atol=1e-5)
        model.zero_grad()
        compiled(X).sum().backward()
    assert graph_count() == count
    factor = model.base_model.model.q.lora_B["default"].weight
    assert factor.grad is not None


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_wrapped_modules(how: str, tmp_path: Path) -> None:
    """Another rank and a pattern for one module act, by a folder and by tensors of such a model."""
    config = {"r": 6, "alpha_pattern": {"0.q": 40}}
    new = adapted(seed=2, base=in_a_wrapper("none"), **config)
    new.save_pretrained(tmp_path)
    model = adapted(base=in_a_wrapper(how))
    fastlora.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), new(X))
    model.save_pretrained(tmp_path / "again")
    again = fastlora.LoraModel.from_pretrained(in_a_wrapper("none"), tmp_path / "again")
    assert torch.equal(again(X), new(X))
    model = adapted(base=in_a_wrapper(how))
    state = adapted(seed=2, base=in_a_wrapper(how), **config).state_dict()
    state = {key: tensor for key, tensor in state.items() if "lora_" in key}
    fastlora.hotswap_adapter_from_state_dict(model, state, "default", new.peft_config["default"])
    assert torch.equal(model(X), new(X))


def test_a_model_with_a_compiled_base(tmp_path: Path) -> None:
    expected = saved(tmp_path)
    model = adapted(base=torch.compile(two_layers(), backend="eager"))
    fastlora.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), expected)


def test_a_mixed_batch_sees_the_swap(tmp_path: Path) -> None:
    """What was packed for an earlier batch is not used again."""
    expected = saved(tmp_path, r=3)
    model = adapted()
    model.add_adapter("other", fastlora.LoraConfig(r=2, target_modules=["q"]))
    ids = ["default", None, "other", "default", None]
    with torch.no_grad():
        for _ in range(3):
            model(X, adapter_names=ids)
        fastlora.hotswap_adapter(model, tmp_path, "default")
        y = model(X, adapter_names=ids)
    torch.testing.assert_close(y[[0, 3]], expected[[0, 3]], rtol=1e-4, atol=1e-5)


def test_tensors_by_either_name(tmp_path: Path) -> None:
    """A state dict of a model, and one of a file; PEFT's config is taken too."""
    other = adapted(seed=2, r=2)
    expected = other(X).detach()
    by_file = peft.get_peft_model_state_dict(adapted(peft, seed=2, r=2))
    in_model = {k: v for k, v in other.state_dict().items() if "lora_" in k}
    for tensors, library in ((in_model, fastlora), (by_file, peft)):
        model = adapted()
        config = library.LoraConfig(r=2, target_modules=["q", "v"])
        fastlora.hotswap_adapter_from_state_dict(model, tensors, "default", config)
        torch.testing.assert_close(model(X).detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_state_dict_of_the_whole_model() -> None:
    """What both base models have is no part of the adapter: biases, copied modules, buffers."""

    def one(seed: int, r: int) -> Any:
        base = nn.Sequential(two_layers(), nn.BatchNorm1d(5))
        return adapted(seed=seed, base=base, r=r, modules_to_save=["head"])

    model, new = one(1, 4), one(2, 2)
    given = new.state_dict(), "default", new.peft_config["default"]
    fastlora.hotswap_adapter_from_state_dict(model, *given)
    torch.testing.assert_close(model(X), new(X), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.get_base_model()[0].v.bias[0] += 1
    with (
        unchanged(model),
        pytest.raises(HotswapError, match=r"unexpected keys found: \S+\.v\.bias"),
    ):
        fastlora.hotswap_adapter_from_state_dict(model, *given)


@pytest.mark.parametrize("merged", [False, True])
def test_base_biases_of_layers_of_another_adapter(merged: bool, tmp_path: Path) -> None:
    """They are the swapped adapter's to train, also where the other one is merged into them."""
    new = adapted(seed=2, target_modules=["q"], bias="all")
    with torch.no_grad():
        new.base_model.model.v.bias.add_(1)
    new.save_pretrained(tmp_path)
    model = adapted(target_modules=["q"], bias="all")
    model.add_adapter("other", fastlora.LoraConfig(r=2, target_modules=["v"], lora_bias=True))
    randomize(model)
    if merged:
        model.merge_adapter(["other"])
    fastlora.hotswap_adapter(model, tmp_path, "default")
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), new(X), rtol=1e-4, atol=1e-5)


def test_preparing() -> None:
    """Requires-grad flags, a config that is handed in, and the model's own stay right."""
    model = adapted(rank_pattern={"q": 2}, lora_alpha=8)
    model.base_model.model.q.lora_A["default"].requires_grad_(False)
    layers = model.base_model.model.q, model.base_model.model.v
    scalings = [layer.scaling["default"] for layer in layers]
    config = fastlora.LoraConfig(r=4, rank_pattern={"q": 2}, target_modules=["q", "v"])
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=6, config={"x": config})
    assert (config.r, config.rank_pattern) == (6, {"q": 6})
    own = model.peft_config["default"]
    assert (own.r, own.rank_pattern) == (6, {"q": 6})
    assert [own.scaling_for("q"), own.scaling_for("v")] == pytest.approx(scalings)
    layer = model.base_model.model.q
    assert layer.lora_A["default"].weight.shape == (6, 16)
    assert not layer.lora_A["default"].weight.requires_grad
    assert layer.lora_B["default"].weight.requires_grad
    layer.set_scale("default", 1.0)
    assert layer.scaling["default"] == pytest.approx(scalings[0])


@pytest.mark.parametrize("rslora", [False, True])
def test_preparing_keeps_a_temporary_scale_temporary(rslora: bool, tmp_path: Path) -> None:
    model = adapted(use_rslora=rslora)
    before = model(X)
    layers = model.base_model.model.q, model.base_model.model.v
    for layer in layers:
        layer.set_scale("default", 3.0)
    scaled = model(X)
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(X), scaled)
    model.save_pretrained(tmp_path)
    for layer in layers:
        layer.set_scale("default", 1.0)
    torch.testing.assert_close(model(X), before)
    loaded = fastlora.LoraModel.from_pretrained(two_layers(), tmp_path)
    torch.testing.assert_close(loaded(X), before)


def test_errors_change_nothing(tmp_path: Path) -> None:
    """Each before the first tensor is written."""
    saved(tmp_path / "wide", target_modules=["q", "v", "head"])
    saved(tmp_path / "dora", use_dora=True)
    saved(tmp_path / "dropout", lora_dropout=0.5)
    saved(tmp_path / "good", r=9)
    model = adapted()
    wrong: list[tuple[str, str, type[Exception], str]] = [
        ("wide", "default", HotswapError, "unexpected keys found: .*head.lora_A.default.weight"),
        ("wide", "default", RuntimeError, "Hot swapping the adapter did not succeed"),
        ("dora", "default", ConfigError, "for use_dora, False != True"),
        ("dropout", "default", ConfigError, "for lora_dropout"),
        ("good", "absent", AdapterNotFoundError, "no adapter named 'absent'"),
        ("nowhere", "default", CheckpointError, "nowhere"),
    ]
    for folder, name, error, words in wrong:
        with unchanged(model), pytest.raises(error, match=words):
            fastlora.hotswap_adapter(model, tmp_path / folder, name)
    for rank, error, words in (
        (3, ConfigError, r"target rank 3, but the original rank is larger \(4\)"),
        (0, ConfigError, "positive integer"),
    ):
        with unchanged(model), pytest.raises(error, match=words):
            fastlora.prepare_model_for_compiled_hotswap(model, target_rank=rank)
    state = {k: v for k, v in adapted(seed=2, r=2).state_dict().items() if "lora_" in k}
    config = fastlora.LoraConfig(r=3, target_modules=["q", "v"])
    wrong_shape = r"has shape \(2, 16\), expected \(3, 16\)"
    with unchanged(model), pytest.raises(HotswapError, match=wrong_shape):
        fastlora.hotswap_adapter_from_state_dict(model, state, "default", config)
    model.merge_adapter()
    with unchanged(model), pytest.raises(AdapterStateError, match="currently merged"):
        fastlora.hotswap_adapter(model, tmp_path / "good", "default")
    assert model.base_model.model.q.scaling["default"] == 8 / 4


def test_an_adapter_without_values_is_not_used(tmp_path: Path) -> None:
    """One that `low_cpu_mem_usage` left on the meta device; weights can be loaded into it."""
    expected = saved(tmp_path)
    config = fastlora.LoraConfig(r=4, target_modules=["q", "v"])
    model = fastlora.get_peft_model(two_layers(), config, low_cpu_mem_usage=True)
    for use in (
        lambda: fastlora.hotswap_adapter(model, tmp_path, "default"),
        lambda: model.add_weighted_adapter(["default"], [1.0], "sum"),
        lambda: fastlora.reduce_rank(model, 2),
    ):
        with pytest.raises(AdapterStateError, match="'default' is on the meta device .* load_ada"):
            use()
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path, "default")
    fastlora.hotswap_adapter(model, tmp_path, "default")
    torch.testing.assert_close(model(X), expected)


def test_compiled_models_and_models_without_adapters() -> None:
    """PEFT's three answers to a model that is compiled already."""
    compiled: Any = torch.compile(adapted(), backend="eager")
    with pytest.raises(ValueError, match=r"\*before\* compiling"):
        fastlora.prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="already compiled"):
        fastlora.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    fastlora.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="ignore")
    with pytest.raises(ValueError, match="'error', 'warn', or 'ignore', got 'no'"):
        fastlora.prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="no")
    with pytest.raises(ValueError, match="No adapter layers found"):
        fastlora.prepare_model_for_compiled_hotswap(nn.Linear(2, 2), target_rank=8)


def test_models_of_peft(tmp_path: Path) -> None:
    """Go to PEFT's own functions; a patched one keeps nothing of the adapter before."""
    expected = saved(tmp_path, r=2, lora_alpha=8)
    model = adapted(peft)
    fastlora.patch(model)
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=4)
    with torch.no_grad():
        model(X)
        fastlora.hotswap_adapter(model, tmp_path, "default")
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_a_mixed_batch_of_a_patched_model_sees_the_swap(tmp_path: Path) -> None:
    """PEFT's swap writes where no version counts it, and packed factors are of before."""
    expected = saved(tmp_path)
    model = adapted(peft)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q"]))
    fastlora.patch(model.eval())
    ids = ["default", None, "other", "default", None]
    outputs = []
    with torch.no_grad():
        for swaps in (False, False, False, True):
            if swaps:
                fastlora.hotswap_adapter(model, tmp_path, "default")
            with fastlora.adapters(model, ids):
                outputs.append(model(X))
    torch.testing.assert_close(outputs[3][[0, 3]], expected[[0, 3]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[3][[1, 2, 4]], outputs[2][[1, 2, 4]])


class Attention(nn.Module):
    """Self-attention, by a module whose projections are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[B, T, 16]`` to the same shape."""
        y: torch.Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


KINDS: dict[str, Any] = {
    "embedding": (lambda: nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8)), ["0", "1"]),
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3)), ["0"]),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), ["0"]),
    "last": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last),
        ["0"],
    ),
    "attention": (Attention, ["attention"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_layers(kind: str, tmp_path: Path) -> None:
    """Of another rank; PEFT's own swap takes linears and convolutions in two dimensions."""
    make, targets = KINDS[kind]
    inputs = {
        "embedding": torch.arange(12).view(3, 4),
        "attention": torch.randn(2, 5, 16),
    }.get(kind, torch.randn(2, 4, 5, 5))

    def base() -> nn.Module:
        torch.manual_seed(0)
        made: nn.Module = make()
        return made

    outputs = {}
    for seed, r in ((1, 4), (2, 2)):
        start = base()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=r, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(start, config).eval()
        model.save_pretrained(tmp_path / str(r))
        # PEFT adds an update to the attention's out_proj twice.
        library = fastlora if kind == "attention" else peft
        again = library.PeftModel.from_pretrained(base(), tmp_path / str(r)).eval()
        outputs[r] = again(inputs).detach()
    model = fastlora.PeftModel.from_pretrained(base(), tmp_path / "2")
    fastlora.prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch.testing.assert_close(model(inputs).detach(), outputs[2], rtol=1e-4, atol=1e-5)
    for r in (4, 2, 4):
        fastlora.hotswap_adapter(model, tmp_path / str(r), "default")
        torch.testing.assert_close(model(inputs).detach(), outputs[r], rtol=1e-4, atol=1e-5)
    assert math.isclose(model.peft_config["default"].scaling_for(targets[0]), 8 / 4)
    model.save_pretrained(tmp_path / "again")
    again = library.PeftModel.from_pretrained(base(), tmp_path / "again").eval()
    torch.testing.assert_close(again(inputs).detach(), outputs[4], rtol=1e-4, atol=1e-5)


def test_a_rank_that_groups_do_not_divide_raises() -> None:
    """Before any factor is padded."""
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 6, 1))
    model = fastlora.get_peft_model(base, fastlora.LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"not divisible by 2.*'0'"):
        fastlora.prepare_model_for_compiled_hotswap(model, target_rank=5)
    assert [m.r["default"] for m in model.base_model.model] == [2, 2]


def test_trained_rows_are_swapped(tmp_path: Path) -> None:
    """Rows of an embedding go along; other rows have no place."""
    ids, outputs = torch.arange(12).view(3, 4), []
    for seed, rows in ((1, [1, 3]), (2, [1, 3]), (3, [4, 6])):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))
        config = peft.LoraConfig(r=2, target_modules=["1"], trainable_token_indices={"0": rows})
        model = peft.get_peft_model(base, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        outputs.append(model(ids).detach())
        model.save_pretrained(tmp_path / str(seed))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(12, 16), nn.Linear(16, 8))
    model = fastlora.PeftModel.from_pretrained(base, tmp_path / "1")
    for index in (1, 0):
        fastlora.hotswap_adapter(model, tmp_path / str(index + 1), "default")
        torch.testing.assert_close(model(ids).detach(), outputs[index], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="for trainable_token_indices"):
        fastlora.hotswap_adapter(model, tmp_path / "3", "default")


def test_files_that_hold_the_base_embedding(tmp_path: Path) -> None:
    """It is written along with LoRA on it, and is the model's own; another one is refused."""
    config = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False}
    ids, outputs = torch.arange(12).view(2, 6), []
    for seed, r in enumerate((4, 2)):
        model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=r, **config)).eval()
        randomize(model, seed)
        model.save_pretrained(tmp_path / str(seed))
        outputs.append(model(ids).logits.detach())
    model = fastlora.PeftModel.from_pretrained(tiny_llama(), tmp_path / "0")
    fastlora.hotswap_adapter(model, tmp_path / "1", "default")
    torch.testing.assert_close(model(ids).logits.detach(), outputs[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.get_base_model().get_input_embeddings().weight[0, 0] += 1
    with pytest.raises(HotswapError, match="unexpected keys found: .*embed_tokens"):
        fastlora.hotswap_adapter(model, tmp_path / "0", "default")


def resized(tied: bool) -> Any:
    """A Llama with ten more tokens than it was made with."""
    model = tiny_llama(tie_word_embeddings=tied)
    torch.manual_seed(0)
    model.resize_token_embeddings(107, mean_resizing=False)
    return model


FILES_WITH_MORE: list[tuple[bool, dict[str, Any]]] = [
    (False, {"target_modules": ["q_proj", "lm_head"]}),
    (True, {"target_modules": ["q_proj"]}),
    (True, {"target_modules": ["q_proj"], "trainable_token_indices": [98, 99]}),
    (True, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tied, config", FILES_WITH_MORE, ids=[str(c) for _, c in FILES_WITH_MORE])
def test_files_with_more_than_the_adapter(
    tied: bool, config: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    """Base weights of embeddings and heads, and the factors of a tied head, are no other layers."""
    ids = torch.tensor([[1, 2, 98, 99]])
    new = adapted(seed=2, base=resized(tied), r=6, lora_alpha=24, **config)
    for key, rows in new.state_dict().items():
        if "trainable_tokens_delta" in key:
            rows.mul_(2)
    new.save_pretrained(tmp_path, save_embedding_layers=True)
    model = adapted(base=resized(tied), **{**config, "r": 2})
    before = model(input_ids=ids).logits.detach()
    if padded:
        fastlora.prepare_model_for_compiled_hotswap(model, target_rank=8)
        torch.testing.assert_close(model(input_ids=ids).logits.detach(), before)
    fastlora.hotswap_adapter(model, tmp_path, "default")
    expected = new(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.save_pretrained(tmp_path / "again", save_embedding_layers=True)
    again = fastlora.LoraModel.from_pretrained(resized(tied), tmp_path / "again")
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_base_weights_that_another_adapter_is_merged_into(tmp_path: Path) -> None:
    """They are compared with the values from before the merge."""
    config = {"target_modules": ["q_proj", "lm_head"]}
    new = adapted(seed=2, base=resized(False), **config)
    new.save_pretrained(tmp_path)
    model = adapted(base=resized(False), **config)
    model.add_adapter("other", fastlora.LoraConfig(**config))
    randomize(model)
    model.merge_adapter(["other"])
    fastlora.hotswap_adapter(model, tmp_path, "default")
    model.unmerge_adapter()
    ids = torch.tensor([[1, 2, 98, 99]])
    torch.testing.assert_close(model(input_ids=ids).logits, new(input_ids=ids).logits)


def test_former_names_of_modules(tmp_path: Path) -> None:
    """A swap maps the names in a file as loading does: by the model's mapping, or a given one."""
    expected = saved(tmp_path)
    model = adapted(base=nn.Sequential(two_layers()))
    fastlora.hotswap_adapter(model, tmp_path, "default", key_mapping={"^": "0."})
    assert torch.equal(model(X), expected)
    model = adapted(base=nn.Sequential(two_layers()))
    model.get_base_model()._checkpoint_conversion_mapping = {"^": "0."}
    fastlora.hotswap_adapter(model, tmp_path, "default")
    assert torch.equal(model(X), expected)
