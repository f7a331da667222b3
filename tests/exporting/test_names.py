"""Names from strangers: they stay in their folder, stay apart, and can be read back."""

from __future__ import annotations

import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import InputError
from distill.exporting.names import MAX_NAME_BYTES, FileNames, class_folders, portable

HOSTILE = [
    "..",
    ".",
    "",
    " ",
    "/etc/passwd",
    "../../up",
    "a/b",
    "a\\b",
    "C:\\x",
    "c:x",
    "\0",
    "a\nb",
    "\x1b[2J",
    "\u202egpj",
    "con",
    "NUL",
    "nul.txt",
    "Com1.tar.gz",
    "LPT\u00b9",
    "aux ",
    "ends.",
    "ends ",
    ".hidden",
    "100%",
    "%2E%2E",
    "%",
    "a\u2028b",
    "\ud800",
    "\udc80",
    "~x",
    "train",
    "größer",
    "猫",
]

# Hostile text is rare among random characters: these make it common.
names = st.text(
    st.sampled_from("aA.~% /\\:con\0\n\u00df\u00e9\u0301\u0130\ud800") | st.characters(codec=None),
    max_size=12,
)


def back(name: str) -> str:
    return "" if name == "%" else unquote(name, errors="surrogatepass")


def key(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def assert_harmless(name: str) -> None:
    assert name and name.isprintable() and name == name.strip() and not name.startswith(".")
    assert not set('<>:"/\\|?*') & set(name) and name[-1] not in " ."
    assert PurePosixPath("/out", name).parent == PurePosixPath("/out")
    windows = PureWindowsPath("C:/out", name)
    assert windows.parent == PureWindowsPath("C:/out")
    assert name.split(".")[0].rstrip().lower() not in {"con", "prn", "aux", "nul", "com1", "lpt\u00b9"}
    assert name.splitlines() == [name], "a line of classes.txt"


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_harmless_and_give_the_name_back(name: str) -> None:
    assert_harmless(portable(name))
    assert back(portable(name)) == name


@given(names)
def test_any_name_is_harmless_and_gives_the_name_back(name: str) -> None:
    assert_harmless(portable(name))
    assert back(portable(name)) == name


@pytest.mark.parametrize(
    "name", ["cat", "größer", "猫", "n01440764", "a b", "x.y", "console", "com10", "a~b", "{x}"]
)
def test_usual_names_stay_as_they_are(name: str) -> None:
    assert portable(name) == name


@pytest.mark.parametrize(
    ("name", "expected"),
    [("..", "%2E%2E"), ("a/b", "a%2Fb"), ("con", "%63on"), ("", "%"), ("é ", "é%20"), ("\u00a0", "%C2%A0")],
)
def test_golden(name: str, expected: str) -> None:
    assert portable(name) == expected


@given(st.lists(names, unique=True, max_size=8))
def test_folders_of_classes_differ_on_every_file_system(classes: list[str]) -> None:
    folders = class_folders(classes, reserved=("train",))
    assert [back(folder) for folder in folders] == classes
    assert len({key(folder) for folder in folders} | {"train"}) == len(classes) + 1
    for folder in folders:
        assert_harmless(folder)


def test_who_comes_first_keeps_the_name() -> None:
    assert class_folders(["Cat", "cat", "CAT"]) == ("Cat", "%63%61%74", "%43%41%54")
    assert class_folders(["e\u0301", "\u00e9"])[1] == "%C3%A9"
    assert class_folders(["Train"], reserved=("train",)) == ("%54%72%61%69%6E",)


def test_classes_of_one_name_or_too_long_are_refused() -> None:
    with pytest.raises(InputError, match="two classes"):
        class_folders(["a", "b", "a"])
    assert class_folders(["a" * MAX_NAME_BYTES]) == ("a" * MAX_NAME_BYTES,)
    for name in ("a" * (MAX_NAME_BYTES + 1), "猫" * 86, "\n" * 86):
        with pytest.raises(InputError, match="too long"):
            class_folders([name])


def test_files_keep_their_names_but_for_those_that_are_taken_or_impossible() -> None:
    files = FileNames()
    given = ["x.jpg", "X.JPG", "x.jpg", "~00000002.jpg", "..jpg", ".jpg", "a" * 255 + ".jpg", "a/b.jpg"]
    found = [files.name("cat", file, number=number, suffix=file[-4:]) for number, file in enumerate(given)]
    assert found == [
        "x.jpg",
        "~00000001.jpg",
        "~00000002.jpg",
        "%7E00000002.jpg",
        "%2E.jpg",
        "~00000005.jpg",
        "~00000006.jpg",
        "a%2Fb.jpg",
    ]
    assert files.name("dog", "x.jpg", number=9, suffix=".jpg") == "x.jpg"
    assert files.name("dog", "", number=10, suffix=".png") == "00000010.png"


@given(st.lists(st.tuples(st.sampled_from(["cat", "dog"]), names), max_size=12))
def test_no_two_files_are_one(given: list[tuple[str, str]]) -> None:
    files = FileNames()
    found = [
        (folder, files.name(folder, f"{stem}.jpg", number=number, suffix=".jpg"))
        for number, (folder, stem) in enumerate(given)
    ]
    assert len({(folder, key(name)) for folder, name in found}) == len(given)
    for _, name in found:
        assert_harmless(name)
        assert Path(name).suffix == ".jpg"
