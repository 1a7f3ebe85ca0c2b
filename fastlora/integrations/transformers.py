"""Integration with transformers: pipelines, error messages, and progress bars.

The Trainer accepts a `LoraModel` as an adapter model, because a `LoraModel` is also an instance of
`peft.PeftModel` after PEFT is imported. See `fastlora.integrations.peft_registration`.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from fastlora.integrations.import_hooks import call_when_imported
from fastlora.model import LoraModel
from fastlora.validation import CheckpointError

# Errors that transformers raises if files are missing or damaged.
CANNOT_READ = (OSError, ValueError, KeyError, TypeError)


def _lora_model_after_importing_peft() -> type[LoraModel]:
    """Import PEFT, and return `LoraModel`.

    The import makes `LoraModel` a subclass of ``peft.PeftModel``.
    """
    importlib.import_module("peft")
    return LoraModel


def _register_with_pipelines() -> None:
    """Add `LoraModel` to the model classes that transformers pipelines support.

    If a model's class is not among them, the pipeline logs an error that lists all supported
    classes.
    """
    pipelines: Any = sys.modules["transformers.pipelines.base"]
    for names in pipelines.SUPPORTED_PEFT_TASKS.values():
        names.append(LoraModel.__name__)


call_when_imported("transformers.pipelines.base", _register_with_pipelines)


@contextlib.contextmanager
def convert_model_load_errors(folder: object) -> Iterator[None]:
    """Context manager that re-raises model-loading errors as fastlora's `CheckpointError`.

    The ``with`` block loads the model, which must be a causal language model. The errors that are
    re-raised are RuntimeError and those in `CANNOT_READ`. The message of the new error starts with
    ``folder``.
    """
    try:
        yield
    except (*CANNOT_READ, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded as a causal language model ({error})"
        ) from error


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the set of token ids that end a generated sequence.

    These are the EOS tokens of the model's generation config and of its tokenizer.
    """
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {*(given if isinstance(given, (list, tuple)) else [given]), tokenizer.eos_token_id}
    return {end for end in ends if end is not None}


@contextlib.contextmanager
def quiet_transformers(*, hide_messages: bool = True) -> Iterator[None]:
    """Context manager that hides transformers' messages and progress bars.

    FutureWarnings from any library are hidden too.

    Args:
        hide_messages: Whether to hide messages and warnings too. If False, only progress bars are
            hidden.
    """
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            if hide_messages:
                logging.set_verbosity_error()
                warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def __getattr__(name: str) -> Any:
    """Return `LoraModel` for the name ``TransformersLoraModel``, which old pickles contain."""
    if name == "TransformersLoraModel":
        return _lora_model_after_importing_peft()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
