"""The file in memory behaves as a file does, and takes room for what was written only."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distill.store.sparse import _BLOCK, SparseFile

_OFFSET = st.integers(0, 3 * _BLOCK)
_MOVES = st.one_of(
    st.tuples(st.just("write"), _OFFSET, st.binary(max_size=64).map(lambda each: each * 2000)),
    st.tuples(st.just("read"), _OFFSET, st.integers(0, 2 * _BLOCK)),
    st.tuples(st.just("truncate"), _OFFSET, st.none()),
)


@given(st.lists(_MOVES, max_size=12))
def test_it_reads_as_a_file_does(moves: list) -> None:
    ours, plain = SparseFile(), io.BytesIO()
    for what, offset, detail in moves:
        for file in (ours, plain):
            file.seek(offset)
        if what == "write" and detail:
            assert ours.write(detail) == plain.write(detail)
        elif what == "read":
            assert ours.read(detail) == plain.read(detail)
        elif what == "truncate" and offset >= plain.seek(0, io.SEEK_END):
            for file in (ours, plain):
                file.seek(offset)
                file.truncate()
            if plain.seek(0, io.SEEK_END) < offset:  # BytesIO does not grow
                plain.write(bytes(offset - plain.tell()))
        assert ours.seek(0, io.SEEK_END) == plain.seek(0, io.SEEK_END)


def test_reserved_room_takes_no_memory_and_is_filled_on_the_disk(tmp_path: Path) -> None:
    file, far = SparseFile(), 1 << 30
    file.write(b"head")
    file.seek(far)
    file.write(b"tail")
    assert len(file._blocks) == 2
    array = np.arange(1 << 20, dtype="<u4").reshape(1024, -1)
    file.truncate(far + 8)
    file.copy_to(tmp_path / "file", [(_BLOCK + 8, array)])
    with (tmp_path / "file").open("rb") as written:
        assert written.read(4) == b"head"
        written.seek(_BLOCK + 8)
        assert written.read(array.nbytes) == array.tobytes()
        written.seek(far)
        assert written.read() == b"tail" + bytes(4)
