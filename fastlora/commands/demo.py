"""``fastlora demo``: three adapters trained at once on a real model, and compared with PEFT.

Every number that the demo prints was measured in the run that prints it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora import env
from fastlora.bench import measure, mixed_bench, mixed_report
from fastlora.commands import smollm2
from fastlora.commands.demo_data import make_batches, read_styles, shipped
from fastlora.commands.demo_peft import compare, load_in_peft
from fastlora.integrations.transformers import quiet_transformers
from fastlora.train import AdapterOptimizers, causal_lm_losses, train_adapters
from fastlora.train.data import Batch, Corpus, read_samples
from fastlora.validation import ConfigError

# Each style its own rank, alpha and target modules: they train in one batch all the same.
STYLES: dict[str, dict[str, Any]] = {
    "ships_log": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "json_answer": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "robot": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}
LEARNING_RATE, BATCH = 2e-3, 8
ANSWER_TOKENS = 40
# The table of part 6.
RANK, SEQUENCES, TABLE_ROUNDS = 16, 64, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to ``parser``."""
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where the converted model is kept"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        action="append",
        help="JSON lines with 'prompt' and 'completion', an adapter each; repeatable",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(".demo/adapters"),
        help="where the adapters are saved (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="ask this when trained, in place of two prompts that come with the demo; repeatable",
    )
    parser.add_argument("--steps", type=int, default=22, help="training steps (default: 22)")
    parser.add_argument("--rounds", type=int, default=5, help="timed pairs (default: 5)")
    parser.add_argument(
        "--adapters",
        type=mixed_bench.counts,
        default=[1, 4, 16, 64],
        metavar="N,N,...",
        help="numbers of adapters in the last table (default: 1,4,16,64)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit code: 1 when PEFT's logits differ from ours.

    Raises:
        FastLoraError: Missing data, a missing model, or an argument that makes no sense.
    """
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if max(args.adapters) > SEQUENCES:
        raise ConfigError(
            f"--adapters must be at most {SEQUENCES}, the sequences of a batch, got "
            f"{max(args.adapters)}"
        )
    env.prepare_demo_process()
    started = time.monotonic()
    files = args.data or [shipped(f"{style}.jsonl") for style in STYLES]
    for path in files:
        read_samples([path])  # what is wrong with a file is said before a model is read
    prompts = args.prompt or shipped("unseen_prompts.txt").read_text("utf-8").splitlines()[:2]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    folder = smollm2.model_dir(args.cache)
    tokenizer = smollm2.load_tokenizer(folder)
    data = read_styles(files, tokenizer)

    def fresh_base() -> Any:
        return smollm2.load_model(folder).to(device)

    base = fresh_base()
    parameters = sum(p.numel() for p in base.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    _say(f"SmolLM2-135M-Instruct, {parameters:,} parameters, fp32, on {where}")

    with quiet_transformers():
        _heading(f"1  {len(data)} adapters fine-tuned at once, in mixed batches")
        model = add_adapters(base, data)
        batches = make_batches(data, tokenizer.pad_token_id, args.steps, BATCH, device)
        clock = time.monotonic()
        losses = train(model, batches)
        seconds = time.monotonic() - clock
        for name, seen in losses.items():
            _say(f"{name:<12} {_losses(seen)}")
        _say(f"{len(batches)} steps of {BATCH} samples, adapters at random, in {seconds:.1f} s")

        _heading("2  Unseen prompts, each in one mixed batch: the base model and every adapter")
        model.eval()
        columns = [None, *data]
        answers = [answer(model, tokenizer, prompt, columns) for prompt in prompts]
        _say(side_by_side([name or "base model" for name in columns], prompts, answers))

        _heading("3  Saved in PEFT's format, loaded back with PEFT: one mixed batch in both")
        model.save_pretrained(str(args.out))
        for path in sorted(args.out.glob("*/adapter_*")):
            _say(f"{path}  {path.stat().st_size:,} bytes")
        twin, agrees, text = load_in_peft(model, fresh_base, args.out, batches[0])
        _say(text)

        _heading("4  What is fused")
        _say(str(fastlora.fusion_report(model)))

        first = next(iter(data))
        _heading(f"5  {first} alone against PEFT: same weights, same batch, same process")
        _say(compare(model, twin, first, batches[0], args.rounds, device))

        _heading("6  Mixed batches against PEFT and against one adapter after another")
        del model, twin
        _say(mixed_table(fresh_base(), args.adapters, device))
    _say(f"\nwhole demo: {time.monotonic() - started:.0f} s")
    if not agrees:
        sys.stderr.write("fastlora demo: the logits differ from PEFT's by more than rounding\n")
    return 0 if agrees else 1


def add_adapters(base: Any, data: Mapping[str, Corpus]) -> Any:
    """Returns the model with an adapter for each style, all trainable."""
    model: Any = None
    for name, corpus in data.items():
        config = fastlora.LoraConfig(**STYLES.get(name, STYLES["ships_log"]), task_type="CAUSAL_LM")
        if model is None:
            model = fastlora.get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        targets = config.target_modules or ()
        where = "all linear layers" if targets == "all-linear" else ", ".join(sorted(targets))
        _say(f"{name:<12} {len(corpus)} examples, rank {config.r} on {where}")
    train_adapters(model, list(data))
    return model


def train(model: Any, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """Trains every adapter with an AdamW of its own; returns the losses of each.

    An adapter without a sample in a batch does not move in that step.
    """
    from tqdm import tqdm

    losses: dict[str, list[float]] = {name: [] for name in model.peft_config}
    adamw = partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0)
    optimizers = AdapterOptimizers(model, dict.fromkeys(losses, adamw), max_grad_norm=1.0)
    model.train()
    with tqdm(batches, desc="training", unit="step") as bar:
        for batch in bar:
            with fastlora.adapters(model, batch.adapters):
                logits = model(**batch.inputs, use_cache=False).logits
            found = causal_lm_losses(logits, batch.labels, batch.adapters)
            optimizers.backward(found)
            optimizers.step()
            optimizers.zero_grad()
            for name, value in found.values.items():
                losses[name].append(value)
            bar.set_postfix_str(
                ", ".join(f"{n} {seen[-1]:.2f}" for n, seen in losses.items() if seen)
            )
    return losses


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompt: str, names: Sequence[str | None] | None = None
) -> list[str]:
    """Returns greedy answers to one prompt, without a system prompt, from one batch.

    Args:
        model: In evaluation mode.
        tokenizer: Its own.
        prompt: The question.
        names: An adapter, or None for the base model alone, for each answer; None asks a model
            without adapters once.
    """
    text = smollm2.chat_prompt(prompt)
    routed = {} if names is None else {"adapter_names": names}
    inputs = tokenizer(
        [text] * len(names or [None]), return_tensors="pt", add_special_tokens=False
    ).to(model.device)
    output = model.generate(
        **inputs,
        **routed,
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    for new in output[:, inputs["input_ids"].shape[1] :]:
        ended = tokenizer.eos_token_id in new.tolist()
        decoded = tokenizer.decode(new, skip_special_tokens=True).strip()
        answers.append(decoded + ("" if ended else " ..."))
    return answers


def mixed_table(base: Any, adapters: Sequence[int], device: torch.device) -> str:
    """Returns what a step of decoding costs with so many adapters in the batch."""
    with measure.torch_threads(1):
        rows = mixed_bench.compare(base, adapters, RANK, SEQUENCES, 1, TABLE_ROUNDS)
    note = mixed_bench.footnote(TABLE_ROUNDS, device)
    shape = f"{SEQUENCES} sequences decode a token; random adapters, rank {RANK}, all linear layers"
    return f"{shape}\n\n{mixed_report.table(rows)}\n\n{note}"


def side_by_side(
    titles: Sequence[str], prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> str:
    """Returns each prompt's answers in columns, together as wide as the terminal (at most 120)."""
    total = min(shutil.get_terminal_size((100, 24)).columns, 120)
    width = max((total - 3 * (len(titles) - 1)) // len(titles), 16)

    def line(cells: Sequence[str]) -> str:
        return " | ".join(f"{cell:<{width}}" for cell in cells).rstrip()

    lines = [line(titles)]
    for prompt, texts in zip(prompts, answers, strict=True):
        lines += ["-" * (width * len(titles) + 3 * (len(titles) - 1)), f"> {prompt}"]
        columns = [textwrap.wrap(" ".join(text.split()), width) or [""] for text in texts]
        for i in range(max(map(len, columns))):
            lines.append(line([column[i] if i < len(column) else "" for column in columns]))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and runs the demo."""
    parser = argparse.ArgumentParser(
        prog="fastlora demo", description=(__doc__ or "").replace("``", "")
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _losses(seen: Sequence[float]) -> str:
    if not seen:
        return "no sample yet"
    last = seen[-5:]
    return (
        f"loss {seen[0]:.3f} at its first step, {statistics.mean(last):.3f} over its last "
        f"{len(last)} of {len(seen)}"
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _heading(text: str) -> None:
    _say(f"\n== {text}")


if __name__ == "__main__":
    sys.exit(main())
