"""Models of ours in transformers: its pipelines, and what loading a base model prints or raises.

Trainer finds an adapter model in a `LoraModel`, which is a `peft.PeftModel` where PEFT is imported:
see `fastlora.integrations.as_peft`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from fastlora.integrations.when_imported import when_imported
from fastlora.model import LoraModel
from fastlora.validation import CheckpointError

# What transformers raises where files are missing or damaged.
CANNOT_READ = (OSError, ValueError, KeyError, TypeError)


def _transformers_lora_model() -> type[LoraModel]:
    """Returns the class of adapter models; importing PEFT makes it one of PEFT's too."""
    importlib.import_module("peft")
    return LoraModel


def _name_to_pipelines() -> None:
    """Has pipelines take our models as they take PEFT's; else they print all that they know."""
    pipelines: Any = sys.modules["transformers.pipelines.base"]
    for names in pipelines.SUPPORTED_PEFT_TASKS.values():
        names.append(LoraModel.__name__)


when_imported("transformers.pipelines.base", _name_to_pipelines)


@contextlib.contextmanager
def as_causal_model(folder: object) -> Iterator[None]:
    """Makes what transformers raises when a model cannot be loaded a `CheckpointError`."""
    try:
        yield
    except (*CANNOT_READ, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as a causal language model ({error})"
        ) from error


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Returns the tokens that end an answer: the model's, and the tokenizer's."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(given if isinstance(given, (list, tuple)) else [given]), tokenizer.eos_token_id}
    return {end for end in ends if end is not None}


@contextlib.contextmanager
def quiet_transformers(*, notes: bool = True) -> Iterator[None]:
    """Hides bars of transformers and its notes, and PEFT's use of names that it is to rename.

    Without ``notes`` it hides bars alone.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if notes:
                logging.set_verbosity_error()
                warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def __getattr__(name: str) -> Any:
    """Finds `LoraModel` under the name that it once had here, for pickled models."""
    if name == "TransformersLoraModel":
        return _transformers_lora_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
