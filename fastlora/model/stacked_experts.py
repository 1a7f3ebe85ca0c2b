"""Detect configs that target stacked expert weights, which fastlora cannot adapt.

transformers 5 stores all experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``,
where transformers 4 had linear layers. Configs still use the names of the linear layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from fastlora.model.base_modules import BaseModules, is_lora_layer
from fastlora.validation import PEFT_MODEL_ALTERNATIVE, UnsupportedLayerError

# Stacked parameters -> the names of the linear layers in transformers 4 that they replace.
_EARLIER_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("w2",),
}

# The target names for which PEFT 0.21.2 adapts the experts, by the base model's ``model_type``.
# Taken from ``peft/utils/transformers_weight_conversion.py`` with transformers 5.24.
_OF_MIXTRAL = frozenset({"w1", "w2", "w3"})
_OF_QWEN2_MOE = frozenset({"gate_proj", "up_proj", "down_proj"})
EXPERT_NAMES: MappingProxyType[str, frozenset[str]] = MappingProxyType(
    {
        **dict.fromkeys(("minimax", "minimax_m2", "mixtral"), _OF_MIXTRAL),
        **dict.fromkeys(
            (
                *("Dots3NoteTextModel", "UnlimitedOcrTextModel", "afmoe", "beam", "cohere2_moe"),
                *("deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
                *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe"),
                *("glm_moe_dsa", "hunyuan_v1_moe", "longcat_flash", "mellum", "olmoe"),
                *("qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen3_omni_moe_text"),
                *("qwen3_omni_moe_thinker", "sarvam_mla", "solar_open"),
            ),
            _OF_QWEN2_MOE,
        ),
    }
)
# Maximum number of parameters to list in a message.
_LISTED = 4


class ExpertOrRouterParameter(NamedTuple):
    """A parameter that stacks the weights of a layer's experts, or the weight of a router.

    Attributes:
        parameter: The name of the parameter.
        names: The module names that a config may use to refer to the parameter.
    """

    parameter: str
    names: tuple[str, ...]


def find_stacked_experts(modules: BaseModules) -> list[ExpertOrRouterParameter]:
    """Return a list of the parameters ``[experts, ...]`` that stack the weights of experts."""
    return [
        ExpertOrRouterParameter(f"{name}.{leaf}", tuple(_possible_target_names(name, leaf)))
        for name, module, _ in modules
        if module._parameters
        for leaf in _num_experts_by_parameter(module)
    ]


def find_stacked_expert_routers(modules: BaseModules) -> list[ExpertOrRouterParameter]:
    """Find the routers of stacked experts, and return a list of their weights ``[experts, K]``.

    Routers that are linear layers are left out.
    """
    found = []
    for name, module, _ in modules:
        children = dict(module.named_children())
        experts = {
            n for child in children.values() for n in _num_experts_by_parameter(child).values()
        }
        for child_name, child in children.items():
            weight = child._parameters.get("weight")
            if weight is not None and _is_custom_module(child) and not isinstance(child, nn.Linear):
                at = f"{name}.{child_name}" if name else child_name
                if weight.dim() == 2 and weight.shape[0] in experts:
                    found.append(ExpertOrRouterParameter(f"{at}.weight", (at,)))
    return found


def shorten_to_expert_name(model_type: object, entry: str) -> str:
    """Shorten a ``target_modules`` entry to its last component if that is an expert name.

    PEFT ignores the other components in this case. For example, ``experts.3.down_proj`` adapts all
    experts of a Qwen3 MoE. If the last component is not an expert name for the model type, the
    entry is returned unchanged.
    """
    leaf = entry.rpartition(".")[2]
    return leaf if leaf in _names_of(model_type) else entry


def check_targeted_experts(
    model_type: object,
    entries: Collection[str],
    left_out: Collection[ExpertOrRouterParameter],
    *,
    shown: str,
    adapts: bool,
) -> None:
    """Emit a warning or raise an error if a config names experts that cannot be adapted.

    Args:
        model_type: The ``model_type`` of the base model.
        entries: The entries of ``target_modules`` that match experts but no module.
        left_out: The experts that the config names.
        shown: A description of ``target_modules``, for messages.
        adapts: Whether the config matches other modules.

    Raises:
        UnsupportedLayerError: If PEFT would adapt the experts for one of the entries, or if the
            config matches no other modules.
    """
    if not left_out:
        return
    known = _names_of(model_type)
    unsupported = sorted(entry for entry in entries if entry.rpartition(".")[2] in known)
    what = (
        f"({_format_names(stack.parameter for stack in left_out)}). "
        f"Stacked weights of experts and their "
        f"routers are parameters, not linear layers. Adapting them requires target_parameters; "
        f"{PEFT_MODEL_ALTERNATIVE}"
    )
    if unsupported:
        raise UnsupportedLayerError(
            f"target_modules entries {unsupported} name experts of a {model_type!r} model {what}"
        )
    if not adapts:
        raise UnsupportedLayerError(f"{shown} matches only experts {what}")
    warnings.warn(f"{shown} leaves out experts {what}", stacklevel=4)


def _names_of(model_type: object) -> frozenset[str]:
    return EXPERT_NAMES.get(model_type, frozenset()) if isinstance(model_type, str) else frozenset()


def _is_custom_module(module: nn.Module) -> bool:
    """Return whether a module is custom rather than a module of ``torch.nn``.

    A LoRA layer is not custom either.
    """
    return not type(module).__module__.startswith("torch.nn") and not is_lora_layer(module)


def _num_experts_by_parameter(module: nn.Module) -> dict[str, int]:
    """Return the number of experts in each stacked expert parameter, keyed by parameter name.

    Only direct parameters of the module are considered.
    """
    found: dict[str, int] = {}
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
            found[leaf] = parameter.shape[0]
    return found if found and _is_custom_module(module) else {}


def _possible_target_names(module: str, leaf: str) -> Iterable[str]:
    """Yield the module names that a config may use to refer to a stacked parameter.

    These are the parameter's own name and the names of the linear layers that it replaces, each
    with and without the index of an expert.
    """
    for name in (leaf, *_EARLIER_NAMES.get(leaf, ())):
        yield f"{module}.{name}"
        yield f"{module}.0.{name}"


def _format_names(parameters: Iterable[str]) -> str:
    """Format parameter names as a list for a message.

    Indices are replaced with ``*``, so that the same parameter of several layers is listed once. A
    long list is truncated.
    """
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parameters))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
