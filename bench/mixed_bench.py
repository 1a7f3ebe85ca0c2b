"""``fastlora bench mixed``: the cost of a batch of many adapters on a given model.

For each number of adapters, the same sequences form a batch in which each sequence has a random
adapter. The batch is timed as one mixed batch, with PEFT's ``adapter_names``, and one adapter after
another, relative to the bare base model. Adapters are random, on all linear layers. All results are
compared with float64 first.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastlora.bench import measure, mixed_report
from fastlora.bench.mixed_contest import Contest, Row
from fastlora.command_line import install_command
from fastlora.commands.options import Option, parse_options
from fastlora.integrations.transformers import quiet_transformers
from fastlora.model.config import LoraConfig
from fastlora.model.targets import find_target_modules
from fastlora.validation import FastLoraError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Number of adapter sets that a model caches in packed form. Each is a copy of the factors.
_PACKED_SETS = 2


class BenchError(FastLoraError, ValueError):
    """The benchmark cannot run because of an option, the model, or too little memory."""


def counts(text: str) -> list[int]:
    """Parse ``"1,4,16"`` for argparse into positive numbers, ascending and without duplicates."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise argparse.ArgumentTypeError(
            f"expected positive numbers with commas between, such as 1,4,16,64, got {text!r}"
        )
    return found


OPTIONS = (
    Option(
        "--model",
        "model folder of transformers",
        *(None, None, Path, "DIR", {"required": True}),
    ),
    Option(
        "--adapters",
        "how many different adapters a batch has (default: 1,4,16,64)",
        *([1, 4, 16, 64], None, counts, "N,N,..."),
    ),
    Option("--rank", "rank of each adapter", 16, 1),
    Option("--sequences", "sequences in a batch", 64, 1),
    Option("--tokens", "tokens of each: 1 is a step of decoding, more a prefill", 1, 1),
    Option(
        "--dtype",
        "dtype of the model and the adapters (default: auto, the model's own)",
        "auto",
        more={"choices": ("auto", *DTYPES)},
    ),
    Option("--threads", "CPU threads", 1, 1),
    Option("--rounds", "timed rounds", 5, 1),
    Option("--out", "where mixed.csv and mixed.png go", Path("bench-mixed"), type=Path),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse ``argv`` and run the benchmark."""
    text = (__doc__ or "").replace("``", "")
    return run(parse_options("fastlora bench mixed", text, OPTIONS, argv))


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and return the exit code 0.

    Raises:
        BenchError: An option is invalid, the model cannot be used, or there is too little memory.
            This is raised before any weight is read.
        WrongResultError: The results of a side are wrong.
    """
    check_options(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with quiet_transformers():
        plan = plan_for(args)
        check_memory(plan, args, free_bytes(device))
        args.out.mkdir(parents=True, exist_ok=True)  # fails early if unwritable
        torch.manual_seed(0)
        model = plan.load().to(device)
        with measure.torch_threads(args.threads):
            rows = compare(
                model, args.adapters, args.rank, args.sequences, args.tokens, args.rounds
            )
    facts = {
        "model": args.model.resolve().name,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": args.threads,
        "torch": torch.__version__,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "rank": args.rank,
        "sequences": args.sequences,
        "tokens": args.tokens,
    }
    title = describe(facts)
    sys.stdout.write(f"{title}\n\n{mixed_report.table(rows)}\n\n{footnote(args.rounds, device)}\n")
    mixed_report.write_csv(args.out / "mixed.csv", facts, rows)
    sys.stdout.write(f"{args.out / 'mixed.csv'}\n")
    try:
        mixed_report.plot(args.out / "mixed.png", title, rows)
        sys.stdout.write(f"{args.out / 'mixed.png'}\n")
    except ImportError:
        sys.stdout.write(f"no picture: {mixed_report.PLOT_HINT}\n")
    return 0


def describe(facts: dict[str, Any]) -> str:
    """Return one line that describes the measurement."""
    tokens = f"{facts['tokens']} token" + ("s" if facts["tokens"] > 1 else "")
    where = facts["device"]
    if where == "cpu":
        where = f"CPU, {facts['threads']} thread" + ("s" if facts["threads"] > 1 else "")
    return (
        f"{facts['model']}, {facts['dtype']}, {where}: {facts['sequences']} sequences of {tokens}, "
        f"adapters of rank {facts['rank']}"
    )


def footnote(rounds: int, device: torch.device) -> str:
    """Return an explanation of the table."""
    clock = "CUDA events" if device.type == "cuda" else "CPU time of the process"
    return (
        f"time over the base model: medians of {rounds} interleaved rounds' ratios, {clock};\n"
        "all results were within the rounding of the dtype, by float64"
    )


def compare(
    model: Any, adapters: Sequence[int], rank: int, sequences: int, tokens: int, rounds: int
) -> list[Row]:
    """Check and time mixed batches for each number of adapters.

    Args:
        model: A transformers model that takes only ``input_ids``. `Contest` describes how it is
            changed.
        adapters: Numbers of different adapters.
        rank: Rank of each adapter.
        sequences: Number of sequences in a batch.
        tokens: Number of tokens in a sequence.
        rounds: Number of timed rounds.

    Raises:
        WrongResultError: The results of a side are wrong.
    """
    from tqdm import tqdm

    most = max(adapters)
    with tqdm(total=most, desc="adding adapters", unit="adapter", leave=False) as bar:
        contest = Contest(model, most, rank, on_adapter=bar.update)
    ids = contest.random_ids(sequences, tokens)
    rows: list[Row] = []
    steps = len(adapters) * (1 + rounds)
    with tqdm(total=steps, desc="measuring mixed batches", unit="round", leave=False) as bar:
        for count in adapters:
            bar.set_postfix_str(f"{count} adapters")
            mix = contest.random_mix(sequences, count)
            rows += contest.measure(contest.sides(mix, ids), mix, ids, rounds, bar.update)[0]
    return rows


# ------------------------------------------------------------------------ checks before the work


@dataclass(frozen=True)
class Plan:
    """How to load a model, and the memory that it needs.

    Attributes:
        load: Returns the model on the CPU.
        dtype: Dtype of the weights.
        weights: Bytes of the weights.
        adapter: Bytes of one adapter.
        outputs: Bytes of a forward pass's results and of the largest weight in float64.
    """

    load: Callable[[], Any]
    dtype: torch.dtype
    weights: int
    adapter: int
    outputs: int


def check_options(args: argparse.Namespace) -> None:
    """Raise `BenchError` for an invalid option or an invalid combination of options."""
    if max(args.adapters) > args.sequences:
        raise BenchError(
            f"--adapters asks for {max(args.adapters)} different adapters in a batch of "
            f"{args.sequences} sequences; expected at most one for each (--sequences)"
        )
    if not args.model.is_dir():
        raise BenchError(f"{args.model}: no such folder; expected a model that transformers loads")
    if args.out.exists() and not args.out.is_dir():
        raise BenchError(f"{args.out}: not a folder; expected one for the results (--out)")
    missing = [n for n in ("transformers", "peft", "tqdm") if importlib.util.find_spec(n) is None]
    if missing:
        raise BenchError(
            f"{' and '.join(missing)} not installed; install with: {install_command('demo')}"
        )


def plan_for(args: argparse.Namespace) -> Plan:
    """Read the model's config, without its weights.

    Raises:
        BenchError: transformers cannot load the model, or it needs more inputs than token ids.
        TargetNotFoundError: The model has no linear layers.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel
    from transformers import AutoModelForCausalLM as CausalLM

    folder = str(args.model)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"{folder}: transformers cannot load its config ({error})") from error
    own = getattr(config, "dtype", None) or torch.float32
    dtype = own if args.dtype == "auto" else DTYPES[args.dtype]
    auto = CausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModel
    if getattr(config, "is_encoder_decoder", False):
        raise BenchError(f"{folder}: an encoder with a decoder, expected a model of one part")
    try:
        with torch.device("meta"):
            skeleton = auto.from_config(config, dtype=dtype)
        embedding = skeleton.get_input_embeddings()
    except (ValueError, NotImplementedError) as error:
        raise BenchError(f"{folder}: cannot be used ({error})") from error
    if not isinstance(embedding, nn.Embedding):
        raise BenchError(f"{folder}: {type(skeleton).__name__} takes no token ids")
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and args.tokens > longest:
        raise BenchError(f"--tokens is {args.tokens}, expected at most the model's {longest}")
    targets = find_target_modules(skeleton, LoraConfig(target_modules="all-linear"))
    shapes = [skeleton.get_submodule(name).weight.shape for name in targets]

    def load() -> Any:
        try:
            return auto.from_pretrained(folder, dtype=dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            raise BenchError(f"{folder}: transformers cannot load it ({error})") from error

    return Plan(
        load=load,
        dtype=dtype,
        weights=sum(p.numel() * p.element_size() for p in skeleton.parameters()),
        adapter=sum(args.rank * sum(shape) for shape in shapes) * dtype.itemsize,
        outputs=8 * embedding.num_embeddings * (args.sequences * args.tokens)
        + 8 * max(p.numel() for p in skeleton.parameters()),
    )


def check_memory(plan: Plan, args: argparse.Namespace, free: int | None) -> None:
    """Raise `BenchError` if the benchmark needs more memory than is free.

    ``free`` is None if the free memory is unknown.
    """
    largest = sorted(args.adapters)[-_PACKED_SETS:]
    held = max(args.adapters) + sum(largest)
    needed = plan.weights + held * plan.adapter + plan.outputs
    if free is not None and needed > free:
        raise BenchError(
            f"needs some {_gib(needed)}, and {_gib(free)} are free: {_gib(plan.weights)} for the "
            f"model, {_gib(held * plan.adapter)} for {max(args.adapters)} adapters of "
            f"{plan.adapter / 2**20:,.1f} MiB and packed copies of "
            f"{' and '.join(map(str, largest))}, {_gib(plan.outputs)} for results in float64; "
            "ask for fewer --adapters, a smaller --rank or a smaller --dtype"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, or None if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    kib = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return kib[0] * 1024 if kib else None


def _gib(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB"


if __name__ == "__main__":
    sys.exit(main())
