"""Random linear maps R^P -> R^k that keep inner products: a sum of independent maps, one a parameter tensor.

    P x = sum_t P_t x_t,   E <P x, P y> = <x, y>,   Var <P x, P y> <= c (|x|^2 |y|^2 + <x, y>^2) / k

The flat gradient is never concatenated, and no P x k matrix is formed: `Projector.add` takes the gradients of one
tensor at a time. A dense Gaussian matrix has c = 1 and costs p k operations and 4 p k bytes. For one sample and one
tensor of p coordinates:

- sparse: p operations for each entry of a column, 4 p bytes, c = 1 (`distill.cache.count_sketch`; by default one
  entry a column, see `Projection.nonzeros`).
- fft: random signs, a real Fourier transform of n >= max(p, k) coordinates, k of them without replacement:
  2.5 n log2 n operations, 4 p bytes, c = 2. Ailon and Chazelle, STOC 2006; Tropp, "Improved Analysis of the
  Subsampled Randomized Hadamard Transform", 2011.
- kronecker: a weight (O, I) of a linear layer has the gradient sum_l g_l a_l^T over L positions (one, but for tokens);
  that of a convolution, over pixels l and the patches a_l that they see, I = Kh Kw Ch. TensorSketch (Pham and Pagh,
  KDD 2013) takes the factors: CountSketch of g_l and of a_l, their circular convolution by Fourier transforms of
  length k, summed over l before the one transform back. L (O + I + 5 k log2 k) operations, 4 L (O + I) bytes, c = 4
  (for rank-one gradients that are nearly parallel; 1 where they are orthogonal). A gradient that is formed
  has the same map: its rows are sketched, turned by their buckets and added up. Which way is faster is decided by
  sizes and is no part of the map. Everything else is sparse: vectors, small weights, and convolutions of which
  forming the gradient (a product of matrices) would be faster at many positions. Measured, a formed gradient takes
  3 to 8 times sparse's time: its runs are rows, and k numbers are kept of each, where sparse has long runs and one sum.

Other ways to use the factors are worse: sketching rows and columns separately to k_out x k_in numbers has a variance of
1 / k_out + 1 / k_in instead of 1 / (k_out k_in); random rows of a Khatri-Rao product have TensorSketch's variance and
cost k (O + I) operations a position.

Coordinates of a convolution's weight (O, I, Kh, Kw) are numbered as channels_last memory has them, since
`distill.cache.layer_gradients` makes them so. `python tools/bench/gradients.py` prints times and errors of all kinds.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Protocol

import scipy.fft
import torch
from pydantic import Field
from torch import Tensor

from distill.cache.count_sketch import CountSketch, random_signs
from distill.randomness import counter_permutation, derive_seed
from distill.training.config import Strict

_FACTORS_FROM = (
    64  # O * I from which a linear layer's weight has factors, in units of k: there 3 times as fast
)
# Costs in the time of one multiply-add of a matrix product, measured on 2 threads of a 2.5 GHz Xeon for k = 512:
_FOURIER_COST = (
    32  # of k log2 k steps each, the Fourier transforms of two factors together with their sketches
)
_FORMED_COST = 32  # a coordinate of a formed gradient, written to memory and sketched
_STEP_BYTES = 16 << 20  # what one step over positions may take


class Projection(Strict):
    """How gradients are projected to `dim` = k dimensions.

    `nonzeros` entries are in each column of the sparse kind (and of what kronecker sketches sparsely). More of them
    cost as many times more, leave the variance as it is, and make large errors rarer for gradients of few large
    coordinates.
    """

    kind: Literal["sparse", "fft", "kronecker"] = "kronecker"
    dim: Annotated[int, Field(ge=1)] = 512
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    nonzeros: Annotated[int, Field(ge=1, le=64)] = 1


class Projector:
    """The random map that a `Projection` means, for tensors of any names and shapes.

    The map of a tensor depends on the projection, the tensor's name and its shape alone. Its signs are kept, one number
    a coordinate.
    """

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self._maps: dict[tuple[object, ...], _Map] = {}

    def add(self, out: Tensor, name: str, values: Tensor) -> None:
        """Add one tensor's part of the projection.

        Args:
            out: (B, k), added to in place.
            name: the parameter's.
            values: (B, *shape), a gradient of the parameter's shape for each sample; dtype and device of `out`.
        """
        out += self._map(name, values.shape[1:], values)(values)

    def add_outer(self, out: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        """Like `add` for values = sum_l left_l right_l^T of shape (O, I), without forming them.

        Args:
            out: (B, k), added to in place.
            name: the parameter's.
            left: (B, L, O).
            right: (B, L, I); for a convolution I counts Kh, Kw, Ch, as `flat` does. `takes_factors` holds.
        """
        own = self._map(name, torch.Size((left.shape[2], right.shape[2])), left)
        assert isinstance(own, _Outer)
        out += own.of_factors(left, right)

    def takes_factors(self, shape: torch.Size, *, positions: int) -> bool:
        """Whether factors of a gradient of shape (O, I) or (O, Ch, Kh, Kw) are faster than the gradient itself.

        Decided by sizes alone; the projection is the same but for rounding.
        """
        formed = shape.numel() * (positions + _FORMED_COST)
        return self._is_outer(shape) and positions * self._factors_cost() <= formed

    def _factors_cost(self) -> float:
        """Of one position."""
        return 2 * _FOURIER_COST * self.projection.dim * math.log2(self.projection.dim + 1)

    def _is_outer(self, shape: torch.Size) -> bool:
        """Whether the map of this shape takes factors; positions are not known to it."""
        if self.projection.kind != "kronecker" or len(shape) not in (2, 4):
            return False
        if len(shape) == 4:  # convolutions have many positions: factors must be faster for any number of them
            return shape.numel() >= self._factors_cost()
        return shape.numel() >= _FACTORS_FROM * self.projection.dim

    def _map(self, name: str, shape: torch.Size, like: Tensor) -> _Map:
        if self._is_outer(shape):
            shape = torch.Size((shape[0], shape[1:].numel()))
        key = (name, shape, like.device, like.dtype)
        if key not in self._maps:
            self._maps[key] = self._make(name, shape, like)
        return self._maps[key]

    def _make(self, name: str, shape: torch.Size, like: Tensor) -> _Map:
        projection = self.projection
        seed = derive_seed(projection.seed, "projection", name)
        if self._is_outer(shape):
            return _Outer(shape, projection.dim, seed=seed, like=like)
        if projection.kind == "fft":
            return _Fourier(shape, projection.dim, seed=seed, like=like)
        return _Sparse(shape, projection.dim, seed=seed, nonzeros=projection.nonzeros, like=like)


class _Map(Protocol):
    """The map of one tensor."""

    def __call__(self, values: Tensor) -> Tensor:
        """(B, *shape) -> (B, k)."""
        ...


class _Sparse:
    """The mean of `nonzeros` CountSketches, times sqrt(nonzeros)."""

    def __init__(self, shape: torch.Size, dim: int, *, seed: int, nonzeros: int, like: Tensor) -> None:
        self.scale = 1 / math.sqrt(nonzeros)
        self.sketches = [
            CountSketch(
                shape.numel(), dim, seed=derive_seed(seed, number), device=like.device, dtype=like.dtype
            )
            for number in range(nonzeros)
        ]

    def __call__(self, values: Tensor) -> Tensor:
        coordinates = flat(values)
        total = self.sketches[0](coordinates)
        for sketch in self.sketches[1:]:
            total += sketch(coordinates)
        return total * self.scale if len(self.sketches) > 1 else total


class _Fourier:
    """Random signs, then k random coordinates of the orthonormal real Fourier transform.

    Coordinate 0 is the mean's, 2 j - 1 and 2 j are the real and the imaginary part of frequency j.
    """

    def __init__(self, shape: torch.Size, dim: int, *, seed: int, like: Tensor) -> None:
        self.length: int = scipy.fft.next_fast_len(max(shape.numel(), dim), real=True)  # n
        self.signs = random_signs(
            shape.numel(), seed=derive_seed(seed, "signs"), device=like.device, dtype=like.dtype
        )
        chosen = counter_permutation(derive_seed(seed, "coordinates"), 0, self.length, device=like.device)[
            :dim
        ]
        frequency = (chosen + 1) // 2
        imaginary = (chosen % 2 == 0) & (chosen > 0)
        self.places = 2 * frequency + imaginary
        alone = (chosen == 0) | (2 * frequency == self.length)  # frequencies without an imaginary part
        square = torch.where(alone, 1.0, 2.0).to(like.dtype) / dim
        self.scale = square.sqrt()

    def __call__(self, values: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(flat(values) * self.signs, n=self.length)
        return torch.view_as_real(spectrum).flatten(1).index_select(1, self.places) * self.scale


class _Outer:
    """TensorSketch of matrices (O, I): coordinate (o, i) goes to bucket (h(o) + h'(i)) mod k with sign s_o s'_i."""

    def __init__(self, shape: torch.Size, dim: int, *, seed: int, like: Tensor) -> None:
        self.dim = dim
        rows, columns = shape
        self.left = CountSketch(
            rows, dim, seed=derive_seed(seed, "left"), scrambled=True, device=like.device, dtype=like.dtype
        )
        self.right = CountSketch(
            columns, dim, seed=derive_seed(seed, "right"), device=like.device, dtype=like.dtype
        )
        self.buckets = self.left.buckets()

    def __call__(self, values: Tensor) -> Tensor:
        """(B, O, I), or a convolution's gradient, -> (B, k)."""
        batch, rows = values.shape[:2]
        matrices = flat(values).reshape(batch, rows, -1)
        if rows <= self.dim:
            return self._turned_sum(self._of_rows(matrices), self.buckets, self.left.signs)
        every = torch.arange(self.dim, device=values.device)  # rows that meet in a bucket are added up first
        return self._turned_sum(self._of_rows(self.left(matrices)), every, torch.ones_like(every))

    def _of_rows(self, matrices: Tensor) -> Tensor:
        """(B, rows, I) -> (B, rows, k)."""
        return self.right(matrices.flatten(0, 1)).unflatten(0, matrices.shape[:2])

    def _turned_sum(self, rows: Tensor, buckets: Tensor, signs: Tensor) -> Tensor:
        """Each row turned by its bucket and times its sign, added up: (B, rows, k) -> (B, k)."""
        if rows.is_cuda:  # in a few calls, see `CountSketch.by_gathering`
            source = (torch.arange(self.dim, device=rows.device) - buckets[:, None]) % self.dim
            return (rows * signs[:, None]).gather(2, source.expand_as(rows)).sum(dim=1)
        sums = rows.new_zeros(len(rows), 2 * self.dim)
        turns = zip(rows.unbind(1), buckets.tolist(), signs.tolist(), strict=True)
        for row, bucket, sign in turns:
            sums.narrow(1, bucket, self.dim).add_(row, alpha=sign)
        return sums[:, : self.dim] + sums[:, self.dim :]

    def of_factors(self, left: Tensor, right: Tensor) -> Tensor:
        """(B, L, O), (B, L, I) -> (B, k)."""
        positions = max(1, _STEP_BYTES // (len(left) * self.dim * 4 * left.element_size()))
        steps = zip(left.split(positions, 1), right.split(positions, 1), strict=True)
        products = [
            (self._spectrum(self.left, left_step) * self._spectrum(self.right, right_step)).sum(dim=1)
            for left_step, right_step in steps
        ]
        return torch.fft.irfft(torch.stack(products).sum(dim=0), n=self.dim)

    def _spectrum(self, sketch: CountSketch, factors: Tensor) -> Tensor:
        """(B, L, size) -> complex (B, L, k // 2 + 1)."""
        return torch.fft.rfft(sketch(factors.flatten(0, 1)).unflatten(0, factors.shape[:2]))


def flat(values: Tensor) -> Tensor:
    """(B, *shape) -> (B, p), weights of convolutions in the order of channels_last memory."""
    if values.dim() == 5:
        values = values.permute(0, 1, 3, 4, 2)
    return values.flatten(1)
