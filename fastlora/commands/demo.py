"""``fastlora demo``: train three adapters at once on a real model, and compare them with PEFT.

Every number that the demo prints is measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import fastlora
from fastlora import env
from fastlora.bench import measure, mixed_bench, mixed_report
from fastlora.commands import smollm2
from fastlora.commands.demo_peft import (
    compare_step_time_and_memory,
    load_in_peft_and_compare_logits,
)
from fastlora.commands.options import Option, parse_options
from fastlora.integrations.transformers import quiet_transformers
from fastlora.train.command import summarize_result
from fastlora.train.data import DataError, collate_samples, read_samples
from fastlora.train.lock import lock_folder
from fastlora.train.run import Run, open_run
from fastlora.train.settings import settings_from_dict
from fastlora.validation import ConfigError

# Each style has its own rank, alpha, and target modules, yet all train in one batch.
STYLES: dict[str, dict[str, Any]] = {
    "ships_log": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
    "json_answer": {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "o_proj"]},
    "robot": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
}
DEFAULTS = {"lr": 2e-3, "schedule": "constant", "warmup_ratio": 0, "dropout": 0}
BATCH = 8
ANSWER_TOKENS = 40
# Settings of the table in part 6.
RANK, SEQUENCES, TABLE_ROUNDS = 16, 64, 2


OPTIONS = (
    Option(
        "--cache",
        "folder for the converted model (default: the cache folder of fastlora)",
        type=Path,
    ),
    Option(
        "--data",
        "JSON lines file with 'prompt' and 'completion', one adapter per file; repeatable",
        *(None, None, Path, "FILE", {"action": "append"}),
    ),
    Option("--out", "folder to save the adapters in", Path(".demo/adapters"), type=Path),
    Option(
        "--prompt",
        "prompt to answer after training, instead of the two built-in prompts; repeatable",
        metavar="TEXT",
        more={"action": "append"},
    ),
    Option("--steps", "number of training steps", 22, 1),
    Option("--rounds", "number of timed rounds", 5, 1),
    Option(
        "--adapters",
        "adapter counts in the last table (default: 1,4,16,64)",
        *([1, 4, 16, 64], None, mixed_bench.counts, "N,N,..."),
    ),
)


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo and return the exit code.

    The exit code is 1 if the logits differ from PEFT's, and 0 otherwise.

    Raises:
        FastLoraError: The data or the model is missing, or an argument is invalid.
    """
    if max(args.adapters) > SEQUENCES:
        raise ConfigError(
            f"--adapters must be at most {SEQUENCES} (the number of sequences in a batch), got "
            f"{max(args.adapters)}"
        )
    env.set_offline_demo_variables()
    started = time.monotonic()
    files = args.data or [examples_data_path(f"{style}.jsonl") for style in STYLES]
    adapters = adapter_settings_for_data_files(files)
    prompts = (
        args.prompt or examples_data_path("unseen_prompts.txt").read_text("utf-8").splitlines()[:2]
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    folder = smollm2.converted_smollm2_dir(args.cache)
    tokenizer = smollm2.load_tokenizer(folder)

    def fresh_base() -> Any:
        return smollm2.load_model(folder).to(device)

    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    _print_message(f"SmolLM2-135M-Instruct, fp32, on {where}")

    with quiet_transformers():
        _heading(f"1  {len(adapters)} adapters fine-tuned together, in mixed batches")
        with open_demo_run(folder, adapters, args.out, args.steps) as trained:
            clock = time.monotonic()
            _print_message(summarize_result(trained.train()))
            seconds = time.monotonic() - clock
        _print_message(
            f"{args.steps} steps of {BATCH} samples, with random adapters, in {seconds:.1f} s"
        )
        model = trained.model
        batch = collate_samples(
            trained.schedule.order.step_samples(0), trained.corpora, trained.pad, device
        )

        _heading("2  Unseen prompts, each in one mixed batch: the base model and every adapter")
        model.eval()
        columns = [None, *adapters]
        answers = [
            answer_with_adapters_in_one_batch(model, tokenizer, prompt, columns)
            for prompt in prompts
        ]
        _print_message(
            format_side_by_side([name or "base model" for name in columns], prompts, answers)
        )

        _heading("3  Saved in PEFT's format and loaded with PEFT: one mixed batch in both")
        for path in sorted(args.out.glob("*/adapter_*")):
            _print_message(f"{path}  {path.stat().st_size:,} bytes")
        peft_model, agrees, text = load_in_peft_and_compare_logits(
            model, fresh_base, args.out, batch
        )
        _print_message(text)

        _heading("4  Fused layers")
        _print_message(str(fastlora.fusion_report(model)))

        first = next(iter(adapters))
        _heading(f"5  {first} alone, compared with PEFT: same weights, batch, and process")
        _print_message(
            compare_step_time_and_memory(model, peft_model, first, batch, args.rounds, device)
        )

        _heading("6  Mixed batches, compared with PEFT and with one adapter at a time")
        del model, peft_model, trained
        _print_message(decoding_time_table(fresh_base(), args.adapters, device))
    _print_message(f"\nwhole demo: {time.monotonic() - started:.0f} s")
    if not agrees:
        sys.stderr.write(
            "fastlora demo: the logits differ from PEFT's by more than rounding error\n"
        )
    return 0 if agrees else 1


def examples_data_path(name: str) -> Path:
    """Return the path of a data file of the examples.

    The file is in the folder ``examples/data`` of the source repository. The folder is not part of
    the installed package.

    Raises:
        DataError: The file is missing.
    """
    path = Path(__file__).resolve().parents[2] / "examples" / "data" / name
    if not path.is_file():
        raise DataError(
            f"{path} is missing: the demo's text is in the source repository, but not in the "
            "installed package; run `make demo` in a clone, or pass --data FILE and --prompt TEXT"
        )
    return path


def adapter_settings_for_data_files(data_files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the settings of the demo's adapters, given the adapters' data files.

    There is one adapter for each data file. The result is a dict that maps the name of each adapter
    to the adapter's settings, such as the rank and the target modules. An adapter's name is the
    stem of the name of its data file.

    Raises `DataError` if a file is missing or damaged, or if two files have the same name. The
    files are read here, so that an error is reported before the model is loaded.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in data_files:
        read_samples([path])
        if path.stem in found:
            raise DataError(
                f"{path}: adapter {path.stem!r} is already defined by another file; rename one of "
                "the files"
            )
        found[path.stem] = {"data": path, **STYLES.get(path.stem, STYLES["ships_log"])}
    return found


@contextlib.contextmanager
def open_demo_run(
    model_folder: Path, adapters: Mapping[str, Any], out: Path, steps: int
) -> Iterator[Run]:
    """Open a training run for the demo, and yield the run.

    The run trains the adapters on the model for the given number of steps. The run writes to
    ``out`` and replaces any earlier run there.
    """
    template = out / "chat_template.jinja"
    with lock_folder(out):
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
        template.write_text(smollm2.TEMPLATE, encoding="utf-8")
    given = {
        "model": model_folder,
        "out": out,
        "steps": steps,
        "batch_size": BATCH,
        "dtype": "float32",
    }
    given |= {"chat": True, "chat_template": template, "save_every": 0, "defaults": DEFAULTS}
    given |= {"deterministic": False}  # deterministic kernels would slow down the timings on a GPU
    settings = settings_from_dict(given | {"adapters": dict(adapters)}, {}, "the demo")
    with open_run(settings, on_message=_print_message) as run:
        yield run


@torch.no_grad()
def answer_with_adapters_in_one_batch(
    model: Any, tokenizer: Any, prompt: str, names: Sequence[str | None] | None = None
) -> list[str]:
    """Generate a response to a prompt with each of several adapters in one batch.

    Returns the responses. Decoding is greedy, without a system prompt. ``names`` contains the
    adapter for each response, with None for the base model. If ``names`` is omitted, there is one
    response, from a model without adapters.
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


def decoding_time_table(base: Any, adapter_counts: Sequence[int], device: torch.device) -> str:
    """Measure decoding times for each number of adapters, and return them as a table.

    Each time is that of one decoding step, in which each sequence in the batch receives one token.
    The times with adapters are given relative to the base model's time.
    """
    torch.manual_seed(0)
    with measure.torch_threads(1):
        rows = mixed_bench.compare(base, adapter_counts, RANK, SEQUENCES, 1, TABLE_ROUNDS)
    note = mixed_bench.footnote(TABLE_ROUNDS, device)
    shape = f"{SEQUENCES} sequences decode a token; random adapters, rank {RANK}, all linear layers"
    return f"{shape}\n\n{mixed_report.table(rows)}\n\n{note}"


def format_side_by_side(
    titles: Sequence[str], prompts: Sequence[str], answers: Sequence[Sequence[str]]
) -> str:
    """Format the responses to each prompt as side-by-side columns of text.

    The total width is the width of the terminal, but at most 120 characters.
    """
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
    """Parse ``argv``, run the demo, and return the exit code."""
    return run_demo(
        parse_options("fastlora demo", (__doc__ or "").replace("``", ""), OPTIONS, argv)
    )


def _print_message(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _heading(text: str) -> None:
    _print_message(f"\n== {text}")


if __name__ == "__main__":
    sys.exit(main())
