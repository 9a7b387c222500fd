"""A decode that fails in the middle of an answer: it is told in a sentence, and what was said is kept."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from doors import write_chat_model
from lost_device import LosableDevice

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.named_sessions import session_path
from kvlocal.conversations.saved_chat import load
from kvlocal.errors import KvlocalError
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load as load_library
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal_cli.main import main

pytestmark = pytest.mark.device

CONFIG = SessionConfig(budget=64, stride=16, n_ubatch=32, max_tokens=24, n_threads=1, sampling=SamplingParams(temperature=0))
OPTIONS = ("--kv-budget", "64", "--stride", "16", "--threads", "1", "--temp", "0", "--max-tokens", "24")
QUESTIONS = ("The keeper wrote down the birds.", "Who wrote down what?", "And when?")


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    found = tmp_path_factory.mktemp("model") / "tiny.gguf"
    write_chat_model(found, family=request.param, n_layer=6)
    return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LosableDevice:
    return LosableDevice(monkeypatch)


def check_agreement(session: ChatSession) -> None:
    ledger = session.cache.ledger
    assert session.cache.native.n_cells() == ledger.n_cells and session.cache.context.pos_max(0) == ledger.next_position - 1


# a token, and the compression after one
@pytest.mark.parametrize("left", [1, 6, 7])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_session_goes_on(path: Path, device: LosableDevice, left: int, comes_back: bool) -> None:
    with Model(path) as model, ChatSession(model, CONFIG) as session:
        for question in QUESTIONS[:2]:
            "".join(session.send(question))
        before = [dict(message) for message in session.messages]
        pieces = session.send(QUESTIONS[2])
        device.left = left
        with pytest.raises(KvlocalError) as told:
            list(pieces)
        assert "\n" not in str(told.value)
        shown = session.messages[-1]["content"]
        assert session.messages[:-2] == before and session.messages[-2]["content"] == QUESTIONS[2]
        if not comes_back:
            with pytest.raises(KvlocalError):
                "".join(session.send("Still there?"))
            assert session.messages[:-1] == [*before, {"role": "user", "content": QUESTIONS[2]}]
        device.left = None
        "".join(session.send("Now?"))
        assert [message["content"] for message in session.messages[len(before) + 1 :]][:2] == [shown, "Now?"]
        check_agreement(session)
        session.add_turn("user", "And now?")
        assert np.isfinite(session.cache.context.logits()).all()


def test_a_refused_batch(path: Path) -> None:
    """llama.cpp finds that the cache is not what it was: a hole in front of the next token."""
    with Model(path) as model, ChatSession(model, CONFIG) as session:
        pieces = session.send(QUESTIONS[0])
        shown = next(pieces)
        load_library().llama_cpp.llama_memory_seq_rm(session.cache.context.memory, 0, session.cache.ledger.next_position - 1, -1)
        with pytest.raises(EngineError, match="refused the batch"):
            list(pieces)
        check_agreement(session)
        assert session.messages[-1]["content"].startswith(shown)


def invoke(*arguments: object, lines: Sequence[str] = ()) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), *OPTIONS], input="\n".join(lines))


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def test_a_chat_keeps_what_was_shown(path: Path, device: LosableDevice, state: Path) -> None:
    device.left = 12
    done = invoke("chat", path, "--session", "one", lines=QUESTIONS)
    assert done.exit_code == 1 and all(line.startswith("kvlocal: ") for line in done.stderr.splitlines())
    assert "decoding was aborted" in done.stderr and done.stderr.count("\n") <= 2 * len(QUESTIONS)
    kept = session_path("one")
    asked, answer = load(kept).messages
    assert asked["content"] == QUESTIONS[0] and answer["content"] and done.stdout.startswith(answer["content"])
    assert '"reason": "error"' in kept.read_text(encoding="utf-8")
    device.left = None
    assert invoke("chat", path, "--session", "one", lines=["And now?"]).exit_code == 0
    assert [message["content"] for message in load(kept).messages[:3]] == [QUESTIONS[0], answer["content"], "And now?"]


def test_a_run_shows_what_there_is(path: Path, device: LosableDevice) -> None:
    device.left = 12
    done = invoke("run", path, QUESTIONS[0])
    assert done.exit_code == 1 and len(done.stdout) > 1 and done.stdout.endswith("\n")
    assert done.stderr.startswith("kvlocal: decoding was aborted") and done.stderr.count("\n") == 1


def test_a_batch_writes_a_record_for_each_line(path: Path, device: LosableDevice, tmp_path: Path) -> None:
    """Also for those that were not begun; nothing waits for what will not come."""
    device.left = 12
    jobs, results = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs.write_text("".join(json.dumps({"id": question, "messages": [{"role": "user", "content": question}]}) + "\n" for question in QUESTIONS))
    done = invoke("batch", jobs, "-o", results, "--ordered", "--model", path, "--parallel", 2)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert done.exit_code == 1 and [record["id"] for record in records] == list(QUESTIONS)
    assert all(record["error"] and "\n" not in record["error"] for record in records)
