"""What makes Hugging Face's Trainer treat a `LoraModel` as the adapter model that it is.

Trainer writes the whole ``state_dict()`` of a model unless that is a PreTrainedModel or a
PeftModel. So on a transformers model, where peft is installed, a `LoraModel` is made as an instance
of both classes: everything Trainer calls is ours, and its checks find a PeftModel.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

from torch import nn


def lora_model_class(model: nn.Module) -> type:
    """Returns the class that wraps ``model``: `LoraModel`, or its subclass for transformers."""
    from fastlora.model import LoraModel

    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return LoraModel
    if importlib.util.find_spec("peft") is None:
        return LoraModel
    return _transformers_lora_model()


@functools.cache
def _transformers_lora_model() -> type:
    from peft import PeftModel

    from fastlora.model import LoraModel

    class TransformersLoraModel(LoraModel, PeftModel):  # type: ignore[misc, override]  # ours win
        """A `LoraModel` on a transformers model; see the module's docstring."""

        _is_prompt_learning = False
        peft_type = "LORA"

        @property
        def active_peft_config(self) -> Any:
            """The config of the active adapter."""
            return self.peft_config[self.active_adapter]

    TransformersLoraModel.__qualname__ = "TransformersLoraModel"
    return TransformersLoraModel


def __getattr__(name: str) -> Any:
    """Finds the lazily made class by its name, so that its instances can be pickled."""
    if name == "TransformersLoraModel":
        return _transformers_lora_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
