"""Where blocks end: against the definitions written as loops, and on texts in the tokens of a real model."""

import itertools
import time

import numpy as np
import pytest

from kvlocal.llama.model import Model
from kvlocal.policies.segmentation import (
    BREAK,
    CLAUSE,
    ITEM,
    LINE,
    NEUTRAL,
    SENTENCE,
    Dynamic,
    FixedDelimiters,
    FixedInterval,
    boundary_importance,
    delimiter_strength,
)

PROSE = 'Dr Smith paid 3.14 dollars, e.g. for tea; at 12:30 he said: "Stop!" (Really?) And left...\nA new line.\n\nThe end'
LIST = "To buy:\n1. Milk, two litres\n2. Bread. Brown bread.\n   - rye\nThat is all.\nBye"
CODE = "Use this:\n```python\nx = a[1:2]; y = 3.5\n\nreturn (x, y)\n```\nThen run it. Good"
CHINESE = "你好，世界。我叫小明！今天「很好。」走吧"

ENDS = {
    PROSE: [
        ("dollars,", CLAUSE), ("tea;", CLAUSE), ("said:", CLAUSE), ('"Stop!"', SENTENCE), ("(Really?)", SENTENCE), ("left...\n", LINE),
        ("new line.\n\n", BREAK),
    ],
    LIST: [
        ("To buy:\n", ITEM), ("Milk,", CLAUSE), ("litres\n", ITEM), (" Bread.", SENTENCE), ("bread.\n", ITEM), ("rye\n", ITEM),
        ("is all.\n", LINE),
    ],
    CODE: [
        ("this:\n", BREAK), ("```python\n", LINE), ("2];", CLAUSE), ("3.5\n\n", BREAK), ("(x,", CLAUSE), ("y)\n", LINE), ("\n```\n", BREAK),
        ("run it.", SENTENCE),
    ],
    CHINESE: [("你好，", CLAUSE), ("世界。", SENTENCE), ("小明！", SENTENCE), ("很好。」", SENTENCE)],
}  # fmt: skip


@pytest.fixture(scope="module")
def tokens_of(smollm2):
    """Text to the bytes of its tokens, in a real vocabulary."""
    with Model(smollm2) as model:
        yield lambda text: [model.token_bytes(token) for token in model.tokenize(text, parse_special=False).tolist()]


def ends_found(texts):
    """The delimiters as [(text up to the end of their token, strength)]."""
    strength = delimiter_strength(texts)
    assert strength.dtype == np.float32 and strength.shape == (len(texts),)
    return [(b"".join(texts[: i + 1]), round(float(strength[i]), 3)) for i in np.flatnonzero(strength)]


def assert_ends(texts, expected):
    """Each delimiter is found where the text says, before or after the line end that is part of it."""
    found = ends_found(texts)
    assert [strength for _, strength in found] == [strength for _, strength in expected]
    for (before, _), (tail, _) in zip(found, expected, strict=True):
        assert before.rstrip().endswith(tail.rstrip().encode()), (before, tail)


def random_texts(rng, n):
    pieces = [b" word", b"a", b",", b".", b" x.", b"\n", b"\n\n", b"; ", b"", b"- ", b"1.", "。".encode(), b"\xe3", b"\x80\x82", b"```"]
    return [pieces[i] for i in rng.integers(len(pieces), size=n)]


def random_attention(rng, n):
    attention = np.tril(rng.random((n, n)) ** 4)
    attention /= attention.sum(axis=1, keepdims=True) + rng.random((n, 1))
    return attention.astype(np.float32)


@pytest.mark.parametrize("text", ENDS, ids=["prose", "list", "code", "chinese"])
def test_delimiters_in_real_tokens(tokens_of, text):
    assert_ends(tokens_of(text), ENDS[text])


@pytest.mark.parametrize("text", ENDS, ids=["prose", "list", "code", "chinese"])
def test_delimiters_in_single_bytes(text):
    """Byte tokens hold parts of characters; the delimiters are the same ones, and end exactly where they end."""
    texts = [bytes([byte]) for byte in text.encode()]
    assert_ends(texts, ENDS[text])
    for (before, _), (tail, _) in zip(ends_found(texts), ENDS[text], strict=True):
        assert before.endswith(tail.encode())


@pytest.mark.parametrize(
    ("texts", "strength"),
    [
        ([b"3", b".", b"14"], [0, 0, 0]),
        ([b"a.b"], [0]),
        ([b"a", b". b"], [0, 0]),  # text after the delimiter in its token
        ([b"a", b". ", b"b"], [0, SENTENCE, 0]),
        ([b"a.", b" ", b"b"], [SENTENCE, 0, 0]),
        ([b"a", b".", b""], [0, 0, SENTENCE]),  # a control token without text goes with what is before it
        ([b"a", b".\n\n", b"b"], [0, BREAK, 0]),
        ([b"a", b"\r\n", b"b"], [0, LINE, 0]),
        ([b"a", b"\n", b"  \n", b"b"], [0, 0, BREAK, 0]),
        ([b"a", b"\n    ", b"b"], [LINE, 0, 0]),  # the indent stays with what it indents
        ([b"a", b".\nb"], [0, 0]),
        ([b"1", b".", b" a"], [0, 0, 0]),
        ([b"in 1", b".", b" a"], [0, SENTENCE, 0]),
        ([b"\xe3\x80", b"\x82", b"a"], [0, SENTENCE, 0]),
        ([b"\x80\x82", b"\xff"], [0, 0]),
        ([], []),
    ],
)
def test_delimiters_in_odd_tokens(texts, strength):
    np.testing.assert_array_equal(delimiter_strength(texts), np.array(strength, np.float32))


@pytest.mark.parametrize("run", [b".", b" ", b"\n", b",)", b".)", b"\t\r", b"*", "。".encode()])
def test_long_runs_take_no_time(run):
    started = time.thread_time()
    delimiter_strength([run * 20_000 + b"x"])
    assert time.thread_time() - started < 1


def reference_importance(attention, b, reach):
    n, near, far = len(attention), 0.0, 0.0
    for q in range(b, min(b + reach, n)):
        close = sum(attention[q, j] for j in range(max(0, b - reach), b))
        own = sum(attention[q, j] for j in range(b, q + 1))
        near += close
        far += 1 - close - own
    return far / (near + far) if near + far > 0 else NEUTRAL


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("reach", [1, 3, 8, 60])
def test_importance_equals_its_definition(seed, reach):
    attention = random_attention(np.random.default_rng(seed), 40)
    ends = np.arange(1, 41)
    importance = boundary_importance(attention, ends, reach)
    assert importance.dtype == np.float32 and (importance >= 0).all() and (importance <= 1).all()
    np.testing.assert_allclose(importance, [reference_importance(attention.astype(float), b, reach) for b in ends], atol=1e-5)


def test_importance_is_high_where_the_past_is_not_needed():
    """Two halves that see only themselves: the boundary between them is the best; one that cuts a half in two is worth nothing."""
    attention = np.zeros((40, 40), np.float32)
    for q in range(40):
        first = 0 if q < 20 else 20
        attention[q, first : q + 1] = 0.9 / (q + 1 - first)
    importance = boundary_importance(attention, np.arange(1, 40), 8)
    assert importance.argmax() + 1 == 20 and importance[19] > 0.99
    assert boundary_importance(attention, np.array([40]), 8) == NEUTRAL
    assert boundary_importance(np.zeros((0, 0), np.float32), np.array([], int), 8).shape == (0,)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 31, 33, 200])
@pytest.mark.parametrize("known", [True, False])
def test_blocks_cover_the_stretch(seed, n, known):
    rng = np.random.default_rng(seed)
    texts, attention = random_texts(rng, n), random_attention(rng, n) if known else None
    for splitter, least, most in (
        (Dynamic(), 4, 32),
        (Dynamic(1, 1), 1, 1),
        (Dynamic(7, 9), 7, 9),
        (Dynamic(16, 16), 16, 16),
        (FixedInterval(7), 7, 7),
        (FixedDelimiters(5), 1, 5),
    ):
        ends = splitter.split(texts, attention)
        lengths = np.diff(ends, prepend=0)
        assert ends.dtype == np.int32 and lengths.sum() == n and (n == 0 or ends[-1] == n)
        assert (lengths >= 1).all() and (lengths <= most).all() and (lengths[:-1] >= least).all()
        if any(k * least <= n <= k * most for k in range(n + 1)):
            assert (lengths >= least).all()


def test_fixed_intervals():
    assert FixedInterval(16).split([b"."] * 40, None).tolist() == [16, 32, 40]
    assert FixedInterval(16).split([b"."] * 32, None).tolist() == [16, 32]


def test_fixed_delimiters():
    texts = [b"a", b",", b" b", b".", b" c"] + [b" d"] * 9 + [b"\n", b"e"]
    assert FixedDelimiters(32).split(texts, None).tolist() == [4, 15, 16]
    assert FixedDelimiters(5).split(texts, None).tolist() == [4, 9, 14, 15, 16]


def best_sum(worth, n, least, most):
    """The highest sum of worth over the ends of all divisions of n tokens."""
    best = -np.inf
    for choice in itertools.product([False, True], repeat=n - 1):
        ends = [i + 1 for i, chosen in enumerate(choice) if chosen] + [n]
        lengths = np.diff([0, *ends])
        if lengths.min() >= least and lengths.max() <= most:
            best = max(best, sum(worth[end] for end in ends))
    return best


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("least", "most"), [(1, 4), (2, 5), (3, 7)])
def test_dynamic_finds_the_best_division(seed, least, most):
    rng = np.random.default_rng(seed)
    n = 12
    texts, attention = random_texts(rng, n), random_attention(rng, n)
    splitter = Dynamic(least, most, reach=3, weight=0.4, cost=0.35)
    strength = delimiter_strength(texts).astype(float)
    for known in (None, attention):
        worth = {end: strength[end - 1] for end in range(1, n + 1)}
        if known is not None:
            candidates = [end for end in range(1, n) if strength[end - 1] > 0]
            importance = {end: boundary_importance(known, np.array([end]), 3)[0] for end in candidates}
            for end in candidates:
                below = sum(other < importance[end] for other in importance.values())
                equal = sum(other == importance[end] for other in importance.values())
                worth[end] = 0.6 * strength[end - 1] + 0.4 * (below + equal / 2) / len(candidates)
        worth = {end: value - 0.35 for end, value in worth.items()}
        ends = splitter.split(texts, known)
        assert sum(worth[end] for end in ends.tolist()) == pytest.approx(best_sum(worth, n, least, most), abs=1e-5)


def test_dynamic_on_a_real_text(tokens_of):
    texts = tokens_of("We like museums, and good food. No clubs, please!\nThe tram takes a while; it leaves at noon.\n\nEnjoy the trip.")
    blocks = [b"".join(texts[a:b]).decode() for a, b in itertools.pairwise([0, *Dynamic().split(texts, None)])]
    assert blocks == [
        "We like museums, and good food.", " No clubs, please!\n", "The tram takes a while; it leaves at noon.\n\n", "Enjoy the trip.",
    ]  # fmt: skip


def test_attention_moves_a_boundary():
    """Of two equal sentence ends too close for both, attention decides."""
    texts = [b" a"] * 7 + [b"."] + [b" b", b"."] + [b" c"] * 8
    for end in (8, 10):
        attention = np.zeros((18, 18), np.float32)
        for q in range(18):
            first = 0 if q < end else end
            attention[q, first : q + 1] = 0.9 / (q + 1 - first)
        assert Dynamic(min_block=4, reach=4).split(texts, attention).tolist() == [end, 18]


def test_2000_tokens_are_split_in_little_time():
    rng = np.random.default_rng(0)
    texts, attention = random_texts(rng, 2000), random_attention(rng, 2000)
    seconds = []
    for _ in range(5):
        started = time.thread_time()
        Dynamic().split(texts, attention)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 0.06


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedInterval(0),
        lambda: FixedDelimiters(0),
        lambda: Dynamic(0),
        lambda: Dynamic(9, 8),
        lambda: Dynamic(reach=0),
        lambda: Dynamic(weight=1.5),
        lambda: Dynamic(cost=-0.1),
    ],
)
def test_lengths_and_weights_are_checked(make):
    with pytest.raises(ValueError, match="must be"):
        make()
