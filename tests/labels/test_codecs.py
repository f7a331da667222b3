"""Soft-label codecs: what goes in comes out, within what the codec promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.labels import codec, codecs
from distill.labels.codecs import CODECS, Codec, check, decode, encode, label_bytes, probabilities, register


def logits(V: int = 2, N: int = 5, C: int = 3) -> torch.Tensor:
    return torch.randn(V, N, C, generator=torch.Generator().manual_seed(0)) * 10


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("V", [1, 3])
def test_every_codec_passes_its_own_check(name: str, V: int) -> None:
    pairs = torch.arange(V * 5 * 2).view(V, 5, 2) % 3
    plan = {"views": {"mix": "cutmix", "epochs": V}} if CODECS[name].of_pairs else {}
    soft = encode(logits(V), codec=name, temperature=4, teacher="t", pairs=pairs, **plan)
    check(soft, images=5, classes=3)
    out = decode(soft, pairs)
    assert (out.dtype, tuple(out.shape), out.device.type) == (torch.float32, (V, 5, 3), "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_full_rounds_to_float16(dtype: torch.dtype) -> None:
    values = logits().to(dtype)
    soft = encode(values, codec="full", temperature=4, teacher="t")
    assert soft.arrays["logits"].dtype == np.float16
    assert torch.equal(decode(soft), values.half().float())


def test_arrays_and_tensors_on_a_graph_alike() -> None:
    values = logits()
    first = encode(values.clone().requires_grad_(), codec="full", temperature=1, teacher="t")
    second = encode(values.numpy(), codec="full", temperature=1, teacher="t")
    np.testing.assert_array_equal(first.arrays["logits"], second.arrays["logits"])


def test_stored_labels_do_not_follow_the_logits() -> None:
    values = logits().half()
    soft = encode(values, codec="full", temperature=1, teacher="t")
    before = soft.arrays["logits"].copy()
    values.zero_()
    np.testing.assert_array_equal(soft.arrays["logits"], before)


def test_attributes() -> None:
    soft = encode(logits(), codec="full", temperature=4, teacher={"name": "convnet"}, epochs=3)
    assert soft.codec == "full"
    assert soft.attributes == {"teacher": {"name": "convnet"}, "temperature": 4.0, "epochs": 3}


def test_label_bytes_are_exact() -> None:
    assert label_bytes(encode(logits(2, 5, 3), codec="full", temperature=1, teacher="t")) == 2 * 5 * 3 * 2


def test_probabilities_are_the_mean_over_label_sets() -> None:
    soft = encode(logits(3), codec="full", temperature=2.5, teacher="t")
    stored = soft.arrays["logits"].astype(np.float64) / 2.5
    each = np.exp(stored) / np.exp(stored).sum(axis=2, keepdims=True)
    found = probabilities(soft, classes=torch.zeros(5, dtype=torch.int64))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), each.mean(axis=0), rtol=1e-5)


@pytest.mark.parametrize("value", [65520.0, -1e6])
def test_logits_that_overflow_float16(value: float) -> None:
    values = logits()
    values[0, 1, 2] = value
    with pytest.raises(NonFiniteError, match="float16") as caught:
        encode(values, codec="full", temperature=1, teacher="t")
    assert f"{abs(value):g}" in str(caught.value)


def test_the_largest_float16_is_kept() -> None:
    values = torch.full((1, 1, 2), 65504.0)
    assert torch.equal(decode(encode(values, codec="full", temperature=1, teacher="t")), values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_logits(value: float) -> None:
    with pytest.raises(NonFiniteError, match="teacher gave"):
        encode(torch.full((1, 2, 3), value), codec="full", temperature=1, teacher="t")


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_out_of_range(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        encode(logits(), codec="full", temperature=temperature, teacher="t")


def test_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'full'"):
        encode(logits(), codec="ful", temperature=1, teacher="t")


@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.zeros(0, 2, 3), torch.zeros(1, 2, 3).long()])
def test_wrong_form_is_a_defect_of_the_caller(values: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"\(V, N, C\)"):
        encode(values, codec="full", temperature=1, teacher="t")


GOOD = np.zeros((1, 5, 3), dtype=np.float16)
FACTS: Mapping[str, Any] = {"teacher": "t", "temperature": 1.0}


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        (SoftLabels("fool", {"logits": GOOD}, FACTS), "unknown soft-label codec"),
        (SoftLabels("full", {}, FACTS), "wrong arrays"),
        (SoftLabels("full", {"logits": GOOD, "more": GOOD}, FACTS), "wrong arrays"),
        (SoftLabels("full", {"logits": GOOD.astype(np.float32)}, FACTS), "do not match"),
        (SoftLabels("full", {"logits": GOOD[0]}, FACTS), "do not match"),
        (SoftLabels("full", {"logits": GOOD[:, 1:]}, FACTS), "do not match"),
        (SoftLabels("full", {"logits": GOOD[:, :, 1:]}, FACTS), "do not match"),
        (SoftLabels("full", {"logits": GOOD[:0]}, FACTS), "empty"),
        (SoftLabels("full", {"logits": GOOD + np.float16("inf")}, FACTS), "infinite"),
        (SoftLabels("full", {"logits": GOOD}, {"teacher": "t"}), "temperature"),
        (SoftLabels("full", {"logits": GOOD}, {"teacher": "t", "temperature": "4"}), "temperature"),
        (SoftLabels("full", {"logits": GOOD}, {"teacher": "t", "temperature": -1.0}), "temperature"),
        (SoftLabels("full", {"logits": GOOD}, {"temperature": 1.0}), "teacher"),
    ],
)
def test_check_refuses(soft: SoftLabels, message: str) -> None:
    with pytest.raises(DamagedDataError, match=message):
        check(soft, images=5, classes=3)


def test_a_codec_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The seam: a registered class is all that a codec takes."""
    monkeypatch.setattr(codec, "CODECS", table := dict(CODECS))
    monkeypatch.setattr(codecs, "CODECS", table)

    @register
    class Rounded(Codec):
        name = "rounded"

        def encode(
            self, logits: torch.Tensor, attributes: Mapping[str, Any], pairs: torch.Tensor | None
        ) -> dict[str, np.ndarray]:
            return {"steps": (logits / attributes["step"]).round().to(torch.int8).numpy()}

        def decode(self, soft: SoftLabels, pairs: torch.Tensor | None) -> torch.Tensor:
            return torch.from_numpy(soft.arrays["steps"]).float() * soft.attributes["step"]

        def shapes(self, soft: SoftLabels, *, images: int, classes: int) -> dict:
            return {"steps": ("i1", (images, classes))}

    values = logits().clamp(-20, 20)
    soft = encode(values, codec="rounded", temperature=1, teacher="t", step=0.5)
    check(soft, images=5, classes=3)
    assert (decode(soft) - values).abs().max() <= 0.25
    assert label_bytes(soft) == values.numel()
    with pytest.raises(AssertionError, match="two codecs"):
        register(Rounded)
