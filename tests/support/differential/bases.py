"""The base models of the differential test, and the names that a config can use in each."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from tests.support.tiny import tiny

IDS = torch.tensor([[3, 5, 4, 9], [7, 5, 9, 11], [2, 1, 5, 3]])
SAMPLES = len(IDS)


class Base(NamedTuple):
    """A base model, and what a config can name in it.

    Attributes:
        make: Makes the model in float32, with zero dropout.
        inputs: ``"ids"`` or the name of the argument that takes float inputs of shape ``shape``.
        shape: Shape of the float inputs, and of ``inputs_embeds`` where the inputs are ids.
        targets: Names for ``target_modules``; linears first.
        linears: The number of linears among them.
        regexes: Expressions for ``target_modules``.
        saved: Names for ``modules_to_save``.
        tokens: Names of embeddings for ``trainable_token_indices``; the first one is the input's.
        task_types: Values for ``task_type``.
        layers: The number of layers that ``layers_to_transform`` can choose from.
        decodes: Whether the model takes ``decoder_input_ids`` too.
    """

    make: Callable[[], nn.Module]
    inputs: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    linears: int
    regexes: tuple[str, ...]
    saved: tuple[str, ...]
    tokens: tuple[str, ...] = ()
    task_types: tuple[str | None, ...] = (None,)
    layers: int = 2
    decodes: bool = False


class Convolutions(nn.Module):
    """An embedding, convolutions in one and two dimensions, and linears behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8)
        self.line = nn.Conv1d(8, 6, 3, padding=1)
        self.plane = nn.Conv2d(1, 4, (3, 2), padding=1, bias=False)
        self.norm = nn.LayerNorm(4)
        self.inner = nn.Linear(4, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Maps ids ``[B, T]`` and inputs ``[B, T, 8]`` to ``[B, 5]``."""
        line = self.line((self.embed(input_ids) + x).transpose(1, 2)).tanh()
        plane = self.plane(line[:, None]).tanh().flatten(2).transpose(1, 2)
        return self.head(self.inner(self.norm(plane)).tanh()).mean(1)


_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_layer": 2}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2}
_WHISPER: dict[str, Any] = {
    **{"num_mel_bins": 6, "max_source_positions": 6, "max_target_positions": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}


def _causal(kind: str, targets: tuple[str, ...], **changes: Any) -> Base:
    return Base(
        lambda: tiny(kind, num_hidden_layers=2, **changes),
        "ids",
        (SAMPLES, 4, 16),
        (*targets, "lm_head", "embed_tokens"),
        len(targets) + 1,
        (r".*\.layers\.1\.self_attn.*_proj", r".*self_attn\.[qv]_proj$"),
        ("lm_head", "embed_tokens", "norm"),
        ("embed_tokens", "lm_head"),
        (None, "CAUSAL_LM"),
    )


BASES: dict[str, Base] = {
    "Llama": _causal("LlamaForCausalLM", _DECODER, attention_bias=True),
    "Qwen3": _causal("Qwen3ForCausalLM", _DECODER),
    "Mixtral": _causal(
        "MixtralForCausalLM",
        _DECODER[:4],
        num_local_experts=3,
        experts_implementation="eager",  # the others take no float64
    ),
    "GPT-2": Base(
        lambda: tiny("GPT2LMHeadModel", bos_token_id=1, eos_token_id=2, **_GPT2),
        "ids",
        (SAMPLES, 4, 16),
        ("c_attn", "c_proj", "c_fc", "attn.c_proj", "lm_head", "wte"),
        4,
        (r".*\.h\.1\..*c_proj", r".*(c_attn|mlp\.c_fc)"),
        ("lm_head", "ln_f", "wpe"),
        ("wte",),
        (None, "CAUSAL_LM"),
    ),
    "BERT": Base(
        lambda: tiny("BertForSequenceClassification", num_labels=3, **_BERT),
        "ids",
        (SAMPLES, 4, 16),
        ("query", "key", "value", "dense", "output.dense", "word_embeddings"),
        5,
        (r".*layer\.0\..*(query|value)", r".*attention\.output\.dense"),
        ("classifier", "pooler", "LayerNorm"),
        ("word_embeddings", "position_embeddings"),
        (None, "SEQ_CLS"),
    ),
    "T5": Base(
        lambda: tiny("T5ForConditionalGeneration", dropout_rate=0.0, decoder_start_token_id=0),
        "ids",
        (SAMPLES, 4, 16),
        ("q", "k", "v", "o", "wi", "wo", "EncDecAttention.q", "lm_head", "shared"),
        7,
        (r".*encoder\..*\.(q|wi)", r".*EncDecAttention\.[kv]"),
        ("final_layer_norm", "wo"),
        ("shared",),
        (None, "SEQ_2_SEQ_LM"),
        layers=1,
        decodes=True,
    ),
    "ViT": Base(
        lambda: tiny("ViTForImageClassification", image_size=8, patch_size=4, num_labels=3),
        "pixel_values",
        (SAMPLES, 3, 8, 8),
        ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "projection"),
        6,
        (r".*attention\.[qv]_proj", r"vit\.layers\.0\..*"),
        ("classifier", "layernorm"),
        layers=1,
    ),
    "Whisper": Base(
        lambda: tiny("WhisperForConditionalGeneration", **_WHISPER),
        "input_features",
        (SAMPLES, 6, 12),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1"),
        6,
        (r".*decoder.*encoder_attn\.[qv]_proj", r".*encoder\..*(fc1|k_proj)"),
        ("layer_norm", "fc2"),
        ("decoder.embed_tokens",),
        layers=1,
        decodes=True,
    ),
    "convolutions": Base(
        Convolutions,
        "x",
        (SAMPLES, 4, 8),
        ("inner", "head", "line", "plane", "embed"),
        2,
        (r"inner|line", r"(plane|embed)"),
        ("head", "norm"),
        ("embed",),
    ),
}


@functools.cache
def _made(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BASES[name].make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # transformers starts them at zero, which hides scales
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
            elif parameter.dim() > 1:  # larger than transformers' 0.02, or nothing has an effect
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values / parameter[0].numel() ** 0.5)
    return model.eval()


def fresh(name: str, dtype: torch.dtype) -> Any:
    """A base model in a dtype; the same values at every call."""
    return copy.deepcopy(_made(name)).to(dtype)


def inputs_of(name: str, dtype: torch.dtype, embedded: bool) -> tuple[dict[str, Any], Any]:
    """The arguments of a forward, and the one among them that takes a gradient, or None.

    Args:
        name: A base model's.
        dtype: Of the float inputs.
        embedded: Pass ``inputs_embeds`` in place of ids, where the model takes ids.
    """
    base = BASES[name]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(base.shape, generator=generator).to(dtype).requires_grad_()
    arguments: dict[str, Any] = {}
    if base.decodes:
        arguments["decoder_input_ids"] = IDS.flip(1)
    if base.inputs == "ids" and not embedded:
        return {"input_ids": IDS, **arguments}, None
    if base.inputs == "x":
        arguments["input_ids"] = IDS
    return {"inputs_embeds" if base.inputs == "ids" else base.inputs: x, **arguments}, x
