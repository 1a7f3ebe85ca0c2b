"""`load_in`: quantize the base model with bitsandbytes while it is loaded, as in QLoRA.

``4bit`` is NF4 with nested scales (Dettmers et al., 2023, arXiv 2305.14314). Its products are in
bf16, or in fp16 if ``dtype`` is float16. ``8bit`` is LLM.int8.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from fastlora.command_line import install_command
from fastlora.layers.quantized import prevent_bitsandbytes_repacking
from fastlora.model.recommend import QLORA
from fastlora.train.processes import TrainError
from fastlora.train.settings import TrainSettings
from fastlora.validation import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEEDS = {"bitsandbytes": "pip install bitsandbytes", "accelerate": install_command("train")}


def base_model_dtype(settings: TrainSettings) -> str:
    """Return the dtype in which to load the base model.

    The result is a string that transformers accepts. With `load_in`, the parts that are not
    quantized (embeddings, norms, the head) are in bf16 unless ``dtype`` says otherwise. The norms
    of transformers' models compute in fp32 in both cases.
    """
    return "bfloat16" if settings.load_in and settings.dtype == "auto" else settings.dtype


def bitsandbytes_config(settings: TrainSettings, model_config: object) -> Any:
    """Return the `BitsAndBytesConfig` for the base model.

    The result is None if `load_in` is not set.

    Raises:
        ConfigError: The model's own config says that the model is already quantized.
        TrainError: bitsandbytes or accelerate is not installed.
    """
    own = getattr(model_config, "quantization_config", None)
    if own is not None and settings.load_in:
        raise ConfigError(
            f"{settings.model} is already quantized, but load_in is {settings.load_in!r}; use a "
            "model that is not quantized, or remove load_in"
        )
    if not settings.load_in:
        return None
    for package, install in _NEEDS.items():
        if importlib.util.find_spec(package) is None:
            raise TrainError(
                f"load_in={settings.load_in!r} needs {package}; install it with: {install}"
            )
    library: Any = importlib.import_module("transformers")
    if settings.load_in == "8bit":
        return library.BitsAndBytesConfig(load_in_8bit=True)
    half = torch.float16 if settings.dtype == "float16" else torch.bfloat16
    return library.BitsAndBytesConfig(**{**QLORA, "bnb_4bit_compute_dtype": half})


def stored_bitsandbytes_config(model_config: object) -> Any:
    """Return the `BitsAndBytesConfig` that is stored in the config of a quantized model.

    The result is None if the model is not quantized, if another library has quantized it, or if
    bitsandbytes or accelerate is not installed.
    """
    own: Any = getattr(model_config, "quantization_config", None)
    if own is None or any(importlib.util.find_spec(package) is None for package in _NEEDS):
        return None
    fields = own if isinstance(own, dict) else own.to_dict()
    if fields.get("quant_method") != "bitsandbytes":
        return None
    library: Any = importlib.import_module("transformers")
    return library.BitsAndBytesConfig.from_dict(fields)


def quantize_meta_model(model: PreTrainedModel, config: Any) -> None:
    """Replace the linear layers of a model on the meta device with quantized layers."""
    library: Any = importlib.import_module("transformers.quantizers.auto")
    quantizer, dtype = library.AutoHfQuantizer.from_config(config, pre_quantized=False), model.dtype
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(".bias"):  # the replacements create fp32 biases
            parameter.data = parameter.data.to(dtype)


def prevent_repacking_and_cast_warnings(model: PreTrainedModel) -> None:
    """Prevent weight repacking in a quantized model, and suppress warnings about dtype casts.

    The function prepares the model for training, and changes the model in place. If bitsandbytes
    repacked 4-bit weights during an evaluation, the model could not be trained afterward. The cast
    warnings of bitsandbytes are suppressed in the whole process.
    """
    prevent_bitsandbytes_repacking(model)
    # bitsandbytes warns at every product that x is cast to fp16, but LLM.int8 always computes in
    # fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
