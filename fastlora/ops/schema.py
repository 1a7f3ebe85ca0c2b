"""The registered operators: schemas, fakes and implementations.

One opaque operator is crossed per forward of a layer, so that `torch.compile` sees neither Triton
nor the choice of a plan. Nothing here imports Triton before a kernel runs.

Shapes everywhere: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``,
``s [M, R]``, ``y [M, N]``, ``scaling`` without dimensions or ``[R]``.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F

# Part of this module for its callers: what they pass to the operators comes of these.
from fastlora.ops.backend import draw_seed as draw_seed
from fastlora.ops.backend import resolve_impl as resolve_impl
from fastlora.ops.backend import triton_status as triton_status
from fastlora.ops.plans import choose_plan
from fastlora.ops.plans import precision as _precision  # noqa: F401
from fastlora.ops.torch import reference

# Of the mixed add, which has no table of plans: as `fastlora.kernels.configs.FUSED_MAX_ROWS`.
_FUSED_MAX_ROWS = 64

_LIBRARY = torch.library.Library("fastlora", "DEF")
_LIBRARY.define(
    "lora_shrink(Tensor x, Tensor lora_a, Tensor? seed, float dropout_p, str impl) -> Tensor"
)
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b,"
    " Tensor scaling, Tensor? seed, float dropout_p, str impl, str plan) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lora_expand_(Tensor(a!) y, Tensor s, Tensor lora_b, Tensor scaling, str impl) -> ()"
)
_LIBRARY.define("lora_dropout(Tensor x, Tensor seed, float dropout_p, str impl) -> Tensor")
# ``after`` is not read. A backward gives one of its tensors, so that compilers neither take its
# mask for the forward's nor draw it there: they would save it.
_LIBRARY.define("lora_keep(Tensor x, Tensor seed, float dropout_p, Tensor? after) -> Tensor")
_LIBRARY.define(
    "lora_linear_of(Tensor x, Tensor weight, Tensor? bias, Tensor s, Tensor lora_b,"
    " Tensor scaling, str impl, str plan) -> Tensor"
)


def _implements(name: str) -> Any:
    return torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")


def _on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _whole_rows(x: torch.Tensor) -> torch.Tensor:
    """Returns x ``[M, K]`` contiguous, at a multiple of 16 bytes, and with those strides at M = 1.

    Triton compiles kernels of their own for other layouts, and a batch may come in any.
    """
    if not x.is_contiguous() or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    return x.view(-1).view(x.shape)


def _triton_shrink(
    x: torch.Tensor, lora_a: torch.Tensor, seed: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """Runs shrink, and its reduction where K was split; returns s ``[M, R]`` in x's dtype."""
    from fastlora.kernels import chips, configs, lora_shrink

    (m, k), r, precision = x.shape, lora_a.shape[0], _precision(x.dtype)
    config = configs.choose(
        chips.chip_of(x.device), "lora_shrink", x.dtype, m=m, k=k, r=r, input_precision=precision
    )
    s = x.new_empty(m, r)
    if config.splits == 1:
        lora_shrink.launch_lora_shrink(s, x, lora_a, seed=seed, dropout_p=dropout_p, config=config)
        return s
    planes = x.new_empty(config.splits, m, r, dtype=torch.float32)
    lora_shrink.launch_lora_shrink(planes, x, lora_a, seed=seed, dropout_p=dropout_p, config=config)
    lora_shrink.launch_lora_shrink_reduce(s, planes, config=config)
    return s


def _triton_expand_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor
) -> None:
    from fastlora.kernels import chips, configs, lora_expand

    (m, n), r, precision = y.shape, s.shape[1], _precision(s.dtype)
    config = configs.choose(
        chips.chip_of(y.device), "lora_expand", s.dtype, m=m, n=n, r=r, input_precision=precision
    )
    lora_expand.launch_lora_expand(y, s, lora_b, scaling, config=config)


def _triton_fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    invariant: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two launches: shrink, then the base GEMM with the LoRA term in its epilogue.

    Where shrink splits K, its planes go straight into that epilogue, which sums them.
    """
    from fastlora.kernels import chips, configs, lora_linear, lora_shrink

    (m, k), n, r = x.shape, weight.shape[0], lora_a.shape[0]
    chip = chips.chip_of(x.device)
    # From one plane to the next; in the mode a multiple of 16, as Triton would ask of it again.
    plane_rows = m
    if invariant:
        x, plane_rows = _whole_rows(x), configs.cdiv(m, 16) * 16
    given: dict[str, Any] = {"m": m, "n": n, "k": k, "r": r, "batch_invariant": invariant}
    given["input_precision"] = _precision(x.dtype)
    shrink_config = configs.choose(chip, "lora_shrink", x.dtype, **given)
    linear_config = configs.choose(chip, "lora_linear", x.dtype, **given)
    y, s = x.new_empty(m, n), x.new_empty(m, r)
    split = shrink_config.splits > 1
    shrunk = s
    if split:
        planes = x.new_empty(shrink_config.splits, plane_rows, r, dtype=torch.float32)
        shrunk = planes[:, :m]
    lora_shrink.launch_lora_shrink(
        shrunk, x, lora_a, seed=seed, dropout_p=dropout_p, config=shrink_config
    )
    lora_linear.launch_lora_linear(
        y,
        x,
        weight,
        shrunk,
        lora_b,
        scaling,
        bias=bias,
        s_out=s if split else None,
        config=linear_config,
        pdl=chip.has_pdl,
    )
    return y, s


def _triton_linear_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    plan: str,
) -> torch.Tensor:
    """y from an s that is there already."""
    from fastlora.kernels import chips, configs, lora_linear

    if choose_plan(plan, x, weight, lora_b.shape[1]) == "split":
        y = F.linear(x, weight, bias)
        _triton_expand_(y, s, lora_b, scaling)
        return y
    (m, k), (n, r) = x.shape, lora_b.shape
    chip, precision = chips.chip_of(x.device), _precision(x.dtype)
    config = configs.choose(
        chip, "lora_linear", x.dtype, m=m, n=n, k=k, r=r, input_precision=precision
    )
    y = x.new_empty(m, n)
    lora_linear.launch_lora_linear(
        y, x, weight, s, lora_b, scaling, bias=bias, s_out=None, config=config, pdl=False
    )
    return y


def _triton_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses and runs a plan; see `fastlora.ops.plans`."""
    chosen = choose_plan(plan, x, weight, lora_a.shape[0])
    if chosen != "split":
        return _triton_fused_linear(
            x, weight, bias, lora_a, lora_b, scaling, seed, dropout_p, chosen == "invariant"
        )
    s = _triton_shrink(x, lora_a, seed, dropout_p)
    return _triton_linear_of(x, weight, bias, s, lora_b, scaling, plan), s


@_implements("lora_shrink")
def _lora_shrink(
    x: torch.Tensor,
    lora_a: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
) -> torch.Tensor:
    if impl == "triton":
        with _on_device(x):
            return _triton_shrink(x, lora_a, seed, dropout_p)
    dropped = x if seed is None else reference.lora_dropout(x, seed, dropout_p)
    return reference.lora_shrink(dropped, lora_a)


@_implements("lora_linear")
def _lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    seed: torch.Tensor | None,
    dropout_p: float,
    impl: str,
    plan: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        with _on_device(x):
            return _triton_linear(x, weight, bias, lora_a, lora_b, scaling, seed, dropout_p, plan)
    s = _lora_shrink(x, lora_a, seed, dropout_p, impl)
    return reference.lora_linear(x, weight, bias, s, lora_b, scaling), s


@_implements("lora_linear_of")
def _lora_linear_of(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    s: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: torch.Tensor,
    impl: str,
    plan: str,
) -> torch.Tensor:
    if impl == "triton":
        with _on_device(x):
            return _triton_linear_of(x, weight, bias, s, lora_b, scaling, plan)
    return reference.lora_linear(x, weight, bias, s, lora_b, scaling)


@_implements("lora_expand_")
def _lora_expand_(
    y: torch.Tensor, s: torch.Tensor, lora_b: torch.Tensor, scaling: torch.Tensor, impl: str
) -> None:
    if impl == "triton":
        with _on_device(y):
            _triton_expand_(y, s, lora_b, scaling)
    else:
        reference.lora_expand_(y, s, lora_b, scaling)


@_implements("lora_dropout")
def _lora_dropout(x: torch.Tensor, seed: torch.Tensor, dropout_p: float, impl: str) -> torch.Tensor:
    if impl == "triton":
        from fastlora.kernels import chips, configs, lora_dropout

        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        m, k = x.shape
        config = configs.choose(chips.chip_of(x.device), "lora_dropout", x.dtype, m=m, k=k)
        with _on_device(x):
            lora_dropout.launch_lora_dropout(out, x, seed=seed, dropout_p=dropout_p, config=config)
        return out
    return reference.lora_dropout(x, seed, dropout_p)


@_implements("lora_keep")
def _lora_keep(
    x: torch.Tensor, seed: torch.Tensor, dropout_p: float, after: torch.Tensor | None
) -> torch.Tensor:
    return reference.lora_keep(x, seed, dropout_p)


@torch.library.register_fake("fastlora::lora_shrink")
def _(x: torch.Tensor, lora_a: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], lora_a.shape[0])


@torch.library.register_fake("fastlora::lora_linear")
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, lora_a: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    m = x.shape[0]
    return x.new_empty(m, weight.shape[0]), x.new_empty(m, lora_a.shape[0])


@torch.library.register_fake("fastlora::lora_linear_of")
def _(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fastlora::lora_keep")
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(x.shape, dtype=reference.INTEGERS[x.itemsize], device=x.device)


@torch.library.register_fake("fastlora::lora_expand_")
def _(*_: Any) -> None:
    return None


@torch.library.register_fake("fastlora::lora_dropout")
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
