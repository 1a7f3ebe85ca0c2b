"""The frame of a CPU benchmark: one thread, and a CSV that describes the machine."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.machine import describe, processor
from fastlora.bench.measure import torch_threads
from fastlora.commands import smollm2
from fastlora.integrations.transformers import quiet_transformers
from fastlora.model.recommend import QLORA

CPU = torch.device("cpu")
BASES = ("plain", "nf4")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def csv_rows(
    path: Path, device: torch.device = CPU
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Run the body on one thread and yield a function that writes a row of the CSV.

    The columns that describe the machine come first. Each row is flushed when it is written. The
    first row defines the columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer: Any = None
    with path.open("w", newline="") as file, torch_threads(1), ExitStack() as quiet:
        if importlib.util.find_spec("transformers"):
            quiet.enter_context(quiet_transformers())
        machine = describe(device) | {"cpu": processor(), "threads": 1}

        def write(row: Mapping[str, Any]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, [*machine, *row], lineterminator="\n")
                writer.writeheader()
            writer.writerow({**machine, **row})
            file.flush()

        yield write


def load_base(base: str, dtype: torch.dtype) -> Any:
    """Return SmolLM2, either plain or in NF4 with nested scales and products in ``dtype``."""
    folder = smollm2.converted_smollm2_dir()
    if base == "plain":
        return smollm2.load_model(folder, dtype)
    import transformers

    bits = transformers.BitsAndBytesConfig(**{**QLORA, "bnb_4bit_compute_dtype": dtype})
    with quiet_transformers():
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=bits, device_map={"": "cpu"}
        )
