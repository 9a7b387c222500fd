import builtins
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from shallow_model import write_shallow_model
from tiny_model import N_VOCAB, write_tiny_model

from kvlocal.cache.second_read import INSTRUCTION
from kvlocal.conversations.dialogues import load as load_dialogues
from kvlocal.errors import KvlocalError
from kvlocal.evaluation.history import turn_tokens
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model
from kvlocal.nexus.file import NexusFile
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.training.examples import Example, Examples, joined, read
from kvlocal_cli.main import main
from kvlocal_cli.progress import LongWork

MESSAGES = [
    {"role": "user", "content": "My cat is called Noodle. What is a good food for her?"},
    {"role": "assistant", "content": "Fish, and a little chicken."},
    {"role": "user", "content": "How often?"},
    {"role": "assistant", "content": "Twice a day."},
    {"role": "user", "content": "What is her name?"},
    {"role": "assistant", "content": "Her name is Noodle."},
]


def write_data(path: Path, *dialogues: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogues))
    return path


# Without PyTorch


def test_segments_are_what_a_session_reads(smollm2: Path, tmp_path: Path) -> None:
    path = write_data(tmp_path / "a.jsonl", MESSAGES)
    with Model(smollm2) as model:
        examples = read(model, [path], max_tokens=1024, held_out=0.0)
        template = ChatTemplate.from_model(model)
        prefix, *turns = turn_tokens(model, template, load_dialogues(path).dialogues[0].messages)
        (closing,) = [tokens for _, tokens in template.tokens(model, template.close_assistant(MESSAGES, ""))]
        (example,) = examples.training
        assert np.array_equal(example.prefix, prefix)
        assert np.array_equal(np.concatenate(example.segments), np.concatenate([*turns, closing]))
        texts = [b"".join(model.token_bytes(token, special=True) for token in segment.tolist()).decode() for segment in example.segments]
        asked = b"".join(model.token_bytes(token, special=True) for token in examples.instruction.tolist()).decode()
    assert [text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n") for text in texts] == [True] * 3
    assert "Twice a day." in texts[1] and "Noodle" in texts[2]
    assert asked == f"<|im_start|>user\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n"


def test_nothing_is_left_out_in_silence(smollm2: Path, tmp_path: Path) -> None:
    long = [{"role": "user", "content": "Go on. " * 200}, {"role": "assistant", "content": "No."}]
    numbered = [
        {"role": role, "content": f"This is turn {i} of the conversation, which goes on and on for a while, as conversations do."}
        for i in range(12)
        for role in ("user", "assistant")
    ]
    dialogues = [MESSAGES, MESSAGES, MESSAGES[:2], [*MESSAGES[:2], *long, *MESSAGES[4:]], [{"role": "user", "content": "Hello"}], numbered]
    path = write_data(tmp_path / "a.jsonl", *dialogues)
    with Model(smollm2) as model:
        found = read(model, [path], max_tokens=200, held_out=0.0)
    assert (found.n_dialogues, found.n_empty, found.n_split, found.n_too_long, found.n_repeated) == (5, 1, 1, 1, 1)
    assert all(example.n_tokens <= 200 and len(example.segments) >= 2 for example in found.training)
    # 3 of the first, 1 of the third, 2 of the fourth, 12 of the last; those that are alone are counted
    assert sum(len(example.segments) for example in found.training) + found.n_single == 3 + 1 + 2 + 12
    assert found.left_out["single"] == found.n_single >= 1


def test_a_conversation_behind_another_takes_the_last_segments_there_is_room_for() -> None:
    def example(*lengths: int) -> Example:
        return Example(np.zeros(3, np.int32), tuple(np.full(n, n, np.int32) for n in lengths))

    own = example(5, 6)
    for room, expected in ((0, ()), (7, ()), (8, (8,)), (16, (8,)), (17, (9, 8)), (100, (7, 9, 8))):
        joined = own.behind(example(7, 9, 8), own.n_tokens + room)
        assert tuple(map(len, joined.segments)) == (*expected, 5, 6) and len(joined.prefix) == 3


def test_a_segment_cut_in_two() -> None:
    segments = tuple(np.arange(n, dtype=np.int32) for n in (5, 6, 7))
    cut = Example(np.zeros(3, np.int32), segments).cut(1, 4)
    assert [part.tolist() for part in cut.segments] == [list(range(5)), [0, 1, 2, 3], [4, 5], list(range(7))]


def test_a_segment_recited() -> None:
    segments = tuple(np.arange(n, dtype=np.int32) for n in (5, 6, 7))
    recited = Example(np.zeros(3, np.int32), segments).recited(2, 0, np.array([90, 91], np.int32))
    assert [part.tolist() for part in recited.segments] == [list(range(5)), list(range(6)), [90, 91, 0, 1, 2, 3, 4]]


def test_what_is_held_out_depends_on_the_conversation_alone(smollm2: Path, tmp_path: Path) -> None:
    dialogues = [[{**MESSAGES[0], "content": f"My number is {i}."}, *MESSAGES[1:]] for i in range(40)]
    with Model(smollm2) as model:
        found = read(model, [write_data(tmp_path / "a.jsonl", *dialogues)], max_tokens=1024, held_out=0.3)
        fewer = read(model, [write_data(tmp_path / "a.jsonl", *dialogues[::-2])], max_tokens=1024, held_out=0.3)
    assert len(found.training) + len(found.held_out) == 40 and 3 < len(found.held_out) < 25
    held_out, training = ({example.key for example in part} for part in (found.held_out, found.training))
    assert not held_out & training
    assert {example.key for example in fewer.held_out} <= held_out and {example.key for example in fewer.training} <= training


def test_data_without_a_second_turn(smollm2: Path, tmp_path: Path) -> None:
    with Model(smollm2) as model, pytest.raises(KvlocalError, match="no conversation of two turns"):
        read(model, [write_data(tmp_path / "a.jsonl", MESSAGES[:2])], max_tokens=1024, held_out=0.0)


def test_pytorch_is_asked_for(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = builtins.__import__

    def without_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return genuine(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    data = write_data(tmp_path / "a.jsonl", MESSAGES)
    result = CliRunner().invoke(main, ["nexus", "train", str(smollm2), "--data", str(data), "-o", str(tmp_path / "a.gguf")])
    wanted = "kvlocal: training and its evaluation need PyTorch: install it with `pip install kvlocal[train]`\n"
    assert (result.exit_code, result.stderr) == (1, wanted)


# With it

torch = pytest.importorskip("torch")

from kvlocal.training.decoder import Decoder  # noqa: E402
from kvlocal.training.distil import Compression, Distillation, SequenceLayout  # noqa: E402
from kvlocal.training.divergence import divergences  # noqa: E402
from kvlocal.training.nexus_training import Training, TrainingError, TrainingSettings  # noqa: E402
from kvlocal.training.parameters import Parameters  # noqa: E402
from kvlocal.training.row_divergence import RowsKL  # noqa: E402
from kvlocal.training.weights import Weights  # noqa: E402


def example(seed: int, *lengths: int) -> Example:
    rng = np.random.default_rng(seed)
    prefix, *segments = (rng.integers(0, N_VOCAB, n).astype(np.int32) for n in lengths)
    return Example(prefix, tuple(segments))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Container:
    path = tmp_path_factory.mktemp("base") / "tiny.gguf"
    write_tiny_model(path, "llama")
    return Container(path)


@pytest.fixture(scope="module")
def decoder(base: Container) -> Decoder:
    return Decoder(Weights.load(base, torch.float32, "cpu"))


def test_visibility_against_a_slow_loop() -> None:
    conversation = example(0, 3, 5, 4, 6, 7, 2)
    layout = SequenceLayout.of(conversation, Compression((2, 3, 2, 9), 2, 0.5, n_judged=2))
    # who wrote each row: (segment, Nexus or not); nothing behind what is judged
    counts = [(-1, False, 3), (0, False, 5), (0, True, 2), (1, False, 4), (1, True, 3), (2, False, 6), (2, True, 2), (3, False, 7)]
    rows = [(segment, is_nexus) for segment, is_nexus, n in counts for _ in range(n)]
    assert list(zip(layout.segments, layout.nexus >= 0, strict=True)) == rows
    past = [i for i, (segment, is_nexus) in enumerate(rows) if segment < 2 and not is_nexus]
    own = [i for i in range(len(rows)) if i not in past]
    assert layout.past.tolist() == past and layout.own.tolist() == own
    kept = torch.rand(2, 3, len(past), generator=torch.Generator().manual_seed(0)) < 0.5
    some, none = layout.visible(kept), layout.visible(None)
    for r, i in enumerate(own):
        for c, j in enumerate(past + own):
            segment, (other, is_nexus) = rows[i][0], rows[j]
            for layer in range(2):
                for head in range(3):
                    if j > i:
                        expected = expected_bare = False
                    elif other == -1 or is_nexus or other == segment or other >= 2:
                        expected = expected_bare = True
                    else:
                        expected, expected_bare = bool(kept[layer, head, c]), False
                    assert some[layer, head, r, c] == expected and none[0, 0, r, c] == expected_bare


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_all_raw_cells_and_no_nexus_tokens_is_the_teacher(family: str, tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf", family)
    decoder = Decoder(Weights.load(Container(tmp_path / "tiny.gguf"), torch.float32, "cpu"))
    conversation = example(1, 4, 20, 15, 18, 12)
    reading = Distillation(decoder, conversation, n_gone=[1, 2, 3], with_masses=True)
    parameters = Parameters.new(decoder.weights, 8, 2, 0)
    rng = np.random.default_rng(0)
    for n_gone, n_judged in ((1, 1), (2, 2), (3, 1), (3, 2)):
        same = reading.loss(parameters, Compression((0, 0, 0), n_gone, 1.0, n_judged=n_judged), rng)
        assert same.kl.item() == pytest.approx(0, abs=1e-6) and same.attention.item() == pytest.approx(0, abs=1e-5)
    if family == "gemma3":
        # both of its layers have a sliding window, and lose nothing
        return
    half, none = (reading.loss(parameters, Compression((0, 0, 0), 2, raw), rng) for raw in (0.5, 0.0))
    assert 1e-4 < half.kl.item() < none.kl.item() and 0 < half.attention.item() < none.attention.item()


def test_a_student_reads_on_from_the_teachers_cells(decoder: Decoder) -> None:
    """One segment is gone, so the student's cells are the teacher's exactly, but for the positions behind Nexus tokens that the judged rows have."""
    conversation, k = example(2, 4, 20, 15), 3
    parameters = Parameters.new(decoder.weights, 8, 2, 0)
    for _, b in parameters.pairs.values():
        b.data.normal_(generator=torch.Generator().manual_seed(1))
    found = Distillation(decoder, conversation, n_gone=[1], with_masses=False).loss(
        parameters, Compression((k,), 1, 0.0), np.random.default_rng(0)
    )
    tokens = torch.from_numpy(np.concatenate([conversation.prefix, *conversation.segments])).long()
    with torch.no_grad():
        embedded, n = decoder.embed(tokens), len(tokens)
        teacher = decoder.forward(embedded, torch.arange(n), torch.ones(1, 1, n, n, dtype=torch.bool).tril())
        # everything at once, Nexus tokens after the 24th token
        x = torch.cat([embedded[:24], parameters.table[:k], embedded[24:]])
        visible = torch.ones(n + k, n + k, dtype=torch.bool).tril()
        visible[24 + k :, 4:24] = False
        student = decoder.forward(x, torch.arange(n + k), visible[None, None], adapter=parameters.adapter(torch.float32, torch.arange(24, 24 + k)))
        p, q = (decoder.logits(rows).log_softmax(-1) for rows in (teacher.hidden[24:], student.hidden[24 + k :]))
    assert found.kl.item() == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)


def test_cells_that_are_moved_are_those_read_there(decoder: Decoder) -> None:
    x = torch.randn(6, decoder.hyper.n_embd, generator=torch.Generator().manual_seed(0))
    visible = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        here, there = (decoder.forward(x, positions, visible).cells for positions in (torch.arange(6), torch.arange(6) + 40))
        moved = decoder.moved(here, torch.full((6,), 40))
    for a, b in zip(moved, there, strict=True):
        assert torch.allclose(a.keys, b.keys, atol=1e-4) and torch.allclose(a.values, b.values, atol=1e-4)


def test_chosen_cells_are_the_teachers_best(decoder: Decoder) -> None:
    conversation = example(1, 4, 30, 25, 18)
    reading = Distillation(decoder, conversation, n_gone=[1, 2], with_masses=False)
    with torch.no_grad():
        plain = torch.from_numpy(np.concatenate([conversation.prefix, *conversation.segments])).long()
        n = len(plain)
        visible = torch.ones(1, 1, n, n, dtype=torch.bool).tril()
    for n_gone, end in ((1, 34), (2, 59)):
        compression = Compression((3, 2), n_gone, 0.4)
        kept = reading._kept(SequenceLayout.of(conversation, compression), compression, np.random.default_rng(0))
        assert kept.shape[-1] == end and (kept.sum(-1) == round(0.4 * (end - 4))).all() and not kept[..., :4].any()
        with torch.no_grad():
            watched = decoder.forward(decoder.embed(plain), torch.arange(n), visible, watch=torch.arange(end - 16, end)).watched
        scores = watched.mean(2)[:, :, 4:end]
        for layer in range(scores.shape[0]):
            for head in range(scores.shape[1]):
                best = set(scores[layer, head].topk(round(0.4 * (end - 4))).indices.tolist())
                assert {int(cell) - 4 for cell in kept[layer, head].nonzero().flatten()} == best


def test_the_gradient_of_the_divergence(decoder: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(150, decoder.hyper.n_embd, generator=generator) for _ in range(2))
    student.requires_grad_()
    p, q = (decoder.logits(hidden).log_softmax(-1) for hidden in (teacher, student))
    expected = (p.exp() * (p - q)).sum(-1).mean()
    (gradient,) = torch.autograd.grad(expected, student)
    found = RowsKL.apply(student, teacher, decoder)
    (found_gradient,) = torch.autograd.grad(3 * found, student)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(found_gradient, 3 * gradient, atol=1e-6)


def test_samples_cover_what_is_promised() -> None:
    conversation = example(0, 4, 40, 60, 30, 50, 40)
    drawn = [Compression.sample(np.random.default_rng(i), conversation, (0.5, 0.9), 64) for i in range(400)]
    shares = [compression.raw for compression in drawn]
    assert 0.2 < np.mean(np.array(shares) == 0) < 0.4 and 1.0 in shares and min(share for share in shares if share) < 0.06
    assert {compression.n_gone for compression in drawn} == {1, 2, 3, 4} and {compression.n_judged for compression in drawn} == {1, 2}
    assert max(compression.ks[1] for compression in drawn) == 30 and min(compression.ks[1] for compression in drawn) < 6
    assert {Compression.sample(np.random.default_rng(i), conversation, (0.5,), 64, n_gone=2).n_gone for i in range(20)} == {2}


SETTINGS = TrainingSettings(steps=6, batch=2, k=8, rank=2, ratios=(0.5, 0.8), join=1, recite=0.0, seed=1)


@pytest.fixture
def examples() -> Examples:
    training = tuple(example(i, 4, 20, 15 + i, 18) for i in range(5))
    return Examples(training, (example(9, 4, 20, 20, 20),), np.arange(3, dtype=np.int32), 6, 0, 0, 0, 0, 0, ("a",))


def train(base: Container, examples: Examples, path: Path, settings: TrainingSettings = SETTINGS, **options) -> tuple[list, NexusFile]:
    measured = []
    file = Training(base, "tiny", examples, settings, path, "cpu").run(measured.append, **options)
    return measured, file


def assert_same(a: NexusFile, b: NexusFile) -> None:
    assert np.array_equal(a.table, b.table) and a.adapter.keys() == b.adapter.keys()
    assert all(np.array_equal(x, y) for name in a.adapter for x, y in zip(a.adapter[name], b.adapter[name], strict=True))
    assert a.record["losses"] == b.record["losses"]


def test_a_killed_run_goes_on_to_the_same_result(base: Container, examples: Examples, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def killed_after(step: int):
        def report(measurement) -> None:
            if measurement.step == step:
                raise Killed

        return report

    measured, expected = train(base, examples, tmp_path / "whole.gguf")
    assert [m.step for m in measured] == [1, 2, 3, 4, 5, 6, 6] and measured[-1].held_out.keys() >= {"nothing", "nexus@0.8", "mixed@0.5", "raw@0.9"}
    path = tmp_path / "a.gguf"
    for step in (2, 5):
        run = Training(base, "tiny", examples, SETTINGS, path, "cpu")
        with pytest.raises(Killed):
            run.run(killed_after(step), checkpoint_seconds=0)
    # the file is there to be tried while training goes on
    NexusFile.load(path).check_base(base)
    # the update it was killed at is made again
    resumed = Training(base, "tiny", examples, SETTINGS, path, "cpu")
    assert resumed.step == 4
    assert_same(resumed.run(lambda measurement: None), expected)
    assert_same(NexusFile.load(path), NexusFile.load(tmp_path / "whole.gguf"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.gguf", "whole.gguf"]


def test_a_stopped_run_goes_on(base: Container, examples: Examples, tmp_path: Path) -> None:
    _, expected = train(base, examples, tmp_path / "whole.gguf")
    run = Training(base, "tiny", examples, SETTINGS, tmp_path / "a.gguf", "cpu")
    run.run(lambda measurement: run.stop())
    assert run.step == 1
    measured, found = train(base, examples, tmp_path / "a.gguf", limit_seconds=0)
    assert not measured and found.record["steps"] == 1
    assert_same(train(base, examples, tmp_path / "a.gguf")[1], expected)


def test_a_checkpoint_of_another_run_is_refused(base: Container, examples: Examples, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    train(base, examples, path, limit_seconds=0)
    with pytest.raises(TrainingError, match="other settings"):
        train(base, examples, path, replace(SETTINGS, seed=2))
    (tmp_path / "a.gguf.partial").write_bytes(b"no")
    with pytest.raises(TrainingError, match="no checkpoint that can be read"):
        train(base, examples, path)


@pytest.mark.parametrize("change", [{}, {"rank": 0}, {"attention_weight": 0.0}])
def test_it_learns(base: Container, decoder: Decoder, examples: Examples, tmp_path: Path, change: dict) -> None:
    settings = replace(SETTINGS, steps=90, batch=2, k=8, ratios=(0.6,), **change)
    _, file = train(base, examples, tmp_path / "a.gguf", settings)
    before = Parameters.new(decoder.weights, settings.k, settings.rank, settings.seed)

    def lost(parameters: Parameters) -> float:
        return np.mean([divergences(decoder, parameters, one, (0.6,))["nexus@0.6"] for one in examples.training])

    assert lost(Parameters.of(file, decoder.device)) < 0.9 * lost(before)
    assert file.rank == settings.rank and file.record["evaluations"][-1]["step"] == 90


def test_training_begins_with_another_file(base: Container, examples: Examples, tmp_path: Path) -> None:
    _, first = train(base, examples, tmp_path / "a.gguf")
    settings = replace(SETTINGS, start="a", steps=2)
    begun = Training(base, "tiny", examples, settings, tmp_path / "b.gguf", "cpu", first)
    assert np.array_equal(begun.file().table, first.table)
    begun.run(lambda measurement: None, limit_seconds=0)
    # it goes on from its own checkpoint, and not without the file
    with pytest.raises(TrainingError, match="other settings"):
        Training(base, "tiny", examples, replace(settings, start=""), tmp_path / "b.gguf", "cpu")
    with pytest.raises(TrainingError, match="8 embeddings and rank 2"):
        Training(base, "tiny", examples, replace(settings, k=16), tmp_path / "c.gguf", "cpu", first)


def test_held_out_conversations_are_joined_like_others(base: Container, examples: Examples, tmp_path: Path) -> None:
    held_out = tuple(example(10 + i, 4, 20, 20) for i in range(3))
    assert [len(one.segments) for one in joined(held_out, 2, 100)] == [4, 4, 4]
    assert [len(one.segments) for one in joined(held_out, 3, 90)] == [4, 4, 4]
    assert np.array_equal(joined(held_out, 2, 100)[2].segments[0], held_out[0].segments[0])
    alone, together = (
        train(base, replace(examples, held_out=held_out), tmp_path / f"{n}.gguf", replace(SETTINGS, steps=1, join=n))[0][-1].held_out for n in (1, 3)
    )
    assert alone != together


def test_recitals_are_judged_apart(base: Container, examples: Examples, tmp_path: Path) -> None:
    def run(recite: float) -> tuple[list, NexusFile]:
        return train(base, examples, tmp_path / f"{recite}.gguf", replace(SETTINGS, recite=recite))

    (*never, evaluation), _ = run(0.0)
    assert all(np.isnan(measured.recital) and measured.kl > 0 for measured in never)
    assert not any("recital" in name for name in evaluation.held_out)
    (*always, evaluation), file = run(1.0)
    assert all(np.isnan(measured.kl) and measured.recital > 0 for measured in always)
    assert evaluation.held_out.keys() >= {"nexus@0.8", "recital nothing", "recital nexus@0.8", "recital raw@0.8"}
    assert [set(entry) for entry in file.record["losses"]] == [{"step", "attention", "recital"}] * 6
    (*some, _), file = run(0.5)
    kinds = {(bool(np.isnan(measured.kl)), bool(np.isnan(measured.recital))) for measured in some}
    assert (False, False) in kinds and len(kinds) > 1
    json.dumps(file.record, allow_nan=False)


def test_nothing_held_out(base: Container, examples: Examples, tmp_path: Path) -> None:
    measured, file = train(base, replace(examples, held_out=()), tmp_path / "a.gguf", replace(SETTINGS, steps=1))
    assert measured[-1].held_out == {} and file.record["evaluations"] == []


# The command


def test_train_command(smollm2: Path, tmp_path: Path) -> None:
    write_shallow_model(smollm2, tmp_path / "shallow.gguf", 1)
    dialogues = [[{**MESSAGES[0], "content": f"My number is {i}."}, *MESSAGES[1:]] for i in range(20)]
    data, out = write_data(tmp_path / "a.jsonl", *dialogues), tmp_path / "a.nexus.gguf"
    command = ["nexus", "train", str(tmp_path / "shallow.gguf"), "--data", str(data), "-o", str(out), "--threads", "1", "--steps", "2"]
    command += ["--batch", "1", "--held-out", "1", "--fixed-ratio", "0.8"]
    stopped = CliRunner().invoke(main, [*command, "--minutes", "0.0001"])
    assert stopped.exit_code == 0 and "stopped after 1 of 2 updates" in stopped.stderr and (tmp_path / "a.nexus.gguf.partial").exists()
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.stderr
    assert "going on after 1 updates" in result.stderr and "held out nothing" in result.stderr and result.stdout == f"{out}\n"
    file = NexusFile.load(out)
    file.check_base(Container(tmp_path / "shallow.gguf"))
    assert (file.k, file.rank, file.ratios, file.record["steps"]) == (64, 16, (0.8,), 2)
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "name another file or replace it with --force" in again.stderr
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0
    # a checkpoint does not make any file one of the run
    partial = tmp_path / "a.nexus.gguf.partial"
    partial.write_bytes(b"checkpoint")
    out.write_text("precious")
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1 and "name another file or replace it with --force" in again.stderr and out.read_text() == "precious"


def test_eval_command(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shallow_model(smollm2, tmp_path / "shallow.gguf", 1)
    dialogues = [[{**MESSAGES[0], "content": f"My number is {i}."}, *MESSAGES[1:]] for i in range(3)]
    data, file = write_data(tmp_path / "a.jsonl", *dialogues), tmp_path / "a.nexus.gguf"
    common = [str(tmp_path / "shallow.gguf"), "--data", str(data), "--threads", "1"]
    assert CliRunner().invoke(main, ["nexus", "train", *common, "-o", str(file), "--steps", "1", "--batch", "1", "--held-out", "0"]).exit_code == 0
    monkeypatch.setattr(LongWork, "is_time", lambda self: True)
    result = CliRunner().invoke(main, ["nexus", "eval", str(file), "-m", *common, "--ratio", "0.8", "--limit", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    assert [(row["kept"], row["ratio"], row["n"]) for row in rows] == [("nothing", None, 2), ("nexus", 0.8, 2), ("mixed", 0.8, 2), ("raw", 0.8, 2)]
    assert all(0 < row["lo"] <= row["mean"] <= row["hi"] for row in rows)
    assert "1 of 2 conversations, 0 min left" in result.stderr
