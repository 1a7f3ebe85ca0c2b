"""Faults of ``fastlora/model``: adapters of a model, targets, patterns, swaps, sums and files."""

from __future__ import annotations

from tests.faults.fault import Fault

_ALIASED = "tests/model/test_tied.py::test_a_module_with_two_names_is_untied_before_a_merge"
_BIASES = "tests/model/test_base_biases.py"
_CALLS = "tests/integrations/test_peft_compatibility_calls.py"
_DROPIN = "tests/model/test_dropin.py"
_EXPERT_FILES = "tests/model/test_expert_files.py"
_EXPERT_MODELS = "tests/model/test_expert_models.py"
_HOTSWAP = "tests/model/test_hotswap.py"
_PATTERNS = "tests/test_patterns.py"
_OPEN_BLOCKS = "tests/routing/test_open_blocks.py"
_TIED = "tests/model/test_tied.py"
_UNLIKE = f"{_TIED}::test_a_file_of_an_adapter_that_is_unlike_the_loaded_one"
_WEIGHTED = "tests/algebra/test_weighted.py"

FAULTS = (
    Fault(
        sentence="A config that asks for a transposed weight is changed without a warning.",
        kind="a warning left out",
        source="D11",
        path="fastlora/model/plan.py",
        before="            if given and not transposed:",
        after="            if False:",
        tests=(
            "tests/model/test_features.py::test_fan_in_fan_out_in_files_is_what_the_targets_say",
        ),
    ),
    Fault(
        sentence="A recommended config keeps alpha when another rank is given, and scales less.",
        kind="a value that does not follow another",
        source="D8",
        path="fastlora/model/recommend.py",
        before='2 * check_rank(changes["r"]) if "r" in changes else self.lora_alpha',
        after="self.lora_alpha",
        tests=("tests/model/test_recommend.py::test_by_size",),
    ),
    Fault(
        sentence="A mixed batch of a patched model computes with the factors of before a swap.",
        kind="a stale packed copy",
        source="17b48e7",
        path="fastlora/model/hotswap.py",
        before="""\
        weights_versions.invalidate_all()
        for layer in own.modules():
            if isinstance(layer, BaseAdapterLayer):
                clear_layer_caches(layer)
        return
""",
        after="        return\n",
        tests=(f"{_HOTSWAP}::test_a_mixed_batch_of_a_patched_model_sees_the_swap",),
    ),
    Fault(
        sentence="A hot swap refuses a file that holds the base embedding as the model has it.",
        kind="a tensor without a place",
        source="9e5a853",
        path="fastlora/model/hotswap.py",
        before="unchanged = same and weight is not None and torch.equal(weight, tensor.to(weight))",
        after="unchanged = same and weight is None",
        tests=(f"{_HOTSWAP}::test_files_that_hold_the_base_embedding",),
    ),
    Fault(
        sentence="A rank that a convolution's groups do not divide is refused without its name.",
        kind="a check of groups left out",
        source="0a14a4e",
        path="fastlora/model/hotswap.py",
        before='            groups = int(getattr(layer.get_base_layer(), "groups", 1))\n',
        after="            groups = 1\n",
        tests=(f"{_HOTSWAP}::test_a_rank_that_groups_do_not_divide_raises",),
    ),
    Fault(
        sentence="A hot swap puts rows of other tokens into an adapter's trained rows.",
        kind="configs that differ unseen",
        source="d706142",
        path="fastlora/model/hotswap.py",
        before=', "bias", "trainable_token_indices")',
        after=', "bias")',
        tests=(f"{_HOTSWAP}::test_trained_rows_are_swapped",),
    ),
    Fault(
        sentence="A weighted sum refuses a list that names an adapter twice.",
        kind="names counted once",
        source="7968eb2",
        path="fastlora/model/weighted.py",
        before="    if len(weights) != len(adapters):\n",
        after="    if len(weights) != len(configs):\n",
        tests=("tests/algebra/test_weighted.py::test_two_copies_of_one_module_raise",),
    ),
    Fault(
        sentence="The base biases of an idle adapter train with the active one's factors.",
        kind="a parameter that trains unasked",
        source="f1c9c8e",
        path="fastlora/model/tuner.py",
        before="bias.requires_grad_(name in self._active and not inference_mode)",
        after="bias.requires_grad_(not inference_mode)",
        tests=(f"{_BIASES}::test_biases_train_as_the_factors_do",),
    ),
    Fault(
        sentence="The base biases of a deleted adapter go on training.",
        kind="a parameter that trains unasked",
        source="f1c9c8e",
        path="fastlora/model/tuner.py",
        before="""\
        for bias in biases:
            bias.requires_grad_(False)
        del self.peft_config[adapter_name]
""",
        after="        del self.peft_config[adapter_name]\n",
        tests=(f"{_BIASES}::test_deleting_an_adapter_freezes_its_biases",),
    ),
    Fault(
        sentence="A merged adapter leaves the weights when the active one is deleted.",
        kind="a merge undone",
        source="9032abf",
        path="fastlora/model/tuner.py",
        before="self._activate([next(iter(self.peft_config))], keep_merged=True)",
        after="self._activate([next(iter(self.peft_config))])",
        tests=(f"{_DROPIN}::test_deleting_the_active_adapter_keeps_another_one_merged[fastlora]",),
    ),
    Fault(
        sentence="Unloading takes merged adapters out of the weights.",
        kind="a merge lost",
        source="0dfda71",
        path="fastlora/model/inject.py",
        before="            base = module.release()\n            model.set_submodule(",
        after=(
            "            module.unmerge() if not merge else None\n"
            "            base = module.release()\n            model.set_submodule("
        ),
        tests=(f"{_DROPIN}::test_unloading_keeps_what_is_merged",),
    ),
    Fault(
        sentence="A deleted adapter stays active on layers that it was not on.",
        kind="a name kept",
        source="dbfd241",
        path="fastlora/model/inject.py",
        before="""\
            module._remove_adapter(adapter_name)
        # A module without the adapter may also list the name as active, and may later get a new
        # adapter with the same name.
        module._active_adapters = [""",
        after="""\
            module._remove_adapter(adapter_name)
            module._active_adapters = [""",
        tests=(f"{_DROPIN}::test_a_deleted_adapter_is_active_on_no_layer",),
    ),
    Fault(
        sentence="A second adapter freezes what somebody trains of the base model.",
        kind="a parameter frozen",
        source="1bc60fd",
        path="fastlora/model/inject.py",
        before="        for parameter in trained:\n            parameter.requires_grad_(True)\n",
        after="        del trained\n",
        tests=(f"{_BIASES}::test_what_a_user_unfreezes_stays_trainable",),
    ),
    Fault(
        sentence="Biases of a module that an adapter has a copy of train and are saved.",
        kind="a parameter counted wrongly",
        source="79f7229",
        path="fastlora/model/inject.py",
        before=' == "bias" and id(parameter) not in originals:',
        after=' == "bias":',
        tests=(f"{_BIASES}::test_a_file_holds_the_biases_that_were_trained",),
    ),
    Fault(
        sentence="Trained tokens of a tied module act only once their adapter is set.",
        kind="an adapter that does not act",
        source="3de6d60",
        path="fastlora/model/inject.py",
        before="                    rows._activate([adapter_name], plan.config.inference_mode)\n",
        after="                    pass\n",
        tests=(
            "tests/model/test_trainable_tokens.py::test_an_adapter_that_was_added_acts_as_in_peft",
        ),
    ),
    Fault(
        sentence="An adapter's own file does not load over it after its scale was set.",
        kind="a scaling compared wrongly",
        source="15e0917",
        path="fastlora/model/adapter_state.py",
        before="loaded = (layers[name].r[adapter_name], loaded_config.scaling_for(name))",
        after="loaded = (layers[name].r[adapter_name], layers[name].scaling[adapter_name])",
        tests=("tests/model/test_model.py::test_own_files_load_over_an_adapter_that_was_scaled",),
    ),
    Fault(
        sentence="Base biases in a file of PEFT's are left out because of their names there.",
        kind="a file without what was trained",
        source="f1c9c8e",
        path="fastlora/model/adapter_state.py",
        before="        name = strip_adapter_wrapper_names(disk.removeprefix(KEY_PREFIX))\n",
        after="        name = disk.removeprefix(KEY_PREFIX)\n",
        tests=(f"{_BIASES}::test_biases_in_files_of_peft",),
    ),
    Fault(
        sentence="A loaded adapter gets other weights while a mixed batch uses it.",
        kind="a change in an open block",
        source="c9ac794",
        path="fastlora/model/tuner.py",
        before="            self.group.check_no_open_blocks(operation)\n        modules",
        after="            pass\n        modules",
        tests=(f"{_OPEN_BLOCKS}::test_other_weights_for_a_loaded_adapter_within_a_block_raise",),
    ),
    Fault(
        sentence="A file that is loaded over a merged adapter takes no effect.",
        kind="a state not checked",
        source="loading over a merged adapter",
        path="fastlora/model/tuner.py",
        before="        if any(adapter_name in module.merged_adapters for _, module in modules):\n",
        after="        if False:\n",
        tests=("tests/model/test_model.py::test_a_merged_adapter_is_not_replaced",),
    ),
    Fault(
        sentence="A deleted adapter takes the hooks of its module along.",
        kind="a hook lost",
        source="modules of deleted adapters",
        path="fastlora/model/base_modules.py",
        before="        or fallback_reason_hooked(module)\n",
        after="",
        tests=(
            "tests/model/test_trainable_tokens.py::"
            "test_a_deleted_adapter_leaves_hooks_where_they_are[rows]",
        ),
    ),
    Fault(
        sentence="A hot swap into an adapter on the meta device writes nothing.",
        kind="a state not checked",
        source="hot-swapping into an empty adapter",
        path="fastlora/model/hotswap.py",
        before="    tuner.check_adapter_has_values(adapter_name)\n",
        after="",
        tests=(f"{_HOTSWAP}::test_an_adapter_without_values_is_not_used",),
    ),
    Fault(
        sentence="Padding an adapter for hot swaps makes the scale of set_scale permanent.",
        kind="a wrong source of a value",
        source="preparing a scaled adapter",
        path="fastlora/model/hotswap.py",
        before="float(layer.lora_alpha[adapter_name])",
        after="float(layer.scaling[adapter_name]) * ranks[name]",
        tests=(f"{_HOTSWAP}::test_preparing_keeps_a_temporary_scale_temporary[False]",),
    ),
    Fault(
        sentence="An adapter's file contains a base weight that adapters are merged into.",
        kind="a state not checked",
        source="saving while adapters are merged",
        path="fastlora/model/adapter_state.py",
        before="        if full:\n            values[key]",
        after="        if False:\n            values[key]",
        tests=("tests/model/test_checkpoint.py::test_base_tensors_are_saved_as_before_a_merge",),
    ),
    Fault(
        sentence="The base weight of a file replaces a merged weight, and loses its adapter.",
        kind="a state not checked",
        source="loading beside a merged adapter",
        path="fastlora/model/adapter_state.py",
        before="            if module.merged and any(\n",
        after="            if False and any(\n",
        tests=(
            "tests/model/test_model.py::test_base_weights_of_a_file_beside_a_merged_adapter",
            "tests/model/test_model.py::test_base_biases_of_a_file_beside_a_merged_adapter",
        ),
    ),
    Fault(
        sentence="A PiSSA adapter takes a plain one's place, on base weights that it does not fit.",
        kind="a base weight of its own ignored",
        source="8aa38ac",
        path="fastlora/model/tuner.py",
        before='config.check_plain(f"an adapter that replaces {adapter_name!r}")',
        after="pass",
        tests=(
            "tests/init/test_weight_inits.py::test_what_cannot_go_without_its_own_base_weights",
        ),
    ),
    Fault(
        sentence="Adapters are disabled while rows of an open block ask for them.",
        kind="a change in an open block",
        source="eba4346",
        path="fastlora/model/tuner.py",
        before='        self.group.check_no_open_blocks("disable_adapter_layers")\n',
        after="",
        tests=(
            f"{_OPEN_BLOCKS}::test_operations_that_would_change_an_open_block_raise"
            "[ours-disable_adapter_layers]",
        ),
    ),
    Fault(
        sentence="A target may lie inside of a module that another adapter owns a copy of.",
        kind="a target inside of a copy",
        source="35a7f96",
        path="fastlora/model/targets.py",
        before="        if wrapped[name]:\n            raise UnsupportedLayerError(",
        after="        if wrapped[name] is None:\n            raise UnsupportedLayerError(",
        tests=("tests/layers/test_modules_to_save.py::test_what_would_reach_into_a_copy_raises",),
    ),
    Fault(
        sentence="Names of experts are read as a whole, where PEFT reads their last part.",
        kind="targets matched wrongly",
        source="c6d8222",
        path="fastlora/model/target_parameters.py",
        before='{entry.rpartition(".")[2] for entry in targets or () if entry not in linears}',
        after="set(targets or ())",
        tests=("tests/model/test_experts.py::test_the_adapted_set_contains_that_of_peft",),
    ),
    Fault(
        sentence="A regular expression that matches one expert selects all of them.",
        kind="targets matched wrongly",
        source="5b0e840",
        path="fastlora/model/stacked_experts.py",
        before="            with_index and all(matches",
        after="            with_index and any(matches",
        tests=("tests/model/test_experts.py::test_experts_that_no_target_selects_are_named",),
    ),
    Fault(
        sentence="A user's pattern for a fused parameter loses against the doubled rank.",
        kind="a pattern that is overwritten",
        source="5b0e840",
        path="fastlora/model/target_parameters.py",
        before="config.rank_pattern.setdefault(pattern, config.r * parts)\n",
        after="config.rank_pattern = {pattern: config.r * parts} | config.rank_pattern\n",
        tests=("tests/model/test_experts.py::test_the_adapted_set_contains_that_of_peft",),
    ),
    Fault(
        sentence="A former name doubles the rank of a parameter that is named otherwise.",
        kind="a pattern that matches too much",
        source="c6d8222",
        path="fastlora/model/target_parameters.py",
        before="    return re.escape(name) if shared else",
        after="    return",
        tests=("tests/model/test_experts.py::test_a_former_name_doubles_only_its_own_parameters",),
    ),
    Fault(
        sentence="A saved adapter of a subset of the experts is one of all experts for PEFT.",
        kind="a subset that is saved as all",
        source="5b0e840",
        path="fastlora/model/target_parameters.py",
        before="    return preferred_value if matched == set(names) else sorted(names)",
        after="    return preferred_value if matched else sorted(names)",
        tests=(f"{_EXPERT_FILES}::test_saved_adapters_load_in_peft",),
    ),
    Fault(
        sentence="The config of a saved adapter has names that PEFT converts to all experts.",
        kind="a subset that is saved as all",
        source="5b0e840",
        path="fastlora/model/expert_files.py",
        before='{e for e in entries if e.rpartition(".")[2] not in former}',
        after="set(entries)",
        tests=(f"{_EXPERT_FILES}::test_saved_adapters_load_in_peft",),
    ),
    Fault(
        sentence="The config of a loaded adapter lacks the linear layers that only the file names.",
        kind="a file that decides nothing",
        source="5b0e840",
        path="fastlora/model/plan.py",
        before="    if selected.only_in_file:\n",
        after="    if not selected.only_in_file:\n",
        tests=(f"{_EXPERT_FILES}::test_linears_that_peft_drops",),
    ),
    Fault(
        sentence="Experts of transformers 4 keep the alpha of one linear layer with rsLoRA.",
        kind="a scaling that is converted wrongly",
        source="5b0e840",
        path="fastlora/model/expert_files.py",
        before="math.sqrt(rank) if config.use_rslora else rank)",
        after="rank)",
        tests=(f"{_EXPERT_FILES}::test_files_of_transformers_4",),
    ),
    Fault(
        sentence="The linear layers of one expert are joined with one scaling for both.",
        kind="a scaling that is converted wrongly",
        source="5b0e840",
        path="fastlora/model/expert_files.py",
        before="[lora_b if scale == 1.0 else lora_b * scale for",
        after="[lora_b for",
        tests=(f"{_EXPERT_FILES}::test_files_of_transformers_4",),
    ),
    Fault(
        sentence="The config that a user hands to from_pretrained is not the model's own.",
        kind="a config that is a copy",
        source="886f7dc",
        path="fastlora/model/lora_model.py",
        before="            plan = replace(plan, config=config)\n        self = cls.__new__(cls)\n",
        after="        self = cls.__new__(cls)\n",
        tests=(f"{_CALLS}::test_a_config_given_to_from_pretrained_is_not_copied",),
    ),
    Fault(
        sentence="A file without a task does not name the base model's class.",
        kind="a field not written",
        source="542dd01",
        path="fastlora/model/lora_model.py",
        before="_auto_mapping(self.get_base_model()) if not config.task_type else None",
        after="None",
        tests=(f"{_CALLS}::test_the_class_of_the_base_model_is_in_the_file",),
    ),
    Fault(
        sentence="The loop over a config's many patterns takes time that nothing bounds.",
        kind="a time not counted",
        source="b5c43c7",
        path="fastlora/patterns.py",
        before="    with count_toward_matching_time_limit(field):\n"
        "        return _suffix_index(field, patterns).first_pattern_matching_suffix(name)\n",
        after="    return _suffix_index(field, patterns).first_pattern_matching_suffix(name)\n",
        tests=(f"{_PATTERNS}::test_the_bound_covers_the_loop_over_many_patterns",),
    ),
    Fault(
        sentence="A long pattern may pass itself for seconds between two counted steps.",
        kind="a pattern unbounded",
        source="1bba3e8",
        path="fastlora/patterns.py",
        before=(
            "steps = min(_STEPS, _CHARACTERS // "
            "_max_length_with_repeats_expanded(pattern, expression))"
        ),
        after="steps = _STEPS",
        tests=(f"{_PATTERNS}::test_a_long_way_between_two_steps_is_bounded[long]",),
    ),
    Fault(
        sentence="Reading a large adapter counts as matching, and its patterns are refused.",
        kind="a time counted wrongly",
        source="354d3a8",
        path="fastlora/patterns.py",
        before="        self._start: float | None = None\n",
        after="        self._start: float | None = time.thread_time()\n",
        tests=(f"{_PATTERNS}::test_only_matching_counts",),
    ),
    Fault(
        sentence="An expression counts before a plain name that comes earlier in the config.",
        kind="an order of patterns lost",
        source="354d3a8",
        path="fastlora/patterns.py",
        before="            if best is not None and plain[best] < place:\n                break\n",
        after="            if best is not None and place < 0:\n                break\n",
        tests=(f"{_PATTERNS}::test_the_first_of_many_patterns_counts_as_in_peft[re]",),
    ),
    Fault(
        sentence="A failed addition within an open block cannot remove what it has added.",
        kind="an open block",
        source="d5917c1",
        path="fastlora/model/inject.py",
        before="            module._remove_adapter(adapter_name)\n",
        after="            module.delete_adapter(adapter_name)\n",
        tests=(
            "tests/routing/test_open_blocks.py::"
            "test_a_failed_addition_within_an_open_block_is_undone",
        ),
    ),
    Fault(
        sentence="The rank of a linear layer in target_parameters is written by another name.",
        kind="a pattern of another name",
        source="b1be4d6",
        path="fastlora/model/config.py",
        before='            return f"^{re.escape(self._name_for_rank_and_alpha_patterns(name))}"\n',
        after='            return f"^{re.escape(name)}"\n',
        tests=(
            f"{_EXPERT_MODELS}::test_weighted_sums_over_weights_of_linear_layers",
            f"{_EXPERT_MODELS}::test_reducing_the_rank_of_weights_of_linear_layers",
            f"{_EXPERT_MODELS}::test_a_hot_swap_of_weights_of_linear_layers",
        ),
    ),
    Fault(
        sentence="A weighted sum that fails stays in the model.",
        kind="an error that leaves its work",
        source="b1be4d6",
        path="fastlora/model/tuner.py",
        before="self._delete_adapter(adapter_name)  # also in",
        after="pass  # also in",
        tests=(f"{_WEIGHTED}::test_a_failed_sum_is_not_left_in_the_model",),
    ),
    Fault(
        sentence="A module with two names in the model counts as a module that shares nothing.",
        kind="an alias that nobody sees",
        source="a module with two names",
        path="fastlora/model/tied_weights.py",
        before="return holder.module in family and (holder.in_adapter_module or at_name)",
        after="return holder.module in family",
        tests=(
            f"{_ALIASED}[embedding]",
            "tests/init/test_weight_inits.py::"
            "test_the_weight_of_a_module_with_two_names_is_not_changed[pissa]",
        ),
    ),
    Fault(
        sentence="The other name of a merged module still refers to the merged module.",
        kind="an alias that is merged",
        source="a module with two names",
        path="fastlora/model/tied_weights.py",
        before='                setattr(other.parent, other.name.rpartition(".")[2], made)\n',
        after="",
        tests=(f"{_ALIASED}[linear]", f"{_ALIASED}[convolution]", f"{_ALIASED}[int8]"),
    ),
    Fault(
        sentence="Merging a lora_bias changes the bias of the merged module's other name.",
        kind="a shared bias",
        source="a module with two names",
        path="fastlora/model/tied_weights.py",
        before='for parameter in (_adapted_parameter_name(module), "bias"):',
        after="for parameter in (_adapted_parameter_name(module),):",
        tests=(f"{_ALIASED}[linear]", f"{_ALIASED}[hooks]"),
    ),
    Fault(
        sentence="A file with biases is loaded over an adapter that has none.",
        kind="tensors left out in silence",
        source="a file over another adapter",
        path="fastlora/model/adapter_state.py",
        before='for field in ("use_dora", "lora_bias", "bias"):',
        after='for field in ("use_dora",):',
        tests=(f"{_UNLIKE}[lora_bias-one over the other]", f"{_UNLIKE}[bias-one over the other]"),
    ),
    Fault(
        sentence="A file with a copy of a module is loaded over an adapter that has none.",
        kind="a copy left out in silence",
        source="a file over another adapter",
        path="fastlora/model/adapter_state.py",
        before="copied.symmetric_difference((*plan.modules_to_save, *plan.tied_copies))",
        after="copied.difference(copied)",
        tests=(f"{_UNLIKE}[copies-one over the other]", f"{_UNLIKE}[copies-the other over one]"),
    ),
    Fault(
        sentence="A file of an untied adapter is loaded over a tied one, whose head it changes.",
        kind="a tie that is not in the file",
        source="a file over another adapter",
        path="fastlora/model/adapter_state.py",
        before="{*tied.heads, *tied.copies} ^ {*plan.tied_heads, *plan.tied_copies}",
        after="set[str]()",
        tests=(
            f"{_UNLIKE}[ties of factors-one over the other]",
            f"{_UNLIKE}[ties of copies-the other over one]",
        ),
    ),
    Fault(
        sentence="A swap writes the values of an untied adapter into what is tied.",
        kind="a tie that is not in the file",
        source="a swap of a tied adapter",
        path="fastlora/model/hotswap.py",
        before="    names = (input_embedding_name(model), *differing) if differing else ()\n",
        after="    names = ()\n",
        tests=(
            f"{_UNLIKE}[ties of factors-one over the other]",
            f"{_UNLIKE}[ties of copies-one over the other]",
        ),
    ),
    Fault(
        sentence="The copies of a computed adapter come apart in training.",
        kind="a tie that is lost",
        source="a sum of tied adapters",
        path="fastlora/model/computed_adapters.py",
        before="    plan = plan_target_modules(model, config, ties=ties)\n    layers",
        after="    plan = plan_target_modules(model, config)\n    layers",
        tests=(f"{_TIED}::test_a_computed_adapter_is_tied_as_its_source[copies-weighted]",),
    ),
    Fault(
        sentence="Copies that were on the meta device come apart once they are loaded.",
        kind="a tie that is lost",
        source="low_cpu_mem_usage with tied copies",
        path="fastlora/model/adapter_state.py",
        before="if each._parameters.get(leaf) is old:",
        after="if each is owner:",
        tests=(f"{_TIED}::test_copies_on_the_meta_device_stay_tied",),
    ),
    Fault(
        sentence="A head is adapted that is not tied to the embedding in a file of PEFT's.",
        kind="a tie that is not in the file",
        source="a file of PEFT's for GPT-2",
        path="fastlora/model/tied_weights.py",
        before="tensors_in_file is None or _are_tied_in_file(embedding, tied, tensors_in_file)",
        after="True",
        tests=(
            f"{_TIED}::test_files_say_what_is_tied_to_an_embedding_that_peft_does_not_know"
            "[fields1-False]",
        ),
    ),
    Fault(
        sentence="A file of a model from the Hub lacks the embeddings that were resized.",
        kind="a size that is compared with itself",
        source="a base model loaded by its id",
        path="fastlora/model/adapter_state.py",
        before='return bool(getattr(original, "vocab_size", size) != size)',
        after="return False",
        tests=(
            "tests/model/test_dropin_calls.py::test_resized_embeddings_of_a_model_from_the_hub[True]",
        ),
    ),
    Fault(
        sentence="A converted adapter loses the base biases that it trained.",
        kind="a field that is reset",
        source="bias='all' in save_as_lora",
        path="fastlora/model/reduce.py",
        before="        config.bias = tuner.peft_config[adapter_name].bias\n",
        after="",
        tests=(f"{_BIASES}::test_a_converted_adapter_keeps_its_biases[all]",),
    ),
    Fault(
        sentence="A pattern for one module does not act if the module is in a compiled one.",
        kind="two names of one module",
        source="wrapped modules",
        path="fastlora/model/config.py",
        before="name = strip_wrapper_prefixes(module_or_parameter_name)",
        after="name = module_or_parameter_name",
        tests=(
            f"{_HOTSWAP}::test_wrapped_modules[compiled]",
            "tests/model/test_model.py::test_files_and_wrapped_modules[patterns-compiled]",
        ),
    ),
)
