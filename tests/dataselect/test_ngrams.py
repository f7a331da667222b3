"""Hashed n-grams against Python's own `re` and `hashlib`, and against the values of the reference package."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dataselect.ngrams import Documents, Hash, NGrams, character_classes
from dataselect.sha256 import begin, feed, finish_mod

# What has once gone wrong somewhere: capitals that grow or hang on their place, marks, wide characters, lone halves of
# pairs, spaces beyond ASCII, and tokens of 7, 8, 9, 16 and 17 bytes.
ODD = (
    "",
    " \t\n",
    "A",
    "İstanbul ΟΔΥΣΣΕΥΣ Σ",
    "don't--stop!!",
    "e\u0301te\u0301 naïve",
    "日本語のテキスト、です。",
    "😀 zwj👩‍👩‍👧 \ud83d x\udc00",
    "a\u00a0b\u2003c\u200bd\u3000e\x1cf\x85g",
    "1234567 12345678 123456789 1234567890123456 12345678901234567",
    "snake_case x²+½ ٣٤ Ⅷ ª º",
    "\x00\x01 \x7f\x80",
)


def tokens(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def grams(text: str, n: int) -> list[str]:
    words = tokens(text)
    return [" ".join(words[at : at + i]) for i in range(1, n + 1) for at in range(len(words) - i + 1)]


def bucket(gram: str, buckets: int) -> int:
    digest = hashlib.sha256(gram.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest, "big") % buckets


def counted(texts: list[str], *, n: int, buckets: int, hash: Hash) -> NDArray[np.int64]:
    counts = np.zeros(buckets, dtype=np.int64)
    NGrams(n=n, buckets=buckets, hash=hash).count(Documents.of(texts), counts)
    return counts


@given(
    st.lists(st.text(st.characters()), max_size=4), st.integers(1, 4), st.sampled_from([1, 7, 10_000, 2**31])
)
@example(list(ODD), 3, 10_000)
def test_buckets_are_those_of_sha256(texts: list[str], n: int, buckets: int) -> None:
    buckets = min(buckets, 1 << 20)
    wanted = np.bincount(
        [bucket(gram, buckets) for text in texts for gram in grams(text, n)], minlength=buckets
    )
    assert np.array_equal(counted(texts, n=n, buckets=buckets, hash="sha256"), wanted)


@given(st.lists(st.text(st.characters()), max_size=4), st.integers(1, 4))
@example(list(ODD), 3)
def test_a_fast_hash_counts_the_same_ngrams(texts: list[str], n: int) -> None:
    """With many buckets each n-gram has its own: as many counts of each size as there are n-grams."""
    wanted = Counter(gram for text in texts for gram in grams(text, n))
    found = counted(texts, n=n, buckets=1 << 24, hash="fast")
    assert sorted(found[found > 0]) == sorted(wanted.values())


@pytest.mark.parametrize("hash", ["fast", "sha256"])
def test_scores_are_sums_over_counts_and_lengths_are_tokens(hash: Hash) -> None:
    model = np.random.default_rng(0).normal(size=1000)
    features = NGrams(n=2, buckets=1000, hash=hash)
    scores, lengths = features.score(Documents.of(ODD), np.stack([model, -model]))
    assert np.array_equal(scores[1], -scores[0])
    for text, score, length in zip(ODD, scores[0], lengths, strict=True):
        counts = counted([text], n=2, buckets=1000, hash=hash)
        assert score == pytest.approx(counts @ model, rel=1e-12, abs=1e-12)
        assert length == len(tokens(text))
        assert counts.sum() == length + max(length - 1, 0)
    assert np.array_equal(features.count(Documents.of(ODD), np.zeros(1000, dtype=np.int64)), lengths)


def test_what_is_forgotten_is_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four places for some hundred n-grams, of several documents and passes."""
    monkeypatch.setattr("dataselect.ngrams._KNOWN", 4)
    features = NGrams(n=3, buckets=10_000, hash="sha256")
    texts = [*ODD, "a b a b a c a b", " ".join(f"w{number % 7} w{number}" for number in range(90))]
    wanted = np.bincount(
        [bucket(gram, 10_000) for text in texts for gram in grams(text, 3)], minlength=10_000
    )
    for _ in range(2):
        counts = np.zeros(10_000, dtype=np.int64)
        features.count(Documents.of(texts), counts)
        assert np.array_equal(counts, wanted)


def test_what_stands_beside_a_document_does_not_matter() -> None:
    features = NGrams(n=3, buckets=500)
    models = np.random.default_rng(0).normal(size=(1, 500))
    (together,), _ = features.score(Documents.of(ODD), models)
    alone = [features.score(Documents.of([text]), models)[0][0, 0] for text in ODD]
    assert together.tolist() == alone


def test_fast_buckets_stay_what_they_are() -> None:
    """Sets, and weights kept by interrupted runs, hang on them."""
    found = [
        int(counted([word], n=1, buckets=10_000, hash="fast").argmax()) for word in ("alice", "the", "日本語")
    ]
    assert found == [6618, 7594, 2386]


def test_fast_buckets_are_even() -> None:
    """Chi-square over 1,000 buckets of 200,000 different words: within five deviations of its mean."""
    words = " ".join(f"{number:x}" for number in range(200_000))
    counts = counted([words], n=1, buckets=1000, hash="fast")
    chi = float(((counts - 200) ** 2 / 200).sum())
    assert abs(chi - 999) < 5 * np.sqrt(2 * 999)


def test_every_code_point_is_of_the_class_that_re_says() -> None:
    classes = character_classes()
    for point in [*range(0x3100), *range(0x1F000, 0x1F700, 7), 0xD800, 0xDFFF, 0x10FFFF]:
        character = chr(point)
        wanted = 0 if re.match(r"\s", character) else 1 if re.match(r"\w", character) else 2
        assert classes[point] == wanted, hex(point)


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000])
@pytest.mark.parametrize("modulus", [1, 10_000, 2**32 - 1])
def test_sha256_is_that_of_hashlib(size: int, modulus: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    state, block = begin()
    length = feed(state, block, 0, data, 0, size // 3)
    length = feed(state, block, length, data, size // 3, size)
    wanted = int.from_bytes(hashlib.sha256(data.tobytes()).digest(), "big") % modulus
    assert finish_mod(state, block, length, modulus) == wanted


# --- the reference package


def test_words_of_the_reference_package() -> None:
    def of(text: str, buckets: int = 10_000) -> list[int]:
        return counted([text], n=2, buckets=buckets, hash="sha256").nonzero()[0].tolist()

    assert of("alice") == [6720] and of("alice", 50_000) == [6720] and of("the") == [8288]
    assert of("Alice went") == sorted([6720, 114, bucket("went", 10_000)])
    sentence = "Alice went to the store"
    assert of(sentence) == [114, 1087, 2441, 3440, 4126, 5816, 6720, 8288, 9879]
    assert counted([sentence], n=2, buckets=10_000, hash="sha256").sum() == 9


def test_counts_of_the_toy_corpus(shared_data: Path) -> None:
    """Figures of reference/selectors.md, section 2: the corpus counted twice, as it was given twice."""
    lines = (shared_data / "dsir_toy" / "toy_pile_data.jsonl").read_text(encoding="utf-8").splitlines()
    documents = Documents.of([json.loads(line)["contents"] for line in lines])
    counts = np.zeros(10_000, dtype=np.int64)
    lengths = NGrams(n=2, buckets=10_000, hash="sha256").count(documents, counts)
    assert 2 * counts.sum() == 582_796 and (counts > 0).sum() == 9_999
    assert (lengths >= 100).sum() == 793
    assert (lengths.min(), lengths.max(), lengths.sum()) == (1, 654, 146_199)
    top = counts.argsort()[::-1][:3]
    assert top.tolist() == [4887, 8288, 3960]
    assert counts[top] / counts.sum() == pytest.approx([0.0197839, 0.0186824, 0.0185485], abs=5e-8)
