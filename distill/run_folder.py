"""The folder of a run: which files it holds, and when a run may go on in one.

DIR/set.h5, report.json, report.html, recipe.yaml, log.jsonl   what a user reads
DIR/.resume/                                                   what an interrupted run needs; gone once it is done
DIR/previous/                                                  the results that --fresh is replacing; gone likewise

The same recipe in the same folder goes on where it was interrupted, with the same data, installation and device; where
it is finished there is nothing to do.
Another recipe is refused, with the differences, unless the folder is started afresh.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from distill.costs import load_cost, save_cost
from distill.errors import InputError
from distill.evaluation.results import StageCost
from distill.files import disk_errors, write_bytes_atomically
from distill.locks import Lock
from distill.recipe import differences
from distill.store.summary import summarise

State = Literal["new", "interrupted", "finished"]
DOCUMENT_FORMS = ("jsonl", "parquet")
_SHOWN = 8  # differences between two recipes, or between two origins


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def set(self) -> Path:
        return self.root / "set.h5"

    @property
    def report_json(self) -> Path:
        return self.root / "report.json"

    @property
    def report_html(self) -> Path:
        return self.root / "report.html"

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.yaml"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def resume(self) -> Path:
        return self.root / ".resume"

    @property
    def previous(self) -> Path:
        return self.root / "previous"

    @property
    def ledger(self) -> Path:
        return self.resume / "students.jsonl"

    def step(self, number: int) -> Path:
        """The result of a finished step."""
        return self.resume / f"step-{number}.h5"

    def scratch(self, number: int) -> Path:
        """A step's own checkpoints."""
        return self.resume / f"step-{number}"

    def keep_cost(self, number: int, cost: StageCost) -> None:
        """Remember what a finished step cost."""
        save_cost(self._cost(number), cost)

    def step_cost(self, number: int) -> StageCost:
        """What the interrupted run paid for a step that it finished."""
        return load_cost(self._cost(number))

    def _cost(self, number: int) -> Path:
        """Where what a step has cost is kept."""
        return self.resume / f"step-{number}.json"

    @property
    def origin(self) -> Path:
        """What the run began with: data, installation and device."""
        return self.resume / "origin.json"

    def keep_origin(self, origin: Mapping[str, Any]) -> None:
        """Remember what a run begins with: JSON-able, `data` and what else decides its results."""
        write_bytes_atomically(self.origin, json.dumps(origin).encode())

    def refuse_other_origin(self, origin: Mapping[str, Any]) -> None:
        """Raise InputError where the interrupted run began with other data, or elsewhere: parts would not fit."""
        try:
            began = json.loads(self.origin.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            began = None
        if began == origin:
            return
        if not isinstance(began, Mapping):
            what = "nothing tells which data the interrupted run began with"
        elif began.get("data") != origin["data"]:
            what = "the data changed since the interruption"
        else:
            what = "the interrupted run began with another installation or device"
        found = _listed(differences(began, origin)) if isinstance(began, Mapping) else None
        raise InputError(what, where=str(self.root), found=found, fix="start anew with --fresh")

    def refuse_other_set(self, content_sha256: str) -> None:
        """Raise InputError where another set than this lies here, whose report is not to be overwritten."""
        if not self.set.exists():
            return
        own = summarise(self.set, verify=False)["content_sha256"]
        if own != content_sha256:
            raise InputError(
                "the folder holds another set",
                where=str(self.root),
                found=f"content_sha256 {own}",
                allowed=content_sha256,
                fix="name another folder with --out",
            )

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The files that a finished run leaves."""
        return (self.set, self.report_json, self.report_html, self.recipe, self.log)

    def documents(self, form: str) -> Path:
        """The documents of a set, written out in a form of `DOCUMENT_FORMS`."""
        return self.root / f"documents.{form}"

    @property
    def replaced(self) -> tuple[Path, ...]:
        """What a run may leave, and a new one replaces."""
        return (*self.outputs, *map(self.documents, DOCUMENT_FORMS))

    def make(self) -> None:
        """Create the folder where it is absent."""
        with disk_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)

    def check(self, merged_yaml: str, *, resume: bool, fresh: bool) -> State:
        """How a run of this recipe would begin here; nothing is written.

        Args:
            merged_yaml: the merged recipe.
            resume: insist on going on with an interrupted run.
            fresh: start anew, whatever the folder holds of an earlier run.

        Raises:
            InputError: another recipe's run is there, or there is nothing to resume.
        """
        state: State = "new" if fresh else self._state()
        if not fresh and self._holds_work():
            self._refuse_other_recipe(merged_yaml)
        if resume and state != "interrupted":
            raise InputError(
                "there is no interrupted run to resume",
                where=str(self.root),
                found="a finished run" if state == "finished" else None,
                fix="leave --resume out" + (" to run from the start" if state == "new" else ""),
            )
        return state

    def open(self, merged_yaml: str, *, resume: bool, fresh: bool) -> State:
        """Prepare the folder for this recipe; a finished run is left as it is.

        Results that a new run will replace are set aside in `previous` until it is finished.

        Args, returns: as `check`.

        Raises:
            InputError: as `check`, and where the folder is not writable.
        """
        self.make()
        state = self.check(merged_yaml, resume=resume, fresh=fresh)
        if state == "finished":
            return state
        if state == "new":
            self._clear()
        with disk_errors(self.resume):
            self.resume.mkdir(exist_ok=True)
        write_bytes_atomically(self.recipe, merged_yaml.encode())
        return state

    def _state(self) -> State:
        if self._was_interrupted():
            return "interrupted"
        results = (self.set, self.report_json, self.report_html)
        return "finished" if all(path.exists() for path in results) else "new"

    def _was_interrupted(self) -> bool:
        """Whether there is anything of a run to go on with; one that failed before its first result left nothing."""
        return self.resume.is_dir() and any(
            path.is_file() for path in self.resume.rglob("*") if path != self.origin
        )

    def _holds_work(self) -> bool:
        """Whether another run would destroy something."""
        return self._was_interrupted() or self.set.exists() or self.report_json.exists()

    def _refuse_other_recipe(self, merged_yaml: str) -> None:
        try:
            earlier = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            earlier = None
        wanted = yaml.safe_load(merged_yaml)
        if earlier == wanted:
            return
        changes = (
            differences(earlier, wanted) if isinstance(earlier, Mapping) else ["recipe.yaml is unreadable"]
        )
        raise InputError(
            "the folder holds the run of another recipe",
            where=str(self.root),
            found=_listed(changes),
            fix="name another folder with --out, or replace the run with --fresh",
        )

    def _clear(self) -> None:
        """Set results aside, and remove what else an earlier run left; nothing else is touched."""
        aside = self.root / ".aside"  # left by a process that was killed while it moved results
        with disk_errors(self.root):
            if aside.exists() or (self.set.exists() and not self._was_interrupted()):
                aside.mkdir(exist_ok=True)
                for path in self.replaced:
                    with suppress(FileNotFoundError):
                        path.replace(aside / path.name)
                shutil.rmtree(self.previous, ignore_errors=True)
                aside.rename(self.previous)
            shutil.rmtree(self.resume, ignore_errors=True)
            for path in self.replaced:
                path.unlink(missing_ok=True)

    def finish(self) -> None:
        """The run is complete: forget what resuming would have needed, and the results that it replaces."""
        shutil.rmtree(self.resume, ignore_errors=True)
        shutil.rmtree(self.previous, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run out of the folder; the lock ends with the process, however it ends."""
        lock = Lock(self.root / ".lock", shared=False)
        self.make()
        with disk_errors(lock.path):
            had = lock.take()
        if not had:
            raise InputError(
                "another run is at work in this folder",
                where=str(self.root),
                fix="wait for it, or name another folder with --out",
            )
        try:
            yield
        finally:
            lock.release(remove=True)


def state_lines(state: State, folder: RunFolder) -> list[str]:
    """What the folder holds of this recipe already, and what that changes."""
    if state == "finished":
        return [f"the run in {folder.root} is finished: only --fresh would run it again"]
    if state == "interrupted":
        return [f"the run in {folder.root} was interrupted and would go on; below is the whole of it"]
    return []


def _listed(changes: list[str]) -> str:
    """Lines of their own below `found:`, not too many."""
    more = [f"and {len(changes) - _SHOWN} more"] if len(changes) > _SHOWN else []
    return "".join(f"\n    {line}" for line in [*changes[:_SHOWN], *more])
