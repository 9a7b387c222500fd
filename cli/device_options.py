"""The options that say on which devices a model is put, turned into one Where."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import click

from kvlocal.chat.config import SessionConfig
from kvlocal.doctor.memory_estimate import layers_that_fit
from kvlocal.errors import KvlocalError
from kvlocal.llama.adapter import Lora
from kvlocal.llama.placement import ALL, Placement, SplitMode
from kvlocal.llama.rpc import servers_of
from kvlocal_cli.option_lists import add_options

AUTO: Literal["auto"] = "auto"

_DEFAULT = Placement()


@dataclass(frozen=True)
class Where:
    """On which devices a command puts its model.

    placement: with fits, its number of layers stands for nothing
    fits: as many layers go there as fit
    """

    placement: Placement
    fits: bool = False

    @property
    def uses_devices(self) -> bool:
        """Whether layers may go to another device than the CPU."""
        return self.fits or self.placement.n_gpu_layers != 0

    def of(self, path: Path, config: SessionConfig, parallel: int = 1, undo: bool = True, lora: Sequence[Lora] = ()) -> Placement:
        """That of the model of a file, for so many conversations with it, with undo or without.

        Raises:
            KvlocalError: there is no such device, or the file cannot be read.
        """
        if not self.fits:
            return self.placement
        return replace(self.placement, n_gpu_layers=layers_that_fit(path, config, self.placement, parallel, undo, lora))


class NumberOfLayers(click.ParamType):
    """A number of layers, all of them as ALL, or auto."""

    name = "layers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Raises BadParameter if it is something else."""
        if value in (AUTO, "all"):
            return AUTO if value == AUTO else ALL
        n: int = click.IntRange(min=ALL).convert(value, param, ctx)
        return n


class DeviceNames(click.ParamType):
    """Names of devices, with commas between them, as a tuple."""

    name = "devices"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Raises BadParameter if there is none, or one twice."""
        names = value if isinstance(value, tuple) else tuple(name.strip() for name in value.split(","))
        try:
            return Placement(devices=names).devices or ()
        except KvlocalError as error:
            self.fail(str(error), param, ctx)


class Parts(click.ParamType):
    """Numbers with commas between them, as a tuple."""

    name = "parts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Raises BadParameter if it is something else."""
        try:
            parts = value if isinstance(value, tuple) else tuple(float(part) for part in re.split("[,/]", value))
            return Placement(tensor_split=parts).tensor_split
        except ValueError:
            self.fail(f"{value!r} is no list of numbers such as 3,1", param, ctx)
        except KvlocalError as error:
            self.fail(str(error), param, ctx)


class RpcServers(click.ParamType):
    """llama.cpp's RPC servers, as HOST:PORT,... A tuple of them."""

    name = "rpc servers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Raises BadParameter if they are not of that form."""
        if isinstance(value, tuple):
            return value
        try:
            return servers_of(value)
        except KvlocalError as error:
            self.fail(str(error), param, ctx)


def _check_attention(_ctx: click.Context, _param: click.Parameter, value: str) -> None:
    if value == "off":
        raise click.BadParameter(
            "cells are removed and moved one by one, which llama.cpp's other attention has no rows of values for: leave it at auto"
        )


DEVICE_OPTIONS = (
    click.option(
        "--rpc", type=RpcServers(), default=(), metavar="HOST:PORT[,...]",
        help="Put layers on other machines, where kvlocal rpc-server runs: on a trusted network only, as nobody is asked for a key.",
    ),
    click.option(
        "--gpu-layers", type=NumberOfLayers(), default=AUTO, show_default=True, metavar="N|auto|all",
        help="Layers that go to the GPU: so many of the last ones, all, or as many as fit there with their cells; 0 is the CPU alone. Without a GPU "
        "it has no effect.",
    ),
    click.option(
        "--device", "devices", type=DeviceNames(), metavar="NAME[,NAME]",
        help="Devices for these layers, by the names that kvlocal doctor lists; none for the CPU alone.  [default: all GPUs]",
    ),
    click.option(
        "--split-mode", type=click.Choice(get_args(SplitMode)), default=_DEFAULT.split_mode, show_default=True,
        help="How several devices share a model: whole layers, rows of each matrix, or not at all.",
    ),
    click.option(
        "--main-gpu", type=click.IntRange(min=0), default=_DEFAULT.main_gpu, show_default=True, metavar="N",
        help="The device, counted from 0, that has everything with --split-mode none, and intermediate results with row.",
    ),
    click.option(
        "--tensor-split", type=Parts(), metavar="X,X",
        help="How much of the model each device gets, in relation to the others, such as 3,1.  [default: by the memory that is free]",
    ),
    click.option(
        "--no-kv-offload", is_flag=True, help="Keep the cache in main memory, where attention is computed then, also of layers on a GPU.",
    ),
    click.option(
        "--flash-attn", type=click.Choice(["on", "off", "auto"]), default="auto", show_default=True, callback=_check_attention, expose_value=True,
        help="For who knows it from llama.cpp: flash attention is always on, as the cells of a cache cannot be compressed without it.",
    ),
)  # fmt: skip


def take_devices(arguments: dict[str, Any]) -> Where:
    """The arguments of these options, taken out of those of a command."""
    layers, _ = arguments.pop("gpu_layers"), arguments.pop("flash_attn")
    placement = Placement(
        n_gpu_layers=ALL if layers == AUTO else layers,
        devices=arguments.pop("devices"),
        main_gpu=arguments.pop("main_gpu"),
        split_mode=arguments.pop("split_mode"),
        tensor_split=arguments.pop("tensor_split") or (),
        kv_offload=not arguments.pop("no_kv_offload"),
        rpc=arguments.pop("rpc"),
    )
    return Where(placement, fits=layers == AUTO)


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds these options to a command."""
    return add_options(command, DEVICE_OPTIONS)
