"""Quantised base weights: read as a dense matrix, and written back after a merge.

One class a kind. `quantised` finds the kind of a module; `fastlora.layers.bases` and
`fastlora.layers.stored` ask it, and nothing else here knows a library of quantised layers.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fastlora.layers.stored import Fingerprint, Stored, sums_of_bits
from fastlora.validation import UnsupportedLayerError

# Into so many pieces a weight is cut: on a CPU libraries make several copies of what they quantise.
_PIECES = 16


class Quantised(Stored):
    """What the kinds have in common: `dense` makes a tensor.

    Args:
        base: The module.

    Attributes:
        weight: Its weight.
        shape: N and K.
    """

    def __init__(self, base: object) -> None:
        module: Any = base
        self.base, self.weight = module, module.weight
        self.shape = int(module.out_features), int(module.in_features)

    in_place = False

    def _rows(self) -> list[slice]:
        """Returns the rows of each piece."""
        step = -(-self.shape[0] // _PIECES)
        return [slice(start, start + step) for start in range(0, self.shape[0], step)]

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yields the elements of the weight in fp32, some rows or blocks at a time."""
        yield self.dense().reshape(-1).float()

    def wide(self) -> torch.Tensor:
        """As `Stored`; no other copy is made on the way."""
        made = torch.empty(self.shape, dtype=torch.float32, device=self.weight.device)
        flat, start = made.view(-1), 0
        for piece in self.pieces():
            flat[start : start + piece.numel()] = piece
            start += piece.numel()
        return made

    def square_distance(self, matrix: torch.Tensor) -> float:
        """As `Stored`."""
        flat, start, total = matrix.reshape(-1), 0, 0.0
        for piece in self.pieces():
            part = flat[start : start + piece.numel()]
            total += float((part - piece).square().sum(dtype=torch.float64))
            start += piece.numel()
        return total

    def check_writable(self) -> None:
        """As `Stored`."""

    def moved(self, kept: object, fn: Callable[[torch.Tensor], torch.Tensor]) -> object:
        """As it is: ``fn`` may change the dtype, and `restore` moves to the device."""
        return kept

    def dense_of(self, kept: object) -> torch.Tensor:
        """As `Stored`."""
        now = self.keep()
        try:
            self.restore(kept)
            return self.dense()
        finally:
            self.restore(now)


class Bits4(Quantised):
    """A `Linear4bit` of bitsandbytes: codes of 4 bits, blocks with a largest value each.

    In evaluation on a CPU bitsandbytes repacks the codes for its product, and rounds the blocks'
    values to bf16. `write` makes the usual layout again; the next forward repacks that.
    """

    backend = "bnb 4bit"

    def __init__(self, base: object) -> None:
        super().__init__(base)
        if self.weight.quant_state is None:
            raise not_quantised_yet(self.base)

    def dense(self) -> torch.Tensor:
        """As `Stored`."""
        weight = self.weight
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            return _through(self.base, weight.device)
        return _bitsandbytes().dequantize_4bit(weight.data, weight.quant_state)

    def _blocks(self) -> int:
        """Returns how many blocks a piece has."""
        blocksize: int = self.weight.quant_state.blocksize
        return -(-(self.shape[0] * self.shape[1]) // (_PIECES * blocksize))

    def pieces(self) -> Iterator[torch.Tensor]:
        """As `Quantised`; repacked ones are one piece."""
        library, state = _bitsandbytes(), self.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            yield from super().pieces()
            return
        absmax = state.absmax
        if state.nested:
            absmax = library.dequantize_blockwise(absmax, state.state2).add_(state.offset).float()
        blocks, elements = self._blocks(), self.shape[0] * self.shape[1]
        codes, size = self.weight.data.view(torch.uint8).view(-1), blocks * state.blocksize
        for index, part in enumerate(codes.split(size // 2)):
            piece = type(state)(
                absmax=absmax[index * blocks : (index + 1) * blocks],
                shape=torch.Size([min(size, elements - index * size)]),
                code=state.code,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                dtype=torch.float32,
            )
            yield library.dequantize_4bit(part.view(-1, 1), piece).view(-1)

    def write(self, dense: torch.Tensor) -> None:
        """As `Stored`."""
        library, state = _bitsandbytes(), self.weight.quant_state
        packed = getattr(state, "packing_format_for_cpu", False)
        parts = [
            library.quantize_4bit(
                part,
                blocksize=state.blocksize,
                quant_type=state.quant_type,
                quant_storage=self.weight.quant_storage,
            )
            for part in dense.contiguous().view(-1).split(self._blocks() * state.blocksize)
        ]
        new = parts[0][1]
        new.absmax = torch.cat([part.absmax for _, part in parts])
        if state.original_nested if packed else state.nested:
            # As the library nests them: without their mean, in 8 bits.
            new.offset, new.nested = new.absmax.mean(), True
            new.absmax, new.state2 = library.quantize_blockwise(
                new.absmax - new.offset, blocksize=256
            )
        new.shape = dense.shape
        new.dtype = state.original_dtype if packed else state.dtype  # that of the product
        self.restore((torch.cat([codes for codes, _ in parts]), new))

    def keep(self) -> object:
        """As `Stored`."""
        return self.weight.data.clone(), _cloned(self.weight.quant_state)

    def restore(self, kept: object) -> None:
        """As `Stored`."""
        both: Any = kept
        data, state = both
        self.weight.data = data.to(self.weight.device)
        # In place: the module has a reference to the very object.
        own = self.weight.quant_state.__dict__
        own.clear()
        own.update(_cloned(state).__dict__)
        self.weight.quant_state.to(self.weight.device)

    def fingerprint(self) -> Fingerprint:
        """How often each code occurs, which repacking leaves as it is."""
        counts = self.weight.data.view(torch.uint8).flatten().bincount(minlength=256).view(16, 16)
        return (counts.sum(0) + counts.sum(1),)


class Bits8(Quantised):
    """A `Linear8bitLt` of bitsandbytes: int8, and a largest value for each row."""

    backend = "bnb 8bit"

    def __init__(self, base: object) -> None:
        super().__init__(base)
        # They move from the parameter to the module's state with the first forward.
        moved = self.base.state.SCB
        self.scales = self.weight.SCB if moved is None else moved
        if self.weight.dtype != torch.int8 or self.scales is None:
            raise not_quantised_yet(self.base)

    def dense(self) -> torch.Tensor:
        """As `Stored`."""
        scales = self.scales.to(self.weight.device)
        return _bitsandbytes().int8_vectorwise_dequant(self.weight.data, scales)

    def pieces(self) -> Iterator[torch.Tensor]:
        """As `Quantised`."""
        dequantise, codes = _bitsandbytes().int8_vectorwise_dequant, self.weight.data
        scales = self.scales.to(codes.device)
        for rows in self._rows():
            yield dequantise(codes[rows], scales[rows]).view(-1).float()

    def write(self, dense: torch.Tensor) -> None:
        """As `Stored`; from fp16, which is all that bitsandbytes takes."""
        quantise = _bitsandbytes().int8_vectorwise_quant
        parts = [quantise(rows.to(torch.float16)) for rows in map(dense.__getitem__, self._rows())]
        self.restore((torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])))

    def keep(self) -> object:
        """As `Stored`."""
        return self.weight.data.clone(), self.scales.clone()

    def restore(self, kept: object) -> None:
        """As `Stored`."""
        both: Any = kept
        codes, scales = both
        for place in (self.weight.data, self.weight.CB, self.base.state.CB):
            if place is not None:
                place.copy_(codes)
        self.scales.copy_(scales)

    def fingerprint(self) -> Fingerprint:
        """As `Stored`."""
        return (*sums_of_bits(self.weight.data), *sums_of_bits(self.scales))


class TorchAO(Quantised):
    """A weight of torchao's: int8 or float8 with scales by row, by group or one for all."""

    backend = "torchao"

    def _parts(self) -> list[torch.Tensor]:
        return _tensors(self.weight)

    def dense(self) -> torch.Tensor:
        """As `Stored`."""
        return self.weight.dequantize()

    def pieces(self) -> Iterator[torch.Tensor]:
        """As `Quantised`."""
        self.check_writable()
        for rows in self._rows():
            yield self.weight[rows].dequantize(torch.float32).reshape(-1)

    def check_writable(self) -> None:
        """Raises `UnsupportedLayerError` for a kind that is not known how to be made again."""
        if type(self.weight).__name__ not in _TORCHAO:
            raise UnsupportedLayerError(
                f"cannot merge into a {type(self.weight).__name__} of torchao; expected one of "
                f"{', '.join(_TORCHAO)}: dequantise the base model first"
            )

    def write(self, dense: torch.Tensor) -> None:
        """As `Stored`."""
        self.check_writable()
        make, granularity = _TORCHAO[type(self.weight).__name__], _granularity(self.weight, dense)
        by_row = int(self.weight.block_size[0]) == 1
        # All of it before the first is written: a failure half way changes nothing.
        made = [
            (rows, _tensors(make(self.weight, dense[rows], granularity)))
            for rows in (self._rows() if by_row else [slice(None)])
        ]
        for rows, values in made:
            for part, value in zip(self._parts(), values, strict=True):
                (part[rows] if by_row else part).copy_(value)

    def keep(self) -> object:
        """As `Stored`."""
        return [part.clone() for part in self._parts()]

    def restore(self, kept: object) -> None:
        """As `Stored`."""
        values: Any = kept
        for part, value in zip(self._parts(), values, strict=True):
            part.copy_(value)

    def fingerprint(self) -> Fingerprint:
        """As `Stored`."""
        return tuple(total for part in self._parts() for total in sums_of_bits(part))


class _TorchaoWeight(Protocol):
    """What is read of a weight of torchao's, beside its methods as a tensor."""

    tensor_data_names: Sequence[str]
    block_size: Sequence[int]
    qdata: torch.Tensor
    zero_point: torch.Tensor | None
    act_quant_kwargs: object
    act_quant_scale: object
    act_quant_zero_point: object
    act_pre_scale: object
    reduce_range: bool
    mm_config: object
    kernel_preference: object


def _tensors(weight: _TorchaoWeight | torch.Tensor) -> list[torch.Tensor]:
    """Returns what a weight of torchao's is stored in."""
    own: Any = weight
    optional = getattr(own, "optional_tensor_data_names", None) or ()
    found = [getattr(own, name) for name in (*own.tensor_data_names, *optional)]
    return [part for part in found if part is not None]


def quantised(module: object) -> Quantised | None:
    """Returns how a module's weight is quantised, or None where none of these libraries did it.

    Raises:
        UnsupportedLayerError: The library has not quantised the weight yet.
    """
    weight = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        return Bits4(module)
    if kind == "Int8Params":
        return Bits8(module)
    return TorchAO(module) if type(weight).__module__.startswith("torchao.") else None


def not_quantised_yet(base: nn.Module) -> UnsupportedLayerError:
    """Returns the error for a layer of bitsandbytes whose weight is as it was made."""
    return UnsupportedLayerError(
        f"the weight of this {type(base).__name__} is not quantised yet: bitsandbytes does that "
        "when the model moves to its device, so call model.to(device) first"
    )


def _made_int8(weight: _TorchaoWeight, dense: torch.Tensor, granularity: object) -> torch.Tensor:
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType
    zero = weight.zero_point
    shifted = zero is not None and bool(zero.any())
    kind: Any = type(weight)
    return kind.from_hp(
        dense,
        granularity,
        mapping_type=mapping.ASYMMETRIC if shifted else mapping.SYMMETRIC,
        act_quant_kwargs=weight.act_quant_kwargs,
        act_quant_scale=weight.act_quant_scale,
        act_quant_zero_point=weight.act_quant_zero_point,
        act_pre_scale=weight.act_pre_scale,
        reduce_range=weight.reduce_range,
    )


def _made_float8(weight: _TorchaoWeight, dense: torch.Tensor, granularity: object) -> torch.Tensor:
    kind: Any = type(weight)
    return kind.from_hp(
        dense,
        float8_dtype=weight.qdata.dtype,
        granularity=granularity,
        mm_config=weight.mm_config,
        kernel_preference=weight.kernel_preference,
        act_quant_kwargs=weight.act_quant_kwargs,
    )


def _granularity(weight: _TorchaoWeight, dense: torch.Tensor) -> Any:
    """Returns torchao's word for a weight's blocks: rows, all of it, or groups of columns."""
    library = importlib.import_module("torchao.quantization")
    block = [int(size) for size in weight.block_size]
    if block == [1, dense.shape[1]]:
        return library.PerRow()
    if block == list(dense.shape):
        return library.PerTensor()
    if block[0] == 1:
        return library.PerGroup(block[1])
    raise UnsupportedLayerError(
        f"cannot merge into a {type(weight).__name__} in blocks of {block}; expected rows, groups "
        "of columns, or one block: dequantise the base model first"
    )


_TORCHAO = {"Int8Tensor": _made_int8, "Float8Tensor": _made_float8}


def _bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes.functional")


def _cloned(state: object) -> Any:
    """Returns a copy of a quant state, and of those inside it, with tensors of its own."""
    made: Any = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(made, name, value.clone())
        elif type(value) is type(state):
            setattr(made, name, _cloned(value))
    return made


@torch.no_grad()
def _through(base: nn.Module, device: torch.device) -> torch.Tensor:
    """Returns the weight that a layer computes with: what it makes of the unit vectors.

    For 4-bit weights that an evaluation on a CPU has repacked, which cannot be dequantised.
    """
    layer: Any = base
    columns = layer(torch.eye(layer.in_features, device=device))
    return (columns if layer.bias is None else columns - layer.bias).t()
