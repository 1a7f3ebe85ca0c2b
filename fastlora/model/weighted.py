"""Compute weighted sums of adapters for `LoraTuner.add_weighted_adapter`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastlora.algebra import combine, low_rank
from fastlora.layers import LoraLayer
from fastlora.model.computed_adapters import (
    ComputedAdapter,
    LayerAdapterTensors,
    build_computed_adapter,
    check_modules_to_save_disjoint,
    factor_matrices,
    join_per_matrix_factors,
    split_factors_by_matrix,
    warn_if_base_biases_left_out,
)
from fastlora.model.config import LoraConfig
from fastlora.model.inject import layers_with_own_factors
from fastlora.model.stacked_experts import former_to_parameter_names
from fastlora.model.targets import model_type_of
from fastlora.validation import AdapterStateError, ConfigError, check_rank, near_names


class CombinationOptions(NamedTuple):
    """The options that control how adapters are combined.

    They are arguments of `LoraTuner.add_weighted_adapter`.
    """

    combination_type: str = "svd"
    svd_rank: int | None = None
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"

    @property
    def combines_updates(self) -> bool:
        """Whether to combine the adapters' updates instead of their factors.

        The update of an adapter is the product ``lora_b @ lora_a``.
        """
        return self.combination_type.endswith("svd")


class AdapterNameAndWeight(NamedTuple):
    """The name of an adapter, and its weight in a weighted sum of adapters."""

    adapter: str
    weight: float


def combine_adapters(
    model: nn.Module,
    configs: Mapping[str, LoraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    options: CombinationOptions,
) -> ComputedAdapter:
    """Combine adapters with the given weights, and return the combined adapter.

    The options specify how the adapters are combined. The model is not changed.

    Args:
        model: The base model with its adapters.
        configs: A mapping from the names of the adapters to their configs.
        adapters: The names of the adapters to combine. A name may occur more than once.
        weights: The weights of the adapters, one number for each name.
        options: The options that control how the adapters are combined.

    Raises:
        AdapterStateError, ConfigError, UnsupportedLayerError: See
            `LoraTuner.add_weighted_adapter`.
    """
    _check_combination(configs, adapters, weights, options)
    # Where PEFT means experts by names of layers, the files of adapters with a pattern have a list.
    if not former_to_parameter_names(model_type_of(model)):
        _check_same_target_modules_type(configs)
    check_modules_to_save_disjoint(model, adapters)
    if len(adapters) == 1:
        options = options._replace(combination_type="linear")
    chosen = [
        AdapterNameAndWeight(*each) for each in zip(adapters, map(float, weights), strict=True)
    ]
    factors = {}
    for name, layer in layers_with_own_factors(model).items():
        holders = [summand for summand in chosen if summand.adapter in layer.r]
        if holders:
            factors[name] = _combine_on_layer(name, layer, holders, options)
    warn_if_base_biases_left_out(configs)
    return build_computed_adapter(model, configs, factors)


def _check_combination(
    configs: Mapping[str, LoraConfig],
    adapters: Sequence[str],
    weights: Sequence[float],
    options: CombinationOptions,
) -> None:
    """Check that `combine_adapters` can combine adapters with the given weights and options.

    Raises:
        ConfigError: If an argument is invalid.
        AdapterStateError: If an adapter cannot be combined with others.
    """
    kind = options.combination_type
    if kind not in combine.COMBINATIONS:
        raise ConfigError(
            f"Invalid combination_type: {kind!r}; expected one of {', '.join(combine.COMBINATIONS)}"
            f"{near_names(kind, combine.COMBINATIONS)}"
        )
    if not configs:
        raise ConfigError("adapters is empty, expected the names of adapters to add")
    if len(weights) != len(adapters):
        raise ConfigError(
            f"expected one weight for each of the {len(adapters)} adapters, got {list(weights)}"
        )
    if not all(map(math.isfinite, weights)):
        raise ConfigError(f"weights must be finite numbers, got {list(weights)}")
    if len(adapters) > 1:
        combine.check_required_density(kind, options.density)
    if options.svd_rank is not None:
        check_rank(options.svd_rank)
    if options.svd_clamp is not None and not 0.0 <= options.svd_clamp <= 1.0:
        raise ConfigError(f"svd_clamp must be a quantile in [0, 1], got {options.svd_clamp!r}")
    if options.majority_sign_method not in ("total", "frequency"):
        raise ConfigError(
            f"majority_sign_method must be 'total' or 'frequency', got "
            f"{options.majority_sign_method!r}"
        )
    for name, config in configs.items():
        if config.use_dora:
            raise AdapterStateError(
                f"adapter {name!r} uses DoRA, so its update is not a product of two factors and "
                "cannot be combined with other updates; merge it with merge_and_unload(), or train "
                "without use_dora"
            )
        if config.trainable_token_indices:
            raise AdapterStateError(
                f"adapter {name!r} trains token embeddings (trainable_token_indices), which cannot "
                "be combined with the token embeddings of other adapters"
            )


def _check_same_target_modules_type(configs: Mapping[str, LoraConfig]) -> None:
    """Check that the ``target_modules`` of all configs have the same type.

    Raises:
        ConfigError: If some are strings (patterns) and others are collections of strings.
    """
    if len({isinstance(config.target_modules, str) for config in configs.values()}) > 1:
        raise ConfigError(
            "the target_modules of all adapter configs must have the same type: some of "
            f"{list(configs)} specify a string and others a list; use lists for all of them"
        )


def _combine_on_layer(
    name: str,
    layer: LoraLayer,
    holders: Sequence[AdapterNameAndWeight],
    options: CombinationOptions,
) -> LayerAdapterTensors:
    """Compute the combined adapter's tensors for one layer.

    Args:
        name: The name of the layer, for messages.
        layer: The LoRA layer.
        holders: The summands with an adapter on this layer.
        options: The options that control how the adapters are combined.
    """
    require_product = options.combines_updates or options.combination_type == "cat"
    adapters = [summand.adapter for summand in holders]
    weights = [summand.weight for summand in holders]
    pairs = [
        factor_matrices(name, layer, adapter, require_product=require_product)
        for adapter in adapters
    ]
    ranks = {adapter: layer.r[adapter] for adapter in adapters}
    scalings = [float(layer.scaling[adapter]) for adapter in adapters]
    scales = [w * s for w, s in zip(weights, scalings, strict=True)]
    kind = options.combination_type
    bias = _combine_lora_biases(
        [layer._factors(adapter)[2] for adapter in adapters], scales, options
    )
    if require_product:
        rank = max(ranks.values()) if options.svd_rank is None else options.svd_rank
        by_matrix = zip(*(split_factors_by_matrix(layer, pair) for pair in pairs), strict=True)
        if kind == "cat":
            made = [_concatenate_factor_pairs(own, scales) for own in by_matrix]
        else:
            made = [_combine_by_svd(own, scalings, weights, options, rank) for own in by_matrix]
        return LayerAdapterTensors(*join_per_matrix_factors(made), bias, None, layer.num_matrices)
    if len(set(ranks.values())) > 1:
        raise ConfigError(  # begins as in PEFT
            f"All adapters must have the same r value when using combination_type {kind!r}, but "
            f"their r values for layer {name!r} are {ranks}; to combine adapters with different "
            "ranks, use 'cat' or a type that ends in 'svd'"
        )
    # Multiply both factors by the square root of |scale|, and one of them by the sign.
    roots = [math.sqrt(abs(scale)) for scale in scales]
    signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
    return LayerAdapterTensors(
        _combine([a for a, _ in pairs], signed, options),
        _combine([b for _, b in pairs], roots, options),
        bias,
        num_matrices=layer.num_matrices,
    )


def _concatenate_factor_pairs(
    pairs: Sequence[low_rank.FactorPair], scales: Sequence[float]
) -> low_rank.FactorPair:
    """Concatenate pairs of factors along the rank dimension.

    The result is one pair, and each lora_a in it is multiplied by its scale. The product of the
    result is the sum of ``scale * lora_b @ lora_a`` over all pairs.
    """
    lora_a = torch.cat([a * scale for (a, _), scale in zip(pairs, scales, strict=True)])
    return lora_a, torch.cat([b for _, b in pairs], 1)


def _combine(
    tensors: Sequence[torch.Tensor], weights: Sequence[float], options: CombinationOptions
) -> torch.Tensor:
    method = options.combination_type.removesuffix(combine.SVD)
    return combine.combine(method, tensors, weights, options.density, options.majority_sign_method)


def _combine_by_svd(
    pairs: Sequence[low_rank.FactorPair],
    scalings: Sequence[float],
    weights: Sequence[float],
    options: CombinationOptions,
    rank: int,
) -> low_rank.FactorPair:
    """Combine updates, and use an SVD to split the result into factors.

    The result is a tuple ``(lora_a, lora_b)``. The factors have the given rank. The rows of
    ``lora_a`` and the columns of ``lora_b`` are ordered by decreasing singular value.
    """
    if options.combination_type == "svd":
        scales = [w * s for w, s in zip(weights, scalings, strict=True)]
        found = low_rank.svd_of_weighted_sum(pairs, scales, options.svd_driver)
    else:
        updates = [b @ a * s for (a, b), s in zip(pairs, scalings, strict=True)]
        found = low_rank.compute_svd(_combine(updates, weights, options), options.svd_driver)
    lora_a, lora_b = found.vh[:rank], (found.u * found.s)[:, :rank]
    if options.svd_clamp is not None:
        lora_a, lora_b = low_rank.clamp_factors_to_quantile(lora_a, lora_b, options.svd_clamp)
    return low_rank.pad_factor(lora_a, rank, 0), low_rank.pad_factor(lora_b, rank, 1)


def _combine_lora_biases(
    biases: Sequence[torch.Tensor | None], scales: Sequence[float], options: CombinationOptions
) -> torch.Tensor | None:
    """Combine the ``lora_b`` biases of adapters, weighted by the given scales.

    ``options`` determines the method. For the combination types ``"cat"`` and ``"svd"``, the method
    is a weighted sum. The result is a tensor ``[N]``, or None if no adapter has a ``lora_b`` bias.
    """
    found = [(b.detach(), s) for b, s in zip(biases, scales, strict=True) if b is not None]
    if not found:
        return None
    exact = options.combination_type in ("cat", "svd")
    options = options._replace(combination_type="linear") if exact else options
    return _combine([b for b, _ in found], [s for _, s in found], options)
