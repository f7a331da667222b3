"""YAML as data: plain values, with the line of every key, and the way back to text.

Differences from PyYAML's SafeLoader, which reads YAML 1.1:

- YAML 1.2 core scalars: `1e-3` is a number, `010` is ten, `12:30`, `no` and `2024-01-01` are text.
- A key written twice is an error, and so is a tag other than the core ones; `<<` is a key like any other.
- Size, depth and the number of values are bounded, so aliases cannot blow up; an alias cannot contain itself.

Written text is quoted wherever YAML 1.1 or 1.2 would read something else, so all readers get equal values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from distill.errors import InputError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000

KeyPath = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
# YAML 1.2.2, section 10.3.2: tag, pattern, first characters.
_CORE_SCALARS = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF")),
    ("int", re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+0123456789."),
    ),
]
# What PyYAML says, and what it means to the writer of a recipe.
_PLAIN_WORDS = {
    "could not find expected ':'": "a line that is neither `key: value` nor `- item`",
    "found character '\\t' that cannot start any token": "a tab; indent with spaces",
    "mapping values are not allowed here": "a `:` where no key can stand; indent as above, or quote the text",
    "found unexpected end of stream": "a quote is opened and never closed",
    "expected ',' or ']', but got": "a `[` without its `]`, or a comma is missing",
    "expected ',' or '}', but got": "a `{` without its `}`, or a comma is missing",
    "expected <block end>, but found": "the indentation does not match the lines above",
    "but found another document": "a second document; a recipe is one",
    "found undefined alias": "an alias without its anchor; quote text that begins with `*`",
    "found duplicate anchor": "an anchor defined twice",
}


@dataclass(frozen=True, order=True)
class Mark:
    """Where a key or item stands; both count from 1."""

    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """What a YAML text holds.

    Args:
        value: dicts with text keys, lists, str, int, float, bool and None.
        marks: where each key path stands: the key of a mapping's entry, the item of a list; () is the top.
        problems: mistakes that do not keep the rest from being read, such as duplicate keys, by key path.
    """

    value: Any
    marks: Mapping[KeyPath, Mark] = field(default_factory=dict)
    problems: tuple[tuple[KeyPath, Mark, InputError], ...] = ()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file of at most `MAX_BYTES` bytes; InputError where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"cannot be read: {reason or 'no such file'}", where=quoted(str(path))) from error
    if len(content) > MAX_BYTES:
        raise InputError(
            "the file is too large for a recipe", where=str(path), allowed=f"at most {MAX_BYTES} bytes"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError("not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from error


def parse(text: str, *, source: str) -> Document:
    """Read one YAML document; an empty one is None.

    Args:
        text: the YAML.
        source: names the text in errors.

    Raises:
        InputError: the text is not YAML, or goes over a limit of this file.
    """
    loader = _Loader("")
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InputError("a control character that YAML does not allow", where=f"{source}:{line}") from error
    except _LimitError as error:
        raise _at(source, error.mark, error.what) from error
    except yaml.MarkedYAMLError as error:
        raise _at(source, _mark(error.problem_mark or error.context_mark), _in_plain_words(error)) from error
    except (ValueError, OverflowError) as error:  # from PyYAML's scanner
        what = "not valid YAML: an escape or directive with a number out of range"
        raise _at(source, _mark(loader.get_mark()), what) from error
    if root is None:
        return Document(None, {(): Mark(1, 1)})
    builder = _Builder()
    try:
        value = builder.build(root, ())
    except _LimitError as error:
        raise _at(source, error.mark, error.what) from error
    return Document(value, {(): _mark(root.start_mark), **builder.marks}, tuple(builder.problems))


def parse_scalar(text: str) -> Any:
    """A plain YAML scalar; what means something inside a document (`#`, `*`, `: `) is plain text here.

    Raises:
        ValueError: no file or name can hold the text; the message is in words for the user.
    """
    resolver = _Loader("")
    tag = resolver.resolve(ScalarNode, text, (True, False))
    return _scalar(tag.removeprefix(_TAG), text)


def dump(value: Any) -> str:
    """YAML that `parse` reads back to an equal value: keys in their order, lists of scalars on one line."""
    return yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=110
    )


def flow(value: Any, *, limit: int | None = 80) -> str:
    """The value on one line as a recipe would write it, cut at `limit` characters."""
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        sort_keys=False,
        default_flow_style=True,
        allow_unicode=True,
        width=float("inf"),
    )
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def quoted(text: str) -> str:
    """A name as it is, or in quotes and escaped where it holds anything but visible characters."""
    return text if text and text.isprintable() and " " not in text else repr(text)


def _at(source: str, mark: Mark, what: str) -> InputError:
    return InputError(what, where=f"{source}:{mark.line}:{mark.column}")


def _mark(mark: Any) -> Mark:
    return Mark(mark.line + 1, mark.column + 1) if mark is not None else Mark(1, 1)


def _in_plain_words(error: yaml.MarkedYAMLError) -> str:
    said = f"{error.problem or error.context}"
    words = next((ours for theirs, ours in _PLAIN_WORDS.items() if theirs in said), said)
    return f"not valid YAML: {words}"


class _LimitError(Exception):
    """The document is well-formed, and more than a recipe may be."""

    def __init__(self, what: str, mark: Mark) -> None:
        super().__init__(what)
        self.what = what
        self.mark = mark


class _Loader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2 tags; `_Builder` makes the values."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _LimitError(f"nested deeper than {MAX_DEPTH} levels", _mark(self.get_mark()))
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes lists of scalars on one line and the rest in blocks, without aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def short_list(self, data: list[Any]) -> Node:
        short = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence(_TAG + "seq", data, flow_style=short or self.default_flow_style)

    def safe_text(self, data: str) -> Node:
        """Double quotes and escapes for line breaks and the like, which other styles fold."""
        return self.represent_scalar(_TAG + "str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(list, _Dumper.short_list)
_Dumper.add_representer(str, _Dumper.safe_text)
# The dumper keeps its YAML 1.1 patterns and gains those of 1.2: text that either would misread is quoted.
for _name, _pattern, _first in _CORE_SCALARS:
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


class _Builder:
    """From nodes to values; collects marks and problems on the way."""

    def __init__(self) -> None:
        self.marks: dict[KeyPath, Mark] = {}
        self.problems: list[tuple[KeyPath, Mark, InputError]] = []
        self.count = 0
        self.open: set[int] = set()

    def build(self, node: Node, path: KeyPath) -> Any:
        mark = _mark(node.start_mark)
        self._keep_within_limits(node, path, mark)
        kind = node.tag.removeprefix(_TAG)
        self.open.add(id(node))
        try:
            if isinstance(node, MappingNode) and kind == "map":
                return self._mapping(node, path)
            if isinstance(node, SequenceNode) and kind == "seq":
                return self._sequence(node, path)
            if isinstance(node, ScalarNode) and kind in ("null", "bool", "int", "float", "str"):
                return _scalar(kind, node.value)
        except ValueError as error:
            self._problem(path, mark, str(error), found=quoted(node.value[:60]))
            return None
        finally:
            self.open.discard(id(node))
        tag = "!!" + kind if kind != node.tag else node.tag
        self._problem(
            path, mark, "a tag, where plain values are allowed only", found=quoted(tag), fix="remove the tag"
        )
        return None

    def _keep_within_limits(self, node: Node, path: KeyPath, mark: Mark) -> None:
        self.count += 1
        if id(node) in self.open:
            raise _LimitError("an alias contains itself", mark)
        if self.count > MAX_VALUES:
            raise _LimitError(f"more than {MAX_VALUES} values, aliases counted each time", mark)
        if len(path) > MAX_DEPTH:
            raise _LimitError(f"nested deeper than {MAX_DEPTH} levels", mark)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = _mark(key_node.start_mark)
            if not isinstance(key_node, ScalarNode) or key_node.tag != _TAG + "str":
                self._bad_key(key_node, path, mark)
                continue
            key = key_node.value
            here = (*path, key)
            if key in values:
                line = self.marks[here].line
                self._problem(here, mark, f"stands twice, first on line {line}", fix="keep one of them")
                continue
            self.marks[here] = mark
            values[key] = self.build(value_node, here)
        return values

    def _sequence(self, node: SequenceNode, path: KeyPath) -> list[Any]:
        values = []
        for number, item in enumerate(node.value):
            self.marks[*path, number] = _mark(item.start_mark)
            values.append(self.build(item, (*path, number)))
        return values

    def _bad_key(self, node: Node, path: KeyPath, mark: Mark) -> None:
        found = quoted(node.value[:60]) if isinstance(node, ScalarNode) else "a list or mapping"
        self._problem(
            path, mark, "a key that is not a name", found=found, allowed="text, in quotes if need be"
        )

    def _problem(self, path: KeyPath, mark: Mark, what: str, **rest: str) -> None:
        self.problems.append((path, mark, InputError(what, **rest)))


def _scalar(kind: str, text: str) -> Any:
    """The value of a scalar; ValueError, in words for the user, where the text does not fit the kind."""
    if kind == "str":
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("text with a character that no file or name can hold")
        return text
    pattern = next(pattern for name, pattern, _ in _CORE_SCALARS if name == kind)
    if not pattern.match(text):
        raise ValueError(f"not what its tag !!{kind} says")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if len(text) > 100:
        raise ValueError("a number of more than 100 digits")
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
