"""Errors that a user meets: each says what, where, what was found, what is allowed and how to fix it.

The command line prints `str(error)` and leaves with `error.exit_code`; a traceback is shown with `--debug` only.
Errors of other types are our own defects and leave with exit code 1.
"""

from __future__ import annotations

from typing import Any


class DistillError(Exception):
    """Base of every error meant for a user.

    Args:
        what: one sentence without a full stop.
        where: file (with line), key path or option.
        found: the offending value, as the user would write it.
        allowed: the values that would have been accepted.
        fix: what to do, in the imperative.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        allowed: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = found
        self.allowed = allowed
        self.fix = fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel from worker processes with every field."""
        return _rebuild, (type(self), self.__dict__)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [
            f"  {label}: {text}"
            for label, text in (("found", self.found), ("allowed", self.allowed), ("fix", self.fix))
            if text
        ]
        return printable("\n".join(lines))


def printable(text: str) -> str:
    """Control characters but for line ends escaped: names in files come from strangers, and terminals obey them."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _rebuild(cls: type[DistillError], fields: dict[str, Any]) -> DistillError:
    error = cls.__new__(cls)
    error.__dict__.update(fields)
    error.args = (fields["what"],)
    return error


class InputError(DistillError):
    """What the user wrote, named or pointed at cannot be used: exit code 2."""

    exit_code = 2


class DamagedDataError(DistillError):
    """Data exist but are broken: truncated, wrong checksum, NaN, labels out of range. Exit code 3."""

    exit_code = 3


class UnsafeFileError(DamagedDataError):
    """A file uses a feature that could harm the reader's machine; nothing of it was read. Exit code 3."""


class MemoryExhaustedError(DistillError):
    """The device or the host ran out of memory; `fix` names the option to turn. Exit code 4."""

    exit_code = 4


class NonFiniteError(DistillError):
    """A loss, gradient or feature became NaN or infinite; `fix` says what to change. Exit code 2."""

    exit_code = 2


class RecipeErrors(InputError):  # noqa: N818 - it holds many
    """Every mistake of a recipe at once.

    Args:
        problems: one error a mistake, in the order of the file.
        source: the recipe's path or name.
    """

    def __init__(self, problems: list[InputError], *, source: str) -> None:
        super().__init__(f"{len(problems)} mistake{'s' if len(problems) != 1 else ''} in {source}")
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join([f"{printable(self.what)}:", *(str(problem) for problem in self.problems)])


def missing_extra(package: str, extra: str, *, purpose: str) -> InputError:
    """The error for an optional dependency that is not installed; names the extra that brings it."""
    return InputError(
        f"{purpose} needs the package {package}, which is not installed",
        fix=f"pip install 'distill[{extra}]'",
    )
