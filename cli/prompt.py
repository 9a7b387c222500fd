"""The prompt of `kvlocal run`: of arguments, of files, and of what is piped in."""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from kvlocal.errors import KvlocalError
from kvlocal.files.places import prompts_dir
from kvlocal.files.text import text_of
from kvlocal.hub.catalogue import Catalogue
from kvlocal_cli.options import clean_text
from kvlocal_cli.terminal import decode_input, is_terminal, telling_of_silence

_INPUT = re.compile(r"\{\{\s*input\s*\}\}")  # where the text goes in a prompt with a name
_ENDINGS = (".txt", ".md")  # of the files of such prompts


def model_and_prompt(words: Sequence[str], model: str | None, files: Sequence[str] = (), named: str | None = None) -> tuple[str | None, str]:
    """The model that is asked, None if none is named, and the prompt.

    Args:
        words: the arguments; @FILE is a file, any other the prompt, or the model and the prompt.
        model: if it was named by an option; then no word is one.
        files: more files; their texts follow the prompt, with their names if there are several.
        named: the name of a prompt that all this is the text for.

    Raises:
        click.UsageError: there is no prompt, or a file cannot be read.
        KvlocalError: there is no prompt of that name.
    """
    form = None if named is None else named_prompt(named)
    in_words = [word[1:] for word in words if _is_file(word)]
    name, prompt = _split([word for word in words if not _is_file(word)], model)
    parts = [clean_text(prompt)] if prompt else []
    paths = [Path(file).expanduser() for file in (*in_words, *files)]
    parts += [f"{path.name}:\n\n{_text(path)}" if len(paths) > 1 else _text(path) for path in paths]
    if sys.stdin is not None and not is_terminal(sys.stdin):
        with telling_of_silence("waiting for the end of standard input, which belongs to the prompt; where there is none, run it with </dev/null"):
            parts.append(decode_input(sys.stdin.buffer.read()))
    prompt = "\n\n".join(part for part in parts if part.strip())
    if form is not None:
        prompt = _filled(named or "", form, prompt)
    if not prompt:
        raise click.UsageError("there is no prompt: give one as an argument, in a file or through a pipe")
    return name, prompt


def named_prompt(name: str) -> str:
    """The text of the prompt that is kept under a name.

    Raises:
        KvlocalError: there is none, or it cannot be read; the sentence says which there are.
    """
    for path in (prompts_dir() / f"{name}{ending}" for ending in _ENDINGS):
        if os.sep not in name and path.is_file():
            return _text(path)
    there = sorted({path.stem for path in prompts_dir().glob("*") if path.suffix in _ENDINGS})
    hint = f"there are {', '.join(there)}" if len(there) > 1 else f"there is {there[0]}" if there else "there is none yet"
    where = f"in {prompts_dir()}, a text file such as summary.txt for each"
    raise KvlocalError(f"no prompt is called {name[:60]!r}: {hint} {where}")


def _filled(name: str, form: str, text: str) -> str:
    """A prompt with its text in the place of {{input}}, or behind it."""
    if not _INPUT.search(form):
        return "\n\n".join(part for part in (form, text) if part.strip())
    if not text:
        raise click.UsageError(f"the prompt {name} is for a text: give it as an argument, in a file or through a pipe")
    return _INPUT.sub(lambda _: text, form)


def _is_file(word: str) -> bool:
    """Whether a word names a file; a text that begins with an at sign has more than one word, or two of these signs."""
    return word.startswith("@") and len(word.split()) == 1 and not word.startswith("@@") and len(word) > 1


def _split(words: Sequence[str], model: str | None) -> tuple[str | None, str | None]:
    if len(words) > (2 if model is None else 1):
        raise click.UsageError('too many arguments: put the prompt in quotes, as in kvlocal run "Why is the sky blue?"')
    texts = [word[1:] if word.startswith("@@") else word for word in words]
    if len(words) == 2:
        return texts[0], texts[1]
    if model is None and words and _names_a_model(words[0]):
        return words[0], None
    return model, texts[0] if texts else None


def _text(path: Path) -> str:
    try:
        return text_of(path.read_bytes()).rstrip("\r\n")
    except OSError as error:
        raise click.UsageError(f"cannot read {path} ({error.strerror}): name a text file, or write @@ for a text that begins with @") from error
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{path} is no text in UTF-8: name a text file") from error


def _names_a_model(word: str) -> bool:
    if Catalogue.load().is_name(word):
        return True
    # a path that does not exist gets an error, not an answer
    return Path(word).suffix.lower() == ".gguf" and "\n" not in word
