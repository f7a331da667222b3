"""Samples out of tar shards, as a stream: nothing is extracted, links and devices are refused.

A sample is a run of consecutive members KEY.EXTENSION with the same KEY (up to the first dot of the file
name). It needs one image and one `.cls`; members of other extensions are skipped.

tarfile takes a damaged or missing header for the end of the archive. Here it is an error: a shard ends with
the zero block that every tar writer appends, or it is truncated."""

from __future__ import annotations

import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distill.data.decode import MAX_FILE_BYTES
from distill.data.files import opened
from distill.errors import DamagedDataError, DistillError, UnsafeFileError

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "ppm", "webp"))
LABEL_EXTENSION = "cls"

_MAX_LABEL_BYTES = 64
_MAX_HEADER_BYTES = 2**20
_HEADER_TYPES = frozenset(
    (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )
)
_BUFFER_BYTES = 2**18
_MAX_PADDING_BYTES = 2**24


@dataclass
class Sample:
    """One labelled image of a shard.

    Args:
        key: the members' common name.
        label: the number in KEY.cls.
        image_name: the image member, None while it has not been met.
        image: its bytes, None where they were not wanted.
    """

    key: str
    label: int | None = None
    image_name: str | None = None
    image: bytes | None = None


def read_samples(shard: Path, *, want: Callable[[int], bool]) -> Iterator[Sample]:
    """The samples of a shard in order.

    Args:
        want: whether to read the image of the shard's i-th sample; labels are always read.

    Raises:
        DamagedDataError: a truncated or corrupt archive, a sample without its image or label, a label that is
            no number.
        UnsafeFileError: a link, a device, or a member of absurd size.
    """
    position = 0
    sample: Sample | None = None
    with _damage_named(shard) as place, opened(shard) as stream, _open_tar(stream) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it met
            place.member = member.name
            key, extension = _split(member.name)
            _check_member(member, shard)
            if member.isdir() or (extension != LABEL_EXTENSION and extension not in IMAGE_EXTENSIONS):
                continue
            if sample is not None and sample.key != key:
                yield _complete(sample, shard)
                sample, position = None, position + 1
            sample = sample or Sample(key)
            _add(sample, member, extension, tar, want(position), shard)
        if sample is not None:
            yield _complete(sample, shard)
        stream.read(_MAX_PADDING_BYTES)  # reaches gzip's checksum


@dataclass
class _Place:
    member: str = "(before the first member)"


@contextmanager
def _damage_named(shard: Path) -> Iterator[_Place]:
    place = _Place()
    try:
        yield place
    except DistillError:
        raise
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, struct.error) as error:
        raise DamagedDataError(
            "the shard is truncated or damaged",
            where=str(shard),
            found=f"{error or type(error).__name__}, near member {place.member}",
            fix="fetch the shard again",
        ) from error


def _open_tar(stream: object) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER_BYTES, tarinfo=_StrictInfo)  # type: ignore[call-overload]


class _StrictInfo(tarfile.TarInfo):
    """Headers whose damage is an error, and which may not announce more than the limits."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad member header: {error}") from error

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _HEADER_TYPES and info.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {info.size} bytes")
        return info


def _check_member(member: tarfile.TarInfo, shard: Path) -> None:
    where = f"{shard}, member {member.name}"
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise UnsafeFileError(
            "the shard holds a link, a device or a sparse file", where=where, allowed="plain files"
        )
    if member.size > MAX_FILE_BYTES:
        raise UnsafeFileError(
            "a member is too large",
            where=where,
            found=f"{member.size} bytes",
            allowed=f"{MAX_FILE_BYTES} bytes",
        )


def _split(name: str) -> tuple[str, str]:
    """Key and extension: `a/0001.seg.png` is `a/0001` and `seg.png`."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _add(
    sample: Sample, member: tarfile.TarInfo, extension: str, tar: tarfile.TarFile, wanted: bool, shard: Path
) -> None:
    if extension == LABEL_EXTENSION:
        if sample.label is not None:
            raise _bad_sample(sample, shard, "two labels")
        sample.label = _label(member, tar, shard)
        return
    if sample.image_name is not None:
        raise _bad_sample(sample, shard, f"two images, {sample.image_name} and {member.name}")
    sample.image_name = member.name
    if wanted:
        sample.image = _contents(member, tar)


def _contents(member: tarfile.TarInfo, tar: tarfile.TarFile) -> bytes:
    stream = tar.extractfile(member)
    data = stream.read() if stream is not None else b""
    if len(data) != member.size:
        raise EOFError(f"{len(data)} of {member.size} bytes")
    return data


def _label(member: tarfile.TarInfo, tar: tarfile.TarFile, shard: Path) -> int:
    text = _contents(member, tar) if member.size <= _MAX_LABEL_BYTES else b""
    if not re.fullmatch(rb"\s*[0-9]{1,18}\s*", text):
        raise DamagedDataError(
            "a label is not a class number",
            where=f"{shard}, member {member.name}",
            found=repr(text.decode("utf-8", "replace")) if text else f"{member.size} bytes",
            allowed="a number from 0 up, as text",
        )
    return int(text)


def _complete(sample: Sample, shard: Path) -> Sample:
    if sample.image_name is None:
        raise _bad_sample(sample, shard, f"{sample.key}.{LABEL_EXTENSION} without an image")
    if sample.label is None:
        raise _bad_sample(sample, shard, f"{sample.image_name} without {sample.key}.{LABEL_EXTENSION}")
    return sample


def _bad_sample(sample: Sample, shard: Path, found: str) -> DamagedDataError:
    return DamagedDataError(
        f"sample {sample.key!r} is not one image with one label",
        where=str(shard),
        found=found,
        allowed=f"KEY.{LABEL_EXTENSION} beside KEY with one of {', '.join(sorted(IMAGE_EXTENSIONS))}",
    )
