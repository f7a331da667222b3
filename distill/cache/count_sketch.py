"""CountSketch: each of p coordinates is added, with a random sign, to one of k buckets; contiguous memory throughout.

    (S x)_b = sum_{i: h(i) = b} s_i x_i,   Var <S x, S y> <= (|x|^2 |y|^2 + <x, y>^2 - 2 sum_i x_i^2 y_i^2) / k

Source: Charikar, Chen and Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002. The bound, no worse than
a dense Gaussian's, needs independent signs s and, for any two coordinates, a chance of at most 1 / k to share a bucket;
nothing more. So instead of scattering by a random table (slow on a CPU; on a GPU, atomic additions in no fixed order),
coordinates are cut into runs of K = m k, each run is rotated by a random offset of its own, and the runs are added up:
two coordinates of one run never share a place, two of different runs do with chance 1 / K. Where m > 1, the K sums are
then added up m by m along a random permutation, which makes the chance 1 / k. m is chosen such that there are few runs,
since adding one costs a call.

Without the offsets (adding up runs as they are), coordinates k apart would always share a bucket: for gradients, which
repeat along the layout of a weight, that is far from random.

Measured by tools/bench/gradients.py on 2 threads of a 2.5 GHz Xeon, (32, 199610) float32 to k = 512, in ms: this 2.8,
index_add_ 7.8, a sparse CSR product 14, the rotation by a table of indices (as on a GPU) 16, index_select and a sum 23;
reading the values once takes 1.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.randomness import counter_bits, counter_integers, counter_permutation, derive_seed

_RUNS = 32  # aim at this many runs,
_WIDEST = 1 << 15  # but at runs of at most this many coordinates: sums of a few samples then stay cached


class CountSketch:
    """A random linear map R^p -> R^k with one entry +-1 in each column.

    Args:
        size: p.
        dim: k.
        seed: decides the map, which is the same on every device.
        scrambled: whether the difference of two coordinates' buckets is random within a run too, which a product of
            two sketches needs.
        device, dtype: of the values.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        seed: int,
        scrambled: bool = False,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dim = dim
        self.width = dim * max(1, min(-(-size // (_RUNS * dim)), _WIDEST // dim))  # K
        runs = torch.arange(-(-size // self.width))
        self.offsets = counter_integers(derive_seed(seed, "offsets"), 0, runs, 0, below=self.width).tolist()
        self.signs = random_signs(size, seed=derive_seed(seed, "signs"), device=device, dtype=dtype)
        self.order: Tensor | None = None
        if scrambled or self.width > dim:
            self.order = counter_permutation(derive_seed(seed, "order"), 0, self.width, device=device)

    def __call__(self, values: Tensor) -> Tensor:
        """(B, p, ...) -> (B, k, ...), of vectors along dimension 1."""
        rotated = self.by_gathering(values) if values.is_cuda else self.by_slices(values)
        if self.order is not None:
            rotated = rotated.index_select(1, self.order)
        return rotated.unflatten(1, (-1, self.dim)).sum(dim=1)

    def buckets(self) -> Tensor:
        """int64 (p,): where each coordinate goes."""
        coordinates = torch.arange(len(self.signs), device=self.signs.device)
        offsets = torch.tensor(self.offsets, device=self.signs.device)
        places = (coordinates + offsets[coordinates // self.width]) % self.width
        if self.order is not None:
            places = self.order.argsort()[places]
        return places % self.dim

    def by_slices(self, values: Tensor) -> Tensor:
        """The sum of the rotated runs, (B, p, ...) -> (B, K, ...), a slice at a time: no copy of the values is made."""
        sums = values.new_zeros(len(values), 2 * self.width, *values.shape[2:])
        along = self.signs.view(-1, *(1 for _ in values.shape[2:]))
        runs = zip(self.offsets, values.split(self.width, 1), along.split(self.width), strict=True)
        for offset, run, signs in runs:
            sums.narrow(1, offset, len(signs)).addcmul_(run, signs)
        return sums[:, : self.width] + sums[:, self.width :]

    def by_gathering(self, values: Tensor) -> Tensor:
        """The same in a few calls, whatever the number of runs: a GPU would wait for each."""
        missing = len(self.offsets) * self.width - values.shape[1]
        signed = torch.nn.functional.pad(values.movedim(1, -1) * self.signs, (0, missing))
        runs = signed.unflatten(-1, (-1, self.width))  # (B, ..., runs, K)
        places = torch.arange(self.width, device=values.device)
        offsets = torch.tensor(self.offsets, device=values.device)
        source = (places - offsets[:, None]) % self.width  # (runs, K)
        return runs.gather(-1, source.expand_as(runs)).sum(dim=-2).movedim(-1, 1)


def random_signs(size: int, *, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(size,) of +1 and -1, each with chance 1/2 and independent, the same on every device."""
    words = counter_bits(seed, 0, torch.arange(-(-size // 64), device=device), 0)
    bits = (words[:, None] >> torch.arange(64, device=device)) & 1
    return (1 - 2 * bits.to(torch.int8)).flatten()[:size].to(dtype)
