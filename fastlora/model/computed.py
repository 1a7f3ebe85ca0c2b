"""Adapters that are computed from others, whole, before the model changes."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.algebra import low_rank
from fastlora.layers import LoraLayer
from fastlora.model.config import LoraConfig
from fastlora.model.inject import lora_layers, routed_modules
from fastlora.model.plan import Plan, plan_adapter
from fastlora.sharding import is_sharded
from fastlora.validation import AdapterStateError, UnsupportedLayerError


class Factors(NamedTuple):
    """What an adapter is to have on one layer.

    Attributes:
        lora_a, lora_b: ``[R, K]`` and ``[N, R]``.
        lora_bias: ``[N]``, or None.
        magnitude: Of an adapter that uses DoRA, in its own shape.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


class Made(NamedTuple):
    """An adapter that is computed, and not in the model yet.

    Attributes:
        plan: Its config, and the modules it goes on.
        factors: What it has on each LoRA layer.
        copies: Module of ``modules_to_save`` to the adapter whose copy it takes over.
        wide: Whether the factors are fp32 beside base layers of 16 bits.
    """

    plan: Plan
    factors: Mapping[str, Factors]
    copies: Mapping[str, str]
    wide: bool

    @property
    def ranks(self) -> dict[str, int]:
        """Layer to the rank of its factors."""
        return {name: each.lora_a.shape[0] for name, each in self.factors.items()}

    @torch.no_grad()
    def fill(self, model: nn.Module, adapter_name: str) -> None:
        """Copies what was computed into the adapter, once the model has it."""
        layers = lora_layers(model)
        for name, made in self.factors.items():
            layer = layers[name]
            layer._put_factors(adapter_name, made.lora_a, made.lora_b, made.lora_bias)
            if made.magnitude is not None:
                magnitude: Any = layer.lora_magnitude_vector[adapter_name]
                magnitude.weight.copy_(made.magnitude)
            layer._forget_packed()
        for name, owner in self.copies.items():
            wrapper = model.get_submodule(name)
            copies: Any = wrapper.modules_to_save
            copies[adapter_name].load_state_dict(copies[owner].state_dict())


def pair_of(name: str, layer: LoraLayer, adapter: str, *, multiplied: bool = True) -> low_rank.Pair:
    """Returns an adapter's factors on a layer as matrices, in fp32 or wider.

    ``multiplied`` says that their product is to be the update.

    Raises:
        AdapterStateError: They are sharded, or have values that are not finite.
        UnsupportedLayerError: The update is no product of two matrices that could be written to.
    """
    lora_a, lora_b, _ = layer._factors(adapter)
    if layer.is_split or is_sharded(lora_a) or is_sharded(lora_b):
        raise AdapterStateError(
            f"the factors on {name!r} are sharded over processes; save the adapters, and compute "
            "with them on a model that is whole"
        )
    if multiplied and lora_b.shape[1] != lora_a.shape[0]:
        raise UnsupportedLayerError(
            f"{name!r} is a {type(layer.get_base_layer()).__name__} whose adapters are no plain "
            "pairs of matrices (it has groups); expected targets without it"
        )
    low_rank.check_finite(f"adapter {adapter!r} on {name!r}", lora_a, lora_b)
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return lora_a.detach().to(wide), lora_b.detach().to(wide)


def made(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    factors: Mapping[str, Factors],
    config: LoraConfig | None = None,
) -> Made:
    """Returns an adapter that is ready to be added, on the layers that it has factors for.

    ``configs`` are those of the adapters that it was computed from; ``config`` is its own, or None
    where its factors hold all scalings. Raises as `LoraTuner.add_weighted_adapter`.
    """
    copies = _copies_of(model, list(configs))
    if config is None:
        ranks = {name: each.lora_a.shape[0] for name, each in factors.items()}
        config = _config_for(list(configs.values()), ranks, copies)
    plan = plan_adapter(model, config)
    layers = lora_layers(model)
    inner = {f"{n}.{below}" for n, layer in layers.items() for below in layer.inner_layers()}
    outer = set(factors) - inner
    if set(plan.targets) != outer:
        # Configs that pick layers in different ways have no sum but the names themselves.
        config.target_modules = outer
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        plan = plan_adapter(model, config)
    holders = (layers[name]._factors(a) for name in factors for a in configs if a in layers[name].r)
    return Made(plan, factors, copies, next(holders)[0].dtype == torch.float32)


def _copies_of(model: nn.Module, adapters: Sequence[str]) -> dict[str, str]:
    """Returns each module that adapters own a copy of, and the one whose copy a new adapter takes.

    Raises as `check_one_copy`.
    """
    check_one_copy(model, adapters)
    return {name: owners[0] for name, owners in _owners_of_copies(model, adapters).items()}


def check_one_copy(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raises `AdapterStateError` where a sum of adapters would have two copies of one module.

    An adapter that comes twice has two, as in PEFT.
    """
    for name, owners in _owners_of_copies(model, adapters).items():
        if len(owners) > 1:
            raise AdapterStateError(
                "Cannot add weighted adapters if they target the same module with modules_to_save: "
                f"adapters {owners} own copies of {name!r}"
            )


def _owners_of_copies(model: nn.Module, adapters: Sequence[str]) -> dict[str, list[str]]:
    """Returns each module that adapters own copies of, and those adapters."""
    found = {}
    for name, module in routed_modules(model):
        copies = getattr(module, "modules_to_save", None)
        owners = [adapter for adapter in adapters if copies is not None and adapter in copies]
        if owners:
            found[name] = owners
    return found


def _config_for(
    configs: Sequence[LoraConfig], ranks: Mapping[str, int], copies: Mapping[str, str]
) -> LoraConfig:
    """Returns the config of an adapter whose factors hold all scalings: its alpha is its rank.

    Of the adapters that it is made of the first one's other fields are taken. Raises `ConfigError`
    where one of them means something only on base weights that its start changed.
    """
    for each in configs:
        each.check_plain("an adapter computed from it")
    config = copy.deepcopy(configs[0])
    rank = max(ranks.values())
    config.r = config.lora_alpha = rank
    config.use_rslora = False  # alpha / sqrt(rank) would scale a second time
    config.rank_pattern = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    config.alpha_pattern = dict(config.rank_pattern)
    config.bias = "none"  # biases of the base model are not the adapter's own
    config.lora_bias = any(each.lora_bias for each in configs)
    config.init_lora_weights = True
    config.modules_to_save = sorted(copies) or None
    targets = [each.target_modules for each in configs]
    if isinstance(targets[0], str):
        config.target_modules = "|".join(dict.fromkeys(f"({target})" for target in targets))
    else:
        config.target_modules = {name for each in targets for name in each or ()}
    return config
