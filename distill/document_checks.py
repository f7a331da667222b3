"""What a recipe of text may hold: refused before anything is read, where images and documents are mixed up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from distill.contracts import DocumentSelector, Method
from distill.errors import InputError
from distill.recipe import Recipe
from distill.step_checks import step_named
from distill.text import Corpus, Piece, Unreadable, read_blocks, would_be_read
from distill.text.data import TextConfig, TextTargetConfig

_FIRST = 1000  # rows that cannot be read, after which nothing else is expected


def check_images(recipe: Recipe, steps: Sequence[Method | DocumentSelector]) -> list[Method]:
    """The steps of a recipe of images.

    Raises:
        InputError: a step or a target of text, or work on Ray.
    """
    for number, step in enumerate(steps):
        if isinstance(step, DocumentSelector):
            raise InputError(
                f"{step.name} chooses documents, and the data are images",
                where=f"steps.{number}.{step.name}",
                found=f"data: {recipe.data.name}",  # type: ignore[attr-defined]
                fix="name files of text, data: {name: text, files: ...}, or a selector of images, such as importance",
            )
    if isinstance(recipe.target, TextTargetConfig):
        raise InputError("the target is text, and the data are images", where="target.name", found="text")
    if recipe.engine != "local":
        raise InputError(
            "images are worked on by this machine alone",
            where="engine",
            found=recipe.engine,
            allowed="local; ray with data: {name: text, ...}",
        )
    return [step for step in steps if isinstance(step, Method)]


def check_text(recipe: Recipe, steps: Sequence[Method | DocumentSelector]) -> DocumentSelector:
    """The one step of a recipe of text.

    Raises:
        InputError: several steps, or one of images; no target, or one of images; students.
    """
    for number, each in enumerate(steps):
        if not isinstance(each, DocumentSelector):
            raise InputError(
                f"{each.name} works on images, and the data are text",
                where=f"steps.{number}.{each.name}",
                allowed="dsir, or another selector of documents",
                fix="choose documents, or name data of images",
            )
    step, *more = steps
    assert isinstance(step, DocumentSelector), "all of them are"
    if more:
        raise InputError(
            "one step chooses documents",
            where=f"steps.1.{more[0].name}",
            found=f"{len(steps)} steps",
            fix="leave one, and choose again among what it wrote in a run of its own",
        )
    if recipe.target is None:
        raise InputError(
            f"{step.name} chooses what is like a target, and the recipe names none",
            where="target",
            fix="name files of text beside data, target: {name: text, files: ...}",
        )
    if not isinstance(recipe.target, TextTargetConfig):
        raise InputError(
            "the data are text, and the target is not",
            where="target.name",
            found=recipe.target.name,  # type: ignore[attr-defined]
            allowed="text",
        )
    if recipe.evaluate.on != "nothing":
        raise InputError(
            "no student learns text",
            where="evaluate.on",
            found=recipe.evaluate.on,
            allowed="nothing",
            fix="leave evaluate out; the report tells how close the choice is to the target",
        )
    with step_named(0, step):
        step.check(tuple(recipe.target.named))
    return step


def check_outputs(recipe: Recipe, outputs: Iterable[Path]) -> None:
    """Raise InputError where what a run writes would be read as documents: its log, its report, what it chose.

    Args:
        recipe: of text or images.
        outputs: every file that may be written.
    """
    read: list[tuple[str, str | list[str]]] = []
    if isinstance(recipe.data, TextConfig):
        read.append(("data.files", recipe.data.files))
    if isinstance(recipe.target, TextTargetConfig):
        read += [("target.files", files) for files in recipe.target.named.values()]
    for where, files in read:
        among = [
            path for path in outputs if would_be_read(path, [files] if isinstance(files, str) else files)
        ]
        if among:
            raise InputError(
                "a run would write among the files that it reads",
                where=where,
                found=f"{among[0]} among {files}",
                fix="name a folder outside of them with --out",
            )


def check_readable(corpus: Corpus, *, where: str) -> None:
    """Look at a few rows: raise InputError where none of them can be read, before hours are spent on the rest.

    Args:
        corpus: whose first rows are looked at, and those in its middle and of its last piece.
        where: the section of the recipe that names it.

    Raises:
        InputError: none of them can be read, as where the field has another name.
        DamagedDataError, UnsafeFileError: a file is broken.
    """
    if corpus.config.bad_lines == 1:
        return
    pieces = corpus.pieces()
    if not pieces:  # empty files: told where words are counted
        return
    found = [_unreadable_in(pieces[at], corpus) for at in sorted({0, len(pieces) // 2, len(pieces) - 1})]
    told = [why for why in found if why is not None]
    if told and len(told) == len(found):
        raise InputError(
            f"none of the rows that were looked at can be read; the first {told[0].why}",
            where=f"{pieces[0].file.path}, line {told[0].row + 1}",
            fix=f"name the text with {where}.field, or look at the file",
        )


def _unreadable_in(piece: Piece, corpus: Corpus) -> Unreadable | None:
    """The first row of the piece where none of its first ones can be read; None where one can, or there is none."""
    seen, first = 0, None
    for block in read_blocks(piece, corpus.config):
        if any(text is not None for text in block.texts):
            return None
        first = first or next(iter(block.unreadable), None)
        seen += len(block.unreadable)
        if seen >= _FIRST:
            break
    return first
