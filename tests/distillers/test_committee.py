"""committee: which teachers judge and label, where images begin, and what is refused."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.cache import Network
from distill.contracts import Context, DistilledSet, Preprocessing, Source
from distill.distillers import recovering
from distill.distillers.committee import Committee
from distill.errors import InputError
from distill.labels.ensemble import Ensemble
from distill.labels.pool import open_pool
from distill.labels.view_labels import plan_of
from distill.preprocessing import Transform
from distill.recovery.initial import CropSearch, mosaics
from distill.recovery.recover import recover
from distill.recovery.voting import prior_weights

MakeContext = Callable[..., Context]
MakeSource = Callable[..., Source]
TEACHERS = [
    {"model": {"name": "convnet", "width": width, "norm": "batch"}, "train": {"epochs": 1, "batch_size": 12}}
    for width in (4, 6, 8)
]
QUICK = {"teachers": TEACHERS, "priors": [60.0, 50.0, 55.0], "recover": {"iterations": 2, "augment": "crop"}}
TRAIN = {"epochs": 2, "batch_size": 6, "augment": "crop"}


def committee(**options: Any) -> Committee:
    given: Mapping[str, Any] = {"ipc": 2, **QUICK, **options}
    return Committee(Committee.Config.model_validate_json(json.dumps(given)))


def run(step: Committee, ctx: Context, source: Source) -> DistilledSet:
    step.check(source, None)
    return step.run(ctx, source, None)


def test_labels_are_weighed_by_priors(source: Source, make_context: MakeContext) -> None:
    made = run(committee(), make_context(**TRAIN), source)
    assert made.soft is not None
    assert made.soft.attributes["weights"] == pytest.approx(prior_weights([60, 50, 55], temperature=10))
    assert made.provenance["priors"] == [60.0, 50.0, 55.0]
    plan = plan_of(made.soft)
    assert plan is not None and (plan.epochs, plan.batch_size, plan.augment) == (2, 6, "crop")
    assert made.train.temperature == 20.0
    equal = run(committee(label_weights="equal"), make_context(**TRAIN), source)
    assert equal.soft is not None and equal.soft.attributes["weights"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("init", ["noise", "real", "easiest", "middle"])
def test_images_begin_where_they_are_told(source: Source, make_context: MakeContext, init: str) -> None:
    ctx = make_context(**TRAIN)
    options = {"init": init, "recover": {"iterations": 0}, "relabel": None, "candidates": 5, "crops": 3}
    made = run(committee(**options), ctx, source)
    assert made.soft is None and made.labels.tolist() == [0, 0, 1, 1, 2, 2]
    real = {bytes(image.numpy().tobytes()) for image in source.train.images}
    among = [image.numpy().tobytes() in real for image in made.images]
    assert all(among) == (init == "real") and (made.selection is not None) == (init == "real")
    if init != "real":
        assert not any(among)
    assert torch.equal(run(committee(**options), make_context(**TRAIN), source).images, made.images)


def test_easy_and_middling_crops_differ(source: Source, make_context: MakeContext) -> None:
    options = {"recover": {"iterations": 0}, "relabel": None, "ipc": 1}
    easy, middle = (
        run(committee(init=init, **options), make_context(**TRAIN), source).images
        for init in ("easiest", "middle")
    )
    assert not torch.equal(easy, middle)


def test_mosaics_of_four(source: Source, make_context: MakeContext) -> None:
    options = {"init": "easiest", "factor": 2, "recover": {"iterations": 0}, "relabel": None, "ipc": 1}
    made = run(committee(**options), make_context(**TRAIN), source)
    assert made.images.shape == (3, 1, 8, 8)
    with pytest.raises(InputError, match="cannot be made of 3 x 3 crops"):
        run(committee(**{**options, "factor": 3}), make_context(**TRAIN), source)
    with pytest.raises(InputError, match="too few images to make 3 of"):
        run(committee(**{**options, "ipc": 3}), make_context(**TRAIN), source)


def test_measured_priors_are_accuracies_on_the_validation_split(
    make_source: MakeSource, make_context: MakeContext
) -> None:
    source = make_source(train=(20, 20, 20), valid=10)
    prior = {"ipc": 4, "iterations": 2, "epochs": 10, "student": {"name": "convnet", "width": 8}}
    made = run(committee(priors="measured", prior=prior, relabel=None), make_context(**TRAIN), source)
    priors = made.provenance["priors"]
    assert len(priors) == 3 and all(0 <= prior <= 100 for prior in priors)
    assert all((prior * 30 / 100) == pytest.approx(round(prior * 30 / 100)) for prior in priors)
    again = run(committee(priors="measured", prior=prior, relabel=None), make_context(**TRAIN), source)
    assert again.provenance["priors"] == priors


def test_priors_need_a_validation_split(make_source: MakeSource) -> None:
    source = make_source(valid=0)
    with pytest.raises(InputError, match="priors are measured on the validation split"):
        committee(priors="measured").check(source, None)
    committee().check(source, None)
    committee(priors="measured", teachers=TEACHERS[:1]).check(source, None)


def test_wrong_options_are_refused(source: Source, make_context: MakeContext) -> None:
    with pytest.raises(ValueError, match="priors has 2 numbers for 3 teachers"):
        committee(priors=[1.0, 2.0])
    plain = [{"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 12}}]
    without = {"teachers": plain, "priors": "valid"}
    with pytest.raises(InputError, match="no batch norm, whose statistics this needs"):
        committee(**without).check(source, None)
    with pytest.raises(InputError, match="no batch norm, whose statistics this needs"):
        committee(**without, recover={"iterations": 0}, relabel={"batch_norm": "batch"}).check(source, None)
    run(committee(**without, recover={"iterations": 1, "statistics": 0.0}), make_context(**TRAIN), source)
    with pytest.raises(InputError, match="keeps more classes"):
        committee(relabel={"codec": {"name": "topk", "k": 4}}).check(source, None)


def test_class_statistics(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**TRAIN)
    made = run(committee(recover={"iterations": 2, "classwise": True}, relabel=None), ctx, source)
    other = run(committee(relabel=None), make_context(**TRAIN), source)
    assert not torch.equal(made.images, other.images)


# --- what reaches the parts


def seen_by_recovery(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the step gives to `recover`, by name of the argument."""
    seen: dict[str, Any] = {}
    signature = inspect.signature(recover)

    def noting(*args: Any, **options: Any) -> Any:
        seen.update(signature.bind(*args, **options).arguments)
        return recover(*args, **options)

    monkeypatch.setattr(recovering, "recover", noting)
    return seen


def test_all_pairs_vote_weighed_by_their_priors(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_recovery(monkeypatch)
    options = {"voting_temperature": 5.0, "label_weights_temperature": 3.0, "temperature": 7.0}
    run(committee(ipc=3, relabel=None, **options), make_context(**TRAIN), source)
    voters = [dict(group.voters) for group in seen["groups"]]
    assert sorted(tuple(each) for each in voters) == [(0, 1), (0, 2), (1, 2)]
    for each in voters:
        powers = {teacher: math.exp((60.0, 50.0, 55.0)[teacher] / 5) for teacher in each}
        for teacher, weight in each.items():
            assert weight == pytest.approx(powers[teacher] / sum(powers.values()))


def test_one_image_a_class_is_judged_by_the_best_two(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_recovery(monkeypatch)
    step = committee(ipc=1, relabel=None, priors=[50.0, 60.0, 55.0], voting="equal")
    run(step, make_context(**TRAIN), source)
    assert [group.voters for group in seen["groups"]] == [((1, 0.5), (2, 0.5))]


def inputs_of_batch_norms(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    heard: dict[str, torch.Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda _, given, name=name: heard.update({name: given[0]}))
    with torch.no_grad():
        module(x)
    return heard


def test_class_statistics_are_those_of_the_training_images(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, ctx = seen_by_recovery(monkeypatch), make_context(**TRAIN)
    step = committee(recover={"iterations": 1, "classwise": True}, relabel=None)
    run(step, ctx, source)
    assert [len(group.images) for group in seen["groups"]] == [2, 2, 2]
    x = Transform(Preprocessing(source.mean, source.std))(source.train.images)
    for judge, network in zip(seen["judges"], open_pool(ctx, source, step.config.teachers), strict=True):
        heard = inputs_of_batch_norms(network.module(torch.device("cpu")), x)
        assert judge.classwise and judge.targets.keys() == heard.keys()
        for name, (mean, var) in judge.targets.items():
            for label in range(3):
                own = heard[name][source.train.labels == label].transpose(0, 1).flatten(1)
                torch.testing.assert_close(mean[label], own.mean(1), rtol=1e-3, atol=1e-4)
                torch.testing.assert_close(var[label], own.var(1, unbiased=False), rtol=1e-3, atol=1e-4)


def test_all_teachers_judge_crops_alike(source: Source, make_context: MakeContext) -> None:
    """By mean logits of the three, and not of one of them."""
    ctx = make_context(**TRAIN)
    step = committee(init="easiest", recover={"iterations": 0}, relabel=None, ipc=1)
    made = run(step, ctx, source)
    how = CropSearch(middle=False, factor=1, candidates=300, crops=5, crop_scale=0.08)
    preprocessing = Preprocessing(source.mean, source.std)
    networks = open_pool(ctx, source, step.config.teachers)

    def crops(*judges: Network) -> torch.Tensor:
        ensemble = Ensemble(judges, (1 / len(judges),) * len(judges), 1.0, preprocessing)
        return mosaics(ctx, source, ensemble.on(torch.device("cpu")), np.ones(3, dtype=np.int64), how)

    assert torch.equal(made.images, crops(*networks))
    assert not any(torch.equal(made.images, crops(network)) for network in networks)


def test_priors_of_the_teachers_themselves_are_percent(
    make_source: MakeSource, make_context: MakeContext
) -> None:
    source, ctx = make_source(valid=10), make_context(**TRAIN)
    step = committee(priors="valid")
    made = run(step, ctx, source)
    networks = open_pool(ctx, source, step.config.teachers)
    wanted = [100 * network.facts["valid_accuracy"] for network in networks]
    assert made.provenance["priors"] == wanted and max(wanted) > 1
    assert made.soft is not None
    assert made.soft.attributes["weights"] == pytest.approx(prior_weights(wanted, temperature=10))


def test_sizes_are_refused_before_any_teacher_is_trained(
    source: Source, make_context: MakeContext, trained: list[Any]
) -> None:
    recovery = {"iterations": 4, "segments": 2, "sizes": [8, 12]}
    with pytest.raises(InputError, match="cannot take images of 12 x 12 px") as caught:
        run(committee(recover=recovery), make_context(**TRAIN), source)
    assert "sizes" in str(caught.value) and "convnet-w4-batch" in str(caught.value)
    assert trained == []


def test_teachers_of_one_configuration_are_two(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = seen_by_recovery(monkeypatch)
    made = run(
        committee(teachers=[TEACHERS[0], TEACHERS[0]], priors=[50.0, 50.0]), make_context(**TRAIN), source
    )
    names = ["convnet-w4-batch (0)", "convnet-w4-batch (1)"]
    assert made.provenance["teachers"] == [judge.name for judge in seen["judges"]] == names
    first, second = (judge.module.state_dict()["classifier.weight"] for judge in seen["judges"])
    assert not torch.equal(first, second)
    assert made.soft is not None and len(set(made.soft.attributes["identities"])) == 2
