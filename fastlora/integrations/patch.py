"""`patch` and `unpatch`: make the LoRA layers of a PEFT model use fastlora, and undo the change."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from fastlora.integrations.report import FusionReport, fusion_report
from fastlora.routing.routers import AdapterRouter, register_adapter_router
from fastlora.validation import UnsupportedLayerError


def patch(peft_model: nn.Module) -> FusionReport:
    """Patch a PEFT model in place to run with fastlora, and return the fusion report.

    The LoRA layers then compute their outputs with fastlora. The model remains an ordinary PEFT
    model. Only the classes of its LoRA layers and its tuner are replaced, with subclasses of PEFT's
    own classes. PEFT continues to manage the parameters, the files, and adapters that are added
    later. Existing optimizer state remains valid.

    Args:
        peft_model: A `peft.PeftModel`, or any module that PEFT has added LoRA layers to.

    Returns:
        The fusion report, which lists the fused layers and gives the fallback reason of each other
        layer.

    Raises:
        UnsupportedLayerError: The model has no PEFT LoRA layer.
    """
    seen = 0
    if importlib.util.find_spec("peft") is not None:
        from fastlora.integrations.peft import patch_model

        seen = patch_model(peft_model)
    if not seen:
        raise UnsupportedLayerError(
            f"patch() expects a model with PEFT LoRA layers, but this {type(peft_model).__name__} "
            "has none; add them with peft.get_peft_model. A model from fastlora.get_peft_model "
            "does not need patch()"
        )
    return fusion_report(peft_model)


def unpatch(peft_model: nn.Module) -> None:
    """Undo `patch` on a PEFT model.

    The patched layers and tuners are restored: they get back their original classes, and thus
    PEFT's forward methods. A model that is not patched is left unchanged.

    Raises:
        UnsupportedLayerError: Other code has changed the class of a patched layer.
    """
    if importlib.util.find_spec("peft") is not None:
        from fastlora.integrations.peft import unpatch_model

        unpatch_model(peft_model)


@register_adapter_router
def _patched_model_router(model: Any) -> AdapterRouter | None:
    """Return the router of a patched PEFT model.

    The result is None if ``model`` is not a patched PEFT model.

    Raises:
        UnsupportedLayerError: A layer of the model cannot take part in a mixed batch.
    """
    if not isinstance(model, nn.Module) or importlib.util.find_spec("peft") is None:
        return None
    from fastlora.integrations.peft import patched_model_router

    return patched_model_router(model)
