"""What a person sees in a chat and in a run: on a pseudo-terminal, with a real model whose answers follow a grammar, on the screen of an emulator."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_copy import Source, copy
from terminal import Terminal
from test_answer_formats import THINKING

from kvlocal.conversations.transcript import Transcript

OPTIONS = ("--threads", "1", "--temp", "0")
MARKDOWN = "# A title\n\nSome **bold words**.\n\n```python\ndef f(x):\n    return x\n```\n\n1. one\n2. two\n"
RENDERED = ["A title", "", "Some bold words.", "", "def f(x):", "    return x", "", " 1. one", " 2. two"]
THOUGHT = "They greet me.\n</think>\n\nHello **you**."


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    without = {name: value for name, value in os.environ.items() if name not in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY")}
    return {**without, "KVLOCAL_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def says(tmp_path: Path):
    """Options with which a model says exactly this."""

    def options(text: str) -> tuple[str, ...]:
        path = tmp_path / f"grammar-{len(text)}.gbnf"
        path.write_text("root ::= " + '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"')
        return (*OPTIONS, "--grammar", str(path))

    return options


@pytest.fixture(scope="module")
def thinking(short_smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers begin with a thought, which no switch leaves out."""
    path = tmp_path_factory.mktemp("thinking") / "thinking.gguf"
    copy(Source(short_smollm2), path, metadata={"tokenizer.chat_template": THINKING})
    return path


def kept(env: dict[str, str]) -> list[str]:
    """The answers in the newest transcript."""
    path = max((Path(env["KVLOCAL_STATE_DIR"]) / "chats").glob("*.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return [message["content"] for message in Transcript.read(path).messages if message["role"] == "assistant"]


def block(lines: list[str], first: str, n: int) -> list[str]:
    """So many lines from the last that begins so."""
    start = max(i for i, line in enumerate(lines) if line.startswith(first))
    return lines[start : start + n]


def test_markdown_in_a_chat(env, says, short_smollm2):
    with Terminal("chat", str(short_smollm2), *says(MARKDOWN), env=env) as chat:
        chat.wait_for_prompt()
        chat.type("Go on\r")
        chat.wait_for_prompt()
        lines = chat.seen()
        assert block(lines, "A title", len(RENDERED)) == RENDERED and not any("**" in line or "```" in line for line in lines)
        # what was said is what is kept, and what /copy gives
        assert kept(env) == [MARKDOWN]
        chat.type("/copy\r")
        chat.wait_for_prompt()
        sent = re.findall("\x1b\\]52;c;([^\x07]*)\x07", chat.output)
        assert [base64.b64decode(data).decode() for data in sent] == [MARKDOWN.strip()]
        chat.type("\x04")
        assert chat.wait_for_end() == 0


def test_markdown_as_it_is(env, says, short_smollm2, tmp_path):
    """With --plain, and wherever there is no terminal."""
    options = ("run", "-m", str(short_smollm2), *says(MARKDOWN), "Go on")
    with Terminal(*options, env=env) as run:
        assert run.wait_for_end() == 0
        assert run.seen() == RENDERED
    with Terminal(*options, "--plain", env=env) as run:
        assert run.wait_for_end() == 0
        assert run.seen() == MARKDOWN.rstrip("\n").split("\n")
    with Terminal(*options, env=env, stdout=tmp_path / "out") as run:
        assert run.wait_for_end() == 0
    assert (tmp_path / "out").read_text() == MARKDOWN


def test_an_answer_stopped_in_the_middle_of_a_block(env, says, short_smollm2):
    """It stays as it is on the screen, and what is kept is what is seen."""
    items = "".join(f"- item number {i}\n" for i in range(500))
    with Terminal("chat", str(short_smollm2), *says(items), "--max-tokens", "8000", env=env) as chat:
        chat.wait_for_prompt()
        chat.type("Go on\r")
        chat.wait_for("number 12", 300)
        chat.type("hello\x03")
        chat.wait_for_prompt()
        lines = chat.seen()
        [answer] = kept(env)
        assert items.startswith(answer)
        start = next(i for i, line in enumerate(lines) if line == " • item number 0")
        end = next(i for i, line in enumerate(lines) if line.startswith("stopped"))
        # a mark with nothing behind it is not yet an item
        said = [f" • {line[2:]}".rstrip() if len(line) > 2 else line.rstrip() for line in answer.rstrip("\n").split("\n")]
        assert lines[start:end] == said
        assert lines[end + 1] == ">>>"
        chat.kill(9)


@pytest.mark.parametrize("look", [(), ("--plain",)])
def test_thoughts_are_dim_hidden_or_off(env, says, thinking, look):
    told = {"show": ["They greet me.", ""], "hide": [], "off": []}
    for think, before in told.items():
        with Terminal("run", "-m", str(thinking), *says(THOUGHT), "--think", think, *look, "Hi", env=env) as run:
            assert run.wait_for_end() == 0
            lines, shown = run.seen(), [*before, "Hello **you**." if look else "Hello you."]
            # on as many lines as its path is long
            warning = "".join("".join(lines[: len(lines) - len(shown)]).split())
            assert lines[len(lines) - len(shown) :] == shown and ("hasnoswitchforthoughts" in warning) == bool(warning)
            assert bool(warning) == (think == "off") and ("\x1b[2mThey" in run.output) == (think == "show")


def test_thoughts_without_a_terminal(env, says, thinking):
    def run(*options: str, lines: str = "Hi\n") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "kvlocal_cli", "chat", str(thinking), *says(THOUGHT), *options]
        return subprocess.run(command, input=lines, env=env, capture_output=True, text=True, timeout=300)

    shown = run().stdout
    [whole] = kept(env)
    assert shown == whole + "\n" and shown.split() == ("<think>\n" + THOUGHT).split()
    # in a chat
    turned = run("--think", "hide", lines="Hi\n/set think maybe\n/set think show\nHi\n/set think off\nHi\n/set\n")
    assert turned.stdout.startswith("Hello **you**.\n\n<think>\nThey greet me.") and kept(env) == [whole] * 3
    assert turned.returncode == 1 and "/set think takes show, hide, off" in turned.stderr and "no switch" in turned.stderr
    assert turned.stdout.count("They greet me.") == 1 and re.search("^think +off$", turned.stdout, re.MULTILINE)
    hidden, off = run("--think", "hide"), run("--think", "off")
    assert hidden.stdout == off.stdout == "Hello **you**.\n" and kept(env) == [whole]
    assert hidden.stderr == "" and off.stderr.count("\n") == 1 and "no switch for thoughts" in off.stderr


def test_a_pasted_document_is_a_row(env, smollm2):
    """In the cache it is in blocks, with Nexus tokens behind each."""
    with Terminal("chat", str(smollm2), *OPTIONS, "--policy", "hybrid", "--max-tokens", "4", env=env) as chat:
        chat.wait_for_prompt()
        text = "\n\n".join(f"Part {i}. " + "The keeper wrote down the birds. " * 8 for i in range(10))
        chat.type(f"\x1b[200~{text}\x1b[201~\r")
        chat.wait_for_prompt()
        chat.type("/kv\r")
        rows = [line for line in chat.wait_for_prompt().splitlines() if re.search("[█░]", line)]
        assert [re.split(" +", row.strip())[:2] for row in rows[1:]] == [["1", role] for role in ("user", "nexus", "assistant")]
        n_blocks = int(re.search(r"\((\d+) blocks\) Part 0\. The keeper", rows[1])[1])
        chat.type("/kv all\r")
        all_rows = [line for line in chat.wait_for_prompt().splitlines() if re.search("[█░]", line) and " user " in line]
        assert len(all_rows) == n_blocks > 1
        assert sum(int(row.split()[2]) for row in all_rows) == int(rows[1].split()[2])
        chat.kill(9)


def test_tab_completes(env, short_smollm2, tmp_path):
    (tmp_path / "state" / "sessions").mkdir(parents=True)
    (tmp_path / "state" / "sessions" / "holiday.jsonl").touch()
    (tmp_path / "a report.md").touch()
    with Terminal("chat", str(short_smollm2), *OPTIONS, env=env) as chat:
        chat.wait_for_prompt()
        for typed, completed in [
            ("/sy", "/system"),
            ("/load hol", "/load holiday"),
            (f"/save {tmp_path}/a rep", "a report.md"),
            ("/set pol", "/set policy"),
            ("/set policy str", "/set policy streaming"),
            ("/kv a", "/kv all"),
        ]:
            chat.type(typed + "\t")
            chat.wait_for(re.escape(completed.removeprefix(typed)) if completed.startswith(typed) else "ort")
            assert any(completed in line for line in chat.seen()), typed
            chat.type("\x15")
        chat.type("\x04")
        assert chat.wait_for_end() == 0
