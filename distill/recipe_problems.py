"""What is wrong with a recipe, in words: from pydantic's findings to key paths, limits and nearest names.

The limits are read from the JSON schema of the configurations, so what an error allows and what
`distill schema` prints never differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from distill.errors import InputError
from distill.registry import nearest
from distill.yaml_lines import KeyPath, flow, quoted

JsonSchema = dict[str, Any]

_OURS = "distill"
MISSING = "is missing"

_NOT_A_NUMBER = dict.fromkeys(["float_type", "float_parsing"], "not a number")
_NOT_WHOLE = dict.fromkeys(["int_type", "int_parsing", "int_from_float"], "not a whole number")
_NOT_TEXT = dict.fromkeys(["string_type", "path_type"], "not text")
_NOT_A_LIST = dict.fromkeys(["list_type", "tuple_type", "set_type", "frozen_set_type"], "not a list")
_NOT_A_MAPPING = dict.fromkeys(["model_type", "dict_type", "model_attributes_type"], "not a mapping")
_WHAT = {
    **_NOT_A_NUMBER,
    **_NOT_WHOLE,
    **_NOT_TEXT,
    **_NOT_A_LIST,
    **_NOT_A_MAPPING,
    "bool_type": "neither true nor false",
    "none_required": "not null",
    "finite_number": "not a finite number",
    "literal_error": "not one of the allowed values",
    "enum": "not one of the allowed values",
    "greater_than": "too small",
    "greater_than_equal": "too small",
    "less_than": "too large",
    "less_than_equal": "too large",
    "too_short": "too few items",
    "too_long": "too many items",
    "string_too_short": "text that is too short",
    "string_too_long": "text that is too long",
    "string_pattern_mismatch": "not of the allowed form",
    "missing": MISSING,
    "extra_forbidden": "unknown key",
}
_NOT_ACCEPTED = "not an accepted value"
_KEYS_TOLD = 8  # of a mapping, where something else stands in its place


@dataclass(frozen=True)
class Problem:
    """One mistake; the fields besides `path` are those of `DistillError`."""

    path: KeyPath
    what: str
    found: str | None = None
    allowed: str | None = None
    fix: str | None = None


@dataclass(frozen=True)
class Written:
    """What the user wrote, beside the JSON schema that it should follow.

    Args:
        raw: plain data.
        schema: of the whole of `raw`.
    """

    raw: Any
    schema: JsonSchema

    def value(self, path: KeyPath) -> Any:
        """What stands at `path`; None where nothing does."""
        here = self.raw
        for part in path:
            inside = isinstance(here, list) and isinstance(part, int) and part < len(here)
            here = here[part] if inside else here.get(part) if isinstance(here, dict) else None
        return here

    def forms(self, path: KeyPath) -> list[JsonSchema]:
        """Every form that the schema allows at `path`, references followed.

        Where constants tell forms apart, such as the name of a model, the user's own choice counts.
        """
        forms = _fitting(list(_alternatives(self.schema, self.schema)), self.raw)
        for depth, part in enumerate(path, start=1):
            below = [each for form in forms for each in _below(form, part)]
            found = [each for form in below for each in _alternatives(form, self.schema)]
            forms = _fitting(found, self.value(path[:depth]))
        return forms

    def keys(self, path: KeyPath) -> list[str]:
        """The keys that the mapping at `path` may have; empty where the schema names none."""
        return list(dict.fromkeys(key for form in self.forms(path) for key in form.get("properties", ())))


def refuse(error: InputError, value: Any, *loc: str | int) -> NoReturn:
    """Report `error` from inside a pydantic validator, at `loc` under the value; `explain` restores it."""
    told = {"what": error.what, "found": error.found, "allowed": error.allowed, "fix": error.fix}
    kind = PydanticCustomError(_OURS, "{what}", told)
    raise ValidationError.from_exception_data(
        _OURS, [InitErrorDetails(type=kind, loc=loc, input=value)]
    ) from error


def explain(error: ValidationError, written: Written) -> list[Problem]:
    """One problem a mistake, from pydantic's findings.

    Args:
        error: raised when `written.raw` was validated.
        written: what the user wrote.
    """
    problems: list[Problem] = []
    forks: dict[KeyPath, list[Problem]] = {}
    for details in error.errors(include_url=False):
        if _counts_accepted_items_only(details):
            continue
        path, fork = _place(details, written.raw)
        problem = _problem(details, path, written)
        if fork is None:
            problems.append(problem)
        else:
            forks.setdefault(fork, []).append(problem)
    for fork, branches in forks.items():
        problems += _of_alternatives(fork, branches, written)
    return problems


def _counts_accepted_items_only(details: ErrorDetails) -> bool:
    """Whether a list is called too short only because some of its items have findings of their own."""
    return details["type"] == "too_short" and len(details["input"]) >= details["ctx"]["min_length"]


def unknown_key(path: KeyPath, known: Sequence[str], value: Any = None) -> Problem:
    """The problem of a key that nobody reads."""
    name = str(path[-1])
    found = quoted(name) if value is None else f"{quoted(name)}: {flow(value, limit=60)}"
    allowed = ", ".join(known) or None
    # In an argument the name above it may be meant, and be written wrongly: steps.0.kcentre.ipc=3.
    fix = _did_you_mean(name, known) or _did_you_mean(name, [str(part) for part in path[-2:-1]])
    return Problem(path, _WHAT["extra_forbidden"], found=found, allowed=allowed, fix=fix)


def _place(details: ErrorDetails, raw: Any) -> tuple[KeyPath, KeyPath | None]:
    """The key path of a finding, and where pydantic tried alternatives there, if it did.

    pydantic's location holds, besides keys, the names of alternatives: those are the parts that `raw` lacks.
    """
    path: KeyPath = ()
    fork: KeyPath | None = None
    here = raw
    parts = details["loc"]
    for number, part in enumerate(parts):
        inside = (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int) and part < len(here)
        )
        if inside:
            here = here[part]
            path = (*path, part)
        elif details["type"] == "missing" and number == len(parts) - 1:
            path = (*path, part)
        elif fork is None:
            fork = path
    return path, fork


def _problem(details: ErrorDetails, path: KeyPath, written: Written) -> Problem:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    if kind == _OURS:
        return Problem(path, context["what"], context["found"], context["allowed"], context["fix"])
    if kind == "extra_forbidden":
        return unknown_key(path, written.keys(path[:-1]), value)
    if kind in ("value_error", "assertion_error"):
        told = context["error"].__cause__
        if isinstance(told, InputError):
            return Problem(path, told.what, told.found, told.allowed, told.fix)
        return Problem(path, str(context["error"]), found=flow(value))
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _without_kind(path, context["discriminator"].strip("'"), value, written)
    forms = written.forms(path)
    allowed = describe(forms)
    if kind == "missing":
        return Problem(path, _WHAT[kind], allowed=allowed, fix=f"add `{path[-1]}: ...`")
    fix = _fix(kind, value, _choices(forms))
    if value is None:
        default = "" if _is_required(written, path) else ", or remove the key to keep its default"
        fix = f"give a value{default}"
    what = _WHAT["finite_number"] if value != value else _WHAT.get(kind, _NOT_ACCEPTED)
    return Problem(path, what, found=flow(value), allowed=allowed, fix=fix)


def _without_kind(path: KeyPath, key: str, value: dict[str, Any], written: Written) -> Problem:
    """A mapping whose `key` should tell which form it has, and does not."""
    path = (*path, key)
    known = _choices(written.forms(path))
    allowed = ", ".join(known) or None
    if key not in value:
        return Problem(path, _WHAT["missing"], allowed=allowed, fix=f"add `{key}: ...`")
    found = value[key]
    return Problem(path, _WHAT["literal_error"], flow(found), allowed, _did_you_mean(found, known))


def _is_required(written: Written, path: KeyPath) -> bool:
    return bool(path) and any(path[-1] in node.get("required", ()) for node in written.forms(path[:-1]))


def _did_you_mean(value: Any, known: Sequence[str]) -> str | None:
    close = nearest(value, known) if isinstance(value, str) else None
    return f"did you mean {close!r}?" if close else None


def _fix(kind: str, value: Any, choices: Sequence[str]) -> str | None:
    if kind in ("literal_error", "enum"):
        return _did_you_mean(value, choices)
    if kind in _NOT_WHOLE and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if (kind in _NOT_WHOLE or kind in _NOT_A_NUMBER) and isinstance(value, str) and _is_number(value):
        return "remove the quotes"
    if kind == "bool_type" and str(value).lower() in ("yes", "on", "no", "off"):
        return "write true" if str(value).lower() in ("yes", "on") else "write false"
    if kind in _NOT_TEXT and isinstance(value, int | float):
        return "write it in quotes"
    if kind in _NOT_A_LIST and value is not None:
        return "begin each item with `- `" if isinstance(value, dict) else f"write [{flow(value)}]"
    return None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _of_alternatives(fork: KeyPath, branches: list[Problem], written: Written) -> Iterator[Problem]:
    """What to say where a value fits none of several forms.

    Findings inside the value come from the form that the user meant; else one problem says all.
    """
    deeper = [problem for problem in branches if len(problem.path) > len(fork)]
    if deeper:
        yield from {(problem.path, problem.what): problem for problem in deeper}.values()
        return
    same = {problem.what for problem in branches}
    value = written.value(fork)
    forms = written.forms(fork)
    what = same.pop() if len(same) == 1 else _NOT_ACCEPTED
    yield Problem(
        fork, what, found=flow(value), allowed=describe(forms), fix=_did_you_mean(value, _choices(forms))
    )


def _below(node: JsonSchema, part: str | int) -> list[JsonSchema]:
    if isinstance(part, int):
        first: list[JsonSchema] = node.get("prefixItems", [])
        return [first[part]] if part < len(first) else _if_schema(node.get("items"))
    if part in node.get("properties", {}):
        return [node["properties"][part]]
    return _if_schema(node.get("additionalProperties"))


def _if_schema(node: Any) -> list[JsonSchema]:
    return [node] if isinstance(node, dict) else []


def _alternatives(node: JsonSchema, schema: JsonSchema) -> Iterator[JsonSchema]:
    """The node itself, or the forms of which it must have one."""
    if "$ref" in node:
        yield from _alternatives(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema)
        return
    forms = [*node.get("anyOf", []), *node.get("oneOf", []), *node.get("allOf", [])]
    if not forms:
        yield node
    for form in forms:
        yield from _alternatives(form, schema)


def _fitting(forms: list[JsonSchema], value: Any) -> list[JsonSchema]:
    """The forms whose constants the mapping `value` has; else those it does not contradict; else all."""
    if not isinstance(value, dict):
        return forms
    forms = [form for form in forms if form.get("type") in (None, "object")] or forms
    agreement = [_agreement(value, form.get("properties", {})) for form in forms]
    best = [form for form, agrees in zip(forms, agreement, strict=True) if agrees]
    possible = [form for form, agrees in zip(forms, agreement, strict=True) if agrees is not False]
    return best or possible or forms


def _agreement(value: dict[str, Any], properties: dict[str, JsonSchema]) -> bool | None:
    """Whether every constant of a form, such as its name, is what `value` says; None where none is."""
    same = [
        each["const"] == value[key] for key, each in properties.items() if "const" in each and key in value
    ]
    return all(same) if same else None


def describe(forms: Sequence[JsonSchema]) -> str | None:
    """The values that any of the forms allows, in words; None where the schema does not limit them."""
    kinds = [_kind(node) for node in forms if not _values(node)]
    if None in kinds:
        return None
    choices = ", ".join(_choices(forms))
    return ", or ".join(dict.fromkeys(text for text in [choices, *kinds] if text)) or None


def _choices(forms: Sequence[JsonSchema]) -> list[str]:
    return list(dict.fromkeys(flow(value) for node in forms for value in _values(node)))


def _values(node: JsonSchema) -> list[Any]:
    return [node["const"]] if "const" in node else node.get("enum", [])


def _kind(node: JsonSchema) -> str | None:
    kind = node.get("type")
    if kind == "integer":
        return _limited(
            "a whole number", node, ">= minimum", "> exclusiveMinimum", "<= maximum", "< exclusiveMaximum"
        )
    if kind == "number":
        return _limited(
            "a number", node, ">= minimum", "> exclusiveMinimum", "<= maximum", "< exclusiveMaximum"
        )
    if kind == "string" and "description" in node:
        return str(node["description"])
    if kind == "string":
        return _limited(
            "text", node, "of length >= minLength", "of length <= maxLength", "of the form pattern"
        )
    if kind == "array":
        return _limited("a list", node, "of length >= minItems", "of length <= maxItems")
    if kind == "object":
        keys = list(node.get("properties", ()))
        return f"a mapping with {', '.join(keys)}" if 0 < len(keys) <= _KEYS_TOLD else "a mapping"
    return {"boolean": "true or false", "null": "null"}.get(str(kind))


def _limited(kind: str, node: JsonSchema, *limits: str) -> str:
    """The kind with those limits that the node has; the last word of a limit is its key in the schema."""
    split = [limit.rsplit(" ", 1) for limit in limits]
    return " ".join(
        [kind, " and ".join(f"{words} {node[key]}" for words, key in split if key in node)]
    ).strip()


def key_path(path: KeyPath) -> str:
    """`steps.0.kcenter.ipc`."""
    return ".".join(quoted(str(part)) for part in path)
