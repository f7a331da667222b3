"""The folder of a run: what state it is in, and that results are never lost on the way to new ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.errors import InputError
from distill.run_folder import RunFolder

RECIPE, OTHER = "seed: 1\n", "seed: 2\n"


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    """A folder as a finished run leaves it; every file holds its name."""
    folder = RunFolder(tmp_path / "run")
    folder.make()
    for path in folder.outputs:
        path.write_text(path.name)
    folder.recipe.write_text(RECIPE)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_states(tmp_path: Path, finished: RunFolder) -> None:
    absent = RunFolder(tmp_path / "absent")
    assert absent.check(RECIPE, resume=False, fresh=False) == "new"
    assert not absent.root.exists()
    assert finished.check(RECIPE, resume=False, fresh=False) == "finished"
    assert finished.check(OTHER, resume=False, fresh=True) == "new"
    finished.resume.mkdir()
    assert finished.check(RECIPE, resume=False, fresh=False) == "finished", "nothing was begun"
    finished.ledger.write_text("")
    assert finished.check(RECIPE, resume=True, fresh=False) == "interrupted"


@pytest.mark.parametrize("lost", ["set.h5", "report.json", "report.html"])
def test_a_run_that_lacks_a_result_is_run_again(finished: RunFolder, lost: str) -> None:
    (finished.root / lost).unlink()
    assert finished.check(RECIPE, resume=False, fresh=False) == "new"


def test_a_finished_run_is_left_as_it_is(finished: RunFolder) -> None:
    before = contents(finished.root)
    assert finished.open(RECIPE, resume=False, fresh=False) == "finished"
    assert contents(finished.root) == before


def test_results_are_set_aside_until_new_ones_stand(finished: RunFolder) -> None:
    before = contents(finished.root)
    assert finished.open(OTHER, resume=False, fresh=True) == "new"
    assert contents(finished.previous) == before
    assert contents(finished.root) == {"recipe.yaml": OTHER}
    finished.finish()
    assert not finished.previous.exists()


def test_an_unfinished_run_does_not_replace_what_was_set_aside(finished: RunFolder) -> None:
    before = contents(finished.root)
    finished.open(OTHER, resume=False, fresh=True)
    finished.set.write_text("half")
    finished.ledger.write_text("")
    finished.open(OTHER, resume=False, fresh=True)
    assert contents(finished.previous) == before
    assert not finished.set.exists()


@pytest.mark.parametrize("moved", range(6))
def test_a_process_killed_while_it_moves_results_loses_none(
    finished: RunFolder, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    """Killed after 0 to 4 of the five moves, or before the folder has its name; the next one completes them."""
    before, replace, count = contents(finished.root), Path.replace, 0

    def killed(path: Path, target: Path) -> Path:
        nonlocal count
        if target.parent.name == ".aside":
            if count == moved:
                raise KeyboardInterrupt
            count += 1
        return replace(path, target)

    def killed_at_last(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "rename", killed_at_last)
        with pytest.raises(KeyboardInterrupt):
            finished.open(OTHER, resume=False, fresh=True)
    finished.open(OTHER, resume=False, fresh=True)
    assert contents(finished.previous) == before


def test_differences_stand_on_lines_of_their_own_and_are_not_too_many(finished: RunFolder) -> None:
    finished.recipe.write_text("".join(f"key{k}: 1\n" for k in range(20)))
    with pytest.raises(InputError) as caught:
        finished.check("".join(f"key{k}: 2\n" for k in range(20)), resume=False, fresh=False)
    lines = str(caught.value).splitlines()
    assert lines[1:4] == ["  found: ", "    key0: 1 -> 2", "    key1: 1 -> 2"]
    assert "    and 12 more" in lines
