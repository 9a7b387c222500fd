"""Fixtures that more than one test module uses, and the signals of all."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import device
import numpy as np
import pytest
from rpc_process import RpcServer
from shallow_model import write_shallow_model

from kvlocal.errors import KvlocalError
from kvlocal.hub.catalogue import resolve
from kvlocal.hub.pull import pull
from kvlocal.llama import context
from kvlocal.llama.model import Model

# one thread where a test does not say how many: two that wait for each other crawl when the machine is busy
context.available_cores = lambda: 1

# what whoever runs the tests has set for their chats is not for them
os.environ["KVLOCAL_CONFIG"] = str(Path(__file__).with_name("no-config.toml"))

# nohup and background jobs are started with these ignored, and so would be all that the tests start and interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=device.chosen(), help="where models are put (device.py)  [default: KVLOCAL_TEST_DEVICE or cpu]")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only: what it tests exists on the CPU alone")
    config.addinivalue_line("markers", "device: what differs with the device that the models are on; -m device chooses these alone")
    where = config.getoption("--device")
    if where == "rpc":
        server = RpcServer()
        config.add_cleanup(server.end)
        where += f":{server.address}"
    device.use(where)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not device.on_cpu():
        for item in items:
            if item.get_closest_marker("cpu_only"):
                item.add_marker(pytest.mark.skip(reason="exists on the CPU alone"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, which `make test` has fetched."""
    return resolve("smollm2-135m")


@pytest.fixture(scope="session")
def short_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first six layers: for what does not depend on what the model says, but on how it is used."""
    path = tmp_path_factory.mktemp("short") / "short-smollm2.gguf"
    write_shallow_model(smollm2, path, 6, quantized=True)
    return path


@pytest.fixture(scope="session")
def three_layers(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first three layers in float32."""
    path = tmp_path_factory.mktemp("shallow") / "three-layers.gguf"
    write_shallow_model(smollm2, path, 3)
    return path


@pytest.fixture(scope="session")
def shallow_file(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first four layers in float32, see shallow_model.py."""
    path = tmp_path_factory.mktemp("shallow") / "shallow.gguf"
    write_shallow_model(smollm2, path, 4)
    return path


@pytest.fixture(scope="module")
def shallow_model(shallow_file: Path) -> Iterator[Model]:
    """The same, loaded."""
    with Model(shallow_file) as model:
        yield model


@pytest.fixture(scope="module")
def tokens(shallow_model: Model) -> np.ndarray:
    """Random ones of its vocabulary, int32 [2048]."""
    return np.random.default_rng(7).integers(100, shallow_model.n_vocab, 2048).astype(np.int32)


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma-3-270M, a model with a sliding window; fetched on first use. A machine with a GPU may have no network: there its tests are skipped."""
    try:
        return pull("gemma3-270m")
    except KvlocalError as error:
        if device.on_cpu():
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def short_gemma3(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its first six layers, of which one has no sliding window."""
    path = tmp_path_factory.mktemp("short") / "short-gemma3.gguf"
    write_shallow_model(gemma3, path, 6, quantized=True)
    return path
