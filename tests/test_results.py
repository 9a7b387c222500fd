"""The file of results: whole lines only, taken up where it ends, and never one of something else."""

import errno
import fcntl
import json
import os
import resource

import pytest

from kvlocal.batch.line import Failure, Result
from kvlocal.batch.output import Results, settings_key
from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.runner import WorkFile
from kvlocal.llama.model import Model
from kvlocal.training.synth import DataFile, SynthSettings

KEY = "0" * 32
TIMINGS = {"answer_tokens": 1}


def result(number, text="Hello"):
    return Result(number, f"id {number}", [{"role": "assistant", "content": text}], ["end"], [[]], 1, {}, TIMINGS)


def fill(path, numbers, settings=KEY):
    with Results(path, settings) as results:
        for number in numbers:
            assert results.wants(number, b"line %d\n" % number)
            results.write(result(number))


def records(path):
    return [json.loads(part) for part in path.read_bytes().split(b"\n")[:-1]]


def test_written_lines_are_what_was_given(tmp_path):
    path = tmp_path / "out.jsonl"
    texts = ["日本語 👍🏽 é \u2028 \n", "half \ud800 a pair"]
    with Results(path, KEY) as results:
        for number, text in enumerate(texts, 1):
            results.wants(number, b"x")
            results.write(result(number, text))
            assert path.read_bytes().endswith(b"}\n")
        results.wants(3, b"y")
        results.write(Failure(3, "c", KvlocalError("it is bad: mend it")))
    written = records(path)
    assert [record["messages"][0]["content"] for record in written[:2]] == texts
    assert written[2] == {"line": 3, "key": written[2]["key"], "id": "c", "error": "it is bad: mend it"}
    assert "日本語 👍🏽".encode() in path.read_bytes()


def test_goes_on_behind_what_is_there(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, [1, 5, 2])
    with path.open("ab") as file:
        file.write(b'{"line": 3, "key": "00')
    with Results(path, KEY) as results:
        assert (results.n_done, results.n_failed) == (3, 0)
        # the end of a line is no part of it: the last one may get it later
        assert [results.wants(number, b"line %d" % number) for number in range(1, 7)] == [False, False, True, True, False, True]
        results.write(result(3))
    assert [record["line"] for record in records(path)] == [1, 5, 2, 3]


def test_failures_are_tried_again_when_asked(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    with Results(path, KEY) as results:
        for number in (2, 3):
            results.wants(number, b"line %d" % number)
        results.write(Failure(2, "b", KvlocalError("the device is gone: find it")))
        results.write(result(3, text='an answer about an "error"'))
        results.wants(4, b"line 4")
        results.write(Failure(4, "d", KvlocalError("the device is gone: find it")))
    path.chmod(0o640)
    link = tmp_path / "link.jsonl"
    link.symlink_to(path)
    with Results(link, KEY) as results:
        assert (results.n_done, results.n_failed, results.wants(2, b"line 2")) == (4, 2, False)
    with Results(link, KEY, retry=True) as results:
        assert (results.n_done, results.n_failed) == (2, 0)
        assert [results.wants(number, b"line %d" % number) for number in (1, 2, 3, 5)] == [False, True, False, True]
        results.write(Failure(5, "e", KvlocalError("it is bad: mend it")))
        assert [record["line"] for record in records(path)] == [1, 2, 3, 4, 5]
        results.write(result(2))
        with pytest.raises(KvlocalError, match="another run"):
            Results(path, KEY).__enter__()
        assert results.wants(4, b"line 4")
        results.write(Failure(4, "d", KvlocalError("the device is still gone: find it")))
    assert [record["line"] for record in records(path)] == [1, 3, 5, 2, 4]
    assert link.is_symlink() and path.stat().st_mode & 0o7777 == 0o640
    assert sorted(tmp_path.iterdir()) == [link, path]


def test_failures_stay_where_there_is_no_room_to_drop_them(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, KEY) as results:
        for number in (1, 2):
            results.wants(number, b"line %d" % number)
        results.write(result(1, text="long " * 1000))
        results.write(Failure(2, "b", KvlocalError("the device is gone: find it")))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with Results(path, KEY, retry=True) as results, pytest.raises(KvlocalError, match="make room"):
            assert results.wants(2, b"line 2")
            results.write(result(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_another_input_or_other_settings(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    with Results(path, KEY) as results:
        results.wants(2, b"line 2")
        results.write(Failure(2, "b", KvlocalError("the device is gone: find it")))
    before = path.read_bytes()
    for settings, line in [(KEY, b"line 2"), ("1" * 32, b"line 1")]:
        for retry in (False, True):
            with Results(path, settings, retry=retry) as results, pytest.raises(KvlocalError, match="these settings: name another file"):
                results.wants(1, line)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "precious\n",
        "[]\n",
        '{"id": 1}\n',
        '{"line": 0, "key": "1"}\n',
        '{"line": "1", "key": "1"}\n',
        '{"line": 1, "key": 1}\n',
        '{"line": 1, "key": "-1"}\n',
        '{"line": 1, "key": "' + "f" * 17 + '"}\n',
        '{"line": 1, "key": "1"}\n' * 2,
    ],
)
def test_something_else_is_left_alone(tmp_path, content):
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    with pytest.raises(KvlocalError, match="something else"):
        Results(path, KEY).__enter__()
    assert path.read_text() == content
    with Results(path, KEY, replace=True) as results:
        assert results.n_done == 0
    assert path.read_text() == ""


FOREIGN = [
    b"precious",
    b"{",
    b'{"l',
    b"[1, 2]",
    json.dumps({"report": list(range(100))}).encode(),
    json.dumps({"line": 3, "text": "of a poem"}).encode(),
    json.dumps({"a": 1}, indent=2).encode(),
    b"\xff\xfe\0",
    b"\0" * 100,
    b"a" * 100_000,
]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_foreign_file_without_a_last_newline_is_left_alone(tmp_path, content):
    """Whatever its shape, nothing of it is taken for half a line."""
    path = tmp_path / "report.json"
    path.write_bytes(content)
    for open_it in (
        lambda: Results(path, KEY),
        lambda: DataFile(path, KEY, SynthSettings()),
        lambda: WorkFile(path, KEY),
    ):
        with pytest.raises(KvlocalError, match="something else|no file of unfinished results"), open_it():
            pass
        assert path.read_bytes() == content
    fill(tmp_path / "out.jsonl", [1])
    whole = (tmp_path / "out.jsonl").read_bytes()
    path.write_bytes(whole + content)
    # the beginning of a line behind whole ones is what a crash leaves
    if content not in (b"{", b'{"l', b"\0" * 100):
        with pytest.raises(KvlocalError, match="something else"):
            Results(path, KEY).__enter__()
        assert path.read_bytes() == whole + content


def test_a_result_that_lacks_nothing_but_its_end_is_kept(tmp_path):
    path = tmp_path / "out.jsonl"
    fill(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(b"\xef\xbb\xbf" + whole[:-1])
    with Results(path, KEY) as results:
        assert results.n_done == 2
    assert path.read_bytes() == b"\xef\xbb\xbf" + whole


def test_the_lock_is_on_the_file_of_that_name(tmp_path, monkeypatch):
    """A file that was opened before another run put a new one in its place is not what is locked then."""
    path = tmp_path / "out.jsonl"
    fill(path, [1])
    open_file, replaced = os.open, []

    def open_late(*args, **options):
        descriptor = open_file(*args, **options)
        if os.fspath(args[0]) == str(path) and not replaced:
            replaced.append(path.read_bytes())
            (tmp_path / "new").write_bytes(replaced[0])
            (tmp_path / "new").replace(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_late)
    with Results(path, KEY) as results:
        assert replaced and results.wants(2, b"x")
        results.write(result(2))
        with pytest.raises(KvlocalError, match="another run"):
            Results(path, KEY).__enter__()
    assert [record["line"] for record in records(path)] == [1, 2]


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    """Nobody can tell there whether another run has the file."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    path = tmp_path / "out.jsonl"
    fill(path, [1])
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KvlocalError, match="has no locks.*: name a file on another disk"):
        Results(path, KEY).__enter__()


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    with Results(path, KEY), pytest.raises(KvlocalError, match="another run"):
        Results(path, KEY).__enter__()
    with Results(path, KEY):
        pass


def test_a_million_lines_take_eight_bytes_each(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("".join(f'{{"line": {number}, "key": "{number:016x}"}}\n' for number in range(1, 100_001)))
    with Results(path, KEY) as results:
        assert results.n_done == 100_000
        assert results._keys.itemsize * len(results._keys) <= 8 * 100_001


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(KvlocalError, match="No such file or directory"):
        Results(tmp_path / "no" / "out.jsonl", KEY).__enter__()


def test_a_full_disk_leaves_the_lines_before(tmp_path):
    path = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results(path, KEY) as results:
        for number in (1, 2):
            results.wants(number, b"x")
        results.write(result(1))
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, limits[1]))
        try:
            with pytest.raises(KvlocalError, match="cannot write .*out.jsonl"):
                results.write(result(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_settings_are_others_when_answers_are(smollm2, tmp_path):
    with Model(smollm2) as model:

        def key(**changes):
            return settings_key(model, SessionConfig(**{"policy": "recall", "archive": "disk", **changes}), None)

        for changes in ({"n_threads": 1}, {"archive_ram": 5}, {"archive_dir": tmp_path}):
            assert key(**changes) == key()
        for changes in ({"archive": "off"}, {"budget": 300}, {"policy_args": {"recent": 0.7}}):
            assert key(**changes) != key()
