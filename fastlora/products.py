"""Matrix products on a CPU: in fp32 where the processor has no instructions for 16-bit ones.

There PyTorch's own 16-bit products take 8 to 60 times as long as fp32's. SmolLM2's linear of 576
to 1536, 512 rows of bf16, one AVX2 core, PyTorch and here: forward 91.5 and 10.5 ms, gradient of
its input 377 and 10.5 ms. The sums are fp32 either way and rounded once; where a product is added
to a result, here also the sum is.

Everywhere else, and under a compiler, these are PyTorch's functions. No temporary is larger than
``_CHUNK`` numbers, but for the left operand in fp32. Nothing is called that autocast would narrow:
it knows neither PyTorch's in-place products nor those with ``out``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Numbers of the right operand, or of the result, that are widened at once: 1 MiB, as a cache holds.
_CHUNK = 1 << 18


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
    y, wide = a.new_empty(a.shape[0], b.shape[1]), a.float()
    for part in _columns(wide, b):
        own = b[:, part].float()
        y[:, part] = torch.mm(wide, own, out=wide.new_empty(len(wide), own.shape[1]))
    return y


def addmm_(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adds ``a @ b`` to ``y [M, N]`` in place and returns it."""
    if not widens(y):
        return y.addmm_(a, b)
    wide = a.float()
    for part in _columns(wide, b):
        y[:, part] = y[:, part].float().addmm_(wide, b[:, part].float())
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


def _columns(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    width = max(_CHUNK // max(*a.shape, 1), 64)
    return (slice(at, at + width) for at in range(0, b.shape[1], width))


def _groups(a: torch.Tensor, b: torch.Tensor) -> Iterator[slice]:
    (groups, m, k), n = a.shape, b.shape[2]
    count = max(_CHUNK // max(m * k, k * n, m * n, 1), 1)
    return (slice(at, at + count) for at in range(0, groups, count))
