"""What all sources share, shown on pixels made here: subsets, caps, cuts, notes and their errors."""

import pytest
import torch

from distill.data import config_class, open_source, plan
from distill.data.base import DataConfig, Plan
from distill.data.build import Found, PixelRows, build_source, images_found
from distill.data.decode import PixelFormat
from distill.data.statistics import channel_statistics, fingerprint
from distill.errors import DamagedDataError, InputError

NAMES = ("ant", "bee", "cow")


def rows(sizes, *, channels=1, first=0):
    """`sizes[c]` images of each class, interleaved; image i is filled with the value first + i."""
    labels = torch.tensor([number for i in range(max(sizes)) for number, n in enumerate(sizes) if i < n])
    values = (first + torch.arange(len(labels))).to(torch.uint8)
    images = values[:, None, None, None].expand(-1, channels, 4, 4).contiguous()
    return PixelRows(labels, "made here", images)


def build(progress, train, test=None, *, names=NAMES, seed=0, pixel_format=None, notes=(), **options):
    settings = {"wanted": None, "cap": None, "valid": 0.0, "bad_images": 0.0, **options}
    found = Found(train, test if test is not None else rows([2, 2, 2], first=200), names, notes)
    return build_source(
        "made", found, pixel_format=pixel_format or PixelFormat(), seed=seed, progress=progress, **settings
    )


def values(split):
    """The value that each image is filled with: who it is."""
    return split.images[:, 0, 0, 0].tolist()


def test_everything_is_used_without_options(progress):
    train = rows([5, 6, 7])
    images, labels = train.images.clone(), train.labels.clone()
    source = build(progress, train)
    assert source.train.images.equal(images)
    assert source.train.labels.equal(labels)
    assert source.train.fingerprint == fingerprint(images, labels)
    assert (source.mean, source.std) == channel_statistics(images)
    assert source.classes == NAMES
    assert len(source.valid) == 0
    assert source.notes == ()
    assert source.without_test().held_out is None
    assert progress.notes == ["made: 3 classes of 1 x 4 x 4 images; 18 train, 0 valid, 6 test"]


@pytest.mark.parametrize("test", [None, 0.2])
@pytest.mark.parametrize("options", [{}, {"cap": 3}, {"wanted": ["bee"]}, {"valid": 0.5}])
def test_notes_tell_how_many_images_were_found_where_any_were_left_out(progress, test, options):
    notes = build(progress, rows([10, 20, 30]), test, notes=("1 of 9 is none of these",), **options).notes
    assert images_found(notes) == (60 if test or "cap" in options or "wanted" in options else None)


def test_valid_is_a_share_of_each_class_of_train(progress):
    source = build(progress, rows([10, 20, 30]), valid=0.1)
    assert torch.bincount(source.valid.labels).tolist() == [1, 2, 3]
    assert torch.bincount(source.train.labels).tolist() == [9, 18, 27]
    assert sorted(values(source.train) + values(source.valid)) == list(range(60))
    labels = rows([10, 20, 30]).labels
    for split in (source.train, source.valid):
        assert split.labels.tolist() == [int(labels[value]) for value in values(split)]
        assert values(split) == sorted(values(split))


def test_valid_follows_the_seed_and_test_does_not(progress):
    sources = [build(progress, rows([30, 30, 30]), 0.2, valid=0.2, seed=seed) for seed in (0, 0, 1)]
    assert values(sources[0].valid) == values(sources[1].valid) != values(sources[2].valid)
    assert values(sources[0].test) == values(sources[1].test) == values(sources[2].test)


@pytest.mark.parametrize("test", [None, 0.2])
def test_rows_are_numbers_in_the_data_as_found(progress, test):
    """The n-th image is filled with n, whatever was left out on the way."""
    source = build(progress, rows([10, 20, 30]), test, wanted=["cow", "ant"], cap=8, valid=0.25)
    splits = [source.train, source.valid, *([source.test] if test else [])]
    for split in splits:
        assert split.rows.tolist() == values(split)
    assert source.test.rows.tolist() == [value - (0 if test else 200) for value in values(source.test)]
    assert source.train.fingerprint == fingerprint(source.train.images, source.train.labels)


def test_statistics_are_those_of_train_after_the_cut(progress):
    source = build(progress, rows([10, 20, 30]), valid=0.3)
    assert (source.mean, source.std) == channel_statistics(source.train.images)


def test_test_cut_is_told_and_disjoint(progress):
    source = build(progress, rows([10, 20, 30]), 0.2)
    assert torch.bincount(source.test.labels).tolist() == [2, 4, 6]
    assert sorted(values(source.train) + values(source.test)) == list(range(60))
    assert source.notes == ("12 of 60 images are the test split, the same for every seed",)


def test_test_cut_ignores_cap_and_subset(progress):
    whole = build(progress, rows([10, 20, 30]), 0.2)
    part = build(progress, rows([10, 20, 30]), 0.2, cap=3, wanted=["cow", "ant"])
    assert set(values(part.test)) <= set(values(whole.test))
    assert not set(values(part.train)) & set(values(whole.test))


def test_cap_takes_at_most_that_many_a_class_and_tells(progress):
    source = build(progress, rows([2, 20, 30]), cap=5)
    assert torch.bincount(source.train.labels).tolist() == [2, 5, 5]
    assert "12 of 52 training images used" in source.notes
    assert "12 of 52 training images used" in progress.notes
    larger = build(progress, rows([2, 20, 30]), cap=9)
    assert set(values(source.train)) < set(values(larger.train))


def test_cap_follows_the_seed(progress):
    picks = [values(build(progress, rows([20, 20, 30]), cap=5, seed=seed).train) for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]


def test_cap_includes_valid(progress):
    source = build(progress, rows([20, 20, 20]), cap=10, valid=0.2)
    assert torch.bincount(source.train.labels).tolist() == [8, 8, 8]
    assert torch.bincount(source.valid.labels).tolist() == [2, 2, 2]


def test_subset_is_renumbered_in_the_given_order_and_told(progress):
    source = build(progress, rows([4, 5, 6]), wanted=["cow", 0])
    assert source.classes == ("cow", "ant")
    assert torch.bincount(source.train.labels).tolist() == [6, 4]
    original = rows([4, 5, 6]).labels
    new = {2: 0, 0: 1}
    assert source.train.labels.tolist() == [new[int(original[value])] for value in values(source.train)]
    assert set(source.notes) == {"10 of 15 training images used", "4 of 6 test images used"}


def test_a_subset_may_leave_out_an_empty_class(progress):
    with pytest.raises(InputError, match="class 'bee' has no training image"):
        build(progress, rows([4, 0, 6]))
    assert build(progress, rows([4, 0, 6]), wanted=["ant", "cow"]).classes == ("ant", "cow")


def test_numbers_name_the_classes_where_nothing_else_does(progress):
    source = build(progress, rows([4, 5, 6]), names=None, wanted=[2, "0"])
    assert source.classes == ("2", "0")


def test_a_class_left_without_training_image_by_valid(progress):
    with pytest.raises(InputError, match=r"class 'ant' has no training image[^$]*data\.valid"):
        build(progress, rows([1, 9, 9]), valid=0.6)


@pytest.mark.parametrize("which", ["train", "test"])
def test_label_out_of_range(progress, which):
    good, bad = rows([3, 3, 3]), rows([3, 3, 3, 3])
    parts = (bad, good) if which == "train" else (good, bad)
    with pytest.raises(DamagedDataError, match="label 3 at row 3"):
        build(progress, *parts)


def test_test_label_unknown_to_train(progress):
    with pytest.raises(DamagedDataError, match="label 3 at row 3"):
        build(progress, rows([3, 3, 3]), rows([1, 1, 1, 1]), names=None)


@pytest.mark.parametrize("label", [-1, 10**12])
def test_absurd_labels(progress, label):
    train = rows([3, 3, 3])
    train.labels[4] = label
    with pytest.raises(DamagedDataError, match=f"label {label} at row 4"):
        build(progress, train, names=None)


@pytest.mark.parametrize("which", ["training", "test"])
def test_nothing_there(progress, which):
    nothing = PixelRows(
        torch.empty(0, dtype=torch.int64), "here", torch.empty((0, 1, 4, 4), dtype=torch.uint8)
    )
    parts = (nothing, rows([1, 1, 1])) if which == "training" else (rows([1, 1, 1]), nothing)
    with pytest.raises(InputError, match=f"there is no {which} image"):
        build(progress, *parts)


def test_no_test_image_left_by_the_subset(progress):
    with pytest.raises(InputError, match="no test image is left"):
        build(progress, rows([3, 3, 3]), rows([3, 3, 0]), wanted=["cow"])


def test_a_class_without_test_image_is_told(progress):
    source = build(progress, rows([3, 3, 3]), rows([3, 3, 0]))
    assert source.notes == ("no test image of 1 of 3 classes: cow",)


def test_train_and_test_of_different_shapes(progress):
    with pytest.raises(InputError, match=r"differ[^$]*data\.resize"):
        build(progress, rows([3, 3, 3]), rows([1, 1, 1], channels=3))


def test_format_applies_to_pixels(progress):
    source = build(
        progress, rows([3, 3, 3], channels=3), rows([1, 1, 1]), pixel_format=PixelFormat("rgb", (8, 6))
    )
    assert source.image_shape == (3, 8, 6)
    assert source.test.images.shape == (3, 3, 8, 6)
    assert values(source.train) == list(range(9))


def test_channels_of_images_that_are_neither_grey_nor_rgb(progress):
    with pytest.raises(InputError, match=r"data\.channels"):
        build(progress, rows([3, 3, 3], channels=5), pixel_format=PixelFormat("rgb"))


def test_notes_of_the_source_come_first(progress):
    source = build(progress, rows([3, 3, 3]), notes=("found so",), cap=2)
    assert source.notes == ("found so", "6 of 9 training images used")


def test_plan_applies_the_options():
    config = config_class("digits")(resize=[16, 12], channels="rgb", classes=[1, 2], cap=7)
    assert plan(config) == Plan(classes=2, image_shape=(3, 16, 12), train=14, test=359)
    assert plan(config).image_bytes == (14 + 359) * 3 * 16 * 12
    assert Plan().image_bytes is None


def test_unknown_data_name():
    with pytest.raises(InputError, match="did you mean 'digits'"):
        config_class("digit")


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 0},
        {"resize": [8]},
        {"resize": [8, 8, 8]},
        {"resize": 100_000},
        {"channels": "gray"},
        {"classes": []},
        {"classes": [1.5]},
        {"cap": 0},
        {"valid": 1.0},
        {"valid": -0.1},
        {"bad_images": 1.5},
        {"shuffle": True},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DataConfig(name="digits", **options)


def test_opening_twice_gives_the_same_source(progress):
    config = config_class("digits")(cap=20)
    first, again = (open_source(config, seed=3, progress=progress) for _ in range(2))
    for split in ("train", "valid", "test"):
        assert getattr(first, split).fingerprint == getattr(again, split).fingerprint
    assert open_source(config, seed=4, progress=progress).train.fingerprint != first.train.fingerprint
    assert len(first.train) + len(first.valid) == 200
