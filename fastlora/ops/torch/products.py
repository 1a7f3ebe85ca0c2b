"""Matrix products on a CPU: in fp32 where the processor has no instructions for 16-bit ones.

There PyTorch's own 16-bit products take many times as long as fp32's. SmolLM2's linear of 576 to
1536, 512 rows of bf16, one AVX2 core, PyTorch and here: forward 91.5 and 11 ms, gradient of its
input 377 and 11 ms; fp32's 10. The sums are fp32 either way and rounded once; where a product is
added to a result, here also the sum is.

Everywhere else these are PyTorch's functions, and under a compiler or tracer, where a graph is
recorded, and for operands that do not agree in dtype. Temporaries are the smaller operand in fp32,
and parts of the larger one and of the result. Nothing is called that autocast would narrow: it
knows neither in-place products nor those with ``out``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

# Numbers of an operand that are widened at once, or as many as the smaller operand and the result
# have together, if no more than `_MOST`: a product in two costs up to a third more than one.
_CHUNK, _MOST = 1 << 17, 1 << 22
# And at least so many rows of it.
_LEAST = 32
# PyTorch reads the weight of so few rows at memory's speed: 2 rows of bf16 through 576 to 1536 in
# 0.43 ms and here in 0.81; 4 in 0.8 and 0.6.
_FEW_ROWS = 3


def _emulated() -> frozenset[torch.dtype]:
    """Returns the dtypes whose products this processor emulates; known for x86 with AVX2 only."""
    if (
        torch.backends.cpu.get_cpu_capability() != "AVX2"
        or not torch.backends.mkldnn.is_available()
    ):
        return frozenset()
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, is_fast in supported.items() if not is_fast)


EMULATED = _emulated()


def widens(*operands: torch.Tensor) -> bool:
    """Whether a product of these is computed in fp32 here."""
    first = operands[0]
    return (
        first.dtype in EMULATED
        and first.device.type == "cpu"
        and all(t.dtype is first.dtype for t in operands)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in operands))
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``x @ weight.T + bias``, ``[M, N]``, for ``x [M, K]``."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    if x.dtype not in EMULATED or not widens(*operands) or _is_read_once(x, weight.t()):
        return F.linear(x, weight, bias)
    return mm(x, weight.t()) if bias is None else addmm_(bias.repeat(x.shape[0], 1), x, weight.t())


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[M, N]``, for ``a [M, K]`` and ``b [K, N]``."""
    if a.dtype not in EMULATED or not widens(a, b) or _is_read_once(a, b):
        return torch.mm(a, b)
    y = a.new_empty(a.shape[0], b.shape[1])

    def write(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(torch.mm(a, b, out=a.new_empty(part.shape)))

    _in_parts(write, y, a, b)
    return y


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [M, N]`` in place and returns it."""
    if y.dtype not in EMULATED or not widens(y, a, b) or _is_read_once(a, b):
        return y.addmm_(a, b)

    def add(part: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.copy_(part.float().addmm_(a, b))

    _in_parts(add, y, a, b)
    return y


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[G, M, N]``, for ``a [G, M, K]`` and ``b [G, K, N]``."""
    if not widens(a, b) or _is_read_once(a, b):
        return torch.bmm(a, b)
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for part in _groups(a, b):
        own_a, own_b = a[part].float(), b[part].float()
        y[part] = torch.bmm(own_a, own_b, out=own_a.new_empty(y[part].shape))
    return y


def baddbmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [G, M, N]`` in place and returns it."""
    if not widens(y, a, b):
        return y.baddbmm_(a, b)
    for part in _groups(a, b):
        y[part] = y[part].float().baddbmm_(a[part].float(), b[part].float())
    return y


def _is_read_once(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether PyTorch takes dot products of few rows with what lies in memory as ``[N, K]``."""
    return a.shape[-2] <= _FEW_ROWS and b.stride(-2) == 1


def _in_parts(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
    y: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
) -> None:
    """Calls ``compute`` for parts of y with their operands in fp32; the smaller one is whole."""
    by_rows = a.numel() > b.numel()
    parted, whole = (a, b.float()) if by_rows else (b.t(), a.float())
    results = y if by_rows else y.t()
    at_once = min(max(_CHUNK, whole.numel() + y.numel()), _MOST)
    size = max(at_once // max(parted.shape[1], results.shape[1], 1), _LEAST)
    for own, part in zip(parted.split(size), results.split(size), strict=True):
        if by_rows:
            compute(part, own.float(), whole)
        else:
            compute(part.t(), whole, own.float().t())


def _groups(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    (groups, m, k), n = a.shape, b.shape[2]
    count = max(_CHUNK // max(m * k, k * n, m * n, 1), 1)
    return (slice(at, at + count) for at in range(0, groups, count))
