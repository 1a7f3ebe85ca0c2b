"""The machine of a benchmark: card, versions, commit, and measured peak rates of the card."""

from __future__ import annotations

import hashlib
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastlora.bench.harness import Timing, time_plain
from fastlora.bench.shapes import Roofs

# The checkout, or the folder of an installed package.
ROOT = Path(__file__).resolve().parent.parent


def results_folder() -> Path:
    """Return the checkout's results folder, or the working directory for an installed package."""
    folder = ROOT / "bench" / "results"
    return folder if folder.is_dir() else Path()


def describe(device: torch.device, checkout: Path = ROOT) -> dict[str, Any]:
    """Return the columns with the same value in every row: card, versions, and commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    card, sms, driver = "cpu", torch.get_num_threads(), "none"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card, sms, driver = properties.name, properties.multi_processor_count, _driver()
    return {
        "card": card,
        "sms": sms,
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(checkout),
    }


def _driver() -> str:
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return answer.stdout.split()[0]
    with suppress(OSError, IndexError):
        words = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()
        return next(word for word in words if word[0].isdigit())
    return "unknown"


def processor() -> str:
    """Return the processor's name, or "unknown"."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else "unknown"
    return "unknown"


def commit(checkout: Path) -> str:
    """Return the commit, or a digest of the sources if they differ from it or there is none."""
    if not (checkout / "fastlora").is_dir():
        return f"source-{_digest(checkout)}"  # a surrounding repository would be another project
    git = ["git", "-c", "safe.directory=*", "-C", str(checkout)]
    with suppress(OSError, subprocess.SubprocessError):
        head, changes = (
            subprocess.run([*git, *args], capture_output=True, text=True, timeout=20, check=True)
            for args in (
                ("rev-parse", "--short=12", "HEAD"),
                ("status", "--porcelain", "--", "fastlora", "kernels", "bench", ":!bench/results"),
            )
        )
        if not changes.stdout.strip():
            return head.stdout.strip()
        return f"{head.stdout.strip()}-dirty-{_digest(checkout)}"
    return f"source-{_digest(checkout)}"


def _digest(checkout: Path) -> str:
    digest = hashlib.sha256()
    folders = [checkout / name for name in ("fastlora", "kernels", "bench")]
    for folder in folders if folders[0].is_dir() else [checkout]:
        for path in sorted(folder.rglob("*.py")):
            digest.update(f"{path.relative_to(checkout)}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def measure_roofs(device: torch.device, dtype: torch.dtype) -> tuple[Roofs, Timing, Timing]:
    """Measure a large copy and a large GEMM on random data (small ones on a CPU).

    Returns:
        The measured rates, the time of one copy, and the time of one GEMM.
    """
    size, side = (2**30, 8192) if device.type == "cuda" else (2**22, 256)
    source = torch.randn(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = time_plain(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    gemm = time_plain(lambda: a @ b, device)
    roofs = Roofs(2 * size / (copy.median * 1e-6), 2 * side**3 / (gemm.median * 1e-6))
    return roofs, copy, gemm
