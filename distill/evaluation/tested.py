"""On whose images students are tested: refusals before any work, and images that they would have learned from."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

from distill.contracts import Source, Split
from distill.errors import InputError
from distill.selection import evaluated_on_target, labelled_target

Tested = Literal["data", "target", "transfer", "nothing"]


def reads_target(on: Tested, against: tuple[str, ...]) -> bool:
    """Whether an evaluation needs the target of the recipe."""
    return on != "nothing" and (on in ("target", "transfer") or "random_target" in against)


def check_tested(source: Source, on: Tested, against: tuple[str, ...]) -> None:
    """Refuse a target that students cannot be tested on, or whose classes a control cannot draw.

    Args:
        source: with its target where one is read, or an `outline` of it.
        on, against: of the evaluation.

    Raises:
        InputError: classes that the source lacks, or too few of them.
    """
    if on == "target":
        evaluated_on_target(source)
    if on == "transfer":
        refuse_one_class(source)
    if on != "nothing" and "random_target" in against:
        labelled_target(source, why="random_target draws real images of the target's classes")


def refuse_one_class(source: Source) -> None:
    """Raise InputError where there is one class to learn, or to judge features by."""
    assert source.target is not None, "refused before the first step"
    for name, classes in (("data", source.classes), ("target", source.target.classes)):
        if len(classes) < 2:
            raise InputError(
                "students are pretrained to tell classes apart, and features are judged by the target's classes",
                where=name,
                found=f"one class, {classes[0]!r}",
                allowed="at least 2",
                fix="set evaluate.on: nothing, or name data with classes",
            )


def without_learned(source: Source, on: Tested) -> tuple[Source, str | None]:
    """The source without test images of the target that lie in its train split too, and what to tell of them.

    A folder may hold a smaller one: a selector that looks for what resembles the target would find its test images.
    Images are the same where all pixels are. The target's test split is left as it is where nobody is tested on it.
    """
    target = source.target
    if target is None or on not in ("target", "transfer"):
        return source, None
    learned = {_digest(source.train, number) for number in range(len(source.train))}
    kept = [number for number in range(len(target.test)) if _digest(target.test, number) not in learned]
    lost = len(target.test) - len(kept)
    if not lost:
        return source, None
    if not kept:
        raise InputError(
            "every test image of the target is a training image of the data",
            where="target",
            found=f"{lost} of {lost} images",
            fix="name a target whose test images the data do not hold",
        )
    test = target.test
    named = hashlib.sha256(f"{test.fingerprint} without {source.train.fingerprint}".encode()).hexdigest()
    left = Split(test.images[kept], test.labels[kept], named)
    note = (
        f"{lost} of {len(test)} test images of the target are training images of the data, and are left out"
    )
    return replace(source, target=replace(target, held_out=left)), note


def _digest(split: Split, number: int) -> bytes:
    return hashlib.blake2b(split.images[number].contiguous().numpy().tobytes(), digest_size=16).digest()
