"""Which modules `trainable_token_indices` means, and which of them share their rows.

Method: PEFT 0.21.2, ``utils/other.py``, `set_additional_trainable_modules`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.layers import LoraLayer, TrainableTokensWrapper
from fastlora.layers.trainable_tokens import check_tokens
from fastlora.model.config import LoraConfig
from fastlora.model.tied import input_embedding, tied_with_embedding, ties_embeddings
from fastlora.model.walk import base_modules, holds_copies, is_wrapper, original_of
from fastlora.validation import ConfigError, TargetNotFoundError, UnsupportedLayerError, near_names


@dataclass(frozen=True)
class Tokens:
    """Rows of a module that an adapter trains.

    Attributes:
        indices: Of the rows.
        tied_to: The name of the embedding whose rows these are, or None.
    """

    indices: list[int]
    tied_to: str | None = None


def find_tokens(model: nn.Module, config: LoraConfig) -> dict[str, Tokens]:
    """Returns the modules of which an adapter trains rows, by name, the embedding before its ties.

    A list means the input embedding. A key means every module whose name ends with it. Where the
    model ties its embeddings, what is tied to a chosen input embedding takes its rows, unless the
    config gives both different ones.

    Raises:
        TargetNotFoundError: A key matches no module.
        ConfigError: Tied modules are to have different rows, although ``ensure_weight_tying``.
        UnsupportedLayerError: A module is no embedding or linear, or is trained otherwise too.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    embedding = input_embedding(model)
    if not isinstance(wanted, dict):
        wanted = {embedding or "embed_tokens": wanted}
    ties = ties_embeddings(model)
    tied = tied_with_embedding(model) if ties and embedding else []
    found = _matches(model, wanted)
    if not ties and config.ensure_weight_tying:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights "
            "(tie_word_embeddings=False): no rows of trainable_token_indices are shared",
            stacklevel=5,
        )
    of_tied = {name: found[name] for name in (embedding, *tied) if name in found}
    differ = any(indices != next(iter(of_tied.values())) for indices in of_tied.values())
    if differ and config.ensure_weight_tying:
        raise ConfigError(
            "Cannot ensure weight tying when different token indices are specified for tied "
            f"layers: trainable_token_indices gives {of_tied}; expected the same for all, or "
            "ensure_weight_tying=False"
        )
    tokens = {name: Tokens(indices) for name, indices in found.items()}
    if embedding in found and not differ:
        rows = tokens.pop(embedding)
        tied_rows = {name: Tokens(rows.indices, embedding) for name in tied}
        tokens = {embedding: rows, **tokens, **tied_rows}
    for name, rows in tokens.items():
        _check(model, name, rows)
    return tokens


def check_apart(
    tokens: Collection[str], targets: Collection[str], saved: Collection[str], tied: Collection[str]
) -> None:
    """Raises `UnsupportedLayerError` where an adapter is to train a module in two ways."""
    for name in tied:
        if name in targets:
            raise UnsupportedLayerError(
                f"ensure_weight_tying gives {name!r} the input embedding's copy (modules_to_save), "
                "and target_modules names it too; expected one of them"
            )
    for name in tokens:
        copied = any(name == n or name.startswith(f"{n}.") for n in (*saved, *tied))
        if name in targets or copied:
            how = "adapted with LoRA (target_modules)"
            if copied:
                how = "marked to be trained fully (modules_to_save)"
            raise UnsupportedLayerError(
                f"trainable_token_indices trains rows of {name!r}: The embedding layer is already "
                f"{how}; expected one of them"
            )


def _matches(model: nn.Module, wanted: dict[str, list[int]]) -> dict[str, list[int]]:
    modules = list(base_modules(model, remove_duplicate=False))
    names = [name for name, _, _ in modules if name]
    found: dict[str, list[int]] = {}
    for key, indices in wanted.items():
        named = [name for name in names if name.endswith(key)]
        if not named:
            ends = {name.rpartition(".")[2] for name in names}
            raise TargetNotFoundError(
                f"Target modules {{{key!r}}} not found in the base model. They are named in "
                f"trainable_token_indices{near_names(key, sorted(ends))}"
            )
        found |= dict.fromkeys(named, indices)
    inside = {name for name, module, wrapped in modules if wrapped and not is_wrapper(module)}
    for name in found:
        if name in inside:
            raise UnsupportedLayerError(
                f"trainable_token_indices names {name!r}, which lies in a module that adapters own "
                "copies of (modules_to_save)"
            )
    return found


def _check(model: nn.Module, name: str, rows: Tokens) -> None:
    """Raises unless a module can have the rows."""
    module: Any = model.get_submodule(name)
    if isinstance(module, LoraLayer) or holds_copies(module):
        how = "LoRA" if isinstance(module, LoraLayer) else "a full copy (modules_to_save)"
        raise UnsupportedLayerError(
            f"trainable_token_indices needs rows of {name!r}, of which an adapter has {how}"
        )
    check_tokens(original_of(module), rows.indices)
    if isinstance(module, TrainableTokensWrapper) and module.is_tied != (rows.tied_to is not None):
        raise UnsupportedLayerError(
            f"trainable_token_indices: adapters {module.adapter_names} have rows on {name!r} that "
            f"are {'tied' if module.is_tied else 'not tied'} to the input embedding's; all "
            "adapters of a model must agree"
        )
