"""Mistakes in reading run files."""

from tests.mutations import Mistake

MISTAKES = {
    "overrides_at_the_top_alone": Mistake(
        "launch/config.py", "return _replaced(document, [*sections, last], value)",
        "return _replaced(document, [last], value)",
        "test_launch_config.py::test_overrides_reach_deep_values_and_null_sections",
    ),
    "sections_replaced_by_an_override": Mistake(
        "launch/config.py", "        value = merge(inner[last], value)\n", "        pass\n",
        "test_launch_config.py::test_an_override_of_a_section_is_merged_into_it",
    ),
    "anchors_share_an_override": Mistake(
        "launch/config_files.py", "    return {**base, **both}\n", "    base.update(both)\n    return base\n",
        "test_launch_config.py::test_an_override_changes_no_other_key_that_shares_an_anchor",
    ),
    "comments_cut_out_of_overrides": Mistake(
        "launch/config_files.py", "            if between:\n", "            if not end:\n",
        "test_launch_config_files.py::test_what_yaml_would_take_out_of_a_value_is_refused_and_taken_in_the_quotes_that_"
        "are_advised",
    ),
    "shipped_deepspeed_files_first": Mistake(
        "launch/config_files.py", "_is_name_of(path, ours) and not path_exists(here)", "_is_name_of(path, ours)",
        "test_launch_config_files.py::test_a_file_here_comes_before_a_shipped_one_and_the_choice_is_said",
    ),
    "keys_may_stand_twice": Mistake(
        "launch/config_files.py", "            if name in lines:\n", "            if None in lines:\n",
        "test_launch_config_files.py::test_what_cannot_be_read_is_said_in_a_line_with_its_file",
    ),
    "groups_of_zero_3_count_as_steps": Mistake(
        "launch/training/deepspeed_options.py",
        '        config["zero_optimization"]["sub_group_size"] = int(1e15)\n', """\
        config["zero_optimization"]["sub_group_size"] = 100
""", "test_launch_deepspeed_options.py::test_an_option_changes_no_number[offloaded_weights]",
    ),
    "key_of_deepspeed_that_has_no_reason": Mistake(
        "launch/training/deepspeed_options.py",
        '        "compute_grad_norm": "it follows from what else is set",\n', "",
        "test_launch_deepspeed_keys.py::test_each_key_that_deepspeed_knows_is_allowed_or_refused_with_a_reason",
    ),
    "merge_replaces_sections": Mistake(
        "launch/config_files.py",
        "if isinstance(v, Mapping) and isinstance(base.get(k), Mapping) and (v or not empties)", "if False",
        "test_launch_config.py::test_merge_goes_down",
    ),
    "empty_mappings_leave_the_base": Mistake(
        "launch/extends.py", ", empties=True)", ")",
        "test_launch_extends.py::test_null_and_empty_values_take_the_place_of_the_bases",
    ),
    "base_over_the_file_that_extends_it": Mistake(
        "launch/extends.py", "            return layers[::-1], notes\n", "            return layers, notes\n",
        "test_launch_extends.py::test_a_file_says_what_differs_from_its_base",
    ),
    "bases_from_the_working_directory": Mistake(
        "launch/extends.py", "found = find_config(written, folder=folder)", "found = find_config(written)",
        "test_launch_extends.py::test_a_base_extends_a_file_in_its_turn_each_from_its_own_folder",
    ),
    "sizes_lose_to_the_base": Mistake(
        "launch/extends.py", "merge(without_sizes(base, layer.document), layer.document, empties=True)",
        "merge(base, layer.document, empties=True)",
        "test_launch_extends.py::test_a_size_takes_the_place_of_the_fields_of_one",
    ),
    "sizes_lose_to_a_file": Mistake(
        "launch/config.py", "_overridden(without_sizes(document, _overridden({}, override)), override)",
        "_overridden(document, override)",
        "test_launch_extends.py::test_a_size_takes_the_place_of_the_fields_of_one",
    ),
    "circles_by_name_alone": Mistake(
        "launch/extends.py", "os.path.realpath(found) == os.path.realpath(file)", "found == file",
        "test_launch_extends.py::test_files_in_a_circle_are_listed",
    ),
    "mistakes_of_overrides_in_the_base": Mistake(
        "launch/config.py", "explain(e, [*layers, Layer('', said)])", "explain(e, layers)",
        "test_launch_extends.py::test_a_wrong_value_is_said_with_the_file_it_stands_in",
    ),
    "bases_of_any_model": Mistake(
        "launch/config.py", "    _refuse_other_kind(document, kind)\n",
        "    _refuse_other_kind(document, kind) if extends else None\n",
        "test_launch_extends.py::test_a_base_of_the_other_model_is_named",
    ),
    "an_empty_override_is_merged": Mistake(
        "launch/config.py", "    if value and isinstance(value, dict)", "    if isinstance(value, dict)",
        "test_launch_config.py::test_an_empty_override_empties",
    ),
}  # fmt: skip
