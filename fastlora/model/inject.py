"""Putting adapters into a model and taking them out: whole, or not at all."""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fastlora.init.data import progress
from fastlora.layers import LoraLayer, ModulesToSaveWrapper, ModuleWrapper, TrainableTokensWrapper
from fastlora.layers.tied_head import TiedLoraHead
from fastlora.layers.trainable_tokens import TokenAdapter
from fastlora.model.dequantise import as_if_plain, dense_dtype, dequantise, make_plain
from fastlora.model.plan import Plan, settings_for
from fastlora.model.replication import forget_replication
from fastlora.model.tied import SharedWeights, input_embedding, note_untied
from fastlora.model.walk import base_of, outer_modules
from fastlora.validation import AdapterStateError, ConfigError, error_prefix


@contextlib.contextmanager
def _without_collecting() -> Iterator[None]:
    """Pauses Python's cycle collector: thousands of new modules make it scan all the others.

    With it, the 64th adapter on 210 layers takes 0.16 s and the second 0.09; without, both 0.10.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _outside_inference_mode() -> Iterator[None]:
    """Makes tensors that outlive the mode: they can train, and writes into them are counted."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@_without_collecting()
def add_adapter(
    model: nn.Module, adapter_name: str, plan: Plan, *, autocast_adapter_dtype: bool = True
) -> None:
    """Adds an adapter to every module of its plan, inactive.

    Base parameters that train still train afterwards. On failure the model is as before. As in
    PEFT, one adapter acts and trains at once: the first one with trained tokens, on modules that
    share the input embedding's weight.
    """
    replaced: dict[str, tuple[nn.Module, nn.Module]] = {}
    undo: list[Callable[[], None]] = []
    init = plan.config.init
    trained = [p for _, p in base_parameters(model) if p.requires_grad]

    def holder(name: str, kind: type, make: Callable[[nn.Module], nn.Module]) -> Any:
        """Returns the module of that name, made what holds adapters if it is not yet."""
        module = model.get_submodule(name)
        if isinstance(module, kind):
            return module
        if not name:
            raise ConfigError("the model itself is the target; wrap it in a module first")
        made = make(module)
        replaced[name] = module, made
        model.set_submodule(name, made)
        return made

    try:
        if plan.replication is not None:
            plan.replication.apply()
        with _outside_inference_mode():
            for name, target in plan.targets.items():
                layer = holder(name, LoraLayer, target.kind.wrap)
                for each in (layer, *layer.inner_layers().values()):
                    if init.changes_base or init.data:
                        undo.append(each._keep_base(init, offload=True))
                    with error_prefix(f"target module {name!r}"):
                        each.add_adapter(adapter_name, **target.settings._asdict())
                    if autocast_adapter_dtype:
                        each.widen(adapter_name)
            for name in plan.modules_to_save:
                holder(name, ModulesToSaveWrapper, ModulesToSaveWrapper).add_adapter(adapter_name)
            embedding = str(input_embedding(model)) if plan.tied else ""
            source: Any = model.get_submodule(embedding)
            for name in plan.tied_heads:
                head = holder(name, TiedLoraHead, lambda module: TiedLoraHead(module, source))
                settings = settings_for(embedding, plan.config)
                head.add_adapter(adapter_name, **settings._asdict())
            for name in plan.tied_copies:
                wrapper = holder(name, ModulesToSaveWrapper, ModulesToSaveWrapper)
                wrapper.add_adapter(adapter_name, source.modules_to_save[adapter_name])
            for name, tokens in plan.tokens.items():
                tied: Any = tokens.tied_to and model.get_submodule(tokens.tied_to)
                make = functools.partial(TrainableTokensWrapper, tied_to=tied)
                rows = holder(name, TrainableTokensWrapper, make)
                if adapter_name not in rows.adapter_names:
                    rows.add_adapter(adapter_name, tokens.indices, autocast_adapter_dtype)
                if tied and name in replaced:
                    # PEFT 0.21.2 activates the first adapter of a tied module at once.
                    rows._activate([adapter_name], plan.config.inference_mode)
    except BaseException:
        delete_adapter(model, adapter_name)
        for put_back in undo:
            put_back()
        for name, (module, made) in replaced.items():
            if isinstance(made, LoraLayer):
                made.release()
            model.set_submodule(name, module)
        if plan.replication is not None:
            plan.replication.undo()
        raise
    finally:  # a module that gets its first adapter freezes its own parameters
        for parameter in trained:
            parameter.requires_grad_(True)


def to_meta(model: nn.Module, adapter_name: str) -> None:
    """Leaves an adapter without storage, on the meta device, to be loaded into."""
    for _, module in routed_modules(model):
        for owned in module._modules.values():
            if isinstance(owned, nn.ModuleDict) and adapter_name in owned:
                owned[adapter_name].to("meta")
            elif isinstance(owned, nn.ParameterDict) and adapter_name in owned:
                parameter = owned[adapter_name]
                made = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
                owned[adapter_name] = made


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Removes an adapter; the layers stay. Raises `AdapterStateError` where it is merged."""
    found = routed_modules(model)
    if any(adapter_name in module.merged_adapters for _, module in found):
        raise AdapterStateError(
            f"Cannot delete adapter(s) {[adapter_name]} while they are merged. "
            "Please unmerge them first."
        )
    for _, module in found:
        if present(module, [adapter_name]):  # rows are deleted with those that they are tied to
            module.delete_adapter(adapter_name)
        # A module without the adapter knows its name too, and may get a new adapter of that name.
        module._active_adapters = [n for n in module._active_adapters if n != adapter_name]


def routed_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Returns name and module of all that hold adapters, which a mixed batch chooses by row."""
    kinds = (LoraLayer, ModuleWrapper)
    found = outer_modules(model, inner_layers=True)
    return [(name, module) for name, module in found if isinstance(module, kinds)]


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Returns every LoRA layer of a model by its name, those inside others too."""
    return {name: m for name, m in routed_modules(model) if isinstance(m, LoraLayer)}


def freeze_base(model: nn.Module) -> None:
    """Freezes the base model and leaves adapters alone."""
    for _, parameter in base_parameters(model):
        parameter.requires_grad_(False)


def adapter_biases(model: nn.Module, adapter_name: str, bias: str) -> dict[str, nn.Parameter]:
    """Returns the base biases that an adapter trains, by name; ``bias`` is its config's field."""
    if bias == "none":
        return {}
    modules = [module for _, module in routed_modules(model) if present(module, [adapter_name])]
    targets = [module for module in modules if isinstance(module, LoraLayer)]
    copied = [module for module in modules if isinstance(module, ModulesToSaveWrapper)]
    return trained_biases(model, bias, targets, copied)


def trained_biases(
    model: nn.Module, bias: str, targets: Iterable[nn.Module], copied: Iterable[nn.Module]
) -> dict[str, nn.Parameter]:
    """Returns the base biases that an adapter trains, by name.

    A bias that has several names comes once. The biases of a module that the adapter owns a copy of
    are not among them.

    Args:
        model: The base model, with or without adapters.
        bias: ``"none"``, ``"all"``, or ``"lora_only"`` for the biases of the targets.
        targets: Modules that the adapter adapts with LoRA.
        copied: Modules that the adapter owns a copy of.
    """
    at_targets = {id(getattr(base_of(module), "bias", None)) for module in targets}
    originals = {id(p) for module in copied for p in base_of(module).parameters()}
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in base_parameters(model):
        wanted = bias == "all" or (bias == "lora_only" and id(parameter) in at_targets)
        if wanted and name.rpartition(".")[2] == "bias" and id(parameter) not in originals:
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())


def base_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns name and value of what belongs to no adapter; what is tied comes once a name."""
    found: list[tuple[str, nn.Parameter]] = []
    ahead = [("", model)]  # the next one last
    while ahead:
        prefix, module = ahead.pop()
        for key, parameter in module._parameters.items():
            if parameter is not None:
                found.append((f"{prefix}{key}", parameter))
        adapters: tuple[str, ...] = ()
        if isinstance(module, LoraLayer):
            adapters = ("lora_dropout", *module.adapter_parts)
        elif isinstance(module, (ModuleWrapper, TokenAdapter)):
            adapters = module.owned
        for key, child in reversed(module._modules.items()):
            if child is not None and key not in adapters:
                ahead.append((f"{prefix}{key}.", child))
    return found


def unload(
    model: nn.Module,
    *,
    merge: bool,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
    progressbar: bool = False,
    dequantize: bool = False,
) -> nn.Module:
    """Puts base layers back in place of LoRA layers, with the adapters merged in or dropped.

    Adapters that are merged already stay merged, as in PEFT.

    With ``dequantize``, quantised linears become plain ones before adapters are merged into them.

    A module of ``modules_to_save`` becomes the active adapter's copy. Every check comes first, so a
    merge that `LoraLayer.merge` refuses changes nothing.
    """
    found = routed_modules(model)
    found.sort(key=lambda each: -each[0].count(".base_layer."))  # inner ones before their outer
    if merge:
        for _, module in found:
            with as_if_plain(module, safe_merge) if dequantize else contextlib.nullcontext():
                module.check_merge(safe_merge, present(module, adapter_names))
    dtype = dense_dtype(model) if dequantize else None
    shared = SharedWeights(model)
    errors: dict[str, float | None] = {}
    for name, module in progress(found, "Merging" if merge else "Unloading", progressbar):
        if merge:
            names = present(module, adapter_names)
            was_quantised = dequantize and make_plain(module)
            if module.check_merge(adapter_names=names):
                shared.untie(name, module)
            module.merge(adapter_names=names, keep_base=False)
            if isinstance(module, LoraLayer):
                module._unmerged = None
                errors[name] = module.merge_error
        base = module.release()
        model.set_submodule(name, base.to(dtype) if merge and was_quantised else base)
    if dtype is not None:
        model = dequantise(model, dtype)
    shared.tell()
    tell_merge_errors(errors)
    note_untied(model)
    forget_replication(model)
    return model


def tell_merge_errors(errors: Mapping[str, float | None]) -> None:
    """Warns of what quantising merged weights again has lost; by layer, None where nothing has."""
    lossy = {name: error for name, error in errors.items() if error is not None}
    if lossy:
        worst = max(lossy, key=lossy.__getitem__)
        warnings.warn(
            f"merged into {len(lossy)} quantised weights, which were rounded again: of what the "
            f"merge was to change, {sum(lossy.values()) / len(lossy):.1%} is lost on average, and "
            f"at most {lossy[worst]:.1%} ({worst}); unmerged adapters lose nothing",
            stacklevel=4,
        )


def present(module: Any, adapter_names: list[str] | None) -> list[str] | None:
    """Returns those of the names that a module has; None, for the active ones, stays None."""
    if adapter_names is None:
        return None
    known = module.r if isinstance(module, LoraLayer) else module.adapter_names
    return [name for name in adapter_names if name in known]
