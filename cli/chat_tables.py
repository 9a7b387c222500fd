"""The tables of a chat: what the cache holds, and what an answer looked at."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

from kvlocal.chat.stats import SegmentStats
from kvlocal.errors import KvlocalError
from kvlocal_cli.terminal import printable

if TYPE_CHECKING:
    from kvlocal_cli.chat import Chat

BAR_WIDTH = 24
SHOWN_SEGMENTS = 24
SHOWN_PARTS = 8


def show_cache(chat: Chat, argument: str) -> None:
    """What is left of each part of the conversation, or with `all` of each of its blocks."""
    if argument not in ("", "all"):
        raise KvlocalError("/kv takes nothing, or all")
    chat.session.settle()
    segments, kv = chat.session.segments(), chat.session.kv
    rows = _merged(segments, kv.archived) if argument != "all" else [_row(segment, kv.archived) for segment in segments]
    _show_table(chat, [("turn", "role", "seen", *(("archived", "recalled") if kv.archived else ()), "kept", "", ""), *rows])
    nexus = f" ({kv.nexus:.1f} of them Nexus tokens)" if kv.nexus else ""
    chat.screen.show(
        f"total: {kv.history_tokens} tokens seen, {kv.used} cells kept{nexus} of a budget of {kv.budget}, "
        f"{kv.evicted} evicted in {kv.compressions} compressions; peak {kv.peak_cells} of {kv.capacity} cells"
    )
    if kv.archived:
        in_memory, on_disk = (f"{n_bytes / 1e6:,.0f} MB" for n_bytes in kv.archive_bytes)
        chat.screen.show(f"archive: {kv.archived} tokens, {in_memory} of memory, {on_disk} of disk; {kv.recalled:.1f} cells recalled just now")


def _show_table(chat: Chat, rows: Sequence[Sequence[str]]) -> None:
    """Rows of a turn, a role, numbers, a bar and a text."""
    *columns, texts = zip(*rows, strict=True)
    padded = []
    for i, column in enumerate(columns):
        pad = str.ljust if i in (1, len(columns) - 1) else str.rjust
        padded.append([pad(cell, max(map(len, column))) for cell in column])
    width = shutil.get_terminal_size().columns if chat.screen.interactive else None
    for cells in zip(*padded, texts, strict=True):
        line = "  ".join(cells).rstrip()
        chat.screen.show(line if width is None or cell_len(line) <= width else set_cell_size(line, width - 1) + "…")


def _row(segment: SegmentStats, archived: int) -> tuple[str, ...]:
    text = on_a_line(segment.text)
    return (
        str(segment.turn or ""),
        segment.role,
        str(segment.n_tokens),
        *((str(segment.n_archived), f"{segment.n_recalled:.1f}") if archived else ()),
        f"{segment.n_cells:.1f}",
        _bar(segment.n_cells, segment.n_tokens),
        f"pinned  {text}" if segment.pinned else text,
    )


def _merged(blocks: list[SegmentStats], archived: int) -> list[tuple[str, ...]]:
    """What is pinned and the last texts, each in one row; those between in one row."""
    segments, rows, old = _texts(blocks), [], []
    for i, segment in enumerate(segments):
        if segment.pinned or i >= len(segments) - SHOWN_SEGMENTS:
            rows.append((i, _row(segment, archived)))
        else:
            old.append((i, segment))
    if len(old) > 1:
        together = _sum([segment for _, segment in old], f"{len(old)} earlier parts, /kv all shows each")
        rows.append((old[0][0], _row(replace(together, role="earlier", turn=0), archived)))
    else:
        rows += [(i, _row(segment, archived)) for i, segment in old]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _texts(blocks: list[SegmentStats]) -> list[SegmentStats]:
    """What was said, each in one. In the cache a long text is in blocks, with Nexus tokens behind each, which are in one as well."""
    texts: dict[tuple[int, str, bool], list[SegmentStats]] = {}
    for block in blocks:
        texts.setdefault((block.turn, block.role, block.pinned), []).append(block)
    return [_sum(parts, f"({len(parts)} blocks) {parts[0].text}" if len(parts) > 1 else parts[0].text) for parts in texts.values()]


def _sum(segments: list[SegmentStats], text: str) -> SegmentStats:
    """The first of these with the numbers of all, and this text."""
    names = ("n_tokens", "n_cells", "n_archived", "n_recalled")
    return replace(segments[0], text=text, **{name: sum(getattr(segment, name) for segment in segments) for name in names})


def _bar(kept: float, seen: int) -> str:
    full = round(BAR_WIDTH * min(kept / seen, 1.0)) if seen else 0
    return "█" * full + "░" * (BAR_WIDTH - full)


def show_attention(chat: Chat, argument: str) -> None:
    """What the last answer looked at."""
    if argument not in ("", "all"):
        raise KvlocalError("/why takes nothing, or all")
    looked = chat.session.looked_at()
    # what was recalled need not have got the largest shares: heads that look far are few
    recalled = chat.session.last.recalled if chat.session.last and looked.everything else ()
    shown = [part for i, part in enumerate(looked.parts) if argument == "all" or i < SHOWN_PARTS or part.turn in recalled]
    rows: list[tuple[str, ...]] = [("turn", "role", "share", *(("recalled",) if looked.everything else ()), "", "")]
    for part in shown:
        back = (f"{part.recalled:.1f}",) if looked.everything else ()
        rows.append((str(part.turn or ""), part.role, f"{part.share:.0%}", *back, _bar(part.share, 1), on_a_line(part.text)))
    if shown:
        _show_table(chat, rows)
    if n_others := len(looked.parts) - len(shown):
        chat.screen.show(f"and {n_others} others with {1 - sum(part.share for part in shown):.0%} together, /why all shows each")
    span = "the whole conversation" if looked.everything else "what the cache holds"
    chat.screen.show(
        f"attention to {span}: {looked.earlier:.0%} to earlier turns, {looked.current:.0%} to this one, "
        f"{looked.beginning:.0%} to the beginning that always stays"
    )


def on_a_line(text: str) -> str:
    """The text without line breaks and control characters."""
    return " ".join(printable(text).split())
