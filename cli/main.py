"""The click group `kvlocal`, and the one place that turns failures into sentences and exit codes."""

import sys
from io import TextIOWrapper
from typing import Any, NoReturn

import click

import kvlocal
from kvlocal.errors import KvlocalError
from kvlocal_cli.batch import batch_command
from kvlocal_cli.bench import bench_command
from kvlocal_cli.chat_command import chat_command
from kvlocal_cli.doctor import doctor_command
from kvlocal_cli.evaluations import eval_group
from kvlocal_cli.groups import CommandGroup
from kvlocal_cli.model_files import cp_command, rm_command, show_command
from kvlocal_cli.models import models_command, pull_command
from kvlocal_cli.nexus import nexus_group
from kvlocal_cli.run import run_command
from kvlocal_cli.serve import serve_command
from kvlocal_cli.sessions import sessions_group
from kvlocal_cli.terminal import INTERRUPTED

FAILURE = 1


class Kvlocal(CommandGroup):
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
            _fail(str(error), FAILURE)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "kvlocal"
            _fail(f"{_sentence(error)}; see `{command} --help`", error.exit_code)
        except click.ClickException as error:
            _fail(_sentence(error), error.exit_code)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            _fail(f"{what}{error.strerror or error}", FAILURE)
        sys.exit(code if isinstance(code, int) else 0)


def _sentence(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    return message[:1].lower() + message[1:]


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


for command in (
    chat_command, run_command, batch_command, serve_command, sessions_group, models_command, pull_command, show_command, rm_command, cp_command,
    bench_command, doctor_command, eval_group, nexus_group,
):  # fmt: skip
    main.add_command(command)
