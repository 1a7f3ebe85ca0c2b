"""The recipes of examples/recipes/ run, and give what they say; long ones by ``make recipes``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlora
from tests.support.tiny import randomize

pytest.importorskip("transformers", reason="the models of the recipes are transformers'")
pytest.importorskip("peft", reason="the recipes compare with it")

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
long = pytest.mark.skipif(
    not os.environ.get("FASTLORA_RECIPES"), reason="takes long; make recipes runs it"
)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``recipe(name)`` imports one, as if it was started where it lies."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent))

    def load(name: str) -> Any:
        for known in ("shared", "tiny", name):
            monkeypatch.delitem(sys.modules, known, raising=False)
        return importlib.import_module(name)

    return load


def test_every_recipe_is_listed_and_tested() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"shared"}
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\w+)\.py\)", page)) == names
    loaded = set(
        re.findall(r"recipe\(\"(\w+)\"\)|FOLDER / \"(\w+)\.py\"", Path(__file__).read_text())
    )
    assert {a or b for a, b in loaded} == names
    for name in names:
        text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
        assert text and f"examples/recipes/{name}.py" in text or name == "axolotl_plugin"


# ---------------------------------------------------------------------------------------- training


def test_trl_sft(recipe: Any) -> None:
    for library in ("trl", "datasets"):
        pytest.importorskip(library, reason="TRL's trainer")
    result = recipe("trl_sft").main()
    first, *_ = result["our model"]  # factors are drawn at another moment; B is zero at first
    assert result["peft_config"][0] == pytest.approx(first, rel=1e-4)
    assert result["peft_config"] == pytest.approx(result["our model"], rel=0.1)
    assert result["peft_config"][-1] < 0.8 * result["peft_config"][0]
    assert result["eligible"] == 14 and result["class"] == "LoraModel"


def test_hf_trainer(recipe: Any) -> None:
    result = recipe("hf_trainer").main()
    assert result["losses"][-1] < 0.6 * result["losses"][0]
    assert result["PEFT's logits differ by"] < 1e-4


def test_experts_sft(recipe: Any) -> None:
    for library in ("trl", "datasets"):
        pytest.importorskip(library, reason="TRL's trainer")
    result = recipe("experts_sft").main()
    assert result["losses"][-1] < 0.8 * result["losses"][0]
    assert (result["factors of experts"], result["factors of routers"]) == (2 * 4, 0)
    assert result["PEFT's logits differ by"] < 1e-4


def test_qlora(recipe: Any) -> None:
    pytest.importorskip("bitsandbytes", reason="quantizes")
    result = recipe("qlora").main()
    assert result["ours"][-1] < 0.5 * result["ours"][0]
    assert result["PEFT's, patched"] == pytest.approx(result["ours"], rel=1e-2)
    assert result["patched layers"] == 14


def test_continue_training(recipe: Any) -> None:
    result = recipe("continue_training").main()
    assert result["loaded"] == pytest.approx(result["saved"], rel=1e-5)
    assert result["went on"] < 0.8 * result["saved"] < 0.8 * result["first"]


def test_two_processes_alone(recipe: Any) -> None:
    """In one process the script is a loop of accelerate's."""
    pytest.importorskip("accelerate", reason="runs it")
    result = recipe("two_processes").main()
    assert result["losses"][-1] < result["losses"][0] and len(result["sums"]) == 1


@long
def test_two_processes() -> None:
    """Two give one's losses, and hold one adapter."""
    script = str(FOLDER / "two_processes.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = []
    for count in ("1", "2"):
        done = subprocess.run(
            [*launch, "--nproc-per-node", count, script], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(ast.literal_eval(done.stdout.strip().splitlines()[-1]))
    one, two = found
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["sums"][0] == two["sums"][1] == pytest.approx(one["sums"][0], rel=1e-3)


# ------------------------------------------------------------------------- beside other libraries


def replaced(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Liger replaces in Llama's module, by plain functions that note their calls."""
    calls: list[str] = module.__dict__.setdefault("stand_in_calls", [])

    class Norm(torch.nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            super().__init__()
            self.weight, self.eps = torch.nn.Parameter(torch.ones(size)), eps

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append("norm")
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    class Mlp(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            sizes = (config.hidden_size, config.intermediate_size)
            self.gate_proj = torch.nn.Linear(*sizes, bias=False)
            self.up_proj = torch.nn.Linear(*sizes, bias=False)
            self.down_proj = torch.nn.Linear(*reversed(sizes), bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append("mlp")
            return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    monkeypatch.setattr(module, "LlamaRMSNorm", Norm)
    monkeypatch.setattr(module, "LlamaMLP", Mlp)


def test_liger(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in replaces classes before: the same losses, and layers as eligible as without."""
    from transformers.models.llama import modeling_llama

    page = recipe("liger")
    torch.manual_seed(0)
    plain = page.main(apply=lambda: None)
    torch.manual_seed(0)
    found = page.main(apply=lambda: replaced(modeling_llama, monkeypatch))
    assert {"norm", "mlp"} <= set(modeling_llama.stand_in_calls)
    monkeypatch.delattr(modeling_llama, "stand_in_calls")
    assert found["before"] == pytest.approx(plain["before"], rel=1e-5)
    assert found["trained"] == pytest.approx(plain["trained"], rel=1e-2)
    assert found["trained"] < 0.8 * found["before"]
    assert found["eligible"] == plain["eligible"] == found["layers"] == 14
    if importlib.util.find_spec("liger_kernel") is None:
        with pytest.raises(ModuleNotFoundError, match="liger"):
            page.main()


@pytest.mark.parametrize("first", ["liger", "adapters"])
def test_forwards_replaced_on_a_model(recipe: Any, first: str) -> None:
    """As Liger's `model=` does: the order does not matter, gradients are the same."""
    page = recipe("liger")

    def of_instance(model: torch.nn.Module) -> None:
        for module in model.modules():
            if hasattr(module, "gate_proj"):
                module.forward = types.MethodType(
                    lambda self, x: self.down_proj(
                        torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)
                    ),
                    module,
                )

    found = []
    for replaces in (False, True):
        base = page.base_model()
        if replaces and first == "liger":
            of_instance(base)
        config = fastlora.LoraConfig(r=4, target_modules=page.TARGETS, task_type="CAUSAL_LM")
        model = fastlora.get_peft_model(base, config)
        randomize(model)
        if replaces and first == "adapters":
            of_instance(model)
        ids = torch.tensor(page.tokenizer()(page.texts()).input_ids)
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 28
    for plain, own in zip(*found, strict=True):
        assert torch.allclose(plain, own, rtol=1e-5, atol=1e-7)


def test_axolotl_plugin(
    recipe: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loader's calls in its order, on a stand-in for its base class."""
    import peft

    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = object  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    plugin = recipe("axolotl_plugin").FastLoraPlugin()
    page = recipe("liger")
    with pytest.raises(ValueError, match="lora_qkv_kernel: set to false"):
        plugin.pre_model_load(types.SimpleNamespace(lora_qkv_kernel=True))
    cfg = types.SimpleNamespace(lora_qkv_kernel=None)  # Axolotl's gives None for what is not set
    plugin.pre_model_load(cfg)
    model = peft.get_peft_model(page.base_model(), peft.LoraConfig(target_modules=page.TARGETS))
    plugin.post_lora_load(cfg, model)
    assert "14 of 14 LoRA layers are eligible" in capsys.readouterr().out
    assert fastlora.fusion_report(model).fused == 14


# ----------------------------------------------------------------------------------------- exports


def saved(folder: Path, base: Any, **config: Any) -> Any:
    """An adapter with random factors in a folder, and its model."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "up_proj"]}
    options |= {"task_type": "CAUSAL_LM", **config}
    model = fastlora.get_peft_model(base, fastlora.LoraConfig(**options))
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


MANY = {
    "rank_pattern": {"q_proj": 2, "up_proj": 6},
    "alpha_pattern": {"layers.1.mlp.up_proj": 5},
    "use_rslora": True,
}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, MANY], ids=["plain", "rs", "many"])
def test_export_vllm(recipe: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    """One rank and one scaling for all, the names that vLLM parses, and PEFT computes the same."""
    import peft

    page, base = recipe("export_vllm"), recipe("liger").base_model
    model = saved(tmp_path / "adapter", base(), **config)
    written = page.export_adapter(tmp_path / "adapter", tmp_path / "out")
    tensors = page.load_file(tmp_path / "out" / "adapter_model.safetensors")
    pattern = r"base_model\.model\.(.+)\.lora_[AB]\.weight"
    modules = {match[1] for match in map(re.compile(pattern).fullmatch, tensors) if match}
    assert len(tensors) == 2 * len(modules) == 12
    assert modules <= {name for name, _ in base().named_modules()}
    assert {t.shape[0 if "lora_A" in key else 1] for key, t in tensors.items()} == {written["r"]}
    assert page.max_lora_rank(written["r"]) == 8
    ids = torch.randint(0, 16, (2, 7))
    twin = peft.PeftModel.from_pretrained(base(), str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert torch.allclose(twin(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_what_vllm_does_not_read(recipe: Any, tmp_path: Path) -> None:
    """Refused, and nothing is written; merged it is a plain model."""
    from transformers import AutoModelForCausalLM

    page, base = recipe("export_vllm"), recipe("liger").base_model
    model = saved(tmp_path / "adapter", base(), use_dora=True)
    with pytest.raises(ValueError, match="vLLM does not read use_dora; merge the adapter"):
        page.export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ids = torch.randint(0, 16, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("config", [{}, MANY], ids=["plain", "many"])
def test_export_gguf(recipe: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    """Base and adapter added up in GGUF's layout, read by transformers: the adapter's logits."""
    gguf = pytest.importorskip("gguf", reason="writes the files")
    from transformers import AutoModelForCausalLM

    page = recipe("export_gguf")
    base = recipe("liger").base_model(attention_bias=False)
    base.save_pretrained(tmp_path / "base")
    model = saved(tmp_path / "adapter", base, **config)
    page.export_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "adapter.gguf")
    page.export_model(tmp_path / "base", tmp_path / "base.gguf")

    def read(name: str) -> tuple[Any, dict[str, Any]]:
        reader = gguf.GGUFReader(tmp_path / name)
        return reader, {tensor.name: tensor.data for tensor in reader.tensors}

    reader, factors = read("adapter.gguf")
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert alpha == (0 if config else 6)
    _, weights = read("base.gguf")
    assert {"blk.0.attn_q.weight.lora_a", "blk.1.ffn_up.weight.lora_b"} <= set(factors)
    added = dict(weights)
    for key, a in factors.items():
        if key.endswith(".lora_a"):
            name = key.removesuffix(".lora_a")
            b = factors[f"{name}.lora_b"]
            # As llama.cpp: the shapes have to fit, and alpha 0 is none.
            assert a.shape[1] == weights[name].shape[1] and b.shape[0] == weights[name].shape[0]
            assert a.shape[0] == b.shape[1]
            added[name] = weights[name] + (alpha / a.shape[0] if alpha else 1.0) * (b @ a)
    assert sum((added[name] != weights[name]).any() for name in weights) == 6
    # The base's file with the sums in its place, for a reader that is not ours.
    page_numbers = page._numbers
    order = iter(added.values())
    page._numbers = lambda tensor: next(order)
    try:
        page.export_model(tmp_path / "base", tmp_path / "sum.gguf")
    finally:
        page._numbers = page_numbers
    ids = torch.randint(0, 16, (2, 7))
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="base.gguf")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="sum.gguf")
        with model.disable_adapter():
            assert torch.allclose(
                bare(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5
            )
        assert torch.allclose(theirs(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
        assert not torch.allclose(
            theirs(input_ids=ids).logits, bare(input_ids=ids).logits, atol=1e-2
        )


def test_what_gguf_does_not_hold(recipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writes the files")
    page, base = recipe("export_gguf"), recipe("liger").base_model()
    base.save_pretrained(tmp_path / "base")
    saved(tmp_path / "adapter", base, use_dora=True)
    with pytest.raises(ValueError, match="a GGUF adapter has lora_A and lora_B alone, found"):
        page.export_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


@long
def test_export_gguf_of_smollm2(recipe: Any, tmp_path: Path, fresh_smollm2: Any) -> None:
    """A real model with its tokenizer: transformers reads both back from the file."""
    pytest.importorskip("gguf", reason="writes the files")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastlora.commands import smollm2

    page = recipe("export_gguf")
    folder = smollm2.converted_smollm2_dir(progress=False)
    page.export_model(folder, tmp_path / "model.gguf", "smollm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "Why is the sea salty? <|im_end|>\n It's 42, isn't it?"
    assert again(text).input_ids == tokenizer(text).input_ids
    ids = torch.tensor([tokenizer(text).input_ids])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf")
    with torch.no_grad():
        expected = fresh_smollm2()(input_ids=ids).logits
        assert torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
