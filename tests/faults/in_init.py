"""Faults of ``fastlora/init`` and ``fastlora/optimizers``, and of what calls them for a model."""

from __future__ import annotations

from tests.faults.fault import Fault

_DATA = "tests/init/test_data_inits.py"
_OPTIMIZERS = "tests/optimizers/test_optimizers.py"
_WEIGHTS = "tests/init/test_weight_inits.py"

FAULTS = (
    Fault(
        sentence="EVA's hooks keep the graph of a call of the model that makes one.",
        kind="a graph kept",
        source="8f2f5e8",
        path="fastlora/init/eva_search.py",
        before="            @torch.no_grad()  # even if the model runs with gradients\n",
        after="",
        tests=(f"{_DATA}::test_eva_keeps_no_graph_of_a_call_that_makes_one",),
    ),
    Fault(
        sentence="EVA scales what layers with the same inputs share once for each of them.",
        kind="a shared result taken twice",
        source="39f8770",
        path="fastlora/init/eva_search.py",
        before="            made[name] = (found.components[:rank] / scales).float()\n",
        after="            made[name] = found.components[:rank].div_(scales).float()\n",
        tests=(f"{_DATA}::test_eva_whitens_layers_with_the_same_inputs_once",),
    ),
    Fault(
        sentence="Calibrating LoRA-GA drops the gradients that the model held.",
        kind="a gradient not given back",
        source="39f8770",
        path="fastlora/init/lora_ga.py",
        before="            weight.grad = held[name]\n",
        after="            weight.grad = None\n",
        tests=(f"{_DATA}::test_lora_ga_gradients_caches_and_loaders",),
    ),
    Fault(
        sentence="LoRA-GA scales a transposed layer by its inputs.",
        kind="wrong dimension",
        source="d5d9beb",
        path="fastlora/init/lora_ga.py",
        before="lora_b = lora_b * (weight.shape[0] ** 0.25 / config.stable_gamma**0.5)",
        after=(
            "lora_b = lora_b * (\n"
            "            weight.shape[given.transposed] ** 0.25 / config.stable_gamma**0.5\n"
            "        )"
        ),
        tests=(f"{_DATA}::test_lora_ga_on_conv1d_scales_by_its_outputs",),
    ),
    Fault(
        sentence="An adapter that failed to start leaves the base weight that it had changed.",
        kind="half a change after a failure",
        source="18c00e4",
        path="fastlora/model/inject.py",
        before="        for put_back in undo:\n            put_back()\n",
        after="        undo.clear()\n",
        tests=(f"{_WEIGHTS}::test_what_cannot_start_leaves_the_model_as_it_was",),
    ),
    Fault(
        sentence="A plain adapter takes the place of a PiSSA adapter, on the weights that it left.",
        kind="a check left out",
        source="replacing adapters that changed the base",
        path="fastlora/model/tuner.py",
        before="        if config.init is not init or old != new or",
        after="        if",
        tests=(
            f"{_WEIGHTS}::test_only_the_same_change_of_the_base_replaces_an_adapter"
            "[hotswap_adapter-pissa-{'init_lora_weights': True}]",
        ),
    ),
    Fault(
        sentence="A PiSSA file replaces an adapter whose base a second adapter changed.",
        kind="a record overlooked",
        source="replacing adapters that changed the base",
        path="fastlora/model/tuner.py",
        before="        if len(self._changed_base) > 1:\n",
        after="        if False:\n",
        tests=(f"{_WEIGHTS}::test_no_file_replaces_an_adapter_if_two_changed_the_base[True]",),
    ),
    Fault(
        sentence="A deleted PiSSA adapter is forgotten, and the next one decomposes what it left.",
        kind="a record lost",
        source="deleting adapters that changed the base",
        path="fastlora/model/tuner.py",
        before="            self._changed_base[None] = init\n",
        after="",
        tests=(f"{_WEIGHTS}::test_the_base_stays_changed_behind_a_deleted_adapter",),
    ),
    Fault(
        sentence="LoRA-FA projects gradients by a lora_A that has been replaced since.",
        kind="a stale inverse",
        source="4247458",
        path="fastlora/optimizers/lorafa.py",
        before="""\
        watched = (local_shard(lora_a),), (lora_a._version,)
        known = self._inverses.get(lora_a)
        if known is None or known[0] is None or not known[0].matches(*watched):
            stamp = stamp_tensors(*watched)
""",
        after="""\
        stamp = (lora_a.data_ptr(), lora_a._version)
        known = self._inverses.get(lora_a)
        if known is None or known[0] != stamp:
""",
        tests=(f"{_OPTIMIZERS}::test_lorafa_sees_a_lora_a_that_was_replaced_twice",),
    ),
    Fault(
        sentence="Each step of LoRA-FA decreases a learning rate that is a tensor.",
        kind="a write to a setting",
        source="e722df0",
        path="fastlora/optimizers/lorafa.py",
        before="size = size * math.sqrt(",
        after="size *= math.sqrt(",
        tests=(f"{_OPTIMIZERS}::test_lorafa_steps_are_those_of_peft",),
    ),
    Fault(
        sentence="LoRA-FA takes a bias of lora_B for the partner of a lora_A.",
        kind="partners matched wrongly",
        source="5b22cfd",
        path="fastlora/optimizers/lorafa.py",
        before='        if found and not rest.endswith(".bias"):\n',
        after='        if found:\n            rest = rest.replace("bias", "weight")\n',
        tests=(f"{_OPTIMIZERS}::test_lorafa_of_several_adapters_and_of_all_their_parts",),
    ),
    Fault(
        sentence="LoRA-FA steps a lora_A that has a gradient from before it was frozen.",
        kind="a stale gradient",
        source="gradients from before LoRA-FA",
        path="fastlora/optimizers/lorafa.py",
        before="if parameter.grad is None or parameter in frozen:",
        after="if parameter.grad is None:",
        tests=(f"{_OPTIMIZERS}::test_lorafa_leaves_a_lora_a_with_a_gradient_alone",),
    ),
    Fault(
        sentence="A model keeps the gradients that its adapters have started from.",
        kind="kept memory",
        source="M10",
        path="fastlora/layers/adapter_init.py",
        before="        delattr(found[0], init.data)",
        after="        pass",
        tests=("tests/init/test_data_inits.py::test_lora_ga_on_conv1d_scales_by_its_outputs",),
    ),
    Fault(
        sentence="A copied LoRA-FA optimizer no longer knows which lora_A belongs to a lora_B.",
        kind="partners lost by a copy",
        source="copies of LoRA-FA optimizers",
        path="fastlora/optimizers/lorafa.py",
        before="""\
            self._pair_factors()
""",
        after="",
        tests=(f"{_OPTIMIZERS}::test_a_copied_lorafa_optimizer_goes_on",),
    ),
)
