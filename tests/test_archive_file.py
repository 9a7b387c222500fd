"""The file of an archive: what a snapshot names stays as it was, whatever is written later, and what is not as it was is found out."""

import errno
import os

import numpy as np
import pytest

from kvlocal.cache.archive import ArchivePart
from kvlocal.conversations.archive_file import ArchiveFile
from kvlocal.errors import KvlocalError


@pytest.fixture
def file(tmp_path):
    return ArchiveFile(tmp_path / "one.archive")


def part(key, n, seed=0):
    return ArchivePart(key, np.random.default_rng([key, seed]).integers(0, 256, n, dtype=np.uint8))


def check(path, parts, extents):
    for array, (_, data) in zip(ArchiveFile(path).read(extents), parts, strict=True):
        np.testing.assert_array_equal(array, data)
        assert not array.flags.writeable


def test_parts_come_back_and_are_written_once(file, monkeypatch):
    parts = [part(1, 5000), part(2, 5000), part(7, 1)]
    extents = file.write(parts)
    check(file.path, parts, extents)
    assert file.path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(os, "pwrite", None)
    assert file.write(parts) == extents
    assert file.write(parts[1:]) == extents[1:]
    file.keep([])
    assert not file.path.exists() and ArchiveFile(file.path).read([]) == []


def test_what_a_snapshot_names_is_never_written_over(file):
    """Whenever the process ends, what is named then is there; what nobody needs any more leaves its place to others."""
    rng, key = np.random.default_rng(0), 0
    parts, named = [], ([], [])
    for _ in range(60):
        # a conversation that goes on, goes back and goes on otherwise
        del parts[int(rng.integers(0, len(parts) + 1)) :]
        for _ in range(int(rng.integers(1, 6))):
            parts.append(part(key := key + 1, int(rng.choice([4096, 10_000, 70_000]))))
        n_left = int(rng.integers(1, 12))
        stops = iter(range(n_left))
        extents = file.write(parts, lambda stops=stops: next(stops, None) is None)
        check(file.path, *named)
        if extents is not None:
            check(file.path, parts, extents)
            if rng.random() < 0.5:
                file.keep(extents)
                named = (list(parts), extents)
        if rng.random() < 0.2 and named[1]:
            # as another process finds it
            file = ArchiveFile(file.path)
            found = file.read(named[1])
            parts = [ArchivePart(key := key + 1, data) for data in found]
            file.take_up(parts, named[1])
            named = (parts[:], named[1])
    most = 3 * max(sum(extent.size for extent in named[1]), 30 * 70_000)
    assert file.path.stat().st_size < most


def test_what_is_not_as_it_was_is_found_out(file):
    parts = [part(1, 5000), part(2, 6000)]
    extents = file.write(parts)
    content = file.path.read_bytes()
    for at in (0, 4999, extents[1].start, len(content) - 1):
        changed = bytearray(content)
        changed[at] ^= 1
        file.path.write_bytes(changed)
        with pytest.raises(KvlocalError, match="damaged"):
            ArchiveFile(file.path).read(extents)
    for n in (0, 1, 5000, len(content) - 1):
        file.path.write_bytes(content[:n])
        with pytest.raises(KvlocalError, match="incomplete|gone"):
            ArchiveFile(file.path).read(extents)
    file.path.write_bytes(content)
    for start, size in ((-1, 10), (0, -1), (0, 2**62), (2**62, 1), (2**62, 2**62)):
        with pytest.raises(KvlocalError, match="incomplete"):
            ArchiveFile(file.path).read([extents[0]._replace(start=start, size=size)])
    file.path.unlink()
    with pytest.raises(KvlocalError, match="gone"):
        ArchiveFile(file.path).read(extents)


def test_a_full_disk_is_an_error_and_what_was_there_stays(file, monkeypatch):
    parts = [part(1, 5000)]
    extents = file.write(parts)
    file.keep(extents)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(KvlocalError, match="make room"):
            file.write([*parts, part(2, 100)])
    check(file.path, parts, extents)
    more = [*parts, part(2, 100)]
    check(file.path, more, file.write(more))


def test_nothing_is_where_another_file_is(file):
    """As after the file was removed, or put back from a copy, while a chat goes on."""
    parts = [part(1, 5000), part(2, 5000)]
    file.keep(file.write(parts))
    file.path.rename(file.path.with_name("away"))
    parts.append(part(3, 100))
    extents = file.write(parts)
    check(file.path, parts, extents)
    for key, data in file.mapped(parts).items():
        np.testing.assert_array_equal(data, parts[key - 1].data)
    assert file.mapped(parts) == {}
    file.path.write_bytes(b"")
    file.path.with_name("away").rename(file.path)
    with pytest.raises(KvlocalError, match="another file"):
        file.mapped([*parts, part(4, 1)])
    check(file.path, parts, file.write(parts))


def test_what_no_snapshot_names_goes_when_another_begins(file):
    file.write([part(1, 500_000)])
    other = ArchiveFile(file.path)
    other.write([part(2, 100)])
    assert other.path.stat().st_size == 100
