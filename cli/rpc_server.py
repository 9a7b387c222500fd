"""`kvlocal rpc-server`."""

import click

from kvlocal.files.places import cache_dir
from kvlocal.llama.free_cores import available_cores
from kvlocal.llama.rpc import DEFAULT_HOST, DEFAULT_PORT
from kvlocal.llama.rpc_server import serve


@click.command("rpc-server")
@click.option("--host", default=DEFAULT_HOST, show_default=True, metavar="ADDRESS", help="Where to listen; others than this machine reach 0.0.0.0.")
@click.option("--port", type=click.IntRange(1, 65535), default=DEFAULT_PORT, show_default=True, metavar="N", help="The port.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads, where there is no GPU.  [default: one per core]")
@click.option("--cache", is_flag=True, help="Keep large tensors on the disk here, so that a model comes over the network once.")
def rpc_server_command(host: str, port: int, threads: int | None, cache: bool) -> None:
    """Hold layers of models of other machines, and compute them here.

    The others name this machine with --rpc. The layers are on its GPUs, or on its CPU where there are none. It is llama.cpp's RPC server,
    and runs until it is ended.

    Nobody is asked for a key and nothing is encrypted: whoever reaches the port can use this machine, and what it is sent is not
    checked as files are. Use it on a network that you trust.
    """
    kept = None
    if cache:
        directory = cache_dir() / "rpc"
        directory.mkdir(parents=True, exist_ok=True)
        kept = str(directory)
    click.echo(f"kvlocal: an RPC server at {host}:{port}, for everybody who reaches it; Ctrl-C ends it", err=True)
    serve(host, port, threads or available_cores(), kept)
