"""Adapters for a compressed cache: the chats they are trained on, the training, the file, and the commands."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from engine_cells import EngineReading
from lora_file import write_lora
from shallow_model import write_shallow_model
from tiny_model import N_VOCAB, write_tiny_model

from kvlocal import policies
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.history import turn_tokens
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.training.synth import DataFile, SynthSettings, WrittenDialogue
from kvlocal_cli.main import main

torch = pytest.importorskip("torch")

from kvlocal.training.adapt_training import DistillSettings, DistillTraining, divergences  # noqa: E402
from kvlocal.training.adapted_file import AdaptedFile, AdaptedFileError  # noqa: E402
from kvlocal.training.chats import Chats, ChatTurn, TrainingChat, read_chats  # noqa: E402
from kvlocal.training.checkpoint import TrainingError  # noqa: E402
from kvlocal.training.compressed_distillation import Student, TaughtChat  # noqa: E402
from kvlocal.training.compressed_reading import read_compressed  # noqa: E402
from kvlocal.training.compression_times import Timetable  # noqa: E402
from kvlocal.training.decoder import Decoder  # noqa: E402
from kvlocal.training.parameters import AdapterParameters, pairs_of  # noqa: E402
from kvlocal.training.policy_choice import PolicyChoice  # noqa: E402
from kvlocal.training.training_memory import training_memory  # noqa: E402
from kvlocal.training.weights import Weights  # noqa: E402

SETTINGS = DistillSettings(
    steps=5, batch=1, students=2, policies=("gkv", "streaming"), ratios=(0.5, 0.8), stride=16, rank=2, rate=2e-3, max_tokens=220, n_held_out=1,
)  # fmt: skip
MESSAGES = [
    {"role": "user", "content": "My number is 7. Tell me about the harbour of a small town by the sea, please."},
    {"role": "assistant", "content": "The harbour lies behind a long wall of stone, and in the evening the boats come home with the tide."},
    {"role": "user", "content": "And who lives there?"},
    {"role": "assistant", "content": "Fishermen, a harbour master, and a great many gulls, who own the place."},
]


def some_turns(seed: int, *lengths: int) -> tuple[ChatTurn, ...]:
    """Turns of these lengths, every second one the model's, that repeat a few tokens: there is something to attend to."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, N_VOCAB, 12)
    return tuple(ChatTurn(rng.choice(words, n).astype(np.int32), bool(i % 2)) for i, n in enumerate(lengths))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Container:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny_model(path, "llama")
    return Container(path)


@pytest.fixture(scope="module")
def chats() -> Chats:
    prefix = ChatTurn(np.arange(4, dtype=np.int32), False)
    return Chats(prefix, tuple(some_turns(i, 30, 40, 20, 50) for i in range(3)), (some_turns(9, 40, 60, 40, 90),), ("0",))


def train(base: Container, chats: Chats, path: Path, settings: DistillSettings = SETTINGS, **options) -> tuple[list, AdaptedFile]:
    measured = []
    file = DistillTraining(base, "tiny", chats, settings, path, "cpu").run(measured.append, **options)
    return measured, file


def assert_same(a: AdaptedFile, b: AdaptedFile) -> None:
    assert a.adapter.keys() == b.adapter.keys()
    assert all(np.array_equal(x, y) for name in a.adapter for x, y in zip(a.adapter[name], b.adapter[name], strict=True))
    assert a.record["losses"] == b.record["losses"] and a.record["evaluations"] == b.record["evaluations"]


# Chats


def test_turns_are_those_of_a_session(smollm2: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (MESSAGES, MESSAGES[:2])))
    with Model(smollm2) as model:
        template = ChatTemplate.from_model(model)
        expected = np.concatenate(turn_tokens(model, template, [*MESSAGES, *MESSAGES[:2]]))
        found = read_chats(model, [data], held_out=0.0)
        chat = found.chat(found.training, 1000)
        # the last answer is closed too
        assert np.array_equal(chat.tokens[: len(expected)], expected) and len(chat.tokens) - len(expected) < 4
        written = [turn.tokens for turn in chat.turns if turn.written]
        texts = [b"".join(map(model.token_bytes, tokens.tolist())).decode() for tokens in written]
        assert texts == [MESSAGES[1]["content"], MESSAGES[3]["content"], MESSAGES[1]["content"]]
    # judged is what predicts an answer's tokens, and its end
    assert len(chat.judged) == sum(map(len, written)) + len(written)
    assert np.array_equal(chat.tokens[chat.judged[: len(written[0])] + 1], written[0])
    # user and model take turns
    assert [turn.written for turn in chat.turns] == [False, True] * 3 + [False]


def test_a_chat_is_cut_where_there_is_no_more_room(chats: Chats) -> None:
    chat = chats.chat(chats.training, 110)
    assert len(chat.tokens) == 110 and chat.n_prefix == 4
    assert chats.chat(chats.training[:1], 10_000).lengths == [(34, False), (40, True), (20, False), (50, True)]
    # the same for a seed, and others for the next
    first, same, other = (chats.nth(n, 0, 220).tokens for n in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert len(chats.chats_of(chats.training, 9, 220)) == 2


# Training


def test_a_student_without_compression_is_its_teacher(tiny: Container, chats: Chats) -> None:
    decoder = Decoder(Weights.load(tiny, torch.float32, "cpu"))
    taught = TaughtChat(decoder, chats.chat(chats.training, 220))
    with torch.no_grad():
        assert taught.kl(Student("full", 0.0), None).item() < 1e-6
        mild, strong = (taught.kl(Student("gkv", ratio, 16), None).item() for ratio in (0.5, 0.8))
    assert 1e-4 < mild < strong
    # too short to be compressed
    assert TaughtChat(decoder, TrainingChat(some_turns(0, 20, 10), 0)).kl(Student("gkv", 0.8), None) is None


def test_a_killed_run_goes_on_to_the_same_result(tiny: Container, chats: Chats, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killed(measured) -> None:
        if measured.step == 3:
            raise Killed

    measured, expected = train(tiny, chats, tmp_path / "whole.gguf")
    assert [one.step for one in measured] == [0, 1, 2, 3, 4, 5, 5]
    assert measured[0].held_out.keys() == {"full", "gkv@0.5", "streaming@0.5", "gkv@0.8", "streaming@0.8"}
    path = tmp_path / "a.gguf"
    with pytest.raises(Killed):
        DistillTraining(tiny, "tiny", chats, SETTINGS, path, "cpu").run(killed, checkpoint_seconds=0)
    # the file is there to be tried while training goes on
    AdaptedFile.load(path, tiny)
    resumed = DistillTraining(tiny, "tiny", chats, SETTINGS, path, "cpu")
    assert resumed.step == 2
    assert_same(resumed.run(lambda measured: None), expected)
    assert_same(AdaptedFile.load(path), AdaptedFile.load(tmp_path / "whole.gguf"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "whole.gguf"]
    train(tiny, chats, path, limit_seconds=0)
    with pytest.raises(TrainingError, match="other settings"):
        train(tiny, chats, path, replace(SETTINGS, seed=2))


def test_it_learns(tiny: Container, chats: Chats, tmp_path: Path) -> None:
    settings = replace(SETTINGS, steps=60, ratios=(0.8,), rank=4, temperature=1.0)
    _, file = train(tiny, chats, tmp_path / "a.gguf", settings, evaluate_every=1000)
    decoder = Decoder(Weights.load(tiny, torch.float32, "cpu"))
    adapter = AdapterParameters(pairs_of(file.adapter, decoder.device), file.alpha).adapter(torch.float32)
    chat = chats.chat(chats.training, 220)
    before, after = (divergences(decoder, chat, one, ("gkv", "streaming"), (0.8,), 16) for one in (None, adapter))
    assert all(after[name] < 0.9 * before[name] for name in ("gkv@0.8", "streaming@0.8"))
    assert before["full"] < 1e-6 < after["full"]


def test_training_begins_with_another_file(tiny: Container, chats: Chats, tmp_path: Path) -> None:
    _, first = train(tiny, chats, tmp_path / "a.gguf")
    settings = replace(SETTINGS, start="a", steps=2)
    measured: list = []
    run = DistillTraining(tiny, "tiny", chats, settings, tmp_path / "b.gguf", "cpu", first)
    assert all(np.array_equal(run.file().adapter[name][1], b) for name, (_, b) in first.adapter.items())
    run.run(measured.append)
    # what it begins with is evaluated first, and that is where the other run ended, but for the rounding of the file
    assert measured[0].held_out["gkv@0.8"] == pytest.approx(first.record["evaluations"][-1]["gkv@0.8"], rel=0.02)
    with pytest.raises(TrainingError, match="rank 2"):
        DistillTraining(tiny, "tiny", chats, replace(settings, rank=4), tmp_path / "c.gguf", "cpu", first)


def test_policies_that_cannot_choose_in_training_are_refused() -> None:
    for name in ("full", "kvzip", "dynsplit", "hybrid"):
        with pytest.raises(KvlocalError, match="choose among streaming, h2o, snapkv"):
            replace(SETTINGS, policies=(name,))


def test_memory_grows_with_what_is_asked_for(smollm2: Path) -> None:
    base = Container(smollm2)
    least = training_memory(base, 512, 8, "bfloat16")
    assert 0.8e9 < least < 3e9
    assert all(training_memory(base, *more) > least for more in ((1024, 8, "bfloat16"), (512, 64, "bfloat16"), (512, 8, "float32")))


# The file


def test_the_engine_computes_with_the_adapter_what_training_does(three_layers: Path, tmp_path: Path) -> None:
    base = Container(three_layers)
    random = Container(write_lora(tmp_path / "random.gguf", three_layers, rank=4, alpha=4.0))
    names = {name.rpartition(".")[0] for name in random.tensors}
    pairs = {name: (random.tensors[f"{name}.lora_a"].values(), random.tensors[f"{name}.lora_b"].values()) for name in names}
    decoder = Decoder(Weights.load(base, torch.float32, "cpu"))
    parameters = AdapterParameters(pairs_of(pairs, decoder.device), 4.0)
    file = AdaptedFile(parameters.arrays(), 4.0, "llama", "base", "", "distill", ("gkv",), (0.8,))
    file.save(tmp_path / "a.lora.gguf")
    student = Student("gkv", 0.7, 48)
    with Model(three_layers) as model:
        tokens = model.tokenize(" ".join(message["content"] for message in 4 * MESSAGES), parse_special=False)
    turns = [(tokens[:120], False), (tokens[120:], True)]
    config = replace(student.config(len(tokens)), type_k="f32", type_v="f32", n_threads=1)
    engine = EngineReading.of(three_layers, config, turns, 4, tmp_path / "a.lora.gguf")
    timetable = Timetable.of(config, [(len(tokens), written) for tokens, written in turns], 4, 8192)
    choice = PolicyChoice(policies.make("gkv"), timetable, 4, config.window)
    x = decoder.embed(torch.from_numpy(tokens).long())
    with torch.no_grad():
        found, plain = (decoder.logits(read_compressed(decoder, x, choice, one)).softmax(-1) for one in (parameters.adapter(torch.float32), None))
    expected = torch.from_numpy(engine.logits).softmax(-1)
    assert (found - expected).abs().max() < 1e-2
    assert (plain - expected).abs().max() > 0.1
    assert len(engine.begins) >= 2


def test_files_that_are_no_adapters_are_refused(tiny: Container, chats: Chats, tmp_path: Path) -> None:
    with pytest.raises(AdaptedFileError, match="cannot be read"):
        AdaptedFile.load(tmp_path / "none.gguf")
    other = write_lora(tmp_path / "other.gguf", tiny.path)
    with pytest.raises(AdaptedFileError, match="was not written by `kvlocal adapt`"):
        AdaptedFile.load(other)
    _, file = train(tiny, chats, tmp_path / "a.gguf", replace(SETTINGS, steps=1))
    write_tiny_model(tmp_path / "second.gguf", "llama", seed=1)
    with pytest.raises(AdaptedFileError, match=r"was trained for tiny, not for second\.gguf"):
        AdaptedFile.load(tmp_path / "a.gguf", Container(tmp_path / "second.gguf"))
    whole = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AdaptedFileError, match="damaged or cut off"):
        AdaptedFile.load(tmp_path / "cut.gguf")
    replace(file, adapter={name: (a * np.nan, b) for name, (a, b) in file.adapter.items()}).save(tmp_path / "b.gguf")
    with pytest.raises(AdaptedFileError, match="not finite"):
        AdaptedFile.load(tmp_path / "b.gguf", tiny)


# The commands


def test_commands(smollm2: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    base = tmp_path / "shallow.gguf"
    write_shallow_model(smollm2, base, 1)
    out, plot = tmp_path / "a.lora.gguf", tmp_path / "a.png"
    data = f"{out}.dialogues.jsonl"
    # what the model would have written
    settings = SynthSettings()
    with Model(base) as model, DataFile(Path(data), settings.key(model), settings) as file:
        for i in range(40):
            messages = [{**MESSAGES[0], "content": f"My number is {i}. And yours?"}, *MESSAGES[1:]]
            file.add(WrittenDialogue(i, tuple(messages), 100))
    small = ["--max-tokens", "256", "--stride", "32", "--threads", "1", "--policy", "gkv", "--ratio", "0.8"]
    command = ["adapt", "distill", str(base), "-o", str(out), *small, "--steps", "2", "--batch", "1", "--students", "1", "--held-out", "1"]
    command += ["--own-tokens", "4000", "--plot", str(plot)]
    stopped = CliRunner().invoke(main, [*command, "--minutes", "0.0001"])
    assert stopped.exit_code == 0, stopped.stderr
    assert "training takes about" in stopped.stderr and "stopped after 1 of 2 updates" in stopped.stderr
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "going on after 1 updates" in result.stderr and "held out full" in result.stderr and result.stdout == f"{out}\n"
    assert plot.stat().st_size > 5000
    assert "name another file or replace it with --force" in CliRunner().invoke(main, command).stderr
    told = CliRunner().invoke(main, ["adapt", "info", str(out), "-m", str(base)])
    assert told.exit_code == 0 and "distill" in told.stdout and "gkv" in told.stdout and "held out" in told.stdout
    evaluation = ["adapt", "eval", str(out), "-m", str(base), "--data", data, *small, "--limit", "2", "--all", "--json"]
    measured = CliRunner().invoke(main, evaluation)
    assert measured.exit_code == 0, measured.stderr
    rows = json.loads(measured.stdout)["rows"]
    assert [(row["student"], row["adapter"], row["n"]) for row in rows] == [
        ("full", False, 2), ("gkv@0.8", False, 2), ("full", True, 2), ("gkv@0.8", True, 2),
    ]  # fmt: skip
    refused = CliRunner().invoke(main, [*command, "--force", "--policy", "kvzip"])
    assert refused.exit_code == 1 and "the policy kvzip cannot choose in training: choose among" in refused.stderr
