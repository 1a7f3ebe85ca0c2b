"""Faults of ``fastlora/commands`` and ``fastlora/integrations``."""

from __future__ import annotations

from tests.faults.fault import Fault

_CLI = "tests/commands/test_cli.py"
_PATCH = "tests/integrations/test_patch.py"

_VLLM_SLOTS = "tests/integrations/test_vllm_slots.py"
_VLLM_REGISTER = "tests/integrations/test_vllm_register.py"

FAULTS = (
    Fault(
        sentence="A chat goes on behind the tokenizer's end token, which training teaches.",
        kind="an end token left out",
        source="A2",
        path="fastlora/commands/chat.py",
        before="ends = sorted(end_token_ids(model, tokenizer))",
        after="ends = model.generation_config.eos_token_id",
        tests=("tests/commands/test_chat.py::test_it_samples_as_the_server_does",),
    ),
    Fault(
        sentence="A chat samples from the 50 most likely tokens only.",
        kind="a default of another library",
        source="A3",
        path="fastlora/commands/chat.py",
        before='        sampling["top_k"] = 0',
        after='        sampling["top_k"] = 50',
        tests=("tests/commands/test_chat.py::test_it_samples_as_the_server_does",),
    ),
    Fault(
        sentence="What other code has written in vLLM's stacks is lost when another slot changes.",
        kind="a version compared too late",
        source="4a78b89",
        path="fastlora/integrations/vllm/slots.py",
        before="            products.drop_packs_if_outdated()\n",
        after="            pass\n",
        tests=(f"{_VLLM_SLOTS}::test_a_slot_changes_after_other_code_has_written_another",),
    ),
    Fault(
        sentence="vLLM is taken over although a class that fastlora does not know sets adapters.",
        kind="a definition not compared",
        source="c06158b",
        path="fastlora/integrations/vllm/register.py",
        before="            if name in vars(cls) and (owner, name) not in known:\n",
        after="            if False:\n",
        tests=(f"{_VLLM_REGISTER}::test_a_new_class_with_a_method_of_its_own_leaves_vllm_alone",),
    ),
    Fault(
        sentence="The doctor shows a server's key.",
        kind="a secret shown",
        source="eafed83",
        path="fastlora/env.py",
        before='{name: "(set)" if name in _SECRETS else value for name, value in found.items()}',
        after="found",
        tests=("tests/commands/test_doctor.py::test_a_machine_that_is_well",),
    ),
    Fault(
        sentence="A merged model gets the base model's tokenizer where the adapter has its own.",
        kind="a file of the wrong folder",
        source="1a50363",
        path="fastlora/commands/cli.py",
        before="_copy_tokenizer(adapter, partial) or _copy_tokenizer(Path(args.base), partial)",
        after="_copy_tokenizer(Path(args.base), partial) or _copy_tokenizer(adapter, partial)",
        tests=(f"{_CLI}::test_the_adapters_tokenizer_comes_first",),
    ),
    Fault(
        sentence="A patch that is undone leaves scalings of fastlora's on PEFT's layers.",
        kind="a record left in place",
        source="3c0448f",
        path="fastlora/integrations/peft_layers.py",
        before='    scalings = dict(module.__dict__.pop("_scaling"))\n',
        after='    scalings = module.__dict__.pop("_scaling")\n',
        tests=(f"{_PATCH}::test_scalings_of_a_patched_model",),
    ),
    Fault(
        sentence="Half of a model is unpatched when a layer of it cannot be.",
        kind="half a change after a failure",
        source="c614857",
        path="fastlora/integrations/peft.py",
        before="""\
    for module in model.modules():
        check_can_unpatch(module)
    for module in model.modules():
        unpatch_layer(module)
""",
        after="""\
    for module in model.modules():
        unpatch_layer(module)
""",
        tests=(f"{_PATCH}::test_a_layer_whose_class_has_changed_is_not_unpatched",),
    ),
    Fault(
        sentence="An adapter that cannot be routed keeps later layers out of open blocks.",
        kind="layers unknown to open blocks",
        source="e5b400a",
        path="fastlora/integrations/peft_router.py",
        before="""\
                self._add_to_routed_layer_group(layers)  # even if others fail: blocks may be open
""",
        after="""\
                if not others:
                    self._add_to_routed_layer_group(layers)
""",
        tests=(
            "tests/routing/test_open_blocks.py::test_an_adapter_that_cannot_be_routed_within_a_block",
        ),
    ),
    Fault(
        sentence="Adapters of a patched model are deleted while rows of an open block use them.",
        kind="a change in an open block",
        source="eba4346",
        path="fastlora/integrations/peft.py",
        before='        self._check_no_open_block("delete_adapter")\n',
        after="",
        tests=(
            "tests/routing/test_open_blocks.py::"
            "test_operations_that_would_change_an_open_block_raise[patched-delete_adapter]",
        ),
    ),
    Fault(
        sentence="The rows of a batch of another size get wrong adapters, without an error.",
        kind="a missing check",
        source="178c4a6",
        path="fastlora/integrations/peft_router.py",
        before="""\
        check_batch_matches_ids(router.group, args, kwargs)


class _GenerateAfter""",
        after="""\
        pass


class _GenerateAfter""",
        tests=(
            "tests/integrations/test_from_peft.py::test_mixed_batches_of_injected_adapters[deepcopy]",
        ),
    ),
    Fault(
        sentence="Every mixed batch of an injected model tracks its rows again.",
        kind="a check that is repeated",
        source="178c4a6",
        path="fastlora/integrations/peft_router.py",
        before="            if not joined or [*map(id, found)] != [*map(id, before)]:\n",
        after="            if True:\n",
        tests=(
            "tests/integrations/test_from_peft.py::test_rows_of_injected_models_are_tracked_once",
        ),
    ),
    Fault(
        sentence="A block has no effect after one of another model that shares its layers.",
        kind="layers of another group",
        source="cfdcef8",
        path="fastlora/integrations/peft_router.py",
        before="""\
        joined = group.row_checks is not None and all(
            getattr(layer, "routing_group", None) is group for layer in before
        )
""",
        after="        joined = group.row_checks is not None\n",
        tests=("tests/integrations/test_from_peft.py::test_models_that_share_layers_take_turns",),
    ),
    Fault(
        sentence="A copied model does not check the rows of its layers.",
        kind="a check that a copy lacks",
        source="cfdcef8",
        path="fastlora/integrations/peft_router.py",
        before="""\
        joined = group.row_checks is not None and all(
            getattr(layer, "routing_group", None) is group for layer in before
        )
""",
        after="""\
        joined = all(getattr(layer, "routing_group", None) is group for layer in before)
""",
        tests=("tests/integrations/test_from_peft.py::test_copies_track_rows_again",),
    ),
    Fault(
        sentence="Adapters of other methods apply to all rows of a mixed batch.",
        kind="a layer that is not seen",
        source="cfdcef8",
        path="fastlora/integrations/peft_router.py",
        before="            elif isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):\n",
        after="            elif isinstance(module, (PeftLoraLayer, AuxiliaryTrainingWrapper)):\n",
        tests=("tests/integrations/test_from_peft.py::test_adapters_that_cannot_be_routed_raise",),
    ),
    Fault(
        sentence="LoRA layers outside the routed model use their active adapters.",
        kind="a layer that is not seen",
        source="cfdcef8",
        path="fastlora/integrations/peft.py",
        before="    if any(id(module) not in inside for module in adapted):\n",
        after="    if False:\n",
        tests=("tests/integrations/test_from_peft.py::test_adapters_that_cannot_be_routed_raise",),
    ),
    Fault(
        sentence="Slots of a mixed batch index the settings of a wrapper with a peft_config.",
        kind="a wrong root",
        source="f3bf933",
        path="fastlora/integrations/peft.py",
        before="    return any(id(layer) not in inside for layer in layers)\n",
        after="    return bool(layers or inside)\n",
        tests=(
            "tests/integrations/test_from_peft.py::test_wrappers_of_a_peft_model[peft_config2]",
        ),
    ),
    Fault(
        sentence="Layers injected beside a tuner apply their active adapters to all rows.",
        kind="layers that are not looked up",
        source="f3bf933",
        path="fastlora/integrations/peft_router.py",
        before="        if not search and before and joined and names == self.names:\n",
        after="        if not search and before and joined:\n",
        tests=("tests/integrations/test_from_peft.py::test_wrappers_of_a_peft_model[None]",),
    ),
    Fault(
        sentence="A model keeps its unloaded LoRA layers.",
        kind="a record left in place",
        source="406e895",
        path="fastlora/integrations/peft.py",
        before="""\
        model = super().unload()
        remove_router(model)
""",
        after="""\
        model = super().unload()
""",
        tests=("tests/integrations/test_from_peft.py::test_mixed_batches_after_unload",),
    ),
    Fault(
        sentence="Slots index the adapters of the base model instead of those of the tuner.",
        kind="a wrong root",
        source="406e895",
        path="fastlora/integrations/peft_router.py",
        before='tuple(getattr(root, "peft_config", None) or ())\n',
        after='tuple(getattr(self.model, "peft_config", None) or ())\n',
        tests=(
            "tests/integrations/test_from_peft.py::test_layers_that_are_replaced_in_the_base_model",
        ),
    ),
)
