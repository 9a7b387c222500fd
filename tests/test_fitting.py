"""What does not go together with a model is refused from its file alone, and memory becomes cells and types."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys

import device
import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGUFWriter
from tiny_model import HEAD, write_tiny_model

from kvlocal.batch.run import run_batch
from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.config import CacheConfig, CacheError
from kvlocal.cache.fitting import check_file, fitted
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.gguf.attention import Attention
from kvlocal.gguf.container import Container
from kvlocal.llama.cache_types import device_without_attention
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import KV_TYPES, Context
from kvlocal.llama.errors import NativeError
from kvlocal.llama.model import Model
from kvlocal.llama.placement import Placement
from kvlocal_cli.main import main
from kvlocal_cli.options import SizeInBytes

CPU = Placement()
RECALL = {"policy": "recall", "archive": "ram"}


def write_header(path, family="llama", *, head=64, sinks=0):
    """A file that says what a model is and has no weights, so that nothing can be done with it but to read that."""
    writer = GGUFWriter(path, family)
    writer.add_context_length(4096)
    writer.add_embedding_length(8 * head)
    writer.add_block_count(4)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    for i in range(sinks):
        writer.add_tensor(f"blk.{i}.attn_sinks.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(path, **changes):
    with pytest.raises(CacheError) as error:
        check_file(path, SessionConfig(**changes), device.placement())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_goes_together_is_not_refused(smollm2, tmp_path):
    for kind in KV_TYPES:
        if kind in ("f16", "f32") or device.on_cpu():
            check_file(smollm2, SessionConfig(type_k=kind, type_v=kind), device.placement())
    check_file(smollm2, SessionConfig(**RECALL), device.placement())
    # of what does not say what it is llama.cpp complains
    writer = GGUFWriter(tmp_path / "nothing.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    check_file(tmp_path / "nothing.gguf", SessionConfig(**RECALL, type_k="q8_0"), device.placement())


@pytest.mark.parametrize("changes", [
    {"block_count": 2**32 - 1}, {"block_count": 0}, {"attention.head_count": 0}, {"attention.head_count": "many"}, {"embedding_length": 3},
    {"attention.key_length": 2**31}, {"attention.value_length": 0}, {"context_length": 0}, {"attention.head_count_kv": [1, 2, 3]},
    {"attention.head_count_kv": [-1, 1, 1, 1]}, {"attention.head_count_kv": 3},
], ids=str)  # fmt: skip
def test_files_that_say_nonsense_end_nothing(tmp_path, changes):
    """What is wrong with them is said by whoever loads them; some are refused here."""
    values = {"context_length": 4096, "embedding_length": 512, "block_count": 4, "attention.head_count": 8, "attention.head_count_kv": 2} | changes
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    for name, value in values.items():
        add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}[type(value)]
        add(f"llama.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    for config in (SessionConfig(type_k="q8_0", type_v="q4_0"), SessionConfig(memory=10**8, type_k="auto", type_v="auto"), SessionConfig(**RECALL)):
        try:
            check_file(tmp_path / "odd.gguf", config, Placement(-1))
        except CacheError as error:
            assert "\n" not in str(error)


def test_types_that_do_not_fit_the_heads(tmp_path):
    path = write_header(tmp_path / "phi.gguf", head=80)
    check_file(path, SessionConfig(), device.placement())
    assert "the keys of phi.gguf have 80 numbers" in refused(path, type_k="q4_0") and "--ctk f16" in refused(path, type_k="q4_0")
    assert "the values of phi.gguf" in refused(path, type_v="iq4_nl") and "--ctv f16" in refused(path, type_v="iq4_nl")
    tiny = tmp_path / "tiny.gguf"
    write_tiny_model(tiny, "llama")
    assert f"{HEAD} numbers" in refused(tiny, type_k="q8_0")
    for kind in KV_TYPES:
        if kind in ("f16", "f32"):
            check_file(path, SessionConfig(**RECALL, archive_type=kind), device.placement())
            continue
        said = refused(path, **RECALL, archive_type=kind)
        assert f"the keys of phi.gguf have 80 numbers in each head, which is no multiple of the 32 that {kind}" in said
        assert "--archive-type f16" in said
        check_file(path, SessionConfig(archive="off", archive_type=kind), device.placement())


def test_an_archive_that_a_model_cannot_have(tmp_path):
    for path in (write_header(tmp_path / "capped.gguf", "gemma2"), write_header(tmp_path / "sinks.gguf", "gpt-oss", sinks=4)):
        assert "soft cap or attention sinks" in refused(path, **RECALL)
        check_file(path, SessionConfig(archive="off"), device.placement())
    # where some layers are plain the engine decides
    check_file(write_header(tmp_path / "some.gguf", "gpt-oss", sinks=2), SessionConfig(**RECALL), device.placement())


@pytest.mark.parametrize("option", [("--archive-ram", "100"), ("--archive-type", "f16"), ("--archive-dir", "."), ("--archive", "ram")])
def test_an_archive_that_was_asked_for_is_not_left_out_in_silence(tmp_path, option):
    path = write_header(tmp_path / "capped.gguf", "gemma2")
    result = CliRunner().invoke(main, ["run", str(path), "Hello", *option])
    assert result.exit_code == 1 and "cannot recall from an archive: give --archive off" in result.stderr
    # without, another policy is the default, and the file is found to lack its tensors
    assert "recall" not in CliRunner().invoke(main, ["run", str(path), "Hello"]).stderr


def test_a_budget_beyond_the_trained_context(tmp_path):
    path = write_header(tmp_path / "short.gguf")
    assert "give at most 3968" in refused(path, budget=4096)
    check_file(path, SessionConfig(budget=3968), device.placement())


@pytest.mark.parametrize(("options", "said"), [
    (["--ctk", "q8_0"], "80 numbers in each head"),
    (["--kv-budget", "9999"], "give at most 3968"),
    (["--kv-memory", "1k"], "give at least"),
])  # fmt: skip
@pytest.mark.parametrize("command", [["run"], ["chat", "--no-transcript"], ["batch", "-"]], ids=lambda words: words[0])
def test_the_commands_say_it_before_they_load_the_model(tmp_path, command, options, said):
    path = str(write_header(tmp_path / "phi.gguf", head=80))
    words = [*command, "-m", path] if command[0] == "batch" else [command[0], path, *command[1:], *(["Hello"] if command[0] == "run" else [])]
    result = CliRunner().invoke(main, [*words, *options], input="Hello\n")
    assert result.exit_code == 1 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("kvlocal: ") and result.stderr.count("\n") == 1 and said in result.stderr
    # with nothing wrong it goes on to what is wrong with the file
    assert said not in CliRunner().invoke(main, words, input="Hello\n").stderr


def test_eval_and_bench_say_it_too(tmp_path):
    path = str(write_header(tmp_path / "phi.gguf", head=80))
    for words in (["eval", "recall", "--questions", "1"], ["bench", "--stock", str(tmp_path)]):
        result = CliRunner().invoke(main, [*words, "-m", path, "--ctv", "q4_0"])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1 and "the values of phi.gguf" in result.stderr, words


def test_devices_answer_before_there_is_a_model_as_they_do_later(smollm2):
    attention = Attention.of(Container(smollm2))
    with Model(smollm2) as model:
        for type_k, type_v in itertools.product(KV_TYPES, KV_TYPES):
            lacking = device_without_attention(
                type_k, type_v, n_head=attention.n_head, n_head_kv=attention.n_head_kv, size_k=attention.size_k, size_v=attention.size_v,
                placement=model.placement,
            )  # fmt: skip
            with Context(model, n_cells=256, n_ubatch=8, type_k=type_k, type_v=type_v) as context:
                try:
                    NativeCache(context.pointer).layout()
                    assert lacking is None, (type_k, type_v, lacking)
                except NativeError as error:
                    assert lacking is not None and f"the device {lacking} has no attention" in str(error)


def test_shapes_that_would_end_the_process_are_nobodys_fault():
    shape = {"n_head": 8, "n_head_kv": 2, "size_k": 64, "size_v": 64, "placement": CPU}
    for changes in ({"n_head_kv": 3}, {"n_head": 0}, {"size_k": 80}, {"size_v": 0}, {"n_head_kv": 0}, {"size_v": -32}):
        assert device_without_attention("q8_0", "q8_0", **shape | changes) is None


# memory


def test_memory_becomes_the_most_cells_that_fit(smollm2):
    config = SessionConfig(memory=20_000_000, type_k="auto", type_v="auto", n_threads=1)
    with Model(smollm2) as model, ChatSession(model, config) as chat:
        used, kept = chat.cache.context.kv_bytes(), chat.config
        assert (kept.type_k, kept.type_v, kept.memory) == ("q8_0", "q8_0", None)
        assert kept.budget == chat.kv.budget == 1536 - kept.slack and chat.kv.capacity == 1536
        # llama.cpp tells sizes in hundredths of a MiB
        assert used <= 20_000_000 * 1.001 and used / 1536 * (1536 + 256) > 20_000_000
        with ChatSession(model, SessionConfig(memory=20_000_000, n_threads=1)) as other:
            assert other.config.type_k == "f16" and other.kv.capacity == 768 and other.cache.context.kv_bytes() <= 20_000_000 * 1.001
        with BudgetedCache(model, CacheConfig(memory=20_000_000, policy="full", n_threads=1)) as cache:
            assert cache.budget == cache.capacity == 768


def test_types_that_memory_chooses(smollm2, tmp_path):
    def types(path, **changes):
        config = fitted(path, SessionConfig(**{"type_k": "auto", "type_v": "auto"} | changes), device.placement())
        return config.type_k, config.type_v, config.budget + config.slack

    # all that the model was trained for: 8192 cells of 23,040 bytes
    assert types(smollm2, memory=8192 * 23_040) == ("f16", "f16", 8192)
    assert types(smollm2, memory=8192 * 23_040 - 1) == ("q8_0", "q8_0", 8192)
    assert types(smollm2, memory=10**12) == ("f16", "f16", 8192)
    # what is given stays
    assert types(smollm2, memory=10**7, type_k="q4_0")[:2] == ("q4_0", "q8_0")
    assert types(smollm2, memory=10**7, type_v="f32")[:2] == ("q8_0", "f32")
    assert types(smollm2, memory=10**7, type_k="f16", type_v="f16")[:2] == ("f16", "f16")
    # heads that no other type fits
    assert types(write_header(tmp_path / "phi.gguf", head=80), memory=10**6)[:2] == ("f16", "f16")
    assert fitted(smollm2, SessionConfig(budget=512), CPU) == SessionConfig(budget=512)


def test_memory_that_holds_too_little(smollm2):
    config = {"type_k": "q8_0", "type_v": "q8_0"}
    message = refused(smollm2, memory=1000, **config)
    least = float(message.rpartition("give at least ")[2].removesuffix(" MB"))
    assert fitted(smollm2, SessionConfig(memory=int(least * 10**6) + 10**5, **config), CPU).budget == 256 - 128
    assert "give at least" in refused(smollm2, memory=int(least * 10**6) - 10**5, **config)
    with pytest.raises(CacheError, match="leave one of them out"):
        SessionConfig(memory=10**8, budget=512)
    with pytest.raises(CacheError, match="needs memory"):
        SessionConfig(type_k="auto")


def test_memory_of_a_model_that_does_not_say_what_a_cell_takes(tmp_path):
    path = write_header(tmp_path / "odd.gguf")
    odd = path.read_bytes().replace(b"llama.block_count", b"llama.block_cuont")
    path.write_bytes(odd)
    with pytest.raises(CacheError, match="give a budget of cells"):
        fitted(path, SessionConfig(memory=10**8), CPU)
    check_file(path, SessionConfig(), CPU)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("200M", 200 * 10**6), ("1.5G", 1_500_000_000), ("64MiB", 64 * 2**20), ("512 kb", 512_000), ("1000", 1000), (".5g", 5 * 10**8), ("7B", 7)],
)
def test_sizes(text, n_bytes):
    assert SizeInBytes().convert(text, None, None) == n_bytes


@pytest.mark.parametrize("text", ["", "M", "-5M", "5X", "nan", "1e6", "0", "0.1", "5iB", "999999999T", "٣M"])
def test_what_is_no_size_is_wrong_usage(text):
    result = CliRunner().invoke(main, ["run", "--kv-memory", text, "Hello"])
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and "--kv-memory" in result.stderr and "memory" in result.stderr


def test_a_budget_and_memory_are_wrong_usage():
    result = CliRunner().invoke(main, ["chat", "--kv-memory", "20M", "--kv-budget", "64"])
    assert result.exit_code == 2 and "give one of them" in result.stderr and result.stderr.count("\n") == 1


def test_the_commands_take_memory(smollm2, tmp_path):
    def run(*words, stdin):
        env = {**os.environ, "KVLOCAL_STATE_DIR": str(tmp_path)}
        options = ["--kv-memory", "20M", "--threads", "1", "--temp", "0", "--max-tokens", "4", "--nexus", "off", "--read-stride", "128"]
        done = subprocess.run([sys.executable, "-m", "kvlocal_cli", *words, *options], input=stdin, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout

    assert json.loads(run("run", str(smollm2), "--json", stdin="Hello"))["kv"]["budget"] == 1408
    shown = run("chat", str(smollm2), stdin="/set\n/set kv-budget 512\n/set\n")
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("kv-budget")] == ["1408", "512"]
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("ctk")] == ["q8_0", "q8_0"]


def test_a_line_of_a_batch_with_a_budget_of_its_own(smollm2):
    config = SessionConfig(memory=10**7, type_k="auto", type_v="auto", n_threads=1, max_tokens=2, policy="snapkv")
    lines = [json.dumps({"messages": [{"role": "user", "content": "Hi"}]} | own).encode() for own in ({}, {"kv_budget": 96})]
    with Model(smollm2) as model:
        results = list(run_batch(lines, model, config, ordered=True))
    assert [result.kv["budget"] for result in results] == [768 - (128 if device.on_cpu() else 256), 96]


def test_a_sliding_window_is_counted_as_if_it_were_none(tmp_path):
    write_tiny_model(tmp_path / "tiny.gguf", "gemma3", n_layer=12)
    cell = 12 * 2 * (HEAD + HEAD) * 2
    with Model(tmp_path / "tiny.gguf") as tiny, BudgetedCache(tiny, CacheConfig(memory=512 * cell, policy="snapkv", stride=32)) as cache:
        assert cache.capacity == 512 and 0 < cache.context.kv_bytes() <= 512 * cell * 1.01


@pytest.mark.device
def test_devices_have_more_room_for_a_text_that_is_read(smollm2):
    """Of the cells there are a third, at most 512; the CPU has a stride, as it is for an answer."""

    def read_stride(**changes):
        return fitted(smollm2, CacheConfig(**changes), device.placement()).slack

    if device.on_cpu():
        assert fitted(smollm2, CacheConfig(), device.placement()) == CacheConfig()
        return
    cases = ({}, {"budget": 4096}, {"budget": 512}, {"budget": 300}, {"ratio": 0.8}, {"memory": 768 * 23_040}, {"memory": 512 * 23_040})
    assert [read_stride(**case) for case in cases] == [512, 512, 256, 128, 512, 256, 128]
    # what is said, what the trained context leaves, and what no device computes
    assert [read_stride(**case) for case in ({"read_stride": 128}, {"stride": 600}, {"budget": 8064})] == [128, 600, 128]
    assert fitted(smollm2, CacheConfig(policy="full"), device.placement()).read_stride is None
    here = dataclasses.replace(device.placement(), kv_offload=False)
    assert fitted(smollm2, CacheConfig(), here).read_stride is None
