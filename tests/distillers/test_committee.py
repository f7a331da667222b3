"""committee: which teachers judge and label, where images begin, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from distill.contracts import Context, DistilledSet, Source
from distill.distillers.committee import Committee
from distill.errors import InputError
from distill.labels.view_labels import plan_of
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
