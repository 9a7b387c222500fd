"""Answers as they are shown on a terminal while they come: Markdown, wrapped words, thoughts; looked at on the screen of a terminal emulator."""

import io
import random
import re

import pytest
from rich.console import Console
from terminal import seen

from kvlocal.chat.answer_piece import AnswerPiece
from kvlocal_cli import markdown_stream
from kvlocal_cli.answer_view import PlainView, TerminalView
from kvlocal_cli.look import Look
from kvlocal_cli.markdown_stream import THEME, MarkdownStream
from kvlocal_cli.word_wrap import WordWrap

ANSWER = """\
# About birds

Some **bold text** and `code`, with <stdio.h>, [a link](https://example.org/a_b) and <https://example.org>.
A second line, the formula \\(x_1 + y_1\\), and 5 \\* 3.

1. an item that is rather long and has to be wrapped, because there is no end of it, and it goes on and on, and on
2. another one
   - inside it
   - and one more

   with a paragraph
10. the tenth

* loose

* list

```python
def f(x):
    \"\"\"Doc.\"\"\"

    return x + 1  # a comment
```
| bird | weight |
|------|-------:|
| wren | 9 g |
| a swan that is heavy | 11,000 g |

---
> quoted words
> in two lines

![picture](https://example.org/p.png) and [a reference][1]

[1]: https://example.org/reference

The end, 終わり: 日本語の文には空白がない。
"""


class Screen:
    """A terminal of so many columns and lines.

    Attributes:
        written: all that was written to it
    """

    def __init__(self, width: int, height: int) -> None:
        self._file = io.StringIO()
        self.console = Console(
            file=self._file, force_terminal=True, width=width, height=height, theme=THEME, color_system="standard", highlight=False, _environ={}
        )

    @property
    def written(self) -> str:
        return self._file.getvalue()

    def lines(self) -> list[str]:
        """What a person sees who scrolls back."""
        return seen(self.written.replace("\n", "\r\n"), self.console.width, self.console.height)


@pytest.fixture
def eager(monkeypatch):
    """Every piece is drawn."""
    monkeypatch.setattr(markdown_stream, "_SECONDS", 0)
    monkeypatch.setattr(markdown_stream, "_SHARE", 1)


def shown(text: str, pieces: int | None, width: int = 60, height: int = 12, seed: int = 0) -> list[str]:
    """What is on the screen in the end. pieces: the most characters that come at once, None for all."""
    screen, rng = Screen(width, height), random.Random(seed)
    stream = MarkdownStream(screen.console)
    while text:
        n = len(text) if pieces is None else rng.randint(1, pieces)
        stream.write(text[:n])
        text = text[n:]
    stream.end()
    return screen.lines()


def test_what_is_shown_of_markdown():
    lines = shown(ANSWER, None, width=70, height=80)
    assert lines[:9] == [
        "About birds",
        "",
        "Some bold text and code, with <stdio.h>, a link",
        "(https://example.org/a_b) and https://example.org.",
        "A second line, the formula \\(x_1 + y_1\\), and 5 * 3.",
        "",
        " 1. an item that is rather long and has to be wrapped, because there",
        "    is no end of it, and it goes on and on, and on",
        " 2. another one",
    ]
    text = "\n".join(lines)
    # nothing that may be meant is taken for markup and left out
    for part in ("<stdio.h>", " 10. the tenth", "!picture (https://example.org/p.png)", "[1]: https://example.org/reference", "    return x + 1  #"):
        assert part in text
    assert text.count("https://example.org.") == 1 and " • loose\n\n • list" in text and "def f(x):" in lines


@pytest.mark.parametrize("size", [(60, 12), (33, 5), (200, 100)])
@pytest.mark.parametrize("pieces", [1, 7, 40])
def test_however_it_comes_it_looks_the_same(eager, size, pieces):
    """Also where the screen is smaller than the answer, of which nothing is there twice."""
    # the columns of a table are as wide as its widest cell, and what has left the screen stays as it was
    text = ANSWER if size[1] > 20 else ANSWER.partition("| bird")[0] + ANSWER.partition("---\n")[2]
    assert shown(text, pieces, *size) == shown(text, None, *size)


@pytest.mark.parametrize("mark", ["-", "*", "1.", "#", "##", ">", "```", "```python", "~~~"])
@pytest.mark.parametrize("before", ["", "Some text\n\n", "- an item\n", "1. an item\n", "# A title\n"])
@pytest.mark.parametrize("pieces", [None, 1])
def test_a_mark_is_seen_where_an_answer_ends_with_it(eager, before, mark, pieces):
    """Or what is kept of an answer that was stopped there would be more than what was seen."""
    for text in (before + mark, before + mark + " ", before + mark + "\n"):
        assert shown(text, pieces)[-1] == mark


def test_every_word_is_seen_wherever_an_answer_is_stopped(eager):
    for n in range(0, len(ANSWER), 7):
        seen = "".join(shown(ANSWER[:n], None, width=200, height=100))
        last = re.split(r"[^A-Za-z0-9]+", ANSWER[:n])[-1]
        assert last in seen, ANSWER[max(0, n - 30) : n]


def test_answers_longer_than_the_screen(eager):
    """One paragraph, one block of code, one list."""
    words = " ".join(f"word{i}" for i in range(400))
    code = "```\n" + "\n".join(f"line {i}" for i in range(100)) + "\n```\n"
    items = "\n".join(f"- item {i}" for i in range(100))
    for text in (f"Title\n\n{words}", code, items, f"{words}\n\n{code}\n{items}"):
        lines = shown(text, 9, 50, 8)
        assert lines == shown(text, None, 50, 8)
        together = " ".join(lines).split()
        assert [word for word in together if word not in ("•", "Title")] == text.replace("```", " ").replace("- ", " ").replace("Title", "").split()


def test_what_is_finished_is_printed_once(eager):
    screen = Screen(60, 12)
    stream = MarkdownStream(screen.console)
    stream.write("First words.\n\n1. one\n2. two\n\nSecond")
    stream.write(" words\n\nThird")
    # a program that is killed now leaves a cursor
    assert screen.written.rfind("\x1b[?25h") > screen.written.rfind("\x1b[?25l")
    before = len(screen.written)
    stream.write(" words of the answer, one after another.")
    stream.write(" And more.")
    stream.end()
    new = screen.written[before:]
    assert "Third" in new and not any(old in new for old in ("First", "one\n", "two", "Second"))
    assert screen.lines()[-1] == "Third words of the answer, one after another. And more."


def test_drawing_takes_a_small_part_of_the_time(monkeypatch):
    """However fast the pieces come, and however long a block is."""
    now = [0.0]
    monkeypatch.setattr(markdown_stream.time, "monotonic", lambda: now[0])
    screen = Screen(60, 12)
    stream = MarkdownStream(screen.console)
    draw, drawn = stream._draw, []

    def takes_long(**options):
        drawn.append(now[0])
        now[0] += 0.2
        draw(**options)

    monkeypatch.setattr(stream, "_draw", takes_long)
    for i in range(1000):
        stream.write(f"word{i} ")
        now[0] += 0.01
    assert 0.2 * len(drawn) <= 0.1 * now[0] + 0.4


def test_any_markdown_can_be_shown():
    """Nothing that a model writes ends the chat."""
    parts = [
        "# ", "- ", "12. ", "> ", "`", "```\n", "```x\n", "~~", "**", "*", "_", "[a](", "[", "](b)", "![", ")", "|a|b|\n", "|-|-|\n", "|", "\n",
        "\n\n", "    ", "\t", "<b>", "</b>", "<!--", "&amp;", "\\", "\\(", "---\n", "word ", "words\n", "日本", "http://x.y ", "<http://x.y>",
        "[1]: /u\n", "\u2028",
    ]  # fmt: skip
    for seed in range(100):
        rng = random.Random(seed)
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 40)))
        lines = shown(text, rng.choice([None, 3]), 20, 6, seed)
        assert "".join(text.split()).count("word") == "".join("".join(lines).split()).count("word"), (seed, text, lines)


# words alone


def wrapped(text: str, width: int, pieces: int = 3) -> str:
    words = WordWrap(lambda: width)
    return "".join(words.push(text[i : i + pieces]) for i in range(0, len(text), pieces)) + words.flush()


def test_words_are_not_broken():
    text = "The quick brown fox jumps over the lazy dog.\n\n    indented, and  two spaces\n" + "/a/long/path/" * 5 + " end"
    for pieces in (1, 5, 1000):
        lines = wrapped(text, 20, pieces).split("\n")
        assert " ".join(lines).split() == text.split()
        assert all(len(line) < 20 for line in lines if not line.startswith("/a")) and "    indented, and" in lines
    assert wrapped("日本語の文には空白がない", 9) == "日本語の\n文には空\n白がない"
    assert wrapped("a\n" * 3, 20) == "a\n" * 3


def view_of(screen: Screen, *pieces: AnswerPiece, **look) -> None:
    view = TerminalView(screen.console, Look(**look))
    for piece in pieces:
        view.write(piece.reasoning + piece.text, piece)
    view.end()


THOUGHT = [AnswerPiece(reasoning="They greet "), AnswerPiece(reasoning="me, so I greet them."), AnswerPiece("Hello **you**"), AnswerPiece(".")]


@pytest.mark.parametrize(("plain", "answer"), [(False, "Hello you."), (True, "Hello **you**.")])
def test_a_thought_is_dim_and_apart(plain, answer):
    screen = Screen(24, 10)
    view_of(screen, *THOUGHT, plain=plain)
    assert screen.lines() == ["They greet me, so I", "greet them.", "", answer]
    dim, _, rest = screen.written.partition("Hello")
    assert "\x1b[2m" in dim and "\x1b[2m" not in rest


@pytest.mark.parametrize("think", ["hide", "off"])
def test_a_hidden_thought_leaves_nothing(think):
    screen = Screen(24, 10)
    view_of(screen, *THOUGHT, think=think)
    assert screen.lines() == ["Hello you."] and "thinking" in screen.written and "greet" not in screen.written
    # an answer that never came
    screen = Screen(24, 10)
    view_of(screen, *THOUGHT[:2], think=think)
    assert screen.lines() == [""]


def test_an_answer_cannot_command_the_terminal():
    for plain in (True, False):
        screen = Screen(40, 10)
        view_of(screen, AnswerPiece(reasoning="\x1b]0;a\x07"), AnswerPiece("\x1b[31mred\x1b[2J\x9b1m `\x1b[5m`"), plain=plain)
        assert not any(part in screen.written for part in ("\x1b]", "\x1b[31m", "\x1b[2J", "\x9b", "\x1b[5m", "\x07"))


def test_without_a_terminal_the_text_is_as_it_is(capsys):
    pieces = [("<think>\nHm.", AnswerPiece(reasoning="Hm.")), ("\n</think>\n\n**Yes**", AnswerPiece("**Yes**"))]
    for think, text in (("show", "<think>\nHm.\n</think>\n\n**Yes**\n"), ("hide", "**Yes**\n")):
        view = PlainView(think)
        for piece in pieces:
            view.write(*piece)
        view.end()
        assert capsys.readouterr().out == text
