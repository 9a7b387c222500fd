"""llama.cpp's RPC: servers on other machines that hold layers of a model, as seen from here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvlocal.llama.errors import EngineError
from kvlocal.llama.ggml import functions
from kvlocal.llama.library import load

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 50052  # of llama.cpp's rpc-server

# ggml's scheduler takes 16, of which one is the CPU and one may be an accelerator
_MOST_DEVICES = 14

_ADD_SERVER = "ggml_backend_reg_t (*)(const char *)"
_IS_LOST = "bool (*)(ggml_backend_dev_t)"


def servers_of(text: str) -> tuple[str, ...]:
    """The servers named in HOST[:PORT],..., each as HOST:PORT.

    Raises:
        EngineError: one is not of that form, or is named twice.
    """
    servers = []
    for name in text.split(","):
        host, colon, port = name.strip().rpartition(":") if ":" in name else (name.strip(), "", "")
        number = int(port) if port.isascii() and port.isdecimal() else 0 if colon else DEFAULT_PORT
        if not host or ":" in host or any(c.isspace() for c in host) or not 0 < number < 2**16:
            raise EngineError(f"{name.strip()!r} is no RPC server: give HOST:PORT, such as 192.168.1.5:{DEFAULT_PORT}")
        servers.append(f"{host}:{number}")
    if len(set(servers)) < len(servers):
        raise EngineError("an RPC server is named twice: give each one once")
    return tuple(servers)


def connect(servers: Iterable[str]) -> list[Any]:
    """Asks servers, given as HOST:PORT, what they compute with: a ggml_backend_dev_t for each of their devices, in their order.

    Raises:
        EngineError: this llama.cpp was built without RPC, a server does not answer within seconds, or they have more devices than ggml takes.
    """
    found: list[Any] = []
    servers = tuple(servers)
    if not servers:
        return found
    ffi, ggml = functions()
    load().llama_cpp.llama_backend_init()
    add_server = backend_function("ggml_backend_rpc_add_server", _ADD_SERVER)
    for server in servers:
        free, total = ffi.new("size_t *"), ffi.new("size_t *")
        reg = add_server(server.encode())
        devices = [ggml.ggml_backend_reg_dev_get(reg, i) for i in range(ggml.ggml_backend_reg_dev_count(reg))] if reg else []
        for device in devices:
            ggml.ggml_backend_dev_memory(device, free, total)
            # of a server that answered before and does not now, it is 0
            if not total[0]:
                devices = []
                break
        if not devices:
            raise EngineError(f"no RPC server of this version answers at {server}: start `kvlocal rpc-server` there, or see to the address")
        found += devices
    if len(found) > _MOST_DEVICES:
        raise EngineError(f"the RPC servers have {len(found)} devices: llama.cpp takes {_MOST_DEVICES} at most")
    return found


def lost_server(device: Any) -> bool:
    """Whether the connection to the server of a ggml_backend_dev_t has failed, as far as is known: llama.cpp does not say it, and what was computed
    there is nothing then."""
    ffi, ggml = functions()
    address = ggml.ggml_backend_reg_get_proc_address(ggml.ggml_backend_dev_backend_reg(device), b"ggml_backend_rpc_is_lost")
    # without our patches llama.cpp ends the process instead
    return bool(address and ffi.cast(_IS_LOST, address)(device))


def backend_function(name: str, kind: str) -> Any:
    """A function of the RPC backend, as a pointer of that C type.

    Raises:
        EngineError: there is no such backend.
    """
    ffi, ggml = functions()
    reg = ggml.ggml_backend_reg_by_name(b"RPC")
    if not reg:
        raise EngineError("this llama.cpp was built without RPC: build kvlocal with -DGGML_RPC=ON")
    # its library may be loaded later than others, so it is asked for what it has by name
    return ffi.cast(kind, ggml.ggml_backend_reg_get_proc_address(reg, name.encode()))
