"""Where the models of the tests are: on the CPU, or on the device that KVLOCAL_TEST_DEVICE or pytest's --device names.

"cpu" is the default, "gpu" puts all layers and their cache on the GPU, "gpu:N" the last N layers only, "rpc:HOST:PORT,..." all on RPC servers, and
"rpc" alone on one that is started for it (conftest.py).
"""

import os

import pytest

from kvlocal.llama.devices import devices, used_devices
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.rpc import servers_of


def use(device: str) -> None:
    """Puts all models that are made from now on, unless they say where, on the device.

    Raises:
        pytest.UsageError: there is no such device.
    """
    kind, _, layers = device.partition(":")
    if kind == "rpc":
        Model.__init__.__kwdefaults__.update(n_gpu_layers=ALL, placement=Placement(ALL, rpc=servers_of(layers)))
    elif kind not in ("cpu", "gpu") or (layers and not layers.isdecimal()) or (kind == "cpu" and layers):
        raise pytest.UsageError(f"there is no device {device!r}: name cpu, gpu, gpu:LAYERS or rpc:HOST:PORT")
    if kind == "gpu":
        if not used_devices(Placement(ALL), devices()):
            raise pytest.UsageError("this library finds no GPU: build it with a GPU backend on a machine that has one, or leave --device out")
        Model.__init__.__kwdefaults__["n_gpu_layers"] = int(layers or -1)
    os.environ["KVLOCAL_TEST_DEVICE"] = device  # the processes that tests start see it too


def chosen() -> str:
    """The device as it was named."""
    return os.environ.get("KVLOCAL_TEST_DEVICE", "cpu")


def on_cpu() -> bool:
    """Whether the tests run on the CPU alone."""
    return chosen() == "cpu"


def tolerance(on_the_cpu: float, on_a_device: float) -> float:
    """How far a result may be from its reference: what is written where it is used for each of the two."""
    return on_the_cpu if on_cpu() else on_a_device


def placement() -> Placement:
    """Where the models of the tests are put."""
    defaults = Model.__init__.__kwdefaults__
    return defaults["placement"] or Placement(defaults["n_gpu_layers"])
