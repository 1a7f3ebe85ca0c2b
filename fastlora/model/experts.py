"""The experts that a config names and LoRA cannot go on: weights stacked in one parameter.

transformers 5 keeps the experts of a layer in two parameters, ``gate_up_proj`` and ``down_proj``,
where transformers 4 had linear layers. Configs still use the names of the linear layers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from fastlora.model.walk import BaseModules, is_lora_layer
from fastlora.validation import THE_PEFT_WAY, UnsupportedLayerError

# The linear layers of transformers 4 that a stacked parameter holds.
_EARLIER_NAMES = {
    "gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"),
    "down_proj": ("w2",),
}

# The names for which PEFT 0.21.2 adapts the experts, by the base model's ``model_type``. Facts from
# ``peft/utils/transformers_weight_conversion.py`` with transformers 5.24.
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
# Parameters that a message lists.
_LISTED = 4


class Stack(NamedTuple):
    """A parameter that holds one weight of every expert, or a router beside such parameters.

    Attributes:
        parameter: Its name.
        names: Names of modules by which a config can mean it.
    """

    parameter: str
    names: tuple[str, ...]


def stacked_experts(modules: BaseModules) -> list[Stack]:
    """Returns the stacked weights in a model's modules, ``[experts, ...]``."""
    return [
        Stack(f"{name}.{leaf}", tuple(_module_names(name, leaf)))
        for name, module, _ in modules
        if module._parameters
        for leaf in _stacked(module)
    ]


def routers(modules: BaseModules) -> list[Stack]:
    """Returns the routers of stacked experts that are no linear layers."""
    found = []
    for name, module, _ in modules:
        children = dict(module.named_children())
        experts = {n for child in children.values() for n in _stacked(child).values()}
        for child_name, child in children.items():
            weight = child._parameters.get("weight")
            if weight is not None and _is_own(child) and not isinstance(child, nn.Linear):
                at = f"{name}.{child_name}" if name else child_name
                if weight.dim() == 2 and weight.shape[0] in experts:
                    found.append(Stack(f"{at}.weight", (at,)))
    return found


def as_expert_name(model_type: object, entry: str) -> str:
    """Returns the expert name that PEFT reads an entry of ``target_modules`` as, or the entry.

    PEFT reads the last part alone: ``experts.3.down_proj`` adapts every expert of a Qwen3 MoE.
    """
    leaf = entry.rpartition(".")[2]
    return leaf if leaf in _names_of(model_type) else entry


def check_experts(
    model_type: object,
    entries: Collection[str],
    left_out: Collection[Stack],
    *,
    shown: str,
    adapts: bool,
) -> None:
    """Warns of the experts that a config leaves out, or refuses the config.

    Args:
        model_type: The base model's.
        entries: Entries of ``target_modules`` that match experts and no module.
        left_out: The experts that the config names.
        shown: ``target_modules``, for the message.
        adapts: Whether the config matches other modules.

    Raises:
        UnsupportedLayerError: PEFT adapts experts for an entry, or the config matches nothing else.
    """
    if not left_out:
        return
    known = _names_of(model_type)
    refused = sorted(entry for entry in entries if entry.rpartition(".")[2] in known)
    what = (
        f"{_listed(stack.parameter for stack in left_out)}: stacked weights of experts and their "
        f"routers are parameters, not linear layers. To adapt them (target_parameters): "
        f"{THE_PEFT_WAY}"
    )
    if refused:
        raise UnsupportedLayerError(
            f"target_modules entries {refused} name experts of a {model_type!r} model, {what}"
        )
    if not adapts:
        raise UnsupportedLayerError(f"{shown} matches only experts, {what}")
    warnings.warn(f"{shown} leaves out {what}", stacklevel=4)


def _names_of(model_type: object) -> frozenset[str]:
    return EXPERT_NAMES.get(model_type, frozenset()) if isinstance(model_type, str) else frozenset()


def _is_own(module: nn.Module) -> bool:
    """Returns whether a module is of a model's own class, and has no adapters."""
    return not type(module).__module__.startswith("torch.nn") and not is_lora_layer(module)


def _stacked(module: nn.Module) -> dict[str, int]:
    """Returns a module's own stacked parameters, each with its number of experts."""
    found: dict[str, int] = {}
    for leaf, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
            found[leaf] = parameter.shape[0]
    return found if found and _is_own(module) else {}


def _module_names(module: str, leaf: str) -> Iterable[str]:
    """Yields the names that a stacked parameter has, or had as linear layers of experts."""
    for name in (leaf, *_EARLIER_NAMES.get(leaf, ())):
        yield f"{module}.{name}"
        yield f"{module}.0.{name}"


def _listed(parameters: Iterable[str]) -> str:
    """Returns names of parameters for a message; layers that differ by number are one name."""
    names = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in parameters))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
