import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from doors import write_chat_model

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.llama.context import Context
from kvlocal.llama.errors import EngineError
from kvlocal.llama.library import load
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import MAX_SEED, REPEAT_PENALTY, Sampler, SamplingError, SamplingParams


@pytest.fixture(scope="module")
def model(short_smollm2: Path) -> Iterator[Model]:
    with Model(short_smollm2) as model:
        yield model


@pytest.fixture(scope="module")
def context(model: Model) -> Iterator[Context]:
    with Context(model, n_cells=256, n_ubatch=64, n_outputs=1) as context:
        yield context


def generate(context: Context, sampler: Sampler, n: int = 12, prompt: str = "Once upon a time") -> list[int]:
    context.clear()
    tokens = context.model.tokenize(prompt, parse_special=False)
    context.decode(tokens, 0)
    out = []
    for pos in range(len(tokens), len(tokens) + n):
        out.append(sampler.sample(context))
        context.decode(out[-1:], pos)
    return out


def test_temperature_zero_takes_the_most_likely_token(context: Context) -> None:
    with Sampler(context.model, SamplingParams(temperature=0)) as sampler:
        context.clear()
        tokens = context.model.tokenize("The capital of France is", parse_special=False)
        context.decode(tokens, 0)
        for pos in range(len(tokens), len(tokens) + 5):
            token = sampler.sample(context)
            assert token == context.logits().argmax()
            context.decode([token], pos)


def test_a_seed_repeats_a_run_and_another_seed_does_not(context: Context) -> None:
    params = SamplingParams(temperature=1.5, top_k=0, top_p=1, min_p=0, seed=11)
    first = generate(context, Sampler(context.model, params))
    assert generate(context, Sampler(context.model, params)) == first
    others = [generate(context, Sampler(context.model, SamplingParams(temperature=1.5, seed=seed))) for seed in (1, 2)]
    assert others[0] != others[1]


def test_a_drawn_seed_can_be_read_and_used_again(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams(temperature=1.5))
    assert 0 <= sampler.seed <= MAX_SEED
    first = generate(context, sampler)
    assert generate(context, Sampler(context.model, SamplingParams(temperature=1.5, seed=sampler.seed))) == first
    assert Sampler(context.model, SamplingParams()).seed != sampler.seed


def test_reset_starts_the_random_numbers_again(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams(temperature=1.5, seed=3))
    first = generate(context, sampler)
    sampler.reset()
    assert generate(context, sampler) == first


def test_each_answer_has_random_numbers_of_its_own(context: Context) -> None:
    sampler, other = (Sampler(context.model, SamplingParams(temperature=1.5, repeat_penalty=1, seed=3)) for _ in range(2))
    answers = [generate(context, sampler)]
    for number in (1, 2):
        sampler.begin(number)
        answers.append(generate(context, sampler))
    assert len({tuple(answer) for answer in answers}) == 3
    other.begin(2)
    assert generate(context, other) == answers[2]
    other.begin(0)
    assert generate(context, other) == answers[0]


def test_top_k_of_one_is_greedy_at_any_temperature(context: Context) -> None:
    greedy = generate(context, Sampler(context.model, SamplingParams(temperature=0)))
    assert generate(context, Sampler(context.model, SamplingParams(temperature=5, top_k=1, repeat_penalty=1, seed=1))) == greedy
    sharp = SamplingParams(temperature=0.1, min_p=1.0, repeat_penalty=1, seed=1)
    assert generate(context, Sampler(context.model, sharp)) == greedy


def test_the_repeat_penalty_is_off_for_greedy_decoding_unless_asked_for() -> None:
    assert SamplingParams().repeat_penalty == REPEAT_PENALTY > 1
    assert SamplingParams(temperature=0).repeat_penalty == 1
    assert SamplingParams(temperature=0, repeat_penalty=1.3).repeat_penalty == 1.3


def test_repeat_penalty_works_on_accepted_tokens_also_at_temperature_zero(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams(temperature=0, repeat_penalty=1e6))
    context.clear()
    context.decode(context.model.tokenize("The capital of France is", parse_special=False), 0)
    best = int(context.logits().argmax())
    assert sampler.sample(context) == best
    assert sampler.sample(context) != best
    sampler.reset()
    sampler.accept(best)
    expected = context.logits()
    expected[best] = -np.inf
    assert sampler.sample(context) == expected.argmax()


@pytest.mark.parametrize(("frequency", "presence", "bias"), [(0.0, 0.0, {}), (0.4, -0.3, {5: 3.0, 260: -2.0, 300: -np.inf})])
@pytest.mark.parametrize("temperature", [0, 0.7, 2.0])
def test_the_tokens_are_those_of_a_chain_that_is_all_llama_cpp(
    context: Context, temperature: float, frequency: float, presence: float, bias: dict[int, float]
) -> None:
    """Including the penalties and biases, which are computed here."""
    params = SamplingParams(
        temperature=temperature, repeat_penalty=1.3, repeat_last_n=20, seed=9,
        frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias,
    )  # fmt: skip
    lib = load().llama_cpp
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    biases = (lib.llama_logit_bias * len(bias))(*bias.items())
    parts = [
        lib.llama_sampler_init_logit_bias(context.model.n_vocab, len(bias), biases),
        lib.llama_sampler_init_penalties(context.model.n_vocab, params.repeat_last_n, params.repeat_penalty, frequency, presence),
    ]
    if temperature:
        parts += [lib.llama_sampler_init_top_k(params.top_k), lib.llama_sampler_init_top_p(params.top_p, 1)]
        parts += [lib.llama_sampler_init_min_p(params.min_p, 1), lib.llama_sampler_init_temp(temperature), lib.llama_sampler_init_dist(params.seed)]
    else:
        parts.append(lib.llama_sampler_init_greedy())
    for part in parts:
        lib.llama_sampler_chain_add(chain, part)
    context.clear()
    context.decode([5], 0)
    with Sampler(context.model, params) as sampler:
        for pos in range(1, 200):
            token = sampler.sample(context)
            assert token == lib.llama_sampler_sample(chain, context.pointer, -1)
            context.decode([token], pos)
    lib.llama_sampler_free(chain)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_dry_and_xtc_are_those_of_a_chain_that_is_all_llama_cpp(context: Context, temperature: float) -> None:
    """Also when the tokens that were said are put down from outside, as after a restart."""
    params = SamplingParams(
        temperature=temperature, repeat_penalty=1, seed=9, dry_multiplier=0.9, dry_allowed_length=1, dry_penalty_last_n=40,
        dry_sequence_breakers=["\n", " the"], xtc_probability=0.4, xtc_threshold=0.05,
    )  # fmt: skip
    lib = load().llama_cpp
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    breakers = (ctypes.c_char_p * 2)(b"\n", b" the")
    for part in (
        lib.llama_sampler_init_dry(context.model.vocab, 0.9, 1.75, 1, 40, breakers, 2),
        lib.llama_sampler_init_top_k(params.top_k), lib.llama_sampler_init_top_p(params.top_p, 1), lib.llama_sampler_init_min_p(params.min_p, 1),
        lib.llama_sampler_init_xtc(0.4, 0.05, 1, params.seed), lib.llama_sampler_init_temp(temperature), lib.llama_sampler_init_dist(params.seed),
    ):  # fmt: skip
        lib.llama_sampler_chain_add(chain, part)
    context.clear()
    context.decode([5], 0)
    with Sampler(context.model, params) as sampler:
        for pos in range(1, 200):
            if pos % 50 == 0:
                recent = list(sampler.recent)
                sampler.recent.clear()
                sampler.recent.extend(recent)
            token = sampler.sample(context)
            assert token == lib.llama_sampler_sample(chain, context.pointer, -1)
            context.decode([token], pos)
    lib.llama_sampler_free(chain)


class Logits:
    """Predictions that are always the same."""

    def __init__(self, n_vocab: int, **logits: float) -> None:
        self._logits = np.zeros(n_vocab, np.float32)
        for name, value in logits.items():
            self._logits[int(name[1:])] = value

    def logits(self, i: int = -1) -> np.ndarray:
        return self._logits


def test_dry_breaks_off_a_repetition(context: Context) -> None:
    predictions = Logits(context.model.n_vocab, t700=3, t701=2.5)
    said = [500, 600, 700, 5000, 500, 600]
    for params, drawn in (({}, 700), ({"dry_multiplier": 2}, 701), ({"dry_multiplier": 2, "dry_allowed_length": 3}, 700),
                          ({"dry_multiplier": 2, "dry_penalty_last_n": 5}, 700), ({"dry_multiplier": 2, "repeat_last_n": 0}, 701)):  # fmt: skip
        with Sampler(context.model, SamplingParams(temperature=0, **params)) as sampler:
            for token in said:
                sampler.accept(token)
            assert sampler.sample(predictions) == drawn, params
    with Sampler(context.model, SamplingParams(temperature=0, dry_multiplier=2)) as sampler:
        sampler.recent.extend(said)
        sampler.recent.pop()
        assert sampler.sample(predictions) == 700


def test_the_penalty_looks_at_as_many_tokens_as_without_dry(context: Context) -> None:
    predictions = Logits(context.model.n_vocab, t700=3, t701=2.5)
    for last_n, drawn in ((2, 700), (3, 701), (0, 700)):
        with Sampler(context.model, SamplingParams(temperature=0, repeat_penalty=2, repeat_last_n=last_n, dry_multiplier=1)) as sampler:
            sampler.recent.extend([700, 1, 2])
            assert sampler.sample(predictions) == drawn


def test_xtc_drops_the_likely_ones_but_the_least(context: Context) -> None:
    predictions = Logits(context.model.n_vocab, t700=13, t701=12.9, t702=12.8, t703=5)
    with Sampler(context.model, SamplingParams(temperature=0, xtc_probability=1)) as sampler:
        assert [sampler.sample(predictions) for _ in range(3)] == [702] * 3
    draws = {}
    for name in ("one", "other"):
        with Sampler(context.model, SamplingParams(temperature=0, xtc_probability=0.5, seed=3)) as sampler:
            draws[name] = [sampler.sample(predictions) for _ in range(40)]
            sampler.begin(1)
            draws[name] += [sampler.sample(predictions) for _ in range(40)]
    assert draws["one"] == draws["other"] and set(draws["one"]) == {700, 702}
    assert draws["one"][:40] != draws["one"][40:]


def test_a_huge_penalty_is_no_error(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams(temperature=0, repeat_penalty=1e300))
    tokens = generate(context, sampler)
    assert len(set(tokens)) == len(tokens)


def test_nothing_to_sample_from_is_an_error(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams())
    context.clear()
    with pytest.raises(EngineError, match="no logits"):
        sampler.sample(context)
    context.decode([5, 6], 0, logits="none")
    with pytest.raises(EngineError, match="no logits"):
        sampler.sample(context)


def test_a_closed_sampler_is_an_error(context: Context) -> None:
    sampler = Sampler(context.model, SamplingParams())
    sampler.close()
    sampler.close()
    with pytest.raises(EngineError, match="closed"):
        sampler.reset()


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.5},
        {"min_p": 1.5},
        {"repeat_penalty": 0},
        {"repeat_penalty": float("inf")},
        {"repeat_last_n": -1},
        {"dry_multiplier": -1},
        {"dry_multiplier": float("nan")},
        {"dry_base": 0.5},
        {"dry_allowed_length": -1},
        {"dry_penalty_last_n": -1},
        {"dry_penalty_last_n": 2**16 + 1},
        {"dry_sequence_breakers": [""]},
        {"dry_sequence_breakers": ["x" * 41]},
        {"xtc_probability": 1.5},
        {"xtc_threshold": -0.1},
        {"seed": -1},
        {"seed": 2**32 - 1},
    ],
)
def test_values_out_of_range_name_the_parameter(wrong: dict[str, float]) -> None:
    with pytest.raises(SamplingError, match=next(iter(wrong))) as caught:
        SamplingParams(**wrong)
    assert isinstance(caught.value, KvlocalError)
    assert isinstance(caught.value, ValueError)


def test_predictions_that_are_not_numbers_are_reported(short_smollm2: Path, tmp_path: Path) -> None:
    """A weight of a damaged file is NaN; what was said stays in the session."""
    path = tmp_path / "tiny.gguf"
    write_chat_model(path)
    norm = Container(path).tensors["output_norm.weight"].values()
    damaged = path.read_bytes().replace(norm.tobytes(), np.full_like(norm, np.nan).tobytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    with Model(path) as model, ChatSession(model, SessionConfig(budget=128, n_ubatch=64, n_threads=1)) as session:
        with pytest.raises(EngineError, match="predictions are not numbers"):
            list(session.send("Hello"))
        assert session.messages[0] == {"role": "user", "content": "Hello"}
