"""What the documentation says is what the code does: tables, names and links."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import get_args

import click
import pytest
from test_rooms import MODULES, ROOMS

from kvlocal.batch.in_process import batch_timings
from kvlocal.batch.line import OPTIONS
from kvlocal.cache.compression import Seconds
from kvlocal.chat.stats import REPORTED, StopReason
from kvlocal.hub.catalogue import Catalogue
from kvlocal.policies import DEFAULT_POLICY, POLICIES, WITHOUT_ARCHIVE, WITHOUT_NEXUS
from kvlocal_cli import chat_commands, options
from kvlocal_cli.config_file import all_commands
from kvlocal_cli.main import main
from kvlocal_cli.settings import settable, variable

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted((ROOT / "docs").glob("*.md"))


def table(page: str, header: str) -> list[list[str]]:
    """The rows of a table, by the beginning of its header, without the header and the line below it."""
    lines = (ROOT / page).read_text().split(f"| {header} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def session_options() -> dict[str, click.Option]:
    """The options of every command that holds a conversation, by their name on the command line."""

    @options.session_options
    def command() -> None: ...

    return {option.opts[0]: option for option in reversed(command.__click_params__) if isinstance(option, click.Option)}


def test_the_table_of_options():
    known = session_options()
    rows = [(name, cells[1]) for cells in table("docs/chat.md", "option") for name in code(cells[0])]
    assert [name.split()[0] for name, _ in rows] == list(known)
    for text, default in rows:
        name, _, values = text.partition(" ")
        option = known[name]
        if isinstance(option.type, click.Choice) and values == values.lower() and values:
            assert values.split("|") == list(option.type.choices)
        if option.show_default:
            assert default == str(option.default), name


def test_defaults_that_depend_on_others_are_in_the_help():
    known = session_options()
    rows = {name.split()[0]: cells for cells in table("docs/chat.md", "option") for name in code(cells[0])}
    for name in ("--kv-budget", "--repeat-penalty"):
        assert f"[default: {rows[name][1]}" in known[name].help
    assert code(rows["--policy"][1]) == [DEFAULT_POLICY, WITHOUT_ARCHIVE, WITHOUT_NEXUS]
    assert code(rows["--ctk"][2]) == list(known["--ctk"].type.choices)


def test_the_table_of_policies():
    rows = table("docs/chat.md", "policy")
    assert [code(row[0]) for row in rows] == [[name] for name in POLICIES]
    for (name, policy), row in zip(POLICIES.items(), rows, strict=True):
        shown = {field.name: {True: "on", False: "off"}.get(field.default, field.default) if isinstance(field.default, bool) else field.default
                 for field in fields(policy)}  # fmt: skip
        assert code(row[2]) == [f"{key}={value}" for key, value in shown.items()], name
        assert ("the default where" in row[1]) == (name in (DEFAULT_POLICY, WITHOUT_ARCHIVE, WITHOUT_NEXUS))


def test_the_table_of_hyper_parameters():
    documented = [name for row in table("docs/chat.md", "hyper-parameter") for name in code(row[0])]
    assert sorted(documented) == sorted({field.name for policy in POLICIES.values() for field in fields(policy)})


def test_the_table_of_environment_variables():
    documented = {name for row in table("docs/chat.md", "variable") for name in code(row[0])}
    sources = [path.read_text() for folder in ("kvlocal", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert documented == {name for text in sources for name in re.findall(r"\b(?:KVLOCAL|XDG)_[A-Z_]+\b", text)}


def test_the_keys_of_the_json_of_run_are_documented():
    rows = {name: row[1] for row in table("docs/chat.md", "key") for name in code(row[0])}
    phases = [f"{field.name}_seconds" for field in fields(Seconds)]
    assert set(code(rows["kv"])) == set(REPORTED) and code(rows["timings"])[-len(phases) :] == phases
    assert code(rows["stop_reason"])[0:1] == ["end"] and {*get_args(StopReason)} - {"tool_calls"} <= {*code(rows["stop_reason"])}


def test_the_timings_of_a_batch_are_documented():
    documented = [name for row in table("docs/batches.md", "key") for name in code(row[0])]
    assert sorted(documented) == sorted(batch_timings(1.0, 2, 3, 0.5, Seconds()))


def test_every_option_of_every_command_is_documented():
    """By one of its names, in a table, a sentence or an example."""
    text = "\n".join(page.read_text() for page in PAGES if page.name != "CHANGELOG.md")
    blocks = re.compile(r"^    (.*)$", re.MULTILINE)
    # a backquote in a block of code is one
    shown = "\n".join([*code(blocks.sub("", text)), *blocks.findall(text)])
    undocumented = {
        f"{' '.join(path)} --{key}"
        for path, command in all_commands(main)
        for key, option in settable(command).items()
        if not any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", shown) for name in option.opts)
    }
    assert undocumented == set()


def test_the_names_of_settings():
    rows = [[code(cell) for cell in row] for row in table("docs/config.md", "for")]
    for (command, *_), (name,), (key, scope) in rows:
        if command.startswith("kvlocal "):
            _, *path, option = command.split()
            assert (f"--{key}", scope) == (option, f"[{'.'.join(path)}]")
        assert name == variable(scope.strip("[]"), key)


def test_the_table_of_commands():
    rows = [code(row[0])[0].split()[1:] for row in table("README.md", "command")]
    documented = {row[0]: row[1:] for row in rows} | {"pull": ["NAME"]}
    ctx = click.Context(main)
    assert set(documented) == set(main.list_commands(ctx))
    for name, words in documented.items():
        command = main.get_command(ctx, name)
        if isinstance(command, click.Group):
            assert set(words[0].split("|")) == set(command.commands)


def test_the_catalogue():
    rows = table("docs/models.md", "name")
    entries = Catalogue.load().entries
    assert [code(row[0])[0] for row in rows] == list(entries)
    for (_, licence, context, size, place), entry in zip(rows, entries.values(), strict=True):
        assert (licence, context, size) == (entry.licence, f"{entry.trained_context:,}", f"{entry.size / 1e9:.1f} GB")
        assert code(place) == ([entry.place.name] if entry.place else [])


@pytest.mark.parametrize("other", ["ollama", "llm", "llama-cli", "lms"])
def test_what_users_of_other_programs_type_here(other, tmp_path, monkeypatch):
    """All of it is understood; nothing of it is carried out."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("schema.json", "{}"), ("list.gbnf", "root ::= [a-z]+")):
        (tmp_path / name).write_text(text)
    rows = table("docs/other-programs.md", other)
    typed = [text for row in rows for text in code(row[1])]
    assert len(rows) >= 6 and len(typed) >= 6
    for text in typed:
        if text.startswith("/"):
            assert text.split()[0] in chat_commands.COMMANDS
            continue
        *_, words = (part.partition("<")[0] for part in text.split("|"))
        program, command, *args = shlex.split(words)
        assert program == "kvlocal"
        with click.Context(main) as parent, main.get_command(parent, command).make_context(command, args, parent=parent):
            pass


def test_the_table_of_commands_inside_a_chat():
    assert [code(row[0])[0].split()[0] for row in table("docs/chat.md", "command")] == list(chat_commands.COMMANDS)


def test_what_a_line_of_a_batch_may_have():
    (sentence,) = re.findall(r"A line may have its own (.+?);", (ROOT / "docs/batches.md").read_text(), re.DOTALL)
    assert code(sentence) == list(OPTIONS)


def test_the_table_of_rooms():
    assert [code(row[0])[0] for row in table("docs/architecture.md", "room")] == list(ROOMS)
    for (name, said), room in zip(table("docs/architecture.md", "room")[2:], ROOMS[2:], strict=True):
        sentence = " ".join(importlib.import_module(f"kvlocal.{room}").__doc__.split("\n\n")[0].split()).rstrip(".")
        assert said.lower() == sentence.lower(), name


def test_the_cmake_options():
    documented = {name for row in table("docs/building.md", "CMake option") for name in re.findall(r"-D(KVLOCAL_\w+)", row[0])}
    cmake = (ROOT / "CMakeLists.txt").read_text()
    assert documented == set(re.findall(r"(?:option|set)\((KVLOCAL_\w+) +\"[^\n]*(?:CACHE|OFF\))", cmake))


def test_the_targets_of_make():
    makefile = (ROOT / "Makefile").read_text()
    documented = {name for row in table("docs/building.md", "target of make") for name in code(row[0])}
    assert documented == set(re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split())


@pytest.mark.parametrize(("page", "heading"), [("README.md", "## In a program"), ("docs/library.md", "# In a program")])
def test_the_programs_run(page, heading, smollm2, capsys):
    section = (ROOT / page).read_text().split(f"{heading}\n", 1)[1].split("\n#", 1)[0]
    program = "\n".join(line.removeprefix("    ") for line in section.splitlines() if not line or line.startswith("    "))
    exec(compile(program, page, "exec"), {})
    assert "KvStats(budget=512" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_names(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path) if path else page
            assert linked.exists(), target
            if anchor:
                headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target
    for name in re.findall(r"\bkvlocal(?:\.[a-z_]+)+(?:\.[A-Z]\w+)?", text):
        if name.split(".")[1] not in {*ROOMS, *(module.split(".")[1] for module in MODULES if "." in module)}:
            continue  # a file's name
        module, _, attribute = name.rpartition(".") if name.rpartition(".")[2][0].isupper() else (name, "", "")
        assert module in MODULES and (not attribute or hasattr(importlib.import_module(module), attribute)), name
    for path in re.findall(r"`((?:kvlocal|cli|tests|native|models|docs)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
