import gzip
import struct

import numpy as np
import pytest

from distill.data import config_class, open_source, plan
from distill.errors import DamagedDataError, InputError, UnsafeFileError
from distill.progress import NullProgress

N = 30
IMAGES = np.random.default_rng(0).integers(0, 256, (N, 5, 4), dtype=np.uint8)
LABELS = (np.arange(N) % 3).astype(np.uint8)


@pytest.fixture(params=["-idx", "-idx.gz", ".idx"])
def folder(request, tmp_path, write_idx):
    """The four files in each spelling; the test split is the first 6 images."""
    spelling = request.param
    for stem, n in (("train", N), ("t10k", 6)):
        for kind, array in (("images-idx3", IMAGES[:n]), ("labels-idx1", LABELS[:n])):
            name = f"{stem}-{kind}-ubyte"
            name = name.replace("-idx", ".idx") if spelling.startswith(".") else name
            write_idx(tmp_path / (name + (".gz" if spelling.endswith("gz") else "")), array)
    return tmp_path


@pytest.fixture
def four(tmp_path, write_idx):
    """Four plain files; returns paths by short name."""
    paths = {
        "x": write_idx(tmp_path / "train-images-idx3-ubyte", IMAGES),
        "y": write_idx(tmp_path / "train-labels-idx1-ubyte", LABELS),
    }
    write_idx(tmp_path / "t10k-images-idx3-ubyte", IMAGES[:6])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS[:6])
    return paths


def open_idx(progress, **options):
    return open_source(config_class("idx")(**{"valid": 0.0, **options}), seed=0, progress=progress)


def test_every_spelling_gives_the_arrays(folder, progress):
    source = open_idx(progress, folder=str(folder))
    np.testing.assert_array_equal(source.train.images[:, 0].numpy(), IMAGES)
    assert source.train.labels.tolist() == LABELS.tolist()
    assert len(source.test) == 6
    assert source.classes == ("0", "1", "2")


def test_plan_reads_headers(folder):
    planned = plan(config_class("idx")(folder=str(folder)))
    assert (planned.image_shape, planned.train, planned.test) == ((1, 5, 4), N, 6)
    assert planned.classes == len(
        open_source(config_class("idx")(folder=str(folder)), seed=0, progress=NullProgress()).classes
    )


def test_explicit_paths_and_names(tmp_path, write_idx, progress):
    write_idx(tmp_path / "x", IMAGES)
    write_idx(tmp_path / "y.gz", LABELS)
    pair = [str(tmp_path / "x"), str(tmp_path / "y.gz")]
    source = open_idx(progress, train=pair, test=pair, class_names=["a", "b", "c"], classes=["c"])
    assert source.classes == ("c",)
    assert len(source.train) == 10
    relative = open_idx(progress, folder=str(tmp_path), train=["x", "y.gz"], test=["x", "y.gz"])
    assert len(relative.train) == N


def test_missing_file_lists_the_spellings(tmp_path, progress):
    with pytest.raises(
        InputError, match=r"train-images-idx3-ubyte, train-images-idx3-ubyte\.gz, train-images\.idx3"
    ):
        open_idx(progress, folder=str(tmp_path))


def test_no_folder_and_no_files(progress):
    with pytest.raises(InputError, match=r"data\.folder"):
        open_idx(progress)


def cut(raw):
    return raw[:-7]


def lengthened(raw):
    return raw + b"\0"


def wrong_magic(raw):
    return struct.pack(">I", 0x0D03) + raw[4:]


def header_only(raw):
    return raw[:9]


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("fault", [cut, lengthened, wrong_magic, header_only])
@pytest.mark.parametrize("which", ["x", "y"])
def test_damaged_files_are_named(four, progress, fault, gzipped, which):
    raw = fault(four[which].read_bytes())
    four[which].write_bytes(gzip.compress(raw) if gzipped else raw)
    with pytest.raises(DamagedDataError, match=four[which].name):
        open_idx(progress, folder=str(four["x"].parent))


def test_truncated_gzip(four, progress):
    four["x"].write_bytes(gzip.compress(four["x"].read_bytes())[:-20])
    with pytest.raises(DamagedDataError, match="truncated or damaged"):
        open_idx(progress, folder=str(four["x"].parent))


def test_a_flipped_byte_in_gzip_fails_its_checksum(four, progress):
    raw = bytearray(gzip.compress(four["x"].read_bytes(), compresslevel=0))
    raw[200] ^= 1
    four["x"].write_bytes(bytes(raw))
    with pytest.raises(DamagedDataError, match="CRC"):
        open_idx(progress, folder=str(four["x"].parent))


def test_images_and_labels_of_different_number(four, progress, write_idx):
    write_idx(four["y"], LABELS[:-1])
    with pytest.raises(DamagedDataError, match=f"{N - 1} labels for {N} images"):
        open_idx(progress, folder=str(four["x"].parent))


def test_a_header_that_claims_terabytes_is_refused_before_allocating(four, progress):
    four["x"].write_bytes(struct.pack(">4I", 0x0803, 2**31, 2**10, 2**10) + b"\0" * 100)
    with pytest.raises(UnsafeFileError, match="far larger than the file"):
        open_idx(progress, folder=str(four["x"].parent))


def test_label_beyond_the_class_names(four, progress):
    with pytest.raises(DamagedDataError, match="label 2 at row 2"):
        open_idx(progress, folder=str(four["x"].parent), class_names=["a", "b"])
