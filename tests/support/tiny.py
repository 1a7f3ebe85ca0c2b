"""Small models that several test files share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn

import fastlora


def tiny_llama(**changes: Any) -> Any:
    """A random Llama of two layers (needs transformers); the same one at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "tie_word_embeddings": True,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**config))


# What architectures call the same sizes.
_TINY = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "num_decoder_layers", "n_layer"), 1),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_head"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 16),
    **{"vocab_size": 31, "head_dim": 8, "d_kv": 8, "d_ff": 24},
}


def tiny(kind: str, **changes: Any) -> Any:
    """A random model of a class of transformers', in evaluation; the same one at every call."""
    import transformers

    cls = getattr(transformers, kind)
    known = cls.config_class().to_dict()
    sizes = {name: size for name, size in _TINY.items() if name in known}
    torch.manual_seed(0)
    return cls(cls.config_class(**{**sizes, **changes})).eval()


class TwoLayers(nn.Module):
    """Two linears, a norm and a head, without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 24)
        self.norm = nn.LayerNorm(24)
        self.v = nn.Linear(24, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., 16]`` to ``[..., 5]``."""
        return self.head(self.v(self.norm(self.q(x)).relu()))


class Gated(nn.Module):
    """Two linears fed by one tensor, and one behind them that is called as it is, or is not."""

    def __init__(self, width: int = 16, inner: int = 24, called: bool = True) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)
        if called:
            self.down.register_forward_hook(lambda module, args, y: y * 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[..., width]`` to ``[..., width]``."""
        return self.down(self.gate(x).tanh() * self.up(x))


def with_adapters(
    base: nn.Module, configs: Mapping[str, Any], library: Any = fastlora, **options: Any
) -> Any:
    """Puts adapters into a model, in this order; ``options`` go to `get_peft_model`."""
    (first, config), *others = configs.items()
    model = library.get_peft_model(base, config, first, **options)
    for name, other in others:
        model.add_adapter(name, other)
    return model


def two_layers() -> nn.Module:
    """The base of `adapted`."""
    torch.manual_seed(0)
    return TwoLayers()


def adapted(
    library: Any = fastlora, seed: int = 1, base: nn.Module | None = None, **config: Any
) -> Any:
    """A model, `TwoLayers` unless another is given, with one random adapter, in evaluation mode.

    It is the same at every call, and in both libraries.
    """
    base = two_layers() if base is None else base
    torch.manual_seed(seed)
    config = {"r": 4, "target_modules": ["q", "v"], **config}
    model = library.get_peft_model(base, library.LoraConfig(**config))
    randomize(model, seed)
    return model.eval()


def in_a_wrapper(how: str, module: nn.Module | None = None) -> nn.Sequential:
    """`two_layers` as the module ``0``, as it is (``"none"``), compiled, or checkpointed."""
    base = nn.Sequential(two_layers() if module is None else module)
    if how == "compiled":
        base[0] = torch.compile(base[0], backend="eager")  # type: ignore[assignment]
    elif how == "checkpointed":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        base[0] = checkpoint_wrapper(base[0])
    return base


@contextlib.contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """Behind the block all is as it was: modules, values, what trains, configs, who acts."""
    before = [(_values(model), _facts(model)) for model in models]
    yield
    for model, (values, facts) in zip(models, before, strict=True):
        assert _facts(model) == facts
        torch.testing.assert_close(_values(model), values, rtol=0, atol=0, equal_nan=True)


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _facts(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    return [
        [(name, id(module)) for name, module in model.named_modules()],
        [name for name, p in model.named_parameters() if p.requires_grad],
        list(getattr(model, "peft_config", ())),
        getattr(model.base_model, "active_adapters", None)
        if hasattr(model, "peft_config")
        else None,
        config.to_dict() if hasattr(config, "to_dict") else config,
    ]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def randomize(model: nn.Module, seed: int = 7) -> None:
    """Gives every lora_B of a model a random value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def quantized_two_layers(kind: str) -> nn.Module:
    """A TwoLayers whose q is quantized."""
    torch.manual_seed(0)
    model = TwoLayers()
    if kind == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes")
        q = bnb.nn.Linear4bit(16, 24, compute_dtype=torch.float32, quant_type="nf4")
        q.load_state_dict(model.q.state_dict())
        model.q = q.to("cpu")
        model.is_loaded_in_4bit = True
    else:
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.q, torchao.Int8WeightOnlyConfig(version=2))
    return model
