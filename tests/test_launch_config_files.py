"""YAML as run files need it: nothing is read otherwise than it looks, and what cannot be read is said in a line."""

import os
import re

import pytest
import yaml

from launch.config_files import ConfigError, parse, read_mapping

REFUSED = {
    "a: 1\nb: 2\na: 3": "line 3: a .* line 1",
    "a:\n  b: 1\n  c: 2\n  b: 3": "line 4: b .* line 2",
    "a: [{b: 1, b: 1}]": "b .* line 1",
    "a: 1\n'a': 2": "line 2: a .* line 1",
    "yes: 1\ntrue: 2": "line 2: true .* line 1",
    "1: x\n0x1: y": "line 2: 0x1 .* line 1",
    "a: 010": '010 .*write 10, or "010" in quotes',
    "a: -010": '-010 .*write -10, or "-010"',
    "a: 08": "08 .*write 8",
    "a: 0_1": "0_1 .*write 1",
    "a: 1:30": '1:30 .*base 60.*"1:30" in quotes',
    "a: 12:30:45": "12:30:45 .*base 60",
    "a: 1:30.5": "1:30.5 .*base 60",
    "a: [1": "not YAML: ",
    "a: 1\nb: [1": "not YAML, line 2: ",
    "a: b: c": "not YAML: ",
    "a: 1\n\tb: 2": "not YAML, line 2: ",
    "a: 1\n---\nb: 2": "not YAML, line 2: ",
    "a: \0": "not YAML: ",
    "a: !!int x": "int",
    "a: !!python/object/apply:os.system [true]": "python/object",
    "? [1, 2]\n: 3": "line 1: ",
    "[" * 5000: "nested too deeply",
    "- 1": "list, not a mapping",
    "text": "str, not a mapping",
    "": "nothing, not a mapping",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: repr(text[:20]))
def test_what_cannot_be_read_is_said_in_a_line_with_its_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        read_mapping(path)
    message = str(e.value)
    assert message.startswith(str(path)) and "\n" not in message, message
    assert re.search(REFUSED[text], message), message


@pytest.mark.parametrize(("text", "value"), [
    ("1e-4", 1e-4), ("1E5", 1e5), ("1.0e4", 1e4), ("+.5", 0.5), ("-3", -3), ("0", 0), ("1_000", 1000), ("0x10", 16),
    ("1.", 1.0), (".inf", float("inf")), ("2024-01-31", "2024-01-31"), ("=", "="), ("10.0.0.1", "10.0.0.1"),
    ('"010"', "010"), ("'1:30'", "1:30"), ("0o17", "0o17"), ("1.5x", "1.5x"), ("~", None), ("~/x", "~/x"),
    ("yes", True), ("Off", False), ("true", True), ("y", "y"),
])  # fmt: skip
def test_plain_values(text, value):
    found = parse(text, "here")
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("value", ["010", "1:30", "2024-01-31", "=", "no", "~", "0x1", 10, 1e-5, True, None])
def test_what_a_yaml_writer_wrote_comes_back(tmp_path, value):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"a": value}))
    assert read_mapping(path) == {"a": value}


def test_merged_mappings_may_be_changed_and_anchors_used_again():
    text = "x: &x {a: 1, b: 1}\ny: {<<: *x, a: 2}\nz: {<<: *x, a: 3}"
    assert parse(text, "here") == {"x": {"a": 1, "b": 1}, "y": {"a": 2, "b": 1}, "z": {"a": 3, "b": 1}}


def test_json_may_be_indented_by_tabs_and_has_no_key_twice(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{\n\t"a": {\n\t\t"b": 1e-5\n\t}\n}')
    assert read_mapping(path) == {"a": {"b": 1e-5}}
    path.write_text('{\n\t"a": 1,\n\t"a": 2\n}')
    with pytest.raises(ConfigError, match=r"ds\.json, line 3: a was already given in line 2"):
        read_mapping(path)


@pytest.mark.parametrize(("content", "words"), [
    ("a: 1\n# größe\n".encode("latin-1"), "line 2: byte 0xf6 is not UTF-8"),
    ("a: 1\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 27\n", "Git LFS pointer"),
    (b"<!DOCTYPE html>\n<html></html>", "web page"),
    (b"a: " + b" " * 2**24 + b"1", "bytes: it is no config"),
])
def test_files_that_are_no_config_are_named(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as e:
        read_mapping(path)
    assert str(path) in str(e.value)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes("a: ö\n".encode("utf-8-sig"))
    assert read_mapping(path) == {"a": "ö"}


def test_pipes_and_folders_are_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, words in (("pipe", "named pipe"), ("folder", "directory"), ("absent", "does not exist")):
        with pytest.raises(ConfigError, match=f"cannot read config: .*{name}.*{words}"):
            read_mapping(tmp_path / name)
