"""What is done while a person types: one thread at a time, whatever is pressed; and a chat has one session at a time."""

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from doors import write_chat_model

from kvlocal.chat.config import SessionConfig
from kvlocal.doctor import memory_estimate
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.llama.context import Context
from kvlocal_cli.idle import Idle
from kvlocal_cli.main import main


class Slow:
    """A session whose second read goes on for a while after it is asked to stop."""

    def __init__(self):
        self.inside = self.most = 0

    def finish_turn(self):
        pass

    def second_read(self, stop):
        self.inside += 1
        self.most = max(self.most, self.inside)
        while not stop():
            time.sleep(0.01)
        time.sleep(0.3)
        self.inside -= 1


def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_while_the_thread_is_waited_for_leaves_none_behind():
    session, idle = Slow(), Idle(lambda stop: None)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), idle.working(session):
            interrupt_after(0.1)
        assert session.inside == 0
    with idle.working(session):
        time.sleep(0.05)
    assert session.most == 1 and session.inside == 0


def test_a_thread_that_was_not_waited_for_ends_before_the_next_one():
    session, idle = Slow(), Idle(lambda stop: None)
    block = idle.working(session)
    block.__enter__()
    time.sleep(0.05)
    with idle.working(session):
        time.sleep(0.05)
        assert session.inside == 1
    assert session.most == 1
    idle.end()


@pytest.mark.parametrize("error, problem", [(KvlocalError("no room"), ""), (OSError("no such device"), "OSError: no such device")])
def test_what_goes_wrong_in_the_thread_is_told_and_ends_nothing(error, problem, capfd):
    def fails(*_):
        raise error

    idle = Idle(lambda stop: None)
    with idle.working(SimpleNamespace(finish_turn=fails)):
        pass
    assert problem in idle.problem and bool(problem) == bool(idle.problem)
    assert capfd.readouterr().err == ""


# one session at a time

OPTIONS = ("--kv-budget", "64", "--stride", "16", "--threads", "1", "--temp", "0", "--max-tokens", "8", "--policy", "snapkv", "--no-transcript")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_chat_model(found)
    return found


@pytest.fixture
def contexts(monkeypatch):
    """Contexts that were made, and the most that were open at once."""
    made, most, init = [], [], Context.__init__

    def counted(context, *args, **options):
        init(context, *args, **options)
        made.append(context)
        most.append(sum(not one.closed for one in made))

    monkeypatch.setattr(Context, "__init__", counted)
    return SimpleNamespace(made=made, most=most)


def chat(path, *lines):
    return CliRunner().invoke(main, ["chat", str(path), *OPTIONS], input="".join(f"{line}\n" for line in lines))


def test_another_budget_never_takes_memory_for_two_caches(path, contexts):
    done = chat(path, "Hello", "/set kv-budget 96", "/set policy streaming", "/system B", "And now?", "/set")
    assert done.exit_code == 0, done.output
    assert re.search(r"^kv-budget +96$", done.stdout, re.MULTILINE) and "streaming" in done.stdout
    assert len(contexts.made) == 4 and max(contexts.most) == 1


@pytest.mark.parametrize("command", ["/set kv-budget 9000", "/set kv-budget 20", "/set policy hybrid", "/set policy full"])
def test_what_is_refused_leaves_the_chat_as_it_was(path, contexts, command):
    lines = ["so " * 50, "What?", command, "And now?", "/set"]
    done = chat(path, *lines)
    usual = chat(path, *lines[:2], *lines[3:])
    assert max(contexts.most) == 1
    assert done.exit_code == 1 and done.stderr.count("\n") <= 2 and done.stderr.startswith("kvlocal: ")
    assert re.search(r"^kv-budget +64$", done.stdout, re.MULTILINE) and done.stdout.count("\n") == usual.stdout.count("\n")


def test_a_budget_that_turns_out_too_small_while_it_is_read_changes_nothing(path):
    """The cache is at once what it was, and not only when the chat goes on."""
    done = chat(path, "so " * 50, "What?", "/set policy full", "/kv")
    assert done.exit_code == 1 and "removes nothing" in done.stderr
    words = done.stdout.splitlines()[-1].split()
    assert words[0] == "total:" and int(words[1]) > 200


@pytest.mark.parametrize("lacking", [0, 1])
def test_memory_is_looked_at_for_another_budget_too(path, monkeypatch, contexts, lacking):
    """What the session takes that ends then counts as free."""
    asked = [SessionConfig(budget=budget, stride=16, policy="snapkv") for budget in (64, 400)]
    model = Container(path)
    estimate, _ = (memory_estimate.MemoryEstimate.of(model, config) for config in asked)
    small, large = estimate.total(64 + 16)[0], estimate.total(400 + 16)[0]
    assert small < large
    left = large - (small - estimate.host.weights)
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: left - lacking if contexts.made else small)
    done = chat(path, "/set kv-budget 400", "/set")
    if lacking:
        assert done.exit_code == 1 and "takes about" in done.stderr and re.search(r"^kv-budget +64$", done.stdout, re.MULTILINE)
    else:
        assert done.exit_code == 0 and re.search(r"^kv-budget +400$", done.stdout, re.MULTILINE)
