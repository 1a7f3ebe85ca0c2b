"""Cached launches: the same kernels, grids and arguments as Triton's own launcher takes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

import triton
import triton.language as tl
from triton import knobs

from fastlora.kernels import launch as launching
from fastlora.kernels.launch import cached_launches, empty, launch, product
from fastlora.ops.backend import BackwardArguments
from fastlora.ops.factors import AddressTables, LayerAdapterOperands
from fastlora.ops.layout import shrink_partials_shape
from fastlora.ops.operator_backend import OperatorBackend
from fastlora.ops.rows import sort_rows
from fastlora.ops.triton import backward, forward
from fastlora.ops.triton.rows_argument import rows_argument_for_address_tables
from fastlora.quantized_tensor import QuantizedData, QuantizedTensor
from fastlora.testing import launches as stubs
from fastlora.testing import stubbed_launches


class Seen(list[Any]):
    """Launches as the driver sees them; addresses by the tensor that they lie in."""

    def normal(self, tensors: list[torch.Tensor]) -> list[Any]:
        """Kernel hash, grid and arguments; an address in none of the tensors gets a number."""
        numbers: dict[int, str] = {}

        def name(address: int | None) -> Any:
            if address is None:
                return None
            for place, tensor in enumerate(tensors):
                storage = tensor.untyped_storage()
                if 0 <= address - storage.data_ptr() < storage.nbytes():
                    return place, address - storage.data_ptr()
            return numbers.setdefault(address, f"allocated {len(numbers)}")

        return [(*what, [name(a) for a in addresses], rest) for *what, addresses, rest in self]


@pytest.fixture(params=["sm_90"])
def seen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What a driver without a GPU is asked to launch."""
    calls = Seen()

    def launcher_cls(_: Any, source: Any, metadata: Any) -> Callable[..., None]:
        count = sum(name.endswith("_ptr") for name in source.fn.arg_names)

        def run(x: int, y: int, z: int, *given: Any) -> None:
            about, enter, _, *arguments = given[3:]
            if about is not None and enter is not None:
                enter(about)
            addresses = [
                a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[:count]
            ]
            calls.append((metadata.hash, (x, y, z), addresses, arguments[count:]))

        return run

    monkeypatch.setattr(stubs._RecordOnlyDriver, "launcher_cls", launcher_cls)
    with torch.no_grad(), stubbed_launches(request.param):
        yield calls


@contextlib.contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Whether each cache key that is met for the first time is cached."""
    made: list[bool] = []
    steps = launching._steps

    def noted(*given: Any) -> Any:
        found = steps(*given)
        made.append(found is not None)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(launching, "_steps", noted)
        yield made


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["table_ptr"])
def _witness_kernel(out_ptr, x_ptr, table_ptr, M, N, scale, stride, FLAG: tl.constexpr):
    value = tl.load(x_ptr + stride) * scale + M + N
    if table_ptr is not None:
        value += tl.load(table_ptr)
    if FLAG:
        value += 1.0
    tl.store(out_ptr, value)


def _witness(
    out: torch.Tensor,
    x: torch.Tensor,
    table: torch.Tensor | None,
    m: Any,
    scale: float,
    flag: bool,
    options: tuple[int, ...],
    pdl: bool,
) -> None:
    warps, stages, *registers = options
    launch(
        _witness_kernel,
        (x.shape[0],),
        out_ptr=out,
        x_ptr=x,
        table_ptr=table,
        M=m,
        N=x.shape[0],
        scale=scale,
        stride=x.stride(0),
        FLAG=flag,
        num_warps=warps,
        num_stages=stages,
        **({"maxnreg": registers[0]} if registers else {}),
        **({"launch_pdl": True} if pdl else {}),
    )


def _variations() -> list[tuple[Any, ...]]:
    """One argument of the witness differs at a time: everything that Triton specializes."""
    out, x, table = torch.zeros(512), torch.zeros(4096), torch.zeros(64, dtype=torch.int32)
    plain = (out[:256], x[:24], table[:4], 7, 0.5, False, (4, 1), False)
    others: list[tuple[Any, ...]] = [
        (out[1:257], out[2:258], out.half(), out.double()),
        # One row, sizes with and without 16 as a divisor, strides 1 and 16, an odd address.
        (x[:1], x[:16], x[:32], x[:1600:16], x[:100:2], x[1:25], x[:24].half(), x[:24].bfloat16()),
        (table[1:5], table.long(), None),
        (1, 16, 0, True, 2**31 + 1),
        (1.0, 0.0),
        (True,),
        ((8, 1), (4, 2), (4, 1, 128)),
        (True,),
    ]
    others[1] += x[:48:2], x[:384:16]  # its strides alone
    found = [plain]
    for place, values in enumerate(others):
        found += [(*plain[:place], value, *plain[place + 1 :]) for value in values]
    return found


def test_the_kernel_is_the_one_that_triton_takes(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variation's kernel, grid and arguments, in two rounds: compared with Triton's own."""
    variations, function = _variations(), cached_launches(_witness)
    expected = [_launched(seen, _witness, given) for given in variations]
    assert len({calls[0][0] for calls, _ in expected}) > 15, "they are compiled apart"
    for first in (True, False):
        with counting(monkeypatch) as made:
            found = [_launched(seen, function, given) for given in variations]
        assert found == expected
        assert made == [True] * len(variations) * first


@contextlib.contextmanager
def _all_alive() -> Iterator[None]:
    """What is allocated in the block lives until its end: no address stands for two tensors."""
    alive: list[torch.Tensor] = []
    with contextlib.ExitStack() as stack:

        def kept_alive(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def made(*args: Any, **kwargs: Any) -> torch.Tensor:
                alive.append(plain(*args, **kwargs))
                return alive[-1]

            return made

        patch, plain, allocate = mock.patch.object, torch.Tensor.new_empty, launching._empty_on
        stack.enter_context(patch(torch.Tensor, "new_empty", kept_alive(plain)))
        stack.enter_context(patch(launching, "_empty_on", lambda kind: kept_alive(allocate(kind))))
        yield


def _launched(seen: Seen, function: Callable[..., Any], given: tuple[Any, ...]) -> list[Any]:
    """What a function launches."""
    seen.clear()
    with _all_alive():
        result = function(*given)
    read = [
        t.quantized_data if isinstance(t, QuantizedTensor) else t
        for t in launching._flat_values(given)
    ]
    tensors = [t for t in launching._flat_values(read) if isinstance(t, torch.Tensor)]
    found = seen.normal(tensors)
    made = [t for t in launching._flat_values([result]) if isinstance(t, torch.Tensor)]
    shapes = [(t.shape, t.stride(), t.dtype) for t in made]
    # What is returned is what was written.
    written = {address for *_, addresses, _ in seen for address in addresses}
    assert all(t.data_ptr() in written for t in made if t.numel())
    return [found, shapes]


def _linear(dtype: torch.dtype, m: int, n: int = 64, **changed: Any) -> tuple[Any, ...]:
    """Arguments of `forward.linear`: one adapter of rank 8, K = 2048."""
    x, weight, lora_a, lora_b = (
        torch.zeros(shape, dtype=dtype) for shape in ((m, 2048), (n, 2048), (8, 2048), (n, 8))
    )
    given = {"x": x, "bias": None, "s": None, "seeds": None, "plan": "auto"}
    given |= {"lora_a": lora_a, "lora_b": lora_b} | changed
    p = 0.0 if given["seeds"] is None else 0.5
    factors = [given["lora_a"], given["lora_b"], None]
    own = given["x"], weight, given["bias"], [], given["s"], factors, torch.ones(1), given["seeds"]
    return *own, [p], given["plan"]


def _mixed(
    m: int, index: int, *, s: bool = False, layer_range: Any = None, plan: str = "auto"
) -> Any:
    """Arguments of `forward.linear_at`: three modules, four slots; tables are parts of a buffer."""
    own = rows_argument_for_address_tables(
        sort_rows(torch.arange(m) % 4, m, 4), plan == "invariant"
    )
    addresses = torch.zeros(3, 3, 4, dtype=torch.int64)
    numbers = torch.ones(3, 4, dtype=torch.int32), torch.ones(3, 4)
    tables = AddressTables(addresses[0], addresses[1], addresses[2], *numbers, 16, torch.float16)
    x, weight = torch.zeros(m, 1024, dtype=torch.float16), torch.zeros(64, 1024).half()
    first, stop = layer_range or (index, index + 1)
    shape = shrink_partials_shape(m, 1024, stop - first, 16, plan == "invariant")
    planes = torch.zeros(shape) if s else None
    given = tables.operator_arguments(), index, tables.max_rank, tables.dtype, plan, layer_range
    return (x, weight, None, own, planes, *given)


def _grad_b(m: int, n: int, with_bias: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    tensors = torch.zeros(m, n, dtype=dtype), torch.zeros(m, 8, dtype=dtype)
    return *tensors, [], 0, [torch.zeros(n, 8)], [with_bias], torch.ones(1), True


def _grad_x(m: int, drop: bool, plan: str) -> tuple[Any, ...]:
    dy, weight, ds, lora_a = (torch.zeros(s) for s in ((m, 64), (64, 96), (m, 8), (8, 96)))
    seeds = torch.zeros(1, dtype=torch.int64) if drop else None
    return dy, weight, ds, [], [lora_a], seeds, [0.5 if drop else 0.0], plan


def _grad_a(m: int, count: int, drop: bool) -> tuple[Any, ...]:
    ds = [torch.zeros(m, 8 * (1 + i)) for i in range(count)]
    lora_a = [torch.zeros(8 * (1 + i), 96, dtype=torch.float16) for i in range(count)]
    seeds = torch.zeros(count, dtype=torch.int64) if drop else None
    return torch.zeros(m, 96), ds, [], 0, lora_a, seeds, [0.25 if drop else 0.0] * count


def _gradients(m: int, bias: bool = False, p: float = 0.0, plan: str = "auto") -> tuple[Any, ...]:
    """Arguments of `OperatorBackend.gradients`: one adapter of rank 8."""
    dy, weight, x, lora_a, lora_b, s = (
        torch.zeros(shape) for shape in ((m, 64), (64, 96), (m, 96), (8, 96), (64, 8), (m, 8))
    )
    seeds = torch.zeros(1, dtype=torch.int64) if p else None
    operands = LayerAdapterOperands([lora_a], [lora_b], [None], torch.ones(()), (p,), seeds)
    wants = True, bias, False, (True, True, False)
    return (BackwardArguments(dy, weight, x, operands, None, s, plan, *wants),)


def _operands(p: float, k: int = 96) -> list[torch.Tensor | None]:
    """Of two layers of K inputs, ranks 8 and 16: weights, biases, factors, scalings and seeds."""
    shapes = (64, k), (32, k), (8, k), (16, k), (64, 8), (32, 16)
    weights_and_factors = [torch.zeros(shape) for shape in shapes]
    seeds = [torch.zeros(1, dtype=torch.int64) if p else None for _ in range(2)]
    biases, scalings = [torch.zeros(64), torch.zeros(32)], [torch.ones(()), torch.ones(())]
    return [*weights_and_factors[:2], *biases, *weights_and_factors[2:], *scalings, *seeds]


def _grouped_forward(m: int, p: float = 0.0, with_s: bool = False, k: int = 96) -> tuple[Any, ...]:
    """Arguments of `forward.grouped_forward`."""
    return torch.zeros(m, k), (p, p), with_s, *_operands(p, k)


def _grouped_gradients(m: int, p: float = 0.0, same: bool = False) -> tuple[Any, ...]:
    """Arguments of `backward.grouped_gradients`; the second has no bias; one dy for two, or one."""
    dy, s = torch.zeros(m, 64), [torch.zeros(m, 24)]
    if p:
        s = [torch.zeros(m, 8), torch.zeros(m, 16)]
    operands, wants = _operands(p), (True, False, False, True, False, True, True, True, True)
    dys: list[torch.Tensor | None] = [dy, torch.zeros(m, 32)]
    if same:
        operands[1], operands[7] = torch.zeros(64, 96), torch.zeros(64, 16)
        dys = [dy, dy]
    return torch.zeros(m, 96), (p, p), wants, *dys, *operands, *s


def _half(m: int, **changed: Any) -> tuple[Any, ...]:
    return _linear(torch.float16, m, **changed)


def _codes(n: int, k: int) -> QuantizedData:
    """A weight of NF4; nobody decodes it here."""
    return QuantizedData(
        "table4", torch.zeros(n * k // 2).byte(), torch.zeros(2, dtype=torch.int64), n, k, 64
    )


def _over_codes(made: tuple[Any, ...], *places: int) -> tuple[Any, ...]:
    """The arguments with codes in place of weights."""
    arguments: list[Any] = list(made)
    for place in places:
        n, k = arguments[place].shape
        arguments[place] = _codes(n, k)
    return tuple(arguments)


def _gradients_over_codes(p: float) -> tuple[Any, ...]:
    """As `_gradients` of a layer of 128 inputs."""
    (given,) = _gradients(5, p=p)
    quantized, x, lora_a = _codes(64, 128), torch.zeros(5, 128), torch.zeros(8, 128)
    weight = QuantizedTensor(quantized, lambda: torch.zeros(64, 128), given.dy.dtype, ())
    operands = given.operands._replace(lora_a=[lora_a])
    return (given._replace(weight=weight, x=x, operands=operands),)


_gradients_of = OperatorBackend("triton").gradients
Make = Callable[[], tuple[Any, ...]]
OPERATORS: dict[str, tuple[Callable[..., Any], Make]] = {
    "linear": (forward.linear, lambda: _half(5)),
    "linear, other rows": (forward.linear, lambda: _half(48, n=512)),
    "linear, bias": (forward.linear, lambda: _half(5, bias=torch.zeros(64))),
    "linear, x strided": (forward.linear, lambda: _half(5, x=torch.zeros(2048, 5).half().t())),
    "linear, b by column": (forward.linear, lambda: _half(5, lora_b=torch.zeros(8, 64).t())),
    "linear, s given": (forward.linear, lambda: _half(5, s=torch.zeros(5, 8).half())),
    "linear, dropout": (forward.linear, lambda: _half(5, seeds=torch.zeros(1).long())),
    "linear, dropout, a by column": (
        forward.linear,
        lambda: _half(5, seeds=torch.zeros(1).long(), lora_a=torch.zeros(2048, 8).half().t()),
    ),
    "linear, split": (forward.linear, lambda: _half(5, plan="split")),
    "linear, invariant": (forward.linear, lambda: _half(5, plan="invariant")),
    "linear, one row": (forward.linear, lambda: _half(1, plan="invariant")),
    "linear, fp32": (forward.linear, lambda: _linear(torch.float32, 5)),
    "linear_at": (forward.linear_at, lambda: _mixed(11, 1)),
    "linear_at, other module": (forward.linear_at, lambda: _mixed(11, 2)),
    "linear_at, first of a group": (forward.linear_at, lambda: _mixed(11, 1, layer_range=(1, 3))),
    "linear_at, next": (forward.linear_at, lambda: _mixed(11, 2, s=True, layer_range=(1, 3))),
    "linear_at, invariant": (forward.linear_at, lambda: _mixed(11, 0, plan="invariant")),
    "linear_at, split": (forward.linear_at, lambda: _mixed(11, 0, plan="split")),
    "grad_b": (backward.grad_b, lambda: _grad_b(64, 64, False, torch.float32)),
    "grad_b, planes": (backward.grad_b, lambda: _grad_b(2048, 512, True, torch.float16)),
    "grad_x": (backward.grad_x, lambda: _grad_x(48, False, "fused")),
    "grad_x, dropout": (backward.grad_x, lambda: _grad_x(48, True, "fused")),
    "grad_x, split": (backward.grad_x, lambda: _grad_x(48, True, "split")),
    "gradients": (_gradients_of, lambda: _gradients(64)),
    "gradients, bias": (_gradients_of, lambda: _gradients(2048, bias=True)),
    "gradients, dropout": (_gradients_of, lambda: _gradients(64, p=0.5)),
    "gradients, split": (_gradients_of, lambda: _gradients(64, plan="split")),
    "grouped layers": (forward.grouped_forward, lambda: _grouped_forward(5)),
    "grouped layers, s too": (forward.grouped_forward, lambda: _grouped_forward(5, with_s=True)),
    "grouped layers, more rows": (
        forward.grouped_forward,
        lambda: _grouped_forward(200, with_s=True),
    ),
    "grouped layers, dropout": (
        forward.grouped_forward,
        lambda: _grouped_forward(5, p=0.5, with_s=True),
    ),
    "grouped layers' gradients": (backward.grouped_gradients, lambda: _grouped_gradients(64)),
    "grouped layers' gradients, one dy": (
        backward.grouped_gradients,
        lambda: _grouped_gradients(64, same=True),
    ),
    "grouped layers' gradients, more rows": (
        backward.grouped_gradients,
        lambda: _grouped_gradients(2048),
    ),
    "grouped layers' gradients, dropout": (
        backward.grouped_gradients,
        lambda: _grouped_gradients(64, p=0.5),
    ),
    "linear, codes": (forward.linear, lambda: _over_codes(_half(5), 1)),
    "linear, codes, other rows": (forward.linear, lambda: _over_codes(_half(48, n=512), 1)),
    "linear_at, codes": (forward.linear_at, lambda: _over_codes(_mixed(11, 1), 1)),
    "linear_at, codes, split": (
        forward.linear_at,
        lambda: _over_codes(_mixed(11, 0, plan="split"), 1),
    ),
    "grouped layers, codes": (
        forward.grouped_forward,
        lambda: _over_codes(_grouped_forward(5, k=128), 3, 4),
    ),
    "gradients, codes": (_gradients_of, lambda: _gradients_over_codes(0.0)),
    "gradients, codes, dropout": (_gradients_of, lambda: _gradients_over_codes(0.5)),
    "grad_a": (backward.grad_a, lambda: _grad_a(64, 1, False)),
    "grad_a, grouped layers": (backward.grad_a, lambda: _grad_a(2048, 3, False)),
    "grad_a, dropout": (backward.grad_a, lambda: _grad_a(64, 2, True)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_launches_what_it_would(
    name: str, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other tensors, same cache key: kernels, arguments, what is allocated and returned."""
    function, make = OPERATORS[name]
    with monkeypatch.context() as patch:
        patch.setattr(launching, "_CAN_CACHE", False)
        expected = _launched(seen, function, make())
    keeping = [make() for _ in range(5)]  # so that every call has memory of its own
    with counting(monkeypatch) as made:
        # Around a product of PyTorch's, each launch is kept by itself, from the second call on.
        found = [_launched(seen, function, given) for given in keeping[:2]]
        assert made and all(made)
        made.clear()
        found += [_launched(seen, function, given) for given in keeping[2:]]
        assert made == []
    assert found == [expected] * 5


def test_how_fp32_rounds_is_seen(seen: Seen) -> None:
    settings, hashes = torch.backends.cuda.matmul, []
    before = settings.fp32_precision
    try:
        for precision in ("ieee", "tf32") * 2:
            settings.fp32_precision = precision
            calls, _ = _launched(seen, forward.linear, _linear(torch.float32, 5))
            hashes.append([call[0] for call in calls])
    finally:
        settings.fp32_precision = before
    assert hashes[0] == hashes[2] != hashes[1] == hashes[3]


@pytest.mark.parametrize("seen", ["gfx942"], indirect=True)
def test_the_size_of_a_storage_is_seen_on_amd(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_SEES_SIZES", True)
    function, (out, x, *others) = cached_launches(_witness), _variations()[0]
    part = torch.empty(2**29 + 64)[: x.numel()]  # of more than 2 GiB, none of which is touched
    found = []
    for which in (_witness, function, function):
        found.append([_launched(seen, which, (out, t, *others))[0][0][0] for t in (x, part)])
    assert found[0][0] != found[0][1]
    assert found == found[:1] * 3


def test_one_tensor_given_twice_is_not_taken_for_two(seen: Seen) -> None:
    """Which tensors lie at one address is part of the cache key, in whatever order they come."""
    function, (_, x, *others) = cached_launches(_witness), _variations()[0]
    one, two = x.clone(), x.clone()
    for pair in ((x, x), (one, two), (one, one), (two, one)) * 2:
        _launched(seen, function, (*pair, *others))
        assert seen[0][2][:2] == [tensor.data_ptr() for tensor in pair]


def test_a_tuple_that_begins_with_none(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tensors are looked at like any others; a cache key with them would keep them alive."""

    def second(pair: tuple[torch.Tensor | None, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        out = empty(x, 4, 4)
        _witness(out, x, pair[1], 7, 0.5, False, (4, 1), False)
        return out

    function = cached_launches(second)
    with counting(monkeypatch) as made:
        for _ in range(3):
            x, table = torch.zeros(4, 4), torch.zeros(4, dtype=torch.int32)
            function((None, table), x)
            assert seen[-1][2][1:] == [x.data_ptr(), table.data_ptr()]
    assert made == [True]


def test_two_threads_sort_arguments_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks have the `id` of what the types were found to be, which no other is to get."""
    kinds, both = (int, torch.Tensor, type(None), float), threading.Barrier(2)
    picks, found = launching._item_picker, list[Any]()

    def waits(places: Any) -> Any:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(1)
        return picks(places)

    monkeypatch.setattr(launching, "_item_picker", waits)
    threads = [
        threading.Thread(target=lambda: found.append(launching._group_by_type(kinds)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is found[1] is launching._group_by_type(kinds)


def test_what_else_a_function_does_is_done_each_time(seen: Seen) -> None:
    """A copy that it makes, a product or a write into what it allocates, another result."""

    def own(x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        out = empty(x, 4, 4)
        _witness(out, source, None, 7, 0.5, False, (4, 1), False)
        return out

    def copies(x: torch.Tensor) -> torch.Tensor:
        return own(x, x.clone())

    def adds(x: torch.Tensor) -> torch.Tensor:
        return own(x, x).zero_().add_(x)

    def multiplies(x: torch.Tensor) -> torch.Tensor:
        return torch.mm(x, x, out=own(x, x))

    def returns(x: torch.Tensor) -> torch.Tensor:
        own(x, x)
        return x * 2

    for mode in (torch.no_grad, torch.inference_mode):
        for plain in (copies, adds, multiplies, returns):
            function = cached_launches(plain)
            for _ in range(3):
                x = torch.randn(4, 4)
                seen.clear()
                with mode():
                    result = function(x)
                assert len(seen) == 1
                if plain is copies:
                    assert seen[0][2][1] != x.data_ptr()
                else:
                    assert torch.equal(result, plain(x))


def test_products_between_launches_are_cached(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that makes a tensor, and one that writes into a tensor, each of the new tensors."""

    def square(x: torch.Tensor) -> torch.Tensor:
        out = product(torch.mm, x, x)
        _witness(out, x, None, 7, 0.5, False, (4, 1), False)
        return out

    def add(x: torch.Tensor, bias: torch.Tensor | None = None) -> list[torch.Tensor]:
        other, out = empty(x, 2), empty(x, 4, 4)
        _witness(out, x, None, 7, 0.5, False, (4, 1), False)
        product(lambda y, x, _: y.copy_(x).addmm_(x, x), out, x, bias)
        return [out, other]

    with counting(monkeypatch) as made:
        for function, what in (
            (cached_launches(square), lambda x: x @ x),
            (cached_launches(add), lambda x: x + x @ x),
        ):
            for _ in range(3):
                x = torch.randn(4, 4)
                seen.clear()
                result = function(x)
                out = result if isinstance(result, torch.Tensor) else result[0]
                torch.testing.assert_close(out, what(x))
                assert seen[0][2][:2] == [out.data_ptr(), x.data_ptr()]
                assert len(seen) == 1
    assert made == [True, True]


def test_whoever_watches_launches_sees_them(seen: Seen) -> None:
    """Hooks get Triton's own launch, with what it tells them, and debugging another kernel."""
    function, given = cached_launches(_witness), _variations()[0]
    function(*given)
    plain = seen[-1]

    heard: list[str] = []

    def hook(about: Any) -> None:
        heard.append(about.get()["name"])

    with mock.patch.object(launching, "_steps", side_effect=AssertionError):
        knobs.runtime.launch_enter_hook.add(hook)
        try:
            function(*given)
        finally:
            knobs.runtime.launch_enter_hook.remove(hook)
        assert heard == ["_witness_kernel"]
        with mock.patch.object(knobs.runtime, "debug", True):
            function(*given)
        assert seen[-1][0] != plain[0]
        function(*given)
    assert seen[-1] == plain


def test_a_version_that_is_not_known_gets_its_own_launcher(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_CAN_CACHE", False)
    monkeypatch.setattr(launching, "_steps", None)
    function, given = cached_launches(_witness), _variations()[0]
    assert _launched(seen, function, given) == _launched(seen, function, given)


def test_looks_are_dropped_past_a_number_of_them(
    seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_MAX_CACHE_KEYS", 2)
    function, given = cached_launches(_witness), _variations()
    with counting(monkeypatch) as made:
        for variation in (*given[:3], given[2], given[0]):
            function(*variation)
    assert made == [True] * 4
