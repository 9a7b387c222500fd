"""`kvlocal doctor`."""

import json
import sys
from typing import Any

import click
from rich.filesize import decimal

from kvlocal.doctor.diagnosis import diagnose
from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import DEFAULT_MODEL, NotPulled
from kvlocal.llama.adapter import Lora
from kvlocal_cli import completing
from kvlocal_cli.device_options import RpcServers
from kvlocal_cli.doctor_chat import describe_chat
from kvlocal_cli.options import lora_option


@click.command("doctor")
@click.argument("model", required=False, shell_complete=completing.models)
@lora_option
@click.option("--rpc", type=RpcServers(), default=(), metavar="HOST:PORT[,...]", help="Servers that are to get layers of a chat's model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
def doctor_command(model: str | None, lora: tuple[Lora, ...], rpc: tuple[str, ...], as_json: bool) -> None:
    """Say what this installation consists of, and what is wrong if anything is: then the exit code is 1.

    It also says which model, policy, Nexus tokens, device and threads a chat without options would use, and why.

    With MODEL, a name from the catalogue or a GGUF file, the same for that model, what its KV cache costs and whether it can
    be compressed; with --lora whether these adapters go with it. With --rpc it asks these servers whether they are there.
    """
    if lora and model is None:
        raise click.UsageError("--lora is for a model: name it too")
    report = diagnose(model, lora, rpc)
    report["chat"] = _chat(report, model, lora, rpc)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        for label, value in _rows(report):
            click.echo(f"{label:<16}{value}".rstrip())
    if report["problems"]:
        sys.exit(1)


def _chat(report: dict[str, Any], model: str | None, lora: tuple[Lora, ...], rpc: tuple[str, ...]) -> dict[str, Any] | None:
    """What a chat would use; None where that cannot be found out."""
    if not report["library"] or report.get("model", True) is None:
        return None
    try:
        return describe_chat(model, lora, rpc, report["library"], report["machine"])
    except NotPulled as error:
        if DEFAULT_MODEL not in str(error):  # of which there is a hint already
            report["hints"].append(f"a chat would have another model: {error}")
    except KvlocalError as error:
        report["problems"].append(f"a chat {f'with {model} ' if model else ''}is not possible: {error}")
    return None


def _place(name: str) -> str:
    return "memory" if name == "host" else f"memory on {name}"


def _free(size: int | None) -> str:
    return "" if size is None else f", of which {decimal(size)} are free"


def _rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say, as labels and texts."""
    rows = [("kvlocal", report["kvlocal"]), ("python", f"{report['python']} on {report['platform']}")]
    if library := report["library"]:
        rows += [
            ("library", library["path"]),
            ("llama.cpp", f"of llama-cpp-python {library['bindings']}, patches {library['patches']}, C interface {library['api_version']}"),
            ("backends", ", ".join(library["backends"])),
            ("features", " ".join(library["features"])),
        ]
        for device in library["devices"]:
            # llama.cpp does not know how much of the main memory is free.
            free = "" if device["kind"] == "cpu" else f", {decimal(device['memory_free'])} free of {decimal(device['memory_total'])}"
            rows.append(("device", f"{device['name']}: {device['description']} ({device['kind']}{free})"))
    machine = report["machine"]
    available = machine["memory_available"]
    rows += [
        ("cores", f"{machine['usable_cores']} of {machine['cores']}"),
        ("memory", f"{'?' if available is None else decimal(available)} available of {decimal(machine['memory_total'])}"),
    ]
    if models := report["models"]:
        rows += [
            ("models", f"{models['directory']}{'' if models['exists'] else ' (not made yet)'}, {decimal(models['disk_free'])} free"),
            ("present", ", ".join(models["present"]) or "none"),
        ]
    if model := report.get("model"):
        window = f", sliding window {model['sliding_window']:,}" if model["sliding_window"] else ""
        rows += [
            ("model", f"{model['description']}, {decimal(model['size'])}, {model['path']}"),
            ("trained context", f"{model['trained_context']:,} tokens{window}"),
            ("chat template", model["template"] or "unusable"),
        ]
        for adapter in model["lora"]:
            rows.append(("LoRA", f"{adapter['path']} at {adapter['scale']:g}, {adapter['tensors']} tensors, {decimal(adapter['size'])}"))
        if model["compressible"]:
            rotates = "" if model["can_rotate"] else ", keys cannot be rotated"
            rows.append(("compressible", f"{model['compressible_layers']} layers of {model['kv_heads']} KV heads{rotates}"))
            cost = ", ".join(f"{kind} {decimal(size)}" for kind, size in model["kv_bytes_per_1000_cells"].items() if size)
            rows.append(("1,000 cells", f"take {cost}"))
            for place in model["memory"] or ():
                rows.append(("a chat takes", f"about {decimal(place['need'])} of {_place(place['name'])}{_free(place['free'])}"))
            if model["layers_on_devices"] is not None:
                rows.append(("on the GPU", f"{model['layers_on_devices']} of {model['layers']} layers fit, with the cells of a chat"))
            if model["largest_budget"] is not None:
                rows.append(("largest budget", f"{model['largest_budget']:,} cells in the memory that is free"))
        else:
            rows.append(("compressible", "no"))
    if chat := report["chat"]:
        rows += [
            ("a chat", f"with {chat['model']} keeps {chat['budget']:,} cells by the policy {chat['policy']} ({chat['policy_why']})"),
            ("Nexus tokens", f"{chat['nexus'] or 'none'} ({chat['nexus_why']})"),
            ("runs on", f"{chat['device']} ({chat['device_why']})"),
            ("threads", f"{chat['threads']} ({chat['threads_why']})"),
        ]
    rows += [("hint", hint) for hint in report["hints"]]
    rows += [("problem", problem) for problem in report["problems"]] or [("problems", "none")]
    return rows
