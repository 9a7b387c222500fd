"""The archive: what it holds, how it grows, and what it does when it cannot."""

import dataclasses
import errno
import os

import numpy as np
import pytest
from recalling import rows_of

from kvlocal.cache.archive import CHUNK, Archive, ArchiveFailed
from kvlocal.cache.marks import ArchivedMark
from kvlocal.llama.layout import Layout
from kvlocal.llama.rows import Rows

LAYOUT = Layout(2, 6, 3, 32, 32, 1, 512, 16, False, False, True, False, 8, 6, 34, 22)
CHUNK_BYTES = 2 * 3 * CHUNK * (34 + 22)


def some_rows(n, seed=0):
    rng = np.random.default_rng(seed)
    return Rows(*(rng.integers(0, 256, (2, 3, n, size), dtype=np.uint8) for size in (34, 22)))


def filled(archive, lengths):
    """All that was stored, in pieces of these lengths, at positions that begin at 5."""
    rows = some_rows(sum(lengths))
    start = 0
    for n in lengths:
        archive.append(Rows(rows.k[:, :, start : start + n], rows.v[:, :, start : start + n]), np.arange(start, start + n, dtype=np.int32) + 5)
        start += n
    return rows


@pytest.mark.parametrize("n_in_memory", [0, 2, 99])
def test_tokens_come_back_as_they_were(tmp_path, n_in_memory):
    archive = Archive(LAYOUT, n_in_memory * CHUNK_BYTES, tmp_path)
    rows = filled(archive, [1, 255, 256, 300, 7, 500])
    assert archive.n_tokens == 1319 and archive.chunk_bytes == CHUNK_BYTES
    assert archive.bytes_in_memory == min(n_in_memory, 6) * CHUNK_BYTES and archive.bytes_on_disk == max(0, 6 - n_in_memory) * CHUNK_BYTES
    np.testing.assert_array_equal(archive.positions, np.arange(1319) + 5)
    tokens = np.random.default_rng(1).integers(0, 1319, (2, 3, 400))
    found = rows_of(archive, tokens)
    for array, stored in ((found.k, rows.k), (found.v, rows.v)):
        np.testing.assert_array_equal(array, np.take_along_axis(stored, tokens[..., None], axis=2))
    assert rows_of(archive, tokens[..., :0]).n == 0
    np.testing.assert_array_equal(np.concatenate(archive.key_chunks(), axis=2)[:, :, :1319], rows.k)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    archive.close(), archive.close()


def test_growing_copies_nothing(tmp_path):
    archive = Archive(LAYOUT, 2 * CHUNK_BYTES, tmp_path)
    filled(archive, [CHUNK] * 3)
    before = [chunk.ctypes.data for chunk in archive.key_chunks()]
    filled(archive, [CHUNK] * 9)
    assert [chunk.ctypes.data for chunk in archive.key_chunks()][:3] == before


def test_what_was_cut_off_is_written_over():
    archive = Archive(LAYOUT, 2**30, None)
    rows = filled(archive, [700])
    archive.truncate(300)
    archive.truncate(500)
    assert archive.n_tokens == len(archive.positions) == 300 and len(archive.key_chunks()) == 2
    new = some_rows(100, seed=9)
    archive.append(new, np.arange(100, dtype=np.int32))
    found = rows_of(archive, np.broadcast_to(np.r_[299:400], (2, 3, 101)))
    np.testing.assert_array_equal(found.k[:, :, 0], rows.k[:, :, 299])
    np.testing.assert_array_equal(found.v[:, :, 1:], new.v)


def test_memory_that_is_used_up_is_an_error():
    archive = Archive(LAYOUT, CHUNK_BYTES, None)
    filled(archive, [CHUNK])
    with pytest.raises(ArchiveFailed, match="filled the 0 MB"):
        filled(archive, [1])


def test_a_disk_that_fails_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(ArchiveFailed, match="No such file"):
        filled(Archive(LAYOUT, 0, tmp_path / "away"), [1])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(ArchiveFailed, match="No space left"):
        filled(Archive(LAYOUT, 0, tmp_path), [1])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="written with zeros where the system has no call for it")
def test_blocks_are_taken_before_they_are_used(tmp_path):
    """A file that only promised its blocks would end the process when the disk is full."""
    archive = Archive(LAYOUT, 0, tmp_path)
    filled(archive, [1])
    status = os.fstat(archive._memory._file)
    assert status.st_blocks * 512 >= archive.chunk_bytes
    assert status.st_mode & 0o777 == 0o600 and status.st_nlink == 0


@pytest.mark.parametrize("ram", [2**30, 0])
def test_marks_that_are_gone_leave_their_place_to_others(tmp_path, ram):
    archive = Archive(LAYOUT, ram, tmp_path)
    filled(archive, [300])
    rng, taken = np.random.default_rng(0), []
    for n in (70_000, 1000, 60_000, 70_000, 1000, 3000):
        data = rng.integers(0, 256, n, dtype=np.uint8)
        if len(archive.marks) == 3:
            archive.keep_marks(0)
        archive.add_mark(ArchivedMark(len(archive.marks), 1, 0, (0,), 0, data))
        np.testing.assert_array_equal(archive.marks[-1].data, data)
        taken.append(archive.bytes_in_memory + archive.bytes_on_disk)
    assert taken[5] == taken[2] and (ram or taken[2:] == taken[2:3] * 4)
    archive.truncate(1)
    assert [mark.n_tokens for mark in archive.marks] == [0, 1]
    archive.add_mark(ArchivedMark(1, 7, 0, (0,), 0, np.zeros(3, np.uint8)))
    assert [(mark.n_tokens, mark.n_cells) for mark in archive.marks] == [(0, 1), (1, 7)]
    archive.close()
    assert not archive.marks


def test_marks_that_lie_back_are_thinned_out():
    archive = Archive(LAYOUT, 2**30, None)
    filled(archive, [256])
    for n in range(1, 257):
        archive.add_mark(ArchivedMark(n, 1, n, (0,), 0, np.zeros(100, np.uint8)))
        archive.thin_marks(1000)
    lengths = [mark.n_tokens for mark in archive.marks]
    assert len(lengths) == 10 and lengths[-3:] == [254, 255, 256]
    # what is read again, where there is no mark any more, is less than what is taken back
    for n in range(lengths[0], 257):
        last = max(length for length in lengths if length <= n)
        assert n - last <= 256 - n + 1
    archive.thin_marks(0)
    assert [mark.n_tokens for mark in archive.marks] == [256]
    archive.close()


def check_equal(archive, rows):
    tokens = np.broadcast_to(np.arange(archive.n_tokens), (2, 3, archive.n_tokens))
    found = rows_of(archive, tokens)
    np.testing.assert_array_equal(found.k, rows.k[:, :, : archive.n_tokens])
    np.testing.assert_array_equal(found.v, rows.v[:, :, : archive.n_tokens])


def test_what_changes_is_another_part(tmp_path):
    archive = Archive(LAYOUT, 2**30, None)
    filled(archive, [300])
    archive.add_mark(ArchivedMark(300, 1, 300, (0,), 0, np.arange(100, dtype=np.uint8)))
    first = archive.parts()
    assert [len(part.data) for part in first] == [CHUNK_BYTES, CHUNK_BYTES, 100] and archive.parts() == first
    archive.append(some_rows(10), np.arange(10, dtype=np.int32))
    second = archive.parts()
    assert second[0].key == first[0].key and second[1].key != first[1].key and second[2].key == first[2].key
    archive.truncate(200)
    assert [part.key for part in archive.parts()] == [first[0].key]
    archive.append(some_rows(10), np.arange(10, dtype=np.int32))
    assert not {part.key for part in archive.parts()} & {part.key for part in first + second}


def test_exchanged_parts_are_not_written_to_and_leave_the_memory(tmp_path):
    archive = Archive(LAYOUT, 2**30, None)
    rows = filled(archive, [300])
    archive.add_mark(ArchivedMark(300, 1, 300, (0,), 0, np.arange(100, dtype=np.uint8)))
    data = {part.key: part.data.copy() for part in archive.parts()}
    for array in data.values():
        array.flags.writeable = False
    archive.exchange(data)
    assert archive.bytes_in_memory == 0 and archive.bytes_on_disk == 2 * CHUNK_BYTES
    check_equal(archive, rows)
    archive.truncate(270)
    new = some_rows(50, seed=3)
    archive.append(new, np.arange(50, dtype=np.int32))
    assert archive.bytes_in_memory == archive.bytes_on_disk == CHUNK_BYTES
    check_equal(archive, Rows(*(np.concatenate([a[:, :, :270], b], axis=2) for a, b in ((rows.k, new.k), (rows.v, new.v)))))


@pytest.mark.parametrize("ram", [2**30, 0])
def test_what_is_shared_stays_as_it_is(tmp_path, ram):
    """In memory and in a file: what comes next is written elsewhere, and what lies there is not used for something else."""
    archive, other = Archive(LAYOUT, ram, tmp_path), Archive(LAYOUT, 2**30, None)
    filled(archive, [300])
    archive.add_mark(ArchivedMark(300, 1, 300, (0,), 0, np.arange(100, dtype=np.uint8)))
    shared = archive.share()
    before = [part.data.copy() for part in shared]
    other.restore(archive.positions, [dataclasses.replace(archive.marks[0], data=None)], [part.data for part in shared], False)
    other.known_as(shared)
    keys = [part.key for part in shared]
    assert [part.key for part in archive.parts()] == [part.key for part in other.parts()] == keys
    for one in (archive, other):
        one.truncate(270)
        filled(one, [400])
        for n in (650, 660):
            one.add_mark(ArchivedMark(n, 1, 300, (0,), 0, np.full(100, 7, np.uint8)))
    for part, data in zip(shared, before, strict=True):
        np.testing.assert_array_equal(part.data, data)
    # the first chunk is what it was in both, and all that changed has another key than anywhere else
    assert archive.parts()[0].key == other.parts()[0].key == keys[0]
    assert len({part.key for one in (archive, other) for part in one.parts()[1:]} - {*keys}) == 2 * 4


@pytest.mark.parametrize("copy", [True, False])
def test_another_archive_takes_over_what_one_had(copy):
    archive, other = Archive(LAYOUT, 2**30, None), Archive(LAYOUT, 2**30, None)
    rows = filled(archive, [300])
    archive.add_mark(ArchivedMark(300, 1, 300, (0,), 0, np.arange(100, dtype=np.uint8)))
    marks, data = [dataclasses.replace(archive.marks[0], data=None)], [part.data for part in archive.parts()]
    for positions, wrong_marks, wrong in (
        (archive.positions, marks, data[:-1]),
        (archive.positions, [], data),
        (archive.positions, marks, [data[0], data[1][1:], data[2]]),
        (archive.positions[:200], marks, data[:1] + data[2:]),
        (archive.positions, [dataclasses.replace(marks[0], n_beside=101)], data),
        (archive.positions, [dataclasses.replace(marks[0], n_cells=-1)], data),
        (archive.positions, [dataclasses.replace(marks[0], n_cells=301)], data),
        (archive.positions, marks * 2, [*data, data[2]]),
    ):
        with pytest.raises(ValueError):
            other.restore(positions, wrong_marks, wrong, copy)
    other.restore(archive.positions, marks, data, copy)
    check_equal(other, rows)
    np.testing.assert_array_equal(other.positions, archive.positions)
    np.testing.assert_array_equal(other.marks[0].data, np.arange(100))
    assert (other.bytes_in_memory >= 2 * CHUNK_BYTES) == copy
    with pytest.raises(ArchiveFailed):
        Archive(LAYOUT, CHUNK_BYTES, None).restore(archive.positions, marks, data, True)
