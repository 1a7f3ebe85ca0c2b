"""Files of adapters on experts: convert those of transformers 4, and write configs for PEFT.

In transformers 5, the experts of a layer are stacked parameters. A file of transformers 4 has LoRA
factors for each expert. The conversion joins these factors into factors of the stacked parameters,
in PEFT's layout.

The conversion follows PEFT 0.21.2, ``utils/transformers_weight_conversion.py``.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from fastlora.layers import LoraLayer
from fastlora.model.adapter_folder import (
    KEY_PREFIX,
    AdapterContents,
    ParsedAdapterKey,
    with_renamed_modules,
)
from fastlora.model.base_modules import modules_with_original_names
from fastlora.model.config import LoraConfig
from fastlora.model.config_checks import PEFT_VERSION
from fastlora.model.stacked_experts import (
    ROUTER,
    BaseModelParameter,
    base_parameters_outside_auxiliary_wrappers,
    format_parameters_with_wildcards,
    former_names_of_parameter,
    former_to_parameter_names,
    stacked_experts_among,
)
from fastlora.model.target_names import (
    distinguishing_suffixes,
    matches_names,
    matches_targets,
)
from fastlora.model.target_parameters import target_parameters_selecting_exactly
from fastlora.model.targets import model_type_of
from fastlora.patterns import patterns_matching_no_suffix
from fastlora.user_warnings import warn
from fastlora.validation import CheckpointError

_OF_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)")


def may_need_expert_conversion(model: nn.Module, layers_in_file: Iterable[str]) -> bool:
    """Return whether experts' factors in an adapter file may need conversion to the model's layout.

    The function `convert_expert_factors` converts the file. A conversion may be needed if at least
    one layer in the file is not a module of the model, and `former_to_parameter_names` has former
    names for the model's type.

    Args:
        model: The base model, with or without adapters.
        layers_in_file: The names of the layers in the file.
    """
    if not former_to_parameter_names(model_type_of(model)):
        return False
    names = {name for name, _, _ in modules_with_original_names(model)}
    return any(layer.replace(".base_layer", "") not in names for layer in layers_in_file)


def convert_expert_factors(model: nn.Module, file: AdapterContents) -> AdapterContents:
    """Convert the expert factors of an adapter file to the layout of the model's experts.

    The factors for the linear layers of the individual experts become factors for the model's
    stacked parameters.

    Args:
        model: The base model, with or without adapters.
        file: The loaded adapter.

    Returns:
        ``file`` itself if there is nothing to convert. Otherwise, a copy with other tensors and
        another config: ``target_parameters`` names the stacked parameters, and the patterns contain
        their ranks and alphas.

    Raises:
        CheckpointError: If the factors of an expert or of a part of a fused parameter are missing,
            or if the experts of a layer have different ranks.
    """
    former = former_to_parameter_names(model_type_of(model))
    if not former:
        return file
    modules = modules_with_original_names(model)
    parameters = base_parameters_outside_auxiliary_wrappers(modules)
    stacks = {
        each.name: each
        for each in parameters
        if each.parameter.dim() == 3 and former_names_of_parameter(former, each)
    }
    if not stacks:
        return file
    blocks = {each.module_name.rpartition(".")[0] for each in stacks.values()}
    file = _with_renamed_expert_blocks(file, blocks, {name for name, _, _ in modules})
    found: dict[str, dict[str, dict[int, str]]] = {}  # parameter -> former name -> expert -> layer
    for layer in file.layers:
        match = _OF_EXPERT.fullmatch(layer)
        new = f"{match[1]}.{former.get(match[3])}" if match else ""
        if match and new in stacks:
            found.setdefault(new, {}).setdefault(match[3], {})[int(match[2])] = layer
    if not found:
        return file
    config, tensors = copy.deepcopy(file.config), dict(file.tensors)
    factors, ranks, alphas = dict[str, torch.Tensor](), dict[str, int](), dict[str, float]()
    for name in (name for name in stacks if name in found):
        layers = _layers_grouped_by_former_name(file, stacks[name], former, found[name])
        scaling = config.scaling_for(layers[0][0])
        parts = [
            [
                tuple(tensors.pop(f"{KEY_PREFIX}{layer}.lora_{end}.weight") for end in "AB")
                for layer in part
            ]
            for part in layers
        ]
        scales = [[config.scaling_for(layer) / scaling for layer in part] for part in layers]
        lora_a, lora_b = join_expert_factors(parts, scales)
        module = stacks[name].module_name
        nested = [n for n in stacks if n in found and stacks[n].module_name == module]
        # PEFT nests one layer for each parameter. The last one has the name of the module.
        layer = module + ".base_layer" * (len(nested) - 1 - nested.index(name))
        factors |= {f"{layer}.lora_A": lora_a, f"{layer}.lora_B": lora_b}
        ranks[name] = rank = lora_a.shape[0] // len(parts[0])
        alphas[name] = scaling * (math.sqrt(rank) if config.use_rslora else rank)
    keys = {key: parsed for key, parsed in file.keys.items() if key in tensors}
    remaining = [*(parsed.module for parsed in keys.values()), *ranks]
    for name, tensor in factors.items():
        layer, _, kind = name.rpartition(".")
        keys[f"{KEY_PREFIX}{name}.weight"] = ParsedAdapterKey(layer, kind)
        tensors[f"{KEY_PREFIX}{name}.weight"] = tensor
    own, added = config.target_parameters or [], sorted({stacks[name].leaf for name in ranks})
    config.target_parameters = target_parameters_selecting_exactly(
        {*ranks, *(each.name for each in parameters if matches_names(each.name, own))},
        [*own, *(entry for entry in added if entry not in own)],
        parameters,
    )
    config.rank_pattern = _prepend_stack_patterns("rank_pattern", config, ranks, remaining)
    config.alpha_pattern = _prepend_stack_patterns("alpha_pattern", config, alphas, remaining)
    return replace(file, config=config, keys=keys, tensors=tensors)


def config_for_peft(model: nn.Module, adapter_name: str, config: LoraConfig) -> LoraConfig:
    """Convert an adapter's config to a config that PEFT understands.

    The result is for the folder of the saved adapter. If the base model has stacked experts with
    former names, the result is a modified config that keeps PEFT from adapting experts that
    fastlora does not adapt. Whenever PEFT reads a config, it converts the former names of experts.
    PEFT then adapts all experts, and no linear layer with a former name. The modified config has no
    former names. In the modified config, ``target_parameters`` also selects the weights of the
    linear routers that the adapter adapts. For other base models, or if ``target_modules`` is not
    set, the config is returned unchanged.

    PEFT cannot adapt some linear layers that fastlora adapts. If the adapter has such layers, a
    warning names them. When fastlora loads the adapter, it recognizes these layers by their
    tensors.

    Args:
        model: The base model with its adapters.
        adapter_name: The name of the adapter.
        config: The adapter's config. It is not changed.
    """
    former = former_to_parameter_names(model_type_of(model))
    modules = modules_with_original_names(model) if former and config.target_modules else []
    if not stacked_experts_among(base_parameters_outside_auxiliary_wrappers(modules)):
        return config
    names = [name for name, _, _ in modules]
    linears = [n for n, m, _ in modules if isinstance(m, LoraLayer) and adapter_name in m.r]
    others = [name for name in linears if name.rpartition(".")[2] not in former]
    written = copy.copy(config)
    if isinstance(config.target_modules, str):
        written.target_modules = distinguishing_suffixes(others, set(names).difference(others))
    else:
        entries = config.target_modules or ()
        written.target_modules = {e for e in entries if e.rpartition(".")[2] not in former}
    routers = [name for name in linears if name.rpartition(".")[2] == ROUTER]
    own = config.target_parameters or []
    weights = [f"{n}.weight" for n in routers if not matches_names(f"{n}.weight", own)]
    if weights:
        written.target_parameters = [*own, *weights]
    dropped = [name for name in linears if name not in (*others, *routers)]
    if dropped:
        warn(
            f"PEFT {PEFT_VERSION} ignores the factors of {len(dropped)} linear layers when it "
            f"loads this adapter, because their names mean experts to it: lora_A and lora_B of "
            f"{format_parameters_with_wildcards(dropped, len(dropped))}. fastlora loads them",
        )
    return written


def join_expert_factors(
    parts: Sequence[Sequence[Sequence[torch.Tensor]]], scales: Sequence[Sequence[float]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the factors of individual experts into the factors of a stacked parameter.

    The factors to join are those of the linear layers of E experts. The rank R of the result is the
    sum of the ranks of the layers that the parameter fuses.

    Args:
        parts: For each of these layers and each expert, the factors A ``[r, K]`` and B ``[N, r]``.
        scales: For each of these layers and each expert, a number to multiply the update by.

    Returns:
        The factor A ``[E * R, K]``, with the expert as the slowest index, and the factor B
        ``[N, R * E]``, with the expert as the fastest index.
    """
    stacked_a = torch.cat([torch.stack([lora_a for lora_a, _ in part]) for part in parts], dim=1)
    scaled_b = [
        [lora_b if scale == 1.0 else lora_b * scale for (_, lora_b), scale in zip(*of, strict=True)]
        for of in zip(parts, scales, strict=True)
    ]
    stacked_b = torch.stack([torch.block_diag(*of) for of in zip(*scaled_b, strict=True)])
    return stacked_a.flatten(0, 1), stacked_b.permute(1, 2, 0).flatten(1)


def _with_renamed_expert_blocks(
    file: AdapterContents, current_blocks: Iterable[str], modules: Collection[str]
) -> AdapterContents:
    """Return an adapter with the former names of expert blocks replaced by the current names.

    An expert block is a module that contains the experts of a layer. For example,
    ``block_sparse_moe`` is the former name of such a block.

    Args:
        file: The loaded adapter.
        current_blocks: The current names of the blocks.
        modules: The names of all modules of the base model.
    """
    renamed, names = {}, file.layers
    for block in current_blocks:
        layer = f"{block.rpartition('.')[0]}."
        for name in names:
            old = layer + name.removeprefix(layer).partition(".")[0]
            if name.startswith(layer) and old not in modules:
                renamed[f"^{re.escape(old)}(?=\\.)"] = block
    return with_renamed_modules(file, renamed)


class InferredLoraLayerSettings(NamedTuple):
    """The LoRA settings of one layer, as inferred from an adapter file.

    A layer in an adapter file is a module, such as a linear layer, or a parameter, such as the
    stacked weights of experts. If a module has several adapted parameters, each of them is a layer
    in the file.

    Attributes:
        rank: The rank.
        alpha: The alpha.
        scaling: The scaling.
        experts: The number of experts in a stack, or None for other modules.
    """

    rank: int | None
    alpha: float | None
    scaling: float | None
    experts: int | None = None


def infer_settings_of_layers_in_file(
    config: LoraConfig, lora_a_rows: Mapping[str, int]
) -> dict[str, InferredLoraLayerSettings]:
    """Infer the LoRA settings of the layers in an adapter file, such as the rank of each layer.

    The result is a dict that maps each module name in the file to the settings of the layer. All
    layers in the file are included, not only the layers of experts.

    The names in a file do not say which parameter a tensor belongs to. The number of experts is
    therefore chosen so that each factor of a module has a rank that the config sets for one of the
    module's parameters. A value is None if the file does not determine it.

    Args:
        config: The adapter's config.
        lora_a_rows: Maps module names to the number of rows of lora_A, which is the rank times the
            number of experts.
    """
    found: dict[str, InferredLoraLayerSettings] = {}
    by_module: dict[str, list[str]] = {}
    for name in lora_a_rows:
        found[name] = InferredLoraLayerSettings(
            config.rank_for(name), config.alpha_for(name), config.scaling_for(name)
        )
        module = name
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
        by_module.setdefault(module, []).append(name)
    targets = config.target_modules
    targets = targets if isinstance(targets, str) else set(targets or ())
    entries = [entry.rpartition(".") for entry in config.target_parameters or ()]
    for module, names in by_module.items():
        leaves = {leaf for at, _, leaf in entries if not at or matches_names(module, {at})}
        if not leaves or matches_targets(module, targets, config):
            continue
        parameters = [f"{module}.{leaf}" for leaf in leaves]
        ranks = {config.rank_for(parameter) for parameter in parameters}
        counts = [
            {lora_a_rows[name] // r for r in ranks if lora_a_rows[name] % r == 0} for name in names
        ]
        common = set[int].intersection(*counts)
        for name in names:
            if len(common) != 1:
                found[name] = InferredLoraLayerSettings(None, None, None)
                continue
            (count,) = common
            rank = lora_a_rows[name] // count
            same = [parameter for parameter in parameters if config.rank_for(parameter) == rank]
            values = {(config.alpha_for(p), config.scaling_for(p)) for p in same}
            alpha, scaling = values.pop() if len(values) == 1 else (None, None)
            found[name] = InferredLoraLayerSettings(
                rank, alpha, scaling, count if count > 1 else None
            )
    return found


def _layers_grouped_by_former_name(
    file: AdapterContents,
    stack: BaseModelParameter,
    former: Mapping[str, str],
    found: Mapping[str, Mapping[int, str]],
) -> list[list[str]]:
    """Return an adapter file's layers for a stack of experts, grouped by transformers 4 name.

    In the file, the layers of each expert have the former names of the stacked parameter, such as
    ``gate_proj``. The result contains one list for each of these names, in the order of
    `former_names_of_parameter`. Each list contains one layer name per expert.

    Args:
        file: The loaded adapter.
        stack: The stacked parameter.
        former: The result of `former_to_parameter_names`.
        found: The names of the layers in the file, by former name and expert.

    Raises:
        CheckpointError: If a layer is missing, or if the layers have different ranks.
    """
    names, count = former_names_of_parameter(former, stack), stack.parameter.shape[0]
    layers = []
    for old in names:
        experts = found.get(old, {})
        missing = sorted(set(range(count)).symmetric_difference(experts))
        if missing:
            raise CheckpointError(
                f"{file.path}: module {stack.module_name!r} has {count} experts, but the file's "
                f"factors for {old} cover a different set of experts (first difference: expert "
                f"{missing[0]}). {stack.name!r} requires factors for {names} in every expert, but "
                f"the file has factors for {sorted(found)}"
            )
        layers.append([experts[index] for index in range(count)])
        ranks = {file.config.rank_for(layer) for layer in layers[-1]}
        if len(ranks) > 1:
            raise CheckpointError(
                f"in {file.path}, the factors for {old} have different ranks across the experts of "
                f"{stack.module_name!r} ({sorted(ranks)}); all experts must have the same rank"
            )
    return layers


def _prepend_stack_patterns(
    field: str, config: LoraConfig, values_by_parameter: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Prepend patterns for stacked parameters to a config's rank or alpha patterns.

    The result is a new dict. The added patterns come first, because the first pattern that matches
    a name is used.

    Args:
        field: The field of the config: ``"rank_pattern"`` or ``"alpha_pattern"``.
        config: The adapter's config.
        values_by_parameter: A mapping from the names of stacked parameters to their ranks or
            alphas.
        names: The names of the layers and parameters of the adapter. Patterns that match none of
            them are left out.
    """
    value_for = config.rank_for if field == "rank_pattern" else config.alpha_for
    by_end: dict[str, set[float]] = {}
    for name, value in values_by_parameter.items():
        by_end.setdefault(_last_two_components(name), set()).add(value)
    added = {
        _last_two_components(name) if len(by_end[_last_two_components(name)]) == 1 else name: value
        for name, value in values_by_parameter.items()
        if value_for(name) != value
    }
    patterns = added | {k: v for k, v in getattr(config, field).items() if k not in added}
    for unused in patterns_matching_no_suffix(field, patterns, names):
        del patterns[unused]
    return patterns


def _last_two_components(parameter_name: str) -> str:
    """Return the last two components of a name, such as ``experts.gate_up_proj``."""
    return ".".join(parameter_name.split(".")[-2:])
