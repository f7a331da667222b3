"""Why an original is not the set's image: its data changed, and how, as far as the set knows what they were."""

from __future__ import annotations

from dataclasses import dataclass

from distill.data.base import DataConfig
from distill.data.build import Found, Rows, class_names, images_found
from distill.data.rows import share_per_class
from distill.errors import InputError
from distill.set_recipe import Made

_FIX = (
    "name the data that the set was made from, such as data.folder=..., or use --pixels, which needs no originals: "
    "the set's own images, or indices without paths"
)


@dataclass(frozen=True)
class Compared:
    """The data that originals are looked for in, beside what the set says of those that it was made from.

    Args:
        found: the data.
        config: of the set's recipe.
        made: what the set says.
    """

    found: Found
    config: DataConfig
    made: Made

    def refusal(self, where: str, *, found: str, allowed: str) -> InputError:
        """The error for an original that is not the set's image.

        Originals are found by their numbers, which one image more or fewer shifts for all that follow. Where the data
        hold more or fewer, the file at this number is likely as it was, and is not blamed.
        """
        here, before, what = self._counts()
        if before not in (None, here):
            return fewer_or_more(
                self.found.train.where,
                fewer=here < before,
                found=f"{here} {what}; {where}: {found}",
                allowed=f"{before} {what}; {where}: {allowed}",
            )
        return InputError(
            "this is not the original of an image of the set: the data changed, where an image more or fewer shifts "
            "the numbers of all that follow, or a step changed the images",
            where=where,
            found=found,
            allowed=allowed,
            fix=_FIX,
        )

    def _counts(self) -> tuple[int, int | None, str]:
        """How many images there are and were, and what they are; None where that is not known."""
        labels = self.found.train.labels
        before = images_found(self.made.notes)
        if before is not None:
            return len(labels), before, "images"
        if not isinstance(self.found.test, Rows):  # such a cut had a note: the test images were others
            return len(labels), None, ""
        # Without a note no image was left out, but for those of the validation split.
        cut = share_per_class(labels, self.config.valid, classes=len(class_names(self.found)))
        return len(labels) - int(cut.sum()), self.made.train_images, "images without those for validation"


def fewer_or_more(where: str, *, fewer: bool, found: str, allowed: str) -> InputError:
    """The error for data that lost or gained images."""
    return InputError(
        f"the data hold {'fewer' if fewer else 'more'} images than those that the set was made from, which likely "
        "shifted the numbers by which originals are found",
        where=where,
        found=found,
        allowed=allowed,
        fix=f"{'put back what was removed' if fewer else 'take out what was added'}, {_FIX}",
    )
