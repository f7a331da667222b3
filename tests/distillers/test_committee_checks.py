"""committee: what is refused before any teacher is trained, and what an interruption must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.contracts import Context, Source
from distill.distillers import recovering
from distill.distillers.committee import Committee
from distill.distillers.soft_label import SoftLabel
from distill.errors import InputError
from distill.step_checks import check_steps
from distill.training.config import TrainConfig
from tests.distillers.test_committee import TRAIN, committee, run

MakeContext = Callable[..., Context]


@pytest.mark.parametrize(
    ("options", "train", "said"),
    [
        ({"init": "easiest", "factor": 3}, {}, "cannot be made of 3 x 3 crops"),
        ({"init": "easiest", "factor": 2, "ipc": 3}, {}, "too few images to make 3 of"),
        (
            {"recover": {"iterations": 4, "segments": 2, "sizes": [8, 12]}},
            {},
            "cannot take images of 12 x 12 px",
        ),
        ({"relabel": {"calibration": {}}}, {"mix": "cutmix"}, "no class of their own"),
        ({"relabel": {"calibration": {}}}, {"loss": "mse"}, "calibration softens labels as probabilities"),
        (
            {"relabel": {"codec": {"name": "marginal_smoothing", "k": 2}}},
            {"loss": "mse"},
            "does not keep",
        ),
        ({"relabel": {"codec": {"name": "topk", "k": 4}}}, {}, "more classes than there are"),
        (
            {"relabel": {"labels": "online", "codec": {"name": "topk", "k": 2}}},
            {},
            "a codec has nothing to do",
        ),
        ({"relabel": {"batch_norm": "batch"}}, {"batch_size": 5}, "no statistics to be normalised by"),
        ({"relabel": {"batch_norm": "batch"}}, {"micro_batches": 6}, "no statistics to be normalised by"),
    ],
)
def test_what_cannot_be_done_is_refused_before_work(
    options: dict[str, Any], train: dict[str, Any], said: str, source: Source
) -> None:
    step = committee(**options)
    with pytest.raises(InputError, match=said) as caught:
        check_steps([step], source, TrainConfig.model_validate({**TRAIN, **train}))
    assert caught.value.fix and (caught.value.where or "").startswith(("steps.0.committee", "train."))


def test_sound_options_pass(source: Source) -> None:
    train = TrainConfig.model_validate({**TRAIN, "micro_batches": 3})
    check_steps([committee(relabel={"batch_norm": "batch"}, init="easiest")], source, train)


@pytest.mark.parametrize("prior", [float("nan"), float("inf")])
def test_priors_are_numbers(prior: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Committee.Config.model_validate({"ipc": 1, "teachers": [{}], "priors": (prior,)})


def test_images_that_are_learned_anew_lose_their_labels(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**TRAIN)
    first = SoftLabel(SoftLabel.Config(ipc=2)).run(ctx, source, None)
    assert first.soft is not None
    learned = committee(ipc=None, relabel=None).run(ctx, source, first)
    assert not torch.equal(learned.images, first.images) and learned.soft is None
    kept = committee(ipc=None, relabel=None, recover={"iterations": 0}).run(
        make_context(**TRAIN), source, first
    )
    assert torch.equal(kept.images, first.images) and kept.soft is first.soft


def test_the_training_of_the_step_before_is_kept(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**TRAIN)
    first = SoftLabel(SoftLabel.Config(ipc=2)).run(ctx, source, None)
    first = replace(first, train=first.train.model_copy(update={"lr": 0.123, "epochs": 7}))
    made = committee(ipc=None).run(ctx, source, first)
    assert (made.train.lr, made.train.epochs, made.train.temperature) == (0.123, 7, 20.0)
    assert made.soft is not None and made.soft.attributes["views"]["epochs"] == 7


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({}, True),
        ({"voting": "equal"}, True),  # the labels
        ({"voting": "equal", "label_weights": "equal"}, False),
        ({"voting": "equal", "label_weights": "equal", "ipc": 1}, True),  # the greatest are drawn
        ({"label_weights": "equal"}, True),
        ({"label_weights": "equal", "drawn": 1}, False),
        ({"label_weights": "equal", "recover": {"voters": "turns"}}, False),
        ({"recover": {"iterations": 0}, "relabel": None}, False),
    ],
)
def test_priors_are_measured_where_something_depends_on_them(options: dict[str, Any], needed: bool) -> None:
    assert committee(**options).config.needs_priors == needed


def test_priors_survive_an_interruption(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ctx = make_context(folder=tmp_path / "run", **TRAIN)
    step = committee(priors="measured", relabel=None)
    monkeypatch.setattr(recovering, "measure_priors", lambda *a, **k: (51.25, 1 / 3, 60.0))
    with monkeypatch.context() as patch:
        patch.setattr(recovering, "recover", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            step.run(ctx, source, None)
    monkeypatch.setattr(recovering, "measure_priors", lambda *a, **k: pytest.fail("measured again"))
    assert step.run(ctx, source, None).provenance["priors"] == [51.25, 1 / 3, 60.0]


def test_a_dry_run_counts_priors_and_crops(source: Source) -> None:
    def work(**options: Any) -> tuple[int, int]:
        estimate = committee(**options).estimate(train=100, classes=3, before=None)
        return len(estimate.trainings), sum(each.batch * each.count for each in estimate.passes)

    plain = work()
    measured = work(priors="measured")
    assert measured[0] == plain[0] + 3 and measured[1] > plain[1]
    assert work(init="easiest")[1] > work(init="noise")[1]


def test_a_run_with_these_options_works(source: Source, make_context: MakeContext) -> None:
    made = run(committee(relabel={"batch_norm": "batch"}), make_context(**TRAIN), source)
    assert made.soft is not None and made.soft.attributes["batch_norm"] == "batch"
