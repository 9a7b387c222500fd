"""Dialogues that a model writes with itself: the draw, the plans, what is left out, and runs of the real model."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from kvlocal.errors import KvlocalError
from kvlocal.evaluation.facts import load_facts
from kvlocal.llama.context import Context
from kvlocal.llama.errors import CacheFull, EngineError
from kvlocal.llama.model import Model
from kvlocal.template.chat_template import ChatTemplate
from kvlocal.template.defaults import CHATML, GEMMA, PLAIN
from kvlocal.training.dialogue_plan import MAX_PAIRS, MIN_PAIRS, draw_plan
from kvlocal.training.draw import draw
from kvlocal.training.synth import SEEDS_PER_RUN, DataFile, SynthSettings, synthesize
from kvlocal.training.themes import themes
from kvlocal.training.turn_text import flaw, sentence_ends
from kvlocal_cli.groups import Lazy
from kvlocal_cli.main import Kvlocal

SYNTH = {"synth": Lazy("kvlocal_cli.nexus_synth:synth_command", "")}

# One thread: two would wait for each other wherever the cores are shared.
SETTINGS = SynthSettings(seed=3, parallel=4, n_threads=1)
TOKENS = 700


@pytest.fixture(scope="module")
def model(smollm2):
    with Model(smollm2) as m:
        yield m


@pytest.fixture(scope="module")
def written(model, tmp_path_factory):
    """Everything that came up in a run without interruption, and its file."""
    path = tmp_path_factory.mktemp("synth") / "data.jsonl"
    return run(model, path), path


def run(model, path, settings=SETTINGS, tokens=TOKENS):
    with DataFile(path, settings.key(model), settings) as data:
        return list(synthesize(model, data, tokens, settings))


# Several sequences in one batch


def test_a_batch_of_several_sequences_equals_each_alone(model):
    texts = ["The sea is deep and cold.", "A train leaves the station at noon.", "One, two, three, four, five, six."]
    tokens = np.array([model.tokenize(text, parse_special=False)[:6] for text in texts])
    with Context(model, n_cells=256, n_ubatch=32, n_seq_max=3, n_threads=1) as context:
        for i in range(6):
            context.decode_sequences(tokens[:, i], [i] * 3, [0, 1, 2])
        together = context.logits_all()
        assert [context.pos_max(seq) for seq in range(3)] == [5, 5, 5]
        context.clear()
        alone = []
        for seq in range(3):
            context.decode(tokens[seq], 0, seq)
            alone.append(context.logits())
        context.clear()
        # equally many tokens of each, not in order
        order = np.array([(seq, pos) for pos in range(6) for seq in (2, 0, 1)])
        context.decode_sequences(tokens[order[:, 0], order[:, 1]], order[:, 1], order[:, 0])
        last = context.logits_all()[-3:]
    assert np.abs(together - np.array(alone)).max() < 0.5
    assert np.abs(last - np.array(alone)[[2, 0, 1]]).max() < 0.5


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        (([1, 2], [0], [0, 1]), "same length"),
        (([[1]], [[0]], [[0]]), "one dimension"),
        (([], [], []), "1 to 8 tokens"),
        ((range(9), range(9), [0] * 9), "split it"),
        (([1, 2], [0, -1], [0, 1]), "at least 0"),
        (([1, 2], [0, 0], [0, 2]), "no sequence 2"),
        (([1, 2], [0, 0], [-1, 0]), "no sequence -1"),
        (([1, 10**6], [0, 0], [0, 1]), "outside the vocabulary"),
        (([1, 2], [5, 0], [0, 1]), "does not continue sequence 0|another sequence"),
    ],
)
def test_wrong_batches_are_refused(model, arrays, why):
    with Context(model, n_cells=256, n_ubatch=8, n_seq_max=2, n_threads=1) as context:
        context.decode([1, 2], 0)
        with pytest.raises(EngineError, match=why):
            context.decode_sequences(*arrays)
        context.decode_sequences([1, 1], [2, 0], [0, 1])
        assert (context.pos_max(0), context.pos_max(1)) == (2, 0)


def test_a_full_sequence_is_told(model):
    with Context(model, n_cells=256, n_seq_max=2, n_threads=1) as context:
        context.decode([1] * 256, 0, 1, "none")
        with pytest.raises(CacheFull, match="sequence 0 or of another of this batch"):
            context.decode_sequences([1, 1], [0, 256], [0, 1])


# The draw


def one_row(logits, temperature, uniform, top_p, min_p):
    """The same, written out."""
    p = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    kept = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    order = [token for token in order[:kept] if p[token] >= min_p * p[order[0]]]
    reached = np.cumsum(p[order]) / p[order].sum()
    return order[int(np.searchsorted(reached, uniform, side="right"))]


def test_draws_are_those_of_the_filters_written_out():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(40, 3000)) * 3).astype(np.float32)
    temperature = rng.choice([0.3, 0.7, 1.0], 40).astype(np.float32)
    uniform = rng.random(40)
    before = logits.copy()
    drawn = draw(logits, temperature, uniform, 0.6, 0.02)
    assert drawn.tolist() == [one_row(*row, 0.6, 0.02) for row in zip(logits, temperature, uniform, strict=True)]
    assert np.array_equal(logits, before)
    # and no row depends on the others
    assert draw(logits[7:8], temperature[7:8], uniform[7:8], 0.6, 0.02) == drawn[7]


def test_what_is_impossible_is_never_drawn():
    logits = np.full((2, 5), -np.inf, dtype=np.float32)
    logits[0, 3], logits[1, 1:3] = 1.0, 0.0
    assert draw(logits, np.ones(2, np.float32), np.array([0.999999, 0.999999])).tolist()[0] == 3
    assert {draw(logits, np.ones(2, np.float32), np.array([0.5, u]))[1] for u in (0.0, 0.4, 0.6, 0.99)} == {1, 2}


# Plans


def test_a_plan_depends_on_its_seed_alone():
    plans = [draw_plan(seed) for seed in range(300)]
    assert plans == [draw_plan(seed) for seed in range(300)] and len(set(plans)) == 300
    openings = {plan.pairs[0].user.given for plan in plans}
    assert len(openings) > 280
    for plan in plans:
        assert MIN_PAIRS <= len(plan.pairs) <= MAX_PAIRS
        assert not any("{" in part.given.replace("{}", "") for pair in plan.pairs for part in (pair.user, pair.answer))


def test_what_is_asked_was_told_before():
    values = {value for kind in themes().facts for value in kind.values}
    recalled = 0
    for seed in range(200):
        pairs = draw_plan(seed).pairs
        for i, pair in enumerate(pairs):
            if pair.recalls:
                recalled += 1
                told = " ".join(earlier.user.given for earlier in pairs[:i])
                assert any(value.lower() in pair.answer.given.lower() and value in told for value in values), pair
                assert i > 0 and not pair.user.goes_on and not pairs[0].recalls
                assert " my " not in pair.answer.given
    assert recalled > 150


def test_no_fact_is_one_of_the_evaluation_s():
    told = {value for topic in load_facts().topics for value in topic.values} | {topic.about for topic in load_facts().topics}
    own = {text.strip('"') for kind in themes().facts for text in (*kind.values, *kind.things)}
    assert not told & own


# What is left out


@pytest.mark.parametrize(
    ("role", "text", "earlier", "what"),
    [
        ("user", "How do bees find their way home?", [], None),
        ("assistant", "1. Wash it.\n2. Dry it.\n3. Put it away.", [], None),
        ("assistant", " \n ", [], "empty"),
        ("assistant", "...", [], "empty"),
        ("assistant", "a \ufffd", [], "broken characters"),
        ("assistant", "Yes.<|im_end|>", [], "markup"),
        ("user", "Thanks.\n### Assistant:\nYes", [], "markup"),
        ("user", "One @END@ two", [], "markup"),
        ("assistant", "So:\n```python\nx = 1", [], "unfinished code"),
        ("assistant", "It is red and round. " * 5, [], "repetition"),
        ("assistant", "- the same item\n- the same item\n- the same item", [], "repetition"),
        ("assistant", "It is late.", ["Hi", "It is late!"], "echo"),
        ("user", "How may I help you today?", [], "assistant's voice"),
        ("assistant", "How may I help you today?", [], None),
    ],
)
def test_flaws_of_a_turn(role, text, earlier, what):
    assert flaw(role, text, text, ["@END@"], earlier) == what


def test_ends_of_sentences():
    assert sentence_ends('He said "No!" Then 3.5 came.\n1. One') == [13, 28, 29]


# Templates


@pytest.mark.parametrize("source", [CHATML, GEMMA, PLAIN])
def test_a_user_turn_is_its_start_and_its_end(source):
    template = ChatTemplate(source)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for messages in ([], history):
        both = template.user_start(messages, "How are you?") + template.user_end(messages)
        assert both == template.user_turn(messages, "How are you?")
        texts = "".join(piece.text for piece in template.user_start(messages, "How"))
        assert texts.endswith("How") and template.render([{"role": "user", "content": "How"}], opening=False).count("How") == 1


# Runs of the model


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_dialogues_are_whole(model, written):
    came, path = written
    records = lines(path)
    assert sum(record["tokens"] for record in records) >= TOKENS > sum(record["tokens"] for record in records[:-1])
    assert [record["seed"] for record in records] == [dialogue.seed for dialogue in came if dialogue.messages]
    assert [dialogue.seed for dialogue in came] == list(range(3 * SEEDS_PER_RUN, 3 * SEEDS_PER_RUN + len(came)))
    template = ChatTemplate.from_model(model)
    for record in records:
        messages = record["messages"]
        assert len(messages) >= 2 * MIN_PAIRS and len(messages) % 2 == 0
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        plan = draw_plan(record["seed"])
        assert messages[0]["content"].startswith(plan.pairs[0].user.given)
        for message in messages:
            text = message["content"]
            assert text == text.strip() != "" and "<|" not in text and "\ufffd" not in text
        # the tokens are those of the rendered dialogue, but for spaces at the ends of turns
        n_tokens = len(model.tokenize(template.render(messages, opening=False), parse_special=True))
        assert record["tokens"] == pytest.approx(n_tokens, abs=3 * len(messages))


def test_a_resumed_run_equals_one_without_interruption(model, written, tmp_path):
    path = tmp_path / "data.jsonl"
    first, second, *_ = written[1].read_bytes().splitlines(keepends=True)
    # killed while the second line was written
    path.write_bytes(first + second[:40])
    run(model, path)
    assert path.read_bytes() == written[1].read_bytes()
    # and a finished one has nothing to do
    assert run(model, path) == []


def test_another_run_s_file_is_refused(model, written, tmp_path):
    for settings in (SynthSettings(seed=4, parallel=4), SynthSettings(seed=3, parallel=5)):
        with pytest.raises(KvlocalError, match="name another file"), DataFile(written[1], settings.key(model), settings):
            pass
    other = tmp_path / "other"
    other.write_text("a line\nand half a")
    with pytest.raises(KvlocalError, match="name another file"), DataFile(other, "k", SETTINGS):
        pass
    assert other.read_text() == "a line\nand half a"


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("MODEL", "--tokens", "5"), 2, "--output"),
        (("MODEL", "-o", "x"), 2, "--tokens"),
        (("MODEL", "-o", "x", "--tokens", "0"), 2, "0 is not in the range"),
        (("MODEL", "-o", "x", "--tokens", "5", "--parallel", "65"), 2, "65 is not in the range"),
        (("no-such.gguf", "-o", "x", "--tokens", "5"), 1, "no-such.gguf"),
        (("MODEL", "-o", "no/such/x", "--tokens", "5"), 1, "cannot keep results in no/such/x"),
    ],
)
def test_bad_arguments_are_one_sentence(smollm2, tmp_path, monkeypatch, args, code, says):
    monkeypatch.chdir(tmp_path)
    args = [str(smollm2) if arg == "MODEL" else arg for arg in args]
    result = CliRunner().invoke(Kvlocal(lazy=SYNTH), ["synth", *args])
    assert result.exit_code == code, result.output
    sentence = result.stderr.strip()
    assert says in sentence and sentence.startswith("kvlocal: ") and "\n" not in sentence
    assert not list(tmp_path.iterdir())


def test_the_command_says_how_far_it_is(smollm2, written, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(written[1].read_bytes())
    args = ["synth", str(smollm2), "-o", str(path), "--tokens", str(TOKENS), "--seed", "3", "--parallel", "4", "--threads", "1"]
    result = CliRunner().invoke(Kvlocal(lazy=SYNTH), args)
    assert result.exit_code == 0, result.output
    n = len(lines(path))
    assert f"going on after {n} dialogues" in result.stderr and f"of {TOKENS:,} tokens" in result.stderr and result.stdout == ""
