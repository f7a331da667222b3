"""Outer steps: SGD as torch does it, the guard, the average, and a file that continues to the same bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import NonFiniteError
from distill.matching.gradient import Matched
from distill.matching.learning import Rates, State

CPU = torch.device("cpu")
RATES = Rates(
    images=0.3,
    labels=2.0,
    log_lr=0.5,
    momentum=0.5,
    labels_momentum=0.9,
    average=None,
    diverged=10.0,
    patience=50,
)


def begin(*, average: bool = False, labels: bool = True) -> State:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 2, 3, 3, generator=generator)
    logits = torch.randn(4, 3, generator=generator) if labels else None
    return State.begin(images, lr=0.02, labels=logits, average=average)


def found(seed: int, *, labels: bool = True, loss: float = 1.0) -> Matched:
    generator = torch.Generator().manual_seed(seed)
    return Matched(
        loss=torch.tensor([loss]),
        images=torch.randn(4, 2, 3, 3, generator=generator),
        labels=torch.randn(4, 3, generator=generator) if labels else None,
        lr=torch.randn((), generator=generator),
    )


def values(state: State) -> list[Tensor]:
    return [each for each in vars(state).values() if isinstance(each, Tensor)]


def test_steps_are_those_of_torchs_sgd() -> None:
    state = begin()
    images, labels = (each.clone().requires_grad_() for each in (state.images, state.labels))
    log_lr = state.log_lr.clone().requires_grad_()
    optimizers = [
        torch.optim.SGD([images], lr=0.3, momentum=0.5),
        torch.optim.SGD([log_lr], lr=0.5, momentum=0.5),
        torch.optim.SGD([labels], lr=2.0, momentum=0.9),
    ]
    for step in range(5):
        matched = found(step)
        images.grad, labels.grad = matched.images, matched.labels
        log_lr.grad = matched.lr * log_lr.detach().exp()  # the chain rule: dL/dlog beta = beta dL/dbeta
        for optimizer in optimizers:
            optimizer.step()
        assert state.learn(matched, RATES)
    torch.testing.assert_close(state.images, images.detach())
    torch.testing.assert_close(state.labels, labels.detach())
    torch.testing.assert_close(state.log_lr, log_lr.detach())
    assert float(state.lr) == pytest.approx(math.exp(float(log_lr.detach())))


def test_hard_labels_are_not_learned() -> None:
    state = begin(labels=False)
    assert state.learn(found(0, labels=False), RATES)
    assert len(state.labels) == 0


def test_the_learning_rate_cannot_become_negative() -> None:
    state = begin()
    for _ in range(20):
        state.learn(replace(found(0), lr=torch.tensor(1e3)), RATES)
    assert 0 < float(state.lr) < 1e-10


@pytest.mark.parametrize(
    "bad", ["nan loss", "infinite loss", "large loss", "nan image", "nan label", "infinite lr"]
)
def test_a_bad_step_is_left_out_and_no_momentum_sees_it(bad: str) -> None:
    state, clean = begin(), begin()
    for each in (state, clean):
        each.learn(found(0), RATES)
    matched = found(1)
    if bad == "nan loss":
        matched = replace(matched, loss=torch.tensor([1.0, math.nan]))
    elif bad == "infinite loss":
        matched = replace(matched, loss=torch.tensor([math.inf]))
    elif bad == "large loss":
        matched = replace(matched, loss=torch.tensor([0.5, 10.5]))
    elif bad == "nan image":
        matched.images[2, 1, 0, 0] = math.nan
    elif bad == "nan label":
        assert matched.labels is not None
        matched.labels[0, 0] = math.nan
    else:
        matched = replace(matched, lr=torch.tensor(math.inf))
    assert not state.learn(matched, RATES)
    assert (state.step, state.skipped) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(values(state), values(clean), strict=True))
    assert state.learn(found(2), RATES) and clean.learn(found(2), RATES)
    assert all(torch.equal(a, b) for a, b in zip(values(state), values(clean), strict=True))


@pytest.mark.parametrize("lr_slope", [3e4, -3e4], ids=["a rate of 0", "an infinite rate"])
def test_a_rate_that_leaves_the_numbers_is_no_step(lr_slope: float) -> None:
    """The gradient is finite; exp(-300) and exp(300) are no float32 that anyone can train with."""
    state, clean = begin(), begin()
    assert not state.learn(replace(found(0), lr=torch.tensor(lr_slope)), RATES)
    assert state.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(values(state), values(clean), strict=True))


@pytest.mark.parametrize("what", ["images", "labels"])
def test_finite_gradients_that_overflow_are_no_step(what: str) -> None:
    state, clean = begin(average=True), begin(average=True)
    rates = replace(RATES, average=0.9, **{what: 1e3})
    matched = found(0)
    gradient = getattr(matched, what)
    gradient[1] = 1e37
    assert not state.learn(matched, rates)
    assert all(torch.equal(a, b) for a, b in zip(values(state), values(clean), strict=True))


def test_patience_is_what_it_is_given() -> None:
    state = begin()
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        for _ in range(4):
            state.learn(found(0, loss=20.0), replace(RATES, patience=3))
    assert state.step == 3


@pytest.mark.parametrize(("good", "change"), [(0, "lower student_lr"), (1, "lower lr_images")])
def test_when_nothing_but_bad_steps_come_it_stops_and_says_what_to_change(good: int, change: str) -> None:
    """Where none was ever taken, rates that take steps are not to blame."""
    state = begin()
    for number in range(good):
        assert state.learn(found(number), RATES)
    with pytest.raises(NonFiniteError, match="50 steps in a row") as caught:
        for _ in range(100):
            state.learn(found(0, loss=20.0), RATES)
    assert state.step == 50 + good
    assert change in str(caught.value) and "loss 20" in str(caught.value)


def test_a_good_step_ends_the_row() -> None:
    state = begin()
    for step in range(200):
        state.learn(found(step, loss=20.0 if step % 40 else 1.0), RATES)
    assert state.skipped == 195


def test_the_average() -> None:
    state = begin(average=True)
    expected = state.images.clone()
    for step in range(4):
        state.learn(found(step), replace(RATES, average=0.9))
        expected = 0.9 * expected + 0.1 * state.images
    torch.testing.assert_close(state.result, expected)
    assert not torch.equal(state.result, state.images)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("labels", [False, True])
def test_what_is_kept_goes_on_to_the_same_bytes(tmp_path: Path, average: bool, labels: bool) -> None:
    rates = replace(RATES, average=0.9 if average else None)
    whole = begin(average=average, labels=labels)
    for step in range(6):
        whole.learn(found(step, labels=labels), rates)
    cut = begin(average=average, labels=labels)
    for step in range(6):
        cut.save(tmp_path / "state.npz", identity="a run")
        loaded = State.load(tmp_path / "state.npz", CPU, identity="a run")
        assert loaded is not None
        cut = loaded
        cut.learn(found(step, labels=labels), rates)
    assert cut.step == whole.step
    for a, b in zip(values(cut), values(whole), strict=True):
        assert torch.equal(a, b)
        assert not len(a.shape) or not len(a) or a.stride() == b.stride(), (
            "kernels, and so the last bits, follow the layout"
        )


def test_what_another_run_kept_is_not_taken(tmp_path: Path) -> None:
    begin().save(tmp_path / "state.npz", identity="a run")
    assert State.load(tmp_path / "state.npz", CPU, identity="another") is None
    assert State.load(tmp_path / "state.npz", CPU, identity="a run") is not None


@pytest.mark.parametrize("damage", ["cut", "a changed byte", "empty", "text", "another archive"])
def test_what_is_damaged_is_not_taken(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "state.npz"
    begin().save(path, identity="a run")
    data = bytearray(path.read_bytes())
    place = data.index(begin().images.numpy().tobytes()[:8])
    if damage == "another archive":
        np.savez(path, identity=np.array("a run"), step=np.array(3))
    else:
        data[place + 3] ^= 1
        pieces = {"cut": data[: len(data) // 2], "a changed byte": data, "empty": b"", "text": b"step 3"}
        path.write_bytes(pieces[damage])
    assert State.load(path, CPU, identity="a run") is None


def test_one_layout_whatever_the_images_come_in() -> None:
    images = torch.randn(4, 1, 3, 3)
    strides = {
        State.begin(each, lr=0.1, labels=None, average=False).images.stride()
        for each in (images, images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
    }
    assert len(strides) == 1
