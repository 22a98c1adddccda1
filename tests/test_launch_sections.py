"""Every key of every section: paths know `~`, whole numbers have limits, and a wrong value is said in plain words."""

import re
from pathlib import Path
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from common.sections import Section, SectionError, describe, expand_home
from launch.config import LightningDiTRun, VavaeRun

#: Keys whose text is no path.
TEXT = {
    "exp_name",
    "wandb",
    "model_name",
    "model_type",
    "sampling_method",
    "diffusion_form",
    "inception_sha256",
    "kernels",
    "overrides",
    "model_args",
}
#: What only pydantic says, and what only the code calls itself.
FOREIGN = re.compile(
    r"(Input|Tuple|List) should|[Vv]alid (dict|str|bool|int|num|tuple)|validation error|pydantic|"
    r"Config\b|Section\b|Run\b|\bdict\[|literal\[|\[key\]|instance of"
)
WRONG = [
    None,
    True,
    3,
    -1,
    1.5,
    float("nan"),
    "a\ntext",
    [1],
    ["x"],
    {"a": 1},
    {1: 2},
    {"a": None},
    10**19,
    [[]],
    "~",
    [],
    [1] * 99,
]


def sections() -> list[type[Section]]:
    """The classes of all sections of a run file."""
    found: list[type[Section]] = []
    waiting: list[type[Section]] = [LightningDiTRun, VavaeRun]
    while waiting:
        section = waiting.pop()
        if section not in found:
            found.append(section)
            for field in section.model_fields.values():
                waiting += [t for t in types_in(field.annotation) if isinstance(t, type) and issubclass(t, Section)]
    return found


def types_in(annotation) -> list:
    inner = get_args(annotation)
    return [annotation] if not inner else [t for a in inner for t in types_in(a)]


def fields(kind: type) -> list:
    """(section, key, field) of every key that takes values of `kind`."""
    return [
        pytest.param(section, name, field, id=f"{section.__name__}.{name}")
        for section in sections()
        for name, field in section.model_fields.items()
        if kind in types_in(field.annotation)
    ]


def adapter(field: FieldInfo) -> TypeAdapter:
    return TypeAdapter(field.rebuild_annotation())


def test_all_sections_are_found():
    assert len(sections()) > 15


@pytest.mark.parametrize(("section", "name", "field"), fields(str))
def test_every_path_knows_the_home_directory(monkeypatch, section, name, field):
    monkeypatch.setenv("HOME", "/home/of-a-test")
    if name in TEXT:
        return
    assert adapter(field).validate_python("~/x") == "/home/of-a-test/x"
    assert adapter(field).validate_python("x/~") == "x/~"
    with pytest.raises(ValidationError, match="no home directory ~nobody-of-that-name"):
        adapter(field).validate_python("~nobody-of-that-name/x")


@pytest.mark.parametrize(("section", "name", "field"), fields(str))
def test_no_name_or_path_holds_what_no_file_system_takes(section, name, field):
    if name in ("kernels", "overrides", "model_args"):  # names of ops, and keys of others: each is looked up
        return
    for text in (
        "a\0b",
        "a\nb",
        "a\x1bb",
        "a\x7fb",
        "a\x85b",
        "\ud800",
        "a\u2028b",
        9 * "a" + "\0",
        "a/" + 256 * "b",
        128 * "ö",
        2048 * "a/",
    ):
        with pytest.raises(ValidationError) as e:
            adapter(field).validate_python(text)
        assert re.search(r"not allowed in names and paths|too long for a file system", message := describe(e.value))
        assert message.isprintable() and len(message) < 300
    if name not in TEXT:
        assert adapter(field).validate_python(255 * "a" + "/ö €") == 255 * "a" + "/ö €"


def test_keys_of_text_are_still_there():
    assert {field.values[1] for field in fields(str)} >= TEXT


def test_a_user_s_home_directory_is_found():
    import pwd

    assert expand_home(f"~{pwd.getpwuid(0).pw_name}/x") == str(Path(pwd.getpwuid(0).pw_dir) / "x")


@pytest.mark.parametrize(("section", "name", "field"), fields(int))
def test_every_whole_number_has_a_limit(section, name, field):
    for value in (10**19, -1):
        with pytest.raises(ValidationError):
            adapter(field).validate_python(value, strict=True)


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_a_wrong_value_is_said_in_plain_words_with_its_key(section):
    messages = 0
    for name in section.model_fields:
        for value in WRONG:
            try:
                section.model_validate({name: value})
            except ValidationError as e:
                text = describe(e)
                assert not FOREIGN.search(text), text
                assert "\n" not in text
                messages += re.search(rf"(^|; |\W){name}\b", text) is not None
    assert messages >= len(section.model_fields)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"train": 3}, "train: a section of keys is wanted (got 3)"),
        ({"train": {"max_steps": "many"}}, "train.max_steps: a whole number is wanted (got 'many')"),
        ({"train": {"max_steps": 0}}, "train.max_steps: must be at least 1 (got 0)"),
        ({"train": {"resume": "x"}}, "train.resume: allowed are true, false and 'strict' (got 'x')"),
        ({"train": {"precision": "int8"}}, "train.precision: must be 'float32' or 'bfloat16' (got 'int8')"),
        (
            {"train": {"exp_name": False}},
            "train.exp_name: text is wanted, in quotes where YAML reads something else (got False)",
        ),
        ({"train": {"exp_name": "../x"}}, "train.exp_name: '../x' is no name of a folder below output_dir"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: a finite number is wanted (got inf)"),
        ({"model": {"model_type": None}}, "model: give model_type (one of "),
        (
            {"model": {"hidden_size": 10, "depth": 1, "num_heads": 3, "patch_size": 1}},
            "model: hidden_size 10 is not a multiple of num_heads 3",
        ),
        ({"kernels": {"swigl": "cuda"}}, "kernels: no op is called 'swigl' (did you mean 'swiglu'?)"),
        ({"deepspeed": {"overrides": 5}}, "deepspeed.overrides: a mapping of keys to values is wanted (got 5)"),
        (
            {"deepspeed": {"overrides": {1: 2}}},
            "deepspeed.overrides: the names in it are text, in quotes where YAML reads something else (got 1)",
        ),
    ],
)
def test_messages(values, text):
    whole = {"data": {"data_path": "x"}, "model": {"model_type": "LightningDiT-B/1"}}
    with pytest.raises(SectionError) as e:
        LightningDiTRun.read(whole | values, "run.yaml")
    assert f"run.yaml: {text}" in str(e.value)
