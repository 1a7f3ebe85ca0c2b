"""Resolve an adapter's config against a model: find the modules to adapt, and check them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn
from torch.nn.parameter import is_lazy

from fastlora.layers import FastLoraLinear, LoraLayer, ModulesToSaveWrapper, ModuleWrapper
from fastlora.layers.adapted_parameters import ParameterLoraLayer
from fastlora.layers.base_layers import linear_features, stores_weight_transposed
from fastlora.layers.layer_kinds import (
    PEFT_LAYER_ALTERNATIVE,
    LayerAdapterSettings,
    LayerKind,
    ParameterRankAndAlpha,
    TensorShapes,
    layer_kind_names,
    layer_kind_of,
    linear_adapter_shapes,
    parameter_kind_of,
)
from fastlora.layers.modules_to_save import raise_if_container
from fastlora.layers.quantized import quantized_weight_of
from fastlora.layers.tied_head import TiedLoraHead
from fastlora.model.base_modules import (
    base_module_of,
    is_lora_layer_in_use,
    modules_with_original_names,
)
from fastlora.model.config import LoraConfig
from fastlora.model.replication import (
    RevertibleLayerReplication,
    plan_layer_replication,
    temporary_replication,
)
from fastlora.model.target_names import saved_modules_and_task_heads
from fastlora.model.target_parameters import SelectedParameters
from fastlora.model.targets import find_modules_to_save, resolve_target_modules, select_targets
from fastlora.model.tied_weights import (
    NO_TIED_MODULES,
    ModulesAdaptedWithEmbedding,
    SharedWeightUntier,
    update_config_for_tied_embedding,
)
from fastlora.model.trainable_tokens import (
    TrainableRowIndices,
    check_modules_trained_once,
    find_trainable_tokens,
)
from fastlora.routing.ids import check_adapter_name
from fastlora.user_warnings import warn
from fastlora.validation import (
    PEFT_MODEL_ALTERNATIVE,
    AdapterStateError,
    ConfigError,
    UnsupportedLayerError,
    error_prefix,
)

if TYPE_CHECKING:
    from fastlora.model.adapter_folder import AdapterContents


class TargetModule(NamedTuple):
    """A module to which an adapter applies LoRA, with the adapter's settings for the module.

    Attributes:
        base: The module without adapters.
        kind: The `LayerKind` of the module, which determines how it is adapted.
        settings: The settings of the adapter on this module.
    """

    base: nn.Module
    kind: LayerKind
    settings: LayerAdapterSettings

    def tensor_shapes_by_key_within_module(self) -> TensorShapes:
        """Return the shapes of the adapter's tensors for the module.

        The result is a dict that maps keys within the module to shapes. A key within the module,
        such as ``lora_A.weight``, is the part of a key in an adapter file that follows the module's
        name.
        """
        return self.kind.shapes(self.base, self.settings)


@dataclass(frozen=True)
class AdapterPlan:
    """A plan for adding an adapter to a model.

    The plan contains the checked config and the modules to adapt, each with its rank, alpha, and
    other settings.

    Attributes:
        config: The adapter's config.
        targets: A dict that maps names to the modules to adapt with LoRA, in the model's order.
        modules_to_save: The names of the modules that the adapter owns a copy of.
        target_modules: The resolved value of the config's ``target_modules``.
        from_file: Whether the adapter's weights come from a file.
        parameters: The full names of the parameters to adapt with LoRA. Their modules are in
            ``targets``.
        tokens: A dict that maps the names of the modules in which the adapter trains rows to the
            rows.
        tied_copies: The names of the modules that share the adapter's copy of the input embedding.
        tied_heads: The names of the modules that share the input embedding's LoRA factors.
        replication: The layer replication that must be applied to the model before the adapter is
            added, or None.
    """

    config: LoraConfig
    targets: dict[str, TargetModule]
    modules_to_save: list[str]
    target_modules: set[str] | str
    from_file: bool = False
    parameters: list[str] = field(default_factory=list)
    tokens: dict[str, TrainableRowIndices] = field(default_factory=dict)
    tied_copies: list[str] = field(default_factory=list)
    tied_heads: list[str] = field(default_factory=list)
    replication: RevertibleLayerReplication | None = None

    @property
    def module_names_sharing_embedding_adapter(self) -> list[str]:
        """The names of the modules that share the input embedding's adapter.

        These modules share either the embedding's LoRA factors or the adapter's copy of its weight.
        """
        return [*self.tied_copies, *self.tied_heads]

    @property
    def adapted_module_and_parameter_names(self) -> list[str]:
        """The names of the modules and parameters that the adapter targets.

        Each of these modules and parameters has LoRA factors of its own. Modules that share the
        input embedding's LoRA factors are left out. If the adapter targets parameters of a module,
        the list contains the names of the parameters instead of the module's name.
        """
        return [
            own
            for name, target in self.targets.items()
            for own in [f"{name}.{each.name}" for each in target.settings.parameters] or [name]
        ]

    @property
    def changed_module_names(self) -> list[str]:
        """The names of the modules that change when the adapter is added."""
        return [
            *self.targets,
            *self.modules_to_save,
            *self.module_names_sharing_embedding_adapter,
            *self.tokens,
        ]


def make_adapter_plan(
    model: nn.Module,
    adapter_name: str,
    peft_config: Any,
    *,
    file: AdapterContents | None = None,
) -> AdapterPlan:
    """Create the plan for adding an adapter to a model.

    The config is resolved against the model. The plan contains a copy of the config in which
    ``target_modules`` is resolved to names or a regular expression, and ``target_parameters``
    includes the experts that ``target_modules`` names. Neither the model nor ``peft_config`` is
    changed.

    Args:
        model: The base model, with or without adapters.
        adapter_name: The name of the adapter.
        peft_config: A `fastlora.LoraConfig` or a ``peft.LoraConfig``.
        file: The contents of the file that the adapter's weights come from, or None if the adapter
            is new.

    Raises:
        TargetNotFoundError: If the config does not match any module of the model.
        UnsupportedLayerError: If the config matches a module that cannot be adapted.
        ConfigError: If a field of the config or the adapter's name is invalid.
    """
    check_adapter_name(adapter_name)
    config = copy.deepcopy(to_lora_config(peft_config))
    config.check_supported("new" if file is None else "load")
    replication = plan_layer_replication(model, config.layer_replication)
    with temporary_replication(replication):
        tensors, layers = (None, None) if file is None else (file.tensors, file.layers)
        ties = update_config_for_tied_embedding(model, config, tensors)
        plan = plan_target_modules(model, config, file is not None, ties, layers)
        plan = dataclasses.replace(plan, replication=replication)
        _warn_of_peft_differences_and_ignored_dropout(plan)
        config.target_modules = plan.target_modules
        config.fan_in_fan_out = _fan_in_fan_out_to_store(plan)
    if plan.modules_to_save:
        config.modules_to_save = saved_modules_and_task_heads(config)
    if not config.base_model_name_or_path:
        name = getattr(model, "name_or_path", None) or getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
        config.base_model_name_or_path = name or None
    return plan


def _fan_in_fan_out_to_store(plan: AdapterPlan) -> bool:
    """Return the value of ``fan_in_fan_out`` to store in the config.

    As in PEFT, the last linear layer among the targets determines the value. If no target is a
    linear layer, the config's own value is returned. As in PEFT, a warning is emitted if the value
    changes from True to False.
    """
    given = plan.config.fan_in_fan_out
    for name, target in reversed(plan.targets.items()):
        transposed = stores_weight_transposed(target.base)
        if transposed or isinstance(target.base, nn.Linear):
            if given and not transposed:
                warn(
                    f"fan_in_fan_out is set to True but {name!r} is a "
                    f"{type(target.base).__name__}. Setting fan_in_fan_out to False",
                )
            return transposed
    return given


def plan_target_modules(
    model: nn.Module,
    config: LoraConfig,
    from_file: bool = False,
    ties: ModulesAdaptedWithEmbedding = NO_TIED_MODULES,
    layers_in_file: Collection[str] | None = None,
) -> AdapterPlan:
    """Plan which modules of a model get an adapter, and with which settings.

    The function finds the targets and checks that they can be adapted. The targets include the
    parameters that the config selects. The model is not changed. In the config, the selected
    parameters are stored (see `SelectedParameters.store_targets_and_patterns_in`).

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        from_file: Whether the adapter's weights come from a file.
        ties: The modules that share the input embedding's adapter.
        layers_in_file: The names of the layers with LoRA factors in the file. See
            `select_targets`.

    Raises:
        TargetNotFoundError: If no module matches the config.
        UnsupportedLayerError: If a target is of a kind that cannot be adapted, at least with this
            config; or if the adapter needs a copy of a module that another adapter adapts with
            LoRA, or the other way around; or if a lazy module has not run yet.
    """
    modules = modules_with_original_names(model)
    for name, module, _ in modules:
        if any(map(is_lazy, module._parameters.values())):  # type: ignore[arg-type]  # also None
            raise UnsupportedLayerError(
                f"the lazy module {name!r} is not initialized; run a forward pass of the model "
                "first"
            )
    meant = resolve_target_modules(model, config, modules)
    selected = select_targets(model, config, meant, modules, layers_in_file, ties.heads)
    targets = selected.modules
    selected.parameters.store_targets_and_patterns_in(config)
    if selected.only_in_file:
        named = targets if isinstance(meant, str) else {*meant, *selected.only_in_file}
        meant = set(named)
    saved = find_modules_to_save(model, config)
    copies, heads = list(ties.copies), list(ties.heads)
    saved = [name for name in saved if name not in copies]
    targets = [name for name in targets if name not in heads]
    targets += [name for name in ties.embeddings if name not in targets]
    _check_can_share_embedding_factors(model, config, targets, heads)
    tokens = find_trainable_tokens(model, config)
    check_modules_trained_once(tokens, targets, saved, [*copies, *heads])
    if config.init.changes_base:
        _check_init_changes_no_shared_weight(model, config, targets)
    found = _check_target_modules(model, config, targets, from_file)
    if selected.parameters.names:
        found |= check_targets_of_parameters(model, config, selected.parameters, from_file)
    parameters = selected.parameters.names
    plan = AdapterPlan(config, found, saved, meant, from_file, parameters, tokens, copies, heads)
    for name in (*plan.modules_to_save, *plan.tied_copies):
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            continue  # checked when the wrapper was created
        raise_if_container(module)
        for inner, part in module.named_modules():
            if isinstance(part, LoraLayer) and (inner or is_lora_layer_in_use(part)):
                raise UnsupportedLayerError(
                    f"modules_to_save matches {name!r}, but another adapter has LoRA factors in "
                    "this module"
                )
            if isinstance(part, ModuleWrapper):
                at = f"{name}.{inner}" if inner else name
                raise UnsupportedLayerError(
                    f"modules_to_save matches {name!r}, but adapters {part.adapter_names} already "
                    f"train their own {part.owns} of {at!r}; all adapters that train a module must "
                    "train it in the same way"
                )
    return plan


def _check_target_modules(
    model: nn.Module, config: LoraConfig, target_names: Sequence[str], from_file: bool
) -> dict[str, TargetModule]:
    """Check that a config's target modules can be adapted, and return a `TargetModule` for each.

    The result is a dict whose keys are the names in ``target_names``.

    Raises:
        UnsupportedLayerError: See `plan_target_modules`.
    """
    found = {}
    common, custom = _settings_without_patterns(config, from_file), config.custom_modules
    for name in target_names:
        base = base_module_of(model.get_submodule(name))
        with error_prefix(f"target module {name!r} is a {type(base).__name__}"):
            target = TargetModule(
                base, _kind_for(base, custom), _settings_with_module_rank(name, config, common)
            )
            target.kind.check(base, target.settings)
        found[name] = target
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and not isinstance(
            base, nn.MultiheadAttention
        ):
            warn(
                f"{name!r}: nn.TransformerEncoderLayer may read this weight without calling the "
                "module in evaluation mode, which skips the adapter; call "
                "torch.backends.mha.set_fastpath_enabled(False)",
            )
    return found


def check_targets_of_parameters(
    model: nn.Module, config: LoraConfig, selected: SelectedParameters, from_file: bool
) -> dict[str, TargetModule]:
    """Check that a config's target parameters can be adapted, and return their modules.

    The result is a dict that maps the name of each module to a `TargetModule`. A linear layer with
    a selected weight is adapted as a whole, unless its class defines its own ``forward``. For
    example, the class of the routers of Llama 4 does.

    Raises:
        UnsupportedLayerError: See `plan_target_modules`.
    """
    found = {}
    common = _settings_without_patterns(config, from_file)
    for name, leaves in selected.by_module().items():
        base = base_module_of(model.get_submodule(name))
        names = [f"{name}.{leaf}" for leaf in leaves]
        ranks = [(config.rank_for(full), config.alpha_for(full)) for full in names]
        kind: LayerKind | None
        with error_prefix(
            f"target parameter {', '.join(map(repr, names))} of a {type(base).__name__}"
        ):
            if config.fan_in_fan_out and not from_file:
                raise UnsupportedLayerError("expected fan_in_fan_out=False, got True")
            if isinstance(base, nn.Linear) and not _has_own_forward(base):
                kind = _kind_for(base, {})
                settings = common._replace(r=ranks[0][0], lora_alpha=ranks[0][1])
            else:
                kind = parameter_kind_of(base)
                parameters = zip(leaves, ranks, strict=True)
                settings = common._replace(
                    parameters=tuple(
                        ParameterRankAndAlpha(leaf, *rank) for leaf, rank in parameters
                    )
                )
            if kind is None:
                raise UnsupportedLayerError(
                    f"fastlora does not adapt parameters of this module; {PEFT_MODEL_ALTERNATIVE}"
                )
            kind.check(base, settings)
        found[name] = TargetModule(base, kind, settings)
    return found


def _has_own_forward(linear: nn.Linear) -> bool:
    """Return whether the class of a linear layer overrides ``forward``.

    The output of such a layer may differ from that of `nn.Linear.forward`. The result is always
    False for layers with quantized weights.
    """
    replaced = type(linear).forward not in (nn.Linear.forward, FastLoraLinear.forward)
    return replaced and quantized_weight_of(linear) is None and linear.weight.is_floating_point()


def _warn_of_peft_differences_and_ignored_dropout(plan: AdapterPlan) -> None:
    """Warn if an adapter is computed differently than in PEFT, or if its dropout has no effect.

    A warning about a difference names a target that is computed differently than in PEFT. Such a
    warning is emitted only for an adapter that was loaded from a file with a ``peft_version`` in
    its config. The warning about dropout is emitted if a new adapter has ``lora_dropout``, but a
    target has no input to which dropout can be applied.
    """
    config = plan.config
    without = [name for name, target in plan.targets.items() if not target.kind.uses_dropout]
    if without and config.lora_dropout and not plan.from_file:
        more = f" and {len(without) - 1} more targets" if len(without) > 1 else ""
        warn(
            f"lora_dropout={config.lora_dropout} has no effect on {without[0]!r}{more}, as in "
            f"PEFT: the adapter of a {type(plan.targets[without[0]].base).__name__} has no input "
            "to apply dropout to",
        )
    if config.peft_version and plan.from_file:
        notes = {target.kind.peft_note: name for name, target in plan.targets.items()}
        for note, name in notes.items():
            if note:
                base = plan.targets[name].base
                warn(f"{name!r} is a {type(base).__name__}: {note}")


def _check_can_share_embedding_factors(
    model: nn.Module,
    config: LoraConfig,
    targets_with_own_factors: Sequence[str],
    tied_heads: Sequence[str],
) -> None:
    """Check that tied heads can share the LoRA factors of the input embedding.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        targets_with_own_factors: The names of the modules that get their own LoRA factors.
        tied_heads: The names of the modules that will share the input embedding's factors.

    Raises:
        UnsupportedLayerError: If a target shares the input embedding's factors for another adapter,
            or if a tied head is not a linear layer that can share them.
        ConfigError: If the config uses DoRA or an initialization with a frozen factor.
    """
    for name in targets_with_own_factors:
        if isinstance(model.get_submodule(name), TiedLoraHead):
            raise UnsupportedLayerError(
                f"target module {name!r} shares the input embedding's LoRA factors in other "
                "adapters (ensure_weight_tying=True); set ensure_weight_tying=True for this "
                "adapter too, or choose other targets"
            )
    for name in tied_heads:
        module = model.get_submodule(name)
        base = module.get_base_layer() if isinstance(module, LoraLayer) else module
        has_own_factors = is_lora_layer_in_use(module) and not isinstance(module, TiedLoraHead)
        if has_own_factors or not isinstance(base, nn.Linear):
            raise UnsupportedLayerError(
                f"ensure_weight_tying makes {name!r} share the input embedding's LoRA factors, so "
                "this module must be an nn.Linear without LoRA factors of its own; got "
                f"{type(module).__name__}"
            )
    if tied_heads and (config.use_dora or config.init.frozen):
        raise ConfigError(
            "ensure_weight_tying=True with LoRA on the embedding requires use_dora=False and "
            "an initialization method that trains both factors, got "
            f"use_dora={config.use_dora} and init_lora_weights={config.init_lora_weights!r}"
        )


def _check_init_changes_no_shared_weight(
    model: nn.Module, config: LoraConfig, targets: Sequence[str]
) -> None:
    """Check that the initialization does not change a weight that another module shares.

    The config's initialization method changes the base weights. If a target shared its weight with
    another module, the method would also change the other module.

    Raises:
        AdapterStateError: If a target shares its weight with another module.
    """
    shared = SharedWeightUntier(model)
    for name in targets:
        module = model.get_submodule(name)
        base = base_module_of(module)
        other = shared.find_module_sharing_weight(name, base, (module, base))
        if other is not None and linear_features(base) is not None:
            raise AdapterStateError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of target "
                f"module {name!r}, which is shared with {other!r}; exclude the module with "
                "exclude_modules, or untie the two weights first"
            )


def adapter_settings_for(name: str, config: LoraConfig) -> LayerAdapterSettings:
    """Return an adapter's settings for the module called ``name``."""
    return _settings_with_module_rank(name, config, _settings_without_patterns(config))


def _settings_without_patterns(config: LoraConfig, from_file: bool = False) -> LayerAdapterSettings:
    """Return a config's layer settings, ignoring its rank and alpha patterns.

    Layers that match neither ``rank_pattern`` nor ``alpha_pattern`` have these settings.
    """
    return LayerAdapterSettings(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        lora_bias=config.lora_bias,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        init_config=config.init_config,
        from_file=from_file,
    )


def _settings_with_module_rank(
    name: str, config: LoraConfig, common: LayerAdapterSettings
) -> LayerAdapterSettings:
    """Return the ``common`` settings with the rank and alpha that the config sets for a module.

    ``name`` is the name of the module.
    """
    if not config.rank_pattern and not config.alpha_pattern:
        return common
    return common._replace(r=config.rank_for(name), lora_alpha=config.alpha_for(name))


def _kind_for(base: nn.Module, custom: Mapping[type, type]) -> LayerKind:
    """Return the layer kind of a base module.

    The result is a `LayerKind`, which determines the LoRA layer that adapts the module.

    Raises:
        UnsupportedLayerError: If fastlora does not support the module's class.
    """
    kind = layer_kind_of(base, custom)
    if kind is None:
        raise UnsupportedLayerError(
            "this class is not supported; fastlora supports "
            f"{', '.join(layer_kind_names())} (including transformers' Conv1D and quantized linear "
            "layers), as well as classes that you register with "
            f"LoraConfig._register_custom_module; if PEFT supports this class, "
            f"{PEFT_LAYER_ALTERNATIVE}"
        )
    return kind


def adapter_tensor_shapes(module: nn.Module, name: str, config: LoraConfig) -> TensorShapes:
    """Return the shapes of an adapter's tensors for a module.

    The result is a dict that maps key suffixes to shapes. A key suffix is the part of a key in an
    adapter file that follows the module's name.

    Args:
        module: The module, with or without adapters, or the layer of an adapted parameter.
        name: The name of the module or parameter, which selects the rank.
        config: The adapter's config.
    """
    settings = adapter_settings_for(name, config)
    if isinstance(module, ParameterLoraLayer):
        rows = settings._replace(r=settings.r * module.num_matrices)
        return linear_adapter_shapes(module.in_features, module.out_features, rows)
    base = base_module_of(module)
    kind = layer_kind_of(base, config.custom_modules)
    return {} if kind is None else kind.shapes(base, settings)


def to_lora_config(peft_config: Any) -> LoraConfig:
    """Convert a PEFT config to a `LoraConfig`.

    If the argument is already a `LoraConfig`, it is returned unchanged.

    Raises:
        ConfigError: See `LoraConfig.from_peft`.
    """
    return peft_config if isinstance(peft_config, LoraConfig) else LoraConfig.from_peft(peft_config)
