"""The fusion report: which LoRA layers of a model are fused, and why others are not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastlora.deprecation import RenamedAttribute, without_old_names
from fastlora.layers import LoraLayer
from fastlora.layers.fallback_reasons import FusionStatus
from fastlora.layers.group_members import describe_input_sharing
from fastlora.layers.quantized_base import describe_quantization
from fastlora.ops.execution_mode import triton_status
from fastlora.sharding import is_fsdp2_module

# A table of `fastlora inspect` with more rows than this combines equal rows.
SHOWN_ROWS = 24


@dataclass(frozen=True)
class LayerFusion:
    """The fusion status of one LoRA layer, as a row of the fusion report.

    Attributes:
        name: Name of the layer in the model.
        layer: Name of the LoRA layer's class.
        fused: Whether the base GEMM and the LoRA term are computed in one call. The call uses
            Triton kernels if they are available.
        reason: Fallback reason if the layer is not fused, else an empty string.
        shared_input: Number of layers that share the passes over their common input x in training
            (to compute s and d_lora_a), or the reason why this layer shares none. Known only after
            a forward pass in training.
        reads: Format of the quantized base weight that the kernels read, and the dtype of their
            products. Without kernels, the base layer is called unchanged. Empty if the kernels do
            not read a quantized weight.
    """

    name: str
    layer: str
    fused: bool
    reason: str = ""
    shared_input: str = ""
    reads: str = ""

    siblings = RenamedAttribute("shared_input")

    def __dir__(self) -> list[str]:
        return without_old_names(self, super().__dir__())


@dataclass(frozen=True)
class FusionReport:
    """Report on which LoRA layers of a model are fused, and which are not.

    The report has one row for each LoRA layer. The row of a layer that is not fused contains the
    reason. ``str()`` formats the report as a table.

    Attributes:
        rows: One row for each LoRA layer, in the model's order.
        implementation: The implementation for the model's device, ``"triton"`` or ``"eager"``.
        reason: The reason why this implementation was chosen.
    """

    rows: tuple[LayerFusion, ...]
    implementation: str
    reason: str

    @property
    def fused(self) -> int:
        """The number of fused layers."""
        return sum(row.fused for row in self.rows)

    def __str__(self) -> str:
        """Return the report as a table.

        Layers share a line if they differ only in the part of the name before the last dot.
        """
        what = "runs as Triton kernels" if self.implementation == "triton" else "runs in PyTorch"
        quantized = sum(bool(row.fused and row.reads) for row in self.rows)
        line = (
            f"{self.fused} of {len(self.rows)} LoRA layers are eligible for the fused call, "
            f"which {what} here ({self.reason})"
        )
        if quantized and self.implementation != "triton":
            line += (
                f"\n{quantized} of them have a quantized base weight, which only the kernels read; "
                "without kernels, the base layer's own forward pass is used"
            )
        rows: list[tuple[str, ...]] = [
            (row.name, row.layer, "yes" if row.fused else "no", self.runs_as(row), row.reason)
            + (row.shared_input, row.reads)
            for row in self.rows
        ]
        rows = fold_similar_rows(rows)
        header = ("layer", "class", "eligible", "runs as", "fallback reason", "shared input")
        columns = [c for c in zip((*header, "base"), *rows, strict=True) if any(c[1:]) or not rows]
        return "\n".join([line, *format_table(list(zip(*columns, strict=True)))])

    def runs_as(self, row: LayerFusion) -> str:
        """Return a description of how a layer's output is computed.

        The result is ``"Triton kernels"`` or ``"PyTorch"`` if the layer runs as one fused call, and
        ``"base layer and separate LoRA"`` otherwise.
        """
        if not row.fused or (row.reads and self.implementation != "triton"):
            return "base layer and separate LoRA"
        return "Triton kernels" if self.implementation == "triton" else "PyTorch"


def fold_similar_rows(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Combine similar table rows.

    Rows are similar if they differ only in the part of the layer name before the last dot, for
    example, in the layer number. The name in a combined row is ``*.LAST (COUNT)``, such as
    ``*.q_proj (32)``.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *others in rows:
        groups.setdefault((name.rpartition(".")[2], *others), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"*.{last} ({len(names)})", *others)
        for (last, *others), names in groups.items()
    ]


def fusion_report(model: nn.Module) -> FusionReport:
    """Return a report that shows which LoRA layers of a model are fused.

    For each layer that is not fused, the report gives the reason.

    Args:
        model: A fastlora model, a PEFT model (patched or not), or any other module, with or without
            LoRA layers.
    """
    rows: list[LayerFusion] = []
    parameter = next(model.parameters(), None)
    if parameter is None:
        return FusionReport((), "eager", "the model has no parameters")
    implementation, impl_reason = auto_implementation(parameter.device)
    gathered: list[str] = []  # prefixes of the names of modules that FSDP2 gathers
    for name, module in model.named_modules():
        if is_fsdp2_module(module):
            gathered.append(f"{name}." if name else "")
        verdict = _verdict(module, f"{name}.".startswith(tuple(gathered)))
        if verdict is not None:
            fused, reason = verdict
            shared = ""
            if getattr(module, "is_linear", False):
                runs = implementation if module.impl == "auto" else module.impl
                shared = describe_input_sharing(module, runs == "triton")
            reads = describe_quantization(module)
            kind = type(module).__qualname__
            rows.append(LayerFusion(name, kind, fused, reason, shared, reads))
    return FusionReport(tuple(rows), implementation, impl_reason)


def auto_implementation(device: torch.device) -> tuple[str, str]:
    """Return the implementation that ``impl="auto"`` selects on a device, and the reason.

    The result is a tuple (implementation, reason).
    """
    runs, reason = triton_status(device.type, device.index or 0)
    if device.type == "cuda" or not runs:
        return "triton" if runs else "eager", reason
    return "eager", f"{reason}, but only with impl='triton'"


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format rows of cells as a list of text lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _verdict(module: nn.Module, gathered: bool) -> FusionStatus | None:
    if isinstance(module, LoraLayer):
        return module.fusion(gathered)
    if "peft.tuners.lora.layer" in sys.modules:
        from fastlora.integrations.peft_layers import peft_layer_fusion_status

        return peft_layer_fusion_status(module, gathered)
    return None
