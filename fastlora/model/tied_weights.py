"""Find weights that a model ties to its input embedding, and untie weights for a merge."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from fastlora.model.base_modules import base_module_of, modules_with_original_names
from fastlora.patterns import matches_consecutive_components, matches_whole_name
from fastlora.user_warnings import warn

if TYPE_CHECKING:
    from fastlora.model.config import LoraConfig

# Last components of names that PEFT considers to be embeddings, or heads tied to embeddings.
EMBEDDING_NAMES = ("embed_tokens", "lm_head")


class ModulesAdaptedWithEmbedding(NamedTuple):
    """The modules that are adapted together with the input embedding.

    They are tied to the embedding.

    Attributes:
        names: The names of the modules.
        copies: True if the modules share the adapter's copy of the embedding's weight
            (``modules_to_save``), or False if they share the embedding's LoRA factors.
    """

    names: tuple[str, ...] = ()
    copies: bool = False


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
    model: nn.Module, config: LoraConfig
) -> ModulesAdaptedWithEmbedding:
    """Update a config so that tied modules are adapted with the embedding, and return the modules.

    The embedding is the model's input embedding. The modules in the result are tied to the
    embedding. If there are such modules, the config is changed in place: ``modules_to_save`` or
    ``target_modules`` then contains the embedding instead of the modules tied to it. If
    ``target_modules`` is a regular expression, it is extended so that it matches the embedding too.

    As in PEFT, a warning is emitted if the config requires tying that is not possible, or if a tied
    module is adapted without ``ensure_weight_tying``.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.
    """
    known, targets = list(EMBEDDING_NAMES), config.target_modules
    embedding = input_embedding_name(model) if config.ensure_weight_tying else None
    if embedding is not None:
        # PEFT writes the embedding's name into the config. When PEFT reads this config again, it
        # ties nothing if the name is not one of the known names.
        known += [embedding, embedding.rpartition(".")[2]]
    copied = any(name.rpartition(".")[2] in known for name in config.modules_to_save or ())
    if isinstance(targets, str):
        targeted = any(matches_whole_name("target_modules", targets, name) for name in known)
    else:
        targeted = any(name.rpartition(".")[2] in known for name in targets or ())
    if not config.ensure_weight_tying and not copied and not targeted:
        return ModulesAdaptedWithEmbedding()
    tied = modules_tied_to_embedding(model)
    if not config.ensure_weight_tying:
        if tied:
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
    return ModulesAdaptedWithEmbedding(tuple(tied), copied)


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


class SharedWeightUntier:
    """Unties weights that several modules of a model share.

    After a weight has been untied, one module's weight can be changed without changing the others.
    The object can also find shared weights without untying them. It is used before adapters are
    merged, and before an initialization method changes base weights.

    Args:
        model: The base model with its adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders: dict[int, list[tuple[str, nn.Module]]] = {}
        self._untied: list[tuple[str, str, int]] = []
        self._heads: list[Any] = [m for m in model.modules() if hasattr(type(m), "tied_to")]
        for name, module in model.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append((name, module))

    def find_module_sharing_weight(
        self, base: nn.Module, ignored: Collection[nn.Module], parameter: str = "weight"
    ) -> str | None:
        """Return the name of a module that shares the weight of ``base``.

        Args:
            base: The module with the weight.
            ignored: Modules to ignore.
            parameter: The name of the weight in ``base``.

        Returns:
            The name of the first module found, or None if no module shares the weight.
        """
        holders = self._holders.get(id(base._parameters.get(parameter)), ())
        return next((name for name, module in holders if module not in ignored), None)

    def other_module_sharing_weight(self, module: Any) -> str | None:
        """Return the name of another module that shares the weight of ``module``.

        The weight is that of the base layer of ``module``. Modules that share the LoRA factors or
        trained rows of ``module`` are ignored. The result is None if no other module shares the
        weight.
        """
        return self.find_module_sharing_weight(
            module.get_base_layer(),
            self._modules_sharing_factors(module),
            _adapted_parameter_name(module),
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

        The base weight of the layer is replaced with a copy. Without the copy, merging an adapter
        into an output head would also change the embedding.

        Args:
            name: The name of the layer.
            module: The layer.
        """
        other = self.other_module_sharing_weight(module)
        if other is None:
            return
        base, weight = module.get_base_layer(), _adapted_parameter_name(module)
        old, family = getattr(base, weight), self._modules_sharing_factors(module)
        own = nn.Parameter(old.detach().clone(), requires_grad=False)
        for part in family:
            if part._parameters.get(weight) is old:
                setattr(part, weight, own)
        self._holders[id(old)] = [held for held in self._holders[id(old)] if held[1] not in family]
        self._untied.append((name, other, own.numel() * own.element_size()))

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
