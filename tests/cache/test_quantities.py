"""Any mix of quantities by one pass, each against a direct computation for one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache import (
    AreaUnderMargin,
    Cache,
    ErrorNorms,
    Features,
    Forgetting,
    GradientNorms,
    Gradients,
    LastLayerGradients,
    Logits,
    Loss,
    Margins,
    Network,
    Statistics,
)
from distill.cache.gradient_request import GradientRequest
from distill.cache.projections import Projection
from distill.cache.quantities import Quantity
from distill.contracts import Split
from distill.errors import InputError, NonFiniteError
from distill.training.recording import Dynamics

CPU = torch.device("cpu")
EVERYTHING = slice(None)
SMALL = Gradients(Projection(dim=8))
ALL: list[Quantity] = [
    *(Features(), Features("body.0"), Logits(), Loss(), Margins(), ErrorNorms(), LastLayerGradients()),
    *(SMALL, GradientNorms(), GradientNorms(of="margin", layers=("body.*",))),
    *(Statistics(of="convolution"), Statistics(of="convolution", per_class=True)),
]
MakeCache = Callable[..., Cache]


def direct_logits(split: Split, network: Network) -> Tensor:
    """float64 (N, C)."""
    pre = network.preprocessing
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    return network.module(CPU).double()((split.images.double() / 255 - mean) / std)


def test_one_pass_answers_everything(make_cache: MakeCache, split: Split, network: Network) -> None:
    cache = make_cache()
    together = cache.request(split, network, ALL)
    assert cache.images_forwarded == len(split)
    assert list(together) == ALL
    again = make_cache()
    for quantity in ALL:
        alone = again.request(split, network, [quantity])[quantity]
        if isinstance(quantity, Statistics):
            continue
        assert torch.equal(alone.read(EVERYTHING), together[quantity].read(EVERYTHING))
        assert alone.shape == tuple(alone.read(EVERYTHING).shape)
    assert again.images_forwarded == 0


@pytest.mark.parametrize("quantity", [each for each in ALL if not isinstance(each, Statistics)], ids=str)
def test_what_a_quantity_is_does_not_depend_on_its_company(
    quantity: Quantity, make_cache: MakeCache, split: Split, network: Network
) -> None:
    together = make_cache().request(split, network, ALL)[quantity].read(EVERYTHING).clone()
    alone = Split(split.images, split.labels, "the same again")
    assert torch.equal(make_cache().request(alone, network, [quantity])[quantity].read(EVERYTHING), together)


def test_what_follows_from_logits(make_cache: MakeCache, split: Split, network: Network) -> None:
    cache = make_cache()
    answers = cache.request(split, network, [Loss(), Margins(), ErrorNorms()])
    logits = direct_logits(split, network)
    for row, (z, y) in enumerate(zip(logits, split.labels.tolist(), strict=True)):
        others = torch.cat([z[:y], z[y + 1 :]])
        error = z.softmax(0) - F.one_hot(torch.tensor(y), 3)
        one = slice(row, row + 1)
        assert float(answers[Loss()].read(one)) == pytest.approx(float(-z.log_softmax(0)[y]), abs=1e-5)
        assert float(answers[Margins()].read(one)) == pytest.approx(float(z[y] - others.max()), abs=1e-5)
        assert float(answers[ErrorNorms()].read(one)) == pytest.approx(float(error.norm()), abs=1e-5)
    picked = torch.tensor([30, 2, 2])
    assert torch.equal(answers[Loss()].take(picked), answers[Loss()].read(EVERYTHING)[picked])
    assert not [path for path in cache.folder.rglob("manifest.json") if "loss" in path.read_text()]


def test_a_network_of_one_class(make_cache: MakeCache, split: Split, network: Network) -> None:
    """It is always right: nothing else could be taken for the label."""
    state = {
        name: value[:1] if name.startswith("classifier") else value for name, value in network.state.items()
    }
    one = Network(network.model, network.image_shape, 1, network.preprocessing, state, facts={})
    split = Split(split.images, torch.zeros_like(split.labels), "one class")
    answers = make_cache().request(split, one, [Loss(), Margins(), ErrorNorms()])
    assert all(torch.isfinite(rows.read(EVERYTHING)).all() for rows in answers.values())
    assert not answers[Loss()].read(EVERYTHING).any()


def test_lengths_of_gradients_equal_autograd(make_cache: MakeCache, split: Split, network: Network) -> None:
    cache = make_cache()
    whole = cache.request(split, network, [GradientNorms()])[GradientNorms()].read(EVERYTHING)[:, 0]
    module = network.module(CPU).double().requires_grad_(True)
    pre = network.preprocessing
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    for row in range(0, 37, 6):
        image = (split.images[row].double() / 255 - mean) / std
        loss = F.cross_entropy(module(image[None]), split.labels[row : row + 1])
        gradient = torch.autograd.grad(loss, list(module.parameters()))
        length = torch.cat([each.flatten() for each in gradient]).norm()
        assert float(whole[row]) == pytest.approx(float(length), rel=1e-4)


def test_the_mean_over_checkpoints_scales_each_row(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    """A checkpoint whose gradients are a thousand times as long does not decide alone."""
    loud = replace(network, state={**network.state, "body.0.weight": network.state["body.0.weight"] * 3})
    cache = make_cache()
    mean = cache.gradients(split, [network, loud], SMALL)
    parts = [cache.gradients(split, each, SMALL).read(EVERYTHING) for each in (network, loud)]
    expected = sum(part / part.norm(dim=1, keepdim=True) for part in parts) / 2
    torch.testing.assert_close(mean.read(EVERYTHING), expected)
    torch.testing.assert_close(mean.take(torch.tensor([5, 1])), expected[[5, 1]])
    assert [block.shape for _, block in mean.blocks(20)] == [(20, 8), (17, 8)]
    assert cache.images_forwarded == 2 * 37


def test_checkpoints_may_weigh_otherwise_and_keep_their_lengths(
    make_cache: MakeCache, split: Split, make_network: Callable[..., Network]
) -> None:
    networks = [make_network(seed=seed) for seed in range(3)]
    cache = make_cache()
    parts = [cache.gradients(split, each, SMALL).read(EVERYTHING) for each in networks]
    lengths = [part.norm(dim=1, keepdim=True) for part in parts]
    weighed = cache.gradients(split, networks, SMALL, weights=[1, 0, 3])
    expected = parts[0] / lengths[0] / 4 + parts[2] / lengths[2] * 3 / 4
    torch.testing.assert_close(weighed.read(EVERYTHING), expected)
    torch.testing.assert_close(weighed.take(torch.tensor([7, 7])), expected[[7, 7]])
    plain = cache.gradients(split, networks, SMALL, normalise=False)
    torch.testing.assert_close(plain.read(EVERYTHING), torch.stack(parts).mean(dim=0))
    again = cache.gradients(split, networks[0], SMALL).read(EVERYTHING)
    assert torch.equal(again, parts[0]), "what the cache keeps is not changed"


@pytest.mark.parametrize("weights", [[], [1.0], [1, 2, 3], [1, -1], [0, 0], [1, torch.inf], [1, torch.nan]])
def test_weights_without_a_mean(
    weights: list[float], make_cache: MakeCache, split: Split, make_network: Callable[..., Network]
) -> None:
    with pytest.raises(InputError, match="have no mean") as caught:
        make_cache().gradients(split, [make_network(), make_network(seed=1)], SMALL, weights=weights)
    assert caught.value.where == "weights"


def test_a_score_is_averaged_over_networks(
    make_cache: MakeCache, split: Split, make_network: Callable
) -> None:
    networks = [make_network(seed=seed) for seed in range(3)]
    cache = make_cache()
    found = cache.scores(split, networks, ErrorNorms()).read(EVERYTHING)
    each = [cache.request(split, one, [ErrorNorms()])[ErrorNorms()].read(EVERYTHING) for one in networks]
    torch.testing.assert_close(found, torch.stack(each).mean(dim=0))


def test_what_was_recorded_of_the_training(make_cache: MakeCache, split: Split, network: Network) -> None:
    dynamics = Dynamics(
        forgetting=torch.arange(37, dtype=torch.int32),
        learned=torch.arange(37) != 4,
        margin=torch.linspace(-1, 1, 37),
    )
    facts = {"data": split.fingerprint}
    cache = make_cache()
    answers = cache.request(
        split, replace(network, dynamics=dynamics, facts=facts), [Forgetting(), AreaUnderMargin(), Loss()]
    )
    forgotten = answers[Forgetting()].read(EVERYTHING)[:, 0].tolist()
    assert forgotten[:6] == [0, 1, 2, 3, float("inf"), 5]
    assert torch.equal(
        answers[AreaUnderMargin()].take(torch.tensor([36, 0]))[:, 0], torch.tensor([1.0, -1.0])
    )
    assert cache.images_forwarded == 37
    for other in (network, replace(network, dynamics=dynamics, facts={"data": "other samples"})):
        with pytest.raises(InputError, match="not recorded"):
            cache.request(split, other, [Forgetting()])


def test_a_pattern_that_fits_no_parameter(make_cache: MakeCache, split: Split, network: Network) -> None:
    with pytest.raises(InputError) as caught:
        make_cache().request(split, network, [GradientNorms(layers=("head.*",))])
    assert "classifier.weight" in str(caught.value)


def test_patterns_may_be_a_list() -> None:
    for make in (Gradients, GradientNorms, Statistics, GradientRequest):
        assert make(layers=["body"]) == make(layers=("body",))
        assert hash(make(layers=["body"])) == hash(make(layers=("body",)))


@pytest.mark.parametrize("make", [Gradients, GradientNorms, Statistics, GradientRequest])
@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"layers": "body"}, "write ('body',)"),
        ({"layers": (1,)}, None),
        ({"layers": None}, None),
        ({"of": "nothing"}, None),
    ],
    ids=str,
)
def test_arguments_that_mean_nothing(
    make: Callable[..., object], wrong: dict[str, object], fix: str | None
) -> None:
    with pytest.raises(InputError) as caught:
        make(**wrong)
    assert caught.value.where == next(iter(wrong))
    assert caught.value.found == repr(next(iter(wrong.values())))
    assert caught.value.fix == fix


def test_margins_is_no_margin() -> None:
    with pytest.raises(InputError) as caught:
        Gradients(of="margins")  # type: ignore[arg-type]
    assert (caught.value.allowed, caught.value.fix) == ("loss, margin", "did you mean 'margin'?")


@pytest.mark.parametrize(
    "quantity",
    [
        *(Features("bodyy.0"), Gradients(layers=("head.*",)), GradientNorms(layers=("*", "head"))),
        *(Statistics(of="convolution", layers=("head",)), Statistics(of="batch_norm")),
    ],
    ids=str,
)
def test_what_a_network_cannot_give_is_refused_before_anything_is_written(
    quantity: Quantity, make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    with pytest.raises(InputError, match="no "):
        cache.request(split, network, [Features(), quantity])
    assert not list(cache.folder.glob("rows/*"))
    assert cache.images_forwarded == 0


def test_gradients_that_are_not_finite(make_cache: MakeCache, split: Split, network: Network) -> None:
    huge = {**network.state, "classifier.weight": network.state["classifier.weight"] * 1e38}
    with pytest.raises(NonFiniteError, match="gave NaN or infinite"):
        make_cache().request(split, replace(network, state=huge), [SMALL])
