"""`fastlora.warm_up`: which kernels it finds, how it compiles them, and what it says."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("triton", reason="triton is not installed")

import fastlora
from fastlora.bench.host import LINEARS, Layer, Shape
from fastlora.env import triton_interpreted
from fastlora.kernels import chips, precompile
from fastlora.kernels.precompile import KernelVariant, record_variants
from fastlora.model.warm_up import record_kernel_variants
from fastlora.ops.torch import products
from fastlora.ops.triton import expand, linear
from fastlora.testing import stubbed_launches

if triton_interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

H100, A100 = ("sm_90", 132), ("sm_80", 108)
ADAPTERS, MAX_RANK, ROWS = 64, 32, 256
TINY = Shape(64, 32, 128)


def adapted(shape: Shape, ranks: dict[str, int], **lacking: list[str]) -> Any:
    """A layer of a decoder with adapters in bf16; some adapters lack modules."""
    layer = Layer(shape, dtype=torch.bfloat16)
    model: Any = None
    for name, r in ranks.items():
        targets = [linear for linear in LINEARS if linear not in lacking.get(name, ())]
        config = fastlora.LoraConfig(r=r, target_modules=targets, init_lora_weights=False)
        if model is None:
            model = fastlora.get_peft_model(layer, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model.to(torch.bfloat16).eval()


def tiny_model() -> Any:
    """64 adapters of ranks 1 to 32, of which each fourth lacks modules."""
    ranks = {f"a{i}": (1, 4, 8, 16, 24, MAX_RANK)[i % 6] for i in range(ADAPTERS)}
    lacking = {f"a{i}": list(LINEARS[i % 3 :: 3]) for i in range(3, ADAPTERS, 4)}
    return adapted(TINY, ranks, **lacking)


def random_input(draw: random.Random, rows: int) -> torch.Tensor:
    """x of a batch: as layers return it, at an odd address, in wider rows, or transposed."""
    k = TINY.hidden
    room = torch.zeros((rows + 1) * (k + 8), dtype=torch.bfloat16)
    kind = draw.randrange(4)
    if kind == 0:
        return room[: rows * k].view(rows, k)
    if kind == 1:
        return room[1 : rows * k + 1].view(rows, k)
    if kind == 2:
        return room[: rows * (k + 8)].view(rows, k + 8)[:, 8:]
    return room[: rows * k].view(k, rows).t()


def run_random_batches(model: Any, count: int, known: Collection[str] = ()) -> set[str]:
    """Run batches of 0 to 64 adapters, with rows of none; return the keys of their kernels.

    With ``known`` keys, the first batch that launches another kernel is the last.
    """
    draw = random.Random(0)
    names = list(model.peft_config)
    with stubbed_launches(*H100), record_variants(chips.Chip(*H100)) as found, torch.no_grad():
        for _ in range(count):
            if known and found.keys() - known:
                break
            rows = draw.choice((draw.randint(1, 8), draw.randint(1, 64), draw.randint(1, ROWS)))
            most = draw.choice((4, 8, ADAPTERS))
            chosen = draw.sample(names, draw.randint(0, most))
            x = random_input(draw, rows)
            if not chosen and draw.random() < 0.5:
                model(x)  # the active adapter alone
                continue
            ids = [draw.choice([None, *chosen]) for _ in range(rows)]
            with fastlora.adapters(model, ids):
                model(x)
    return set(found)


@pytest.fixture(scope="module")
def warmed() -> tuple[Any, dict[str, KernelVariant]]:
    """The tiny model, and the kernels that a warm-up compiles for it."""
    model, inputs = tiny_model(), torch.zeros(2, TINY.hidden).bfloat16()
    with stubbed_launches(*H100):
        return model, record_kernel_variants(model, ROWS, inputs=inputs)


def test_random_batches_launch_only_kernels_that_are_warm(
    warmed: tuple[Any, dict[str, KernelVariant]],
) -> None:
    model, known = warmed
    launched = run_random_batches(model, 500)
    assert not launched - known.keys()
    assert len(launched) > len(known) / 2


def test_a_rank_that_is_left_out_is_missed(warmed: tuple[Any, dict[str, KernelVariant]]) -> None:
    model, known = warmed
    inputs = torch.zeros(2, TINY.hidden).bfloat16()
    with stubbed_launches(*H100):
        some = record_kernel_variants(model, ROWS, ranks=[16], inputs=inputs)
    assert some.keys() < known.keys()
    assert run_random_batches(model, 100, some.keys()) - some.keys()


def test_an_alignment_that_is_left_out_is_missed(
    warmed: tuple[Any, dict[str, KernelVariant]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs at odd addresses are copied; if not, they need kernels of their own."""
    model, known = warmed
    for module in (expand, linear):
        monkeypatch.setattr(module, "to_kernel_layout", lambda x, contiguous=False: x)
    assert run_random_batches(model, 100, known.keys()) - known.keys()


def test_parameters_at_odd_addresses_are_recorded() -> None:
    inputs = torch.zeros(2, TINY.hidden).bfloat16()

    def kernels_of(model: Any) -> tuple[set[str], set[str]]:
        """What a warm-up compiles, and what batches launch."""
        with stubbed_launches(*H100):
            known = record_kernel_variants(model, ROWS, inputs=inputs)
        with stubbed_launches(*H100), record_variants(chips.Chip(*H100)) as found, torch.no_grad():
            for rows in (1, 3, 20, 100, ROWS):
                x = torch.zeros(rows, TINY.hidden).bfloat16()
                model(x)
                with fastlora.adapters(model, [None, *["a"] * (rows - 1)]):
                    model(x)
        return set(known), set(found)

    model = adapted(TINY, {"a": 16})
    known, launched = kernels_of(model)
    assert launched and not launched - known
    for name in LINEARS:
        layer = getattr(model.base_model.model, name)
        room = layer.weight.new_empty(layer.weight.numel() + 1)
        layer.weight = nn.Parameter(room[1:].view(layer.weight.shape), requires_grad=False)
    found, launched = kernels_of(model)
    assert launched - known and not launched - found


@pytest.mark.parametrize("rows", [3, 200])
def test_a_batch_without_adapters_launches_only_kernels_that_are_warm(
    warmed: tuple[Any, dict[str, KernelVariant]], rows: int
) -> None:
    model, known = warmed
    x = torch.zeros(rows, TINY.hidden, dtype=torch.bfloat16)
    with (
        stubbed_launches(*H100),
        record_variants(chips.Chip(*H100)) as found,
        torch.no_grad(),
        fastlora.adapters(model, [None] * rows),
    ):
        model(x)
    assert found and not found.keys() - known.keys()


# ------------------------------------------------------------------------------ a model of 8B


@pytest.fixture
def without_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Base products are not computed."""
    monkeypatch.setattr(
        F, "linear", lambda x, weight, bias=None: x.new_empty(*x.shape[:-1], weight.shape[0])
    )
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda self, *_: self)
    monkeypatch.setattr(products, "mm", lambda x, weight: x.new_empty(len(x), weight.shape[1]))


@pytest.mark.parametrize(
    ("chip", "rank", "count"),
    [
        *((H100, 4, 31), (H100, 8, 32), (H100, 16, 31), (H100, 64, 31)),
        *((A100, 8, 26), (A100, 64, 28)),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_a_llama_8b_needs_few_kernels(
    chip: tuple[str, int], rank: int, count: int, without_products: None
) -> None:
    """Decode and prefill, with one adapter and mixed, and the sorting of rows."""
    with torch.device("meta"):
        layer = Layer(Shape(4096, 1024, 14336), dtype=torch.bfloat16)
    layer = layer.to_empty(device="cpu")
    config = fastlora.LoraConfig(r=rank, target_modules=list(LINEARS), init_lora_weights=False)
    model: Any = fastlora.get_peft_model(layer, config, adapter_name="a0")
    for i in range(1, 6):  # with more, no other kernels run
        model.add_adapter(f"a{i}", config)
    with stubbed_launches(*chip):
        found = record_kernel_variants(model, 4096, inputs=torch.empty(2, 4096).bfloat16())
    kinds = Counter(variant.name for variant in found.values())
    assert kinds.total() == count
    assert kinds["mixed_rows_sort"] == 2
    assert all(
        kinds[name] >= 2
        for name in ("lora_shrink", "lora_linear", "lora_expand", "mixed_lora_shrink")
    )


def test_a_pool_is_warm_for_every_rank() -> None:
    layer = Layer(TINY, dtype=torch.bfloat16).eval()
    pool = fastlora.AdapterPool(layer, max_adapters=2, max_rank=40)
    with stubbed_launches(*H100):
        known = record_kernel_variants(layer, ROWS, inputs=torch.zeros(2, TINY.hidden).bfloat16())
    sizes = {f"base_model.model.{name}": getattr(layer, name) for name in LINEARS}
    with stubbed_launches(*H100), record_variants(chips.Chip(*H100)) as found, torch.no_grad():
        for rank in (1, 6, 17, 40):
            tensors = {}
            for name, module in sizes.items():
                tensors[f"{name}.lora_A.weight"] = torch.zeros(rank, module.in_features)
                tensors[f"{name}.lora_B.weight"] = torch.zeros(module.out_features, rank)
            config = fastlora.LoraConfig(r=rank, target_modules=list(LINEARS))
            pool.load("a", tensors, config=config)
            for rows in (1, 4, 5, 64, 65, 200):
                for ids in (["a"] + [None] * (rows - 1), [None] * rows):
                    with fastlora.adapters(pool, ids):
                        layer(torch.zeros(rows, TINY.hidden).bfloat16())
    pool.close()
    assert found and not found.keys() - known.keys()


# ------------------------------------------------------------------------------- compilation


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A model with one linear layer, and Triton's cache in a folder that is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    config = fastlora.LoraConfig(r=16, target_modules=["down_proj"])
    model: Any = fastlora.get_peft_model(Layer(TINY), config).to(torch.bfloat16)
    given = {"rows": 4, "adapters": 0, "inputs": torch.zeros(2, TINY.hidden).bfloat16()}
    with stubbed_launches(*H100):
        yield {"model": model, "processes": 1, **given}


def test_the_second_start_finds_every_kernel(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process dies, as if the system had killed it, and the next one goes on."""
    model, inputs = small["model"], small["inputs"]
    assert model.training
    mark = Path(os.environ["TRITON_CACHE_DIR"]).parent / "died"
    dies = f"import os, pathlib, signal; mark = pathlib.Path({str(mark)!r}); "
    dies += "mark.exists() or (mark.touch(), os.kill(os.getpid(), signal.SIGKILL)); "
    monkeypatch.setattr(precompile, "_WORKER", dies + precompile._WORKER)
    with pytest.warns(UserWarning, match=r"kernel lora_\w+ was not compiled \(.*SIGKILL"):
        report = fastlora.warm_up(**small)
    assert len(report.failed) == 1 and not report.cached
    assert report.compiled == report.kernels - 1 >= 1
    assert model.training
    # A kernel that does not compile is named, and its process goes on with the next one.
    variants = record_kernel_variants(model, small["rows"], 0, inputs=inputs).values()
    (missing,) = (variant for variant in variants if not precompile.is_cached(variant))
    broken = missing._replace(signature={**missing.signature, "x_ptr": "*nothing"})
    answers = dict.fromkeys(("broken", "missing"), "")
    for variant, error in precompile.compile_in_processes([broken, missing], 1):
        answers["broken" if variant is broken else "missing"] = error
    assert answers["broken"] and not answers["missing"]

    monkeypatch.setattr(precompile, "_WORKER", "raise SystemExit(1)")
    again = fastlora.warm_up(**small)
    assert (again.kernels, again.cached, again.failed) == (report.kernels, report.kernels, ())
    assert str(again).startswith(f"{report.kernels} kernels: 0 compiled in ")
    # Nor does a first forward pass compile anything.
    from triton import knobs

    hits: list[bool] = []
    monkeypatch.setattr(
        knobs.compilation, "listener", lambda *, cache_hit, **_: hits.append(cache_hit)
    )
    with torch.no_grad():
        model.eval()(torch.zeros(3, TINY.hidden).bfloat16())
    assert len(hits) == report.kernels and all(hits)


def test_a_cache_that_cannot_be_written(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder below a file cannot be made, not even by root."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(fastlora.FastLoraError, match="file/cache is not writable .*set TRITON_"):
        fastlora.warm_up(**small)


def test_without_a_gpu_nothing_is_done(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(TINY, {"a": 2})
    report = fastlora.warm_up(model)
    assert report.kernels == 0 and "no Triton kernels for device type 'cpu'" in report.reason
    (line,) = caplog.messages
    assert line == f"warm_up() compiles nothing: {report.reason}"


def test_arguments(small: dict[str, Any]) -> None:
    for name, value, error in (
        ("rows", 0, "rows must be at least 1, got 0"),
        ("processes", 0, "processes must be at least 1, got 0"),
        ("ranks", [], r"ranks must be one or more integers, each at least 1, got \[\]"),
        ("ranks", [0, 2], r"at least 1, got \[0, 2\]"),
        ("ranks", [77], r"no adapter in the model has any of the ranks \[77\]"),
        ("inputs", {"flag": True}, "inputs must contain a tensor"),
    ):
        with pytest.raises(fastlora.FastLoraError, match=error):
            fastlora.warm_up(**{**small, "adapters": None, name: value})
    with pytest.raises(fastlora.FastLoraError, match="use inputs= to pass the arguments for a"):
        fastlora.warm_up(**{**small, "inputs": None})
    with pytest.raises(TypeError, match="with adapters on linear layers, got a Linear"):
        fastlora.warm_up(nn.Linear(2, 2))
