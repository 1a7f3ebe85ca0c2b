"""Faults of routing: which rows have which adapter, blocks, threads."""

from __future__ import annotations

from tests.faults.fault import Fault

_BLOCKS = "tests/routing/test_mixed_blocks.py::"
_SELECTED = "tests/routing/test_selected_rows.py::"
_AGAIN = "test_rows_that_data_chose_are_followed_again_after_constants_placed_them"

FAULTS = (
    # ------------------------------------------------------------------------- rows and ids
    Fault(
        "Two layers with names of one CRC draw the same masks.",
        "same number",
        "c088499",
        "fastlora/routing/routing.py",
        "        while number in used:\n            number += 1\n",
        "",
        (f"{_BLOCKS}test_layers_whose_names_collide",),
    ),
    Fault(
        "A layer with the sequence first gives rows to the adapters of other samples.",
        "wrong dimension",
        "2e3e9bb",
        "fastlora/routing/routing.py",
        " and not each_id_covers_whole_entries(\n            leading, count\n        ):\n",
        " and False:\n",
        (
            "tests/routing/test_experts.py::"
            "test_samples_that_are_not_along_the_first_dimension_raise",
        ),
    ),
    Fault(
        "A block notices no change of factors once it has found them packed.",
        "stale packs",
        "1871540",
        "fastlora/routing/routing.py",
        "if known is None or not known.has_current_weights_version:",
        "if known is None:",
        (
            "tests/conformance/test_conformance.py::"
            "test_conformance[changes_are_seen-model-mixed-plain]",
        ),
    ),
    Fault(
        "An adapter is changed while a block uses it in another thread.",
        "open block",
        "eba4346",
        "fastlora/routing/routing.py",
        "        if self.has_open_blocks:\n            raise",
        "        if self._open < 0:\n            raise",
        (
            "tests/routing/test_open_blocks.py::"
            "test_operations_that_would_change_an_open_block_raise[ours-delete_adapter]",
        ),
    ),
    Fault(
        "Ids are taken for tokens though they are neither as many as tokens nor as samples.",
        "wrong count",
        "ee4c39f",
        "fastlora/routing/active.py",
        "if count != samples and count != tokens:",
        "if tokens % max(count, 1):",
        (f"{_BLOCKS}test_ids_that_are_neither_samples_nor_tokens[3-ours]",),
    ),
    Fault(
        "A block that ends out of order ends the other one.",
        "order of blocks",
        "8655115",
        "fastlora/routing/active.py",
        "_set_active(tuple(other for other in _thread.open if other is not routing))",
        "_set_active(_thread.open[:-1])",
        (f"{_BLOCKS}test_blocks_that_end_out_of_order",),
    ),
    Fault(
        "A checkpoint's repetition in the backward has no adapters.",
        "checkpoint",
        "c088499",
        "fastlora/routing/activation_checkpointing.py",
        "with replace_active_routings(routings):\n            return function(*args, **kwargs)",
        "return function(*args, **kwargs)",
        (f"{_BLOCKS}test_gradients_within_a_block_without[False]",),
    ),
    Fault(
        "An id out of range on a GPU is never told.",
        "lost error",
        "109e6d6",
        "fastlora/routing/ids.py",
        "                if flag.item():\n",
        "                if False:\n",
        (f"{_BLOCKS}test_ids_out_of_range_are_told_by_a_later_block_that_waits_for_nothing",),
    ),
    Fault(
        "A compiled batch gives the adapters' seeds to other adapters.",
        "wrong slot",
        "bc02d30",
        "fastlora/routing/block.py",
        "    spread[[place[name] for name in seeded_names]] = seeds\n",
        "    spread[: len(seeded_names)] = seeds\n",
        ("tests/conformance/test_compiled.py::test_values[aot_eager-model-mixed-dropout]",),
    ),
    Fault(
        "A compiled batch of some adapters takes the first adapters of the model.",
        "wrong adapter",
        "bc02d30",
        "fastlora/routing/block.py",
        "    return table[slots.clamp(min=NO_ADAPTER)]\n",
        "    return slots.clamp(min=NO_ADAPTER)\n",
        ("tests/conformance/test_compiled.py::test_values[aot_eager-model-mixed-plain-called]",),
    ),
    # ---------------------------------------------------------------------- what blocks keep
    Fault(
        "Packs are used though a factor was replaced.",
        "replaced memory",
        "R5",
        "fastlora/routing/adapter_changes.py",
        "                and all(map(eq, states, self._states))\n",
        "",
        ("tests/test_stamps.py::test_replaced_parameters_are_seen[packed-replaced twice]",),
    ),
    Fault(
        "Packs are used though an adapter's dropout acts now.",
        "dropout",
        "912c58d",
        "fastlora/routing/adapter_changes.py",
        "                and not any(map(_training, self._dropouts))\n",
        "",
        (f"{_BLOCKS}test_a_dropout_that_trains_in_a_layer_that_does_not",),
    ),
    Fault(
        "Packs are used though something is hooked into a factor's module.",
        "hook",
        "1d73623",
        "fastlora/routing/adapter_changes.py",
        "                and not any(self._hooks)\n",
        "",
        ("tests/conformance/test_conformance.py::test_conformance[hooks-model-mixed-plain]",),
    ),
    # ------------------------------------------------------------------------- followed rows
    Fault(
        "A mask that fits one batch by chance is taken to fit every batch.",
        "chosen rows",
        "ce2f116",
        "fastlora/routing/row_facts.py",
        "return ROWS if fixed else RowOriginFacts(RowOriginKind.EVEN)",
        "return ROWS",
        (f"{_SELECTED}test_a_mask_that_fits_by_chance_is_followed_again",),
    ),
    Fault(
        "Rows that data chose count as fixed after constants have selected them again.",
        "chosen rows",
        "ac78699",
        "fastlora/routing/row_rules.py",
        "(*indices) and known.rows_have_fixed_sample_indices(\n        source\n    )\n",
        "(*indices)\n",
        (f"{_SELECTED}{_AGAIN}[picked backward]",),
    ),
    Fault(
        "Rows that data placed count as fixed if constants place the last ones.",
        "chosen rows",
        "ac78699",
        "fastlora/routing/row_rules.py",
        "    fixed = known.rows_have_fixed_sample_indices(dest) and (",
        "    fixed = (",
        (f"{_SELECTED}test_rows_of_which_data_placed_some_are_followed_again",),
    ),
    Fault(
        "Rows that count down look like rows in order.",
        "order of an index",
        "ce2f116",
        "fastlora/routing/row_rules.py",
        "not row_samples.values_are_readable(index) or bool((index.flatten().diff() >= 0).all())",
        "True",
        (f"{_SELECTED}test_rows_out_of_order_raise[counted down]",),
    ),
    Fault(
        "A layer over a table that all samples share gives its rows to adapters.",
        "shared table",
        "5037054",
        "fastlora/routing/row_checks.py",
        "            if self.order.is_shared_table(x):\n"
        "                self._checks.raise_now_and_at_later_checks(layer, _LONE_TABLE)\n",
        "",
        (f"{_SELECTED}test_a_layer_over_a_table_of_the_model_raises",),
    ),
    # ------------------------------------------------------------ what is kept, and for how long
    Fault(
        sentence="A block gives every forward the rows of its first one.",
        kind="wrong key",
        source="M10",
        path="fastlora/routing/routing.py",
        before='key = (m, device, cuda_stream_handle(device) if device.type == "cuda" else 0)',
        after="key = (0, device, 0)",
        tests=("tests/ops/test_packed.py::test_a_block_finds_its_factors_once",),
    ),
    Fault(
        sentence="Rows of a block follow ids that the caller has written since.",
        kind="ids written",
        source="M10",
        path="fastlora/routing/ids.py",
        before="dtype=torch.int64, copy=True)",
        after="dtype=torch.int64)",
        tests=(
            "tests/routing/test_mixed_blocks.py::test_ids_written_within_a_block",
            "tests/routing/test_mixed_blocks.py::test_ids_written_before_the_backward_pass",
        ),
    ),
    Fault(
        sentence="A model keeps every set of adapters packed.",
        kind="no bound",
        source="M10",
        path="fastlora/routing/caches.py",
        before="while len(self._sets) > _MOST_SETS:",
        after="while False:",
        tests=("tests/ops/test_packed.py::test_only_the_last_sets_stay",),
    ),
    Fault(
        sentence="Packed sets keep the memory of factors that were replaced.",
        kind="kept memory",
        source="M10",
        path="fastlora/routing/caches.py",
        before="for other, each in self._sets.items() if each.is_valid()]",
        after="for other, each in self._sets.items()]",
        tests=(
            "tests/routing/test_cached_adapter_sets.py::test_sets_of_replaced_factors_are_dropped_together",
        ),
    ),
    Fault(
        sentence="What a captured graph reads stays in memory after `clear_caches`.",
        kind="kept memory",
        source="M10",
        path="fastlora/routing/caches.py",
        before="        self._captured.clear()\n",
        after="        pass\n",
        tests=("tests/ops/test_packed.py::test_what_a_captured_graph_reads_stays",),
    ),
    Fault(
        sentence="Tables of a set are used behind a write that moves no version.",
        kind="no mark",
        source="M10",
        path="fastlora/routing/caches.py",
        before="weights_versions.version_of_trainable_weights() if factors_can_change else None\n",
        after="None\n",
        tests=(
            "tests/kernels/test_mixed_tables.py::test_tables_end_with_what_they_were_made_from",
        ),
    ),
    Fault(
        sentence="A task runs a layer with the adapters of another task's block.",
        kind="a missing check",
        source="issue 29",
        path="fastlora/routing/active.py",
        before="    if _thread.has_task_blocks and routing is not None and ",
        after="    if False and ",
        tests=("tests/routing/test_in_force.py::test_tasks_do_not_get_the_blocks_of_others",),
    ),
    Fault(
        sentence="A checkpoint before the first block is recomputed with the block's adapters.",
        kind="wrong adapter",
        source="issue 29",
        path="fastlora/model/tuner.py",
        before="        patch_activation_checkpointing()\n",
        after="",
        tests=(
            "tests/routing/test_open_blocks.py::"
            "test_a_checkpoint_before_the_first_block_of_a_process[ours]",
        ),
    ),
    Fault(
        sentence="Slots of a block are on the default device.",
        kind="wrong device",
        source="issue 29",
        path="fastlora/routing/ids.py",
        before='torch.tensor(slots, dtype=torch.int64, device="cpu")',
        after="torch.tensor(slots, dtype=torch.int64)",
        tests=(
            "tests/routing/test_mixed_blocks.py::"
            "test_a_default_device_does_not_matter[5-float32-False]",
        ),
    ),
)
