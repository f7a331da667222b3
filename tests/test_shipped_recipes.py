"""Every shipped recipe is one, can be planned, and says at its head how to run it and what to expect."""

from __future__ import annotations

import pytest

from distill.document_checks import check_images, check_text
from distill.pipeline import make_steps
from distill.recipe import load_recipe, recipe_names, recipe_text
from distill.step_checks import check_places


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_one_and_says_what_to_expect(name: str) -> None:
    recipe = load_recipe(name).recipe
    steps = make_steps(recipe)
    if recipe.of_text:
        check_text(recipe, steps)
    else:
        check_places(check_images(recipe, steps), recipe)
    head = recipe_text(name)
    assert f"# Run:      distill run {name}" in head and "# Expect:   " in head
