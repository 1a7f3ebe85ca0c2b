"""Random adapters of PEFT for the tests in vLLM, and PEFT's own answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from vllm.lora.peft_helper import PEFTHelper

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# The margin between the two best logits below which fp32 rounding may choose another token.
NEAR_TIE = 2e-3
# Ranks from 3 to 64; all linear layers, some, or embeddings; patterns; rsLoRA.
CONFIGS: dict[str, dict[str, Any]] = {
    "all-r8": {"r": 8},
    "all-r64": {"r": 64},
    "all-r3": {"r": 3},
    "all-r16-rslora": {"r": 16, "use_rslora": True},
    "qv-r8": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "qkvo-r32": {"r": 32, "target_modules": list(LINEARS[:4])},
    "mlp-r24": {"r": 24, "target_modules": list(LINEARS[4:])},
    "up-r5": {"r": 5, "target_modules": ["up_proj"]},
    "rank-pattern": {"r": 8, "rank_pattern": {"q_proj": 4, "down_proj": 48}},
    "alpha-pattern": {"r": 8, "alpha_pattern": {"o_proj": 40, "k_proj": 3}},
    "embedding-r8": {"r": 8, "target_modules": ["embed_tokens", "o_proj"]},
    "head-r12": {"r": 12, "target_modules": ["lm_head", "q_proj", "gate_proj"]},
}
OLDER_RANKS = {"rank-pattern": 20, "alpha-pattern": 6}
if "rank_pattern" not in {field.name for field in fields(PEFTHelper)}:  # vLLM 0.31
    CONFIGS |= {name: {"r": r, "lora_alpha": 32} for name, r in OLDER_RANKS.items()}


def make_adapters(base: Any, root: Path, configs: dict[str, dict[str, Any]]) -> PeftModel:
    """Save random adapters below a folder, and return PEFT's model with all of them."""
    model: Any = None
    for seed, (name, own) in enumerate(configs.items()):
        torch.manual_seed(seed)
        settings = {"target_modules": list(LINEARS), "lora_alpha": 16, **own}
        config = LoraConfig(init_lora_weights=False, **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        model.save_pretrained(str(root), selected_adapters=[name], save_embedding_layers=False)
    return model.eval()


def copy_damaged(source: Path, root: Path, damage: str) -> Path:
    """Copy an adapter's folder with one kind of damage, which is also the name of the copy."""
    folder = root / damage
    shutil.copytree(source, folder)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "damaged":
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        return folder
    tensors = load_file(weights)
    up = next(name for name in tensors if "layers.3.self_attn.v_proj.lora_B" in name)
    down = up.replace("lora_B", "lora_A")
    if damage == "nan":
        tensors[up][3, 2] = float("nan")
    elif damage == "infinity":
        tensors[down][3, 2] = float("inf")
    elif damage == "outputs":
        tensors[up] = tensors[up][:-1].contiguous()
    elif damage == "inputs":
        tensors[down] = tensors[down][:, :-1].contiguous()
    elif damage == "half":
        del tensors[up]
    elif damage == "ranks":
        tensors[up] = tensors[up][:, :-1].contiguous()
    elif damage == "rank":
        tensors[down], tensors[up] = tensors[down].repeat(9, 1), tensors[up].repeat(1, 9)
    elif damage == "config-rank":
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"r": 128}))
    else:
        raise ValueError(f"unknown damage {damage!r}")
    save_file(tensors, weights)
    return folder


def answer_logits(
    model: PeftModel, name: str | None, prompt: Sequence[int], answer: Sequence[int]
) -> torch.Tensor:
    """PEFT's logits at each token of an answer, ``[tokens, vocabulary]``."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        if name is None:
            with model.disable_adapter():
                logits = model(ids).logits
        else:
            model.set_adapter(name)
            logits = model(ids).logits
    found: torch.Tensor = logits[0, len(prompt) - 1 : -1].float()
    return found


def first_near_tie(logits: torch.Tensor, answer: Sequence[int]) -> int:
    """Check an answer against PEFT's logits up to the first near tie, and return its position.

    The position is the length of the answer if there is none.
    """
    best = logits.topk(2, dim=-1)
    for position, token in enumerate(answer):
        first, second = best.values[position].tolist()
        if first - second <= NEAR_TIE:
            return position
        expected = int(best.indices[position, 0])
        assert token == expected, (position, list(answer), expected, first - second)
    return len(answer)
