"""`kvlocal run` and the failures of the command line, each as a process of its own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from gguf_copy import Source, copy
from terminal import Terminal
from tiny_model import write_tiny_model

import kvlocal
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.text_session import TextSession
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal_cli.main import main
from kvlocal_cli.options import session_options

# one thread: two that wait for each other crawl when the machine is busy
THREADS = ("--threads", "1")
GREEDY = (*THREADS, "--temp", "0", "--max-tokens", "8")


@pytest.fixture
def env(smollm2: Path, tmp_path: Path) -> dict[str, str]:
    """The default model is the model of the tests, and the state directory is new."""
    models = tmp_path / "models"
    models.mkdir()
    (models / "smollm2-135m.gguf").symlink_to(Path(smollm2).absolute())
    return {**os.environ, "KVLOCAL_MODELS_DIR": str(models), "KVLOCAL_STATE_DIR": str(tmp_path / "state")}


@pytest.fixture
def kvlocal_run(env):
    def run(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "kvlocal_cli", *args]
        return subprocess.run(command, input=stdin, env=env, capture_output=True, text=True, timeout=60)

    return run


def failed(result: subprocess.CompletedProcess, code: int) -> str:
    """The one sentence on stderr."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.startswith("kvlocal: ") and result.stderr.count("\n") == 1
    return result.stderr


def test_one_answer_on_clean_stdout(kvlocal_run):
    result = kvlocal_run("run", *GREEDY, "--max-tokens", "60", "What is 2+2?")
    assert result.returncode == 0
    assert "answer" in result.stdout and result.stdout.endswith("\n") and "\x1b" not in result.stdout
    assert result.stderr == ""


def test_an_answer_that_was_cut_off_is_told(kvlocal_run):
    result = kvlocal_run("run", *GREEDY, "What is 2+2?")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1
    assert result.stderr == "kvlocal: the answer was cut off at 8 tokens: give a larger --max-tokens\n"


def test_json(kvlocal_run, smollm2):
    result = kvlocal_run("run", str(smollm2), "Sum this up:", *GREEDY, "--json", "--seed", "7", stdin="Cats ☃ sleep.\n")
    report = json.loads(result.stdout)
    assert list(report) == ["model", "prompt", "answer", "kv", "recalled", "timings", "seed", "settings", "stop_reason"]
    assert report["recalled"] == []
    assert report["model"] == str(smollm2)
    assert report["prompt"] == "Sum this up:\n\nCats ☃ sleep."
    assert report["answer"]
    assert report["seed"] == 7 and report["stop_reason"] in ("end", "length")
    assert list(report["kv"]) == ["budget", "peak_cells", "history_tokens", "compressions", "evicted", "nexus"]
    assert report["kv"]["budget"] == 1024
    assert report["kv"]["history_tokens"] == report["kv"]["peak_cells"] > 20
    assert 0 < report["timings"]["answer_tokens"] <= 8 and report["timings"]["answer_seconds"] > 0


def test_an_open_silent_stdin_is_told(env):
    """Whoever starts it from a program that leaves stdin open would wait for ever without a word."""
    command = [sys.executable, "-m", "kvlocal_cli", "run", *GREEDY, "--max-tokens", "60", "Hi"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == (
            "kvlocal: waiting for the end of standard input, which belongs to the prompt; where there is none, run it with </dev/null\n"
        )
        process.stdin.write("there")
        process.stdin.close()
        assert process.stderr.read() == "" and process.stdout.read() and process.wait() == 0


def test_a_text_from_windows(kvlocal_run):
    """A byte order mark is no part of a prompt or of a turn, and CR no part of the end of a line."""
    text = "Name a bird.\nName a tree.\n"
    marked = "\ufeff" + text.replace("\n", "\r\n")
    assert json.loads(kvlocal_run("run", *GREEDY, "--json", stdin=marked).stdout)["prompt"] == text.strip()
    chat = kvlocal_run("chat", *GREEDY, "--seed", "1", stdin="\ufeff/set\r\n" + marked)
    assert chat.returncode == 0 and chat.stdout.startswith("temp ")
    assert chat.stdout == kvlocal_run("chat", *GREEDY, "--seed", "1", stdin="/set\n" + text).stdout


def test_a_seed_that_was_drawn_repeats_the_answer(kvlocal_run):
    first = json.loads(kvlocal_run("run", *THREADS, "--json", "--max-tokens", "12", "Tell me a story.").stdout)
    again = kvlocal_run("run", *THREADS, "--max-tokens", "12", "--seed", str(first["seed"]), stdin="Tell me a story.")
    assert again.stdout == first["answer"].rstrip("\n") + "\n"


def test_what_json_tells_repeats_the_answer(kvlocal_run):
    """All settings that matter are there as they were in use, whether they were given or not."""
    given = ("--threads", "1", "--max-tokens", "12", "--top-k", "30", "--stop", "dragon", "--archive", "off", "--policy", "snapkv", "--ctk", "q8_0")
    first = json.loads(kvlocal_run("run", "--json", *given, "Tell me a story.").stdout)
    used = first["settings"]
    assert (used["n_threads"], used["top_k"], used["stop"], used["archive"], used["type_k"]) == (1, 30, ["dragon"], "off", "q8_0")
    assert used["budget"] == 1024 and used["repeat_penalty"] == 1.1 and used["seed"] == first["seed"] and not used["raw"]
    options = {"threads": "n_threads", "max-tokens": "max_tokens", "temp": "temperature", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p",
               "repeat-penalty": "repeat_penalty", "seed": "seed", "policy": "policy", "archive": "archive", "kv-budget": "budget",
               "stride": "stride", "read-stride": "read_stride", "positions": "positions", "ctk": "type_k",
               "ctv": "type_v", "gpu-layers": "gpu_layers"}  # fmt: skip
    again = [f"--{option}={used[name]}" for option, name in options.items()] + [f"--stop={text}" for text in used["stop"]]
    second = json.loads(kvlocal_run("run", "--json", *again, "Tell me a story.").stdout)
    assert second["answer"] == first["answer"] and second["settings"] == used


def test_how_tokens_are_drawn_is_told_and_repeats_the_answer(kvlocal_run):
    given = ("--presence-penalty=0.5", "--frequency-penalty=0.25", "--logit-bias=17-100", "--dry-multiplier=0.8", "--dry-base=2",
             "--dry-allowed-length=1", "--dry-penalty-last-n=100", "--dry-sequence-breaker=\\n", "--dry-sequence-breaker=x",
             "--xtc-probability=0.5", "--xtc-threshold=0.2", "--logprobs=1")  # fmt: skip
    first, second = (json.loads(kvlocal_run("run", "--json", *THREADS, "--max-tokens=6", "--seed=3", *given, "Hello").stdout) for _ in range(2))
    used = first["settings"]
    assert used["logit_bias"] == {"17": -100} and used["dry_sequence_breakers"] == ["\n", "x"]
    assert [used[name] for name in ("presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base", "dry_allowed_length",
                                    "dry_penalty_last_n", "xtc_probability", "xtc_threshold")] == [0.5, 0.25, 0.8, 2, 1, 100, 0.5, 0.2]  # fmt: skip
    assert first["answer"] == second["answer"] and used == second["settings"]
    tokens = first["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode("utf-8", "replace").startswith(first["answer"])
    assert all(len(token["top_logprobs"]) == 1 for token in tokens) and first["logprobs"] == second["logprobs"]


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--logit-bias=cat", "17-100"),
        ("--dry-base=0", "dry_base is 0.0"),
        ("--xtc-probability=2", "xtc_probability"),
        ("--dry-penalty-last-n=-1", "dry_penalty_last_n"),
        ("--logprobs=1", "--json"),
        ("--threads=0", "--threads"),
        ("--threads=many", "--threads"),
    ],
)
def test_what_cannot_be_drawn_so(kvlocal_run, option, words):
    assert words in failed(kvlocal_run("run", option, "Hello"), 2)


def test_threads_follow_unless_a_text_is_to_come_again():
    @click.command()
    @session_options
    def command(config, loading):
        click.echo(repr(config.n_threads))

    said = {"": "'auto'", "--threads=auto --seed=1": "'auto'", "--seed=1": "None", "--temp=0": "None", "--threads=3": "3"}
    assert {words: CliRunner().invoke(command, words.split()).output.strip() for words in said} == said


def test_a_text_is_completed_as_it_is(kvlocal_run, smollm2):
    """No template, no system prompt, and what is known of the prompt is not printed again."""
    text = "One, two, three,"
    with Model(smollm2) as model, TextSession(model, SessionConfig(n_threads=1, sampling=SamplingParams(temperature=0.0), max_tokens=8)) as session:
        session.read(text)
        goes_on = "".join(session.answer())
        n_tokens = len(session.tokenize(text))
    result = kvlocal_run("run", "--raw", *GREEDY, text)
    assert result.returncode == 0 and result.stdout == goes_on.rstrip("\n") + "\n" and " four" in goes_on
    report = json.loads(kvlocal_run("run", "--raw", "--json", *GREEDY, stdin=text + "\n").stdout)
    assert report["answer"] == goes_on and report["settings"]["raw"] and report["timings"]["prompt_tokens"] == n_tokens
    for archive in ("disk", "off"):
        small = ("--kv-budget", "96", "--archive", archive)
        report = json.loads(kvlocal_run("run", "--raw", "--json", *GREEDY, *small, stdin=200 * "One, two, ").stdout)
        assert report["kv"]["compressions"] > 0 and report["answer"]
    assert "leave --system out" in failed(kvlocal_run("run", "--raw", "--system", "Be kind.", text), 2)


def test_a_model_that_was_not_trained_to_chat_is_told(kvlocal_run, env, short_smollm2, tmp_path):
    base = tmp_path / "base.gguf"
    copy(Source(short_smollm2), base, metadata={"tokenizer.chat_template": ""})
    says = f"kvlocal: {base} has no chat template, so it was most likely not trained to chat"
    (tmp_path / "in.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n')
    for command, stdin in (
        (["run", str(base), "Hi"], ""),
        (["chat", str(base)], "Hi\n"),
        (["batch", str(tmp_path / "in.jsonl"), "-m", str(base)], ""),
    ):
        result = kvlocal_run(*command, *GREEDY, stdin=stdin)
        assert result.returncode == 0 and result.stderr.count(says) == 1 and "kvlocal run --raw" in result.stderr, command
    assert "chat template" not in kvlocal_run("run", "--raw", str(base), *GREEDY, "Hi").stderr
    with Terminal("chat", str(base), *GREEDY, env=env) as terminal:
        assert says in terminal.wait_for_prompt().replace("\n", "")


def test_a_prompt_that_looks_like_an_option(kvlocal_run, smollm2):
    for args in (["-5"], ["-m", str(smollm2), "-5"], [str(smollm2), *GREEDY, "-5"], ["--", "-5"]):
        report = json.loads(kvlocal_run("run", "--json", "--max-tokens", "1", *THREADS, *args).stdout)
        assert report["prompt"] == "-5", args
    # the value of an option is one, and what is none is wrong
    assert "temperature is -1.0" in failed(kvlocal_run("run", "--temp", "-1", "Hi"), 2)
    assert "-x" in failed(kvlocal_run("run", "-x", "Hi"), 2)


def test_files_belong_to_the_prompt(kvlocal_run, smollm2, tmp_path):
    for name, text in (("a.txt", "\ufeffCats ☃\r\nsleep.\n"), ("b.txt", "Dogs run.\n")):
        (tmp_path / name).write_bytes(text.encode())
    a, b, none = (str(tmp_path / name) for name in ("a.txt", "b.txt", "c.txt"))
    for args, stdin, prompt in (
        ([f"@{a}"], "", "Cats ☃\nsleep."),
        (["-f", a, "Sum up."], "Piped.\n", "Sum up.\n\nCats ☃\nsleep.\n\nPiped."),
        ([str(smollm2), "Sum up.", f"@{a}", "--file", b], "", "Sum up.\n\na.txt:\n\nCats ☃\nsleep.\n\nb.txt:\n\nDogs run."),
        (["@@ada"], "", "@ada"),
        (["@ada says hi"], "", "@ada says hi"),
    ):
        report = json.loads(kvlocal_run("run", "--json", "--max-tokens", "1", *THREADS, *args, stdin=stdin).stdout)
        assert report["prompt"] == prompt
    assert f"cannot read {none} (No such file or directory)" in failed(kvlocal_run("run", "Sum up.", f"@{none}"), 2)
    assert "cannot read" in failed(kvlocal_run("run", "-f", str(tmp_path)), 2)
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    assert "is no text in UTF-8" in failed(kvlocal_run("run", "-f", none), 2)


def test_the_model_as_an_option(kvlocal_run, smollm2):
    """As in the other commands; what is left is the prompt, whatever it looks like."""
    report = json.loads(kvlocal_run("run", "-m", str(smollm2), "--json", *GREEDY, "smollm2-135m").stdout)
    assert (report["model"], report["prompt"]) == (str(smollm2), "smollm2-135m")
    assert "quotes" in failed(kvlocal_run("run", "-m", str(smollm2), "two", "words"), 2)
    assert kvlocal_run("chat", "-m", str(smollm2), *GREEDY, "--no-transcript", stdin="Hi").returncode == 0
    assert "named twice" in failed(kvlocal_run("chat", "-m", str(smollm2), str(smollm2)), 2)
    assert "a text is answered by `kvlocal run`" in failed(kvlocal_run("chat", "hello there"), 1)


def test_a_long_prompt_is_compressed(kvlocal_run):
    text = "The quick brown fox jumps over the lazy dog. " * 60
    result = kvlocal_run("run", "--kv-budget", "128", "--stride", "64", "--json", *GREEDY, stdin=text)
    kv = json.loads(result.stdout)["kv"]
    assert kv["history_tokens"] > 600 and kv["compressions"] > 1
    assert kv["evicted"] > 400 and kv["peak_cells"] <= 128 + 64 + 256


def test_what_was_recalled_of_a_long_prompt(kvlocal_run):
    """There is one turn, and what came back is of it."""
    text = "The quick brown fox jumps over the lazy dog. " * 60
    result = kvlocal_run("run", "--archive", "ram", "--kv-budget", "128", "--stride", "64", "--json", *GREEDY, stdin=text + "Who jumps?")
    assert json.loads(result.stdout)["recalled"] == [1]


def test_an_archive_of_a_type_that_the_heads_have_no_whole_blocks_of(kvlocal_run, tmp_path):
    write_tiny_model(tmp_path / "tiny.gguf", "llama")
    said = failed(kvlocal_run("run", str(tmp_path / "tiny.gguf"), "--archive", "ram", "--archive-type", "q8_0", "Hi"), 1)
    assert "the keys of tiny.gguf have 16 numbers in each head" in said and "give --archive-type f16" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["run"], "no prompt"),
        (["run", "why", "is", "this"], "quotes"),
        (["run", "--temp", "-1", "Hi"], "temperature is -1.0"),
        (["run", "--policy-arg", "alphabet=1", "Hi"], "hyper-parameter"),
        (["run", "--policy-arg", "alpha", "Hi"], "name=value"),
        (["run", "--kv-budget", "5", "Hi"], "too small"),
        (["run", "--policy", "full", "--kv-ratio", "0.5", "Hi"], "the policy full removes nothing"),
        (["run", "--archive", "ram", "--archive-type", "q9", "Hi"], "iq4_nl"),
        (["run", "--archive", "off", "--archive-type", "q8_0", "Hi"], "give --archive disk"),
        (["run", "--policy", "snapkv", "--archive-ram", "100", "Hi"], "give --archive disk"),
        (["chat", "--max-tokens", "0"], "max-tokens"),
        (["dance"], "dance"),
    ],
)
def test_wrong_usage(args, said):
    result = CliRunner().invoke(main, args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_wrong_usage_says_where_help_is(kvlocal_run):
    assert "`kvlocal run --help`" in failed(kvlocal_run("run", "--nonsense", "Hi"), 2)


def test_failures_are_sentences(kvlocal_run, tmp_path):
    assert "there is no file" in failed(kvlocal_run("run", str(tmp_path / "none.gguf"), "Hi"), 1)
    assert "kvlocal pull gemma3-270m" in failed(kvlocal_run("run", "gemma3-270m", "Hi"), 1)
    system = "Obey the rules of the house. " * 30
    assert "system prompt" in failed(kvlocal_run("run", "--kv-budget", "64", "--system", system, "Hi"), 1)


def test_version_and_help(kvlocal_run):
    assert kvlocal.__version__ in kvlocal_run("--version").stdout
    for args in ((), ("--help",)):
        result = kvlocal_run(*args)
        assert result.returncode == 0
        for command in ("chat", "run", "batch", "models", "pull", "doctor"):
            assert f"  {command} " in result.stdout


@pytest.mark.parametrize("group", ["sessions", "eval", "nexus"])
def test_a_group_without_a_command_shows_its_help(group):
    result = CliRunner().invoke(main, [group])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == CliRunner().invoke(main, [group, "--help"]).stdout and "Commands:\n" in result.stdout
    assert CliRunner().invoke(main, [group, "dance"]).exit_code == 2


def test_a_reader_that_leaves_is_no_traceback(env):
    command = [sys.executable, "-m", "kvlocal_cli", "run", *THREADS, "--max-tokens", "60", "Write a story."]
    process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 1


def test_ctrl_c_prints_what_there_is(env):
    with Terminal("run", *THREADS, "--max-tokens", "2000", "--temp", "0", "Write a long story about a cat.", env=env) as terminal:
        shown = terminal.wait_for("[Cc]at")
        terminal.kill(signal.SIGINT)
        assert terminal.wait_for_end() == 130
    assert "Traceback" not in terminal.output
    assert terminal.output.endswith("\n") and "cat" in shown.lower()
