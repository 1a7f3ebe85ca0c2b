"""Create new adapters from the factors of existing adapters.

All factors of a new adapter are computed before the model is changed.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.algebra import low_rank
from fastlora.layers import LoraLayer
from fastlora.model.base_modules import strip_wrapper_prefixes_from_names
from fastlora.model.config import LoraConfig
from fastlora.model.inject import (
    lora_layers,
    modules_adapted_with_embedding,
    modules_with_adapters,
)
from fastlora.model.plan import AdapterPlan, plan_target_modules
from fastlora.model.targets import NO_TARGETS
from fastlora.model.tied_weights import ModulesAdaptedWithEmbedding, input_embedding_name
from fastlora.ops.stacks import rank_row_views
from fastlora.sharding import is_dtensor
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError, UnsupportedLayerError


class LayerAdapterTensors(NamedTuple):
    """A computed adapter's tensors for one layer.

    These are the adapter's factors and, where it has them, its bias and DoRA magnitude. The adapter
    was computed from one or more other adapters.

    Attributes:
        lora_a, lora_b: The factors, ``[R, K]`` and ``[N, R]``.
        lora_bias: The bias of ``lora_b``, ``[N]``, or None.
        magnitude: The DoRA magnitude, of the same shape as the layer's parameter, or None if the
            adapter does not use DoRA.
        num_matrices: The number E of matrices that the layer's weight consists of. R is E times
            the rank.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    num_matrices: int = 1

    @property
    def rank(self) -> int:
        """The rank of the computed adapter.

        The rank is that of the adapter's factors for one layer. The adapter may have different
        ranks for other layers.
        """
        return self.lora_a.shape[0] // self.num_matrices


class ComputedAdapter(NamedTuple):
    """An adapter that was computed from other adapters and is ready to be added to a model.

    Its parameters were computed from those of one or more other adapters.

    Attributes:
        plan: The adapter's config and the modules that it adapts.
        factors: A mapping from the names of LoRA layers to the adapter's tensors.
        copies: A mapping from the name of each module in ``modules_to_save`` to the name of the
            existing adapter from which the new adapter copies this module.
        wide: Whether the factors of 16-bit base layers are stored in fp32.
    """

    plan: AdapterPlan
    factors: Mapping[str, LayerAdapterTensors]
    copies: Mapping[str, str]
    wide: bool

    @property
    def ranks(self) -> dict[str, int]:
        """A dict that maps the names of LoRA layers to the ranks of their factors."""
        return {name: each.rank for name, each in self.factors.items()}

    @torch.no_grad()
    def copy_into_adapter(self, model: nn.Module, adapter_name: str) -> None:
        """Copy the computed weights into an adapter of the model.

        The weights are the computed factors, DoRA magnitudes, and biases. For each module in
        ``copies``, the existing adapter's copy of the module is also copied.

        Args:
            model: The base model with its adapters.
            adapter_name: The name of the adapter to copy into, which was added with ``plan``.
        """
        layers = lora_layers(model)
        for name, made in self.factors.items():
            layer = layers[name]
            layer._copy_into_factors(adapter_name, made.lora_a, made.lora_b, made.lora_bias)
            if made.magnitude is not None:
                magnitude: Any = layer.lora_magnitude_vector[adapter_name]
                magnitude.weight.copy_(made.magnitude)
            layer._clear_model_packed_factors()
        for name, owner in self.copies.items():
            wrapper = model.get_submodule(name)
            copies: Any = wrapper.modules_to_save
            copies[adapter_name].load_state_dict(copies[owner].state_dict())


def factor_matrices(
    name: str, layer: LoraLayer, adapter: str, *, require_product: bool = True
) -> low_rank.FactorPair:
    """Return an adapter's two LoRA factors for a layer, as matrices.

    The matrices have the dtype fp32 or, if a factor has a wider dtype, that dtype. They are not
    multiplied by the adapter's scaling.

    Args:
        name: The name of the layer, for messages.
        layer: The LoRA layer.
        adapter: The name of the adapter.
        require_product: Whether to require that the product of the two matrices is the adapter's
            update.

    Returns:
        The tuple ``(lora_a, lora_b)``, of shapes ``[R, K]`` and ``[N, R]``.

    Raises:
        AdapterStateError: If the factors are sharded or contain values that are not finite.
        UnsupportedLayerError: If the update is not the product of the two matrices, as in a grouped
            convolution, and ``require_product`` is True.
    """
    lora_a, lora_b, _ = layer._factors(adapter)
    if layer.is_split or is_dtensor(lora_a) or is_dtensor(lora_b):
        raise AdapterStateError(
            f"the factors of {name!r} are sharded across processes; save the adapters, load them "
            "into an unsharded model, and run this operation there"
        )
    if require_product and lora_b.shape[1] != lora_a.shape[0]:
        raise UnsupportedLayerError(
            f"{name!r} is a {type(layer.get_base_layer()).__name__} with groups > 1, so its LoRA "
            "factors are not a pair of matrices; exclude this layer from target_modules"
        )
    low_rank.check_factors_finite(f"adapter {adapter!r} on {name!r}", lora_a, lora_b)
    wide = torch.promote_types(lora_a.dtype, torch.float32)
    return lora_a.detach().to(wide), lora_b.detach().to(wide)


def split_factors_by_matrix(
    layer: LoraLayer, pair: low_rank.FactorPair
) -> list[low_rank.FactorPair]:
    """Split a layer's pair of factors into one pair per matrix.

    A layer has several matrices if its weight is a stack of matrices, as for stacked experts. For
    any other layer, the result is a list that contains only ``pair``.
    """
    if layer.num_matrices == 1:
        return [pair]
    lora_a, lora_b = rank_row_views(*pair, layer.num_matrices)
    return list(zip(lora_a, lora_b.transpose(1, 2), strict=True))


def join_per_matrix_factors(pairs: Sequence[low_rank.FactorPair]) -> low_rank.FactorPair:
    """Join a layer's per-matrix factors into one pair of factors for the whole layer.

    The matrices, for example those of stacked experts, form the layer's weight. Each matrix has its
    own pair of factors. This function is the inverse of `split_factors_by_matrix`.
    """
    lora_a, lora_b = zip(*pairs, strict=True)
    return torch.cat(lora_a), torch.stack(lora_b, dim=2).flatten(1)


def build_computed_adapter(
    model: nn.Module,
    source_configs: Mapping[str, LoraConfig],
    factors: Mapping[str, LayerAdapterTensors],
    config: LoraConfig | None = None,
) -> ComputedAdapter:
    """Build a `ComputedAdapter` from factors and configs.

    The computed adapter can later be added to the model. This function does not change the model.

    Args:
        model: The base model with its adapters.
        source_configs: A mapping from adapter names to configs. It contains the adapters from which
            the new adapter was computed.
        factors: A mapping from layer names to the new adapter's tensors. It contains all layers
            that the new adapter adapts.
        config: The new adapter's config, which may be changed. With None, the factors already
            include all scalings, and the config is derived from ``source_configs``.

    Raises:
        AdapterStateError: If two of the adapters own a copy of the same module, or if only some of
            them tie a head to the input embedding.
        ConfigError: If an adapter was trained on base weights that its initialization changed.
    """
    copies = _owner_by_copied_module(model, list(source_configs))
    ties = _ties_of_sources(model, list(source_configs))
    ranks = {name: each.rank for name, each in factors.items()}
    ranks |= {name: ranks[str(input_embedding_name(model))] for name in ties.heads}
    if config is None:
        saved = [name for name in copies if name not in ties.copies]
        config = _computed_adapter_config(list(source_configs.values()), ranks, saved)
    config.ensure_weight_tying = any(ties)
    alphas = {name: config.alpha_for(name) for name in ranks}
    plan = plan_target_modules(model, config, ties=ties)
    layers = lora_layers(model)
    parameters = {name for name in factors if not layers[name].replaces_module}
    inner = {f"{n}.{below}" for n, layer in layers.items() for below in layer.inner_layers()}
    outer = set(factors) - inner
    if set(plan.adapted_module_and_parameter_names) != outer | parameters:
        # The configs select layers in different ways. Only a list of names describes all layers.
        config.target_modules = set(strip_wrapper_prefixes_from_names(outer))
        config.target_parameters = sorted(parameters) or None
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        config._set_layer_ranks_and_alphas(ranks, alphas)
        plan = plan_target_modules(model, config, ties=ties)
    holders = (
        layers[name]._factors(a) for name in factors for a in source_configs if a in layers[name].r
    )
    return ComputedAdapter(plan, factors, copies, next(holders)[0].dtype == torch.float32)


def _ties_of_sources(model: nn.Module, adapters: Sequence[str]) -> ModulesAdaptedWithEmbedding:
    """Return the modules that a computed adapter adapts together with the input embedding.

    Args:
        model: The base model with its adapters.
        adapters: The adapters from which the new adapter is computed.

    Raises:
        AdapterStateError: If a head shares the embedding's LoRA factors in only some of the
            adapters that have such factors.
    """
    found = {name: modules_adapted_with_embedding(model, name) for name in adapters}
    heads = {head for ties in found.values() for head in ties.heads}
    layers = lora_layers(model)
    for head in heads:
        embedding: Any = layers[head]
        apart = [n for n in adapters if n in embedding.tied_to.r and head not in found[n].heads]
        if apart:
            raise AdapterStateError(
                f"adapters {list(adapters)} cannot be combined: adapters {apart} do not tie "
                f"{head!r} to the input embedding (ensure_weight_tying=True), and the others do; "
                "combine only adapters that tie the same modules"
            )
    copies = (name for ties in found.values() for name in ties.copies)
    return ModulesAdaptedWithEmbedding(tuple(sorted(heads)), tuple(copies))


def warn_if_base_biases_left_out(source_configs: Mapping[str, LoraConfig]) -> None:
    """Warn if a new adapter in the model leaves out base biases that its sources train.

    At most one adapter of a model trains biases of the base model, because all adapters share them.

    Args:
        source_configs: A mapping from adapter names to configs. It contains the adapters from which
            the new adapter is computed.
    """
    for name, config in source_configs.items():
        if config.bias != "none":
            warn(
                f"the new adapter does not include the base biases that adapter {name!r} trains "
                f"(bias={config.bias!r}). They stay in this model, but the new adapter's file does "
                "not contain them; save_as_lora saves a reduced adapter together with its base "
                "biases",
            )


def _owner_by_copied_module(model: nn.Module, adapters: Sequence[str]) -> dict[str, str]:
    """Return a dict that maps the name of each copied module to the adapter that owns the copy.

    Raises:
        AdapterStateError: See `check_modules_to_save_disjoint`.
    """
    check_modules_to_save_disjoint(model, adapters)
    return {name: owners[0] for name, owners in _adapters_by_copied_module(model, adapters).items()}


def check_modules_to_save_disjoint(model: nn.Module, adapters: Sequence[str]) -> None:
    """Raise an error if two adapters have the same module in ``modules_to_save``.

    An adapter owns a copy of each module in its ``modules_to_save``. Adapters that own copies of
    the same module cannot be combined. An adapter whose name occurs twice in ``adapters`` counts as
    two adapters, as in PEFT.

    Raises:
        AdapterStateError: If two adapters own copies of the same module.
    """
    for name, owners in _adapters_by_copied_module(model, adapters).items():
        if len(owners) > 1:
            raise AdapterStateError(  # begins as in PEFT
                "Cannot add weighted adapters if they target the same module with modules_to_save: "
                f"adapters {owners} each have a copy of {name!r}"
            )


def _adapters_by_copied_module(model: nn.Module, adapters: Sequence[str]) -> dict[str, list[str]]:
    """Return a dict that maps the name of each copied module to the adapters that own a copy.

    Only the given adapters are listed.
    """
    found = {}
    for name, module in modules_with_adapters(model):
        copies = getattr(module, "modules_to_save", None)
        owners = [adapter for adapter in adapters if copies is not None and adapter in copies]
        if owners:
            found[name] = owners
    return found


def _computed_adapter_config(
    configs: Sequence[LoraConfig], ranks: Mapping[str, int], modules_to_save: Sequence[str]
) -> LoraConfig:
    """Create the config of a computed adapter from the configs of the original adapters.

    The factors already include all scalings. Therefore, ``lora_alpha`` equals the rank, so that the
    adapter's scaling is 1. Fields that are not determined by the computation are copied from the
    first of ``configs``.

    Args:
        configs: The configs of the adapters that the new adapter was computed from.
        ranks: A mapping from the names of layers to ranks.
        modules_to_save: The names of the modules that the new adapter owns a copy of.

    Raises:
        ConfigError: If an adapter was trained on base weights that its initialization changed.
    """
    for each in configs:
        each.check_plain("an adapter computed from this one")
    config = copy.deepcopy(configs[0])
    rank = max(ranks.values())
    config.r = config.lora_alpha = rank
    config.use_rslora = False  # alpha / sqrt(rank) would scale a second time
    config.bias = "none"  # at most one adapter of a model trains the base model's biases
    config.lora_bias = any(each.lora_bias for each in configs)
    config.init_lora_weights = True
    config.modules_to_save = sorted(modules_to_save) or None
    targets = [each.target_modules for each in configs]
    if all(isinstance(target, str) for target in targets):
        patterns = [str(target) for target in dict.fromkeys(targets)]
        config.target_modules = patterns[0] if len(patterns) == 1 else _join_patterns(patterns)
    else:  # if there are also patterns, `build_computed_adapter` lists all layers
        lists = [each for each in targets if each and not isinstance(each, str)]
        config.target_modules = {name for each in lists for name in each}
    parameters = {name for each in configs for name in each.target_parameters or ()}
    config.target_parameters = sorted(parameters) or None
    config._set_layer_ranks_and_alphas(ranks, ranks)
    return config


def _join_patterns(patterns: Sequence[str]) -> str:
    """Return a regular expression that matches what any of the patterns matches.

    Patterns with flags, or with groups of the same name, cannot be joined. The result then matches
    no module, so that `build_computed_adapter` lists all layers.
    """
    joined = "|".join(f"({pattern})" for pattern in patterns)
    try:
        re.compile(joined)
    except re.error:
        return NO_TARGETS
    return joined
