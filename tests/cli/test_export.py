"""`distill export`: originals found again and compared, links, shards, indices, and what is refused or left behind."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image

import distill
from distill.contracts import DistilledSet
from distill.data.build import Reading
from distill.data.decode import PixelFormat
from distill.data.digits import Digits
from distill.data.folder import Folder, FolderConfig
from distill.data.torchvision_sets import CIFAR10
from distill.data.webdataset import WebDataset, WebDatasetConfig
from distill.errors import InputError
from distill.exporting import staging
from distill.locks import Lock
from distill.progress import NullProgress
from distill.store.reader import read_set
from distill.store.writer import write_set

Call = Callable[..., Result]
Lines = list[dict[str, Any]]

STEPS = "steps: [{random: {ipc: 3}}]\nevaluate: {on: nothing}\n"
# Sorted by name, as `folder` reads them; several classes, folders below a class, and suffixes of both cases.
FILES = [
    *(f"train/cat/{number}.png" for number in range(9)),
    *(
        f"train/dog/{name}"
        for name in ("a/x.JPG", "a/y.jpg", "b/x.jpg", "b/z.ppm", "q.webp", "r.png", "s.png")
    ),
    *(f"train/größer/{number:03}.jpeg" for number in range(8)),
    *(f"test/{name}/0.png" for name in ("cat", "dog", "größer")),
]


def encoded(number: int, suffix: str, side: int = 12) -> bytes:
    """A file of noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG"}.get(suffix, suffix))
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images of 12 x 14 pixels."""
    for number, name in enumerate(FILES):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(number, file.suffix[1:].lower()))
    return tmp_path / "images"


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of 8 images, whose members have the same names in each."""
    root = tmp_path / "shards"
    root.mkdir()
    (root / "classes.txt").write_text("ant\nbee\n")
    for shard in range(3):
        members = {}
        for number in range(8):
            members[f"./in/{number}.jpg"] = encoded(100 * shard + number, "jpg")
            members[f"./in/{number}.cls"] = str((shard + number) % 2).encode()
        write_tar(root / f"train-{shard}.tar", members)
    return root


@pytest.fixture
def run(call: Call, tmp_path: Path) -> Callable[..., Path]:
    """run(data, out, steps): the set of a run on these data."""

    def run(data: str, out: str = "out", steps: str = STEPS) -> Path:
        (tmp_path / "r.yaml").write_text(f"seed: 3\ndata: {data}\n{steps}")
        result = call("run", "r.yaml", "--out", out, "--quiet")
        assert result.exit_code == 0, result.output
        return tmp_path / out / "set.h5"

    return run


@pytest.fixture
def chosen(run: Callable[..., Path], images: Path) -> Path:
    return run(f"{{name: folder, folder: {images}, resize: 6, valid: 0.2, cap: 7}}")


@pytest.fixture
def streamed(run: Callable[..., Path], shards: Path) -> Path:
    return run(f"{{name: webdataset, folder: {shards}, test: 0.2, resize: 6}}")


@pytest.fixture
def made_up(chosen: Path, tmp_path: Path) -> Callable[..., Path]:
    """made_up(**fields): the chosen set with other fields, elsewhere."""

    def made_up(**fields: Any) -> Path:
        path = tmp_path / "made-up.h5"
        write_set(replace(read_set(chosen), **fields), path)
        return path

    return made_up


def read_lines(file: Path) -> Lines:
    return [json.loads(line) for line in file.read_text("ascii").splitlines()]


def tree(root: Path) -> dict[str, bytes]:
    return {
        file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()
    }


def assert_refused(result: Result, *said: str, code: int = 2) -> None:
    assert result.exit_code == code, result.output
    for text in said:
        assert text in result.stderr
    assert "Traceback" not in result.stderr


def assert_nothing_left(folder: Path) -> None:
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "exported"))]


# --- a folder of images


def test_originals_are_copied_as_they_are(call: Call, chosen: Path, images: Path, tmp_path: Path) -> None:
    result = call("export", chosen, "--to", "folder", "--out", "exported")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == "exported"
    distilled, lines = read_set(chosen), read_lines(tmp_path / "exported" / "indices.jsonl")
    files = tree(tmp_path / "exported")
    assert len(lines) == len(distilled) == 9 and len(files) == 10
    for number, line in enumerate(lines):
        original = images / line["path"]
        assert files[line["file"]] == original.read_bytes()
        assert line["path"] == FILES[line["row"]]
        assert line["class"] == original.relative_to(images).parts[1] == line["file"].split("/")[0]
        assert line["class"] == distilled.classes[line["label"]]
        assert original.name == line["file"].split("/")[1] or line["file"].startswith(f"dog/~{number:08d}.")


def test_indices_are_the_sets_in_its_order(call: Call, chosen: Path, tmp_path: Path) -> None:
    assert call("export", chosen, "--to", "indices", "--out", "new/exported.jsonl").exit_code == 0
    lines = read_lines(tmp_path / "new" / "exported.jsonl")
    distilled = read_set(chosen)
    selection = distilled.selection
    assert selection is not None and selection.rows is not None
    assert [line["index"] for line in lines] == selection.indices.tolist()
    assert [line["row"] for line in lines] == selection.rows.tolist()
    assert [line["label"] for line in lines] == distilled.labels.tolist()
    assert np.array([line["weight"] for line in lines], np.float32).tolist() == selection.weights.tolist()
    assert np.array([line["score"] for line in lines], np.float32).tolist() == selection.scores.tolist()
    assert [line["path"] for line in lines] == [FILES[row] for row in selection.rows]
    assert not [path for path in (tmp_path / "new").iterdir() if path.name != "exported.jsonl"]


def test_weights_have_the_digits_of_a_float32_and_infinite_scores_are_null(
    call: Call, made_up: Callable[..., Path], chosen: Path, tmp_path: Path
) -> None:
    selection = read_set(chosen).selection
    assert selection is not None
    weights = np.array([0.1, 1.9, *[1] * 7], np.float32)
    scores = np.array([np.inf, np.nan, 1 / 3, *[0] * 6], np.float32)
    path = made_up(selection=replace(selection, weights=weights, scores=scores))
    assert call("export", path, "--to", "indices", "--out", "exported", "--pixels").exit_code == 0
    lines = read_lines(tmp_path / "exported")
    assert [line["weight"] for line in lines][:2] == [0.1, 1.9]
    assert [line["score"] for line in lines][:3] == [None, None, 0.33333334]


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_links(call: Call, chosen: Path, images: Path, tmp_path: Path, kind: str) -> None:
    assert call("export", chosen, "--to", "folder", "--out", "exported", "--link", kind).exit_code == 0
    for line in read_lines(tmp_path / "exported" / "indices.jsonl"):
        file = tmp_path / "exported" / line["file"]
        assert file.samefile(images / line["path"])
        assert file.is_symlink() == (kind == "symbolic")
        assert file.readlink().is_absolute() if kind == "symbolic" else file.stat().st_nlink == 2


def test_links_that_the_file_system_refuses(
    call: Call, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", refuse)
    result = call("export", chosen, "--to", "folder", "--out", "exported", "--link", "hard")
    assert_refused(result, "--link symbolic", os.strerror(errno.EXDEV))
    assert_nothing_left(tmp_path)


def test_the_folder_reads_back(call: Call, chosen: Path, tmp_path: Path) -> None:
    assert call("export", chosen, "--to", "folder", "--out", "exported").exit_code == 0
    found = Folder(FolderConfig(folder="exported")).find(NullProgress())
    distilled = read_set(chosen)
    assert found.classes == distilled.classes
    assert found.train.labels.bincount().tolist() == distilled.labels.bincount().tolist()
    read = found.train.take(torch.arange(9), reading=reading((6, 6)), title="").images
    assert sorted(image.numpy().tobytes() for image in read) == sorted(
        image.contiguous().numpy().tobytes() for image in distilled.images
    )


def test_an_export_is_read_whole_as_the_help_says(
    call: Call, chosen: Path, images: Path, tmp_path: Path
) -> None:
    """Otherwise splits are cut off it."""
    assert call("export", chosen, "--to", "folder", "--out", "whole/train").exit_code == 0
    shutil.copytree(images / "test", "whole/test")
    assert call("export", chosen, "--to", "webdataset", "--out", "shards").exit_code == 0
    assert call("export", chosen, "--to", "webdataset", "--out", "test").exit_code == 0
    folder = {"folder": "whole", "resize": 6, "channels": "rgb"}
    shards = {"folder": "shards", "resize": 6, "channels": "rgb"}
    for source, size in (
        (Folder(FolderConfig(**folder, valid=0)), 9),
        (Folder(FolderConfig(**folder | {"folder": "whole/train"}, valid=0)), 6),
        (WebDataset(WebDatasetConfig(**shards, test=["../test/train-000000.tar"], valid=0)), 9),
        (WebDataset(WebDatasetConfig(**shards, test=0.2, valid=0)), 6),
    ):
        assert len(source.open(seed=0, progress=NullProgress()).train) == size


def reading(size: tuple[int, int] | None = None) -> Reading:
    return Reading(PixelFormat(None, size), 0.0, NullProgress())


# --- shards


@pytest.mark.parametrize("form", [(), ("--pixels",)], ids=["originals", "pixels"])
def test_shards_read_back_in_the_order_of_the_set(
    call: Call, streamed: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    assert call("export", streamed, "--to", "webdataset", "--out", "exported", *form).exit_code == 0
    found = WebDataset(WebDatasetConfig(folder="exported", test=0.2)).find(NullProgress())
    distilled = read_set(streamed)
    assert found.classes == distilled.classes == ("ant", "bee")
    assert found.train.labels.tolist() == distilled.labels.tolist()
    read = found.train.take(torch.arange(len(distilled)), reading=reading((6, 6)), title="").images
    assert torch.equal(read, distilled.images)


def test_what_a_shard_holds(call: Call, streamed: Path, shards: Path, tmp_path: Path) -> None:
    assert call("export", streamed, "--to", "webdataset", "--out", "exported").exit_code == 0
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"train-000000.tar", "classes.txt"}
    with tarfile.open(tmp_path / "exported" / "train-000000.tar") as tar:
        members = tar.getmembers()
        contents = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in members}
    assert [member.name for member in members] == sorted(contents)
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    for number in range(6):
        told = json.loads(contents[f"{number:08d}.json"])
        shard, _, member = told["path"].partition(":")
        with tarfile.open(shards / shard) as tar:
            assert contents[f"{number:08d}.jpg"] == (tar.extractfile(member) or io.BytesIO()).read()
        assert contents[f"{number:08d}.cls"] == str(told["label"]).encode()
        assert told["row"] == 8 * int(shard[6]) + int(member[5])


def test_shards_give_the_same_bytes_in_parts_of_bounded_size(
    call: Call, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--to", "webdataset", "--shard-bytes", "10240")
    assert call("export", streamed, *options, "--out", "first").exit_code == 0
    monkeypatch.setattr("distill.data.decode._BATCH_ITEMS", 1)
    monkeypatch.setattr("distill.data.decode._processors", lambda: 3)
    assert call("export", streamed, *options, "--out", "second").exit_code == 0
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    sizes = [path.stat().st_size for path in (tmp_path / "first").glob("*.tar")]
    assert len(sizes) > 1 and max(sizes) <= 10240
    assert (
        call("export", streamed, "--to", "webdataset", "--shard-bytes", "1", "--out", "third").exit_code == 0
    )
    assert len(list((tmp_path / "third").glob("*.tar"))) == 6, "a sample too large has a shard of its own"


def test_members_of_shards_become_files(call: Call, streamed: Path, tmp_path: Path) -> None:
    """Three shards name their members alike: who comes first keeps the name."""
    assert call("export", streamed, "--to", "folder", "--out", "exported").exit_code == 0
    lines = read_lines(tmp_path / "exported" / "indices.jsonl")
    assert len({line["file"] for line in lines}) == 6
    with_rows = {line["row"]: (tmp_path / "exported" / line["file"]).read_bytes() for line in lines}
    assert with_rows == {row: encoded(100 * (row // 8) + row % 8, "jpg") for row in with_rows}


def never(*_: object, **__: object) -> None:
    raise AssertionError("this is not to happen")


@pytest.mark.parametrize("kind", ["hard", "symbolic"])
def test_links_to_what_is_no_file_are_refused_before_anything_is_read(
    call: Call, streamed: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    digits = run("{name: digits, cap: 20}", "digits")
    monkeypatch.setattr(WebDataset, "find", never)
    monkeypatch.setattr(Digits, "find", never)
    for path, said in ((streamed, "members of archives"), (digits, "pixels in arrays")):
        result = call("export", path, "--to", "folder", "--out", "linked", "--link", kind)
        assert_refused(result, "--link", said, "copy them")
        assert_nothing_left(Path())
        assert not Path("linked").exists()


def test_files_that_shards_do_not_hold_are_refused_before_any_is_decoded(
    call: Call, images: Path, run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("w.tiff", "y.BMP", "z.bmp")):
        (images / "train/dog/b" / name).write_bytes(encoded(50 + number, name[2:].lower()))
    everything = "steps: [{random: {fraction: 1}}]\nevaluate: {on: nothing}\n"
    path = run(f"{{name: folder, folder: {images}, resize: 6, valid: 0}}", "all", everything)
    monkeypatch.setattr("distill.data.decode._decode", never)
    result = call("export", path, "--to", "webdataset", "--out", "exported")
    selection = read_set(path).selection
    assert selection is not None and selection.rows is not None
    files = sorted(str(file) for file in (images / "train").rglob("*") if file.is_file())
    first = next(files[row] for row in selection.rows if files[row].endswith((".BMP", ".bmp", ".tiff")))
    assert_refused(result, first, "1 of .BMP, 1 of .bmp, 1 of .tiff", "--to folder", "--pixels")
    assert not Path("exported").exists()


def test_chosen_files_alone_must_be_of_shards_kinds(
    call: Call, images: Path, run: Callable[..., Path]
) -> None:
    path = run(f"{{name: folder, folder: {images}, resize: 6, classes: [cat, größer]}}")
    assert call("export", path, "--to", "webdataset", "--out", "exported").exit_code == 0


def test_a_stream_is_never_held_whole(
    call: Call, run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "large"
    root.mkdir()
    members: dict[str, bytes] = {}
    for number in range(48):
        members |= {f"{number:02}.png": encoded(number, "png", 256), f"{number:02}.cls": b"0"}
    write_tar(root / "train.tar", members)
    total = sum(map(len, members.values()))
    steps = "steps: [{random: {fraction: 1}}]\nevaluate: {on: nothing}\n"
    path = run(f"{{name: webdataset, folder: {root}, test: 0.05, valid: 0, resize: 6}}", "whole", steps)
    monkeypatch.setattr("distill.data.decode._BATCH_ITEMS", 1)
    monkeypatch.setattr("distill.data.decode._processors", lambda: 1)
    monkeypatch.setattr(
        "distill.data.shards._MAX_PADDING_BYTES", 2**16
    )  # a buffer, whatever the shard's size
    del members
    tracemalloc.start()
    try:
        assert call("export", path, "--to", "webdataset", "--out", "exported").exit_code == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total > 9e6 and peak < total / 3


# --- pixels


def test_arrays_are_written_as_png(call: Call, run: Callable[..., Path], tmp_path: Path) -> None:
    path = run("{name: digits, cap: 20}", steps="steps: [{kcenter: {ipc: 2}}]\nevaluate: {on: nothing}\n")
    for form in ("--originals", "--pixels"):
        out = f"exported{form}"
        assert call("export", path, "--to", "folder", "--out", out, form).exit_code == 0
        for number, line in enumerate(read_lines(tmp_path / out / "indices.jsonl")):
            assert line["path"] is None and line["file"] == f"{line['class']}/{number:08d}.png"
            pixels = np.asarray(Image.open(tmp_path / out / line["file"]))
            assert np.array_equal(pixels, read_set(path).images[number, 0].numpy())
    assert tree(tmp_path / "exported--originals") == tree(tmp_path / "exported--pixels")
    assert call("export", path, "--to", "indices", "--out", "indices").exit_code == 0
    assert {line["path"] for line in read_lines(tmp_path / "indices")} == {None}
    result = call("export", path, "--to", "indices", "--out", "again", "--originals")
    assert_refused(result, "no files", "digits")


def test_originals_in_arrays_have_their_own_size(
    call: Call, run: Callable[..., Path], tmp_path: Path
) -> None:
    path = run("{name: digits, cap: 20, resize: 4}")
    assert read_set(path).images.shape[2:] == (4, 4)
    assert call("export", path, "--to", "folder", "--out", "exported").exit_code == 0
    file = read_lines(tmp_path / "exported" / "indices.jsonl")[0]["file"]
    assert Image.open(tmp_path / "exported" / file).size == (8, 8)


def test_made_images_are_rounded_and_clamped_and_that_is_told(
    call: Call, made_up: Callable[..., Path], chosen: Path, tmp_path: Path
) -> None:
    images = read_set(chosen).images / 255
    images[0, 0, 0, 0], images[1, 2, 3, 4] = -0.1, 1.5
    path = made_up(images=images.half(), selection=None)
    result = call("export", path, "--to", "folder", "--out", "exported")
    assert result.exit_code == 0, result.output
    assert "2 of 972 lay outside 0..255" in result.stderr
    for number, line in enumerate(read_lines(tmp_path / "exported" / "indices.jsonl")):
        expected = (images[number] * 255).clamp(0, 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
        assert (
            np.abs(np.asarray(Image.open(tmp_path / "exported" / line["file"])).astype(int) - expected).max()
            <= 0
        )
        assert (line["index"], line["row"], line["weight"], line["score"]) == (None,) * 4


def test_made_images_have_no_originals(call: Call, made_up: Callable[..., Path]) -> None:
    path = made_up(selection=None)
    for options in (
        ("--to", "indices"),
        ("--to", "folder", "--originals"),
        ("--to", "folder", "--link", "hard"),
    ):
        assert_refused(call("export", path, *options, "--out", "exported"), "no selection", str(path))
    result = call("export", path, "data.folder=here", "--to", "folder", "--out", "exported")
    assert_refused(result, "no selection", "data.folder=here")


def test_images_of_two_channels_are_refused(call: Call, made_up: Callable[..., Path], chosen: Path) -> None:
    own = read_set(chosen)
    odd = replace(own.preprocessing, mean=own.preprocessing.mean[:2], std=own.preprocessing.std[:2])
    path = made_up(images=own.images[:, :2], preprocessing=odd)
    result = call("export", path, "--to", "folder", "--out", "exported", "--pixels")
    assert_refused(result, "2 channels")


# --- where the data are


def test_a_set_alone_is_told_where_the_data_are(
    call: Call, chosen: Path, images: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.h5"
    shutil.copy(chosen, alone)
    result = call("export", alone, "--to", "folder", "--out", "exported")
    assert_refused(result, "data.folder", "give data.folder=FOLDER on the command line")
    assert "add `" not in result.stderr
    images = images.rename(tmp_path / "moved")
    result = call("export", alone, f"data.folder={images}", "--to", "folder", "--out", "exported")
    assert result.exit_code == 0, result.output
    result = call("export", alone, "--to", "indices", "--out", "pathless")
    assert result.exit_code == 0 and "left out" in result.stderr
    assert {line["path"] for line in read_lines(tmp_path / "pathless")} == {None}
    result = call("export", alone, f"data.folder={images}", "--to", "indices", "--out", "paths")
    assert {line["path"] for line in read_lines(tmp_path / "paths")} <= set(FILES)
    for argument in ("--originals", "data.folder=nowhere"):
        assert_refused(call("export", alone, argument, "--to", "indices", "--out", "again"), "data.folder")


def test_a_target_that_is_not_here_is_not_asked_for(
    call: Call, made_up: Callable[..., Path], chosen: Path, images: Path
) -> None:
    """A set says that there was a target, and not where."""
    provenance = dict(read_set(chosen).provenance)
    recipe = {**provenance["recipe"], "target": {"name": "folder"}, "evaluate": {"on": "target"}}
    path = made_up(provenance={**provenance, "recipe": recipe})
    result = call("export", path, f"data.folder={images}", "--to", "folder", "--out", "exported")
    assert result.exit_code == 0, result.output


def swap(images: Path, paths: list[str]) -> None:
    a, b = (images / path for path in paths[:2])
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)


def one_more(images: Path, paths: list[str]) -> None:
    shutil.copy(images / "train/cat/8.png", images / "train/cat/-1.png")


def last_gone(images: Path, paths: list[str]) -> None:
    for file in (images / "train/größer").iterdir():
        if int(file.stem) > 0:
            file.unlink()


def no_image(images: Path, paths: list[str]) -> None:
    (images / paths[0]).write_bytes(b"nothing")


def other_size(images: Path, paths: list[str]) -> None:
    (images / paths[0]).write_bytes(encoded(0, "png", 30))


def other_class(images: Path, paths: list[str]) -> None:
    (images / "train/cat").rename(images / "train/ape")
    (images / "test/cat").rename(images / "test/ape")


@pytest.mark.parametrize("change", [swap, one_more, last_gone, no_image, other_size, other_class])
@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
def test_data_that_changed_are_refused(
    call: Call, chosen: Path, images: Path, tmp_path: Path, change: Callable[..., None], to: str
) -> None:
    assert call("export", chosen, "--to", "indices", "--out", "before").exit_code == 0
    change(images, [line["path"] for line in read_lines(tmp_path / "before")])
    result = call("export", chosen, "--to", to, "--out", "exported")
    said = "images than those" if change in (one_more, last_gone) else "not the original"
    assert_refused(result, said, "shift", "data.folder", "--pixels")
    assert_nothing_left(tmp_path)
    assert call("export", chosen, "--to", to, "--out", "exported", "--pixels").exit_code == 0


def first_gone(images: Path, paths: list[str]) -> None:
    left_out = next(name for name in FILES if name.startswith("train/cat/") and name not in paths)
    (images / left_out).unlink()


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
@pytest.mark.parametrize(
    ("change", "said"), [(first_gone, "fewer"), (one_more, "more"), (last_gone, "fewer")]
)
@pytest.mark.parametrize(
    ("options", "test", "count"),
    [
        ("cap: 7", True, "24 images"),
        ("valid: 0.2", False, "24 images"),
        ("valid: 0", True, "24 images without"),
    ],
)
def test_images_more_or_fewer_are_told_in_place_of_files_that_stayed(
    call: Call,
    run: Callable[..., Path],
    images: Path,
    tmp_path: Path,
    change: Callable[..., None],
    said: str,
    options: str,
    test: bool,
    count: str,
    to: str,
) -> None:
    """The notes tell how many there were where any were left out, else the number of training images does."""
    if not test:
        shutil.rmtree(images / "test")
    path = run(f"{{name: folder, folder: {images}, resize: 6, {options}}}")
    assert call("export", path, "--to", "indices", "--out", "before").exit_code == 0
    change(images, [line["path"] for line in read_lines(tmp_path / "before")])
    result = call("export", path, "--to", to, "--out", "exported")
    fix = "put back what was removed" if said == "fewer" else "take out what was added"
    first = f"error: {images / 'train'}: the data hold {said} images than those that the set was made from"
    assert_refused(result, first, "likely", fix, "--pixels")
    if change is not last_gone:  # whose rows have no image
        assert_refused(result, count, "23 images" if said == "fewer" else "25 images")
    assert_nothing_left(tmp_path)
    assert call("export", path, "--to", to, "--out", "exported", "--pixels").exit_code == 0


def test_files_that_could_not_be_decoded_are_no_images_more(
    call: Call, run: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    no_image(images, ["train/cat/0.png"])
    path = run(f"{{name: folder, folder: {images}, resize: 6, valid: 0, bad_images: 0.1}}")
    assert call("export", path, "--to", "indices", "--out", "before").exit_code == 0
    swap(images, [line["path"] for line in read_lines(tmp_path / "before")])
    assert_refused(call("export", path, "--to", "folder", "--out", "exported"), "not the original")


def test_another_share_for_the_test_tells_nothing_of_the_count(
    call: Call, streamed: Path, shards: Path
) -> None:
    (shards / "train-1.tar").rename(shards / "train-9.tar")
    for share in (0.2, 0.4):
        result = call("export", streamed, f"data.test={share}", "--to", "folder", "--out", "exported")
        assert_refused(result, "not the original")


def test_a_stream_that_changed_is_refused(call: Call, streamed: Path, shards: Path, tmp_path: Path) -> None:
    (shards / "train-1.tar").rename(shards / "train-9.tar")
    result = call("export", streamed, "--to", "folder", "--out", "exported")
    assert_refused(result, "not the original")
    assert_nothing_left(tmp_path)


def test_sets_of_before_rows_were_kept(call: Call, made_up: Callable[..., Path], chosen: Path) -> None:
    selection = read_set(chosen).selection
    assert selection is not None
    path = made_up(selection=replace(selection, rows=None))
    for options in (
        ("--to", "folder"),
        ("--to", "indices", "--originals"),
        ("data.folder=a", "--to", "indices"),
    ):
        assert_refused(call("export", path, *options, "--out", "exported"), "selection/rows", "--pixels")
    assert call("export", path, "--to", "indices", "--out", "indices").exit_code == 0
    assert {line["row"] for line in read_lines(Path("indices"))} == {None}
    assert call("export", path, "--to", "folder", "--out", "exported", "--pixels").exit_code == 0


# --- strangers


@pytest.fixture
def told(made_up: Callable[..., Path], chosen: Path) -> Callable[..., Path]:
    """told(**data): the chosen set, which says that it was made from other data."""

    def told(**data: Any) -> Path:
        provenance = dict(read_set(chosen).provenance)
        recipe = {**provenance["recipe"], "data": data}
        return made_up(provenance={**provenance, "recipe": recipe})

    return told


def test_nothing_is_downloaded_unasked(
    call: Call, told: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def torchvision(root: str, *, download: bool, train: bool) -> None:
        asked.append(download)
        raise RuntimeError("not found")

    monkeypatch.setattr(CIFAR10, "dataset", staticmethod(torchvision))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    path = told(name="cifar10", download=True)
    for arguments in ((), ("data.name=cifar10",)):
        result = call("export", path, *arguments, "--to", "folder", "--out", "exported")
        assert_refused(result, "downloads nothing unasked", "data.download=true", str(tmp_path / "user"))
        assert not asked and not (tmp_path / "user").exists(), "nor is a folder made for it"
    (tmp_path / "user/distill/data").mkdir(parents=True)
    result = call("export", path, "--to", "folder", "--out", "exported")
    assert_refused(result, "downloads nothing unasked", "not found")
    assert asked == [False], "what was downloaded before is read"
    result = call("export", path, "data.download=true", "--to", "folder", "--out", "exported")
    assert_refused(result, "could not be downloaded")
    assert asked == [False, True]
    assert call("export", path, "--to", "indices", "--out", "exported").exit_code == 0
    assert asked == [False, True], "their paths are not told, so they are not looked for"


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
def test_originals_are_not_blown_up(
    call: Call,
    told: Callable[..., Path],
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
) -> None:
    path = told(name="folder", resize=[4096, 6])
    monkeypatch.setattr(Folder, "find", never)
    result = call("export", path, f"data.folder={images}", "--to", to, "--out", "exported")
    assert_refused(result, "data.resize", "4096 x 6", "6 x 6", "--pixels")
    assert not Path("exported").exists()


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_class_names_cannot_leave_the_folder(
    call: Call, made_up: Callable[..., Path], tmp_path: Path, to: str
) -> None:
    before = set(tmp_path.rglob("*"))
    classes = ("../../up", str(tmp_path / "absolute"), "..")
    path = made_up(classes=classes)
    out = tmp_path / "deep" / "exported"
    assert call("export", path, "--to", to, "--out", out, "--pixels").exit_code == 0
    assert {each for each in tmp_path.rglob("*") if out not in (each, *each.parents)} - before == {
        out.parent,
        path,
    }
    if to == "folder":
        assert {each.name for each in out.iterdir() if each.is_dir()} == {
            "%2E.%2F..%2Fup",
            str(tmp_path / "absolute").replace("/", "%2F"),
            "%2E%2E",
        }
        assert {line["class"] for line in read_lines(out / "indices.jsonl")} == set(classes)


@pytest.mark.parametrize(
    "classes",
    [
        ("Train", "indices.jsonl", "dog"),
        ("a", "A", "con"),
        ("\ud800", "\x00\n", ""),
        ("x\u2028y", " y", ".z"),
    ],
    ids=ascii,
)
def test_odd_class_names_read_back_as_they_are_written(
    call: Call, made_up: Callable[..., Path], classes: tuple[str, ...]
) -> None:
    path = made_up(classes=classes)
    for to in ("folder", "webdataset"):
        result = call("export", path, "--to", to, "--out", to, "--pixels")
        assert result.exit_code == 0, result.output
    shards = WebDataset(WebDatasetConfig(folder="webdataset", test=0.2)).find(NullProgress())
    folder = Folder(FolderConfig(folder="folder")).find(NullProgress())
    assert shards.classes is not None and folder.classes is not None
    assert len(set(shards.classes)) == len(folder.classes) == 3
    assert folder.train.labels.bincount().tolist() == [3, 3, 3]
    lines = read_lines(Path("folder/indices.jsonl"))
    assert [line["class"] for line in lines] == [classes[line["label"]] for line in lines]


def test_class_names_that_cannot_be_folders_are_refused(call: Call, made_up: Callable[..., Path]) -> None:
    for classes, said in ((("a", "b", "a"), "one name"), (("a" * 300, "b", "c"), "too long")):
        path = made_up(classes=classes)
        assert_refused(
            call("export", path, "--to", "folder", "--out", "exported", "--pixels"), said, "indices"
        )
        assert not Path("exported").exists()
        assert call("export", path, "--to", "indices", "--out", said, "--pixels").exit_code == 0


def test_members_of_hostile_shards_stay_in_the_folder(
    call: Call, run: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "hostile"
    root.mkdir()
    stems = ["../../up", "/etc/passwd", "\\win", "con", "a\udc80", "x/", "C:x", "~00000001", "A", "a"]
    members: dict[str, bytes] = {}
    for number, stem in enumerate(stems):
        members |= {f"{stem}.jpg": encoded(number, "jpg"), f"{stem}.cls": b"0"}
    write_tar(root / "train.tar", members)
    everything = "steps: [{random: {fraction: 1}}]\nevaluate: {on: nothing}\n"
    path = run(f"{{name: webdataset, folder: {root}, test: 0.1, valid: 0, resize: 6}}", steps=everything)
    before = set(tmp_path.rglob("*"))
    assert call("export", path, "--to", "folder", "--out", "exported").exit_code == 0
    new = set(tmp_path.rglob("*")) - before
    lines = read_lines(tmp_path / "exported" / "indices.jsonl")
    out = tmp_path / "exported"
    assert new == {out, out / "0", out / "indices.jsonl", *(out / line["file"] for line in lines)}
    for line in lines:
        assert line["path"] == f"train.tar:{stems[line['row']]}.jpg"
        assert (out / line["file"]).read_bytes() == encoded(line["row"], "jpg")


def test_classes_without_images_are_told(call: Call, run: Callable[..., Path], images: Path) -> None:
    two = "steps: [{random: {count: 2, per_class: false}}]\nevaluate: {on: nothing}\n"
    path = run(f"{{name: folder, folder: {images}, resize: 6}}", steps=two)
    result = call("export", path, "--to", "folder", "--out", "exported")
    assert result.exit_code == 0, result.output
    assert "of 3 classes have no image" in result.stderr


# --- the data stay as they are


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
@pytest.mark.parametrize("form", ["--originals", "--pixels"])
def test_nothing_is_written_among_the_data(
    call: Call, chosen: Path, images: Path, tmp_path: Path, to: str, form: str
) -> None:
    """A new folder there would be read as a class, as test images or as images of a class by the next run."""
    (tmp_path / "link").symlink_to(images / "train")
    places = (
        images / "train" / "new",
        images / "train" / "cat" / "new" / "deep",
        images / "val",
        tmp_path / "link" / "new",
        tmp_path / "out" / ".." / "images" / "train" / "new",
    )
    before = tree(images)
    for out in places:
        result = call("export", chosen, "--to", to, "--out", out, form)
        assert_refused(
            result, "read from there", str(out), "a place in" if out.name != "val" else "the folder"
        )
        assert tree(images) == before and not out.exists()
    assert not (images / "train" / "cat" / "new").exists()
    assert call("export", chosen, "--to", to, "--out", images / "new", form).exit_code == 0, "no split's"


def test_nothing_is_written_among_the_data_of_a_flat_folder_or_where_links_lead(
    call: Call, run: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    flat = (images / "train").rename(tmp_path / "flat")
    (flat / "dog").rename(tmp_path / "dogs")
    (flat / "dog").symlink_to(tmp_path / "dogs")
    path = run(f"{{name: folder, folder: {flat}, resize: 6}}")
    for out in (flat / "train", flat / "new", tmp_path / "dogs" / "new"):
        assert_refused(call("export", path, "--to", "folder", "--out", out), "read from there")
    moved = flat.rename(tmp_path / "moved")
    for out in (moved / "new", tmp_path / "dogs" / "new"):
        result = call("export", path, f"data.folder={moved}", "--to", "folder", "--out", out)
        assert_refused(result, "read from there")
    for out, said in ((flat, "the folder"), (flat / "new", "a place in")):
        result = call("export", path, "--to", "folder", "--out", out, "--pixels")
        assert_refused(result, said, "read from there")
    assert not flat.exists()


def test_nothing_is_written_above_the_data(
    call: Call, run: Callable[..., Path], images: Path, tmp_path: Path
) -> None:
    """Moved data leave their place to a class of their folder's name."""
    path = run(f"{{name: folder, folder: {images}, resize: 6}}")
    images.rename(tmp_path / "moved")
    (tmp_path / "above").mkdir()
    again = tmp_path / "out" / "recipe.yaml"
    again.write_text(again.read_text().replace(str(images), str(tmp_path / "above" / "cat")))
    result = call("export", path, "--to", "folder", "--out", "above", "--pixels")
    assert_refused(result, "a folder above", "read from there")


def test_nothing_is_written_among_shards(call: Call, streamed: Path, shards: Path) -> None:
    for to in ("folder", "webdataset", "indices"):
        assert_refused(
            call("export", streamed, "--to", to, "--out", shards / "train-9.tar"), "read from there"
        )
    assert len(list(shards.iterdir())) == 4


def test_the_folders_of_shards_that_patterns_match() -> None:
    config = WebDatasetConfig(folder="a", train=["b/*/train-?.tar", "c.tar", "/d/[ef]/*.tar"], test=["/g/*"])
    assert WebDataset(config).folders() == [Path("a"), Path("a/b"), Path("/d"), Path("/g")]
    assert WebDataset(WebDatasetConfig(train=["*.tar"], test=0.2)).folders() == [Path()]


@pytest.mark.parametrize("form", ["--originals", "--pixels"])
def test_nothing_is_written_among_the_target(
    call: Call, run: Callable[..., Path], images: Path, tmp_path: Path, form: str
) -> None:
    shutil.copytree(images / "train", tmp_path / "goal")
    data = f"{{name: folder, folder: {images}, resize: 6}}\ntarget: {{name: folder, folder: goal, resize: 6}}"
    steps = "steps: [{simcore: {count: 3, features: pixels}}]\nevaluate: {on: nothing}\n"
    path = run(data, steps=steps)
    result = call("export", path, "--to", "folder", "--out", tmp_path / "goal" / "new", form)
    assert_refused(result, "read from there", "goal")
    assert call("export", path, "--to", "folder", "--out", "exported", form).exit_code == 0


def test_fixed_names_are_no_folder_of_data(call: Call, run: Callable[..., Path], tmp_path: Path) -> None:
    path = run("{name: digits, cap: 20}")
    assert call("export", path, "--to", "folder", "--out", "data/exported").exit_code == 0


# --- what is refused, and what is left behind


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--to", "webdataset", "--link", "hard"), "--to folder"),
        (("--to", "folder", "--link", "hard", "--pixels"), "without --pixels"),
        (("--to", "folder", "--shard-bytes", "1GB"), "--to webdataset"),
        (("--to", "webdataset", "--shard-bytes", "0"), "1 byte"),
        (("--to", "webdataset", "--shard-bytes", "many"), "a number of bytes"),
        (("--to", "folder", "--pixels", "data.folder=x"), "--pixels"),
        (("--to", "folder", "train.epochs=3"), "data.KEY=VALUE"),
        (("--to", "folder", "steps.0.ipc=3"), "data.KEY=VALUE"),
        (("--to", "folder", "data.foldr=x"), "folder"),
        (("--to", "folder", "data.classes=[dog]"), "every image"),
        (("--to", "webdataset", "data.cap=2"), "data.cap"),
        (("--to", "indices", "data.valid=null"), "data.valid"),
        (("--to", "folder", "data={name: folder, folder: images, bad_images: 0}"), "data.bad_images"),
        (("--to", "tape"), "webdataset"),
    ],
)
def test_options_that_do_not_go_together(
    call: Call, chosen: Path, options: tuple[str, ...], said: str
) -> None:
    assert_refused(call("export", chosen, *options, "--out", "exported"), said)
    assert not Path("exported").exists()


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
def test_what_is_there_stays(call: Call, chosen: Path, tmp_path: Path, to: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    for out in ("full", "file", "link", ".", ".."):
        assert_refused(call("export", chosen, "--to", to, "--out", out), "there already")
    assert tree(tmp_path) == before


def test_an_empty_folder_is_filled_and_parents_are_made(call: Call, chosen: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert call("export", chosen, "--to", "folder", "--out", "empty").exit_code == 0
    assert call("export", chosen, "--to", "webdataset", "--out", "a/b/c", "--pixels").exit_code == 0
    assert (tmp_path / "empty" / "indices.jsonl").exists() and (tmp_path / "a/b/c/classes.txt").exists()


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, "disk is full"),
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (RuntimeError("made up"), 1, "made up"),
    ],
    ids=["full", "interrupted", "defect"],
)
def test_a_failure_leaves_nothing(
    call: Call,
    chosen: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    failure: BaseException,
    code: int,
    said: str,
) -> None:
    """It comes with the fourth image."""
    from distill.exporting import folder, indices, shards

    told = indices.facts

    def failing(distilled: DistilledSet, number: int, *, path: str | None) -> dict[str, Any]:
        if number == 3:
            raise failure
        return told(distilled, number, path=path)

    for module in (folder, indices, shards):
        monkeypatch.setattr(module, "facts", failing)
    result = call("export", chosen, "--to", to, "--out", "exported", "--pixels")
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert_nothing_left(tmp_path)
    (tmp_path / "a").mkdir()
    assert call("export", chosen, "--to", to, "--out", "a/new/folder/exported", "--pixels").exit_code == code
    assert not list((tmp_path / "a").iterdir()), "parents made for it are gone, others stay"


KILLED = """
import os, signal, sys
from pathlib import Path
from distill.exporting.staging import reserved, staged_folder
from distill.files import write_atomically

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

out = Path(sys.argv[1])
with reserved(out):
    if sys.argv[2] == "indices":
        write_atomically(out, lambda partial: die(partial.write_text("half")))
    with staged_folder(out) as root:
        (root / "cat").mkdir()
        (root / "cat" / "0.png").write_text("half")
        die()
"""


@pytest.mark.parametrize("to", ["folder", "indices"])
def test_what_a_killed_export_left_is_removed_by_the_next(
    call: Call, chosen: Path, tmp_path: Path, to: str
) -> None:
    """What lies there besides, under names of its like, is none of ours."""
    place = tmp_path / "new"
    killed = subprocess.run([sys.executable, "-c", KILLED, place / "ex[p]orted", to], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len([path for path in place.iterdir() if path.name.endswith(".partial")]) == 1
    others = [
        ".exporte.12345678.partial",
        ".ex[p]orted.x12345678.partial",
        ".ex[p]orted.d.12345678.partial",
        "kept",
    ]
    for name in others:
        (place / name).mkdir()
    assert call("export", chosen, "--to", to, "--out", place / "ex[p]orted", "--pixels").exit_code == 0
    assert {path.name for path in place.iterdir()} == {"ex[p]orted", *others}


@pytest.mark.parametrize("to", ["folder", "webdataset", "indices"])
def test_a_running_export_keeps_its_place(call: Call, chosen: Path, tmp_path: Path, to: str) -> None:
    with staging.reserved(tmp_path / "exported"), staging.staged_folder(tmp_path / "exported") as root:
        (root / "mine").write_text("mine")
        result = call("export", chosen, "--to", to, "--out", "exported")
        assert_refused(result, "another export is writing there", str(Path("exported")))
        assert (root / "mine").read_text() == "mine"
    assert tree(tmp_path / "exported") == {"mine": b"mine"}


def test_without_locks_nothing_of_others_is_removed(
    call: Call, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(lock: Lock, *, wait: bool = False) -> bool:
        lock.path.touch()
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    other = tmp_path / ".exported.12345678.partial"
    other.mkdir()
    monkeypatch.setattr(Lock, "take", refuse)
    assert call("export", chosen, "--to", "folder", "--out", "exported").exit_code == 0
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [other]


def test_all_that_is_written_reaches_the_disk_before_it_gets_its_name(
    call: Call, chosen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing else does: neither another disk nor the originals behind symbolic links."""
    synced: set[Path] = set()
    named: list[bool] = []

    def sync(path: Path) -> None:
        synced.add(path)
        named.append((tmp_path / "exported").exists())

    monkeypatch.setattr(staging, "sync", sync)
    monkeypatch.setattr(staging, "_SYNCED_AT_ONCE", 2)
    monkeypatch.setattr(os, "sync", never)
    for link in ((), ("--link", "symbolic")):
        assert call("export", chosen, "--to", "folder", "--out", "exported", *link).exit_code == 0
        assert named == [False] * (len(synced) - 1) + [True], "the last is the folder above"
        written = [path for path in (tmp_path / "exported").rglob("*") if not path.is_symlink()]
        assert len(written) == (4 if link else 13)
        root = next(path for path in synced if path.name.endswith(".partial"))
        there = {root / path.relative_to(tmp_path / "exported") for path in written}
        assert {path.absolute() for path in synced} == {path.absolute() for path in (Path(), root, *there)}
        shutil.rmtree(tmp_path / "exported")
        synced.clear()
        named.clear()


def test_an_original_that_vanishes_on_the_way(
    call: Call, chosen: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the original that is named, not the place to be written to."""
    read = Path.read_bytes

    def vanished(path: Path) -> bytes:
        import threading

        if threading.current_thread() is threading.main_thread():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", vanished)
    result = call("export", chosen, "--to", "folder", "--out", "exported")
    assert_refused(result, "the original cannot be read", str(images))
    assert_nothing_left(tmp_path)


def test_a_damaged_set_is_damage(call: Call, chosen: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.h5").write_bytes(chosen.read_bytes()[:2000])
    assert_refused(call("export", tmp_path / "cut.h5", "--to", "indices", "--out", "exported"), code=3)
    assert_refused(call("export", "absent.h5", "--to", "indices", "--out", "exported"), "absent.h5")


def test_help_says_what_is_written(call: Call) -> None:
    text = " ".join(call("export", "--help").stdout.split())
    for word in ("folder", "webdataset", "indices", "--link", "--pixels", "--shard-bytes", "data.folder"):
        assert word in text
    for promise in (
        "nothing is left under OUT unless all agree",
        "shards twice",
        "unless `data.download=true`",
        "a shard holds at least one",
        "`row` is its number in the data as they were found, which `costs.file` uses too",
        "read whole, give data.valid=0",
    ):
        assert promise in text


# --- from Python


def test_the_function_is_the_command(call: Call, chosen: Path, tmp_path: Path) -> None:
    assert distill.export(str(chosen), to="folder", out="exported", quiet=True) == 9
    assert call("export", chosen, "--to", "folder", "--out", "by-command").exit_code == 0
    assert tree(tmp_path / "exported") == tree(tmp_path / "by-command")
    assert "export" in dir(distill)


def test_names_that_are_none_are_refused_in_python(chosen: Path) -> None:
    for options, said in (({"to": "tape"}, "webdataset"), ({"to": "folder", "link": "soft"}, "symbolic")):
        with pytest.raises(InputError, match=said):
            distill.export(chosen, out="exported", **options)
