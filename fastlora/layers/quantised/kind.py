"""What a kind of quantised weight answers, and the kinds by name of their class.

A kind is one class, a `Quantised` under `register_quantised`: which modules it knows, their weight
as a dense matrix, whole and some rows at a time, how a merge writes it, and what kernels read.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastlora.coded_weight import Coded, CodedWeight
from fastlora.layers.stored import Fingerprint, Stored, sums_of_bits
from fastlora.validation import UnsupportedLayerError

# Into so many pieces a weight is cut: on a CPU libraries make several copies of what they quantise.
PIECES = 16
# Below twice so many elements a matrix is made whole for a norm: pieces cost a call each.
_WHOLE = 1 << 19
_Kind = TypeVar("_Kind", bound="type[Quantised]")
_kinds: list[type[Quantised]] = []
# Classes of modules that return a tensor that they have just made, and keep no reference to it.
FRESH: set[str] = set()


class NotCoded(Exception):  # noqa: N818  # it is a reason, and never leaves this folder
    """Why kernels cannot read a weight; raised where `Quantised.read` reads it."""


class Quantised(Stored):
    """What the kinds have in common: `dense` makes a tensor.

    A weight that nothing can be merged into raises in `check_writable`, and the class says no more
    of merging.

    Args:
        base: The module.

    Attributes:
        modules: Names of the modules' classes, see `class_name`; a subclass may do anything.
        fresh_output: Whether they return a tensor that they have just made, and keep none.
        casts: Whether they take x in any dtype, compute in their own, and return x's.
        peft_layer: Python module and class of PEFT's layer over them, if it has one.
        weight: Its weight.
        shape: N and K.
        dtype: Of what `dense` makes.
    """

    in_place = False
    backend: str | None = None
    modules: ClassVar[tuple[str, ...]] = ()
    fresh_output: ClassVar[bool] = False
    casts: ClassVar[bool] = False
    peft_layer: ClassVar[tuple[str, str] | None] = None

    def __init__(self, base: object) -> None:
        module: Any = base
        self.base, self.weight = module, self.weight_of(module)
        self.shape = int(module.out_features), int(module.in_features)

    @staticmethod
    def weight_of(module: object) -> Any:
        """Returns what the module keeps its weight in."""
        return getattr(module, "weight", None)

    @classmethod
    def matches(cls, module: object) -> bool:
        """Returns whether a module's weight is of this kind."""
        raise TypeError(f"{cls.__name__} lacks `matches`")

    @property
    def dtype(self) -> torch.dtype:
        """As above."""
        found: torch.dtype = self.weight.dtype
        return found

    # ------------------------------------------------------------------------ what kernels read

    def computes_in(self) -> torch.dtype | None:
        """Returns the dtype that the module computes in; None for that of x."""
        return self.dtype

    def is_there(self) -> bool:
        """Returns whether the module still has the very weight that this was made for."""
        return self.weight_of(self.base) is self.weight

    def watched(self) -> Sequence[torch.Tensor]:
        """Returns the tensors that the weight depends on: a cache of it ends when one changes."""
        return self.parts()

    def settings(self) -> Hashable:
        """Returns what else the weight depends on, to be compared by ``==``."""
        return None

    def read(self, dtype: torch.dtype) -> tuple[Coded, tuple[torch.Tensor, ...]]:
        """Returns what kernels read in the place of a matrix in ``dtype``, and what it points to.

        What is read of a library's object is checked here: dtypes, sizes, values of tables.

        Raises:
            NotCoded: They cannot, and why.
        """
        raise NotCoded(f"its base layer is {type(self.base).__name__}, called as it is")

    def library(self) -> str:
        """Returns name and version of the library that quantised the weight."""
        kind = type(self.base) if self.weight is None else type(self.weight)
        name = kind.__module__.partition(".")[0]
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return name

    def lacks(self, error: AttributeError) -> str:
        """Returns what is said of a library's object that lacks a field."""
        return f"{self.library()}: {error}; its base layer is called as it is"

    def coded(self, dtype: torch.dtype) -> CodedWeight | str:
        """Returns the weight for kernels, in ``dtype``, or why the module must be called."""
        if class_name(self.base) not in self.modules:
            return f"its base layer is {type(self.base).__name__}, called as it is"
        if self.codes().is_meta:
            return "its base weight is not loaded yet (it is on the meta device)"
        try:
            own = self.computes_in()
            if own is not None and own is not dtype:
                return f"its base layer computes in {own}, and gets x in {dtype}"
            coded, keeps = self.read(dtype)
        except NotCoded as error:
            return str(error)
        except AttributeError as error:  # another version of a library's
            return self.lacks(error)
        if coded.codes.data_ptr() % 4:
            return "the codes of its base weight begin within a word of 4 bytes"
        return CodedWeight(coded, self.maker(dtype), dtype, keeps)

    @property
    def says(self) -> str:
        """What the fusion report calls the weight."""
        return self.backend or type(self).__name__

    def unread(self) -> CodedWeight:
        """Returns the weight as a tensor without a matrix, which PyTorch computes with."""
        n, k = self.shape
        codes = self.codes()
        coded = Coded("", codes, torch.empty(0, dtype=torch.int64), n, k, k)
        return CodedWeight(coded, self.maker(self.dtype), self.dtype, (codes,))

    def parts(self) -> list[torch.Tensor]:
        """Returns the tensors that the weight is stored in, the codes first."""
        return [self.weight]

    def codes(self) -> torch.Tensor:
        """Returns a tensor that lies where the weight does."""
        return self.parts()[0]

    def maker(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Returns what makes the matrix ``[N, K]`` that the weight is now, in ``dtype``."""
        return lambda: self.dense().to(dtype)

    def bias_in(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Returns the module's bias, for a product in ``dtype``; changes what the module would."""
        bias: torch.Tensor | None = self.base.bias
        return bias

    # ------------------------------------------------------------------------------- in pieces

    def row_slices(self, count: int = PIECES) -> list[slice]:
        """Returns the rows of each of so many pieces."""
        step = -(-self.shape[0] // count)
        return [slice(start, start + step) for start in range(0, self.shape[0], step)]

    def pieces(self, count: int = PIECES) -> Iterator[torch.Tensor]:
        """Yields the elements of the weight in fp32, about so many pieces of rows or blocks."""
        yield self.dense().reshape(-1).float()

    def rows(self) -> Iterator[torch.Tensor]:
        """Yields the matrix in `dtype`, some rows ``[n, K]`` at a time."""
        (n, k), rest = self.shape, None
        count = min(PIECES, n * k // _WHOLE)
        if count < 2:
            yield self.dense()
            return
        for piece in self.pieces(count):
            flat = piece if rest is None else torch.cat([rest, piece])
            whole = flat.numel() // k * k
            if whole:
                yield flat[:whole].view(-1, k).to(self.dtype)
            rest = flat[whole:] if whole < flat.numel() else None

    def wide(self) -> torch.Tensor:
        """As `Stored`; no other copy is made on the way."""
        made = torch.empty(self.shape, dtype=torch.float32, device=self.weight.device)
        flat, start = made.view(-1), 0
        for piece in self.pieces():
            flat[start : start + piece.numel()] = piece
            start += piece.numel()
        return made

    def square_distance(self, matrix: torch.Tensor) -> float:
        flat, start, total = matrix.reshape(-1), 0, 0.0
        for piece in self.pieces():
            part = flat[start : start + piece.numel()]
            total += float((part - piece).square().sum(dtype=torch.float64))
            start += piece.numel()
        return total

    # ------------------------------------------------------------------------------- merging

    def keep(self) -> object:
        return [part.detach().clone() for part in self.parts()]

    def restore(self, kept: object) -> None:
        values: Any = kept
        for part, value in zip(self.parts(), values, strict=True):
            part.detach().copy_(value)

    def fingerprint(self) -> Fingerprint:
        return tuple(total for part in self.parts() for total in sums_of_bits(part))

    def moved(self, kept: object, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """As it is: ``fn`` may change the dtype, and `restore` moves to the device."""
        return kept

    def dense_of(self, kept: object) -> torch.Tensor:
        now = self.keep()
        try:
            self.restore(kept)
            return self.dense()
        finally:
            self.restore(now)


def register_quantised(kind: _Kind) -> _Kind:
    """Makes a kind known; decorates its class. Later ones are asked first."""
    _kinds.insert(0, kind)
    if kind.fresh_output:
        FRESH.update(kind.modules)
    return kind


def peft_layers() -> list[tuple[str, str]]:
    """Returns Python module and class of PEFT's layers over weights of a known kind."""
    return [kind.peft_layer for kind in _kinds if kind.peft_layer is not None]


def class_name(module: object) -> str:
    """Returns the name of a module's class, with its Python module."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def quantised(module: object) -> Quantised | None:
    """Returns how a module's weight is quantised, or None where no kind knows it.

    Raises:
        UnsupportedLayerError: The library has not quantised the weight yet.
    """
    for kind in _kinds:
        if kind.matches(module):
            return kind(module)
    return None


def check_part(
    name: str,
    part: object,
    like: torch.Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    count: int,
    library: str,
) -> torch.Tensor:
    """Returns a part of a library's weight, a field's, which is as kernels read it.

    Of one of these dtypes, with so many elements side by side, where ``like`` lies.

    Raises:
        NotCoded: It is not.
    """
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if not isinstance(part, torch.Tensor) or part.dtype not in wanted:
        found = part.dtype if isinstance(part, torch.Tensor) else type(part).__name__
        names = " or ".join(map(str, wanted))
        raise NotCoded(f"{library}: {name} is {found}, expected {names}; called as it is")
    if part.device != like.device:
        raise NotCoded(f"{library}: {name} is on {part.device}, and the codes on {like.device}")
    if part.numel() != count or not part.is_contiguous():
        raise NotCoded(
            f"{library}: {name} has {part.numel()} elements in {tuple(part.shape)} with strides "
            f"{part.stride()}, expected {count} side by side; called as it is"
        )
    return part


def addresses_of(*parts: torch.Tensor) -> torch.Tensor:
    """Returns int64 ``[len(parts)]``, on their device: where parts lie, as loaders take them."""
    found = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64)
    return found.to(parts[0].device)


def check_decoding(decoded: torch.Tensor, rows: torch.Tensor, library: str, what: str) -> None:
    """Compares what codes mean to kernels with what a library makes of them, both in fp32.

    Raises:
        NotCoded: They differ: the library has moved something.
    """
    scale = rows.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((decoded - rows).abs().max() / scale).nan_to_num(math.inf))
    if error > 1e-5:
        raise NotCoded(
            f"{library}: the codes of a {what} mean something else than here (they differ by "
            f"{error:.2g} of the largest value); called as it is"
        )


def not_quantised_yet(base: nn.Module) -> UnsupportedLayerError:
    """Returns the error for a layer of bitsandbytes whose weight is as it was made."""
    return UnsupportedLayerError(
        f"the weight of this {type(base).__name__} is not quantised yet: bitsandbytes does that "
        "when the model moves to its device, so call model.to(device) first"
    )
