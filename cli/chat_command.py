"""`kvlocal chat`: begins a chat, or goes on with one."""

from contextlib import nullcontext
from dataclasses import replace

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.options import AnswerOptions
from kvlocal.conversations.named_sessions import chat_file, kept_path
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.saved_chat import load
from kvlocal.conversations.transcript import Transcript
from kvlocal.hub.catalogue import is_same_model
from kvlocal_cli import chat_commands, completing
from kvlocal_cli.answer_options import answer_options
from kvlocal_cli.answer_view import answer_view
from kvlocal_cli.chat import Chat
from kvlocal_cli.chat_screen import Screen
from kvlocal_cli.groups import Command
from kvlocal_cli.look import Look, look_options, warn_of_thoughts
from kvlocal_cli.options import Loading, clean_text, model_named, session_options
from kvlocal_cli.settings import is_given
from kvlocal_cli.terminal import warn_of_base_model


@click.command("chat", cls=Command)
@click.argument("name", required=False, metavar="[MODEL]", shell_complete=completing.models)
@click.option("-m", "--model", metavar="MODEL", shell_complete=completing.models, help="The model, in place of the argument.")
@session_options
@answer_options
@look_options
@click.option("--session", "session_name", metavar="NAME|FILE", shell_complete=completing.sessions,
              help="Begin a conversation that is kept under this name or in this file, or go on with it where it ended.")
@click.option("--load", "load_from", metavar="FILE|NAME", shell_complete=completing.conversations,
              help="Go on with a saved chat, a transcript, or a copy of a session.")
@click.option("--no-transcript", is_flag=True, help="Keep no file of this chat.")
@click.option("--separator", default="", metavar="TEXT", help="Without a terminal, the line between two answers.  [default: an empty line]")
@click.option("--verbose", is_flag=True, help="Without a terminal, say on stderr what a terminal would show.")
def chat_command(
    name: str | None,
    model: str | None,
    config: SessionConfig,
    loading: Loading,
    asked: AnswerOptions,
    look: Look,
    session_name: str | None,
    load_from: str | None,
    no_transcript: bool,
    separator: str,
    verbose: bool,
) -> None:
    """Chat with a model.

    MODEL is a name that `kvlocal models` lists, or the path of a GGUF file. Without it a session goes on with its own model.

    The chat never ends: what it was about stays in the KV cache as far as the budget goes. Type /help for the commands.
    Every chat is kept in a transcript, word by word; --session goes on with one where it ended, whatever ended it.

    Without a terminal turns are read from stdin, one a line, and the answers are plain text on stdout, with an empty line between two:

    \b
        printf 'Hello\\nWhat did I just say?\\n' | kvlocal chat
    """
    name, default = model_named(name, model)
    if session_name is not None and no_transcript:
        raise click.UsageError("a session is its transcript: give --session or --no-transcript")
    load_path = None if load_from is None else chat_file(load_from)
    begun = Conversation() if load_path is None else load(load_path)
    kept = None if session_name is None else Transcript.resume(kept_path(session_name))
    with kept or nullcontext():
        earlier = (kept and kept.conversation) or Conversation()
        if earlier.messages and load_path:
            raise click.UsageError(f"the session {session_name} has begun already: load the file into another one, or in the chat with /load")
        screen = Screen(verbose=verbose)
        name = model_of(earlier, name, default, screen)
        before = begun if load_path else earlier
        system = system_of(before, config)
        config = replace(config, system=system, thinking=look.think != "off")
        with loading.loaded(name, config) as loaded, Chat(name, loaded, screen, answer_view(look, separator=separator), loading, asked) as chat:
            warn_of_base_model(name, loaded.model)
            warn_of_thoughts(name, loaded.model, look)
            if begun.messages:
                # before there is a transcript: a file that does not fit leaves none
                chat.replace(chat.config, begun.messages)
            if kept:
                chat.keep_session(kept)
            elif not no_transcript:
                chat.record.begin(chat.name, chat.config.system)
            if load_path and begun.messages:
                chat.record.add(lambda transcript: transcript.add_load(begun.messages, system))
                chat_commands.note_loaded(chat, load_path, begun)
            chat.run()
            failed = chat.failed
    if failed:
        click.get_current_context().exit(1)


def system_of(earlier: Conversation, config: SessionConfig) -> str | None:
    """The system prompt that goes on with a conversation: the one that the command line gives, else its own, if it has turns, or that of the
    configuration."""
    if config.system is None or (earlier.messages and not is_given("system")):
        return earlier.system
    return clean_text(config.system)


def model_of(earlier: Conversation, name: str | None, default: str, screen: Screen) -> str:
    """The model that goes on with a conversation: the one that the command line names, if a person agrees to another than before, else its own, or
    the default.

    Raises:
        click.Abort: the person does not agree.
    """
    is_other = name and earlier.model and earlier.messages and not is_same_model(name, earlier.model)
    if is_other and not screen.agrees(f"This session was led with {earlier.model}. Read it with {name}, and go on with that?"):
        raise click.Abort
    return name or earlier.model or default
