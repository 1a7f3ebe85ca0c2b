"""A base weight that is stored as codes and scales, which kernels read as it is.

`CodedWeight` stands where a weight stands: autograd, routing, siblings and mixed batches pass it on
and save it like any tensor. Kernels get what it holds, a `Coded`. Whatever else PyTorch computes
with it gets the dense matrix, made for that one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map_only


class Coded(NamedTuple):
    """What a kernel reads of a weight ``[N, K]``.

    Attributes:
        kind: Name of the loader in `fastlora.kernels.weights`.
        codes: The codes, as the loader says.
        parts: int64, one address each of what decodes them, as the loader says.
        n, k: Sizes of the weight.
        block: Elements along K that share a scale; it divides K.
        transposed: Whether it stands for the weight's transpose, ``[K, N]``.
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
        """That of the matrix it stands for."""
        return (self.k, self.n) if self.transposed else (self.n, self.k)

    def t(self) -> Coded:
        """Returns the transpose."""
        return self._replace(transposed=not self.transposed)


class CodedWeight(torch.Tensor):
    """A weight ``[N, K]`` without a matrix.

    Args:
        coded: What kernels read.
        dense: Makes the matrix ``[N, K]``.
        dtype: Of the matrix, in which the base layer computes.
        keeps: What the addresses in ``coded`` point to.
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
        """Makes the tensor."""
        make: Any = torch.Tensor._make_wrapper_subclass
        made: CodedWeight = make(cls, coded.shape, dtype=dtype, device=coded.codes.device)
        made._coded, made.dense, made.keeps = coded, dense, keeps
        made._versions = _versions(keeps)
        return made

    @property
    def is_unwritten(self) -> bool:
        """Whether nobody wrote to it since it was made."""
        return _versions(self.keeps) == self._versions

    @property
    def coded(self) -> Coded:
        """What kernels read.

        Raises:
            RuntimeError: Somebody wrote to it since it was made.
        """
        if not self.is_unwritten:
            raise RuntimeError(
                "a quantised base weight was written to (a merge, a loaded state) after a forward "
                "and before its backward, which needs it as it was: write once the backward has run"
            )
        return self._coded

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation on the dense matrix; a transpose and a detached one need none."""
        if func is torch.ops.aten.t.default:
            return _of(args[0], args[0]._coded.t())
        if func is torch.ops.aten.detach.default:
            return _of(args[0], args[0]._coded)
        dense = tree_map_only(CodedWeight, matrix, (args, kwargs or {}))
        return func(*dense[0], **dense[1])

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        """Says what it holds."""
        return f"CodedWeight({self._coded.kind}, {tuple(self.shape)}, {self.dtype})"


def _versions(tensors: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    return tuple([tensor._version for tensor in tensors if not tensor.is_inference()])


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Returns a weight as it is, and of codes the matrix: once for several products."""
    return matrix(weight) if isinstance(weight, CodedWeight) else weight


def matrix(weight: CodedWeight) -> torch.Tensor:
    """Returns a new dense matrix of a weight, transposed as it is."""
    made = weight.dense().detach()
    made = made if made.dtype is weight.dtype else made.to(weight.dtype)
    return made.t() if weight.coded.transposed else made


def _of(weight: CodedWeight, coded: Coded) -> CodedWeight:
    made = CodedWeight(coded, weight.dense, weight.dtype, weight.keeps)
    made._versions = weight._versions
    return made
