"""`kvlocal run`: one answer."""

import json
import secrets
import sys
from dataclasses import asdict, replace
from pathlib import Path

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.options import AnswerOptions
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import DEFAULT_MODEL, Catalogue
from kvlocal.llama.sampling import MAX_SEED
from kvlocal_cli.answer_options import answer_options
from kvlocal_cli.options import Loading, clean_text, session_options
from kvlocal_cli.terminal import (
    INTERRUPTED,
    Interruptible,
    ReadingBar,
    archive_lost,
    decode_input,
    is_terminal,
    telling_of_silence,
    write_answer,
)


@click.command("run")
@click.argument("words", nargs=-1, metavar="[MODEL] [PROMPT]")
@session_options
@answer_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the answer.")
def run_command(words: tuple[str, ...], config: SessionConfig, loading: Loading, asked: AnswerOptions, as_json: bool) -> None:
    """Answer one PROMPT and print nothing but the answer.

    MODEL is a name that `kvlocal models` lists or the path of a GGUF file. A single argument is taken for MODEL if it
    is such a name, begins with hf: or ends in .gguf, else for PROMPT, and the default model answers; to ask exactly
    such a word, name the model too.

    What is piped in is the prompt, or follows PROMPT after an empty line:

    \b
        kvlocal run "Sum this up." < report.txt
    """
    name, prompt = _model_and_prompt(words)
    if config.sampling.seed is None:
        # drawn here so that it can be told
        config = replace(config, sampling=replace(config.sampling, seed=secrets.randbelow(MAX_SEED + 1)))
    bar = ReadingBar()
    with (
        loading.loaded(name, config) as loaded,
        ChatSession(loaded.model, loaded.config, progress=bar.show, nexus=loaded.nexus) as session,
        Interruptible(session) as turn,
    ):
        try:
            pieces = session.send(prompt, asked)
        finally:
            bar.close()
        try:
            for piece in turn.answering(pieces):
                if not as_json:
                    write_answer(piece)
        except KvlocalError:
            if not as_json:
                write_answer("\n")
            raise
        answer, lost = session.messages[-1]["content"], session.kv.archive_lost
        if as_json:
            click.echo(json.dumps(_report(name, prompt, answer, session), indent=2, ensure_ascii=False))
        elif not answer.endswith("\n"):
            click.echo()
    if lost:
        click.echo(f"kvlocal: {archive_lost(lost)}", err=True)
    if turn.interrupted:
        click.get_current_context().exit(INTERRUPTED)


def _model_and_prompt(words: tuple[str, ...]) -> tuple[str, str]:
    if len(words) > 2:
        raise click.UsageError('too many arguments: put the prompt in quotes, as in kvlocal run "Why is the sky blue?"')
    name, prompt = DEFAULT_MODEL, None
    if len(words) == 2:
        name, prompt = words
    elif words and _names_a_model(words[0]):
        name = words[0]
    elif words:
        prompt = words[0]
    parts = [clean_text(prompt)] if prompt else []
    if sys.stdin is not None and not is_terminal(sys.stdin):
        with telling_of_silence("waiting for the end of standard input, which belongs to the prompt; where there is none, run it with </dev/null"):
            parts.append(decode_input(sys.stdin.buffer.read()))
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise click.UsageError("there is no prompt: give one as an argument or through a pipe")
    return name, prompt


def _names_a_model(word: str) -> bool:
    if word in Catalogue.load().entries or word.startswith("hf:"):
        return True
    # a path that does not exist gets an error, not an answer
    return Path(word).suffix.lower() == ".gguf" and "\n" not in word


def _report(name: str, prompt: str, answer: str, session: ChatSession) -> dict[str, object]:
    last = session.last
    assert last is not None  # after an answer
    return {
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
        "stop_reason": last.stop_reason,
    }

