"""Check the installed packages, the available devices, and the environment."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora import env

if TYPE_CHECKING:
    import torch

DISTRIBUTION = "fastlora-triton"
# Packages that `import fastlora` does not need, each with what needs it.
_OPTIONAL = {
    "transformers": "train, chat, merge, serve, and doctor MODEL",
    "peft": "fastlora.patch and PEFT models",
    "accelerate": "train, transformers' Trainer, and quantized base models",
    "fastapi": "serve",
    "uvicorn": "serve",
    "bitsandbytes": "4-bit and 8-bit base models",
    "torchao": "int8, int4, and float8 base models",
}
_PACKAGES = ("torch", "triton", "safetensors", *_OPTIONAL)
# Files that the drivers of GPUs create.
_DRIVERS = (("NVIDIA", Path("/proc/driver/nvidia/version")), ("AMD", Path("/dev/kfd")))
# Sizes of the trial launch on each GPU: rows, in, out, rank. The bound is far above its fp16 error.
_TEST_LAUNCH, _TEST_LAUNCH_ERROR = (16, 64, 64, 8), 0.03


@dataclass
class DoctorFindings:
    """The findings of the ``fastlora doctor`` command.

    The command reports the findings as problems and notes.

    Attributes:
        problems: Problems that prevent fastlora from working correctly, each with a fix.
        notes: Facts that are not problems but may be surprising.
    """

    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add_problem(self, what: str, fix: str) -> None:
        """Add a problem and its fix."""
        self.problems.append({"problem": " ".join(what.split()), "fix": fix})


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution.

    The result is None if the distribution is not installed.
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def supported_version_ranges() -> dict[str, str]:
    """Return the supported version ranges of fastlora's dependencies.

    The result is a dict that maps the name of each package, and ``"python"``, to a version range.
    The packages include those of the extras. The ranges are those of pyproject.toml at the time of
    installation. The dict is empty if fastlora is not installed.
    """
    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return {}
    ranges = {"python": str(metadata["Requires-Python"] or "")}
    for requirement in importlib.metadata.requires(DISTRIBUTION) or ():
        match = re.match(r"([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)", requirement)
        if match and match[2].strip():
            parts = sorted((part.strip() for part in match[2].split(",")), reverse=True)
            ranges.setdefault(match[1].lower(), ",".join(parts))
    return ranges


def is_version_in_range(found: str, wanted: str) -> bool:
    """Return whether a version is in a range such as ``">=2.11,<3"``.

    Only the numbers of the versions are compared.
    """
    for part in filter(None, wanted.split(",")):
        sign, bound = part[: len(part) - len(part.lstrip("<>=!~"))], part.lstrip("<>=!~")
        ours, theirs = _numbers(found), _numbers(bound)
        if (sign == ">=" and ours < theirs) or (sign == "<" and ours >= theirs):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"\d+(?:\.\d+)*", text)
    numbers = [int(part) for part in release[0].split(".")] if release else []
    return (*numbers, *[0] * (4 - len(numbers)))


def check_python(found: DoctorFindings) -> dict[str, str]:
    """Check the Python version, and return a dict that describes it.

    The dict contains the version and the supported range. If the version is not supported, a
    problem is added to ``found``.
    """
    have, wanted = platform.python_version(), supported_version_ranges().get("python", "")
    if not is_version_in_range(have, wanted):
        found.add_problem(f"Python {have} is not supported", f"use Python {wanted}")
    return {"version": have, "supported": wanted}


def check_packages(found: DoctorFindings) -> Iterator[dict[str, str | None]]:
    """Check the installed packages and their versions.

    Problems and notes are added to ``found``. For each package, yields a dict of properties: the
    package's name, version, supported range, and purpose.
    """
    ranges, own = supported_version_ranges(), installed_version(DISTRIBUTION)
    yield {"name": "fastlora", "version": own, "supported": None, "needed_for": None}
    if own is None:
        found.notes.append(
            "fastlora is imported from a checkout and is not installed, so the supported versions "
            "are unknown; install it with: pip install -e ."
        )
    for name in _PACKAGES:
        have, wanted = installed_version(name), ranges.get(name, "")
        needed_for = _OPTIONAL.get(name)
        yield {"name": name, "version": have, "supported": wanted, "needed_for": needed_for}
        if have is None:
            if needed_for is None and (name != "triton" or platform.system() == "Linux"):
                found.add_problem(f"{name} is not installed", f"pip install '{name}{wanted}'")
        elif not is_version_in_range(have, wanted):
            found.add_problem(
                f"{name} {have} is not supported, expected {wanted}",
                f"pip install '{name}{wanted}'",
            )
        elif error := import_error_text(name):
            found.add_problem(
                f"{name} {have} is installed but cannot be imported ({error})",
                f"pip install --force-reinstall --no-deps '{name}{wanted}'"
                + ("" if needed_for is None else f", or pip uninstall {name}"),
            )


def import_error_text(name: str) -> str:
    """Try to import a package, and return the error message if the import fails.

    The message is a single line. It is empty if the import succeeds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception as error:  # a broken package may raise anything
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def describe_devices() -> Iterator[dict[str, Any]]:
    """Describe the CPU and the accelerators that torch detects.

    For each device, yields a dict of properties. The devices are the CPU, each GPU, and any
    accelerator of another type. The dict contains the device's name, the implementation that
    ``impl="auto"`` selects on the device, and the reason for this choice. For a GPU, the dict also
    contains properties of its architecture.
    """
    import torch

    from fastlora.integrations.report import auto_implementation

    names = ["cpu"]
    names += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    other = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if other is not None and other.type != "cuda":
        names.append(other.type)
    for name in names:
        device = torch.device(name)
        chosen, reason = auto_implementation(device)
        yield {
            "device": name,
            "implementation": chosen,
            "why": reason,
            **_gpu_architecture_and_processor_count(device),
        }


def _gpu_architecture_and_processor_count(device: torch.device) -> dict[str, Any]:
    """Return a dict that contains a GPU's architecture and its number of multiprocessors.

    The dict also contains the architecture whose config table the kernels use, or None if there is
    no table. The name of an NVIDIA architecture contains the compute capability, as in ``sm_90``.
    If the device is not a GPU, or if Triton is not installed, the dict is empty.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return {}
    from fastlora.kernels import chips

    chip = chips.chip_of(device)
    tables = chip.family if chip.is_supported else None
    return {"arch": chip.arch, "processors": chip.num_sms, "tables": tables}


def check_gpus_and_test_launches(
    found_devices: Sequence[dict[str, Any]], found: DoctorFindings
) -> None:
    """Check the GPUs, and run a test kernel on each supported device.

    GPUs that torch does not detect are reported.
    """
    import torch

    from fastlora.ops.execution_mode import triton_status

    for maker, driver in _DRIVERS:
        if driver.exists() and not torch.cuda.is_available():
            hidden = [v for v in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES") if v in os.environ]
            built = torch.version.cuda or torch.version.hip or "CPU only"
            found.add_problem(
                f"an {maker} driver is installed, but torch {torch.__version__} (built for "
                f"{built}) does not see a GPU",
                f"unset {hidden[0]}"
                if hidden
                else "install the torch build that matches the driver: https://pytorch.org/get-started",
            )
    for entry in found_devices:
        device = torch.device(entry["device"])
        runs, reason = triton_status(device.type, device.index or 0)
        if device.type == "cuda" and not runs:
            fix = "use another GPU; on this one, fastlora runs in PyTorch without its kernels"
            found.add_problem(
                f"the kernels do not run on {entry['device']}: {reason}",
                "pip install 'triton>=3.6,<4'" if "not installed" in reason else fix,
            )
        entry["trial"] = _run_test_launch(device, found) if runs else None


def _run_test_launch(device: torch.device, found: DoctorFindings) -> str:
    """Launch a test kernel on a device, and return the outcome as text.

    The kernel's result is compared with a result computed in float64. If the launch fails, or if
    the kernel's result is wrong, a problem is added to ``found``.
    """
    import torch

    from fastlora.functional import lora_linear

    m, k, n, r = _TEST_LAUNCH
    cpu = torch.Generator().manual_seed(0)
    shapes = ((m, k), (n, k), (r, k), (n, r))
    exact = [torch.randn(s, generator=cpu, dtype=torch.float64) for s in shapes]
    x, weight, lora_a, lora_b = exact
    truth = x @ weight.T + (x @ lora_a.T) @ lora_b.T
    fix = "run it again with TORCH_SHOW_CPP_STACKTRACES=1, and report the output in an issue"
    try:
        on_device = [t.to(device, torch.float16) for t in exact]
        with torch.no_grad():
            x, weight, lora_a, lora_b = on_device
            y = lora_linear(x, weight, lora_a, lora_b, scaling=1.0, impl="triton")
        error = float((y.cpu().double() - truth).norm() / truth.norm())
    except Exception as raised:  # a compiler or a driver may raise anything
        message = str(raised).strip().partition("\n")[0] or type(raised).__name__
        found.add_problem(f"a test launch on {device} failed: {message}", fix)
        return "failed"
    if not error <= _TEST_LAUNCH_ERROR:
        found.add_problem(f"a test launch on {device} has a relative error of {error:.2g}", fix)
        return "wrong"
    return f"ran, with a relative error of {error:.2g} in fp16"


def check_environment_variables(found: DoctorFindings) -> None:
    """Check the environment variables, and report values that cause problems.

    The problems are added to ``found``.
    """
    if env.triton_interpreted():
        found.add_problem(
            "TRITON_INTERPRET is set: kernels run in Triton's interpreter, which is meant for "
            "tests and is thousands of times slower",
            "unset TRITON_INTERPRET",
        )
    folder = env.measured_configs_folder()
    if folder is not None and not folder.is_dir():
        found.add_problem(f"FASTLORA_MEASURED is not a folder: {folder}", "unset FASTLORA_MEASURED")
