"""Faults of adapter files: replaced, locked, read as one, and found where they may be."""

from __future__ import annotations

from tests.faults.fault import Fault

_FILES = "tests/model/test_adapter_files.py"
_REPLACE = "tests/model/test_replace_files.py"

FAULTS = (
    Fault(
        sentence="A renamed file can lose its name in a crash, since its folder is not flushed.",
        kind="a rename not on disk",
        source="103fddf",
        path="fastlora/model/atomic_files.py",
        before="            os.replace(partial, path)\n            fsync_path(path.parent)\n",
        after="            os.replace(partial, path)\n",
        tests=(f"{_REPLACE}::test_order_on_disk",),
    ),
    Fault(
        sentence="A file takes its name before its content is on disk.",
        kind="a content not on disk",
        source="R2",
        path="fastlora/model/atomic_files.py",
        before="        for partial in partials:\n            fsync_path(partial)\n",
        after="",
        tests=(f"{_REPLACE}::test_order_on_disk",),
    ),
    Fault(
        sentence="A writer removes the temporary files of another one that still writes.",
        kind="a file of a living writer",
        source="R6",
        path="fastlora/model/atomic_files.py",
        before="if _owner_process_ended(folder) if held is None else held:",
        after="if _owner_process_ended(folder) or held is not None:",
        tests=(f"{_REPLACE}::test_files_of_a_living_writer_stay",),
    ),
    Fault(
        sentence="What killed saves leave stays in the folder for ever.",
        kind="files that only grow in number",
        source="103fddf",
        path="fastlora/model/atomic_files.py",
        before="    remove_abandoned_temp_folders(path.parent)\n    folder, descriptor",
        after="    folder, descriptor",
        tests=(f"{_REPLACE}::test_without_flock_the_process_decides",),
    ),
    Fault(
        sentence="Where a file system has no locks, the writer's process is not asked for.",
        kind="a lock taken for granted",
        source="R6",
        path="fastlora/model/atomic_files.py",
        before="""\
        return False
    except OSError:
        return None
    return True
""",
        after="""\
        return False
    except OSError:
        return True
    return True
""",
        tests=(f"{_REPLACE}::test_without_flock_the_process_decides",),
    ),
    Fault(
        sentence="Two saves into one folder do not wait for each other.",
        kind="a lock not taken",
        source="103fddf",
        path="fastlora/model/adapter_folder.py",
        before="    with folder_lock(folder), atomic_replace_each_file(*paths) as "
        "(weights, new_config):",
        after="    with atomic_replace_each_file(*paths) as (weights, new_config):",
        tests=(f"{_FILES}::test_simultaneous_saves",),
    ),
    Fault(
        sentence="A save that is killed between its files leaves a new config to old weights.",
        kind="a kill between files",
        source="R2",
        path="fastlora/model/adapter_folder.py",
        before="""\
        paths = folder / WEIGHTS_NAME, folder / CONFIG_NAME
        with folder_lock(folder), atomic_replace_each_file(*paths) as (weights, new_config):
""",
        after="""\
        paths = folder / CONFIG_NAME, folder / WEIGHTS_NAME
        with folder_lock(folder), atomic_replace_each_file(*paths) as (new_config, weights):
""",
        tests=("tests/crash/test_save.py::test_kills_at_fixed_calls[1]",),
    ),
    Fault(
        sentence="New weights beside an old config are read with the old scaling.",
        kind="a mixture of two saves",
        source="103fddf",
        path="fastlora/model/adapter_files.py",
        before="    if hashlib.sha256(config_file_text).hexdigest() != metadata.get(_REPLACES):\n",
        after="    if config_file_text:\n",
        tests=(f"{_FILES}::test_a_save_that_was_cut_off",),
    ),
    Fault(
        sentence="A config that was read before two saves is used for the weights of the second.",
        kind="files that change while they are read",
        source="103fddf",
        path="fastlora/model/adapter_files.py",
        before="""\
            if own is None and _read_config(path, root, limits.config) != text:
                continue
""",
        after="",
        tests=(f"{_FILES}::test_both_files_replaced_while_they_are_read",),
    ),
    Fault(
        sentence="A config that is saved alone does not count if the last save replaced it.",
        kind="an old config saved again",
        source="59aa300",
        path="fastlora/model/config.py",
        before='config_file_bytes_for_config_only_save(folder, text.encode("utf-8"))',
        after='text.encode("utf-8")',
        tests=(f"{_FILES}::test_the_config_that_was_replaced_can_be_saved_again",),
    ),
    Fault(
        sentence="A file that becomes a link while it is opened is followed out of the folder.",
        kind="a path outside of the served folder",
        source="E6",
        path="fastlora/model/adapter_files.py",
        before="        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=at)",
        after="        return os.open(name, flags, dir_fd=at)",
        tests=(f"{_FILES}::test_a_link_that_appears_after_the_check",),
    ),
    Fault(
        sentence="An adapter is read from a device or a folder that has a file's name.",
        kind="a file that is none",
        source="E6",
        path="fastlora/model/adapter_files.py",
        before="    if not stat.S_ISREG(os.fstat(descriptor).st_mode):\n",
        after="    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):\n",
        tests=(f"{_FILES}::test_files_that_are_not_regular",),
    ),
    Fault(
        sentence="A config of any size is written, which no reader accepts.",
        kind="no bound on a config",
        source="600789c",
        path="fastlora/model/config.py",
        before="        if len(text) > MAX_CONFIG_BYTES:\n",
        after="        if not text:\n",
        tests=(f"{_FILES}::test_a_config_of_a_gigabyte_is_not_read",),
    ),
)
