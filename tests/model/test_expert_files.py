"""Files of adapters on experts: from PEFT and back, and those of transformers 4."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fastlora
from fastlora import AdapterPool, LoraConfig, LoraModel, adapters, get_peft_model
from fastlora.model.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from fastlora.model.expert_files import infer_settings_of_layers_in_file
from fastlora.model.stacked_experts import FORMER_NAMES
from fastlora.model.targets import select_targets
from fastlora.validation import CheckpointError
from tests.support.moe_models import MODELS, moe_model
from tests.support.peft_twins import peft
from tests.support.tiny import unchanged

IDS = torch.arange(12).view(2, 6)
PREFIX = "base_model.model."
PROJECTIONS = ["gate_proj", "up_proj", "down_proj"]
BOTH = ["gate_up_proj", "down_proj"]
# Adapters of the same modules in PEFT and in fastlora.
SAVED: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {"target_modules": "all-linear"}),
    ("mixtral", {"target_modules": ["o_proj", "w1", "w2", "w3", "gate"]}),
    ("olmoe", {"target_modules": r".*\.(o_proj|down_proj)"}),
    ("olmoe", {"target_modules": PROJECTIONS, "rank_pattern": {"(gate_up_proj)": 3}}),
    ("qwen3_moe", {"target_modules": PROJECTIONS, "layers_to_transform": [1]}),
    ("qwen3_moe", {"target_modules": r".*layers\.1\..*(o|gate|up|down)_proj"}),
    ("qwen3_moe", {"target_modules": "all-linear", "exclude_modules": ["gate", "0.mlp.experts"]}),
    ("deepseek_v3", {"target_modules": ["o_proj"], "target_parameters": BOTH}),
    ("deepseek_v3", {"target_modules": "all-linear", "exclude_modules": r".*(mlp|expert).*_proj"}),
    ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": [*BOTH, "router.weight"]}),
    ("llama4_text", {"target_parameters": ["feed_forward.experts.down_proj"]}),
    ("nemotron_h", {"target_modules": ["o_proj"], "target_parameters": ["experts.up_proj"]}),
    ("olmoe", {"target_parameters": ["q_proj.weight"], "rank_pattern": {"q_proj.weight": 3}}),
    ("olmoe", {"target_parameters": ["0.mlp.gate.weight"], "rank_pattern": {"gate.weight": 3}}),
]


def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(input_ids=IDS).logits.detach()
    return logits


def logits_in_pool(kind: str, folder: Path, **targets: Any) -> torch.Tensor:
    """The logits of a pool that has read the adapter in a folder, for two samples."""
    model = moe_model(kind)
    with AdapterPool(model, **targets) as pool:
        pool.load("a", folder)
        with adapters(pool, ["a", "a"]):
            return logits_of(model)


def adapted(kind: str, **fields: Any) -> LoraModel:
    """Returns a model with an adapter of random factors."""
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **fields)
    return get_peft_model(moe_model(kind), config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), SAVED, ids=str)
def test_saved_adapters_load_in_peft(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Logits are equal, also of subsets of the experts, and again in fastlora (E1, E2)."""
    model = adapted(kind, **fields)
    expected, base = logits_of(model), logits_of(moe_model(kind))
    assert (expected - base).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twin = peft.PeftModel.from_pretrained(moe_model(kind), tmp_path)
    assert not [w for w in caught if "missing" in str(w.message)]
    torch.testing.assert_close(logits_of(twin), expected, rtol=0, atol=1e-6)
    again = LoraModel.from_pretrained(moe_model(kind), tmp_path)
    assert torch.equal(logits_of(again), expected)
    again.save_pretrained(tmp_path / "again")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), SAVED[2:6], ids=str)
def test_converted_adapters_load_in_peft(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(kind, **fields)
    fastlora.save_as_lora(tmp_path, model, 1.0)
    for library in (peft, fastlora):
        twin = library.PeftModel.from_pretrained(moe_model(kind), tmp_path)
        torch.testing.assert_close(logits_of(twin), logits_of(model), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "fields"), SAVED, ids=str)
def test_files_of_peft_load(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """The tensors decide: PEFT ignores exclude_modules and layers_to_transform (E1)."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **fields)
    twin = peft.get_peft_model(moe_model(kind), config)
    twin.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "these config values match no module: exclude_modules")
        model = LoraModel.from_pretrained(moe_model(kind), tmp_path)
        # The routers of this model type are no targets of a pool unless it names them.
        targets = {"target_parameters": [*BOTH, "router.weight"]} if kind == "gpt_oss" else {}
        in_pool = logits_in_pool(kind, tmp_path, **targets)
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=0, atol=1e-6)
    torch.testing.assert_close(in_pool, logits_of(twin), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("targets", "dropped"),
    [
        ("all-linear", ["mlp", "mlp.shared_experts"]),
        (["o_proj", *PROJECTIONS], ["mlp", "mlp.shared_experts"]),
        (r".*(o_proj|shared_experts\.(gate|up|down)_proj)", ["mlp.shared_experts"]),
    ],
)
def test_linears_that_peft_drops(
    targets: str | list[str], dropped: list[str], tmp_path: Path
) -> None:
    """Saving names them once, fastlora loads them, and PEFT loads all the others (E2)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted("deepseek_v3", target_modules=targets)
    expected = logits_of(model)
    with pytest.warns(UserWarning, match=r"PEFT 0.21.2 ignores the factors") as caught:
        model.save_pretrained(tmp_path)
    (said,) = [str(w.message) for w in caught]
    names = {part for part in said.split("'") if ".mlp." in part}
    assert names == {f"model.layers.*.{outer}.{end}" for outer in dropped for end in PROJECTIONS}
    again = LoraModel.from_pretrained(moe_model("deepseek_v3"), tmp_path)
    assert torch.equal(logits_of(again), expected)
    configs = (model.peft_config["default"], again.peft_config["default"])
    found, found_again = (select_targets(moe_model("deepseek_v3"), each) for each in configs)
    assert found_again.modules == found.modules
    assert found_again.parameters.names == found.parameters.names
    with pytest.warns(UserWarning, match=r"PEFT 0.21.2 ignores the factors"):
        again.save_pretrained(tmp_path / "again")
    twin = peft.PeftModel.from_pretrained(moe_model("deepseek_v3"), tmp_path)
    linears = [f"{outer}.{end}" for outer in dropped for end in PROJECTIONS]
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if any(f".{linear}.lora_B." in name for linear in linears):
                factor.zero_()
    torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=0, atol=1e-6)


@pytest.mark.parametrize("targets", [["gate"], r".*\.(o_proj|gate)"])
def test_a_router_that_is_a_linear_layer(
    targets: str | list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is a target module, and PEFT loads it as the parameter that it converts `gate` to (E2)."""
    fields = {"num_dense_layers": 1, "num_experts": 4, "head_dim": 8, "moe_intermediate_size": 8}
    monkeypatch.setitem(MODELS, "afmoe", fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapted("afmoe", target_modules=targets)
        model.save_pretrained(tmp_path)
        again = LoraModel.from_pretrained(moe_model("afmoe"), tmp_path)
        again.save_pretrained(tmp_path / "again")
    router = "model.layers.1.mlp.router.gate"
    assert router in model.base_model.targeted_module_names
    data = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert data["target_parameters"] == [f"{router}.weight"]
    assert data == json.loads((tmp_path / "again" / CONFIG_NAME).read_text())
    assert torch.equal(logits_of(again), logits_of(model))
    twin = peft.PeftModel.from_pretrained(moe_model("afmoe"), tmp_path)
    torch.testing.assert_close(logits_of(twin), logits_of(model), rtol=0, atol=1e-6)


def write_per_expert_file(
    folder: Path, kind: str, names: list[str], *, ranks: dict[str, int], **fields: Any
) -> dict[str, torch.Tensor]:
    """Writes an adapter of transformers 4: factors of linear layers for each expert.

    Returns:
        The update of each parameter of the model, in float64.
    """
    generator, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["o_proj", *names], **fields)
    updates: dict[str, torch.Tensor] = {}

    def add(layer: str, old: str, weight: torch.Tensor) -> torch.Tensor:
        rank = ranks.get(old, 2)
        a = torch.randn(rank, weight.shape[1], generator=generator)
        b = torch.randn(weight.shape[0], rank, generator=generator)
        at = PREFIX + (layer.replace(".mlp.", ".block_sparse_moe.") if kind == "mixtral" else layer)
        tensors[f"{at}.lora_A.weight"], tensors[f"{at}.lora_B.weight"] = a, b
        alpha = config.alpha_pattern.get(old, 6)
        scaling = alpha / (math.sqrt(rank) if config.use_rslora else rank)
        return scaling * b.double() @ a.double()

    for name, parameter in moe_model(kind).named_parameters():
        module, _, leaf = name.rpartition(".")
        olds = [old for old, new in FORMER_NAMES[kind].items() if name.endswith(f".{new}")]
        if parameter.dim() == 3 and set(olds) <= set(names):
            updates[name] = torch.stack(
                [
                    torch.cat(
                        [
                            add(f"{module}.{expert}.{old}", old, part)
                            for old, part in zip(olds, weight.chunk(len(olds)), strict=True)
                        ]
                    )
                    for expert, weight in enumerate(parameter)
                ]
            )
        elif leaf == "weight" and module.rpartition(".")[2] in {"o_proj", *names}:
            updates[name] = add(module, module.rpartition(".")[2], parameter)
    save_file(tensors, folder / WEIGHTS_NAME)
    data = config.to_dict() | {"rank_pattern": ranks}
    (folder / CONFIG_NAME).write_text(json.dumps(data))
    return updates


@pytest.mark.parametrize(
    ("kind", "names", "fields"),
    [
        ("mixtral", ["w1", "w2", "w3", "gate"], {}),
        ("mixtral", ["w1", "w2", "w3"], {"use_rslora": True}),
        ("mixtral", ["w1", "w3"], {}),
        ("olmoe", [*PROJECTIONS, "gate"], {}),
        ("qwen3_moe", ["down_proj"], {}),
        ("deepseek_v3", PROJECTIONS, {}),
        ("qwen3_moe", PROJECTIONS, {"ranks": {"gate_proj": 3}}),
        ("qwen3_moe", PROJECTIONS, {"ranks": {"up_proj": 4}, "alpha_pattern": {"up_proj": 12}}),
    ],
)
def test_files_of_transformers_4(
    kind: str, names: list[str], fields: dict[str, Any], tmp_path: Path
) -> None:
    """The model has the update of each expert's linear layers, and saves it for PEFT (E2)."""
    fields = {"ranks": {}} | fields
    updates = write_per_expert_file(tmp_path, kind, names, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = LoraModel.from_pretrained(moe_model(kind), tmp_path)
        in_pool = logits_in_pool(kind, tmp_path)
    merged = moe_model(kind, torch.float64, "eager")
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name in updates:
                parameter += updates[name]
    torch.testing.assert_close(logits_of(model).double(), logits_of(merged), rtol=0, atol=1e-5)
    torch.testing.assert_close(in_pool.double(), logits_of(merged), rtol=0, atol=1e-5)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    torch.testing.assert_close(logits_of(model).double(), logits_of(merged), rtol=0, atol=1e-5)
    if fields == {"ranks": {}} and kind != "deepseek_v3" and names != ["w1", "w3"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twin = peft.PeftModel.from_pretrained(moe_model(kind), tmp_path)
        torch.testing.assert_close(logits_of(model), logits_of(twin), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "lost", "words"),
    [
        (
            PROJECTIONS,
            "experts.3.down_proj",
            r"4 experts, .* for down_proj .* a different .*expert 3",
        ),
        (PROJECTIONS, ".up_proj", r"4 experts, .* for up_proj .* a different .*requires factors"),
    ],
)
def test_a_file_that_lacks_experts(names: list[str], lost: str, words: str, tmp_path: Path) -> None:
    """Missing experts, and half of a fused pair, are refused by name (E2)."""
    write_per_expert_file(tmp_path, "qwen3_moe", names, ranks={})
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    save_file({k: t for k, t in tensors.items() if lost not in k}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match=words):
        LoraModel.from_pretrained(moe_model("qwen3_moe"), tmp_path)


def test_other_orders_of_lora_b(tmp_path: Path) -> None:
    """A file of Unsloth with the expert as the slowest index is refused by its marker (E2)."""
    model = adapted("olmoe", target_parameters=["experts.down_proj"])
    model.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"lora_B_layout": "rank_major"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = LoraModel.from_pretrained(moe_model("olmoe"), tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    path.write_text(json.dumps(data | {"lora_B_layout": "grouped_by_expert"}))
    base = moe_model("olmoe")
    with (
        unchanged(base),
        pytest.raises(CheckpointError, match=r"'grouped_by_expert'.*\['experts.down_proj'\]"),
    ):
        LoraModel.from_pretrained(base, tmp_path)
    # The message says how to convert such a file.
    lora_b = torch.arange(24).view(2, 12)
    grouped = lora_b.unflatten(1, (3, 4)).transpose(1, 2).flatten(1)  # E 4, r 3
    assert torch.equal(grouped.unflatten(1, (4, 3)).transpose(1, 2).flatten(1), lora_b)


def test_sizes_that_a_file_does_not_show() -> None:
    """A number of experts that does not follow from the ranks is unknown, as its rank is."""
    config = LoraConfig(r=3, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    one_rank = {"mlp.experts": 12, "mlp.experts.base_layer": 12, "q": 3}
    found = infer_settings_of_layers_in_file(config, one_rank)
    assert found["mlp.experts"] == found["mlp.experts.base_layer"] == (3, 8, 8 / 3, 4)
    assert found["q"] == (3, 8, 8 / 3, None)
    config.rank_pattern, config.alpha_pattern = {"gate_up_proj": 6}, {"gate_up_proj": 1}
    both = infer_settings_of_layers_in_file(
        config, {"mlp.experts.base_layer": 24, "mlp.experts": 12}
    )
    assert both == {
        "mlp.experts.base_layer": (6, 1, 1 / 6, 4),
        "mlp.experts": (3, 8, 8 / 3, 4),
    }
    assert (
        infer_settings_of_layers_in_file(config, {"mlp.experts": 24})["mlp.experts"] == (None,) * 4
    )
