"""What a model card says, and what is uploaded to the Hugging Face Hub, without a connection."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastlora import LoraConfig, LoraModel, get_peft_model
from fastlora.validation import ImplementationError
from tests.support.tiny import TwoLayers, tiny_llama

hub = pytest.importorskip("huggingface_hub", reason="reads and writes cards")
peft = pytest.importorskip("peft", reason="compares with PEFT's cards")


def card_of(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return hub.ModelCard((folder / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["llama", "two layers"])
def test_a_card_has_pefts_keys(tmp_path: Path, name: str) -> None:
    """Library, base model, tags, pipeline and PEFT's version are what PEFT writes."""

    def base() -> Any:
        if name != "llama":
            return TwoLayers()
        model = tiny_llama()
        model.name_or_path = model.config._name_or_path = "somebody/base"
        return model

    config = {"r": 2, "target_modules": ["q_proj"] if name == "llama" else ["q"]}
    config["task_type"] = "CAUSAL_LM" if name == "llama" else None
    ours = card_of(get_peft_model(base(), LoraConfig(**config)), tmp_path / "ours")
    theirs = card_of(peft.get_peft_model(base(), peft.LoraConfig(**config)), tmp_path / "theirs")
    assert ours.data.to_dict() == theirs.data.to_dict()
    assert "lora" in ours.data.tags
    assert "- PEFT 0.21.2" in ours.text.splitlines()


def test_an_existing_card_is_not_overwritten(tmp_path: Path) -> None:
    """Keys and text of somebody's card stay; saving twice adds nothing more."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    (tmp_path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\nMy card.\n")
    card = card_of(model, tmp_path)
    assert card.data.license == "mit" and sorted(card.data.tags) == ["lora", "mine"]
    assert card.text.startswith("My card.")
    assert card_of(model, tmp_path).content == card.content
    (tmp_path / "README.md").write_text("---\na: [\n---\n")
    with pytest.warns(UserWarning, match="is not a valid model card"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "---\na: [\n---\n"


def test_push_to_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model uploads what it saves, a config its file; options reach the Hub's client."""
    calls: list[tuple[str, Any]] = []

    class Api:
        """Notes what it is asked for."""

        def __init__(self, token: str | None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            """Returns a repository with its owner's name."""
            calls.append(("private", private))
            assert exist_ok
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: str, **options: Any) -> str:
            """Notes the names of the files."""
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            calls.append(("options", options))
            return "done"

    monkeypatch.setattr(hub, "HfApi", Api)
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    told = {"commit_message": "m", "commit_description": "d"}
    assert model.push_to_hub("mine", private=True, token="t", **told) == "done"
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    options = {**told, "revision": None, "create_pr": False}
    assert calls == [("token", "t"), ("private", True), ("me/mine", files), ("options", options)]
    LoraConfig(r=2, target_modules=["q"]).push_to_hub("config")
    assert ("me/config", ["adapter_config.json"]) in calls


def test_without_huggingface_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushing is refused in one line; saving writes no card, and all else."""
    model = get_peft_model(TwoLayers(), LoraConfig(r=2, target_modules=["q"]))
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "huggingface_hub" else found(n, *a)
    )
    with pytest.raises(ImplementationError, match="pip install huggingface_hub$"):
        model.push_to_hub("mine")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert list(LoraModel.from_pretrained(TwoLayers(), tmp_path).peft_config) == ["default"]
