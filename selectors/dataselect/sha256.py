"""SHA-256 (FIPS 180-4) of pieces of a buffer, compiled, and its remainder by a small number.

For n-grams, which are many and short: `hashlib` takes longer to be called than to hash them.
"""

from __future__ import annotations

import numba
import numpy as np

_ROUNDS = np.array(
    [
        0x428A2F98, 0x71374491, 0xB5C0FBCF, 0xE9B5DBA5, 0x3956C25B, 0x59F111F1, 0x923F82A4, 0xAB1C5ED5,
        0xD807AA98, 0x12835B01, 0x243185BE, 0x550C7DC3, 0x72BE5D74, 0x80DEB1FE, 0x9BDC06A7, 0xC19BF174,
        0xE49B69C1, 0xEFBE4786, 0x0FC19DC6, 0x240CA1CC, 0x2DE92C6F, 0x4A7484AA, 0x5CB0A9DC, 0x76F988DA,
        0x983E5152, 0xA831C66D, 0xB00327C8, 0xBF597FC7, 0xC6E00BF3, 0xD5A79147, 0x06CA6351, 0x14292967,
        0x27B70A85, 0x2E1B2138, 0x4D2C6DFC, 0x53380D13, 0x650A7354, 0x766A0ABB, 0x81C2C92E, 0x92722C85,
        0xA2BFE8A1, 0xA81A664B, 0xC24B8B70, 0xC76C51A3, 0xD192E819, 0xD6990624, 0xF40E3585, 0x106AA070,
        0x19A4C116, 0x1E376C08, 0x2748774C, 0x34B0BCB5, 0x391C0CB3, 0x4ED8AA4A, 0x5B9CCA4F, 0x682E6FF3,
        0x748F82EE, 0x78A5636F, 0x84C87814, 0x8CC70208, 0x90BEFFFA, 0xA4506CEB, 0xBEF9A3F7, 0xC67178F2,
    ],
    dtype=np.uint32,
)  # fmt: skip
_INITIAL = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19],
    dtype=np.uint32,
)


@numba.njit(cache=True, nogil=True)
def begin():  # type: ignore[no-untyped-def]
    """State, uint32 (8 + 64,), behind which a block is spread, and an empty block, uint8 (64,)."""
    state = np.empty(8 + 64, dtype=np.uint32)
    begin_again(state)
    return state, np.zeros(64, dtype=np.uint8)


@numba.njit(cache=True, nogil=True)
def begin_again(state):  # type: ignore[no-untyped-def]
    """The same state for another text: an n-gram is hashed sooner than room for it is found."""
    state[:8] = _INITIAL


@numba.njit(cache=True, nogil=True)
def feed(state, block, length, data, start, stop):  # type: ignore[no-untyped-def]
    """Take the bytes data[start:stop] in, after `length` others; returns how many there are now."""
    for place in range(start, stop):
        block[length % 64] = data[place]
        length += 1
        if length % 64 == 0:
            _compress(state, block)
    return length


@numba.njit(cache=True, nogil=True)
def finish_mod(state, block, length, modulus):  # type: ignore[no-untyped-def]
    """The hash of all bytes as a big-endian number, modulo `modulus` below 2^32; ends the state."""
    used = length % 64
    block[used] = 0x80
    block[used + 1 :] = 0
    if used >= 56:
        _compress(state, block)
        block[:] = 0
    bits = np.uint64(length) * np.uint64(8)
    for place in range(8):
        block[63 - place] = np.uint8(bits >> np.uint64(8 * place) & np.uint64(0xFF))
    _compress(state, block)
    rest = np.uint64(0)
    for word in state[:8]:
        rest = (rest << np.uint64(32) | np.uint64(word)) % np.uint64(modulus)
    return np.int64(rest)


@numba.njit(cache=True, nogil=True, inline="always")
def _rotated(x, by):  # type: ignore[no-untyped-def]
    return np.uint32(x >> np.uint32(by) | x << np.uint32(32 - by))


@numba.njit(cache=True, nogil=True, inline="always")
def _round(a, b, c, d, e, f, g, h, added):  # type: ignore[no-untyped-def]
    """What stands for d and h after a round; the others only change their names, which a caller does."""
    sum_1 = _rotated(e, 6) ^ _rotated(e, 11) ^ _rotated(e, 25)
    first = np.uint32(h + sum_1 + (g ^ e & (f ^ g)) + added)
    sum_0 = _rotated(a, 2) ^ _rotated(a, 13) ^ _rotated(a, 22)
    return np.uint32(d + first), np.uint32(first + sum_0 + (a & b | c & (a | b)))


@numba.njit(cache=True, nogil=True)
def _compress(state, block):  # type: ignore[no-untyped-def]
    """One block into the state (FIPS 180-4, section 6.2.2)."""
    w = state[8:]
    for t in range(16):
        w[t] = (
            np.uint32(block[4 * t]) << np.uint32(24)
            | np.uint32(block[4 * t + 1]) << np.uint32(16)
            | np.uint32(block[4 * t + 2]) << np.uint32(8)
            | np.uint32(block[4 * t + 3])
        )
    for t in range(16, 64):
        low = _rotated(w[t - 15], 7) ^ _rotated(w[t - 15], 18) ^ w[t - 15] >> np.uint32(3)
        high = _rotated(w[t - 2], 17) ^ _rotated(w[t - 2], 19) ^ w[t - 2] >> np.uint32(10)
        w[t] = np.uint32(w[t - 16] + low + w[t - 7] + high)
    for t in range(64):
        w[t] += _ROUNDS[t]
    a, b, c, d = state[0], state[1], state[2], state[3]
    e, f, g, h = state[4], state[5], state[6], state[7]
    for t in range(0, 64, 8):
        d, h = _round(a, b, c, d, e, f, g, h, w[t])
        c, g = _round(h, a, b, c, d, e, f, g, w[t + 1])
        b, f = _round(g, h, a, b, c, d, e, f, w[t + 2])
        a, e = _round(f, g, h, a, b, c, d, e, w[t + 3])
        h, d = _round(e, f, g, h, a, b, c, d, w[t + 4])
        g, c = _round(d, e, f, g, h, a, b, c, w[t + 5])
        f, b = _round(c, d, e, f, g, h, a, b, w[t + 6])
        e, a = _round(b, c, d, e, f, g, h, a, w[t + 7])
    for place, word in enumerate((a, b, c, d, e, f, g, h)):
        state[place] += word
