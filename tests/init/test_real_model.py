"""Adapters that start from SmolLM2-135M's weights, or from data, start at its loss and train.

On six of its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlora
from fastlora import CordaConfig, EvaConfig, LoraConfig

TEXTS = (
    "The lighthouse keeper wrote the weather into his book every evening, and nobody read it.",
    "A train of forty wagons left the harbour at noon, loaded with salt, timber and old letters.",
)
LAYERS = [0, 2, 5]


@pytest.fixture(scope="module")
def batch(smollm2_tokenizer: Any) -> dict[str, torch.Tensor]:
    """The two texts, as long as the shorter one."""
    ids = [smollm2_tokenizer(text)["input_ids"] for text in TEXTS]
    tokens = torch.tensor([each[: min(map(len, ids))] for each in ids])
    return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "corda"])
def test_starts_at_the_base_models_loss_and_trains(
    init: str, fresh_smollm2: Callable[..., Any], batch: dict[str, torch.Tensor]
) -> None:
    base = fresh_smollm2(layers=6)
    settings: dict[str, Any] = {
        "eva": {"eva_config": EvaConfig(rho=1.5)},
        "corda": {"corda_config": CordaConfig(corda_method="ipm")},
    }
    config = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=LAYERS,
        init_lora_weights=init,
        **settings.get(init, {}),
    )
    with torch.no_grad():
        start = float(base(**batch).loss)
    if init == "corda":
        fastlora.preprocess_corda(base, config, dataloader=[batch], show_progress_bar=False)
    torch.manual_seed(0)
    model = fastlora.get_peft_model(base, config)
    if init == "eva":
        fastlora.initialize_lora_eva_weights(model, [batch], show_progress_bar=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0] == pytest.approx(start, rel=2e-4)
    assert losses[-1] < losses[0] - 0.05, losses
