"""`kvlocal serve`: the model over HTTP."""

import ipaddress
import sys
from dataclasses import replace
from pathlib import Path

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.errors import KvlocalError
from kvlocal.files.places import state_dir
from kvlocal.llama.context import MAX_SEQUENCES
from kvlocal_cli import completing
from kvlocal_cli.groups import Command
from kvlocal_cli.options import Loading, SizeInBytes, clean_text, model_named, session_options
from kvlocal_cli.terminal import is_terminal

PARALLEL = 2
WAITING = 16

# what the extra `serve` brings, by the names that are imported
_EXTRA = {"h11", "prometheus_client", "pydantic", "pydantic_core", "sse_starlette", "starlette", "uvicorn"}


@click.command("serve", cls=Command)
@click.argument("name", required=False, metavar="[MODEL]", shell_complete=completing.models)
@click.option("-m", "--model", metavar="MODEL", shell_complete=completing.models, help="The model, in place of the argument.")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen; 0.0.0.0 is everywhere.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="The same; 0 takes a free one.")
@click.option("--parallel", type=click.IntRange(1, MAX_SEQUENCES), default=PARALLEL, show_default=True, metavar="N",
              help="Conversations that are answered at once, each with a budget of its own.")  # fmt: skip
@click.option("--waiting", type=click.IntRange(min=0), default=WAITING, show_default=True, metavar="N",
              help="Requests that may wait for one of them to end; more are told to come back later.")  # fmt: skip
@click.option("--api-key", "api_keys", multiple=True, metavar="KEY",
              help="A key that clients have to send; can be repeated, and each has conversations of its own. Others see it in the list of "
              "processes: the environment variable KVLOCAL_API_KEY, with a space between keys, keeps it from them.")  # fmt: skip
@click.option("--cors-origin", "origins", multiple=True, metavar="ORIGIN",
              help="Web pages that may use the server, such as https://example.org, beside those of this machine; can be repeated, and * is "
              "all.  [default: none, with a key all]")  # fmt: skip
@click.option("--disk", type=SizeInBytes(), default="16GiB", show_default=True, metavar="SIZE",
              help="How much all conversations may take on the disk, such as 500G: beyond that the oldest are deleted.")  # fmt: skip
@click.option("--forget", is_flag=True, help="Keep no conversations on the disk: they end with the server.")
@click.option("--keep-trimmed", is_flag=True,
              help="Where a client has left out the oldest turns, go on with the conversation that has them.")  # fmt: skip
@session_options
def serve_command(
    name: str | None,
    model: str | None,
    host: str,
    port: int,
    parallel: int,
    waiting: int,
    api_keys: tuple[str, ...],
    origins: tuple[str, ...],
    disk: int,
    forget: bool,
    keep_trimmed: bool,
    config: SessionConfig,
    loading: Loading,
) -> None:
    """A chat in the browser, and answers for programs that speak OpenAI's API.

    MODEL is a name that `kvlocal models` lists, or the path of a GGUF file. The address is told when it is ready; a
    browser shows a chat there, with a map of what of it is in the cache:

    \b
        kvlocal serve --port 8080
        curl http://127.0.0.1:8080/v1/chat/completions \\
            -d '{"messages": [{"role": "user", "content": "Hello"}]}'

    A conversation that a client sends again is gone on with: only what is new of it is read. Conversations are kept on the
    disk, in the directory `served` of --archive-dir or of where chats are kept. Ctrl-C ends the server; answers that are on
    their way have some seconds to end.
    """
    try:
        from kvlocal.server import serving
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        raise KvlocalError(f"kvlocal serve needs {package}, which is not installed: pip install 'kvlocal[serve]'") from error
    _, name = model_named(name, model)
    if not all(key.strip() for key in api_keys):
        raise click.UsageError("an API key is empty: give one that is not, or leave the option out")
    config = replace(config, system=None if config.system is None else clean_text(config.system))
    directory = None if forget else (config.archive_dir or state_dir()) / "served"
    loading.locate(name)
    listening = serving.listen(host, port)
    with listening:
        address = serving.address_of(listening, host)
        if not api_keys and not _is_loopback(listening.getsockname()[0]):
            _say(f"everybody who reaches {host} can use the server: ask for a key with --api-key")
        if not is_terminal(sys.stderr):
            _say(f"loading {name}")
        with loading.loaded(name, config, parallel) as loaded:
            serving.serve_model(
                loaded.model, loaded.config, listening, name=_model_name(name), nexus=loaded.nexus, parallel=parallel, waiting=waiting,
                directory=directory, disk=disk, api_keys=api_keys, origins=origins or (("*",) if api_keys else ()), host=host,
                keep_trimmed=keep_trimmed, ready=lambda: _say(f"{name} is served at {address}; Ctrl-C ends it"),
            )  # fmt: skip
    _say("the server has ended")


def _model_name(name: str) -> str:
    """By which clients know it: that of a file is its own, without where it lies."""
    return Path(name).stem if name.lower().endswith(".gguf") and not name.startswith("hf:") else name


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _say(text: str) -> None:
    click.echo(f"kvlocal: {text}", err=True)
