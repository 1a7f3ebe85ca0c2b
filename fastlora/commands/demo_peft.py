"""The demo's comparisons with PEFT: the logits, and the time and memory of a training step."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.bench import measure
from fastlora.testing import error_budget
from fastlora.train.data import TrainBatch


class PeftLogitsComparison(NamedTuple):
    """A comparison of the logits that a model produces with fastlora and with PEFT.

    Attributes:
        peft_model: The trainable PEFT model.
        logits_agree: Whether the logits agree.
        text: A description of the comparison.
    """

    peft_model: Any
    logits_agree: bool
    text: str


def load_in_peft_and_compare_logits(
    model: Any, fresh_base: Callable[[], Any], folder: Path, batch: TrainBatch
) -> PeftLogitsComparison:
    """Load the saved adapters with PEFT, and compare PEFT's logits with fastlora's.

    The logits are those of a mixed batch. The tolerance is derived, not chosen: it is twice the sum
    of PEFT's own error against the same model in float64 and one rounding of the largest logit
    (`fastlora.testing.error_budget`). transformers computes the norms of a float64 Llama in fp32,
    so the reference is exact except for the norms.

    Args:
        model: The model with its adapters.
        fresh_base: Function that returns a new base model.
        folder: The folder of the saved adapters.
        batch: The mixed batch.

    Returns:
        A `PeftLogitsComparison`.
    """
    from peft import PeftModel
    from tqdm import tqdm

    real = batch.inputs["attention_mask"].bool()
    first, *others = model.peft_config

    with tqdm(total=5, desc="loading in PEFT, checking logits", leave=False) as bar:

        def loaded(dtype: torch.dtype) -> Any:
            base = fresh_base().to(dtype)
            found = PeftModel.from_pretrained(
                base, str(folder / first), adapter_name=first, is_trainable=True
            )
            for name in others:
                found.load_adapter(str(folder / name), name, is_trainable=True)
            bar.update()
            return found

        @torch.no_grad()
        def logits(m: Any) -> torch.Tensor:
            result = m.eval()(**batch.inputs, adapter_names=batch.adapters).logits[real]
            bar.update()
            return result

        truth = logits(loaded(torch.float64).double())
        peft_model = loaded(torch.float32)
        ours, theirs = logits(model), logits(peft_model)
    budget = error_budget(theirs, truth)
    difference = (ours.double() - theirs.double()).abs().max().item()
    error_ours = (ours.double() - truth).abs().max().item()
    error_theirs = (theirs.double() - truth).abs().max().item()
    agrees = difference <= budget and error_ours <= budget  # False for NaN too
    text = (
        f"{len(batch.adapters)} samples of {', '.join(sorted(set(batch.adapters)))}\n"
        f"logits of {real.sum().item()} tokens x {truth.shape[-1]:,}, largest "
        f"{truth.abs().max().item():.1f}\n"
        f"  max |fastlora - PEFT|     {difference:.2e}\n"
        f"  max |fastlora - float64|  {error_ours:.2e}\n"
        f"  max |PEFT - float64|      {error_theirs:.2e}\n"
        f"  allowed                   {budget:.2e}  (2 x (PEFT's error + fp32 eps x largest))\n"
        f"  {'equal within fp32 rounding' if agrees else 'NOT EQUAL'}"
    )
    return PeftLogitsComparison(peft_model, agrees, text)


def compare_step_time_and_memory(
    model: Any,
    peft_model: Any,
    adapter: str,
    batch: TrainBatch,
    rounds: int,
    device: torch.device,
) -> str:
    """Return a table that compares fastlora's time and peak memory per step with PEFT's.

    All samples of the batch use the same adapter.

    Args:
        model: The model with its adapters.
        peft_model: The same model with the same adapters, in PEFT.
        adapter: Name of the adapter.
        batch: The batch to measure.
        rounds: Number of timed rounds.
        device: Device of both models.
    """
    from tqdm import tqdm

    calls = 2 * 2 * (rounds + 2)  # 2 steps, 2 sides: warm-up, timed rounds, memory
    bar = tqdm(total=calls, desc="measuring, 1 thread", leave=False)

    @torch.no_grad()
    def forward(m: Any) -> None:
        m(**batch.inputs)
        bar.update()

    def forward_backward(m: Any) -> None:
        m(**batch.inputs, labels=batch.labels).loss.backward()
        m.zero_grad(set_to_none=True)
        bar.update()

    for m in (model, peft_model):
        m.set_adapter(adapter)
        m.train()
    rows = []
    with bar, measure.torch_threads(1):
        for name, step in (("forward", forward), ("forward + backward", forward_backward)):
            sides = {"ours": partial(step, model), "theirs": partial(step, peft_model)}
            times = measure.interleaved_seconds(sides, rounds, warmup=1, device=device)
            ratio = measure.median_ratio(times, "ours", "theirs")
            row = f"{name:<20}{_ms(times['theirs']):>12}{_ms(times['ours']):>12}{ratio:>10.3f}"
            peaks = [
                measure.peak_step_bytes(partial(step, m), device=device)
                for m in (peft_model, model)
            ]
            row += f"{_mib(peaks[0]):>13}{_mib(peaks[1]):>13}{peaks[1] / peaks[0]:>10.3f}"
            rows.append(row)
    clock = "CUDA events" if device.type == "cuda" else "CPU time of the process, 1 thread"
    shape = " x ".join(str(n) for n in batch.labels.shape)
    columns = ["PEFT", "fastlora", "ratio"] * 2
    widths = (12, 12, 10, 13, 13, 10)
    title = f"{'':<20}{'time per step':^34}{'peak memory of the step':^36}"
    header = f"{'':<20}" + "".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
    note = (
        f"batch {shape} tokens, fp32; {clock}; medians of {rounds} interleaved rounds; the ratio\n"
        "is the median of the ratios of the rounds; memory is the peak allocation of a step"
    )
    return "\n".join([title.rstrip(), header, *rows, "", note])


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:,.0f} ms"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
