"""Being a server of llama.cpp's RPC: layers of other machines' models are held and computed here."""

from __future__ import annotations

import signal
import socket

from kvlocal.llama.devices import cpu_devices, devices_of
from kvlocal.llama.errors import EngineError
from kvlocal.llama.ggml import functions
from kvlocal.llama.library import load
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.rpc import backend_function

_START_SERVER = "void (*)(const char *, const char *, size_t, size_t, ggml_backend_dev_t *)"


def serve(host: str, port: int, n_threads: int, cache_dir: str | None = None) -> None:
    """Computes for whoever connects, on the GPUs of this machine, or on the CPU where there are none, until the process is ended.

    Args:
        host, port: where it listens. llama.cpp's RPC knows no keys: who can connect can use the machine.
        n_threads: of the CPU.
        cache_dir: where large tensors are kept, so that a model is sent once; None for nowhere.

    Raises:
        EngineError: this llama.cpp was built without RPC, or nothing can listen there.
    """
    ffi, _ = functions()
    load().llama_cpp.llama_backend_init()
    start = backend_function("ggml_backend_rpc_start_server", _START_SERVER)
    try:
        address = socket.gethostbyname(host)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        raise EngineError(f"nothing can listen at {host}:{port} ({error.strerror}): choose another --host or --port") from error
    served = devices_of(Placement(ALL)) or cpu_devices()
    # Python's own handlers would not run while llama.cpp waits
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    kept = cache_dir.encode() if cache_dir else ffi.NULL
    pointers = ffi.new("ggml_backend_dev_t[]", [ffi.cast("ggml_backend_dev_t", device.address) for device in served])
    start(f"{address}:{port}".encode(), kept, n_threads, len(served), pointers)
    raise EngineError(f"the RPC server at {host}:{port} has ended: see what it said above")
