"""`LoraTuner`: add, activate, freeze, merge, and delete the adapters of a model.

The class corresponds to PEFT's tuner, and is available as ``lora_model.base_model``. `LoraModel`
implements saving, loading, and calling the model.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.init import InitMethod
from fastlora.layers import LoraLayer, ModuleWrapper, TrainableTokensWrapper
from fastlora.layers.adapter_factors import ModelAdapterSource
from fastlora.layers.quantized import prevent_bitsandbytes_repacking
from fastlora.model import inject
from fastlora.model.computed_adapters import ComputedAdapter
from fastlora.model.config import LoraConfig
from fastlora.model.plan import AdapterPlan
from fastlora.model.tied_weights import SharedWeightUntier
from fastlora.model.weighted import CombinationOptions, combine_adapters
from fastlora.routing.activation_checkpointing import patch_activation_checkpointing
from fastlora.routing.block import routing_from_parameters, sample_routings_from_parameters
from fastlora.routing.ids import check_adapter_name
from fastlora.routing.routers import register_adapter_router
from fastlora.routing.routing import RoutedLayerGroup, Routing, add_to_group
from fastlora.user_warnings import warn
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    ConfigError,
    error_prefix,
    near_names,
)


class LoraTuner(nn.Module):
    """Manages the LoRA adapters of a base model.

    The tuner wraps the base model. Attributes and methods have the same names as in PEFT.

    Args:
        model: Any module. Its target modules are replaced with LoRA layers in place.

    Attributes:
        model: The base model, which contains the LoRA layers.
        peft_config: A dict that maps adapter names to configs.
        targeted_module_names: The names of the modules that adapters target, in the order in which
            they were added.

    Raises:
        AdapterStateError: If the model already contains LoRA layers.
    """

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if inject.lora_layers(model):
            raise AdapterStateError(
                "the model already has LoRA layers; use add_adapter(), or unload() it first"
            )
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.targeted_module_names: list[str] = []
        self._parameters_by_adapter: dict[str, list[str]] = {}
        self._active: list[str] = []
        # The initialization methods that changed the base weights, by adapter. The key None stands
        # for adapters that were deleted.
        self._changed_base: dict[str | None, InitMethod] = {}
        self._weight_layout_set = False
        # The layers of this model refer to the same object. Since it is a separate object, the
        # references remain correct when the model is copied or pickled.
        self.group = RoutedLayerGroup()
        patch_activation_checkpointing()
        self._routed: list[nn.Module] | None = None
        # The parameters that `disable_adapter_layers` froze.
        self._frozen: list[nn.Parameter] = []
        self.training = model.training

    @property
    def targeted_parameter_names(self) -> list[str]:
        """The names of the parameters that adapters target.

        Their modules are not in ``targeted_module_names``.
        """
        names = (name for each in self._parameters_by_adapter.values() for name in each)
        return list(dict.fromkeys(names))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model, which contains the adapters.

        In a `fastlora.adapters` block, each row is routed to its own adapter.
        """
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the base model if the tuner does not have the attribute."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The names of the active adapters.

        This property is an alias of `active_adapters`, for compatibility with PEFT.
        """
        return list(self._active)

    def add_adapter(
        self, adapter_name: str, plan: AdapterPlan, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Add an adapter to the model.

        The new adapter is frozen and inactive. As in PEFT, there is one exception: the first
        adapter that trains tokens of a tied embedding is active at once. If the new adapter is the
        model's first, the base model is frozen.

        Args:
            adapter_name: The name of the new adapter, which must not be in use.
            plan: The result of `make_adapter_plan`.
            autocast_adapter_dtype: Whether to store the factors of 16-bit base layers in fp32, as
                PEFT does.

        Raises:
            AdapterStateError: If the name is in use, if both this adapter and another adapter train
                biases of the base model, or if this adapter is loaded from a file and needs a
                change of the base weights that conflicts with the change of another adapter.
        """
        self.check_new_adapter_name(adapter_name)
        config = plan.config
        self._check_init_conflicts(adapter_name, plan)
        for name, other in self.peft_config.items():
            if config.bias != "none" and other.bias != "none":
                raise AdapterStateError(
                    f"bias={config.bias!r}: adapter {name!r} already trains the base model's "
                    "biases, which all adapters share; expected bias='none'"
                )
        before = self.modules_selecting_adapter_per_row if self.peft_config else []
        inject.add_adapter(
            self.model, adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        for module in before:
            if isinstance(module, TrainableTokensWrapper):
                # Adding an earlier adapter may have activated that adapter on this module.
                module._activate_without_making_trainable(self._active)
        self.peft_config[adapter_name] = config
        if config.init.changes_base and (config.init.must_repeat or not plan.from_file):
            self._changed_base[adapter_name] = config.init
        self._parameters_by_adapter[adapter_name] = plan.parameters
        owners = {name.rpartition(".")[0] for name in plan.parameters}
        names = [*self.targeted_module_names, *(n for n in plan.targets if n not in owners)]
        self.targeted_module_names = list(dict.fromkeys(names))
        # A new layer must belong to the model's routing group before its first forward pass,
        # because a `fastlora.adapters` block may already be open.
        model = self.model
        modules: list[Any] = [model.get_submodule(name) for name in plan.changed_module_names]
        layers = [module for module in modules if isinstance(module, LoraLayer)]
        modules += [inner for layer in layers for inner in layer.inner_layers().values()]
        for module in modules:
            if not module._active_adapters:
                module._active_adapters = list(self._active)
        if any(module.routing_group is not self.group for module in modules):
            self._find_routed()
        if len(self.peft_config) == 1:
            inject.freeze_base(self.model)
        if not config.inference_mode and not self._weight_layout_set:
            # Only once, because it walks over all modules.
            prevent_bitsandbytes_repacking(self.model)
            self._weight_layout_set = True

    def _check_init_conflicts(self, adapter_name: str, plan: AdapterPlan) -> None:
        """Check that a new adapter's initialization does not conflict with other adapters.

        Some initialization methods change the base weights, which all adapters share. An error is
        raised if loading an adapter must change the base weights, but another adapter has already
        changed them. Otherwise, a warning is emitted if an initialization method that changes the
        base weights is used in a model with several adapters. A warning is also emitted if the
        initialization of a loaded adapter changed the base weights at random, because loading
        cannot repeat this change exactly.

        Raises:
            AdapterStateError: If the adapter is loaded from a file, its initialization must be
                repeated, and another adapter has already changed the base weights.
        """
        config, init = plan.config, plan.config.init
        others = self._changed_base
        if plan.from_file and init.changes_base and init.must_repeat and others:
            by, other = self._describe_other_change_of_base(adapter_name)
            raise AdapterStateError(
                f"loading adapter {adapter_name!r} requires changing this model's base weights "
                f"({init.title}), but {by} has already changed them ({other.title}); load "
                "the base model again, or first save one of the two adapters as plain LoRA with "
                "save_pretrained(..., "
                "path_initial_model_for_weight_conversion=<folder of the untrained adapter>)"
            )
        if None in others:
            warn(
                f"a deleted adapter has changed the base weights of this model "
                f"({others[None].title}), and adapter {adapter_name!r} is added to the changed "
                "weights. To use the original weights, load the base model again",
            )
        changing = init.title if init.changes_base else ""
        changing = changing or next((other.title for other in others.values()), "")
        if changing and self.peft_config:
            warn(
                f"{changing} changes the base weights of the model and should thus not be used "
                "with other adapters. Consider converting the adapter into a normal LoRA adapter: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        if plan.from_file and init.changes_base_randomly(config.init_lora_weights):
            reason = (
                "is random: loading changes the base weights slightly differently than training did"
                if init.must_repeat
                else "changed the base weights for training, and loading does not change them"
            )
            warn(
                f"init_lora_weights={config.init_lora_weights!r} {reason}, as in PEFT. "
                "To avoid this, save the adapter with path_initial_model_for_weight_conversion",
            )

    def _describe_other_change_of_base(self, adapter_name: str) -> tuple[str, InitMethod]:
        """Describe another adapter that changed the base weights, and return its method too."""
        changes = self._changed_base.items()
        other, init = next((name, init) for name, init in changes if name != adapter_name)
        return ("a deleted adapter" if other is None else f"adapter {other!r}"), init

    def check_adapter_replaceable(
        self,
        operation: str,
        adapter_name: str,
        config: LoraConfig,
        layers_left_out: Collection[str] = (),
    ) -> None:
        """Check that a loaded adapter can be replaced with another adapter.

        The other adapter's weights replace those of the loaded adapter, which keeps its name.

        Args:
            operation: The name of the method that replaces the weights, for messages.
            adapter_name: The name of the loaded adapter.
            config: The config of the other adapter.
            layers_left_out: The names of the loaded adapter's layers that the other adapter does
                not adapt.

        Raises:
            AdapterStateError: If the adapter is merged, or if a `fastlora.adapters` block of the
                model is open.
            ConfigError: If the initialization of one of the two adapters changed the base weights,
                and the initialization of the other one did not change them in the same way, or a
                third adapter changed them too.
        """
        with error_prefix(f"adapter {adapter_name!r} is already loaded"):
            self.group.check_no_open_blocks(operation)
        modules = inject.modules_with_adapters(self.model)
        if any(adapter_name in module.merged_adapters for _, module in modules):
            raise AdapterStateError(
                f"{operation} cannot replace adapter {adapter_name!r} because it is currently "
                "merged into the base weights; call unmerge_adapter() first"
            )
        if adapter_name in self._changed_base:
            self._check_same_base_change(adapter_name, config, layers_left_out)
        else:
            config.check_plain(f"an adapter that replaces {adapter_name!r}")

    def _check_same_base_change(
        self, adapter_name: str, config: LoraConfig, layers_left_out: Collection[str]
    ) -> None:
        """Check that another adapter's initialization changes the base weights in the same way.

        The initialization of the loaded adapter has changed the base weights. See
        `check_adapter_replaceable`.
        """
        loaded, init = self.peft_config[adapter_name], self._changed_base[adapter_name]
        if len(self._changed_base) > 1:
            by, other = self._describe_other_change_of_base(adapter_name)
            raise ConfigError(
                f"the initialization of adapter {adapter_name!r} ({init.title}) changed the base "
                f"weights, and so did that of {by} ({other.title}), so no file can replace the "
                "adapter. Load the base model again, and load the new adapter into it"
            )
        differing = [*layers_left_out]
        differing += [
            name
            for name, layer in inject.lora_layers(self.model).items()
            if adapter_name in layer.r
            and (
                config.rank_for(name) != loaded.rank_for(name)
                or not math.isclose(config.scaling_for(name), loaded.scaling_for(name))
            )
        ]
        old, new = (str(each.init_lora_weights).lower() for each in (loaded, config))
        if config.init is not init or old != new or config.init_config != loaded.init_config:
            what = f"init_lora_weights={config.init_lora_weights!r} or its settings"
        elif differing:
            what = f"the rank or scaling for {differing[0]!r}"
        else:
            return
        raise ConfigError(
            f"the initialization of adapter {adapter_name!r} ({init.title}) changed the base "
            "weights, so only an adapter with the same initialization, layers, ranks, and scalings "
            f"can replace it; the new adapter differs in {what}. Load the base model again, and "
            "load the new adapter into it"
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapters.

        All other adapters are deactivated. The active adapters are made trainable, and the others
        are frozen. If an adapter's config selects biases of the base model, these biases are
        trainable whenever the adapter's factors are.

        Args:
            adapter_name: The name of an adapter, or a list of names. The updates of several
                adapters are added.
            inference_mode: Whether to freeze the active adapters too.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If two of the adapters own a copy, or trained rows, of the same
                module.
        """
        names = self._checked_adapter_names(adapter_name)
        for _, wrapper in inject.modules_with_adapters(self.model) if len(names) > 1 else ():
            owners = inject.existing_adapter_names(wrapper, names) or []
            if len(owners) > 1 and isinstance(wrapper, ModuleWrapper):
                raise AdapterStateError(  # the second sentence begins as in PEFT
                    f"adapters {owners} train their own {wrapper.owns} of the same module "
                    f"({wrapper.field}). Only one adapter can be set at a time for "
                    f"{type(wrapper).__name__}"
                )
        self._activate(names, inference_mode)

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        self._active, self._frozen = list(dict.fromkeys(names)), []
        for _, module in inject.modules_with_adapters(self.model):
            module._activate(self._active, inference_mode, keep_merged)
        for name in self.peft_config:
            for bias in self._selected_base_biases(name):
                bias.requires_grad_(name in self._active and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter.

        If the adapter was the only active one, another becomes active. Other adapters that are
        merged stay merged.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If the adapter is merged, or if a `fastlora.adapters` block of the
                model is open.
        """
        self.group.check_no_open_blocks("delete_adapter")
        if adapter_name not in self.peft_config:
            known = list(self.peft_config)
            raise AdapterNotFoundError(
                f"Adapter {adapter_name} does not exist; the loaded adapters are {known}"
                f"{near_names(adapter_name, known)}"
            )
        self._delete_adapter(adapter_name)
        if inject.remove_wrappers_without_adapters(self.model):
            self._find_routed()

    def _delete_adapter(self, adapter_name: str) -> None:
        biases = self._selected_base_biases(adapter_name) if adapter_name in self._active else []
        inject.delete_adapter(self.model, adapter_name)
        for bias in biases:
            bias.requires_grad_(False)
        del self.peft_config[adapter_name]
        self._parameters_by_adapter.pop(adapter_name, None)
        init = self._changed_base.pop(adapter_name, None)
        if init is not None:
            self._changed_base[None] = init
            warn(
                f"the base weights keep the change that the initialization of the deleted adapter "
                f"{adapter_name!r} made to them ({init.title}). To use the original weights, load "
                "the base model again",
            )
        left = {n for n, m in inject.modules_with_adapters(self.model) if getattr(m, "r", None)}
        self.targeted_module_names = [n for n in self.targeted_module_names if n in left]
        if adapter_name in self._active:
            self._active.remove(adapter_name)
            if not self._active and self.peft_config:
                self._activate([next(iter(self.peft_config))], keep_merged=True)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Add an adapter that is a weighted sum of other adapters.

        The new adapter is frozen and inactive.

        Args:
            adapters: The names of the adapters to add. A name may occur more than once. If there is
                only one name, the combination type ``"linear"`` is used.
            weights: A list with one number for each name. Negative numbers are allowed.
            adapter_name: The name of the new adapter.
            combination_type: How to combine the adapters. ``"cat"`` adds the updates
                ``lora_b @ lora_a`` exactly; the rank of the result is the sum of the ranks.
                ``"svd"`` adds the updates and returns the best approximation of rank ``svd_rank``.
                ``"linear"`` adds ``lora_a`` and ``lora_b`` separately, which is a rough
                approximation and requires equal ranks. ``"ties"``, ``"dare_linear"``,
                ``"dare_ties"``, and ``"magnitude_prune"`` do the same after setting some values to
                zero (see `fastlora.algebra.combine`). With the suffix ``"_svd"``, these four types
                operate on the updates instead of the factors.
            svd_rank: The rank of the result, for types that end in ``"svd"``. With None, it is the
                largest rank of the adapters.
            svd_clamp: For types that end in ``"svd"``, the quantile of the factors' values that the
                values are clamped to. With None, they are not clamped.
            svd_full_matrices: Ignored, since it does not affect the result.
            svd_driver: The cuSOLVER driver for models on a GPU. See `torch.linalg.svd`.
            density: The fraction of values to keep, in (0, 1], for types that set values to zero.
            majority_sign_method: How TIES elects signs: ``"total"`` by the sum of the values, or
                ``"frequency"`` by the number of values with each sign.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If the new name is in use; if an adapter uses DoRA, has trained
                tokens, is on the meta device, or has values that are not finite; if two adapters
                own a copy of the same module; if only some of the adapters tie a head to the input
                embedding; or if factors are sharded.
            ConfigError: If another argument is invalid; if the ranks differ and the type requires
                equal ranks; if some adapters specify ``target_modules`` as a string and others as a
                list; or if the initialization of an adapter changed the base weights (PiSSA, OLoRA,
                CorDA, or LoftQ).
            UnsupportedLayerError: If a layer is a grouped convolution and the type adds updates.
                The model is unchanged after any of these errors.
        """
        names = self._checked_adapter_names(adapters)
        for name in names:
            self.check_adapter_has_values(name)
        self.check_new_adapter_name(adapter_name)
        options = CombinationOptions(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method
        )
        configs = {name: self.peft_config[name] for name in names}
        self.add_computed_adapter(
            adapter_name, combine_adapters(self.model, configs, names, weights, options)
        )

    def add_computed_adapter(self, adapter_name: str, computed: ComputedAdapter) -> None:
        """Add an adapter with weights that have already been computed.

        The weights were computed from those of other adapters. The new adapter is frozen and
        inactive. If an error is raised, the adapter is not added.

        Args:
            adapter_name: The name of the new adapter, which must not be in use.
            computed: The computed adapter.
        """
        self.add_adapter(adapter_name, computed.plan, autocast_adapter_dtype=computed.wide)
        try:
            computed.copy_into_adapter(self.model, adapter_name)
        except BaseException:
            self._delete_adapter(adapter_name)  # also in an open `fastlora.adapters` block
            raise

    def check_new_adapter_name(self, adapter_name: str) -> None:
        """Check that ``adapter_name`` is a valid name and is not in use.

        Raises:
            ConfigError: If the name is invalid.
            AdapterStateError: If the name is in use.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise AdapterStateError(f"adapter {adapter_name!r} already exists")

    def enable_adapter_layers(self) -> None:
        """Re-enable the adapters after a call to `disable_adapter_layers`."""
        self._unfreeze(self._frozen)
        self._frozen = []
        self._set_disabled(False)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters.

        The outputs are then those of the base model. The adapters are also frozen. Merged adapters
        are unmerged.

        Raises:
            AdapterStateError: If a `fastlora.adapters` block of the model is open.
        """
        self.group.check_no_open_blocks("disable_adapter_layers")
        if any(module.merged for _, module in inject.modules_with_adapters(self.model)):
            self.unmerge_adapter()
        if not self._frozen:
            self._frozen = self._freeze_adapters()
        self._set_disabled(True)

    def _set_disabled(self, disabled: bool) -> None:
        for _, module in inject.modules_with_adapters(self.model):
            module._disabled = disabled

    @property
    def disabled(self) -> bool:
        """Whether the adapters are disabled.

        The value is False if the adapters are disabled on only some layers.
        """
        return all(module._disabled for _, module in inject.modules_with_adapters(self.model))

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Make adapters trainable, or freeze them.

        The adapters need not be active. Other adapters are not affected. If an adapter is active
        and trains biases of the base model, these biases are made trainable or frozen together with
        the adapter. If it is inactive, the biases stay frozen, because they take effect in every
        forward pass.

        Args:
            adapter_names: The name of an adapter, or a list of names.
            requires_grad: Whether to make the adapters trainable. If False, they are frozen.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
        """
        for parameter in self._trainable_parameters(self._checked_adapter_names(adapter_names)):
            parameter.requires_grad_(requires_grad)

    def _selected_base_biases(self, name: str) -> list[nn.Parameter]:
        """Return a list of the base-model biases that an adapter's config selects."""
        found = inject.base_biases_trained_by(self.model, name, self.peft_config[name].bias)
        return list(found.values())

    def _trainable_parameters(self, names: Collection[str]) -> list[nn.Parameter]:
        """Return the trainable parameters of the given adapters.

        The result contains the adapters' own parameters and, for active adapters, the biases of the
        base model that their configs select. Parameters of these kinds are included even if they
        are currently frozen.
        """
        owned = [
            parameter
            for _, module in inject.modules_with_adapters(self.model)
            for name in names
            for parameter in module.adapter_parameters(name)
        ]
        biases = [
            bias
            for name in names
            if name in self._active
            for bias in self._selected_base_biases(name)
        ]
        return list({id(parameter): parameter for parameter in (*owned, *biases)}.values())

    def _freeze_adapters(self) -> list[nn.Parameter]:
        """Freeze all trainable adapter parameters, and return a list of them.

        These include the biases of the base model that active adapters train.
        """
        trained = [p for p in self._trainable_parameters(self.peft_config) if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        return trained

    def _unfreeze(self, frozen: Collection[nn.Parameter]) -> None:
        """Unfreeze parameters that were frozen.

        ``frozen`` is a list that `_freeze_adapters` returned. Parameters that the adapters cannot
        train in the current state stay frozen.
        """
        trainable = {id(parameter) for parameter in self._trainable_parameters(self.peft_config)}
        for parameter in frozen:
            if id(parameter) in trainable:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Disable all adapters for the duration of a ``with`` block.

        The adapters are also frozen, as are biases of the base model that an adapter has trained.
        These biases keep their values. On exit, the previous state is restored. If adapters were
        disabled on only some layers before, a warning is emitted and they are enabled on all
        layers.
        """
        layers = inject.lora_layers(self.model).values()
        irregular = len({layer._disabled for layer in layers}) > 1
        if irregular:
            warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. After disable_adapter(), all of them are enabled",
            )
        with contextlib.ExitStack() as stack:
            if irregular:
                stack.callback(self._set_disabled, False)
            for _, module in inject.modules_with_adapters(self.model):
                stack.enter_context(module.disable_adapter())
            active, frozen = self._active, self._freeze_adapters()
            try:
                yield
            finally:
                # If `set_adapter` was called in the block, its result must not be overwritten.
                if self._active is active:
                    self._unfreeze(frozen)

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Create the routing for a `fastlora.adapters` block.

        The routing assigns an adapter to each row of a batch.

        Args:
            ids, seeds, validate: See `fastlora.adapters`.
            held: See `fastlora.routing.routers.AdapterRouter.routing`.
        """
        # `held` is unused: adapters stored as parameters need no resources for the block.
        return routing_from_parameters(
            self.group,
            self.modules_selecting_adapter_per_row,
            tuple(self.peft_config),
            ModelAdapterSource,
            ids,
            seeds,
            validate,
        )

    def sample_routings(self, adapters: int | None, ranks: Sequence[int] | None) -> list[Routing]:
        """Return example routings for the given number of adapters and the given ranks.

        `warm_up` uses the routings to determine which kernels to compile. ``adapters`` is the
        largest number of adapters in a batch. See
        `fastlora.routing.routers.AdapterRouter.sample_routings`.
        """
        known = tuple(self.peft_config)
        layers = self.modules_selecting_adapter_per_row
        return sample_routings_from_parameters(
            self.group, layers, known, ModelAdapterSource, adapters, ranks
        )

    @property
    def modules_selecting_adapter_per_row(self) -> list[Any]:
        """The modules that select an adapter for each row of a mixed batch.

        These are all modules that contain adapters. See
        `fastlora.model.inject.modules_with_adapters`.
        """
        found = self._routed
        # A copied model does not have row checks yet, so they must be set up first.
        return self._find_routed() if found is None or self.group.row_checks is None else found

    def _find_routed(self) -> list[nn.Module]:
        found = inject.modules_with_adapters(self.model)
        add_to_group(self.group, self.model, found)
        self._routed = [module for _, module in found]
        return self._routed

    def check_adapter_loaded(self, name: str) -> None:
        """Raise `AdapterNotFoundError` if no adapter with the given name is loaded."""
        if name not in self.peft_config:
            raise AdapterNotFoundError(
                f"there is no adapter named {name!r}; the loaded adapters are "
                f"{list(self.peft_config)}{near_names(name, self.peft_config)}"
            )

    def check_adapter_has_values(self, name: str) -> None:
        """Check that an adapter is loaded and that its parameters have values.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If a parameter of the adapter is on the meta device.
        """
        self.check_adapter_loaded(name)
        for _, module in inject.modules_with_adapters(self.model):
            if any(parameter.is_meta for parameter in module.adapter_parameters(name)):
                raise AdapterStateError(
                    f"adapter {name!r} is on the meta device (low_cpu_mem_usage=True) and has no "
                    "values yet; first load weights into it with load_adapter()"
                )

    def merge_adapter(
        self,
        adapter_names: str | list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep_base: bool = True,
    ) -> None:
        """Merge adapters into the base weights.

        To undo the merge, call `unmerge_adapter`.

        Args:
            adapter_names: The adapters to merge. With None, the active adapters are merged.
            safe_merge: Whether to raise an error if merged weights are not finite.
            keep_base: Whether to store the base weights from before the merge, so that unmerging is
                exact. See `LoraLayer.merge`.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If adapters are disabled, if a target shares its weight with another
                module, if a `fastlora.adapters` block of the model is open, if an adapter is on the
                meta device, or if a layer cannot merge an adapter in its current state.
            UnsupportedLayerError: If a layer does not support merging. The model is unchanged after
                any of these errors.
        """
        self.group.check_no_open_blocks("merge_adapter")
        wanted = self._names_to_merge(adapter_names)
        layers = dict(inject.modules_with_adapters(self.model))
        if any(layer._disabled for layer in layers.values()):
            raise AdapterStateError(
                "adapters are disabled, but merged adapters would still take effect; call "
                "enable_adapter_layers() first"
            )
        shared = SharedWeightUntier(self.model)
        chosen = {
            name: inject.existing_adapter_names(layer, wanted) for name, layer in layers.items()
        }
        anything = False
        for name, layer in layers.items():
            merges = layer.check_merge(safe_merge, chosen[name])
            anything = anything or bool(merges)
            tied = shared.other_module_sharing_weight(name, layer) if merges else None
            if tied is not None:
                raise AdapterStateError(
                    f"target module {name!r} shares its weight with {tied!r}, so merging would "
                    "change both; use merge_and_unload(), which gives the target its own weight"
                )
        if not anything and any(layer.merged for layer in layers.values()):
            warn("All adapters are already merged, nothing to do")
        for name, layer in layers.items():
            layer.merge(adapter_names=chosen[name], keep_base=keep_base)
        inject.warn_of_requantization_errors(
            {name: layer.merge_error for name, layer in layers.items()}
        )

    def unmerge_adapter(self) -> None:
        """Remove all merged adapters from the base weights.

        Raises:
            AdapterStateError: If a layer cannot unmerge a DoRA adapter. See `LoraLayer.unmerge`.
                The model is unchanged in this case.
        """
        modules = [module for _, module in inject.modules_with_adapters(self.model)]
        for module in modules:
            if isinstance(module, LoraLayer):
                module._check_unmerge()
        for module in modules:
            module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | list[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merge adapters into the base weights, and return the base model without LoRA layers.

        A quantized weight is quantized again after the merge, and a single warning reports the
        error. With ``dequantize``, the only error is that of rounding to the dtype of the weight.

        Args:
            progressbar: Whether to show a progress bar, if tqdm is installed.
            safe_merge: Whether to raise an error if merged weights are not finite.
            adapter_names: The adapters to merge. With None, the active adapters are merged.
            dequantize: Whether to replace every quantized linear layer of the model with a plain
                linear layer. The layers are converted one at a time, to the dtype of the parameters
                that are not quantized.

        Raises:
            AdapterNotFoundError: If there is no such adapter.
            AdapterStateError: If a `fastlora.adapters` block of the model is open, if an adapter is
                on the meta device, or if a layer cannot merge an adapter in its current state.
            UnsupportedLayerError: If a layer does not support merging. The model is unchanged after
                any of these errors.
        """
        self.group.check_no_open_blocks("merge_and_unload")
        return inject.unload(
            self.model,
            merge=True,
            safe_merge=safe_merge,
            adapter_names=self._names_to_merge(adapter_names),
            progressbar=progressbar,
            dequantize=dequantize,
        )

    def unload(self, *, dequantize: bool = False) -> nn.Module:
        """Remove the adapters from the model, and return the base model.

        The base layers replace the LoRA layers, and the adapters are not merged. As in PEFT,
        adapters that were already merged with `merge_adapter` stay in the weights, and a module in
        ``modules_to_save`` is replaced with the active adapter's copy. To get the original base
        weights, call `unmerge_adapter` first.

        Args:
            dequantize: See `merge_and_unload`.

        Raises:
            AdapterStateError: If a `fastlora.adapters` block of the model is open.
            UnsupportedLayerError: If a layer's weight is computed from other parameters. The model
                is unchanged after any of these errors.
        """
        self.group.check_no_open_blocks("unload")
        return inject.unload(self.model, merge=False, dequantize=dequantize)

    def _names_to_merge(self, names: str | Sequence[str] | None) -> list[str] | None:
        """Check that adapters can be merged, and return their names as a list.

        None, which stands for the active adapters, is returned unchanged.

        Raises:
            AdapterNotFoundError: If one of the adapters is not loaded.
            AdapterStateError: If one of the adapters is on the meta device.
        """
        chosen = None if names is None else self._checked_adapter_names(names)
        for name in self._active if chosen is None else chosen:
            self.check_adapter_has_values(name)
        return chosen

    def _checked_adapter_names(self, names: str | Sequence[str]) -> list[str]:
        """Check that adapters are loaded, and return their names as a list.

        Raises:
            AdapterNotFoundError: If one of the adapters is not loaded.
        """
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            self.check_adapter_loaded(name)
        return chosen


def tuner_of(model: object) -> LoraTuner | None:
    """Return the tuner of a `LoraModel`.

    The result is None for any other object.
    """
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, LoraTuner) else None


@register_adapter_router
def _router(model: Any) -> LoraTuner | None:
    return tuner_of(model)
