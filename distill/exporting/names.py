"""Names from strangers as names of files: any file system takes them, and they lead nowhere else.

A name stays as it is where it can. What could leave the folder, hide, or mean something else elsewhere is written as
%XX, the UTF-8 bytes of the characters in capital hexadecimal, `%` itself included, so that
`urllib.parse.unquote(name, errors="surrogatepass")` gives the name back; an empty name is `%`. Escaped are

- path separators, the characters that Windows refuses, control and invisible characters, and lone surrogates;
- a dot or a space in front, a dot or a space at the end: `..`, hidden files, and what Windows and text files strip;
- names of devices on Windows, with any extension (con, NUL.txt, COM1);
- the whole of a name that differs from an earlier one by case or by Unicode form alone.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from distill.errors import InputError

# What a component of a path may have on ext4, XFS, APFS and, counted in UTF-16, on NTFS.
MAX_NAME_BYTES = 255

_REFUSED = frozenset('%/\\<>:"|?*')
_DEVICES = re.compile(
    r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])\s*(\..*)?", re.IGNORECASE
)


def portable(name: str) -> str:
    """The name as a file name; the same for every machine, and another for every other name."""
    if not name:
        return "%"
    last = len(name) - 1
    marked = {at for at, c in enumerate(name) if c in _REFUSED or not c.isprintable()}
    marked |= {at for at in (0, last) if name[at] in " ."}
    if _DEVICES.fullmatch(name):
        marked.add(0)
    return "".join(_escaped(c) if at in marked else c for at, c in enumerate(name))


def _escaped(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode(errors="surrogatepass"))


def _key(name: str) -> str:
    """Equal for names that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def class_folders(classes: Sequence[str], *, reserved: Sequence[str] = ()) -> tuple[str, ...]:
    """A folder name for each class.

    Args:
        classes: names, as a set has them.
        reserved: names in small letters that stand for something else where the folders will lie.

    Raises:
        InputError: two classes of one name, or a name too long for a folder.
    """
    taken = set(reserved)
    folders: dict[str, str] = {}
    for name in classes:
        if name in folders:
            raise InputError(
                "two classes have one name", where="classes", found=repr(name), fix="use --to indices"
            )
        folder = portable(name)
        if _key(folder) in taken:
            folder = _escaped(name)
        if len(folder.encode()) > MAX_NAME_BYTES:
            raise InputError(
                "the name of a class is too long for a folder",
                where="classes",
                found=f"{name[:40]!r}..., {len(folder.encode())} bytes",
                allowed=f"{MAX_NAME_BYTES} bytes",
                fix="use --to indices",
            )
        taken.add(_key(folder))
        folders[name] = folder
    return tuple(folders.values())


class FileNames:
    """Names for the images of one folder after another: their own, or their number where they have none.

    An image is called `~NUMBER` where its own name is taken in its folder, by case or Unicode form alone too, is too
    long, or nothing but a suffix. Who comes first keeps the name. No own name begins with `~`: it is escaped.
    """

    def __init__(self) -> None:
        self._taken: set[bytes] = set()  # digests: a few bytes an image, whatever its name

    def name(self, folder: str, file: str, *, number: int, suffix: str) -> str:
        """A name that the folder has not yet.

        Args:
            folder: where the image goes.
            file: its own name, empty where it has none.
            number: its position in the set.
            suffix: of a kind of image that is known, such as `.png`.
        """
        if not file:
            return f"{number:08d}{suffix}"
        own = portable(file)
        if own.startswith("~"):
            own = f"{_escaped('~')}{own[1:]}"
        digest = hashlib.blake2b(f"{folder}/{_key(own)}".encode(), digest_size=8).digest()
        if digest in self._taken or len(own.encode()) > MAX_NAME_BYTES or not own.endswith(suffix):
            return f"~{number:08d}{suffix.lower()}"
        self._taken.add(digest)
        return own
