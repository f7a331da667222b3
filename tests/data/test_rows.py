import numpy as np
import pytest
import torch

from distill.data.rows import (
    blocks,
    check_labels,
    class_numbers,
    drawn_per_class,
    entries,
    renumbering,
    share_per_class,
    take_out,
)
from distill.errors import DamagedDataError, InputError
from distill.randomness import counter_bits


def drawn_slowly(labels: list[int], counts: list[int], seed: int) -> list[bool]:
    keys = [int(counter_bits(seed, 0, torch.tensor([row]), 0)[0]) for row in range(len(labels))]
    drawn = [False] * len(labels)
    for number, count in enumerate(counts):
        rows = sorted((row for row in range(len(labels)) if labels[row] == number), key=lambda row: keys[row])
        for row in rows[:count]:
            drawn[row] = True
    return drawn


def test_drawn_per_class_equals_sorting_each_class_by_its_keys():
    labels = torch.from_numpy(np.random.default_rng(0).integers(0, 5, 200))
    counts = torch.tensor([3, 0, 1000, 7, 1])
    for seed in (0, 1):
        fast = drawn_per_class(labels, counts, seed=seed)
        assert fast.tolist() == drawn_slowly(labels.tolist(), counts.tolist(), seed)


def test_drawn_per_class_of_one_class_ignores_the_others():
    labels = torch.tensor([0, 1] * 50)
    few = drawn_per_class(labels, torch.tensor([5, 0]), seed=3)
    more = drawn_per_class(labels, torch.tensor([5, 20]), seed=3)
    assert few.tolist() == (more & (labels == 0)).tolist()


def test_drawn_per_class_differs_by_seed():
    labels = torch.zeros(100, dtype=torch.int64)
    draws = [drawn_per_class(labels, torch.tensor([50]), seed=seed) for seed in (0, 1)]
    assert not torch.equal(*draws)


def test_share_rounds_halves_up():
    labels = torch.tensor([0] * 5 + [1] * 15 + [2] * 1)
    assert share_per_class(labels, 0.1, classes=4).tolist() == [1, 2, 0, 0]


@pytest.mark.parametrize("n", [1, 7, 10_000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_take_out_equals_two_masks_and_reuses_memory(n: int, share: float):
    rows = torch.arange(n * 3).reshape(n, 3)
    taken = torch.rand(n, generator=torch.Generator().manual_seed(n)) < share
    left_expected, out_expected = rows[~taken].clone(), rows[taken].clone()
    left, out = take_out(rows, taken)
    assert torch.equal(left, left_expected)
    assert torch.equal(out, out_expected)
    assert left.data_ptr() == rows.data_ptr() or not len(left)


def test_class_numbers_by_name_and_number_in_the_given_order():
    names = ("cat", "dog", "3", "owl")
    assert class_numbers(["owl", 0, "3"], names) == (3, 0, 2)
    assert class_numbers(None, names) == (0, 1, 2, 3)
    assert renumbering((3, 0, 2), classes=4).tolist() == [1, -1, 2, 0]


def test_unknown_class_names_the_nearest():
    with pytest.raises(InputError, match="did you mean 'airplane'"):
        class_numbers(["airplan"], ("airplane", "bird"))


@pytest.mark.parametrize("wanted", [[2], [-1], ["cat", 0]])
def test_class_outside_or_twice_is_refused(wanted: list[str | int]):
    with pytest.raises(InputError, match=r"data\.classes"):
        class_numbers(wanted, ("cat", "dog"))


@pytest.mark.parametrize("bad", [-1, 3])
def test_labels_out_of_range_name_the_row(bad: int):
    with pytest.raises(DamagedDataError, match=rf"label {bad} at row 2"):
        check_labels(torch.tensor([0, 2, bad]), classes=3, where="here")


def test_blocks_cover_all_rows_once():
    ranges = list(blocks(10, 4, block_bytes=12))
    assert [row for block in ranges for row in range(block.start, block.stop)] == list(range(10))
    assert max(block.stop - block.start for block in ranges) == 3
    assert len(list(blocks(3, 100, block_bytes=1))) == 3


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 10_000])
def test_entries_are_those_of_a_list(count):
    rows = torch.arange(count) * 3
    found = list(entries(rows))
    assert found == rows.tolist()
    assert all(type(entry) is int for entry in found)
