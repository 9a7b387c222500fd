"""What a chat without options would use, and why: the policy, the Nexus tokens, the device and the threads."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource

from kvlocal import policies
from kvlocal.cache.config import allocation
from kvlocal.chat.config import SessionConfig
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.adapter import Lora
from kvlocal.llama.devices import devices, used_devices
from kvlocal.llama.free_cores import AUTO
from kvlocal.llama.placement import ALL, Placement
from kvlocal.nexus.discovery import OFF
from kvlocal_cli.options import Loaded, Loading, session_options


@click.command()
@session_options
def _settings(config: SessionConfig, loading: Loading) -> tuple[SessionConfig, Loading]:
    return config, loading


def describe_chat(
    model: str | None, lora: Sequence[Lora], rpc: tuple[str, ...], library: dict[str, Any], machine: dict[str, Any]
) -> dict[str, Any]:
    """For JSON: of policy, nexus, device and threads what is used (nexus None for none) and, as policy_why and so on, why; model and budget (cells).

    Args:
        model: a name or a path; None for the model that a chat has by default.
        lora: adapters for it; without any those that a chat has by default.
        rpc: servers that get layers of it; without any those that a chat has by default.
        library, machine: what the doctor found.

    Raises:
        NotPulled: the model is not here.
        KvlocalError: a chat with this model would end with this.
    """
    with _context() as context:
        config, loading = context.invoke(_settings, **{str(param.name): context.params[str(param.name)] for param in _settings.params})
        is_default = context.get_parameter_source("policy") == ParameterSource.DEFAULT
        name = model or context.params["model"] or DEFAULT_MODEL
    resolve(name)  # nobody is asked whether to pull it
    if rpc:
        loading = replace(loading, where=replace(loading.where, placement=replace(loading.where.placement, rpc=rpc)))
    with replace(loading, lora=tuple(lora) or loading.lora).loaded(name, config) as loaded:
        return {
            "model": name,
            "budget": allocation(loaded.config, loaded.model.n_ctx_train).budget,
            "policy": loaded.config.policy,
            "policy_why": _why_policy(config.policy, loaded, is_default),
            "nexus": str(loaded.nexus.path) if loaded.nexus else None,
            "nexus_why": _why_nexus(loaded, loading),
            **_device(library, loaded.model.placement),
            **_threads(config, machine),
        }


def _context() -> click.Context:
    """That of `kvlocal chat` without arguments, which is not carried out."""
    root = click.get_current_context().find_root()
    assert isinstance(root.command, click.Group)
    # which also finds what it has for defaults
    _, chat, _ = root.command.resolve_command(root, ["chat"])
    assert chat is not None
    return chat.make_context("chat", [], parent=root)


def _why_policy(asked: str, loaded: Loaded, is_default: bool) -> str:
    if loaded.config.policy == asked:
        return "the default" if is_default else "as it is set"
    tokens = "there are Nexus tokens for it" if loaded.nexus else "there are no Nexus tokens for it"
    return f"the model cannot recall, which {asked} needs, and {tokens}"


def _why_nexus(loaded: Loaded, loading: Loading) -> str:
    if loaded.nexus:
        return "as it is set" if loading.nexus else "the first file that fits the model, of those beside it, among the models and shipped"
    if not (loading.takes_nexus(loaded.config) or "nexus" in policies.make(loaded.config.policy, loaded.config.policy_args).needs):
        return f"the policy {loaded.config.policy} uses none"
    if loading.nexus == OFF:
        return "as it is set"
    return "beside adapters only a file that is named" if loaded.model.changed_by else "no file fits the model"


def _device(library: dict[str, Any], placement: Placement) -> dict[str, str]:
    every = devices(placement.servers)
    if not used_devices(Placement(ALL), every):
        others = [name for name in library["backends"] if name not in ("CPU", "RPC")]
        return {"device": "CPU", "device_why": "no other device was found" if others else "this llama.cpp was built for nothing else"}
    gpus = used_devices(placement, every)
    if not gpus:
        return {"device": "CPU", "device_why": "no layer is to go to the GPU"}
    n = placement.n_gpu_layers
    cells = "" if placement.kv_offload else ", and the cache stays in main memory"
    names = [f"RPC server {gpu.description}" if gpu.is_remote else gpu.description for gpu in gpus]
    return {"device": ", ".join(names), "device_why": f"{'all' if n < 0 else n} layers go there{cells}"}


def _threads(config: SessionConfig, machine: dict[str, Any]) -> dict[str, Any]:
    if config.n_threads == AUTO:
        return {"threads": machine["usable_cores"], "threads_why": "one per core that this process may use, fewer while other programs compute"}
    if config.n_threads:
        return {"threads": config.n_threads, "threads_why": "as it is set"}
    return {"threads": machine["usable_cores"], "threads_why": "one per core that this process may use"}
