"""Chunks, digests and JSON of format 1, against slow and obvious references."""

from __future__ import annotations

import hashlib
import math
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.store import format as fmt

shapes = st.lists(st.integers(1, 3000), min_size=1, max_size=4).map(tuple)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(shapes, st.sampled_from([1, 2, 4, 8]))
def test_chunks_fit_the_budget_and_use_it(shape: tuple[int, ...], itemsize: int) -> None:
    chunk = fmt.chunk_shape(shape, itemsize)
    assert len(chunk) == len(shape)
    assert all(1 <= c <= s for c, s in zip(chunk, shape, strict=True))
    assert math.prod(chunk) * itemsize <= fmt.CHUNK_BYTES
    cut = next((axis for axis, (c, s) in enumerate(zip(chunk, shape, strict=True)) if c < s and c > 1), None)
    if cut is not None:
        assert chunk[:cut] == (1,) * cut
        assert chunk[cut + 1 :] == shape[cut + 1 :]
        assert (chunk[cut] + 1) * math.prod(chunk[cut + 1 :]) * itemsize > fmt.CHUNK_BYTES


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((50_000, 32, 32, 3), (85, 32, 32, 3)),
        ((10, 224, 224, 3), (1, 224, 224, 3)),
        ((10, 512, 512, 3), (1, 170, 512, 3)),
    ],
)
def test_chunks_of_usual_images(shape: tuple[int, ...], chunk: tuple[int, ...]) -> None:
    assert fmt.chunk_shape(shape, 1) == chunk


def test_digest_is_sha256_over_dtype_shape_and_bytes() -> None:
    array = np.arange(12, dtype="<f4").reshape(3, 4)
    expected = hashlib.sha256(b"<f4 3,4\n" + array.tobytes()).hexdigest()
    assert fmt.digest(array.dtype, array.shape, [array]) == expected
    assert fmt.digest(array.dtype, array.shape, [array[:1], array[1:]]) == expected
    assert fmt.digest(array.dtype, array.shape, [np.asfortranarray(array)]) == expected


def test_digest_tells_dtypes_and_shapes_apart() -> None:
    array = np.zeros(4, dtype="<i4")
    others = [array.view("<f4"), array.reshape(2, 2), array.view("<i8")]
    digests = {fmt.digest(a.dtype, a.shape, [a]) for a in [array, *others]}
    assert len(digests) == 4


def test_content_digest_does_not_depend_on_order() -> None:
    expected = hashlib.sha256(b"a 1\nb 2\n").hexdigest()
    assert fmt.content_digest({"b": "2", "a": "1"}) == fmt.content_digest({"a": "1", "b": "2"}) == expected


@settings(max_examples=50)
@given(values)
def test_json_round_trip(value: Any) -> None:
    assert fmt.decode_json(fmt.encode_json(value)) == value


def test_json_of_equal_values_is_equal() -> None:
    ordered = fmt.encode_json({"a": 1, "b": [1, 2]})
    other = fmt.encode_json(MappingProxyType({"b": (1, 2), "a": 1}))
    assert ordered.tobytes() == other.tobytes() == b'{"a":1,"b":[1,2]}'


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1: "a"}, {"a": object()}, {"a": np.float32(1)}]
)
def test_json_refuses_what_it_would_not_give_back(value: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        fmt.encode_json(value)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"NaN", b"[" * 100_000], ids=range(5))
def test_json_refuses_broken_text(text: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        fmt.decode_json(np.frombuffer(text, dtype=np.uint8))


def test_missing_names_what_belongs_together() -> None:
    required = list(fmt.REQUIRED)
    assert fmt.missing(required) == []
    assert fmt.missing(required[1:]) == [required[0]]
    assert fmt.missing([*required, fmt.ZCA]) == [fmt.ZCA_INVERSE, fmt.ZCA_MEAN]
    assert fmt.missing([*required, "labels/soft/logits"]) == [fmt.CODEC]
    selection = [fmt.INDICES, fmt.SELECTION_META, fmt.SCORES, fmt.WEIGHTS]
    assert fmt.missing([*required, fmt.ROWS]) == selection
    assert fmt.missing([*required, *selection]) == []  # sets of before rows were kept
    assert fmt.missing([*required, fmt.CODEC]) == []  # labels that teachers give as students train


@pytest.mark.parametrize(
    "name", ["labels/soft/../images", "labels/soft/", "labels/soft/A", "labels/soft/a/b", ""]
)
def test_no_spec_for_other_names(name: str) -> None:
    assert fmt.spec_of(name) is None
