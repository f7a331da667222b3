import struct
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data import config_class, files, open_source, plan
from distill.errors import DamagedDataError, DistillError, InputError, UnsafeFileError

N = 30
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (N, 5, 4, 3), dtype=np.uint8)  # nhwc
LABELS = np.arange(N) % 3
KINDS = ["npz", "compressed", "npy", "h5"]


def save(folder, kind, **arrays):
    """Write the arrays in one of the containers; returns what data.path should be."""
    if kind == "npy":
        folder = folder / "arrays"
        folder.mkdir(exist_ok=True)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        return folder
    if kind == "h5":
        with h5py.File(folder / "data.h5", "w") as file:
            for name, array in arrays.items():
                file.create_dataset(name, data=array, compression="gzip", shuffle=True, fletcher32=True)
        return folder / "data.h5"
    (np.savez if kind == "npz" else np.savez_compressed)(folder / "data.npz", **arrays)
    return folder / "data.npz"


def open_arrays(path, progress, **options):
    config = config_class("arrays")(path=str(path), **{"valid": 0.0, **options})
    return open_source(config, seed=0, progress=progress)


def standard(**changes):
    arrays = {"x_train": COLOUR, "y_train": LABELS, "x_test": COLOUR[:6], "y_test": LABELS[:6]}
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container(tmp_path, progress, kind):
    source = open_arrays(save(tmp_path, kind, **standard()), progress)
    np.testing.assert_array_equal(source.train.images.numpy(), COLOUR.transpose(0, 3, 1, 2))
    assert source.train.images.is_contiguous()
    assert source.train.labels.tolist() == LABELS.tolist()
    assert len(source.test) == 6
    assert source.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", KINDS)
def test_many_blocks_equal_one(tmp_path, progress, kind, monkeypatch):
    path = save(tmp_path, kind, **standard())
    whole = open_arrays(path, progress)
    monkeypatch.setattr("distill.data.rows.blocks.__kwdefaults__", {"block_bytes": 130})
    assert open_arrays(path, progress).train.fingerprint == whole.train.fingerprint


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_fortran_order(tmp_path, progress, kind):
    source = open_arrays(save(tmp_path, kind, **standard(x_train=np.asfortranarray(COLOUR))), progress)
    np.testing.assert_array_equal(source.train.images.numpy(), COLOUR.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("array", "layout", "shape"),
    [
        (COLOUR, None, (3, 5, 4)),
        (COLOUR.transpose(0, 3, 1, 2), None, (3, 5, 4)),
        (COLOUR[..., 0], None, (1, 5, 4)),
        (COLOUR[..., :1], None, (1, 5, 4)),
        (COLOUR[:, :3, :, :], "nhwc", (3, 3, 4)),
        (COLOUR[:, :3, :, :], "nchw", (3, 4, 3)),
        (COLOUR.repeat(2, axis=3), "nhwc", (6, 5, 4)),
        (COLOUR[..., 0], "nhw", (1, 5, 4)),
    ],
)
def test_layouts(tmp_path, progress, array, layout, shape):
    path = save(tmp_path, "npz", **standard(x_train=array, x_test=array[:6]))
    source = open_arrays(path, progress, layout=layout)
    assert source.image_shape == shape
    images = source.train.images.numpy()
    back = images[:, 0] if array.ndim == 3 else images
    back = back.transpose(0, 2, 3, 1) if back.ndim == 4 and back.shape != array.shape else back
    if layout != "nchw":
        np.testing.assert_array_equal(back.reshape(array.shape), array)
    assert plan(config_class("arrays")(path=str(path), layout=layout)).image_shape == shape


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (COLOUR[:, :3], r"cannot be told[^$]*data\.layout"),
        (COLOUR.repeat(2, axis=3), r"cannot be told[^$]*data\.layout"),
        (COLOUR.reshape(N, -1), "these are not images"),
    ],
)
def test_unclear_layouts(tmp_path, progress, array, match):
    with pytest.raises(InputError, match=match):
        open_arrays(save(tmp_path, "npz", **standard(x_train=array)), progress)


def test_layout_of_other_dimensions(tmp_path, progress):
    with pytest.raises(InputError, match="the layout does not fit"):
        open_arrays(save(tmp_path, "npz", **standard()), progress, layout="nhw")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_zero_to_one(tmp_path, progress, kind, dtype):
    path = save(
        tmp_path, kind, **standard(x_train=(COLOUR / 255).astype(dtype), x_test=np.ones((6, 5, 4, 3), dtype))
    )
    source = open_arrays(path, progress)
    np.testing.assert_array_equal(source.train.images.numpy(), COLOUR.transpose(0, 3, 1, 2))
    assert source.test.images.unique().tolist() == [255]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_counted_and_located(tmp_path, progress, kind, value):
    floats = (COLOUR / 255).astype(np.float32)
    floats[7, 1, 2, 0] = floats[9, 0, 0, :2] = value
    with pytest.raises(DamagedDataError, match=r"3 pixels are NaN or infinite[^$]*image 7"):
        open_arrays(save(tmp_path, kind, **standard(x_train=floats)), progress)


@pytest.mark.parametrize("array", [COLOUR.astype(np.float32), COLOUR / 255.0 - 0.5])
def test_floats_outside_zero_to_one(tmp_path, progress, array):
    with pytest.raises(InputError, match=r"must lie in \[0, 1\]"):
        open_arrays(save(tmp_path, "npz", **standard(x_train=array)), progress)


@pytest.mark.parametrize("dtype", [np.int64, np.uint16, np.int8, bool])
def test_other_pixel_types(tmp_path, progress, dtype):
    with pytest.raises(InputError, match=r"uint8 in 0\.\.255, or floats"):
        open_arrays(save(tmp_path, "npz", **standard(x_train=COLOUR.astype(dtype))), progress)


def test_names_and_hdf5_groups(tmp_path, progress):
    with h5py.File(tmp_path / "data.hdf5", "w") as file:
        file["train/images"], file["train/labels"] = COLOUR, LABELS[:, None].astype(np.uint16)
    source = open_arrays(
        tmp_path / "data.hdf5",
        progress,
        x_train="train/images",
        y_train="train/labels",
        class_names=["a", "b", "c"],
    )
    assert source.classes == ("a", "b", "c")
    assert (len(source.train), len(source.test)) == (24, 6)
    assert "6 of 30 images are the test split, the same for every seed" in source.notes


@pytest.mark.parametrize("kind", KINDS)
def test_without_test_arrays_a_share_is_cut(tmp_path, progress, kind):
    path = save(tmp_path, kind, x_train=COLOUR, y_train=LABELS)
    source = open_arrays(path, progress, test=0.4)
    assert np.bincount(source.test.labels).tolist() == [4, 4, 4]
    planned = plan(config_class("arrays")(path=str(path), test=0.4))
    assert (planned.train, planned.test, planned.image_shape) == (18, 12, (3, 5, 4))


def test_plan_with_test_arrays(tmp_path):
    planned = plan(config_class("arrays")(path=str(save(tmp_path, "npz", **standard()))))
    assert (planned.classes, planned.train, planned.test) == (None, N, 6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x_train", "y_train"])
def test_missing_arrays_list_what_is_there(tmp_path, progress, kind, name):
    path = save(tmp_path, kind, other=LABELS, **standard(**{name: None}))
    with pytest.raises(InputError, match=rf"there is no array '{name}'[^$]*other"):
        open_arrays(path, progress)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x_test", "y_test"])
def test_half_a_test_split(tmp_path, progress, kind, name):
    with pytest.raises(InputError, match="one of the two test arrays is missing"):
        open_arrays(save(tmp_path, kind, **standard(**{name: None})), progress)


def test_share_beside_test_arrays_is_refused(tmp_path, progress):
    with pytest.raises(InputError, match=r"data\.test"):
        open_arrays(save(tmp_path, "npz", **standard()), progress, test=0.2)


def test_test_names_that_are_not_there(tmp_path, progress):
    path = save(tmp_path, "npz", x_train=COLOUR, y_train=LABELS)
    with pytest.raises(InputError, match=r"data\.x_test"):
        open_arrays(path, progress, x_test="images")


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (LABELS[:-1], DamagedDataError, "29 labels for 30 images"),
        (np.where(LABELS == 1, -1, LABELS), DamagedDataError, "label -1 at row 1"),
        (np.where(np.arange(N) == 4, 10**9, LABELS), DamagedDataError, "label 1000000000 at row 4"),
        (LABELS.astype(float), InputError, "labels must be class numbers"),
        (np.eye(3, dtype=int)[LABELS], InputError, "labels must be class numbers"),
        (np.where(LABELS == 1, 2, LABELS), InputError, "class '1' has no training image"),
    ],
)
def test_bad_labels(tmp_path, progress, labels, error, match):
    with pytest.raises(error, match=match):
        open_arrays(save(tmp_path, "npz", **standard(y_train=labels)), progress)


def test_test_label_unknown_to_train(tmp_path, progress):
    with pytest.raises(DamagedDataError, match="label 3 at row 0"):
        open_arrays(save(tmp_path, "npz", **standard(y_test=LABELS[:6] + 3)), progress)


def test_no_such_file_and_other_kinds(tmp_path, progress):
    with pytest.raises(InputError, match=r"data\.path: no such file"):
        open_arrays(tmp_path / "nowhere.npz", progress)
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(InputError, match="not a file of arrays"):
        open_arrays(tmp_path / "data.csv", progress)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_truncated_files(tmp_path, progress, kind, share):
    path = save(tmp_path, kind, **standard())
    file = path / "x_train.npy" if kind == "npy" else path
    raw = file.read_bytes()
    file.write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(DamagedDataError, match=file.name):
        open_arrays(path, progress)


@pytest.mark.parametrize("kind", ["npz", "compressed", "h5"])
def test_a_flipped_byte_fails_the_checksum(tmp_path, progress, kind):
    path = save(tmp_path, kind, **standard())
    raw = bytearray(path.read_bytes())
    if kind == "h5":
        with h5py.File(path) as file:
            position = file["x_train"].id.get_chunk_info(0).byte_offset + 100
    else:
        position = raw.index(b"x_train.npy") + 400
    raw[position] ^= 0x10
    path.write_bytes(bytes(raw))
    with pytest.raises(DamagedDataError, match=path.name):
        open_arrays(path, progress)


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_pickled_objects_are_never_loaded(tmp_path, progress, kind):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    objects = np.empty(N, dtype=object)
    objects[:] = [Bomb() for _ in range(N)]
    with pytest.raises(UnsafeFileError, match="pickled Python objects"):
        open_arrays(save(tmp_path, kind, **standard(y_train=objects)), progress)


def npy_header(shape):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_headers_that_claim_more_than_there_is(tmp_path, progress, kind):
    path = save(tmp_path, "npy", **standard())
    (path / "x_train.npy").write_bytes(npy_header((2**30, 1024, 1024)) + bytes(100))
    if kind == "npz":
        with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
            for file in path.iterdir():
                archive.write(file, file.name)
        path = tmp_path / "data.npz"
    with pytest.raises(DamagedDataError, match="by its header"):
        open_arrays(path, progress)


def test_a_header_that_is_no_python_text(tmp_path, progress):
    path = save(tmp_path, "npy", **standard())
    raw = (path / "y_train.npy").read_bytes()
    for damaged in (raw.replace(b"'shape': (", b"'shape': ((", 1), raw.replace(b"{'descr'", b"('descr'", 1)):
        (path / "y_train.npy").write_bytes(damaged)
        with pytest.raises(DamagedDataError, match=r"y_train\.npy"):
            open_arrays(path, progress)


@pytest.mark.parametrize("kind", ["compressed", "h5"])
def test_data_far_larger_than_their_file(tmp_path, progress, kind, monkeypatch):
    monkeypatch.setattr(files, "_HARMLESS_BYTES", 1000)
    zeros = np.zeros((1000, 64, 64), dtype=np.uint8)
    path = save(tmp_path, kind, **standard(x_train=zeros, y_train=np.arange(1000) % 3))
    with pytest.raises(UnsafeFileError, match="far larger than the file"):
        open_arrays(path, progress)


def hostile_hdf5(folder, fault):
    """A file whose x_train does what `fault` says."""
    secret = folder / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["x"] = COLOUR
        file["group/x_train"] = COLOUR
    (folder / "secret.raw").write_bytes(COLOUR.tobytes())
    path = folder / "data.h5"
    with h5py.File(path, "w") as file:
        file["y_train"], file["x_test"], file["y_test"] = LABELS, COLOUR[:6], LABELS[:6]
        if fault == "external link":
            file["x_train"] = h5py.ExternalLink(str(secret), "/x")
        elif fault == "external link on the way":
            file["group"] = h5py.ExternalLink(str(secret), "/group")
        elif fault == "soft link":
            file["x_train"] = h5py.SoftLink("/x_test")
        elif fault == "external storage":
            file.create_dataset(
                "x_train", COLOUR.shape, "u1", external=[(str(folder / "secret.raw"), 0, COLOUR.nbytes)]
            )
        elif fault == "virtual":
            layout = h5py.VirtualLayout(COLOUR.shape, "u1")
            layout[:] = h5py.VirtualSource(str(secret), "x", COLOUR.shape)
            file.create_virtual_dataset("x_train", layout)
        elif fault == "text":
            file["x_train"] = ["a", "b"]
        elif fault == "compound":
            file["x_train"] = np.zeros(N, dtype=[("a", "u1"), ("b", "f4")])
        elif fault == "references":
            file.create_dataset("x_train", (N,), dtype=h5py.ref_dtype)
        elif fault == "no shape":
            file["x_train"] = h5py.Empty("u1")
        elif fault == "foreign filter":
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_chunk((5, 5, 4, 3))
            properties.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
            space = h5py.h5s.create_simple(COLOUR.shape)
            h5py.h5d.create(file.id, b"x_train", h5py.h5t.STD_U8LE, space, properties)
        else:
            file.create_dataset("x_train", (2**40, 28, 28), "u1", chunks=(1, 28, 28))
    return path


@pytest.mark.parametrize(
    "fault",
    [
        "external link",
        "external link on the way",
        "soft link",
        "external storage",
        "virtual",
        "text",
        "compound",
        "references",
        "no shape",
        "foreign filter",
        "shape bomb",
    ],
)
def test_hostile_hdf5_is_refused(tmp_path, progress, fault):
    name = "group/x_train" if fault.endswith("on the way") else "x_train"
    with pytest.raises(UnsafeFileError, match=r"data\.h5"):
        open_arrays(hostile_hdf5(tmp_path, fault), progress, x_train=name)


def test_a_group_is_no_array(tmp_path, progress):
    path = save(tmp_path, "h5", **standard())
    for name in ("x_train/x", "/", "..", "nothing/at/all"):
        with pytest.raises(InputError, match="there is no array"):
            open_arrays(path, progress, x_train=name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), kind=st.sampled_from(KINDS))
def test_any_changed_byte_is_read_or_refused_but_never_crashes(tmp_path, progress, place, value, kind):
    path = save(tmp_path, kind, x_train=COLOUR, y_train=LABELS)
    file = path / "y_train.npy" if kind == "npy" else path
    raw = bytearray(file.read_bytes())
    raw[int(place * len(raw))] = value
    file.write_bytes(bytes(raw))
    try:
        source = open_arrays(path, progress)
    except DistillError:
        return
    assert len(source.train) + len(source.test) == N
