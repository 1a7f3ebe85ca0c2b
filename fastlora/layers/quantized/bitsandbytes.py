"""Weights quantized by bitsandbytes: 4 bits (NF4, FP4) and int8."""

from __future__ import annotations

import copy
import functools
import importlib
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from fastlora.layers.merge_target import Fingerprint
from fastlora.layers.quantized.base_weight import (
    PIECES,
    BaseQuantizedWeight,
    KernelsCannotReadError,
    address_tensor,
    check_decoded_values,
    check_weight_tensor,
    not_quantized_yet_error,
    register_quantized_weight,
)
from fastlora.layers.quantized.repacking import MODULES, is_repacked_by_bitsandbytes
from fastlora.quantized_tensor import QuantizedData

# Number of blocks with absmax values that are quantized together. bitsandbytes supports no other
# number.
_NESTED_BLOCK = 256


@register_quantized_weight
class BitsAndBytes4BitWeight(BaseQuantizedWeight):
    """Base weight that bitsandbytes has quantized to 4 bits.

    The class recognizes the weight of a `Linear4bit`, and has methods that dequantize the weight
    and write to it. The weight is stored as blocks of 4-bit codes with one absmax each.

    In evaluation on a CPU, bitsandbytes repacks the codes for its matrix product, and rounds the
    blocks' absmax values to bf16. `write` restores the usual layout, and the next forward pass
    repacks it.
    """

    backend = "bnb 4bit"
    peft_layer = ("peft.tuners.lora.bnb", "Linear4bit")
    fresh_output = casts = True
    modules = MODULES

    def __init__(self, base: object) -> None:
        super().__init__(base)
        if self.weight.quant_state is None:
            raise not_quantized_yet_error(self.base)

    @classmethod
    def matches(cls, module: object) -> bool:
        return type(getattr(module, "weight", None)).__name__ == "Params4bit"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the dequantized weight.

        If the codes are repacked, the dtype is fp32. Otherwise, the dtype is that of the weight
        before quantization.
        """
        found: torch.dtype = self.weight.quant_state.dtype
        return torch.float32 if self._is_repacked() else found

    def dense(self) -> torch.Tensor:
        weight = self.weight
        if self._is_repacked():
            return _weight_from_outputs(self.base, weight.device)
        return _bitsandbytes().dequantize_4bit(weight.data, weight.quant_state)

    def _is_repacked(self) -> bool:
        return is_repacked_by_bitsandbytes(self.base)

    # ------------------------------------------------------------------------ what kernels read

    def compute_dtype(self) -> torch.dtype | None:
        found: torch.dtype | None = self.base.compute_dtype
        return found

    def tensor_dependencies(self) -> Sequence[torch.Tensor]:
        state = self.weight.quant_state
        inner = getattr(state, "state2", None)  # Repacked weights have none.
        nested = [] if inner is None else [inner.absmax, inner.code, state.offset]
        return [self.weight, state.absmax, state.code, *nested]

    def non_tensor_dependencies(self) -> Hashable:
        base, state = self.base, self.weight.quant_state
        # A weak reference, because another object may get the `id` of a deleted one.
        return weakref.ref(state), state.quant_type, base.compute_dtype, base.compute_type_is_set

    def read_for_kernels(
        self, dtype: torch.dtype
    ) -> tuple[QuantizedData, tuple[torch.Tensor, ...]]:
        """Return the weight in the format that the kernels expect.

        The result is a tuple of the quantized data and the tensors that it refers to. A dequantized
        value is ``table[code] * absmax``, with the absmax of its block along K.
        """
        weight, state, (n, k) = self.weight, self.weight.quant_state, self.shape
        library, block = self.library_and_version(), state.blocksize
        if not self.base.compute_type_is_set:
            raise KernelsCannotReadError(
                "bitsandbytes chooses its compute dtype in its first forward pass"
            )
        if self._is_repacked():
            raise KernelsCannotReadError("an evaluation on the CPU has repacked its base weight")
        if state.quant_type not in ("nf4", "fp4"):
            raise KernelsCannotReadError(
                f"{library}: quant_type is {state.quant_type!r}, expected 'nf4' or 'fp4'"
            )
        if tuple(state.shape) != (n, k):
            raise KernelsCannotReadError(
                f"{library}: quant_state.shape is {tuple(state.shape)}, expected {(n, k)}"
            )
        if not isinstance(block, int) or block <= 0 or block & (block - 1) or k % block:
            raise KernelsCannotReadError(
                f"the block size of {block} is not a power of 2 that divides in_features={k}"
            )
        if block < 16:  # Kernels load words of 8 codes.
            raise KernelsCannotReadError(
                f"the block size is {block}, but the kernels need at least 16"
            )
        if not weight.data.is_contiguous():
            raise KernelsCannotReadError(f"{library}: the quantized values are not contiguous")
        # detach(), unlike `.data`, also counts writes to the parameter.
        codes, count = weight.detach().view(torch.uint8).view(-1), n * k // block
        own = functools.partial(check_weight_tensor, like=codes, library=library)
        own("weight", codes, dtypes=torch.uint8, count=n * k // 2)
        table = own("quant_state.code", state.code, dtypes=torch.float32, count=16)
        if state.nested:
            inner = state.state2
            if inner.blocksize != _NESTED_BLOCK:
                raise KernelsCannotReadError(
                    f"{library}: quant_state.state2.blocksize is {inner.blocksize}, expected "
                    f"{_NESTED_BLOCK}"
                )
            kind = "table4_nested"
            parts: tuple[torch.Tensor, ...] = (
                own("quant_state.absmax", state.absmax, dtypes=torch.uint8, count=count),
                table,
                own(
                    "quant_state.state2.absmax",
                    inner.absmax,
                    dtypes=torch.float32,
                    count=-(-count // _NESTED_BLOCK),
                ),
                own("quant_state.state2.code", inner.code, dtypes=torch.float32, count=256),
                own("quant_state.offset", state.offset, dtypes=torch.float32, count=1),
            )
        else:
            kind = "table4"
            parts = (
                own("quant_state.absmax", state.absmax, dtypes=torch.float32, count=count),
                table,
            )
        some = min(count, 512)
        check_decoded_values(
            _decode_blocks(codes[: some * block // 2], parts, block),
            self._dequantize_blocks(
                codes[: some * block // 2], self._absmax_per_block()[:some], some * block
            ),
            library,
            type(weight).__name__,
        )
        return QuantizedData(kind, codes, address_tensor(*parts), n, k, block), (codes, *parts)

    @property
    def quantization_name(self) -> str:
        state = self.weight.quant_state
        return f"{state.quant_type}{' nested' if state.nested else ''}"

    def make_dequantizer(self, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
        """Return a function that dequantizes the weight to ``dtype``.

        The function dequantizes the current codes to a dense matrix.
        """
        if self._is_repacked():
            return super().make_dequantizer(dtype)
        library, state = _bitsandbytes(), copy.copy(self.weight.quant_state)
        codes, state.dtype = self.weight.data.view(-1, 1), dtype
        return lambda: library.dequantize_4bit(codes, state)

    def bias_as_module_adds_it(self, product_dtype: torch.dtype) -> torch.Tensor | None:
        """Return the bias in the dtype in which the bitsandbytes module adds it to a product.

        This is ``product_dtype``, the dtype of the matrix product. Returns None if the module has
        no bias. As in bitsandbytes, the module's own bias is converted to ``product_dtype`` in
        place.
        """
        bias: torch.Tensor | None = self.base.bias
        if bias is not None and bias.dtype is not product_dtype:
            with torch.inference_mode(False):
                bias.data = bias.data.to(product_dtype)
        return bias

    # ------------------------------------------------------------------------------- in pieces

    @property
    def _block(self) -> int:
        found: int = self.weight.quant_state.blocksize
        return found

    def _blocks_per_piece(self, count: int = PIECES) -> int:
        """Return the number of blocks per piece.

        ``count`` is the number of pieces.
        """
        return -(-(self.shape[0] * self.shape[1]) // (count * self._block))

    def dequantized_pieces(self, approximate_count: int = PIECES) -> Iterator[torch.Tensor]:
        """Yield the dequantized weight in pieces.

        There are about ``approximate_count`` pieces, so that the whole dequantized weight need not
        be in memory at once. A piece contains consecutive elements of the weight in fp32. A
        repacked weight is one piece.
        """
        if self._is_repacked():
            yield from super().dequantized_pieces()
            return
        blocks, elements = self._blocks_per_piece(approximate_count), self.shape[0] * self.shape[1]
        codes, size = self.weight.data.view(torch.uint8).view(-1), blocks * self._block
        largest = self._absmax_per_block()
        for index, part in enumerate(codes.split(size // 2)):
            own = largest[index * blocks : (index + 1) * blocks]
            yield self._dequantize_blocks(part, own, min(size, elements - index * size))

    def dequantized_rows(self) -> Iterator[torch.Tensor]:
        """Yield the dequantized weight in chunks of rows.

        If blocks span several rows, the whole matrix is one chunk. In this case, bitsandbytes 0.50
        computes on a CPU with values that differ from the stored ones, and norms must match the
        values that bitsandbytes computes with.
        """
        if self.shape[1] % self._block:
            yield self.dense()
        else:
            yield from super().dequantized_rows()

    def _absmax_per_block(self) -> torch.Tensor:
        """Return the absmax of each block.

        The values are in fp32. They are dequantized if they are themselves quantized.
        """
        state, absmax = self.weight.quant_state, self.weight.quant_state.absmax
        if state.nested:
            absmax = _bitsandbytes().dequantize_blockwise(absmax, state.state2).add_(state.offset)
        return absmax.float()

    def _dequantize_blocks(
        self, codes: torch.Tensor, absmax: torch.Tensor, element_count: int
    ) -> torch.Tensor:
        """Dequantize blocks of bitsandbytes codes.

        The codes form whole blocks. ``absmax`` has one value per block. The result is in fp32 and
        has ``element_count`` elements. The method calls bitsandbytes' ``dequantize_4bit``.
        """
        state = self.weight.quant_state
        piece = type(state)(
            absmax=absmax,
            shape=torch.Size([element_count]),
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        made: torch.Tensor = _bitsandbytes().dequantize_4bit(codes.view(-1, 1), piece)
        return made.view(-1)

    def write(self, dense: torch.Tensor) -> None:
        library, state = _bitsandbytes(), self.weight.quant_state
        packed = self._is_repacked()
        parts = [
            library.quantize_4bit(
                part,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                quant_storage=self.weight.quant_storage,
            )
            for part in dense.contiguous()
            .view(-1)
            .split(self._blocks_per_piece() * state.blocksize)
        ]
        new = parts[0][1]
        new.absmax = torch.cat([part.absmax for _, part in parts])
        if state.original_nested if packed else state.nested:
            # As bitsandbytes nests them: without their mean, in 8 bits.
            new.offset, new.nested = new.absmax.mean(), True
            new.absmax, new.state2 = library.quantize_blockwise(
                new.absmax - new.offset, blocksize=256
            )
        new.shape = dense.shape
        new.dtype = state.original_dtype if packed else state.dtype  # The dtype of the product.
        self.restore((torch.cat([codes for codes, _ in parts]), new))

    def snapshot(self) -> object:
        return self.weight.data.clone(), _clone_quant_state(self.weight.quant_state)

    def restore(self, snapshot: object) -> None:
        both: Any = snapshot
        data, state = both
        self.weight.data = data.to(self.weight.device)
        # In place, because the module refers to this very object.
        own = self.weight.quant_state.__dict__
        own.clear()
        own.update(_clone_quant_state(state).__dict__)
        self.weight.quant_state.to(self.weight.device)

    def fingerprint(self) -> Fingerprint:
        """Return a fingerprint of the weight's contents.

        It is the number of times that each 4-bit code occurs, which repacking does not change.
        """
        counts = self.weight.data.view(torch.uint8).flatten().bincount(minlength=256).view(16, 16)
        return (counts.sum(0) + counts.sum(1),)


@register_quantized_weight
class BitsAndBytes8BitWeight(BaseQuantizedWeight):
    """Base weight of a bitsandbytes 8-bit layer, with methods that read and write it.

    The layer is a `Linear8bitLt`. The weight is stored as int8 codes with one absmax per row.
    """

    backend = "bnb 8bit"
    peft_layer = ("peft.tuners.lora.bnb", "Linear8bitLt")
    modules = ("bitsandbytes.nn.modules.Linear8bitLt",)
    fresh_output = True

    def __init__(self, base: object) -> None:
        super().__init__(base)
        # The first forward pass moves the scales from the parameter to the module's state.
        moved = self.base.state.SCB
        self.scales = self.weight.SCB if moved is None else moved
        if self.weight.dtype != torch.int8 or self.scales is None:
            raise not_quantized_yet_error(self.base)

    @classmethod
    def matches(cls, module: object) -> bool:
        return type(getattr(module, "weight", None)).__name__ == "Int8Params"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is dequantized to, which is always fp32."""
        return torch.float32

    def stored_tensors(self) -> list[torch.Tensor]:
        return [self.weight, self.scales]

    def read_for_kernels(self, dtype: torch.dtype) -> NoReturn:
        """Always raise `KernelsCannotReadError`, because kernels cannot read the weight.

        The kernels do not support this kind of quantization, in which bitsandbytes also quantizes x
        to int8.
        """
        threshold = getattr(self.base.state, "threshold", 0.0)
        apart = f", except for columns with values above {threshold}" if threshold else ""
        raise KernelsCannotReadError(
            f"bitsandbytes also quantizes x to int8{apart}, so the base layer's own forward pass "
            "is used"
        )

    def dense(self) -> torch.Tensor:
        scales = self.scales.to(self.weight.device)
        return _bitsandbytes().int8_vectorwise_dequant(self.weight.data, scales)

    def dequantized_pieces(self, approximate_count: int = PIECES) -> Iterator[torch.Tensor]:
        dequantize_rows, codes = _bitsandbytes().int8_vectorwise_dequant, self.weight.data
        scales = self.scales.to(codes.device)
        for rows in self.row_slices(approximate_count):
            yield dequantize_rows(codes[rows], scales[rows]).view(-1).float()

    def write(self, dense: torch.Tensor) -> None:
        """Quantize ``dense``, and replace the weight with the quantized result.

        This is `MergeTarget.write`, except that ``dense`` is first rounded to fp16. bitsandbytes
        accepts no other dtype here.
        """
        quantize_rows = _bitsandbytes().int8_vectorwise_quant
        made = [quantize_rows(dense[rows].to(torch.float16))[:2] for rows in self.row_slices()]
        self.restore([torch.cat(values) for values in zip(*made, strict=True)])

    def restore(self, snapshot: object) -> None:
        super().restore(snapshot)
        for codes in (self.weight.CB, self.base.state.CB):
            if codes is not None:
                codes.copy_(self.weight.data)


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _clone_quant_state(state: object) -> Any:
    """Return a clone of a quantization state.

    Its tensors and nested states are cloned too.
    """
    made: Any = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(made, name, value.clone())
        elif type(value) is type(state):
            setattr(made, name, _clone_quant_state(value))
    return made


@torch.no_grad()
def _weight_from_outputs(base: nn.Module, device: torch.device) -> torch.Tensor:
    """Recover a layer's weight from outputs of the layer.

    The layer is called with unit vectors. The function is for 4-bit weights that an evaluation on a
    CPU has repacked, which cannot be dequantized.
    """
    layer: Any = base
    columns = layer(torch.eye(layer.in_features, device=device))
    return (columns if layer.bias is None else columns - layer.bias).t()


def _decode_blocks(
    codes: torch.Tensor, parts: tuple[torch.Tensor, ...], block_size: int
) -> torch.Tensor:
    """Decode blocks of quantization codes.

    The 4-bit codes form whole blocks. The codes are decoded to fp32 values in the same way as in
    the kernels.
    """
    absmax, table, *nested = parts
    count = 2 * codes.numel() // block_size
    largest = absmax[:count]
    if nested:
        outer, outer_table, offset = nested
        each = outer.repeat_interleave(_NESTED_BLOCK)[:count]
        largest = outer_table[largest.long()] * each + offset
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).view(count, block_size)
    return (table[nibbles.long()] * largest[:, None]).view(-1)
