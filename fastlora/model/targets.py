"""Find the modules that a config selects, by PEFT's matching rules.

The rules follow PEFT 0.21.2, ``tuners/tuners_utils.py`` and ``utils/other.py``. No function in this
module changes the model or the config.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn as nn

from fastlora.model.base_modules import (
    ModulesWithOriginalNames,
    base_module_of,
    is_auxiliary_wrapper,
    is_lora_layer,
    is_modules_to_save_wrapper,
    is_trainable_tokens_wrapper,
    modules_with_original_names,
    named_modules_outside_adapters,
    strip_wrapper_prefixes,
    strip_wrapper_prefixes_from_names,
    unwrap_auxiliary_wrapper,
)
from fastlora.model.config import LoraConfig
from fastlora.model.default_targets import DEFAULT_TARGETS
from fastlora.model.stacked_experts import (
    FEED_FORWARD_NAMES,
    BaseModelParameter,
    base_parameters_outside_auxiliary_wrappers,
    experts_named_but_not_selected,
    format_parameters_with_wildcards,
    former_names_of_parameter,
    former_to_parameter_names,
    stacked_experts_among,
)
from fastlora.model.target_names import (
    ALL_LINEAR,
    distinguishing_suffixes,
    dotted_suffixes_shortest_first,
    format_config_value,
    is_all_linear,
    is_excluded,
    matches_names,
    matches_targets,
    saved_modules_and_task_heads,
    suggest_names,
    task_heads,
)
from fastlora.model.target_parameters import SelectedParameters, select_parameters
from fastlora.patterns import patterns_matching_no_suffix
from fastlora.user_warnings import warn
from fastlora.validation import ConfigError, TargetNotFoundError, UnsupportedLayerError

# The value of target_modules that PEFT uses for an adapter without targets.
NO_TARGETS = "dummy-target-modules"

_CLASSIFIER_HEADS = ("score", "classifier")
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
# The mixers of these models pass the weights of these modules to a fused kernel, and never call the
# modules themselves.
_MAMBA_BYPASSED = ("out_proj", "conv1d")
# If there are at least this many names, PEFT replaces them with the shortest suffixes that match
# the same modules.
_MINIMIZE_FROM = 20


class SelectedTargets(NamedTuple):
    """The targets that a config selects in a model.

    The targets are modules and parameters.

    Attributes:
        modules: The names of the target modules, in the order of ``named_modules()``.
        parameters: The selected parameters. Their modules are not in ``modules``.
        only_in_file: The names of the target modules that only the adapter's file names.
    """

    modules: list[str]
    parameters: SelectedParameters
    only_in_file: Collection[str] = ()


def find_target_modules(
    model: nn.Module,
    config: LoraConfig,
    targets: set[str] | str | None = None,
    modules: ModulesWithOriginalNames | None = None,
) -> list[str]:
    """Return a list of the names of the target modules. See `select_targets`."""
    return select_targets(model, config, targets, modules).modules


def select_targets(
    model: nn.Module,
    config: LoraConfig,
    resolved_targets: set[str] | str | None = None,
    modules: ModulesWithOriginalNames | None = None,
    layers_in_file: Collection[str] | None = None,
    tied_heads: Collection[str] = (),
) -> SelectedTargets:
    """Select the modules and parameters of a model that a LoRA config targets.

    The modules may include LoRA layers that already have other adapters, but no modules inside a
    LoRA layer. ``"all-linear"`` leaves out every module that adapters own copies of
    (``modules_to_save``), and all modules inside it.

    A warning is emitted in each of these cases: some entries match no module while others do;
    ``"all-linear"`` leaves out a linear layer other than the output head because adapters own
    copies of it, or selects routers; or the config selects feed-forward projections, but not the
    experts beside them.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        resolved_targets: The result of `resolve_target_modules`, or None to compute it.
        modules: The result of `modules_with_original_names`, or None to compute it.
        layers_in_file: The names of the layers with LoRA factors in the adapter's file, or None if
            the adapter is new. A file decides about some of the targets: see `select_parameters`.
            A linear layer with a name that PEFT converts to experts is also a target if the file
            has factors for it, because PEFT removes these names from the config.
        tied_heads: The names of the modules that share the input embedding's factors, which keys of
            ``rank_pattern`` and ``alpha_pattern`` may match.

    Raises:
        TargetNotFoundError: If no module or parameter matches, or if an entry of
            ``target_parameters`` matches no parameter. The message suggests similar names.
        ConfigError: If ``target_modules`` and ``target_parameters`` are None and the model's
            architecture has no default, if both select the same module, or if a name selects a
            part of a fused parameter.
        UnsupportedLayerError: If a target is never called in the model's architecture, if a target
            is a module that other adapters own copies of or is inside one, or if a parameter cannot
            have LoRA factors.
    """
    modules = modules_with_original_names(model) if modules is None else modules
    resolved_targets = (
        resolve_target_modules(model, config, modules)
        if resolved_targets is None
        else resolved_targets
    )
    former, is_new = former_to_parameter_names(model_type_of(model)), layers_in_file is None
    # Only warnings for new adapters need the parameters if the config cannot select any.
    base = (
        base_parameters_outside_auxiliary_wrappers(modules)
        if former or config.target_parameters or is_new
        else []
    )
    wrapped = {name: inside for name, _, inside in modules if name}
    names = list(wrapped)
    # Configs and files usually have the names without the prefixes of wrapper modules.
    bare_names = strip_wrapper_prefixes_from_names(names)
    if layers_in_file:
        pairs = zip(names, bare_names, strict=True)
        layers_in_file = {name for name, bare in pairs if bare in layers_in_file}
    selected = select_parameters(former, config, base, layers_in_file)
    if resolved_targets == NO_TARGETS:
        return SelectedTargets([], selected)
    saved = saved_modules_and_task_heads(config)
    excludes = bool(config.exclude_modules or saved)
    excluded = {
        name
        for name, bare in zip(names, bare_names, strict=True)
        if excludes
        and (
            is_excluded(bare, config, saved) or (bare != name and is_excluded(name, config, saved))
        )
    }
    named = [(each.module_name, former_names_of_parameter(former, each)) for each in base]
    converted = {module_name for module_name, olds in named if olds}
    former_names = {old for _, olds in named for old in olds}
    found = [
        name
        for name, bare in zip(names, bare_names, strict=True)
        if name not in excluded
        and name not in converted
        and (
            matches_targets(bare, resolved_targets, config)
            or (bare != name and matches_targets(name, resolved_targets, config))
        )
    ]
    by_module = selected.by_module()
    named_in_config = {*found, *by_module}
    only_in_file = _linears_in_file_not_in_config(
        former, modules, named_in_config, layers_in_file or ()
    )
    if only_in_file:
        found = [name for name in names if name in {*found, *only_in_file}]
    _check_no_target_has_selected_parameters(found, by_module)
    left = [
        each
        for each in (stacked_experts_among(base) if is_new else ())
        if each.module_name not in by_module
        and each.name not in selected.excluded
        and not any(is_excluded(name, config, saved) for name in (each.name, each.module_name))
    ]
    left = experts_named_but_not_selected(left, found, config) if left else []
    if not found and not selected.parameters:
        without = strip_wrapper_prefixes_from_names(excluded)
        message = _no_target_message(bare_names, without, resolved_targets, config)
        raise TargetNotFoundError(f"{message}{_hint_about_experts(left)}")
    _check_bypassed(model, found)
    for name in found:
        if wrapped[name]:
            raise UnsupportedLayerError(
                f"target module {name!r} {_explain_auxiliary_module(model, name)}; choose other "
                "targets, or exclude this one with exclude_modules"
            )
    # The warning of experts that are left out is about projections too.
    told = {*former_names, *(FEED_FORWARD_NAMES if left or not is_new else ())}
    lost = _unmatched_targets([*names, *bare_names], resolved_targets)
    unmatched = [entry for entry in lost if entry.rpartition(".")[2] not in told]
    excludes = bool(excluded or selected.excluded)
    adapted = [*found, *tied_heads]
    _warn_of_unmatched_modules_and_patterns(unmatched, adapted, selected, excludes, config)
    if left:
        warn(
            f"target_modules={format_config_value(config.target_modules)} leaves out experts"
            f"{_hint_about_experts(left)}",
        )
    if is_all_linear(config.target_modules):
        _warn_of_routers_and_skipped_linears(model, modules, config, excluded, selected)
    return SelectedTargets(found, selected, only_in_file)


def _linears_in_file_not_in_config(
    former_names: Collection[str],
    modules: ModulesWithOriginalNames,
    named_in_config: Collection[str],
    layers_in_file: Collection[str],
) -> list[str]:
    """Return the linear layers that have factors in a file but are not selected by the config.

    The result is a list of names. These layers have names that PEFT converts to experts, and
    removes from ``target_modules``.
    """
    wanted = {name for name in layers_in_file if name.rpartition(".")[2] in former_names}
    wanted.difference_update(named_in_config)
    return [
        name
        for name, module, _ in (modules if wanted else ())
        if name in wanted and isinstance(base_module_of(module), nn.Linear)
    ]


def _check_no_target_has_selected_parameters(
    target_modules: Collection[str], parameters_by_module: Mapping[str, list[str]]
) -> None:
    """Raise `ConfigError` if a parameter of a target module is also a target."""
    twice = sorted(parameters_by_module.keys() & set(target_modules))
    if twice:
        raise ConfigError(  # the first sentence is PEFT's
            f"Trying to wrap an `nn.Parameter` of layer {twice[0]!r} of type Linear, which is not "
            "a valid target. target_modules selects the whole layer, and target_parameters selects "
            f"{parameters_by_module[twice[0]]}; use only one of these fields for the layer"
        )


def _warn_of_unmatched_modules_and_patterns(
    unmatched_target_modules: list[str],
    target_module_names: list[str],
    selected_parameters: SelectedParameters,
    any_excluded: bool,
    config: LoraConfig,
) -> None:
    """Warn about module names and patterns in the config that match nothing in the model.

    The warning covers entries of ``target_modules``, keys of ``rank_pattern`` and
    ``alpha_pattern``, and ``exclude_modules`` if this field excludes nothing. `select_parameters`
    has already checked the entries of ``target_parameters``.

    Args:
        unmatched_target_modules: The entries of ``target_modules`` that match no module and no
            experts.
        target_module_names: The names of the target modules, and of heads that share the input
            embedding's factors.
        selected_parameters: The selected parameters.
        any_excluded: Whether at least one module or parameter is excluded.
        config: The adapter's config.
    """
    names = [*target_module_names, *selected_parameters.names]
    unused = _format_unmatched_config_values(unmatched_target_modules, names, any_excluded, config)
    if selected_parameters.parameters and not target_module_names and unmatched_target_modules:
        warn(  # in PEFT's words
            f"target_modules={config.target_modules} were set but no module was matched.",
            RuntimeWarning,
        )
    elif unused:
        warn(f"these config values match no module: {'; '.join(unused)}")


def _hint_about_experts(unselected: Sequence[BaseModelParameter]) -> str:
    """Return a hint that explains how to adapt experts that no target selects.

    The hint, which is part of a message, says that the weights of the experts are parameters and
    must be adapted with ``target_parameters``. If there are no such experts, the result is an empty
    string.
    """
    if not unselected:
        return ""
    entries = sorted({".".join(each.name.split(".")[-2:]) for each in unselected})
    return (
        f" ({format_parameters_with_wildcards(each.name for each in unselected)}). "
        f"Their weights are parameters, not linear layers; adapt them with "
        f"target_parameters={entries}"
    )


def _warn_of_routers_and_skipped_linears(
    model: nn.Module,
    modules: ModulesWithOriginalNames,
    config: LoraConfig,
    excluded: Collection[str],
    selected: SelectedParameters,
) -> None:
    """Warn if a config targets MoE routers or leaves out linear layers.

    Both warnings are for ``target_modules="all-linear"``.
    """
    routers = [each.name for each in selected.parameters if each.parameter.dim() == 2]
    routers = [name for name in routers if name in selected.former]
    if routers:
        warn(
            f"{ALL_LINEAR!r} also adapts the routers of experts "
            f"({format_parameters_with_wildcards(routers)}), as in PEFT; leave them out with "
            "exclude_modules",
        )
    if any(wrapped for _, _, wrapped in modules):
        linears = _linears_without_head(model, config, modules)
        left = [n for n, inside in linears if inside and n not in excluded]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            warn(
                f"{ALL_LINEAR!r} leaves out {left[0]!r}{more}: "
                f"it {_explain_auxiliary_module(model, left[0])}",
            )


def check_all_target_modules_match(model: nn.Module, config: LoraConfig) -> None:
    """Raise an error if an entry of ``target_modules`` matches nothing in the model.

    An entry can match modules, or the former names of experts and routers. This check is stricter
    than `find_target_modules`, which only emits a warning for an entry without a match if other
    entries match.

    Raises:
        TargetNotFoundError: If an entry does not match anything.
    """
    modules, former = (
        modules_with_original_names(model),
        former_to_parameter_names(model_type_of(model)),
    )
    names = [name for name, _, _ in modules if name]
    olds = {
        old
        for each in base_parameters_outside_auxiliary_wrappers(modules)
        for old in former_names_of_parameter(former, each)
    }
    lost = [
        entry
        for entry in _unmatched_targets(names, config.target_modules or ())
        if entry.rpartition(".")[2] not in olds
    ]
    if lost:
        suggested = suggest_names(lost, names)
        raise TargetNotFoundError(
            f"target_modules entries {format_config_value(lost)} match no module{suggested}"
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
    entries = tuple(saved_modules_and_task_heads(config))
    if not entries:
        return []
    # Modules with several names can be matched by each of their names.
    base = list(modules_with_original_names(model, remove_duplicate=False))
    names = [name for name, _, _ in base if name]
    named = [e for e in config.modules_to_save or () if e not in task_heads(config)]
    lost = [entry for entry in named if not any(name.endswith(entry) for name in names)]
    if lost:
        suggested = suggest_names(lost, names)
        message = f"modules_to_save entries {format_config_value(lost)} match no module{suggested}"
        if lost == named:
            raise TargetNotFoundError(message)
        warn(message)
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
                f"modules_to_save matches {name!r}, which "
                f"{_explain_auxiliary_module(model, name)}; "
                "specify the entire enclosing module instead, or a module outside it"
            )
    return found


def resolve_target_modules(
    model: nn.Module, config: LoraConfig, modules: ModulesWithOriginalNames | None = None
) -> set[str] | str:
    """Resolve the ``target_modules`` of a config for a model.

    None is replaced with the default of the model's architecture, and ``"all-linear"`` with the
    names of the linear layers. The result is a set of module names or a regular expression, and is
    the value to store in a saved config.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        modules: The result of `modules_with_original_names`, or None to compute it.

    Raises:
        ConfigError: If ``target_modules`` is None and the model's architecture has no default.
    """
    targets = config.target_modules
    if targets is None:
        targets = _default_targets(model, config)
    if is_all_linear(targets):
        modules = _with_bare_names(modules or modules_with_original_names(model))
        targets = {
            name for name, inside in _linears_without_head(model, config, modules) if not inside
        }
        if any(inside and matches_names(name, targets) for name, _, inside in modules):
            # As an entry of a list, "proj" would also match "copied.proj".
            targets = "|".join(map(re.escape, sorted(targets)))
    if isinstance(targets, str):
        return targets
    targets = set(targets)
    if len(targets) < _MINIMIZE_FROM or config.layers_to_transform is not None:
        # With layers_to_transform, full names are exempt from the layer filter but suffixes are
        # not. PEFT's shortening would then change which modules match.
        return targets
    modules = _with_bare_names(modules or modules_with_original_names(model))
    others = [n for n, _, _ in modules if n and not matches_names(n, targets)]
    shorter = distinguishing_suffixes(targets, others)
    return shorter if len(shorter) < len(targets) else targets


def _with_bare_names(modules: ModulesWithOriginalNames) -> ModulesWithOriginalNames:
    """Return the modules under their names without the prefixes of wrapper modules."""
    return [(strip_wrapper_prefixes(name), module, wrapped) for name, module, wrapped in modules]


def _default_targets(model: nn.Module, config: LoraConfig) -> set[str] | str:
    model_type = model_type_of(model)
    defaults = DEFAULT_TARGETS.get(model_type) if isinstance(model_type, str) else None
    if defaults is None and config.target_parameters:
        return set()
    if defaults is None:
        raise ConfigError(
            f"target_modules is None and model type {model_type!r} has no default targets; "
            f"expected a list of module names, a regular expression, or {ALL_LINEAR!r}"
        )
    if not isinstance(defaults, str):
        return set(defaults)
    if config.layers_to_transform is not None:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} requires target_modules to be a "
            f"list; the default for {model_type!r} is a regular expression"
        )
    return defaults


def model_type_of(model: nn.Module) -> Any:
    """Return the ``model_type`` in a model's config.

    The result is None if there is none.
    """
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


class _FoundLinearName(NamedTuple):
    """The name of a linear layer that was found in the base model.

    The object also says whether the layer is wrapped.

    Attributes:
        name: The name of the layer.
        is_wrapped: Whether the layer is, or is inside, a module that adapters own copies of or
            train rows of.
    """

    name: str
    is_wrapped: bool


def _linears_without_head(
    model: nn.Module, config: LoraConfig, modules: ModulesWithOriginalNames
) -> list[_FoundLinearName]:
    """Return a list of all linear layers except the output head.

    The output projection of an `nn.MultiheadAttention` is left out too, because it is never called.
    """
    kinds = (nn.Linear, *_transformers_class("pytorch_utils", "Conv1D"))
    head = _output_head(model, config)

    def is_linear(module: nn.Module) -> bool:
        if type(module).__name__ == "NonDynamicallyQuantizableLinear":
            return False
        if not is_lora_layer(module):
            return isinstance(unwrap_auxiliary_wrapper(module), kinds)
        # The class name is checked too. PEFT recognizes its own layers in this way.
        under = (module, module._modules.get("base_layer"))
        return any(isinstance(m, kinds) for m in under) or "Linear" in type(module).__name__

    return [
        _FoundLinearName(n, wrapped)
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


def _explain_auxiliary_module(model: nn.Module, name: str) -> str:
    """Return an explanation of why a module is auxiliary and cannot be a target.

    The explanation follows the module's name in a message. The module called ``name`` must be, or
    be inside, a module that adapters own copies of or train rows of.
    """
    for outer, module in named_modules_outside_adapters(model, remove_duplicate=False):
        if is_auxiliary_wrapper(module) and (name == outer or name.startswith(f"{outer}.")):
            where = "is" if name == outer else f"is inside {outer!r},"
            if is_trainable_tokens_wrapper(module):
                return f"{where} a module in which adapters train rows (trainable_token_indices)"
            copies: Any = module._modules["modules_to_save"]
            return f"{where} a module that adapters {list(copies)} own copies of (modules_to_save)"
    return "is a module that adapters own copies of (modules_to_save)"


def _check_bypassed(model: nn.Module, found: list[str]) -> None:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    bad = [name for name in found if name.rpartition(".")[2] in _MAMBA_BYPASSED]
    if bad and model_type in _MAMBA_TYPES:
        raise UnsupportedLayerError(
            f"{bad[0]} is never called in a {model_type!r} model, so an adapter on it has no "
            "effect; leave the following layers out of target_modules: "
            f"{', '.join(_MAMBA_BYPASSED)}"
        )


def _no_target_message(
    names: list[str], excluded: Collection[str], targets: set[str] | str, config: LoraConfig
) -> str:
    """Return an error message that explains why a config targets no module."""
    entries = [targets] if isinstance(targets, str) else sorted(targets)
    shown = f"target_modules={format_config_value(targets)}"
    before = [name for name in names if name in excluded and matches_targets(name, targets, config)]
    if before:
        return (
            f"{shown} matches only modules in exclude_modules or modules_to_save: "
            f"{', '.join(before[:5])}"
        )
    if config.layers_to_transform is not None:
        layers = (
            f" with layers_to_transform={format_config_value(config.layers_to_transform)}, "
            f"layers_pattern={format_config_value(config.layers_pattern)}"
        )
        if not isinstance(targets, str) and any(matches_names(n, targets) for n in names):
            return f"{shown} matches modules, but none in the layers selected{layers}"
        shown += layers
    return f"{shown} matches no module{suggest_names(entries, names)}"


def _unmatched_targets(module_names: list[str], targets: Collection[str] | str) -> list[str]:
    """Return the entries of ``targets`` that match no module name.

    The result is a sorted list. If ``targets`` is a string, such as a regular expression, it has no
    entries, and the list is empty.
    """
    if isinstance(targets, str):
        return []
    known = {suffix for name in module_names for suffix in dotted_suffixes_shortest_first(name)}
    return sorted(entry for entry in targets if entry not in known)


def _format_unmatched_config_values(
    unmatched_target_modules: list[str],
    found_target_names: list[str],
    any_excluded: bool,
    config: LoraConfig,
) -> list[str]:
    """Format the config values that match no module.

    The result is a list of texts for a warning, one for each field that has such values. The fields
    are ``target_modules``, ``exclude_modules``, ``rank_pattern``, and ``alpha_pattern``.

    Args:
        unmatched_target_modules: The entries of ``target_modules`` that match no module and no
            experts.
        found_target_names: The names of the targets.
        any_excluded: Whether at least one module is excluded.
        config: The adapter's config.
    """
    unused = (
        [f"target_modules entries {format_config_value(unmatched_target_modules)}"]
        if unmatched_target_modules
        else []
    )
    if config.exclude_modules and not any_excluded:
        unused.append(f"exclude_modules={format_config_value(config.exclude_modules)}")
    names = strip_wrapper_prefixes_from_names(found_target_names)
    for field in ("rank_pattern", "alpha_pattern"):
        lost = patterns_matching_no_suffix(field, getattr(config, field), names)
        unused += [f"{field} keys {format_config_value(lost)}"] if lost else []
    return unused
