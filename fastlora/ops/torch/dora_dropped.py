"""One DoRA adapter with active dropout, as PEFT computes it: the base product twice.

``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T`` and its
gradients. LoRA's own products are operators' where they run over Triton.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``z`` and ``y [M, N]``, ``magnitude`` and its squares ``[N]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.coded_weight import as_matrix
from fastlora.ops.torch import products, reference
from fastlora.ops.torch.scale import scale_of, scaled_with_sums, times
from fastlora.ops.torch.single import keep_mask


class Dropped(NamedTuple):
    """One DoRA adapter whose dropout acts.

    Attributes:
        lora_a, lora_b, magnitude: ``[R, K]``, ``[N, R]``, ``[N]``.
        squares: The norm's, ``[N]``.
        scaling: Without dimensions.
        seed: Of its mask, int64 ``[1]``.
        dropout_p: Probability.
        impl: ``"triton"``, or the name of PyTorch's backend.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor
    squares: torch.Tensor
    scaling: torch.Tensor
    seed: torch.Tensor
    dropout_p: float
    impl: str

    def masked(self, rows: torch.Tensor, after: torch.Tensor | None) -> torch.Tensor:
        """Returns dropout of ``rows [M, K]``, always with the same mask.

        ``after`` is as in `fastlora.ops.torch.single.keep_mask`.
        """
        if self.impl == "triton":
            made: torch.Tensor = torch.ops.fastlora.lora_dropout(rows, self.seed, self.dropout_p)
            return made
        keep = keep_mask(rows, self.seed, self.dropout_p, after, self.impl == "traced eager")
        return reference.select_(keep, rows).mul_(1.0 / (1.0 - self.dropout_p))


class Made(NamedTuple):
    """A forward's ``y [M, N]``, ``s [M, R]`` and ``z [M, N]``."""

    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor


class Wanted(NamedTuple):
    """Which gradients a backward is to find."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    magnitude: bool


class Found(NamedTuple):
    """The gradients of `Wanted`, None where it was not."""

    x: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    lora_a: torch.Tensor | None = None
    lora_b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None


def forward_rows(
    base: torch.Tensor | None,
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    adapter: Dropped,
    inplace: bool = False,
) -> Made:
    """Runs an adapter on the rows ``[M, K]`` of x without recording a graph.

    ``base [M, N]`` is the base layer's output, None to compute it from weight and bias; contiguous
    if it may become y, ``inplace``.
    """
    lora_a, lora_b, magnitude, squares, scaling, _, _, impl = adapter
    weight_x, scale = as_matrix(weight).to(rows.dtype), scale_of(magnitude, squares)
    masked = adapter.masked(rows, None)
    z, scaled_b = products.linear(masked, weight_x), _scaled_rows(lora_b, scale, rows.dtype)
    if base is None:
        y = products.linear(rows, weight_x, None if bias is None else bias.to(rows.dtype))
    else:
        y = base if inplace else base.clone(memory_format=torch.contiguous_format)
    if impl == "triton":
        s = torch.ops.fastlora.lora_shrink(masked, [], [lora_a], 1, None, [0.0], impl)
        torch.ops.fastlora.lora_expand_(y, s, [], [scaled_b], [None], scaling, impl)
    else:
        s = reference.lora_shrink(masked, lora_a)
        reference.lora_expand_(y, s, scaled_b, scaling)
    y.addcmul_(z.to(y.dtype), (scale - 1.0).to(y.dtype))
    return Made(y, s, z)


def gradients(
    dy: torch.Tensor,
    rows: torch.Tensor | None,
    weight: torch.Tensor,
    adapter: Dropped,
    s: torch.Tensor | None,
    z: torch.Tensor | None,
    wanted: Wanted,
    *,
    own_base: bool,
) -> Found:
    """Returns the gradients for ``dy [M, N]`` in x's dtype.

    x, ``rows``, is read for the gradients of weight and lora_a, s for those of lora_b and
    magnitude, z for the magnitude's. ``own_base`` says that the forward made the base layer's
    output, and its gradients count too.
    """
    lora_a, lora_b, magnitude, squares, scaling, *_ = adapter
    d_weight = d_lora_a = d_lora_b = d_magnitude = dx = sums = None
    traced = adapter.impl == "traced eager"
    scale = scale_of(magnitude, squares)
    if z is None or not wanted.magnitude:
        through_z = times(dy, scale - 1.0, traced)
    else:
        through_z, sums = scaled_with_sums(dy, z, scale - 1.0, traced)
    if s is not None and (wanted.lora_b or wanted.magnitude):
        # [R, M] x [M, N]: (scaling * s)^T dy serves both.
        inner = products.mm((s * scaling).to(dy.dtype).t(), dy).to(squares.dtype)
        if wanted.lora_b:
            d_lora_b = (inner * scale).t().to(lora_b.dtype).contiguous()
        if sums is not None:
            through_s = inner.mul_(lora_b.to(dy.dtype).t()).sum(0)
            d_magnitude = through_s.add_(sums).mul_(squares.rsqrt()).to(magnitude.dtype)
    if wanted.x or wanted.lora_a:
        ds = products.mm(dy, _scaled_rows(lora_b, scale, dy.dtype)).mul_(scaling)
    if wanted.x:
        weight_x = as_matrix(weight).to(dy.dtype)
        # [M, N] x [N, K], and the adapter's [M, R] x [R, K] into it
        dx = products.addmm_(products.mm(through_z, weight_x), ds, lora_a.to(dy.dtype))
        dx = adapter.masked(dx, dy)
        dx = products.addmm_(dx, dy, weight_x) if own_base else dx
    if rows is not None and (wanted.lora_a or wanted.weight):
        masked = adapter.masked(rows, dy)
        if wanted.lora_a:
            d_lora_a = products.mm(ds.t(), masked).to(lora_a.dtype)
        if wanted.weight:
            d_weight = products.mm(through_z.t(), masked)
            d_weight = products.addmm_(d_weight, dy.t(), rows) if own_base else d_weight
            d_weight = d_weight.to(weight.dtype)
    return Found(dx, d_weight, d_lora_a, d_lora_b, d_magnitude)


def _scaled_rows(lora_b: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns ``g * lora_b`` in ``dtype``, rounded once, for g ``[N]``."""
    return (lora_b.detach().to(dtype).to(scale.dtype) * scale[:, None]).to(dtype)
