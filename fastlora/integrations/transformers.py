"""What makes Hugging Face's Trainer treat a `LoraModel` as the adapter model that it is.

Trainer writes the whole ``state_dict()`` of a model unless that is a PreTrainedModel or a
PeftModel. So on a transformers model, where peft is installed, a `LoraModel` is made as an instance
of both classes: everything Trainer calls is ours, and its checks find a PeftModel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from fastlora.model import LoraModel, adapter_state
from fastlora.validation import CheckpointError

# What transformers raises where files are missing or damaged.
CANNOT_READ = (OSError, ValueError, KeyError, TypeError)


def lora_model_class(model: nn.Module) -> type[LoraModel] | None:
    """Returns the subclass of `LoraModel` for a transformers model; None for any other."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    return None if importlib.util.find_spec("peft") is None else _transformers_lora_model()


LoraModel.classes.append(lora_model_class)


@functools.cache
def _transformers_lora_model() -> type[LoraModel]:
    from peft import PeftModel

    class TransformersLoraModel(LoraModel, PeftModel):  # type: ignore[misc, override]  # ours win
        """A `LoraModel` on a transformers model; see the module's docstring."""

        _is_prompt_learning = False
        peft_type = "LORA"

        @property
        def active_peft_config(self) -> Any:
            """The config of the active adapter."""
            return self.peft_config[self.active_adapter]

    TransformersLoraModel.__qualname__ = "TransformersLoraModel"
    _answer_for_peft()
    return TransformersLoraModel


@functools.cache
def _answer_for_peft() -> None:
    """Makes PEFT's state-dict functions, which accelerate calls by name, take our models too.

    They look for PEFT's layer classes, find none in a model of ours and say that it has no tensors:
    a sharded checkpoint of Trainer's would hold nothing.
    """
    import peft
    from peft.utils import save_and_load

    theirs_get: Any = save_and_load.get_peft_model_state_dict
    theirs_set: Any = save_and_load.set_peft_model_state_dict

    @functools.wraps(theirs_get)
    def get(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(model, LoraModel):
            return theirs_get(model, state_dict, adapter_name, *args, **kwargs)
        source = model.state_dict() if state_dict is None else state_dict
        embeddings = kwargs.get("save_embedding_layers", "auto")
        return adapter_state.collect(model, adapter_name, source, embeddings)

    @functools.wraps(theirs_set)
    def put(
        model: Any,
        peft_model_state_dict: Any,
        adapter_name: str = "default",
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(model, LoraModel):
            return theirs_set(model, peft_model_state_dict, adapter_name, *args, **kwargs)
        return adapter_state.put(model, adapter_name, peft_model_state_dict)

    modules: tuple[Any, ...] = (peft, peft.utils, save_and_load)
    for module in modules:
        module.get_peft_model_state_dict = get
        module.set_peft_model_state_dict = put


@contextlib.contextmanager
def as_causal_model(folder: object) -> Iterator[None]:
    """Makes what transformers raises when a model cannot be loaded a `CheckpointError`."""
    try:
        yield
    except (*CANNOT_READ, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as a causal language model ({error})"
        ) from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hides the notes of transformers, and PEFT's use of names that it is about to rename."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def __getattr__(name: str) -> Any:
    """Finds the lazily made class by its name, so that its instances can be pickled."""
    if name == "TransformersLoraModel":
        return _transformers_lora_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
