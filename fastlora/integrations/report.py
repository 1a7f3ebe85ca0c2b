"""The fusion report: for every LoRA layer of a model, whether it runs fused, and why not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.layers import LoraLayer
from fastlora.layers.coded_base import reads_codes
from fastlora.layers.group_members import sibling_note
from fastlora.ops.conditions import triton_status
from fastlora.sharding import is_fsdp_module

# Longer tables fold rows that say the same.
SHOWN_ROWS = 24


@dataclass(frozen=True)
class LayerFusion:
    """One layer's row.

    Attributes:
        name: Module name in the model.
        layer: Class of the LoRA layer.
        fused: Whether base GEMM and LoRA term are one call, of kernels where those run.
        reason: Why not, else empty.
        siblings: How many layers share their passes over x in training (s and d_lora_a), or why
            they do not; known once a training forward was seen.
        reads: What kernels read of a quantised base layer, which is called as it is without them.
    """

    name: str
    layer: str
    fused: bool
    reason: str = ""
    siblings: str = ""
    reads: str = ""


@dataclass(frozen=True)
class FusionReport:
    """All rows, and which implementation the model's device gets. Printing it is a table.

    Attributes:
        rows: One for each LoRA layer, in the model's order.
        implementation: ``"triton"`` or ``"eager"``.
        reason: Why that one.
    """

    rows: tuple[LayerFusion, ...]
    implementation: str
    reason: str

    @property
    def fused(self) -> int:
        """Number of fused layers."""
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        """A table: layers that share layer class and verdict on one line when there are many."""
        what = "run as Triton kernels" if self.implementation == "triton" else "run in PyTorch"
        quantised = sum(bool(row.fused and row.reads) for row in self.rows)
        line = (
            f"{self.fused} of {len(self.rows)} LoRA layers are eligible for the fused call; "
            f"such calls {what} here ({self.reason})"
        )
        if quantised and self.implementation != "triton":
            line += (
                f"\n{quantised} of them have a quantised base, which kernels read; without kernels "
                "it is called as it is"
            )
        rows: list[tuple[str, ...]] = [
            (row.name, row.layer, "yes" if row.fused else "no", self.runs_as(row), row.reason)
            + (row.siblings, row.reads)
            for row in self.rows
        ]
        if len(rows) > SHOWN_ROWS:
            rows = folded(rows)
        header = ("layer", "class", "eligible", "runs as", "why not", "siblings in training")
        columns = [c for c in zip((*header, "base"), *rows, strict=True) if any(c[1:]) or not rows]
        return "\n".join([line, *table(list(zip(*columns, strict=True)))])

    def runs_as(self, row: LayerFusion) -> str:
        """Returns who computes a layer: kernels, PyTorch, or its base layer as it is."""
        if not row.fused or (row.reads and self.implementation != "triton"):
            return "its base layer, LoRA beside it"
        return "Triton kernels" if self.implementation == "triton" else "PyTorch"


def folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Returns one row for those that differ but in the path before the last dot of their name."""
    groups: dict[tuple[str, ...], int] = {}
    for name, *others in rows:
        key = (name.rpartition(".")[2], *others)
        groups[key] = groups.get(key, 0) + 1
    return [(f"*.{name} ({count})", *others) for (name, *others), count in groups.items()]


def fusion_report(model: nn.Module) -> FusionReport:
    """Reports on a model of ours, a PEFT model (patched or not), or any module with LoRA layers.

    Args:
        model: Any module.
    """
    rows: list[LayerFusion] = []
    parameter = next(model.parameters(), None)
    if parameter is None:
        return FusionReport((), "eager", "the model has no parameters")
    implementation, why = implementation_on(parameter.device)
    gathered: list[str] = []  # what FSDP2 gathers for its forward: all below these
    for name, module in model.named_modules():
        if is_fsdp_module(module):
            gathered.append(f"{name}." if name else "")
        verdict = _verdict(module, f"{name}.".startswith(tuple(gathered)))
        if verdict is not None:
            fused, reason = verdict
            shared = ""
            if getattr(module, "is_linear", False):
                runs = implementation if module.impl == "auto" else module.impl
                shared = sibling_note(module, runs == "triton")
            reads = reads_codes(module)
            kind = type(module).__qualname__
            rows.append(LayerFusion(name, kind, fused, reason, shared, reads))
    return FusionReport(tuple(rows), implementation, why)


def implementation_on(device: torch.device) -> tuple[str, str]:
    """Returns what ``impl="auto"`` takes on a device, and why."""
    runs, why = triton_status(device.type, device.index or 0)
    if device.type == "cuda" or not runs:
        return "triton" if runs else "eager", why
    return "eager", f"{why}, when impl='triton' is asked for"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns rows of cells as lines, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _verdict(module: nn.Module, gathered: bool) -> tuple[bool, str] | None:
    if isinstance(module, LoraLayer):
        return module.fusion(gathered)
    if "peft.tuners.lora.layer" in sys.modules:
        from fastlora.integrations.peft import layer_fusion

        return layer_fusion(module, gathered)
    return None
