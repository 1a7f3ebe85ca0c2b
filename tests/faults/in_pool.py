"""Faults of ``fastlora/pool``: leases, slots, tiers, reading, DoRA's scales and closing."""

from __future__ import annotations

from tests.faults.fault import Fault

_ERRORS = "tests/pool/test_pool_errors.py"
_EXPERTS = "tests/pool/test_pool_experts.py"
_SCALES = "tests/pool/test_pool_scales.py"
_THREADS = "tests/pool/test_pool_threads.py"

FAULTS = (
    Fault(
        sentence="An adapter with replicated layers is registered, and adapts other layers.",
        kind="layers taken for others",
        source="f591f74",
        path="fastlora/pool/reader.py",
        before="        if config.layer_replication:",
        after="        if False:",
        tests=("tests/pool/test_pool_errors.py::test_an_adapter_that_raises_changes_nothing",),
    ),
    Fault(
        sentence="An adapter with trained tokens is registered, and fails when it is first used.",
        kind="a check left out",
        source="D2",
        path="fastlora/pool/reader.py",
        before="        if config.trainable_token_indices:",
        after="        if False:",
        tests=("tests/pool/test_pool_errors.py::test_an_adapter_that_raises_changes_nothing",),
    ),
    Fault(
        sentence="A slot gets another adapter while a captured graph may still read the old one.",
        kind="a slot changed before its readers end",
        source="21830f9",
        path="fastlora/pool/tiers.py",
        before="""\
                if old is not None:  # a captured graph that still runs may look up the slot
                    self._transfers.order_writes_after_reads(old.reads.values())
""",
        after="",
        tests=(f"{_THREADS}::test_a_slot_changes_its_meaning_behind_its_readers",),
    ),
    Fault(
        sentence="A slot means a free column after an adapter failed to reach the device.",
        kind="a slot left by a failed copy",
        source="031a2b0",
        path="fastlora/pool/tiers.py",
        before="""\
                self._tables.assign(slot, NO_COLUMN if old is None else old.column)
                self._tables.clear_adapter_column(column)
""",
        after="""\
                self._tables.clear_adapter_column(column)
""",
        tests=(f"{_ERRORS}::test_an_adapter_that_fails_last_leaves_the_slot",),
    ),
    Fault(
        sentence="A hot swap in the pool gives the new adapter another slot than the old one had.",
        kind="wrong slot at a swap",
        source="91cf170",
        path="fastlora/pool/tiers.py",
        before="slot = self._free_slots[-1] if old is None else old.slot",
        after="slot = self._free_slots[-1] if self._free_slots or old is None else old.slot",
        tests=("tests/pool/test_pool.py::test_a_hot_swap_leaves_running_forwards_alone",),
    ),
    Fault(
        sentence="A name means the new adapter before anything of it has reached the device.",
        kind="a change before what can fail",
        source="91cf170",
        path="fastlora/pool/tiers.py",
        before="""\
        if now:  # first, because it can fail: the name still has its old adapter
            self._evict_until_device_has_room({name: image})
""",
        after="""\
        self.entries[name] = entry
        if now:
            self._evict_until_device_has_room({name: image})
""",
        tests=(f"{_ERRORS}::test_a_load_that_fails",),
    ),
    Fault(
        sentence="An adapter is in no tier after another one of its batch failed to be copied.",
        kind="an image lost by a failed copy",
        source="b92ecd2",
        path="fastlora/pool/tiers.py",
        before="if not shares or name not in self.device:",
        after="if not shares:",
        tests=(f"{_THREADS}::test_a_copy_that_fails_loses_no_adapter",),
    ),
    Fault(
        sentence="Leases may take the column that is kept free for a swap.",
        kind="a column not kept free",
        source="91cf170",
        path="fastlora/pool/tiers.py",
        before="tables.column_of.numel(), tables.rank.shape[1] - 1",
        after="tables.column_of.numel(), tables.rank.shape[1]",
        tests=(
            "tests/pool/test_pool.py::test_swaps_beyond_the_spare_columns_wait_in_the_cpu_tier",
        ),
    ),
    Fault(
        sentence="A pool learns only at the first lease that a registered adapter uses DoRA.",
        kind="a fact learned too late",
        source="5c03a82",
        path="fastlora/pool/tiers.py",
        before="        self._tables.uses_dora |= uses_dora\n",
        after="",
        tests=(f"{_SCALES}::test_a_pool_knows_of_dora_from_its_registration_on",),
    ),
    Fault(
        sentence="A column of a DoRA adapter stays one of DoRA when a plain adapter is written.",
        kind="a stale mark",
        source="5c03a82",
        path="fastlora/pool/address_tables.py",
        before="        self._dora_columns.discard(column)\n",
        after="",
        tests=(f"{_SCALES}::test_a_column_that_is_written_again_is_of_its_last_adapter",),
    ),
    Fault(
        sentence="Scales are not made again for replaced adapters that leases still hold.",
        kind="stale scales",
        source="8b99b55",
        path="fastlora/pool/leases.py",
        before="lease = self._create_lease(tuple(self._tiers.loaded_adapters))",
        after="lease = self._create_lease(tuple(self._tiers.device.values()))",
        tests=(f"{_SCALES}::test_refresh_reaches_adapters_that_were_replaced",),
    ),
    Fault(
        sentence="A pinned adapter waits for room behind others to have its scales made.",
        kind="a wait for what is there",
        source="8b99b55",
        path="fastlora/pool/leases.py",
        before="""\
            lease = self._create_lease((loaded,))  # it is on the device and needs no more room
        self._make_stream_wait_until_ready(lease).release()
""",
        after="""\
        self.acquire(LeaseRequest((name,)), None).release()
""",
        tests=(f"{_SCALES}::test_a_pinned_adapter_waits_for_nobodys_room",),
    ),
    Fault(
        sentence="A lease whose scales are there waits for those that another thread makes.",
        kind="a wait for what others make",
        source="8b99b55",
        path="fastlora/pool/scales.py",
        before="""\
        if not dora or not self._find_stale_scales_and_base_weight_stamps(dora)[0]:
""",
        after="        if not dora:\n",
        tests=(f"{_SCALES}::test_threads_make_them_once",),
    ),
    Fault(
        sentence="Scales that could not all be made replace the ones that the tables point to.",
        kind="half a change after a failure",
        source="8b99b55",
        path="fastlora/pool/scales.py",
        before="by_module, blocks = dict(scales.by_module), dict(scales.blocks)",
        after="by_module, blocks = scales.by_module, scales.blocks",
        tests=(f"{_SCALES}::test_a_failure_halfway_leaves_tables_of_what_is_there",),
    ),
    Fault(
        sentence="A lease on all that is on the device counts as no use of an adapter.",
        kind="a use not counted",
        source="91cf170",
        path="fastlora/pool/leases.py",
        before="            self.hits += len(self._tiers.device)\n",
        after="",
        tests=("tests/pool/test_pool.py::test_lease_resident_takes_what_is_there",),
    ),
    Fault(
        sentence="A pool that is closing still grants leases.",
        kind="a lease granted too late",
        source="8e62ffc",
        path="fastlora/pool/leases.py",
        before="        if self.closing:\n            raise PoolClosedError(",
        after="        if self.closed:\n            raise PoolClosedError(",
        tests=(f"{_THREADS}::test_blocks_of_the_model_while_and_after_its_pool_closes",),
    ),
    Fault(
        sentence="Adapters are prefetched one after another, behind one that is slow to read.",
        kind="a wait in the background",
        source="8e62ffc",
        path="fastlora/pool/leases.py",
        before="_THREADS = 4",
        after="_THREADS = 1",
        tests=(f"{_THREADS}::test_a_slow_first_use_delays_no_other",),
    ),
    Fault(
        sentence="A closed pool leaves the model without the methods that the instance had.",
        kind="a method not given back",
        source="e5b400a",
        path="fastlora/pool/layers.py",
        before="""\
            if before is None:
                del own[method]
            else:
                own[method] = before
""",
        after="            del own[method]\n",
        tests=(f"{_ERRORS}::test_close_gives_back_methods_of_the_instance",),
    ),
    Fault(
        sentence="The size of an adapter is checked after its tensors have been read.",
        kind="a limit checked too late",
        source="9793bd4",
        path="fastlora/pool/reader.py",
        before="""\
            self._check_bytes(opened.weights_file_size, str(folder))
            yield opened
""",
        after="""\
            yield opened
            self._check_bytes(opened.weights_file_size, str(folder))
""",
        tests=(f"{_ERRORS}::test_limits_are_checked_before_a_tensor_is_read[bytes]",),
    ),
    Fault(
        sentence="The targets that a pool remembers keep replaced stacks in memory.",
        kind="a cache that keeps memory alive",
        source="issue 31",
        path="fastlora/pool/reader.py",
        before="without = replace(found.parameters, parameters=[])",
        after="without = replace(found.parameters)",
        tests=(f"{_EXPERTS}::test_replaced_stacks_are_freed",),
    ),
    Fault(
        sentence="A pool follows links out of the folder that adapters must be in.",
        kind="a path outside of the folder",
        source="E6",
        path="fastlora/pool/reader.py",
        before="open_adapter_folder(folder, self._root, self._limits) as opened:",
        after="open_adapter_folder(folder, None, self._limits) as opened:",
        tests=(f"{_ERRORS}::test_files_outside_the_root",),
    ),
    Fault(
        sentence="A pool reads the tensors of other files than those that it has checked.",
        kind="files opened twice",
        source="9793bd4",
        path="fastlora/pool/reader.py",
        before="""\
            return self._pack(header.config, locations, opened.load().tensors, str(folder))
""",
        after="""\
            with open_adapter_folder(folder, self._root) as again:
                return self._pack(again.config, locations, again.load().tensors, str(folder))
""",
        tests=(f"{_ERRORS}::test_a_file_is_read_as_it_was_checked",),
    ),
    Fault(
        sentence="A config may be as large as for any model, however few modules the pool has.",
        kind="no bound on a config",
        source="cf2946f",
        path="fastlora/pool/reader.py",
        before="config=min(_CONFIG_BYTES + names, MAX_CONFIG_BYTES),",
        after="config=MAX_CONFIG_BYTES,",
        tests=(f"{_ERRORS}::test_configs_are_bounded_by_what_the_modules_need",),
    ),
    Fault(
        sentence="A batch by names is planned for the pool's largest rank, not for its own.",
        kind="a plan for a larger rank",
        source="9793bd4",
        path="fastlora/pool/router.py",
        before="""\
        lease = exit_stack.enter_context(pool.lease(names))
        max_rank = lease.max_rank or 1""",
        after="""\
        lease = exit_stack.enter_context(pool.lease(names))
        max_rank = pool.max_rank or lease.max_rank""",
        tests=(f"{_ERRORS}::test_blocks_by_name_plan_for_the_ranks_that_they_use",),
    ),
    Fault(
        sentence="An adapter on the device has the factors of one module on all of them.",
        kind="wrong key",
        source="M10",
        path="fastlora/pool/records.py",
        before="        return self._views[table_row]\n",
        after="        return next(iter(self._views.values()))\n",
        tests=("tests/pool/test_pool.py::test_residents_hold_what_the_files_say",),
    ),
    Fault(
        sentence="The layout of an adapter's image stays when its last image is gone.",
        kind="kept memory",
        source="M10",
        path="fastlora/pool/packed_adapter.py",
        before="        self._layouts = WeakValueDictionary()\n",
        after="        self._layouts = {}\n",
        tests=("tests/pool/test_pool.py::test_adapters_of_equal_shape_share_a_layout",),
    ),
    Fault(
        sentence="An image that was read for a refused lease stays in memory.",
        kind="kept memory",
        source="M10",
        path="fastlora/pool/tiers.py",
        before="self.staged: WeakValueDictionary[str, PackedAdapter] = WeakValueDictionary()",
        after="self.staged: dict[str, PackedAdapter] = {}",
        tests=("tests/pool/test_pool.py::test_what_found_no_room_is_not_cached",),
    ),
    Fault(
        sentence="Images in CPU memory take more than the pool's budget.",
        kind="no bound",
        source="M10",
        path="fastlora/pool/tiers.py",
        before="                if used <= self.cpu_bytes:\n                    break\n",
        after="                break\n",
        tests=("tests/pool/test_pool.py::test_budgets_hold_at_every_step",),
    ),
    Fault(
        sentence="The adapter that was used last leaves the device first.",
        kind="order of use",
        source="M10",
        path="fastlora/pool/tiers.py",
        before="        for name in images:\n            self.device.move_to_end(name)\n",
        after="",
        tests=("tests/pool/test_pool.py::test_the_least_recently_used_leaves_first",),
    ),
    Fault(
        sentence="A replaced adapter stays on the device when its last lease has ended.",
        kind="kept memory",
        source="M10",
        path="fastlora/pool/tiers.py",
        before="        if loaded in self.retired and not loaded.leases:\n",
        after="        if False:\n",
        tests=("tests/pool/test_pool.py::test_unloading_spares_the_leases",),
    ),
    Fault(
        sentence="Memory on the device is reused while a forward may still read it.",
        kind="memory reused before its readers end",
        source="M10",
        path="fastlora/pool/tiers.py",
        before=(
            "        self._transfers.order_writes_after_reads(loaded.reads.values())\n"
            "        with self"
        ),
        after="        with self",
        tests=(
            "tests/pool/test_pool_threads.py::test_memory_on_the_device_is_reused_behind_its_readers",
        ),
    ),
    Fault(
        sentence="Unloading an adapter leaves its packed factors in memory.",
        kind="kept memory",
        source="M10",
        path="fastlora/pool/pool.py",
        before="self.group.packs.clear()",
        after="pass",
        tests=("tests/routing/test_mixed_blocks.py::test_unloading_frees_packed_factors",),
    ),
    Fault(
        sentence="A thread holds a lease that it has ended.",
        kind="a lease kept",
        source="M10",
        path="fastlora/pool/leases.py",
        before="            self.held[owner].remove(lease)\n",
        after="            pass\n",
        tests=("tests/pool/test_pool.py::test_a_lease_keeps_its_adapters_on_the_device",),
    ),
    # ------------------------------------------------------------ adapters on experts and routers
    Fault(
        sentence="The image of an evicted adapter on experts stays in a cache of the layers.",
        kind="kept memory",
        source="issue 31",
        path="fastlora/layers/adapted_parameters.py",
        before="            or watched.t().is_contiguous()  # Nothing is copied.\n",
        after="",
        tests=(f"{_EXPERTS}::test_factors_are_read_in_place_and_freed",),
    ),
    Fault(
        sentence="A pool scales the weight of a linear layer by patterns for the layer's name.",
        kind="wrong scaling",
        source="issue 31",
        path="fastlora/pool/reader.py",
        before="locations[key] = TensorTargetAndKind(index, _BLOCK_OF[kind], name)",
        after="locations[key] = TensorTargetAndKind(index, _BLOCK_OF[kind], target)",
        tests=("tests/model/test_expert_files.py::test_files_of_peft_load",),
    ),
    Fault(
        sentence="A captured graph runs the experts of a pool without its adapters.",
        kind="adapters left out",
        source="issue 31",
        path="fastlora/layers/adapted_parameters.py",
        before="        if routing.captured:\n",
        after="        if False:\n",
        tests=(f"{_EXPERTS}::test_graphs_break_at_experts_of_a_pool",),
    ),
    Fault(
        sentence="On kernels the host reads in each layer which experts the router chose.",
        kind="a wait for the device",
        source="issue 31",
        path="fastlora/layers/experts.py",
        before='if conditions.compiling or conditions.impl != "eager" or bad.is_meta:',
        after='if bad.any() and (conditions.compiling or conditions.impl != "eager"):',
        tests=("tests/kernels/test_stacks.py::test_the_host_waits_for_no_layer",),
    ),
)
