"""The cases of the conformance suite: where adapters live, which rows they have, what they use."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


def _lora(r: int, lora_alpha: float, targets: str = "qko", **fields: Any) -> dict[str, Any]:
    return {"r": r, "lora_alpha": lora_alpha, "target_modules": list(targets), **fields}


# Every adapter of a feature: the fields of its config. "en" alone is the single case, "en" and
# "fr" are the several active ones, and all of them are in a mixed batch.
FEATURES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {
        "en": _lora(4, 6),
        "fr": _lora(1, 3, "qo"),
        "de": _lora(3, 2, "ko", use_rslora=True),
    },
    "rslora": {
        "en": _lora(3, 5, use_rslora=True),
        "fr": _lora(16, 8, "qk", use_rslora=True),
        "de": _lora(1, 2),
    },
    "bias": {
        "en": _lora(4, 8, lora_bias=True),
        "fr": _lora(3, 2, "qo", lora_bias=True),
        "de": _lora(8, 4),
    },
    # From four of one rank on PyTorch takes them as a batch.
    "many": {
        name: _lora(4, 2 + 3 * i, lora_bias=i % 2 == 1)
        for i, name in enumerate(("en", "fr", "de", "es", "it"))
    },
    "dropout": {
        "en": _lora(1, 1.5, lora_dropout=0.25),
        "fr": _lora(3, 2, "qo", lora_dropout=0.5),
        "de": _lora(8, 4),
    },
    # "en" is small enough that its norm joins the base product of 16 to 24 rows.
    "dora": {
        "en": _lora(2, 3, use_dora=True),
        "fr": _lora(3, 2, "qo", use_dora=True),
        "de": _lora(8, 4),
    },
    # Several that are active act in this order: a lora_bias before DoRA is scaled by it.
    "biased_dora": {
        "en": _lora(4, 8, "qo", lora_bias=True),
        "fr": _lora(2, 3, use_dora=True),
        "de": _lora(1, 2, use_dora=True),
    },
    "dora_dropout": {
        "en": _lora(2, 3, use_dora=True, lora_dropout=0.25),
        "fr": _lora(3, 2, "qo", use_dora=True),
        "de": _lora(8, 4, "ko", lora_dropout=0.5),
    },
}
# One id for each of the six samples: unsorted, with rows of the base model alone.
IDS: dict[str, list[str | None]] = {"many": ["it", "en", None, "de", "fr", "es"]}
MIXED: list[str | None] = ["fr", None, "en", "de", "fr", "en"]
SEEDS = {name: 11 * (i + 1) for i, name in enumerate(("en", "fr", "de", "es", "it"))}


class Case(NamedTuple):
    """What one conformance test runs on.

    Attributes:
        source: ``"function"``, ``"layer"``, ``"model"``, ``"patched"``, ``"pool"`` or ``"shards"``
            (a model behind torch's tensor parallelism, in one process).
        rows: ``"single"``, ``"several"`` (active at once) or ``"mixed"``.
        feature: A key of `FEATURES`.
        base: ``"plain"`` linears, or ``"called"`` ones, which run as modules.
        dtype: Of x and of the base weights.
        factors: Dtype of the adapters' parameters; "" for dtype.
        tokens: Rows of each of the six samples.
        impl: Implementation of the layers.
        base_trains: Whether the base weights and biases train too.
    """

    source: str
    rows: str
    feature: str
    base: str = "plain"
    dtype: str = "float32"
    factors: str = ""
    tokens: int = 3
    impl: str = "eager"
    base_trains: bool = False

    def __str__(self) -> str:
        extra = [self.base] * (self.base != "plain") + [self.dtype] * (self.dtype != "float32")
        extra += [f"{self.factors}-factors"] * bool(self.factors)
        extra += [f"{self.tokens}-tokens"] * (self.tokens != 3)
        extra += ["base-trains"] * self.base_trains
        return "-".join([self.source, self.rows, self.feature, *extra])

    @property
    def ids(self) -> list[str | None]:
        """The adapter of each sample of a mixed batch."""
        return list(IDS.get(self.feature, MIXED))

    @property
    def active(self) -> list[str]:
        """The adapters that act outside of a mixed batch."""
        return ["en", "fr"] if self.rows == "several" else ["en"]

    @property
    def x_dtype(self) -> torch.dtype:
        """Of x and of the base weights."""
        return getattr(torch, self.dtype)

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of the adapters' parameters."""
        return getattr(torch, self.factors or self.dtype)

    @property
    def drops(self) -> bool:
        """Whether dropout acts in training."""
        return self.source != "pool" and any(
            "lora_dropout" in config for config in FEATURES[self.feature].values()
        )

    @property
    def dora(self) -> bool:
        """Whether an adapter uses DoRA."""
        return any("use_dora" in config for config in FEATURES[self.feature].values())

    @property
    def forwards(self) -> int:
        """After how many an evaluation has all that it keeps: kernels have no factors to pack."""
        return 2 if self.impl == "triton" else 3

    @property
    def trains(self) -> bool:
        """Whether adapters are parameters; a pool's are not."""
        return self.source != "pool"


# Pairwise over the axes. The numbers are the rows of the matrix of paths that a case enters:
# 1 PyTorch's nodes, 2 one function, 4 mixed, 5 packed (without gradients), 10 a pool's, 11 tensor
# parallel; compiled (8, 9) and hooked (12) ones are made from these by their invariants.
CASES = [
    Case("function", "single", "plain"),  # 1
    Case("function", "single", "dropout", dtype="float64"),  # 2
    Case("function", "single", "plain", base="called", dtype="bfloat16"),  # 2
    Case("function", "single", "plain", tokens=180, base_trains=True),  # 2
    Case("layer", "single", "plain"),  # 1
    Case("layer", "single", "rslora", dtype="float64", base_trains=True),  # 1
    Case("layer", "single", "bias", dtype="bfloat16", factors="float32"),  # 2
    Case("layer", "single", "dropout", base_trains=True),  # 2
    Case("layer", "single", "dropout", base="called", dtype="float16"),  # 2
    Case("layer", "single", "dora", dtype="float64", base_trains=True),  # 1
    Case("layer", "single", "dora_dropout", base_trains=True),  # 2
    Case("layer", "single", "dora", base="called"),  # 2
    Case("layer", "several", "bias", dtype="float64"),
    Case("layer", "several", "dropout"),
    Case("layer", "several", "dora_dropout"),
    Case("layer", "several", "plain", base="called"),
    Case("layer", "several", "biased_dora"),
    Case("layer", "several", "biased_dora", base="called"),
    Case("model", "single", "dropout", dtype="float64"),  # 2
    Case("model", "single", "bias", tokens=180, base_trains=True),  # 2
    Case("model", "single", "plain", base="called", dtype="bfloat16", tokens=20),  # 2
    Case("model", "single", "rslora", dtype="bfloat16"),
    Case("model", "single", "dora_dropout", base="called", dtype="bfloat16", factors="float32"),
    Case("model", "several", "plain", base_trains=True),
    Case("model", "several", "dora"),
    Case("model", "mixed", "plain"),  # 4, 5
    Case("model", "mixed", "rslora", dtype="bfloat16"),  # 4, 5
    Case("model", "mixed", "bias", dtype="float64", base_trains=True),
    Case("model", "mixed", "many"),  # 4 in a batch of shares, 5
    Case("model", "mixed", "many", dtype="bfloat16", factors="float32", tokens=1),
    Case("model", "mixed", "dropout", tokens=40),
    Case("model", "mixed", "dora", base_trains=True),
    Case("model", "mixed", "biased_dora"),
    Case("model", "mixed", "dora_dropout", dtype="float64"),
    Case("model", "mixed", "plain", base="called", dtype="float16"),
    Case("model", "mixed", "dora_dropout", base="called"),
    Case("patched", "single", "plain"),
    Case("patched", "single", "dora_dropout", dtype="float64"),
    Case("patched", "single", "bias", dtype="bfloat16", factors="float32"),
    Case("patched", "several", "rslora"),
    Case("patched", "mixed", "plain", dtype="float64"),
    Case("patched", "mixed", "dropout", base_trains=True),
    Case("patched", "mixed", "dora"),
    Case("patched", "mixed", "bias", base="called"),
    Case("pool", "mixed", "plain"),  # 4, 5
    Case("pool", "mixed", "many", dtype="bfloat16"),
    Case("pool", "mixed", "bias", base="called", dtype="float64"),
    Case("pool", "mixed", "dora"),
    Case("pool", "single", "rslora", dtype="float16"),
    Case("shards", "single", "plain"),  # 11
    Case("shards", "single", "dora_dropout", dtype="float64"),
    Case("shards", "mixed", "bias"),
    Case("shards", "mixed", "dora_dropout"),
]
