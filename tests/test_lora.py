"""LoRA adapters beside a model: what is computed with them, what is refused, and everything that depends on them."""

import dataclasses
import json
import struct

import device
import numpy as np
import pytest
from click.testing import CliRunner
from doors import write_chat_model
from gguf import GGUFWriter
from gguf_copy import Source, copy
from lora_file import EMBEDDING, matrices, merge, write_lora
from random_nexus import nexus_file
from tiny_model import N_VOCAB, write_tiny_model

from kvlocal import Lora
from kvlocal.batch.output import settings_key
from kvlocal.batch.run import run_batch
from kvlocal.cache.fitting import fitted
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.snapshot import SnapshotError, Snapshots
from kvlocal.doctor import memory_estimate
from kvlocal.doctor.diagnosis import diagnose
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.gguf.lora import flaw_of_adapter
from kvlocal.llama.context import Context
from kvlocal.llama.model import Model
from kvlocal.llama.placement import Placement
from kvlocal.llama.sampling import SamplingParams
from kvlocal.nexus.discovery import nexus_for
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.serving.engine import Engine
from kvlocal.serving.request import AnswerRequest
from kvlocal_cli.main import main

GREEDY = SamplingParams(temperature=0)
CONFIG = SessionConfig(budget=256, stride=64, n_ubatch=64, n_threads=1, sampling=GREEDY, max_tokens=8, archive="ram")
TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, 40).astype(np.int32)
# float32 weights, sums in another order
CLOSE = {"rtol": 0, "atol": device.tolerance(2e-3, 0.2)}


def logits_of(path, *lora, tokens=TOKENS):
    """float32 [n, n_vocab]"""
    with Model(path, lora=lora) as model, Context(model, n_cells=256, n_ubatch=64, n_threads=1) as context:
        context.decode(tokens, 0, logits="all")
        return context.logits_all()


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def tiny(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / f"{request.param}.gguf"
    write_tiny_model(path, request.param, tied=request.param == "gemma3")
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "llama.gguf"
    write_tiny_model(path, "llama")
    return path


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A model that chats, in bytes."""
    path = tmp_path_factory.mktemp("talker") / "talker.gguf"
    write_chat_model(path, n_layer=4)
    return path


@pytest.fixture(scope="module")
def adapter(talker, tmp_path_factory):
    """It changes what is said."""
    return write_lora(tmp_path_factory.mktemp("lora") / "adapter.gguf", talker, strength=0.5)


@pytest.fixture(scope="module")
def other(talker, tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("lora") / "other.gguf", talker, seed=1)


# What is computed


def test_logits_are_those_of_the_weights_with_the_adapters_added(tiny, tmp_path):
    one, two = (write_lora(tmp_path / f"{i}.gguf", tiny, rank=3 + i, alpha=alpha, seed=i) for i, alpha in enumerate((8.0, None)))
    plain = logits_of(tiny)
    for adapters in ([(one, 1.0)], [(one, 0.5)], [(two, 1.0)], [(one, 0.7), (two, -1.5)]):
        expected = logits_of(merge(tmp_path / "merged.gguf", tiny, *adapters))
        assert np.abs(expected - plain).max() > 0.1
        np.testing.assert_allclose(logits_of(tiny, *(Lora(path, scale) for path, scale in adapters)), expected, **CLOSE)


def test_embeddings_and_output_can_be_changed_where_they_are_two(tmp_path):
    base = tmp_path / "untied.gguf"
    write_tiny_model(base, "llama", tied=False)
    path = write_lora(tmp_path / "a.gguf", base, [EMBEDDING, "output.weight", "blk.1.ffn_up.weight"])
    expected = logits_of(merge(tmp_path / "merged.gguf", base, (path, 0.5)))
    assert np.abs(expected - logits_of(base)).max() > 0.1
    np.testing.assert_allclose(logits_of(base, Lora(path, 0.5)), expected, **CLOSE)


def test_a_real_model(three_layers, tmp_path):
    path = write_lora(tmp_path / "a.gguf", three_layers, kind=np.float16)
    tokens = np.random.default_rng(0).integers(100, 40000, 32).astype(np.int32)
    expected = logits_of(merge(tmp_path / "merged.gguf", three_layers, (path, 0.8)), tokens=tokens)
    assert np.abs(expected - logits_of(three_layers, tokens=tokens)).max() > 1
    np.testing.assert_allclose(logits_of(three_layers, Lora(path, 0.8), tokens=tokens), expected, rtol=0, atol=device.tolerance(0.01, 0.5))


def test_with_scale_zero_nothing_is_different(llama, tmp_path):
    path = write_lora(tmp_path / "a.gguf", llama)
    np.testing.assert_array_equal(logits_of(llama, Lora(path, 0)), logits_of(llama))
    np.testing.assert_array_equal(logits_of(llama, Lora(path, 0), Lora(path, 0.5)), logits_of(llama, Lora(path, 0.5)))
    with Model(llama, lora=[Lora(path, 0)]) as model:
        assert model.changed_by == [] and [each.scale for each in model.adapters] == [0]


def test_half_of_it_twice_is_all_of_it(llama, tmp_path):
    path = write_lora(tmp_path / "a.gguf", llama)
    np.testing.assert_allclose(logits_of(llama, Lora(path, 0.5), Lora(path, 0.5)), logits_of(llama, Lora(path)), rtol=0, atol=1e-3)


def test_adapters_are_added_in_their_order(llama, tmp_path):
    """Not in one that depends on where they lie in memory, as rounding would then be another in every process."""
    paths = [write_lora(tmp_path / f"{i}.gguf", llama, seed=i) for i in range(9)]
    loras = [Lora(path, 0.3) for path in paths]
    expected = logits_of(llama, *loras)
    for _ in range(3):
        with Model(llama, lora=loras):  # takes other addresses
            np.testing.assert_array_equal(logits_of(llama, *loras), expected)


def test_nexus_tokens_are_read_with_both_adapters(talker, tmp_path):
    """That of the Nexus file for them alone, the user's for everything."""
    lora = write_lora(tmp_path / "a.gguf", talker, kind=np.float16)
    merged, found = merge(tmp_path / "merged.gguf", talker, (lora, 0.5)), []
    for path, loras in ((talker, [Lora(lora, 0.5)]), (merged, [])):
        nexus_file(path).save(tmp_path / "a.nexus.gguf")
        with Model(path, lora=loras) as model:
            nexus = NexusTokens(model, tmp_path / "a.nexus.gguf")
            with Context(model, n_cells=256, n_ubatch=64, n_threads=1) as context:
                context.decode(np.arange(100, 116), 0)
                context.use_adapter(nexus.adapter)
                context.decode_embeddings(nexus.vectors(4), 16)
                context.use_adapter(None)
                context.decode(np.arange(30, 46), 20, logits="all")
                found.append(context.logits_all())
    np.testing.assert_allclose(*found, rtol=0, atol=device.tolerance(0.02, 0.5))


def test_conversations_beside_others_have_it_too(talker, adapter):
    turns = [[{"role": "user", "content": f"Say {i}."}, {"role": "user", "content": "Go on."}] for i in range(3)]
    lines = [json.dumps({"messages": messages}).encode() for messages in turns]
    with Model(talker, lora=[Lora(adapter)]) as model:
        alone, together = (list(run_batch(lines, model, CONFIG, parallel=n, ordered=True)) for n in (1, 3))
    with Model(talker) as model:
        without = list(run_batch(lines, model, CONFIG, parallel=3, ordered=True))
    assert [result.messages for result in alone] == [result.messages for result in together] != [result.messages for result in without]


# What is refused


def test_a_file_and_its_scale(tmp_path):
    plain, named = tmp_path / "a.gguf", tmp_path / "a.gguf:0.5"
    plain.touch()
    assert Lora.parse(f"{plain}") == Lora(plain, 1.0)
    assert Lora.parse(f"{plain}:0.5") == Lora(plain, 0.5)
    assert Lora.parse(f"{plain}:-1e-1") == Lora(plain, -0.1)
    named.touch()  # all of the name is that of a file
    assert Lora.parse(f"{named}") == Lora(named, 1.0)
    assert Lora.parse(f"{named}:2") == Lora(named, 2.0)


@pytest.mark.parametrize(
    "text, said",
    [
        ("a.gguf:half", "'half' is no scale for .*a.gguf: give a number"),
        ("a.gguf:", "'' is no scale"),
        ("a.gguf:nan", "nan is no scale"),
        ("a.gguf:inf", "inf is no scale"),
        ("a.gguf:1e39", "1e[+]39 is no scale"),
        ("b.gguf", "b.gguf cannot be read"),
        ("b.gguf:0.5", "b.gguf:0.5 cannot be read"),
        ("b:c/a.gguf", "a.gguf cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("", "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_file_and_no_scale(tmp_path, monkeypatch, text, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").touch()
    with pytest.raises(KvlocalError, match=said):
        Lora.parse(text)
    result = CliRunner().invoke(main, ["run", "no-such-model", "Hello", "--lora", text])
    assert result.exit_code == 2 and "--lora" in result.stderr and "Traceback" not in result.stderr


def _rewritten(path, **values):
    """With other bytes of the value of a key, given as {key: bytes}."""
    data = path.read_bytes()
    for key, value in values.items():
        at = data.index(key.replace("_", ".").encode()) + len(key)
        data = data[:at] + value + data[at + len(value) :]
    path.write_bytes(data)
    return path


def _with_vector(path, base):
    write_lora(path, base, ["blk.0.attn_q.weight"])
    source = Source(path)
    tensors = [(t.name.replace("attn_q.weight", "attn_norm.weight"), t.data, t.kind, t.shape) for t in source.tensors.values()]
    copy(source, path.with_suffix(".new"), tensors=tensors)
    path.with_suffix(".new").replace(path)


BAD = {
    "text": (lambda path, _: path.write_text("no GGUF at all"), "is not a GGUF file"),
    "cut off": (lambda path, base: path.write_bytes(write_lora(path, base).read_bytes()[:-5000]), "damaged or cut off"),
    "a model": (lambda path, base: path.write_bytes(base.read_bytes()), "it is no adapter"),
    "another type": (lambda path, base: write_lora(path, base, adapter_type="ia3"), "of the type ia3"),
    "another architecture": (lambda path, base: write_lora(path, base, architecture="qwen2"), "for the architecture qwen2, and the model has llama"),
    "tied": (lambda path, base: write_lora(path, base, [EMBEDDING]), "which is the output of this model too"),
    "a vector": (_with_vector, "has the shape"),
    "not finite": (lambda path, base: write_lora(path, base, strength=float("inf")), "not finite"),
    "alpha": (lambda path, base: write_lora(path, base, alpha=float("nan")), "alpha is no number"),
    # llama.cpp would end the process
    "kind of alpha": (lambda path, base: _rewritten(write_lora(path, base), adapter_lora_alpha=struct.pack("<I", 4)), "alpha is no number"),
    "nexus": (lambda path, base: nexus_file(base).save(path), "is a Nexus file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_before_the_model_is_loaded(talker, tmp_path, name):
    make, said = BAD[name]
    make(tmp_path / "bad.gguf", talker)
    with pytest.raises(KvlocalError, match=said):
        Model(talker, lora=[Lora(tmp_path / "bad.gguf")])


def test_an_adapter_for_other_shapes_is_refused(llama, three_layers, tmp_path):
    path = write_lora(tmp_path / "a.gguf", llama)
    with pytest.raises(KvlocalError, match=r"blk.0.attn_q.weight has the shape \[576, 576\]|name an adapter that was made for this model"):
        Model(three_layers, lora=[Lora(path)])
    deep = write_lora(tmp_path / "b.gguf", three_layers, ["blk.2.ffn_up.weight"])
    with pytest.raises(KvlocalError, match="the model has no tensor blk.2.ffn_up.weight"):
        Model(llama, lora=[Lora(deep)])


def _gguf(path, kind, **tensors):
    writer = GGUFWriter(path, "llama")
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    for name, shape in tensors.items():
        writer.add_tensor(name.replace("__", "."), np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Container(path)


@pytest.mark.parametrize(
    "a, b, more, flaw",
    [
        ((4, 2, 64), (4, 96, 2), {}, None),
        ((4, 2, 64), (4, 96, 2), {"blk__0__attn_norm__weight": 64}, None),  # which llama.cpp leaves out
        ((2, 64), (96, 2), {}, "has the shape"),
        ((3, 2, 64), (3, 96, 2), {}, "has the shape"),
        ((4, 2, 64), (4, 96, 3), {}, "has the shape"),
        ((4, 64, 2), (4, 96, 2), {}, "has the shape"),
        ((4, 2, 64), (4, 96, 2), {"blk__0__attn_q__bias": 64}, "is no part of an adapter"),
        ((4, 2, 64), (4, 96, 2), {"blk__0__attn_q__weight__lora_a": (2, 64)}, "has one half of its pair"),
    ],
)
def test_adapters_of_experts_have_them_in_front(tmp_path, a, b, more, flaw):
    name = "blk__0__ffn_up_exps__weight"
    base = _gguf(tmp_path / "base.gguf", "model", **{name: (4, 96, 64)})
    found = flaw_of_adapter(_gguf(tmp_path / "a.gguf", "adapter", **{f"{name}__lora_a": a, f"{name}__lora_b": b}, **more), base)
    assert found is None if flaw is None else flaw in found


# What depends on them


def said_by(model, *texts, **changes):
    with ChatSession(model, dataclasses.replace(CONFIG, **changes)) as chat:
        return ["".join(chat.send(text)) for text in texts]


def test_a_snapshot_is_of_no_use_with_others(talker, adapter, other, tmp_path):
    snapshots = Snapshots(tmp_path / "one.snapshot")
    with Model(talker, lora=[Lora(adapter, 0.5)]) as model:
        with ChatSession(model, CONFIG) as chat:
            for text in ("Name a bird.", "And a tree."):
                "".join(chat.send(text))
            snapshots.save(chat)
            kept = chat.messages
            expected = "".join(chat.send("And a ship."))
        with ChatSession(model, CONFIG) as chat:
            snapshots.load(chat, kept[:4])
            assert "".join(chat.send("And a ship.")) == expected
    for lora in ([], [Lora(adapter, 0.6)], [Lora(other, 0.5)], [Lora(adapter, 0.5), Lora(other)], [Lora(adapter, 0.5)] * 2):
        with Model(talker, lora=lora) as model, ChatSession(model, CONFIG) as chat:
            with pytest.raises(SnapshotError, match="made with another set of LoRA adapters"):
                snapshots.load(chat, kept[:4])
            assert not chat.messages
    # by what it holds, not by where it lies, and without what has no effect
    moved = tmp_path / "moved.gguf"
    moved.write_bytes(adapter.read_bytes())
    with Model(talker, lora=[Lora(moved, 0.5), Lora(other, 0)]) as model, ChatSession(model, CONFIG) as chat:
        assert snapshots.load(chat, kept[:4]) == 4


def test_the_results_of_a_batch_are_of_their_adapters(talker, adapter, other, tmp_path):
    keys = []
    for lora in ([], [Lora(adapter, 0)], [Lora(adapter)], [Lora(adapter, 0.5)], [Lora(other)]):
        with Model(talker, lora=lora) as model:
            keys.append(settings_key(model, CONFIG, None))
    assert keys[0] == keys[1] and len(set(keys)) == 4
    lines, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "Name a tree."}]}) + "\n")
    command = ["batch", str(lines), "-o", str(out), "-m", str(talker), "--max-tokens", "4", "--threads", "1", "--temp", "0"]
    assert CliRunner().invoke(main, [*command, "--lora", f"{adapter}"]).exit_code == 0
    before = out.read_bytes()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1 and "with these settings" in result.stderr and out.read_bytes() == before
    assert CliRunner().invoke(main, [*command, "--lora", f"{adapter}"]).exit_code == 0
    assert out.read_bytes() == before


def test_an_evaluation_does_not_take_what_the_model_alone_predicted(short_smollm2, tmp_path):
    adapter = write_lora(tmp_path / "adapter.gguf", short_smollm2, ["blk.0.ffn_up.weight", "blk.2.attn_v.weight"], strength=0.5)
    data, out = tmp_path / "d.jsonl", tmp_path / "out.json"
    turns = [{"user": "Tell me of the sea.", "bot": "It is deep and cold."}, {"user": "And of lakes?", "bot": "They are smaller."}]
    data.write_text(json.dumps({"history": turns}) + "\n")
    command = ["eval", "dialogue", "-m", str(short_smollm2), "--threads", "1", "--cache", str(tmp_path / "cache"), "--data", str(data)]
    command += ["--policy", "streaming", "--ratio", "0.5", "--stride", "16", "--json", str(out)]
    full, settings = [], []
    for lora in ([], ["--lora", f"{adapter}:0.5"], ["--lora", f"{adapter}:0"]):
        result = CliRunner().invoke(main, [*command, *lora])
        assert result.exit_code == 0, result.stderr
        document = json.loads(out.read_text())
        full.append({row["metric"]: row["mean"] for row in document["rows"] if row["policy"] == "full"})
        settings.append(document["settings"])
    assert full[0] == full[2] != full[1] and full[1]["kl"] < 1e-3 and abs(full[0]["cross_entropy"] - full[1]["cross_entropy"]) > 0.01
    assert "lora" not in settings[0] and "lora" not in settings[2]
    assert [(each["file"], each["scale"]) for each in settings[1]["lora"]] == [("adapter.gguf", 0.5)]


def test_a_server_that_starts_again_reads_anew_with_others(talker, adapter, tmp_path):
    def answer(model, *messages):
        with Engine(model, CONFIG, parallel=1, directory=tmp_path) as engine:
            *_, last = engine.submit(AnswerRequest("me", messages)).events()
            assert last.error is None
            return last

    hello = {"role": "user", "content": "The keeper wrote down the weather and the ships. " * 5}
    with Model(talker, lora=[Lora(adapter)]) as model:
        messages = [hello, answer(model, hello).message, {"role": "user", "content": "Go on."}]
        assert answer(model, *messages).usage.cached_tokens > 40
    with Model(talker) as model:
        assert answer(model, *messages).usage.cached_tokens == 0


def test_a_session_that_is_gone_on_with_without_them_says_so(talker, adapter, tmp_path):
    command = ["chat", str(talker), "--session", str(tmp_path / "a.jsonl"), "--threads", "1", "--temp", "0", "--max-tokens", "4"]
    first = CliRunner().invoke(main, [*command, "--lora", f"{adapter}:0.5"], input="Name a bird.\n/set\n")
    assert first.exit_code == 0 and f"{adapter}:0.5" in first.stdout
    second = CliRunner().invoke(main, command, input="Name a tree.\n")
    assert second.exit_code == 0 and "made with another set of LoRA adapters: 2 messages are read again" in second.stderr
    third = CliRunner().invoke(main, [*command, "--lora", f"{adapter}:0"], input="And a ship.\n")
    assert third.exit_code == 0 and "again" not in third.stderr


def test_a_nexus_file_is_used_beside_them_only_if_it_is_named(talker, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("KVLOCAL_MODELS_DIR", str(tmp_path))
    path = tmp_path / "a.nexus.gguf"
    nexus_file(talker).save(path)
    said = []
    with Model(talker, lora=[Lora(adapter, 0)]) as model:
        assert nexus_for(model, None, said.append).path == str(path) and not said
    with Model(talker, lora=[Lora(adapter)]) as model:
        assert nexus_for(model, None, said.append) is None
        assert nexus_for(model, str(path), said.append).path == str(path)
    assert len(said) == 2 and "is left out: to use it all the same, name it with --nexus" in said[0] and "is not known" in said[1]
    command = ["run", str(talker), "Name a tree.", "--max-tokens", "2", "--threads", "1", "--lora", f"{adapter}"]
    for options, told in ((["--archive", "off"], "is left out"), (["--nexus", str(path)], "is not known"), ([], "")):
        result = CliRunner().invoke(main, [*command, *options])
        assert result.exit_code == 0 and (told in result.stderr if told else "nexus" not in result.stderr)


def test_their_memory_is_counted(talker, adapter):
    config = fitted(talker, CONFIG, Placement())
    base, lora = Container(talker), [Lora(adapter)] * 2
    with_them, without = (memory_estimate.MemoryEstimate.of(base, config, True, each) for each in (lora, ()))
    assert with_them.host.weights - without.host.weights == 2 * adapter.stat().st_size


# Where they are named


def test_who_tells_of_them(talker, adapter, other, tmp_path):
    report = diagnose(str(talker), [Lora(adapter, 0.5)])
    assert report["problems"] == [] and report["model"]["lora"] == [
        {"path": str(adapter), "scale": 0.5, "tensors": len(matrices(talker)), "size": adapter.stat().st_size}
    ]
    (tmp_path / "bad.gguf").write_text("nothing")
    result = CliRunner().invoke(main, ["doctor", str(talker), "--lora", str(other), "--lora", str(tmp_path / "bad.gguf"), "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and [each["path"] for each in report["model"]["lora"]] == [str(other)] and "bad.gguf" in report["problems"][0]
    assert "LoRA" in CliRunner().invoke(main, ["doctor", str(talker), "--lora", f"{other}:0.5"]).stdout
    assert CliRunner().invoke(main, ["doctor", "--lora", str(other)]).exit_code == 2
    result = CliRunner().invoke(
        main, ["run", str(talker), "Hello", "--max-tokens", "2", "--threads", "1", "--json", "--lora", f"{adapter}:0.5", "--lora", str(other)]
    )
    assert json.loads(result.stdout)["lora"] == [{"path": str(adapter), "scale": 0.5}, {"path": str(other), "scale": 1.0}]


def test_a_server_tells_of_them(talker, adapter):
    pytest.importorskip("starlette")
    from serving_process import OPTIONS, ServerProcess

    with ServerProcess(talker, *OPTIONS, "--kv-budget", "256", "--forget", "--lora", f"{adapter}:0.5") as server:
        assert server.get("/props").json["lora_adapters"] == [{"path": adapter.name, "scale": 0.5}]
