"""On which devices layers and cells are put, and what they take there: over made-up devices, as no machine has all of them."""

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from tiny_model import write_tiny_model

from kvlocal.chat.config import SessionConfig
from kvlocal.compat.errors import NotSupported
from kvlocal.compat.settings import placement_of
from kvlocal.doctor import memory_estimate
from kvlocal.doctor.memory_estimate import Free, MemoryEstimate, OutOfMemory, check, layers_that_fit
from kvlocal.doctor.memory_shares import MemoryShare, ModelSizes, shares
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.llama import devices as devices_module
from kvlocal.llama import model as model_module
from kvlocal.llama.cache_types import device_without_attention
from kvlocal.llama.context import Context
from kvlocal.llama.devices import Device, devices, used_devices
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement, places_of_layers
from kvlocal_cli.device_options import AUTO, Where, device_options, take_devices
from kvlocal_cli.main import main

G = 2**30
CPU = Device("CPU", "a processor", "CPU", "cpu", 64 * G, 64 * G)
BLAS = Device("BLAS", "a library", "BLAS", "accelerator", 0, 0)
CUDA0, CUDA1 = (Device(f"CUDA{i}", "a card", "CUDA", "gpu", 8 * G, 8 * G, f"0000:0{i}:00.0") for i in (0, 1))
SAME = Device("Vulkan0", "the first card", "Vulkan", "gpu", 8 * G, 8 * G, CUDA0.id)
OWN = Device("Vulkan1", "graphics", "Vulkan", "integrated gpu", 16 * G, 16 * G)
OTHER = Device("Metal", "graphics", "Metal", "integrated gpu", 16 * G, 16 * G)
THERE = Device("RPC0", "a machine", "RPC", "gpu", 8 * G, 8 * G)


def used(*every: Device, **placement: object) -> list[str]:
    return [device.name for device in used_devices(Placement(**{"n_gpu_layers": ALL} | placement), every)]


def test_the_devices_that_layers_go_to() -> None:
    assert used(CPU, BLAS) == [] == used(CUDA0, CPU, n_gpu_layers=0) == used(CUDA0, CPU, devices=("none",))
    assert used(CUDA0, CUDA1, SAME, OWN, CPU, n_gpu_layers=3) == ["CUDA0", "CUDA1"]
    assert used(CUDA0, THERE, CPU) == ["RPC0", "CUDA0"]
    assert used(OWN, OTHER, CPU) == ["Vulkan1"] and used(THERE, OWN) == ["RPC0", "Vulkan1"]
    assert used(CUDA0, CUDA1, OWN, CPU, devices=("Vulkan1", "CUDA1")) == ["Vulkan1", "CUDA1"]
    assert used(CUDA0, CUDA1, split_mode="none", main_gpu=1) == ["CUDA1"]
    assert used(CPU, split_mode="none", main_gpu=1) == []


@pytest.mark.parametrize(("placement", "said"), [
    ({"devices": ("CUDA7",)}, "there is no device CUDA7 that layers could go to: there are CUDA0, CUDA1"),
    ({"devices": ("CPU",)}, "there is no device CPU that layers could go to"),
    ({"split_mode": "none", "main_gpu": 2}, "counted from 0 to 1"),
    ({"tensor_split": (1, 1, 1)}, "split in 3 parts and goes to 2 devices"),
    ({"devices": ()}, "an empty list"), ({"devices": ("none", "CUDA0")}, "name each once"), ({"devices": ("CUDA0", "CUDA0")}, "name each once"),
    ({"main_gpu": -1}, "counted from 0"), ({"split_mode": "tensor"}, "one of none, layer, row"),
    ({"tensor_split": (0.0, 0.0)}, "not all 0"), ({"tensor_split": (float("nan"), 1)}, "not all 0"), ({"tensor_split": (-1, 2)}, "at least 0"),
])  # fmt: skip
def test_devices_that_cannot_be_used(placement: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said) as error:
        used(CUDA0, CUDA1, CPU, **placement)
    assert "\n" not in str(error.value)


def places(n: int, *free: int, **placement: object) -> str:
    """One character for each layer and for what makes logits; - for the CPU."""
    found = places_of_layers(n, Placement(**{"n_gpu_layers": ALL} | placement), free)
    return "".join("-" if place < 0 else str(place) for place in found)


def test_the_device_of_each_layer() -> None:
    assert places(4) == "-----" == places(4, 8, n_gpu_layers=0)
    assert places(4, 8) == "00000" == places(4, 8, n_gpu_layers=99) == places(4, 8, n_gpu_layers=5)
    # logits are made where the last layer is
    assert places(4, 8, n_gpu_layers=1) == "----0" and places(4, 8, n_gpu_layers=3) == "--000"
    # in equal parts, the first device has one more
    assert places(4, 8, 8) == "00011" and places(3, 8, 8) == "0011"
    assert places(7, 6, 2) == "00000011" and places(7, 2, 6) == "00111111"
    assert places(7, 8, 8, tensor_split=(3, 1)) == "00000011" and places(7, 8, 8, tensor_split=(0, 1)) == "11111111"
    assert places(7, 8, 8, 8, tensor_split=(1, 1)) == "00001111"
    assert places(7, 0, 0) == "00000000"


SIZES = ModelSizes(
    layers=(10, 20, 30, 40), output=5, embeddings=7, shared=7, cells=(1, 2, 1, 2), rings=(100, 0, 100, 0), windows=(0, 512, 0, 512),
    token=3, n_ubatch=64,
)  # fmt: skip


def test_what_lies_where() -> None:
    host, (first, second) = shares(SIZES, Placement(4), [8, 8])
    # layer 0 is on the CPU, 1 and 2 on the first device, 3 and the logits on the second, with its own copy of what makes them
    assert (host.weights, first.weights, second.weights) == (10 + 7, 20 + 30, 40 + 5 + 7)
    assert [share.cache(1000) for share in (host, first, second)] == [1024, 1024 + 2 * 512, 2 * 512]
    assert [share.cache(200) for share in (host, first, second)] == [256, 3 * 256, 2 * 256]
    assert (host.ring, first.ring, second.ring) == (100, 100, 0)
    for share in (host, first, second):
        assert share.graph == 64 * 3
        assert share.total(1000, 2) - share.total(1000) == share.cache(1000) + share.ring
    # all that there is, wherever it is
    alone, nothing = shares(SIZES, Placement(), [])
    assert nothing == [] and alone.weights == 10 + 20 + 30 + 40 + 5 + 7
    for n in range(6):
        parts = shares(SIZES, Placement(n), [3, 1])
        assert sum(share.cache(777) for share in (parts[0], *parts[1])) == alone.cache(777)
    # without a layer there it takes nothing
    assert shares(SIZES, Placement(2, tensor_split=(0, 1)), [8, 8])[1][0] == MemoryShare(n_ubatch=64)


def test_cells_that_stay_on_the_host() -> None:
    host, (device,) = shares(SIZES, Placement(ALL, kv_offload=False), [8])
    assert device.cache(1000) == 0 == device.ring and host.cache(1000) == shares(SIZES, Placement(), [])[0].cache(1000)
    assert device.weights == 10 + 20 + 30 + 40 + 5 + 7 and host.weights == 7


def test_facts_are_those_of_the_file(smollm2: Path) -> None:
    container, config = Container(smollm2), SessionConfig()
    sizes = ModelSizes.of(container, Attention.of(container), config)
    total = sum(tensor.data.nbytes for tensor in container.tensors.values())
    assert sum(sizes.layers) + sizes.output + sizes.embeddings == total and len(sizes.layers) == 30
    # the embeddings make the logits, and nothing else does but a norm
    assert sizes.shared == container.tensors["token_embd.weight"].data.nbytes and sizes.output == 576 * 4
    assert sizes.cells == (3 * 64 * 2 * 2,) * 30 and not any(sizes.windows)


def test_layers_with_a_window(tmp_path: Path) -> None:
    """As llama.cpp has them where the file says nothing, a period, or a flag for each."""
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, "gemma3", n_layer=12)
    assert Attention.of(Container(path)).windowed == (True, True, True, True, True, False) * 2
    config = SessionConfig(budget=640, policy="snapkv", stride=128, n_ubatch=32)
    with Model(path) as model, Context(model, n_cells=768, n_ubatch=32) as context:
        estimate = MemoryEstimate.of(Container(path), config)
        assert estimate.host.cache(768) == pytest.approx(context.kv_bytes(), rel=0.03)


# what llama.cpp gets


def test_with_no_layer_elsewhere_there_is_no_device(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp takes memory of a device that it may use also where nothing is put there, and sends it large batches."""
    lib, seen = load().llama_cpp, []
    read, make = lib.llama_model_load_from_file, lib.llama_init_from_model

    def load_model(path: bytes, params: object) -> object:
        assert params.devices
        seen.append(model_module.ctypes.cast(params.devices, model_module.ctypes.POINTER(model_module.ctypes.c_void_p))[0])
        return read(path, params)

    def make_context(model: object, params: object) -> object:
        seen.append((params.op_offload, params.offload_kqv))
        return make(model, params)

    monkeypatch.setattr(lib, "llama_model_load_from_file", load_model)
    monkeypatch.setattr(lib, "llama_init_from_model", make_context)
    with Model(smollm2, n_gpu_layers=0) as model, Context(model, n_cells=256, n_ubatch=32):
        assert seen == [None, (False, True)]
    seen.clear()
    with Model(smollm2, placement=Placement(ALL, devices=("none",), kv_offload=False)) as model, Context(model, n_cells=256, n_ubatch=32):
        assert seen == [None, (True, False)]


def test_a_device_that_there_is_not(smollm2: Path) -> None:
    with pytest.raises(EngineError, match="there is no device CUDA77"):
        Model(smollm2, placement=Placement(ALL, devices=("CUDA77",)))


def test_split_and_placement_have_no_effect_on_the_cpu(three_layers: Path, tokens: np.ndarray) -> None:
    found = []
    for placement in (Placement(), Placement(ALL, devices=("none",), tensor_split=(3, 1), split_mode="row", main_gpu=0, kv_offload=False)):
        with Model(three_layers, placement=placement) as model, Context(model, n_cells=256, n_ubatch=32, n_threads=1) as context:
            context.decode(tokens[:32], 0)
            found.append(context.logits())
    assert np.array_equal(*found)


def test_the_processor_is_a_device() -> None:
    assert any(device.kind == "cpu" and device.name == "CPU" and device.memory_total for device in devices())


# what fits


def free(*sizes: int, host: int | None = None, integrated: bool = False) -> Free:
    return Free(host, sizes, (integrated,) * len(sizes), tuple(f"CUDA{i}" for i in range(len(sizes))))


def on_devices(smollm2: Path, n: int, room: Free, **changes: object) -> list[int]:
    config = SessionConfig(**changes)
    estimate = MemoryEstimate.of(Container(smollm2), config, placement=Placement(n), free=room)
    return estimate.total(memory_estimate.allocation(config, 8192).n_cells)


def test_as_many_layers_as_fit(smollm2: Path) -> None:
    config = SessionConfig(budget=4096)
    assert layers_that_fit(smollm2, config, Placement(), free=free()) == ALL == layers_that_fit(smollm2, config, Placement(), free=free(8 * G))
    left = memory_estimate._LEFT_FREE
    for n in (1, 7, 30):
        _, need = on_devices(smollm2, n, free(8 * G), budget=4096)
        assert layers_that_fit(smollm2, config, Placement(), free=free(need + left)) == n
        assert layers_that_fit(smollm2, config, Placement(), free=free(need + left - 1)) == n - 1
    # more cells leave room for fewer layers, and none of them for more
    room = free(on_devices(smollm2, 20, free(8 * G), budget=4096)[1] + left)
    assert layers_that_fit(smollm2, SessionConfig(budget=8000), Placement(), free=room) < 20
    assert layers_that_fit(smollm2, config, Placement(), parallel=4, free=room) < 20
    assert layers_that_fit(smollm2, config, Placement(kv_offload=False), free=room) == ALL
    assert layers_that_fit(smollm2, config, Placement(), free=free(10**6)) == 0 == layers_that_fit(smollm2, config, Placement(), free=free(0))
    # a device that does not tell what it has
    assert layers_that_fit(smollm2, config, Placement(), free=Free(None, (None,), (False,), ("X",))) == ALL


def test_two_devices_hold_more(smollm2: Path) -> None:
    config = SessionConfig(budget=4096)
    room = on_devices(smollm2, 10, free(8 * G), budget=4096)[1] + memory_estimate._LEFT_FREE
    n = layers_that_fit(smollm2, config, Placement(), free=free(room, room))
    assert 18 <= n <= 22
    _, *both = on_devices(smollm2, n, free(room, room), budget=4096)
    assert all(0 < need <= room for need in both)


def test_what_lies_elsewhere_is_not_counted_on_the_host(smollm2: Path) -> None:
    alone, = on_devices(smollm2, 0, free(), budget=4096)
    host, device = on_devices(smollm2, ALL, free(8 * G), budget=4096)
    weights = sum(tensor.data.nbytes for name, tensor in Container(smollm2).tensors.items() if name != "token_embd.weight")
    cells = 4352 * 23_040
    assert alone - host >= weights + cells and device >= weights + cells
    # unless its memory is the host's
    shared, same = on_devices(smollm2, ALL, free(8 * G, integrated=True), budget=4096)
    assert same == device and shared == host + device


def test_no_device_is_asked_where_all_is_on_the_cpu(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that says what memory it has takes some of it."""

    def asked(_: object) -> list[Device]:
        raise AssertionError("a device was asked")

    monkeypatch.setattr(devices_module, "devices", asked)
    check(smollm2, SessionConfig(), placement=Placement(0))
    assert device_without_attention("q8_0", "q8_0", n_head=9, n_head_kv=3, size_k=64, size_v=64, placement=Placement(0)) is None
    with Model(smollm2, placement=Placement(0)) as model:
        assert model.devices == []
    with pytest.raises(AssertionError, match="was asked"):
        check(smollm2, SessionConfig(), placement=Placement(1))


def test_too_little_on_a_device(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, placement = SessionConfig(budget=4096), Placement(ALL)
    _, need = on_devices(smollm2, ALL, free(8 * G), budget=4096)
    monkeypatch.setattr(memory_estimate, "available_memory", lambda: 64 * G)
    for size in (need, need - 1):
        card = replace(CUDA0, memory_free=size, memory_total=8 * G)
        monkeypatch.setattr(devices_module, "devices", lambda _, card=card: [card, CPU])
        if size == need:
            check(smollm2, config, placement=placement)
            continue
        with pytest.raises(OutOfMemory, match=r"of memory on CUDA0 and .* are free: give --kv-budget 3968 or less, or --gpu-layers 0$") as error:
            check(smollm2, config, placement=placement)
        check(smollm2, SessionConfig(budget=3968), placement=placement)
        check(smollm2, config, placement=Placement(0))
        assert "\n" not in str(error.value)
    # what a conversation gives back counts there, too, and the model is there already
    card = replace(CUDA0, memory_free=10**6, memory_total=8 * G)
    monkeypatch.setattr(devices_module, "devices", lambda _: [card, CPU])
    check(smollm2, config, placement=placement, instead_of=config)
    card = replace(CUDA0, memory_free=need + memory_estimate._LEFT_FREE - 1, memory_total=8 * G)
    monkeypatch.setattr(devices_module, "devices", lambda _: [card, CPU])
    check(smollm2, config, placement=placement)
    with pytest.raises(OutOfMemory, match="--gpu-layers auto, which is [0-9]+ here"):
        check(smollm2, SessionConfig(budget=8000), parallel=30, placement=placement)


# options


def asked(*words: str) -> Where:
    @click.command()
    @device_options
    def command(**others: object) -> None:
        click.echo(repr(take_devices(others)))

    result = CliRunner().invoke(command, words)
    assert result.exit_code == 0, result.output
    return eval(result.output, {"Where": Where, "Placement": Placement})


def test_the_options() -> None:
    assert asked() == Where(Placement(ALL), fits=True) == asked("--gpu-layers", AUTO)
    assert asked("--gpu-layers", "all") == asked("--gpu-layers", "-1") == Where(Placement(ALL))
    assert asked("--gpu-layers=0") == Where(Placement(0)) and not asked("--gpu-layers=0").uses_devices
    words = ("--device", "CUDA1, CUDA0", "--split-mode", "row", "--main-gpu", "1", "--tensor-split", "3/1", "--no-kv-offload", "--flash-attn", "on")
    assert asked("--gpu-layers=7", *words) == Where(Placement(7, ("CUDA1", "CUDA0"), 1, "row", (3.0, 1.0), kv_offload=False))


@pytest.mark.parametrize(("words", "said"), [
    (["--gpu-layers", "some"], "--gpu-layers"), (["--gpu-layers", "-2"], "--gpu-layers"), (["--main-gpu", "-1"], "--main-gpu"),
    (["--tensor-split", "0,0"], "not all 0"), (["--tensor-split", "a"], "no list of numbers"), (["--device", ""], "name each once"),
    (["--device", "none,CUDA0"], "name each once"), (["--split-mode", "tensor"], "--split-mode"), (["--flash-attn", "off"], "leave it at auto"),
    (["--flash-attn", "off", "--ctv", "q8_0"], "leave it at auto"),
])  # fmt: skip
def test_wrong_usage(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["run", *words, "Hello"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and said in result.stderr


@pytest.mark.parametrize(
    "command", [["run", "Hello"], ["chat"], ["eval", "recall"], ["batch", "-"], ["serve", "--port", "0"]], ids=lambda words: words[0]
)
def test_the_commands_refuse_a_device_that_there_is_not(smollm2: Path, command: list[str]) -> None:
    result = CliRunner().invoke(main, [*command, "-m", str(smollm2), "--device", "CUDA77"], input="Hello\n")
    assert result.exit_code == 1 and "there is no device CUDA77" in result.stderr and "Traceback" not in result.stderr


def test_variables_and_the_config_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("[conversation]\ngpu-layers = 0\nno-kv-offload = true\ntensor-split = '2,1'\nflash-attn = true\n")
    monkeypatch.setenv("KVLOCAL_CONFIG", str(config))
    monkeypatch.setenv("KVLOCAL_DEVICE", "none")
    result = CliRunner().invoke(main, ["run", "--json", "--threads", "1", "--max-tokens", "1", "Hello"])
    used = json.loads(result.stdout)["settings"]
    assert (used["gpu_layers"], used["devices"], used["kv_offload"], used["tensor_split"]) == (0, ["none"], False, [2.0, 1.0])
    config.write_text("[conversation]\nflash-attn = false\n")
    assert "leave it at auto" in CliRunner().invoke(main, ["run", "Hello"]).stderr


def test_the_arguments_of_llama_cpp_python() -> None:
    def of(**changes: object) -> Placement:
        return placement_of(**{"n_gpu_layers": -1, "main_gpu": 0, "split_mode": 1, "tensor_split": None, "offload_kqv": True} | changes)

    assert of() == Placement(ALL)
    found = of(n_gpu_layers=5, main_gpu=1, split_mode=0, tensor_split=[0.5, 1], offload_kqv=False)
    assert found == Placement(5, None, 1, "none", (0.5, 1), kv_offload=False)
    with pytest.raises(NotSupported, match="split_mode 3"):
        of(split_mode=3)
