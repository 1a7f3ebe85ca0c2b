"""Initialisations that look at data before an adapter is added: CorDA and LoRA-GA.

Names and arguments are PEFT's, and so is what they leave on the layers and in cache files: either
library goes on from what the other has calibrated. EVA, which comes afterwards, is in
`fastlora.model.eva`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init import corda, lora_ga
from fastlora.init.configs import CordaConfig, LoraGAConfig, settings_of
from fastlora.init.data import (
    batches,
    call_model,
    from_cache,
    in_mode,
    progress,
    read_cache,
    same_buffers,
    write_cache,
)
from fastlora.layers.bases import is_transposed, why_not_replaceable
from fastlora.model.config import LoraConfig
from fastlora.model.plan import own_config
from fastlora.model.targets import find_targets
from fastlora.model.tuner import tuner_of
from fastlora.model.walk import base_of
from fastlora.validation import ConfigError, InitialisationError, error_prefix


def calibrated_layers(model: nn.Module, config: LoraConfig, title: str) -> dict[str, nn.Module]:
    """Returns the linear layers that a config targets, by name; others are left out, as in PEFT.

    Raises:
        TargetNotFoundError: Nothing matches.
        InitialisationError: No target is a linear layer, or the weight of one is quantised.
    """
    tuner = tuner_of(model)
    inner = model if tuner is None else tuner.model
    found = {}
    for name in find_targets(inner, config):
        base = base_of(inner.get_submodule(name))
        if not isinstance(base, nn.Linear) and not is_transposed(base):
            continue
        why = why_not_replaceable(base, quantised_too=False)
        if why or hasattr(base, "quant_state"):
            raise InitialisationError(
                f"{title} does not support quantized models. Found quantized module: {name!r}: "
                f"{why or 'it has a quant_state'}"
            )
        found[name] = base
    if not found:
        raise InitialisationError(
            f"No supported layers found for {title} initialization: none of the target modules is "
            "an nn.Linear or a Conv1D"
        )
    return found


def _runner(
    model: nn.Module,
    run: Callable[[], object] | None,
    dataloader: Iterable[Any] | None,
    each: Callable[[nn.Module, Any], object],
    name: str,
    show: bool,
) -> Callable[[], object]:
    """Returns what to call for one pass over the data."""
    if run is not None:
        return run
    if dataloader is None:
        raise ConfigError(f"{name} or dataloader must be given, where no cache file holds a result")
    loader = dataloader

    def over_the_loader() -> None:
        for batch in batches(loader, model, "Calibrating", show):
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
    """Prepares a model for ``init_lora_weights="corda"``; call it before `get_peft_model`.

    It sums a covariance ``[K, K]`` for each target layer, in fp32 and whatever number of batches
    there is, then leaves R directions on the layer. Some 256 sequences of 2,048 tokens are enough
    for K = 4096; too few give covariances of a low rank.

    Args:
        model: The model.
        lora_config: Its ``corda_config`` says which directions, and names the cache files.
        run_model: Runs the model over the data.
        hooked_model: The model that ``run_model`` runs, where that is a copy.
        dataloader: In place of ``run_model``: batches to call the model with.
        show_progress_bar: Show one over the batches, where tqdm is installed.

    Raises:
        ConfigError: There is neither data nor a cache file.
        InitialisationError: A layer, which the message names, cannot be calibrated.
        TargetNotFoundError: Nothing matches the config.

    Method: https://arxiv.org/abs/2406.05223, as in PEFT 0.21.2.
    """
    config = own_config(lora_config)
    settings: CordaConfig = settings_of(config.corda_config, CordaConfig) or CordaConfig()
    layers = calibrated_layers(model, config, "CorDA")
    cache = read_cache(settings.cache_file)
    if cache is not None:
        made = {}
        for name, module in layers.items():
            keys = (f"{name}.eigens.{part}" for part in corda.PARTS)
            parts = [from_cache(cache, key, settings.cache_file, module) for key in keys]
            made[name] = corda.CordaEigens(*parts)
        _leave(layers, corda.DATA, made)
        return
    counts: dict[str, int] = {}
    covariances = read_cache(settings.covariance_file)
    if covariances is None:
        runs = model if hooked_model is None else hooked_model
        watched = layers if runs is model else calibrated_layers(runs, config, "CorDA")
        sums = corda.Covariances(
            {name: module for name, module in watched.items() if name in layers},
            settings.use_float16_for_covariance,
        )
        run = _runner(runs, run_model, dataloader, call_model, "run_model", show_progress_bar)
        with in_mode(runs, training=False), sums.watching():
            run()
        counts, covariances = sums.counts, sums.means()
        write_cache(settings.covariance_file, covariances)
    made = {}
    for name, module in progress(list(layers.items()), "Decomposing", settings.verbose):
        weight: Any = module.weight
        covariance = from_cache(covariances, name, settings.covariance_file, module)
        with error_prefix(f"layer {name!r}"):
            made[name] = corda.decompose(
                weight.t() if is_transposed(module) else weight,
                covariance,
                config.rank_for(name),
                settings.corda_method,
            )
    _leave(layers, corda.DATA, made)
    if not settings.prune_temporary_fields:
        _leave(layers, "covariance_matrix", covariances)
        _leave(layers, "sample_count", {name: counts.get(name, 0) for name in layers})
    write_cache(
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
    """Prepares a model for ``init_lora_weights="lora_ga"``; call it before `get_peft_model`.

    It leaves the mean gradient of each target layer's weight on the layer. Only these weights get
    gradients meanwhile; they take as much memory as the weights themselves.

    Args:
        model: The model.
        lora_config: Its ``lora_ga_config`` must be set.
        train_step: Runs forward and backward passes of the model; their gradients add up.
        cache_file: Where the gradients are kept; they are read from there if it exists.
        dataloader: In place of ``train_step``: batches to call the model with, whose output has a
            ``loss``.
        show_progress_bar: Show one over the batches, where tqdm is installed.

    Raises:
        ConfigError: ``lora_ga_config`` is not set, or there is neither data nor a cache file.
        InitialisationError: A layer, which the message names, got no gradient or is quantised.
        TargetNotFoundError: Nothing matches the config.

    Method: https://arxiv.org/abs/2407.05000, as in PEFT 0.21.2.
    """
    config = own_config(lora_config)
    if settings_of(config.lora_ga_config, LoraGAConfig) is None:
        raise ConfigError(
            "If you want to use LoRA-GA, please initialize the LoraConfig with "
            "init_lora_weights='lora_ga' and lora_ga_config=LoraGAConfig(...)."
        )
    layers = calibrated_layers(model, config, "LoRA-GA")
    path = None if cache_file is None else str(cache_file)
    cache = read_cache(path)
    if cache is not None:
        found = {
            name: from_cache(cache, f"{name}.{lora_ga.DATA}", path, module)
            for name, module in layers.items()
        }
        _leave(layers, lora_ga.DATA, found)
        return
    run = _runner(model, train_step, dataloader, _backward, "train_step", show_progress_bar)
    estimate_gradients(model, config, run)
    write_cache(
        path,
        {f"{name}.{lora_ga.DATA}": getattr(layer, lora_ga.DATA) for name, layer in layers.items()},
    )


def estimate_gradients(
    model: nn.Module, lora_config: Any, train_step: Callable[[], object]
) -> None:
    """Leaves the mean gradient of each target layer's weight on it; see `preprocess_loraga`."""
    layers = calibrated_layers(model, own_config(lora_config), "LoRA-GA")
    training = in_mode(model, training=True)
    with same_buffers(model), training, lora_ga.gradients(model, layers) as found:
        train_step()
    _leave(layers, lora_ga.DATA, found)


def _leave(layers: Mapping[str, nn.Module], attribute: str, results: Mapping[str, object]) -> None:
    """Gives each layer its own result."""
    for name, module in layers.items():
        setattr(module, attribute, results[name])


def _backward(model: nn.Module, batch: Any) -> None:
    output = call_model(model, batch)
    loss = output["loss"] if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        with contextlib.suppress(TypeError, IndexError):
            loss = output if isinstance(output, torch.Tensor) and not output.dim() else output[0]
    if not isinstance(loss, torch.Tensor) or loss.dim():
        raise InitialisationError(
            "the model's output has no loss for these batches; give them labels, or pass "
            "train_step, which runs forward and backward"
        )
    loss.backward()
