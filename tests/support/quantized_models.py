"""Tiny quantized models of transformers, in the kinds that users load."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_llama

BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4 nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
TORCHAO = ("torchao int8", "torchao int4", "torchao float8")
KINDS = (*BITSANDBYTES, *TORCHAO)


def quantized_model(kind: str, arch: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """A random model of two layers, quantized; the same one at every call.

    bitsandbytes is kept from repacking 4-bit weights in evaluation, as it does on some CPUs: its
    products are in bf16 then, and PEFT's DoRA takes their norm from repacked codes.
    """
    if kind == "int8":  # a copy of it has no scales
        return _made(kind, arch, dtype)
    model = copy.deepcopy(_cached(kind, arch, dtype))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _made(kind: str, arch: str, dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    plain = (tiny_llama() if arch == "llama" else tiny_gpt2()).to(dtype)
    if kind in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
        bits = dict(BITSANDBYTES[kind])
        if "load_in_4bit" in bits:
            bits["bnb_4bit_compute_dtype"] = dtype
        with tempfile.TemporaryDirectory() as folder:
            plain.save_pretrained(folder)
            return transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=transformers.BitsAndBytesConfig(**bits),
                device_map={"": "cpu"},
                dtype=dtype,
            )
    library = pytest.importorskip("torchao.quantization")
    config = {
        "torchao int8": library.Int8WeightOnlyConfig(version=2),
        # The int4 layouts of torchao's own kernels do not run on a CPU.
        "torchao int4": library.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=library.PerGroup(32)
        ),
        "torchao float8": library.Float8WeightOnlyConfig(),
    }[kind]
    library.quantize_(plain, config, lambda module, name: _is_inner(module, name))
    return plain


_cached = functools.cache(_made)


def _is_inner(module: object, name: str) -> bool:
    return isinstance(module, torch.nn.Linear) and "lm_head" not in name


def tiny_gpt2() -> Any:
    """A random GPT-2 of two layers, whose linears are Conv1D; the same one at every call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    )
    return GPT2LMHeadModel(config)
