"""Faults of the kernels: masks, strides, partial sums, slots, dropout, and cached launches."""

from __future__ import annotations

from tests.faults.fault import Fault

_ONE = "tests/kernels/test_one_adapter.py::"
_MIXED = "tests/kernels/test_mixed_forward.py::"
_GRADS = "tests/kernels/test_mixed_lora_grad.py::"
_LAUNCHES = "tests/ops/test_cached_launches.py::"

FAULTS = (
    # ----------------------------------------------------------------------------- one adapter
    Fault(
        "The third of siblings reads the second one's columns of s.",
        "wrong module",
        "fde607c",
        "kernels/lora_expand.py",
        "first_r = of_module(module, 0, R, R + R_1, R + R_1 + R_2, NUM_MODULES)",
        "first_r = of_module(module, 0, R, R_1, R_1 + R_2, NUM_MODULES)",
        (
            "tests/kernels/test_shared_input_launches.py::"
            "test_expand_writes_what_a_product_accumulates_on"
            "[float32-True-(70, 33, 33)-(8, 3, 40)]",
        ),
    ),
    Fault(
        "Every term of an expand that adds the terms of siblings reads the first one's s.",
        "wrong term",
        "66d6585e",
        "kernels/lora_expand.py",
        "own_s = all_s[term] + first_m",
        "own_s = all_s[0] + first_m",
        (
            "tests/kernels/test_shared_input_launches.py::"
            "test_one_expand_adds_the_terms_of_siblings[float32-ranks0-64]",
        ),
    ),
    Fault(
        "A launch for some columns of dy overwrites the ds of the columns before.",
        "lost partial sum",
        "66d6585e",
        "fastlora/ops/triton/backward.py",
        "adds_ds=with_ds and number > 0,",
        "adds_ds=False,",
        (
            "tests/kernels/test_partial_bytes.py::"
            "test_a_mixed_gradient_in_several_launches[float32-True]",
        ),
    ),
    Fault(
        "All row tiles of a shrink drop the elements of the first one.",
        "wrong mask",
        "912c58d",
        "kernels/lora_shrink.py",
        "keep = philox_keep_mask(seed, first_m, k, threshold, 0, BLOCK_M, BLOCK_K)",
        "keep = philox_keep_mask(seed, 0, k, threshold, 0, BLOCK_M, BLOCK_K)",
        (f"{_ONE}test_every_chunk_and_masks_whatever_the_tile[shrink-(16, 16, 16)]",),
    ),
    Fault(
        "A shrink of siblings reads their rank rows with the first one's stride twice.",
        "wrong strides",
        "fde607c",
        "kernels/lora_shrink.py",
        "others[i] + tl.cast(r - firsts[i], tl.int64) * stride_ar, rank_rows",
        "others[i] + tl.cast(r - firsts[i], tl.int64) * stride_ak, rank_rows",
        ("tests/kernels/test_shared_input_launches.py::test_shrink[float32-ranks1-72-1]",),
    ),
    Fault(
        "An element that dropout drops passes where it is not finite.",
        "NaN through a mask",
        "51264ce",
        "kernels/lora_dropout.py",
        "out = tl.where(keep, x.to(tl.float32) * tl.cast(inv_keep, tl.float32), 0.0)",
        "out = keep.to(tl.float32) * x.to(tl.float32) * tl.cast(inv_keep, tl.float32)",
        (f"{_ONE}test_a_dropped_element_that_is_not_finite_does_not_pass[dropout]",),
    ),
    Fault(
        "Every sibling's gradient of lora_a has the first one's mask.",
        "wrong seed",
        "51ebfba",
        "kernels/lora_grad_a.py",
        "seed = tl.load(seeds_ptr + i)",
        "seed = tl.load(seeds_ptr)",
        (f"{_ONE}test_runs_repeat_bit_for_bit[float32-grad_a]",),
    ),
    Fault(
        "Parts of the rows write their sums over each other's.",
        "shared partial sum",
        "51ebfba",
        "kernels/lora_grad_a.py",
        "out = outs[i] + (tl.cast(split, tl.int64) * ranks[i] + first_r) * K + first_k",
        "out = outs[i] + (tl.cast(0, tl.int64) * ranks[i] + first_r) * K + first_k",
        (f"{_ONE}test_runs_repeat_bit_for_bit[float32-grad_a]",),
    ),
    Fault(
        "dy is read with the stride of its rows for its columns.",
        "swapped strides",
        "51ebfba",
        "kernels/lora_grad_b.py",
        "offs_dy = offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn",
        "offs_dy = offs_m[:, None] * stride_dyn + offs_n[None, :] * stride_dym",
        (f"{_ONE}test_expanded[grad_b-shape1]",),
    ),
    Fault(
        "A bias's gradient is one running sum, with three times the error of PyTorch's.",
        "rounding",
        "442066c",
        "kernels/row_sums.py",
        "_PARTS = tl.constexpr(8)",
        "_PARTS = tl.constexpr(1)",
        ("tests/kernels/test_ops.py::test_sums_of_rows_are_as_good_as_pytorchs",),
    ),
    Fault(
        "The linear adds the adapter once for each part of K.",
        "added twice",
        "fde607c",
        "kernels/lora_linear.py",
        "is_first = first_k == 0",
        "is_first = first_k >= 0",
        (
            "tests/kernels/test_shared_input_launches.py::"
            "test_a_linear_that_splits_k[float32-2-(70, 33, 33)-(8, 3, 40)]",
        ),
    ),
    Fault(
        "Partial sums of s behind the first one are not added.",
        "lost partial sum",
        "912c58d",
        "kernels/rank_rows.py",
        "for partial in tl.range(0, num_partials, num_stages=1, loop_unroll_factor=IN_FLIGHT):",
        "for partial in tl.range(0, 1, num_stages=1, loop_unroll_factor=IN_FLIGHT):",
        (f"{_ONE}test_partial_sums_of_s_are_added_and_stored[float32-2]",),
    ),
    # ------------------------------------------------------------------------- mixed batches
    Fault(
        "A factor that is not finite reaches the rows of other adapters in its tile.",
        "NaN across rows",
        "4cc822b",
        "kernels/mixed_rows.py",
        "clean = tl.where(finite, scaled, 0.0)",
        "clean = scaled",
        (f"{_MIXED}test_rows_stay_separate[linear]",),
    ),
    Fault(
        "Rows of an id out of range come out finite.",
        "wrong id",
        "109e6d6",
        "kernels/mixed_lora_expand.py",
        'scale = tl.where(slot == INVALID_SLOT, float("nan"), scale)',
        "scale = tl.where(slot == INVALID_SLOT, 0.0, scale)",
        (f"{_MIXED}test_rows_of_an_invalid_id_are_nan[expand]",),
    ),
    Fault(
        "The mask of an adapter's rows depends on what else is in the batch.",
        "wrong mask",
        "7c09815",
        "kernels/mixed_lora_expand.py",
        "first_row = first_m - tl.load(slot_start_ptr + slot, mask=held, other=0)",
        "first_row = first_m",
        (f"{_GRADS}test_masks_are_held_exactly",),
    ),
    Fault(
        "Siblings of a mixed batch read the first one's ranks.",
        "wrong module",
        "2f25eba",
        "kernels/mixed_lora_expand.py",
        "        rank_ptr += module * stride_table\n",
        "",
        (
            "tests/kernels/test_shared_input_launches.py::"
            "test_grouped_layers_of_a_mixed_batch[float32-1-(70, 5, 33)-expand]",
        ),
    ),
    Fault(
        "Two runs of rows write their sums into one partial sum.",
        "shared partial sum",
        "7c09815",
        "kernels/lora_grad_b.py",
        "partial = tl.cast(first_m // rows + slot, tl.int64)",
        "partial = tl.cast(first_m // rows, tl.int64)",
        (f"{_GRADS}test_adapters_over_several_runs[float32-8]",),
    ),
    Fault(
        "Rows with scales of DoRA that are yet to be made come out finite.",
        "pending scales",
        "5c03a82",
        "kernels/mixed_dora_scale.py",
        'g = tl.load(g_ptr + offs_n, mask=offs_n < columns, other=float("nan"))',
        "g = tl.load(g_ptr + offs_n, mask=offs_n < columns, other=0.0)",
        (
            "tests/kernels/test_mixed_dora_scale.py::"
            "test_rows_that_are_wrong_stay_so[kernel-float32]",
        ),
    ),
    Fault(
        "The scales of DoRA are applied to the base bias too.",
        "scaled bias",
        "365eab9",
        "kernels/mixed_dora_scale.py",
        "y = (y - bias[None, :]) * g[None, :] + bias[None, :]",
        "y = y * g[None, :]",
        ("tests/kernels/test_mixed_dora_scale.py::test_values[kernel-float32-17-257-True]",),
    ),
    Fault(
        "A slot's first row is counted in ids where an id has several rows.",
        "wrong unit",
        "109e6d6",
        "kernels/mixed_rows_sort.py",
        "tl.store(slot_start_ptr + first + offs, low * each, mask=first + offs <= slots)",
        "tl.store(slot_start_ptr + first + offs, low, mask=first + offs <= slots)",
        ("tests/kernels/test_mixed_rows_sort.py::test_every_entry[17-3-3]",),
    ),
    Fault(
        "Rows of an invalid id are looked for at the beginning of the sorted rows.",
        "wrong order",
        "issue 32",
        "kernels/mixed_rows.py",
        "row_slot = tl.load(segment_slot_ptr + row_segment, mask=row_segment >= 0, other=0)",
        "row_slot = tl.load(segment_slot_ptr) + row_segment",
        ("tests/kernels/test_mixed_forward.py::test_rows_of_an_invalid_id_are_nan",),
    ),
    Fault(
        "Ids with a stride are read side by side.",
        "wrong strides",
        "109e6d6",
        "kernels/mixed_rows_sort.py",
        "ids_ptr + offs_b * stride_ids",
        "ids_ptr + offs_b",
        ("tests/kernels/test_mixed_rows_sort.py::test_ids_with_a_stride",),
    ),
    # ------------------------------------------------------------------- cached launches
    Fault(
        "A cached launch serves tensors of other strides.",
        "strides",
        "a1a856e",
        "kernels/launch.py",
        "        key_parts += map(_strides_of, tensors)\n",
        "",
        (f"{_LAUNCHES}test_the_kernel_is_the_one_that_triton_takes",),
    ),
    Fault(
        "A launch that was cached for one tensor given twice serves two tensors.",
        "one tensor for two",
        "96aff13",
        "kernels/launch.py",
        "            key_parts += map(addresses.index, addresses)\n",
        "            pass\n",
        (f"{_LAUNCHES}test_one_tensor_given_twice_is_not_taken_for_two",),
    ),
    Fault(
        "A cached launch rounds fp32 products as at its first call.",
        "rounding",
        "c0e87ab",
        "kernels/launch.py",
        "            key_parts.append(_rounding_of_fp32())\n",
        "            pass\n",
        (f"{_LAUNCHES}test_how_fp32_rounds_is_seen",),
    ),
    Fault(
        "What a cached function computes with PyTorch is computed at its first call alone.",
        "lost product",
        "c71b816",
        "kernels/launch.py",
        "found = None if operators.computed else _steps(given, tensors, calls, fresh, result)",
        "found = _steps(given, tensors, calls, fresh, result)",
        (f"{_LAUNCHES}test_what_else_a_function_does_is_done_each_time",),
    ),
    Fault(
        sentence="A function caches launches for any number of cache keys.",
        kind="no bound",
        source="M10",
        path="kernels/launch.py",
        before="                cache.clear()\n",
        after="                pass\n",
        tests=("tests/ops/test_cached_launches.py::test_looks_are_dropped_past_a_number_of_them",),
    ),
    Fault(
        sentence="Two threads sort a call's arguments by two records, and keep its launches twice.",
        kind="other threads",
        source="M10",
        path="kernels/launch.py",
        before="    return _known_groups.setdefault(kinds, found)",
        after="    return found",
        tests=("tests/ops/test_cached_launches.py::test_two_threads_sort_arguments_alike",),
    ),
    # ------------------------------------------------------------------------------ measured rows
    Fault(
        "A tile measured for one layer's gradient of lora_a is used for three layers.",
        "wrong key",
        "issue 30",
        "kernels/configs.py",
        "else _measured(rows, m, n, k, r, group_size)",
        "else _measured(rows, m, n, k, r)",
        (
            "tests/kernels/test_measurements.py::"
            "test_a_measurement_covers_its_group_and_nearby_numbers_of_rows",
        ),
    ),
    Fault(
        "The tuner measures layers one by one that share a launch in a model.",
        "wrong sizes",
        "issue 30",
        "bench/shapes.py",
        "TUNE_GROUPS = (*SHARED_INPUTS, ",
        "TUNE_GROUPS = (*((name,) for names in SHARED_INPUTS for name in names), ",
        (
            "tests/bench/test_tune.py::"
            "test_every_launch_of_a_layer_has_the_fastest_measured_tile[linears0-case0-16]",
        ),
    ),
)
