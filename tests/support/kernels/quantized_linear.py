"""Linears over quantized weights, on kernels, and what the matrices of the weights would give."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.ops.backend import BACKENDS, BackwardArguments
from fastlora.ops.factors import Base, LayerAdapterOperands
from fastlora.ops.operator_backend import weight_for_kernels
from fastlora.ops.philox_reference import philox_keep_mask
from fastlora.ops.triton import forward
from fastlora.quantized_tensor import QuantizedTensor, dequantize
from fastlora.testing import assert_within_budget
from tests.support.kernels.lab import Lab
from tests.support.kernels.mixed_problem import MixedProblem, Results
from tests.support.kernels.quantized_weights import make_quantized_weight

TRITON = BACKENDS["triton"]
SEED = 1234567


def check_linear(
    lab: Lab, weight: QuantizedTensor, m: int, r: int = 8, p: float = 0.0, plan: str = "auto"
) -> Results:
    """Compares y and every gradient of one adapter with the same operations over the matrix.

    Returns them. Gradients are not made for the plan "invariant", which is a forward's.
    """
    (n, k), dtype, c = weight.shape, weight.dtype, 0.75
    x, dy = lab.rand(m, k, dtype=dtype), lab.rand(m, n, dtype=dtype)
    bias = lab.rand(n, dtype=dtype)
    lora_a, lora_b = lab.rand(r, k, dtype=dtype), lab.rand(n, r, dtype=dtype)
    seeds = torch.tensor([SEED], device=lab.device) if p else None
    scaling = torch.tensor(c, device=lab.device)
    operands = LayerAdapterOperands([lora_a], [lora_b], [None], scaling, (p,), seeds)
    with torch.no_grad():
        y, s = TRITON.forward(x, Base(weight, bias), operands, None, None, plan)
        results: dict[str, Any] = {"y": y}
        if plan != "invariant":
            wants = True, True, False, (True, True, False)
            given = BackwardArguments(dy, weight, x, operands, None, s, plan, *wants)
            dx, _, _, (d_a, d_b, _) = TRITON.gradients(given)
            results |= {"dx": dx, "d_lora_a": d_a, "d_lora_b": d_b}
    mask = torch.ones(m, k)
    if p:
        mask = philox_keep_mask(SEED, m, k, p) / (1 - p)

    def by_torch(dtype: torch.dtype) -> Results:
        w, a, b, g = (t.to(dtype) for t in (dequantize(weight), lora_a, lora_b, dy))
        keep = mask.to(lab.device, dtype)
        dropped = x.to(dtype) * keep
        s = dropped @ a.t()
        ds = c * (g @ b)
        return {
            "y": x.to(dtype) @ w.t() + bias.to(dtype) + c * s @ b.t(),
            "dx": g @ w + (ds @ a) * keep,
            "d_lora_a": ds.t() @ dropped,
            "d_lora_b": c * g.t() @ s,
        }

    near, exact = by_torch(dtype), by_torch(torch.float64)
    for name, actual in results.items():
        assert_within_budget(actual, near[name], exact[name], name)
    return results


def of_tables(lab: Lab, kind: str, ids: list[int], ranks: Any, dtype: torch.dtype) -> MixedProblem:
    """A mixed batch over quantized weights, whose truth is that of the matrices."""
    problem = MixedProblem(lab, ids, ranks, 128, [40, 72, 64][: len(ranks)], dtype, biased=(1,))
    problem.quantized = [make_quantized_weight(kind, weight) for weight in problem.weights]
    problem.weights = [dequantize(weight) for weight in problem.quantized]
    return problem


def at(problem: MixedProblem, plan: str = "auto") -> torch.Tensor:
    """y of module 0, as a layer asks for it."""
    read = weight_for_kernels(problem.quantized[0], problem.x, problem.max_rank, plan)
    invariant = plan == "invariant"
    return forward.linear_at(
        *(problem.x, read, problem.biases[0], problem.rows(invariant), None, problem.all_tables),
        *(0, problem.max_rank, problem.factor_dtype, plan),
    )[0]
