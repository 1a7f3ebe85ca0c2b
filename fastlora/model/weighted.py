"""An adapter that is the weighted sum of others: what `LoraModel.add_weighted_adapter` makes.

Everything is checked and computed before the model changes.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.algebra import combine, low_rank
from fastlora.layers import LoraLayer
from fastlora.model import inject
from fastlora.model.config import LoraConfig
from fastlora.sharding import is_sharded
from fastlora.validation import (
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
    check_rank,
    near_names,
)


class Combination(NamedTuple):
    """How to add adapters; see `LoraTuner.add_weighted_adapter`."""

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def of_updates(self) -> bool:
        """Whether updates ``lora_b @ lora_a`` are added, and not factors."""
        return self.combination_type.endswith("svd")


class Factors(NamedTuple):
    """What an adapter is to have on one layer: ``[R, K]``, ``[N, R]``, and ``[N]`` or None."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None = None


class Made(NamedTuple):
    """An adapter that is computed, and not in the model yet.

    Attributes:
        plan: Its config, and the modules it goes on.
        factors: What it has on each of them.
        copies: Module of ``modules_to_save`` to the adapter whose copy it takes over.
        wide: Whether the factors are fp32 beside base layers of 16 bits.
    """

    plan: inject.Plan
    factors: dict[str, Factors]
    copies: dict[str, str]
    wide: bool

    @torch.no_grad()
    def fill(self, model: nn.Module, adapter_name: str) -> None:
        """Copies what was computed into the adapter, once the model has it."""
        for name, layer in _lora_layers(model).items():
            if name in self.factors:
                for place, value in zip(
                    layer._factors(adapter_name), self.factors[name], strict=True
                ):
                    if place is not None and value is not None:
                        place.copy_(value)
                layer._forget_packed()
        for name, owner in self.copies.items():
            wrapper = model.get_submodule(name)
            copies: Any = wrapper.modules_to_save
            copies[adapter_name].load_state_dict(copies[owner].state_dict())


def combined(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    weights: Sequence[float],
    how: Combination,
) -> Made:
    """Computes the weighted sum of adapters; changes nothing.

    Args:
        model: The base model, with the adapters in it.
        configs: Name of each adapter, in order, to its config.
        weights: A number for each.
        how: The way to add them.

    Raises:
        ConfigError, AdapterStateError, UnsupportedLayerError: See
            `LoraTuner.add_weighted_adapter`.
    """
    _check(configs, weights, how)
    if len(configs) == 1:
        how = how._replace(combination_type="linear")
    chosen = dict(zip(configs, map(float, weights), strict=True))
    layers = _lora_layers(model)
    factors = {}
    for name, layer in layers.items():
        holders = {adapter: w for adapter, w in chosen.items() if adapter in layer.r}
        if holders:
            factors[name] = _on_layer(name, layer, holders, how)
    ranks = {name: made.lora_a.shape[0] for name, made in factors.items()}
    copies = _copies(model, list(configs))
    config = _config(list(configs.values()), ranks, copies)
    plan = inject.plan_adapter(model, config)
    if set(plan.targets) != set(factors):
        # Configs that pick layers in different ways have no sum but the names themselves.
        config.target_modules = set(factors)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        plan = inject.plan_adapter(model, config)
    first = next(layer._factors(a)[0] for layer in layers.values() for a in chosen if a in layer.r)
    return Made(plan, factors, copies, first.dtype == torch.float32)


def _check(configs: Mapping[str, LoraConfig], weights: Sequence[float], how: Combination) -> None:
    """Raises `ConfigError` for what cannot be asked, `AdapterStateError` for what has no sum."""
    kind = how.combination_type
    if kind not in combine.COMBINATIONS:
        raise ConfigError(
            f"Invalid combination_type: {kind!r}; expected one of {', '.join(combine.COMBINATIONS)}"
            f"{near_names(kind, combine.COMBINATIONS)}"
        )
    if not configs:
        raise ConfigError("adapters is empty, expected the names of adapters to add")
    if len(weights) != len(configs):
        raise ConfigError(f"{len(configs)} different adapters need as many weights, got {weights}")
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)}")
    if len(configs) > 1:
        combine.check_density(kind, how.density)
    if how.svd_rank is not None:
        check_rank(how.svd_rank)
    if how.svd_clamp is not None and not 0.0 <= how.svd_clamp <= 1.0:
        raise ConfigError(f"svd_clamp must be a quantile in [0, 1], got {how.svd_clamp!r}")
    if how.majority_sign_method not in ("total", "frequency"):
        raise ConfigError(
            f"majority_sign_method must be 'total' or 'frequency', got {how.majority_sign_method!r}"
        )
    if len({isinstance(config.target_modules, str) for config in configs.values()}) > 1:
        raise ConfigError(
            "all adapter configs should follow the same target modules type: some of "
            f"{list(configs)} have a string and some a list; load them with lists"
        )
    for name, config in configs.items():
        if config.use_dora:
            raise AdapterStateError(
                f"adapter {name!r} uses DoRA, whose update is no product of two factors that could "
                "be added; merge it with merge_and_unload(), or train without use_dora"
            )
        if config.trainable_token_indices:
            raise AdapterStateError(
                f"adapter {name!r} has trained tokens (trainable_token_indices), which have no sum"
            )


def _on_layer(name: str, layer: LoraLayer, holders: dict[str, float], how: Combination) -> Factors:
    """Computes the sum on one layer, of the adapters that it has."""
    parts = [layer._factors(adapter) for adapter in holders]
    pairs = [(a.detach(), b.detach()) for a, b, _ in parts]
    if layer.is_split or any(is_sharded(tensor) for pair in pairs for tensor in pair):
        raise AdapterStateError(
            f"the factors on {name!r} are sharded over processes; save the adapters, and add them "
            "on a model that is whole"
        )
    low_rank.check_finite(
        f"an adapter of {list(holders)} on {name!r}", *(t for p in pairs for t in p)
    )
    ranks = [layer.r[adapter] for adapter in holders]
    scalings = [float(layer.scaling[adapter]) for adapter in holders]
    scales = [w * s for w, s in zip(holders.values(), scalings, strict=True)]
    kind = how.combination_type
    if (how.of_updates or kind == "cat") and any(b.shape[1] != a.shape[0] for a, b in pairs):
        raise UnsupportedLayerError(
            f"combination_type={kind!r} cannot add updates of a grouped convolution ({name!r}), "
            "which are no products of two factors; expected 'linear'"
        )
    bias = _bias([part[2] for part in parts], scales, how)
    wide = torch.promote_types(pairs[0][0].dtype, torch.float32)
    pairs = [(a.to(wide), b.to(wide)) for a, b in pairs]
    if kind == "cat":
        lora_a = torch.cat([a * scale for (a, _), scale in zip(pairs, scales, strict=True)])
        return Factors(lora_a, torch.cat([b for _, b in pairs], 1), bias)
    if how.of_updates:
        lora_a, lora_b = _svd(pairs, scalings, list(holders.values()), how)
        rank = max(ranks) if how.svd_rank is None else how.svd_rank
        lora_a, lora_b = lora_a[:rank], lora_b[:, :rank]
        if how.svd_clamp is not None:
            lora_a, lora_b = low_rank.clamped(lora_a, lora_b, how.svd_clamp)
        return Factors(low_rank.padded(lora_a, rank, 0), low_rank.padded(lora_b, rank, 1), bias)
    if len(set(ranks)) > 1:
        raise ConfigError(
            f"All adapters must have the same r value when using combination_type {kind!r}, got "
            f"{dict(zip(holders, ranks, strict=True))} on {name!r}; expected 'cat', or a type "
            "that ends in 'svd'"
        )
    # A root of the scale on either factor, and its sign on one of them.
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    return Factors(
        _combine([a for a, _ in pairs], signed, how),
        _combine([b for _, b in pairs], roots, how),
        bias,
    )


def _combine(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], how: Combination
) -> torch.Tensor:
    method = how.combination_type.removesuffix(combine.SVD)
    return combine.combine(method, tensors, weights, how.density, how.majority_sign_method)


def _svd(
    pairs: Sequence[low_rank.Pair],
    scalings: Sequence[float],
    weights: Sequence[float],
    how: Combination,
) -> low_rank.Pair:
    """Returns factors of the sum of updates, rank rows from the one that matters most."""
    if how.combination_type == "svd":
        scales = [w * s for w, s in zip(weights, scalings, strict=True)]
        found = low_rank.decompose_pairs(pairs, scales, how.svd_driver)
    else:
        updates = [b @ a * s for (a, b), s in zip(pairs, scalings, strict=True)]
        found = low_rank.decompose(_combine(updates, weights, how), how.svd_driver)
    return found.vh, found.u * found.s


def _bias(
    biases: Sequence[torch.Tensor | None], scales: Sequence[float], how: Combination
) -> torch.Tensor | None:
    """Returns the sum of what adapters with a lora_bias add to the output, ``[N]``."""
    found = [(b.detach(), s) for b, s in zip(biases, scales, strict=True) if b is not None]
    if not found:
        return None
    exact = how.combination_type in ("cat", "svd")
    how = how._replace(combination_type="linear") if exact else how
    return _combine([b for b, _ in found], [s for _, s in found], how)


def _copies(model: nn.Module, adapters: list[str]) -> dict[str, str]:
    """Returns each module of which one of the adapters owns a copy, and which one."""
    found = {}
    for name, module in inject.routed_modules(model):
        copies = getattr(module, "modules_to_save", None)
        owners = [adapter for adapter in adapters if copies is not None and adapter in copies]
        if len(owners) > 1:
            raise AdapterStateError(
                "Cannot add weighted adapters if they target the same module with modules_to_save: "
                f"adapters {owners} own copies of {name!r}"
            )
        if owners:
            found[name] = owners[0]
    return found


def _config(
    configs: list[LoraConfig], ranks: Mapping[str, int], copies: Mapping[str, str]
) -> LoraConfig:
    """Returns the config of the sum; its factors hold all scalings, so that alpha is the rank."""
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


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    found = inject.routed_modules(model)
    return {name: layer for name, layer in found if isinstance(layer, LoraLayer)}
