"""Which parameters an adapter has, and which adapters train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from fastlora.model.adapter_state import key_map
from fastlora.validation import AdapterStateError

if TYPE_CHECKING:
    from fastlora.model import LoraModel


def adapter_parameters(model: LoraModel, name: str) -> dict[str, nn.Parameter]:
    """Returns an adapter's parameters by their names in the model: what its file would hold.

    These are its factors, its copies of ``modules_to_save``, and with ``bias="all"`` or
    ``"lora_only"`` the base model's biases.

    Raises:
        AdapterNotFoundError: There is no such adapter.
    """
    model.base_model.check_known(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    keys = key_map(model, name).values()
    return {key: parameters[key] for key in keys if key in parameters}


def train_adapters(model: LoraModel, names: str | Sequence[str]) -> None:
    """Makes these adapters trainable, and of all adapters them alone.

    Unlike ``model.set_adapter``, which a later call of would freeze the others again, it leaves the
    active adapters as they are, and each may own a copy of the same module (``modules_to_save``):
    in a mixed batch no row has more than one adapter.

    Raises:
        AdapterNotFoundError: There is no such adapter.
        AdapterStateError: Several are named, and one trains the base model's biases.
        ValueError: None is named.
    """
    chosen = check_trained_together(model, names)
    trained = {id(p) for name in chosen for p in adapter_parameters(model, name).values()}
    for name in model.peft_config:
        for parameter in adapter_parameters(model, name).values():
            parameter.requires_grad_(id(parameter) in trained)


def check_trained_together(model: LoraModel, names: str | Sequence[str]) -> list[str]:
    """Returns the names without repetitions if these adapters can train in one batch.

    Raises:
        AdapterNotFoundError, AdapterStateError, ValueError: See `train_adapters`.
    """
    chosen = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not chosen:
        raise ValueError(f"no adapter is named; expected some of {list(model.peft_config)}")
    for name in chosen:
        model.base_model.check_known(name)
    for name in chosen:
        bias = model.peft_config[name].bias
        if bias != "none" and len(chosen) > 1:
            raise AdapterStateError(
                f"adapter {name!r} has bias={bias!r}: it trains the base model's biases, which "
                "every row shares; expected bias='none', or to train it alone"
            )
    return chosen
