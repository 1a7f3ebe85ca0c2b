"""The default ``target_modules`` for each ``model_type`` of base models.

The values are those of PEFT 0.21.2 (the table for LoRA in ``peft/utils/constants.py``). A config
without ``target_modules`` therefore adapts the same modules in both libraries. A value that is a
string is a regular expression that must match the whole name of a module.
"""

from __future__ import annotations

from types import MappingProxyType

_Q_V = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED_QKV = ("query_key_value",)

DEFAULT_TARGETS: MappingProxyType[str, tuple[str, ...] | str] = MappingProxyType(
    {
        "bart": _Q_V,
        "bert": _QUERY_VALUE,
        "blip-2": ("q", "v", "q_proj", "v_proj"),
        "bloom": _FUSED_QKV,
        "btlm": ("c_proj", "c_attn"),
        "chatglm": _FUSED_QKV,
        "codegen": ("qkv_proj",),
        "deberta": ("in_proj",),
        "deberta-v2": ("query_proj", "value_proj"),
        "electra": _QUERY_VALUE,
        "falcon": _FUSED_QKV,
        "gemma": _Q_V,
        "gemma2": _Q_V,
        "gemma3_text": _Q_V,
        "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
        "gpt2": ("c_attn",),
        "gpt_bigcode": ("c_attn",),
        "gpt_neo": _Q_V,
        "gpt_neox": _FUSED_QKV,
        "gptj": _Q_V,
        "layoutlm": _QUERY_VALUE,
        "llama": _Q_V,
        "llama4": _Q_V,
        "mistral": _Q_V,
        "mixtral": _Q_V,
        "mpt": ("Wqkv",),
        "mt5": ("q", "v"),
        "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "opt": _Q_V,
        "phi": ("q_proj", "v_proj", "fc1", "fc2"),
        "qwen2": _Q_V,
        "qwen3": _Q_V,
        "RefinedWeb": _FUSED_QKV,
        "RefinedWebModel": _FUSED_QKV,
        "roberta": _QUERY_VALUE,
        "rwkv": ("key", "value", "receptance", "output"),
        "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
        "stablelm": _Q_V,
        "t5": ("q", "v"),
        "xlm-roberta": _QUERY_VALUE,
    }
)
