"""Launches, and what is kept of them for the next call that looks the same.

Triton's launcher binds some 40 named arguments, asks of each what the compiler may know, and looks
the kernel up by the answers: 20 to 40 us of the host, for a kernel that may run for 2. Before it,
somebody chooses a plan and configs. A function under `kept` does all that once for each look of
its arguments: dtype, shape, strides and address modulo 16 of a tensor, type and value of all else.
From then on it allocates the same memory and calls the same compiled kernels and products, with the
new tensors.

Triton's own launcher runs where something watches or changes launches (hooks of profilers,
``TRITON_DEBUG``, instrumentation), in Triton's interpreter, and in versions of Triton that this was
not written for.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime.driver import driver

from fastlora.env import triton_interpreted

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Versions whose compiled kernels are called as `_Steps.run` does.
_FIRST, _LAST = (3, 6), (3, 9)
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_KEEPS = _FIRST <= _VERSION <= _LAST and not triton_interpreted()
# Looks of one function; past it all are dropped. One takes some 3 KiB.
_MAX_LOOKS = 16384
_NUMBERS = frozenset((bool, int, float, str, torch.dtype))
_PLAIN = _NUMBERS | {type(None)}
_UNSEEN: Any = object()
_ALLOCATE = (torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided, torch.ops.aten.empty)
# `torch.backends.cuda.matmul.fp32_precision`, which takes six times as long.
_rounding_of_fp32 = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
# In one call for many tensors.
_address_of, _strides_of = torch.Tensor.data_ptr, torch.Tensor.stride
_dtype_of, _shape_of = operator.attrgetter("dtype"), operator.attrgetter("shape")
# For AMD, Triton asks of each tensor whether 32 bits address all of its storage.
_SEES_SIZES, _SMALL = torch.version.hip is not None, 2**31 - 1


class _Call(NamedTuple):
    """A launch as a function under `kept` made it; ``compiled`` is what Triton compiled for it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


class _Product(NamedTuple):
    """A call of `product`, and the tensor that it made; None where it wrote into an argument."""

    function: Callable[..., torch.Tensor]
    arguments: tuple[torch.Tensor | None, ...]
    made: torch.Tensor | None


class _Operators(TorchDispatchMode):
    """Notices operators of PyTorch's that compute something."""

    computed = within_product = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls the operator."""
        harmless = func.is_view or func.overloadpacket in _ALLOCATE or self.within_product
        self.computed |= not harmless
        return func(*args, **(kwargs or {}))


class _Recording(threading.local):
    """What a function under `kept` does; None where none runs for the first time."""

    calls: list[_Call | _Product] | None = None
    fresh: list[torch.Tensor]
    operators: _Operators


_recording = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launches a kernel of Triton's, with its arguments and Triton's options by name."""
    compiled = kernel[grid](**arguments)
    if _recording.calls is not None:
        _recording.calls.append(_Call(kernel, grid, arguments, compiled))


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns memory that launches fill, on the device of a tensor and by default in its dtype."""
    made = like.new_empty(shape, dtype=dtype)
    if _recording.calls is not None:
        _recording.fresh.append(made)
    return made


def product(function: Callable[..., torch.Tensor], *arguments: torch.Tensor | None) -> torch.Tensor:
    """Returns what a function of PyTorch's makes of tensors, or the one of them that it writes."""
    if _recording.calls is None:
        return function(*arguments)
    _recording.operators.within_product = True
    try:
        result = function(*arguments)
    finally:
        _recording.operators.within_product = False
    is_new = all(result is not tensor for tensor in arguments)
    if is_new:
        _recording.fresh.append(result)
    _recording.calls.append(_Product(function, arguments, result if is_new else None))
    return result


@contextlib.contextmanager
def recorded() -> Iterator[list[Any]]:
    """Yields launches and products of the block; nothing that was kept is used, and nothing kept.

    Of a launch, ``compiled`` is what Triton compiled for it.
    """
    _recording.calls, _recording.fresh, _recording.operators = [], [], _Operators()
    try:
        yield _recording.calls
    finally:
        _recording.calls, _recording.fresh = None, []


class _Steps(NamedTuple):
    """What a function under `kept` does for one look of its arguments.

    Tensors are numbered: those given, those allocated, None, those that products make, and views.

    Attributes:
        empty: Allocates.
        empties: Of each tensor that is allocated shape, strides and dtype.
        blanks: None, as often as there are numbers behind those.
        views: For each the number of its tensor, and bytes from there.
        calls: For each launch what is called, its grid, the function, its metadata, what picks the
            addresses, and the kernel's other arguments. For each product None, the function, what
            picks its arguments, the number of what it makes or -1, and nothing.
        result: Makes what is returned, from all tensors.
        alive: What must live as long.
    """

    empty: Callable[..., torch.Tensor]
    empties: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    blanks: tuple[None, ...]
    views: tuple[tuple[int, int], ...]
    calls: tuple[tuple[Any, ...], ...]
    result: Callable[[list[Any]], Any]
    alive: tuple[Any, ...]

    def run(self, stream: int, tensors: list[Any], addresses: list[Any]) -> Any:
        """Allocates, launches and multiplies."""
        empty, empties, blanks, views, calls, result, _ = self
        allocated = [*itertools.starmap(empty, empties)]
        tensors += allocated
        tensors += blanks
        addresses += map(_address_of, allocated)
        addresses += blanks
        for source, offset in views:
            addresses.append(addresses[source] + offset)
        for run, x, y, z, function, metadata, pick, others in calls:
            if run is None:
                made = x(*y(tensors))
                if z >= 0:
                    tensors[z], addresses[z] = made, made.data_ptr()
                continue
            run(x, y, z, stream, function, metadata, None, None, None, *pick(addresses), *others)
        return result(tensors)


def kept(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Keeps what a function launches.

    The function looks at nothing but its arguments, at no tensor's values, and at how fp32 products
    round. All that it does with tensors is `launch`, `empty`, `product` and views; it returns what
    it made. A function that does more runs as it is each time. What it calls may be kept too.

    The first tensor has the dtype of the products, or a config says how they round.
    """
    looks: dict[Hashable, _Steps | None] = {}

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not _KEEPS or _recording.calls is not None or _is_watched():
            return function(*args, **kwargs)
        try:
            active = driver.active
        except RuntimeError:  # Triton sees no device: whatever is asked for, nothing is launched
            return function(*args, **kwargs)
        given: tuple[Any, ...] = (*args, *kwargs.values()) if kwargs else args
        device = active.get_current_device()
        look: list[Hashable] = [device, len(args), *kwargs]
        tensors: list[torch.Tensor] = []
        _look_at(given, look, tensors)
        addresses = [*map(_address_of, tensors)]
        look += map(_dtype_of, tensors)
        look += map(_shape_of, tensors)
        look += map(_strides_of, tensors)
        look += [address & 15 for address in addresses]
        if _SEES_SIZES:
            look += [tensor.untyped_storage().nbytes() <= _SMALL for tensor in tensors]
        if tensors[0].dtype is torch.float32:
            look.append(_rounding_of_fp32())
        if len(set(addresses)) < len(addresses):  # one tensor given twice, or views of one
            look += map(addresses.index, addresses)
        key = tuple(look)
        steps = looks.get(key, _UNSEEN)
        if steps is None:
            return function(*args, **kwargs)
        if steps is not _UNSEEN:
            made: _T = steps.run(active.get_current_stream(device), tensors, addresses)
            return made
        _recording.calls, _recording.fresh = [], []
        try:
            with _Operators() as operators:
                _recording.operators = operators
                result = function(*args, **kwargs)
            calls, fresh = _recording.calls, _recording.fresh
        finally:
            _recording.calls, _recording.fresh = None, []
        if calls and all(isinstance(c, _Product) or c.compiled is not None for c in calls):
            if len(looks) >= _MAX_LOOKS:
                looks.clear()
            found = None if operators.computed else _steps(given, tensors, calls, fresh, result)
            looks[key] = found
        return result

    return run


def _is_watched() -> bool:
    """Whether something of Triton's watches launches or changes how kernels are compiled."""
    runtime = knobs.runtime
    try:
        hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    except AttributeError:  # something else than Triton's chain of hooks
        return True
    return bool(
        hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


_Picks = Callable[[Sequence[Any]], Sequence[Any]]
_Sorts = tuple[_Picks, _Picks, tuple[int, ...], _Picks]


@functools.cache
def _sorts_of(kinds: tuple[type, ...]) -> _Sorts:
    """Returns which of some values are of which sort, by their types.

    What picks tensors, and values that are looked at as they are; the places of sequences; and what
    picks the rest: configs, which `_Steps` keeps, so no other one gets their ``id``.
    """
    tensors: list[int] = []
    plain: list[int] = []
    sequences: list[int] = []
    others: list[int] = []
    for place, kind in enumerate(kinds):
        if issubclass(kind, torch.Tensor):
            tensors.append(place)
        elif kind in _PLAIN:
            plain.append(place)
        elif issubclass(kind, (list, tuple)):
            sequences.append(place)
        else:
            others.append(place)
    found = _picks(tensors), _picks(plain), tuple(sequences), _picks(others)
    return _known_sorts.setdefault(kinds, found)  # `cache` may call this in two threads at once


# Looks have the `id` of these, so each lives for good.
_known_sorts: dict[tuple[type, ...], _Sorts] = {}


def _look_at(values: Sequence[Any], look: list[Hashable], tensors: list[torch.Tensor]) -> None:
    """Adds what values look like beside their tensors, and these."""
    sorts = _sorts_of((*map(type, values),))
    tensors_of, plain_of, sequences, others_of = sorts
    tensors += tensors_of(values)
    look.append(id(sorts))  # the number of values and their types
    look += plain_of(values)
    look += map(id, others_of(values))
    for place in sequences:
        value = values[place]
        if type(value) is tuple and value and type(value[0]) in _NUMBERS:  # of one type
            look += type(value[0]), value
        else:
            _look_at(value, look, tensors)


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """Yields values, those in sequences one by one."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


def _steps(
    given: tuple[Any, ...],
    own: list[torch.Tensor],
    calls: list[_Call | _Product],
    fresh: list[torch.Tensor],
    result: Any,
) -> _Steps | None:
    """Returns what to do for other tensors of the same look; ``own`` are those that are given.

    None where that is not known: a tensor that is neither given nor made.
    """
    returned = [leaf for leaf in _leaves([result]) if leaf is not None]
    read = list(returned)
    for call in calls:
        read += call.arguments if isinstance(call, _Product) else call.arguments.values()
    products = [call.made for call in calls if isinstance(call, _Product) and call.made is not None]
    unmade = {id(tensor) for tensor in products}
    allocated = [t for t in fresh if id(t) not in unmade and any(_holds(t, part) for part in read)]
    tensors = [*own, *allocated, None, *products]
    # Of a tensor that was given twice the last place: the look says that it is the first one too.
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    views, made = [], []
    for call in calls:
        if isinstance(call, _Product):
            sources = [places.get(id(tensor)) for tensor in call.arguments]
            if None in sources:
                return None
            place = -1 if call.made is None else places[id(call.made)]
            made.append((None, call.function, _picks(sources), place, *[None] * 4))
            continue
        names = call.kernel.arg_names
        count = sum(name.endswith("_ptr") for name in names)
        values = [call.arguments[name] for name in names]
        sources = []
        for value in values[:count]:
            source = places.get(id(value))
            if source is None:
                owners = [i for i in places.values() if _holds(tensors[i], value)]
                if len(owners) != 1 or id(tensors[owners[0]]) in unmade:
                    return None
                source = len(tensors) + len(views)
                views.append((owners[0], value.data_ptr() - tensors[owners[0]].data_ptr()))
            sources.append(source)
        x, y, z = (*call.grid, 1, 1)[:3]
        what = call.compiled.function, call.compiled.packed_metadata
        made.append((call.compiled.run, x, y, z, *what, _picks(sources), tuple(values[count:])))
    if any(places.get(id(leaf), -1) < len(own) for leaf in returned):
        return None
    alive = [v for v in _leaves(given) if not isinstance(v, torch.Tensor) and type(v) not in _PLAIN]
    alive += [call.compiled for call in calls if isinstance(call, _Call)]
    return _Steps(
        _empty_on(own[0].device.type),
        tuple((tuple(t.shape), t.stride(), t.dtype) for t in allocated),
        (None,) * (1 + len(products)),
        tuple(views),
        tuple(made),
        _result_of(result, places),
        tuple(alive),
    )


def _empty_on(device_type: str) -> Callable[..., torch.Tensor]:
    """Returns what allocates on the current device, given shape, strides and dtype.

    Graphs of Inductor's allocate by it; `torch.empty_strided` takes twice as long.
    """
    allocate: Callable[..., torch.Tensor]
    allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")
    return allocate


def _picks(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Returns what picks the values at these places, always as a sequence."""
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return operator.itemgetter(*places) if places else lambda values: ()


def _holds(tensor: torch.Tensor | None, part: Any) -> bool:
    """Whether something is a tensor, or a view that begins within its memory."""
    if tensor is part or tensor is None or not isinstance(part, torch.Tensor):
        return tensor is part
    if tensor.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    end = sum((size - 1) * stride for size, stride in sizes) * tensor.itemsize
    return tensor.numel() > 0 and 0 <= part.data_ptr() - tensor.data_ptr() <= end


def _result_of(result: Any, places: dict[int, int]) -> Callable[[list[Any]], Any]:
    """Returns what makes a result from all tensors."""
    if result is None or isinstance(result, torch.Tensor):
        return operator.itemgetter(places[id(result)])
    make: Any = getattr(result, "_make", type(result))
    if not any(isinstance(item, (list, tuple)) for item in result):
        pick = _picks([places[id(item)] for item in result])
        return lambda tensors: make(pick(tensors))
    items = [_result_of(item, places) for item in result]
    return lambda tensors: make([item(tensors) for item in items])
