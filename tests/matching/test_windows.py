"""Where students start: the window, its growth, and what each student follows."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill.cache.trajectories import Layout, Trajectories
from distill.matching.networks import FlatNetworks
from distill.matching.students import Students
from distill.matching.windows import StartEpochs


def test_a_window_that_grows_reaches_its_end_in_time() -> None:
    """DATM's schedule: the upper end rises from 9 to 19 within 1,000 steps."""
    window = StartEpochs(last=19, grow_from=9, grow_steps=1000)
    assert [window.last_at(step) for step in (0, 99, 100, 500, 999, 1000, 4000)] == [9, 9, 10, 14, 18, 19, 19]


def test_a_fixed_window() -> None:
    assert {StartEpochs(first=2, last=5).last_at(step) for step in range(100)} == {5}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"first": 3, "last": 2}, "first 3 is beyond last 2"),
        ({"grow_from": 3}, "belong together"),
        ({"grow_steps": 3}, "belong together"),
        ({"last": 4, "grow_from": 5, "grow_steps": 10}, "grow_from 5 is outside of first 0 to last 4"),
        ({"first": -1}, "greater than or equal to 0"),
    ],
)
def test_impossible_windows(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        StartEpochs(**values)


@pytest.fixture
def students(tmp_path: Path) -> Students:
    module = torch.nn.Linear(2, 1)
    np.save(tmp_path / "weights.npy", np.zeros((5, 8, 3), dtype=np.float32))
    layout = Layout.of(module, range(8))
    return Students(
        networks=FlatNetworks(module, layout),
        experts=Trajectories(tmp_path / "weights.npy", layout, 5),
        count=2,
        epochs=2,
        start=StartEpochs(first=1, last=5, grow_from=2, grow_steps=50),
        steps=3,
        batch=2,
        augment="none",
        gradient="exact",
        segment=1,
        seed=4,
        device=torch.device("cpu"),
        stacked=False,
    )


def test_every_expert_is_followed_in_turn(students: Students) -> None:
    followed = [draw.expert for step in range(50) for draw in students.draws(step)]
    for first in range(0, 100, 5):
        assert sorted(followed[first : first + 5]) == list(range(5))
    assert followed[:5] != followed[5:10], "not always in the same order"


def test_starts_fill_the_window_as_it_is_then(students: Students) -> None:
    early = {draw.start for step in range(10) for draw in students.draws(step)}
    late = Counter(draw.start for step in range(100, 600) for draw in students.draws(step))
    assert early == {1, 2}
    assert set(late) == {1, 2, 3, 4, 5}
    assert max(late.values()) - min(late.values()) < 80, "of 1,000, each as likely: about 200"


def test_every_student_has_a_seed_of_its_own(students: Students) -> None:
    seeds = [draw.seed for step in range(20) for draw in students.draws(step)]
    assert len(set(seeds)) == 40
    assert students.draws(7) == students.draws(7)
