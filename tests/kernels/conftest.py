"""What the kernel tests share: where they run, in which dtypes, and tensors that show neglect.

They run in Triton's interpreter (``TRITON_INTERPRET=1``, on the CPU) or natively on a CUDA GPU. The
interpreter's bf16 arithmetic is wrong, so bf16 needs a GPU.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from fastlora.env import triton_interpreted

NATIVE = torch.cuda.is_available() and not triton_interpreted()
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if NATIVE else ()))


if triton_interpreted() and importlib.util.find_spec("triton") is not None:
    from tests.support.kernels import quick_interpreter

    quick_interpreter.quicken()


class Lab:
    """Makes the tensors of a test, on the device under test."""

    device = torch.device("cuda" if NATIVE else "cpu")

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values, the same on every device."""
        return torch.randn(shape).to(self.device, dtype)

    def poisoned(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """An output buffer of NaN: what a kernel forgets to write shows."""
        return torch.full(shape, float("nan"), dtype=dtype, device=self.device)

    def strided(self, x: torch.Tensor, layout: str) -> torch.Tensor:
        """The same values ``[M, K]`` in another layout; what lies between them is NaN."""
        if layout == "contiguous":
            return x
        if layout == "transposed":
            return x.t().contiguous().t()
        m, k = x.shape
        if layout == "rows":  # a column slice of a wider matrix
            wide = self.poisoned(m, k + 5, dtype=x.dtype)
            wide[:, 3 : 3 + k] = x
            return wide[:, 3 : 3 + k]
        if layout == "both":
            wide = self.poisoned(2 * m, 3 * k, dtype=x.dtype)
            wide[::2, ::3] = x
            return wide[::2, ::3]
        raise ValueError(layout)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every test with a ``dtype`` argument of no other source the dtypes that run here."""
    marks = metafunc.definition.iter_markers("parametrize")
    if "dtype" in metafunc.fixturenames and not any("dtype" in mark.args[0] for mark in marks):
        metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@pytest.fixture
def lab() -> Lab:
    """The device under test; skips where no kernel can run."""
    pytest.importorskip("triton", reason="triton is not installed")
    if not NATIVE and not triton_interpreted():
        pytest.skip("kernels need a CUDA GPU or TRITON_INTERPRET=1")
    return Lab()


@pytest.fixture
def kernel_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In PyTorch too, dropout takes the masks that the kernels draw."""
    from fastlora.ops import philox_reference
    from fastlora.ops.torch import reference

    def dropped(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
        keep = philox_reference.philox_keep_mask(int(seed), *x.shape, p)
        return torch.where(keep.to(x.device), x / (1 - p), 0)

    monkeypatch.setattr(reference, "lora_dropout", dropped)


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's dots where there is one, hostile ones in the interpreter."""
    if not triton_interpreted():
        return
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self: Any, a: Any, b: Any, acc: Any, *_: Any) -> Any:
        left, right, total = (t.data.astype(np.float32) for t in (a, b, acc))
        (m, k), n = left.shape, right.shape[1]
        for step in np.roll(np.arange(k), (m + 3 * n) // 16 % k):
            total = total + left[:, step : step + 1] * right[step : step + 1]
        # The next fp32 towards infinity.
        return TensorHandle(np.nextafter(total, np.float32(np.inf)), acc.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
