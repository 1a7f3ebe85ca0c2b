"""`patch` and `unpatch`: a PEFT model made fast in place, and as it was again."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

from fastlora.integrations.report import FusionReport, fusion_report
from fastlora.routing.routers import Router, register_router
from fastlora.validation import UnsupportedLayerError


def patch(peft_model: nn.Module) -> FusionReport:
    """Makes the LoRA layers of a PEFT model compute through fastlora, in place.

    The model stays a PEFT model in every way: only the class of its layers changes, to a subclass
    of PEFT's own, so parameters, optimizer state, adapters added later and files are PEFT's.

    Args:
        peft_model: A `peft.PeftModel`, or any module that PEFT put LoRA layers into.

    Returns:
        The fusion report: which layers are fused, and why others are not.

    Raises:
        UnsupportedLayerError: There is no PEFT LoRA layer in the model.
    """
    seen = 0
    if importlib.util.find_spec("peft") is not None:
        from fastlora.integrations.peft import patch_model

        seen = patch_model(peft_model)
    if not seen:
        raise UnsupportedLayerError(
            f"patch() takes a model with PEFT LoRA layers, got a {type(peft_model).__name__} "
            "without any; to add some, use peft.get_peft_model or fastlora.get_peft_model"
        )
    return fusion_report(peft_model)


def unpatch(peft_model: nn.Module) -> None:
    """Gives a PEFT model its own layer classes back; does nothing to a model not patched."""
    if importlib.util.find_spec("peft") is not None:
        from fastlora.integrations.peft import unpatch_model

        unpatch_model(peft_model)


@register_router
def _router(model: Any) -> Router | None:
    """Finds how a patched PEFT model routes its batches.

    Raises:
        UnsupportedLayerError: A layer of it cannot take part in a mixed batch.
    """
    if not isinstance(model, nn.Module) or importlib.util.find_spec("peft") is None:
        return None
    from fastlora.integrations.peft import routed_model

    return routed_model(model)
