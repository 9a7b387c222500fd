"""The click group `kvlocal`, and the one place that turns failures into sentences and exit codes."""

import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import click

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal_cli.groups import Lazy, RootGroup, origin

FAILURE = 1

COMMANDS = {
    "chat": Lazy("kvlocal_cli.chat_command:chat_command", "Chat with a model."),
    "run": Lazy("kvlocal_cli.run:run_command", "Answer one PROMPT and print nothing but the answer."),
    "batch": Lazy("kvlocal_cli.batch:batch_command", "Answer every conversation of IN.jsonl, or of standard input if that is -."),
    "serve": Lazy("kvlocal_cli.serve:serve_command", "A chat in the browser, and answers for programs that speak OpenAI's API."),
    "rpc-server": Lazy("kvlocal_cli.rpc_server:rpc_server_command", "Hold layers of models of other machines, and compute them here."),
    "sessions": Lazy("kvlocal_cli.sessions:sessions_group", "List, show, rename, fork, export, prune and delete conversations that have a name."),
    "logs": Lazy("kvlocal_cli.logs:logs_command", "List past sessions and chats, the last used first"),
    "chats": Lazy("kvlocal_cli.prune:chats_group", "Make room of past chats that have no name."),
    "models": Lazy("kvlocal_cli.models:models_command", "List the models that can be pulled by name, what is on this machine, and what fits"),
    "pull": Lazy("kvlocal_cli.models:pull_command", "Fetch the model NAME and print the path of its GGUF file."),
    "show": Lazy("kvlocal_cli.model_files:show_command", "Say what the model NAME is: how large, how it is quantized, what its KV cache costs"),
    "rm": Lazy("kvlocal_cli.model_files:rm_command", "Remove models that were pulled, or aliases, whose models stay."),
    "cp": Lazy("kvlocal_cli.model_files:cp_command", "Give the model NAME another name"),
    "bench": Lazy("kvlocal_cli.bench:bench_command", "Measure a compressed session against stock llama.cpp, in alternation in one run."),
    "doctor": Lazy("kvlocal_cli.doctor:doctor_command", "Say what this installation consists of, and what is wrong if anything is"),
    "eval": Lazy("kvlocal_cli.evaluations:eval_group", "Compare policies: how much of a conversation is left in the compressed cache."),
    "nexus": Lazy("kvlocal_cli.nexus:nexus_group", "Nexus tokens: trained soft tokens that stand for finished turns of a conversation."),
    "adapt": Lazy("kvlocal_cli.adapt:adapt_group", "Adapters with which a model lives better with a compressed cache: LoRA files that --lora takes."),
    "config": Lazy("kvlocal_cli.config:config_group", "Show and change what options have by default."),
    "completion": Lazy("kvlocal_cli.completion:completion_group", "Have the shell complete commands, options, models, sessions and prompts by Tab."),
}  # fmt: skip


class Kvlocal(RootGroup):
    """A group whose failures are one sentence on stderr: exit code 1, for wrong usage 2, after Ctrl-C 130."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                # what the encoding cannot show becomes a question mark
                stream.reconfigure(errors="replace")
        kwargs["standalone_mode"] = False
        try:
            # the exit code if the command asked for one, else what it returned
            code = super().main(*args, **kwargs)
        except KvlocalError as error:
            _fail(f"{error}{_notes(error)}", FAILURE)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "kvlocal"
            _fail(f"{_place(error)}{_sentence(error)}{_notes(error)}; see `{command} --help`", error.exit_code)
        except click.ClickException as error:
            _fail(_sentence(error), error.exit_code)
        except click.Abort:
            from kvlocal_cli.terminal import INTERRUPTED

            sys.exit(INTERRUPTED)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            _fail(f"{what}{error.strerror or error}", FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:]


def _place(error: click.UsageError) -> str:
    """Where a wrong value is that is not on the command line."""
    if not (isinstance(error, click.BadParameter) and error.ctx and isinstance(error.param, click.Option)):
        return ""
    place = origin(error.ctx, error.param)
    return f"{place}: " if place else ""


def _notes(error: Exception) -> str:
    """What may have caused it, and is not on the command line."""
    notes = getattr(error, "__notes__", [])
    return f" ({'; '.join(notes)})" if notes else ""


def _fail(sentence: str, code: int) -> NoReturn:
    click.echo(f"kvlocal: {sentence}", err=True)
    sys.exit(code)


_FIRST_STEPS = """\
kvlocal chats with language models on this machine. Try one of these:

  kvlocal chat                            a chat with a small model, which is pulled first if you agree
  kvlocal run "Why is the sky blue?"      one answer
  kvlocal models                          more models to pull, and which of them fit this machine

`kvlocal doctor` says what a chat would use, and whether anything is wrong.
"""


@click.group(
    cls=Kvlocal,
    lazy=COMMANDS,
    without_config=("config", "completion"),
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(kvlocal.__version__, prog_name="kvlocal")
@click.pass_context
def main(context: click.Context) -> None:
    """Chat with quantized GGUF models on this machine, inside a fixed KV-cache budget."""
    if context.invoked_subcommand is None:
        click.echo(_FIRST_STEPS)
        click.echo(context.get_help())
