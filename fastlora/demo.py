"""``fastlora demo``: a real model fine-tuned, saved, loaded with PEFT, compared with PEFT.

Every number that the demo prints was measured in the run that prints it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora import env, measure, smollm2
from fastlora.demo_data import DemoDataError, make_batches, read_examples, read_prompts, shipped
from fastlora.testing import error_budget

STYLE = "ships_log"
RANK, ALPHA, LEARNING_RATE, BATCH = 8, 16, 2e-3, 4
ANSWER_TOKENS = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to ``parser``."""
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where the converted model is kept"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="JSON lines with 'prompt' and 'completion'"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path(".demo/adapter"),
        help="where the adapter is saved (default: %(default)s)",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="ask this; repeatable")
    parser.add_argument("--steps", type=int, default=25, help="training steps (default: 25)")
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs (default: 7)")


def run(args: argparse.Namespace) -> int:
    """Runs the demo and returns the exit code: 1 when PEFT's logits differ from ours.

    Raises:
        FastLoraError: Missing data, a missing model, or an argument that makes no sense.
    """
    for name in ("steps", "rounds"):
        if getattr(args, name) < 1:
            raise DemoDataError(f"--{name} must be at least 1, got {getattr(args, name)}")
    env.prepare_demo_process()
    started = time.monotonic()
    data = args.data or shipped(f"{STYLE}.jsonl")
    examples = read_examples(data)
    prompts = args.prompt or read_prompts(shipped("unseen_prompts.txt"))[:3]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    folder = smollm2.model_dir(args.cache)
    tokenizer = smollm2.load_tokenizer(folder)

    def fresh_base() -> Any:
        return smollm2.load_model(folder).to(device)

    base = fresh_base()
    parameters = sum(p.numel() for p in base.parameters())
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    _say(f"SmolLM2-135M-Instruct, {parameters:,} parameters, fp32, on {where}")

    with _quiet_transformers():
        before = answer(base, tokenizer, prompts, "base model answers")

        _heading(f"1  Fine-tune: {len(examples)} examples of {data.name}")
        config = fastlora.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = fastlora.get_peft_model(base, config)
        model.print_trainable_parameters()
        batches = make_batches(examples, tokenizer, args.steps, BATCH, device)
        clock = time.monotonic()
        losses = train(model, batches)
        seconds = time.monotonic() - clock
        last = statistics.mean(losses[-5:])
        _say(
            f"loss {losses[0]:.3f} at the first step, {last:.3f} over the last {len(losses[-5:])}; "
            f"{len(losses)} steps of {BATCH} examples in {seconds:.1f} s"
        )

        _heading("2  The same unseen prompts before and after (greedy)")
        model.eval()
        after = answer(model, tokenizer, prompts, "fine-tuned answers")
        _say(side_by_side(prompts, before, after))

        _heading("3  Saved in PEFT's format, loaded back with PEFT")
        model.save_pretrained(str(args.out))
        for path in sorted(args.out.glob("adapter_*")):
            _say(f"{path}  {path.stat().st_size:,} bytes")
        twin, agrees = load_in_peft(model, fresh_base, args.out, batches[0])

    _heading("4  What is fused")
    _say(str(fastlora.fusion_report(model)))

    _heading("5  Against PEFT: same weights, same batch, same process")
    _say(compare(model, twin, batches[0], args.rounds, device))
    _say(f"\nwhole demo: {time.monotonic() - started:.0f} s")
    if not agrees:
        sys.stderr.write("fastlora demo: the logits differ from PEFT's by more than rounding\n")
    return 0 if agrees else 1


def train(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> list[float]:
    """Trains ``model`` with AdamW, one step a batch, and returns the losses."""
    from tqdm import tqdm

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    model.train()
    with tqdm(batches, desc="training", unit="step") as bar:
        for batch in bar:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    return losses


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: Sequence[str], what: str) -> list[str]:
    """Returns the model's greedy answer to each prompt, without a system prompt."""
    from tqdm import tqdm

    answers = []
    for prompt in tqdm(prompts, desc=what, unit="prompt"):
        text = smollm2.chat_prompt(prompt)
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        ended = tokenizer.eos_token_id in new.tolist()
        answers.append(
            tokenizer.decode(new, skip_special_tokens=True).strip() + ("" if ended else " ...")
        )
    return answers


def load_in_peft(
    model: Any, fresh_base: Callable[[], Any], folder: Path, batch: dict[str, torch.Tensor]
) -> tuple[Any, bool]:
    """Loads ``folder`` with PEFT on a fresh base and compares logits on ``batch``.

    The threshold is not picked: it is twice PEFT's own error against the same model in float64 plus
    one rounding of the largest logit (`fastlora.testing.error_budget`). transformers computes the
    norms of a float64 Llama in fp32, so that truth is exact in all but those.

    Returns:
        PEFT's model, trainable, and whether the logits agree.
    """
    from peft import PeftModel
    from tqdm import tqdm

    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    real = batch["attention_mask"].bool()

    with tqdm(total=5, desc="loading in PEFT, checking logits", leave=False) as bar:

        def loaded(**kwargs: Any) -> Any:
            base = fresh_base().to(kwargs.pop("dtype"))
            peft_model = PeftModel.from_pretrained(base, str(folder), **kwargs)
            bar.update()
            return peft_model

        @torch.no_grad()
        def logits(m: Any) -> torch.Tensor:
            result = m.eval()(**inputs).logits[real]
            bar.update()
            return result

        truth = logits(loaded(dtype=torch.float64).double())
        twin = loaded(dtype=torch.float32, is_trainable=True)
        ours, theirs = logits(model), logits(twin)
    budget = error_budget(theirs, truth)
    difference = (ours.double() - theirs.double()).abs().max().item()
    error_ours = (ours.double() - truth).abs().max().item()
    error_theirs = (theirs.double() - truth).abs().max().item()
    agrees = difference <= budget and error_ours <= budget  # False for NaN too
    _say(
        f"logits of {real.sum().item()} tokens x {truth.shape[-1]:,}, largest "
        f"{truth.abs().max().item():.1f}\n"
        f"  max |fastlora - PEFT|     {difference:.2e}\n"
        f"  max |fastlora - float64|  {error_ours:.2e}\n"
        f"  max |PEFT - float64|      {error_theirs:.2e}\n"
        f"  allowed                   {budget:.2e}  (2 x (PEFT's error + fp32 eps x largest))\n"
        f"  {'equal within fp32 rounding' if agrees else 'NOT EQUAL'}"
    )
    return twin, agrees


def compare(
    model: Any, twin: Any, batch: dict[str, torch.Tensor], rounds: int, device: torch.device
) -> str:
    """Returns a table of time per step and peak memory: ``model`` is ours, ``twin`` PEFT's."""
    from tqdm import tqdm

    calls = 2 * 2 * (rounds + 2)  # two steps, two sides: warm-up, timed rounds, memory
    bar = tqdm(total=calls, desc="measuring, 1 thread", leave=False)

    @torch.no_grad()
    def forward(m: Any) -> None:
        m(**batch)
        bar.update()

    def forward_backward(m: Any) -> None:
        m(**batch).loss.backward()
        m.zero_grad(set_to_none=True)
        bar.update()

    model.train()
    twin.train()
    rows = []
    with bar, measure.torch_threads(1):
        for name, step in (("forward", forward), ("forward + backward", forward_backward)):
            ratio, ours, theirs = measure.paired_ratio(
                partial(step, model), partial(step, twin), rounds, device=device
            )
            row = f"{name:<20}{_ms(theirs):>12}{_ms(ours):>12}{ratio:>10.3f}"
            peaks = [
                measure.peak_step_bytes(partial(step, m), device=device) for m in (twin, model)
            ]
            row += f"{_mib(peaks[0]):>13}{_mib(peaks[1]):>13}{peaks[1] / peaks[0]:>10.3f}"
            rows.append(row)
    clock = "CUDA events" if device.type == "cuda" else "CPU time of the process, 1 thread"
    shape = " x ".join(str(n) for n in batch["input_ids"].shape)
    columns = ["PEFT", "fastlora", "ratio"] * 2
    widths = (12, 12, 10, 13, 13, 10)
    title = f"{'':<20}{'time per step':^34}{'peak memory of the step':^36}"
    header = f"{'':<20}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    note = (
        f"batch {shape} tokens, fp32; {clock}; medians of {rounds} interleaved rounds, the ratio\n"
        "is the median of the rounds' own ratios; memory is what the step allocates at its peak"
    )
    return "\n".join([title.rstrip(), header, *rows, "", note])


def side_by_side(prompts: Sequence[str], left: Sequence[str], right: Sequence[str]) -> str:
    """Returns the answers in two columns, as wide as the terminal (at most 120)."""
    width = (min(shutil.get_terminal_size((100, 24)).columns, 120) - 3) // 2
    width = max(width, 24)
    lines = [f"{'BEFORE':<{width}} | AFTER"]
    for prompt, *pair in zip(prompts, left, right, strict=True):
        lines += ["-" * (2 * width + 3), f"> {prompt}"]
        columns = [textwrap.wrap(" ".join(text.split()), width) or [""] for text in pair]
        for i in range(max(map(len, columns))):
            a, b = (column[i] if i < len(column) else "" for column in columns)
            lines.append(f"{a:<{width}} | {b}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses ``argv`` and runs the demo."""
    parser = argparse.ArgumentParser(prog="fastlora demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _heading(text: str) -> None:
    _say(f"\n== {text}")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():  # PEFT reads names that transformers is about to rename
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)


if __name__ == "__main__":
    sys.exit(main())
