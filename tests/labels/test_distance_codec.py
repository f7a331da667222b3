"""DBR: two numbers a view, what they decode to, the losses that learn from them, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, InputError
from distill.labels.codecs import CodecConfig, check, decode, encode, label_bytes
from distill.labels.relabel import Relabelling
from distill.training.config import TrainConfig
from distill.training.loop import network_losses

V, N, C = 2, 6, 5
PLAN = {"views": {"mix": "cutmix", "epochs": V}}


def logits(classes: int = C, seed: int = 0) -> Tensor:
    return torch.randn(V, N, classes, generator=torch.Generator().manual_seed(seed)) * 3


def pairs(classes: int = C) -> Tensor:
    """Some of one class twice."""
    return torch.randint(classes, (V, N, 2), generator=torch.Generator().manual_seed(1))


def stored(classes: int = C, temperature: float = 2.0) -> SoftLabels:
    return encode(
        logits(classes), codec="dbr", temperature=temperature, teacher="t", pairs=pairs(classes), **PLAN
    )


def test_the_store_is_a_five_hundredth_of_full_labels_at_1000_classes() -> None:
    """Both by the store's own count; exactly two numbers a view."""
    full = encode(logits(1000), codec="full", temperature=2.0, teacher="t")
    dbr = stored(1000)
    assert label_bytes(full) == 500 * label_bytes(dbr)
    assert sum(array.size for array in dbr.arrays.values()) == 2 * V * N
    assert CodecConfig(name="dbr").view_bytes(1000) == 4


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_decoded_target_is_the_marginal_of_the_two_classes(temperature: float) -> None:
    """A slow reference in float64, view by view."""
    assert (pairs()[..., 0] == pairs()[..., 1]).any() and (pairs()[..., 0] != pairs()[..., 1]).any()
    p = (logits().double() / temperature).softmax(dim=2)
    found = (decode(stored(temperature=temperature), pairs()) / temperature).softmax(dim=2)
    for view in range(V):
        for row in range(N):
            own, other = pairs()[view, row].tolist()
            known = {own: float(p[view, row, own]), other: float(p[view, row, other])}
            rest = (1 - sum(known.values())) / (C - len(known))
            wanted = torch.tensor([known.get(number, rest) for number in range(C)])
            torch.testing.assert_close(found[view, row], wanted, rtol=2e-3, atol=1e-4)


def test_two_classes_have_no_rest() -> None:
    both = torch.tensor([0, 1]).expand(V, N, 2)
    values = logits(2)
    soft = encode(values, codec="dbr", temperature=1.0, teacher="t", pairs=both, **PLAN)
    torch.testing.assert_close(decode(soft, both).softmax(dim=2), values.softmax(dim=2), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("loss", ["dbr_l1", "dbr_l2"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_losses_are_the_papers(loss: Any, temperature: float) -> None:
    """Number by number: mixed cross-entropy, and the distances' difference at T, times T or T squared."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(V, N, C, generator=generator, dtype=torch.float64)
    targets = (logits().double() / temperature).softmax(dim=2)
    ratio = torch.rand(V, N, generator=generator, dtype=torch.float64)
    config = TrainConfig(loss=loss, dbr_weight=0.7, temperature=temperature, mix="cutmix")
    found = network_losses(student, targets, config, temperature=temperature, pairs=pairs(), ratio=ratio)
    for network in range(V):
        total = 0.0
        for row in range(N):
            z, share = student[network, row].tolist(), float(ratio[network, row])
            hard, apart = [], []
            for number in pairs()[network, row].tolist():
                hard.append(math.log(sum(map(math.exp, z))) - z[number])
                soft = [each / temperature for each in z]
                ours = math.log(sum(map(math.exp, soft))) - soft[number]
                theirs = -math.log(float(targets[network, row, number]))
                apart.append(temperature * (ours - theirs))
            norm = abs if loss == "dbr_l1" else (lambda x: x * x)
            total += share * hard[0] + (1 - share) * hard[1] + 0.7 * sum(map(norm, apart))
        assert float(found[network]) == pytest.approx(total / N, rel=1e-10)


def test_distances_need_no_more_than_the_two_numbers() -> None:
    """From stored distances and from all probabilities the loss is the same, up to float16."""
    student = torch.randn(V, N, C, generator=torch.Generator().manual_seed(3))
    config = TrainConfig(loss="dbr_l2", temperature=2.0, mix="cutmix")
    ratio = torch.full((V, N), 0.3)
    losses = [
        network_losses(
            student, (each / 2.0).softmax(dim=2), config, temperature=2.0, pairs=pairs(), ratio=ratio
        )
        for each in (logits(), decode(stored(), pairs()))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("mix", ["none", "selfmix"])
@pytest.mark.parametrize("wrong", ["codec", "train.loss"])
def test_views_of_one_image_are_refused(mix: Any, wrong: str) -> None:
    codec = CodecConfig(name="dbr") if wrong == "codec" else CodecConfig()
    train = TrainConfig(mix=mix, loss="kl" if wrong == "codec" else "dbr_l1")
    with pytest.raises(InputError, match="two images") as caught:
        Relabelling(codec=codec).check(train, classes=C)
    assert caught.value.where == wrong


def test_losses_of_logits_are_refused() -> None:
    with pytest.raises(InputError, match="compares logits"):
        Relabelling(codec=CodecConfig(name="dbr")).check(TrainConfig(mix="cutmix", loss="mse"), classes=C)


def test_damage_is_refused() -> None:
    soft = stored()
    check(soft, images=N, classes=C)
    soft.arrays["distances"][0, 0, 0] = -1
    with pytest.raises(DamagedDataError, match="below 0"):
        check(soft, images=N, classes=C)
    other = SoftLabels("dbr", stored().arrays, {**stored().attributes, "classes": C + 1})
    with pytest.raises(DamagedDataError, match="of how many classes"):
        check(other, images=N, classes=C)
    for views in (None, {"mix": "none", "epochs": V}):
        attributes = {key: value for key, value in stored().attributes.items() if key != "views"}
        plan = {} if views is None else {"views": views}
        with pytest.raises(DamagedDataError, match="which two images"):
            check(SoftLabels("dbr", stored().arrays, {**attributes, **plan}), images=N, classes=C)
