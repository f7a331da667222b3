"""Messages: every field told, and nothing in them that a terminal would obey."""

from __future__ import annotations

import pickle

from distill.errors import InputError, RecipeErrors


def test_every_field_is_told_on_a_line_of_its_own() -> None:
    error = InputError("wrong", where="here", found="\n    a -> b", allowed="1", fix="go")
    assert str(error) == "here: wrong\n  found: \n    a -> b\n  allowed: 1\n  fix: go"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_control_characters_are_escaped() -> None:
    """Escape sequences, bells, returns, C1 controls and marks that turn the direction of text; other text stays."""
    hostile = "\x1b[2J\x07\r\x9b\u202e\u2028é 猫\t"
    shown = r"\x1b[2J\x07\r\x9b\u202e\u2028" + "é 猫" + r"\t"
    error = InputError(hostile, where=hostile, found=hostile)
    assert str(error) == f"{shown}: {shown}\n  found: {shown}"
    many = RecipeErrors([error], source=hostile)
    assert str(many) == f"1 mistake in {shown}:\n{error}"
