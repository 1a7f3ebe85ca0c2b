"""The ``fastlora`` command and its subcommands: ``doctor``, ``inspect``, ``merge``, and others."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fastlora import env
from fastlora.command_line import install_command
from fastlora.commands.models import DTYPES, CommandError, load_causal_lm, print_progress_message
from fastlora.commands.system_checks import describe_devices, installed_version
from fastlora.validation import FastLoraError, near_names

_DISTRIBUTIONS = {
    "fastlora": "fastlora-triton",
    "torch": "torch",
    "triton": "triton",
    "safetensors": "safetensors",
    "transformers": "transformers",
    "peft": "peft",
}
# Commands that parse their own arguments: their module, and their line in the list of commands. The
# list shows the commands in this order, and the other commands after them.
_PROGRAMS = {
    ("train",): (
        "fastlora.train.command",
        "train several adapters in one run, each on its own data",
    ),
    ("serve",): (
        "fastlora.commands.serve",
        "serve a model and a folder of adapters with an OpenAI-compatible API",
    ),
    ("chat",): ("fastlora.commands.chat", "chat with a model and its adapters"),
    ("demo",): (
        "fastlora.commands.demo",
        "train three adapters on a small model and compare them with PEFT",
    ),
    ("doctor",): (
        "fastlora.commands.doctor",
        "check this installation, and show which layers of a model will be fused",
    ),
    ("bench", "mixed"): (
        "fastlora.bench.mixed_bench",
        "compare batches that use many adapters with PEFT",
    ),
    ("bench", "kernels"): (
        "fastlora.bench.kernels_bench",
        "time one linear layer, or your own function, on a GPU; without a GPU, analyze the "
        "compiled code and predict the time",
    ),
}
# The extra that installs the libraries of a command.
_EXTRAS = {
    "demo": "demo",
    "bench": "hf,bench",
    "train": "train",
    "chat": "hf",
    "merge": "hf",
    "serve": "serve",
}
_EXIT_CODE_CLOSED_PIPE = 141  # 128 + SIGPIPE, which Windows does not define
# Files in which the tokenizer classes of transformers save a tokenizer.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ``fastlora`` command-line interface, and return the exit code.

    The exit code is that of the command: 0, or 1 for an error. If a signal interrupts the command,
    the exit code is 128 plus the number of the signal. If the reader of the output closes its pipe,
    as ``head`` does, the exit code is 141, as after SIGPIPE. Wrong usage exits with code 2.

    Args:
        argv: The arguments, or None to use those of the process.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [a for a in given if a != "--debug"]
    debug = arguments != given
    if not debug:
        env.silence_import_warnings()
    if not sys.stderr.isatty():
        env.hide_hugging_face_progress_bars()
    try:
        for words, (module, _) in _PROGRAMS.items():
            if tuple(arguments[: len(words)]) == words:
                if words[0] in ("demo", "bench", "doctor"):  # before any slow import
                    env.set_offline_demo_variables()
                code: int = importlib.import_module(module).main(arguments[len(words) :])
                break
        else:
            args = _parse_or_exit(arguments)
            code = args.run(args)
        print(end="", flush=True)  # raises here instead of at exit if the pipe is closed
        return code
    except BrokenPipeError:
        return _EXIT_CODE_CLOSED_PIPE
    except (FastLoraError, OSError, ImportError) as error:
        if debug:
            traceback.print_exc()
        else:
            message = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, ModuleNotFoundError) and arguments[0] in _EXTRAS:
                install = install_command(_EXTRAS[arguments[0]])
                message = f"{arguments[0]} needs {error.name}; install it with: {install}"
            print(f"fastlora: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"fastlora: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    finally:
        _discard_output_if_pipe_closed()


def _discard_output_if_pipe_closed() -> None:
    """Discard the buffered output if the reader of stdout has closed its end of the pipe.

    Otherwise, Python would report an error when it flushes stdout at exit.
    """
    try:
        print(end="", flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _parse_or_exit(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command-line arguments, or exit with a message if they are invalid.

    If there are no arguments, print the help and exit. If the command is unknown, print similar
    names and exit.
    """
    parser, commands = _build_parser()
    if not arguments:
        parser.print_help()
        parser.exit()
    command = arguments[0]
    if command not in commands and not command.startswith("-"):
        close = near_names(command, commands)
        parser.error(f"unknown command {command!r}{close or '; run `fastlora --help` for a list'}")
    return parser.parse_args(arguments)


def _build_parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """Build the parser for all commands, and return it with the command names."""
    parser = argparse.ArgumentParser(
        prog="fastlora",
        description="Train, serve, merge, and benchmark LoRA adapters in PEFT's format, with many "
        "adapters in one batch.",
        epilog="Run `fastlora COMMAND --help` for the options of a command. Exit codes: 0 success, "
        "1 error, 2 wrong usage, 130 or 143 interrupted by SIGINT or SIGTERM, 141 the reader of "
        "the output closed its pipe.",
    )
    own = f"fastlora {installed_version('fastlora-triton') or '(not installed)'}"
    parser.add_argument("--version", action="version", version=own)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for words, (_, text) in _PROGRAMS.items():
        if len(words) == 1:
            commands.add_parser(words[0], help=text, add_help=False)

    info = commands.add_parser(
        "info",
        help="show versions, devices, and the implementation for each device",
        description="Prints versions, devices, and which implementation would run on each device, "
        "with the reason.",
    )
    info.set_defaults(run=_info)

    inspect = commands.add_parser(
        "inspect",
        help="show the contents of an adapter folder",
        description="Checks an adapter folder and prints its rank, scaling, targets, parameters, "
        "bytes, and a table of its modules. Loads no tensors.",
    )
    inspect.add_argument("adapter", metavar="ADAPTER_DIR", help="a local PEFT adapter folder")
    inspect.set_defaults(run=_inspect)

    merge = commands.add_parser(
        "merge",
        help="merge an adapter into a base model and save the result",
        description="Loads a causal language model with transformers, merges an adapter into its "
        "weights, and saves the merged model and the tokenizer. The saved model is not quantized, "
        "even if the base model is. If it fails, OUT is not created.",
    )
    merge.add_argument("base", metavar="BASE", help="folder or Hub name of the base model")
    merge.add_argument("adapter", metavar="ADAPTER", help="a local PEFT adapter folder")
    merge.add_argument("out", metavar="OUT", help="new or empty folder for the merged model")
    merge.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="dtype to load, merge, and save in (default: auto, the dtype of the base model)",
    )
    merge.set_defaults(run=_merge)

    for command in (info, inspect):
        command.add_argument("--json", action="store_true", help="print the result as JSON")
    bench = commands.add_parser(
        "bench",
        help="benchmark your model or one linear layer",
        description="Benchmarks your model or one linear layer against other implementations, in "
        "one process.",
        epilog="Run `fastlora bench KIND --help` for the options of a benchmark.",
    )
    kinds = bench.add_subparsers(dest="kind", metavar="KIND", required=True)
    for words, (_, text) in _PROGRAMS.items():
        if words[0] == "bench":
            kinds.add_parser(words[-1], help=text, add_help=False)
    return parser, commands.choices


def _info(args: argparse.Namespace) -> int:
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: installed_version(dist) for name, dist in _DISTRIBUTIONS.items()},
        "devices": list(describe_devices()),
    }
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"python        {facts['python']} on {facts['platform']}")
    for name, found in facts["versions"].items():
        print(f"{name:<13} {found or 'not installed'}")
    print()
    for device in facts["devices"]:
        print(f"{device['device']:<8} {device['implementation']:<8} {device['why']}")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from fastlora.integrations.report import SHOWN_ROWS, fold_similar_rows, format_table

    facts = adapter_facts(args.adapter)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for key, value in facts.items():
        if key not in ("rank_pattern", "alpha_pattern", "modules"):
            print(f"{key:<16} {_format_value(value)}")
    print()
    has_experts = any(m["experts"] for m in facts["modules"])
    keys = ("name", "kind", "rank", "alpha", "scaling", *(("experts",) if has_experts else ()))
    keys = (*keys, "size", "dtype", "parameters", "bytes")
    rows = [
        tuple(_format_value((m | {"size": _size(m)})[key]) for key in keys)
        for m in facts["modules"]
    ]
    shown = rows if len(rows) <= SHOWN_ROWS else fold_similar_rows(rows)
    print("\n".join(format_table([("module", *keys[1:]), *shown])))
    if len(shown) < len(rows):
        print(f"\n{len(rows)} modules; use --json to list them all")
    return 0


def adapter_facts(path: str) -> dict[str, Any]:
    """Return a dict that describes the adapter in a folder.

    ``fastlora inspect --json`` prints this dict.

    Raises:
        CheckpointError: The folder is missing or damaged.
    """
    from fastlora.model.adapter_folder import inspect_adapter_folder
    from fastlora.model.expert_files import (
        InferredLoraLayerSettings,
        infer_settings_of_layers_in_file,
    )

    header = inspect_adapter_folder(path)
    config = header.config
    rows = {
        module: header.tensor_infos[key].shape[0]
        for key, (module, kind) in header.keys.items()
        if kind.endswith("_A")
    }
    sizes = infer_settings_of_layers_in_file(config, rows)
    modules: dict[tuple[str, str], dict[str, Any]] = {}
    for key, (module, kind) in header.keys.items():
        info = header.tensor_infos[key]
        lora = kind.startswith("lora_")
        name = (module, "lora" if lora else kind)
        size = sizes.get(module) if lora else None
        row = modules.setdefault(
            name,
            {
                "name": module,
                "kind": name[1],
                **(size or InferredLoraLayerSettings(None, None, None))._asdict(),
                "shape": [None, None] if lora else list(info.shape),
                "dtype": str(info.dtype).removeprefix("torch."),
                "parameters": 0,
                "bytes": 0,
            },
        )
        if kind.endswith("_A"):
            row["shape"][0] = info.shape[1]
        elif kind.endswith("_B"):
            row["shape"][1] = info.shape[0]
        row["parameters"] += info.nbytes // info.dtype.itemsize
        row["bytes"] += info.nbytes
    data = config.to_dict()
    fields = ("task_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "lora_bias")
    return {
        "path": str(header.path),
        "base_model": config.base_model_name_or_path,
        **{field: data[field] for field in fields},
        "target_modules": data["target_modules"],
        "target_parameters": data["target_parameters"],
        "modules_to_save": data["modules_to_save"],
        "rank_pattern": data["rank_pattern"],
        "alpha_pattern": data["alpha_pattern"],
        "parameters": sum(m["parameters"] for m in modules.values()),
        "bytes": sum(m["bytes"] for m in modules.values()),
        "modules": sorted(modules.values(), key=_lora_first_natural_sort_key),
    }


def _lora_first_natural_sort_key(module: dict[str, Any]) -> tuple[Any, ...]:
    """Return a key that sorts modules in natural order, with LoRA modules first.

    In natural order, layer 2 comes before layer 10.
    """
    parts = re.split(r"(\d+)", module["name"])
    return module["kind"] != "lora", [int(p) if p.isdigit() else p for p in parts]


def _format_value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return str(value)


def _size(module: dict[str, Any]) -> str:
    return (" -> " if module["kind"] == "lora" else " x ").join(map(str, module["shape"]))


def _merge(args: argparse.Namespace) -> int:
    out = Path(args.out)
    # Run the cheap checks first, so that a typing error is reported before a large model loads.
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandError(
            f"{out} already exists and is not an empty folder; choose a new or empty folder"
        )
    from fastlora.model.adapter_folder import inspect_adapter_folder

    adapter = inspect_adapter_folder(args.adapter).path
    model = load_causal_lm(args.base, args.dtype)
    from safetensors import SafetensorError

    from fastlora import LoraModel
    from fastlora.model.atomic_files import atomic_new_folder
    from fastlora.model.dequantize import is_quantized_linear

    print_progress_message(f"merging {adapter}")
    adapted = LoraModel.from_pretrained(model, adapter)
    merged: Any = adapted.merge_and_unload(
        progressbar=sys.stderr.isatty(),
        safe_merge=True,
        dequantize=any(map(is_quantized_linear, model.modules())),
    )
    try:
        with atomic_new_folder(out) as partial:
            print_progress_message(f"writing {out}")
            merged.save_pretrained(partial)
            copied = _copy_tokenizer(adapter, partial) or _copy_tokenizer(Path(args.base), partial)
            if not copied and not _save_tokenizer(args.base, partial):
                print_progress_message(
                    f"no tokenizer found for {args.base}; {out} is saved without one"
                )
    except (SafetensorError, OSError) as error:
        raise CommandError(
            f"{out} could not be written ({error}); free up disk space or choose another folder"
        ) from error
    print_progress_message("done")
    return 0


def _copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer from ``source`` to ``target``; return whether ``source`` has one."""
    if not (source / "tokenizer_config.json").is_file():
        return False
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return True


def _save_tokenizer(base: str, target: Path) -> bool:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(base).save_pretrained(target)
    except (OSError, ValueError, KeyError):
        return False
    return True
