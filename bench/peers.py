"""Kernels of other libraries as contenders, if they are installed: Unsloth's and vLLM's.

They are called as the layers of these libraries call them. If an installed version has another
signature, its row reports an error, and the other contenders are not affected. Their results are
checked like all others.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.bench.contenders import SCALING, Contender, Problem, Results

# By name: the module with the kernels, and the mode that they are for.
PEERS = {
    "unsloth": ("unsloth.kernels.fast_lora", "train"),
    "vllm": ("vllm.lora.ops.triton_ops", "mixed"),
}


def is_installed(name: str) -> bool:
    """Return whether a peer's package is installed, without importing it."""
    return importlib.util.find_spec(name) is not None


def listed() -> list[str]:
    """Return one line about each peer."""
    return [
        f"{name} ({mode}): {module} {'found' if is_installed(name) else 'is not installed'}"
        for name, (module, mode) in PEERS.items()
    ]


def peers_for(mode: str) -> tuple[Contender, ...]:
    """Return the installed peers of a mode."""
    runs: dict[str, Any] = {"unsloth": _unsloth, "vllm": _vllm}
    names = [name for name, (_, own) in PEERS.items() if own == mode and is_installed(name)]
    return tuple(Contender(name, mode, runs[name]) for name in names)


@functools.cache
def _module(name: str) -> Any:
    return importlib.import_module(PEERS[name][0])


def _unsloth(p: Problem) -> Results:
    """Run `LoRA_W` forward and backward on a batch of one sequence."""
    own = p.weight, None, p.lora_a, p.lora_b, SCALING
    y = _module("unsloth").LoRA_W.apply(p.x.unsqueeze(0), *own)[0]
    return (y.detach(), *torch.autograd.grad(y, (p.x, p.lora_a, p.lora_b), p.y))


def _vllm(p: Any) -> Results:
    """Run the base product, `lora_shrink`, and `lora_expand`. Data of the model is cached."""
    ops, (m, _), count = _module("vllm"), p.x.shape, len(p.ranks)
    if "vllm" not in vars(p):
        meta = ops.LoRAKernelMeta.make(count, m, p.x.device)
        meta.prepare_tensors(p.slots.repeat_interleave(m // len(p.slots)).int())
        p.vllm = meta, p.stacked.lora_b.transpose(1, 2).contiguous().unsqueeze(1)
    meta, lora_b = p.vllm
    y, s = F.linear(p.x, p.base.weight), p.x.new_zeros(1, m, max(p.ranks), dtype=torch.float32)
    lora_a = p.stacked.lora_a.unsqueeze(1)
    ops.lora_shrink(p.x, (lora_a,), s, *meta.meta_args(m), SCALING)
    ops.lora_expand(s, (lora_b,), y, *meta.meta_args(m), offset_start=0, add_inputs=True)
    return (y,)
