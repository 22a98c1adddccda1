"""Mistakes in what both models stand on."""

from tests.mutations import Mistake

DURABLE = "test_common_files.py::test_a_file_counts_once_its_bytes_are_on_the_disk"
MISFITS = "test_common_tensors.py::test_what_does_not_fit_is_named_and_changes_nothing"

MISTAKES = {
    "no_fsync": Mistake("common/files.py", "            os.fsync(f.fileno())\n", "", DURABLE),
    "no_fsync_of_the_directory": Mistake("common/files.py", "        sync_directory(path.parent)\n", "", DURABLE),
    "temporary_file_left": Mistake(
        "common/files.py", "            temporary.unlink()\n", "            pass\n",
        "test_common_files.py::test_a_failed_write_names_the_file_and_leaves_the_old_one",
    ),
    "pipes_waited_for": Mistake(
        "common/files.py", "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC", "os.O_RDONLY | os.O_CLOEXEC",
        "test_common_files.py::test_only_regular_files_are_opened_and_nothing_waits",
    ),
    "hash_that_forgets_the_words_before": Mistake(
        "common/seeds.py", "_splitmix64(state ^ _splitmix64(", "_splitmix64(_splitmix64(",
        "test_common_seeds.py::test_the_hash_is_pinned",
    ),
    "controls_beyond_ascii_shown": Mistake(
        "common/text.py", "\\x7f-\\x9f", "\\x7f",
        "test_common_text.py::test_every_control_character_is_shown_as_an_escape",
    ),
    "checksum_of_a_record_not_compared": Mistake(
        "common/records.py", "_CHECKSUM_KEY in content and content.pop(_CHECKSUM_KEY) != _checksum(content)",
        "_CHECKSUM_KEY in content and not content.pop(_CHECKSUM_KEY)",
        "test_common_files.py::test_a_record_with_a_checksum_is_as_it_was_written",
    ),
    "hash_of_the_first_block": Mistake(
        "common/files.py", "        while block := f.read(_BLOCK):\n", "        if block := f.read(_BLOCK):\n",
        "test_common_files.py::test_a_file_is_described_by_size_and_hash",
    ),
    "records_coerce_what_they_read": Mistake(
        "common/records.py", "strict=True, extra=\"allow\"", "strict=False, extra=\"allow\"",
        "test_common_files.py::test_a_record_is_checked_and_the_key_named",
    ),
    "weights_that_are_not_finite_taken": Mistake(
        "common/tensors.py", "if not (tensors[key].is_meta or _is_finite(tensors[key]))]",
        "if key not in own]",
        MISFITS,
    ),
    "weights_of_another_shape_broadcast": Mistake(
        "common/tensors.py", "if tensors[key].shape != own[key].shape]", "if tensors[key].dim() != own[key].dim()]",
        MISFITS,
    ),
    "missing_weights_left_as_they_are": Mistake(
        "common/tensors.py", "[key for key in own if key not in tensors],", "[],", MISFITS,
    ),
    "code_of_a_file_run": Mistake(
        "common/tensors.py", "weights_only=True, mmap", "weights_only=False, mmap",
        "test_common_tensors.py::test_no_code_of_a_file_is_run",
    ),
    "archives_not_checked": Mistake(
        "common/tensors.py", "sum(info.file_size for info in infos)", "sum(info.compress_size for info in infos)",
        "test_common_tensors.py::test_refused",
    ),
    "prefixes_of_wrappers_kept": Mistake(
        "common/tensors.py", 'while key.startswith(_WRAPPERS):', 'while key.startswith("module.module."):',
        "test_common_tensors.py::test_layouts",
    ),
    "metadata_left_out": Mistake(
        "common/tensors.py", '{"format": "pt"} if metadata is None else', '{} if metadata is None else',
        "test_common_tensors.py::test_written_files_are_read_by_the_library",
    ),
    "unknown_keys_let_through": Mistake(
        "common/sections.py", "        if unknown:\n", "        if len(unknown) > 8:\n",
        "test_launch_config.py::test_an_unknown_key_names_the_nearest",
    ),
    "home_directories_not_expanded": Mistake(
        "common/sections.py", "expanded = os.path.expanduser(path)", "expanded = str(path)",
        "test_launch_sections.py::test_every_path_knows_the_home_directory",
    ),
    "nan_written_as_json": Mistake(
        "common/files.py", "indent=1, allow_nan=False)", "indent=1)",
        "test_common_files.py::test_no_json_is_written_that_others_cannot_read",
    ),
    "weights_read_by_the_suffix_of_their_file": Mistake(
        "common/tensors.py", "if is_safetensors(begin) or (path.suffix", "if (path.suffix",
        "test_common_tensors.py::test_a_file_is_what_it_holds_whatever_its_name",
    ),
}  # fmt: skip
