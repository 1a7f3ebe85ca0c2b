"""Find the parameters that a config selects, by PEFT's matching rules.

A config selects parameters in ``target_parameters``, and experts and routers also by the names that
they had in transformers 4 (`fastlora.model.stacked_experts`).

The rules follow PEFT 0.21.2, ``tuners/tuners_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from fastlora.model.stacked_experts import (
    BaseModelParameter,
    check_fused_parameter_not_split,
    former_names_of_parameter,
    former_names_selected_by_target_modules,
    full_former_name_without_index,
)
from fastlora.model.target_names import (
    dotted_suffixes_shortest_first,
    format_config_value,
    in_layers,
    is_excluded,
    matches_names,
    saved_modules_and_task_heads,
    suggest_names,
)
from fastlora.validation import TargetNotFoundError, UnsupportedLayerError

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig


@dataclass(frozen=True)
class SelectedParameters:
    """The target parameters that a config selects in a model.

    The object also contains the names of parameters that the config selects but also excludes.

    Attributes:
        parameters: The selected parameters, in the model's order.
        former: The names of the parameters that are selected only by a former name.
        excluded: The names of the parameters that the config selects but also excludes.
        entries: The value of ``target_parameters`` to store in the adapter's config.
        fused: Maps patterns of parameter names to the number of linear layers that each of these
            parameters was. Their rank and alpha are multiples of the config's.
    """

    parameters: list[BaseModelParameter] = field(default_factory=list)
    former: frozenset[str] = frozenset()
    excluded: frozenset[str] = frozenset()
    entries: list[str] | None = None
    fused: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The names of the selected target parameters."""
        return [each.name for each in self.parameters]

    def by_module(self) -> dict[str, list[str]]:
        """Return a dict that maps module names to the names of their selected parameters.

        The names are relative to the module and in the order of ``named_parameters()``.
        """
        found: dict[str, list[str]] = {}
        for each in self.parameters:
            found.setdefault(each.module_name, []).append(each.leaf)
        return found

    def store_targets_and_patterns_in(self, config: LoraConfig) -> None:
        """Store the selected targets and their patterns in a config.

        The targets are stored in ``target_parameters``. The patterns are added to ``rank_pattern``
        and ``alpha_pattern``, as in PEFT. A pattern doubles the rank and alpha of a parameter that
        two linear layers were fused in. A pattern of the user that matches the parameter has
        precedence.
        """
        config.target_parameters = self.entries
        for pattern, parts in self.fused.items():
            config.rank_pattern.setdefault(pattern, config.r * parts)
            config.alpha_pattern.setdefault(pattern, config.lora_alpha * parts)


def select_parameters(
    former: Mapping[str, str],
    config: LoraConfig,
    parameters: Sequence[BaseModelParameter],
    layers_in_file: Collection[str] | None = None,
) -> SelectedParameters:
    """Select the parameters of a model that a config targets directly.

    A parameter can be selected by ``target_parameters`` or by a former name in ``target_modules``.

    Args:
        former: The result of `former_to_parameter_names` for the base model.
        config: The adapter's config.
        parameters: The parameters of the base model.
        layers_in_file: The names of the layers with LoRA factors in the adapter's file, or None if
            the adapter is new. A file decides about the parameters that a former name selects, and
            about those that ``exclude_modules`` or ``layers_to_transform`` leave out: they are
            selected if the file has factors for their modules.

    Raises:
        TargetNotFoundError: If an entry of ``target_parameters`` matches no parameter.
        UnsupportedLayerError: If a selected parameter cannot have LoRA factors.
        ConfigError: If a former name selects a part of a fused parameter.
    """
    entries = set(config.target_parameters or ())
    if not entries and not former:
        return SelectedParameters(entries=config.target_parameters)
    saved = saved_modules_and_task_heads(config)
    selected, excluded, by_former_name = list[BaseModelParameter](), set[str](), set[str]()
    fused: dict[str, int] = {}
    linears = {each.module_name for each in parameters if isinstance(each.module, nn.Linear)}
    targets = config.target_modules if not isinstance(config.target_modules, str) else ()
    listed = {entry.rpartition(".")[2] for entry in targets or () if entry not in linears}
    for each in parameters:
        olds = former_names_of_parameter(former, each)
        explicit = matches_names(each.name, entries)
        asked = (
            set()
            if explicit
            else former_names_selected_by_target_modules(olds, each, config, listed)
        )
        if not explicit and not asked:
            continue
        if layers_in_file is not None and asked and each.module_name not in layers_in_file:
            continue
        without = [
            o for o in olds if is_excluded(full_former_name_without_index(each, o), config, saved)
        ]
        is_left_out = (
            (bool(olds) and len(without) == len(olds))
            or any(is_excluded(name, config, saved) for name in (each.name, each.module_name))
            or not (each.name in entries or in_layers(each.name, config))
        )
        if is_left_out and (layers_in_file is None or each.module_name not in layers_in_file):
            excluded.add(each.name)
            continue
        if layers_in_file is None:
            check_fused_parameter_not_split(olds, each, without, verb="excludes")
            if not explicit:
                check_fused_parameter_not_split(olds, each, asked, verb="selects")
        _check_parameter(each)
        selected.append(each)
        if not explicit:
            by_former_name.add(each.name)
            if len(olds) > 1:
                fused[each.name] = len(olds)
    if layers_in_file is None:
        _check_entries_match(entries - set(former.values()), parameters, config)
    own = config.target_parameters or []
    added = {
        new
        for new in former.values()
        if new not in own and any(matches_names(name, {new}) for name in by_former_name)
    }
    stored = target_parameters_selecting_exactly(
        [each.name for each in selected], [*own, *sorted(added)], parameters
    )
    others = linears.union(each.name for each in selected if each.name not in by_former_name)
    return SelectedParameters(
        selected,
        frozenset(by_former_name),
        frozenset(excluded),
        stored or config.target_parameters,
        {_pattern_for(name, others): parts for name, parts in fused.items()},
    )


def _pattern_for(name: str, others: Collection[str]) -> str:
    """Return a pattern that matches a parameter, but none of ``others``.

    It is the pattern that PEFT adds, which matches all parameters with this last component, or
    the whole name if PEFT's pattern would match others.
    """
    leaf = name.rpartition(".")[2]
    shared = any(other.rpartition(".")[2] == leaf for other in others)
    return re.escape(name) if shared else rf".*\.{re.escape(leaf)}"


def target_parameters_selecting_exactly(
    names: Collection[str], preferred_value: list[str], parameters: Iterable[BaseModelParameter]
) -> list[str]:
    """Return a ``target_parameters`` value that selects exactly the given parameters.

    PEFT selects the same parameters with this value.

    Args:
        names: The names of the parameters.
        preferred_value: The value to return if it selects these parameters. Otherwise, the full
            names of the parameters are returned.
        parameters: All parameters of the base model.
    """
    known = set(preferred_value)
    matched = {each.name for each in parameters if matches_names(each.name, known)}
    return preferred_value if matched == set(names) else sorted(names)


def _check_entries_match(
    entries: Collection[str], parameters: Sequence[BaseModelParameter], config: LoraConfig
) -> None:
    """Raise `TargetNotFoundError` if an entry of ``target_parameters`` matches no parameter."""
    if entries:
        names = [each.name for each in parameters]
        known = {suffix for name in names for suffix in dotted_suffixes_shortest_first(name)}
        lost = sorted(set(entries) - known)
        if lost:
            raise TargetNotFoundError(
                f"target_parameters entries {format_config_value(lost)} match no parameter"
                f"{suggest_names(lost, names, 'parameters')}"
                f"{_error_suffix_if_target_modules_unset(config)}"
            )


def _error_suffix_if_target_modules_unset(config: LoraConfig) -> str:
    """Return the text that is appended to an error message when ``target_modules`` is not set.

    The text is PEFT's. The error message is about ``target_parameters`` that match no parameter. If
    ``target_modules`` is set, the result is an empty string.
    """
    if config.target_modules:
        return ""
    return (
        ". No `target_modules` passed but also no `target_parameters` found. Please check the "
        "values for these arguments."
    )


def _check_parameter(each: BaseModelParameter) -> None:
    """Raise `UnsupportedLayerError` if a parameter cannot have LoRA factors."""
    shape, dtype = tuple(each.parameter.shape), each.parameter.dtype
    if not each.module_name:
        raise UnsupportedLayerError(
            "Targeting an nn.Parameter on the top-level module is not supported (parameter "
            f"{each.name!r}); wrap the model in another module first"
        )
    if isinstance(each.module, nn.Linear):
        return  # the linear layer is adapted as a whole, also if its weight is quantized
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise UnsupportedLayerError(
            f"target parameter {each.name!r} has dtype {dtype}; expected an unquantized "
            "parameter with a 16-, 32-, or 64-bit floating-point dtype"
        )
    if len(shape) not in (2, 3):
        raise UnsupportedLayerError(
            f"target parameter {each.name!r} has shape {shape}; expected 2 or 3 dimensions"
        )
