"""MarkdownStream: a text in Markdown, shown on a terminal while it comes."""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Heading, ListItem, Markdown, MarkdownElement, TableElement
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.table import Table
from rich.theme import Theme

from kvlocal_cli.terminal import is_terminal

# colours that are those of the terminal, whatever its background is
THEME = Theme({"markdown.code": "cyan", "markdown.code_block": "none", "markdown.item.bullet": "none", "markdown.item.number": "none"})
_CODE_THEME = "ansi_dark"

_SECONDS = 0.05  # between two drawings
_SHARE = 0.1  # of the time that drawing may take, at most

# What these rules take for markup is not shown, or not as it was written, and a model hardly ever means it: tags, images, definitions of links, and
# a line of dashes that makes a heading of the text above it. Escaped characters are looked at here.
_WITHOUT = ["html_inline", "html_block", "image", "reference", "lheading", "text_join"]
_PARSER = MarkdownIt().enable(["strikethrough", "table"]).disable(_WITHOUT)
_END_AT_GAP = ("paragraph_open", "heading_open", "blockquote_open", "table_open")  # no text behind an empty line belongs to such a block
_OF_FORMULAS = "()[]"  # what LaTeX has behind a backslash

Line = list[Segment]


class Block(NamedTuple):
    """A part of a text that is shown for itself: a paragraph, a heading, a block of code, an item of a list.

    start: the line in which it begins, from 0
    end: the line behind its last one
    tokens: what it consists of
    """

    start: int
    end: int
    tokens: Sequence[Token]


class MarkdownStream:
    """Shows Markdown as it comes. Blocks that are finished are printed once and for ever; the one that is still written, or as many of its last lines
    as the screen has, is drawn again when something has come.

    Args:
        console: the terminal, with the theme of this module.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._source = ""  # from the beginning of the block that is written
        self._has_gap = False  # before that block
        self._n_printed = 0  # of the lines of what is in the source
        self._drawn_next = 0.0
        self._live: Live | None = None

    def write(self, text: str) -> None:
        """What comes next, without control characters other than newlines and tabs."""
        # what else ends a line for some of those who read this
        self._source += text.replace("\u2028", "\n").replace("\u2029", "\n")
        if (now := time.monotonic()) >= self._drawn_next:
            self._draw()
            took = time.monotonic() - now
            self._drawn_next = now + took + max(_SECONDS, took * (1 / _SHARE - 1))

    def end(self) -> None:
        """Shows all of it, and is ready for another text."""
        try:
            self._draw(is_whole=True)
        finally:
            if self._live:
                self._live.stop()
            self._live, self._source, self._has_gap, self._n_printed = None, "", False, 0

    def _draw(self, *, is_whole: bool = False) -> None:
        finished, rest = self._finished(is_whole)
        lines = [*finished, *rest]
        # a line that has left the screen cannot be drawn again
        n_final = max(len(finished), len(lines) - self._console.height + 1, self._n_printed)
        final, live = lines[self._n_printed : n_final], lines[n_final:]
        self._n_printed = n_final - len(finished)
        if self._live is None:
            if live:
                # other output comes above what is drawn, if it goes to the same terminal
                self._live = Live(
                    console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=is_terminal(sys.stderr)
                )
                self._live.start()
                # it hides the cursor, which would stay so if the program was killed
                self._console.show_cursor()
        elif not live:
            self._live.stop()
            self._live = None
        if self._live:
            # where there are lines to print, it is drawn with them, in one piece of output
            self._live.update(SegmentLines(_joined(live)), refresh=not final)
        if final:
            self._console.print(SegmentLines(final, new_lines=True), end="")

    def _finished(self, is_whole: bool) -> tuple[list[Line], list[Line]]:
        """The lines of the blocks that no text to come can change, which leave the source, and of the rest. What has no end of a line yet can be the
        beginning of anything, and tells nothing of the blocks before it."""
        if is_whole:
            lines, self._source = self._rendered(self._source, is_final=True), ""
            return lines, []
        by_line = self._source.split("\n")
        blocks = blocks_of("\n".join(by_line[:-1]))
        start = blocks[-1].start if blocks else 0
        if blocks and blocks[-1].tokens[0].type in _END_AT_GAP and not by_line[-2].strip():
            start = len(by_line) - 1
        lines = self._rendered("\n".join(by_line[:start]), is_final=True)
        if start:
            self._source, self._has_gap = "\n".join(by_line[start:]), not by_line[start - 1].strip()
        return lines, self._rendered(self._source, is_final=False)

    def _rendered(self, source: str, *, is_final: bool) -> list[Line]:
        """The lines of a text, with an empty one between two blocks where the text has some. What ends with nothing behind its mark, as an answer
        that is stopped may, is shown as it is written; until then it is not, as the mark tells how what follows will look."""
        by_line = source.split("\n")
        lines: list[Line] = []
        for block in blocks_of(source):
            if self._has_gap if not lines else not by_line[block.start - 1].strip():
                lines.append([])
            shown = self._lines_of(block)
            if not shown and is_final:
                shown = [[Segment(line.rstrip())] for line in by_line[block.start : block.end] if line.strip()]
            lines += shown
        return lines

    def _lines_of(self, block: Block) -> list[Line]:
        rendered = _Markdown("", code_theme=_CODE_THEME)
        rendered.parsed = list(block.tokens)
        lines = [_without_end(line) for line in self._console.render_lines(rendered, pad=False)]
        said = [i for i, line in enumerate(lines) if line]
        return lines[said[0] : said[-1] + 1] if said else []


def blocks_of(source: str) -> list[Block]:
    """The blocks of a text, in order; of a list each item is one."""
    blocks, opened, inside = [], 0, ""
    tokens = _PARSER.parse(source)
    for i, token in enumerate(tokens):
        if token.type in ("bullet_list_open", "ordered_list_open") and token.level == 0:
            inside, opening = token.type, token
        elif inside and token.level == 0:
            inside = ""
        elif token.level == (1 if inside else 0):
            if token.nesting >= 0:
                opened = i
            if token.nesting <= 0:
                content: Iterable[Token] = tokens[opened : i + 1]
                if inside:
                    first = copy.copy(opening)
                    # an item knows its own number
                    first.attrs = {"start": int(tokens[opened].info or 1)}
                    content = (first, *content, Token(inside.replace("open", "close"), token.tag, -1))
                span = tokens[opened].map
                assert span is not None  # as of all tokens that open a block
                blocks.append(Block(span[0], span[1], list(_as_shown(content))))
    return blocks


def _as_shown(tokens: Iterable[Token]) -> Iterator[Token]:
    """Tokens for what a person is to see: line breaks where the text has them, links with their addresses, the backslashes of formulas."""
    addresses: list[tuple[str, int]] = []
    said = ""
    for token in tokens:
        if token.type == "inline":
            token.children = list(_as_shown(token.children or ()))
        elif token.type == "softbreak":
            token = Token("hardbreak", "br", 0)
        elif token.type == "text_special":
            token = _text(token.markup if token.content in _OF_FORMULAS and token.markup.startswith("\\") else token.content)
        elif token.type == "link_open":
            addresses.append((str(token.attrs.get("href", "")), len(said)))
            continue
        elif token.type == "link_close":
            address, start = addresses.pop()
            if said[start:] in (address, address.removeprefix("mailto:")):
                continue
            token = _text(f" ({address})")
        if token.type in ("text", "code_inline"):
            said += token.content
        yield token


def _text(content: str) -> Token:
    return Token("text", "", 0, content=content)


def _joined(lines: Sequence[Line]) -> list[Line]:
    return [[*line, Segment.line()] if i < len(lines) - 1 else line for i, line in enumerate(lines)]


def _without_end(line: Line) -> Line:
    """A line without spaces at its end that nobody sees."""
    while line and not line[-1].text.rstrip() and not (line[-1].style and line[-1].style.bgcolor):
        line = line[:-1]
    if line and not (line[-1].style and line[-1].style.bgcolor):
        line = [*line[:-1], Segment(line[-1].text.rstrip(), line[-1].style)]
    return line


class _Heading(Heading):
    """A heading where all text begins."""

    LEVEL_ALIGN: ClassVar[dict[str, JustifyMethod]] = {}


class _Code(CodeBlock):
    """Code as it can be copied: without spaces around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self.text).rstrip("\n"), self.lexer_name, theme=self.theme, word_wrap=True, background_color="default")


class _Item(ListItem):
    """An item of a list, with its number as it is written."""

    def render_number(self, console: Console, options: ConsoleOptions, number: int, last_number: int) -> RenderResult:
        mark = f" {number}. "
        lines = console.render_lines(self.elements, options.update(width=max(1, options.max_width - len(mark))), style=self.style)
        for i, line in enumerate(lines):
            yield Segment(mark if i == 0 else " " * len(mark))
            yield from line
            yield Segment.line()


class _Table(TableElement):
    """A table that shows all of its cells, however narrow the terminal is."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
            yield table


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _Code,
        "code_block": _Code,
        "list_item_open": _Item,
        "table_open": _Table,
    }
