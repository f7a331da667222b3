"""Codecs that store less than every logit: what they keep, what they lose, and what they weigh."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, InputError
from distill.labels.codecs import CODECS, CodecConfig, check, decode, decode_rows, encode, label_bytes

V, N = 3, 7


def logits(classes: int, seed: int = 0) -> Tensor:
    return torch.randn(V, N, classes, generator=torch.Generator().manual_seed(seed)) * 5


def store(values: Tensor, codec: str, *, temperature: float = 4.0, **options: Any) -> SoftLabels:
    return encode(values, codec=codec, temperature=temperature, teacher="t", **options)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("k", [1, 3, 12])
def test_topk_keeps_the_largest_probabilities(temperature: float, k: int) -> None:
    values = logits(12)
    p = (values / temperature).softmax(dim=2)
    q = (decode(store(values, "topk", temperature=temperature, k=k)) / temperature).softmax(dim=2)
    best, index = p.topk(k, dim=2)
    torch.testing.assert_close(q.gather(2, index), best, rtol=5e-3, atol=1e-6)
    rest = q.scatter(2, index, math.nan)
    for row in rest.reshape(-1, 12):
        others = row[~row.isnan()]
        assert len(others) == 12 - k
        assert len(others) == 0 or float(others.max() - others.min()) < 1e-7


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_marginal_codecs(temperature: float) -> None:
    values, k = logits(12), 4
    p = (values / temperature).softmax(dim=2).double()
    for name in ("marginal_smoothing", "marginal_renormalised"):
        q = (decode(store(values, name, temperature=temperature, k=k)) / temperature).softmax(dim=2)
        for own, other in zip(p.reshape(-1, 12), q.reshape(-1, 12), strict=True):
            order = own.argsort(descending=True)
            top, rest = order[:k], order[k:]
            want = torch.zeros(12, dtype=torch.float64)
            if name == "marginal_smoothing":
                want[top], want[rest] = own[top], (1 - own[top].sum()) / (12 - k)
            else:
                want[top] = own[top] / own[top].sum()
            torch.testing.assert_close(other.double(), want, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("classes", [1, 2, 5, 12])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_logits_are_within_half_a_step(bits: int, classes: int) -> None:
    values = logits(classes)
    soft = store(values, "quantised", bits=bits)
    span = values.amax(dim=2) - values.amin(dim=2)
    step = span / ((1 << bits) - 1)
    error = (decode(soft) - values).abs().amax(dim=2)
    assert (error <= 0.51 * step + 0.01).all()  # float16 of the least logit, of magnitude up to 16
    width = classes if bits == 8 else math.ceil(classes / 2)
    assert soft.arrays["levels"].shape == (V, N, width)


def test_bytes_of_a_thousand_classes() -> None:
    """A view costs 2 C in full, 4 k + 2 of the k largest, C + 4 or C / 2 + 4 in bits, 4 as distances."""
    values = logits(1000)
    views = V * N
    for name, options, expected in (
        ("full", {}, 2000),
        ("dbr", {"pairs": torch.zeros(V, N, 2, dtype=torch.int64)}, 4),
        ("topk", {"k": 10}, 42),
        ("marginal_smoothing", {"k": 10}, 40),
        ("quantised", {"bits": 8}, 1004),
        ("quantised", {"bits": 4}, 504),
    ):
        assert label_bytes(store(values, name, **options)) == views * expected


@pytest.mark.parametrize("name", CODECS)
def test_rows_are_decoded_alone(name: str) -> None:
    pairs = torch.arange(V * N * 2).view(V, N, 2) % 12
    plan = {"views": {"mix": "cutmix", "epochs": V}} if CODECS[name].of_pairs else {}
    soft = store(logits(12), name, pairs=pairs, **plan)
    check(soft, images=N, classes=12)
    alone = decode_rows(soft, 1, slice(2, 5), pairs[1, 2:5])
    torch.testing.assert_close(alone, decode(soft, pairs)[1, 2:5], rtol=0, atol=0)


def test_labels_of_many_classes_need_wider_numbers() -> None:
    for classes, dtype in ((256, np.uint8), (257, np.uint16)):
        soft = store(logits(classes), "topk", k=2)
        assert soft.arrays["index"].dtype == dtype
        assert torch.equal(decode(soft).argmax(dim=2), logits(classes).argmax(dim=2))


@pytest.mark.parametrize("name", ["topk", "marginal_smoothing", "marginal_renormalised"])
def test_a_class_that_is_none_is_damage(name: str) -> None:
    soft = store(logits(12), name, k=3)
    soft.arrays["index"][1, 2, 0] = 12
    with pytest.raises(DamagedDataError, match="a class that is none"):
        check(soft, images=N, classes=12)


@pytest.mark.parametrize("name", ["topk", "marginal_smoothing", "quantised"])
@pytest.mark.parametrize("attribute", ["k", "bits", "classes"])
@pytest.mark.parametrize("value", [None, 0, 13, "3", 1e9])
def test_wrong_attributes_are_damage(name: str, attribute: str, value: Any) -> None:
    soft = store(logits(12), name)
    if attribute not in soft.attributes:
        return
    wrong = SoftLabels(soft.codec, soft.arrays, {**soft.attributes, attribute: value})
    with pytest.raises(DamagedDataError):
        check(wrong, images=N, classes=12)


def test_probabilities_out_of_range_are_damage() -> None:
    soft = store(logits(12), "marginal_smoothing")
    soft.arrays["values"][0, 0, 0] = 1.5
    with pytest.raises(DamagedDataError, match="out of range"):
        check(soft, images=N, classes=12)


def test_options_of_another_codec_are_refused() -> None:
    assert CodecConfig(name="topk").options == {"k": 10}
    assert CodecConfig(name="quantised", bits=4).options == {"bits": 4}
    with pytest.raises(ValidationError, match="k does not belong to codec full"):
        CodecConfig(name="full", k=3)
    with pytest.raises(ValidationError, match="bits does not belong to codec topk"):
        CodecConfig(name="topk", bits=8)


def test_more_than_all_classes_are_refused() -> None:
    CodecConfig(name="topk", k=10).check(10)
    with pytest.raises(InputError, match="keeps more classes than there are") as caught:
        CodecConfig(name="topk", k=11).check(10)
    assert "1 to 10" in str(caught.value)
