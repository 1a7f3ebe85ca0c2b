"""One DoRA adapter with active dropout, as PEFT computes it: the base product twice.

``y = x @ weight.T + bias + (g - 1) * dropout(x) @ weight.T + g * scaling * s @ lora_b.T`` and its
gradients. LoRA's own products are operators' where they run over Triton.

Shapes: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``s [M, R]``,
``z`` and ``y [M, N]``, ``magnitude`` and its squares ``[N]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastlora.ops.torch import products, reference
from fastlora.ops.torch.norms import adapted_squares, norm_joins, outside_autocast
from fastlora.ops.torch.scale import scale_of, scaled_with_sums, times
from fastlora.ops.torch.single import keep_mask


def joins(
    x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor, impl: str
) -> bool:
    """Whether the norm is best computed in `DoraDropped`, from ``||weight||^2``.

    Then lora_a's rows go through the base product behind those of ``dropout(x)``.
    """
    eager = impl != "triton" and not torch.compiler.is_compiling() and type(seed) is torch.Tensor
    on_cpu = x.device.type == "cpu"  # what the norm costs elsewhere is not measured
    return eager and on_cpu and lora_a.shape[0] > 0 and norm_joins(x, weight, lora_a.shape[0])


class Dropped(NamedTuple):
    """One DoRA adapter whose dropout acts.

    Attributes:
        lora_a, lora_b, magnitude: ``[R, K]``, ``[N, R]``, ``[N]``.
        squares: `adapted_squares`, ``[N]``.
        scaling: Without dimensions.
        seed: Of its mask, int64 ``[1]``.
        dropout_p: Probability.
        impl: ``"triton"`` or ``"eager"``.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    magnitude: torch.Tensor
    squares: torch.Tensor
    scaling: torch.Tensor
    seed: torch.Tensor
    dropout_p: float
    impl: str

    @property
    def up(self) -> float:
        """What dropout multiplies by."""
        return 1.0 / (1.0 - self.dropout_p)

    @property
    def z_up(self) -> float:
        """What is missing in z: in PyTorch `up` goes into what is smaller or scaled anyway."""
        return 1.0 if self.impl == "triton" else self.up


class Made(NamedTuple):
    """A forward's ``y [M, N]``, ``s [M, R]``, ``z [M, N]``, and the squares that it used."""

    y: torch.Tensor
    s: torch.Tensor
    z: torch.Tensor
    squares: torch.Tensor


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
    norm_scaling: torch.Tensor | float | None = None,
    inplace: bool = False,
) -> Made:
    """Runs an adapter on ``rows [M, K]`` without recording a graph.

    Args:
        base: The base layer's output ``[M, N]``, or None to compute it from weight and bias.
        rows: x.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        adapter: With ``norm_scaling``, where `joins` says so, its squares are those of the weight.
        norm_scaling: The scaling, as a number if it is one.
        inplace: Whether base, contiguous then, may become y.
    """
    lora_a, lora_b, magnitude, squares, scaling, seed, dropout_p, impl = adapter
    weight_x, m = weight.to(rows.dtype), rows.shape[0]
    if norm_scaling is not None:
        both = reference.lora_selected(rows, seed, dropout_p, lora_a.shape[0])
        both[m:] = lora_a
        dropped, product = both[:m], products.linear(both, weight_x)
        z, cross = product[:m], product[m:].t()
        squares = outside_autocast(
            adapted_squares, weight, squares, lora_a, lora_b, norm_scaling, cross
        )
    else:
        if impl == "triton":
            dropped = torch.ops.fastlora.lora_dropout(rows, seed, dropout_p)
        else:
            dropped = reference.select_(keep_mask(rows, seed, dropout_p, after=None), rows)
        z = products.linear(dropped, weight_x)
    change = scale_of(magnitude, squares).sub_(1.0)
    scaled_b = _scaled_rows(lora_b, magnitude, squares, rows.dtype)
    if base is None:
        y = products.linear(rows, weight_x, None if bias is None else bias.to(rows.dtype))
    else:
        y = base if inplace else base.clone(memory_format=torch.contiguous_format)
    if impl == "triton":
        s = torch.ops.fastlora.lora_shrink(dropped, [], [lora_a], 1, None, [0.0], impl)
        torch.ops.fastlora.lora_expand_(y, s, [], [scaled_b], [None], scaling, impl)
    else:
        s = reference.lora_shrink(dropped, lora_a).mul_(adapter.up)
        reference.lora_expand_(y, s, scaled_b, scaling)
    y.addcmul_(z.to(y.dtype), change.mul_(adapter.z_up).to(y.dtype))
    return Made(y, s, z, squares)


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
    """Returns the gradients for ``dy [M, N]``.

    Args:
        dy: In x's dtype.
        rows: x, ``[M, K]``; not read for the gradients of x, lora_b and magnitude.
        weight: ``[N, K]``.
        adapter: As in the forward.
        s: Of the forward, where lora_b or the magnitude is wanted.
        z: Of the forward, where the magnitude is.
        wanted: What to find.
        own_base: Whether the forward made the base layer's output, and its gradients count too.
    """
    lora_a, lora_b, magnitude, squares, scaling, seed, dropout_p, impl = adapter
    d_weight = d_lora_a = d_lora_b = d_magnitude = dx = None
    z = z if wanted.magnitude else None
    through_z, sums = _through_z(dy, z, magnitude, squares, adapter.up)
    if s is not None and (wanted.lora_b or wanted.magnitude):
        # [R, M] x [M, N]: (scaling * s)^T dy serves both.
        inner = products.mm((s * scaling).to(dy.dtype).t(), dy).to(squares.dtype)
        if wanted.lora_b:
            d_lora_b = (inner * scale_of(magnitude, squares)).t().to(lora_b.dtype).contiguous()
        if sums is not None:
            through_s = inner.mul_(lora_b.to(dy.dtype).t()).sum(0)
            d_magnitude = through_s.add_(sums, alpha=adapter.z_up).mul_(squares.rsqrt())
            d_magnitude = d_magnitude.to(magnitude.dtype)
    if wanted.x or wanted.lora_a or wanted.weight:
        # 1 / (1 - p) of the dropped rows and of dx stands in ds and in through_z.
        scaled_b = _scaled_rows(lora_b, magnitude, squares, dy.dtype)
        ds = products.mm(dy, scaled_b).mul_(scaling).mul_(adapter.up)
        if rows is None:
            rows = dy.new_empty(dy.shape[0], weight.shape[1])
        keep = _mask(rows, seed, dropout_p, impl, dy)
        weight_x = weight.to(dy.dtype)
    if wanted.x:
        # [M, N] x [N, K], and the adapter's [M, R] x [R, K] into it
        dx = products.mm(through_z, weight_x)
        dx = products.addmm_(dx, ds, lora_a.to(dy.dtype))
        dx = dx.mul_(keep) if keep.is_floating_point() else reference.drop_(dx, keep)
        dx = products.addmm_(dx, dy, weight_x) if own_base else dx
    if rows is not None and (wanted.lora_a or wanted.weight):
        kept = rows * keep if keep.is_floating_point() else reference.select_(keep, rows)
        if wanted.lora_a:
            d_lora_a = products.mm(ds.t(), kept).to(lora_a.dtype)
        if wanted.weight:
            d_weight = products.mm(through_z.t(), kept)
            d_weight = products.addmm_(d_weight, dy.t(), rows) if own_base else d_weight
            d_weight = d_weight.to(weight.dtype)
    return Found(dx, d_weight, d_lora_a, d_lora_b, d_magnitude)


def _mask(
    rows: torch.Tensor, seed: torch.Tensor, dropout_p: float, impl: str, after: torch.Tensor
) -> torch.Tensor:
    """Returns what dropout keeps of ``rows``: ones and zeros, integers unless kernels drew them."""
    if impl == "triton":
        ones = torch.ones_like(rows, memory_format=torch.contiguous_format)
        return torch.ops.fastlora.lora_dropout(ones, seed, dropout_p).sign_()
    return keep_mask(rows, seed, dropout_p, after=after)


def _through_z(
    dy: torch.Tensor,
    z: torch.Tensor | None,
    magnitude: torch.Tensor,
    squares: torch.Tensor,
    up: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns ``up * (g - 1) * dy``, and the sums over rows of ``dy * z`` where z is there."""
    change = scale_of(magnitude, squares).sub_(1.0).mul_(up)
    return (times(dy, change), None) if z is None else scaled_with_sums(dy, z, change)


def _scaled_rows(
    lora_b: torch.Tensor, magnitude: torch.Tensor, squares: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Returns ``g * lora_b`` in ``dtype``, rounded once."""
    scale = scale_of(magnitude, squares)
    return (lora_b.detach().to(dtype).to(scale.dtype) * scale[:, None]).to(dtype)
