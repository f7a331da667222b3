"""Hashed n-grams of documents: tokens, their n-grams, the bucket of each, in one compiled pass over bytes.

A document is put into small letters; its tokens are the maximal runs of word characters and the maximal runs of
characters that are neither word nor space, `\\w+|[^\\w\\s]+` of Python's `re`. Its i-grams, i = 1..n, are i tokens in a
row, and each is one count in a bucket:

    hash: sha256   int(sha256(the words joined by one space), big-endian) mod B: the buckets of Xie et al., "Data
                   Selection for Language Models via Importance Resampling", NeurIPS 2023, as released
    hash: fast     a 64-bit hash of the words' bytes, times B, above 2^64: another feature map, as good and faster

Python's own `str.lower` makes the small letters, and what is a word character or a space is asked of `re` once for
every code point, so that documents in any script give the tokens that Python gives. A document is never a vector of B
counts: its n-grams are counted into a model, or looked up in one, as they come.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from dataselect.sha256 import begin, begin_again, feed, finish_mod

Hash = Literal["fast", "sha256"]

_CODE_POINTS = 0x110000
_SPACE, _WORD, _OTHER = 0, 1, 2
_BEHIND = 8  # bytes behind the last document, which are read and masked
_KNOWN = 1 << 21  # n-grams whose sha256 is remembered: 24 bytes each

_BLANK = np.array([32], dtype=np.uint8)

_K1 = np.uint64(0x9E3779B97F4A7C15)
_K2 = np.uint64(0xD6E8FEB86659FD93)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class Documents:
    """Documents as one piece of bytes.

    Args:
        text: uint8, UTF-8 in small letters, one document after the other, and eight bytes more.
        starts: int64 (n + 1,), where each begins; the last is where the last one ends.
    """

    text: NDArray[np.uint8]
    starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, texts: Sequence[str]) -> Documents:
        """The documents with these texts."""
        pieces = [text.lower().encode("utf-8", "surrogatepass") for text in texts]
        starts = np.zeros(len(pieces) + 1, dtype=np.int64)
        np.cumsum([len(piece) for piece in pieces], out=starts[1:])
        return cls(np.frombuffer(b"".join([*pieces, bytes(_BEHIND)]), dtype=np.uint8), starts)


class NGrams:
    """The feature map; for one thread at a time, since it remembers buckets of n-grams that were hashed before.

    Args:
        n: the longest n-grams, at least 1.
        buckets: B.
        hash: see above.
    """

    def __init__(self, *, n: int = 2, buckets: int = 10_000, hash: Hash = "fast") -> None:
        self.n = n
        self.buckets = buckets
        self.hash = hash
        self._known: tuple[NDArray[np.uint64], NDArray[np.int64]] | tuple[None, None] = (None, None)
        if hash == "sha256":  # of n-grams whose bucket is remembered the keys, and the buckets
            self._known = np.zeros((_KNOWN, 2), dtype=np.uint64), np.full(_KNOWN, -1, dtype=np.int64)

    def count(self, documents: Documents, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Add every n-gram's count to `counts`, int64 (B,).

        Returns:
            Tokens of each document, int64 (n,).
        """
        lengths = np.zeros(len(documents), dtype=np.int64)
        self._scan(documents, counts, None, None, lengths)
        return lengths

    def score(
        self, documents: Documents, models: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sums of each model's values over the n-grams of each document.

        Args:
            documents: n of them.
            models: float64 (T, B).

        Returns:
            The sums, float64 (T, n), and tokens of each document, int64 (n,).
        """
        scores = np.zeros((len(models), len(documents)))
        lengths = np.zeros(len(documents), dtype=np.int64)
        models = np.array(models, order="C")  # one that may not be written to would be compiled for anew
        self._scan(documents, None, models, scores, lengths)
        return scores, lengths

    def _scan(
        self,
        documents: Documents,
        counts: NDArray[np.int64] | None,
        models: NDArray[np.float64] | None,
        scores: NDArray[np.float64] | None,
        lengths: NDArray[np.int64],
    ) -> None:
        keys, values = self._known
        _scan(
            documents.text,
            documents.starts,
            character_classes(),
            self.n,
            self.buckets,
            keys,
            values,
            counts,
            models,
            scores,
            lengths,
        )


@cache
def character_classes() -> NDArray[np.uint8]:
    """What `re` takes each code point for: 0 a space, 1 a word character, 2 another; uint8 (0x110000,)."""
    every = np.arange(_CODE_POINTS, dtype="<u4").tobytes().decode("utf-32-le", "surrogatepass")
    classes = np.full(_CODE_POINTS, _OTHER, dtype=np.uint8)
    for pattern, kind in ((r"\w+", _WORD), (r"\s+", _SPACE)):
        for run in re.finditer(pattern, every):
            classes[run.start() : run.end()] = kind
    return classes


@numba.njit(cache=True, nogil=True, inline="always")
def _mixed(x):  # type: ignore[no-untyped-def]
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_A
    x = (x ^ (x >> np.uint64(27))) * _MIX_B
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _sha256_bucket(text, starts, stops, first, last, buckets, state, block):  # type: ignore[no-untyped-def]
    """The bucket of the tokens first..last."""
    begin_again(state)
    length = 0
    for token in range(first, last + 1):
        if token > first:
            length = feed(state, block, length, _BLANK, 0, 1)
        length = feed(state, block, length, text, starts[token], stops[token])
    return finish_mod(state, block, length, buckets)


@intrinsic
def _eight_bytes(typing_context, text, place):  # type: ignore[no-untyped-def]
    """Eight bytes of `text` from `place` on as one number, the first the lowest; they may lie across words."""

    def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(array.data, [arguments[1]])
        number = ir.IntType(64)
        return builder.load(builder.bitcast(address, number.as_pointer()), align=1)

    return types.uint64(text, types.int64), generate


@numba.njit(cache=True, nogil=True)
def _is_ascii(text, first, last):  # type: ignore[no-untyped-def]
    every = np.uint8(0)
    for place in range(first, last):
        every |= text[place]
    return every < 0x80


@numba.njit(cache=True, nogil=True)
def _find_ascii_tokens(text, first, last, classes, starts, stops):  # type: ignore[no-untyped-def]
    """Where the tokens of text[first:last] start and stop; returns how many there are.

    Without a branch: where a token ends is what a processor cannot foresee.
    """
    started, stopped = np.uintp(0), np.uintp(0)
    before = np.uint8(_SPACE)
    for place in range(np.uintp(first), np.uintp(last)):
        kind = classes[np.uintp(text[place])]
        starts[started] = place
        stops[stopped] = place
        changed = kind != before
        started += np.uintp(changed & (kind != _SPACE))
        stopped += np.uintp(changed & (before != _SPACE))
        before = kind
    stops[stopped] = last
    return np.int64(started)


@numba.njit(cache=True, nogil=True)
def _find_tokens(text, first, last, classes, starts, stops):  # type: ignore[no-untyped-def]
    """The same where characters have more bytes than one."""
    started, stopped = 0, 0
    before = np.uint8(_SPACE)
    place = first
    while place < last:
        byte = text[place]
        if byte < 0x80:
            kind, width = classes[byte], 1
        else:
            kind, width = _wide_character(text, place, classes)
        starts[started] = place
        stops[stopped] = place
        changed = kind != before
        started += changed & (kind != _SPACE)
        stopped += changed & (before != _SPACE)
        before = kind
        place += width
    stops[stopped] = last
    return started


@numba.njit(cache=True, nogil=True)
def _wide_character(text, place, classes):  # type: ignore[no-untyped-def]
    """The class of a character beyond ASCII at `place`, and its bytes."""
    byte = text[place]
    second = text[place + 1] & 0x3F
    if byte < 0xE0:
        return classes[(byte & 0x1F) << 6 | second], 2
    third = text[place + 2] & 0x3F
    if byte < 0xF0:
        return classes[(byte & 0x0F) << 12 | second << 6 | third], 3
    return classes[(byte & 0x07) << 18 | second << 12 | third << 6 | (text[place + 3] & 0x3F)], 4


@numba.njit(cache=True, nogil=True, inline="always")
def _token_hash(text, start, stop, masks):  # type: ignore[no-untyped-def]
    """64 bits of the bytes text[start:stop], behind which eight more may be read."""
    hashed = np.uint64(stop - start) * _K2
    while stop - start > 8:
        hashed = _mixed(hashed + _eight_bytes(text, start) + _K1)  # type: ignore[call-arg]
        start += 8
    return _mixed(hashed ^ (_eight_bytes(text, start) & masks[stop - start]))  # type: ignore[call-arg]


@numba.njit(cache=True, nogil=True)
def _scan(text, bounds, classes, n, buckets, keys, values, counts, models, scores, lengths):  # type: ignore[no-untyped-def]
    """Every document's n-grams: counted, or summed over each of `models`; by sha256 where `keys` and `values` are.

    What is None is known when this is compiled, which leaves out what nobody asked for.
    """
    masks = np.empty(9, dtype=np.uint64)
    for size in range(9):
        masks[size] = ~np.uint64(0) >> np.uint64(64 - 8 * size) if size else np.uint64(0)
    longest = np.max(np.diff(bounds)) if len(bounds) > 1 else 0
    starts = np.empty(longest + 1, dtype=np.int64)
    stops = np.empty(longest + 1, dtype=np.int64)
    hashes = np.empty(longest + n, dtype=np.uint64)
    state, block = begin()
    wide, b = np.uint64(32), np.uint64(buckets)
    for document in range(len(bounds) - 1):
        first, last = bounds[document], bounds[document + 1]
        if _is_ascii(text, first, last):
            tokens = _find_ascii_tokens(text, first, last, classes, starts, stops)
        else:
            tokens = _find_tokens(text, first, last, classes, starts, stops)
        for token in range(tokens):
            hashes[token] = _token_hash(text, starts[token], stops[token], masks)
            joined = key = hashes[token]
            for i in range(min(n, token + 1)):
                if i:
                    joined = joined * _K1 + hashes[token - i]
                    key = _mixed(joined)
                if values is not None:
                    check = _mixed(joined * _K2 + _K1)
                    place = key & np.uint64(len(values) - 1)
                    bucket = values[place]
                    if bucket < 0 or keys[place, 0] != key or keys[place, 1] != check:
                        bucket = _sha256_bucket(text, starts, stops, token - i, token, buckets, state, block)
                        keys[place, 0], keys[place, 1], values[place] = key, check, bucket
                else:
                    bucket = np.int64(((key >> wide) * b) >> wide)
                if counts is not None:
                    counts[bucket] += 1
                if models is not None:
                    for number in range(len(models)):
                        scores[number, document] += models[number, bucket]
        lengths[document] = tokens
