"""Which registered operators a model reaches, with what arguments, and checks of them."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastlora
from tests.support.conformance_models import Subject, direction
from tests.support.drawn import draw, is_drawn

# By name, and by which arguments are there: operator, arguments, and whether autograd goes through
# it, or is done with it.
Reached = dict[tuple[str, str], tuple[Any, tuple[Any, ...], dict[str, Any], bool]]


def import_everything() -> None:
    """Imports every module of the package, but not the folders of the checkout beside it.

    One module derives a class from vLLM, which has an environment of its own.
    """
    folder = str(Path(fastlora.__file__).parent)
    left_out = {"fastlora.__main__", "fastlora.integrations.vllm.wrapper"}
    for found in pkgutil.walk_packages([folder], "fastlora."):
        if found.name not in left_out:
            importlib.import_module(found.name)


def registered() -> set[str]:
    """Names of all operators that the package registers."""
    import_everything()
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix("fastlora::") for name in names if name.startswith("fastlora::")}


def _note(reached: Reached, operator: Any, args: Any, kwargs: Any, records: bool = True) -> None:
    """Keeps the arguments of a first call; without gradients where autograd is done with it."""

    def kept(argument: Any) -> Any:
        if not isinstance(argument, torch.Tensor):
            return argument
        return argument.detach().clone().requires_grad_(records and argument.requires_grad)

    operator = getattr(operator, "default", operator)  # graphs name the packet
    if getattr(operator, "namespace", "") == "fastlora":
        name = operator._schema.name.removeprefix("fastlora::")
        given = "".join("-" if argument is None else "+" for argument in args)
        if (name, given) not in reached:
            reached[name, given] = (operator, *tree_map(kept, (args, kwargs)), records)


class _Watch(TorchDispatchMode):
    """Notes the first call of each of our operators."""

    def __init__(self, reached: Reached) -> None:
        super().__init__()
        self.reached = reached

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        _note(self.reached, func, args, kwargs or {}, records=False)
        return func(*args, **(kwargs or {}))


def reached_by(subjects: Iterable[Subject]) -> Reached:
    """The operators that eager steps and graphs of these reach, with arguments of a first call.

    What takes addresses goes on to be right while the subjects are alive.
    """
    reached: Reached = {}

    class Noted(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            _note(reached, target, args, kwargs)
            return super().call_function(target, args, kwargs)

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            with _Watch(reached):
                return Noted(graph).run(*args)

        return run

    for subject in subjects:
        torch._dynamo.reset()
        x = subject.x(3).requires_grad_(subject.case.trains)
        call = subject.call
        for compiles in (False, True):
            subject.call = (
                torch.compile(call, backend=backend, fullgraph=True) if compiles else call
            )
            # Nothing compiles under a mode: of graphs the backend watches the forward.
            watch: Any = contextlib.nullcontext() if compiles else _Watch(reached)
            with watch:
                y = subject.forward(x) if subject.case.trains else None
            if y is not None:
                with _Watch(reached):
                    y.backward(direction(y))
                subject.gradients()
            with watch, torch.no_grad():
                subject.forward(x)
        subject.call = call
    return reached


def check_operators(reached: Reached) -> None:
    """Runs `torch.library.opcheck` on each, or on the half that the commit draws."""
    names = {f"{name} {given}": (name, given) for name, given in reached}
    chosen = draw(tuple(names), 0.5, "operators") if is_drawn() else set(names)
    for name, given in sorted(names[each] for each in chosen):
        operator, args, kwargs, records = reached[name, given]
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        # This check compares two calls, also in what nobody reads: s of rows without an adapter,
        # and its gradient, are left as they are; so are such rows of some below autograd.
        named = dict(zip((a.name for a in operator._schema.arguments), args, strict=False))
        makes_s = "shrink" in name or name == "lora_shared"
        if records and not makes_s and named.get("s") is None:
            checks.append("test_aot_dispatch_dynamic")
        try:
            torch.library.opcheck(operator, args, kwargs, test_utils=checks)
        except Exception as error:
            raise AssertionError(f"fastlora::{name}, {given}: {error}") from error
