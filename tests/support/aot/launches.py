"""What is compiled ahead of time: the launch of every shipped config, in some variants.

A launch is recorded from the launcher itself: the same constants, strides and options as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from unittest import mock

import torch

from fastlora.kernels.chips import Chip
from fastlora.kernels.config_tables import MAX_SPLITS, kernel_of
from fastlora.kernels.mixed_rows import DropoutTables, RankRows
from fastlora.kernels.modules import Module
from fastlora.ops.layout import shrink_partials_shape
from fastlora.quantized_tensor import QuantizedData
from tests.support.aot.shipped import Shipped, all_invariant_shipped, all_shipped
from tests.support.chips import GPUS as CHIPS
from tests.support.kernels.modules import module_of

MIXED_K_LOOPS = ("mixed_lora_shrink", "mixed_lora_linear")
# Launches that a shared-input group shares in training.
SHARED_BY_GROUPS = ("mixed_lora_train_shrink", "mixed_lora_grad_a")
# Kernels that take a shared-input group in one grid.
IN_ONE_GRID = ("lora_linear", "lora_expand")
IN_ONE_GRID += ("mixed_lora_linear", "mixed_lora_expand")
# Variants of launches over codes, and the kinds that they read.
QUANTIZED = {
    "heavy": "table4_nested",
    "table4": "table4",
    "int8": "int8",
    "e4m3": "float8_e4m3",
}
_SLOTS = 64
_ROWS = 64
_PLANES = 96
_RUN = 128


class Launch(NamedTuple):
    """One call of a kernel: the function and its keyword arguments, options included."""

    kernel: Any
    arguments: dict[str, Any]


class Compiled(NamedTuple):
    """What is read of a compiled launch: the text of its stages, its bytes of shared memory."""

    asm: Mapping[str, Any]
    shared: int


@dataclass(frozen=True)
class Case:
    """One kernel to compile: a shipped config on a chip, in one variant of its operands."""

    arch: str
    shipped: Shipped
    variant: str

    @property
    def is_mixed(self) -> bool:
        """Whether it is a kernel for mixed batches."""
        return kernel_of(self.shipped.kernel).startswith("mixed_")


def is_compiled(chip: Chip, shipped: Shipped) -> bool:
    """Whether a config is compiled for a chip: in 16 bits for all, in fp32 once a family.

    FMAs, which no test holds to anything but that they compile, on one NVIDIA chip.
    """
    if shipped.dtype != torch.float32:
        return True
    fma = shipped.config.input_precision == "ieee" and chip.max_registers is not None
    return chip.arch == "sm_80" if fma else chip.arch == chip.family


def is_wgmma(shipped: Shipped) -> bool:
    """Whether sm_90 takes wgmma for a config in 16 bits: 64 rows of the product's tile."""
    stem, config = kernel_of(shipped.kernel), shipped.config
    rows = config.block_k if stem == "lora_grad_a" else config.block_m
    return shipped.dtype == torch.bfloat16 and config.input_precision != "" and rows >= 64


def cases(chips: Sequence[Chip] = CHIPS) -> list[Case]:
    """Returns every case: each config in its heaviest variant, and some in others on sm_90.

    "heavy" is fp32 factors, planes, s_out, every bias and dropout where the launch has it, three
    siblings, at a size that the tiles divide; "plain" has none of these; "light" has none but
    dropout, at a rank that 8 divides but 16 does not, of every tile that sm_90 makes by wgmma.
    "ragged" is heavy at sizes that 16 divides but no tile does, of the K loops for mixed batches on
    every chip; "uneven" is heavy at odd sizes, where nothing can be vectorized. "alone" is heavy
    without siblings, of the shrinks so narrow that they often run so. "invariant" is heavy in the
    batch-invariant mode, "unshared" the same without siblings. "training" is heavy as a mixed batch
    with gradients runs it: dropout, lora_b as its parameter lies. "siblings" is that for three
    modules that share x, which are without dropout; of decode and prefill it is heavy for three
    modules in one grid, in 16 bits; a linear of one adapter has siblings up to 64 rows. "split" is
    heavy for a linear whose programs share out K. "without_ds" is heavy for a gradient of lora_b
    where another pass makes ds, on sm_90 where it takes wgmma; of a mixed batch, "adds_ds" is heavy
    for a part of the columns. "terms" is heavy for an expand that adds the terms of three modules.
    "dependent" is a sum of one s, launched as a programmatic dependent of the shrink.
    """
    result = []
    for chip in chips:
        for shipped in all_shipped(chip):
            config = shipped.config
            if shipped.kernel.startswith("coded_"):
                result += quantized_cases(chip, shipped)
                continue
            trains = shipped.kernel.startswith(("mixed_lora_train", "mixed_lora_grad"))
            if chip.arch == "sm_90" and is_wgmma(shipped):
                result.append(Case(chip.arch, shipped, "light"))
            if trains:
                if is_compiled(chip, shipped):
                    result.append(Case(chip.arch, shipped, "training"))
                    if shipped.kernel in SHARED_BY_GROUPS and shipped.dtype == torch.bfloat16:
                        result.append(Case(chip.arch, shipped, "siblings"))
                    alone = (
                        shipped.kernel == "mixed_lora_grad_b" and shipped.dtype == torch.bfloat16
                    )
                    if alone and chip.arch in ("sm_80", "sm_90"):
                        parts = ("without_ds", "adds_ds")
                        result += [Case(chip.arch, shipped, variant) for variant in parts]
                continue
            result.append(Case(chip.arch, shipped, "heavy"))
            if shipped.kernel == "plane_sums" and chip.has_pdl:
                result.append(Case(chip.arch, shipped, "dependent"))
            if shipped.kernel == "lora_grad_x_add" and shipped.dtype == torch.bfloat16:
                result.append(Case(chip.arch, shipped, "terms"))
            if chip.arch == "sm_90" and shipped.kernel == "lora_grad_b" and config.block_m >= 64:
                result.append(Case(chip.arch, shipped, "without_ds"))
            if chip.arch == "sm_80" and shipped.kernel in ("lora_grad_a", "lora_grad_b"):
                result.append(Case(chip.arch, shipped, "plain"))
            if chip.arch == "sm_90" and shipped.dtype == torch.bfloat16 and shipped.r == 64:
                is_dropout_shrink = shipped.kernel == "dropout_lora_shrink"
                if not is_dropout_shrink:
                    result.append(Case(chip.arch, shipped, "plain"))
                result.append(Case(chip.arch, shipped, "ragged"))
                if (
                    config.block_m == 16
                    or is_dropout_shrink
                    or shipped.kernel.startswith("lora_grad_")
                ):
                    result.append(Case(chip.arch, shipped, "uneven"))
            elif shipped.kernel in MIXED_K_LOOPS and shipped.dtype == torch.bfloat16:
                result.append(Case(chip.arch, shipped, "ragged"))
            if shipped.kernel in IN_ONE_GRID and shipped.dtype == torch.bfloat16:
                decodes = shipped.kernel == "lora_linear" and shipped.config.block_m <= 64
                runs = decodes or shipped.kernel != "lora_linear"
                if runs and chip.arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
                    result.append(Case(chip.arch, shipped, "siblings"))
                if decodes and chip.arch in ("sm_80", "sm_90"):
                    result.append(Case(chip.arch, shipped, "split"))
            narrow = shipped.kernel == "mixed_lora_shrink" and shipped.config.block_r == 16
            if narrow and shipped.dtype == torch.bfloat16:
                result.append(Case(chip.arch, shipped, "alone"))
        for shipped in all_invariant_shipped(chip):
            if shipped.kernel.startswith("coded_") and shipped.dtype == torch.float32:
                continue
            result.append(Case(chip.arch, shipped, "invariant"))
            if shipped.kernel == "mixed_lora_shrink":
                result.append(Case(chip.arch, shipped, "unshared"))
    return result


def quantized_cases(chip: Chip, shipped: Shipped) -> list[Case]:
    """Returns the cases of a config over codes.

    All are as heavy as "heavy", which reads nested NF4, the kind with the most parts; as do
    "siblings", "split" and "invariant", in 16 bits. Other kinds are variants of the widest tiles
    that few and many rows take, of one adapter: the product is the same for many.
    """
    if not is_compiled(chip, shipped):
        return []
    variants = ["heavy"]
    if shipped.dtype == torch.bfloat16:
        mixed = shipped.kernel == "coded_mixed_lora_linear"
        widest = shipped.config.block_m != 32 and shipped.config.block_n == 64
        if widest and shipped.r > 16 and not mixed:
            variants += [kind for kind in QUANTIZED if kind != "heavy"]
        if chip.arch == "sm_90" and shipped.kernel != "coded_lora_grad_x" and shipped.r > 16:
            variants.append("siblings")
        if chip.arch == "sm_90" and shipped.kernel == "coded_lora_linear" and shipped.r > 16:
            variants.append("split")
    return [Case(chip.arch, shipped, variant) for variant in variants]


def quantized_operand(variant: str, n: int, k: int) -> QuantizedData:
    """Returns a quantized weight on the meta device, of the kind of a variant."""
    kind = QUANTIZED.get(variant, QUANTIZED["heavy"])
    dtype = torch.int8 if kind == "int8" else torch.uint8
    by_block = kind.startswith("table4")
    codes = torch.empty(n * k // (2 if by_block else 1), dtype=dtype, device="meta")
    parts = torch.empty(5, dtype=torch.int64, device="meta")
    return QuantizedData(kind, codes, parts, n, k, 64 if by_block else k)


def record(case: Case) -> Launch:
    """Returns the launch that the case's launcher makes."""
    stem = kernel_of(case.shipped.kernel)
    name = f"launch_summed_{stem}" if case.variant == "terms" else f"launch_{stem}"
    launcher = getattr(module_of(stem), name)
    given = operands(case)
    taken = inspect.signature(launcher).parameters.keys() & given.keys()
    with recording(stem) as made:
        launcher(**{name: given[name] for name in taken})
    (only,) = made
    return only


def operands(case: Case) -> dict[str, Any]:
    """Returns what the case's launcher takes, by its parameters' names, on the meta device."""
    launch, dtype, r, config = case.shipped
    stem = launch.removeprefix("coded_")
    light, drops = case.variant == "light", case.variant != "plain"
    heavy = drops and not light
    trains = stem.startswith(("mixed_lora_train", "mixed_lora_grad"))
    factor_dtype = torch.float32 if heavy else dtype
    m = _ROWS if case.is_mixed else config.block_m
    n = k = {"ragged": 4112, "uneven": 4099}.get(case.variant, 4096)
    if not case.is_mixed:
        r -= {"light": 8, "uneven": 1}.get(case.variant, 0)
    alone = case.variant in ("plain", "light", "alone", "unshared", "training")
    modules = 1 if alone else 3

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    factor = functools.partial(empty, dtype=factor_dtype)
    fp32 = functools.partial(empty, dtype=torch.float32)
    ints = functools.partial(empty, dtype=torch.int32)
    longs = functools.partial(empty, dtype=torch.int64)

    def sums(*shape: int) -> torch.Tensor:
        """An output of a backward: planes, or itself."""
        return fp32(4, *shape) if heavy else empty(*shape)

    bias = empty(n) if heavy else None
    dropped = {"seed": longs(1), "dropout_p": 0.1 if drops else 0.0}
    has_pdl = next(chip for chip in CHIPS if chip.arch == case.arch).has_pdl
    # What a name stands for where a launch has nothing of its own below.
    common = {
        "config": config,
        "x": empty(m, k),
        "weight": empty(n, k),
        "y": empty(m, n),
        "dy": empty(m, n),
    }
    if stem != launch:
        common["weight"] = quantized_operand(case.variant, n, k)
    of_dx = {"y": empty(m, k), "x": empty(m, n), "weight": common["weight"].t(), "scaling": None}
    of_dx |= {"bias": None, "s_out": None, "pdl": False}
    if not case.is_mixed:
        common |= {"s": empty(m, r), "lora_b": factor(n, r), "scaling": fp32(r)}
        of_dx |= {"lora_b": factor(r, k).t(), **dropped}
        group_size = config.group_size if heavy else 1
        sizes = (r + 1, *[64] * 3)
        count = 3 if case.variant == "siblings" else 1
        common |= {"s": empty(m, count * r), "scaling": fp32(1 if count > 1 else r)}
        if case.variant == "split":
            common |= {"config": replace(config, splits=2), "y": fp32(2, m, n)}
        shrink_of_one = {
            "out": empty(m, count * r) if light else fp32(config.splits, m, count * r),
            "lora_a": [factor(r, k)] * count,
            "config": replace(config, splits=1) if light else config,
            "seed": None,
            "dropout_p": 0.0,
        }
        own: dict[str, dict[str, Any]] = {
            "lora_shrink": shrink_of_one,
            "dropout_lora_shrink": {**shrink_of_one, **dropped},
            "lora_linear": {
                "s": fp32(MAX_SPLITS, m, count * r) if heavy else empty(m, r),
                "bias": bias,
                "s_out": empty(m, count * r) if heavy and count == 1 else None,
                "pdl": has_pdl,
            },
            "lora_expand": {"bias": bias, "reads_y": False} if count > 1 else {},
            "lora_dropout": {"out": empty(m, k), **dropped},
            "lora_grad_b": {
                "ds": None if case.variant == "without_ds" else sums(m, r),
                "d_lora_b": sums(n, r),
                "d_bias": fp32(4, n) if heavy else None,
            },
            "lora_grad_a": {
                "outs": [sums(r, k) for _ in range(group_size)],
                "ds": [empty(m, r) for _ in range(group_size)],
                "seeds": longs(group_size) if drops else None,
                "dropout_p": [0.1] * group_size,
                "config": replace(config, group_size=group_size),
            },
            "lora_grad_x": of_dx,
            "lora_grad_x_add": of_dx,
            "plane_sums": {
                "outs": [empty(size, k) for size in sizes],
                "partials": [fp32(4, size, k) for size in sizes],
            },
        }
        given = {"bias": None, "reads_y": True} | common | own[stem]
        if case.variant == "terms":
            given |= {"lora_b": [factor(r, k).t()] * 3, "s": [empty(m, r)] * 3}
            return given
        if case.variant == "dependent":
            return given | {"outs": [empty(256, 16)], "partials": [fp32(8, 256, 16)], "pdl": True}
        names = ("y", "lora_b", "scaling", "bias", "weight")
        return given | {"modules": [Module(*(given[name] for name in names))] * count}
    address = longs(_SLOTS)
    # As many as a decode or prefill of these rows has.
    planes = 1 if light else shrink_partials_shape(m, k, modules, 64)[0]
    # order, segment_of, segment_slot, slot_start and pieces
    rows = [ints(m), ints(m), ints(min(m, _SLOTS + 2)), ints(_SLOTS + 1), ints(_SLOTS)]
    common |= {
        "scale_address": address,
        "run": _RUN,
        "rows": rows,
        "bias": bias,
        "s": empty(1, m, 64) if trains else fp32(planes, m, 64),
        "pdl": has_pdl and not config.batch_invariant,
    }
    dropout = None
    if trains and case.variant != "siblings":  # who share a launch where nothing drops
        dropout = DropoutTables(longs(_SLOTS), ints(_SLOTS), fp32(_SLOTS))
    # Siblings in one grid have tables of their own; what a gradient of x adds has no scaling.
    count = 3 if case.variant == "siblings" and stem in IN_ONE_GRID else 1
    shape = (count, _SLOTS) if count > 1 else (_SLOTS,)
    by_column = stem in ("mixed_lora_train_linear", "mixed_lora_train_expand", "mixed_lora_grad_b")
    scaled = "grad_x" not in stem
    common["up"] = RankRows(
        longs(*shape),
        longs(*shape) if heavy and scaled else None,
        ints(*shape),
        fp32(*shape) if scaled else None,
        factor_dtype,
        64,
        by_column,
    )
    of_dx["dropout"] = dropout
    tables = longs(modules, _SLOTS), None, ints(modules, _SLOTS), None
    shrink = {
        "s": fp32(planes, modules, m, 64),
        "down": RankRows(*tables, factor_dtype, 64),
    }
    own = {
        "mixed_rows_sort": {
            "ids": longs(m),
            "invalid": empty(1, dtype=torch.bool),
            "block_m": 16,
        },
        "mixed_lora_shrink": shrink,
        "mixed_lora_train_shrink": {**shrink, "dropout": dropout},
        "mixed_lora_expand": {"s": fp32(planes, m, r)},
        "mixed_lora_train_expand": {"s": empty(1, m, r)},
        "mixed_lora_grad_b": {
            "ds": None if case.variant == "without_ds" else fp32(32, m, 64),
            "d_lora_b": None if case.variant == "adds_ds" else fp32(_PLANES, n, 64),
            "d_bias": None if case.variant == "adds_ds" else fp32(_PLANES, n),
            "adds_ds": case.variant == "adds_ds",
            "s": empty(m, 64),
        },
        "mixed_lora_grad_a": {
            "d_lora_a": fp32(_PLANES, modules, 64, k),
            "ds": empty(modules, m, 64),
            "rank": ints(modules, _SLOTS),
            "max_columns": 64,
            "dropout": dropout,
        },
        "mixed_lora_grad_x": of_dx,
        "mixed_lora_grad_x_add": {**of_dx, "s": empty(1, m, r)},
        "mixed_lora_grad_reduce": {
            "out": factor(_SLOTS * n),
            "partials": fp32(_PLANES, n, 64).transpose(1, 2).unsqueeze(1),
            "rank": ints(1, _SLOTS),
            "scaling": fp32(1, _SLOTS),
            "offset": longs(1, _SLOTS),
            "m": m,
            "columns": n,
            "by_column": True,
            "bias_partials": fp32(_PLANES, n),
            "bias_offset": longs(1, _SLOTS),
            "ds": empty(m, 64),
            "ds_partials": fp32(32, m, 64),
        },
    }
    given = common | own.get(stem, {})
    if count > 1:
        given["s"] = fp32(planes, count, m, 64)
    lists = {"ys": "y", "weights": "weight", "biases": "bias"}
    return given | {plural: [given[name]] * count for plural, name in lists.items()}


@contextlib.contextmanager
def recording(*stems: str) -> Iterator[list[Launch]]:
    """Replaces kernels by ones that write down their launches, in the list that it yields."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda **arguments: made.append(Launch(self.kernel, arguments))

    with contextlib.ExitStack() as stack:
        for stem in stems:
            module = module_of(stem)
            name = f"_{stem}_kernel"
            recorder = Recorder(getattr(module, name))
            stack.enter_context(mock.patch.object(module, name, recorder))
        yield made
