"""Registration as vLLM's LoRA backend, with stand-ins for vLLM's modules.

`tests/engine` runs vLLM itself.
"""

from __future__ import annotations

import abc
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastlora import env
from fastlora.integrations.vllm import register as registration
from fastlora.integrations.vllm.batch import slots_of_rows
from fastlora.integrations.vllm.register import KNOWN_VERSIONS, RELIED_ON, ReliedOnFunction
from tests.engine import compare_sources

ROOT = Path(__file__).parents[2]
STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"


def _function(name: str, parameters: tuple[str, ...]) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(f"def {name}({', '.join(parameters)}): ...", scope)
    function: Callable[..., Any] = scope[name]
    return function


class _Log(list[tuple[str, str]]):
    """What was logged, as (level, message)."""

    def info(self, message: str, *values: Any) -> None:
        """Keep a message."""
        self.append(("info", message % values))

    def warning(self, message: str, *values: Any) -> None:
        """Keep a warning."""
        self.append(("warning", message % values))


class StandIn:
    """Modules with the classes and functions that fastlora relies on.

    Attributes:
        log: What fastlora logs.
        platform: The class of the current platform.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self.log = _Log()
        for owner, name, parameters in RELIED_ON:
            holder, function = self.holder(owner), _function(name, parameters)
            if owner == registration._ABSTRACT:
                function = abc.abstractmethod(function)
            setattr(holder, name, function)
        layers = self.module("vllm.lora.layers")
        base = self.holder("vllm.lora.layers.base:BaseLayerWithLoRA")
        for owner in registration._LAYER_CLASSES:
            cls = self.holder(owner)
            made = type(cls.__name__, (base,), dict(vars(cls)) | {"__module__": cls.__module__})
            setattr(self.module(cls.__module__), cls.__name__, made)
            setattr(layers, cls.__name__, made)
        layers.BaseLayerWithLoRA = base
        for name in registration._MOE_CLASSES:
            setattr(layers, name, type(name, (base,), {"set_lora": _function("set_lora", ())}))
        leaves = [getattr(layers, name) for name in registration._MOE_CLASSES]
        leaves += [self.holder(owner) for owner in registration._LAYER_CLASSES]
        self.module("vllm.lora.utils")._all_lora_classes = tuple(leaves)
        abstract = self.holder(registration._ABSTRACT)
        names = frozenset(name for owner, name, _ in RELIED_ON if owner == registration._ABSTRACT)
        abstract.__abstractmethods__ = names
        base_module = self.module("vllm.lora.punica_wrapper.punica_base")
        base_module.PunicaWrapperBase = type(
            "PunicaWrapperBase", (abstract,), dict(vars(base_module.PunicaWrapperBase))
        )
        self.module("vllm").__version__ = f"{KNOWN_VERSIONS[-1]}+cpu"
        self.module("vllm.logger").init_logger = lambda name: self.log
        self.module("vllm.utils.torch_utils").PIN_MEMORY = False
        self.platform = type(
            "CpuPlatform",
            (),
            {
                "device_type": "cpu",
                "is_cpu": lambda _: True,
                "is_cuda": lambda _: False,
                "get_punica_wrapper": classmethod(lambda cls: STOCK),
            },
        )
        self.module("vllm.platforms").current_platform = self.platform()
        monkeypatch.delitem(sys.modules, "fastlora.integrations.vllm.wrapper", raising=False)

    def module(self, name: str) -> Any:
        """The stand-in for a module."""
        found = sys.modules.get(name)
        if found is None or not isinstance(found, types.ModuleType) or hasattr(found, "__file__"):
            found = types.ModuleType(name)
            found.__path__ = []
            self._patch.setitem(sys.modules, name, found)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(self.module(parent), own, found)
        return found

    def holder(self, owner: str) -> Any:
        """The stand-in for ``module:class`` or ``module:``."""
        module, _, name = owner.partition(":")
        holder = self.module(module)
        if name and not hasattr(holder, name):
            made = abc.ABCMeta(name, (), {"__module__": module})
            setattr(holder, name, made)
        return getattr(holder, name) if name else holder

    def parts(self) -> list[Any]:
        """Everything that registration may replace."""
        found = [self.platform.__dict__["get_punica_wrapper"]]
        return found + [vars(self.holder(owner)).get(name) for owner, name, _ in RELIED_ON]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, with an environment that does not name the plugin."""
    monkeypatch.delenv("FASTLORA_VLLM", raising=False)
    return StandIn(monkeypatch)


def test_register_replaces_every_part_once(vllm: StandIn) -> None:
    before = vllm.parts()
    assert registration.register() is None
    assert vllm.platform().get_punica_wrapper() == registration.WRAPPER
    replaced = {
        (owner, name)
        for (owner, name, _), old, new in zip(RELIED_ON, before[1:], vllm.parts()[1:], strict=True)
        if old is not new
    }
    methods = {(o, name) for o, names in registration._LAYER_CLASSES.items() for name in names}
    others = {
        ("vllm.lora.lora_weights:LoRALayerWeights", "optimize"),
        ("vllm.lora.worker_manager:WorkerLoRAManager", "_load_adapter"),
        ("vllm.v1.worker.gpu_model_runner:GPUModelRunner", "_get_prompt_logprobs_dict"),
        ("vllm.v1.worker.gpu_input_batch:InputBatch", "make_lora_inputs"),
        ("vllm.v1.worker.gpu.lora_utils:LoraState", "get_activate_loras"),
    }
    assert replaced == methods | others
    (level, line) = vllm.log[-1]
    assert level == "info" and "linear layers, logits, embeddings" in line and "PyTorch" in line
    after = vllm.parts()
    assert registration.register() is None
    assert vllm.parts() == after and len(vllm.log) == 1


def _assert_left_alone(vllm: StandIn, before: list[Any], *words: str) -> None:
    refused = registration.register()
    assert refused is not None and refused.is_problem
    assert vllm.parts() == before
    (level, line) = vllm.log[-1]
    assert level == "warning" and all(word in line for word in words), line


@pytest.mark.parametrize("row", RELIED_ON, ids=lambda row: f"{row.owner}.{row.name}")
def test_a_missing_function_or_parameter_leaves_vllm_alone(
    vllm: StandIn, row: ReliedOnFunction
) -> None:
    holder = vllm.holder(row.owner)
    setattr(holder, row.name, _function(row.name, (*row.parameters[:-1], "other", "new=None")))
    _assert_left_alone(vllm, vllm.parts(), row.name, "new", *KNOWN_VERSIONS)
    delattr(holder, row.name)
    _assert_left_alone(vllm, vllm.parts(), row.name, "is missing", *KNOWN_VERSIONS)


@pytest.mark.parametrize("version", ["0.30.2", "0.33.0", "0.32.0rc1", "dev"])
def test_an_unknown_version_is_left_alone(vllm: StandIn, version: str) -> None:
    vllm.module("vllm").__version__ = version
    _assert_left_alone(vllm, vllm.parts(), version, *KNOWN_VERSIONS)


def test_a_new_abstract_method_leaves_vllm_alone(vllm: StandIn) -> None:
    abstract = vllm.holder(registration._ABSTRACT)
    abstract.__abstractmethods__ |= {"add_lora_something"}
    _assert_left_alone(vllm, vllm.parts(), "add_lora_something is new")


def test_a_new_class_with_a_method_of_its_own_leaves_vllm_alone(vllm: StandIn) -> None:
    utils, layers = vllm.module("vllm.lora.utils"), vllm.module("vllm.lora.layers")
    body = {"set_lora": _function("set_lora", ("self",)), "__module__": "vllm.lora.layers.step"}
    leaf = type("StepWithLoRA", (layers.BaseLayerWithLoRA,), body)
    utils._all_lora_classes += (leaf,)
    _assert_left_alone(vllm, vllm.parts(), "StepWithLoRA.set_lora is new")


def test_an_error_leaves_vllm_alone(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("not today")

    monkeypatch.setattr(registration, "differences", fail)
    _assert_left_alone(vllm, vllm.parts(), "RuntimeError: not today")


def test_an_error_in_between_restores_what_was_replaced(
    vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    replacements = registration._replacements

    def with_one_that_fails() -> list[Any]:
        return [*replacements(), (int, "real", None)]

    monkeypatch.setattr(registration, "_replacements", with_one_that_fails)
    _assert_left_alone(vllm, vllm.parts(), "TypeError: cannot set 'real'")


@pytest.mark.parametrize(
    ("device", "value", "enabled"),
    [
        ("cpu", None, True),
        ("cpu", "1", True),
        ("cpu", "0", False),
        ("cuda", None, False),
        ("cuda", "1", True),
        ("cuda", "0", False),
    ],
)
def test_where_the_plugin_is_enabled(
    monkeypatch: pytest.MonkeyPatch, device: str, value: str | None, enabled: bool
) -> None:
    monkeypatch.delenv("FASTLORA_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("FASTLORA_VLLM", value)
    assert env.vllm_plugin_enabled(device) is enabled


def test_a_disabled_plugin_says_so(vllm: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_VLLM", "0")
    before = vllm.parts()
    refused = registration.register()
    assert refused is not None and not refused.is_problem and vllm.parts() == before
    assert vllm.log == [("info", "fastlora is not used for LoRA: FASTLORA_VLLM=0 disables it")]


def test_on_cuda_vllm_multiplies_the_scaling(
    vllm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaling that is kept beside lora_b would not survive the copy to the device."""
    vllm.platform.device_type = "cuda"
    vllm.platform.is_cpu, vllm.platform.is_cuda = (lambda _: False), (lambda _: True)
    monkeypatch.setenv("FASTLORA_VLLM", "1")
    weights = vllm.holder("vllm.lora.lora_weights:LoRALayerWeights")
    before = weights.optimize
    assert registration.register() is None
    assert weights.optimize is before


def test_cuda_is_left_alone_without_a_warning(vllm: StandIn) -> None:
    vllm.platform.device_type = "cuda"
    vllm.platform.is_cpu, vllm.platform.is_cuda = (lambda _: False), (lambda _: True)
    before = vllm.parts()
    refused = registration.register()
    assert refused is not None and not refused.is_problem and vllm.parts() == before
    assert vllm.log == [("info", vllm.log[0][1])] and "FASTLORA_VLLM=1" in vllm.log[0][1]


def test_disabled_it_imports_nothing_and_adds_no_finder() -> None:
    code = """
import sys
finders = list(sys.meta_path)
import fastlora_vllm
fastlora_vllm.register()
assert sys.meta_path == finders
assert not [name for name in sys.modules if name.partition(".")[0] in ("fastlora", "torch")]
"""
    environment = os.environ | {"FASTLORA_VLLM": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_a_fastlora_that_cannot_be_imported_leaves_vllm_alone(tmp_path: Path, error: str) -> None:
    """vLLM starts, and one warning has the error and its stack trace."""
    (tmp_path / "fastlora").mkdir()
    (tmp_path / "fastlora" / "__init__.py").write_text(f"raise {error}('broken on purpose')\n")
    shutil.copy(ROOT / "fastlora_vllm.py", tmp_path)
    code = """
import logging
logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
import fastlora_vllm
fastlora_vllm.register()
"""
    environment = {k: v for k, v in os.environ.items() if k != "FASTLORA_VLLM"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stderr.count("WARNING vllm: fastlora is not used for LoRA") == 1
    assert f"{error}: broken on purpose" in done.stderr


def _write_sources(root: Path, change: str = "") -> Path:
    """Write sources of a vLLM that agrees with the table, apart from one change."""
    classes: dict[str, dict[str, list[str]]] = {}
    for owner, name, parameters in RELIED_ON:
        module, _, cls = owner.partition(":")
        mark = "@abstractmethod\n    " if owner == registration._ABSTRACT else ""
        own = ", ".join(parameters)
        if (change, name) == ("parameter", "slice_lora_a"):
            own += ", new"
        text = f"    {mark}def {name}({own}): ..."
        if (change, name) != ("missing", "slice_lora_b"):
            classes.setdefault(module, {}).setdefault(cls, []).append(text)
    if change == "abstract":
        module, _, cls = registration._ABSTRACT.partition(":")
        classes[module][cls].append("    @abstractmethod\n    def add_lora_other(self): ...")
    if change == "class":
        text = "    def set_lora(self): ..."
        classes[next(iter(classes))]["StepWithLoRA"] = [text]
    for module, own_classes in classes.items():
        file = root / f"{module.replace('.', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(f"class {k}:\n" + "\n".join(v) for k, v in own_classes.items()))
    modules = [each for each in classes if each.startswith("vllm.lora.layers.")]
    lines = [f"from {module} import something" for module in modules]
    (root / "vllm/lora/layers/__init__.py").write_text("\n".join(lines))
    return root


@pytest.mark.parametrize("as_wheel", [False, True])
@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("", None),
        ("missing", "slice_lora_b is missing"),
        ("parameter", "slice_lora_a has parameters self, lora_a, new"),
        ("abstract", "add_lora_other is new"),
        ("class", "StepWithLoRA.set_lora is new"),
    ],
)
def test_sources_of_a_version_are_compared(
    tmp_path: Path, change: str, difference: str | None, as_wheel: bool
) -> None:
    path = _write_sources(tmp_path / "sources", change)
    if as_wheel:
        path = Path(shutil.make_archive(str(tmp_path / "wheel"), "zip", path))
    found = list(compare_sources.differences(compare_sources.source_reader(path)))
    assert len(found) == (difference is not None)
    assert all(each.endswith(str(difference)) for each in found), found


def test_slots_of_rows() -> None:
    slots = slots_of_rows((7, 0, 3, 3, 7), [3, None, 7])
    assert slots.tolist() == [2, -1, 0, 0, 2]
    assert slots_of_rows((), [3]).tolist() == []
    with pytest.raises(ValueError, match="adapter 9 is not in any slot"):
        slots_of_rows((3, 9), [3])
