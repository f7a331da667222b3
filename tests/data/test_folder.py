import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data import config_class, open_source, plan
from distill.data.folder import Folder, FolderConfig
from distill.data.statistics import split_of
from distill.errors import DamagedDataError, InputError


@pytest.fixture
def make(tmp_path, encode, picture):
    """make({"train/cat": 3, ...}): that many images in each folder; returns the folder above."""

    def make(counts):
        for place, count in counts.items():
            (tmp_path / place).mkdir(parents=True)
            for number in range(count):
                file = tmp_path / place / f"{number:03}.png"
                file.write_bytes(encode(picture(len(place) * 1000 + number)))
        return tmp_path

    return make


def open_folder(folder, progress, *, seed=0, **options):
    config = config_class("folder")(folder=str(folder), **{"valid": 0.0, **options})
    return open_source(config, seed=seed, progress=progress)


def test_train_and_test_folders(make, progress, picture):
    folder = make({"train/dog": 4, "train/cat": 3, "test/cat": 2, "test/dog": 1})
    source = open_folder(folder, progress)
    assert source.classes == ("cat", "dog")
    assert source.train.labels.tolist() == [0] * 3 + [1] * 4
    assert source.test.labels.tolist() == [0, 0, 1]
    expected = [picture(len("train/cat") * 1000 + number).transpose(2, 0, 1) for number in range(3)]
    np.testing.assert_array_equal(source.train.images[:3].numpy(), expected)
    assert source.notes == ()


def test_class_folders_alone_are_cut(make, progress):
    source = open_folder(make({"cat": 10, "dog": 20}), progress)
    assert np.bincount(source.test.labels).tolist() == [2, 4]
    assert "6 of 30 images are the test split, the same for every seed" in source.notes
    half = open_folder(make({}), progress, test=0.5)
    assert np.bincount(half.test.labels).tolist() == [5, 10]


def test_val_serves_as_test_and_is_told(make, progress):
    folder = make({"train/cat": 2, "train/dog": 2, "val/cat": 1, "val/dog": 1})
    source = open_folder(folder, progress)
    assert len(source.test) == 2
    assert "the folder val is the test split: there is no folder test" in source.notes
    make({"test/cat": 3, "test/dog": 1})
    source = open_folder(folder, progress)
    assert len(source.test) == 4
    assert "the folder val is not used" in source.notes


def test_nested_hidden_and_other_files(make, progress, encode, picture):
    folder = make({"cat": 3, "dog": 5})
    make({"cat/a/deep": 2, ".hidden": 1, "dog/.thumbnails": 4})
    (folder / "cat" / "._001.png").write_bytes(b"resource fork")
    (folder / "cat" / "README.txt").write_text("mine")
    (folder / "cat" / "LOUD.PNG").write_bytes(encode(picture(0)))
    source = open_folder(folder, progress)
    assert source.classes == ("cat", "dog")
    assert (np.bincount(source.train.labels) + np.bincount(source.test.labels)).tolist() == [6, 5]
    assert any(note.startswith("1 files without an image suffix ignored") for note in source.notes)


def test_order_is_that_of_sorted_paths(tmp_path, encode, progress):
    names = ["b.png", "a/z.png", "a.png", "B.png", "a/b.png"]
    for number, name in enumerate(names):
        file = tmp_path / "train" / "only" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(np.full((2, 2), number, np.uint8)))
    (tmp_path / "test" / "only").mkdir(parents=True)
    (tmp_path / "test" / "only" / "x.png").write_bytes(encode(np.zeros((2, 2), np.uint8)))
    images = open_folder(tmp_path, progress).train.images
    found = [names[int(value)] for value in images[:, 0, 0, 0]]
    assert found == ["B.png", "a.png", "a/b.png", "a/z.png", "b.png"]


# Sorted as text, as bytes and folder by folder, these are in different orders: - . / follow each other in ASCII,
# the last name is no UTF-8 (a surrogate in text, before U+E000; the greatest of bytes).
AWKWARD = [
    "é.png",
    "e.png",
    "E.png",
    "a/b.png",
    "a-b.png",
    "a.png",
    "a/é/z.png",
    "𝒳.png",
    "\ue000.png",
    "10.png",
    "9.png",
]
AWKWARD += [os.fsdecode(b"\xff.png")] if sys.platform == "linux" else []


def reference_paths(split):
    """Slow and obvious: `Path` objects, sorted class by class by their text."""
    folders = sorted(folder for folder in split.iterdir() if folder.is_dir())
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*.png"), key=lambda path: path.relative_to(folder).as_posix())
    ]


def test_order_and_fingerprint_are_those_of_the_reference(tmp_path, encode, progress):
    value = 0
    for place in ("train/zebra", "train/Zoo", "train/ñandú", "test/ñandú", "test/zebra"):
        for name in AWKWARD:
            file = tmp_path / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(np.full((2, 2), value, np.uint8)))
            value += 1
    found = Folder(FolderConfig(folder=str(tmp_path))).find(progress)
    source = open_folder(tmp_path, progress)
    assert found.classes == source.classes == ("Zoo", "zebra", "ñandú")
    for name, rows, split in (("train", found.train, source.train), ("test", found.test, source.test)):
        paths = reference_paths(tmp_path / name)
        assert [os.fsencode(path) for path in paths] != sorted(map(os.fsencode, paths))
        items = list(rows.items(torch.arange(len(paths))))
        assert [item.payload for item in items] == paths
        assert [item.name for item in items] == [str(path) for path in paths]
        grey = [np.full((1, 2, 2), int(one_value(path)), np.uint8) for path in paths]
        labels = torch.tensor(
            [found.classes.index(path.relative_to(tmp_path / name).parts[0]) for path in paths]
        )
        assert split.fingerprint == split_of(torch.from_numpy(np.stack(grey)), labels).fingerprint


def one_value(path):
    """The pixel value of an image of one colour."""
    with Image.open(path) as image:
        return image.getpixel((0, 0))


@pytest.mark.parametrize("classes", [1, 20])
def test_listing_costs_few_bytes_a_file(tmp_path, progress, classes):
    files = 20_000
    places = [tmp_path / split / f"{number:02}" for split in ("train", "test") for number in range(classes)]
    for place in places:
        place.mkdir(parents=True)
        (place / "0.png").touch()
    for row in range(files):
        (tmp_path / "train" / f"{row % classes:02}" / f"{row:08}.png").touch()
    length = len("00/00000000.png")
    tracemalloc.start()
    found = Folder(FolderConfig(folder=str(tmp_path))).find(progress)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.train.labels) == files + classes
    assert peak / files - length < 100


def test_empty_class_is_named(make, progress):
    with pytest.raises(InputError, match=r"class 'dog' is empty"):
        open_folder(make({"cat": 3, "dog": 0}), progress)


def test_empty_test_class_is_named(make, progress):
    folder = make({"train/cat": 3, "train/dog": 3, "test/cat": 1, "test/dog": 0})
    with pytest.raises(InputError, match=r"test/dog: class 'dog' is empty"):
        open_folder(folder, progress)


def test_a_missing_test_class_is_told(make, progress):
    source = open_folder(make({"train/cat": 3, "train/dog": 3, "test/cat": 1}), progress)
    assert source.notes == ("no test image of 1 of 2 classes: dog",)


def test_test_class_unknown_to_train(make, progress):
    with pytest.raises(InputError, match="class 'owl' has test images but no training folder"):
        open_folder(make({"train/cat": 3, "test/cat": 1, "test/owl": 1}), progress)


def test_no_such_folder(tmp_path, progress):
    with pytest.raises(InputError, match=r"data\.folder: no such folder"):
        open_folder(tmp_path / "nowhere", progress)


def test_no_class_folder(tmp_path, progress):
    with pytest.raises(InputError, match="no class folder"):
        open_folder(tmp_path, progress)


def test_share_beside_a_test_folder_is_refused(make, progress):
    with pytest.raises(InputError, match=r"data\.test: the data bring their own"):
        open_folder(make({"train/cat": 3, "test/cat": 1}), progress, test=0.2)


def test_bad_images_beyond_the_rate(make, progress):
    folder = make({"train/cat": 9, "train/dog": 10, "test/cat": 1, "test/dog": 1})
    (folder / "train" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(DamagedDataError, match=r"broken\.jpg"):
        open_folder(folder, progress)
    source = open_folder(folder, progress, bad_images=0.1)
    assert np.bincount(source.train.labels).tolist() == [9, 10]
    assert "19 of 20 training images used, 1 cannot be decoded" in source.notes
    assert "broken.jpg" in progress.warnings[0]
    rows = torch.cat([source.train.rows, source.valid.rows]).sort().values
    assert rows.tolist() == [*range(9), *range(10, 20)], "broken.jpg is row 9: it sorts behind the numbers"


def test_a_class_whose_images_are_all_bad(make, progress):
    folder = make({"train/cat": 0, "train/dog": 9, "test/dog": 1})
    (folder / "train" / "cat" / "broken.jpg").write_bytes(b"")
    with pytest.raises(InputError, match="class 'cat' has no training image"):
        open_folder(folder, progress, bad_images=0.5)


def test_only_the_images_used_are_decoded(make, progress):
    source = open_folder(make({"cat": 20, "dog": 20, "owl": 20}), progress, cap=3, classes=["owl", "cat"])
    assert progress.tasks["decode training"][0] == len(source.train) == 6


def test_plan_counts_files_and_opens_one(make):
    folder = make({"train/cat": 4, "train/dog": 3, "test/cat": 2})
    planned = plan(config_class("folder")(folder=str(folder), resize=4))
    assert (planned.classes, planned.image_shape, planned.train, planned.test) == (2, (3, 4, 4), 7, 2)


def test_plan_of_class_folders_counts_the_cut(make, progress):
    folder = make({"cat": 10, "dog": 20})
    planned = plan(config_class("folder")(folder=str(folder)))
    source = open_folder(folder, progress)
    assert (planned.train, planned.test) == (len(source.train), len(source.test))
    assert planned.image_shape == source.image_shape
