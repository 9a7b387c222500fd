"""Nexus tokens in a conversation: where they come, what they leave alone, which of them stay."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from random_nexus import K, nexus_file
from test_recall import check

from kvlocal.batch.run import run_batch
from kvlocal.cache.ledger import NEXUS
from kvlocal.chat.config import SessionConfig, SessionError
from kvlocal.chat.session import ChatSession
from kvlocal.llama.errors import EngineError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.discovery import nexus_for
from kvlocal.nexus.file import NexusError, NexusFile, WrongBase
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.policies import make
from kvlocal.policies.base import CacheState
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest
from kvlocal_cli.main import main

CONFIG = SessionConfig(
    budget=192, stride=32, n_ubatch=64, n_threads=1, policy="hybrid", system="Be brief.", max_tokens=12,
    sampling=SamplingParams(temperature=0.0),
)
STORY = "The keeper wrote down the weather, then walked to the harbour to count the ships. "


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def path(short_smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("nexus") / "test.nexus.gguf"
    nexus_file(short_smollm2).save(path)
    return path


@pytest.fixture(scope="module")
def nexus(model, path):
    return NexusTokens(model, path)


def session(model, nexus, **fields):
    return ChatSession(model, dataclasses.replace(CONFIG, **fields), nexus=nexus)


def roles(chat):
    return [segment.role for segment in chat.segments()]


def test_every_finished_turn_gets_its_tokens(model, nexus):
    """Behind the markup that closes an answer, in every head, as many as the segment's length and the ratio ask for."""
    with session(model, nexus, ratio=0.5, policy_args={"share": 0.2}) as chat:
        chat.add_turn("user", "Name a bird.")
        chat.add_turn("assistant", "An owl.")
        assert roles(chat) == ["system", "user", "assistant"]
        n_turn = chat.cache.ledger.n_tokens - chat.segments()[0].n_tokens
        chat.add_turn("user", "Another one.")
        assert roles(chat) == ["system", "user", "assistant", "nexus", "user", "assistant"]
        closing = len(model.tokenize("<|im_end|>\n", parse_special=True))
        n = chat.segments()[3].n_tokens
        assert n == -(-(n_turn + closing) // 10) and chat.kv.nexus == n
        assert (chat.cache.ledger.ids == NEXUS).sum() == n
        assert chat.kv.history_tokens == chat.kv.used - n
        np.testing.assert_array_equal(chat.cache.ledger.nexus().sum(axis=-1), n)


def test_a_small_cache_gets_as_many_as_fit(model, nexus):
    with session(model, nexus, budget=96, stride=8, policy="nexus", policy_args={"compression": 0.5}) as chat:
        for i in range(3):
            chat.add_turn("user", f"{STORY * 3}Day {i}.")
            chat.add_turn("assistant", "I see.")
            chat.finish_turn()
            assert 1 <= chat.segments()[-1].n_tokens <= 8 and chat.kv.used <= chat.kv.capacity


def test_a_turn_can_be_finished_at_once(model, nexus):
    """The next logits are the same whether the end of the answer is read now or with the next user turn."""
    logits = []
    for at_once in (False, True):
        with session(model, nexus) as chat:
            chat.add_turn("user", "Name a bird.")
            chat.add_turn("assistant", "An owl.")
            if at_once:
                chat.finish_turn()
                chat.finish_turn()
                assert roles(chat)[-1] == "nexus"
            chat.add_turn("user", "Another one.")
            logits.append(chat.cache.context.logits().copy())
    np.testing.assert_array_equal(*logits)


def test_a_long_text_gets_them_at_ends_of_its_blocks(model, nexus):
    """At the end of a sentence, every 256 to 512 tokens; the parts are one turn."""
    with session(model, nexus) as chat:
        chat.add_turn("user", STORY * 70)
        user = [segment for segment in chat.segments() if segment.role == "user"]
        assert roles(chat) == ["system", "user", *["nexus", "user"] * (len(user) - 1), "assistant"] and len(user) >= 3
        assert all(256 <= segment.n_tokens <= 512 + 8 for segment in user[:-1]) and {segment.turn for segment in user} == {1}
        ids = chat.cache.ledger.ids
        ends = [segment.end for segment in chat.cache.ledger.segments if segment.role == "user"][:-1]
        assert all(model.token_bytes(int(ids[end - 1])).endswith(b".") for end in ends)
        assert chat.kv.used <= chat.kv.budget + CONFIG.stride
        chat.add_turn("assistant", "I see.")
        chat.add_turn("user", "Go on.")
        assert chat.segments()[-1].turn == chat.segments()[-2].turn == 2
    with session(model, None, policy="kvzip-snapkv") as chat:
        chat.add_turn("user", STORY * 70)
        assert roles(chat) == ["system", "user", "assistant"]


def test_before_the_first_one_nothing_is_different(model, nexus):
    answers = []
    for policy, tokens in (("kvzip-snapkv", None), ("hybrid", nexus)):
        with session(model, tokens, policy=policy) as chat:
            text = "".join(chat.send("What is the tallest animal?"))
            answers.append((text, chat.cache.context.logits().copy()))
    assert answers[0][0] == answers[1][0]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_they_change_what_follows_and_the_adapter_is_off_again(model, nexus, path, short_smollm2, tmp_path):
    """With the adapter, Nexus cells are others than without it; tokens before them are the same."""
    bare = dataclasses.replace(NexusFile.load(path), adapter={})
    bare.save(tmp_path / "bare.nexus.gguf")
    keys = []
    for tokens in (nexus, NexusTokens(model, tmp_path / "bare.nexus.gguf")):
        with session(model, tokens) as chat:
            chat.add_turn("user", "Name a bird.")
            chat.add_turn("assistant", "An owl.")
            chat.finish_turn()
            n = chat.segments()[-1].n_tokens
            values = chat.cache.native.read_values(5)
            keys.append(values)
            assert np.isfinite(values).all()
    assert not np.allclose(keys[0][:, -n:], keys[1][:, -n:], atol=1e-3)
    np.testing.assert_array_equal(keys[0][:, :-n], keys[1][:, :-n])


@pytest.mark.parametrize(("policy", "share"), [("nexus", 1.0), ("hybrid", 0.05), ("recall", 0.05)])
def test_raw_cells_go_and_nexus_cells_stay(model, nexus, policy, share):
    """All of them, where their share has room for eight turns."""
    with session(model, nexus, policy=policy, policy_args={"share": share}) as chat:
        for i in range(8):
            chat.add_turn("user", f"Turn {i}. " + STORY * 2)
            chat.add_turn("assistant", STORY)
            chat.finish_turn()
            chat.second_read()
            assert chat.kv.used <= 192 + 32
        chat.compress()
        segments = chat.segments()
        assert chat.kv.compressions > 3 and all(one.n_cells == one.n_tokens for one in segments if one.role == "nexus")
        first = segments[1:3]
        assert all(one.n_cells < one.n_tokens / 2 for one in first)
        if policy == "nexus":
            assert all(one.n_cells == 0 for one in first)
        ledger = chat.cache.ledger
        assert chat.cache.native.n_cells() == ledger.n_cells


@pytest.mark.parametrize("policy", ["hybrid", "recall"])
def test_undo_takes_the_tokens_of_the_turn_before_along(model, nexus, policy):
    """After /undo the chat is as it was, and the next logits are those of a chat in which nothing was taken back."""
    logits = []
    for takes_back in (False, True):
        with session(model, nexus, policy=policy, policy_args={"share": 0.02}) as chat:
            chat.add_turn("user", "Name a bird.")
            chat.add_turn("assistant", "An owl.")
            if takes_back:
                chat.add_turn("user", STORY * 12)
                chat.add_turn("assistant", "Well.")
                chat.finish_turn()
                chat.undo()
                assert roles(chat) == ["system", "user", "assistant"] and chat.kv.nexus == 0
            chat.add_turn("user", "Another one.")
            logits.append(chat.cache.context.logits().copy())
    np.testing.assert_array_equal(*logits)


def test_old_ones_compete_when_their_share_is_full():
    """The newest Nexus cells are pinned up to their share of the budget; the others stay only by their score."""
    n_cells, budget, window = 100, 40, 8
    is_nexus = np.zeros((2, 3, n_cells), bool)
    is_nexus[..., 10:90:2] = True
    pinned = np.zeros((2, 3, n_cells), bool)
    pinned[..., :4] = True
    scores = np.ones((2, 3, n_cells), np.float32)
    scores[..., 11] = scores[..., 12] = 9
    none = np.zeros((2, 3, n_cells), np.float32)
    state = CacheState(pinned, np.full_like(none, np.nan), window, scores=scores, redundancy=none, reread=none, nexus=is_nexus)
    keep = make("hybrid", {"share": 0.5}).plan(state, budget).keep
    newest = np.flatnonzero(is_nexus[0, 0])[-20:]
    for cells in keep.reshape(-1, budget):
        assert set(newest) <= set(cells) and {11, 12} <= set(cells) and {0, 1, 2, 3} <= set(cells)
    crowded = make("nexus", {"share": 1.0}).plan(state, budget).keep
    assert crowded.shape[-1] == budget and {0, 99} <= set(crowded[0, 0])


def test_a_policy_that_needs_them_says_so(model):
    for fields in ({}, {"policy": "recall", "policy_args": {"share": 0.02}}):
        with pytest.raises(SessionError, match="needs Nexus tokens"):
            session(model, None, **fields)
    session(model, None, policy="recall").close()


def test_in_a_long_conversation_the_newest_stay_beside_what_is_recalled(model, nexus):
    """Also where only a part of the archive is looked through, and behind a question, where each head looks for what was asked."""
    with session(model, nexus, policy="recall", policy_args={"share": 0.1}) as chat:
        for _ in range(14):
            chat.add_turn("user", STORY * 9)
            chat.add_turn("assistant", "I see.")
        for i in range(12):
            chat.add_turn("user", f"{i}?")
            chat.add_turn("assistant", "Yes.")
        chat.finish_turn()
        chat.add_turn("user", "What did the keeper count?")
        cache, ledger = chat.cache, chat.cache.ledger
        assert ledger.n_tokens > 2500 and cache.compressor.choices > 10 and cache.compressor.n_recalled > 0
        newest = np.flatnonzero(ledger.ids == NEXUS)[-10:]
        assert newest[0] > ledger.n_tokens - cache.target
        held = ledger.tokens[..., : ledger.n_cells]
        assert all((held == token).any(axis=-1).all() for token in newest)


def test_a_choice_that_is_being_found_takes_effect_past_nexus_tokens(model, nexus):
    """Where it was begun with at the end of an answer, it keeps the Nexus tokens behind that, and the cells are what the archive has."""
    with session(model, nexus, policy="recall", policy_args={"share": 0.05}, budget=96) as chat:
        cache, ledger, compressor = chat.cache, chat.cache.ledger, chat.cache.compressor
        compressor.late = 4
        chat.add_turn("user", STORY * 12 + "What did he write?")
        answer = model.tokenize(STORY, parse_special=False)
        while compressor.tokens_before_choice(ledger) != 2:
            cache.append(answer[:1], "decode")
        cache.append_vectors(nexus.vectors(3), "nexus", nexus.adapter)
        choices = compressor.choices
        assert compressor.tokens_before_choice(ledger) == 0
        cache.append(answer[:1], "decode")
        assert compressor.choices == choices + 1 and compressor.tokens_before_choice(ledger) is None
        newest = np.flatnonzero(ledger.ids == NEXUS)[-3:]
        assert (ledger.tokens[..., : ledger.n_cells, None] == newest).any(axis=-2).all()
        compressor.write_through(ledger)
        check(cache, cache.archive)


def test_files_are_found_beside_the_model_and_refused_for_another(model, nexus, path, short_smollm2, gemma3, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path))
    said = []
    assert nexus_for(model, "off", said.append) is None
    shutil.copy(path, tmp_path / "b.nexus.gguf")
    (tmp_path / "a.nexus.gguf").write_bytes(path.read_bytes()[:5000])
    assert nexus_for(model, None, said.append).path == str(tmp_path / "b.nexus.gguf")
    assert len(said) == 1 and "a.nexus.gguf" in said[0]
    assert nexus_for(model, str(path), said.append).file.k == K
    with pytest.raises(NexusError):
        nexus_for(model, str(tmp_path / "a.nexus.gguf"), said.append)
    with Model(gemma3) as other:
        assert nexus_for(other, None, said.append) is None or other.path.parent != tmp_path
        with pytest.raises(WrongBase, match="trained for"):
            nexus_for(other, str(path), said.append)


def test_the_commands_use_them_unless_told_otherwise(path, short_smollm2, gemma3, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path))
    shutil.copy(path, tmp_path / "a.nexus.gguf")
    turns = [{"role": "user", "content": "Name a tree."}, {"role": "user", "content": "And another one."}]
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"messages": turns}) + "\n")

    def n_read(model, *options):
        out = tmp_path / "out.jsonl"
        command = ["batch", str(lines), "-o", str(out), "--force", "-m", str(model), "--max-tokens", "2", "--kv-budget", "128", "--threads", "1"]
        result = CliRunner().invoke(main, [*command, *options])
        assert result.exit_code == 0, result.stderr
        return json.loads(out.read_text())["kv"]["nexus"]

    for options in ([], ["--archive", "off"], ["--archive", "ram"], ["--nexus", str(path)], ["--policy-arg", "recent=0.6"]):
        assert n_read(short_smollm2, *options) > 0, options
    assert n_read(short_smollm2, "--policy", "recall", "--policy-arg", "share=0.02") > 0
    for options in (["--nexus", "off"], ["--policy-arg", "share=0"], ["--policy", "recall"], ["--archive", "off", "--nexus", "off"]):
        assert n_read(short_smollm2, *options) == 0, options
    assert n_read(short_smollm2, "--policy", "kvzip-snapkv") == n_read(gemma3) == n_read(gemma3, "--archive", "off") == 0


def test_an_adapter_of_another_model_is_refused(path, gemma3):
    from kvlocal.llama.adapter import Adapter

    with Model(gemma3) as other, pytest.raises(EngineError, match="adapter"):
        Adapter(other, path)


def test_a_batch_reads_them_beside_other_conversations(model, nexus):
    """The adapter is on for one conversation alone, while the others wait."""
    config = dataclasses.replace(CONFIG, max_tokens=4, sampling=SamplingParams(temperature=0.0, seed=0))
    turns = [[{"role": "user", "content": f"{STORY * i} Say {i}."}, {"role": "user", "content": "Go on."}] for i in range(4)]
    lines = [json.dumps({"messages": messages}).encode() for messages in turns]
    alone, together = (list(run_batch(lines, model, config, parallel=n, ordered=True, nexus=nexus)) for n in (1, 3))
    assert all(result.kv["nexus"] > 0 for result in alone)
    assert [(result.messages, result.kv) for result in alone] == [(result.messages, result.kv) for result in together]


def test_a_served_conversation_goes_on_behind_them(model, nexus, tmp_path):
    """What a client sends again is found in the cells, also by a server that starts again: Nexus tokens are not among what it counts."""
    config = dataclasses.replace(CONFIG, policy="recall", policy_args={"share": 0.02}, system=None)
    messages, known = [], 0
    for _ in range(2):
        with Engine(model, config, parallel=2, nexus=nexus, directory=tmp_path) as engine:
            for _ in range(2):
                messages.append({"role": "user", "content": STORY * 5})
                *_, last = engine.submit(AnswerRequest("me", messages)).events()
                assert last.error is None and last.usage.cached_tokens >= known
                messages.append(last.message)
                known = last.usage.prompt_tokens
    assert known > 300
