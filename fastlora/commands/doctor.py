"""Check whether fastlora works here, and which layers of a model it will fuse.

The output lists the installed and the supported versions, the devices and whether the kernels run
on them, and the environment variables of fastlora. With MODEL, it also shows which layers of the
model would be fused with an adapter, and why others would not. The weights of the model are read
only if they are quantized.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora import env
from fastlora.command_line import install_command, parse_arguments
from fastlora.commands.system_checks import (
    DoctorFindings,
    check_environment_variables,
    check_gpus_and_test_launches,
    check_packages,
    check_python,
    describe_devices,
)
from fastlora.validation import CheckpointError, FastLoraError

if TYPE_CHECKING:
    from torch import nn

    from fastlora.integrations.report import FusionReport

_SHOWN_NAMES = 4
_ALIGNMENT = 16  # bytes


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``fastlora doctor``, and print the findings.

    Return the exit code, which is 1 if a problem was found and 0 otherwise.
    """
    parser = argparse.ArgumentParser(
        prog="fastlora doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 no problems found, 1 problems found, 2 wrong usage.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", type=Path, help="folder of a model")
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        type=Path,
        help="folder of an adapter (default: a new adapter on every linear layer)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parse_arguments(parser, argv)
    if args.adapter is not None and args.model is None:
        parser.error("--adapter needs MODEL, the folder of the model that it belongs to")
    found = DoctorFindings()
    facts: dict[str, Any] = {
        "python": check_python(found),
        "platform": platform.platform(),
        "packages": list(check_packages(found)),
        "devices": list(describe_devices()),
        "environment": env.variables_in_use(),
        "vllm": _vllm_plugin_facts(),
    }
    check_gpus_and_test_launches(facts["devices"], found)
    check_environment_variables(found)
    report = None
    if args.model is not None:
        report, facts["model"] = _fusion_report_and_model_facts(args.model, args.adapter, found)
    facts |= asdict(found) | {"ok": not found.problems}
    if args.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_lines(facts, report)) + "\n")
    return int(bool(found.problems))


def _vllm_plugin_facts() -> dict[str, Any] | None:
    """Return a dict of diagnostic information about fastlora's vLLM plugin.

    The result is None if vLLM is not installed.
    """
    import torch

    from fastlora.integrations.vllm.register import preview_registration

    found = preview_registration("cuda" if torch.cuda.is_available() else "cpu")
    return None if found is None else found._asdict()


def _fusion_report_and_model_facts(
    folder: Path, adapter: Path | None, found: DoctorFindings
) -> tuple[FusionReport | None, dict[str, Any]]:
    """Return the fusion report of a model with an adapter, and a dict that describes the model.

    The dict can be written as JSON. Findings are added to ``found``. If the model cannot be loaded,
    the error is added to the problems, and the report is None.
    """
    from fastlora.layers.fallback_reasons import DORA_WITH_DROPOUT

    facts: dict[str, Any] = {"path": str(folder)}
    if adapter is not None:
        facts["adapter"] = str(adapter)
    fix = (
        "pass a model folder, which has a config.json; for an adapter folder, run "
        "`fastlora inspect DIR`"
    )
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            base, quantization = _load_model_and_quantization_method(folder)
            kind = type(base).__name__
            if adapter is not None:
                fix = (
                    "pass a folder of an adapter of this model to --adapter; "
                    "`fastlora inspect DIR` shows the contents of an adapter folder"
                )
            report, left_out = _fusion_report_and_layers_without_adapter(base, adapter)
    except (FastLoraError, OSError, ImportError) as error:
        if isinstance(error, ImportError):
            what = f"checking a MODEL failed: a package cannot be imported ({error})"
            found.add_problem(what, install_command("hf"))
        else:
            found.add_problem(str(error), fix)
        return None, facts
    here = Path(__file__).parents[1]
    ours = [w for w in caught if Path(w.filename).is_relative_to(here)]
    found.notes += [" ".join(str(w.message).split()) for w in ours]
    if any(row.reason == DORA_WITH_DROPOUT for row in report.rows):
        found.notes.append("with lora_dropout=0, DoRA is also fused in training")
    facts |= {"class": kind, "quantization": quantization, "eligible": report.fused}
    facts["quantised"] = quantization  # The keys "quantised" and "siblings" are old.
    facts |= {"implementation": report.implementation, "reason": report.reason}
    layers = [{**asdict(row), "siblings": row.shared_input} for row in report.rows]
    facts |= {"layers": layers, "without_adapter": left_out}
    return report, facts


def _load_model_and_quantization_method(folder: Path) -> tuple[nn.Module, str | None]:
    """Load a model, and return it with the name of its quantization method.

    If the model is not quantized, the name is None, and the model is on the meta device, without
    weight values.

    Raises:
        CheckpointError: The folder has no model, or transformers cannot create it.
        ImportError: transformers, or a library that the quantized model needs, is not installed.
    """
    import torch

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: not a model folder (it has no config.json)")
    library: Any = importlib.import_module("transformers")
    from fastlora.integrations.transformers import convert_model_load_errors, quiet_transformers

    with convert_model_load_errors(folder), quiet_transformers():
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        quantization = getattr(config, "quantization_config", None)
        if quantization is not None:
            # Whether kernels can read quantized weights depends on the weights themselves.
            model = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
            # Weights in a mapped file may be unaligned; on a GPU they are aligned.
            for parameter in model.parameters():
                if parameter.data_ptr() % _ALIGNMENT:
                    parameter.data = parameter.data.clone()
            method = model.config.quantization_config.quant_method
            return model, str(getattr(method, "value", method))
        with torch.device("meta"):
            dtype = getattr(config, "dtype", None) or torch.float32
            return library.AutoModelForCausalLM.from_config(config, dtype=dtype), None


def _fusion_report_and_layers_without_adapter(
    base: nn.Module, adapter: Path | None
) -> tuple[FusionReport, list[str]]:
    """Return a model's fusion report and the names of its layers that have no adapter.

    Only linear layers are listed. The report is for the model with the adapter, on the accelerator,
    or on the CPU if no accelerator is available. If ``adapter`` is None, a new adapter is used.
    """
    import torch

    from fastlora.integrations.report import auto_implementation, fusion_report
    from fastlora.layers import LoraLayer
    from fastlora.layers.base_layers import linear_features
    from fastlora.model import LoraModel, get_peft_model
    from fastlora.model.recommend import recommend

    if adapter is None:
        model = get_peft_model(base, recommend(base).config())
    else:
        model = LoraModel.from_pretrained(base, adapter)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    chosen, reason = auto_implementation(device or torch.device("cpu"))
    report = fusion_report(model.train())
    # No forward pass has run, so the shared-input groups are unknown.
    rows = tuple(replace(row, shared_input="") for row in report.rows)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    within = tuple(f"{name}." for name in adapted)
    left_out = [
        name
        for name, module in model.named_modules()
        if linear_features(module) and name not in adapted and not name.startswith(within)
    ]
    return replace(report, rows=rows, implementation=chosen, reason=reason), left_out


def _lines(facts: dict[str, Any], report: FusionReport | None) -> Iterator[str]:
    from fastlora.integrations.report import fold_similar_rows, format_table

    python = facts["python"]
    rows = [("", "installed", "supported", "needed for")]
    rows.append(("python", python["version"], python["supported"], ""))
    rows += [
        (p["name"], p["version"] or "no", p["supported"] or "", p["needed_for"] or "")
        for p in facts["packages"]
    ]
    yield from format_table(rows)
    yield ""
    for entry in facts["devices"]:
        yield f"{entry['device']:<8} {entry['implementation']:<8} {entry['why']}"
        if "arch" in entry:
            of = entry["tables"] or "none"
            yield f"{'':<17} {entry['arch']}, {entry['processors']} processors; configs: {of}"
        if entry["trial"]:
            yield f"{'':<17} test launch: {entry['trial']}"
    yield ""
    variables = [f"{name}={value}" for name, value in facts["environment"].items()]
    yield f"environment: {', '.join(variables) or 'no fastlora variable is set'}"
    vllm = facts["vllm"]
    if vllm is not None:
        known, enabled = "known" if vllm["known"] else "unknown", "on" if vllm["enabled"] else "off"
        yield f"vLLM {vllm['version']} ({known}): plugin {enabled}, replaced parts: {vllm['parts']}"
    model = facts.get("model")
    if report is not None and model is not None:
        what = f"adapter {model['adapter']}" if "adapter" in model else "a new adapter"
        bits = f", quantized by {model['quantization']}" if model["quantization"] else ""
        yield from (
            "",
            f"{model['path']}: {model['class']}{bits}, with {what}, in training",
            str(report),
        )
        if model["without_adapter"]:
            names = model["without_adapter"]
            if len(names) > _SHOWN_NAMES:
                names = [name for (name,) in fold_similar_rows([(n,) for n in names])]
            yield f"linear layers without an adapter: {', '.join(names)}"
    for note in facts["notes"]:
        yield from ("", f"note: {note}")
    yield ""
    for problem in facts["problems"]:
        yield from (f"problem: {problem['problem']}", f"    fix: {problem['fix']}")
    if facts["ok"]:
        yield "No problems found."
