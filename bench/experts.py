"""Experts of a mixture of experts: fastlora, PEFT, and the base model, on a CPU.

python bench/experts.py [--tokens 8,256,1024] [--adapters 1,4] [--dtypes fp32,bf16] [--out CSV]

The module is Qwen3-MoE's experts with random weights, 512 x 192, 128 experts, 8 of them for each
token, and adapters of rank 16 on both stacks. The choices of experts are random. A step consists of
a forward and a backward pass with gradients of x and of the factors, which are deleted after it. A
forward pass is an evaluation without gradients. The base model's step computes the gradient of x
alone.

With several adapters, each of them has the same number of tokens. fastlora runs them in one batch.
PEFT runs one adapter after another, because its experts do not support mixed batches. Adapters have
the default dtype of both libraries, fp32.

The sides run in turn on one thread of one process, over one copy of the base weights. The clock is
the CPU time of this process. Outputs are compared with PEFT's before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fastlora
from fastlora.bench import measure
from fastlora.bench.cpu_run import DTYPES, csv_rows
from fastlora.bench.machine import results_folder

HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN, RANK = 512, 192, 128, 8, 16
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
# Largest relative difference between the outputs of both libraries.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}

Side = Callable[[], object]


class Tokens(NamedTuple):
    """The inputs of the experts for T tokens.

    Attributes:
        x: ``[T, H]``.
        index: The chosen experts, ``[T, k]``.
        weights: Their weights, ``[T, k]``.
    """

    x: torch.Tensor
    index: torch.Tensor
    weights: torch.Tensor

    def part(self, number: int, count: int) -> Tokens:
        """Return one of ``count`` equal parts."""
        return Tokens(*(tensor.chunk(count)[number] for tensor in self))


class Block(nn.Module):
    """The experts of one layer of a Qwen3-MoE with random weights."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        from transformers.models.qwen3_moe import Qwen3MoeConfig, modeling_qwen3_moe

        config = Qwen3MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=INTERMEDIATE,
            num_experts=EXPERTS,
            num_experts_per_tok=PER_TOKEN,
        )
        config._experts_implementation = "grouped_mm"
        self.experts: nn.Module = modeling_qwen3_moe.Qwen3MoeExperts(config)
        generator = torch.Generator().manual_seed(0)
        for stack in self.experts.parameters():
            values = torch.randn(stack.shape, generator=generator) / stack.shape[2] ** 0.5
            stack.data = values.to(dtype)

    def forward(self, *tokens: torch.Tensor) -> torch.Tensor:
        """Map x ``[T, H]``, with the chosen experts and their weights, to ``[T, H]``."""
        y: torch.Tensor = self.experts(*tokens)
        return y


def main() -> int:
    """Measure all cases and write the CSV, each row as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="8,256,1024")
    parser.add_argument("--adapters", default="1,4")
    parser.add_argument("--dtypes", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=results_folder() / "experts_cpu.csv")
    args = parser.parse_args()
    cases = itertools.product(
        args.dtypes.split(","),
        map(int, args.adapters.split(",")),
        map(int, args.tokens.split(",")),
    )
    common = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "experts": EXPERTS}
    common |= {"experts_per_token": PER_TOKEN, "rank": RANK}
    with csv_rows(args.out) as write:
        for dtype, adapters, tokens in cases:
            row = measured(dtype, adapters, tokens, args.rounds)
            write(common | row)
            show(row)
    return 0


def measured(dtype: str, adapters: int, count: int, rounds: int) -> dict[str, Any]:
    """Check and time one case and return its row."""
    names = [f"adapter{number}" for number in range(adapters)]
    tokens = draw_tokens(count, DTYPES[dtype])
    ours, theirs = twins(DTYPES[dtype], names)
    runs = {"base": run_base(ours), "peft": run_peft(theirs, names), "ours": run_ours(ours, names)}
    with torch.no_grad():
        found, expected = (torch.cat(runs[side](tokens)).float() for side in ("ours", "peft"))
    if not (found - expected).norm() <= TOLERANCE[dtype] * expected.norm():
        raise RuntimeError("the outputs of fastlora and PEFT differ")
    trained = [p for model in (ours, theirs) for p in model.parameters() if p.requires_grad]
    row: dict[str, Any] = {"dtype": dtype, "adapters": adapters, "tokens": count}
    for kind, make in (("step", step), ("forward", forward)):
        sides = {name: make(run, tokens, trained) for name, run in runs.items()}
        if kind == "forward":
            for model in (ours, theirs):
                model.eval()
        times = measure.interleaved_seconds(sides, rounds, warmup=2)
        for name in ("base", "peft", "ours"):
            shown = {"ours": "fastlora"}.get(name, name)
            row[f"{kind}_{shown}_ms"] = f"{statistics.median(times[name]) * 1e3:.2f}"
        for other in ("peft", "base"):
            ratio = measure.median_ratio(times, "ours", other)
            row[f"{kind}_ratio_to_{other}"] = f"{ratio:.4f}"
        peaks = {name: measure.peak_step_bytes(side) for name, side in sides.items()}
        for name, peak in peaks.items():
            shown = {"ours": "fastlora"}.get(name, name)
            row[f"{kind}_{shown}_peak_mib"] = f"{peak / 2**20:.4f}"
    return {**row, "rounds": rounds}


def twins(dtype: torch.dtype, names: list[str]) -> tuple[Any, Any]:
    """Return fastlora's model and PEFT's with the same random adapters, on one base module."""
    import peft

    made = []
    for library in (fastlora, peft):
        config = {"r": RANK, "lora_alpha": 2 * RANK, "target_parameters": STACKS}
        configs = [library.LoraConfig(**config, target_modules=[]) for _ in names]
        model: Any = library.get_peft_model(Block(dtype), configs[0], names[0])
        for name, each in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, each)
        made.append(model.train())
    ours, theirs = made
    fastlora.train.train_adapters(ours, names)
    generator = torch.Generator().manual_seed(7)
    for name in names:
        for factor in factors_of(ours, name):
            values = torch.randn(factor.shape, generator=generator)
            factor.data.copy_(values * (0.3 / factor.shape[1] ** 0.5))
        for own, other in zip(factors_of(ours, name), factors_of(theirs, name), strict=True):
            other.data.copy_(own)
    for own, other in zip(stacks_of(ours), stacks_of(theirs), strict=True):
        other.data = own.data
    return ours, theirs


def factors_of(model: Any, name: str) -> list[nn.Parameter]:
    """Return an adapter's factors: of gate_up_proj, then of down_proj, lora_A first."""
    found = [
        (layer.parameter_name != "gate_up_proj", layer)
        for layer in model.modules()
        if hasattr(layer, "parameter_name")
    ]
    layers = [layer for _, layer in sorted(found, key=lambda pair: pair[0])]
    return [side[name].weight for layer in layers for side in (layer.lora_A, layer.lora_B)]


def stacks_of(model: nn.Module) -> list[nn.Parameter]:
    """Return the stacks of the base module."""
    return [parameter for parameter in model.parameters() if parameter.dim() == 3]


def draw_tokens(count: int, dtype: torch.dtype) -> Tokens:
    """Return random tokens with random experts."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weights, index = torch.rand(count, EXPERTS, generator=generator).topk(PER_TOKEN)
    return Tokens(x, index, (weights / weights.sum(1, keepdim=True)).to(dtype))


def run_base(model: Any) -> Callable[[Tokens], list[torch.Tensor]]:
    """Return a function that runs the module without adapters."""
    experts = next(m for m in model.modules() if type(m).__name__ == "Qwen3MoeExperts")
    return lambda tokens: [experts(*tokens)]


def run_ours(model: Any, names: list[str]) -> Callable[[Tokens], list[torch.Tensor]]:
    """Return a function that runs all adapters of fastlora's model in one batch."""

    def run(tokens: Tokens) -> list[torch.Tensor]:
        if len(names) == 1:
            return [model(*tokens)]
        ids = [name for name in names for _ in range(len(tokens.x) // len(names))]
        with fastlora.adapters(model, ids):
            return [model(*tokens)]

    return run


def run_peft(model: Any, names: list[str]) -> Callable[[Tokens], list[torch.Tensor]]:
    """Return a function that runs the adapters of PEFT's model one after another."""

    def run(tokens: Tokens) -> list[torch.Tensor]:
        outputs = []
        for number, name in enumerate(names):
            if len(names) > 1:
                model.set_adapter(name)
            outputs.append(model(*tokens.part(number, len(names))))
        return outputs

    return run


def step(
    run: Callable[[Tokens], list[torch.Tensor]], tokens: Tokens, trained: list[nn.Parameter]
) -> Side:
    """Return a function that runs a forward and a backward pass and deletes the gradients."""
    dy = torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(2)).to(tokens.x.dtype)

    def once() -> None:
        outputs = run(tokens)
        torch.autograd.backward(outputs, list(dy.chunk(len(outputs))))
        for parameter in (tokens.x, *trained):
            parameter.grad = None

    return once


def forward(
    run: Callable[[Tokens], list[torch.Tensor]], tokens: Tokens, trained: list[nn.Parameter]
) -> Side:
    """Return a function that runs a forward pass without gradients."""

    def once() -> None:
        with torch.no_grad():
            run(tokens)

    return once


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    parts = [
        f"{kind}: base {row[f'{kind}_base_ms']} ms, PEFT {row[f'{kind}_peft_ms']} ms, fastlora "
        f"{row[f'{kind}_fastlora_ms']} ms ({row[f'{kind}_ratio_to_peft']} of PEFT, "
        f"{row[f'{kind}_ratio_to_base']} of base), peak {row[f'{kind}_fastlora_peak_mib']} MiB "
        f"(PEFT {row[f'{kind}_peft_peak_mib']})"
        for kind in ("step", "forward")
    ]
    case = f"{row['dtype']}, {row['adapters']} adapters, {row['tokens']} tokens"
    print(f"{case}: {'; '.join(parts)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
