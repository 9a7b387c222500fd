"""`kvlocal chat` on a terminal and through a pipe, each as a process of its own, on a real model."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from terminal import Terminal

from kvlocal.conversations.transcript import Transcript

# one thread: two that wait for each other crawl when the machine is busy
GREEDY = ("--threads", "1", "--temp", "0", "--max-tokens", "8")
STATUS = r"\d+\.\d tok/s · \d+/\d+ cells · \d+ tokens of history · \d+ compressions?"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def env(state: Path) -> dict[str, str]:
    return {**os.environ, "KVLOCAL_STATE_DIR": str(state)}


@pytest.fixture
def chat(env, smollm2):
    """A chat through pipes."""

    def run(*args: str, stdin: str | bytes) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "kvlocal_cli", "chat", str(smollm2), *GREEDY, *args]
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        result = subprocess.run(command, input=data, env=env, capture_output=True, timeout=60)
        result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
        return result

    return run


@pytest.fixture
def terminal(env, smollm2):
    def start(*args: str, **kwargs: Path) -> Terminal:
        return Terminal("chat", str(smollm2), *GREEDY, *args, env=env, **kwargs)

    return start


def transcripts(state: Path) -> list[Path]:
    return sorted((state / "chats").glob("*.jsonl"))


def contents(state: Path) -> list[str]:
    [path] = transcripts(state)
    return [message["content"] for message in Transcript.read(path).messages]


def test_piped_turns(chat, state):
    result = chat(stdin='Hello\n\n"""\nWhat is\n2+2?\n"""\n//slash')
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout and ">>>" not in result.stdout
    said = contents(state)
    assert said[::2] == ["Hello", "What is\n2+2?", "/slash"]
    answers = [answer.rstrip("\n") + "\n" for answer in said[1::2]]
    # a reader can tell them apart
    assert result.stdout == "\n".join(answers)
    assert chat("--no-transcript", "--separator", "%%", stdin="Hello\n").stdout == answers[0]
    assert chat("--no-transcript", "--separator", "%%", stdin="Hello\n/regen\n").stdout == answers[0] + "%%\n" + answers[0]


def test_piped_commands(chat, state):
    lines = ["Hello", "/set", "/set temp 0.5", "/undo", "/system", "/set", "Hi there", "/regen", "/clear", "/kv", "/bye", "Unread"]
    result = chat("--verbose", "--system", "Be kind.", stdin="\n".join(lines))
    assert result.returncode == 0
    assert re.search(r"^temp +0\.0$", result.stdout, re.MULTILINE) and re.search(r"^temp +0\.5$", result.stdout, re.MULTILINE)
    assert re.search(r"^max-tokens +8$", result.stdout, re.MULTILINE)
    assert "\nBe kind.\n" in result.stdout
    assert re.search(r"^total: \d+ tokens seen", result.stdout, re.MULTILINE)
    assert len(re.findall(STATUS, result.stderr)) == 3
    assert "taken back: Hello" in result.stderr
    assert contents(state) == []
    assert chat("--no-transcript", stdin="/system").stdout == "You are a helpful AI assistant named SmolLM, trained by Hugging Face\n"
    assert "Unread" not in transcripts(state)[0].read_text()


@pytest.mark.parametrize("archive", [(), ("--archive", "ram")])
def test_turns_are_taken_back_and_put_otherwise(chat, state, archive):
    lines = ["One.", "Two.", "Three.", "/undo 2", "Four.", "/edit 1 Five.", "Six.", "Seven.", "/edit 2  Eight nine.", "/regen"]
    result = chat(*archive, "--kv-budget", "96", "--stride", "32", "--verbose", stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    assert "taken back: 2 turns, from: Two." in result.stderr
    assert contents(state)[::2] == ["Five.", "Eight nine."]
    again = chat(*archive, "--kv-budget", "96", "--stride", "32", "--no-transcript", stdin="Five.\nEight nine.")
    assert contents(state)[1::2] == [answer.strip() for answer in again.stdout.splitlines()[::2]]
    # nothing that was said is gone from the file
    [path] = transcripts(state)
    typed = [record["content"] for record in map(json.loads, path.read_text().splitlines()) if record["record"] == "user"]
    assert typed == ["One.", "Two.", "Three.", "Four.", "Five.", "Six.", "Seven.", "Eight nine."]


def test_a_chat_goes_on_in_a_session(chat, state):
    session = state / "sessions" / "other.jsonl"
    result = chat("--verbose", stdin="One.\n/fork other\nTwo.\n/fork other\nThree.")
    assert result.returncode == 1 and result.stderr.count("kvlocal: ") == 1 and "is there already" in result.stderr
    assert contents(state)[::2] == ["One."]
    assert [message["content"] for message in Transcript.read(session).messages][::2] == ["One.", "Two.", "Three."]
    result = chat("--session", "other", "--verbose", stdin="Four.")
    assert "back in other: 6 messages" in result.stderr and "again" not in result.stderr
    result = chat("--no-transcript", "--system", "Be kind.", stdin="One.\n/fork another\nTwo.")
    kept = Transcript.read(session.with_name("another.jsonl"))
    assert [message["content"] for message in kept.messages][::2] == ["One.", "Two."] and kept.system == "Be kind."


def test_failed_commands_are_sentences_and_an_exit_code(chat, tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    lines = ["/kvv", "/regen", "/undo", "/set temp warm", "/set temp -1", "/set tmp 1", "/set kv-budget 9", "/set policy none"]
    lines += ["/set policy gkv lam", f"/load {other}", "/load", f"/save {other}", "/save /nowhere/at/all"]
    lines += ["/undo 0", "/undo x", "/edit", "/edit 1", "/edit x y", "/edit 1 y", "/fork", "/fork a:b", "/fork /proc/x.jsonl", "Hello"]
    result = chat(stdin="\n".join(lines))
    assert result.returncode == 1
    errors = result.stderr.splitlines()
    assert len(errors) == len(lines) - 1 and all(line.startswith("kvlocal: ") for line in errors)
    assert "did you mean /kv?" in errors[0]
    assert "temp takes a number" in errors[3]
    assert "did you mean temp?" in errors[5]
    assert other.read_text() == "{}"
    assert result.stdout.count("\n") >= 1


def test_kv_shows_what_was_kept_after_a_compression(chat):
    text = "The quick brown fox jumps over the lazy dog. " * 20
    lines = [text, "Who jumps?", "/kv", "/set kv-budget 96", "/set policy streaming", "/kv", "/set"]
    result = chat("--kv-budget", "128", "--stride", "32", "--verbose", stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    first = re.search(r"compressions? \((\d+) in this turn\)", result.stderr)
    assert first and int(first[1]) > 0
    rows = [line for line in result.stdout.splitlines() if re.search("[█░]", line)]
    assert re.match(r" +system +\d+ +\d+ +\d+\.0 +\d+\.0  █{24}  pinned", rows[0])
    seen, kept = re.match(r" +1  user +(\d+) +\d+ +[\d.]+ +([\d.]+)  █+░+  The quick", rows[1]).groups()
    assert int(seen) > 190 and float(kept) < 128
    used = [int(n) for n in re.findall(r"(\d+) cells kept .*of a budget of 128", result.stdout)]
    assert 128 <= used[0] <= 160
    assert re.search(r"cells kept .*of a budget of 96", result.stdout)
    assert re.search(r"^policy +streaming$", result.stdout, re.MULTILINE) and re.search(r"^kv-budget +96$", result.stdout, re.MULTILINE)


def test_an_archive_shows_what_it_gave_back(chat):
    asked = [f"Name three {things} and say where they live or grow, and what they are good for." for things in ("birds", "fish", "trees")]
    lines = ["/why", *asked, "/kv", "/why", "/why all", "/why not"]
    result = chat("--archive", "ram", "--kv-budget", "96", "--stride", "16", "--max-tokens", "40", "--verbose", stdin="\n".join(lines))
    assert result.returncode == 1
    assert result.stderr.startswith("kvlocal: there is no answer yet") and "kvlocal: /why takes nothing, or all" in result.stderr
    last = [line for line in result.stderr.splitlines() if re.search(STATUS, line)][-1]
    assert re.search(r" · recalled from turns? [123](, [123])*$", last)
    kv, why, more = re.split("^turn  role .*\n", result.stdout, flags=re.MULTILINE)[1:]
    assert re.search(r"^turn  role +seen  archived  recalled  +kept$", result.stdout, re.MULTILINE)
    rows = re.findall(r"^ +(\d) +(\w+) +(\d+) +(\d+) +([\d.]+) +([\d.]+)  [█░]{24}", kv, re.MULTILINE)
    assert [row[:2] for row in rows if row[1] != "nexus"] == [(str(i), role) for i in (1, 2, 3) for role in ("user", "assistant")]
    assert {row[0] for row in rows if row[1] == "nexus"} >= {"1", "2"}
    assert all(int(archived) == int(seen) for turn, _, seen, archived, _, _ in rows if turn != "3") and sum(float(row[4]) for row in rows) > 1
    assert all(float(recalled) <= float(kept) for *_, recalled, kept in rows)
    assert re.search(r"^turn  role +share  recalled$", result.stdout, re.MULTILINE)
    rows = re.findall(r"^ +(\d)  (\w+) +(\d+)% +([\d.]+)  [█░]{24}(?:  (.+))?", why, re.MULTILINE)
    assert sorted(row[:2] for row in rows if row[1] != "nexus") == [(i, role) for i in "12" for role in ("assistant", "user")]
    assert 97 <= sum(int(row[2]) for row in rows) <= 103 and {row[4] for row in rows} >= {text[:60].strip() for text in asked[:2]}
    assert re.search(r"^attention to the whole conversation: \d+% to earlier turns, \d+% to this one, \d+% to the beginning", why, re.MULTILINE)
    assert more.startswith(why.partition("\nturn")[0])


def test_an_archive_of_a_smaller_type_takes_less(chat):
    """And gives back what was asked for; turns are taken back with it."""
    asked = [f"Name three {things} and say where they live or grow, and what they are good for." for things in ("birds", "fish", "trees")]
    sizes = {}
    for kind in ("f16", "q4_0"):
        options = ("--archive", "ram", "--archive-type", kind, "--kv-budget", "96", "--stride", "16", "--max-tokens", "40", "--verbose")
        result = chat(*options, stdin="\n".join([*asked, "/kv", "/undo 2", asked[1]]))
        assert result.returncode == 0, result.stderr
        assert "recalled from turn" in result.stderr and "given up" not in result.stderr and "again" not in result.stderr
        sizes[kind] = int(re.search(r"archive: \d+ tokens, (\d+) MB", result.stdout)[1])
    # what the way back takes besides is the same
    assert sizes["q4_0"] < 0.7 * sizes["f16"]


def test_why_without_an_archive(chat):
    asked = [f"Name a {thing}." for thing in ("bird", "fish", "tree", "river", "town", "star")]
    result = chat("--policy", "snapkv", stdin="\n".join([*asked, "/why", "/why all", "/set policy streaming", "/why"]))
    first, both = result.stdout.split("/why all shows each\n")
    shown, rest = (re.findall(r"^ +(\d)  (\w+) +(\d+)%  [█░]{24}", text, re.MULTILINE) for text in (first, both))
    assert len(shown) == 8 and len(rest) == 10 and sorted({row[0] for row in rest}) == list("12345")
    (n, share) = re.findall(r"^and (\d) others with (\d+)% together", first, re.MULTILINE)[0]
    assert n == "2" and abs(sum(int(row[2]) for row in shown) + int(share) - 100) < 6 and both.count("attention to what the cache holds: ") == 2
    assert result.returncode == 1 and "streaming does not look at attention" in result.stderr and result.stderr.count("\n") == 1


def test_save_and_load(chat, state, tmp_path):
    saved = tmp_path / "saved.json"
    first = chat("--system", "Be kind.", stdin=f"Hello\nMy name is Ada.\n/save {saved}\n/undo\n/save --force {saved}\n/regen\n")
    assert first.returncode == 0, first.stderr
    data = json.loads(saved.read_text())
    assert data["format"] == "kvlocal-chat" and data["system"] == "Be kind." and data["settings"]["temp"] == 0
    assert [message["role"] for message in data["messages"]] == ["user", "assistant"]
    [transcript] = transcripts(state)
    second = chat(f"--load={transcript}", "--verbose", stdin=f"/system\n/save {tmp_path / 'two.json'}\n/load {saved}\n/regen")
    assert second.returncode == 0, second.stderr
    assert "read 2 messages" in second.stderr
    assert second.stdout.splitlines() == ["Be kind.", *first.stdout.splitlines()[4:]]
    assert json.loads((tmp_path / "two.json").read_text())["messages"] == data["messages"]


def test_what_set_shows_and_takes(chat):
    """Greedy is greedy, however it is asked for; what cannot be set is told, and what goes with another policy."""
    wrong = ["/set stop x", "/set stride 3", "/set stopp x", "/set warmth 1"]
    lines = ["/set temp 0.5", "/set", "/set temp 0", "/set", "/set repeat-penalty 1.3", "/set temp 0.5", "/set policy full", "/set", *wrong]
    result = chat("--no-transcript", "--verbose", stdin="\n".join(lines))
    assert re.findall(r"^repeat-penalty +(\S+)$", result.stdout, re.MULTILINE) == ["1.1", "1.0", "1.3"]
    assert re.findall(r"^(\S+) .*\(as the chat began\)$", result.stdout, re.MULTILINE) == 3 * ["stride", "read-stride", "ctk", "ctv"]
    assert re.search("^kv-budget: 8192, which goes with that policy$", result.stderr, re.MULTILINE)
    errors = [line for line in result.stderr.splitlines() if line.startswith("kvlocal: ")]
    assert [error.rpartition(": ")[2][:26] for error in errors] == [
        "begin a chat with --stop", "begin a chat with --stride", "begin a chat with --stop", "it takes temp, top-k, top-p"[:26]
    ]  # fmt: skip
    result = chat("--no-transcript", "--kv-ratio", "0.5", stdin="/set policy full\n/set policy streaming")
    assert result.returncode == 1 and "removes nothing" in result.stderr and result.stderr.count("\n") == 1


def test_how_tokens_are_drawn_can_be_set(chat):
    lines = ["/set dry-multiplier 0.8", "/set xtc-probability 0.5", "/set presence-penalty 0.3", "/set logit-bias 17-100, 18+1.5", "/set",
             "/set logit-bias none", "/set"]  # fmt: skip
    result = chat("--no-transcript", stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    shown = dict(re.findall(r"^(\S+) +(\S.*)$", result.stdout.partition("logit-bias")[0], re.MULTILINE))
    assert (shown["presence-penalty"], shown["temp"]) == ("0.3", "0.0")
    assert re.findall(r"^(?:logit-bias|dry-multiplier|xtc-probability) +(\S.*)$", result.stdout, re.MULTILINE)[:6] == [
        "17-100 18+1.5", "0.8", "0.5", "-", "0.8", "0.5"
    ]  # fmt: skip
    wrong = chat("--no-transcript", stdin="/set logit-bias cat\n/set dry-base 0\n/set dry-allowed-length x")
    assert wrong.returncode == 1 and [line.startswith("kvlocal: ") for line in wrong.stderr.splitlines()] == [True] * 3


def test_save_replaces_nothing_without_being_told(chat, terminal, tmp_path):
    saved, text = tmp_path / "saved.json", tmp_path / "talk.md"
    text.write_text("mine")
    result = chat("--no-transcript", stdin=f"Hello\n/save {saved}\nGood day\n/save {saved}\n/save {text}\n/save --force\n/save --force {text}")
    assert result.returncode == 1
    errors = result.stderr.splitlines()
    assert [f"{path} is there already: choose another name, or write /save --force {path}" in errors[i] for i, path in ((0, saved), (1, text))]
    assert len(errors) == 3 and "needs a file name" in errors[2]
    assert len(json.loads(saved.read_text())["messages"]) == 2
    answers = result.stdout.split("\n\n")
    assert text.read_text() == f"# talk\n\n## You\n\nHello\n\n## Answer\n\n{answers[0]}\n\n## You\n\nGood day\n\n## Answer\n\n{answers[1]}"
    with terminal("--no-transcript", f"--load={saved}") as typed:
        typed.wait_for_prompt()
        typed.type("/undo\r")
        typed.wait_for_prompt()
        for answer, n_messages in (("n\r", 2), ("\x03", 2), ("y\r", 0)):
            typed.type(f"/save {saved}\r")
            assert f"{saved} is there already. Replace it? [y/N]" in typed.wait_for(r"\[y/N\]")
            typed.type(answer)
            assert ("saved 0 messages" in typed.wait_for_prompt()) == (n_messages == 0)
            assert len(json.loads(saved.read_text())["messages"]) == n_messages
        typed.type("\x04")
        assert typed.wait_for_end() == 0


def test_what_was_cleared_or_replaced_comes_back(chat, state, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": "kvlocal-chat", "version": 1, "system": "Be rude.", "messages": [{"role": "user", "content": "Hm"}]}))
    lines = ["Hello", "/clear", "Good day", f"/load {other}", "/undo", "/undo", "/system", "/undo", "/undo", "/regen", "/undo", "/undo"]
    result = chat("--system", "Be kind.", "--verbose", stdin="\n".join(lines))
    assert result.returncode == 1 and result.stderr.count("\nkvlocal: ") == 1
    # the turn that was loaded, the one before that, the one that was cleared, and there is no more
    said = re.findall("^(taken back|back again|kvlocal): ([^:\n]*)", result.stderr, re.MULTILINE)
    assert said == [("taken back", "Hm"), ("back again", "2 messages"), ("taken back", "Good day"), ("back again", "2 messages"),
                    ("taken back", "Hello"), ("kvlocal", "there is nothing to undo")]  # fmt: skip
    first, _, _, system, _, last = result.stdout.splitlines()
    assert system == "Be kind." and last == first
    assert contents(state) == []


def test_loading_a_turn_without_an_answer(chat, state, tmp_path):
    pending = tmp_path / "pending.json"
    pending.write_text(json.dumps({"format": "kvlocal-chat", "version": 1, "messages": [{"role": "user", "content": "Hello"}]}))
    result = chat(f"--load={pending}", stdin=f"/regen\n/load {pending}\nGood day\n")
    assert result.returncode == 0, result.stderr
    assert contents(state)[:3] == ["Hello", "", "Good day"]
    assert len(result.stdout.splitlines()) >= 2


def test_input_that_is_no_utf8(chat, state):
    assert chat(stdin=b"Caf\xe9 \xff\r\n").returncode == 0
    assert contents(state)[0] == "Caf\ufffd \ufffd"


def test_without_a_place_to_write_the_chat_goes_on(chat, state):
    state.write_text("in the way")
    result = chat(stdin="Hello\nHello\n")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) >= 2
    assert result.stderr.count("\n") == 1 and "without a transcript" in result.stderr


def test_no_transcript(chat, state):
    assert chat("--no-transcript", stdin="Hello\n").returncode == 0
    assert not state.exists()


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(terminal, state):
    with terminal("--max-tokens", "4000") as chat:
        assert "kept in" in chat.wait_for_prompt()
        chat.type("Write a long story about a cat.\r")
        chat.wait_for("Once|once|cat.*[Cc]at[^ ]* ")
        chat.type("\x03\x03")
        shown = chat.wait_for_prompt()
        assert re.search("stopped · " + STATUS, shown)
        chat.type("/set max-tokens 6\r")
        chat.wait_for_prompt()
        chat.type("Hello\r")
        assert re.search("cut off at 6 tokens · " + STATUS, chat.wait_for_prompt())
        chat.type("not sent\x03")
        assert "leaves" in chat.wait_for_prompt()
        chat.type("\x04")
        assert chat.wait_for_end() == 0
    assert "Traceback" not in chat.output
    said = contents(state)
    assert said[::2] == ["Write a long story about a cat.", "Hello"] and said[1]
    assert "Hello" in (state / "history").read_text()


def test_ctrl_c_while_a_long_turn_is_read_takes_it_back(terminal, state, tmp_path):
    # three megabytes would take minutes
    long = tmp_path / "long.json"
    messages = [{"role": "user", "content": "The quick brown fox. " * 150_000}]
    long.write_text(json.dumps({"format": "kvlocal-chat", "version": 1, "messages": messages}))
    with terminal("--max-tokens", "4") as chat:
        chat.wait_for_prompt()
        chat.type("Hello\r")
        chat.wait_for_prompt()
        chat.type(f"/load {long}\r")
        chat.wait_for("reading")
        chat.type("\x03")
        assert "the chat is as it was" in chat.wait_for_prompt()
        chat.type("/kv\r")
        assert "Hello" in chat.wait_for_prompt()
        chat.type("\x1b[200~" + "The quick brown fox. " * 3000 + "\x1b[201~\r")
        chat.wait_for("reading")
        chat.type("\x03\x03")
        assert "taken back" in chat.wait_for_prompt()
        chat.type("/bye\r")
        assert chat.wait_for_end() == 0
    assert contents(state)[::2] == ["Hello"]


def test_what_a_terminal_shows_fits_it(terminal):
    """No row is broken, and Ctrl-C does not stand in the answer."""
    with terminal("--max-tokens", "4000", "--no-transcript") as chat:
        chat.wait_for_prompt()
        chat.type("Write a long story about a cat, " + "with whiskers and paws " * 12 + ".\r")
        chat.wait_for("Once|once|cat.*[Cc]at[^ ]* ")
        chat.type("\x03")
        shown = chat.wait_for_prompt()
        assert "stopped" in shown and "^C" not in shown
        chat.type("/kv\r")
        rows = [line for line in chat.wait_for_prompt().splitlines() if re.search("[█░]", line) and "nexus" not in line]
        assert len(rows) == 3 and all(len(row) <= 120 for row in rows) and rows[1].endswith("…")


def test_kill_in_mid_answer_loses_nothing_shown(terminal, state):
    with terminal("--max-tokens", "4000") as chat:
        chat.wait_for_prompt()
        chat.type("Write a long story about a cat.\r")
        chat.wait_for(r"\?2004l")
        while len(" ".join(chat.words_behind_prompt())) < 40:
            chat.wait_for(r"\w")
        chat.kill(signal.SIGKILL)
        assert chat.wait_for_end() == -signal.SIGKILL
        shown = " ".join(chat.words_behind_prompt())
    [path] = transcripts(state)
    kept = Transcript.read(path)
    assert kept.messages[0] == {"role": "user", "content": "Write a long story about a cat."}
    assert " ".join(kept.messages[1]["content"].split()).startswith(shown) and len(shown) >= 40
    assert kept.cut_off == [1]


def test_several_lines_and_a_status_line_on_a_terminal(terminal, state):
    with terminal() as chat:
        chat.wait_for_prompt()
        chat.type('"""One\r')
        chat.wait_for(r"\.\.\.")
        chat.type('two"""\r')
        assert re.search(STATUS, chat.wait_for_prompt())
        chat.type("/help\r")
        assert "/regen" in chat.wait_for_prompt()
        chat.type("\x04")
        assert chat.wait_for_end() == 0
    assert contents(state)[0] == "One\ntwo"


def test_an_answer_that_goes_to_a_file_is_plain(terminal, state, tmp_path):
    with terminal(stdout=tmp_path / "out") as chat:
        chat.wait_for_prompt()
        chat.type("Hello\r")
        assert re.search(STATUS, chat.wait_for_prompt())
        chat.type("\x04")
        assert chat.wait_for_end() == 0
    assert (tmp_path / "out").read_text() == contents(state)[1].rstrip("\n") + "\n"


def test_turns_are_read_again_while_the_person_types(terminal, chat, state):
    """A turn typed at once ends the second read, and the answers are those of a chat that reads no turn again: nothing is evicted here."""
    asked = ["Name three birds.", "Name three trees that grow in the north.", "And one fish."]
    with terminal("--policy", "kvzip-gkv", "--max-tokens", "16") as typed:
        typed.wait_for_prompt()
        for i, text in enumerate(asked):
            typed.type(text + "\r")
            assert re.search(STATUS, typed.wait_for_prompt())
            if i == 1:
                time.sleep(1)
        typed.type("\x04")
        assert typed.wait_for_end() == 0
    answers = contents(state)
    transcripts(state)[0].unlink()
    piped = chat("--policy", "kvzip-gkv", "--max-tokens", "16", "--idle", "off", stdin="\n".join(asked))
    assert piped.returncode == 0 and contents(state) == answers
