"""`load_in`: the base model quantised by bitsandbytes while it is read, as QLoRA trains on it.

NF4 with nested scales, products in bf16 (Dettmers et al., 2023, arXiv 2305.14314); or LLM.int8.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from fastlora.layers.quantised import keep_layout
from fastlora.model.recommend import QLORA
from fastlora.train.config import TrainSettings
from fastlora.train.processes import INSTALL, TrainError
from fastlora.validation import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NEEDS = {"bitsandbytes": "pip install bitsandbytes", "accelerate": INSTALL}


def dtype_of(settings: TrainSettings) -> str:
    """Returns the dtype to read a base model in, as transformers takes it.

    What `load_in` leaves as it is (embeddings, norms, the head) is in bf16 unless ``dtype`` says
    otherwise. Norms of transformers' models compute in fp32 either way.
    """
    return "bfloat16" if settings.load_in and settings.dtype == "auto" else settings.dtype


def quantisation(settings: TrainSettings, model_config: object) -> Any:
    """Returns transformers' config of how a run quantises the base model; None where it does not.

    Raises `ConfigError` where the model is quantised already, by its own config, and `TrainError`
    where bitsandbytes is not installed.
    """
    own = getattr(model_config, "quantization_config", None)
    if own is not None and settings.load_in:
        raise ConfigError(
            f"{settings.model} is quantised already, and load_in is {settings.load_in!r}; expected "
            "a model that is not, or no load_in"
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


def stored_quantisation(model_config: object) -> Any:
    """Returns transformers' config of how bitsandbytes quantised a stored model, or None.

    None as well for other libraries, and where bitsandbytes is not installed.
    """
    own: Any = getattr(model_config, "quantization_config", None)
    if own is None or any(importlib.util.find_spec(package) is None for package in _NEEDS):
        return None
    fields = own if isinstance(own, dict) else own.to_dict()
    if fields.get("quant_method") != "bitsandbytes":
        return None
    library: Any = importlib.import_module("transformers")
    return library.BitsAndBytesConfig.from_dict(fields)


def quantise_empty(model: PreTrainedModel, config: Any) -> None:
    """Puts the linears that a config asks for into a model on the meta device."""
    library: Any = importlib.import_module("transformers.quantizers.auto")
    quantiser, dtype = library.AutoHfQuantizer.from_config(config, pre_quantized=False), model.dtype
    quantiser.preprocess_model(model=model, device_map={"": "cpu"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if name.endswith(".bias"):  # new ones are in fp32
            parameter.data = parameter.data.to(dtype)


def make_trainable(model: PreTrainedModel) -> None:
    """Makes a quantised base model fit for a training run, evaluations in between included."""
    keep_layout(model)
    # It says at every product that x is rounded to fp16, which LLM.int8 is.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
