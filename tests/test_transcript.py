"""Transcripts replay to what was said, whatever happened to the process or to the file."""

import errno
import fcntl
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from kvlocal.conversations.records import Conversation, TranscriptError
from kvlocal.conversations.saved_chat import load, save
from kvlocal.conversations.transcript import Transcript, chat_path
from kvlocal.errors import KvlocalError
from kvlocal.files.places import state_dir


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chats" / "one.jsonl"


@pytest.fixture
def transcript(path: Path) -> Transcript:
    return Transcript.open(path, model="smollm2-135m", system="Be brief.")


def say(transcript: Transcript, user: str, *pieces: str) -> None:
    transcript.add_user(user)
    for piece in pieces:
        transcript.add_piece(piece)
    transcript.end_answer("end")


def texts(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def test_replay(transcript, path):
    say(transcript, "Hello\nthere ☃\u2028", "Hi", " you")
    say(transcript, "Again", "Yes")
    chat = Transcript.read(path)
    assert chat.messages == [
        {"role": "user", "content": "Hello\nthere ☃\u2028"},
        {"role": "assistant", "content": "Hi you"},
        {"role": "user", "content": "Again"},
        {"role": "assistant", "content": "Yes"},
    ]
    assert (chat.system, chat.model, chat.cut_off) == ("Be brief.", "smollm2-135m", [])


def test_regen_undo_clear_system_and_load_replay_to_the_state_they_left(transcript, path):
    say(transcript, "a", "1")
    say(transcript, "b", "2")
    transcript.add_regen()
    transcript.add_piece("3")
    transcript.end_answer("stopped")
    assert texts(Transcript.read(path)) == ["a", "1", "b", "3"]
    transcript.add_undo()
    transcript.add_system(None)
    assert texts(Transcript.read(path)) == ["a", "1"]
    assert Transcript.read(path).system is None and Transcript.read(path).n_answers == 3
    transcript.add_clear()
    assert texts(Transcript.read(path)) == [] and Transcript.read(path).n_answers == 0
    transcript.add_load([{"role": "user", "content": "c"}], "Another.")
    transcript.end_answer("stopped")
    say(transcript, "d", "4")
    assert texts(Transcript.read(path)) == ["c", "", "d", "4"]
    assert Transcript.read(path).system == "Another." and Transcript.read(path).n_answers == 2


def test_undo_takes_a_turn_that_was_never_answered(transcript, path):
    say(transcript, "a", "1")
    transcript.add_user("b")
    transcript.add_undo()
    assert texts(Transcript.read(path)) == ["a", "1"]


def test_undo_takes_several_turns(transcript, path):
    for text in "abc":
        say(transcript, text, text.upper())
    transcript.add_user("d")
    transcript.add_undo(3)
    assert texts(Transcript.read(path)) == ["a", "A"]


def test_a_fork_has_what_was_said_and_leaves_it(transcript, path, tmp_path):
    for text in "abc":
        say(transcript, text, text.upper())
    content = path.read_bytes()
    with transcript.fork(tmp_path / "new" / "two.jsonl") as fork:
        assert fork.conversation.messages == Transcript.read(path).messages and not fork.awaits_answer
        say(fork, "d", "D")
        with pytest.raises(TranscriptError, match="in use"):
            Transcript.resume(fork.path)
    say(transcript, "e", "E")
    assert path.read_bytes().startswith(content) and fork.path.read_bytes().startswith(content)
    assert texts(Transcript.read(fork.path))[::2] == list("abcd") and texts(Transcript.read(path))[::2] == list("abce")
    assert fork.path.stat().st_mode & 0o777 == 0o600
    for there in (path, fork.path):
        with pytest.raises(TranscriptError, match="is there already"):
            transcript.fork(there)


def test_a_fork_of_what_cannot_be_written_is_none(transcript, path, tmp_path, monkeypatch):
    say(transcript, "a", "A")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        with pytest.raises(TranscriptError):
            transcript.add_undo()
        with pytest.raises(TranscriptError, match="make room"):
            transcript.fork(tmp_path / "two.jsonl")
    assert not (tmp_path / "two.jsonl").exists()
    transcript.fork(tmp_path / "two.jsonl").close()
    assert texts(Transcript.read(tmp_path / "two.jsonl")) == texts(Transcript.read(path)) == []


def test_an_empty_answer_is_an_answer(transcript, path):
    say(transcript, "a")
    assert texts(Transcript.read(path)) == ["a", ""]


def test_an_answer_without_an_end_is_kept_and_marked(transcript, path):
    transcript.add_user("a")
    transcript.add_piece("half an ")
    chat = Transcript.read(path)
    assert texts(chat) == ["a", "half an "]
    assert chat.cut_off == [1]


@pytest.mark.parametrize("n_lost", [1, 5, 20])
def test_a_torn_last_line_is_left_out(transcript, path, n_lost):
    say(transcript, "a", "1")
    transcript.add_user("torn ☃☃☃☃☃☃☃☃")
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - n_lost)
    assert texts(Transcript.read(path)) == ["a", "1"]


def test_text_that_is_no_utf8_survives(transcript, path):
    say(transcript, "a\udcff", "1")
    assert texts(Transcript.read(path)) == ["a\udcff", "1"]


def test_only_the_owner_reads_it_and_nothing_is_overwritten(transcript, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(KvlocalError, match="exists"):
        Transcript.open(path, model="m", system=None)


def test_a_chat_without_a_word_leaves_no_file(transcript, path):
    transcript.close()
    assert not path.exists()


def test_what_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KvlocalError, match="cannot write"):
        Transcript.open(tmp_path / "file" / "x.jsonl", model="m", system=None)


def resume(path: Path) -> Transcript:
    return Transcript.resume(path)


def test_a_session_goes_on(path):
    with resume(path) as first:
        assert first.conversation is None
        first.begin(model="m", system="Be brief.")
        say(first, "a", "1")
    with resume(path) as second:
        assert texts(second.conversation) == ["a", "1"] and second.conversation.system == "Be brief."
        second.add_user("b")
        second.add_piece("2")
        second.end_answer("end", [5, 6], 40)
    chat = Transcript.read(path)
    assert texts(chat) == ["a", "1", "b", "2"] and chat.drawn == {3: [5, 6]} and chat.n_tokens == 40 and chat.started


def test_a_session_in_which_nothing_was_said_leaves_no_file(path):
    resume(path).close()
    assert not path.exists()
    with resume(path) as session:
        session.begin(model="m", system=None)
    assert not path.exists()


def test_a_session_is_open_in_one_place(path):
    with resume(path) as session:
        session.begin(model="m", system=None)
        say(session, "a", "1")
        content = path.read_bytes()
        with pytest.raises(KvlocalError, match="in use by another kvlocal"):
            resume(path)
        assert path.read_bytes() == content
    resume(path).close()


@pytest.mark.parametrize("n_lost", [0, 1, 5, 20])
def test_what_a_crash_left_is_mended_and_marked(path, n_lost):
    with resume(path) as session:
        session.begin(model="m", system=None)
        session.add_user("a")
        session.add_piece("one ☃ ")
        session.add_piece("two ☃ ☃ ☃")
    os.truncate(path, path.stat().st_size - n_lost)
    with resume(path) as session:
        assert texts(session.conversation) == ["a", "one ☃ " if n_lost else "one ☃ two ☃ ☃ ☃"] and session.conversation.cut_off == [1]
        assert json.loads(path.read_text().splitlines()[-1]) == {"record": "end", "reason": "cut"}
    with resume(path) as session:
        assert session.conversation.cut_off == [1]
        say(session, "b", "2")
    assert texts(Transcript.read(path))[2:] == ["b", "2"] and Transcript.read(path).cut_off == [1]


def test_the_mark_goes_with_the_answer(path):
    with resume(path) as session:
        session.begin(model="m", system=None)
        session.add_user("a")
        session.add_piece("1")
    with resume(path) as session:
        assert not session.awaits_answer
        session.add_regen()
        assert session.awaits_answer
        session.add_piece("2")
        session.end_answer("end", [7])
    chat = Transcript.read(path)
    assert texts(chat) == ["a", "2"] and chat.cut_off == [] and chat.drawn == {1: [7]}


@pytest.mark.parametrize("n_left", [0, 1, 10, 60])
def test_a_torn_first_line_begins_anew(path, n_left):
    with resume(path) as session:
        session.begin(model="m", system=None)
        session.add_user("a")
    os.truncate(path, n_left)
    with resume(path) as session:
        assert session.conversation is None
        session.begin(model="m", system=None)
        session.add_user("b")
    assert texts(Transcript.read(path)) == ["b"]


@pytest.mark.parametrize("content", ["hello", "hello\n", '{"format": "kvlocal-chat"}\n', '{"record": "user"'])
def test_files_of_others_are_no_sessions(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(KvlocalError, match="neither a saved chat nor a transcript"):
        resume(path)
    assert path.read_text() == content


def test_another_model_makes_tokens_worthless(path):
    with resume(path) as session:
        session.begin(model="m", system=None)
        session.add_user("a")
        session.add_piece("1")
        session.end_answer("end", [5])
        session.add_model("n")
    chat = Transcript.read(path)
    assert chat.model == "n" and chat.drawn == {}


def test_ctrl_c_waits_until_a_record_is_written(path, monkeypatch):
    with resume(path) as session:
        session.begin(model="m", system=None)
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: (signal.raise_signal(signal.SIGINT), fsync(handle)))
        with pytest.raises(KeyboardInterrupt):
            session.add_user("a")
        monkeypatch.undo()
        assert session.awaits_answer
        session.add_piece("1")
        session.end_answer("end")
    assert texts(Transcript.read(path)) == ["a", "1"]


def test_what_finds_no_room_leaves_whole_lines_and_comes_later(path, monkeypatch):
    """Half a record is cut off again; a user turn is refused, an answer that was given already waits."""
    write, room = os.write, 0

    def write_a_little(handle: int, data: memoryview) -> int:
        nonlocal room
        if not room:
            raise OSError(28, "No space left on device")
        n = write(handle, data[:room])
        room -= n
        return n

    with resume(path) as session:
        session.begin(model="m", system=None)
        say(session, "a", "1")
        monkeypatch.setattr(os, "write", write_a_little)
        for n in (0, 7):
            room, content = n, path.read_bytes()
            with pytest.raises(KvlocalError, match="No space"):
                session.add_user("b")
            assert path.read_bytes() == content and not session.awaits_answer
        room = 10_000
        session.add_user("c")
        session.add_piece("2")
        room = 5
        for _ in range(2):
            with pytest.raises(KvlocalError, match="No space"):
                session.add_piece("3")
        with pytest.raises(KvlocalError, match="No space"):
            session.end_answer("end")
        assert texts(Transcript.read(path)) == ["a", "1", "c", "2"] and Transcript.read(path).cut_off == [3]
        room = 10_000
        session.add_user("d")
        assert texts(Transcript.read(path)) == ["a", "1", "c", "233", "d"] and Transcript.read(path).cut_off == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_an_error():
    transcript = Transcript(Path("/dev/full"), os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(KvlocalError, match="No space"):
        transcript.add_user("a")
    transcript._empty = False
    transcript.close()


@pytest.mark.parametrize(
    "content",
    ["", "\n", "hello", "[1, 2]", '{"record": "user", "content": "a"}\n', '{"format": "other"}', "[" * 100_000, "\0\n\0"],
)
def test_other_files_are_refused(path, content, tmp_path):
    other = tmp_path / "other"
    other.write_text(content)
    with pytest.raises(KvlocalError, match="neither a saved chat nor a transcript"):
        load(other)


@pytest.mark.parametrize(
    "line",
    ['{"record": "user"}', '{"record": "user", "content": 1}', '{"record": "dance"}', '{"record": "undo"}', "{}", "[]", "x"],
)
def test_a_damaged_line_is_named(transcript, path, line):
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(KvlocalError, match="line 2 of"):
        Transcript.read(path)


def test_save_and_load(tmp_path):
    chat = Conversation([{"role": "user", "content": "ä\udcff"}], "Be brief.", "m", {"temp": 0.5})
    file = tmp_path / "chat.json"
    save(file, chat)
    assert load(file) == chat
    save(file, Conversation())
    assert load(file).messages == []


def test_only_the_owner_reads_what_was_saved(tmp_path):
    file = tmp_path / "chat.json"
    save(file, Conversation())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    save(file, Conversation())
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


@pytest.mark.parametrize("kind", ["saved", "transcript"])
def test_a_file_that_an_editor_for_windows_wrote(tmp_path, path, kind):
    """With a byte order mark, and with CR LF for the ends of lines."""
    if kind == "saved":
        path = tmp_path / "chat.json"
        save(path, Conversation([{"role": "user", "content": "a\n☃"}, {"role": "assistant", "content": "1"}]))
    else:
        with resume(path) as session:
            session.begin(model="m", system=None)
            say(session, "a\n☃", "1")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert texts(load(path)) == ["a\n☃", "1"]
    if kind == "saved":
        save(path, Conversation())
        return
    with resume(path) as session:
        assert texts(session.conversation) == ["a\n☃", "1"]
        say(session, "b", "2")
    assert texts(Transcript.read(path)) == ["a\n☃", "1", "b", "2"]


def test_a_lock_that_cannot_be_had(path, monkeypatch):
    """A session needs one; a chat whose file was made just now does not."""

    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(KvlocalError, match="has no locks.*: keep the session on another disk"):
        resume(path)
    path.unlink()
    with Transcript.open(path, model="m", system=None) as transcript:
        say(transcript, "a", "1")
    assert texts(Transcript.read(path)) == ["a", "1"]


def test_save_spares_files_of_others(tmp_path):
    file = tmp_path / "notes.json"
    for content in ("notes", '{"format": "other"}', "[]"):
        file.write_text(content)
        with pytest.raises(KvlocalError, match="not written by /save"):
            save(file, Conversation())
        assert file.read_text() == content


@pytest.mark.parametrize(
    "messages", [None, "a", ["a"], [{"role": "king", "content": "a"}], [{"role": "user"}], [{"role": "user", "content": 1}]]
)
def test_bad_messages_are_refused(tmp_path, messages):
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"format": "kvlocal-chat", "version": 1, "messages": messages}))
    with pytest.raises(KvlocalError, match="message"):
        load(file)


def test_load_reads_transcripts(transcript, path):
    assert load(path).system == "Be brief."
    say(transcript, "a", "1")
    assert texts(load(path)) == ["a", "1"]


def test_a_later_version_is_refused(transcript, path):
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(KvlocalError, match="version 2"):
        load(path)


def test_state_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KVLOCAL_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert state_dir() == tmp_path / ".local" / "state" / "kvlocal"
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert state_dir() == Path("/xdg/kvlocal")
    monkeypatch.setenv("KVLOCAL_STATE_DIR", "/chosen")
    assert chat_path().parent == Path("/chosen/chats")
