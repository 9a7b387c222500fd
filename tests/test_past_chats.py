"""`kvlocal logs`, `sessions prune` and `chats prune`: past conversations are found, and make room without a word being lost."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from terminal import Terminal

from kvlocal.conversations.archive_file import archive_path
from kvlocal.conversations.named_sessions import beside, kept_path
from kvlocal.conversations.past_chats import find
from kvlocal.conversations.pruning import KEPT_CHATS, bound_chats, prunable, prune
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.snapshot import snapshot_path
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal.files.atomic import staging_of
from kvlocal_cli.main import main

DAY = 86400


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KVLOCAL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("KVLOCAL_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "state"


def begin(path: Path, *turns: tuple[str, str], days: float = 0, caches: int = 0) -> Path:
    """A conversation that was used so many days ago, with caches of so many bytes in all."""
    with Transcript.open(path, model="smollm2-135m", system=None) as transcript:
        for user, answer in turns:
            transcript.add_user(user)
            for piece in re.findall(r".{1,4}", answer, re.DOTALL):
                transcript.add_piece(piece)
            transcript.end_answer("end", n_tokens=30)
    if caches:
        snapshot_path(path).write_bytes(b"s" * 10)
        archive_path(snapshot_path(path)).write_bytes(b"a" * (caches - 10))
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


@pytest.fixture
def trip(state) -> Path:
    turns = ("Name a bird.", "The albatross crosses\n the Pacific."), ("And a TREE?", "The lighthouse keeper's oak.")
    return begin(state / "sessions/trip.jsonl", *turns, days=3, caches=1000)


@pytest.fixture
def chat(state) -> Path:
    return begin(state / "chats/20260101-000000-7.jsonl", ("Who keeps the lighthouse?", "Nobody does."), days=40, caches=500)


def call(*args: str) -> Result:
    return CliRunner().invoke(main, args, catch_exceptions=False)


def failed(result: Result, code: int = 1) -> str:
    assert result.exit_code == code and result.stdout == "" and result.stderr.startswith("kvlocal: ") and result.stderr.count("\n") == 1
    return result.stderr


# logs


def test_logs_lists_the_newest_first(state, trip, chat):
    (state / "chats/20260102-000000-8.jsonl").touch()
    (state / "sessions/broken.jsonl").write_text("nonsense\n")
    rows = [re.split(r"  +", line) for line in call("logs").stdout.splitlines()]
    assert [row[1:4] for row in rows] == [["broken", "-", "damaged"], ["trip", "smollm2-135m", "2 turns"], [chat.stem, "smollm2-135m", "1 turn"]]
    assert rows[1][4] == "Name a bird."
    result = call("logs", "-n", "1")
    assert len(result.stdout.splitlines()) == 1 and result.stderr == "kvlocal: there are more: -n 2 shows more\n"
    found = json.loads(call("logs", "--json").stdout)["conversations"]
    assert [(each["name"], each["kind"], each["turns"]) for each in found[1:]] == [("trip", "session", 2), (chat.stem, "chat", 1)]
    assert found[1]["path"] == str(trip) and found[1]["bytes"] == trip.stat().st_size + 1000 and found[0]["turns"] is None


def test_logs_finds_what_was_said(trip, chat):
    """Also across the pieces in which an answer came, across ends of lines, and in another case of letters."""
    assert call("logs", "crosses the pacific").stdout.splitlines()[1:] == ["    turn 1, answer: The albatross crosses the Pacific."]
    both = call("logs", "LIGHTHOUSE").stdout
    assert [line.split()[2] for line in both.splitlines() if not line.startswith(" ")] == ["trip", chat.stem]
    # in different turns
    found = json.loads(call("logs", "tree", "albatross", "--json").stdout)["conversations"]
    assert [(place["turn"], place["role"]) for place in found[0]["found"]] == [(1, "assistant"), (2, "user")] and len(found) == 1
    assert "'tree nobody' was said in none of them" in failed(call("logs", "tree", "nobody"))


def test_logs_looks_at_what_is_left_of_a_conversation(trip):
    with Transcript.resume(trip) as transcript:
        transcript.add_undo()
    assert call("logs", "oak").exit_code == 1 and call("logs", "albatross").exit_code == 0


def test_an_excerpt_is_short_and_has_the_word():
    text = f"{'a ' * 500}needle{' b' * 500}"
    (found,) = find(Conversation([{"role": "user", "content": text}]), ["needle"])
    assert "needle" in found.excerpt and len(found.excerpt) < 100 and found.excerpt[0] == found.excerpt[-1] == "…"


def test_control_characters_do_not_reach_the_terminal(state):
    begin(state / "chats/20260103-000000-9.jsonl", ("bad \x1b[31m word", "x"))
    assert "\x1b" not in call("logs").stdout + call("logs", "bad").stdout


def test_the_name_of_a_chat_goes_with_the_other_commands(state, chat):
    assert "Nobody does." in call("sessions", "show", chat.stem).stdout
    assert kept_path(chat.stem) == chat and kept_path("new") == state / "sessions/new.jsonl"
    said = chat.read_bytes()
    assert call("sessions", "rename", chat.stem, "keeper").exit_code == 0
    named = state / "sessions/keeper.jsonl"
    assert named.read_bytes() == said and not chat.exists() and all(part.exists() for part in beside(named))


# prune


def test_pruning_frees_caches_and_keeps_what_was_said(trip, chat):
    said = trip.read_bytes(), chat.read_bytes()
    staging_of(snapshot_path(chat)).write_bytes(b"left by a kill")
    shown = call("chats", "prune", "--older-than", "30d", "--dry-run")
    assert shown.exit_code == 0 and "514 bytes" in shown.stdout and "what was said stays" in shown.stdout
    assert all(part.exists() for part in beside(chat))
    assert "nobody can be asked" in failed(call("chats", "prune", "--older-than", "30d"), 2)
    result = call("chats", "prune", "--older-than", "30d", "--yes")
    assert result.exit_code == 0 and "514 bytes freed; what was said stays" in result.stdout
    assert not any(part.exists() for part in (*beside(chat), staging_of(snapshot_path(chat))))
    assert all(part.exists() for part in beside(trip))
    assert call("sessions", "prune", "--older-than", "30d", "--yes").stderr == "kvlocal: there is nothing to remove of such sessions\n"
    assert call("sessions", "prune", "--keep", "1", "--yes").exit_code == 0 and all(part.exists() for part in beside(trip))
    assert "1.0 kB freed" in call("sessions", "prune", "--keep", "0", "--older-than", "2d", "--yes").stdout
    assert not any(part.exists() for part in beside(trip)) and (trip.read_bytes(), chat.read_bytes()) == said


def test_what_was_said_goes_when_that_is_asked_for(trip, chat):
    assert call("sessions", "prune", "--keep", "0", "--transcripts", "--yes").exit_code == 0
    assert not trip.exists() and not any(part.exists() for part in beside(trip)) and chat.exists()


@pytest.mark.parametrize(("args", "said"), [
    ((), "give --older-than 30d, or --keep 10"),
    (("--older-than", "soon"), "'soon' is no time such as 12h"),
    (("--older-than", "-3d"), "'-3d' is no time"),
    (("--keep", "-1"), "--keep"),
])  # fmt: skip
def test_what_is_old_has_to_be_said(trip, args, said):
    assert said in failed(call("sessions", "prune", "--yes", *args), 2)
    assert all(part.exists() for part in beside(trip))


def test_a_conversation_that_a_process_has_is_left_alone(trip):
    with Transcript.resume(trip):
        result = call("sessions", "prune", "--keep", "0", "--transcripts", "--yes")
        assert result.exit_code == 0 and "is in use by another kvlocal" in result.stderr and "0 bytes freed" in result.stdout
        assert trip.exists() and all(part.exists() for part in beside(trip))


def test_a_conversation_that_was_used_meanwhile_is_left_alone(trip):
    (one,) = prunable(trip.parent)
    with Transcript.resume(trip) as transcript:
        transcript.add_user("One more.")
    with pytest.raises(KvlocalError, match="was used just now"):
        prune(one, transcript=True)
    assert trip.exists() and all(part.exists() for part in beside(trip))


def test_what_is_no_transcript_is_left_alone(state, trip):
    foreign = state / "sessions/notes.jsonl"
    foreign.write_text('{"mine": 1}\n')
    result = call("sessions", "prune", "--keep", "0", "--transcripts", "--yes")
    assert "notes.jsonl is no transcript" in result.stderr and foreign.read_text() == '{"mine": 1}\n' and not trip.exists()


def test_a_person_is_asked(trip, state):
    with Terminal("sessions", "prune", "--keep", "0", env=dict(os.environ)) as terminal:
        assert "What was said stays." in terminal.wait_for(r"\[y/N\]", 60)
        terminal.type("\n")
        assert terminal.wait_for_end() == 130
    assert all(part.exists() for part in beside(trip))


def test_chats_without_a_name_keep_few_caches_and_all_words(state, short_smollm2):
    chats = [begin(state / f"chats/20260101-00000{n}-1.jsonl", ("Hi", "Ho"), days=n + 1, caches=100) for n in range(KEPT_CHATS + 1)]
    said = [chat.read_bytes() for chat in chats]
    bound_chats()
    assert [any(part.exists() for part in beside(chat)) for chat in chats] == KEPT_CHATS * [True] + [False]
    newest = begin(state / "chats/20260102-000000-1.jsonl", ("Name a bird.", "Owl."))
    result = call("run", "-m", str(short_smollm2), "-c", "And now?", "--threads", "1", "--max-tokens", "2", "--kv-budget", "96", "--archive", "off")
    assert result.exit_code == 0, result.stderr
    assert snapshot_path(newest).exists()
    assert [any(part.exists() for part in beside(chat)) for chat in chats] == (KEPT_CHATS - 1) * [True] + 2 * [False]
    assert [chat.read_bytes() for chat in chats] == said
