"""`LoraTuner`: the adapters of a whole model; which act, which train, merging.

It is what PEFT calls the tuner and what users reach as ``lora_model.base_model``. Files and the
model's own calls are `fastlora.model`'s.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.init import Init
from fastlora.layers import ModuleWrapper, TrainableTokensWrapper
from fastlora.layers.factors import Parameters
from fastlora.layers.quantised import keep_layout
from fastlora.model import inject
from fastlora.model.computed import Made
from fastlora.model.config import LoraConfig
from fastlora.model.plan import Plan
from fastlora.model.tied import SharedWeights
from fastlora.model.weighted import Combination, combined
from fastlora.routing.block import parameters_routing
from fastlora.routing.ids import check_adapter_name
from fastlora.routing.routers import register_router
from fastlora.routing.routing import Group, Routing, join_group
from fastlora.validation import (
    AdapterNotFoundError,
    AdapterStateError,
    error_prefix,
    near_names,
)


class LoraTuner(nn.Module):
    """Holds a model and its adapters. Attribute and method names are PEFT's.

    Args:
        model: Any module; LoRA layers replace its target modules in place.

    Attributes:
        model: The model, with the LoRA layers in it.
        peft_config: Adapter name to config.
        targeted_module_names: Modules that adapters have LoRA on, in the order of being added.
        targeted_parameter_names: Always empty: LoRA on single parameters is not supported.
    """

    prefix = "lora_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if inject.lora_layers(model):
            raise AdapterStateError(
                "the model has LoRA layers already; use add_adapter(), or unload() it first"
            )
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self._active: list[str] = []
        self._changed_base: dict[str, Init] = {}
        self._keeps_layout = False
        # Known to this model's layers; an object of its own stays theirs in copies and pickles.
        self.group = Group()
        self._routed: list[nn.Module] | None = None
        # What `disable_adapter_layers` has frozen.
        self._frozen: list[nn.Parameter] = []
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Finds what is not here on the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that act."""
        return list(self._active)

    @property
    def active_adapter(self) -> list[str]:
        """The same, under PEFT's other name."""
        return list(self._active)

    def add_adapter(
        self, adapter_name: str, plan: Plan, *, autocast_adapter_dtype: bool = True
    ) -> None:
        """Adds an adapter, frozen and not active; the first one freezes the base model.

        Args:
            adapter_name: A new name.
            plan: From `plan_for`.
            autocast_adapter_dtype: Keep factors of 16-bit base layers in fp32, as PEFT does.

        Raises:
            AdapterStateError: The name exists, or another adapter trains biases too, or has
                changed base weights that this one is to be loaded beside.
        """
        self.check_new(adapter_name)
        config = plan.config
        self._check_base_changes(adapter_name, plan)
        for name, other in self.peft_config.items():
            if config.bias != "none" and other.bias != "none":
                raise AdapterStateError(
                    f"bias={config.bias!r}: adapter {name!r} trains the base model's biases "
                    "already, which all adapters share; expected bias='none'"
                )
        before = self.routed if self.peft_config else []
        inject.add_adapter(
            self.model, adapter_name, plan, autocast_adapter_dtype=autocast_adapter_dtype
        )
        for module in before:
            if isinstance(module, TrainableTokensWrapper):
                module._act_as(self._active)  # what an earlier call has activated at once
        self.peft_config[adapter_name] = config
        if config.init.changes_base:
            self._changed_base[adapter_name] = config.init
        names = dict.fromkeys((*self.targeted_module_names, *plan.targets))
        self.targeted_module_names = list(names)
        # A layer that is new must know at once whose block may be open around its first forward.
        model = self.model
        modules: list[Any] = [model.get_submodule(name) for name in plan.touched]
        for module in modules:
            if not module._active_adapters:
                module._active_adapters = list(self._active)
        if any(module.routed_by is not self.group for module in modules):
            self._find_routed()
        if len(self.peft_config) == 1:
            inject.freeze_base(self.model)
        if not config.inference_mode and not self._keeps_layout:
            keep_layout(self.model)  # once: it walks over all modules
            self._keeps_layout = True

    def _check_base_changes(self, adapter_name: str, plan: Plan) -> None:
        """Warns, or raises, where the initialisation of one adapter is in the way of another."""
        config, init = plan.config, plan.config.init
        others = self._changed_base
        if plan.from_file and init.changes_base and init.must_repeat and others:
            other = next(iter(others))
            raise AdapterStateError(
                f"adapter {adapter_name!r} was trained on base weights that {init.title} had "
                f"changed, and adapter {other!r} has changed them in its own way "
                f"({others[other].title}); save one of them as plain LoRA first, with "
                "save_pretrained(..., path_initial_model_for_weight_conversion=<folder of the "
                "untrained adapter>)"
            )
        changing = init.title if init.changes_base else ""
        changing = changing or next((other.title for other in others.values()), "")
        if changing and self.peft_config:
            warnings.warn(
                f"{changing} changes the base weights of the model and should thus not be used "
                "with other adapters. Consider converting the adapter into a normal LoRA adapter: "
                "save_pretrained(..., path_initial_model_for_weight_conversion=...)",
                stacklevel=4,
            )
        if plan.from_file and init.is_random(config.init_lora_weights):
            why = (
                "is random: loading changes the base weights a little differently than training did"
                if init.must_repeat
                else "changed the base weights in training, and loading leaves them as they are"
            )
            warnings.warn(
                f"init_lora_weights={config.init_lora_weights!r} {why}, as in PEFT. Save such an "
                "adapter with path_initial_model_for_weight_conversion instead",
                stacklevel=4,
            )

    def check_replaces(self, operation: str, adapter_name: str, config: LoraConfig) -> None:
        """Raises where an operation cannot put another adapter's weights in an adapter's place.

        Args:
            operation: The method that replaces the weights.
            adapter_name: The loaded adapter.
            config: Of the other adapter.

        Raises:
            AdapterStateError: A `fastlora.adapters` block of the model is open.
            ConfigError: The weights were trained on base weights that their start had changed, and
                this adapter's start has not.
        """
        with error_prefix(f"adapter {adapter_name!r} is loaded already"):
            self.group.check_closed(operation)
        if adapter_name not in self._changed_base:
            config.check_plain(f"an adapter that takes the place of {adapter_name!r}")

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Makes these adapters act, and of all adapters them alone trainable.

        The base biases that an adapter's config asks for train exactly while its factors do.

        Args:
            adapter_name: One name, or several whose updates add up.
            inference_mode: Leave all of them frozen.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            AdapterStateError: Two of them own a copy of the same module.
        """
        names = self._known(adapter_name)
        for _, wrapper in inject.routed_modules(self.model) if len(names) > 1 else ():
            owners = inject.present(wrapper, names) or []
            if len(owners) > 1 and isinstance(wrapper, ModuleWrapper):
                raise AdapterStateError(
                    f"adapters {owners} each own {wrapper.owns} of one module ({wrapper.field}); "
                    f"Only one adapter can be set at a time for {type(wrapper).__name__}"
                )
        self._activate(names, inference_mode)

    def _activate(
        self, names: list[str], inference_mode: bool = False, keep_merged: bool = False
    ) -> None:
        self._active, self._frozen = list(dict.fromkeys(names)), []
        for _, module in inject.routed_modules(self.model):
            module._activate(self._active, inference_mode, keep_merged)
        for name in self.peft_config:
            for bias in self._biases(name):
                bias.requires_grad_(name in self._active and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter; where it was the only active one, another takes its place.

        Other adapters that are merged stay merged.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            AdapterStateError: It is merged, or a `fastlora.adapters` block of the model is open.
        """
        self.group.check_closed("delete_adapter")
        if adapter_name not in self.peft_config:
            known = list(self.peft_config)
            raise AdapterNotFoundError(
                f"Adapter {adapter_name} does not exist; loaded are {known}"
                f"{near_names(adapter_name, known)}"
            )
        biases = self._biases(adapter_name) if adapter_name in self._active else []
        inject.delete_adapter(self.model, adapter_name)
        for bias in biases:
            bias.requires_grad_(False)
        del self.peft_config[adapter_name]
        self._changed_base.pop(adapter_name, None)
        left = {n for n, m in inject.routed_modules(self.model) if getattr(m, "r", None)}
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
        """Adds an adapter that is the weighted sum of others, frozen and not active.

        Args:
            adapters: Names of the adapters to add. A name may come more than once. For a list of
                one name, ``"linear"`` is used.
            weights: A number for each, negative ones too.
            adapter_name: Name of the sum.
            combination_type: ``"svd"`` and ``"cat"`` add the updates ``lora_b @ lora_a``: the first
                in the best approximation of its rank, the second exactly, with the sum of the
                ranks. ``"linear"`` adds lora_a and lora_b each, which is rough, and needs equal
                ranks; ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"`` do
                so after leaving out values (see `fastlora.algebra.combine`). With ``"_svd"`` behind
                them these four treat the updates in place of the factors.
            svd_rank: Rank of the sum, where the type ends in svd; None for the largest of theirs.
            svd_clamp: Quantile of the factors' values that they are clamped to.
            svd_full_matrices: Without effect: the values are the same either way.
            svd_driver: Of cuSOLVER, for models on a GPU; see `torch.linalg.svd`.
            density: Share of values that types which leave out values keep, in (0, 1].
            majority_sign_method: What elects signs in TIES: ``"total"`` of values, or
                ``"frequency"``.

        Raises:
            AdapterNotFoundError: There is no such adapter.
            AdapterStateError: The name exists; an adapter uses DoRA, has trained tokens, or values
                that are not finite; two of them own a copy of one module; or factors are sharded.
            ConfigError: Another argument is wrong, or ranks differ where they must not.
            UnsupportedLayerError: A grouped convolution, and a type that adds updates.
                Nothing has changed then.
        """
        names = self._known(adapters)
        self.check_new(adapter_name)
        how = Combination(
            combination_type, svd_rank, svd_clamp, svd_driver, density, majority_sign_method
        )
        configs = {name: self.peft_config[name] for name in names}
        self.add_computed(adapter_name, combined(self.model, configs, names, weights, how))

    def add_computed(self, adapter_name: str, made: Made) -> None:
        """Adds an adapter with the factors that were computed for it, frozen and not active."""
        self.add_adapter(adapter_name, made.plan, autocast_adapter_dtype=made.wide)
        made.fill(self.model, adapter_name)

    def check_new(self, adapter_name: str) -> None:
        """Raises unless an adapter can have that name."""
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise AdapterStateError(f"adapter {adapter_name!r} exists already")

    def enable_adapter_layers(self) -> None:
        """Undoes `disable_adapter_layers`."""
        self._thaw(self._frozen)
        self._frozen = []
        self._set_disabled(False)

    def disable_adapter_layers(self) -> None:
        """Makes the model its base model; merged adapters are unmerged.

        Raises:
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        self.group.check_closed("disable_adapter_layers")
        if any(module.merged for _, module in inject.routed_modules(self.model)):
            self.unmerge_adapter()
        if not self._frozen:
            self._frozen = self._freeze_adapters()
        self._set_disabled(True)

    def _set_disabled(self, disabled: bool) -> None:
        for _, module in inject.routed_modules(self.model):
            module._disabled = disabled

    @property
    def disabled(self) -> bool:
        """Whether the model is its base model now, on every layer."""
        return all(module._disabled for _, module in inject.routed_modules(self.model))

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Has adapters train, or freezes them, whether they act or not; leaves others alone.

        Base biases follow an adapter that is active. They act in every forward, so those of an
        inactive adapter stay frozen.

        Raises:
            AdapterNotFoundError: There is no such adapter.
        """
        for parameter in self._trainable(self._known(adapter_names)):
            parameter.requires_grad_(requires_grad)

    def _biases(self, name: str) -> list[nn.Parameter]:
        """Returns the base biases that an adapter's config asks for."""
        found = inject.adapter_biases(self.model, name, self.peft_config[name].bias)
        return list(found.values())

    def _trainable(self, names: Collection[str]) -> list[nn.Parameter]:
        """Returns what adapters can train now: what they own, and base biases of active ones."""
        owned = [
            parameter
            for _, module in inject.routed_modules(self.model)
            for name in names
            for parameter in module.adapter_parameters(name)
        ]
        biases = [bias for name in names if name in self._active for bias in self._biases(name)]
        return list({id(parameter): parameter for parameter in (*owned, *biases)}.values())

    def _freeze_adapters(self) -> list[nn.Parameter]:
        """Freezes what the adapters train, and returns it."""
        trained = [p for p in self._trainable(self.peft_config) if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        return trained

    def _thaw(self, frozen: Collection[nn.Parameter]) -> None:
        """Has what `_freeze_adapters` returned train again, as far as adapters can train it now."""
        trainable = {id(parameter) for parameter in self._trainable(self.peft_config)}
        for parameter in frozen:
            if id(parameter) in trainable:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within the block the model is its base model, and none of its adapters train.

        Base biases keep the values that an adapter has given them, and are frozen with it.
        """
        layers = inject.lora_layers(self.model).values()
        irregular = len({layer._disabled for layer in layers}) > 1
        if irregular:
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are "
                "disabled. After disable_adapter() all are enabled",
                stacklevel=3,
            )
        with contextlib.ExitStack() as stack:
            if irregular:
                stack.callback(self._set_disabled, False)
            for _, module in inject.routed_modules(self.model):
                stack.enter_context(module.disable_adapter())
            active, frozen = self._active, self._freeze_adapters()
            try:
                yield
            finally:
                # Where other adapters were set active meanwhile, these are to train.
                if self._active is active:
                    self._thaw(frozen)

    def routing(
        self,
        ids: Sequence[str | None] | torch.Tensor,
        seeds: Mapping[str, int] | None,
        validate: bool,
        held: contextlib.ExitStack,
    ) -> Routing:
        """Returns the routing of a `fastlora.adapters` block."""
        return parameters_routing(
            self.group, self.routed, tuple(self.peft_config), Parameters, ids, seeds, validate
        )

    @property
    def routed(self) -> list[Any]:
        """The modules whose adapters a mixed batch chooses by row."""
        found = self._routed
        # A copied model has no row checks yet.
        return self._find_routed() if found is None or self.group.row_checks is None else found

    def _find_routed(self) -> list[nn.Module]:
        found = inject.routed_modules(self.model)
        join_group(self.group, self.model, found)
        self._routed = [module for _, module in found]
        return self._routed

    def check_known(self, name: str) -> None:
        """Raises `AdapterNotFoundError` unless an adapter of that name is loaded."""
        if name not in self.peft_config:
            raise AdapterNotFoundError(
                f"no adapter {name!r}; loaded are {list(self.peft_config)}"
                f"{near_names(name, self.peft_config)}"
            )

    def merge_adapter(
        self,
        adapter_names: str | list[str] | None = None,
        safe_merge: bool = False,
        *,
        keep_base: bool = True,
    ) -> None:
        """Merges adapters into the base weights until `unmerge_adapter`; see `LoraLayer.merge`.

        Raises:
            AdapterNotFoundError, AdapterStateError, UnsupportedLayerError: Nothing has changed. A
                `fastlora.adapters` block of the model that is open is an `AdapterStateError`.
        """
        self.group.check_closed("merge_adapter")
        wanted = None if adapter_names is None else self._known(adapter_names)
        layers = dict(inject.routed_modules(self.model))
        if any(layer._disabled for layer in layers.values()):
            raise AdapterStateError(
                "adapters are disabled, and merged ones would act; call enable_adapter_layers() "
                "first"
            )
        shared = SharedWeights(self.model)
        chosen = {name: inject.present(layer, wanted) for name, layer in layers.items()}
        anything = False
        for layer, names in zip(layers.values(), chosen.values(), strict=True):
            merges = layer.check_merge(safe_merge, names)
            anything = anything or bool(merges)
            tied = shared.other(layer) if merges else None
            if tied:
                raise AdapterStateError(
                    f"a target shares its weight with {tied}, which merging would change too; "
                    "merge_and_unload() gives it its own"
                )
        if not anything and any(layer.merged for layer in layers.values()):
            warnings.warn("All adapters are already merged, nothing to do", stacklevel=2)
        for name, layer in layers.items():
            layer.merge(adapter_names=chosen[name], keep_base=keep_base)
        inject.tell_merge_errors({name: layer.merge_error for name, layer in layers.items()})

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the base weights again."""
        for _, module in inject.routed_modules(self.model):
            module.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: str | list[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """Merges adapters into the base weights and returns the bare model.

        A quantised weight is rounded again, and one warning says what that loses; with
        ``dequantize`` nothing is lost but the rounding of the dtype.

        Args:
            progressbar: Show one, where tqdm is installed.
            safe_merge: Refuse weights that are not finite.
            adapter_names: Which; None for the active ones.
            dequantize: Make every quantised linear of the model a plain one, in the dtype of what
                is not quantised; layer by layer.

        Raises:
            AdapterNotFoundError, AdapterStateError, UnsupportedLayerError: Nothing has changed. A
                `fastlora.adapters` block of the model that is open is an `AdapterStateError`.
        """
        self.group.check_closed("merge_and_unload")
        return inject.unload(
            self.model,
            merge=True,
            safe_merge=safe_merge,
            adapter_names=None if adapter_names is None else self._known(adapter_names),
            progressbar=progressbar,
            dequantize=dequantize,
        )

    def unload(self, *, dequantize: bool = False) -> nn.Module:
        """Takes the LoRA layers out and returns the bare model.

        Adapters that `merge_adapter` has merged stay in the weights, and a module of
        ``modules_to_save`` is replaced by the active adapter's copy; both as in PEFT. For the
        model as it was before, call `unmerge_adapter` first.

        Args:
            dequantize: As in `merge_and_unload`.

        Raises:
            AdapterStateError: A `fastlora.adapters` block of the model is open.
        """
        self.group.check_closed("unload")
        return inject.unload(self.model, merge=False, dequantize=dequantize)

    def _known(self, names: str | Sequence[str]) -> list[str]:
        """Returns one name or several as a list; raises where one is not loaded."""
        chosen = [names] if isinstance(names, str) else list(names)
        for name in chosen:
            self.check_known(name)
        return chosen


def tuner_of(model: object) -> LoraTuner | None:
    """Returns the tuner of a `LoraModel`; None for any other object."""
    tuner = getattr(model, "base_model", None)
    return tuner if isinstance(tuner, LoraTuner) else None


@register_router
def _router(model: Any) -> LoraTuner | None:
    return tuner_of(model)
