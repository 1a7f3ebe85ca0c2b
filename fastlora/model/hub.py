"""Upload adapters to the Hugging Face Hub and write model cards, using huggingface_hub."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastlora.model.atomic_files import atomic_replace_file
from fastlora.model.config_checks import PEFT_VERSION
from fastlora.user_warnings import warn
from fastlora.validation import ImplementationError

CARD_NAME = "README.md"


def push_to_hub(
    save: Callable[[Path], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    """Save files, and upload them to the Hugging Face Hub.

    The files are saved by calling ``save``. The repository is created if it does not exist.

    Args:
        save: A function that writes files into the folder it is called with.
        repo_id: The name of the repository, including its owner.
        private: Whether a new repository is private. With None, the owner's default applies.
        token: The access token, as in huggingface_hub.
        commit_message, commit_description: The message and the description of the commit.
        revision: The branch to upload to.
        create_pr: Whether to open a pull request instead of committing to the branch.

    Returns:
        The `CommitInfo` of huggingface_hub.

    Raises:
        ImplementationError: If huggingface_hub is not installed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ImplementationError("push_to_hub needs huggingface_hub: pip install huggingface_hub")
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def write_or_update_model_card(
    folder: Path, base_model: str | None, tags: Sequence[str], pipeline: str | None = None
) -> None:
    """Write the model card of an adapter, or update an existing model card.

    Keys and tags are the same as in PEFT. If huggingface_hub, which reads and writes the format, is
    not installed, nothing is written.

    Args:
        folder: The folder of the model card.
        base_model: The id or the path of the base model, or None if it is unknown.
        tags: Tags to add to the card.
        pipeline: The Hub's ``pipeline_tag``, such as ``"text-generation"``. An existing tag is not
            changed.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import ModelCard

    path = folder / CARD_NAME
    try:
        card = ModelCard(path.read_text(encoding="utf-8") if path.is_file() else _CARD)
    except Exception as error:  # may be raised by the YAML library that huggingface_hub uses
        warn(f"{path} is not a valid model card and was left unchanged: {error}")
        return
    data: Any = card.data
    data.library_name = "peft"
    if base_model is not None:
        data.base_model = base_model
    data.pipeline_tag = data.pipeline_tag or pipeline
    data.tags = sorted({*(data.tags or ()), *tags})
    version = f"- PEFT {PEFT_VERSION}"
    if version not in card.text.splitlines():
        heading = "### Framework versions"
        if heading not in card.text.splitlines():
            card.text = f"{card.text.rstrip()}\n\n{heading}\n"
        card.text = card.text.replace(heading, f"{heading}\n\n{version}", 1)
    with atomic_replace_file(path) as partial:
        partial.write_text(str(card), encoding="utf-8")


_CARD = """---
library_name: peft
---

# Model card

A LoRA adapter: low-rank updates of a base model's layers. Load it together with the base model.

## How to use it

The base model is named above. With PEFT:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "<this folder or repository>")
```

With fastlora, which reads local folders:

```python
from fastlora import PeftModel
from huggingface_hub import snapshot_download

model = PeftModel.from_pretrained(base_model, snapshot_download("<this repository>"))
```

`adapter_config.json` says which layers are adapted, with which rank and scaling;
`adapter_model.safetensors` contains the weights.

## What it is for

[More Information Needed]

## Training

### Data

[More Information Needed]

### Procedure

[More Information Needed]

## Evaluation

[More Information Needed]

## Limits and risks

The adapter shares the limits and risks of the base model and of its training data.

[More Information Needed]
"""
