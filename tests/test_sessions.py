"""`kvlocal chat --session` and `kvlocal sessions`: a conversation outlives its process, whatever ends it."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from terminal import Terminal

from kvlocal.conversations.archive_file import archive_path
from kvlocal.conversations.named_sessions import session_path
from kvlocal.conversations.saved_chat import load
from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal_cli.idle import Idle
from kvlocal_cli.main import main
from kvlocal_cli.terminal import ReadingBar

# one thread: two that wait for each other crawl when the machine is busy
OPTIONS = ("--threads", "1", "--temp", "0", "--max-tokens", "12", "--kv-budget", "96", "--stride", "32")
STORY = "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. "
ASKED = ["Name a bird.", STORY * 3, "Name a tree.", STORY * 2 + "What is it?"]


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KVLOCAL_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def path(state) -> Path:
    return state / "sessions" / "trip.jsonl"


@pytest.fixture
def chat(short_smollm2):
    """A chat through pipes; `limit`: no file may become larger."""

    def run(*args: str, stdin: list[str], limit: int | None = None, model: str | None = str(short_smollm2)) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "kvlocal_cli", "chat", *([model] if model else []), *OPTIONS, *args]
        confine = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit is not None else None
        return subprocess.run(command, input="\n".join(stdin), capture_output=True, text=True, timeout=120, preexec_fn=confine)

    return run


def messages(path: Path) -> list[str]:
    return [message["content"] for message in Transcript.read(path).messages]


def test_two_processes_say_what_one_says(chat, path, tmp_path):
    """The second goes on from the snapshot, with the model of the first; nothing is read again."""
    together = chat("--session", str(tmp_path / "one.jsonl"), stdin=ASKED)
    first = chat("--session", "trip", "--verbose", stdin=ASKED[:2])
    assert (first.returncode, together.returncode, together.stderr) == (0, 0, "")
    second = chat("--session", "trip", "--verbose", stdin=[*ASKED[2:], "/kv"], model=None)
    assert second.returncode == 0, second.stderr
    assert "back in trip: 4 messages" in second.stderr and "again" not in second.stderr
    answers, _, _ = second.stdout.partition("turn  role")
    assert first.stdout + "\n" + answers == together.stdout
    assert messages(path) == messages(tmp_path / "one.jsonl")
    assert int(re.search(r"evicted in (\d+) compressions", second.stdout)[1]) > 1
    assert path.stat().st_mode & 0o777 == snapshot_path(path).stat().st_mode & 0o777 == 0o600


def test_a_session_with_an_archive_goes_on_where_it_was(chat, path):
    """Turns of the process before are taken back at once too; nothing is read again."""
    options = ("--archive", "disk", "--session")
    first = chat(*options, "trip", stdin=ASKED)
    said = messages(path)
    second = chat(*options, "trip", "--verbose", stdin=["/undo 3", *ASKED[1:], "/kv"])
    assert first.returncode == second.returncode == 0 and "back in trip: 8 messages" in second.stderr and "again" not in second.stderr
    assert messages(path) == said
    assert int(re.search(r"archive: (\d+) tokens", second.stdout)[1]) > 150
    beside = archive_path(snapshot_path(path))
    assert beside.stat().st_mode & 0o777 == 0o600
    chat("--session", "trip", "--archive", "off", stdin=["/undo"])
    assert not beside.exists()


def test_without_its_snapshot_or_with_other_options_it_is_read_again(chat, path):
    chat("--session", "trip", stdin=ASKED[:2])
    said = messages(path)
    content = snapshot_path(path).read_bytes()
    for spoil, why in (
        (lambda: snapshot_path(path).unlink(), "there is no snapshot"),
        (lambda: snapshot_path(path).write_bytes(content[:-1]), "the snapshot is incomplete"),
    ):
        spoil()
        result = chat("--session", "trip", stdin=["/kv"])
        assert result.returncode == 0 and f"kvlocal: {why}: 4 messages are read again" in result.stderr
        assert "Name a bird." in result.stdout and messages(path) == said
        # and is as good as new
        assert chat("--session", "trip", stdin=[]).stderr == ""
    result = chat("--session", "trip", "--kv-budget", "128", stdin=["Go on."])
    assert result.returncode == 0 and "made with another budget" in result.stderr and messages(path)[:4] == said


def test_a_turn_that_a_crash_left_open_is_kept_and_marked(chat, path):
    chat("--session", "trip", stdin=ASKED[:3])
    whole = messages(path)
    with Transcript.resume(path) as transcript:
        transcript.add_undo()
        transcript.add_user(ASKED[2])
        transcript.add_piece("An o")
    result = chat("--session", "trip", "--verbose", stdin=["/regen"])
    assert "the last answer was cut off: /regen makes another" in result.stderr and "again" not in result.stderr
    assert messages(path) == whole
    with Transcript.resume(path) as transcript:
        transcript.add_user(ASKED[3])
    result = chat("--session", "trip", "--verbose", stdin=["/regen"])
    assert "has no answer yet" in result.stderr and len(messages(path)) == 8


def test_a_second_process_is_told(chat, path):
    chat("--session", "trip", stdin=ASKED[:1])
    with Transcript.resume(path):
        content = path.read_bytes()
        result = chat("--session", "trip", stdin=["Hello"])
        assert result.returncode == 1 and result.stdout == ""
        assert re.fullmatch(r"kvlocal: .*trip\.jsonl is in use by another kvlocal: leave that chat first, or .*\n", result.stderr)
        for args in (["delete", "trip", "--yes"], ["rename", "trip", "other"], ["fork", "trip", "other"]):
            assert failure(*args).startswith(f"kvlocal: {path} is in use")
        assert path.read_bytes() == content
    assert chat("--session", "trip", stdin=["Hello"]).returncode == 0


def test_options_that_do_not_go_together(chat, path, tmp_path):
    chat("--session", "trip", stdin=ASKED[:1])
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": "kvlocal-chat", "version": 1, "system": "Be kind.", "messages": [{"role": "user", "content": "Hello"}]}))
    for args in (("--no-transcript",), ("--load", str(path))):
        result = chat("--session", "trip", *args, stdin=[])
        assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "is no name for a session" in chat("--session", "a:b", stdin=[]).stderr
    assert chat("--session", "new", "--load", str(other), stdin=["/regen"]).returncode == 0
    assert messages(path.with_name("new.jsonl"))[0] == "Hello" and Transcript.read(path.with_name("new.jsonl")).system == "Be kind."


def test_another_system_prompt_goes_into_the_transcript(chat, path):
    chat("--session", "trip", "--system", "Be kind.", stdin=ASKED[:1])
    assert "Be kind." in chat("--session", "trip", stdin=["/system"]).stdout
    result = chat("--session", "trip", "--system", "Be rude.", stdin=["/system", "Hello"])
    assert "another conversation" in result.stderr and Transcript.read(path).system == "Be rude."


def test_another_model_is_asked_for_and_changes_nothing_until_something_is_said(chat, path, smollm2, short_smollm2):
    """Nor does another system prompt."""

    def files() -> dict[str, bytes]:
        return {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}

    def again(answer: str) -> Terminal:
        terminal = Terminal("chat", str(smollm2), *OPTIONS, "--session", "trip", "--system", "Be rude.", env=os.environ)
        asked = terminal.wait_for(r"\[y/N\]")
        assert f"was led with {short_smollm2}" in asked and f"Read it with {smollm2}" in asked
        terminal.type(f"{answer}\r")
        return terminal

    chat("--session", "trip", stdin=ASKED[:1])
    before = files()
    assert len(before) == 3
    with again("n") as terminal:
        assert terminal.wait_for_end() == 130
    assert files() == before
    with again("y") as terminal:
        assert "back in trip: 2 messages" in terminal.wait_for_prompt()
        time.sleep(0.5)
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    assert files() == before
    # nobody can be asked
    result = chat("--session", "trip", stdin=["/kv"], model=str(smollm2))
    assert result.returncode == 0 and "[y/N]" not in result.stdout + result.stderr and files() == before
    # the same file by another name
    assert chat("--session", "trip", stdin=[], model=os.path.relpath(short_smollm2)).returncode == 0 and files() == before
    with again("y") as terminal:
        terminal.wait_for_prompt()
        terminal.type(f"{ASKED[2]}\r")
        terminal.wait_for_prompt()
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    kept = Transcript.read(path)
    assert kept.model == str(smollm2) and kept.system == "Be rude." and len(kept.messages) == 4 and [*kept.drawn] == [3]
    assert files()["trip.jsonl"].startswith(before["trip.jsonl"])


def test_a_session_is_cleared_when_the_person_agrees_and_comes_back(chat, path, smollm2, tmp_path):
    chat("--session", "trip", stdin=ASKED[:2])
    said = messages(path)
    with Terminal("chat", *OPTIONS, "--session", "trip", env=os.environ) as terminal:
        terminal.wait_for_prompt()
        for command in ("/clear", "/load trip"):
            terminal.type(f"{command}\r")
            assert "Put the 4 messages of this session aside?" in terminal.wait_for(r"\[y/N\]")
            terminal.type("n\r")
            assert "nothing has changed" in terminal.wait_for_prompt() and messages(path) == said
        terminal.type("/clear\r")
        terminal.wait_for(r"\[y/N\]")
        terminal.type("y\r")
        assert "/undo brings the rest back" in terminal.wait_for_prompt() and messages(path) == []
        terminal.type("\x04")
        assert terminal.wait_for_end() == 0
    # also in another process, and it is not asked twice
    result = chat("--session", "trip", "--verbose", stdin=["/clear", "/undo", "/regen"])
    assert result.returncode == 0 and "back again: 4 messages" in result.stderr
    assert messages(path)[:3] == said[:3] and len(messages(path)) == 4


def test_a_session_is_loaded_by_its_name(chat, path, tmp_path):
    chat("--session", "trip", "--system", "Be kind.", stdin=ASKED[:1])
    for args, stdin in ((("--load", "trip"), ["/system"]), ((), ["/load trip", "/system"])):
        result = chat("--no-transcript", "--verbose", *args, stdin=stdin)
        assert result.returncode == 0 and f"read 2 messages from {path}" in result.stderr and "Be kind." in result.stdout
    result = chat("--load", "none", stdin=[])
    assert result.returncode == 1 and result.stderr.startswith("kvlocal: there is no file none and no session of that name: ")


def test_run_asks_in_a_session_or_in_what_was_used_last(chat, path, short_smollm2, tmp_path):
    """The answers are those of a chat; nothing is read again, and the model is that of the session."""

    def ask(*args: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "kvlocal_cli", "run", *OPTIONS, *args]
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)

    nothing = ask("-c", "Hi")
    assert nothing.returncode == 1 and "there is no chat yet to go on with" in nothing.stderr
    together = chat("--session", str(tmp_path / "one.jsonl"), stdin=ASKED[:3])
    first = ask("-m", str(short_smollm2), "--session", "trip", ASKED[0])
    second = ask("--session", "trip", ASKED[1])
    third = ask("--json", "-c", ASKED[2])
    report = json.loads(third.stdout)
    assert messages(path) == messages(tmp_path / "one.jsonl") and len(messages(path)) == 6
    assert "\n".join([first.stdout, second.stdout, report["answer"].rstrip("\n") + "\n"]) == together.stdout
    cut_off = "kvlocal: the answer was cut off at 12 tokens: give a larger --max-tokens\n"
    assert first.stderr in ("", cut_off) and second.stderr in ("", cut_off) and third.stderr == ""
    assert report["model"] == str(short_smollm2) and report["prompt"] == ASKED[2]
    # a chat without a name too, and what is newer than that
    chat("--session", "trip", stdin=[])
    chat(stdin=["Hello"])
    [plain] = (path.parents[1] / "chats").glob("*.jsonl")
    assert ask("-c", "And now?").returncode == 0 and messages(plain)[::2] == ["Hello", "And now?"]
    ask("--session", "trip", ASKED[3])
    assert ask("-c", "Go on.").returncode == 0 and messages(path)[-2] == "Go on."
    for args in (("--raw", "-c"), ("-c", "--session", "trip"), ("--raw", "--session", "trip")):
        assert ask(*args, "Hi").returncode == 2


def test_no_room_for_the_snapshot_is_said_once_and_nothing_else_is_lost(chat, path):
    result = chat("--session", "trip", stdin=ASKED[:3], limit=2**16)
    assert result.returncode == 0 and result.stderr.count("\n") == 1
    assert re.search(r"cannot write .*archive \(File too large\): .*; the session goes on, but the way back to it will be slow", result.stderr)
    assert messages(path)[::2] == ASKED[:3] and result.stdout == "\n".join(f"{text}\n" for text in messages(path)[1::2])
    assert sorted(os.listdir(path.parent)) == ["trip.jsonl"]


@pytest.mark.parametrize("room", [0, 30, 400])
def test_a_turn_that_finds_no_room_is_refused(chat, path, room):
    """What there is no room for is not taken, or shown with a warning; the file stays whole, and the chat goes on when there is room."""
    chat("--session", "trip", stdin=ASKED[:1])
    before = messages(path)
    limit = path.stat().st_size + room
    result = chat("--session", "trip", stdin=ASKED[2:], limit=limit)
    assert result.returncode == 1
    assert "(File too large): make room for larger files (`ulimit -f`); your turn is not taken: send it again then" in result.stderr
    kept = messages(path)
    assert kept[:2] == before and len(kept) == (4 if room == 400 else 2)
    if room == 400:
        assert kept[2] == ASKED[2] and "is lost if the chat ends before it can be written" in result.stderr and result.stdout.startswith(kept[3])
    again = chat("--session", "trip", stdin=["/regen", *ASKED[3:]] if room == 400 else ASKED[2:])
    assert again.returncode == 0 and messages(path)[::2] == [ASKED[0], *ASKED[2:]]


def test_a_small_file_system_that_is_full(chat, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", small], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        path = small / "one.jsonl"
        result = chat("--session", str(path), stdin=ASKED[:1])
        assert result.returncode == 0 and "(No space left on device): make room; the session goes on" in result.stderr
        said = messages(path)
        (small / "filling").write_bytes(bytes(64 * 2**10 - 2 * 4096 - path.stat().st_size // 4096 * 4096))
        result = chat("--session", str(path), stdin=["Hello " * 2000])
        assert result.returncode == 1 and "(No space left on device): make room; your turn is not taken" in result.stderr
        assert messages(path) == said and result.stdout == ""
        (small / "filling").unlink()
        assert chat("--session", str(path), stdin=ASKED[1:2]).returncode == 0 and len(messages(path)) == 4
        subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        result = chat("--session", str(path), stdin=["Hello"])
        said = r"kvlocal: cannot write .*one\.jsonl \(Read-only file system\): choose a place that you can write\n"
        assert result.returncode == 1 and re.fullmatch(said, result.stderr)
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_killed_at_the_prompt_and_in_an_answer(smollm2, path, number):
    """On a terminal: the first time while the person types, the second in an answer; all that was shown is there."""

    def start() -> Terminal:
        return Terminal("chat", str(smollm2), *OPTIONS, "--session", "trip", "--max-tokens", "200", env=os.environ)

    with start() as first:
        first.wait_for_prompt()
        first.type("Name a bird.\r")
        first.wait_for_prompt()
        first.type("not sen")
        wait_until(lambda: snapshot_path(path).exists())
        first.kill(number)
        assert first.wait_for_end() == -number
    with start() as second:
        shown = second.wait_for_prompt()
        # the last exchange, with its lines broken between words
        answer = " ".join(messages(path)[1].split())
        assert "back in trip: 2 messages" in shown and f" >>> Name a bird. {answer} " in " ".join(shown.split())
        second.type("Write a long story about a cat.\r")
        second.wait_for(r"\?2004l")
        while len(" ".join(second.words_behind_prompt())) < 40:
            second.wait_for(r"\w")
        second.kill(number)
        assert second.wait_for_end() == -number
        shown = " ".join(second.words_behind_prompt())
    kept = Transcript.read(path)
    assert kept.messages[0]["content"] == "Name a bird." and kept.cut_off == [3]
    assert " ".join(kept.messages[3]["content"].split()).startswith(shown) and len(shown) >= 40
    with start() as third:
        assert "the last answer was cut off" in third.wait_for_prompt()
        third.type("\x04")
        assert third.wait_for_end() == 0
    assert "again" not in third.output.replace("/regen makes another", "")


def wait_until(holds) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_without_a_terminal_reading_is_told_in_lines(monkeypatch, capsys):
    now = iter(range(0, 100, 4))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    bar = ReadingBar()
    bar.show(1, 8)
    assert capsys.readouterr().err == ""
    bar.lines = True
    for i in range(2, 9):
        bar.show(i, 8)
    assert capsys.readouterr().err == "kvlocal: 38% read\nkvlocal: 62% read\nkvlocal: 88% read\n"


def test_what_is_written_does_not_hold_up_the_next_turn():
    """The thread is told to stop when the line is sent, and stops."""
    told = threading.Event()

    class Session:
        def finish_turn(self): ...
        def second_read(self, stop): ...

    def keep(stop):
        while not stop():
            time.sleep(0.01)
        told.set()

    with Idle(keep).working(Session()):
        time.sleep(0.05)
        assert not told.is_set()
    assert told.is_set()


@pytest.mark.parametrize("archive", ["off", "disk"])
def test_a_few_kills(short_smollm2, archive):
    script = Path(__file__).parent / "measure" / "kill_chat.py"
    command = [sys.executable, script, "3", "--model", short_smollm2, "--archive", archive]
    result = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["kills"] == 3


# kvlocal sessions


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["sessions", *args])
    return end.value.code


def failure(*args: str) -> str:
    command = [sys.executable, "-m", "kvlocal_cli", "sessions", *args]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode and result.stdout == ""
    return result.stderr


def make(path: Path, *texts: str, model: str = "m") -> None:
    with Transcript.resume(path) as transcript:
        transcript.begin(model=model, system="Be brief.")
        for text in texts:
            transcript.add_user(text)
            transcript.add_piece(f"{text}!")
            transcript.end_answer("end", [1], 12)
    snapshot_path(path).write_bytes(bytes(1000))


def test_list_shows_what_there_is(path, capsys):
    assert run("list") == 0 and capsys.readouterr().out == ""
    make(path, "a", "b", model="/models/some.gguf")
    make(path.with_name("älter.jsonl"))
    make(path.with_name("talk 2.jsonl"), "c")
    path.with_name("broken.jsonl").write_text("x\n")
    os.utime(path, (2**30, 2**30))
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch("name +model +turns +tokens +last used +size", lines[0])
    assert any(re.match(r"talk 2 +m +1 +12 +20\d\d-", line) for line in lines)
    assert any(re.match(r"broken +- +damaged +- ", line) for line in lines)
    assert re.match(r"trip +some\.gguf +2 +12 +2004-01-10 \d\d:37 +1\.[4-9] kB", lines[-1])
    assert run("list", "--json") == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)["sessions"]}
    assert found["trip"]["turns"] == 2 and found["trip"]["bytes"] == path.stat().st_size + 1000 and found["broken"]["turns"] is None


def test_the_number_of_tokens_is_that_of_what_is_left(path, capsys):
    """After every record: turns that are taken back take their tokens with them, and what nobody has counted is not told."""

    def tokens() -> str:
        assert run("list") == 0
        found = re.search(r"^trip +m\S* +\d +(\S+) ", capsys.readouterr().out, re.MULTILINE)[1]
        assert run("show", "trip") == 0 and re.search(rf"^tokens +{found}$", capsys.readouterr().out, re.MULTILINE)
        return found

    def answer(n: int | None) -> None:
        transcript.add_piece("x")
        transcript.end_answer("end", [1], n)

    path.parent.mkdir(parents=True)
    with Transcript.open(path, model="m", system=None) as transcript:
        for n in (20, 40, 60):
            transcript.add_user("a")
            answer(n)
        assert tokens() == "60"
        transcript.add_undo()
        assert tokens() == "40"
        transcript.add_regen()
        assert tokens() == "20"
        answer(45)
        assert tokens() == "45"
        transcript.add_user("b")
        assert tokens() == "45"
        answer(None)
        assert tokens() == "-"
        transcript.add_undo(2)
        assert tokens() == "20"
        # other tokens, or other ones before the first turn
        for change in (lambda: transcript.add_system("Be kind."), lambda: transcript.add_model("m2"), transcript.add_clear):
            change()
            assert tokens() == "-"
            transcript.add_user("c")
            answer(30)
            assert tokens() == "30"


def test_show_and_export(path, capsys, tmp_path):
    make(path, "a", "Was\nnun? ☃")
    with Transcript.resume(path) as transcript:
        transcript.add_user("b")
        transcript.add_piece("half")
    assert run("show", "trip") == 0
    shown = capsys.readouterr()
    assert re.search(r"^system +Be brief\.$", shown.out, re.MULTILINE) and shown.out.endswith("\n>>> b\n\nhalf\n") and "cut off" in shown.err
    assert run("export", "trip") == 0
    assert capsys.readouterr().out == (
        "# trip\n\n## System\n\nBe brief.\n\n## You\n\na\n\n## Answer\n\na!\n\n## You\n\nWas\nnun? ☃\n\n## Answer\n\nWas\nnun? ☃!\n\n"
        "## You\n\nb\n\n## Answer (cut off)\n\nhalf\n"
    )
    out = tmp_path / "out.json"
    assert run("export", str(path), "--format", "json", "-o", str(out)) == 0
    assert load(out).messages == Transcript.read(path).messages and load(out).system == "Be brief."
    assert "is there already" in failure("export", "trip", "-o", str(out)) and load(out).messages
    assert run("export", "trip", "-o", str(out), "--force") == 0 and out.read_text().startswith("# trip")
    assert "cannot write" in failure("export", "trip", "-o", str(tmp_path / "no" / "where"))


def test_rename(path):
    make(path, "a")
    archive_path(snapshot_path(path)).write_bytes(bytes(500))
    content = path.read_bytes()
    make(path.with_name("taken.jsonl"), "b")
    assert "is there already" in failure("rename", "trip", "taken")
    assert "is there already" in failure("rename", "trip", "trip")
    assert "is no name" in failure("rename", "trip", ".hidden")
    assert path.read_bytes() == content
    assert run("rename", "trip", "new name") == 0
    new = path.with_name("new name.jsonl")
    assert new.read_bytes() == content and snapshot_path(new).stat().st_size == 1000
    assert archive_path(snapshot_path(new)).stat().st_size == 500
    assert not path.exists() and not snapshot_path(path).exists() and not archive_path(snapshot_path(path)).exists()


def test_a_session_that_leaves_the_others_is_told_of_and_no_directory_is_made(path, chat, tmp_path, monkeypatch, capsys):
    make(path, "a")
    content = path.read_bytes()
    monkeypatch.chdir(tmp_path)
    for command in ("rename", "fork"):
        said = failure(command, "trip", "a b/c")
        assert "'a b/c' is a file in a b, which is no directory" in said and "a name without /" in said and said.count("\n") == 1
    result = chat("--session", "a b/c", stdin=[])
    assert result.returncode == 1 and "which is no directory" in result.stderr
    assert "which is no directory" in chat(stdin=["/fork a b/c"]).stderr
    assert path.read_bytes() == content and not (tmp_path / "a b").exists()
    (tmp_path / "a b").mkdir()
    capsys.readouterr()
    for command in (["fork", "trip", "a b/c"], ["rename", "trip", "a b/d.jsonl"]):
        assert run(*command) == 0
        where = tmp_path / command[2]
        assert capsys.readouterr().err == f"kvlocal: the session is in the file {where}, which `kvlocal sessions list` does not show\n"
        assert where.read_bytes() == content
    assert run("rename", "a b/d.jsonl", "trip") == 0 and capsys.readouterr().err == "" and path.read_bytes() == content


def test_fork(path):
    make(path, "a", "b", "c")
    archive_path(snapshot_path(path)).write_bytes(bytes(500))
    content, other = path.read_bytes(), path.with_name("other.jsonl")
    assert run("fork", "trip", "other") == 0
    assert other.read_bytes() == content == path.read_bytes() and snapshot_path(other).read_bytes() == bytes(1000)
    assert archive_path(snapshot_path(other)).read_bytes() == bytes(500)
    for file in (other, snapshot_path(other), archive_path(snapshot_path(other))):
        assert file.stat().st_mode & 0o777 == 0o600
    for n in (0, 2, 3):
        assert run("fork", "trip", f"first {n}", "--turns", str(n)) == 0
        new = path.with_name(f"first {n}.jsonl")
        assert messages(new) == messages(path)[: 2 * n] and new.read_bytes().startswith(content)
    assert "3 turns of you: give --turns 0 to 3" in failure("fork", "trip", "more", "--turns", "4")
    assert "is there already" in failure("fork", "trip", "other") and "is there already" in failure("fork", "trip", "trip")
    assert "is no name" in failure("fork", "trip", ".hidden")
    assert "there is no session none" in failure("fork", "none", "more")
    with Transcript.resume(path):
        assert "is in use" in failure("fork", "trip", "more")
    assert not path.with_name("more.jsonl").exists() and path.read_bytes() == content


def test_a_fork_goes_on_from_the_snapshot(chat, path):
    """With all of it, or where it parts; in the chat too, and the session that it came from is as it was."""
    options = ("--archive", "disk", "--session")
    said = chat(*options, "trip", stdin=ASKED[:3])
    assert said.returncode == 0, said.stderr
    content = path.read_bytes()
    assert run("fork", "trip", "other", "--turns", "1") == 0
    result = chat(*options, "other", "--verbose", stdin=[*ASKED[1:3], "/fork third", ASKED[3], "/fork other", "/undo 3"])
    assert result.returncode == 1 and "back in other: 2 messages" in result.stderr and "again" not in result.stderr
    assert "is there already" in result.stderr and "this chat goes on in the session third" in result.stderr
    assert messages(path.with_name("other.jsonl")) == messages(path) and path.read_bytes() == content
    third = path.with_name("third.jsonl")
    assert archive_path(snapshot_path(third)).stat().st_size > 10**6
    assert messages(third) == messages(path)[:2] and all(json.dumps(text)[1:-1] in third.read_text() for text in ASKED)
    result = chat(*options, "third", "--verbose", stdin=ASKED[1:3])
    assert "back in third: 2 messages" in result.stderr and "again" not in result.stderr
    assert messages(third) == messages(path)


def test_delete_asks_first(path):
    make(path, "a")
    archive_path(snapshot_path(path)).write_bytes(bytes(500))
    assert "confirm with --yes" in failure("delete", "trip") and path.exists()
    for answer, stays in (("n\r", True), ("y\r", False)):
        with Terminal("sessions", "delete", "trip", env=os.environ) as terminal:
            terminal.wait_for(r"\[y/N\]")
            terminal.type(answer)
            assert terminal.wait_for_end() == (130 if stays else 0)
        assert path.exists() == stays and snapshot_path(path).exists() == stays
    make(path, "a")
    assert run("delete", "trip", "--yes") == 0 and os.listdir(path.parent) == []
    for command in (["delete", "trip", "--yes"], ["show", "trip"], ["export", "trip"], ["rename", "trip", "a"]):
        assert failure(*command).startswith("kvlocal: there is no session trip: ")


@pytest.mark.parametrize("content", [b"", b"A thesis of two hundred pages.\n", b'{"format": "kvlocal-chat"}', b'{"record": "user"}\n', b"{"])
def test_what_is_no_transcript_is_left_alone(tmp_path, content):
    """Whatever it is called and wherever it is."""
    thesis = tmp_path / "thesis.jsonl"
    thesis.write_bytes(content)
    for command in (["delete", "--yes", str(thesis)], ["rename", str(thesis), "trip"], ["rename", str(thesis), str(tmp_path / "b.jsonl")]):
        assert "is no transcript, so it is left alone" in failure(*command)
    assert thesis.read_bytes() == content and os.listdir(tmp_path) == ["thesis.jsonl"]


def test_what_has_the_new_name_is_left_alone(path, tmp_path):
    make(path, "a")
    content = path.read_bytes()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "dangling"):
        assert "is there already" in failure("rename", "trip", str(tmp_path / f"{name}.jsonl"))
    assert "make its directory" in failure("rename", "trip", str(tmp_path / "new" / "b.jsonl"))
    assert path.read_bytes() == content and not (tmp_path / "new").exists() and not (tmp_path / "nowhere").exists()


def test_a_damaged_session_and_what_a_crash_left_of_one_can_be_deleted(path):
    make(path, "a")
    with path.open("ab") as file:
        file.write(b"what is this\n")
    assert run("delete", "trip", "--yes") == 0
    for content in (b"", b'{"record": "hea'):
        path.write_bytes(content)
        assert run("delete", "trip", "--yes") == 0
    assert os.listdir(path.parent) == []


def test_rename_to_another_file_system(path, tmp_path, monkeypatch):
    """All of it is there then, or all of it here, and nothing else."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        target = Path(folder) / "b.jsonl"
        make(path, "a")
        if path.stat().st_dev == target.parent.stat().st_dev:
            pytest.skip("there is one file system here")
        content = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) - 1, limits[1]))
        try:
            assert "cannot write" in failure("rename", "trip", str(target))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir(folder) == [] and path.read_bytes() == content and snapshot_path(path).exists()
        assert run("rename", "trip", str(target)) == 0
        assert os.listdir(path.parent) == [] and sorted(os.listdir(folder)) == ["b.jsonl", "b.jsonl.snapshot"]
        assert target.read_bytes() == content and target.stat().st_mode & 0o777 == 0o600
        assert snapshot_path(target).stat().st_size == 1000 and snapshot_path(target).stat().st_mode & 0o777 == 0o600


def test_a_plain_chat_is_locked_too(tmp_path):
    path = tmp_path / "chats" / "now.jsonl"
    with Transcript.open(path, model="m", system=None) as transcript:
        transcript.add_user("a")
        assert "is in use" in failure("delete", str(path), "--yes")
        with pytest.raises(KvlocalError, match="is in use"):
            Transcript.resume(path)
    assert run("delete", str(path), "--yes") == 0


def test_list_reads_no_more_than_it_shows(path, monkeypatch, capsys):
    """The pieces of answers, which are nearly all of a transcript, are not looked into."""
    make(path, "a")
    with Transcript.resume(path) as transcript:
        transcript.add_user("b")
        for i in range(20_000):
            transcript.add_piece(f"word {i} ")
        transcript.end_answer("end", range(20_000), 20_020)
    loads, parsed = json.loads, []
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    assert run("list") == 0
    assert re.search(r"trip +m +2 +20020 ", capsys.readouterr().out) and len(parsed) < 10


def test_a_home_that_nobody_has_is_part_of_the_path():
    assert session_path("~no-such-user/a.jsonl") == Path("~no-such-user/a.jsonl")
