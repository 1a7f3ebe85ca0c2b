"""Find the modules that a config selects, by PEFT's matching rules.

The rules follow PEFT 0.21.2, ``tuners/tuners_utils.py`` and ``utils/other.py``. No function in this
module changes the model or the config.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch.nn as nn

from fastlora.model.base_modules import (
    BaseModules,
    is_auxiliary_wrapper,
    is_lora_layer,
    is_modules_to_save_wrapper,
    is_trainable_tokens_wrapper,
    named_base_modules,
    named_outer_modules,
    original_module_of,
)
from fastlora.model.config import LoraConfig
from fastlora.model.default_targets import DEFAULT_TARGETS
from fastlora.model.stacked_experts import (
    ExpertOrRouterParameter,
    check_targeted_experts,
    find_stacked_expert_routers,
    find_stacked_experts,
    shorten_to_expert_name,
)
from fastlora.patterns import (
    count_matching_time,
    layer_index_after_match,
    matches_consecutive_components,
    matches_whole_name,
    patterns_matching_no_suffix,
)
from fastlora.validation import (
    ConfigError,
    TargetNotFoundError,
    UnsupportedLayerError,
    near_names,
)

ALL_LINEAR = "all-linear"
# The value of target_modules that PEFT uses for an adapter without targets.
NO_TARGETS = "dummy-target-modules"

# Heads that PEFT trains in full for a task, even if modules_to_save does not name them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_CLASSIFIER_HEADS = ("score", "classifier")
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
# The mixers of these models pass the weights of these modules to a fused kernel, and never call the
# modules themselves.
_MAMBA_BYPASSED = ("out_proj", "conv1d")
# If there are at least this many names, PEFT replaces them with the shortest suffixes that match
# the same modules.
_MINIMIZE_FROM = 20
# Maximum number of names to list in a message. A config may have any number of names.
_MOST_SHOWN = 10


def find_targets(
    model: nn.Module,
    config: LoraConfig,
    targets: set[str] | str | None = None,
    modules: BaseModules | None = None,
) -> list[str]:
    """Return a list of the names of the target modules.

    The names are in the order of ``named_modules()``. The result may include LoRA layers that
    already have other adapters, but no modules inside a LoRA layer. ``"all-linear"`` leaves out
    every module that adapters own copies of (``modules_to_save``), and all modules inside it.

    A warning is emitted in each of these cases: some entries match no module while others do; an
    entry matches experts with weights that are stacked in a parameter; or ``"all-linear"`` leaves
    out a linear layer other than the output head because adapters own copies of it.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        targets: The result of `resolve_target_modules`, or None to compute it.
        modules: The result of `named_base_modules`, or None to compute it.

    Raises:
        TargetNotFoundError: If no module matches. The message suggests similar names.
        ConfigError: If ``target_modules`` is None and the model's architecture has no default.
        UnsupportedLayerError: If a target is never called in the model's architecture, if a target
            is a module that other adapters own copies of or is inside one, or if an entry matches
            no module but names experts that PEFT can adapt (``target_parameters``).
    """
    modules = named_base_modules(model) if modules is None else modules
    targets = resolve_target_modules(model, config, modules) if targets is None else targets
    if targets == NO_TARGETS:
        return []
    saved = saved_modules_and_heads(config)
    wrapped = {name: inside for name, _, inside in modules if name}
    names = list(wrapped)
    excludes = bool(config.exclude_modules or saved)
    excluded = {name for name in names if excludes and _is_excluded(name, config, saved)}
    found = [n for n in names if n not in excluded and _matches(n, targets, config)]
    model_type = _model_type(model)
    lost = {
        entry: shorten_to_expert_name(model_type, entry)
        for entry in _unmatched_entries(names, targets)
    }
    wanted = targets if isinstance(targets, str) else {*targets, *lost.values()}
    experts = _selected_experts(modules, wanted, config, saved)
    # The time is linear in the number of experts and in the number of entries. A config may have
    # any number of entries.
    expert_names = {
        suffix for s in experts for name in s.names for suffix in _dotted_suffixes(name)
    }
    of_experts = [entry for entry, read_as in lost.items() if read_as in expert_names]
    shown = f"target_modules={_format(config.target_modules)}"
    check_targeted_experts(model_type, of_experts, experts, shown=shown, adapts=bool(found))
    if not found:
        raise TargetNotFoundError(_no_target_message(names, excluded, targets, config))
    _check_bypassed(model, found)
    for name in found:
        if wrapped[name]:
            raise UnsupportedLayerError(
                f"target module {name!r} {_invalid_target_message(model, name)}; choose other "
                "targets, or exclude this one with exclude_modules"
            )
    unmatched = [entry for entry in lost if entry not in of_experts]
    unused = _format_unmatched_config_values(unmatched, found, bool(excluded), config)
    if unused:
        warnings.warn(f"these config values match no module: {'; '.join(unused)}", stacklevel=2)
    if any(wrapped.values()) and _is_all_linear(config.target_modules):
        linears = _linears_without_head(model, config, modules)
        left = [n for n, inside in linears if inside and n not in excluded]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warnings.warn(
                f"{ALL_LINEAR!r} leaves out {left[0]!r}{more}: "
                f"it {_invalid_target_message(model, left[0])}",
                stacklevel=3,
            )
    return found


def _selected_experts(
    modules: BaseModules, targets: set[str] | str, config: LoraConfig, saved: list[str]
) -> list[ExpertOrRouterParameter]:
    """Return the stacked expert weights that a config selects.

    ``"all-linear"`` selects all stacked expert weights and their routers.
    """
    everything = _is_all_linear(config.target_modules)
    stacks = [
        *find_stacked_experts(modules),
        *(find_stacked_expert_routers(modules) if everything else ()),
    ]
    return [
        stack
        for stack in stacks
        if any(everything or _matches(name, targets, config) for name in stack.names)
        and not any(
            _is_excluded(name, config, saved)
            for name in (*stack.names, stack.parameter.rpartition(".")[0])
        )
    ]


def check_all_targets_match(model: nn.Module, config: LoraConfig) -> None:
    """Check that every entry of ``target_modules`` matches a module.

    This check is stricter than `find_targets`, which only emits a warning for such an entry if
    other entries match.

    Raises:
        TargetNotFoundError: If an entry does not match any module.
    """
    names = [name for name, _, _ in named_base_modules(model) if name]
    lost = _unmatched_entries(names, config.target_modules or ())
    if lost:
        raise TargetNotFoundError(
            f"target_modules entries {_format(lost)} match no module{_suggest(lost, names)}"
        )


def find_modules_to_save(model: nn.Module, config: LoraConfig) -> list[str]:
    """Return a list of the names of the modules that ``modules_to_save`` selects.

    The adapter will own a copy of each of these modules. The names are in the model's order.

    As in PEFT, an entry matches every name that ends with it, so that ``"head"`` matches
    ``"lm_head"``. A module inside another matching module is left out, because it is part of that
    module's copy. Modules inside a LoRA layer never match. Heads that the task adds to
    ``modules_to_save`` do not have to exist.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.

    Raises:
        TargetNotFoundError: If ``modules_to_save`` is set and no entry matches a module. If only
            some entries match no module, a warning lists them instead.
        UnsupportedLayerError: If a match is inside a module that other adapters own copies of.
    """
    entries = tuple(saved_modules_and_heads(config))
    if not entries:
        return []
    # Modules with several names can be matched by each of their names.
    base = list(named_base_modules(model, remove_duplicate=False))
    names = [name for name, _, _ in base if name]
    named = [e for e in config.modules_to_save or () if e not in _task_heads(config)]
    lost = [entry for entry in named if not any(name.endswith(entry) for name in names)]
    if lost:
        message = f"modules_to_save entries {_format(lost)} match no module{_suggest(lost, names)}"
        if lost == named:
            raise TargetNotFoundError(message)
        warnings.warn(message, stacklevel=2)
    found: list[str] = []
    for name in names:  # parents come before their children
        if name.endswith(entries) and not any(name.startswith(f"{p}.") for p in found):
            found.append(name)
    below = {
        name for name, module, wrapped in base if wrapped and not is_modules_to_save_wrapper(module)
    }
    for name in found:
        if name in below:
            raise UnsupportedLayerError(
                f"modules_to_save matches {name!r}, which {_invalid_target_message(model, name)}; "
                "expected the whole outer module, or a module outside it"
            )
    return found


def saved_modules_and_heads(config: LoraConfig) -> list[str]:
    """Return the entries of ``modules_to_save`` and the names of the heads for the task type.

    The list has no duplicates.
    """
    return list(dict.fromkeys([*(config.modules_to_save or ()), *_task_heads(config)]))


def _task_heads(config: LoraConfig) -> tuple[str, ...]:
    return _TASK_HEADS.get(config.task_type or "", ())


def resolve_target_modules(
    model: nn.Module, config: LoraConfig, modules: BaseModules | None = None
) -> set[str] | str:
    """Resolve ``target_modules`` to a set of module names or a regular expression.

    None is replaced with the default of the model's architecture, and ``"all-linear"`` with the
    names of the linear layers. The result is the value to store in a saved config.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        modules: The result of `named_base_modules`, or None to compute it.

    Raises:
        ConfigError: If ``target_modules`` is None and the model's architecture has no default.
    """
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model, config)
    if _is_all_linear(targets):
        modules = named_base_modules(model) if modules is None else modules
        targets = {
            name for name, inside in _linears_without_head(model, config, modules) if not inside
        }
    if isinstance(targets, str):
        return targets
    targets = set(targets)
    if len(targets) < _MINIMIZE_FROM or config.layers_to_transform is not None:
        # With layers_to_transform, full names are exempt from the layer filter but suffixes are
        # not. PEFT's shortening would then change which modules match.
        return targets
    modules = named_base_modules(model) if modules is None else modules
    others = [n for n, _, _ in modules if n and not _matches_names(n, targets)]
    shorter = minimal_suffixes(targets, others)
    return shorter if len(shorter) < len(targets) else targets


def minimal_suffixes(names: Collection[str], others: Iterable[str]) -> set[str]:
    """Return a small set of name suffixes that match all of ``names`` and none of ``others``."""
    taken = {suffix for other in others for suffix in _dotted_suffixes(other)}
    chosen: set[str] = set()
    for name in sorted(names):
        suffixes = _dotted_suffixes(name)
        if not any(suffix in chosen for suffix in suffixes):
            chosen.add(next((s for s in suffixes if s not in taken), name))
    return chosen


def _dotted_suffixes(name: str) -> list[str]:
    """Return a list of the suffixes of a dotted name, from the last component to the whole name."""
    found, at = [], len(name)
    while at >= 0:
        at = name.rfind(".", 0, at)
        found.append(name[at + 1 :])
    return found


def _default_targets(model: nn.Module, config: LoraConfig) -> set[str] | str:
    model_type = _model_type(model)
    defaults = DEFAULT_TARGETS.get(model_type) if isinstance(model_type, str) else None
    if defaults is None:
        raise ConfigError(
            f"target_modules is None and model type {model_type!r} has no default targets; "
            f"expected a list of module names, a regular expression, or {ALL_LINEAR!r}"
        )
    if not isinstance(defaults, str):
        return set(defaults)
    if config.layers_to_transform is not None:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} needs a list of target_modules; "
            f"the default for {model_type!r} is a regular expression"
        )
    return defaults


def _model_type(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    elif dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    return config.get("model_type") if isinstance(config, dict) else None


def _transformers_class(module: str, name: str) -> tuple[type, ...]:
    # Instances of the class can exist only if transformers has been imported.
    loaded = sys.modules.get(f"transformers.{module}")
    cls = getattr(loaded, name, None)
    return (cls,) if isinstance(cls, type) else ()


def _is_all_linear(targets: object) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


class _FoundLinear(NamedTuple):
    """A linear layer that was found in the base model.

    Attributes:
        name: The name of the layer.
        is_wrapped: Whether the layer is, or is inside, a module that adapters own copies of or
            train rows of.
    """

    name: str
    is_wrapped: bool


def _linears_without_head(
    model: nn.Module, config: LoraConfig, modules: BaseModules
) -> list[_FoundLinear]:
    """Return a list of all linear layers except the output head."""
    kinds = (nn.Linear, *_transformers_class("pytorch_utils", "Conv1D"))
    head = _output_head(model, config)

    def is_linear(module: nn.Module) -> bool:
        if not is_lora_layer(module):
            return isinstance(original_module_of(module), kinds)
        # The class name is checked too. PEFT recognizes its own layers in this way.
        under = (module, module._modules.get("base_layer"))
        return any(isinstance(m, kinds) for m in under) or "Linear" in type(module).__name__

    return [
        _FoundLinear(n, wrapped)
        for n, m, wrapped in modules
        if n and m is not head and is_linear(m)
    ]


def _output_head(model: nn.Module, config: LoraConfig) -> nn.Module | None:
    if not isinstance(model, _transformers_class("modeling_utils", "PreTrainedModel")):
        return None
    pretrained: Any = model
    embeddings: nn.Module | None = pretrained.get_output_embeddings()
    if embeddings is not None or config.task_type != "SEQ_CLS":
        return embeddings
    heads = (getattr(model, name, None) for name in _CLASSIFIER_HEADS)
    return next((head for head in heads if head is not None), None)


def _invalid_target_message(model: nn.Module, name: str) -> str:
    """Return an error message that explains why a module cannot be a target.

    It is part of a longer message. The module called ``name`` is, or is inside, a module that
    adapters own copies of or train rows of.
    """
    for outer, module in named_outer_modules(model, remove_duplicate=False):
        if is_auxiliary_wrapper(module) and (name == outer or name.startswith(f"{outer}.")):
            where = "is" if name == outer else f"is inside {outer!r},"
            if is_trainable_tokens_wrapper(module):
                return f"{where} a module in which adapters train rows (trainable_token_indices)"
            copies: Any = module._modules["modules_to_save"]
            return f"{where} a module that adapters {list(copies)} own copies of (modules_to_save)"
    return "is a module that adapters own copies of (modules_to_save)"


def _matches_names(name: str, entries: Collection[str]) -> bool:
    return any(map(entries.__contains__, _dotted_suffixes(name)))


def _is_excluded(name: str, config: LoraConfig, saved: list[str]) -> bool:
    exclude = config.exclude_modules
    if isinstance(exclude, str):
        if exclude and matches_whole_name("exclude_modules", exclude, name):
            return True
    elif exclude and _matches_names(name, exclude):
        return True
    # Here, an entry matches whole path components and everything below them. In
    # find_modules_to_save, it matches any suffix. Both rules are PEFT's.
    with count_matching_time("modules_to_save"):
        return any(
            matches_consecutive_components("modules_to_save", entry, name) for entry in saved
        )


def _matches(name: str, targets: set[str] | str, config: LoraConfig) -> bool:
    if isinstance(targets, str):
        return matches_whole_name("target_modules", targets, name)
    if name in targets:
        return True  # a full name is exempt from the layer filter
    return _matches_names(name, targets) and _in_layers(name, config)


def _in_layers(name: str, config: LoraConfig) -> bool:
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # The first number in the name is the layer's index. Later numbers may be indices of experts.
    if patterns:
        with count_matching_time("layers_pattern"):
            found = (
                layer_index_after_match("layers_pattern", pattern, name) for pattern in patterns
            )
            index = next((i for i in found if i is not None), None)
    else:
        match = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        index = None if match is None else int(match[1])
    with count_matching_time("layers_to_transform"):  # a config may list any number of layers
        return index in layers if isinstance(layers, list) else index == layers


def _check_bypassed(model: nn.Module, found: list[str]) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bad = [name for name in found if name.rpartition(".")[2] in _MAMBA_BYPASSED]
    if bad and model_type in _MAMBA_TYPES:
        raise UnsupportedLayerError(
            f"{bad[0]} is never called in a {model_type!r} model, so an adapter on it has no "
            f"effect; expected target_modules without {', '.join(_MAMBA_BYPASSED)}"
        )


def _suggest(entries: Sequence[str], names: list[str]) -> str:
    for entry in entries[:_MOST_SHOWN]:
        # Compare with names of the same number of components: `attn.q_proj` with
        # `self_attn.q_proj`.
        depth = entry.count(".")
        candidates = sorted({s for n in names for s in _dotted_suffixes(n)[depth : depth + 1]})
        close = near_names(entry, candidates)
        if close:
            return close
    return (
        "; the model has modules named "
        f"{', '.join(sorted({n.rpartition('.')[2] for n in names})[:10])}"
    )


def _no_target_message(
    names: list[str], excluded: Collection[str], targets: set[str] | str, config: LoraConfig
) -> str:
    """Return an error message that explains why no module is a target."""
    entries = [targets] if isinstance(targets, str) else sorted(targets)
    shown = f"target_modules={_format(targets)}"
    before = [name for name in names if name in excluded and _matches(name, targets, config)]
    if before:
        return (
            f"{shown} matches only modules in exclude_modules or modules_to_save: "
            f"{', '.join(before[:5])}"
        )
    if config.layers_to_transform is not None:
        layers = (
            f" with layers_to_transform={_format(config.layers_to_transform)}, "
            f"layers_pattern={_format(config.layers_pattern)}"
        )
        if not isinstance(targets, str) and any(_matches_names(n, targets) for n in names):
            return f"{shown} matches modules, but none in the layers selected{layers}"
        shown += layers
    return f"{shown} matches no module{_suggest(entries, names)}"


def _format(value: Collection[Any] | str | int | None) -> str:
    """Format the value of a config field for a message. A long list is truncated."""
    if value is None or isinstance(value, (str, int)):
        return repr(value)
    more = len(value) - _MOST_SHOWN
    return f"{sorted(value)[:_MOST_SHOWN]}" + (f" and {more} more" if more > 0 else "")


def _unmatched_entries(names: list[str], targets: Collection[str] | str) -> list[str]:
    """Return a sorted list of the entries of ``targets`` that match none of the names.

    If ``targets`` is a regular expression, the list is empty.
    """
    if isinstance(targets, str):
        return []
    known = {suffix for name in names for suffix in _dotted_suffixes(name)}
    return sorted(entry for entry in targets if entry not in known)


def _format_unmatched_config_values(
    unmatched: list[str], found: list[str], excludes: bool, config: LoraConfig
) -> list[str]:
    """Format the config values that match no module, for a warning.

    Args:
        unmatched: The entries of ``target_modules`` that match no module and no experts.
        found: The names of the targets.
        excludes: Whether at least one module is excluded.
        config: The adapter's config.
    """
    unused = [f"target_modules entries {_format(unmatched)}"] if unmatched else []
    if config.exclude_modules and not excludes:
        unused.append(f"exclude_modules={_format(config.exclude_modules)}")
    for field in ("rank_pattern", "alpha_pattern"):
        lost = patterns_matching_no_suffix(field, getattr(config, field), found)
        unused += [f"{field} keys {_format(lost)}"] if lost else []
    return unused
