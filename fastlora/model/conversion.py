"""Convert an adapter trained on changed base weights into an adapter for the original weights.

Some initializations change the base weight ``W`` into ``W' = W - s B0 A0``, where ``s`` is the
scaling and ``A0``, ``B0`` are the initial factors. After training,
``W' + s B A = W + s (B A - B0 A0) = W + s [B | -B0] [A ; A0]``. This is a plain LoRA adapter of
twice the rank on the original weight ``W``.

The method follows PEFT 0.21.2, ``save_pretrained(path_initial_model_for_weight_conversion=)``.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping

import torch

from fastlora.init import all_init_methods
from fastlora.model.adapter_folder import (
    AdapterContents,
    load_adapter_folder,
    parse_and_check_tensors,
)
from fastlora.model.config import LoraConfig
from fastlora.validation import CheckpointError, ConfigError


def load_untrained_adapter(
    trained_config: LoraConfig, folder: str | os.PathLike[str]
) -> AdapterContents:
    """Load the initial state of a trained adapter from a folder.

    The result is the untrained adapter, which has the initial weights of the trained adapter.
    `convert_to_original_base` needs the untrained adapter to convert the trained adapter. The
    function first checks that an adapter with the trained adapter's config can be converted.

    Args:
        trained_config: The config of the trained adapter.
        folder: The folder of the untrained adapter. `convert_to_original_base` uses only its
            tensors, not its config.

    Raises:
        CheckpointError: If the folder is missing or damaged.
        ConfigError: If an adapter with this config cannot be converted.
    """
    if trained_config.use_rslora and (trained_config.rank_pattern or trained_config.alpha_pattern):
        raise ConfigError(
            "Passing `path_initial_model_for_weight_conversion` to `save_pretrained` is not "
            "supported when using `rank_pattern` or `alpha_pattern` at the same time as "
            "`use_rslora=True`."
        )
    # PEFT's examples set init_lora_weights to True while they save the untrained adapter.
    if not trained_config.init.converts and trained_config.init_lora_weights is not True:
        titles = ", ".join(init.title for init in all_init_methods() if init.converts)
        raise ConfigError(
            "`path_initial_model_for_weight_conversion` supports only initializations that "
            f"subtract the initial update from the base weights ({titles}), got init_lora_weights="
            f"{trained_config.init_lora_weights!r}; save the adapter without this argument"
        )
    return load_adapter_folder(folder)


def convert_to_original_base(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], initial: AdapterContents
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Convert a trained adapter into an equivalent adapter for the original base weights.

    Only the LoRA factors are changed. All other tensors are returned unchanged.

    Args:
        config: The config of the trained adapter.
        tensors: A mapping from the keys of PEFT's adapter files to the trained adapter's tensors.
        initial: The untrained adapter.

    Returns:
        A tuple of the config and the tensors of an adapter of twice the rank. The tensors are a
        dict with the same kind of keys as ``tensors``.

    Raises:
        CheckpointError: If the factors of the two adapters differ in their keys or shapes.
    """
    keys = parse_and_check_tensors(config, tensors, "the adapter")
    made = dict(tensors)
    for key, parts in keys.items():
        if parts.kind not in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"):
            continue
        before = initial.tensors.get(key)
        if before is None or before.shape != tensors[key].shape:
            found = "no tensor" if before is None else f"shape {tuple(before.shape)}"
            raise CheckpointError(
                f"{initial.path} has {found} for {key!r}; expected a tensor of shape "
                f"{tuple(tensors[key].shape)}, as in the trained adapter"
            )
        before = before.to(tensors[key])
        if parts.kind.endswith("A"):
            made[key] = torch.cat([tensors[key], before], dim=0)
        else:
            made[key] = torch.cat([tensors[key], -before], dim=1)
    return _with_doubled_rank(config), made


def _with_doubled_rank(config: LoraConfig) -> LoraConfig:
    return dataclasses.replace(
        config.shapes_only(),
        r=2 * config.r,
        lora_alpha=config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2),
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: 2 * alpha for key, alpha in config.alpha_pattern.items()},
    )
