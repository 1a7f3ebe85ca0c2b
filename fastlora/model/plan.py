"""What an adapter's config comes to on a model: the modules it touches, or why it does not fit."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from fastlora.layers import FastLoraLinear, LoraLayer, ModulesToSaveWrapper, ModuleWrapper
from fastlora.layers.bases import is_transposed, linear_features
from fastlora.layers.kinds import INSTEAD, Kind, Settings, Shapes, kind_of, known_kinds
from fastlora.layers.modules_to_save import check_copyable
from fastlora.layers.tied_head import TiedLoraHead
from fastlora.model.config import LoraConfig
from fastlora.model.replication import Replication, in_place, replication_for
from fastlora.model.targets import (
    find_modules_to_save,
    find_targets,
    modules_to_save_entries,
    resolve_target_modules,
)
from fastlora.model.tied import NO_TIES, SharedWeights, Ties, tie_adapters
from fastlora.model.tokens import Tokens, check_apart, find_tokens
from fastlora.model.walk import base_modules, base_of
from fastlora.routing.ids import check_adapter_name
from fastlora.validation import AdapterStateError, ConfigError, UnsupportedLayerError, error_prefix


class Target(NamedTuple):
    """A module that gets LoRA.

    Attributes:
        base: The module without adapters.
        kind: What kind of module that is.
        settings: What the adapter is to be on it.
    """

    base: nn.Module
    kind: Kind
    settings: Settings

    def shapes(self) -> Shapes:
        """Returns the shapes of what the adapter has there, by the ends of their file keys."""
        return self.kind.shapes(self.base, self.settings)


@dataclass(frozen=True)
class Plan:
    """An adapter that fits a model: its config, and the modules it touches in the model's order.

    Attributes:
        config: The adapter's.
        targets: Name of each module that gets LoRA, and what LoRA is there.
        modules_to_save: Modules that it owns a copy of.
        target_modules: What the config's field of that name means on the model.
        from_file: Whether its weights exist already.
        tokens: Modules of which it trains rows.
        tied_copies: Modules that have the input embedding's copy.
        tied_heads: Modules that have its LoRA.
        replication: The layers that it finds these modules in, where they are yet to be made.
    """

    config: LoraConfig
    targets: dict[str, Target]
    modules_to_save: list[str]
    target_modules: set[str] | str
    from_file: bool = False
    tokens: dict[str, Tokens] = field(default_factory=dict)
    tied_copies: list[str] = field(default_factory=list)
    tied_heads: list[str] = field(default_factory=list)
    replication: Replication | None = None

    @property
    def tied(self) -> list[str]:
        """Modules that have the input embedding's copy or LoRA; it is the same for all of them."""
        return [*self.tied_copies, *self.tied_heads]

    @property
    def touched(self) -> list[str]:
        """Names of all modules that it touches."""
        return [*self.targets, *self.modules_to_save, *self.tied, *self.tokens]


def plan_for(
    model: nn.Module, adapter_name: str, peft_config: Any, *, loading: bool = False
) -> Plan:
    """Returns what an adapter will touch, with a copy of its config whose targets are resolved.

    ``peft_config`` may be PEFT's own; ``loading`` says that the weights come from a file.

    Raises:
        TargetNotFoundError: The config names no module of the model.
        UnsupportedLayerError: It names one that cannot be adapted.
        ConfigError: A field or the name is wrong.
    """
    check_adapter_name(adapter_name)
    config = copy.deepcopy(own_config(peft_config))
    config.check_supported("load" if loading else "new")
    replication = replication_for(model, config.layer_replication)
    with in_place(replication):
        ties = tie_adapters(model, config)
        plan = plan_adapter(model, config, from_file=loading, ties=ties)
        plan = dataclasses.replace(plan, replication=replication)
        _warn_of_kinds(plan)
        config.target_modules = plan.target_modules
        config.fan_in_fan_out = _stores_inputs_first(plan)
    if plan.modules_to_save:
        config.modules_to_save = modules_to_save_entries(config)
    if not config.base_model_name_or_path:
        name = getattr(model, "name_or_path", None) or getattr(
            getattr(model, "config", None), "_name_or_path", None
        )
        config.base_model_name_or_path = name or None
    return plan


def _stores_inputs_first(plan: Plan) -> bool:
    """Returns ``fan_in_fan_out`` as PEFT corrects it: that of the last linear among the targets."""
    for target in reversed(plan.targets.values()):
        transposed = is_transposed(target.base)
        if transposed or isinstance(target.base, nn.Linear):
            return transposed
    return plan.config.fan_in_fan_out


def plan_adapter(
    model: nn.Module, config: LoraConfig, from_file: bool = False, ties: Ties = NO_TIES
) -> Plan:
    """Finds what a config names and checks that LoRA can go there; changes nothing.

    Raises:
        TargetNotFoundError: Nothing matches.
        UnsupportedLayerError: A target is of no kind that adapters go on, or of one that this
            config does not fit; or another adapter has LoRA, or a copy, where this one is to have a
            copy or LoRA.
    """
    modules = base_modules(model)
    meant = resolve_target_modules(model, config, modules)
    targets = find_targets(model, config, meant, modules)
    saved = find_modules_to_save(model, config)
    copies, heads = list(ties.names), list[str]()
    saved = [name for name in saved if name not in copies]
    if not ties.copies:
        # As PEFT: of what is tied, heads share the embedding's LoRA, and embeddings have their own.
        tied, copies = copies, []
        heads = [n for n in tied if not isinstance(base_of(model.get_submodule(n)), nn.Embedding)]
        targets = [name for name in targets if name not in heads]
        targets += [name for name in tied if name not in (*heads, *targets)]
        _check_tied_lora(model, config, targets, heads)
    tokens = find_tokens(model, config)
    check_apart(tokens, targets, saved, [*copies, *heads])
    if config.init.changes_base:
        _check_untied(model, config, targets)
    found = _targets(model, config, targets, from_file)
    plan = Plan(config, found, saved, meant, from_file, tokens, copies, heads)
    for name in (*plan.modules_to_save, *plan.tied_copies):
        module = model.get_submodule(name)
        if isinstance(module, ModulesToSaveWrapper):
            continue  # checked when it was made
        check_copyable(module)
        for inner, part in module.named_modules():
            if isinstance(part, LoraLayer):
                raise UnsupportedLayerError(
                    f"modules_to_save names {name!r}, which another adapter adapts with LoRA"
                )
            if isinstance(part, ModuleWrapper):
                at = f"{name}.{inner}" if inner else name
                raise UnsupportedLayerError(
                    f"modules_to_save names {name!r}, in which adapters {part.adapter_names} own "
                    f"{part.owns} of {at!r}; expected the same module"
                )
    return plan


def _targets(
    model: nn.Module, config: LoraConfig, names: Sequence[str], from_file: bool
) -> dict[str, Target]:
    """Returns what LoRA is on the modules of these names; raises as `plan_adapter`."""
    found = {}
    common, custom = _common_settings(config, from_file), config.custom_modules
    for name in names:
        base = base_of(model.get_submodule(name))
        with error_prefix(f"target module {name!r} is a {type(base).__name__}"):
            target = Target(base, _kind_for(base, custom), _settings_at(name, config, common))
            target.kind.check(base, target.settings)
        found[name] = target
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.TransformerEncoderLayer) and not isinstance(
            base, nn.MultiheadAttention
        ):
            warnings.warn(
                f"{name!r}: nn.TransformerEncoderLayer may read this weight without calling the "
                "module in evaluation; set torch.backends.mha.set_fastpath_enabled(False)",
                stacklevel=5,
            )
    return found


def _warn_of_kinds(plan: Plan) -> None:
    """Warns where a new adapter has no input to drop, or one of PEFT's computes otherwise."""
    config = plan.config
    without = [name for name, target in plan.targets.items() if not target.kind.drops]
    if without and config.lora_dropout and not plan.from_file:
        more = f" and {len(without) - 1} more targets" if len(without) > 1 else ""
        warnings.warn(
            f"lora_dropout={config.lora_dropout} does nothing on {without[0]!r}{more}, as in "
            f"PEFT: the adapter of a {type(plan.targets[without[0]].base).__name__} has no input "
            "to drop",
            stacklevel=4,
        )
    if config.peft_version and plan.from_file:
        notes = {target.kind.of_peft: name for name, target in plan.targets.items()}
        for note, name in notes.items():
            if note:
                base = plan.targets[name].base
                warnings.warn(f"{name!r} is a {type(base).__name__}: {note}", stacklevel=4)


def _check_tied_lora(
    model: nn.Module, config: LoraConfig, targets: Sequence[str], tied: Sequence[str]
) -> None:
    """Raises where LoRA is to be tied to the input embedding's and cannot, or is not and must."""
    for name in targets:
        if isinstance(model.get_submodule(name), TiedLoraHead):
            raise UnsupportedLayerError(
                f"target module {name!r} has the input embedding's LoRA for other adapters "
                "(ensure_weight_tying); expected ensure_weight_tying=True, or other targets"
            )
    for name in tied:
        module = model.get_submodule(name)
        if not isinstance(module, (nn.Linear, TiedLoraHead)) or isinstance(module, FastLoraLinear):
            raise UnsupportedLayerError(
                f"ensure_weight_tying gives {name!r} the input embedding's LoRA, and it is a "
                f"{type(module).__name__}; expected an nn.Linear without LoRA of its own"
            )
    if tied and (config.use_dora or config.init.frozen):
        raise ConfigError(
            "ensure_weight_tying=True with LoRA on the embedding needs use_dora=False and an "
            f"init_lora_weights that trains both factors, got use_dora={config.use_dora} and "
            f"init_lora_weights={config.init_lora_weights!r}"
        )


def _check_untied(model: nn.Module, config: LoraConfig, targets: Sequence[str]) -> None:
    """Raises where the initialisation would change a weight that another module has too."""
    shared = SharedWeights(model)
    for name in targets:
        module = model.get_submodule(name)
        base = base_of(module)
        other = shared.beside(base, (module, base))
        if other is not None and linear_features(base) is not None:
            raise AdapterStateError(
                f"init_lora_weights={config.init_lora_weights!r} changes the weight of target "
                f"module {name!r}, which {other!r} shares; leave it out (exclude_modules), or "
                "untie the two first"
            )


def settings_for(name: str, config: LoraConfig) -> Settings:
    """Returns what an adapter is to be on the module called ``name``."""
    return _settings_at(name, config, _common_settings(config))


def _common_settings(config: LoraConfig, from_file: bool = False) -> Settings:
    """Returns what an adapter is to be on modules that no pattern of its config names."""
    return Settings(
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


def _settings_at(name: str, config: LoraConfig, common: Settings) -> Settings:
    """Returns the common settings with the rank and alpha of the module called ``name``."""
    if not config.rank_pattern and not config.alpha_pattern:
        return common
    return common._replace(r=config.rank_for(name), lora_alpha=config.alpha_for(name))


def _kind_for(base: nn.Module, custom: Mapping[type, type]) -> Kind:
    """Returns the kind of a module; raises `UnsupportedLayerError` where it has none."""
    kind = kind_of(base, custom)
    if kind is None:
        raise UnsupportedLayerError(
            f"fastlora adapts {', '.join(known_kinds())} (Conv1D of transformers and quantised "
            "linears too), and classes of yours that LoraConfig._register_custom_module names; "
            f"where PEFT adapts it, {INSTEAD}"
        )
    return kind


def factor_shapes(module: nn.Module, name: str, config: LoraConfig) -> Shapes:
    """Returns the shapes of what an adapter has on a module, by the ends of their file keys."""
    base = base_of(module)
    kind = kind_of(base, config.custom_modules)
    return {} if kind is None else kind.shapes(base, settings_for(name, config))


def own_config(config: Any) -> LoraConfig:
    """Returns a config of either library as ours; one of ours is the same object."""
    return config if isinstance(config, LoraConfig) else LoraConfig.from_peft(config)
