"""YAML as run files need it: nothing is read otherwise than it looks, and what cannot be read is said in a line."""

import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from launch.config_files import NUMBER_LIMIT, ConfigError, config_note, find_config, parse, parse_value, read_mapping

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
    "a: " + 5000 * "1": "a whole number of 5,000 characters is larger",
    "a: 0x" + 5000 * "f": "5,002 characters is larger",
    "a: -1" + NUMBER_LIMIT * "_0": "a whole number of 202 characters",
    "b: 1\n" + 500 * "1" + ": x": "line 2: a whole number of 500 characters",
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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("1.0e4", 1e4),
        ("+.5", 0.5),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("0x10", 16),
        ("1.", 1.0),
        (".inf", float("inf")),
        ("2024-01-31", "2024-01-31"),
        ("=", "="),
        ("10.0.0.1", "10.0.0.1"),
        ('"010"', "010"),
        ("'1:30'", "1:30"),
        ("0o17", "0o17"),
        ("1.5x", "1.5x"),
        ("~", None),
        ("~/x", "~/x"),
        ("yes", True),
        ("Off", False),
        ("true", True),
        ("y", "y"),
    ],
)
def test_plain_values(text, value):
    found = parse(text, "here")
    assert found == value and type(found) is type(value)


# The value of a key=value, and what YAML would take of it for something else.
SIGNS = {
    "/data/run #2": "#2 is a comment",
    "#x": "#x is a comment",
    "[1, 2] # two": "# two is a comment",
    "{a: 1} #x": "#x is a comment",
    "x\n#y": "#y is a comment",
    "&a": "&a is an anchor",
    "&a x": "&a is an anchor",
    "{a: &x 1}": "&x is an anchor",
    "*.pt": "not YAML",
    "*a": r"\*a is an alias",
    "!x": "!x is a tag",
    "!x y": "!x is a tag",
    "!!int 3": "!!int is a tag",
    "%x": "%x is a directive",
    "@x": "not YAML .*'@'",
    "`x`": "not YAML .*'`'",
    "--- x": "--- is the start of a document",
    "...": "is the end of a document",
    "|": "is text in lines",
    ">": "is text in lines",
    "|x": "not YAML",
    "x\ny": "is text in lines",
    "'x": "not YAML",
    '"x': "not YAML",
    "<<": "tag",
    "{{USER}}": "unhashable",
}


@pytest.mark.parametrize("text", SIGNS)
def test_what_yaml_would_take_out_of_a_value_is_refused_and_taken_in_the_quotes_that_are_advised(text):
    with pytest.raises(ConfigError, match=rf"^override: .*({SIGNS[text]}).*; for text, write the value in quotes") as e:
        parse_value(text, "override")
    (advised,) = shlex.split(str(e.value).partition(" in quotes, as ")[2])
    assert parse_value(advised, "override") == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("a#b", "a#b"),
        ("a&b*c!d%e@f`g", "a&b*c!d%e@f`g"),
        ("'a # b'", "a # b"),
        ('"&a"', "&a"),
        ('"a\\nb"', "a\nb"),
        (" x ", "x"),
        ("{a: [1, x], b: }", {"a": [1, "x"], "b": None}),
        ("{a: 1,\n b: 2}", {"a": 1, "b": 2}),
        ("a: b", {"a": "b"}),
        ("http://x/y?z=1#2", "http://x/y?z=1#2"),
    ],
)
def test_values_without_such_signs_are_read_as_in_a_file(text, value):
    assert parse_value(text, "override") == parse(text, "here") == value


def test_a_file_here_comes_before_a_shipped_one_and_the_choice_is_said(tmp_path, monkeypatch):
    shipped, here = tmp_path / "shipped", tmp_path / "here"
    for folder in (shipped, here):
        folder.mkdir()
    (shipped / "a.yaml").touch()
    monkeypatch.chdir(here)
    assert find_config("a.yaml", shipped) == shipped / "a.yaml"
    assert config_note("a.yaml", shipped) == [f"not here, so the one in {shipped}"]
    (here / "a.yaml").touch()
    assert find_config("a.yaml", shipped) == Path("a.yaml")
    assert config_note("a.yaml", shipped) == [f"the one here, not that in {shipped}"]
    for plain in ("./a.yaml", "b.yaml", str(shipped / "a.yaml"), "", "."):
        assert find_config(plain, shipped) == Path(plain) and config_note(plain, shipped) == []
    (here / "a.yaml").unlink()
    (here / "a.yaml").symlink_to("absent")
    assert find_config("a.yaml", shipped) == Path("a.yaml") and config_note("a.yaml", shipped)
    monkeypatch.chdir(shipped)
    assert find_config("a.yaml", shipped).samefile("a.yaml") and config_note("a.yaml", shipped) == []


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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: 1\n# größe\n".encode("latin-1"), "line 2: byte 0xf6 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0d71\nsize 27\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html></html>", "web page"),
        (b"a: " + b" " * 2**24 + b"1", "bytes: it is no config"),
    ],
)
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


def test_a_name_near_a_shipped_files_is_told_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"digit.yaml does not exist \(did you mean 'digits.yaml'\?\)$"):
        read_mapping("digit.yaml")
    for path in ("elsewhere/digit.yaml", "run.yaml"):
        with pytest.raises(ConfigError, match=r"does not exist$"):
            read_mapping(path)
