"""Files of adapters on experts: convert those of transformers 4, and write configs for PEFT.

In transformers 5, the experts of a layer are stacked parameters. A file of transformers 4 has LoRA
factors for each expert. They are joined to the factors of the stacks, in PEFT's layout.

The conversion follows PEFT 0.21.2, ``utils/transformers_weight_conversion.py``.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from fastlora.layers import LoraLayer
from fastlora.model.adapter_folder import (
    KEY_PREFIX,
    AdapterContents,
    ParsedAdapterKey,
    with_renamed_modules,
)
from fastlora.model.base_modules import named_base_modules
from fastlora.model.config import LoraConfig
from fastlora.model.config_checks import PEFT_VERSION
from fastlora.model.stacked_experts import (
    ROUTER,
    BaseParameter,
    base_parameters_of,
    format_parameter_names,
    former_names_of,
    former_names_of_parameter,
    stacked_experts_among,
)
from fastlora.model.target_names import matches_names, minimal_suffixes
from fastlora.model.target_parameters import entries_that_select
from fastlora.model.targets import model_type_of
from fastlora.patterns import patterns_matching_no_suffix
from fastlora.validation import CheckpointError

_OF_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)")
_Number = TypeVar("_Number", int, float)


class ExpertFactors(NamedTuple):
    """The factors of one linear layer of one expert.

    Attributes:
        lora_a: The factor A, of shape ``[r, K]``.
        lora_b: The factor B, of shape ``[N, r]``.
        scaling: The scaling of the adapter on this layer.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float


class StackFactors(NamedTuple):
    """The factors of a stacked parameter of E experts.

    Attributes:
        rank: The rank R of each expert.
        lora_a: The factor A, of shape ``[E * R, K]``, with the expert as the slowest index.
        lora_b: The factor B, of shape ``[N, R * E]``, with the expert as the fastest index.
        scaling: The scaling of the adapter on this parameter.
    """

    rank: int
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float


def convert_expert_factors(model: nn.Module, file: AdapterContents) -> AdapterContents:
    """Convert the factors of linear layers of experts in a file to factors of stacked parameters.

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
    former = former_names_of(model_type_of(model))
    if not former:
        return file
    modules = named_base_modules(model)
    parameters = base_parameters_of(modules)
    stacks = {
        each.name: each
        for each in parameters
        if each.parameter.dim() == 3 and former_names_of_parameter(former, each)
    }
    if not stacks:
        return file
    blocks = {each.module_name.rpartition(".")[0] for each in stacks.values()}
    file = _with_current_blocks(file, blocks, {name for name, _, _ in modules})
    found: dict[str, dict[str, dict[int, str]]] = {}  # parameter -> former name -> expert -> layer
    for layer in file.layers:
        match = _OF_EXPERT.fullmatch(layer)
        new = f"{match[1]}.{former.get(match[3])}" if match else ""
        if match and new in stacks:
            found.setdefault(new, {}).setdefault(match[3], {})[int(match[2])] = layer
    if not found:
        return file
    tensors, joined = dict(file.tensors), {}
    for name, stack in stacks.items():
        if name in found:
            layers = _layers_of_stack(file, stack, former, found[name])
            joined[name] = join_expert_factors(
                [[_taken_from(tensors, layer, file.config) for layer in of] for of in layers]
            )
    keys = {key: parts for key, parts in file.keys.items() if key in tensors}
    for name, factors in joined.items():
        module = stacks[name].module_name
        nested = [other for other in joined if stacks[other].module_name == module]
        # PEFT nests one layer for each parameter. The last one has the name of the module.
        layer = module + ".base_layer" * (len(nested) - 1 - nested.index(name))
        for kind, tensor in (("lora_A", factors.lora_a), ("lora_B", factors.lora_b)):
            key = f"{KEY_PREFIX}{layer}.{kind}.weight"
            keys[key], tensors[key] = ParsedAdapterKey(layer, kind), tensor
    config = copy.deepcopy(file.config)
    own, added = config.target_parameters or [], sorted({stacks[name].leaf for name in joined})
    config.target_parameters = entries_that_select(
        {*joined, *(each.name for each in parameters if matches_names(each.name, own))},
        [*own, *(entry for entry in added if entry not in own)],
        parameters,
    )
    ranks = {name: factors.rank for name, factors in joined.items()}
    alphas = {
        name: factors.scaling * (math.sqrt(factors.rank) if config.use_rslora else factors.rank)
        for name, factors in joined.items()
    }
    kept = [layer for layer in file.layers if f"{KEY_PREFIX}{layer}.lora_A.weight" in keys]
    for field, values, value_for in (
        ("rank_pattern", ranks, config.rank_for),
        ("alpha_pattern", alphas, config.alpha_for),
    ):
        patterns = _with_patterns(getattr(config, field), values, value_for)
        for unused in patterns_matching_no_suffix(field, patterns, [*kept, *joined]):
            del patterns[unused]
        setattr(config, field, patterns)
    return replace(file, config=config, keys=keys, tensors=tensors)


def config_for_file(model: nn.Module, adapter_name: str, config: LoraConfig) -> LoraConfig:
    """Return a config that selects the same parameters when PEFT reads it.

    Whenever PEFT reads a config, it converts the former names of experts. It then adapts all
    experts, and no linear layer with a former name. The returned config has no former names. A
    warning names the linear layers that PEFT does not adapt. fastlora recognizes them by their
    tensors.

    Args:
        model: The base model with its adapters.
        adapter_name: The name of the adapter.
        config: The adapter's config. It is not changed.
    """
    former = former_names_of(model_type_of(model))
    modules = named_base_modules(model) if former and config.target_modules else []
    if not stacked_experts_among(base_parameters_of(modules)):
        return config
    names = [name for name, _, _ in modules]
    linears = [
        name
        for name, module, _ in modules
        if isinstance(module, LoraLayer) and adapter_name in module.r
    ]
    others = [name for name in linears if name.rpartition(".")[2] not in former]
    written = copy.copy(config)
    if isinstance(config.target_modules, str):
        written.target_modules = minimal_suffixes(others, set(names).difference(others))
    else:
        entries = config.target_modules or ()
        written.target_modules = {e for e in entries if e.rpartition(".")[2] not in former}
    routers = [name for name in linears if name.rpartition(".")[2] == ROUTER]
    if routers:
        weights = (f"{name}.weight" for name in routers)
        written.target_parameters = [*(config.target_parameters or ()), *weights]
    dropped = [name for name in linears if name not in (*others, *routers)]
    if dropped:
        warnings.warn(
            f"PEFT {PEFT_VERSION} ignores the factors of {len(dropped)} linear layers when it "
            f"loads this adapter, because their names mean experts to it: lora_A and lora_B of "
            f"{format_parameter_names(dropped, len(dropped))}. fastlora loads them",
            stacklevel=3,
        )
    return written


def join_expert_factors(parts: Sequence[Sequence[ExpertFactors]]) -> StackFactors:
    """Join the factors of the experts' linear layers to the factors of a stacked parameter.

    The rank of the result is the sum of the ranks of the layers that the parameter fuses.

    Args:
        parts: For each of these layers, the factors of all experts.
    """
    scaling = parts[0][0].scaling
    stacked_a = torch.cat([torch.stack([each.lora_a for each in part]) for part in parts], dim=1)
    stacked_b = torch.stack(
        [
            torch.block_diag(*(_scaled_b(each, scaling) for each in of_expert))
            for of_expert in zip(*parts, strict=True)
        ]
    )
    return StackFactors(
        stacked_a.shape[1],
        stacked_a.flatten(0, 1),
        stacked_b.permute(1, 2, 0).flatten(1),  # [E, N, R] -> [N, R * E]
        scaling,
    )


def _scaled_b(factors: ExpertFactors, scaling: float) -> torch.Tensor:
    """Return the factor B for another scaling."""
    ratio = factors.scaling / scaling if factors.scaling != scaling else 1.0
    return factors.lora_b if ratio == 1.0 else factors.lora_b * ratio


def _with_current_blocks(
    file: AdapterContents, blocks: Iterable[str], modules: Collection[str]
) -> AdapterContents:
    """Rename the blocks that contain experts, such as ``block_sparse_moe``, to their current names.

    Args:
        file: The loaded adapter.
        blocks: The current names of the blocks.
        modules: The names of all modules of the base model.
    """
    renamed = {}
    for block in blocks:
        layer = f"{block.rpartition('.')[0]}."
        for name in file.layers:
            old = layer + name.removeprefix(layer).partition(".")[0]
            if name.startswith(layer) and old not in modules:
                renamed[f"^{re.escape(old)}(?=\\.)"] = block
    return with_renamed_modules(file, renamed)


def _layers_of_stack(
    file: AdapterContents,
    stack: BaseParameter,
    former: Mapping[str, str],
    found: Mapping[str, Mapping[int, str]],
) -> list[list[str]]:
    """Return the names of the experts' layers in a stack, for each former name.

    Args:
        file: The loaded adapter.
        stack: The stacked parameter.
        former: The result of `former_names_of`.
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
                f"{file.path} has factors of {sorted(found)} for experts of {stack.module_name!r}, "
                f"but not of {old} for exactly {count} experts (the first difference is expert "
                f"{missing[0]}); {stack.name!r} needs factors of {names} for each expert"
            )
        layers.append([experts[index] for index in range(count)])
        ranks = {file.config.rank_for(layer) for layer in layers[-1]}
        if len(ranks) > 1:
            raise CheckpointError(
                f"{file.path} has factors of ranks {sorted(ranks)} for {old} of the experts of "
                f"{stack.module_name!r}; expected the same rank for all experts"
            )
    return layers


def _taken_from(tensors: dict[str, torch.Tensor], layer: str, config: LoraConfig) -> ExpertFactors:
    """Remove the factors of a layer from the tensors of a file, and return them."""
    lora_a, lora_b = (tensors.pop(f"{KEY_PREFIX}{layer}.lora_{end}.weight") for end in "AB")
    return ExpertFactors(lora_a, lora_b, config.scaling_for(layer))


def _with_patterns(
    patterns: dict[str, _Number], values: Mapping[str, _Number], value_for: Callable[[str], _Number]
) -> dict[str, _Number]:
    """Add patterns for the parameters to which the patterns of a config give other values.

    Args:
        patterns: The patterns of the config.
        values: The values by parameter name.
        value_for: Returns the config's value for a name.
    """
    wrong = {name: value for name, value in values.items() if value_for(name) != value}
    by_leaf: dict[str, set[_Number]] = {}
    for name, value in values.items():
        by_leaf.setdefault(name.rpartition(".")[2], set()).add(value)
    added: dict[str, _Number] = {}
    for name, value in wrong.items():
        leaf = name.rpartition(".")[2]
        added[rf".*\.{leaf}" if len(by_leaf[leaf]) == 1 else name] = value
    return {**added, **patterns}
