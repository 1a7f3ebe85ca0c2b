"""The names that experts and routers had in transformers 4, and the parameters that have them now.

transformers 5 stores all experts of a layer in stacked parameters, such as ``gate_up_proj`` and
``down_proj``. transformers 4 had linear layers for each expert. Configs still use the names of
these linear layers.

The conversion follows PEFT 0.21.2, ``utils/transformers_weight_conversion.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from fastlora.layers.adapted_parameters import FastLoraAdaptedParameters
from fastlora.layers.layer_kinds import parameter_kind_of
from fastlora.model.base_modules import ModulesWithOriginalNames, base_module_of, is_lora_layer
from fastlora.model.target_names import in_layers, is_all_linear, matches_targets
from fastlora.validation import ConfigError

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig

# Name of a linear layer in transformers 4 -> the parameter in transformers 5, by model type. The
# model types are those that transformers 5.24 lists for PEFT.
_MIXTRAL = {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"}
_QWEN2_MOE = {
    **{"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"},
    "down_proj": "down_proj",
}
FORMER_NAMES: MappingProxyType[str, dict[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _MIXTRAL),
        **dict.fromkeys(
            (
                *("Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe"),
                *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
                *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
                *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe"),
                *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
                *("qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
            ),
            _QWEN2_MOE,
        ),
    }
)
ROUTER = "gate"
# Names of the projections of feed-forward layers, with and without experts.
FEED_FORWARD_NAMES = frozenset(
    {"gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "fc1", "fc2"}
)
# Maximum number of parameters to list in a message.
_LISTED = 4


class BaseModelParameter(NamedTuple):
    """A parameter of the base model, together with its name and its module.

    The parameter does not have to belong to experts.

    Attributes:
        name: The name of the parameter in the model without adapters.
        module: The module that has the parameter, without adapters.
        parameter: The parameter.
    """

    name: str
    module: nn.Module
    parameter: nn.Parameter

    @property
    def module_name(self) -> str:
        """The name of the module in the model.

        The module is the one that has the parameter. The name refers to the model without adapters.
        """
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        """The last component of the parameter's name.

        This component is the parameter's own name within its module.
        """
        return self.name.rpartition(".")[2]


def base_parameters_outside_auxiliary_wrappers(
    modules: ModulesWithOriginalNames,
) -> list[BaseModelParameter]:
    """Return the base model's parameters that are not inside auxiliary wrappers.

    A config selects its target parameters from these parameters, which are not limited to those of
    experts. Auxiliary wrappers replace modules that adapters own copies of or train rows of. See
    `is_auxiliary_wrapper`.
    """
    return [
        BaseModelParameter(f"{name}.{leaf}" if name else leaf, base, parameter)
        for name, base in (
            (name, base_module_of(module)) for name, module, wrapped in modules if not wrapped
        )
        for leaf, parameter in base._parameters.items()
        if parameter is not None
    ]


def stacked_experts_among(parameters: Iterable[BaseModelParameter]) -> list[BaseModelParameter]:
    """Return the parameters that hold stacked expert weights.

    Other parameters of three dimensions, such as the heads of XLNet's attention, are not experts. A
    module has experts if it has ``num_experts``, or if the name of the module or of its class says
    so.
    """
    return [
        each
        for each in parameters
        if each.parameter.dim() == 3
        and min(each.parameter.shape) > 1
        and not is_lora_layer(each.module)
        and (
            hasattr(each.module, "num_experts")
            or "expert" in f"{each.name}.{type(each.module).__name__}".lower()
        )
    ]


def stacks_with_expert_layer_class(
    parameters: Iterable[BaseModelParameter],
) -> list[BaseModelParameter]:
    """Return the stacked expert weights for which an expert layer class exists.

    The module of a stack determines the expert layer class: see `experts_layer_class`. Stacks of
    modules without an expert layer class are left out, because such modules run with each entire
    stack replaced by the sum of the stack and its update. Quantized stacks are left out too.
    """
    return [
        each
        for each in stacked_experts_among(parameters)
        if experts_layer_class(each.module) is not None and not is_quantized(each)
    ]


def experts_layer_class(module: nn.Module) -> type[FastLoraAdaptedParameters] | None:
    """Return the layer class for the adapters on a module of stacked experts.

    The result is None for modules for which no expert layer class exists.
    """
    kind = parameter_kind_of(module)
    found: Any = None if kind is None else kind.wrap
    return None if found is FastLoraAdaptedParameters else found


def is_quantized(parameter: BaseModelParameter) -> bool:
    """Return whether a parameter is quantized.

    A quantized parameter is stored as integers or as floating-point numbers of at most 8 bits.
    """
    tensor = parameter.parameter
    return not tensor.is_floating_point() or tensor.itemsize < 2


def former_to_parameter_names(model_type: object) -> Mapping[str, str]:
    """For a model type, return a dict that maps former layer names to parameter names.

    The former names are those that the linear layers of the model type's experts and routers had in
    transformers 4. In transformers 5, parameters replaced these layers, except for routers that are
    still linear layers. The dict is empty for a model type without former names.
    """
    return FORMER_NAMES.get(model_type, {}) if isinstance(model_type, str) else {}


def former_names_of_parameter(
    former: Mapping[str, str], parameter: BaseModelParameter
) -> list[str]:
    """Return the former names of a parameter.

    The parameter may hold the stacked weights of experts, for example. Its former names, such as
    ``["gate_proj", "up_proj"]``, are those of the linear layers in transformers 4 that the
    parameter replaced in transformers 5. Configs and files of older adapters contain these names.
    The list is empty if the parameter has no former names. A router that is still a linear layer
    has no former names.

    Args:
        former: The result of `former_to_parameter_names`.
        parameter: The parameter.
    """
    if isinstance(parameter.module, nn.Linear):
        return []
    return [old for old, new in former.items() if parameter.name.endswith(f".{new}")]


def former_names_selected_by_target_modules(
    former_names: Collection[str],
    parameter: BaseModelParameter,
    config: LoraConfig,
    listed_last_components: Collection[str],
) -> set[str]:
    """Return which of a parameter's former names ``target_modules`` selects.

    The former names are the names of the linear layers that the parameter replaced. The parameter
    replaced linear layers of individual experts, or the linear layer of a router.

    As in PEFT, ``"all-linear"`` selects all former names, and an entry of a list selects all
    parameters that its last component stands for. The full name of a linear layer selects only this
    layer. A regular expression selects a parameter if it matches the parameter's former name,
    without the index of an expert or with each index. For a router, it must match the name of the
    module.

    Args:
        former_names: The result of `former_names_of_parameter`.
        parameter: The parameter.
        config: The adapter's config.
        listed_last_components: The last components of the entries of a list, without full names of
            linear layers.
    """
    targets = config.target_modules
    if not former_names or not targets:
        return set()
    if is_all_linear(targets):
        return set(former_names)
    if not isinstance(targets, str):
        return {old for old in former_names if old in listed_last_components}
    matched = set()
    for old in former_names:
        experts = range(0 if old == ROUTER else parameter.parameter.shape[0])
        with_index = [f"{parameter.module_name}.{index}.{old}" for index in experts]
        if matches_targets(full_former_name_without_index(parameter, old), targets, config) or (
            with_index and all(matches_targets(name, targets, config) for name in with_index)
        ):
            matched.add(old)
    return matched


def full_former_name_without_index(parameter: BaseModelParameter, former_name: str) -> str:
    """Return a parameter's full former name in transformers 4, without the expert index.

    The former name is the name of the linear layers that the parameter replaced.
    """
    return (
        parameter.module_name if former_name == ROUTER else f"{parameter.module_name}.{former_name}"
    )


def check_fused_parameter_not_split(
    former_names: Collection[str],
    parameter: BaseModelParameter,
    former_names_in_config: Collection[str],
    *,
    verb: Literal["selects", "excludes"],
) -> None:
    """Check that a config does not select or exclude only part of a fused parameter.

    Args:
        former_names: The result of `former_names_of_parameter`.
        parameter: The parameter.
        former_names_in_config: The former names that the config selects or excludes.
        verb: What the config does with them, for the message.

    Raises:
        ConfigError: If the config names only some of the former names.
    """
    missing = sorted(set(former_names).difference(former_names_in_config))
    if former_names_in_config and missing:
        raise ConfigError(
            f"the config {verb} {sorted(former_names_in_config)} but not {missing}; all of these "
            f"are fused in {parameter.name!r}, so specify all or none of them; to match only "
            "the linear layers with these names, use a regular expression that does not match the "
            "names of expert modules"
        )


def experts_named_but_not_selected(
    unselected_stacks: Iterable[BaseModelParameter],
    target_module_names: Collection[str],
    config: LoraConfig,
) -> list[BaseModelParameter]:
    """Return the stacked experts that a config refers to but does not select as targets.

    A config refers to the experts of each block in which it names feed-forward layers. A list of
    names refers to all blocks that ``layers_to_transform`` selects. A regular expression refers to
    the blocks in which it matches. ``"all-linear"`` refers to all blocks.

    Args:
        unselected_stacks: The stacked experts that no target selects and that the config does not
            exclude.
        target_module_names: The names of the target modules.
        config: The adapter's config.
    """
    targets = config.target_modules
    if isinstance(targets, str) and not is_all_linear(targets):
        projections = [
            name for name in target_module_names if name.rpartition(".")[2] in FEED_FORWARD_NAMES
        ]

        def is_requested(stack: BaseModelParameter) -> bool:
            block, at = stack.module_name.rpartition(".")[0], stack.module_name
            leaves = (stack.leaf, *FEED_FORWARD_NAMES)
            probes = [name for leaf in leaves for name in (f"{at}.{leaf}", f"{at}.0.{leaf}")]
            return any(name.startswith(f"{block}.") for name in projections) or any(
                matches_targets(name, targets, config) for name in probes
            )

        return [stack for stack in unselected_stacks if is_requested(stack)]
    leaves = {entry.rpartition(".")[2] for entry in targets or ()} if targets else set()
    return [
        stack
        for stack in unselected_stacks
        if is_all_linear(targets)
        or (leaves & {stack.leaf, *FEED_FORWARD_NAMES} and in_layers(stack.name, config))
    ]


def format_parameters_with_wildcards(names: Iterable[str], most: int = _LISTED) -> str:
    """Format parameter names for a message, with wildcards in place of indices.

    The result is a list in which indices are replaced with ``*``, so that the same parameter of
    several layers is listed once. A long list is truncated.
    """
    found = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(map(repr, found[:most])) + more
