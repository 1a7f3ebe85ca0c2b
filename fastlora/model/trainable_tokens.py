"""Find the modules and rows that ``trainable_token_indices`` selects for training.

The rules follow `set_additional_trainable_modules` in PEFT 0.21.2, ``utils/other.py``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.layers import LoraLayer, TrainableTokensWrapper
from fastlora.layers.trainable_tokens import check_token_rows_trainable
from fastlora.model.base_modules import (
    base_module_of,
    is_auxiliary_wrapper,
    is_lora_layer_in_use,
    is_modules_to_save_wrapper,
    modules_with_original_names,
)
from fastlora.model.config import LoraConfig
from fastlora.model.tied_weights import (
    config_ties_embeddings,
    input_embedding_name,
    modules_tied_to_embedding,
)
from fastlora.user_warnings import warn
from fastlora.validation import ConfigError, TargetNotFoundError, UnsupportedLayerError, near_names


@dataclass(frozen=True)
class TrainableRowIndices:
    """The indices of the token rows to train in one module.

    An adapter's config selects the rows of the module's weight with ``trainable_token_indices``.
    The module is an embedding or linear layer.

    Attributes:
        indices: The indices of the rows.
        tied_to: The name of the embedding that the module shares the rows with, or None.
    """

    indices: list[int]
    tied_to: str | None = None


def find_trainable_tokens(model: nn.Module, config: LoraConfig) -> dict[str, TrainableRowIndices]:
    """Find the modules and the token rows that a config selects with ``trainable_token_indices``.

    The modules are embeddings or linear layers. The result is a dict that maps the name of each
    module to the rows of the tokens in the module's weight.

    If ``trainable_token_indices`` is a list, it refers to the input embedding. If it is a mapping,
    each key refers to every module with a name that ends with the key. If the input embedding is
    selected and the model ties its embeddings, the tied modules share the embedding's rows, unless
    the config selects different rows for them. The embedding comes before the modules tied to it.

    Args:
        model: The base model, with or without adapters.
        config: The adapter's config.

    Raises:
        TargetNotFoundError: If a key matches no module.
        ConfigError: If ``ensure_weight_tying`` is True, but different rows are selected for tied
            modules.
        UnsupportedLayerError: If a module is neither an embedding nor a linear layer, or if it is
            also trained in another way.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    embedding = input_embedding_name(model)
    if not isinstance(wanted, dict):
        wanted = {embedding or "embed_tokens": wanted}
    ties = config_ties_embeddings(model)
    tied = modules_tied_to_embedding(model) if ties and embedding else []
    found = _matches(model, wanted)
    if not ties and config.ensure_weight_tying:
        warn(
            "ensure_weight_tying=True but the model does not have tied weights "
            "(tie_word_embeddings=False): no rows of trainable_token_indices are shared",
        )
    of_tied = {name: found[name] for name in (embedding, *tied) if name in found}
    differ = any(indices != next(iter(of_tied.values())) for indices in of_tied.values())
    if differ and config.ensure_weight_tying:
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied "
            f"layers: trainable_token_indices gives {of_tied}; expected the same indices for all "
            "tied layers, or ensure_weight_tying=False"
        )
    tokens = {name: TrainableRowIndices(indices) for name, indices in found.items()}
    if embedding in found and not differ:
        rows = tokens.pop(embedding)
        tied_rows = {name: TrainableRowIndices(rows.indices, embedding) for name in tied}
        tokens = {embedding: rows, **tokens, **tied_rows}
    for name, rows in tokens.items():
        _check_rows_trainable(model, name, rows)
    return tokens


def check_modules_trained_once(
    token_modules: Collection[str],
    target_modules: Collection[str],
    saved_modules: Collection[str],
    tied_modules: Collection[str],
) -> None:
    """Raise an error if an adapter would train the same module in two ways.

    A module that shares the input embedding's adapter must not also be a target. A module in which
    the adapter trains rows must not be a target. It also must not be, or be inside, a module that
    the adapter owns a copy of or a module that shares the input embedding's adapter.

    Args:
        token_modules: The names of the modules in which the adapter trains rows.
        target_modules: The names of the modules that the adapter adapts with LoRA.
        saved_modules: The names of the modules of which the adapter owns a copy.
        tied_modules: The names of the modules that share the input embedding's adapter.

    Raises:
        UnsupportedLayerError: If a module is trained in two ways.
    """
    for name in tied_modules:
        if name in target_modules:
            raise UnsupportedLayerError(
                f"ensure_weight_tying makes {name!r} share the copy of the input embedding that "
                f"modules_to_save creates, but target_modules also names {name!r}; train the "
                "module in only one of these two ways"
            )
    for name in token_modules:
        copied = any(name == n or name.startswith(f"{n}.") for n in (*saved_modules, *tied_modules))
        if name in target_modules or copied:
            how = "adapted with LoRA (target_modules)"
            if copied:
                how = "marked to be trained fully (modules_to_save)"
            raise UnsupportedLayerError(  # the second sentence begins as in PEFT
                f"trainable_token_indices selects rows of {name!r} for training, but a layer can "
                f"be trained in only one way. The embedding layer is already {how}; remove it from "
                "one of the two fields"
            )


def _matches(model: nn.Module, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
    modules = list(modules_with_original_names(model, remove_duplicate=False))
    names = [name for name, _, _ in modules if name]
    found: dict[str, list[int]] = {}
    for key, indices in wanted.items():
        named = [name for name in names if name.endswith(key)]
        if not named:
            ends = {name.rpartition(".")[2] for name in names}
            raise TargetNotFoundError(  # the first sentence is PEFT's
                f"Target modules {{{key!r}}} not found in the base model. Each name in "
                "trainable_token_indices must match a module of the model"
                f"{near_names(key, sorted(ends))}"
            )
        found |= dict.fromkeys(named, indices)
    inside = {
        name for name, module, wrapped in modules if wrapped and not is_auxiliary_wrapper(module)
    }
    for name in found:
        if name in inside:
            raise UnsupportedLayerError(
                f"trainable_token_indices names {name!r}, which is inside a module listed in "
                "modules_to_save; remove the module from one of these fields, because each adapter "
                "has its own copy of a module in modules_to_save"
            )
    return found


def _check_rows_trainable(model: nn.Module, module_name: str, rows: TrainableRowIndices) -> None:
    """Check that the given rows of a module can be trained.

    The module must be an embedding or a linear layer.

    Raises:
        UnsupportedLayerError: If the module is anything other than an embedding or linear layer
            with a plain weight, or if other adapters adapt the module in another way.
        ConfigError: If the index of a row is out of range.
        AdapterStateError: If the module's weight is sharded.
    """
    module: Any = model.get_submodule(module_name)
    if is_lora_layer_in_use(module) or is_modules_to_save_wrapper(module):
        how = "LoRA factors" if isinstance(module, LoraLayer) else "a full copy (modules_to_save)"
        raise UnsupportedLayerError(
            f"trainable_token_indices selects rows of {module_name!r} for training, but another "
            f"adapter already adapts this module with {how}"
        )
    check_token_rows_trainable(base_module_of(module), rows.indices)
    if isinstance(module, TrainableTokensWrapper) and module.is_tied != (rows.tied_to is not None):
        raise UnsupportedLayerError(
            f"trainable_token_indices: in adapters {module.adapter_names}, the trainable rows of "
            f"{module_name!r} are {'tied' if module.is_tied else 'not tied'} to the trainable "
            "rows of the input embedding; these rows must be tied in all adapters of a model or in "
            "none"
        )
