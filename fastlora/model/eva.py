"""EVA: initialize the LoRA factor A of each layer from data, and redistribute ranks among layers.

The functions have the same names, arguments, and results as in PEFT. A state dict that was computed
with one library can be used with the other.

The method is that of https://arxiv.org/abs/2410.07170, as implemented in PEFT 0.21.2,
``tuners/lora/eva.py``. Unlike PEFT, this implementation does not keep a batch in memory, accepts
batches other than dicts of tokens, and raises an error if no batch has enough rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init.calibration_data import call_model, temporary_training_mode
from fastlora.init.configs import EvaConfig, convert_init_config
from fastlora.init.eva import Prepare, flatten_first_input
from fastlora.init.eva_search import EvaDirectionSearch
from fastlora.layers import LoraLayer
from fastlora.layers.base_layers import linear_features, stores_weight_transposed
from fastlora.layers.layer_kinds import LayerAdapterSettings
from fastlora.layers.linear import DEFAULT_ADAPTER
from fastlora.model.adapter_folder import KEY_PREFIX
from fastlora.model.config import LoraConfig
from fastlora.model.inject import adapted_layers, lora_layers
from fastlora.model.plan import adapter_settings_for, to_lora_config
from fastlora.model.targets import find_target_modules, resolve_target_modules
from fastlora.model.tuner import LoraTuner, tuner_of
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError, ConfigError, InitializationError

# A larger rho means "no limit". It is reduced to the largest dimension of a parameter divided by r.
_MOST_RHO = 1000


def prepare_model_inputs_fn_language_modeling(
    model_input: Any, peft_config: Any
) -> torch.Tensor | None:
    """Return the indices of the tokens in a language model's inputs that EVA uses.

    A token is selected if it is not masked by the attention mask and, with ``use_label_mask``, its
    label is not ``label_mask_value``.

    Args:
        model_input: The batch.
        peft_config: The adapter's config, which has the ``eva_config``.

    Returns:
        The indices of the selected tokens, a tensor of shape ``[tokens, mask.dim()]``. If the batch
        is not a mapping with ``input_ids``, the result is None, which stands for all tokens.
    """
    if not isinstance(model_input, Mapping) or "input_ids" not in model_input:
        return None
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]) if mask is None else mask
    mask = mask.bool()
    config = convert_init_config(peft_config.eva_config, EvaConfig) or EvaConfig()
    labels = model_input.get("labels")
    if config.use_label_mask and labels is not None:
        mask = mask & (labels != config.label_mask_value)
    indices: torch.Tensor = mask.nonzero()
    return indices


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Any, layer_name: str
) -> torch.Tensor:
    """Prepare the inputs of a language model's layer for use by EVA.

    The result contains only the rows of the tokens that EVA uses.

    Args:
        layer_input: The input of the layer, or the tuple of its inputs.
        model_input: The result of `prepare_model_inputs_fn_language_modeling` for the batch.
        layer_name: The name of the layer.

    Returns:
        The rows, ``[tokens, K]``.
    """
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if model_input is None or not isinstance(x, torch.Tensor) or x.dim() <= model_input.shape[1]:
        return flatten_first_input(layer_input, model_input, layer_name)
    rows: torch.Tensor = x[model_input.T.unbind()]
    return rows


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: Any = None,
    forward_fn: Callable[[nn.Module, Any], object] = call_model,
    prepare_model_inputs_fn: Callable[[Any, Any], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | Mapping[str, Prepare]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT_ADAPTER,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Compute the EVA state dict, which initializes the LoRA layers of an adapter.

    It contains the initial LoRA factor A of each layer. The initial values are the principal
    directions of the layer's inputs, of shape ``[rank, K]``. The sum of all ranks is redistributed
    among the layers. Each layer gets at most ``rho * r`` directions, and layers with the same
    inputs share their directions. The function iterates over the dataloader, repeatedly if
    necessary, until the directions have converged.

    Args:
        model: A model with or without an adapter.
        dataloader: The batches. Any iterable that can be iterated over more than once.
        peft_config: The config of the adapter. Required if the model has no adapter.
        forward_fn: A function that calls the model. Its arguments are the model and a batch.
        prepare_model_inputs_fn: A function of the batch and the config. Its result is passed to
            ``prepare_layer_inputs_fn``. With None, the batch itself is passed.
        prepare_layer_inputs_fn: A function of a layer's inputs, the result of
            ``prepare_model_inputs_fn``, and the layer's name. It returns rows ``[M, K]``. A mapping
            from layer names to functions is accepted too. With None, all rows are used.
        adapter_name: The adapter to compute directions for.
        gather_distributed_inputs: Whether to gather the rows of all processes.
        show_progress_bar: Whether to show a progress bar, if tqdm is installed.

    Returns:
        A dict that maps layer names to directions.

    Raises:
        ConfigError: If the model has no adapter and no config is given, or if a mapping contains
            unknown layer names.
        AdapterNotFoundError: If there is no such adapter.
        TargetNotFoundError: If the model has no adapter, and no module matches the config.
        InitializationError: If the dataloader has no batches, or no batch with enough rows; if no
            target is a linear layer; or if the data does not reach a layer.
    """
    tuner = tuner_of(model)
    if peft_config is None:
        if tuner is None:
            raise ConfigError("peft_config is required if model is not a PeftModel")
        tuner.check_adapter_loaded(adapter_name)
        peft_config = tuner.peft_config[adapter_name]
    config = to_lora_config(peft_config)
    layers = _eva_layers(model, tuner, config, adapter_name)
    if not layers:
        raise InitializationError("EVA needs at least one linear target module, found none")
    without = contextlib.nullcontext() if tuner is None else tuner.disable_adapter()
    settings = convert_init_config(config.eva_config, EvaConfig) or EvaConfig()
    ranks = {name: config.rank_for(name) for name in layers}

    def prepared(batch: Any) -> Any:
        return batch if prepare_model_inputs_fn is None else prepare_model_inputs_fn(batch, config)

    search = EvaDirectionSearch(
        model,
        layers,
        _max_ranks(model, layers, ranks, settings.rho, config.r),
        sum(ranks.values()),
        settings,
        forward_fn,
        prepared,
        _prepare_fn_by_layer(prepare_layer_inputs_fn, layers),
        gather_distributed_inputs,
    )
    with without, temporary_training_mode(model, training=False):
        search.find_shared_inputs(dataloader)
        search.repeat_batches_until_converged(dataloader, show_progress_bar)
    return search.directions()


def _eva_layers(
    model: nn.Module, tuner: LoraTuner | None, config: LoraConfig, adapter_name: str
) -> dict[str, nn.Module]:
    """Return the layers to initialize with EVA.

    The result is a dict of layers, keyed by name. The linear layers that have the adapter are
    returned. If the model has no adapters, the linear layers that the config targets are returned,
    or all linear layers if ``target_modules`` is None.
    """
    if tuner is not None:
        found = lora_layers(tuner.model).items()
        return {f"{KEY_PREFIX}{n}": layer for n, layer in found if _is_linear(layer, adapter_name)}
    names = (
        [name for name, _ in model.named_modules()]
        if config.target_modules is None
        else find_target_modules(model, config)
    )
    modules = {name: model.get_submodule(name) for name in names}
    return {
        n: m for n, m in modules.items() if isinstance(m, nn.Linear) or stores_weight_transposed(m)
    }


def _is_linear(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A and isinstance(layer.lora_A[adapter_name], nn.Linear)


def _prepare_fn_by_layer(
    prepare: Prepare | Mapping[str, Prepare] | None, layers: Mapping[str, nn.Module]
) -> dict[str, Prepare]:
    """Return a dict that maps each layer name to the function that prepares the layer's inputs.

    Raises:
        ConfigError: If ``prepare`` is a mapping with a key that is not a layer name.
    """
    if not isinstance(prepare, Mapping):
        return dict.fromkeys(layers, prepare or flatten_first_input)
    lost = sorted(set(prepare) - set(layers))
    if lost:
        raise ConfigError(
            f"prepare_layer_inputs_fn has keys that match no layer to initialize: {lost}"
        )
    return {name: prepare.get(name, flatten_first_input) for name in layers}


def _max_ranks(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    ranks: Mapping[str, int],
    rho: float,
    r: int,
) -> dict[str, int]:
    """Return a dict that maps layer names to maximum ranks.

    The maximum is the rank in the config multiplied by ``rho``, and not more than the number of
    input features.
    """
    if rho > _MOST_RHO:
        rho = min(rho, max(max(p.shape) for p in model.parameters() if p.dim()) // r)
    widths = {name: (linear_features(layer) or (0, 0))[0] for name, layer in layers.items()}
    return {name: min(round(ranks[name] * rho), width) for name, width in widths.items()}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], object] = call_model,
    prepare_model_inputs_fn: Callable[[Any, Any], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Prepare
    | Mapping[str, Prepare]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT_ADAPTER,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialize the weights of an adapter with EVA.

    The adapter must have been added with ``init_lora_weights="eva"``. If the rank of a layer
    changes, the layer gets new parameters, so create the optimizer after this call. A layer that is
    assigned a rank of 0 loses the adapter. The adapter's config is updated: ``rank_pattern``,
    ``alpha_pattern``, ``target_modules``, and ``target_parameters`` describe the new state.

    Args:
        model: The model with the adapter.
        dataloader, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
            gather_distributed_inputs, show_progress_bar: See `get_eva_state_dict`.
        eva_state_dict: A result of `get_eva_state_dict`. If it is given, no data is needed.
        adapter_name: The adapter to initialize.

    Raises:
        ConfigError: If the model is not a `LoraModel`, if the adapter has a different
            initialization, or if there is neither a dataloader nor a state dict.
        AdapterNotFoundError: If there is no such adapter.
        AdapterStateError: If several adapters are active, if an adapter is merged, or if a
            `fastlora.adapters` block of the model is open. The model is unchanged in this case.
        InitializationError: If the state dict does not fit the adapter, or in the cases listed in
            `get_eva_state_dict`.
    """
    tuner = tuner_of(model)
    if tuner is None:
        raise ConfigError("model must be a PeftModel, as returned by fastlora.get_peft_model")
    if len(tuner.active_adapters) > 1:
        raise AdapterStateError(
            "`initialize_lora_eva_weights` currently only works with a single active adapter"
        )
    tuner.check_adapter_loaded(adapter_name)
    config = tuner.peft_config[adapter_name]
    if config.init.name != "eva":
        raise ConfigError(
            "`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`"
        )
    tuner.group.check_no_open_blocks("initialize_lora_eva_weights")
    if any(layer.merged for layer in lora_layers(tuner.model).values()):
        raise AdapterStateError("an adapter is merged; call unmerge_adapter() first")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    _apply_eva_state_dict(tuner, adapter_name, config, eva_state_dict)


def _apply_eva_state_dict(
    tuner: LoraTuner, adapter_name: str, config: LoraConfig, state: Mapping[str, torch.Tensor]
) -> None:
    """Apply an EVA state dict to the layers of an adapter.

    The directions are copied into the layers, and the adapter's config is updated. If the rank of a
    layer changes, the adapter's factors on this layer are replaced. A layer that is assigned a rank
    of 0 loses the adapter.
    """
    layers = {n: layer for n, layer in lora_layers(tuner.model).items() if adapter_name in layer.r}
    found = {
        name: state[f"{KEY_PREFIX}{name}"] for name in layers if f"{KEY_PREFIX}{name}" in state
    }
    for name, directions in found.items():
        if directions.dim() != 2 or directions.shape[1] != layers[name].in_features:
            raise InitializationError(
                f"layer {name!r}: the directions have shape {tuple(directions.shape)}, expected "
                f"[rank, {layers[name].in_features}]"
            )
    settings = convert_init_config(config.eva_config, EvaConfig) or EvaConfig()
    ranks, alphas, missing = {}, {}, []
    parameters = _target_parameter_names_by_layer(layers, config)
    for name, layer in layers.items():
        new_settings = adapter_settings_for(name, config)
        rank, alpha = new_settings.r, new_settings.lora_alpha
        if name in found:
            rank = len(found[name])
            if rank == 0:
                _remove_adapter_and_unwrap_empty_layer(tuner, name, layer, adapter_name)
                continue
            if settings.adjust_scaling_factors:
                alpha *= rank / new_settings.r
        else:
            missing.append(name)
            new_settings = new_settings._replace(init_lora_weights=True)
        if rank != layer.r[adapter_name] or (name in missing and _is_linear(layer, adapter_name)):
            _recreate_factors(layer, adapter_name, new_settings._replace(r=rank, lora_alpha=alpha))
        if name in found:
            weight: Any = layer.lora_A[adapter_name].weight
            weight.copy_(found[name])
        pattern = config._name_for_rank_and_alpha_patterns(name)
        if rank != config.r:
            ranks[pattern] = rank
        if alpha != config.lora_alpha:
            alphas[pattern] = alpha
    config.rank_pattern, config.alpha_pattern = ranks, alphas
    _store_adapted_layers_as_targets(tuner, adapter_name, config, parameters)
    tuner._find_routed()
    tuner.set_adapter(tuner.active_adapters, config.inference_mode)
    if missing:
        warn(
            "the following layers were initialized with init_lora_weights=True because they were "
            f"not found in the eva state_dict: {missing}",
        )


def _target_parameter_names_by_layer(layers: Iterable[str], config: LoraConfig) -> dict[str, str]:
    """Map the name of each layer to the full name of its target parameter.

    Layers that ``target_modules`` selects have no target parameter, and are left out.
    """
    names = {name: config._name_for_rank_and_alpha_patterns(name) for name in layers}
    return {name: weight for name, weight in names.items() if weight != name}


def _store_adapted_layers_as_targets(
    tuner: LoraTuner, adapter_name: str, config: LoraConfig, parameters: Mapping[str, str]
) -> None:
    """Set the targets in an adapter's config to the layers that have the adapter.

    The config then selects exactly these layers. The tuner's list of the adapter's target
    parameters is updated too.

    Args:
        tuner: The tuner of the model.
        adapter_name: The name of the adapter.
        config: The adapter's config.
        parameters: The result of `_target_parameter_names_by_layer`, for the layers that had the
            adapter.
    """
    left = adapted_layers(tuner.model, adapter_name)
    config.target_modules = {name for name in left if name not in parameters}
    config.target_modules = resolve_target_modules(tuner.model, config)
    kept = [parameter for name, parameter in parameters.items() if name in left]
    if len(kept) < len(parameters):
        config.target_parameters = sorted(kept) or None
        tuner._parameters_by_adapter[adapter_name] = kept


def _recreate_factors(
    layer: LoraLayer, adapter_name: str, new_settings: LayerAdapterSettings
) -> None:
    """Recreate an adapter's factors on a layer, using new settings.

    ``new_settings`` determines the shapes and the initialization of the new factors. The dtype of
    the factors does not change.
    """
    before = layer.lora_A[adapter_name].weight.dtype
    layer.delete_adapter(adapter_name)
    for each, arguments in layer._layers_to_adapt(new_settings._asdict()):
        each.add_adapter(adapter_name, **arguments)
    if before == torch.float32:
        layer.widen(adapter_name)


def _remove_adapter_and_unwrap_empty_layer(
    tuner: LoraTuner, name: str, layer: LoraLayer, adapter_name: str
) -> None:
    """Remove an adapter from a LoRA layer, and unwrap the layer if no adapter is left on it.

    An unwrapped layer is replaced with its base layer.
    """
    layer.delete_adapter(adapter_name)
    if not layer.r:
        tuner.model.set_submodule(name, layer.release())
