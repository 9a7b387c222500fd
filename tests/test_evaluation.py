"""What an evaluation is made of, without a model: dialogues, variants, intervals, the reference on disk, unfinished work, rows."""

import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from kvlocal import policies
from kvlocal.chat.config import SessionConfig
from kvlocal.conversations.data_file import DataError
from kvlocal.conversations.dialogues import load, shuffled
from kvlocal.errors import KvlocalError
from kvlocal.evaluation import figure, plot, report
from kvlocal.evaluation.dialogue import compare
from kvlocal.evaluation.facts import load_facts
from kvlocal.evaluation.recall import DISTANCES, mean_log_probabilities, names
from kvlocal.evaluation.recall_chats import FACTS_PER_CHAT, N_EXAMPLES, recall_chats
from kvlocal.evaluation.reference import (
    Reference,
    ReferenceCache,
    log_softmax,
    references_dir,
)
from kvlocal.evaluation.runner import (
    ChatFailure,
    Measurement,
    WorkFile,
    outcomes,
    pending,
)
from kvlocal.evaluation.small_talk import small_talk
from kvlocal.evaluation.statistics import bootstrap
from kvlocal.evaluation.variants import FULL, Variant, VariantError, parse_all
from kvlocal.files.fingerprint import fingerprint, run_key

# Dialogues


def write(path, *records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records), encoding="utf-8")
    return path


def history(*turns):
    return {"task": "GR", "id": 1, "history": [{"user": user, "bot": bot} for user, bot in turns]}


def messages(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}] * (system is not None) + turns}


def test_both_formats(tmp_path):
    data = load(write(tmp_path / "d.jsonl", history(("a", "b"), ("c", "d")), "", messages("e", "f", "open", system="s")))
    assert [dialogue.turns for dialogue in data.dialogues] == [(("a", "b"), ("c", "d")), (("e", "f"),)]
    assert data.dialogues[1].messages == messages("e", "f")["messages"]
    assert data.n_empty == 0


def test_dialogues_with_an_empty_text_are_counted(tmp_path):
    data = load(write(tmp_path / "d.jsonl", history(("a", " \n")), history(), messages("unanswered"), history(("a", "b"))))
    assert len(data.dialogues) == 1 and data.n_empty == 3


@pytest.mark.parametrize(
    "line, problem",
    [
        ("hello", "not JSON"),
        ("[]", "no messages"),
        ('{"history": 7}', "its history is not a list"),
        ('{"history": [{"user": "a"}]}', "turn 1 of its history is not"),
        ('{"history": [{"user": "a", "bot": "b"}, "c"]}', "turn 2 of its history is not"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', 'was not called'),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', "after turn 1, of the user, comes another"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = write(tmp_path / "d.jsonl", history(("a", "b")), line)
    with pytest.raises(DataError, match=f"d.jsonl, line 2: .*{problem}"):
        load(path)


def test_files_without_dialogues(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no dialogue"):
        load(write(tmp_path / "d.jsonl", ""))


def test_the_order_depends_on_the_seed_alone(tmp_path):
    dialogues = load(write(tmp_path / "d.jsonl", *(history((str(i), "b")) for i in range(50)))).dialogues
    assert shuffled(dialogues, 3) == shuffled(dialogues, 3) != shuffled(dialogues, 4)
    assert sorted(shuffled(dialogues, 3), key=lambda d: int(d.turns[0][0])) == list(dialogues)


# Variants


def test_a_spec_is_split_between_policy_and_session():
    variant = Variant.parse("gkv:lam=0.7:positions=cache:window=8", 0.8)
    assert (variant.policy, variant.policy_args, variant.fields) == ("gkv", {"lam": "0.7"}, {"positions": "cache", "window": 8})
    config = variant.config(SessionConfig(stride=64))
    assert (config.policy, config.ratio, config.positions, config.window, config.stride) == ("gkv", 0.8, "cache", 8, 64)
    assert FULL.config(SessionConfig()).ratio is None
    config = Variant.parse("recall:archive=ram:archive-type=q8_0", 0.5).config(SessionConfig())
    assert (config.policy, config.archive, config.archive_type) == ("recall", "ram", "q8_0")


@pytest.mark.parametrize(
    "spec, problem",
    [
        ("gvk", "there is no policy 'gvk': choose gkv"),
        ("gkv:beta=1", "no hyper-parameter 'beta'"),
        ("gkv:lam", "'lam' in 'gkv:lam' is not of the form name=value"),
        ("gkv:lam=2", "between 0 and 1"),
        ("streaming:stride=x", "must be a whole number"),
        ("streaming:stride=0", "stride is 0"),
        ("streaming:positions=here", "positions"),
        ("recall:archive=ram:archive_type=q9", "the archive's type is 'q9'"),
        ("recall:archive=off:archive_type=q8_0", "no archive"),
        ("snapkv:archive_type=q8_0", "no archive"),
        ("snapkv:archive=ram:archive-type=q8_0", "only the policy recall"),
    ],
)
def test_a_spec_that_cannot_be_run(spec, problem):
    with pytest.raises(VariantError, match=re.escape(problem)):
        Variant.parse(spec, 0.5)


def test_the_list_of_variants():
    variants = parse_all("snapkv, gkv:lam=0.7,full,snapkv", [0.5, 0.8, 0.5])
    assert [(v.spec, v.ratio) for v in variants] == [
        ("full", 0.0), ("snapkv", 0.5), ("gkv:lam=0.7", 0.5), ("snapkv", 0.8), ("gkv:lam=0.7", 0.8),
    ]  # fmt: skip
    assert [v.spec for v in parse_all("all", [0.5])] == ["full", *(name for name in policies.POLICIES if name != "full")]
    assert len(parse_all("all,gkv:lam=0.7", [0.5])) == len(policies.POLICIES) + 1


# Intervals


def test_bootstrap_against_a_slow_one():
    rng = np.random.default_rng(1)
    counts = rng.integers(1, 9, 40)
    sums = np.array([rng.random(n).sum() for n in counts])
    found = bootstrap(sums, counts)
    draws = rng.integers(0, 40, (4000, 40))
    means = [sum(sums[i] for i in draw) / sum(counts[i] for i in draw) for draw in draws]
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    assert (found.lo, found.hi) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.005)


def test_one_chat_has_no_interval(tmp_path):
    """However many values it has."""
    task = SimpleNamespace(name="recall", metrics=["choice", "choice@<500"])
    variants = [FULL, Variant.parse("snapkv", 0.5)]
    one = {(variant.spec, variant.ratio): {0: Measurement(0.5, {"choice": [1.0, 0.0], "choice@<500": [1.0]})} for variant in variants}
    two = {place: {**chats, 1: Measurement(0.5, {"choice": [1.0]})} for place, chats in one.items()}
    found = report.rows(task, variants, one, 0)
    assert [(row.mean, row.lo, row.hi, row.n) for row in found] == 2 * [(0.5, None, None, 2), (1, None, None, 1)]
    (_, whole), (_, split) = report.tables(found)
    assert [line[-1] for line in whole] == ["0.500", "0.500"] and [line[-1] for line in split] == ["1.000", "1.000"]
    assert json.loads(json.dumps(report.document(found, {})))["rows"][0]["lo"] is None
    (_, whole), (_, split) = report.tables(report.rows(task, variants, two, 0))
    assert all(re.fullmatch(r"0\.667 \[0\.\d+, 1\.000\]", line[-1]) for line in whole) and split[0][-1] == "1.000"
    pytest.importorskip("matplotlib")
    plot.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_bootstrap_is_deterministic_and_exact_without_spread():
    assert bootstrap([1, 2, 4], [1, 1, 1], seed=5) == bootstrap([1, 2, 4], [1, 1, 1], seed=5)
    assert bootstrap([3.0], [4]) == (0.75, 0.75, 0.75)
    assert bootstrap([2, 4], [1, 2]) == (2, 2, 2)


# The reference


def logits(n=5, n_vocab=300, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (n, n_vocab)).astype(np.float32)


def test_metrics_against_the_formula():
    full, compressed, tokens = logits(seed=1), logits(seed=2), np.array([4, 0, 299, 7, 7], np.int32)
    reference = Reference.of(tokens, full)
    found = compare(reference, log_softmax(reference.logp), compressed)
    kl, loss, same = [], [], []
    for p, q, token in zip(full.astype(np.float64), compressed.astype(np.float64), tokens, strict=True):
        p, q = np.exp(p) / np.exp(p).sum(), np.exp(q) / np.exp(q).sum()
        kl.append((p * np.log(p / q)).sum())
        loss.append(-np.log(q[token]))
        same.append(p.argmax() == q.argmax())
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-3)  # float16 on the disk
    assert found["cross_entropy"] == pytest.approx(np.mean(loss), rel=1e-5)
    assert found["agreement"] == np.mean(same)


def test_the_full_context_against_itself():
    full = logits(n_vocab=50_000)
    reference = Reference.of(np.zeros(5, np.int32), full)
    found = compare(reference, log_softmax(reference.logp), full)
    assert 0 <= found["kl"] < 1e-5 and found["agreement"] == 1
    assert found["cross_entropy"] == pytest.approx(reference.loss.mean(), rel=1e-6)


def test_a_reference_is_computed_once_and_again_if_damaged(tmp_path):
    cache, tokens, calls = ReferenceCache(tmp_path / "a" / "b"), np.arange(9, dtype=np.int32), []

    def compute():
        calls.append(1)
        return Reference.of(tokens[:5], logits())

    first = cache.get({"model": "x"}, tokens, compute)
    again = cache.get({"model": "x"}, tokens, compute)
    assert len(calls) == 1
    for name in ("tokens", "logp", "top", "loss"):
        one, other = getattr(first, name), getattr(again, name)
        assert one.dtype == other.dtype and np.array_equal(one, other)
    assert first.logp.dtype == np.float16
    (file,) = (tmp_path / "a" / "b").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for n, damaged in enumerate((whole[:-100], whole[:50], b"", b"nonsense", bytes(flipped)), 2):
        file.write_bytes(damaged)
        cache.get({"model": "x"}, tokens, compute)
        assert len(calls) == n and file.read_bytes() == whole
    cache.get({"model": "y"}, tokens, compute)
    cache.get({"model": "x"}, tokens[:-1], compute)
    assert len(list((tmp_path / "a" / "b").iterdir())) == 3


def test_fingerprints(tmp_path):
    content = bytearray(random.Random(0).randbytes(16 * 2**20))
    path = tmp_path / "model"
    seen = set()
    for change in (0, 1, len(content) // 2, len(content) - 1):
        content[change] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint(path))
    path.write_bytes(content[:-1])
    seen.add(fingerprint(path))
    path.write_bytes(b"small")
    seen.add(fingerprint(path))
    # 16 blocks of 1 MiB are all there is
    assert len(seen) == 6


def test_the_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert references_dir() == tmp_path / "kvlocal" / "eval"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert references_dir() == tmp_path / "home" / ".cache" / "kvlocal" / "eval"


# Work


class Fake:
    """A task whose chat `bad` fails with the policy gkv."""

    name, metrics, n_chats = "fake", ("score", "score@<500"), 3

    def __init__(self, bad=None):
        self.bad, self.calls = bad, []

    def measure(self, index, variant):
        self.calls.append((index, variant.spec))
        if (index, variant.policy) == (self.bad, "gkv"):
            raise KvlocalError("no")
        values = {"score": [float(index), 1.0]} | ({"score@<500": [0.5]} if index == 1 else {})
        return Measurement(variant.ratio + index / 100, values)


VARIANTS = parse_all("gkv,streaming", [0.5])


def test_all_variants_of_one_chat_come_before_the_next_chat(tmp_path):
    task = Fake()
    with WorkFile(tmp_path / "w", "k") as work:
        assert len(list(outcomes(task, VARIANTS, work))) == 9
        assert pending(task, VARIANTS, work) == []
    assert task.calls == [(i, spec) for i in range(3) for spec in ("full", "gkv", "streaming")]


def test_work_goes_on_where_it_ended(tmp_path):
    path = tmp_path / "w"
    with WorkFile(path, "k") as work:
        running = outcomes(Fake(), VARIANTS, work)
        for _ in range(4):
            next(running)
    # a line that was cut off
    path.write_bytes(path.read_bytes()[:-7])
    task = Fake()
    with WorkFile(path, "k") as work:
        list(outcomes(task, VARIANTS, work))
        assert len(task.calls) == 6 and task.calls[0] == (1, "full")
        results = work.results
    with WorkFile(tmp_path / "other", "k") as work:
        list(outcomes(Fake(), VARIANTS, work))
        assert work.results == results
    # another policy is all that is left to measure
    task = Fake()
    with WorkFile(path, "k") as work:
        list(outcomes(task, parse_all("gkv,snapkv", [0.5]), work))
    assert task.calls == [(i, "snapkv") for i in range(3)]


def test_runs_do_not_mix(tmp_path):
    path, task = tmp_path / "w", Fake()
    with WorkFile(path, run_key({"seed": 1})) as work:
        list(outcomes(task, VARIANTS[:1], work))
    with WorkFile(path, run_key({"seed": 2})) as work:
        assert len(pending(task, VARIANTS, work)) == 9
        list(outcomes(task, VARIANTS[:1], work))
        work.remove()
    with WorkFile(path, run_key({"seed": 1})) as work:
        assert len(pending(task, VARIANTS, work)) == 6
        work.remove()
    assert not path.exists()


def test_a_failure_costs_nothing_else(tmp_path):
    with WorkFile(tmp_path / "w", "k") as work:
        found = list(outcomes(Fake(bad=1), VARIANTS, work))
        assert [(f.chat, f.variant.spec, str(f.error)) for f in found if isinstance(f, ChatFailure)] == [(1, "gkv", "no")]
        rows = report.rows(Fake(), VARIANTS, work.results, 0)
        assert [row.n for row in rows if row.metric == "score"] == [6, 4, 6]
        assert len(pending(Fake(), VARIANTS, work)) == 1


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "w"
    path.write_text("my notes\nwithout an end")
    with pytest.raises(KvlocalError, match="no file of unfinished results"), WorkFile(path, "k"):
        pass
    assert path.read_text() == "my notes\nwithout an end"
    with pytest.raises(KvlocalError, match="cannot keep results in"), WorkFile(tmp_path / "no" / "w", "k"):
        pass


# Rows


@pytest.fixture
def rows(tmp_path):
    with WorkFile(tmp_path / "w", "k") as work:
        variants = parse_all("gkv,streaming", [0.5, 0.8])
        list(outcomes(Fake(), variants, work))
        return report.rows(Fake(), variants, work.results, 0)


def test_rows(rows):
    first = report.document(rows, {"seed": 0})["rows"][2]
    assert list(first) == ["task", "policy", "ratio", "metric", "mean", "lo", "hi", "n", "compression"]
    assert (first["task"], first["policy"], first["ratio"], first["metric"]) == ("fake", "gkv", 0.5, "score")
    assert (first["mean"], first["n"], first["compression"]) == (1.0, 6, pytest.approx(0.51))
    assert first["lo"] <= first["mean"] <= first["hi"]
    assert [row.metric for row in rows] == ["score", "score@<500"] * 5
    assert rows[1].n == 1


def test_tables(rows):
    whole, split = report.tables(rows)
    assert whole[0] == ["policy", "ratio", "removed", "score"] and split[0][3] == "score@<500"
    assert whole[1][1] == ["gkv", "0.5", "51.0%", "1.000 [0.500, 1.500]"]
    lines = report.plain(*whole).splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1 and lines[0].startswith("policy")


def test_a_plot(rows, tmp_path):
    pytest.importorskip("matplotlib")
    for suffix, start in (("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")):
        plot.draw(rows, tmp_path / f"p.{suffix}")
        assert (tmp_path / f"p.{suffix}").read_bytes().startswith(start)
    with pytest.raises(KvlocalError, match=r"must end in \.png"):
        figure.check(tmp_path / "p.txt")


def test_a_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(figure, "find_spec", lambda name: None)
    with pytest.raises(KvlocalError, match=r"pip install 'kvlocal\[plot\]'"):
        figure.check(tmp_path / "p.png")


# Recall


def count_words(messages):
    return [3, *(len(message["content"].split()) + 5 for message in messages)]


def test_chats_of_facts():
    chats = recall_chats(60, 800, 7, count_words)
    assert [len(chat.questions) for chat in chats] == [FACTS_PER_CHAT] * 7 + [4]
    kinds = {question.kind for chat in chats for question in chat.questions}
    assert kinds == {topic.kind for topic in load_facts().topics} | {"correction"}
    for chat in chats:
        assert chat.n_history == sum(count_words(chat.history)) and 700 <= chat.n_history <= 800 and chat.n_prefix == 3
        assert [message["role"] for message in chat.history] == ["user", "assistant"] * (len(chat.history) // 2)
        texts = [message["content"] for message in chat.history]
        joined = "\n".join(texts)
        assert len({question.lead for question in chat.questions}) == len(chat.questions)
        for question in chat.questions:
            # stated once, by the user, and as far from the end as it says
            stated = [i for i, text in enumerate(texts) if re.search(rf"\b{question.answer}\b", text, re.IGNORECASE)]
            assert len(stated) == 1 and stated[0] % 2 == 0
            assert question.distance == chat.n_history - sum(count_words(chat.history[: stated[0] + 1])) > 0
            assert len({question.answer, *question.distractors}) == 4
            named = [value for value in question.distractors if re.search(rf"\b{value}\b", joined, re.IGNORECASE)]
            if question.kind == "correction":
                old = question.distractors[0]
                first = next(i for i, text in enumerate(texts) if old in text)
                assert named == [old] and first < stated[0]
            else:
                assert named == []
        answered = [text for i, text in enumerate(texts) if i % 2 and re.match(r"Your |The .* of your ", text)]
        assert len(answered) == N_EXAMPLES


def test_the_seed_makes_the_chats():
    one, same, other = (recall_chats(16, 500, seed, count_words) for seed in (1, 1, 2))
    assert one == same != other


def test_other_talk_from_dialogues(tmp_path):
    data = load(write(tmp_path / "d.jsonl", *(history((f"Question {i}?", f"Answer {i}."), ("And then?", "Then this.")) for i in range(40))))
    (chat,) = recall_chats(8, 600, 0, count_words, data.dialogues)
    texts = [message["content"] for message in chat.history]
    assert sum(text.startswith("Question") for text in texts) > 5
    # too few to fill it, and all of them name a value of a fact
    values = " ".join(value for topic in load_facts().topics for value in topic.values)
    empty = load(write(tmp_path / "e.jsonl", history((values, "Yes."))))
    (short,) = recall_chats(8, 600, 0, count_words, empty.dialogues)
    assert short.n_history < 400 and len(short.questions) == 8


def test_texts_of_facts():
    kinds = {}
    for topic in load_facts().topics:
        assert len(set(topic.values)) == len(topic.values) >= 20
        kinds.setdefault(topic.kind, set()).update(value.lower() for value in topic.values)
        for text in (*topic.statements, *topic.questions, *load_facts().corrections):
            said = topic.say(text, value="VALUE", old="OLD")
            assert "{" not in said and topic.about in said.replace("My ", "my ").replace("The ", "the ")
        assert "my" not in topic.lead.split() and topic.lead.endswith(topic.verb)
    assert len({topic.about for topic in load_facts().topics}) == len(load_facts().topics)
    sets = list(kinds.values())
    assert not any(one & other for i, one in enumerate(sets) for other in sets[:i])


def test_small_talk_is_varied():
    talk = small_talk(random.Random(0))
    pairs = [next(talk) for _ in range(260)]
    assert len({question for question, _ in pairs}) == 260 and not any("{" in text for pair in pairs for text in pair)


@pytest.mark.parametrize(
    "text, value, found",
    [
        ("Her name is Elena.", "Elena", True),
        ("ELENA'S", "Elena", True),
        ("Elenas", "Elena", False),
        ("It is on the 14th of March.", "March 14", True),
        ("March 4", "March 14", False),
        ("It is 4,127.", "4127", True),
        ("41270", "4127", False),
        ("I like tea that is green", "green tea", True),
        ("tea", "green tea", False),
    ],
)
def test_values_named_in_a_text(text, value, found):
    assert names(text, value) is found


def test_buckets():
    assert [DISTANCES.name(n) for n in (0, 499, 500, 999, 1000, 1999, 2000, 9999)] == [
        "<500", "<500", "500-1000", "500-1000", "1000-2000", "1000-2000", ">2000", ">2000",
    ]  # fmt: skip


def test_answers_are_compared_where_they_differ():
    answers = [np.array(tokens, np.int32) for tokens in ([5, 6, 7, 8], [5, 6, 9], [5, 6, 7])]
    rows = [logits(len(tokens), 20, seed=i) for i, tokens in enumerate(answers)]
    found = mean_log_probabilities(list(zip(answers, rows, strict=True)))
    for value, tokens, row in zip(found, answers, rows, strict=True):
        logp = log_softmax(row)
        assert value == pytest.approx(np.mean([logp[i, tokens[i]] for i in range(2, len(tokens))]), rel=1e-5)
    # one that is the beginning of the other is compared by its last token
    found = mean_log_probabilities([(answers[0], rows[0]), (answers[2], rows[2])])
    assert found[1] == pytest.approx(log_softmax(rows[2])[2, 7], rel=1e-5)
