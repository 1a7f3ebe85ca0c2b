"""Calibrate a model on data for the initialization methods CorDA and LoRA-GA.

Both methods run before an adapter is added. EVA, which runs after the adapter is added, is in
`fastlora.model.eva`. The functions have the same names and arguments as in PEFT. They store the
same attributes on the layers and the same contents in cache files, so that a calibration made with
one library can be used with the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init import corda, lora_ga
from fastlora.init.calibration_data import (
    cached_tensor_on_device,
    call_model,
    iterate_batches,
    progress_bar,
    read_tensor_cache,
    restoring_buffers,
    temporary_training_mode,
    write_tensor_cache,
)
from fastlora.init.configs import CordaConfig, LoraGAConfig, convert_init_config
from fastlora.layers.base_layers import reason_weight_not_replaceable, stores_weight_transposed
from fastlora.model.base_modules import base_module_of
from fastlora.model.config import LoraConfig
from fastlora.model.plan import to_lora_config
from fastlora.model.targets import find_target_modules
from fastlora.model.tuner import tuner_of
from fastlora.validation import ConfigError, InitializationError, error_prefix


def target_linear_layers(
    model: nn.Module, config: LoraConfig, init_method: str
) -> dict[str, nn.Module]:
    """Return the linear layers that a config targets.

    The result is a dict that maps the names of the layers to the layers without adapters. Targets
    that are not linear layers are left out, as in PEFT.

    Args:
        model: The model, with or without adapters.
        config: The adapter's config.
        init_method: The name of the initialization method that uses the layers. The name appears
            in messages.

    Raises:
        TargetNotFoundError: If no module matches the config.
        InitializationError: If no target is a linear layer, or if a target has a quantized weight.
    """
    tuner = tuner_of(model)
    inner = model if tuner is None else tuner.model
    found = {}
    for name in find_target_modules(inner, config):
        base = base_module_of(inner.get_submodule(name))
        if not isinstance(base, nn.Linear) and not stores_weight_transposed(base):
            continue
        reason = reason_weight_not_replaceable(base, allow_quantized=False)
        if reason or hasattr(base, "quant_state"):
            raise InitializationError(
                f"{init_method} does not support quantized models and cannot be used on module "
                f"{name!r}: {reason or 'it has a quant_state'}"
            )
        found[name] = base
    if not found:
        raise InitializationError(
            f"No supported layers found for {init_method} initialization: none of the target "
            "modules is an nn.Linear or a Conv1D"
        )
    return found


def _make_calibration_run(
    model: nn.Module,
    run: Callable[[], object] | None,
    fallback_dataloader: Iterable[Any] | None,
    each: Callable[[nn.Module, Any], object],
    name: str,
    show: bool,
) -> Callable[[], object]:
    """Return a function that runs the model on all of the calibration data once.

    If the user has passed ``run``, it is returned. Otherwise, the result is a function that calls
    ``each`` for every batch of ``fallback_dataloader``.

    Args:
        model: The model to calibrate.
        run: A function from the user that runs the model, or None.
        fallback_dataloader: The batches to use if ``run`` is None.
        each: A function that is called with the model and each batch of ``fallback_dataloader``.
        name: The name of the user's argument for ``run``, for messages.
        show: Whether to show a progress bar.

    Raises:
        ConfigError: If both ``run`` and ``fallback_dataloader`` are None.
    """
    if run is not None:
        return run
    if fallback_dataloader is None:
        raise ConfigError(
            f"no cached result was found, and {name} and dataloader are both None; pass one of "
            "them so that the result can be computed"
        )
    loader = fallback_dataloader

    def over_the_loader() -> None:
        for batch in iterate_batches(loader, model, "Calibrating", show):
            each(model, batch)

    return over_the_loader


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    dataloader: Iterable[Any] | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Prepare a model for CorDA initialization.

    Call this function before `get_peft_model` with ``init_lora_weights="corda"``.

    For each target layer, this function accumulates the covariance ``[K, K]`` of the layer's inputs
    over any number of batches. The sums are in fp32, or in the inputs' dtype if ``corda_config``
    sets ``use_float16_for_covariance``. The function then uses the covariance to decompose the
    layer's weight, and stores the R selected directions on the layer. About 256 sequences of 2,048
    tokens are enough for K = 4096. With too little data, the covariances are rank-deficient.

    The method is that of https://arxiv.org/abs/2406.05223, as implemented in PEFT 0.21.2.

    Args:
        model: The model to prepare.
        lora_config: The adapter's config. Its ``corda_config`` selects the directions and names the
            cache files.
        run_model: A function that runs the model over the data.
        hooked_model: The model that ``run_model`` runs, if it is a copy of ``model``.
        dataloader: The batches to call the model with. Used if ``run_model`` is None.
        show_progress_bar: Whether to show a progress bar over the batches, if tqdm is installed.

    Raises:
        ConfigError: If there is neither data nor a cache file.
        InitializationError: If a layer cannot be calibrated (the message names the layer), if no
            target is a linear layer, or if ``dataloader`` has no batches.
        TargetNotFoundError: If no module matches the config.
    """
    config = to_lora_config(lora_config)
    settings: CordaConfig = convert_init_config(config.corda_config, CordaConfig) or CordaConfig()
    layers = target_linear_layers(model, config, "CorDA")
    cache = read_tensor_cache(settings.cache_file)
    if cache is not None:
        made = {}
        for name, module in layers.items():
            keys = (f"{name}.eigens.{part}" for part in corda.PARTS)
            parts = [
                cached_tensor_on_device(cache, key, settings.cache_file, module) for key in keys
            ]
            made[name] = corda.CordaEigens(*parts)
        _store_on_layers(layers, corda.DATA, made)
        return
    counts: dict[str, int] = {}
    covariances = read_tensor_cache(settings.covariance_file)
    if covariances is None:
        runs = model if hooked_model is None else hooked_model
        watched = layers if runs is model else target_linear_layers(runs, config, "CorDA")
        sums = corda.PerLayerCovarianceAccumulator(
            {name: module for name, module in watched.items() if name in layers},
            settings.use_float16_for_covariance,
        )
        run = _make_calibration_run(
            runs, run_model, dataloader, call_model, "run_model", show_progress_bar
        )
        with temporary_training_mode(runs, training=False), sums.recording_covariances():
            run()
        counts, covariances = sums.counts, sums.pop_covariances()
        write_tensor_cache(settings.covariance_file, covariances)
    made = {}
    for name, module in progress_bar(list(layers.items()), "Decomposing", settings.verbose):
        weight: Any = module.weight
        covariance = cached_tensor_on_device(covariances, name, settings.covariance_file, module)
        with error_prefix(f"layer {name!r}"):
            made[name] = corda.corda_decompose(
                weight.t() if stores_weight_transposed(module) else weight,
                covariance,
                config.rank_for(name),
                settings.corda_method,
            )
    _store_on_layers(layers, corda.DATA, made)
    if not settings.prune_temporary_fields:
        _store_on_layers(layers, "covariance_matrix", covariances)
        _store_on_layers(layers, "sample_count", {name: counts.get(name, 0) for name in layers})
    write_tensor_cache(
        settings.cache_file,
        {
            f"{name}.eigens.{part}": getattr(eigens, part)
            for name, eigens in made.items()
            for part in corda.PARTS
        },
    )


def preprocess_loraga(
    model: nn.Module,
    lora_config: Any,
    train_step: Callable[[], object] | None = None,
    cache_file: str | None = None,
    *,
    dataloader: Iterable[Any] | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Prepare a model for ``init_lora_weights="lora_ga"``.

    Call this function before `get_peft_model`.

    This function stores the mean gradient of each target layer's weight on the layer. During the
    calibration, only these weights receive gradients, which take as much memory as the weights
    themselves.

    The method is that of https://arxiv.org/abs/2407.05000, as implemented in PEFT 0.21.2.

    Args:
        model: The model to prepare.
        lora_config: The adapter's config. Its ``lora_ga_config`` must be set.
        train_step: A function that runs forward and backward passes of the model. The result is the
            mean over all backward passes.
        cache_file: The file to store the gradients in. If the file exists, the gradients are read
            from it instead of being computed.
        dataloader: The batches to call the model with. The output for each batch must have a
            ``loss``, be a scalar loss, or start with one. Used if ``train_step`` is None.
        show_progress_bar: Whether to show a progress bar over the batches, if tqdm is installed.

    Raises:
        ConfigError: If ``lora_ga_config`` is not set, or if there is neither data nor a cache file.
        InitializationError: If a layer received no gradient or is quantized (the message names the
            layer), if no target is a linear layer, if ``dataloader`` has no batches, or if the
            output for a batch has no scalar loss.
        TargetNotFoundError: If no module matches the config.
    """
    config = to_lora_config(lora_config)
    if convert_init_config(config.lora_ga_config, LoraGAConfig) is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with "
            "init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig(...)."
        )
    layers = target_linear_layers(model, config, "LoRA-GA")
    path = None if cache_file is None else str(cache_file)
    cache = read_tensor_cache(path)
    if cache is not None:
        found = {
            name: cached_tensor_on_device(cache, f"{name}.{lora_ga.DATA}", path, module)
            for name, module in layers.items()
        }
        _store_on_layers(layers, lora_ga.DATA, found)
        return
    run = _make_calibration_run(
        model, train_step, dataloader, _backward, "train_step", show_progress_bar
    )
    estimate_gradients(model, config, run)
    write_tensor_cache(
        path,
        {f"{name}.{lora_ga.DATA}": getattr(layer, lora_ga.DATA) for name, layer in layers.items()},
    )


def estimate_gradients(
    model: nn.Module, lora_config: Any, train_step: Callable[[], object]
) -> None:
    """Estimate the gradient of each target layer's weight.

    The estimate is the mean gradient. It is stored on the layer for LoRA-GA. See
    `preprocess_loraga` for the arguments.
    """
    layers = target_linear_layers(model, to_lora_config(lora_config), "LoRA-GA")
    training = temporary_training_mode(model, training=True)
    with (
        restoring_buffers(model),
        training,
        lora_ga.recording_mean_gradients(model, layers) as found,
    ):
        train_step()
    _store_on_layers(layers, lora_ga.DATA, found)


def _store_on_layers(
    layers: Mapping[str, nn.Module], attribute: str, results: Mapping[str, object]
) -> None:
    """Store the result for each layer as an attribute of the layer.

    ``layers`` and ``results`` have the same keys.
    """
    for name, module in layers.items():
        setattr(module, attribute, results[name])


def _backward(model: nn.Module, batch: Any) -> None:
    output = call_model(model, batch)
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        with contextlib.suppress(TypeError, LookupError):
            loss = output if isinstance(output, torch.Tensor) and not output.dim() else output[0]
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise InitializationError(
            "the model returned no scalar loss for these batches; add labels to the batches, or "
            "pass a train_step function that runs forward and backward"
        )
    loss.backward()
