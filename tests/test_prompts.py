"""The prompt of `kvlocal run`: prompts with a name."""

import io
import sys

import pytest
from click.testing import CliRunner

from kvlocal.errors import KvlocalError
from kvlocal_cli.main import main
from kvlocal_cli.prompt import model_and_prompt


@pytest.fixture(autouse=True)
def prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    folder = tmp_path / "kvlocal" / "prompts"
    folder.mkdir(parents=True)
    (folder / "summary.txt").write_bytes(b"\xef\xbb\xbfSum this up:\r\n")
    (folder / "letter.md").write_text("Answer this letter:\n\n{{ input }}\n\nBe kind to {{input}}.\n")
    (folder / "notes.pdf").touch()
    return folder


def test_the_text_goes_behind_a_prompt_or_into_it(monkeypatch, tmp_path):
    assert model_and_prompt(["A long text."], None, named="summary") == (None, "Sum this up:\n\nA long text.")
    letter = "Answer this letter:\n\nDear \\1 {{input}}\n\nBe kind to Dear \\1 {{input}}."
    assert model_and_prompt([r"Dear \1 {{input}}"], None, named="letter") == (None, letter)
    assert model_and_prompt([], None, named="summary") == (None, "Sum this up:")
    assert model_and_prompt(["smollm2-135m", "A text."], None, named="summary") == ("smollm2-135m", "Sum this up:\n\nA text.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"From a pipe.\n")))
    assert model_and_prompt([], None, named="summary")[1] == "Sum this up:\n\nFrom a pipe."


@pytest.mark.parametrize("name", ["sumary", "../kvlocal/prompts/summary", "notes", ""])
def test_a_name_that_is_not_there_is_told_with_those_that_are(prompts, name):
    with pytest.raises(KvlocalError) as error:
        model_and_prompt(["x"], None, named=name)
    assert str(error.value) == f"no prompt is called {name!r}: there are letter, summary in {prompts}, a text file such as summary.txt for each"


def test_failures_are_sentences(prompts):
    def said(*args: str) -> str:
        result = CliRunner().invoke(main, ["run", *args], catch_exceptions=False)
        assert result.exit_code in (1, 2) and result.stdout == "" and result.stderr.count("\n") == 1
        return result.stderr

    assert "the prompt letter is for a text" in said("-t", "letter")
    for path in prompts.iterdir():
        path.unlink()
    assert f"there is none yet in {prompts}" in said("-t", "letter", "x")
    (prompts / "bad.txt").write_bytes(b"\xff")
    assert "is no text in UTF-8" in said("-t", "bad", "x")
