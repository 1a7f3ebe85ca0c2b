"""The interface of a kind of quantized weight, and the registry of kinds.

A kind is a subclass of `BaseQuantizedWeight` with the decorator `register_quantized_weight`. It
defines the modules that it supports, methods that return their weight as a dense matrix (as a whole
or some rows at a time) or in the format that the kernels expect, and a method with which a merge
writes the weight.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from fastlora.layers.merge_target import Fingerprint, MergeTarget, bit_sums
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor
from fastlora.validation import UnsupportedLayerError

# Number of pieces of a weight: on a CPU, libraries make several copies of what they quantize.
PIECES = 16
# A weight with fewer than twice this number of elements is made as a whole for a norm, because each
# piece costs a call.
_WHOLE = 1 << 19
_Kind = TypeVar("_Kind", bound="type[BaseQuantizedWeight]")
_kinds: list[type[BaseQuantizedWeight]] = []
# Module classes that return a new tensor and keep no reference to it.
UNREFERENCED_OUTPUT_MODULES: set[str] = set()


class KernelsCannotReadError(Exception):
    """Exception that is raised if kernels cannot read a quantized weight.

    The message states why, and is used as the fallback reason.
    """


class BaseQuantizedWeight(MergeTarget):
    """Base class for handling a quantized base weight.

    An object of this class gives access to the quantized weight of one base layer. Each subclass
    supports one kind of quantization, such as the 4-bit quantization of bitsandbytes. `dense`
    returns a new tensor. A kind that does not support merging raises an error in `check_writable`,
    and defines nothing else for merging.

    Args:
        base: The module.

    Attributes:
        modules: Names of the supported module classes; see `qualified_class_name`. Subclasses of
            these classes are not supported, because their behavior is unknown.
        fresh_output: Whether the modules return a new tensor and keep no reference to it.
        casts: Whether the modules accept x in any dtype, compute in their own dtype, and return the
            output in the dtype of x.
        peft_layer: Python module and class of PEFT's layer for these modules, or None.
        weight: The module's weight.
        shape: N and K.
        dtype: Dtype of the result of `dense`.
    """

    in_place = False
    backend: str | None = None
    modules: ClassVar[tuple[str, ...]] = ()
    fresh_output: ClassVar[bool] = False
    casts: ClassVar[bool] = False
    peft_layer: ClassVar[tuple[str, str] | None] = None

    def __init__(self, base: object) -> None:
        module: Any = base
        self.base, self.weight = module, self.stored_weight_of(module)
        self.shape = int(module.out_features), int(module.in_features)

    @staticmethod
    def stored_weight_of(module: object) -> Any:
        """Return a module's weight in its stored form, without dequantizing it.

        Returns None if the module has no ``weight``.
        """
        return getattr(module, "weight", None)

    @classmethod
    def matches(cls, module: object) -> bool:
        """Return whether a module's weight is of this kind."""
        raise TypeError(f"{cls.__name__} must define `matches`")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantized weight.

        `dense` returns the weight in this dtype.
        """
        found: torch.dtype = self.weight.dtype
        return found

    # ------------------------------------------------------------------------ what kernels read

    def compute_dtype(self) -> torch.dtype | None:
        """Return the dtype in which the module computes.

        Returns None if the module has no compute dtype of its own and computes in the dtype of x.
        """
        return self.dtype

    def refers_to_current_weight(self) -> bool:
        """Return whether this object refers to the module's current weight.

        This is the case if ``weight`` is still the module's weight object.
        """
        return self.stored_weight_of(self.base) is self.weight

    def tensor_dependencies(self) -> Sequence[torch.Tensor]:
        """Return the tensors that the weight depends on.

        A change to one of them invalidates the weight's caches.
        """
        return self.stored_tensors()

    def non_tensor_dependencies(self) -> Hashable:
        """Return the non-tensor values that the weight depends on, as one hashable value.

        Two such values are compared with ``==``.
        """
        return None

    def read_for_kernels(
        self, dtype: torch.dtype
    ) -> tuple[QuantizedData, tuple[torch.Tensor, ...]]:
        """Return the weight in the format that the kernels expect.

        The result is a tuple (quantized_data, tensors). ``quantized_data`` represents a matrix in
        ``dtype``. It contains the addresses of ``tensors``.

        The method checks the dtypes, the sizes, and the values of tables in the library's object.

        Raises:
            KernelsCannotReadError: Kernels cannot read the weight. The message gives the reason.
        """
        raise KernelsCannotReadError(
            f"its base layer is {type(self.base).__name__}, which the kernels do not support"
        )

    def library_and_version(self) -> str:
        """Return the name and version of the library that quantized the weight."""
        kind = type(self.base) if self.weight is None else type(self.weight)
        name = kind.__module__.partition(".")[0]
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            return name

    def fallback_reason_missing_field(self, error: AttributeError) -> str:
        """Return the fallback reason for a quantized weight that lacks an expected field.

        The field belongs to an object from the quantization library. ``error`` was raised when the
        field was read.
        """
        return (
            f"{self.library_and_version()}: {error}; falling back to the base layer's own forward "
            "pass"
        )

    def tensor_or_fallback_reason(self, dtype: torch.dtype) -> QuantizedTensor | str:
        """Return the weight as a tensor that kernels can read, or the reason why they cannot.

        The kernels compute in ``dtype``.
        """
        if qualified_class_name(self.base) not in self.modules:
            return f"its base layer is {type(self.base).__name__}, which the kernels do not support"
        if self.codes().is_meta:
            return "its base weight is not loaded yet (it is on the meta device)"
        try:
            own = self.compute_dtype()
            if own is not None and own is not dtype:
                return f"its base layer computes in {own}, but x has dtype {dtype}"
            quantized_data, data_tensors = self.read_for_kernels(dtype)
        except KernelsCannotReadError as error:
            return str(error)
        # The library has an unsupported version.
        except AttributeError as error:
            return self.fallback_reason_missing_field(error)
        if quantized_data.codes.data_ptr() % 4:
            return "the quantized values of its base weight are not aligned to 4 bytes"
        return QuantizedTensor(quantized_data, self.make_dequantizer(dtype), dtype, data_tensors)

    @property
    def quantization_name(self) -> str:
        """Name of the weight's quantization.

        The fusion report shows it.
        """
        return self.backend or type(self).__name__

    def tensor_for_pytorch_only(self) -> QuantizedTensor:
        """Return the weight as a tensor that only PyTorch operators can use.

        The operators dequantize the tensor. Kernels cannot read it.
        """
        n, k = self.shape
        codes = self.codes()
        quantized_data = QuantizedData("", codes, codes.new_empty(0, dtype=torch.int64), n, k, k)
        return QuantizedTensor(
            quantized_data, self.make_dequantizer(self.dtype), self.dtype, (codes,)
        )

    def stored_tensors(self) -> list[torch.Tensor]:
        """Return a list of the tensors that store the weight.

        The codes come first.
        """
        return [self.weight]

    def codes(self) -> torch.Tensor:
        """Return the weight's quantization codes.

        The codes are on the weight's device.
        """
        return self.stored_tensors()[0]

    def make_dequantizer(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Return a function that dequantizes the weight to ``dtype``.

        The weight is dequantized when the function is called. The function returns the current
        weight as a matrix ``[N, K]``.
        """
        return lambda: self.dense().to(dtype)

    def bias_as_module_adds_it(self, product_dtype: torch.dtype) -> torch.Tensor | None:
        """Return the bias as the module adds it to a product of dtype ``product_dtype``.

        Returns None if the module has no bias. If a call of the module converts the module's own
        bias to the dtype of the product, this method also converts that bias. Otherwise, the bias
        keeps its dtype.
        """
        bias: torch.Tensor | None = self.base.bias
        return bias

    # ------------------------------------------------------------------------------- in pieces

    def row_slices(self, approximate_count: int = PIECES) -> list[slice]:
        """Return slices that divide the rows of the weight into pieces.

        The result is a list of approximately ``approximate_count`` slices, one for each piece.
        """
        step = -(-self.shape[0] // approximate_count)
        return [slice(start, start + step) for start in range(0, self.shape[0], step)]

    def dequantized_pieces(self, approximate_count: int = PIECES) -> Iterator[torch.Tensor]:
        """Yield the dequantized weight in pieces.

        There are approximately ``approximate_count`` pieces, so that the whole dequantized weight
        need not be in memory at once. A piece is flat and contains consecutive elements of the
        weight in fp32. In a subclass that does not override this method, the whole weight is one
        piece.
        """
        yield self.dense().reshape(-1).float()

    def dequantized_rows(self) -> Iterator[torch.Tensor]:
        """Yield the dequantized weight in chunks of rows.

        The chunks ``[n, K]`` are consecutive and in `dtype`.
        """
        (n, k), rest = self.shape, None
        count = min(PIECES, n * k // _WHOLE)
        if count < 2:
            yield self.dense()
            return
        for piece in self.dequantized_pieces(count):
            flat = piece if rest is None else torch.cat([rest, piece])
            whole = flat.numel() // k * k
            if whole:
                yield flat[:whole].view(-1, k).to(self.dtype)
            rest = flat[whole:] if whole < flat.numel() else None

    def merge_buffer(self) -> torch.Tensor:
        """Return a buffer for the merged weight.

        The merged weight is computed in the buffer, which is a new dense fp32 matrix that contains
        the dequantized weight. To save memory, the matrix is filled piece by piece.
        """
        made = torch.empty(self.shape, dtype=torch.float32, device=self.weight.device)
        flat, start = made.view(-1), 0
        for piece in self.dequantized_pieces():
            flat[start : start + piece.numel()] = piece
            start += piece.numel()
        return made

    def squared_distance_to(self, matrix: torch.Tensor) -> float:
        flat, start, total = matrix.reshape(-1), 0, 0.0
        for piece in self.dequantized_pieces():
            part = flat[start : start + piece.numel()]
            total += float((part - piece).square().sum(dtype=torch.float64))
            start += piece.numel()
        return total

    # ------------------------------------------------------------------------------- merging

    def snapshot(self) -> object:
        return [part.detach().clone() for part in self.stored_tensors()]

    def restore(self, snapshot: object) -> None:
        values: Any = snapshot
        for part, value in zip(self.stored_tensors(), values, strict=True):
            part.detach().copy_(value)

    def fingerprint(self) -> Fingerprint:
        return tuple(total for part in self.stored_tensors() for total in bit_sums(part))

    def convert_snapshot_if_needed(
        self, snapshot: object, fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> object:
        """Convert a snapshot of the weight with ``fn`` if needed, and return the result.

        ``fn`` is the function that ``nn.Module._apply`` applies to the module's tensors. A snapshot
        of a quantized weight needs no conversion, because `restore` moves the data to the weight's
        device. The snapshot is returned as it is, because ``fn`` may change dtypes.
        """
        return snapshot

    def snapshot_to_dense(self, snapshot: object) -> torch.Tensor:
        now = self.snapshot()
        try:
            self.restore(snapshot)
            return self.dense()
        finally:
            self.restore(now)


def register_quantized_weight(kind: _Kind) -> _Kind:
    """Register the decorated class as a kind of quantized weight.

    Kinds that are registered later are tried first.
    """
    _kinds.insert(0, kind)
    if kind.fresh_output:
        UNREFERENCED_OUTPUT_MODULES.update(kind.modules)
    return kind


def peft_quantized_layer_classes() -> list[tuple[str, str]]:
    """Return a list of PEFT's quantized layer classes.

    The list contains the classes for the registered kinds of quantization. Each entry is a tuple
    (name of the Python module, name of the class).
    """
    return [kind.peft_layer for kind in _kinds if kind.peft_layer is not None]


def qualified_class_name(module: object) -> str:
    """Return the qualified name of a module's class.

    The name includes the Python module of the class.
    """
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def quantized_weight_of(module: object) -> BaseQuantizedWeight | None:
    """Return an object that gives access to a module's quantized weight.

    The object is of the registered kind that supports the module. Returns None if no registered
    kind supports the module, for example because the module's weight is not quantized.

    Raises:
        UnsupportedLayerError: The library has not quantized the weight yet.
    """
    for kind in _kinds:
        if kind.matches(module):
            return kind(module)
    return None


def check_weight_tensor(
    name: str,
    part: object,
    like: torch.Tensor,
    dtypes: torch.dtype | Sequence[torch.dtype],
    count: int,
    library: str,
) -> torch.Tensor:
    """Check that a component of a quantized weight is a tensor that the kernels can read.

    The component is a field of an object from a quantization library. Kernels require a tensor with
    one of the given dtypes and ``count`` contiguous elements, on the device of ``like``. The tensor
    is returned.

    Args:
        name: The field's name, for the message.
        part: The field's value.
        like: A tensor on the required device.
        dtypes: The accepted dtype or dtypes.
        count: The required number of elements.
        library: The library's name and version, for the message.

    Raises:
        KernelsCannotReadError: The component does not meet the requirements.
    """
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if not isinstance(part, torch.Tensor) or part.dtype not in wanted:
        found = part.dtype if isinstance(part, torch.Tensor) else type(part).__name__
        names = " or ".join(map(str, wanted))
        raise KernelsCannotReadError(
            f"{library}: {name} is {found}, expected {names}; falling back to the base layer's own "
            "forward pass"
        )
    if part.device != like.device:
        raise KernelsCannotReadError(
            f"{library}: {name} is on {part.device}, but the quantized values are on {like.device}"
        )
    if part.numel() != count or not part.is_contiguous():
        raise KernelsCannotReadError(
            f"{library}: {name} has {part.numel()} elements, shape {tuple(part.shape)}, and "
            f"strides {part.stride()}, but the kernels expect {count} contiguous elements; falling "
            "back to the base layer's own forward pass"
        )
    return part


def address_tensor(*parts: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the addresses of the tensors in ``parts``.

    The result is int64 ``[len(parts)]``, on the device of these tensors.
    """
    addresses = [part.data_ptr() for part in parts]
    return torch.tensor(addresses, dtype=torch.int64, device=parts[0].device)


def check_decoded_values(
    kernel_values: torch.Tensor, library_values: torch.Tensor, library: str, what: str
) -> None:
    """Check that the decoded values match those of the quantization library.

    Kernels and the library must decode codes to the same fp32 values. ``kernel_values`` contains
    values that are decoded in the same way as in the kernels. ``library_values`` contains the
    values that the library computes from the same codes.

    Raises:
        KernelsCannotReadError: The values differ, because the library has changed its format.
    """
    scale = library_values.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    error = float(((kernel_values - library_values).abs().max() / scale).nan_to_num(math.inf))
    if error > 1e-5:
        relative = f"{error:.2g}"
        raise KernelsCannotReadError(
            f"{library}: a {what} does not dequantize to the values that fastlora expects (the "
            f"largest error is {relative} times the largest absolute value); falling back to the "
            "base layer's own forward pass"
        )


def not_quantized_yet_error(base: nn.Module) -> UnsupportedLayerError:
    """Return the error to raise for a layer whose weight has not been quantized yet.

    The layer is from bitsandbytes.
    """
    return UnsupportedLayerError(
        f"the weight of this {type(base).__name__} is not quantized yet. bitsandbytes quantizes "
        "it when the model moves to its device; call model.to(device) first"
    )
