"""Layers on other machines: what is computed there, that nothing of ours gets there, and servers that are lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import device
import numpy as np
import pytest
from click.testing import CliRunner
from rpc_process import RpcServer, free_port, ggml_attention
from serving_process import OPTIONS as SERVER_OPTIONS
from serving_process import ServerProcess

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.named_sessions import session_path
from kvlocal.conversations.saved_chat import load
from kvlocal.errors import KvlocalError
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.rpc import servers_of
from kvlocal.llama.sampling import SamplingParams
from kvlocal.policies.recall import Recall
from kvlocal_cli.main import main

pytestmark = pytest.mark.skipif(not device.on_cpu(), reason="has servers of its own")

CONFIG = SessionConfig(budget=64, stride=16, n_ubatch=32, max_tokens=8, n_threads=1, sampling=SamplingParams(temperature=0), archive="ram")
OPTIONS = ("--kv-budget", "64", "--stride", "16", "--threads", "1", "--temp", "0", "--archive", "ram")
QUESTIONS = (
    "The keeper of the lighthouse wrote down every bird that flew by, and the hour at which it did.",
    "In the third year of it a storm took the roof, and the book lay in the rain.",
    "Who wrote down what?",
    "And when was the storm?",
)


@pytest.fixture(scope="module")
def servers() -> Iterator[list[RpcServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(RpcServer()) for _ in range(2)]


def addresses(servers: list[RpcServer]) -> tuple[str, ...]:
    return tuple(server.address for server in servers)


def answers(session: ChatSession) -> list[str]:
    return ["".join(session.send(question)) for question in QUESTIONS]


def remote(path: Path, servers: list[RpcServer]) -> Model:
    return Model(path, placement=Placement(ALL, rpc=addresses(servers)))


@pytest.mark.parametrize("n_servers", [1, 2])
@pytest.mark.parametrize("options", [{}, {"policy": "rkv", "archive": "off"}, {"positions": "cache", "archive": "off", "policy": "snapkv"}])
def test_answers_are_those_of_this_machine(three_layers: Path, servers: list[RpcServer], n_servers: int, options: dict[str, str]) -> None:
    """With recall, and with compression alone, whose kept keys move in one case."""
    config = replace(CONFIG, **options)
    with ggml_attention(), Model(three_layers) as model, ChatSession(model, config) as session:
        # as where the cells are on a device
        session.cache.compressor.late = Recall().late
        expected = answers(session)
        cells = session.cache.native.positions()
    with remote(three_layers, servers[:n_servers]) as model, ChatSession(model, config) as session:
        assert answers(session) == expected
        assert session.cache.compressor.compressions and np.array_equal(session.cache.native.positions(), cells)
        assert tuple(device.description for device in model.devices) == addresses(servers[:n_servers])


# all but the first layer there, with its cache; and the cells of all layers here, though the weights are there
@pytest.mark.parametrize("n_gpu_layers, kv_offload", [(3, True), (-1, False)])
def test_nothing_of_ours_is_sent_there(three_layers: Path, servers: list[RpcServer], n_gpu_layers: int, kv_offload: bool) -> None:
    """Our own operations are functions of this process: a server that got one would jump to an address of ours."""
    tokens = np.random.default_rng(1).integers(100, 40000, 96)
    found = []
    for placement in (Placement(), Placement(n_gpu_layers, kv_offload=kv_offload, rpc=addresses(servers[:1]))):
        with (
            Model(three_layers, placement=placement) as model,
            Context(model, n_cells=256, n_ubatch=32, n_threads=1, n_recorded=16) as context,
        ):
            native = NativeCache(context.pointer)
            for i in range(0, 96, 32):
                context.decode(tokens[i : i + 32], i)
            for i in range(8):
                context.decode([tokens[i]], 96 + i)
            scores, redundancy = native.scores(), native.redundancy()
            keep = np.sort(np.argsort(scores.mean((0, 1)))[-64:])
            for kept in (keep, np.arange(64)):  # after which nothing moves
                native.compact(np.broadcast_to(kept, (*scores.shape[:2], 64)).astype(np.int32), np.arange(64, dtype=np.int32))
            context.decode([5], 64)
            found.append((scores, redundancy, context.logits()))
    # ggml's attention adds half precision values up in half precision, which ours does not
    for mine, theirs, atol in zip(*found, (5e-4, 1e-4, 2e-2), strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=atol)
    assert all(server.running for server in servers)


def test_several_at_once(three_layers: Path, servers: list[RpcServer]) -> None:
    """A server has more than one client, which llama.cpp's own lets wait without a word."""
    with remote(three_layers, servers[:1]):
        command = [sys.executable, "-m", "kvlocal_cli", "run", str(three_layers), "Hello", *OPTIONS, "--max-tokens", "4", "--rpc", servers[0].address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr


def test_a_server_that_is_lost(three_layers: Path) -> None:
    """In the middle of an answer: an error, the words that were said, and no other answer before it is back."""
    config = replace(CONFIG, max_tokens=64)
    with RpcServer() as server, remote(three_layers, [server]) as model, ChatSession(model, config) as session:
        session.max_tokens = 4
        before = "".join(session.send(QUESTIONS[0]))
        session.max_tokens = 64
        pieces = session.send("Go on.")
        shown = next(pieces)
        server.end(signal.SIGKILL)
        with pytest.raises(KvlocalError, match=f"the RPC server {server.address} is lost") as told:
            for piece in pieces:
                shown += piece
        assert "\n" not in str(told.value)
        assert session.messages[1]["content"] == before and session.messages[-1]["content"] == shown
        with pytest.raises(KvlocalError, match="is lost"):
            "".join(session.send("Still there?"))
        # what computes with the cells says so too, and what it gave is not used
        for compute in (session.cache.native.redundancy, lambda: session.cache.context.state_get(0)):
            with pytest.raises(KvlocalError):
                compute()
    with RpcServer(port=server.port) as again, remote(three_layers, [again]) as model, ChatSession(model, config) as session:
        session.max_tokens = 4
        assert "".join(session.send(QUESTIONS[0])) == before


def test_a_server_that_is_lost_before_the_first_word(three_layers: Path) -> None:
    """Graphs are made ready at the first decode, for which there is no memory then, nor for those after it."""
    with RpcServer() as server, remote(three_layers, [server]) as model:
        with ChatSession(model, CONFIG) as session, Context(model, n_cells=256, n_ubatch=32, n_seq_max=2, n_recorded=8) as context:
            server.end(signal.SIGKILL)
            for _ in range(2):
                with pytest.raises(KvlocalError, match="is lost"):
                    "".join(session.send(QUESTIONS[0]))
                with pytest.raises(KvlocalError, match="is lost"):
                    context.decode([5, 6], 0, seq=1)
        with pytest.raises(EngineError, match="is lost"):
            Context(model, n_cells=256)


def test_a_lost_server_gives_no_scores(three_layers: Path) -> None:
    """They are read after the graph has been sent, which nobody answers."""
    with RpcServer() as server, remote(three_layers, [server]) as model, Context(model, n_cells=256, n_ubatch=32, n_recorded=8) as context:
        native = NativeCache(context.pointer)
        context.decode(np.arange(100, 132), 0)
        native.scores()
        server.end(signal.SIGKILL)
        for compute in (native.scores, native.redundancy, native.ring_state, lambda: context.state_get(0), lambda: context.decode([5], 32)):
            with pytest.raises(KvlocalError, match="is lost"):
                compute()


def test_a_chat_keeps_what_was_said(three_layers: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with RpcServer() as server:
        command = [sys.executable, "-m", "kvlocal_cli", "chat", str(three_layers), "--session", "one", *OPTIONS, "--max-tokens", "4000",
                   "--rpc", server.address]  # fmt: skip
        chat = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert chat.stdin and chat.stdout and chat.stderr
        chat.stdin.write(QUESTIONS[0] + "\n")
        chat.stdin.flush()
        shown = chat.stdout.read(40)
        server.end(signal.SIGKILL)
        chat.stdin.close()
        shown, said = shown + chat.stdout.read(), chat.stderr.read()
        assert chat.wait(60) == 1
    lost = f"the RPC server {server.address} is lost"
    assert said.startswith(f"kvlocal: {lost}") and all(line.startswith("kvlocal: ") and lost in line for line in said.splitlines())
    asked, answer = load(session_path("one")).messages
    assert asked["content"] == QUESTIONS[0] and shown.startswith(answer["content"]) and len(answer["content"]) >= 40
    with RpcServer(port=server.port):
        done = subprocess.run([*command[:-3], "4", *command[-2:]], input="And now?\n", capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert [message["content"] for message in load(session_path("one")).messages[:3]] == [QUESTIONS[0], answer["content"], "And now?"]


def test_no_server(three_layers: Path) -> None:
    done = CliRunner().invoke(main, ["chat", str(three_layers), "--rpc", f"127.0.0.1:{free_port()}"], input="Hello\n")
    assert done.exit_code == 1 and not done.stdout
    assert done.stderr.count("\n") == 1 and "start `kvlocal rpc-server` there" in done.stderr


def test_something_else_than_a_server(three_layers: Path) -> None:
    """It takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = CliRunner().invoke(main, ["run", str(three_layers), "Hello", "--rpc", f"127.0.0.1:{other.getsockname()[1]}"])
        assert done.exit_code == 1 and "no RPC server" in done.stderr and done.stderr.count("\n") == 1


def test_names_of_servers() -> None:
    assert servers_of("one, 10.0.0.2:99") == ("one:50052", "10.0.0.2:99")
    for wrong in ("", "one:", ":5", "one:0", "one:70000", "a:1,", "[::1]:5", "a b:1", "one:1,one:1", "one:-1", "one:٣"):
        with pytest.raises(EngineError):
            servers_of(wrong)


@pytest.mark.parametrize("options", [("--rpc", "nowhere:"), ("--gpu-layers", "0", "--rpc", "127.0.0.1:1")])
def test_wrong_options(three_layers: Path, options: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, ["run", str(three_layers), "Hello", *options])
    assert done.exit_code and not done.stdout and done.stderr.count("\n") == 1, done.stderr


def test_variable(three_layers: Path, servers: list[RpcServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """KVLOCAL_RPC is for all commands that hold a conversation; --gpu-layers 0 on the command line says that this one is to be here."""
    monkeypatch.setenv("KVLOCAL_RPC", servers[1].address)
    for options, rpc in (((), [servers[1].address]), (("--gpu-layers", "0"), [])):
        done = CliRunner().invoke(main, ["run", str(three_layers), "Hello", *OPTIONS, "--max-tokens", "2", "--json", *options])
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["settings"]["rpc"] == rpc


def test_a_batch(three_layers: Path, servers: list[RpcServer], tmp_path: Path) -> None:
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text("".join(json.dumps({"id": question, "messages": [{"role": "user", "content": question}]}) + "\n" for question in QUESTIONS))
    command = ["batch", str(jobs), "--model", str(three_layers), "--ordered", "--parallel", "2", *OPTIONS, "--max-tokens", "8"]
    found = []
    for name, options in (("here", ()), ("there", ("--rpc", servers[0].address))):
        done = CliRunner().invoke(main, [*command, "-o", str(tmp_path / name), *options])
        assert done.exit_code == 0, done.stderr
        found.append([json.loads(line)["messages"][-1]["content"] for line in (tmp_path / name).read_text().splitlines()])
    assert len(found[0]) == len(QUESTIONS) and found[0] == found[1]


def test_requests_to_a_server_whose_layers_are_lost(three_layers: Path) -> None:
    """Each of them is answered, with the sentence; the process is alive, and ends when it is told to."""
    request = {"model": "m", "messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 4}
    with RpcServer() as layers, ServerProcess(three_layers, *SERVER_OPTIONS, "--rpc", layers.address) as server:
        assert server.post("/v1/chat/completions", request).status == 200
        layers.end(signal.SIGKILL)
        for _ in range(2):
            answer = server.post("/v1/chat/completions", request)
            assert answer.status == 500 and f"the RPC server {layers.address} is lost" in answer.error["message"]
        assert server.running and server.end() == 0, server.log


def test_the_doctor_asks_them(three_layers: Path, servers: list[RpcServer]) -> None:
    done = CliRunner().invoke(main, ["doctor", str(three_layers), "--rpc", ",".join(addresses(servers))])
    assert done.exit_code == 0, done.stdout
    assert all(f"RPC server {address}" in done.stdout for address in addresses(servers))
    # and what the model takes there
    assert done.stdout.count("memory on RPC") == len(servers), done.stdout
    # beside the cells for a text that is read there
    assert f"{8192 - 512:,} cells" in done.stdout
    done = CliRunner().invoke(main, ["doctor", str(three_layers), "--rpc", f"127.0.0.1:{free_port()}"])
    assert done.exit_code == 1 and done.stdout.count("no RPC server") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends(number: int) -> None:
    with RpcServer() as server:
        said = server.end(number)
        assert server.exit_code == -number and said.startswith("kvlocal: an RPC server at 127.0.0.1:") and said.count("\n") == 1


def test_a_port_that_is_taken(servers: list[RpcServer]) -> None:
    command = [sys.executable, "-m", "kvlocal_cli", "rpc-server", "--port", str(servers[0].port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 1 and "nothing can listen" in done.stderr and "Traceback" not in done.stderr
