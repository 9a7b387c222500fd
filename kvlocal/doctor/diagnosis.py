"""Says what this installation consists of, what a model's cache costs, and what is wrong if anything is."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import kvlocal
from kvlocal.cache.config import allocation
from kvlocal.cache.fitting import fitted
from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_estimate import Free, MemoryEstimate, largest_budget, layers_that_fit
from kvlocal.doctor.memory_limits import available_memory
from kvlocal.errors import KvlocalError
from kvlocal.files.places import models_dir
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.gguf.lora import changed_tensors
from kvlocal.hub.catalogue import Catalogue
from kvlocal.hub.hub_file import HubFile
from kvlocal.llama.adapter import Adapter, Lora, check_lora
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import KV_TYPES, Context
from kvlocal.llama.devices import devices, devices_of, used_devices
from kvlocal.llama.errors import NativeError
from kvlocal.llama.ggml import functions
from kvlocal.llama.library import Library, load
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.template.chat_template import ChatTemplate

_T = TypeVar("_T")


def diagnose(model: str | None = None, lora: Sequence[Lora] = (), rpc: tuple[str, ...] = ()) -> dict[str, Any]:
    """A report for JSON; a part that cannot be found out is None, and the reason is in its "problems".

    Sizes are in bytes. Keys:
        kvlocal, python, platform: versions
        library: path, bindings (llama-cpp-python's version), patches, api_version, backends, features and devices (name, description, backend,
            kind, memory_free, memory_total, id); llama.cpp calls all of the CPU's memory free
        machine: cores, usable_cores, memory_total, memory_available
        models: directory, exists, writable, disk_free, default, present (names)
        model: only with `model`, see `_describe_model`
        hints: sentences on what is worth knowing
        problems: sentences on what is wrong and what to do; empty if all is well

    Args:
        model: a catalogue name or a path, as `catalogue.resolve` takes it.
        lora: adapters for it.
        rpc: servers that are to get layers of it, each as HOST:PORT.
    """
    problems: list[str] = []
    hints: list[str] = []
    library = _attempt(problems, load)
    report: dict[str, Any] = {
        "kvlocal": kvlocal.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "library": library and _describe_library(library),
        "machine": _describe_machine(),
        "models": _attempt(problems, lambda: _describe_models(problems, hints)),
    }
    if model is not None:
        # Without the library the one problem would be named twice.
        report["model"] = library and _attempt(problems, lambda: _describe_model(problems, library, model, lora, rpc))
    return report | {"hints": hints, "problems": problems}


def _attempt(problems: list[str], find_out: Callable[[], _T]) -> _T | None:
    try:
        return find_out()
    except KvlocalError as error:
        problems.append(str(error))
        return None


def _describe_library(library: Library) -> dict[str, Any]:
    ffi, ggml = functions()

    def text(pointer: Any) -> str:
        return ffi.string(pointer).decode("utf-8", "replace")

    # "CUDA : ARCHS = 900 | CPU : AVX2 = 1 | FMA = 1 | ", without what is off
    info = library.llama_cpp.llama_print_system_info().decode("utf-8", "replace")
    return {
        "path": str(library.lib_dir),
        "bindings": library.bindings_version,
        "patches": library.patch_level,
        "api_version": library.lib.kvl_api_version(),
        "backends": [text(ggml.ggml_backend_reg_name(ggml.ggml_backend_reg_get(i))) for i in range(ggml.ggml_backend_reg_count())],
        "features": [part.rpartition(" : ")[2].strip().removesuffix(" = 1") for part in info.split("|") if part.strip()],
        "devices": [asdict(device) for device in devices()],
    }


def _describe_machine() -> dict[str, int | None]:
    cores = os.cpu_count()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": cores, "usable_cores": usable, "memory_total": total, "memory_available": available_memory()}


def _describe_models(problems: list[str], hints: list[str]) -> dict[str, Any]:
    directory = models_dir()
    # What a pull would create the directory in.
    anchor = next(path for path in (directory, *directory.parents) if path.exists())
    writable = anchor.is_dir() and os.access(anchor, os.W_OK | os.X_OK)
    if not writable:
        problems.append(f"models cannot be stored in {directory}: set KVLOCAL_MODELS_DIR to a directory that can be written")

    catalogue = Catalogue.load()
    places = [entry.path for entry in catalogue.entries.values()]
    present = [entry.name for entry in catalogue.entries.values() if entry.present]
    for entry in catalogue.entries.values():
        if entry.path and entry.path.exists() and not entry.present:
            problems.append(f"{entry.path} is damaged: run `kvlocal pull --force {entry.name}`")
        elif entry.name == catalogue.default and not entry.present:
            hints.append(f"the default model {entry.name} is not on this machine yet: run `kvlocal pull {entry.name}`")
    return {
        "directory": str(directory),
        "exists": directory.is_dir(),
        "writable": writable,
        "disk_free": shutil.disk_usage(anchor).free,
        "default": catalogue.default,
        "present": [*present, *(file.name for file in HubFile.pulled() if file.path not in places)],
    }


def _describe_model(problems: list[str], library: Library, name: str, lora: Sequence[Lora], rpc: tuple[str, ...]) -> dict[str, Any]:
    """What a session needs to know about a model.

    Keys: path, description, architecture, parameters, size (bytes of the weights), trained_context (tokens), sliding_window (tokens, 0 for none),
    template (ChatTemplate.source, None if it cannot be used), compressible, compressible_layers, kv_heads, can_rotate, kv_bytes_per_1000_cells
    (of the compressible cache, by cache type; None for a type that does not fit the heads), layers (there are, with what makes logits as one more),
    layers_on_devices (of these, how many fit there with the cells of a chat; None without a device beside the CPU), memory (that a chat takes, for
    the host and each such device: name, need and free, in bytes; None where one does not tell), largest_budget (cells that fit into what is free,
    with an f16 cache and the default policy, at most what the model was trained for; None where the system does not say how much is free), lora (of
    the adapters that go with it path, scale, tensors that it changes, and size in bytes).
    """
    path = Catalogue.load().resolve(name)
    with Model(path) as model:
        template = _attempt(problems, lambda: ChatTemplate.from_model(model).source)
        adapters = [_attempt(problems, lambda each=each: _describe_adapter(model, each)) for each in lora]  # type: ignore[misc]
        with Context(model, n_cells=256, n_ubatch=32) as context:
            try:
                layout = NativeCache(context.pointer).layout()
            except NativeError as error:
                problems.append(f"the cache of {path} cannot be compressed ({error}): choose another model")
                layout = None
        cost = None
        if layout is not None:
            _, ggml = functions()
            cost = {}
            for kind in KV_TYPES:
                ggml_type = getattr(library.llama_cpp, f"GGML_TYPE_{kind.upper()}")
                block = ggml.ggml_blck_size(ggml_type)
                sizes = (layout.n_embd_head_k, layout.n_embd_row_v)
                row = sum(ggml.ggml_row_size(ggml_type, size * layout.n_head_kv) for size in sizes)
                cost[kind] = 1000 * layout.n_layer * row if all(size % block == 0 for size in sizes) else None
        return {
            "path": str(path),
            "description": model.description,
            "architecture": model.metadata.get("general.architecture"),
            "parameters": model.n_params,
            "size": model.size_bytes,
            "trained_context": model.n_ctx_train,
            "sliding_window": model.n_swa,
            "template": template,
            "compressible": layout is not None,
            "compressible_layers": layout and layout.n_layer,
            "kv_heads": layout and layout.n_head_kv,
            "can_rotate": layout and layout.can_rotate,
            "kv_bytes_per_1000_cells": cost,
            **_describe_places(path, lora, rpc),
            "lora": [adapter for adapter in adapters if adapter],
        }


def _describe_places(path: Path, lora: Sequence[Lora], rpc: tuple[str, ...]) -> dict[str, Any]:
    """What of a model and of a chat with it fits where.

    Raises:
        EngineError: a server does not answer.
    """
    whole = Placement(ALL, rpc=rpc)
    config, used = fitted(path, SessionConfig(), whole), devices_of(whole)
    placement = replace(whole, n_gpu_layers=layers_that_fit(path, config, whole, lora=lora) if used else 0)
    free = Free.now(used_devices(placement, used))
    container = Container(path)
    attention, estimate = Attention.of(container), MemoryEstimate.of(container, config, True, lora, placement, free)
    n_layers = attention and len(attention.n_head_kv_each) + 1
    needs = estimate and attention and estimate.total(allocation(config, attention.n_ctx_train).n_cells)
    names = ["host", *free.names]
    return {
        "layers": n_layers,
        "layers_on_devices": None if not used else n_layers if placement.n_gpu_layers == ALL else placement.n_gpu_layers,
        "memory": needs and [
            {"name": name, "need": need, "free": size} for name, need, (_, size) in zip(names, needs, free.places, strict=True)
        ],
        "largest_budget": largest_budget(path, config, lora, placement),
    }


def _describe_adapter(model: Model, lora: Lora) -> dict[str, Any]:
    base, container = Container(model.path), Container(lora.path)
    check_lora(lora, base)
    Adapter(model, lora.path, lora.scale, base=base)
    return {"path": str(lora.path), "scale": lora.scale, "tensors": len(changed_tensors(container)), "size": container.status.st_size}
