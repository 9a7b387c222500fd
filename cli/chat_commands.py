"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.cells import cell_len, set_cell_size

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.stats import SegmentStats
from kvlocal.conversations.named_sessions import chat_file, new_session_path, outside
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.saved_chat import load, save
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import with_temperature
from kvlocal_cli.options import split_policy_arg
from kvlocal_cli.sampling_options import biases_of
from kvlocal_cli.terminal import printable

if TYPE_CHECKING:
    from kvlocal_cli.chat import Chat

BAR_WIDTH = 24
SHOWN_SEGMENTS = 24
SHOWN_PARTS = 8


@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    run: Callable[[Chat, str], None]


def names() -> list[str]:
    """The commands, with their slash."""
    return list(_COMMANDS)


def execute(chat: Chat, line: str) -> None:
    """Run the command of a line.

    Raises:
        EOFError: it ends the chat.
        KvlocalError: there is no such command, or it failed; the chat is as it was.
    """
    name, _, argument = line.partition(" ")
    name = _OTHER_NAMES.get(name, name)
    if name not in _COMMANDS:
        close = difflib.get_close_matches(name, _COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "/help lists them, and // begins a line of text with a slash"
        raise KvlocalError(f"there is no command {printable(name[:40])}: {hint}")
    try:
        _COMMANDS[name].run(chat, argument.strip())
    except KeyboardInterrupt:
        if not chat.screen.interactive:
            raise
        raise KvlocalError("stopped: the chat is as it was") from None


def _help(chat: Chat, argument: str) -> None:
    rows = [(command.usage, command.help) for command in _COMMANDS.values()]
    rows += [
        ('"""', "begins and ends a text of several lines"),
        ("//", "begins a line of text that starts with a slash"),
        ("Ctrl-C", "stops the answer, not the program"),
        ("Ctrl-D", "leaves"),
    ]
    width = max(len(usage) for usage, _ in rows)
    for usage, text in rows:
        chat.screen.show(f"{usage.ljust(width)}  {text}")


def _kv(chat: Chat, argument: str) -> None:
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
    text = _on_a_line(segment.text)
    return (
        str(segment.turn or ""),
        segment.role,
        str(segment.n_tokens),
        *((str(segment.n_archived), f"{segment.n_recalled:.1f}") if archived else ()),
        f"{segment.n_cells:.1f}",
        _bar(segment.n_cells, segment.n_tokens),
        f"pinned  {text}" if segment.pinned else text,
    )


def _merged(segments: list[SegmentStats], archived: int) -> list[tuple[str, ...]]:
    """What is pinned and the last segments; those between in one row."""
    rows, old = [], []
    for i, segment in enumerate(segments):
        if segment.pinned or i >= len(segments) - SHOWN_SEGMENTS:
            rows.append((i, _row(segment, archived)))
        else:
            old.append((i, segment))
    if len(old) > 1:
        n_tokens, n_cells, n_archived, n_recalled = (
            sum(getattr(segment, name) for _, segment in old) for name in ("n_tokens", "n_cells", "n_archived", "n_recalled")
        )
        together = SegmentStats("earlier", 0, n_tokens, n_cells, 0, False, f"{len(old)} earlier parts, /kv all shows each", n_archived, n_recalled)
        rows.append((old[0][0], _row(together, archived)))
    else:
        rows += [(i, _row(segment, archived)) for i, segment in old]
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def _bar(kept: float, seen: int) -> str:
    full = round(BAR_WIDTH * min(kept / seen, 1.0)) if seen else 0
    return "█" * full + "░" * (BAR_WIDTH - full)


def _why(chat: Chat, argument: str) -> None:
    if argument not in ("", "all"):
        raise KvlocalError("/why takes nothing, or all")
    looked = chat.session.looked_at()
    # what was recalled need not have got the largest shares: heads that look far are few
    recalled = chat.session.last.recalled if chat.session.last and looked.everything else ()
    shown = [part for i, part in enumerate(looked.parts) if argument == "all" or i < SHOWN_PARTS or part.turn in recalled]
    rows: list[tuple[str, ...]] = [("turn", "role", "share", *(("recalled",) if looked.everything else ()), "", "")]
    for part in shown:
        back = (f"{part.recalled:.1f}",) if looked.everything else ()
        rows.append((str(part.turn or ""), part.role, f"{part.share:.0%}", *back, _bar(part.share, 1), _on_a_line(part.text)))
    if shown:
        _show_table(chat, rows)
    if n_others := len(looked.parts) - len(shown):
        chat.screen.show(f"and {n_others} others with {1 - sum(part.share for part in shown):.0%} together, /why all shows each")
    span = "the whole conversation" if looked.everything else "what the cache holds"
    chat.screen.show(
        f"attention to {span}: {looked.earlier:.0%} to earlier turns, {looked.current:.0%} to this one, "
        f"{looked.beginning:.0%} to the beginning that always stays"
    )


def _regen(chat: Chat, argument: str) -> None:
    chat.regenerate()


def _undo(chat: Chat, argument: str) -> None:
    n_turns = _number("/undo", argument, int) if argument else 1
    if n_turns == 1 and (n_back := chat.bring_back()):
        chat.screen.note(f"back again: {n_back} messages")
        return
    taken = chat.undo(n_turns)
    turns = f"{n_turns} turns, from: " if n_turns > 1 else ""
    chat.screen.note(f"taken back: {turns}{_start(taken[0]['content'])}")


def _edit(chat: Chat, argument: str) -> None:
    number, _, text = argument.partition(" ")
    if not text.strip():
        raise KvlocalError("/edit needs the number of a turn, as /kv shows it, and another text for it")
    chat.edit(_number("/edit", number, int), text.strip())


def _fork(chat: Chat, argument: str) -> None:
    if not argument:
        raise KvlocalError("/fork needs a name for the new session")
    path = new_session_path(argument)
    chat.fork(path)
    chat.screen.note(f"this chat goes on in the session {path.stem}{outside(path)}; the one until now stays as it is")


def _clear(chat: Chat, argument: str) -> None:
    _check_agreed(chat)
    chat.clear()
    chat.screen.note("forgotten; the system prompt stays, and /undo brings the rest back")


def _check_agreed(chat: Chat) -> None:
    """Asks before a session loses its turns.

    Raises:
        KvlocalError: they are to stay.
    """
    n = len(chat.session.messages)
    if chat.record.is_session and n and not chat.screen.agrees(f"Put the {n} messages of this session aside?"):
        raise KvlocalError("nothing has changed")


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        own = chat.session.template.own_system_prompt
        chat.screen.show(printable(chat.config.system if chat.config.system is not None else own or "none"))
        if chat.config.system is None and own:
            chat.screen.note("that is the model's own")
        return
    system = None if argument == '""' else argument
    chat.replace(replace(chat.config, system=system), chat.session.messages)
    chat.record.add(lambda transcript: transcript.add_system(system))
    chat.screen.note("system prompt changed; the conversation was read again")


def _on_a_line(text: str) -> str:
    return " ".join(printable(text).split())


def _start(text: str) -> str:
    text = _on_a_line(text)
    return text if len(text) <= 60 else f"{text[:60]}…"


def settings(chat: Chat) -> dict[str, Any]:
    """The values in use, by the names of their options."""
    config = chat.config
    values = {name: getattr(config.sampling, field) for name, (field, _) in _SAMPLING.items()}
    return {
        **values,
        "seed": chat.session.seed,
        "max-tokens": config.max_tokens,
        "kv-budget": chat.session.kv.budget,
        "policy": config.policy,
        "policy-args": dict(config.policy_args),
        "stride": config.stride,
        "ctk": config.type_k,
        "ctv": config.type_v,
        **({"lora": " ".join(map(str, loras))} if (loras := chat.session.model.adapters) else {}),
    }


def _biases(text: str) -> dict[int, float]:
    return {} if text == "none" else biases_of(text.replace(",", " ").split())


# what /set takes: of the sampling, the field and how its text is read
_SAMPLING: dict[str, tuple[str, Callable[[str], Any]]] = {
    "temp": ("temperature", float),
    "top-k": ("top_k", int),
    "top-p": ("top_p", float),
    "min-p": ("min_p", float),
    "repeat-penalty": ("repeat_penalty", float),
    "presence-penalty": ("presence_penalty", float),
    "frequency-penalty": ("frequency_penalty", float),
    "logit-bias": ("logit_bias", _biases),
    "dry-multiplier": ("dry_multiplier", float),
    "dry-base": ("dry_base", float),
    "dry-allowed-length": ("dry_allowed_length", int),
    "dry-penalty-last-n": ("dry_penalty_last_n", int),
    "xtc-probability": ("xtc_probability", float),
    "xtc-threshold": ("xtc_threshold", float),
    "seed": ("seed", int),
}


def _set(chat: Chat, argument: str) -> None:
    name, _, value = argument.partition(" ")
    name, value = name.removeprefix("--"), value.strip()
    if not name:
        for name, value in settings(chat).items():
            chat.screen.show(f"{name.ljust(18)}  {_shown(name, value)}{'  (as the chat began)' if name in _FIXED else ''}")
        return
    if name not in _SETTABLE:
        raise KvlocalError(f"/set {printable(name[:40])} is not possible: {_instead_of(name)}")
    if not value:
        raise KvlocalError(f"/set {name} needs a value")
    config = chat.config
    if name == "max-tokens":
        config = replace(config, max_tokens=_number(name, value, int))
        chat.session.max_tokens = config.max_tokens
        chat.config = config
    elif name == "kv-budget":
        chat.replace(replace(config, memory=None, budget=_number(name, value, int)), chat.session.messages)
    elif name == "policy":
        budget = chat.session.kv.budget
        chat.replace(_with_policy(config, value), chat.session.messages)
        if chat.session.kv.budget != budget:
            chat.screen.note(f"kv-budget: {chat.session.kv.budget}, which goes with that policy")
    elif name == "temp":
        sampling = with_temperature(config.sampling, _number(name, value, float))
        chat.session.set_sampling(sampling)
        chat.config = replace(config, sampling=sampling)
    else:
        field, kind = _SAMPLING[name]
        number = None if (name, value) == ("seed", "random") else _number(name, value, kind)
        changed: dict[str, Any] = {field: number}
        sampling = replace(config.sampling, **changed)
        chat.session.set_sampling(sampling)
        chat.config = replace(config, sampling=sampling)
    chat.screen.note(f"{name}: {_shown(name, settings(chat)[name])}")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        form = "{}{:+g}" if name == "logit-bias" else "{}={}"
        return " ".join(form.format(key, each) for key, each in value.items()) or "-"
    return str(value)


_SETTABLE = (*_SAMPLING, "max-tokens", "kv-budget", "policy")
_FIXED = ("stride", "ctk", "ctv")


def _instead_of(name: str) -> str:
    """What somebody can do who wants to set what /set cannot."""
    options = [opt.removeprefix("--") for parameter in click.get_current_context().command.params for opt in parameter.opts if opt.startswith("--")]
    close = next(iter(difflib.get_close_matches(name, [*_SETTABLE, *options], n=1)), None)
    if close is None:
        return f"it takes {', '.join(_SETTABLE)}"
    return f"did you mean {close}?" if close in _SETTABLE else f"begin a chat with --{close}"


def _number(name: str, text: str, kind: Callable[[str], Any]) -> Any:
    try:
        return kind(text)
    except ValueError:
        kinds = "a whole number" if kind is int else "a number"
        raise KvlocalError(f"{name} takes {kinds}, not {printable(text[:40])}") from None


def _with_policy(config: SessionConfig, text: str) -> SessionConfig:
    name, *args = text.split()
    try:
        return config.with_policy(name, dict(split_policy_arg(arg) for arg in args))
    except click.BadParameter as error:
        raise KvlocalError(f"{error.message}: write /set policy NAME name=value") from None


def _save(chat: Chat, argument: str) -> None:
    force = argument == "--force" or argument.startswith("--force ")
    path = _path(argument.removeprefix("--force").strip() if force else argument, "/save")
    messages = [dict(message) for message in chat.session.messages]
    conversation = Conversation(messages, chat.config.system, chat.name, settings(chat))
    save(path, conversation, lambda path: force or (chat.screen.interactive and chat.screen.agrees(f"{path} is there already. Replace it?")))
    chat.screen.note(f"saved {len(messages)} messages to {path}")


def _load(chat: Chat, argument: str) -> None:
    path = chat_file(str(_path(argument, "/load")))
    conversation = load(path)
    _check_agreed(chat)
    chat.load(conversation)
    note_loaded(chat, path, conversation)


def note_loaded(chat: Chat, path: Path, conversation: Conversation) -> None:
    """Say what was read."""
    chat.screen.note(f"read {len(conversation.messages)} messages from {path}{open_end(conversation)}")


def open_end(conversation: Conversation) -> str:
    """What to say of a last turn that has no whole answer."""
    messages = conversation.messages
    if messages and messages[-1]["role"] == "user":
        return "; the last turn has no answer yet: /regen makes one"
    return "; the last answer was cut off: /regen makes another" if len(messages) - 1 in conversation.cut_off else ""


def _path(argument: str, command: str) -> Path:
    if not argument:
        raise KvlocalError(f"{command} needs a file name")
    try:
        return Path(argument).expanduser()
    except RuntimeError:
        raise KvlocalError(f"there is no home directory for {argument}: give a full path") from None


def _bye(chat: Chat, argument: str) -> None:
    raise EOFError


_COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/kv": Command("/kv [all]", "what is in the cache: tokens seen and cells kept of each part, and what was recalled", _kv),
    "/why": Command("/why [all]", "which earlier turns the last answer looked at, by their share of its attention", _why),
    "/regen": Command("/regen", "another answer to the last turn", _regen),
    "/undo": Command("/undo [N]", "take the last turn and its answer back, or the last N; behind /clear or /load bring back what was there", _undo),
    "/edit": Command("/edit N TEXT", "say something else in turn N, as /kv numbers them; what follows is dropped", _edit),
    "/fork": Command("/fork NAME", "go on in a new session; the one until now stays as it is", _fork),
    "/clear": Command("/clear", "forget everything but the system prompt", _clear),
    "/system": Command("/system [TEXT]", 'show the system prompt or change it; "" goes back to the model\'s own', _system),
    "/set": Command("/set [NAME VALUE]", f"show the settings or change one: {', '.join(_SETTABLE)}", _set),
    "/save": Command("/save [--force] FILE", "write the conversation to a file, as Markdown if it ends in .md", _save),
    "/load": Command("/load FILE|NAME", "go on with a saved conversation, a transcript or a session", _load),
    "/bye": Command("/bye", "leave", _bye),
}

_OTHER_NAMES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
