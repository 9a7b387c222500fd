"""Defaults of options: variables, the config file, `kvlocal config`, and completion by the shell."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result

from kvlocal.files import places
from kvlocal_cli.config_file import all_commands, line_of
from kvlocal_cli.groups import Lazy
from kvlocal_cli.main import COMMANDS, main
from kvlocal_cli.settings import scopes, settable, variable


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> Path:
    """The config file, which is not there yet."""
    for name in [name for name in os.environ if name.startswith(("KVLOCAL_", "XDG_CONFIG"))]:
        if name not in ("KVLOCAL_LIB_DIR", "KVLOCAL_MODELS_DIR"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("KVLOCAL_STATE_DIR", str(tmp_path / "state"))
    path = tmp_path / "config" / "kvlocal" / "config.toml"
    assert places.config_path() == path
    return path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def call(*args: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, args, input=stdin, catch_exceptions=False)


def failed(result: Result, code: int = 1) -> str:
    """The one sentence on stderr."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == "" and result.stderr.startswith("kvlocal: ") and result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def settings(short_smollm2):
    """What `run` has in use with these arguments."""

    def ask(*args: str) -> dict:
        result = call("run", "-m", str(short_smollm2), "Hi", "--json", "--threads", "1", "--max-tokens", "1", *args)
        assert result.exit_code == 0, result.stderr
        report = json.loads(result.stdout)
        return {**report["settings"], "seed": report["seed"]}

    return ask


# where a value is from


def test_the_command_line_goes_before_the_environment_and_this_before_the_file(settings, config, monkeypatch):
    write(config, "[conversation]\nkv-budget = 200\nstride = 33\ntemp = 0.25\nseed = 9\n[run]\nstride = 34\n[chat]\nstride = 35\n")
    monkeypatch.setenv("KVLOCAL_KV_BUDGET", "201")
    monkeypatch.setenv("KVLOCAL_TEMP", "0.5")
    monkeypatch.setenv("KVLOCAL_RUN_TEMP", "0.75")
    monkeypatch.setenv("KVLOCAL_TOP_K", "")
    found = settings("--kv-budget", "202")
    assert (found["budget"], found["stride"], found["temperature"], found["seed"], found["top_k"]) == (202, 34, 0.75, 9, 40)
    monkeypatch.delenv("KVLOCAL_RUN_TEMP")
    found = settings()
    assert (found["budget"], found["temperature"]) == (201, 0.5)


def test_what_excludes_another_gives_way_to_what_is_said_more_closely(settings, config, monkeypatch):
    text = '[conversation]\nkv-budget = 200\npolicy = "recall"\npolicy-arg = ["recent=0.6", "asked=0.2"]\narchive-ram = 5\nsystem = "Be brief."\n'
    write(config, text)
    found = settings()
    assert found["policy_args"] and found["system"] == "Be brief."
    found = settings("--policy", "snapkv", "--kv-memory", "5M")
    assert found["policy"] == "snapkv" and "recent" not in str(found["policy_args"]) and found["budget"] != 200
    assert settings("--raw")["raw"] is True
    monkeypatch.setenv("KVLOCAL_POLICY", "snapkv")
    assert settings()["policy"] == "snapkv"
    assert settings("--archive", "ram")["policy"] == "recall"


@pytest.mark.parametrize(("variable", "args", "name", "value"), [
    ("KVLOCAL_NO_TRANSCRIPT=1", "chat --session trip", "no_transcript", False),
    ("KVLOCAL_NO_TRANSCRIPT=1", "chat", "no_transcript", True),
    ("KVLOCAL_SESSION=trip", "run -c", "session_name", None),
    ("KVLOCAL_SESSION=trip", "run --raw", "session_name", None),
    ("KVLOCAL_RUN_RAW=0", "run --session trip", "session_name", "trip"),
    ("KVLOCAL_ARCHIVE=ram", "chat --policy snapkv", "archive", None),
    ("KVLOCAL_ARCHIVE=off", "chat --policy recall", "archive", "off"),
    ("KVLOCAL_ARCHIVE_RAM=5", "chat --archive off", "archive_ram", None),
    ("KVLOCAL_ARCHIVE_RAM=5", "chat --archive ram", "archive_ram", 5),
    ("KVLOCAL_POLICY=snapkv", "chat --archive disk", "policy", None),
    ("KVLOCAL_POSITIONS=cache", "chat --archive disk", "positions", "auto"),
    ("KVLOCAL_KV_RATIO=0.5", "chat --policy full", "kv_ratio", None),
    ("KVLOCAL_KV_RATIO=0.5", "chat --policy gkv", "kv_ratio", 0.5),
    ("KVLOCAL_POLICY_ARG=lam=0.5", "chat --policy gkv", "policy_args", {}),
    ("KVLOCAL_POLICY_ARG=lam=0.5", "chat --temp 0", "policy_args", {"lam": "0.5"}),
    ("KVLOCAL_EVAL_RATIO=0.7", "eval recall --kv-budget 64", "ratios", (0.5, 0.8)),
    ("KVLOCAL_EVAL_RATIO=0.7", "eval recall", "ratios", (0.7,)),
    ("KVLOCAL_KV_BUDGET=64", "eval recall", "kv_budget", None),
    ("KVLOCAL_API_KEY=one two", "serve", "api_keys", ("one", "two")),
])  # fmt: skip
def test_what_a_parameter_is(monkeypatch, variable, args, name, value):
    monkeypatch.setenv(*variable.split("=", 1))
    words, ctx = args.split(), click.Context(main)
    command = main.get_command(ctx, words.pop(0))
    while isinstance(command, click.Group):
        command = command.get_command(ctx, words.pop(0))
    with command.make_context(command.name, words, parent=ctx) as made:
        assert made.params[name] == value


def test_two_that_exclude_each_other_in_one_place_are_refused(config, monkeypatch):
    write(config, '[run]\nkv-budget = 200\nkv-memory = "5M"\n')
    said = failed(call("run", "Hi"), 2)
    assert f"--kv-budget is from line 2 of {config}" in said and f"--kv-memory is from line 3 of {config}" in said


def test_a_session_goes_on_with_its_own_model_and_system_prompt(short_smollm2, three_layers, config, tmp_path):
    """What is set for all is for conversations that have none of their own."""
    write(config, f'[conversation]\nmodel = "{short_smollm2}"\nsystem = "Answer in French."\nthreads = 1\nmax-tokens = 2\n')
    assert call("chat", str(three_layers), "--system", "Be brief.", "--session", "trip", stdin="Hi\n").exit_code == 0
    result = call("chat", "--session", "trip", stdin="Go on.\n")
    assert result.exit_code == 0 and result.stderr == ""
    assert call("run", "--session", "trip", "And then?").exit_code == 0
    records = [json.loads(line) for line in (tmp_path / "state/sessions/trip.jsonl").read_text().splitlines()]
    assert records[0]["model"] == str(three_layers) and records[0]["system"] == "Be brief."
    assert not [record for record in records if record["record"] in ("model", "system")]
    assert call("chat", "--session", "new", stdin="Hi\n").exit_code == 0
    header = json.loads((tmp_path / "state/sessions/new.jsonl").read_text().splitlines()[0])
    assert header["model"] == str(short_smollm2) and header["system"] == "Answer in French."


def test_an_argument_goes_before_a_model_that_is_set(short_smollm2, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODEL", "nosuch")
    result = call("run", str(short_smollm2), "Hi", "--max-tokens", "1", "--threads", "1")
    assert result.exit_code == 0, result.stderr
    assert "no model is called 'nosuch'" in (said := failed(call("run", "Hi"))) and "(--model is from KVLOCAL_MODEL)" in said
    assert "the model is named twice" in failed(call("chat", "one", "-m", "two"), 2)


@pytest.mark.parametrize(("name", "value", "said"), [
    ("KVLOCAL_CHAT_KV_BUDGET", "many", "KVLOCAL_CHAT_KV_BUDGET: invalid value for '--kv-budget': 'many'"),
    ("KVLOCAL_POLICY", "snap", "KVLOCAL_POLICY: invalid value for '--policy': 'snap'"),
    ("KVLOCAL_POLICY_ARG", "recent=2 asked", "KVLOCAL_POLICY_ARG: invalid value for '--policy-arg': 'asked' is not of the form"),
    ("KVLOCAL_TEMP", "-1", "temperature is -1.0, but must be 0 or more (--temp is from KVLOCAL_TEMP)"),
    ("KVLOCAL_KV_BUDGET", "3", "(--kv-budget is from KVLOCAL_KV_BUDGET)"),
    ("KVLOCAL_NO_TRANSCRIPT", "perhaps", "KVLOCAL_NO_TRANSCRIPT: invalid value for '--no-transcript'"),
])  # fmt: skip
def test_a_wrong_value_of_a_variable_is_told_by_its_name(monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    assert said in failed(call("chat"), 2)
    if "(" not in said:
        shown = call("config")
        assert shown.exit_code == 0 and f"kvlocal: {name}: " in shown.stderr


@pytest.mark.parametrize(("text", "said", "code"), [
    ("[chat]\n\n# a word\nkv-budget = 'many'\n", "line 4 of {path}: invalid value for '--kv-budget': 'many'", 2),
    ("[conversation]\nkv-budget = 51.5\n", "line 2 of {path}: invalid value for '--kv-budget': '51.5'", 2),
    ("[conversation]\ntemp = -1\n", "(--temp is from line 2 of {path})", 2),
    ("[chat]\nstop = [\n  'a',\n  'b',\n]\nidle = 3\n", "line 6 of {path}: invalid value for '--idle'", 2),
    ("[chat]\nkv-bugdet = 512\n", "line 2 of {path}: chat has no option kv-bugdet: did you mean kv-budget?", 1),
    ("[conversation]\nkv_budget = 512\n", "line 2 of {path}: conversation has no option kv_budget: did you mean kv-budget?", 1),
    ("[chta]\nkv-budget = 512\n", "there is no command chta: did you mean chat?", 1),
    ("kv-budget = 512\n", "line 1 of {path}: kv-budget belongs to no command: write it below [conversation]", 1),
    ("chat = 5\n", "line 1 of {path}: chat belongs to no command", 1),
    ("[chat]\nkv-budget = [512]\n", "line 2 of {path}: chat.kv-budget is one value", 1),
    ("[chat.kv-budget]\nn = 512\n", "chat has no command kv-budget", 1),
    ("[chat]\nverbose = 'yes'\n", "line 2 of {path}: chat.verbose is on or off: write true or false", 1),
    ("[chat\n", "the config file {path} is no TOML, expected ']'", 1),
    ("[chat]\nseed = 1\nseed = 2\n", "(at line 3", 1),
    ("\udcff", "{path} is no text in UTF-8", 1),
])  # fmt: skip
def test_what_is_wrong_in_the_file_is_told_by_its_line(config, text, said, code):
    config.parent.mkdir(parents=True)
    config.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert said.format(path=config) in failed(call("chat"), code)
    # what mends it works, and so does the help
    assert call("config", "path").stdout == f"{config}\n" and call("chat", "--help").exit_code == call("completion", "show", "fish").exit_code == 0
    if "temp" not in text:
        assert failed(call("config")).count(str(config)) == 1 or "chta" in text


def test_an_option_of_another_command_is_none_of_the_shared_ones_that_this_has(config):
    """A port is an option of serve alone, and may stand for all."""
    write(config, "[conversation]\nport = 9000\n[eval]\nthreads = 1\n[eval.recall]\nquestions = 3\n")
    assert "MODEL" in call("chat", "--help").stdout
    assert "no model is called 'x'" in failed(call("run", "-m", "x", "Hi"))
    assert call("config", "get", "serve.port").stdout == "9000\n"
    assert call("config", "get", "eval.recall.questions").stdout == "3\n" and call("config", "get", "eval.recall.threads").stdout == "1\n"


def test_each_variable_means_one_thing():
    meant: dict[str, set[tuple[str, str]]] = {}
    for path, command in all_commands(main):
        for key, option in settable(command).items():
            assert list(option.envvar) == [variable(scope, key) for scope in scopes(path)]
            for scope in scopes(path):
                meant.setdefault(variable(scope, key), set()).add((scope, key))
    assert {name: meanings for name, meanings in meant.items() if len(meanings) > 1} == {}
    assert "KVLOCAL_CHAT_KV_BUDGET" in meant and "KVLOCAL_EVAL_RECALL_TOKENS" in meant
    text = "".join(path.read_text() for folder in ("kvlocal", "cli") for path in (Path(__file__).parents[1] / folder).rglob("*.py"))
    others = {*re.findall(r"\"(KVLOCAL_[A-Z_]+)\"", text), "KVLOCAL_TEST_DEVICE"}
    assert "KVLOCAL_MODELS_DIR" in others and not others & {*meant}


def test_no_scope_of_the_file_is_an_option_too():
    for path, command in all_commands(main):
        for n in range(1, len(path)):
            inner = {other[n] for other, _ in all_commands(main) if other[:n] == path[:n]}
            assert not inner & {*settable(command)}


def test_the_line_of_a_value():
    text = '# head\n[a]\nx = """\n[b]\ny = 1\n"""\n\n[b]\nlist = [\n  1,\n]\ny.z = 2\n'
    assert [line_of(text, keys) for keys in (["a", "x"], ["b", "list"], ["b", "y", "z"], ["b", "q"])] == [3, 9, 12, None]


# kvlocal config


def test_set_keeps_what_is_there(config):
    write(config, "# mine\n[chat] # of chats\nkv-budget = 100 # small\n\n[run]\n# later\n")
    config.chmod(0o600)
    for args in (
        ("chat.kv-budget", "512"), ("kv-memory", "200M"), ("chat.stop", "END", "two words"), ("eval.recall.questions", "5"), ("chat.temp", "1"),
        ("run.raw", "on"), ("--archive-dir", "."),
    ):  # fmt: skip
        assert call("config", "set", "--", *args).exit_code == 0, args
    text = config.read_text()
    assert text.startswith("# mine\n[chat] # of chats\nkv-budget = 512 # small\n") and "# later" in text
    assert tomllib.loads(text) == {
        "chat": {"kv-budget": 512, "stop": ["END", "two words"], "temp": 1.0},
        "run": {"raw": True},
        "conversation": {"kv-memory": "200M", "archive-dir": str(Path.cwd())},
        "eval": {"recall": {"questions": 5}},
    }
    assert config.stat().st_mode & 0o777 == 0o600
    for name in ("chat.kv-budget", "chat.stop", "chat.temp", "eval.recall.questions"):
        assert call("config", "unset", name).exit_code == 0
    text = config.read_text()
    assert "# mine" in text and "# of chats" in text and "# later" in text and "recall" not in text
    assert tomllib.loads(text)["run"] == {"raw": True}


@pytest.mark.parametrize(("args", "said", "code"), [
    (("set", "chat.kv-bugdet", "5"), "chat has no option kv-bugdet: did you mean kv-budget?", 1),
    (("set", "chta.kv-budget", "5"), "there is no command chta: did you mean chat?", 1),
    (("set", "chat.kv-budget", "x"), "chat.kv-budget: 'x' is not a valid integer", 2),
    (("set", "chat.kv-budget", "5", "6"), "chat.kv-budget is one value", 2),
    (("set", "chat.policy", "snap"), "chat.policy: 'snap' is not one of", 2),
    (("set", "chat.policy-arg", "x"), "chat.policy-arg: 'x' is not of the form name=value", 2),
    (("set", "chat.help", "1"), "chat has no option help", 1),
    (("unset", "chat.kv-budget"), "chat.kv-budget is not in", 1),
    (("get", "chat.seed"), "chat.seed is not set, and has no fixed default", 1),
    (("show", "nonsense"), "there is no command nonsense", 1),
])  # fmt: skip
def test_config_refuses(config, args, said, code):
    assert said in failed(call("config", *args), code)
    assert not config.exists()


def test_config_shows_where_each_value_comes_from(config, monkeypatch):
    result = call("config")
    assert result.exit_code == 0 and result.stdout == "" and f"writes to {config}" in result.stderr
    write(config, "[conversation]\nkv-budget = 200\n[chat]\nidle = false\n[serve]\napi-key = 'secret'\n")
    monkeypatch.setenv("KVLOCAL_KV_BUDGET", "300")
    monkeypatch.setenv("KVLOCAL_STRIDDE", "3")
    result = call("config")
    rows = {line.split()[0]: re.split(r"  +", line)[1:] for line in result.stdout.splitlines()}
    assert rows == {
        "conversation.kv-budget": ["300", f"KVLOCAL_KV_BUDGET, not line 2 of {config}"],
        "chat.idle": ["off", f"line 4 of {config}"],
        "serve.api-key": ["(not shown)", f"line 6 of {config}"],
    }
    assert result.stderr == "kvlocal: KVLOCAL_STRIDDE is no variable of kvlocal: did you mean KVLOCAL_STRIDE?\n"
    report = json.loads(call("config", "show", "chat", "--json").stdout)
    found = {each["setting"]: (each["value"], each["from"]) for each in report["settings"]}
    assert report["path"] == str(config) and found["chat.kv-budget"] == ("300", "KVLOCAL_KV_BUDGET")
    assert found["chat.stride"] == (128, "default") and found["chat.seed"] == (None, "default")
    assert [call("config", "get", name).stdout for name in ("chat.kv-budget", "kv-budget", "run.stride")] == ["300\n", "300\n", "128\n"]
    shown = call("config", "show", "--all").stdout
    assert all(" ".join(path).replace(" ", ".") + "." in shown for path, command in all_commands(main) if settable(command))


def test_config_edit(config, monkeypatch, tmp_path):
    """What was typed stays, also where it is wrong."""
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[1], 'a').write('[chat]\\nstride = 0\\n')\n")
    editor.chmod(0o700)
    monkeypatch.setenv("VISUAL", str(editor))
    said = failed(call("config", "edit"))
    text = config.read_text()
    assert f"{config}: --stride: 0 is not in the range" in said and text.startswith("# What") and text.endswith("stride = 0\n")
    monkeypatch.setenv("VISUAL", str(tmp_path / "none"))
    assert failed(call("config", "edit"))


def test_what_is_no_file_is_not_replaced(config):
    config.mkdir(parents=True)
    assert "is no file that could be written" in failed(call("config", "set", "kv-budget", "5")) and config.is_dir()


def test_a_config_that_cannot_be_written_is_as_it_was(config):
    config.parent.mkdir(parents=True)
    config.symlink_to("/proc/nothing")
    assert "cannot write /proc/nothing" in failed(call("config", "set", "kv-budget", "5"))


# completion


def complete(words: str) -> list[str]:
    """What a shell is told for these words, the last of which may be empty."""
    *args, incomplete = words.split(" ")[1:]
    items = BashComplete(main, {}, "kvlocal", "_KVLOCAL_COMPLETE").get_completions(args, incomplete)
    return [f"{item.type},{item.value}" for item in items]


def test_names_are_completed(tmp_path, monkeypatch):
    for place, name in (("sessions", "trip"), ("sessions", "tram"), ("chats", "20260101-000000-1")):
        (tmp_path / "state" / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / "state" / place / f"{name}.jsonl").touch()
    assert complete("kvlocal ser") == ["plain,serve"]
    assert complete("kvlocal chat --kv-b") == ["plain,--kv-budget"]
    assert complete("kvlocal chat --policy sn") == ["plain,snapkv"]
    assert complete("kvlocal chat --session tr") == ["plain,tram", "plain,trip"]
    assert complete("kvlocal sessions show tri") == ["plain,trip"]
    assert complete("kvlocal chat --load 20") == ["plain,20260101-000000-1"]
    assert complete("kvlocal chat smollm2-1") == complete("kvlocal run -m smollm2-1") == ["plain,smollm2-135m"]
    assert complete("kvlocal chat ./x") == complete("kvlocal chat --nexus x") == complete("kvlocal chat --lora x") == ["file,"]
    assert complete("kvlocal config set conversation.kv-b") == ["plain,conversation.kv-budget"]


def test_a_broken_config_does_not_hinder_completion(config, monkeypatch):
    write(config, "[chat\n")
    monkeypatch.setenv("KVLOCAL_STRIDE", "x")
    assert complete("kvlocal chat --kv-b") == ["plain,--kv-budget"]


def test_what_completes_loads_no_more_than_it_needs():
    code = "import sys; from kvlocal_cli.main import main; main.list_commands(None); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "rich", "prompt_toolkit", "tomlkit", "kvlocal.llama.model"} & {*loaded}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_summary_of_a_command_is_the_beginning_of_its_help(name):
    command = main.get_command(click.Context(main), name)
    assert isinstance(COMMANDS[name], Lazy) and " ".join(command.help.split()).startswith(COMMANDS[name].summary)


def test_completion_is_installed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    (tmp_path / ".bashrc").write_bytes(b"export A=\xff1")
    first, second = call("completion", "install"), call("completion", "install", "bash")
    script = tmp_path / "config/kvlocal/completion.bash"
    assert first.exit_code == second.exit_code == 0 and "loads it already" in second.stdout
    assert (tmp_path / ".bashrc").read_bytes() == b"export A=\xff1\n" + f"[ -f {script} ] && . {script} # completion of kvlocal\n".encode()
    assert script.read_text() == call("completion", "show").stdout
    # what bash does at Tab
    tab = 'COMP_WORDS=(kvlocal sess); COMP_CWORD=1; _kvlocal_completion kvlocal; echo "${COMPREPLY[@]}"'
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    checked = subprocess.run(["bash", "-c", f". {tmp_path}/.bashrc; complete -p kvlocal; {tab}"], capture_output=True, text=True)
    bound, proposed = checked.stdout.splitlines()
    assert "-F _kvlocal_completion kvlocal" in bound and proposed == "sessions", checked.stderr
    for shell, path in (("fish", "config/fish/completions/kvlocal.fish"), ("zsh", "config/kvlocal/completion.zsh")):
        assert call("completion", "install", shell).exit_code == 0
        assert (tmp_path / path).read_text() == call("completion", "show", shell).stdout
    assert str(tmp_path / "config/kvlocal/completion.zsh") in (tmp_path / ".zshrc").read_text()
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert "there is no completion for the shell tcsh" in failed(call("completion", "install"), 2)
