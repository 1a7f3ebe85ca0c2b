"""Matrix products on a CPU: in fp32 where the processor has no instructions for 16-bit ones.

There PyTorch's own 16-bit products take 8 to 60 times as long as fp32's. SmolLM2's linear of 576
to 1536, 512 rows of bf16, one AVX2 core, PyTorch and here: forward 91.5 and 10.5 ms, gradient of
its input 377 and 10.5 ms. The sums are fp32 either way and rounded once; where a product is added
to a result, here also the sum is.

Everywhere else, and under a compiler, these are PyTorch's functions. A temporary has no more
numbers than the smaller operand and the result together, or ``_CHUNK``. Nothing is called that
autocast would narrow: it knows neither in-place products nor those with ``out``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Numbers of an operand that are widened at once, if the rows and their results are not more: a
# product in two costs up to a fifth more than one. At least so many rows of it.
_CHUNK, _LEAST = 1 << 17, 32


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


_EMULATED = _emulated()


def widens(a: torch.Tensor) -> bool:
    """Whether products with ``a`` are computed in fp32 here."""
    return a.dtype in _EMULATED and a.device.type == "cpu" and not torch.compiler.is_compiling()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Returns ``x @ weight.T + bias``, ``[M, N]``, for ``x [M, K]``; records no graph."""
    # PyTorch reads the weight of a single row at memory's speed.
    if not widens(x) or x.shape[0] == 1:
        return F.linear(x, weight, bias)
    y = mm(x, weight.t()) if bias is None else bias.repeat(x.shape[0], 1)
    return y if bias is None else addmm_(y, x, weight.t())


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[M, N]``, for ``a [M, K]`` and ``b [K, N]``; records no graph."""
    if not widens(a):
        return torch.mm(a, b)
    y = a.new_empty(a.shape[0], b.shape[1])
    for part, own_a, own_b in _parts(y, a, b):
        part.copy_(torch.mm(own_a, own_b, out=own_a.new_empty(part.shape)))
    return y


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [M, N]`` in place and returns it."""
    if not widens(y):
        return y.addmm_(a, b)
    for part, own_a, own_b in _parts(y, a, b):
        part.copy_(part.float().addmm_(own_a, own_b))
    return y


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns ``a @ b``, ``[G, M, N]``, for ``a [G, M, K]`` and ``b [G, K, N]``."""
    if not widens(a):
        return torch.bmm(a, b)
    y = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    for part in _groups(a, b):
        own_a, own_b = a[part].float(), b[part].float()
        y[part] = torch.bmm(own_a, own_b, out=own_a.new_empty(y[part].shape))
    return y


def baddbmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [G, M, N]`` in place and returns it."""
    if not widens(y):
        return y.baddbmm_(a, b)
    for part in _groups(a, b):
        y[part] = y[part].float().baddbmm_(a[part].float(), b[part].float())
    return y


def _parts(
    y: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields views of y with their operands in fp32; the smaller operand is widened once, whole."""
    by_rows = a.numel() > b.numel()
    parted, whole = (a, b.float()) if by_rows else (b.t(), a.float())
    results = y if by_rows else y.t()
    at_once = max(_CHUNK, whole.numel() + y.numel())
    size = max(at_once // max(parted.shape[1], results.shape[1], 1), _LEAST)
    for own, part in zip(parted.split(size), results.split(size), strict=True):
        yield (part, own.float(), whole) if by_rows else (part.t(), whole, own.float().t())


def _groups(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    (groups, m, k), n = a.shape, b.shape[2]
    count = max(_CHUNK // max(m * k, k * n, m * n, 1), 1)
    return (slice(at, at + count) for at in range(0, groups, count))
