"""All randomness of a run comes from its one seed, through the functions of this file.

Two forms:

- `derive_seed(seed, "teacher", 3)` names a seed; `generator(...)` makes a torch.Generator of it. For draws whose
  count does not depend on the machine (initial weights, a subset).
- `counter_bits` and what follows hash a counter (seed, epoch, index, draw) to a number, with integer arithmetic
  that wraps the same way on every device. For everything that is replayed: orders, crops, flips, boxes, mixing.
  A draw depends on its counter alone, so neither batch size, worker count nor device changes it.

The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, figure 16), applied once a counter word.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) that belongs to `names` alone: sha256 over the root seed and the path of names."""
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch.Generator seeded by `derive_seed(seed, *names)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))


def _signed(value: int) -> int:
    """The two's complement int64 with the bits of the unsigned 64-bit `value`."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_A)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_B)
    return x ^ _shift_right(x, 31)


def counter_bits(seed: int | Tensor, epoch: Tensor | int, index: Tensor, draw: int) -> Tensor:
    """64 random bits for each counter (seed, epoch, index, draw).

    Args:
        seed: names the stream; int64, broadcast against `index` where K streams are drawn at once.
        epoch: int64, broadcast against `index`.
        index: int64 of any shape, the sample's number in its data.
        draw: which of the sample's draws, a small constant.

    Returns:
        int64 of the shape of `index`; all 64 bits are random.
    """
    epoch = torch.as_tensor(epoch, dtype=torch.int64, device=index.device)
    stream = seed * _signed(_MIX_B) + _signed(_GOLDEN)
    if isinstance(stream, int):
        stream = _signed(stream)
    x = _mix(index * _signed(_GOLDEN) + stream)
    x = _mix(x + epoch * _signed(_GOLDEN) + _signed(_MIX_A))
    return _mix(x + _signed((draw + 1) * _GOLDEN))


def counter_uniform(seed: int | Tensor, epoch: Tensor | int, index: Tensor, draw: int) -> Tensor:
    """Uniform numbers in [0, 1) for each counter: multiples of 2^-24, hence exact and equal on every device.

    Returns:
        float32 of the shape of `index`.
    """
    return _shift_right(counter_bits(seed, epoch, index, draw), 40).to(torch.float32) * 2.0**-24


def counter_integers(
    seed: int | Tensor, epoch: Tensor | int, index: Tensor, draw: int, *, below: int
) -> Tensor:
    """Uniform integers in [0, below) for each counter, int64; the bias is below `below` / 2^32."""
    return (_shift_right(counter_bits(seed, epoch, index, draw), 32) * below) >> 32


def counter_permutation(seed: int, epoch: int, n: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The order in which epoch `epoch` visits n samples: int64 (n,), a permutation equal on every device."""
    index = torch.arange(n, device=device)
    return torch.argsort(counter_bits(seed, epoch, index, 0), stable=True)


def pass_order(seed: int, number: int, n: int, *, device: torch.device | str = "cpu") -> Tensor:
    """The order in which pass `number` visits n samples, where `seed` also names their views: int64 (n,).

    Students and the labels that are stored for their views go by it.
    """
    return counter_permutation(derive_seed(seed, "order"), number, n, device=device)
