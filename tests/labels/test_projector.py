"""Labels by a projector: what is stored, that students get the labels of what is stored, and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from distill.cache.teachers import checkpoint_epochs
from distill.contracts import Context, DistilledSet, Source, Split
from distill.errors import DamagedDataError, InputError
from distill.labels.codecs import check, is_stored, label_bytes
from distill.labels.labelling import view_labels, with_labels
from distill.labels.pool import PoolTeacher, open_pool
from distill.labels.projection import Projection
from distill.labels.projector import check_encoder, encoder_bytes, open_projector
from distill.labels.projector_fit import weak_teachers
from distill.labels.relabel import Relabelling
from distill.labels.set_teachers import set_teachers
from distill.labels.view_labels import OnlineLabels, StoredLabels
from distill.models.encoders import EncoderConfig, behind, open_encoder, outline
from distill.selection import materialise
from distill.store.reader import read_set
from distill.store.writer import write_set
from distill.training.batches import DeviceImages, PlannedViews
from distill.training.job import Pool
from tests.distillers.test_soft_label import selection

pytest.importorskip("timm")

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")
ENCODER = "timm/test_resnet"
TRAIN = {"epochs": 3, "batch_size": 4, "augment": "crop", "mix": "cutmix"}
TEACHERS = [
    PoolTeacher.model_validate(
        {"model": {"name": "convnet", "width": 4, "norm": "batch"}, "train": {"epochs": 4, "batch_size": 12}}
    )
]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a tiny encoder, whose batch norms are not what they are at initialisation."""
    module = outline(EncoderConfig(name=ENCODER)).body
    generator = torch.Generator().manual_seed(5)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.copy_(0.1 * torch.randn(part.running_mean.shape, generator=generator))
    path = tmp_path_factory.mktemp("weights") / "encoder.pt"
    torch.save(module.state_dict(), path)
    return path


@pytest.fixture
def rgb(source: Source) -> Source:
    """The tiny source with three channels."""

    def three(split: Split) -> Split:
        images = split.images[:, :1].expand(-1, 3, -1, -1).contiguous()
        images[:, 1] = images[:, 0] // 2
        return Split(images, split.labels, f"{split.fingerprint} rgb")

    return replace(
        source.without_test(),
        train=three(source.train),
        valid=three(source.valid),
        mean=(0.4,) * 3,
        std=(0.3,) * 3,
    )


def projection(weights: Path, **options: Any) -> Projection:
    encoder = {"name": ENCODER, "weights": str(weights), "size": 16, **options.pop("encoder", {})}
    options = {key: tuple(value) if key == "layers" else value for key, value in options.items()}
    quick = {"conv_rank": 2, "head_rank": 2, "steps": 6, "batch_size": 8, "lr": 0.01}
    return Projection.model_validate({"encoder": encoder, **quick, **options})


def labelled(ctx: Context, source: Source, how: Projection) -> DistilledSet:
    plain = materialise(selection(list(range(12))), source, ctx.train)
    networks = open_pool(ctx, source, TEACHERS, checkpoints=how.checkpoints)
    relabelling = Relabelling(projector=how)
    relabelling.check(ctx.train, classes=len(source.classes))
    return with_labels(ctx, source, plain, TEACHERS, networks, (1.0,), relabelling, temperature=4.0)


def said(ctx: Context, source: Source, made: DistilledSet, **options: Any) -> torch.Tensor:
    """The labels of all views, in the plan's order."""
    labels = view_labels(ctx, source, made, **options)
    assert labels is not None
    images = DeviceImages(Pool(made.images, made.labels, made.preprocessing), CPU)
    views, ready = PlannedViews(labels.plan, images), labels.on(CPU)
    return torch.cat(
        [
            ready.batch(epoch, start, *views.batch(epoch, start))[0]
            for epoch in range(labels.plan.epochs)
            for start in views.starts
        ]
    )


def test_a_set_stores_the_adapter_and_the_encoders_sha256(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path
) -> None:
    made = labelled(make_context(**TRAIN), rgb, projection(weights))
    soft = made.soft
    assert soft is not None and soft.codec == "projector" and not is_stored(soft)
    check(soft, images=12, classes=len(rgb.classes))
    assert list(soft.arrays) == ["adapter"]
    assert label_bytes(soft) == soft.arrays["adapter"].nbytes
    data = weights.read_bytes()
    told = soft.attributes["projector"]
    assert told["projection"]["encoder"]["sha256"] == hashlib.sha256(data).hexdigest()
    assert str(weights) not in str(soft.attributes)
    assert encoder_bytes(soft) == len(data)
    path = tmp_path / "set.h5"
    write_set(made, path)
    again = read_set(path)
    assert again.soft is not None
    np.testing.assert_array_equal(again.soft.arrays["adapter"], soft.arrays["adapter"])


def test_labels_are_those_of_what_is_stored(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path
) -> None:
    """From the cache, from the adapter and the file in another cache, and by hand; bit by bit the first two."""
    ctx = make_context(**TRAIN)
    made = labelled(ctx, rgb, projection(weights))
    first = said(ctx, rgb, made)
    write_set(made, tmp_path / "set.h5")
    again = read_set(tmp_path / "set.h5")
    other = make_context(**TRAIN)
    with pytest.raises(InputError, match="not at hand") as caught:
        said(other, rgb, again)
    assert "--encoder" in str(caught.value)
    assert torch.equal(said(other, rgb, again, encoder=weights), first)
    assert torch.equal(said(other, rgb, again), first)  # it is kept now
    assert torch.equal(said(ctx, rgb, made, students=2), first)  # asked once


def test_labels_that_students_share_are_asked_once(
    rgb: Source, make_context: MakeContext, weights: Path
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, rgb, projection(weights))
    assert isinstance(view_labels(ctx, rgb, made), OnlineLabels)
    assert isinstance(view_labels(ctx, rgb, made, students=2), StoredLabels)


def test_without_a_step_it_is_the_nearest_class_mean(
    rgb: Source, make_context: MakeContext, weights: Path
) -> None:
    """s and b apart, g is the cosine to the set's class means about their mean, by the encoder as it came."""
    ctx = make_context(**TRAIN)
    made = labelled(ctx, rgb, projection(weights, steps=1, lr=1e-30))
    network = open_projector(ctx, rgb, made)
    how = EncoderConfig(name=ENCODER, weights=str(weights), size=16)
    encoder, mean, std = open_encoder(how), *behind_tensors(how)
    with torch.no_grad():
        features = F.normalize(encoder((made.images.float() / 255 - mean) / std), dim=1)
    classes = range(len(rgb.classes))
    means = torch.stack([features[made.labels == number].mean(dim=0) for number in classes])
    wanted = features @ F.normalize(means - means.mean(dim=0), dim=1).T
    with torch.no_grad():
        logits = network.module(CPU)((made.images.float() / 255 - mean) / std)
    slope = (logits[1] - logits[0]) / (wanted[1] - wanted[0])
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-2, atol=1e-2)


def behind_tensors(how: EncoderConfig) -> tuple[torch.Tensor, torch.Tensor]:
    told = behind(how)
    return torch.tensor(told.mean)[:, None, None], torch.tensor(told.std)[:, None, None]


def test_the_fit_comes_nearer_to_the_teachers(rgb: Source, make_context: MakeContext, weights: Path) -> None:
    """On the views of the set, which it was not fitted to."""
    ctx = make_context(**TRAIN)
    networks = open_pool(ctx, rgb, TEACHERS)
    errors = []
    for steps in (1, 200):
        fresh = make_context(**TRAIN)
        made = labelled(fresh, rgb, projection(weights, steps=steps, lr=0.02, class_weight=0.0))
        online = Relabelling(labels="online")
        plain = replace(made, soft=None)
        theirs = with_labels(fresh, rgb, plain, TEACHERS, networks, (1.0,), online, temperature=4.0)
        errors.append(float((said(fresh, rgb, made) - said(fresh, rgb, theirs)).square().mean()))
    assert errors[1] < 0.8 * errors[0]


def test_an_interrupted_fit_gives_the_same_bytes(
    rgb: Source, make_context: MakeContext, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.labels import projector_fit as room

    whole = labelled(make_context(**TRAIN), rgb, projection(weights))
    monkeypatch.setattr(room, "_SAVE_SECONDS", -1.0)
    ctx, loss, calls = make_context(**TRAIN), room.Fit._loss, []

    def interrupted(self: Any, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(room.Fit, "_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            labelled(ctx, rgb, projection(weights))
    monkeypatch.setattr(room.Fit, "_calibrate", lambda *_: pytest.fail("began anew"))
    again = labelled(ctx, rgb, projection(weights))
    assert whole.soft is not None and again.soft is not None
    np.testing.assert_array_equal(again.soft.arrays["adapter"], whole.soft.arrays["adapter"])


def test_seeded_matrices_are_not_stored(rgb: Source, make_context: MakeContext, weights: Path) -> None:
    both = labelled(make_context(**TRAIN), rgb, projection(weights))
    ctx = make_context(**TRAIN)
    one = labelled(ctx, rgb, projection(weights, learn_down=False))
    assert both.soft is not None and one.soft is not None
    assert label_bytes(one.soft) < 0.7 * label_bytes(both.soft)
    assert said(ctx, rgb, one).isfinite().all()


def test_weak_teachers_are_networks_along_the_training(
    rgb: Source, make_context: MakeContext, weights: Path
) -> None:
    ctx = make_context(**TRAIN)
    assert checkpoint_epochs(TEACHERS[0].train, 4) == (1, 2, 3)
    assert checkpoint_epochs(TEACHERS[0].train, 1) == checkpoint_epochs(None, 4) == ()
    networks = open_pool(ctx, rgb, TEACHERS, checkpoints=4)
    weak, shares = weak_teachers(networks, (1.0,), [(1, 2, 3)])
    assert shares == (0.25,) * 4
    assert len({network.identity["weights"] for network in weak}) == 4
    assert weak[-1].identity == networks[0].identity
    made = labelled(ctx, rgb, projection(weights, checkpoints=4))
    assert said(ctx, rgb, made).isfinite().all()


def test_random_images_are_labelled_by_the_projector(
    rgb: Source, make_context: MakeContext, weights: Path
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, rgb, projection(weights))
    teachers = set_teachers(ctx, rgb, made)
    pool = teachers.label(Pool(made.images, made.labels, made.preprocessing))
    assert isinstance(pool.views, OnlineLabels)
    assert teachers.ensemble.names == (f"projector on {ENCODER} at 16 px",)


# --- what is refused


def test_a_file_of_another_sha256(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path
) -> None:
    wrong = projection(weights, encoder={"sha256": "0" * 64})
    with pytest.raises(DamagedDataError, match="another sha256"):
        wrong.check(rgb.image_shape)
    made_in = make_context(**TRAIN)
    made = labelled(made_in, rgb, projection(weights))
    changed = tmp_path / "changed.pt"
    state = torch.load(weights, weights_only=True)
    name = next(name for name in state if name.endswith("weight"))
    torch.save({**state, name: state[name] + 1}, changed)
    for ctx in (make_context(**TRAIN), made_in):  # whether the projector is in the cache or not
        with pytest.raises(DamagedDataError, match="not the weights of the encoder"):
            open_projector(ctx, rgb, made, encoder=changed)


def test_an_adapter_for_another_encoder(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path
) -> None:
    """The set says one encoder, and its adapter was made for another; or has other layers."""
    made = labelled(make_context(**TRAIN), rgb, projection(weights))
    other = labelled(make_context(**TRAIN), rgb, projection(weights, conv_rank=1))
    assert made.soft is not None and other.soft is not None
    mixed = replace(made, soft=replace(made.soft, arrays=other.soft.arrays))
    ctx = make_context(**TRAIN)
    with pytest.raises(InputError, match="another encoder"):
        open_projector(ctx, rgb, mixed, encoder=weights)
    changed = tmp_path / "changed.pt"
    state = torch.load(weights, weights_only=True)
    torch.save({name: value * 1 for name, value in reversed(state.items())}, changed)
    told = dict(made.soft.attributes["projector"])
    told["projection"] = {
        **told["projection"],
        "encoder": {
            **told["projection"]["encoder"],
            "sha256": hashlib.sha256(changed.read_bytes()).hexdigest(),
        },
    }
    moved = replace(made, soft=replace(made.soft, attributes={**made.soft.attributes, "projector": told}))
    told["bytes"] = changed.stat().st_size
    with pytest.raises(InputError, match="belongs to something else"):
        open_projector(ctx, rgb, moved, encoder=changed)


@pytest.mark.parametrize(
    ("options", "told", "where"),
    [
        ({"start": "text"}, "no text tower", "start"),
        ({"layers": ["nothing.*"]}, "fits the pattern", "layers"),
        ({"encoder": {"weights": None}}, "are not there", "encoder.weights"),
        ({"encoder": {"weights": "nowhere.pt"}}, "nowhere.pt: no such file", "encoder.weights"),
    ],
    ids=str,
)
def test_what_cannot_be_fitted_is_refused_before_work(
    rgb: Source, weights: Path, options: dict[str, Any], told: str, where: str | None
) -> None:
    with pytest.raises(InputError, match=told) as caught:
        projection(weights, **options).check(rgb.image_shape)
    assert where is None or caught.value.where == where


def test_grey_images_are_refused(weights: Path) -> None:
    with pytest.raises(InputError, match="takes RGB images"):
        projection(weights).check((1, 8, 8))


@pytest.mark.parametrize(
    "options",
    [{"labels": "online"}, {"codec": {"name": "topk"}}, {"batch_norm": "batch"}, {"calibration": {}}],
    ids=str,
)
def test_options_of_other_labels_are_refused(
    weights: Path, options: dict[str, Any], make_context: MakeContext
) -> None:
    how = Relabelling.model_validate({"projector": projection(weights), **options})
    with pytest.raises(InputError, match="a projector labels as students train") as caught:
        how.check(make_context(**TRAIN).train, classes=3)
    assert caught.value.where == next(iter(options))


@pytest.mark.parametrize("name", ["", "other", "two"])
def test_wrong_arrays_are_damage(name: str, rgb: Source, make_context: MakeContext, weights: Path) -> None:
    made = labelled(make_context(**TRAIN), rgb, projection(weights))
    assert made.soft is not None
    adapter = made.soft.arrays["adapter"]
    arrays: dict[str, Any] = {"": {}, "other": {"other": adapter}, "two": {"adapter": adapter[None]}}[name]
    with pytest.raises(DamagedDataError, match="wrong arrays"):
        check(replace(made.soft, arrays=arrays), images=12, classes=3)


@pytest.mark.parametrize(
    "change",
    [
        {"projector": None},
        {"projector": {}},
        {"projector": {"projection": {"encoder": {"name": ENCODER, "sha256": None}}, "bytes": 1, "seed": 0}},
        {"projector": {"projection": {"encoder": {"name": ENCODER, "sha256": "0" * 64}}, "bytes": 10**40}},
        {"views": None},
        {"temperature": 10**400},
    ],
    ids=str,
)
def test_wrong_attributes_are_damage(
    change: dict[str, Any], rgb: Source, make_context: MakeContext, weights: Path
) -> None:
    made = labelled(make_context(**TRAIN), rgb, projection(weights))
    assert made.soft is not None
    wrong = replace(made.soft, attributes={**made.soft.attributes, **change})
    with pytest.raises(DamagedDataError):
        check(wrong, images=12, classes=3)


@pytest.mark.parametrize("trainings", [[None], [TEACHERS[0].train]], ids=["file", "four epochs"])
def test_more_weak_teachers_than_there_are(weights: Path, trainings: list[Any]) -> None:
    with pytest.raises(InputError, match="fewer networks along its training") as caught:
        Relabelling(projector=projection(weights, checkpoints=5)).check_trainings(trainings)
    assert caught.value.where == "projector.checkpoints"


def test_a_fit_goes_on_with_its_own_encoder_alone(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may change between an interruption and the next run; the recipe does not tell."""
    from distill.labels import projector_fit as room

    other = tmp_path / "encoder.pt"
    state = torch.load(weights, weights_only=True)
    torch.save({name: value * 1.01 for name, value in state.items()}, other)
    ctx = make_context(**TRAIN)
    labelled(ctx, rgb, projection(weights))
    steps: list[int] = []
    resume = room.Fit._resume
    monkeypatch.setattr(room.Fit, "_resume", lambda self: steps.append(resume(self)) or steps[-1])
    labelled(ctx, rgb, projection(other))
    assert steps == [0]


def test_decay_leaves_scale_and_bias(rgb: Source, make_context: MakeContext, weights: Path) -> None:
    ctx = make_context(**TRAIN)
    gentle, hard = (
        labelled(make_context(**TRAIN), rgb, projection(weights, weight_decay=decay, lr=1e-4))
        for decay in (0.0, 5000.0)
    )
    logits = [said(ctx, rgb, made, encoder=weights) for made in (gentle, hard)]
    torch.testing.assert_close(logits[0].mean(), logits[1].mean(), rtol=0.05, atol=0.02)


def test_text_embeddings_are_where_it_may_begin(
    rgb: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    """W is made again from the classes' names: the set stores nothing of it, and other names give other labels."""
    open_clip = pytest.importorskip("open_clip")
    from tests.models.test_encoders import TEXT, TOWERS

    described = {"embed_dim": 12, "vision_cfg": TOWERS["tiny-transformer"], "text_cfg": TEXT}
    (tmp_path / "tiny-projected.json").write_text(json.dumps(described), encoding="utf-8")
    open_clip.add_model_config(tmp_path / "tiny-projected.json")
    weights = tmp_path / "clip.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model("tiny-projected").state_dict(), weights)
    encoder = {"name": "open_clip/tiny-projected", "weights": str(weights), "size": 32}
    how = projection(weights, encoder=encoder, start="text", conv_rank=0, linear_rank=1)
    how.check(rgb.image_shape)
    ctx = make_context(**TRAIN)
    made = labelled(ctx, rgb, how)
    first = said(make_context(**TRAIN), rgb, made, encoder=weights)
    assert torch.equal(first, said(ctx, rgb, made))
    renamed = replace(made, classes=("cat", "dog", "ship"))
    assert not torch.allclose(said(make_context(**TRAIN), rgb, renamed, encoder=weights), first, atol=1e-3)


@pytest.mark.gpu
def test_a_gpu_fits_alike(rgb: Source, make_context: MakeContext, weights: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        ctx = make_context(device=device, **TRAIN)
        made = labelled(ctx, rgb, projection(weights, lr=1e-3))
        labels = view_labels(ctx, rgb, made, students=2)
        assert isinstance(labels, StoredLabels)
        found.append(torch.from_numpy(labels.soft.arrays["logits"].astype("f4")))
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"conv_rank": 0, "linear_rank": 0, "head_rank": 0}, "nothing would be adapted"),
        ({"conv_rank": 0, "linear_rank": 0, "layers": ["body.*"]}, "leave layers out"),
    ],
    ids=str,
)
def test_ranks_that_adapt_nothing(weights: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        projection(weights, **options)


def test_an_encoders_file_is_looked_at_before_data_are(
    rgb: Source, make_context: MakeContext, weights: Path, tmp_path: Path
) -> None:
    made = labelled(make_context(**TRAIN), rgb, projection(weights))
    check_encoder(made.soft, weights)
    with pytest.raises(InputError, match="cannot read") as caught:
        check_encoder(made.soft, tmp_path / "nowhere")
    assert caught.value.where == "--encoder" and "name the file" in str(caught.value)
    with pytest.raises(DamagedDataError, match="not the weights"):
        check_encoder(made.soft, Path(__file__))
    with pytest.raises(InputError, match="no public encoder labels this set"):
        check_encoder(None, weights)
