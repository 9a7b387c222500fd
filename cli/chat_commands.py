"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from kvlocal import policies
from kvlocal.chat.config import SessionConfig
from kvlocal.conversations.named_sessions import chat_file, new_session_path, outside
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.saved_chat import load, save
from kvlocal.errors import KvlocalError
from kvlocal.llama.sampling import with_temperature
from kvlocal.template.answer import split_thought
from kvlocal_cli.chat_completion import ChatCompleter, Complete, files, nothing, sessions_and_files, values, words
from kvlocal_cli.chat_tables import on_a_line, show_attention, show_cache
from kvlocal_cli.clipboard import copy
from kvlocal_cli.look import Look, Think, warn_of_thoughts
from kvlocal_cli.options import split_policy_arg
from kvlocal_cli.sampling_options import biases_of
from kvlocal_cli.terminal import printable

if TYPE_CHECKING:
    from kvlocal_cli.chat import Chat

@dataclass(frozen=True)
class Command:
    usage: str
    help: str
    run: Callable[[Chat, str], None]
    complete: Complete = nothing


def completer() -> ChatCompleter:
    """What Tab completes in a line with a command."""
    return ChatCompleter({name: command.complete for name, command in COMMANDS.items()})


def execute(chat: Chat, line: str) -> None:
    """Run the command of a line.

    Raises:
        EOFError: it ends the chat.
        KvlocalError: there is no such command, or it failed; the chat is as it was.
    """
    name, _, argument = line.partition(" ")
    name = _OTHER_NAMES.get(name, name)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "/help lists them, and // begins a line of text with a slash"
        raise KvlocalError(f"there is no command {printable(name[:40])}: {hint}")
    try:
        COMMANDS[name].run(chat, argument.strip())
    except KeyboardInterrupt:
        if not chat.screen.interactive:
            raise
        raise KvlocalError("stopped: the chat is as it was") from None


def _help(chat: Chat, argument: str) -> None:
    rows = [(command.usage, command.help) for command in COMMANDS.values()]
    rows += [
        ('"""', "begins and ends a text of several lines"),
        ("//", "begins a line of text that starts with a slash"),
        ("Ctrl-C", "stops the answer, not the program"),
        ("Ctrl-D", "leaves"),
    ]
    width = max(len(usage) for usage, _ in rows)
    for usage, text in rows:
        chat.screen.show(f"{usage.ljust(width)}  {text}")


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


def _copy(chat: Chat, argument: str) -> None:
    messages = chat.session.messages
    if not messages or messages[-1]["role"] != "assistant":
        raise KvlocalError("there is no answer to copy: send something first")
    if not chat.screen.interactive:
        raise KvlocalError("/copy is for a terminal: without one the answer is on standard output")
    answer = split_thought(messages[-1]["content"])[2].strip()
    copy(answer, chat.screen.terminal)
    chat.screen.note(f"copied the last answer, {len(answer)} characters")


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


def _start(text: str) -> str:
    text = on_a_line(text)
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
        "think": chat.view.think,
        "policy-args": dict(config.policy_args),
        "stride": config.stride,
        "read-stride": config.slack,
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
    elif name == "think":
        _set_think(chat, value)
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


# and the values that are words
_SETTABLE: dict[str, Sequence[str]] = {
    **dict.fromkeys(_SAMPLING, ()), "max-tokens": (), "kv-budget": (), "policy": tuple(policies.POLICIES), "think": get_args(Think),
}  # fmt: skip
_FIXED = ("stride", "read-stride", "ctk", "ctv")


def _set_think(chat: Chat, value: str) -> None:
    think = next((known for known in get_args(Think) if known == value), None)
    if think is None:
        raise KvlocalError(f"/set think takes {', '.join(get_args(Think))}, not {printable(value[:40])}")
    if chat.config.thinking == (think == "off"):
        chat.replace(replace(chat.config, thinking=think != "off"), chat.session.messages)
    chat.view.think = think
    warn_of_thoughts(chat.name, chat.session.model, Look(think=think))


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


COMMANDS = {
    "/help": Command("/help", "this list", _help),
    "/kv": Command("/kv [all]", "what is in the cache: tokens seen and cells kept of each part, and what was recalled", show_cache, words(["all"])),
    "/why": Command("/why [all]", "which earlier turns the last answer looked at, by their share of its attention", show_attention, words(["all"])),
    "/regen": Command("/regen", "another answer to the last turn", _regen),
    "/undo": Command("/undo [N]", "take the last turn and its answer back, or the last N; behind /clear or /load bring back what was there", _undo),
    "/copy": Command("/copy", "the last answer into the clipboard, without its thought", _copy),
    "/edit": Command("/edit N TEXT", "say something else in turn N, as /kv numbers them; what follows is dropped", _edit),
    "/fork": Command("/fork NAME", "go on in a new session; the one until now stays as it is", _fork),
    "/clear": Command("/clear", "forget everything but the system prompt", _clear),
    "/system": Command("/system [TEXT]", 'show the system prompt or change it; "" goes back to the model\'s own', _system),
    "/set": Command("/set [NAME VALUE]", f"show the settings or change one: {', '.join(_SETTABLE)}", _set, values(_SETTABLE)),
    "/save": Command("/save [--force] FILE", "write the conversation to a file, as Markdown if it ends in .md", _save, files),
    "/load": Command("/load FILE|NAME", "go on with a saved conversation, a transcript or a session", _load, sessions_and_files),
    "/bye": Command("/bye", "leave", _bye),
}

_OTHER_NAMES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
