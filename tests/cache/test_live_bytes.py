"""Counting the bytes of live tensors, and what follows for the size of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from distill.cache.live_bytes import LiveBytes, rows_within


def test_the_peak_is_that_of_what_lives_at_once() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a + 1
        del b
        c = a * 2
        del c
    assert live.peak == 8000


def test_views_and_operations_in_place_take_nothing() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        a.view(10, 100).t()[3].mul_(2)
        a += 1
    assert live.peak == 4000


def test_memory_of_before_does_not_count() -> None:
    a = torch.zeros(1000)
    with LiveBytes() as live:
        a[:10].add_(1)
        b = a[:10] + 1
    assert live.peak == b.nbytes


def test_a_view_keeps_its_memory() -> None:
    with LiveBytes() as live:
        kept = torch.zeros(1000)[:1]
        torch.zeros(500)
    assert live.peak == 6000
    del kept


def test_a_backward_pass_and_vmap_are_counted() -> None:
    weight = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        (weight * torch.ones(100)).sum().backward()
    assert live.peak >= 800
    with LiveBytes() as live:
        found = vmap(grad(lambda w, x: (w * x).sum()), in_dims=(None, 0))(weight.detach(), torch.ones(8, 100))
    assert live.peak >= found.nbytes == 3200


def test_the_count_repeats() -> None:
    def peak() -> int:
        with LiveBytes() as live:
            x = torch.zeros(64, 64)
            for _ in range(5):
                x = torch.tanh(x @ x)
        return live.peak

    assert peak() == peak() > 0


@pytest.mark.parametrize(
    ("work_bytes", "rows"), [(0, 1), (7999, 1), (8000, 2), (31_999, 4), (32_000, 8), (10**9, 16)]
)
def test_rows_are_the_largest_power_of_two_that_fits(work_bytes: int, rows: int) -> None:
    def run(images: Tensor) -> object:
        fixed = torch.zeros(5000)  # whatever the number of samples
        return fixed, images.repeat(1, 1000)  # 4000 bytes a sample

    probes = torch.zeros(2, 1), torch.zeros(4, 1)
    assert rows_within(work_bytes, run, probes, most=16) == rows
