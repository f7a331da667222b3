"""Projections: unbiased, within the stated variance, linear, any k, the same again; fast ways against plain ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.cache.count_sketch import CountSketch, random_signs
from distill.cache.layer_gradients import Outer
from distill.cache.projections import Projection, Projector

KINDS = ("sparse", "fft", "kronecker")
# c of the file's head: Var <P x, P y> <= c (|x|^2 |y|^2 + <x, y>^2) / k.
VARIANCE = {"sparse": 1.0, "fft": 2.0, "kronecker": 4.0}
SEEDS = 200
SHAPES = {"conv": (4, 3, 3, 3), "bias": (5,), "linear": (16, 40)}  # linear: O I >= 64 k for k = 8


def project(projection: Projection, parts: Mapping[str, Tensor]) -> Tensor:
    """(B, k) of the gradients in `parts`, (B, *shape) each."""
    projector = Projector(projection)
    first = next(iter(parts.values()))
    out = torch.zeros(len(first), projection.dim, dtype=first.dtype, device=first.device)
    for name, values in parts.items():
        projector.add(out, name, values)
    return out


def flat(parts: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([values.flatten(1) for values in parts.values()], dim=1)


def pair(case: str) -> dict[str, Tensor]:
    """Two gradients, x and y: rows of each tensor."""
    generator = torch.Generator().manual_seed(3)
    random = {
        name: torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }
    if case == "random":
        return random
    if case == "parallel":  # the worst of the bound
        return {name: values[:1].expand_as(values) for name, values in random.items()}
    if case == "constant":  # whose coordinates fold onto each other without random offsets
        return {name: torch.ones_like(values) for name, values in random.items()}
    assert case == "rank_one"
    left = torch.randn(2, 16, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(1, 1, 40, generator=generator, dtype=torch.float64).expand(2, 1, 40)
    return {"linear": left @ right}


@cache
def errors(case: str, kind: Any, *, dim: int, name: str = "", **options: Any) -> tuple[Tensor, float, float]:
    """<P x, P y> - <x, y> for many seeds, the bound of its variance for c = 1, and |x| |y|."""
    parts = {f"{name}{part}": values for part, values in pair(case).items()}
    x, y = flat(parts)
    found = torch.empty(SEEDS, dtype=torch.float64)
    for seed in range(SEEDS):
        px, py = project(Projection(kind=kind, dim=dim, seed=seed, **options), parts)
        found[seed] = px @ py - x @ y
    bound = float((x @ x) * (y @ y) + (x @ y) ** 2) / dim
    return found, bound, float(x.norm() * y.norm())


@pytest.mark.parametrize("case", ["random", "parallel", "constant", "rank_one"])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased_and_within_the_stated_variance(kind: str, case: str) -> None:
    found, bound, _ = errors(case, kind, dim=8)
    allowed = VARIANCE[kind] * bound
    # The mean square of 200 errors has a relative standard deviation of about 0.15.
    assert abs(float(found.mean())) < 4 * math.sqrt(allowed / SEEDS)
    assert float(found.square().mean()) < 1.5 * allowed


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_for_random_gradients_is_that_of_countsketch(kind: str) -> None:
    """Both sides: a map whose error is too small is not random, and c of the bound is for the worst gradients alone."""
    parts = pair("random")
    x, y = flat(parts)
    found, bound, _ = errors("random", kind, dim=8)
    exact = bound - 2 * float((x.square() * y.square()).sum()) / 8
    assert float(found.square().mean()) == pytest.approx(exact, rel=0.4)


def test_the_kronecker_kind_has_the_variance_of_tensorsketch_for_parallel_rank_one_gradients() -> None:
    """Both sides, for the worst gradients: beyond what a dense matrix has, within c."""
    left, right = (torch.ones(2, 1, size, dtype=torch.float64) for size in (16, 40))
    found = torch.empty(SEEDS, dtype=torch.float64)
    for seed in range(SEEDS):
        out = torch.zeros(2, 8, dtype=torch.float64)
        Projector(Projection(dim=8, seed=seed)).add_outer(out, "weight", left, right)
        found[seed] = (out[0] @ out[1]) / 640 - 1
    plain = 2 / 8  # c = 1
    assert 1.5 * plain < float(found.square().mean()) < 4 * 1.5 * plain


def test_more_nonzeros_keep_the_variance() -> None:
    found, bound, _ = errors("random", "sparse", dim=8, nonzeros=4)
    assert float(found.square().mean()) < 1.5 * bound


def test_more_nonzeros_make_large_errors_rarer_for_few_large_coordinates() -> None:
    """Two unit vectors that share a bucket have an error of 1 with one entry a column."""
    parts = {name: row[:, None] for name, row in zip("ab", torch.eye(2, dtype=torch.float64), strict=True)}

    def worst(nonzeros: int) -> float:
        rows = [
            project(Projection(kind="sparse", dim=32, seed=seed, nonzeros=nonzeros), parts)
            for seed in range(150)
        ]
        return max(abs(float(row[0] @ row[1])) for row in rows)

    assert worst(8) < 0.8 < worst(1)


@pytest.mark.parametrize("kind", KINDS)
def test_other_seeds_and_other_names_err_independently(kind: str) -> None:
    here = errors("random", kind, dim=8)[0]
    elsewhere = errors("random", kind, dim=8, name="other.")[0]
    for first, second in ((here[0::2], here[1::2]), (here, elsewhere)):
        correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
        assert abs(correlation) < 5 / math.sqrt(len(first))


@pytest.mark.parametrize("dim", [1, 7, 64, 512, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_any_dimension_gives_the_matrix_of_its_columns(kind: Any, dim: int) -> None:
    """Linear, and equal to the explicit matrix, with fewer and more dimensions than coordinates."""
    projection = Projection(kind=kind, dim=dim, seed=5)
    count = sum(math.prod(shape) for shape in SHAPES.values())
    units = torch.eye(count, dtype=torch.float64)
    matrix = project(projection, cut(units))
    x = torch.randn(3, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(project(projection, cut(x)), x @ matrix, rtol=1e-10, atol=1e-10)
    assert float(matrix.square().sum(dim=1).mean()) == pytest.approx(1, abs=0.2)  # columns of length 1


def cut(rows: Tensor) -> dict[str, Tensor]:
    """(B, P) -> tensors of `SHAPES`."""
    sizes = [math.prod(shape) for shape in SHAPES.values()]
    return {
        name: part.unflatten(1, shape)
        for (name, shape), part in zip(SHAPES.items(), rows.split(sizes, dim=1), strict=True)
    }


def test_a_sparse_column_holds_its_nonzeros() -> None:
    units = {"bias": torch.eye(50, dtype=torch.float64)}
    columns = project(Projection(kind="sparse", dim=16), units)
    assert torch.equal(columns.abs().sum(dim=1), torch.ones(50, dtype=torch.float64))
    assert torch.equal(columns.count_nonzero(dim=1), torch.ones(50, dtype=torch.int64))
    four = project(Projection(kind="sparse", dim=16, nonzeros=4), units)
    assert int(four.count_nonzero(dim=1).max()) == 4


def test_as_many_dimensions_as_coordinates_lose_nothing_with_fft() -> None:
    x = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for dim in (30, 32, 45):  # lengths with small prime factors: every coordinate is taken
        projected = project(Projection(kind="fft", dim=dim), {"bias": x})
        torch.testing.assert_close(projected @ projected.T, x @ x.T)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_whatever_else_was_projected(kind: Any) -> None:
    parts = {name: values.float() for name, values in pair("random").items()}
    first = project(Projection(kind=kind, dim=16), parts)
    assert torch.equal(first, project(Projection(kind=kind, dim=16), parts))
    alone = sum(project(Projection(kind=kind, dim=16), {name: parts[name]}) for name in parts)
    torch.testing.assert_close(alone, first)
    assert not torch.allclose(first, project(Projection(kind=kind, dim=16, seed=1), parts))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_the_batch(kind: Any) -> None:
    parts = cut(torch.randn(5, 753, generator=torch.Generator().manual_seed(2)))
    whole = project(Projection(kind=kind, dim=32), parts)
    one = project(Projection(kind=kind, dim=32), {name: values[2:3] for name, values in parts.items()})
    torch.testing.assert_close(whole[2:3], one)


@pytest.mark.parametrize("rows", [4, 16, 600])  # fewer than dimensions, more, and so many that runs are wider
@pytest.mark.parametrize("positions", [1, 3, 200])
@pytest.mark.parametrize("kernel", [None, (3, 2)])
def test_factors_give_what_their_product_gives(
    rows: int, positions: int, kernel: tuple[int, int] | None
) -> None:
    generator = torch.Generator().manual_seed(4)
    left = torch.randn(3, positions, rows, generator=generator, dtype=torch.float64)
    right = torch.randn(3, positions, 450, generator=generator, dtype=torch.float64)
    projector = Projector(Projection(kind="kronecker", dim=8))
    formed, factored = (torch.zeros(3, 8, dtype=torch.float64) for _ in range(2))
    gradient = Outer(left, right, kernel)
    projector.add(formed, "weight", gradient.formed)
    projector.add_outer(factored, "weight", left, right)
    torch.testing.assert_close(factored, formed, rtol=1e-10, atol=1e-10)
    explicit = torch.einsum("blo,bli->boi", left, right)
    if kernel is not None:
        explicit = explicit.unflatten(2, (3, 2, 75)).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(gradient.formed, explicit)


@pytest.mark.parametrize("scrambled", [False, True])
@pytest.mark.parametrize("size", [3, 40, 3000])
def test_a_countsketch_tells_its_buckets(size: int, scrambled: bool) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}
    sketch = CountSketch(size, 7, seed=3, scrambled=scrambled, **options)
    columns = sketch(torch.eye(size, dtype=torch.float64))
    assert torch.equal(columns.abs().argmax(dim=1), sketch.buckets())
    assert torch.equal(columns.sum(dim=1), sketch.signs)


def test_a_countsketch_takes_vectors_along_the_first_dimension() -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}
    sketch = CountSketch(3000, 7, seed=3, **options)
    values = torch.randn(2, 3000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    expected = torch.stack([sketch(values[..., column]) for column in range(5)], dim=2)
    torch.testing.assert_close(sketch(values), expected)
    torch.testing.assert_close(sketch.by_gathering(values), sketch.by_slices(values))


def test_factors_stay_unformed_where_that_is_faster() -> None:
    kronecker, sparse = (Projector(Projection(kind=kind)) for kind in ("kronecker", "sparse"))
    assert kronecker.takes_factors(torch.Size((512, 512)), positions=1)
    assert not kronecker.takes_factors(torch.Size((10, 100)), positions=1)  # small
    assert not kronecker.takes_factors(torch.Size((64, 512)), positions=4096)  # one product is faster
    assert kronecker.takes_factors(torch.Size((512, 512, 3, 3)), positions=16)
    assert kronecker.takes_factors(torch.Size((256, 256, 3, 3)), positions=64)
    assert not kronecker.takes_factors(torch.Size((128, 128, 3, 3)), positions=256)
    assert not kronecker.takes_factors(torch.Size((64, 64, 3, 3)), positions=1)  # has a sparse map
    assert not sparse.takes_factors(torch.Size((512, 512)), positions=1)


def test_add_adds() -> None:
    projector = Projector(Projection(dim=4))
    out = torch.ones(2, 4)
    projector.add(out, "bias", torch.zeros(2, 3))
    assert torch.equal(out, torch.ones(2, 4))


def test_convolutions_are_numbered_as_channels_last_memory() -> None:
    values = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(6))
    same = values.permute(0, 1, 3, 4, 2).flatten(1)
    projection = Projection(kind="sparse", dim=16)
    assert torch.equal(project(projection, {"w": values}), project(projection, {"w": same}))


@pytest.mark.parametrize(
    ("size", "dim"), [(3, 7), (100, 7), (5000, 7), (70_000, 16), (513, 512), (1_000_001, 512)]
)
def test_both_rotations_of_a_countsketch_agree(size: int, dim: int) -> None:
    sketch = CountSketch(size, dim, seed=1, device=torch.device("cpu"), dtype=torch.float64)
    values = torch.randn(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(sketch.by_gathering(values), sketch.by_slices(values))
    assert len(sketch.offsets) <= 32


def test_coordinates_meet_in_a_bucket_as_often_as_chance_has_it() -> None:
    """Also a run, and a period of the weights' layout, apart: the pairs that a plain fold always brings together."""
    dim, size, seeds = 8, 64, 800
    met = torch.zeros(size, dtype=torch.float64)
    for seed in range(seeds):
        sketch = CountSketch(size, dim, seed=seed, device=torch.device("cpu"), dtype=torch.float64)
        columns = sketch(torch.eye(size, dtype=torch.float64)).abs()
        met += columns @ columns[0]
    chance = met[1:] / seeds
    assert float(chance.max()) < 1 / dim + 5 * math.sqrt((1 / dim) * (1 - 1 / dim) / seeds)


def test_signs_are_fair_and_do_not_depend_on_how_many_are_drawn() -> None:
    options: dict[str, Any] = {"seed": 9, "device": torch.device("cpu"), "dtype": torch.float32}
    signs = random_signs(100_000, **options)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(100_000)
    assert torch.equal(random_signs(77, **options), signs[:77])


@pytest.mark.parametrize(
    "wrong", [{"dim": 0}, {"dim": 2.5}, {"kind": "gauss"}, {"seed": -1}, {"nonzeros": 0}, {"size": 3}]
)
def test_a_wrong_projection_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Projection.model_validate(wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_projects_as_a_cpu(kind: Any) -> None:
    parts = cut(torch.randn(5, 753, generator=torch.Generator().manual_seed(2)))
    there = project(Projection(kind=kind), {name: values.cuda() for name, values in parts.items()})
    torch.testing.assert_close(there.cpu(), project(Projection(kind=kind), parts), rtol=1e-4, atol=1e-4)
