"""The modes of a `Point`: how operands are drawn, their float64 results, and the contenders."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fastlora.bench import contenders, mixed_kernels, mixed_train
from fastlora.bench.contenders import Contender, Results


class Mode(NamedTuple):
    """One mode.

    Attributes:
        draw: Returns one random set of operands of a point, for a dtype, a device, and an ``impl``.
        truths: Returns the float64 results by kind, for a point and its operands.
        yardstick: For each kind, the contender that sets the budget by its error in the tested
            dtype.
        contenders: Returns the contenders of a point, for an ``impl``, a device type, and a dtype.
            The base is first, and yardsticks precede their kind.
        solve: fastlora with the plan that it chooses itself.
    """

    draw: Callable[..., Any]
    truths: Callable[..., dict[str, Results]]
    yardstick: Mapping[str, str]
    contenders: Callable[..., Sequence[Contender]]
    solve: Callable[[Any], Results]


def _auto(p: Any) -> Results:
    return contenders._linear(p, "auto")


MODES = {
    "forward": Mode(
        contenders.Problem.random,
        contenders.truths,
        contenders.YARDSTICK,
        contenders.contenders_for,
        _auto,
    ),
    "train": Mode(
        contenders.Problem.random,
        contenders.truths,
        contenders.YARDSTICK,
        contenders.contenders_for,
        contenders._training(_auto),
    ),
    "mixed": Mode(
        mixed_kernels.MixedProblem.random,
        lambda point, p: mixed_kernels.truths(p),
        mixed_kernels.YARDSTICK,
        mixed_kernels.contenders_for,
        functools.partial(mixed_kernels._linear, "auto"),
    ),
    "mixed_train": Mode(
        mixed_kernels.MixedProblem.random,
        lambda point, p: mixed_kernels.truths(p),
        mixed_kernels.YARDSTICK,
        lambda *_: mixed_train.CONTENDERS,
        functools.partial(mixed_train._kernels, "auto"),
    ),
}
