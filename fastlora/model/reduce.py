"""Reduce the rank of adapters with an SVD, and scale down their intruder dimensions.

`convert_to_lora`, `save_as_lora`, and `reduce_intruder_dimension` have the names and arguments of
PEFT 0.21.2 (``tuners/lora/conversion.py`` and ``intruders.py``). `reduce_rank` is specific to
fastlora and reports the approximation error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastlora.algebra import low_rank
from fastlora.layers import LoraLayer
from fastlora.model import adapter_state
from fastlora.model.adapter_folder import save_adapter_folder
from fastlora.model.base_modules import peft_function_or_raise
from fastlora.model.computed_adapters import (
    ComputedAdapter,
    LayerAdapterTensors,
    build_computed_adapter,
    factor_matrices,
    join_per_matrix_factors,
    split_factors_by_matrix,
    warn_if_base_biases_left_out,
)
from fastlora.model.expert_files import config_for_peft
from fastlora.model.inject import layers_with_own_factors
from fastlora.model.tuner import tuner_of
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.model.lora_model import LoraModel

# The name of a temporary adapter. It must not be the name of a user's adapter.
_CONVERTED = "fastlora-converted"


@dataclass(frozen=True)
class RankReduction:
    """The result of reducing the rank of an adapter.

    `reduce_rank` returns this object, which contains the new ranks and the errors that the
    reduction causes.

    Args:
        adapter_name: The name of the new adapter.
        ranks: A dict that maps layer names to the new rank on the layer.
        errors: A dict that maps layer names to the relative error on the layer. The relative error
            is the Frobenius norm of the lost part of the update, divided by the Frobenius norm of
            the whole update.
    """

    adapter_name: str
    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def largest_error(self) -> float:
        """The largest error among the layers.

        The error is relative, as in ``errors``.
        """
        return max(self.errors.values())

    def __str__(self) -> str:
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"{self.adapter_name}: ranks {min(self.ranks.values())} to {max(self.ranks.values())} "
            f"on {len(self.ranks)} layers; lost {mean:.2%} of the update on average, at most "
            f"{self.errors[worst]:.2%} ({worst})"
        )


def reduce_rank(
    model: LoraModel,
    rank: int | float,
    adapter_name: str = "default",
    new_adapter_name: str = "reduced",
) -> RankReduction:
    """Add a copy of an adapter, reduced to a given rank.

    The copy is a new adapter that approximates the given adapter. On each layer, the new update is
    the best approximation of the old update with the given rank, in the Frobenius norm. The factors
    of the new adapter include the scaling. Biases of ``lora_B``, DoRA magnitudes, and copies of
    modules are copied. If the given adapter trains base biases, a warning says that the new adapter
    does not. The new adapter is frozen and inactive.

    Args:
        model: The model that has the adapter.
        rank: The new rank as an integer, or the fraction of the update's squared Frobenius norm to
            preserve as a float in (0, 1]. With a fraction, each layer gets the smallest rank that
            preserves at least this fraction.
        adapter_name: The adapter to reduce. It is not changed.
        new_adapter_name: The name of the new adapter.

    Returns:
        The rank and the relative error on each layer.

    Raises:
        AdapterNotFoundError: If there is no such adapter.
        AdapterStateError: If the new name is in use, if the adapter has trainable tokens, or if
            factors are sharded or not finite.
        ConfigError: If ``rank`` is out of range, or larger than a dimension of a layer's weight; if
            the new name is invalid; or if the initialization changed the base weights (PiSSA,
            OLoRA, CorDA, or LoftQ).
        UnsupportedLayerError: If a layer's update is not the product of two matrices. The model is
            unchanged after any of these errors.
    """
    model.base_model.check_new_adapter_name(new_adapter_name)
    new, errors = _compute_reduced_adapter_and_errors(model, rank, adapter_name)
    warn_if_base_biases_left_out({adapter_name: model.base_model.peft_config[adapter_name]})
    model.base_model.add_computed_adapter(new_adapter_name, new)
    return RankReduction(new_adapter_name, new.ranks, errors)


def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Convert an adapter to LoRA, and return the config and tensors of the result.

    The result is a LoRA adapter of the given rank. In a PEFT model, the adapter to convert may be
    of any type that PEFT can convert to LoRA. The model is not changed.

    In a `LoraModel`, the adapter is already a LoRA adapter. The result is then a reduced-rank
    approximation of the adapter, as in `reduce_rank`, and a warning reports the approximation
    error. The result also contains the base biases that the adapter trains.

    Args:
        model: A `LoraModel` or a PEFT model. For a PEFT model, PEFT's function is called.
        rank: See `reduce_rank`.
        adapter_name: The adapter to convert. It is not changed.
        progressbar, compile_kwargs: Arguments of PEFT. They are ignored for a `LoraModel`.

    Returns:
        A tuple ``(config, tensors)``, where ``tensors`` is a dict that maps the keys of PEFT's
        adapter files to the tensors of the converted adapter.

    Raises:
        AdapterNotFoundError, AdapterStateError, ConfigError, UnsupportedLayerError: See
            `reduce_rank`.
    """
    if tuner_of(model) is None:
        return _peft_function(model, "convert_to_lora")(
            model, rank, adapter_name, progressbar, compile_kwargs
        )
    new, errors = _compute_reduced_adapter_and_errors(model, rank, adapter_name)
    warn(
        "Converting a PEFT adapter to LoRA that is already a LoRA adapter: "
        f"{RankReduction(adapter_name, new.ranks, errors)}",
    )
    tuner = model.base_model
    tuner.add_computed_adapter(_CONVERTED, new)
    try:
        config, state = tuner.peft_config[_CONVERTED], model.state_dict()
        config.bias = tuner.peft_config[adapter_name].bias
        tensors = adapter_state.adapter_file_state_dict(model, _CONVERTED, state, False)
        return config, {k: v.detach().clone() for k, v in tensors.items()}
    finally:
        tuner._delete_adapter(_CONVERTED)  # also in an open `fastlora.adapters` block


def save_as_lora(
    path: str | os.PathLike[str],
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert an adapter to LoRA, and save the result in a folder.

    The result is a LoRA adapter of the given rank, and is saved in PEFT's format. `convert_to_lora`
    describes which adapters can be converted.

    Args:
        path: The folder. It is created if it does not exist.
        model, rank, adapter_name, progressbar, compile_kwargs: See `convert_to_lora`.
    """
    if tuner_of(model) is None:
        _peft_function(model, "save_as_lora")(
            path, model, rank, adapter_name, progressbar, compile_kwargs
        )
        return
    config, tensors = convert_to_lora(model, rank, adapter_name)
    # The converted adapter is on the same layers as the original one.
    config = config_for_peft(model.get_base_model(), adapter_name, config)
    save_adapter_folder(Path(path), config, tensors)


def reduce_intruder_dimension(
    peft_model: Any,
    old_adapter_name: str = "default",
    new_adapter_name: str = "intruder_reduced",
    top_k: int = 10,
    threshold_epsilon: float = 0.5,
    mitigation_lambda: float = 0.75,
    logging_sink: Callable[..., Any] | None = print,
) -> None:
    """Add a copy of an adapter, and scale down the intruder dimensions of the copy.

    The copy is activated. If the given adapter trains base biases, a warning says that the copy
    does not. An intruder dimension is one of the leading singular vectors of the adapted weight
    that is not similar to any singular vector of the base weight. Intruder dimensions are
    associated with forgetting (https://arxiv.org/abs/2410.21228). Scaling them down may lower the
    accuracy on the adapter's own task.

    Args:
        peft_model: The model that has the adapter.
        old_adapter_name: The adapter to copy. It is not changed.
        new_adapter_name: The name of the new adapter, which has the same rank and scaling.
        top_k: The number of leading singular vectors to examine.
        threshold_epsilon: A singular vector is an intruder if its largest cosine similarity is less
            than this value.
        mitigation_lambda: The fraction of each intruder dimension to keep.
        logging_sink: A function that is called with a line of text for each layer. With None,
            nothing is logged.

    Raises:
        AdapterNotFoundError: If there is no such adapter.
        AdapterStateError: If the model has no LoRA layers of fastlora, if the new name is in use,
            if an adapter is merged, if the old adapter uses DoRA or has trainable tokens, or if
            factors are sharded or not finite.
        ConfigError: If the new name is invalid, or if the initialization changed the base weights
            (PiSSA, OLoRA, CorDA, or LoftQ).
        UnsupportedLayerError: If a base weight cannot be read. The model is unchanged after any of
            these errors.
    """
    if tuner_of(peft_model) is None:
        raise AdapterStateError(
            "The provided model is not using LoRA layers of fastlora and is therefore not "
            "supported."
        )
    tuner = peft_model.base_model
    tuner.check_new_adapter_name(new_adapter_name)
    tuner.check_adapter_loaded(old_adapter_name)
    tuner.peft_config[old_adapter_name].check_plain("an adapter computed from this one")
    tell = logging_sink or (lambda *_: None)
    factors = {}
    for name, layer in _layers_with_adapter(peft_model, old_adapter_name):
        if old_adapter_name in layer.lora_magnitude_vector:
            raise AdapterStateError(f"adapter {old_adapter_name!r} uses DoRA; expected plain LoRA")
        if layer.merged:
            raise AdapterStateError(f"{name!r} has merged adapters; call unmerge_adapter() first")
        if layer.num_matrices > 1:
            raise UnsupportedLayerError(
                f"reduce_intruder_dimension does not support {name!r}, which is a stack of "
                "matrices; use an adapter without target_parameters"
            )
        pair = factor_matrices(name, layer, old_adapter_name)
        scaling = float(layer.scaling[old_adapter_name])
        try:
            weight = layer._local_weight().detach().to(pair[0].dtype)
        except UnsupportedLayerError as error:
            raise UnsupportedLayerError(
                f"the base weight of {name!r}, a {type(layer.get_base_layer()).__name__}, cannot "
                "be read as one matrix; exclude this layer from target_modules"
            ) from error
        found = _scale_down_intruder_dimensions(
            weight, pair, scaling, (top_k, threshold_epsilon, mitigation_lambda)
        )
        tell(f"{name}: {f'Intruders: {found[1]}' if found else 'No intruders'}")
        pair = found[0] if found else pair
        factors[name] = LayerAdapterTensors(*pair, layer._factors(old_adapter_name)[2])
    old = tuner.peft_config[old_adapter_name]
    config = copy.deepcopy(old)
    config.bias, config.init_lora_weights = "none", True
    new = build_computed_adapter(tuner.model, {old_adapter_name: old}, factors, config)
    warn_if_base_biases_left_out({old_adapter_name: old})
    tuner.add_computed_adapter(new_adapter_name, new)
    tell(f"Enabling new adapter {new_adapter_name}")
    peft_model.set_adapter(new_adapter_name)


@torch.no_grad()
def _scale_down_intruder_dimensions(
    weight: torch.Tensor,
    pair: low_rank.FactorPair,
    scaling: float,
    options: tuple[int, float, float],
) -> tuple[low_rank.FactorPair, int] | None:
    """Scale down the intruder dimensions of an adapter on one layer.

    They are multiplied by ``mitigation_lambda``, so that 0 removes them.

    Args:
        weight: The base weight, ``[N, K]``.
        pair: The adapter's factors, ``[R, K]`` and ``[N, R]``.
        scaling: The adapter's scaling.
        options: ``top_k``, ``threshold_epsilon``, and ``mitigation_lambda`` of
            `reduce_intruder_dimension`.

    Returns:
        A tuple of the new factors and the number of intruder dimensions found, or None if there are
        none.
    """
    lora_a, lora_b = pair
    top, threshold, left = options
    adapted = low_rank.compute_svd(torch.addmm(weight, lora_b, lora_a, alpha=scaling))
    base = low_rank.compute_svd(weight)
    similar = (adapted.u[:, :top].t() @ base.u).abs().amax(1)
    index = (similar < threshold).nonzero().flatten()
    if not index.numel():
        return None
    # The subtracted part has rank I, the number of intruders, so the sum has at most rank R + I.
    intruders = adapted.vh[index], adapted.u[:, index] * adapted.s[index]
    found = low_rank.svd_of_weighted_sum([pair, intruders], [1.0, (left - 1.0) / scaling])
    rank = lora_a.shape[0]
    root = found.s[:rank].sqrt()
    made_a, made_b = root[:, None] * found.vh[:rank], found.u[:, :rank] * root
    return (
        low_rank.pad_factor(made_a, rank, 0),
        low_rank.pad_factor(made_b, rank, 1),
    ), index.numel()


def _compute_reduced_adapter_and_errors(
    model: LoraModel, rank: int | float, adapter_name: str
) -> tuple[ComputedAdapter, dict[str, float]]:
    """Compute a reduced-rank approximation of an adapter, and its error on each layer.

    The adapter and the model are not changed.

    Returns:
        A tuple of the computed adapter and a dict that maps layer names to the relative errors of
        the approximation.
    """
    share = isinstance(rank, float)
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank <= 0:
        raise ConfigError(
            "rank must be a positive integer such as 4, or a fraction in (0, 1] such as 0.9, got "
            f"{rank!r}"
        )
    if share and rank > 1:
        raise ConfigError(
            "If rank is a float, it is interpreted as a threshold, which must be between 0 and 1; "
            f"got {rank}."
        )
    factors, errors = {}, {}
    for name, layer in _layers_with_adapter(model, adapter_name):
        pair = factor_matrices(name, layer, adapter_name)
        scaling = float(layer.scaling[adapter_name])
        found = [
            low_rank.svd_of_weighted_sum([each], [scaling])
            for each in split_factors_by_matrix(layer, pair)
        ]
        most = min(pair[0].shape[1], pair[1].shape[0])
        if not share and rank > most:
            raise ConfigError(
                f"The chosen rank {rank} is larger than the smaller dimension ({most}) of the "
                f"weight matrix of {name!r}; choose a lower rank."
            )
        cut = max(each.num_singular_values_to_keep(rank) for each in found)
        energy = torch.stack([each.s.double().square() for each in found])
        total = float(energy.sum())
        errors[name] = (float(energy[:, cut:].sum()) / total) ** 0.5 if total else 0.0
        full = cut if share else int(rank)
        pairs = [(each.vh[:cut], each.u[:, :cut] * each.s[:cut]) for each in found]
        lora_a, lora_b = join_per_matrix_factors(
            [(low_rank.pad_factor(a, full, 0), low_rank.pad_factor(b, full, 1)) for a, b in pairs]
        )
        bias = layer._factors(adapter_name)[2]
        magnitude: Any = layer._factors_by_name(adapter_name).get("lora_magnitude_vector")
        factors[name] = LayerAdapterTensors(
            lora_a,
            lora_b,
            None if bias is None else bias.detach() * scaling,
            None if magnitude is None else magnitude.weight.detach(),
            layer.num_matrices,
        )
    tuner = model.base_model
    return build_computed_adapter(
        tuner.model, {adapter_name: tuner.peft_config[adapter_name]}, factors
    ), errors


def _layers_with_adapter(model: LoraModel, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield a tuple ``(name, layer)`` for each LoRA layer that has factors of the adapter.

    Raises:
        AdapterNotFoundError: If there is no such adapter.
        AdapterStateError: If the adapter has trainable tokens or is on the meta device.
    """
    tuner = model.base_model
    tuner.check_adapter_has_values(adapter_name)
    if tuner.peft_config[adapter_name].trainable_token_indices:
        raise AdapterStateError(
            f"adapter {adapter_name!r} trains token embeddings (trainable_token_indices), which "
            "have no rank to reduce"
        )
    for name, layer in layers_with_own_factors(tuner.model).items():
        if adapter_name in layer.r:
            yield name, layer


def _peft_function(model: nn.Module, function: str) -> Any:
    error = UnsupportedLayerError(
        f"Could not detect any layer that supports LoRA conversion in a {type(model).__name__}; "
        "expected a fastlora.LoraModel or a PEFT model"
    )
    return peft_function_or_raise(model, "peft", function, error)
