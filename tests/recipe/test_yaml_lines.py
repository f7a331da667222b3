"""The YAML of recipes: 1.2 scalars, lines of keys, limits, and text that every YAML reader reads alike."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.errors import InputError
from distill.yaml_lines import MAX_BYTES, Mark, dump, flow, parse, parse_scalar, read_text

# Text as written, value in YAML 1.2's core schema (section 10.3.2).
SCALARS = [
    ("1e-3", 0.001),
    ("1e3", 1000.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("-.inf", -math.inf),
    ("010", 10),
    ("0o10", 8),
    ("0x1F", 31),
    ("+7", 7),
    ("-0", 0),
    ("12:30", "12:30"),
    ("1_000", "1_000"),
    ("0b11", "0b11"),
    ("2024-01-01", "2024-01-01"),
    ("no", "no"),
    ("yes", "yes"),
    ("on", "on"),
    ("off", "off"),
    ("true", True),
    ("FALSE", False),
    ("null", None),
    ("~", None),
    ("", None),
    ("'1'", "1"),
    ("!!str 010", "010"),
    ("!!float 1", 1.0),
]
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    | st.sampled_from([text for text, _ in SCALARS]),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text("abn1e.:#- ", max_size=4), below, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object) -> None:
    read = parse(f"key: {text}\n", source="r.yaml").value["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["1e-3", "010", "no", "true", "null", ""])
def test_a_scalar_alone_reads_as_in_a_document(text: str) -> None:
    assert parse_scalar(text) == parse(f"key: {text}", source="r.yaml").value["key"]


@pytest.mark.parametrize("text", ["*.tar", "a #1 b", "a: b", "@x", "%d", "!x", "&x", "- x"])
def test_a_scalar_alone_has_no_document_syntax(text: str) -> None:
    assert parse_scalar(text) == text


def test_every_key_path_knows_its_line_and_column() -> None:
    document = parse(
        "# a comment\nseed: 0\nsteps:\n  - kcenter:\n      ipc: 1\n  - {random: {}}\n", source="r.yaml"
    )
    assert document.marks == {
        (): Mark(2, 1),
        ("seed",): Mark(2, 1),
        ("steps",): Mark(3, 1),
        ("steps", 0): Mark(4, 5),
        ("steps", 0, "kcenter"): Mark(4, 5),
        ("steps", 0, "kcenter", "ipc"): Mark(5, 7),
        ("steps", 1): Mark(6, 5),
        ("steps", 1, "random"): Mark(6, 6),
    }


def test_aliases_repeat_values_and_keep_the_anchor_lines() -> None:
    document = parse("a: &train {lr: 1}\nb: *train\n", source="r.yaml")
    assert document.value == {"a": {"lr": 1}, "b": {"lr": 1}}
    assert document.marks["b", "lr"].line == 1


def test_an_empty_document_is_none() -> None:
    assert parse("# nothing\n", source="r.yaml").value is None


def test_duplicate_keys_keep_the_first_and_tell_every_other() -> None:
    document = parse("a: 1\nb: {c: 1, c: 2}\na: 3\na: 4\n", source="r.yaml")
    assert document.value == {"a": 1, "b": {"c": 1}}
    assert [(path, mark.line, error.what) for path, mark, error in document.problems] == [
        (("b", "c"), 2, "stands twice, first on line 2"),
        (("a",), 3, "stands twice, first on line 1"),
        (("a",), 4, "stands twice, first on line 1"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [ls]",
        "!foo bar",
        "!!set {a}",
        "!!binary aGk=",
        "!!int x",
        "!!timestamp 1",
    ],
)
def test_tags_other_than_core_are_problems_and_never_objects(text: str) -> None:
    document = parse(f"a: 1\nkey: {text}\n", source="r.yaml")
    assert document.value["key"] is None
    assert [(path, mark.line) for path, mark, _ in document.problems] == [(("key",), 2)]


@pytest.mark.parametrize("key", ["3", "true", "null", "[1]", "{a: 1}", "1e3"])
def test_keys_are_names(key: str) -> None:
    document = parse(f"? {key}\n: 1\n", source="r.yaml")
    assert document.value == {}
    assert len(document.problems) == 1


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        ("a: 1\nb: [1, 2\n", "r.yaml:3:1", "without its `]`"),
        ("a: 1\n\tb: 2\n", "r.yaml:2:1", "a tab; indent with spaces"),
        ("a: b: c\n", "r.yaml:1:5", "indent as above"),
        ("a: 'x\n", "r.yaml:2:1", "never closed"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1", "a second document"),
        ("a: *x\n", "r.yaml:1:4", "an alias without its anchor"),
        ("a: 1\nb: \x07\n", "r.yaml:2", "control character"),
        ('a: "\\UFFFFFFFF"\n', "r.yaml:1", "out of range"),
        ("a: &a [*a]\n", "r.yaml:1", "an alias contains itself"),
        ("[" * 100, "r.yaml:1", "nested deeper than 50"),
    ],
)
def test_text_that_is_no_recipe_yaml_says_where_and_why(text: str, place: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, source="r.yaml")
    assert str(caught.value).startswith(place)
    assert what in str(caught.value)


def test_alias_bombs_are_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(InputError, match="aliases counted each time"):
        parse("\n".join(lines), source="r.yaml")


@pytest.mark.parametrize("escape", ["\\0", "\\uD800"])
def test_text_that_no_file_can_hold_is_a_problem(escape: str) -> None:
    (problem,) = parse(f'a: "x{escape}"\n', source="r.yaml").problems
    assert "no file or name can hold" in problem[2].what


def test_a_number_of_a_thousand_digits_is_a_problem() -> None:
    (problem,) = parse("a: " + "9" * 10_000, source="r.yaml").problems
    assert "more than 100 digits" in problem[2].what


def test_files_are_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"#" * MAX_BYTES)
    assert len(read_text(path)) == MAX_BYTES
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="too large"):
        read_text(path)


def test_files_are_utf8_with_or_without_mark(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_text(path) == "a: 1"
    path.write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(InputError) as caught:
        read_text(path)
    assert caught.value.where == f"{path}:2"


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_text(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="directory"):
        read_text(tmp_path)


@given(value=PLAIN)
@settings(max_examples=150, deadline=None)
def test_written_text_reads_back_equal_in_yaml_1_2_and_1_1(value: object) -> None:
    text = dump({"key": value})
    assert parse(text, source="r.yaml").value == {"key": value}
    assert parse(text, source="r.yaml").problems == ()
    assert yaml.safe_load(text) == {"key": value}


@given(value=PLAIN)
@settings(max_examples=100, deadline=None)
def test_flow_is_one_line_that_reads_back_equal(value: object) -> None:
    text = flow(value, limit=None)
    assert "\n" not in text
    assert parse(text, source="r.yaml").value == value


def test_flow_is_cut_at_the_limit() -> None:
    assert flow("a" * 100, limit=10) == "aaaaaaa..."


@given(text=st.text(max_size=60) | st.text("a1:-[]{}&*!|>'\"\\%#?, \n\t", max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_gives_values_or_our_error(text: str) -> None:
    try:
        document = parse(text, source="r.yaml")
    except InputError as error:
        assert str(error).startswith("r.yaml:")
    else:
        assert parse(dump(document.value), source="again").problems == ()
