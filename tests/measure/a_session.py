"""Goes through what a person does with the commands on a pseudo-terminal, checks what is seen, and writes it down as a page.

    python tests/measure/a_session.py docs/a-session.md
"""

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from terminal import Terminal

from kvlocal.files.atomic import atomic_write
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve

HEAD = """\
# A session

What a terminal shows, from the first command to the last, with the default model. `python tests/measure/a_session.py docs/a-session.md` types all of
it on a pseudo-terminal of 120 columns, checks what is seen and writes this page; colours and the dim of notes are left out.
"""
DOCUMENT = "\n\n".join(f"Day {i}. " + "The keeper of the lighthouse wrote down the weather, the ships and the birds. " * 4 for i in range(1, 4))
PASTE, END = "\x1b[200~", "\x1b[201~"
STOP, LEAVE, TAB = "\x03", "\x04", "\t"
STORY = "Write a long story about a cat."


@dataclass(frozen=True)
class Scene:
    """A command.

    about: what it shows, a sentence
    command: its words
    typed: what is typed, one after another, each with what is waited for then, None for the next prompt of a chat
    seen: what has to be on the screen in the end
    code: the exit code
    """

    about: str
    command: str
    typed: Sequence[tuple[str, str | None]] = ()
    seen: Sequence[str] = ()
    code: int = 0


def scenes(options: str) -> list[Scene]:
    """options: of every command that answers."""
    chat = f"chat {options} --session trip"
    return [
        Scene("Without arguments it says what to try.", "", seen=["kvlocal chat", "kvlocal run"]),
        Scene("A group of commands alone shows its help.", "sessions", seen=["Commands:", "rename"]),
        Scene("One answer. What was cut off is said, and is no failure.", f'run {options} --max-tokens 12 "Name ten birds."',
              seen=["cut off at 12 tokens: give a larger --max-tokens"]),
        Scene("A prompt may begin with a dash.", f'run {options} --max-tokens 8 "-5"'),
        Scene("A text is completed as it is with --raw.", f'run {options} --raw --max-tokens 8 "The capital of France is"', seen=["Paris"]),
        Scene("A text is no model.", 'chat "hello there"', seen=["a text is answered by `kvlocal run`"], code=1),
        Scene("A ratio does nothing where nothing is removed, and is refused.", f"chat {options} --policy full --kv-ratio 0.5",
              seen=["kvlocal: .*full"], code=2),
        Scene(
            "A conversation with a name. Answers are rendered, a pasted text is one row of /kv, and Ctrl-C stops an answer where it is.",
            chat,
            [
                ("", None),
                ("Show me a function in Python that adds two numbers.\r", None),
                (f"{PASTE}{DOCUMENT}\n\nWho wrote?{END}\r", None),
                ("/kv\r", None),
                ("/set max-tokens 2000\r", None),
                (f"{STORY}\r", r"\?2004l[\s\S]*\bcat\b[\s\S]*\bcat\b"),
                (STOP, None),
                ("/undo\r", None),
                ("/undo\r", None),
                ("/set te" + TAB, "mp"),
                (" 0\r", None),
                ("/set stop x\r", None),
                ("/set policy full\r", None),
                ("/system\r", None),
                ("/save notes.md\r", None),
                ("/save notes.md\r", r"\[y/N\]"),
                ("n\r", None),
                ("/clear\r", r"\[y/N\]"),
                ("y\r", None),
                ("/undo\r", None),
                ("/copy\r", None),
                ("/cpoy\r", None),
                (LEAVE, ""),
            ],
            [
                "stopped · ", r"1  user .*█", "taken back: Write a long", "taken back: Day 1", "temp: 0.0", "begin a chat with --stop",
                "which goes with that policy", "that is the model's own", "Replace it", "aside", "back again: 2 messages", "copied the last answer",
                "did you mean /copy",
            ],
        ),
        Scene("It shows its last exchange when it is gone on with.", chat, [("", None), (LEAVE, "")], ["back in trip: 2 messages", ">>> Show me"]),
        Scene("Another model reads it only if that is wanted.", f"chat {options} --session trip another.gguf", [("", r"\[y/N\]"), ("n\r", "")],
              ["This session was led with"], 130),
        Scene("What there is of it.", "sessions list", seen=["trip"]),
        Scene("No name makes directories.", 'sessions rename trip "a b/c"', seen=["make its directory first"], code=1),
        Scene("On with it in one answer, and then without a name.", f'run {options} --max-tokens 8 -c "And three?"'),
        Scene("It is deleted when that is agreed to.", "sessions delete trip", [("", r"\[y/N\]"), ("y\r", "")]),
    ]


def played(scene: Scene, env: dict[str, str]) -> list[str]:
    """The lines on the screen.

    Raises:
        AssertionError: something else was seen than what has to be.
    """
    with Terminal(*shlex.split(scene.command), env=env) as terminal:
        for text, pattern in scene.typed:
            if text:
                terminal.type(text)
            if pattern is None:
                terminal.wait_for_prompt(300)
            elif pattern:
                terminal.wait_for(pattern, 300)
        code = terminal.wait_for_end(300)
        lines = terminal.seen()
    text = "\n".join(lines)
    assert code == scene.code, f"{scene.command}: {code}\n{text}"
    for pattern in scene.seen:
        assert re.search(pattern, text), f"{scene.command}: no {pattern!r} in\n{text}"
    assert "Traceback" not in text
    return lines


def page(threads: int, model: Path) -> str:
    """All scenes, in a home of their own."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory).resolve()
        models = home / ".local/share/kvlocal/models"
        models.mkdir(parents=True)
        (models / f"{DEFAULT_MODEL}.gguf").symlink_to(model)
        (home / "another.gguf").touch()
        foreign = ("KVLOCAL_", "XDG_", "SSH_", "DISPLAY", "WAYLAND_DISPLAY")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign) or name == "KVLOCAL_LIB_DIR"} | {"HOME": str(home)}
        before = Path.cwd()
        os.chdir(home)
        parts = [HEAD]
        try:
            for scene in scenes(f"--temp 0 --threads {threads}"):
                print(f"kvlocal {scene.command}", file=sys.stderr)
                lines = [f"$ kvlocal {scene.command}".rstrip(), *played(scene, env)]
                shown = "\n".join(f"    {line}".rstrip() for line in lines).replace(str(home), "~")
                parts.append(f"{scene.about}\n\n{shown}\n")
        finally:
            os.chdir(before)
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    atomic_write(args.page, page(args.threads, resolve(DEFAULT_MODEL)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
