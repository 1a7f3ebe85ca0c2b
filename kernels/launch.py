"""Kernel launches, and the cache of launches for calls with the same cache key.

Triton's launcher binds about 40 named arguments, asks for properties of each that the compiler may
use, and looks up the kernel: 20 to 40 us of host time, for a kernel that may run for 2 us. Before
that, a plan and configs are chosen. A function with the decorator `cached_launches` does all this
only once for each cache key. The key consists of the dtype, shape, strides, and address modulo 16
of each tensor, and of the type and value of each other argument. In later calls, the function
allocates the same memory and calls the same compiled kernels and products with the new tensors.

Triton's own launcher is used if something observes or changes launches (profiler hooks,
``TRITON_DEBUG``, instrumentation), in Triton's interpreter, and with versions of Triton that this
module does not support.
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
# Triton versions with compiled kernels that can be called as in `_CachedSteps.run`.
_FIRST, _LAST = (3, 6), (3, 9)
_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_CAN_CACHE = _FIRST <= _VERSION <= _LAST and not triton_interpreted()
# Maximum number of cache keys per function. When it is reached, all are dropped. One key takes
# about 3 KiB.
_MAX_CACHE_KEYS = 16384
_NUMBERS = frozenset((bool, int, float, str, torch.dtype))
_PLAIN = _NUMBERS | {type(None)}
_UNSEEN: Any = object()
_ALLOCATE = (torch.ops.aten.new_empty, torch.ops.aten.new_empty_strided, torch.ops.aten.empty)
# `torch.backends.cuda.matmul.fp32_precision` takes six times as long to read.
_rounding_of_fp32 = functools.partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
# For use with map(), which reads an attribute of many tensors in one call.
_address_of, _strides_of = torch.Tensor.data_ptr, torch.Tensor.stride
_dtype_of, _shape_of = operator.attrgetter("dtype"), operator.attrgetter("shape")
# On AMD, Triton also checks for each tensor whether 32 bits can address its entire storage.
_SEES_SIZES, _SMALL = torch.version.hip is not None, 2**31 - 1


class _Call(NamedTuple):
    """A recorded launch; ``compiled`` is the kernel as Triton compiled it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


class _Product(NamedTuple):
    """A call of `product`, and the tensor that it created; None if it wrote into an argument."""

    function: Callable[..., torch.Tensor]
    arguments: tuple[torch.Tensor | None, ...]
    made: torch.Tensor | None


class _Operators(TorchDispatchMode):
    """A dispatch mode that detects PyTorch operators that compute something."""

    computed = within_product = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the operator, and record whether it computes something outside of `product`."""
        harmless = func.is_view or func.overloadpacket in _ALLOCATE or self.within_product
        self.computed |= not harmless
        return func(*args, **(kwargs or {}))


class _Recording(threading.local):
    """The calls that are being recorded, or None outside a recording."""

    calls: list[_Call | _Product] | None = None
    fresh: list[torch.Tensor]
    operators: _Operators


_recording = _Recording()


def launch(kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
    """Launch a Triton kernel with named arguments and Triton's options."""
    compiled = kernel[grid](**arguments)
    if _recording.calls is not None:
        _recording.calls.append(_Call(kernel, grid, arguments, compiled))


def empty(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return memory for launches to fill, on a tensor's device and by default in its dtype."""
    made = like.new_empty(shape, dtype=dtype)
    if _recording.calls is not None:
        _recording.fresh.append(made)
    return made


def product(function: Callable[..., torch.Tensor], *arguments: torch.Tensor | None) -> torch.Tensor:
    """Call a PyTorch function on tensors; return its new tensor, or the argument it wrote into."""
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
def record_calls() -> Iterator[list[Any]]:
    """Yield the list of launches and products in the block, without using or filling the cache.

    The field ``compiled`` of a launch is the kernel that Triton compiled for it.
    """
    _recording.calls, _recording.fresh, _recording.operators = [], [], _Operators()
    try:
        yield _recording.calls
    finally:
        _recording.calls, _recording.fresh = None, []


class _CachedSteps(NamedTuple):
    """The cached launches and products of a function for one cache key.

    Tensors are numbered in this order: given tensors, allocated tensors, None, results of products,
    and views.

    Attributes:
        empty: Function that allocates a tensor.
        empties: Shape, strides, and dtype of each tensor to allocate.
        blanks: A None for each number after the allocated tensors.
        views: For each view, the number of its tensor, and its offset in bytes.
        calls: For each launch, the function to call, its grid, the kernel's function, its metadata,
            a function that picks the addresses, and the kernel's other arguments. For each product,
            None, the function, a function that picks its arguments, the number of its result or -1,
            and None for the rest.
        result: Function that builds the result from all tensors.
        alive: Objects that must live as long as this record.
    """

    empty: Callable[..., torch.Tensor]
    empties: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    blanks: tuple[None, ...]
    views: tuple[tuple[int, int], ...]
    calls: tuple[tuple[Any, ...], ...]
    result: Callable[[list[Any]], Any]
    alive: tuple[Any, ...]

    def run(self, stream: int, tensors: list[Any], addresses: list[Any]) -> Any:
        """Allocate the tensors, and run the launches and products."""
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


def cached_launches(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Cache the launches of a function.

    The function may depend only on its arguments, but not on values of tensors, and on the rounding
    of fp32 products. Apart from views, it may use tensors only in `launch`, `empty`, and `product`,
    and it must return tensors that it created. A function that does anything else runs uncached in
    every call. It may call other functions with this decorator.

    The first tensor has the dtype of the products, or a config determines their rounding.
    """
    cache: dict[Hashable, _CachedSteps | None] = {}

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        if not _CAN_CACHE or _recording.calls is not None or _launches_are_observed():
            return function(*args, **kwargs)
        try:
            active = driver.active
        except RuntimeError:  # Triton sees no device, so nothing can be launched
            return function(*args, **kwargs)
        given: tuple[Any, ...] = (*args, *kwargs.values()) if kwargs else args
        device = active.get_current_device()
        key_parts: list[Hashable] = [device, len(args), *kwargs]
        tensors: list[torch.Tensor] = []
        _append_to_cache_key(given, key_parts, tensors)
        addresses = [*map(_address_of, tensors)]
        key_parts += map(_dtype_of, tensors)
        key_parts += map(_shape_of, tensors)
        key_parts += map(_strides_of, tensors)
        key_parts += [address & 15 for address in addresses]
        if _SEES_SIZES:
            key_parts += [tensor.untyped_storage().nbytes() <= _SMALL for tensor in tensors]
        if tensors[0].dtype is torch.float32:
            key_parts.append(_rounding_of_fp32())
        if len(set(addresses)) < len(addresses):  # the same memory twice
            key_parts += map(addresses.index, addresses)
        key = tuple(key_parts)
        steps = cache.get(key, _UNSEEN)
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
            if len(cache) >= _MAX_CACHE_KEYS:
                cache.clear()
            found = None if operators.computed else _steps(given, tensors, calls, fresh, result)
            cache[key] = found
        return result

    return run


def _launches_are_observed() -> bool:
    """Return whether something observes Triton's launches, or changes how kernels are compiled."""
    runtime = knobs.runtime
    try:
        hooks = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls
    except AttributeError:  # not Triton's chain of hooks
        return True
    return bool(
        hooks
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


_Picker = Callable[[Sequence[Any]], Sequence[Any]]
_TypeGroups = tuple[_Picker, _Picker, tuple[int, ...], _Picker]


@functools.cache
def _group_by_type(kinds: tuple[type, ...]) -> _TypeGroups:
    """Return how to group values by their types.

    The result has a function that picks tensors, a function that picks plain values, the places of
    sequences, and a function that picks the other values. Other values are configs.
    `_CachedSteps` keeps them alive, so that no other object gets the same ``id``.
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
    found = _item_picker(tensors), _item_picker(plain), tuple(sequences), _item_picker(others)
    return _known_groups.setdefault(kinds, found)  # `cache` may call this in two threads at once


# Cache keys contain the `id` of these tuples, so the tuples are never deleted.
_known_groups: dict[tuple[type, ...], _TypeGroups] = {}


def _append_to_cache_key(
    values: Sequence[Any], key_parts: list[Hashable], tensors: list[torch.Tensor]
) -> None:
    """Append the properties of values to a cache key, and their tensors to a list."""
    groups = _group_by_type((*map(type, values),))
    tensors_of, plain_of, sequences, others_of = groups
    tensors += tensors_of(values)
    key_parts.append(id(groups))  # represents the number of values and their types
    key_parts += plain_of(values)
    key_parts += map(id, others_of(values))
    for place in sequences:
        value = values[place]
        if type(value) is tuple and value and type(value[0]) in _NUMBERS:  # all of one type
            key_parts += type(value[0]), value
        else:
            _append_to_cache_key(value, key_parts, tensors)


def _flat_values(values: Iterable[Any]) -> Iterator[Any]:
    """Yield values one by one, including the items of nested sequences."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat_values(value)
        else:
            yield value


def _steps(
    given: tuple[Any, ...],
    own: list[torch.Tensor],
    calls: list[_Call | _Product],
    fresh: list[torch.Tensor],
    result: Any,
) -> _CachedSteps | None:
    """Return the `_CachedSteps` of a recording; ``own`` are the given tensors.

    The result is None if a tensor was neither given nor created, so that the steps are unknown.
    """
    returned = [leaf for leaf in _flat_values([result]) if leaf is not None]
    read = list(returned)
    for call in calls:
        read += call.arguments if isinstance(call, _Product) else call.arguments.values()
    products = [call.made for call in calls if isinstance(call, _Product) and call.made is not None]
    unmade = {id(tensor) for tensor in products}
    allocated = [
        t for t in fresh if id(t) not in unmade and any(_contains(t, part) for part in read)
    ]
    tensors = [*own, *allocated, None, *products]
    # If a tensor was given twice, the last place counts: the cache key says that both are the same.
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    views, made = [], []
    for call in calls:
        if isinstance(call, _Product):
            sources = [places.get(id(tensor)) for tensor in call.arguments]
            if None in sources:
                return None
            place = -1 if call.made is None else places[id(call.made)]
            made.append((None, call.function, _item_picker(sources), place, *[None] * 4))
            continue
        names = call.kernel.arg_names
        count = sum(name.endswith("_ptr") for name in names)
        values = [call.arguments[name] for name in names]
        sources = []
        for value in values[:count]:
            source = places.get(id(value))
            if source is None:
                owners = [i for i in places.values() if _contains(tensors[i], value)]
                if len(owners) != 1 or id(tensors[owners[0]]) in unmade:
                    return None
                source = len(tensors) + len(views)
                views.append((owners[0], value.data_ptr() - tensors[owners[0]].data_ptr()))
            sources.append(source)
        x, y, z = (*call.grid, 1, 1)[:3]
        what = call.compiled.function, call.compiled.packed_metadata
        made.append(
            (call.compiled.run, x, y, z, *what, _item_picker(sources), tuple(values[count:]))
        )
    if any(places.get(id(leaf), -1) < len(own) for leaf in returned):
        return None
    alive = [
        v for v in _flat_values(given) if not isinstance(v, torch.Tensor) and type(v) not in _PLAIN
    ]
    alive += [call.compiled for call in calls if isinstance(call, _Call)]
    return _CachedSteps(
        _empty_on(own[0].device.type),
        tuple((tuple(t.shape), t.stride(), t.dtype) for t in allocated),
        (None,) * (1 + len(products)),
        tuple(views),
        tuple(made),
        _result_builder(result, places),
        tuple(alive),
    )


def _empty_on(device_type: str) -> Callable[..., torch.Tensor]:
    """Return a function that allocates on the current device, given shape, strides, and dtype.

    Inductor's graphs allocate with this function. `torch.empty_strided` takes twice as long.
    """
    allocate: Callable[..., torch.Tensor]
    allocate = getattr(torch._C._dynamo.guards, f"_empty_strided_{device_type}")
    return allocate


def _item_picker(places: Sequence[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return a function that picks the values at the given places, always as a sequence."""
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return operator.itemgetter(*places) if places else lambda values: ()


def _contains(tensor: torch.Tensor | None, part: Any) -> bool:
    """Return whether ``part`` is the tensor, or a view that begins within its memory."""
    if tensor is part or tensor is None or not isinstance(part, torch.Tensor):
        return tensor is part
    if tensor.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
        return False
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    end = sum((size - 1) * stride for size, stride in sizes) * tensor.itemsize
    return tensor.numel() > 0 and 0 <= part.data_ptr() - tensor.data_ptr() <= end


def _result_builder(result: Any, places: dict[int, int]) -> Callable[[list[Any]], Any]:
    """Return a function that builds a result of the same structure from all tensors."""
    if result is None or isinstance(result, torch.Tensor):
        return operator.itemgetter(places[id(result)])
    make: Any = getattr(result, "_make", type(result))
    if not any(isinstance(item, (list, tuple)) for item in result):
        pick = _item_picker([places[id(item)] for item in result])
        return lambda tensors: make(pick(tensors))
    items = [_result_builder(item, places) for item in result]
    return lambda tensors: make([item(tensors) for item in items])
