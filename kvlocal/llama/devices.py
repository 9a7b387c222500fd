"""The devices that llama.cpp has found, and which of them layers of a model go to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvlocal.llama.errors import EngineError
from kvlocal.llama.ggml import functions
from kvlocal.llama.placement import NONE, Placement
from kvlocal.llama.rpc import connect, lost_server

KINDS = ("cpu", "gpu", "integrated gpu", "accelerator", "meta")  # enum ggml_backend_dev_type
_HOLD_LAYERS = ("gpu", "integrated gpu")
_RPC = "RPC"


@dataclass(frozen=True)
class Device:
    """A device.

    name: as llama.cpp has it, such as CUDA0 or CPU
    backend: of ggml, such as CUDA
    kind: one of KINDS
    memory_free, memory_total: bytes; of the CPU llama.cpp calls all of it free
    id: of the hardware, which two backends may have found; None if it is not known
    address: of the ggml_backend_device; 0 for none
    """

    name: str
    description: str
    backend: str
    kind: str
    memory_free: int
    memory_total: int
    id: str | None = None
    address: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether it is on another machine."""
        return self.backend == _RPC


def devices(servers: Sequence[str] = ()) -> list[Device]:
    """All there are here, as llama.cpp orders them, and behind them those of RPC servers, whose descriptions are the servers' HOST:PORT.

    Raises:
        EngineError: a server does not answer.
    """
    return [_device(pointer) for pointer in [*_here(), *connect(servers)]]


def devices_of(placement: Placement) -> list[Device]:
    """Those that layers go to (used_devices), as they are now. Where all is on the CPU no device is asked: a GPU that is asked what memory it has
    takes some of it for the answer.

    Raises:
        EngineError: one is named that there is not, or a server does not answer.
    """
    return used_devices(placement, devices(placement.servers)) if placement.n_gpu_layers else []


def cpu_devices() -> list[Device]:
    """The CPU. No other device is asked."""
    _, ggml = functions()
    return [_device(pointer) for pointer in _here() if ggml.ggml_backend_dev_type(pointer) == KINDS.index("cpu")]


def _here() -> list[Any]:
    """A ggml_backend_dev_t for each device of this machine."""
    _, ggml = functions()
    return [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]


def _device(pointer: Any) -> Device:
    ffi, ggml = functions()
    props = ffi.new("struct ggml_backend_dev_props *")
    ggml.ggml_backend_dev_get_props(pointer, props)
    backend = ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(pointer))
    kind = KINDS[props.type] if props.type < len(KINDS) else "unknown"
    return Device(
        _text(ffi, props.name), _text(ffi, props.description), _text(ffi, backend), kind, props.memory_free, props.memory_total,
        _text(ffi, props.device_id) or None, int(ffi.cast("uintptr_t", pointer)),
    )  # fmt: skip


def check_connected(devices: Sequence[Device]) -> None:
    """Raises EngineError if one of them is of an RPC server that was lost."""
    for device in devices:
        if device.is_remote and lost_server(functions()[0].cast("ggml_backend_dev_t", device.address)):
            raise EngineError(
                f"the RPC server {device.description} is lost, and with it a part of the model: start it again, then kvlocal; what was said is kept"
            )


def _text(ffi: Any, pointer: Any) -> str:
    return ffi.string(pointer).decode("utf-8", "replace").strip() if pointer else ""


def used_devices(placement: Placement, every: Sequence[Device]) -> list[Device]:
    """Those of all devices that layers go to, in the order in which they get them; none where all is on the CPU.

    Source: llama.cpp, llama_prepare_model_devices.

    Raises:
        EngineError: one is named that there is not.
    """
    if placement.n_gpu_layers == 0:
        return []
    if placement.devices is None:
        chosen = _by_default(every)
    elif placement.devices == (NONE,):
        chosen = []
    else:
        by_name = {device.name: device for device in every if device.kind in _HOLD_LAYERS}
        for name in placement.devices:
            if name not in by_name:
                there = f"there are {', '.join(by_name)}" if by_name else "there is none beside the CPU, so give none or leave it out"
                raise EngineError(f"there is no device {name} that layers could go to: {there}")
        chosen = [by_name[name] for name in placement.devices]
    if placement.split_mode == NONE and chosen:
        if placement.main_gpu >= len(chosen):
            raise EngineError(f"the main GPU is {placement.main_gpu}, and devices are counted from 0 to {len(chosen) - 1}: name one of these")
        chosen = [chosen[placement.main_gpu]]
    if chosen and len(placement.tensor_split) > len(chosen):
        raise EngineError(f"the model is split in {len(placement.tensor_split)} parts and goes to {len(chosen)} devices: give as many or fewer")
    return chosen


def _by_default(every: Sequence[Device]) -> list[Device]:
    """Machines elsewhere first, then GPUs, each once; integrated ones of one backend where there is no other here."""
    servers = [device for device in every if device.is_remote]
    gpus: list[Device] = []
    for device in every:
        if device.kind == "gpu" and not device.is_remote and not (device.id and device.id in [other.id for other in gpus]):
            gpus.append(device)
    integrated = [device for device in every if device.kind == "integrated gpu"]
    return servers + (gpus or [device for device in integrated if device.backend == integrated[0].backend])
