import gzip
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data import config_class, open_source, plan, shards, webdataset
from distill.data.shards import read_samples
from distill.errors import DamagedDataError, DistillError, InputError, UnsafeFileError
from distill.progress import NullProgress


@pytest.fixture
def samples(encode, picture):
    """samples(first, count, classes=3): members of `count` samples, labels counting round."""

    def samples(first, count, classes=3):
        members = {}
        for number in range(first, first + count):
            members[f"{number:05}.png"] = encode(picture(number))
            members[f"{number:05}.cls"] = f"{number % classes}\n".encode()
        return members

    return samples


@pytest.fixture
def folder(tmp_path, write_tar, samples):
    """Two training shards (one gzipped) of 12 and 9 samples, one test shard of 6."""
    write_tar(tmp_path / "train-000.tar", samples(0, 12))
    write_tar(tmp_path / "train-001.tar.gz", samples(12, 9))
    write_tar(tmp_path / "test.tgz", samples(100, 6))
    return tmp_path


def open_shards(progress, **options):
    config = config_class("webdataset")(**{"valid": 0.0, **options})
    return open_source(config, seed=0, progress=progress)


def all_samples(shard):
    return list(read_samples(shard, want=lambda _: True))


def test_shards_in_order_plain_and_gzipped(folder, progress, picture):
    source = open_shards(progress, folder=str(folder))
    expected = np.stack([picture(number).transpose(2, 0, 1) for number in range(21)])
    np.testing.assert_array_equal(source.train.images.numpy(), expected)
    assert source.train.labels.tolist() == [number % 3 for number in range(21)]
    assert len(source.test) == 6
    assert source.classes == ("0", "1", "2")
    assert source.notes == ()


def test_subset_and_cap_decode_only_what_is_used(folder, progress, picture):
    source = open_shards(progress, folder=str(folder), classes=[2, 1], cap=4)
    assert progress.tasks["decode training"][0] == len(source.train) == 8
    by_pixels = {picture(number).transpose(2, 0, 1).tobytes(): number for number in range(21)}
    numbers = [by_pixels[image.numpy().tobytes()] for image in source.train.images]
    assert numbers == sorted(numbers)
    assert source.train.labels.tolist() == [{2: 0, 1: 1}[number % 3] for number in numbers]


def test_explicit_lists_and_patterns(folder, progress):
    shards = [str(folder / "train-001.tar.gz"), str(folder / "train-000.*")]
    source = open_shards(progress, train=shards, test=[str(folder / "test.tgz")])
    assert source.train.labels.tolist()[:2] == [0, 1]
    assert len(source.train) == 21
    same = open_shards(progress, folder=str(folder), train=["train-001.tar.gz", "train-000.*"])
    assert same.train.fingerprint == source.train.fingerprint


def test_names_of_classes(folder, progress):
    (folder / "classes.txt").write_text("ant\nbee\n\ncow\n")
    assert open_shards(progress, folder=str(folder)).classes == ("ant", "bee", "cow")
    named = open_shards(progress, folder=str(folder), class_names=["x", "y", "z"], classes=["z"])
    assert named.classes == ("z",)
    with pytest.raises(DamagedDataError, match="label 2"):
        open_shards(progress, folder=str(folder), class_names=["x", "y"])


def test_val_serves_as_test_and_is_told(folder, progress):
    (folder / "test.tgz").rename(folder / "val.tgz")
    source = open_shards(progress, folder=str(folder))
    assert len(source.test) == 6
    assert "val*" in source.notes[0]


def test_share_as_test(folder, progress):
    (folder / "test.tgz").unlink()
    source = open_shards(progress, folder=str(folder), test=0.3)
    assert np.bincount(source.test.labels).tolist() == [2, 2, 2]
    assert len(source.train) == 15


@pytest.mark.parametrize("missing", ["train", "test"])
def test_missing_shards(folder, progress, missing):
    for path in folder.glob(f"{missing}*"):
        path.unlink()
    with pytest.raises(InputError, match=r"there are no (training|test) shards"):
        open_shards(progress, folder=str(folder))


def test_no_folder_and_no_match(progress, tmp_path):
    with pytest.raises(InputError, match="nothing says where the shards are"):
        open_shards(progress)
    with pytest.raises(InputError, match=r"data\.train: no shard matches"):
        open_shards(progress, train=[str(tmp_path / "*.tar")], test=0.5)


def test_plan_counts_small_shards(folder):
    planned = plan(config_class("webdataset")(folder=str(folder), class_names=["a", "b", "c"]))
    source = open_shards(NullProgress(), folder=str(folder), class_names=["a", "b", "c"])
    trained = len(source.train) + len(source.valid)
    assert (planned.classes, planned.image_shape) == (3, (3, 6, 6))
    assert (planned.train, planned.test) == (trained, len(source.test))
    capped = plan(config_class("webdataset")(folder=str(folder), cap=2))
    assert (capped.classes, capped.train) == (3, 6)


def test_plan_of_large_shards_looks_at_the_first_sample(folder, monkeypatch):
    monkeypatch.setattr(webdataset, "_COUNTED_BYTES", 0)
    planned = plan(config_class("webdataset")(folder=str(folder), cap=2, class_names=["a", "b", "c"]))
    assert (planned.classes, planned.image_shape, planned.train, planned.test) == (3, (3, 6, 6), 6, None)
    unknown = plan(config_class("webdataset")(folder=str(folder)))
    assert (unknown.classes, unknown.train) == (None, None)


def test_keys_folders_and_other_members(tmp_path, write_tar, encode, picture):
    image = encode(picture(0))
    shard = write_tar(
        tmp_path / "train.tar",
        {
            "a/1.CLS": b"4",
            "a/1.jpg": image,
            "a/1.json": b"{}",
            "a/2.seg.png": b"?",
            "b/1.webp": image,
            "b/1.cls": b"0",
        },
    )
    found = [(sample.key, sample.label, sample.image_name) for sample in all_samples(shard)]
    assert found == [("a/1", 4, "a/1.jpg"), ("b/1", 0, "b/1.webp")]


def test_images_are_read_where_wanted(folder):
    found = list(read_samples(folder / "train-000.tar", want=lambda position: position in (1, 4)))
    assert [position for position, sample in enumerate(found) if sample.image] == [1, 4]


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({"1.png": b"", "2.png": b"", "2.cls": b"0"}, "1.png without 1.cls"),
        ({"1.cls": b"0", "2.png": b"", "2.cls": b"0"}, "1.cls without an image"),
        ({"1.png": b"", "1.cls": b"0", "2.png": b""}, "2.png without 2.cls"),
        ({"1.png": b"", "1.jpg": b"", "1.cls": b"0"}, "two images"),
        ({"1.cls": b"0", "1.CLS": b"0", "1.png": b""}, "two labels"),
    ],
)
def test_unpaired_members(tmp_path, write_tar, members, found):
    shard = write_tar(tmp_path / "train.tar", members)
    with pytest.raises(DamagedDataError, match=found) as caught:
        all_samples(shard)
    assert str(shard) in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"cat", b"-1", b"1.0", b"9" * 30, b"0" * 100])
def test_labels_that_are_no_numbers(tmp_path, write_tar, text):
    shard = write_tar(tmp_path / "train.tar", {"1.png": b"", "1.cls": text})
    with pytest.raises(DamagedDataError, match=r"member 1\.cls"):
        all_samples(shard)


@pytest.mark.parametrize("name", ["train.tar", "train.tar.gz"])
def test_truncation_anywhere_names_shard_and_member(tmp_path, write_tar, samples, name):
    shard = write_tar(tmp_path / name, samples(0, 3))
    whole = shard.read_bytes()
    # A tar ends with zero blocks; the last of them are padding that nothing needs.
    ends = [*range(0, len(whole), 97)] if name.endswith("gz") else [*range(0, 3 * 2048 + 1, 256)]
    for end in ends:
        shard.write_bytes(whole[:end])
        with pytest.raises(DamagedDataError, match="truncated or damaged") as caught:
            all_samples(shard)
        assert str(shard) in str(caught.value)
        assert "near member" in str(caught.value)


def test_truncation_names_the_member_reached(tmp_path, write_tar, samples, progress):
    write_tar(tmp_path / "test.tar", samples(0, 3))
    shard = write_tar(tmp_path / "train.tar", samples(0, 3))
    shard.write_bytes(shard.read_bytes()[: 4 * 1024 + 600])  # each sample takes two headers and two blocks
    with pytest.raises(DamagedDataError, match=r"train\.tar: [^$]*near member 00002\.png"):
        open_shards(progress, folder=str(tmp_path))


def test_a_damaged_header_is_not_the_end(tmp_path, write_tar, samples):
    shard = write_tar(tmp_path / "train.tar", samples(0, 3))
    raw = bytearray(shard.read_bytes())
    raw[2 * 1024 + 3] ^= 0xFF
    shard.write_bytes(bytes(raw))
    with pytest.raises(DamagedDataError, match="bad checksum"):
        all_samples(shard)


def test_concatenated_gzip_is_read_to_the_end(tmp_path, write_tar, samples):
    shard = write_tar(tmp_path / "train.tar", samples(0, 5))
    raw = shard.read_bytes()
    shard.write_bytes(gzip.compress(raw[:3000]) + gzip.compress(raw[3000:]))
    assert len(all_samples(shard)) == 5


def test_not_a_tar(tmp_path):
    shard = tmp_path / "train.tar"
    shard.write_bytes(b"hello" * 300)
    with pytest.raises(DamagedDataError, match=r"train\.tar"):
        all_samples(shard)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    shard = tmp_path / "train.tar"
    with tarfile.open(shard, "w") as tar:
        info = tarfile.TarInfo("1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UnsafeFileError, match=r"member 1\.png"):
        all_samples(shard)


@pytest.mark.parametrize("name", ["1.png", "1.json"])
def test_members_of_absurd_size_are_refused(tmp_path, name):
    shard = tmp_path / "train.tar"
    info = tarfile.TarInfo(name)
    info.size = 2**40
    shard.write_bytes(info.tobuf() + bytes(1024))
    with pytest.raises(UnsafeFileError, match="1099511627776 bytes"):
        all_samples(shard)


def test_extended_headers_of_absurd_size_are_refused(tmp_path):
    shard = tmp_path / "train.tar"
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 2**33
    shard.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    with pytest.raises(DamagedDataError, match="an extended header of 8589934592 bytes"):
        all_samples(shard)


def test_long_names_are_read(tmp_path, write_tar, encode, picture):
    key = "long/" * 60 + "name"
    shard = write_tar(tmp_path / "train.tar", {f"{key}.png": encode(picture(0)), f"{key}.cls": b"1"})
    assert all_samples(shard)[0].key == key


def test_shards_that_change_between_labels_and_images(folder, progress, monkeypatch, write_tar, samples):
    passes = []

    def shrinking(shard, *, want):
        passes.append(shard)
        if len(passes) > 3:  # the labels of three shards are read
            write_tar(folder / "test.tgz", samples(100, 4))
        return read_samples(shard, want=want)

    monkeypatch.setattr("distill.data.webdataset.read_samples", shrinking)
    with pytest.raises(DamagedDataError, match="changed while they were read"):
        open_shards(progress, folder=str(folder))


def test_broken_images_name_shard_and_member(folder, progress, write_tar, samples):
    write_tar(folder / "train-000.tar", {**samples(0, 9), "00001.png": b"broken"})
    with pytest.raises(DamagedDataError, match=r"train-000\.tar:00001\.png"):
        open_shards(progress, folder=str(folder))


SMALL = io.BytesIO()
with tarfile.open(fileobj=SMALL, mode="w") as _tar:
    for _name, _data in (("1.png", b"pixels"), ("1.cls", b"3"), ("2.png", b"more"), ("2.cls", b"0")):
        _info = tarfile.TarInfo(_name)
        _info.size = len(_data)
        _tar.addfile(_info, io.BytesIO(_data))


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 4095), value=st.integers(0, 255), gzipped=st.booleans())
def test_any_changed_byte_is_read_or_refused_but_never_crashes(tmp_path_factory, position, value, gzipped):
    raw = SMALL.getvalue()[:5120]
    raw = bytearray(gzip.compress(raw, mtime=0) if gzipped else raw)
    raw[position % len(raw)] = value
    shard = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    shard.write_bytes(bytes(raw))
    try:
        found = all_samples(shard)
    except DistillError:
        return
    assert all(sample.label is not None and sample.image is not None for sample in found)


def test_reading_keeps_no_list_of_members(folder, monkeypatch):
    held = []
    original = shards._check_member

    def watching(member, shard):
        held.append(member)
        original(member, shard)

    opened = []
    real = tarfile.open
    monkeypatch.setattr(shards.tarfile, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    monkeypatch.setattr(shards, "_check_member", watching)
    all_samples(folder / "train-000.tar")
    assert len(held) == 24
    assert len(opened[0].members) <= 1
