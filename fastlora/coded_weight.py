"""A quantized base weight that kernels read without dequantizing it first.

`CodedWeight` takes the place of a dense weight. Autograd, routing, shared-input groups, and mixed
batches pass it on and save it like any other tensor. Kernels receive its quantized data, a `Coded`.
Any other PyTorch operation on it receives the dense matrix, which is dequantized for that one
operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class Coded(NamedTuple):
    """The quantized data of a weight ``[N, K]``, as kernels read it.

    Attributes:
        kind: Name of the loader in `fastlora.kernels.weights`.
        codes: The quantized values, in the layout that the loader defines.
        parts: int64 addresses of the tensors that decode the values (such as scales), in the order
            that the loader defines.
        n, k: Dimensions of the weight.
        block: Number of elements along K that share a scale. It divides K.
        transposed: Whether this represents the transposed weight, ``[K, N]``.
    """

    kind: str
    codes: torch.Tensor
    parts: torch.Tensor
    n: int
    k: int
    block: int
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that the quantized data represents."""
        return (self.k, self.n) if self.transposed else (self.n, self.k)

    def t(self) -> Coded:
        """Return the transpose, which shares the quantized data."""
        return self._replace(transposed=not self.transposed)


class CodedWeight(torch.Tensor):
    """A tensor that represents a weight ``[N, K]`` by its quantized data.

    Args:
        coded: The quantized data that kernels read.
        dense: Function that returns the dense matrix ``[N, K]``.
        dtype: Dtype of the dense matrix, in which the base layer computes.
        keeps: The tensors that the addresses in ``coded`` point to. The weight keeps them alive.
    """

    dense: Callable[[], torch.Tensor]
    keeps: tuple[torch.Tensor, ...]
    _coded: Coded
    _versions: tuple[int, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __new__(
        cls,
        coded: Coded,
        dense: Callable[[], torch.Tensor],
        dtype: torch.dtype,
        keeps: tuple[torch.Tensor, ...],
    ) -> CodedWeight:
        """Create the tensor."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: CodedWeight = make(cls, coded.shape, dtype=dtype, device=coded.codes.device)
        made._coded, made.dense, made.keeps = coded, dense, keeps
        made._versions = _versions(keeps)
        return made

    @property
    def is_unwritten(self) -> bool:
        """Whether the quantized data has not been written to since this tensor was created."""
        return _versions(self.keeps) == self._versions

    @property
    def coded(self) -> Coded:
        """The quantized data that kernels read.

        Raises:
            RuntimeError: The data has been written to since this tensor was created.
        """
        if not self.is_unwritten:
            raise RuntimeError(
                "a quantized base weight was modified (by a merge or a loaded state dict) "
                "between a forward pass and its backward pass, which needs the original values; "
                "modify the weight after the backward pass"
            )
        return self._coded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the dense matrix. Transpose and detach do not need the matrix."""
        if func is torch.ops.aten.t.default:
            return _of(args[0], args[0]._coded.t())
        if func is torch.ops.aten.detach.default:
            return _of(args[0], args[0]._coded)
        dense = tree_map_only(CodedWeight, matrix, (args, kwargs or {}))
        return func(*dense[0], **dense[1])

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Return the kind, the shape, and the dtype as text."""
        return f"CodedWeight({self._coded.kind}, {tuple(self.shape)}, {self.dtype})"


def _versions(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple([tensor._version for tensor in tensors if not tensor.is_inference()])


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight as a dense tensor, so that several products can share one dequantization.

    A weight that is not a `CodedWeight` is returned unchanged.
    """
    return matrix(weight) if isinstance(weight, CodedWeight) else weight


def matrix(weight: CodedWeight) -> torch.Tensor:
    """Return a new dense matrix of a quantized weight, transposed if the weight is."""
    made = weight.dense().detach()
    made = made if made.dtype is weight.dtype else made.to(weight.dtype)
    return made.t() if weight.coded.transposed else made


def _of(weight: CodedWeight, coded: Coded) -> CodedWeight:
    made = CodedWeight(coded, weight.dense, weight.dtype, weight.keeps)
    made._versions = weight._versions
    return made
