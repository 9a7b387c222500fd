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
from kvlocal.conversations.named_sessions import last_used, new_session_path
from kvlocal.conversations.records import Conversation
from kvlocal.conversations.transcript import Transcript
from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import DEFAULT_MODEL
from kvlocal.llama.sampling import MAX_SEED
from kvlocal_cli.answer_options import answer_options
from kvlocal_cli.chat import Chat
from kvlocal_cli.chat_command import model_of
from kvlocal_cli.chat_screen import Screen
from kvlocal_cli.groups import TextCommand
from kvlocal_cli.options import Loaded, Loading, clean_text, session_options
from kvlocal_cli.prompt import model_and_prompt
from kvlocal_cli.terminal import (
    INTERRUPTED,
    Interruptible,
    ReadingBar,
    archive_lost,
    warn_of_base_model,
    write_answer,
)


@click.command("run", cls=TextCommand)
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@click.option("-m", "--model", metavar="MODEL", help="The model, in place of the argument.")
@click.option("-f", "--file", "files", multiple=True, metavar="FILE", help="A text that belongs to the prompt; can be repeated, and written @FILE.")
@session_options
@answer_options
@click.option("--session", "session_name", metavar="NAME|FILE", help="Ask in the conversation that is kept under this name, or begin it.")
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
    goes_on: bool,
    config: SessionConfig,
    loading: Loading,
    asked: AnswerOptions,
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
    name, prompt = model_and_prompt(words, model, files)
    if config.sampling.seed is None:
        # drawn here so that it can be told
        config = replace(config, sampling=replace(config.sampling, seed=secrets.randbelow(MAX_SEED + 1)))
    if in_chat:
        _ask_in_chat(last_used() if session_name is None else new_session_path(session_name), name, prompt, config, loading, asked, as_json)
        return
    name = name or DEFAULT_MODEL
    bar, said = ReadingBar(), []
    with loading.loaded(name, config) as loaded, _session(loaded, bar, raw) as session, Interruptible(session) as turn:
        if not raw:
            warn_of_base_model(name, loaded.model)
        try:
            pieces = _pieces(session, prompt, asked)
        finally:
            bar.close()
        try:
            for piece in turn.answering(pieces):
                said.append(piece)
                if not as_json:
                    write_answer(piece)
        except KvlocalError:
            if not as_json:
                write_answer("\n")
            raise
        answer, lost = "".join(said), session.kv.archive_lost
        if as_json:
            _print_report(name, prompt, answer, session, asked, raw)
        elif not answer.endswith("\n"):
            click.echo()
        if not as_json:
            _tell_cut_off(session)
    if lost:
        click.echo(f"kvlocal: {archive_lost(lost)}", err=True)
    if turn.interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _ask_in_chat(
    path: Path, name: str | None, prompt: str, config: SessionConfig, loading: Loading, asked: AnswerOptions, as_json: bool
) -> None:
    """Asks behind what was said before, and keeps it."""
    with Transcript.resume(path) as kept:
        earlier = kept.conversation or Conversation()
        name = model_of(earlier, name, Screen(verbose=False))
        config = replace(config, system=earlier.system if config.system is None else clean_text(config.system))
        with loading.loaded(name, config) as loaded, Chat(name, loaded, Screen(verbose=False, person=False), loading, asked) as chat:
            warn_of_base_model(name, loaded.model)
            chat.keep_session(kept)
            if as_json:
                chat.write = lambda _: None
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


def _pieces(session: ChatSession | TextSession, prompt: str, asked: AnswerOptions) -> Iterator[str]:
    """What answers the prompt, or goes on with it, once it is read."""
    if isinstance(session, ChatSession):
        return session.send(prompt, asked)
    session.read(prompt)
    return session.answer(asked)


def _print_report(name: str, prompt: str, answer: str, session: ChatSession | TextSession, asked: AnswerOptions, raw: bool) -> None:
    last = session.last
    assert last is not None  # after an answer
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
            "gpu_layers": session.model.n_gpu_layers,
            "raw": raw,
            "stop": list(asked.stop),
            "json_schema": asked.json_schema,
            "grammar": asked.grammar,
        },
        "stop_reason": last.stop_reason,
        **({} if asked.top_logprobs is None else {"logprobs": {"content": logprobs(last.logprobs)}}),
    }
    click.echo(json.dumps(report, indent=2, ensure_ascii=False))
