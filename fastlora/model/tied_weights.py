"""Find weights that a model ties to its input embedding, and untie weights for a merge."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastlora.layers import LoraLayer, ModuleWrapper
from fastlora.layers.trainable_tokens import TrainableTokensLayer
from fastlora.layers.unfused import has_replaced_forward_that_cannot_be_copied
from fastlora.model.adapter_folder import file_key
from fastlora.model.base_modules import (
    base_module_of,
    copy_sharing_parameters,
    modules_with_original_names,
)
from fastlora.patterns import matches_consecutive_components, matches_whole_name
from fastlora.user_warnings import warn
from fastlora.validation import AdapterStateError

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig

# Last components of names that PEFT considers to be embeddings, or heads tied to embeddings.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class ModulesAdaptedWithEmbedding(NamedTuple):
    """The modules that are adapted together with the input embedding.

    They are tied to the embedding.

    Attributes:
        heads: The names of the modules that share the embedding's LoRA factors.
        copies: The names of the modules that share the adapter's copy of the embedding's weight
            (``modules_to_save``).
        embeddings: The names of other embeddings, which get LoRA factors of their own.
    """

    heads: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()


NO_TIED_MODULES = ModulesAdaptedWithEmbedding()


def input_embedding_name(model: nn.Module) -> str | None:
    """Return the name of a model's input embedding.

    This is the module that the model's ``get_input_embeddings`` method returns. The result is None
    if the method does not exist or does not return a module of the model.
    """
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        found = get() if callable(get) else None
    except NotImplementedError:
        return None
    if found is None:
        return None
    named = modules_with_original_names(model)
    return next((name for name, module, _ in named if module is found and name), None)


def config_ties_embeddings(model: nn.Module) -> bool:
    """Return whether a model's config ties the word embeddings.

    The field is ``tie_word_embeddings``.
    """
    return bool(_config_field(model, "tie_word_embeddings"))


def modules_tied_to_embedding(model: nn.Module) -> list[str]:
    """Return the names of the modules that are tied to the input embedding.

    These modules share the embedding's weight. The list is sorted. As in PEFT, only modules listed
    in ``_tied_weights_keys`` of the model or of its submodules are considered, and the result is
    empty if the model's config has ``tie_word_embeddings=False``. In addition, the parameters must
    be the same object.
    """
    embedding = input_embedding_name(model)
    if embedding is None or _config_field(model, "tie_word_embeddings") is False:
        return []
    weight = getattr(base_module_of(model.get_submodule(embedding)), "weight", None)
    keys = {
        f"{name}.{key}" if name else key
        for name, module, _ in modules_with_original_names(model)
        for key in getattr(module, "_tied_weights_keys", None) or ()
    }
    names = {key.rpartition(".")[0] for key in keys if key.endswith("weight")} - {embedding, ""}
    known = {name for name, _, _ in modules_with_original_names(model, remove_duplicate=False)}
    return sorted(
        name
        for name in names & known
        if getattr(base_module_of(model.get_submodule(name)), "weight", None) is weight
    )


def update_config_for_tied_embedding(
    model: nn.Module,
    config: LoraConfig,
    tensors_in_file: Mapping[str, torch.Tensor] | None = None,
) -> ModulesAdaptedWithEmbedding:
    """Update a config so that tied modules are adapted with the embedding, and return the modules.

    The embedding is the model's input embedding, and the modules in the result are tied to it. If
    there are such modules, the config is changed in place: ``modules_to_save`` or
    ``target_modules`` then contains the embedding instead of the modules tied to it. If
    ``target_modules`` is a regular expression, it is extended so that it matches the embedding too.

    As in PEFT, a warning is emitted if the config requires tying that is not possible, or if a tied
    module is adapted without ``ensure_weight_tying``. PEFT ties no modules if the config names only
    embeddings that are not in `EMBEDDING_NAMES`. In this case, the tensors in the file determine
    whether modules are tied.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
        tensors_in_file: The tensors of the adapter's file, or None if the adapter is new.
    """
    known: tuple[str, ...] = EMBEDDING_NAMES
    embedding = input_embedding_name(model) if config.ensure_weight_tying else None
    tied = modules_tied_to_embedding(model) if config.ensure_weight_tying else []
    if embedding is not None and (
        tensors_in_file is None or _are_tied_in_file(embedding, tied, tensors_in_file)
    ):
        known = (*known, embedding, embedding.rpartition(".")[2])
    copied, targeted = are_embeddings_copied_and_targeted(config, known)
    if not config.ensure_weight_tying and not copied and not targeted:
        return ModulesAdaptedWithEmbedding()
    if not config.ensure_weight_tying:
        if modules_tied_to_embedding(model):
            _warn(
                "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
                "`ensure_weight_tying` is not set to True: the layer is trained and merged "
                "separately"
            )
        return ModulesAdaptedWithEmbedding()
    if not tied or embedding is None:
        if config.trainable_token_indices is None:  # `find_trainable_tokens` emits its own warning
            _warn(
                "You have requested `ensure_weight_tying`, but no tied modules were found in the "
                "model"
            )
        return ModulesAdaptedWithEmbedding()
    targets = config.target_modules
    if copied:
        config.modules_to_save = _replace_tied_with_embedding(
            config.modules_to_save or [], embedding, tied
        )
    elif isinstance(targets, str) and targeted:
        config.target_modules = rf"(?:{targets}|^{re.escape(embedding)}$)"
    elif targeted:
        config.target_modules = set(
            _replace_tied_with_embedding(sorted(targets or ()), embedding, tied)
        )
    else:
        if config.trainable_token_indices is None:
            _warn(
                "You have requested `ensure_weight_tying`, but no tied modules are added in either "
                "`modules_to_save` or `target_modules`"
            )
        return ModulesAdaptedWithEmbedding()
    if copied:
        return ModulesAdaptedWithEmbedding(copies=tuple(tied))
    # As in PEFT, tied heads share the embedding's LoRA factors, and tied embeddings have their own
    # factors.
    embeddings = tuple(
        n for n in tied if isinstance(base_module_of(model.get_submodule(n)), nn.Embedding)
    )
    heads = tuple(name for name in tied if name not in embeddings)
    return ModulesAdaptedWithEmbedding(heads, embeddings=embeddings)


def are_embeddings_copied_and_targeted(
    config: LoraConfig, known: Collection[str] = EMBEDDING_NAMES
) -> tuple[bool, bool]:
    """Return whether ``modules_to_save`` and ``target_modules`` of a config name embeddings.

    The result is a tuple of two booleans, one for each field. PEFT ties modules according to this
    result.

    Args:
        config: The adapter's config.
        known: The last components of names that are considered to be embeddings, or heads tied to
            embeddings.
    """
    targets = config.target_modules
    copied = any(name.rpartition(".")[2] in known for name in config.modules_to_save or ())
    if isinstance(targets, str):
        return copied, any(matches_whole_name("target_modules", targets, name) for name in known)
    return copied, any(name.rpartition(".")[2] in known for name in targets or ())


def _are_tied_in_file(
    embedding: str, tied: Collection[str], tensors: Mapping[str, torch.Tensor]
) -> bool:
    """Return whether an adapter file adapts modules together with the input embedding.

    The file then contains LoRA factors of such a module, or a copy of the module's weight that is
    equal to the copy of the embedding's weight. PEFT may save a base weight under the same key as a
    copy.

    Args:
        embedding: The name of the input embedding.
        tied: The names of the modules that are tied to the embedding in the model.
        tensors: The tensors of the file, keyed by file key.
    """
    own = tensors.get(file_key(embedding, "weight"))
    for name in tied:
        if any(file_key(name, end) in tensors for end in ("lora_A.weight", "lora_embedding_A")):
            return True
        copied = tensors.get(file_key(name, "weight"))
        if own is not None and copied is not None and torch.equal(own, copied):
            return True
    return False


def _replace_tied_with_embedding(entries: list[str], embedding: str, tied: list[str]) -> list[str]:
    """Replace the names of tied modules with the embedding's name.

    The result is a copy of the list, with the embedding added and the tied modules removed.
    """
    renamed = [*entries, embedding] if embedding not in entries else list(entries)
    for name in tied:
        matching = (
            e for e in renamed if matches_consecutive_components("modules_to_save", e, name)
        )
        gone = next(matching, None)
        renamed = [entry for entry in renamed if entry != gone]
    return renamed


def _warn(message: str) -> None:
    warn(message)


class _Holder(NamedTuple):
    """A module that holds parameters, paired with one of the module's names in the model.

    There is one such object for each name of the module.
    """

    name: str
    module: nn.Module
    parent: Any  # None if the module is the model itself.

    @property
    def in_adapter_module(self) -> bool:
        """Whether the module has adapters, or is a child of a module that has adapters.

        A module with adapters is a LoRA layer, a wrapper, or a `TrainableTokensLayer`.
        """
        kinds = (LoraLayer, ModuleWrapper, TrainableTokensLayer)
        return isinstance(self.module, kinds) or isinstance(self.parent, kinds)


class SharedWeightUntier:
    """Unties shared weights, so that one module's weight can change without changing the others.

    A module that has several names in the model shares its weight in the same way as several
    modules do. The object can also find shared weights without untying them. It is used before
    adapters are merged, and before an initialization method changes base weights.

    Args:
        model: The base model with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._holders: dict[int, list[_Holder]] = {}
        self._untied: list[tuple[str, str, int]] = []
        self._heads: list[Any] = [m for m in model.modules() if hasattr(type(m), "tied_to")]
        self._add_holders(_Holder("", model, None))

    def _add_holders(self, top: _Holder) -> None:
        """Record which modules hold the parameters of a module and its submodules."""
        holders = [top]
        for name, parent in top.module.named_modules(prefix=top.name):
            for key, child in parent._modules.items():
                if child is not None:
                    holders.append(_Holder(f"{name}.{key}" if name else key, child, parent))
        for holder in holders:
            for parameter in holder.module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append(holder)

    def _other_holders(
        self, name: str, base: nn.Module, family: Collection[nn.Module], parameter: str
    ) -> list[_Holder]:
        """Return a `_Holder` for each other module that holds a parameter.

        A holder is left out if its module is in ``family``, and if the holder is called ``name`` or
        is, or is a child of, a module with adapters. A module in ``family`` is therefore returned
        once for each of its other names in the model.
        """
        parent_name, _, key = name.rpartition(".")
        parent = self._model.get_submodule(parent_name)

        def is_own(holder: _Holder) -> bool:
            at_name = holder.parent is parent and holder.name.rpartition(".")[2] == key
            return holder.module in family and (holder.in_adapter_module or at_name)

        holders = self._holders.get(id(base._parameters.get(parameter)), ())
        return [holder for holder in holders if not is_own(holder)]

    def find_module_sharing_weight(
        self, name: str, base: nn.Module, ignored: Collection[nn.Module]
    ) -> str | None:
        """Return the name of another module that shares the weight of ``base``.

        If ``base`` has several names in the model, the result can be another name of ``base``.

        Args:
            name: The name of ``base`` or of the LoRA layer or wrapper that replaced it.
            base: The module with the weight.
            ignored: Modules to ignore.

        Returns:
            The name of the first module found, or None if no module shares the weight.
        """
        others = self._other_holders(name, base, ignored, "weight")
        return others[0].name if others else None

    def other_module_sharing_weight(self, name: str, module: Any) -> str | None:
        """Return the name of another module that shares the weight of ``module``.

        The weight is that of the base layer of ``module``, which is called ``name``. Modules that
        share the LoRA factors or trained rows of ``module`` are ignored. The result is None if no
        other module shares the weight.
        """
        others = self._other_base_weight_holders(name, module)
        return others[0].name if others else None

    def _other_base_weight_holders(self, name: str, module: Any) -> list[_Holder]:
        """Return the other modules that share a layer's base weight.

        A merge of the layer's adapters must not change the weight of these modules. Each of them is
        returned as a `_Holder`. The modules that share the layer's factors are the ``family`` of
        `_other_holders`.
        """
        family, base = self._modules_sharing_factors(module), module.get_base_layer()
        return self._other_holders(name, base, family, _adapted_parameter_name(module))

    def check_can_untie(self, name: str, module: Any) -> None:
        """Check that `untie_if_shared` can untie a layer's weight.

        Raises:
            AdapterStateError: If the base layer has another name in the model, and its ``forward``
                was replaced by a function that cannot be copied.
        """
        originals = _family_and_original_linears(self._modules_sharing_factors(module))
        for holder in self._other_base_weight_holders(name, module):
            if holder.module in originals and has_replaced_forward_that_cannot_be_copied(
                holder.module
            ):
                raise AdapterStateError(
                    f"target module {name!r} is also registered as {holder.name!r} and must be "
                    "copied before merging, but its forward was replaced by a function that "
                    "cannot be copied; restore the original forward, or use a separate module for "
                    "each name"
                )

    def _modules_sharing_factors(self, module: Any) -> set[nn.Module]:
        base = module.get_base_layer()
        adapter = getattr(module, "token_adapter", None)
        if adapter is None:
            source = getattr(module, "tied_to", module)
            layers = [source, *(head for head in self._heads if head.tied_to is source)]
            return {*layers, *(layer.get_base_layer() for layer in layers)}
        bases = {part.base_layer for part in adapter.together}
        return {m for m in bases if m.weight is base.weight}

    def untie_if_shared(self, name: str, module: Any) -> None:
        """Untie a module's weight if another module shares it.

        The base weight of the layer is replaced with a copy, and so is its bias if both are shared.
        Without the copy, merging an adapter into an output head would also change the embedding. If
        the base layer itself has other names in the model, a copy of the module with the old weight
        is put there. Layers must be untied before the layers inside them.

        Args:
            name: The name of the layer.
            module: The layer.
        """
        others = self._other_base_weight_holders(name, module)
        if not others:
            return
        family, base = self._modules_sharing_factors(module), module.get_base_layer()
        originals, size = _family_and_original_linears(family), 0
        copies: dict[nn.Module, nn.Module] = {}
        for other in others:
            if other.module in originals:
                if other.module not in copies:
                    copies[other.module] = copy_sharing_parameters(other.module, self._model)
                made = copies[other.module]
                setattr(other.parent, other.name.rpartition(".")[2], made)
                self._add_holders(other._replace(module=made))
        for parameter in (_adapted_parameter_name(module), "bias"):
            old = base._parameters.get(parameter)
            if old is None or not self._other_holders(name, base, family, parameter):
                continue
            own = copy.deepcopy(old).requires_grad_(False)
            for part in family:
                if part._parameters.get(parameter) is old:
                    setattr(part, parameter, own)
            holders = self._holders[id(old)]
            self._holders[id(old)] = [each for each in holders if each.module not in originals]
            size += own.numel() * own.element_size()
        self._untied.append((name, others[0].name, size))

    def warn_if_weights_were_untied(self) -> None:
        """Warn about the weights that have been untied.

        The warning states how much additional memory the untied weights need. If no weight has been
        untied, no warning is emitted.
        """
        if not self._untied:
            return
        name, other, _ = self._untied[0]
        more = f" (likewise for {len(self._untied) - 1} more)" if len(self._untied) > 1 else ""
        total = sum(size for _, _, size in self._untied)
        warn(
            f"{name} shared its weight with {other}, and now has its own weight with the adapter "
            f"merged in{more}. This takes {total / 2**20:,.1f} MiB more memory",
        )


def _family_and_original_linears(family: set[nn.Module]) -> set[nn.Module]:
    """Return the modules in ``family``, plus the original module of each LoRA layer in it.

    When a LoRA layer is removed, its original module takes its place.
    """
    return family | {linear for part in family for linear in part.__dict__.get("_linear", ())}


def _adapted_parameter_name(layer: Any) -> str:
    """Return the name of the base-layer parameter that a layer's adapters change."""
    name: str = getattr(layer, "parameter_name", "weight")
    return name


def untie_config_if_weights_untied(model: nn.Module) -> None:
    """Set ``tie_word_embeddings`` in a model's config to False if the weights are no longer tied.

    The weights are those of the input and output embeddings. A warning is emitted if the value
    changes.
    """
    config: Any = getattr(model, "config", None)
    if not config_ties_embeddings(model) or isinstance(config, dict):
        return
    weights = []
    for end in ("input", "output"):
        get: Any = getattr(model, f"get_{end}_embeddings", None)
        try:
            weights.append(getattr(get(), "weight", None) if callable(get) else None)
        except NotImplementedError:
            return
    if weights[0] is not None and weights[1] is not None and weights[0] is not weights[1]:
        config.tie_word_embeddings = False
        warn(
            "Input and output embeddings are no longer tied after merging; tie_word_embeddings "
            "was set to False in the model's config",
        )


def _config_field(model: nn.Module, name: str) -> Any:
    """Return the value of a field in a model's config.

    The result is None if the field does not exist.
    """
    config: Any = getattr(model, "config", None)
    if isinstance(config, dict):
        return config.get(name)
    if dataclasses.is_dataclass(config) or config is not None:
        return getattr(config, name, None)
    return None
