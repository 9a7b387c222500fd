"""`kvlocal run`: one answer."""

import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.logprobs import logprobs
from kvlocal.chat.options import MAX_TOP_LOGPROBS, AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.chat.text_session import TextSession
from kvlocal.conversations.named_sessions import kept_path, last_used
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.transcript import Transcript
from kvlocal.llama.sampling import MAX_SEED
from kvlocal_cli import completing
from kvlocal_cli.answer_options import answer_options
from kvlocal_cli.answer_view import AnswerView, Unseen, answer_view
from kvlocal_cli.chat import Chat, Told
from kvlocal_cli.chat_command import model_of, system_of
from kvlocal_cli.chat_screen import Screen
from kvlocal_cli.groups import TextCommand
from kvlocal_cli.look import Look, look_options, warn_of_thoughts
from kvlocal_cli.options import Loaded, Loading, model_named, session_options
from kvlocal_cli.prompt import model_and_prompt
from kvlocal_cli.settings import is_given
from kvlocal_cli.terminal import (
    INTERRUPTED,
    Interruptible,
    ReadingBar,
    archive_lost,
    warn_of_base_model,
)


@click.command("run", cls=TextCommand)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]", shell_complete=completing.models)
@click.option("-m", "--model", metavar="MODEL", shell_complete=completing.models, help="The model, in place of the argument.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", shell_complete=completing.files,
              help="A text that belongs to the prompt; can be repeated, and written @FILE.")
@session_options
@answer_options
@look_options
@click.option("--session", "session_name", metavar="NAME|FILE", shell_complete=completing.sessions,
              help="Ask in the conversation that is kept under this name, or begin it.")
@click.option("-t", "--template", "named", metavar="NAME", shell_complete=completing.prompts,
              help="Take the prompt of this name, with PROMPT and files as the text that it is for.")
@click.option("-c", "--continue", "goes_on", is_flag=True, help="Ask in the chat or session that was used last.")
@click.option("--raw", is_flag=True, help="Complete PROMPT as it is, without a chat template, and print how it goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer.")
@click.option("--logprobs", "n_logprobs", type=click.IntRange(0, MAX_TOP_LOGPROBS), metavar="N",
              help="With --json: tell how likely each token of the answer was, and the N likeliest at its place.")  # fmt: skip
def run_command(
    words: tuple[str, ...],
    model: str | None,
    files: tuple[str, ...],
    session_name: str | None,
    named: str | None,
    goes_on: bool,
    config: SessionConfig,
    loading: Loading,
    asked: AnswerOptions,
    look: Look,
    raw: bool,
    as_json: bool,
    n_logprobs: int | None,
) -> None:
    """Answer one PROMPT and print nothing but the answer.

    MODEL is a name that `kvlocal models` lists or the path of a GGUF file. A single argument is taken for MODEL if it
    is such a name, begins with hf: or ends in .gguf, else for PROMPT, and the default model answers; to ask exactly
    such a word, name the model too, also by -m.

    What is piped in is the prompt, or follows PROMPT after an empty line, and so do the texts of files:

    \b
        kvlocal run "Sum this up." < report.txt
        kvlocal run "What has changed?" @old.txt @new.txt
        kvlocal run -t summary < report.txt

    A prompt with a name is a text file such as summary.txt in the directory prompts beside the config file; {{input}} in it
    stands for the text, which else follows it.
    """
    if n_logprobs is not None:
        if not as_json:
            raise click.UsageError("--logprobs is told in the JSON object: give --json too")
        asked = replace(asked, top_logprobs=n_logprobs)
    if raw and config.system is not None:
        raise click.UsageError("--raw takes the text as it is, without a system prompt: leave --system out, or write it into the text")
    in_chat = session_name is not None or goes_on
    if in_chat and (raw or (session_name is not None and goes_on)):
        raise click.UsageError("--session, --continue and --raw are three ways of asking: give one of them")
    name, prompt = model_and_prompt(words, model if is_given("model") else None, files, named)
    _, default = model_named(name, None if is_given("model") else model)
    if config.sampling.seed is None:
        # drawn here so that it can be told
        config = replace(config, sampling=replace(config.sampling, seed=secrets.randbelow(MAX_SEED + 1)))
    config = replace(config, thinking=look.think != "off")
    view: AnswerView = Unseen() if as_json else answer_view(look, is_markdown=not raw)
    if in_chat:
        path = last_used() if session_name is None else kept_path(session_name)
        _ask_in_chat(path, name, default, prompt, config, loading, asked, look, view, as_json)
        return
    name = default
    bar, said = ReadingBar(), []
    with loading.loaded(name, config) as loaded, _session(loaded, bar, raw) as session, Interruptible(session) as turn:
        if not raw:
            warn_of_base_model(name, loaded.model)
            warn_of_thoughts(name, loaded.model, look)
        try:
            pieces = _pieces(session, prompt, asked)
        finally:
            bar.close()
        try:
            for text, piece in turn.answering(pieces):
                said.append(text)
                view.write(text, piece)
        finally:
            view.end()
        answer, lost = "".join(said), session.kv.archive_lost
        if as_json:
            _print_report(name, prompt, answer, session, asked, raw)
        else:
            _tell_cut_off(session)
    if lost:
        click.echo(f"kvlocal: {archive_lost(lost)}", err=True)
    if turn.interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _ask_in_chat(
    path: Path,
    name: str | None,
    default: str,
    prompt: str,
    config: SessionConfig,
    loading: Loading,
    asked: AnswerOptions,
    look: Look,
    view: AnswerView,
    as_json: bool,
) -> None:
    """Asks behind what was said before, and keeps it."""
    with Transcript.resume(path) as kept:
        earlier = kept.conversation or Conversation()
        name = model_of(earlier, name, default, Screen(verbose=False))
        config = replace(config, system=system_of(earlier, config))
        screen = Screen(verbose=False, person=False)
        with loading.loaded(name, config) as loaded, Chat(name, loaded, screen, view, loading, asked) as chat:
            warn_of_base_model(name, loaded.model)
            warn_of_thoughts(name, loaded.model, look)
            chat.keep_session(kept)
            chat.ask(prompt)
            chat.record.save_snapshot(chat.session)
            chat.record.tell_unsaid()
            if as_json:
                _print_report(name, prompt, chat.session.messages[-1]["content"], chat.session, asked, raw=False)
            else:
                _tell_cut_off(chat.session)


def _tell_cut_off(session: ChatSession | TextSession) -> None:
    if session.last and session.last.stop_reason == "length":
        click.echo(f"kvlocal: the answer was cut off at {session.last.answer_tokens} tokens: give a larger --max-tokens", err=True)


def _session(loaded: Loaded, bar: ReadingBar, raw: bool) -> ChatSession | TextSession:
    if raw:
        return TextSession(loaded.model, loaded.config, progress=bar.show, undo=False)
    return ChatSession(loaded.model, loaded.config, progress=bar.show, nexus=loaded.nexus)


def _pieces(session: ChatSession | TextSession, prompt: str, asked: AnswerOptions) -> Iterator[Told]:
    """What answers the prompt, or goes on with it, once it is read."""
    if isinstance(session, ChatSession):
        session.add_turn("user", prompt)
        return session.told(asked)
    session.read(prompt)
    return ((piece.text, piece) for piece in session.pieces(asked))


def _print_report(name: str, prompt: str, answer: str, session: ChatSession | TextSession, asked: AnswerOptions, raw: bool) -> None:
    last = session.last
    assert last is not None  # after an answer
    placement = asdict(session.model.placement)
    report = {
        "model": name,
        **({"lora": [{"path": str(each.path), "scale": each.scale} for each in session.model.adapters]} if session.model.adapters else {}),
        "prompt": prompt,
        "answer": answer,
        "kv": session.kv.report(),
        "recalled": list(last.recalled),
        "timings": {
            "prompt_tokens": last.prompt_tokens,
            "answer_tokens": last.answer_tokens,
            "prompt_seconds": last.prompt_seconds,
            "answer_seconds": last.answer_seconds,
            "tokens_per_second": last.tokens_per_second,
            **{f"{phase}_seconds": seconds for phase, seconds in asdict(session.seconds).items()},
        },
        "seed": session.seed,
        "settings": {
            **session.settings(),
            "gpu_layers": placement.pop("n_gpu_layers"),
            **placement,
            "raw": raw,
            "stop": list(asked.stop),
            "json_schema": asked.json_schema,
            "grammar": asked.grammar,
        },
        "stop_reason": last.stop_reason,
        **({} if asked.top_logprobs is None else {"logprobs": {"content": logprobs(last.logprobs)}}),
    }
    click.echo(json.dumps(report, indent=2, ensure_ascii=False))
