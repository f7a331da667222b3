"""Counter-based numbers: against a slow reference in Python integers, and their statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from distill.randomness import (
    counter_bits,
    counter_integers,
    counter_permutation,
    counter_uniform,
    derive_seed,
    generator,
)

MASK = (1 << 64) - 1
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * MIX_A) & MASK
    x = ((x ^ (x >> 27)) * MIX_B) & MASK
    return x ^ (x >> 31)


def slow_bits(seed: int, epoch: int, index: int, draw: int) -> int:
    x = slow_mix((index * GOLDEN + seed * MIX_B + GOLDEN) & MASK)
    x = slow_mix((x + epoch * GOLDEN + MIX_A) & MASK)
    return slow_mix((x + (draw + 1) * GOLDEN) & MASK)


@pytest.mark.parametrize("seed", [0, 1, 2**62 + 12345])
def test_bits_equal_the_reference(seed: int) -> None:
    index = torch.tensor([0, 1, 77, 10**12])
    for epoch in (0, 3, 10**6):
        for draw in (0, 5):
            got = counter_bits(seed, epoch, index, draw).numpy().view(np.uint64).tolist()
            assert got == [slow_bits(seed, epoch, int(i), draw) for i in index]


def test_seeds_epochs_and_indices_broadcast() -> None:
    seeds, epochs, index = torch.tensor([3, 9]), torch.tensor([1, 2]), torch.tensor([5, 6])
    together = counter_bits(seeds, epochs, index, 4)
    assert together.tolist() == [
        int(counter_bits(s, e, torch.tensor([i]), 4)) for s, e, i in ((3, 1, 5), (9, 2, 6))
    ]


def test_uniform_is_uniform_and_draws_are_independent() -> None:
    index = torch.arange(20000)
    a, b = (counter_uniform(7, 2, index, draw).numpy() for draw in (0, 1))
    assert a.min() >= 0 and a.max() < 1
    assert stats.kstest(a, "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[:-1], a[1:])[0, 1]) < 0.03


def test_integers_cover_their_range_evenly() -> None:
    counts = np.bincount(counter_integers(1, 0, torch.arange(9000), 2, below=9).numpy(), minlength=9)
    assert len(counts) == 9
    assert stats.chisquare(counts).pvalue > 1e-3


def test_permutation_is_one_and_changes_with_epoch_and_seed() -> None:
    orders = [counter_permutation(seed, epoch, 50).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert counter_permutation(0, 0, 50).tolist() == orders[0]


def test_names_separate_seeds() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(0, "a"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", "1"),
        derive_seed(1, "a"),
    }
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generator_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.gpu
def test_devices_agree() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    index = torch.arange(1000)
    assert torch.equal(counter_uniform(5, 1, index, 3), counter_uniform(5, 1, index.cuda(), 3).cpu())
