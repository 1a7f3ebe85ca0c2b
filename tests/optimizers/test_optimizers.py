"""LoRA+ and LoRA-FA: groups, states and steps against PEFT's, and what PEFT's get wrong."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastlora
from fastlora.optimizers import LoraFAOptimizer, create_lorafa_optimizer, create_loraplus_optimizer
from fastlora.validation import ConfigError
from tests.support.peft_twins import peft
from tests.support.tiny import TwoLayers, adapted, with_adapters

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))


def names_of(model: Any, group: dict[str, Any]) -> set[str]:
    """Names of a group's parameters, as PEFT has them."""
    own = {id(p): name.replace("base_layer.", "") for name, p in model.named_parameters()}
    return {own[id(p)] for p in group["params"]}


@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"modules_to_save": ["norm", "head"]}])
def test_loraplus_groups_and_steps_are_those_of_peft(options: dict[str, Any]) -> None:
    """Rates, decays and members of each group; three steps give the same parameters."""
    from peft.optimizers import create_loraplus_optimizer as theirs

    made = []
    for library, create in ((fastlora, create_loraplus_optimizer), (peft, theirs)):
        model = adapted(library, use_dora=True, **options)
        optimizer = create(
            model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        made.append((model, optimizer))
    (ours, mine), (other, its) = made
    for a, b in zip(mine.param_groups, its.param_groups, strict=True):
        assert (a["lr"], a["weight_decay"]) == (b["lr"], b["weight_decay"])
        assert names_of(ours, a) == names_of(other, b)
    expected = {n.replace("base_layer.", ""): p for n, p in other.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5)


def test_lorafa_steps_are_those_of_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where PEFT's projection is not rounded to bf16: ranks and scalings of each layer, a decay."""
    import peft.optimizers.lorafa as library

    monkeypatch.setattr(library, "is_bf16_available", lambda: False)
    config = {"rank_pattern": {"q": 8}, "lora_alpha": 12, "modules_to_save": ["head"]}
    made = []
    for source, create in (
        (fastlora, create_lorafa_optimizer),
        (peft, library.create_lorafa_optimizer),
    ):
        model = adapted(source, **config)
        rate: Any = torch.tensor(1e-2) if create is create_lorafa_optimizer else 1e-2
        optimizer = create(model, r=4, lora_alpha=12, lr=rate, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            model(X).square().mean().backward()
            optimizer.step()
        made.append({n.replace("base_layer.", ""): p for n, p in model.named_parameters()})
    for name, parameter in made[0].items():
        torch.testing.assert_close(parameter, made[1][name], rtol=1e-3, atol=1e-5)
        assert not ("lora_A" in name and parameter.requires_grad)


def test_lorafa_of_several_adapters_and_of_all_their_parts() -> None:
    """A bias of lora_B, a magnitude and a second adapter leave every pair what it is.

    PEFT 0.21.2 pairs parameters by the order of names that contain "lora", and so takes lora_A of
    one adapter and lora_A of another, or a bias, for a pair.
    """
    plain = fastlora.LoraConfig(r=4, target_modules=["q", "v"])
    alone = with_adapters(TwoLayers(), {"a": plain})
    torch.manual_seed(0)
    configs = {
        "a": plain,
        "b": fastlora.LoraConfig(r=2, target_modules=["q", "v"], lora_bias=True),
        "c": fastlora.LoraConfig(r=3, target_modules=["q"], use_dora=True),
    }
    together = with_adapters(TwoLayers(), configs)
    together.load_state_dict(alone.state_dict(), strict=False)
    fastlora.train_adapters(together, ["a", "b", "c"])
    optimizers = [create_lorafa_optimizer(m, 4, 8, lr=1e-2) for m in (alone, together)]
    for _ in range(2):
        alone.zero_grad()
        alone(X).square().mean().backward()
        optimizers[0].step()
        together.zero_grad()
        with fastlora.adapters(together, ["a"] * 6):
            together(X).square().mean().backward()
        optimizers[1].step()
    mine = dict(together.named_parameters())
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(mine[name], parameter)
    before = {name: p.clone() for name, p in mine.items()}
    together.zero_grad()
    with fastlora.adapters(together, ["b", "c"] * 3):
        together(X).square().mean().backward()
    optimizers[1].step()
    moved = {name for name, p in mine.items() if not torch.equal(p, before[name])}
    tails = {name.split(".", 3)[3] for name in moved}
    assert {"lora_B.b.weight", "lora_B.b.bias", "lora_B.c.weight"} <= tails
    assert "lora_magnitude_vector.c.weight" in tails
    assert not any("lora_A" in name for name in moved)


def test_lorafa_resumes() -> None:
    """A state dict, loaded into a new optimizer, goes on as the old one."""
    results = []
    for restart in (False, True):
        model = adapted(fastlora)
        optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
        for step in range(4):
            if restart and step == 2:
                state = optimizer.state_dict()
                optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss = optimizer.step(functools.partial(backward, model))
            assert loss.requires_grad
        results.append([p.clone() for p in model.parameters()])
    assert all(map(torch.equal, *results))


def backward(model: Any) -> torch.Tensor:
    """The loss, with gradients."""
    loss: torch.Tensor = model(X).square().mean()
    loss.backward()
    return loss


def test_lorafa_leaves_a_lora_a_with_a_gradient_alone() -> None:
    """The gradient is from a backward pass before the optimizer froze lora_A."""
    model = adapted(fastlora)
    lora_a = model.base_model.model.q.lora_A["default"].weight
    model(X).square().mean().backward()
    before = lora_a.detach().clone()
    create_lorafa_optimizer(model, 4, 8, lr=1e-2, weight_decay=0.1).step()
    assert lora_a.grad is not None and torch.equal(lora_a, before)


@pytest.mark.parametrize("lora_a_first", [True, False])
def test_lorafa_pairs_factors_of_different_groups(lora_a_first: bool) -> None:
    """The step is that of one group, and lora_A stays as it is."""
    results = []
    for split in (False, True):
        model = adapted(fastlora)
        model(X).square().mean().backward()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parts = [[n for n in named if place in n] for place in ("lora_A", "lora_B")]
        parts = parts if lora_a_first else parts[::-1]
        groups = [
            {
                "params": [named[name] for name in names],
                "names": names,
                "scaling_factors": [2.0 if "lora_B" in name else None for name in names],
            }
            for names in (parts if split else [[*parts[0], *parts[1]]])
        ]
        before = {name: p.detach().clone() for name, p in named.items()}
        LoraFAOptimizer(groups, lr=1e-2).step()
        moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
        assert moved == {name for name in named if "lora_B" in name}
        results.append(list(named.values()))
    assert all(map(torch.equal, *results))


def test_lorafa_sees_a_lora_a_that_was_written_to() -> None:
    """The inverse that is kept belongs to the values it was made from."""
    model = adapted(fastlora)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    lora_a = model.base_model.model.q.lora_A["default"].weight
    first = optimizer._inverse_gram_matrix(lora_a)
    assert optimizer._inverse_gram_matrix(lora_a) is first
    with torch.no_grad():
        lora_a *= 2
    torch.testing.assert_close(optimizer._inverse_gram_matrix(lora_a), first / 4)


def test_lorafa_sees_a_lora_a_that_was_replaced_twice() -> None:
    """It may get its first address again, with as many writes (R5)."""
    model = adapted(fastlora)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    lora_a, reused = model.base_model.model.q.lora_A["default"].weight, 0
    for _ in range(5):
        before, first = lora_a.data_ptr(), optimizer._inverse_gram_matrix(lora_a)
        for _ in range(2):
            lora_a.data = lora_a.data * 2
        reused += lora_a.data_ptr() == before
        torch.testing.assert_close(optimizer._inverse_gram_matrix(lora_a), first / 16)
    assert reused > 0


def test_errors() -> None:
    """Wrong numbers, flags that contradict the config, and nothing that trains."""
    model = adapted(fastlora)
    for wrong in ({"lr": 0.0}, {"loraplus_lr_ratio": float("nan")}, {"loraplus_lr_embedding": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be a positive number"):
            create_loraplus_optimizer(
                model, torch.optim.AdamW, **{"lr": 1e-3, "loraplus_lr_ratio": 2.0, **wrong}
            )
    with pytest.raises(ConfigError, match="was passed to create_lorafa_optimizer"):
        create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=True)
    with pytest.warns(FutureWarning, match="deprecated"):
        create_lorafa_optimizer(model, 4, 8, 1e-3, use_rslora=False)
    model.set_adapter("default")
    for message, given in (
        ("Invalid learning rate: -1", {"lr": -1}),
        ("Invalid weight decay: -1", {"lr": 1e-3, "weight_decay": -1}),
        ("r must be a positive integer, got 0", {"lr": 1e-3, "r": 0}),
    ):
        with pytest.raises(ConfigError, match=message):
            create_lorafa_optimizer(model, **{"r": 4, "lora_alpha": 8, **given})
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_A" in name)
    model.set_adapter("default", inference_mode=True)
    with pytest.raises(ConfigError, match="no lora_B is trainable"):
        create_lorafa_optimizer(model, 4, 8, 1e-3)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0)
    with pytest.raises(ConfigError, match="`names` and one in `scaling_factors`"):
        LoraFAOptimizer([nn.Parameter(torch.ones(2))])


def test_eight_bit_optimizers_keep_embeddings_in_32_bits() -> None:
    """As PEFT asks bitsandbytes to."""
    library = pytest.importorskip("bitsandbytes").optim
    base = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16))
    model = fastlora.get_peft_model(
        base, fastlora.LoraConfig(target_modules=["1"], modules_to_save=["0"])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        create_loraplus_optimizer(model, library.AdamW8bit, lr=1e-3, loraplus_lr_ratio=2.0)
    manager = library.GlobalOptimManager.get_instance()
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    overridden = [module for module, _, _ in manager.module_weight_config_triple]
    assert all(any(m is o for o in overridden) for m in embeddings)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_lorafa_optimizer_goes_on(copied: Callable[[Any], Any]) -> None:
    def step(model: nn.Module, optimizer: LoraFAOptimizer) -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()

    model = adapted(use_dora=True)
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=1e-2)
    step(model, optimizer)
    other, again = copied((model, optimizer))
    step(model, optimizer)
    step(other, again)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two) and one is not two
