"""The life of an adapter, feature by feature: what PEFT's gives, in training, files and merging.

In float64, so that what agrees agrees in every digit that matters.
"""

from __future__ import annotations

import copy
import json
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model.adapter_folder import load_adapter_folder
from fastlora.model.tied_weights import input_embedding_name
from fastlora.validation import AdapterStateError
from tests.support.moe_models import moe_model
from tests.support.peft_twins import (
    assert_files_cross,
    assert_near,
    assert_same_gradients,
    assert_same_status,
    bare_name,
    gradients_of,
    peft,
)
from tests.support.tiny import tiny, tiny_llama, two_layers, unchanged

pytest.importorskip("transformers", reason="most models are its")

IDS = torch.tensor([[1, 5, 9, 20, 1, 2], [3, 5, 4, 9, 2, 3]])
X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
T5 = "T5ForConditionalGeneration"


class Feature(NamedTuple):
    """A config on a model, and where PEFT does not follow.

    Attributes:
        base: Makes the model, the same one at every call.
        config: Fields of a LoraConfig.
        alone: What of PEFT's is no twin: "values", "config", "loading" or "all".
        unmerged: What `merge_adapter` says where it refuses.
        inside: The part of the model whose layers PEFT can replicate, if it is not the model.
        apart: Whether what is tied has weights of its own once it is merged.
    """

    base: Callable[[], Any]
    config: dict[str, Any]
    alone: tuple[str, ...] = ()
    unmerged: str = ""
    inside: str = ""
    apart: bool = False


class Embedded(nn.Module):
    """An embedding and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.v, self.rows = nn.Embedding(24, 8), nn.Linear(8, 6), nn.Embedding(24, 6)

    def forward(self, input_ids: torch.Tensor) -> Any:
        """Maps ids ``[B, T]`` to logits ``[B, T, 6]``."""
        y = self.v(self.embed(input_ids)) + self.rows(input_ids)
        return type("Output", (), {"logits": y})


def layers(kind: str, targets: list[str], *alone: str, inside: str = "") -> Feature:
    """Four layers out of a model's two."""
    sizes = {"n_layer" if "GPT2" in kind else "num_hidden_layers": 2}
    config = {"target_modules": targets, "layer_replication": [[0, 2], [0, 1], [1, 2]]}
    shared = "shares its weight with"
    return Feature(lambda: tiny(kind, **sizes), config, alone, shared, inside)


def llama(config: dict[str, Any], tied: bool = True, **options: Any) -> Feature:
    """A Llama with q_proj adapted."""
    config = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **config}
    return Feature(lambda: tiny_llama(tie_word_embeddings=tied), config, **options)


def both(config: dict[str, Any], **options: Any) -> Feature:
    """Two plain linears adapted."""
    return Feature(two_layers, {"target_modules": ["q", "v"], **config}, **options)


DORA = {"use_dora": True, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
TOKENS: dict[str, Any] = {
    "list": [1, 5, 9],
    "unsorted": [9, 1, 5],
    "embedding": {"embed_tokens": [1, 5, 9]},
    "both": {"lm_head": [1, 5, 9], "embed_tokens": [1, 5, 9]},
    "apart": {"lm_head": [2, 3], "embed_tokens": [1, 5, 9]},
    "head": {"lm_head": [2, 3]},
}
# What changes one of two modules with one weight.
SHARES: dict[str, Any] = {"unmerged": "shares its weight with", "apart": True}
TIED: dict[str, dict[str, Any]] = {
    "copy of the embedding": {"modules_to_save": ["embed_tokens"]},
    "copy of the head": {"modules_to_save": ["lm_head"]},
    "copy of both": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "lora_alpha": 5},
    "head": {"target_modules": ["lm_head", "q_proj"], "lora_alpha": 5},
    "regex": {"target_modules": r".*(q_proj|lm_head)$", "lora_alpha": 5},
}
# Experts by the names of their parameters, and by those that linear layers had.
BOTH_STACKS = ["experts.gate_up_proj", "experts.down_proj"]
EXPERTS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "qwen3_moe",
        "rslora",
        {"target_parameters": BOTH_STACKS, "use_rslora": True, "target_modules": ["o_proj"]},
    ),
    (
        "gpt_oss",
        "patterns",
        {
            "target_parameters": [*BOTH_STACKS, "router.weight"],
            "rank_pattern": {"experts.down_proj": 3},
            "alpha_pattern": {"router.weight": 5},
            "target_modules": ["o_proj"],
        },
    ),
    (
        "llama4_text",
        "attention",
        {"target_parameters": BOTH_STACKS, "target_modules": ["o_proj"], "lora_alpha": 5},
    ),
    (
        "nemotron_h",
        "attention",
        {
            "target_parameters": ["experts.up_proj", "experts.down_proj"],
            "target_modules": ["q_proj"],
            "lora_alpha": 3,
        },
    ),
    ("mixtral", "w1 w2 w3", {"target_modules": ["w1", "w2", "w3"], "use_rslora": True}),
    ("olmoe", "all-linear", {"target_modules": "all-linear"}),
]
FEATURES: dict[str, Feature] = {
    "plain": both({"task_type": None}),
    "patterns": both({"rank_pattern": {"v": 1}, "alpha_pattern": {"v": 3}}),
    "lora_bias rslora": both({"lora_bias": True, "use_rslora": True}),
    "dora": both({"use_dora": True}),
    "bias": both({"bias": "lora_only", "target_modules": ["q"]}),
    "all biases": both({"bias": "all", "modules_to_save": ["head"]}),
    "copies": both({"modules_to_save": ["head", "norm"]}),
    "embedding and rows": Feature(
        Embedded, {"target_modules": ["embed", "v"], "trainable_token_indices": {"rows": [1, 3]}}
    ),
    "dora on a Llama": llama(DORA),
    "dora rslora": llama({**DORA, "use_rslora": True}),
    "dora and a copy": llama({**DORA, "modules_to_save": ["lm_head"]}, tied=False),
    "saved embedding": llama(
        {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, tied=False
    ),
    "one layer": llama(
        {"target_modules": ["up_proj", "lm_head"], "layers_to_transform": [1]}, False
    ),
    "one of two tied": llama({"target_modules": ["lm_head", "q_proj"]}, **SHARES),
    "a copy of one of two tied": llama({"modules_to_save": ["lm_head"]}, apart=True),
    "Conv1D": Feature(
        lambda: tiny("GPT2LMHeadModel"), {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    ),
    **{
        f"rows {name} {'tied' if tied else 'untied'}": llama(
            {"trainable_token_indices": rows},
            tied,
            **(SHARES if name in ("apart", "head") and tied else {}),
        )
        for name, rows in TOKENS.items()
        for tied in (True, False)
    },
    **{f"tied {k}": llama({**c, "ensure_weight_tying": True}) for k, c in TIED.items()},
    # PEFT's tied copy of an embedding is a linear, which fails; its loader ties nothing here.
    **{
        f"T5 {name}": Feature(
            lambda: tiny(T5, decoder_start_token_id=0),
            {"target_modules": ["q"], "ensure_weight_tying": True, **config},
            alone,
            "shares its weight with" if name == "lora" else "",
        )
        for name, config, alone in (
            ("copies", {"modules_to_save": ["lm_head"]}, ("values", "loading")),
            ("lora", {"target_modules": ["q", "lm_head"]}, ("loading",)),
            ("rows", {"trainable_token_indices": [1, 5, 9]}, ()),
        )
    },
    # Also in a pool, with the file of either library.
    **{
        f"{name} of {kind}": Feature(
            lambda kind=kind: moe_model(kind, implementation="eager"),
            {"target_modules": ["o_proj"], "target_parameters": [name]},
        )
        for kind, name in (
            ("gpt_oss", "experts.down_proj"),
            ("qwen3_moe", "experts.gate_up_proj"),
            ("qwen3_moe", "gate.weight"),
        )
    },
    **{
        f"experts of {kind} {name}": Feature(
            lambda kind=kind: moe_model(kind, implementation="" if "llama" in kind else "eager"),
            config,
            # PEFT removes the names that it converts from target_modules.
            () if "target_parameters" in config else ("config",),
        )
        for kind, name, config in EXPERTS
    },
    "layers of Llama": layers("LlamaForCausalLM", ["q_proj", "up_proj"]),
    "layers of Mistral": layers("MistralForCausalLM", ["q_proj"]),
    # PEFT leaves its config's layer_types too short.
    "layers of Qwen2": layers("Qwen2ForCausalLM", ["q_proj"], "all"),
    "layers of BERT": layers("BertForMaskedLM", ["query", "dense"]),
    "layers of Falcon": layers("FalconForCausalLM", ["query_key_value"], inside="transformer"),
    "layers of GPT-NeoX": layers("GPTNeoXForCausalLM", ["query_key_value"], inside="gpt_neox"),
    "layers of GPT-2": layers("GPT2LMHeadModel", ["c_attn"], inside="transformer"),
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def made(feature: Feature, library: Any) -> Any:
    """The model with its adapter, the same values in both libraries."""
    base, config = feature.base().double(), copy.deepcopy(feature.config)
    if library is peft and feature.inside:
        from peft.tuners.tuners_utils import replicate_layers

        replicate_layers(getattr(base, feature.inside), config.pop("layer_replication"))
    model = library.get_peft_model(base, library.LoraConfig(r=2, **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = bare_name(name)
            if parameter.requires_grad and not is_view(feature, name):
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                value = torch.randn(parameter.shape, generator=generator).to(parameter) / 4
                parameter.copy_(1 + value if "magnitude" in name else value)
    return model


def is_view(feature: Feature, name: str) -> bool:
    """Whether it is a factor of a tied head, which in PEFT is a view of the embedding's."""
    return "ensure_weight_tying" in feature.config and "lm_head.lora" in name


def run(model: Any, **options: Any) -> torch.Tensor:
    """Output of a model with adapters, or a bare one."""
    if hasattr(model, "norm") and hasattr(model, "q"):
        return model(X, **options)
    if type(getattr(model, "get_base_model", lambda: model)()).__name__ == T5:
        options["decoder_input_ids"] = IDS
    return model(input_ids=IDS, **options).logits


def check_training(feature: Feature, ours: Any, theirs: Any) -> None:
    """Output and every gradient; of one factor in two places the sum of PEFT's two."""
    for model in (ours, theirs):
        run(model).square().mean().backward()
    found, expected = gradients_of(ours), gradients_of(theirs)
    embedding = f"base_model.model.{input_embedding_name(ours.get_base_model())}.lora_embedding"
    for end, own in (("A", "B"), ("B", "A")):
        head = f"base_model.model.lm_head.lora_{end}.default.weight"
        if head in expected and is_view(feature, head):
            of_head = expected.pop(head)
            sole = expected[f"{embedding}_{own}.default"]  # T5 calls copies of its embedding
            expected[f"{embedding}_{own}.default"] = of_head.t() + (0 if sole is None else sole)
    assert_same_gradients(found, expected)
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.drawn(1 / 3)
@pytest.mark.parametrize("name", FEATURES)
def test_as_peft(name: str, tmp_path: Path) -> None:
    """Training, files both ways, without it, beside base rows, merged, unmerged, unloaded."""
    feature = FEATURES[name]
    counted = fastlora.estimate(feature.base().double(), fastlora.LoraConfig(r=2, **feature.config))
    ours = made(feature, fastlora)
    if "layer_replication" in feature.config:
        assert ours.config.num_hidden_layers == 4
    trained = [p for p in ours.parameters() if p.requires_grad]
    assert counted.adapter_parameters == sum(p.numel() for p in trained)
    assert counted.weight_bytes == sum(p.nbytes for p in trained)
    expected, models = run(ours).detach(), [ours]
    if "all" not in feature.alone:
        models.append(made(feature, peft))
        check_twin(feature, *models, expected)
    # Of layers inside of its model PEFT writes no config that says what they are.
    models = models[:1] if feature.inside else models
    alone = set(feature.alone) - {"config"} or feature.inside
    readers = (fastlora,) if alone else (fastlora, peft)
    assert_files_cross(models, lambda: feature.base().double(), run, expected, tmp_path, readers)
    if len(models) == 2:
        check_same_keys(*(load_adapter_folder(tmp_path / f"saved{i}").tensors for i in (0, 1)))
    if "target_parameters" in feature.config:
        for number in range(len(models)):
            check_pool(feature, tmp_path / f"saved{number}", expected)
    with torch.no_grad():
        check_merging(feature, ours, expected)


def check_pool(feature: Feature, folder: Path, expected: torch.Tensor) -> None:
    """In a pool, its row of a batch is what it gives alone."""
    base, fields = feature.base().double(), ("target_modules", "target_parameters")
    plain = run(base)
    with (
        fastlora.AdapterPool(base, **{f: feature.config[f] for f in fields}) as pool,
        torch.no_grad(),
    ):
        pool.load("a", folder)
        found = run(base, adapter_names=["a", None])
    assert_near(found[0], expected[0], "its row in a pool")
    assert_near(found[1], plain[1], "a base row in a pool")


def check_twin(feature: Feature, ours: Any, theirs: Any, expected: torch.Tensor) -> None:
    """Output and gradients, of a patched model too; status; what the config became."""
    if "values" not in feature.alone:
        assert_near(expected, run(theirs).detach(), "output")
        check_training(feature, ours, theirs)
        patched = made(feature, peft)
        fastlora.patch(patched)
        run(patched).square().mean().backward()
        both = (
            {n: g for n, g in gradients_of(m).items() if g is not None} for m in (patched, theirs)
        )
        assert_same_gradients(*both)
    views = [p for n, p in theirs.named_parameters() if is_view(feature, n)]
    assert_same_status(ours, theirs, sum(p.numel() for p in views))
    for field in () if "config" in feature.alone else ("target_modules", "modules_to_save"):
        mine, its = (getattr(m.peft_config["default"], field) for m in (ours, theirs))
        assert mine == its, field


def check_same_keys(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Of the same shapes and dtypes."""
    shapes = [{key: (t.shape, t.dtype) for key, t in tensors.items()} for tensors in (ours, theirs)]
    assert shapes[0] == shapes[1]


OTHERS: dict[str, dict[str, Any]] = {
    "a target of another adapter": {"target_modules": ["q_proj"]},
    "beside trainable tokens": {"target_modules": ["lm_head"], "trainable_token_indices": [1]},
    "a target": {"target_modules": ["q_proj", "lm_head"]},
    "a target by an expression": {"target_modules": ".*(q_proj|lm_head)"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_base_embeddings_in_files_are_those_that_peft_saves(name: str, tmp_path: Path) -> None:
    """Where an adapter targets one itself, and trains no tokens."""
    for library in (fastlora, peft):
        folder = tmp_path / library.__name__
        model = library.get_peft_model(
            tiny("LlamaForCausalLM"), library.LoraConfig(target_modules=["lm_head", "v_proj"])
        )
        model.add_adapter("other", library.LoraConfig(**OTHERS[name]))
        model.save_pretrained(folder, selected_adapters=["other"])
    files = [load_adapter_folder(tmp_path / n / "other") for n in ("fastlora", "peft")]
    check_same_keys(files[0].tensors, files[1].tensors)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("targets", [["c_attn"], ["lm_head"], ["c_attn", "lm_head"]])
def test_fan_in_fan_out_in_files_is_what_the_targets_say(
    given: bool, targets: list[str], tmp_path: Path
) -> None:
    """Whatever the caller's config says, as in PEFT. A warning says where True is ignored."""
    found = []
    for library in (fastlora, peft):
        config = library.LoraConfig(target_modules=targets, fan_in_fan_out=given)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = library.get_peft_model(tiny("GPT2LMHeadModel"), config)
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
        warned = any("Setting fan_in_fan_out to False" in str(each.message) for each in caught)
        found.append((stored, given and warned))
    assert found[0] == found[1]


@pytest.mark.parametrize("given", [None, ["pooler"]])
def test_modules_to_save_in_files_have_the_heads_of_the_task(
    given: list[str] | None, tmp_path: Path
) -> None:
    """All that PEFT looks for, whichever of them the model has, and those of the caller."""
    found = []
    for library in (fastlora, peft):
        config = library.LoraConfig(
            target_modules=["query"], task_type="SEQ_CLS", modules_to_save=copy.copy(given)
        )
        model = library.get_peft_model(tiny("BertForSequenceClassification"), config)
        model.save_pretrained(tmp_path)
        found.append(json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"])
    assert found[0] == found[1]


def check_merging(feature: Feature, model: Any, expected: torch.Tensor) -> None:
    """Without the adapter, beside base rows, merged and unmerged, and as a bare model."""
    with model.disable_adapter():
        plain = run(model)
    if not {"bias", "layer_replication"} & feature.config.keys():
        assert torch.equal(plain, run(feature.base().double()))
    assert not torch.allclose(plain, expected)
    mixed = run(model, adapter_names=["default", None])
    assert_near(mixed[0], expected[0], "its row")
    assert_near(mixed[1], plain[1], "a base row")
    before = copy.deepcopy(model.state_dict())
    if feature.unmerged:
        for names in (None, ["default"]):
            with unchanged(model), pytest.raises(AdapterStateError, match=feature.unmerged):
                model.merge_adapter(names)
    else:
        model.merge_adapter()
        assert_near(run(model), expected, "merged")
        with model.disable_adapter():
            assert torch.equal(run(model), plain)
        assert_near(run(model), expected, "merged again")
        # What is merged stays merged when the adapters are taken out (R4).
        assert_near(run(copy.deepcopy(model).unload()), expected, "merged and unloaded")
        with pytest.raises(AdapterStateError, match="while they are merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert_near(run(model), expected, "unmerged")
    together = tied(model.get_base_model()) and not feature.apart
    merged = model.merge_and_unload(safe_merge=True)
    assert_near(run(merged), expected, "unloaded")
    if feature.apart and "trainable_token_indices" not in feature.config:
        embeddings = (m.get_input_embeddings().weight for m in (merged, feature.base().double()))
        assert torch.equal(*embeddings)
    said = getattr(getattr(merged, "config", None), "tie_word_embeddings", False)
    assert tied(merged) == together == said


def tied(model: Any) -> bool:
    """Whether input and output embeddings have one weight."""
    if not hasattr(model, "get_output_embeddings"):
        return False
    found = (getattr(model, f"get_{end}_embeddings")() for end in ("input", "output"))
    one, other = (getattr(module, "get_base_layer", lambda m=module: m)() for module in found)
    return one.weight is other.weight
