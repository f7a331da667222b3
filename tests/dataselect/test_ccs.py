"""CCS: strata against the algorithm of the paper, the budget to the sample, even draws, and the cut of the hardest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pydantic import ValidationError
from scipy.stats import chi2
from sklearn.linear_model import LogisticRegression

from dataselect.ccs import CoverageCentric, allocate, strata_of, stratified
from dataselect.hardness import Hardness
from dataselect.random_choice import RandomChoice
from dataselect.scores import ScoreChoice
from distill.contracts import Context, Method, Selection, Source, Split
from distill.errors import InputError
from distill.training.job import Job

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}
MakeContext = Callable[..., Context]

HARDNESS = arrays.arrays(
    np.float64,
    st.integers(1, 60),
    elements=st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda x: round(x, 3)),
)


def config(**options: object) -> CoverageCentric.Config:
    return CoverageCentric.Config.model_validate({"network": NETWORK, **options})


def with_hardness(monkeypatch: pytest.MonkeyPatch, values: np.ndarray) -> None:
    """Every source's samples are that hard, and no network is trained."""
    monkeypatch.setattr(Hardness, "values", values)


def slow_strata(hardness: np.ndarray, strata: int) -> list[list[int]]:
    """The samples between low + i * width and low + (i + 1) * width, the last stratum closed."""
    low, high = hardness.min(), hardness.max()
    if low == high:
        return [list(range(len(hardness))), *([] for _ in range(strata - 1))]
    found: list[list[int]] = [[] for _ in range(strata)]
    for place, value in enumerate(hardness):
        share = (value - low) / (high - low) * strata
        (number,) = [i for i in range(strata) if i <= share < i + 1 or (i == strata - 1 and share >= strata)]
        found[number].append(place)
    return found


def slow_shares(sizes: list[int], budget: int) -> list[int]:
    """Algorithm 1: while there are strata, take the smallest, give it its share, and go on without it."""
    shares, left = [0] * len(sizes), list(range(len(sizes)))
    while left:
        smallest = min(left, key=lambda i: (sizes[i], i))
        shares[smallest] = min(sizes[smallest], budget // len(left))
        budget -= shares[smallest]
        left.remove(smallest)
    return shares


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=60), data=st.data())
def test_shares_are_those_of_the_paper_and_sum_to_the_budget(sizes: list[int], data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, sum(sizes)))
    shares = allocate(np.array(sizes), budget)
    assert shares.tolist() == slow_shares(sizes, budget)
    assert shares.sum() == budget
    assert (shares <= sizes).all()


@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=20), data=st.data())
def test_shares_are_as_even_as_sizes_allow(sizes: list[int], data: st.DataObject) -> None:
    """A stratum that is not emptied is at most one short of any other's share."""
    shares = allocate(np.array(sizes), data.draw(st.integers(0, sum(sizes))))
    kept = shares[shares < np.array(sizes)]
    assert not len(kept) or kept.min() >= shares.max() - 1


@given(hardness=HARDNESS, strata=st.integers(1, 55), data=st.data())
def test_strata_and_budget_for_every_size(hardness: np.ndarray, strata: int, data: st.DataObject) -> None:
    own = strata_of(hardness, strata)
    members = slow_strata(hardness, strata)
    assert [np.flatnonzero(own == number).tolist() for number in range(strata)] == members
    count = data.draw(st.integers(1, len(hardness)))
    samples = np.arange(len(hardness)) * 3 + 1
    places = stratified(hardness, samples, count, strata=strata, seed=data.draw(st.integers(0, 5)))
    assert len(np.unique(places)) == len(places) == count
    drawn = np.bincount(own[places], minlength=strata)
    assert drawn.tolist() == slow_shares([len(each) for each in members], count)


def test_golden_draw() -> None:
    """Worked by hand: five strata of width 2 hold 4, 0, 1, 2 and 3 samples; of 6, they give 2, 0, 1, 1 and 2."""
    hardness = np.array([0, 0.5, 1, 1.9, 4, 6, 7, 8, 9, 10])
    assert strata_of(hardness, 5).tolist() == [0, 0, 0, 0, 2, 3, 3, 4, 4, 4]
    assert allocate(np.array([4, 0, 1, 2, 3]), 6).tolist() == [2, 0, 1, 1, 2]
    places = stratified(hardness, np.arange(10), 6, strata=5, seed=0)
    assert strata_of(hardness, 5)[places].tolist() == [2, 3, 4, 4, 0, 0]
    assert places.tolist() == [4, 6, 9, 7, 0, 2]  # which of a stratum, the seed decides


def test_the_hardest_sample_is_drawn_where_hardness_is_negative() -> None:
    """The released code's last stratum ends below the greatest score there."""
    hardness = -np.arange(10.0, 0, -1)
    assert sorted(stratified(hardness, np.arange(10), 10, strata=50, seed=0)) == list(range(10))


def test_draws_inside_a_stratum_are_even() -> None:
    """2 of 7 in one stratum over 400 seeds; the spread of counts is chi-square of draws without replacement."""
    hardness, counts = np.full(7, 3.0), np.zeros(7)
    for seed in range(400):
        counts[stratified(hardness, np.arange(7) + 100, 2, strata=50, seed=seed)] += 1
    expected = 400 * 2 / 7
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - 2 / 7)) * 6 / 7
    assert 0.001 < chi2.sf(statistic, 6) < 0.999


def test_a_draw_hangs_on_the_samples_numbers_alone() -> None:
    """Strata of other samples change nothing inside a stratum."""
    samples = np.array([3, 8, 9, 20])
    few = stratified(np.zeros(4), samples, 4, strata=1, seed=1)
    grown = np.array([3, 5, 8, 9, 12, 20])
    many = stratified(np.array([0.0, 9, 0, 0, 9, 0]), grown, 6, strata=2, seed=1)
    assert [each for each in grown[many] if each in samples] == samples[few].tolist()


# --- the method


def test_the_hardest_are_left_out_and_the_range_is_that_of_the_rest(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample of each class is a thousand times harder: with it, all others would share a stratum."""
    values = np.arange(24.0)
    hardest = [np.flatnonzero(source.train.labels.numpy() == number)[-1] for number in range(3)]
    values[hardest] = 1e5
    with_hardness(monkeypatch, values)
    found = CoverageCentric(config(ipc=7, mislabelled=0.125)).run(make_context(), source, None)
    assert sorted(found.indices) == sorted(set(range(24)) - set(hardest))
    three = CoverageCentric(config(ipc=3, mislabelled=0.125, strata=3)).run(make_context(), source, None)
    for number in range(3):
        own = values[three.indices[3 * number : 3 * number + 3]]
        rest = values[(source.train.labels.numpy() == number) & (values < 1e5)]
        assert sorted(strata_of(np.concatenate([own, rest]), 3)[:3]) == [0, 1, 2]


def test_scores_are_the_hardness_of_the_picks(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).normal(size=24)
    with_hardness(monkeypatch, values)
    found = CoverageCentric(config(count=6, per_class=False)).run(make_context(), source, None)
    np.testing.assert_array_equal(found.scores, values[found.indices].astype(np.float32))
    assert "hardness by aum" in found.meta["score"]


def test_equal_ones_are_cut_by_the_seed(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all are equally hard each is left out now and then."""
    with_hardness(monkeypatch, np.zeros(24))
    method = CoverageCentric(config(count=18, per_class=False, mislabelled=0.25))
    left_out = [
        set(range(24)) - set(method.run(make_context(seed=s), source, None).indices) for s in range(40)
    ]
    assert all(len(each) == 6 for each in left_out)
    assert set().union(*left_out) == set(range(24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 8}, "leaves 6 of the 8 samples of class zero, and 8 are asked for"),
        ({"count": 20, "per_class": False}, "leaves 18 of the 24 samples of the data, and 20 are asked for"),
    ],
)
def test_a_cut_that_leaves_too_few_is_refused_before_any_work(
    options: dict[str, object], message: str, source: Source
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        CoverageCentric(config(mislabelled=0.25, **options)).check(source, None)
    allowed = float(str(caught.value.allowed).rsplit(" ", 1)[1])
    CoverageCentric(config(mislabelled=allowed, **options)).check(source, None)


def test_a_cut_behind_a_selection_is_refused_before_training(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    """The source could give them; the selection before kept 4 of a class."""
    labels = source.train.labels.numpy()
    kept = np.concatenate([np.flatnonzero(labels == number)[:4] for number in range(3)])
    before = Selection(kept, np.ones(12, np.float32), np.zeros(12, np.float32))
    with pytest.raises(InputError, match="leaves 3 of the 4 samples of class zero"):
        CoverageCentric(config(ipc=4, mislabelled=0.25)).run(make_context(), source, before)
    assert not trained


def test_samples_without_a_score_are_no_part_of_the_cut(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(24.0)
    values[:12] = np.nan
    with_hardness(monkeypatch, values)
    method = CoverageCentric(config(count=9, per_class=False, mislabelled=0.25))
    assert sorted(method.run(make_context(), source, None).indices) == list(range(12, 21))
    with pytest.raises(InputError, match="leaves 9 of the 12 samples of the data, and 10"):
        CoverageCentric(config(count=10, per_class=False, mislabelled=0.25)).run(make_context(), source, None)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.3, 0.7])
def test_the_share_that_is_cut_is_what_is_written(share: float) -> None:
    """0.29 * 100 is 28.999... in binary."""
    assert config(ipc=1, mislabelled=share).cut(100) == round(100 * share)


def test_a_whole_cut_is_refused() -> None:
    with pytest.raises(ValidationError, match="mislabelled"):
        config(ipc=1, mislabelled=1.0)


@pytest.mark.slow
def test_few_of_many_digits_with_wrong_labels_among_them(
    make_source: Callable[..., Source], make_context: MakeContext
) -> None:
    """The trend of the paper at high rates of pruning: the hardest < random < CCS.

    5 of 100 digits a class, a tenth of them with wrong labels; a linear classifier of pixels tells 700 others, mean of
    3 seeds.
    """
    source = make_source((100,) * 10, test=70)
    labels = source.train.labels.clone()
    labels[::10] = (labels[::10] + 3) % 10
    train = Split(source.train.images, labels, "a tenth is wrong")
    source = replace(source, train=train)
    options = {"ipc": 5, "network": {"model": {"name": "convnet", "width": 8}}}

    def accuracy(method: type[Method], more: dict[str, object]) -> float:
        found = []
        for seed in range(3):
            chosen = method(method.Config.model_validate({**options, **more}))
            picks = chosen.run(make_context(seed=seed), source, None).indices
            images, test = (each.images.flatten(1).numpy() / 255 for each in (train, source.test))
            student = LogisticRegression(max_iter=1000).fit(images[picks], labels.numpy()[picks])
            found.append(student.score(test, source.test.labels.numpy()))
        return float(np.mean(found))

    hardest = accuracy(ScoreChoice, {"by": "aum"})
    even = accuracy(CoverageCentric, {})
    options.pop("network")
    random = accuracy(RandomChoice, {})
    assert hardest < random - 0.1
    assert random + 0.02 < even
