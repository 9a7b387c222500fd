"""Reinforcement learning: rollouts, what their tokens saw, and what they teach."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from tiny_model import N_VOCAB, write_tiny_model

from kvlocal.cache.budgeted import BudgetedCache
from kvlocal.cache.kept_tokens import KeptTokens
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.errors import KvlocalError
from kvlocal.gguf.container import Container
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import SamplingParams, log_probabilities
from kvlocal.training.rollouts import DrawnAnswer, Group, Rollouts, exact_cache
from kvlocal.training.task_maker import make_tasks
from kvlocal.training.tasks import CheckedTask, Rule

torch = pytest.importorskip("torch")

from kvlocal.training.decoder import Decoder  # noqa: E402
from kvlocal.training.grpo import Packed, advantages, difference, policy_gradient, token_logprobs  # noqa: E402
from kvlocal.training.parameters import AdapterParameters  # noqa: E402
from kvlocal.training.weights import Weights  # noqa: E402

SPEAK = CheckedTask("speak", [{"role": "user", "content": "Say something."}], Rule(regex="[aeiou]"))


def config(**changes):
    given = {"policy": "gkv", "ratio": 0.8, "stride": 16, "budget": 1024, "n_threads": 1, "type_k": "f32", "type_v": "f32", "archive": "off"}
    return exact_cache(SessionConfig(**given | changes))


def rollouts(model, parallel=4, temperature=0.8, max_tokens=40, **changes):
    return Rollouts(model, config(**changes), parallel=parallel, temperature=temperature, max_tokens=max_tokens)


@pytest.fixture(scope="module")
def groups(shallow_file):
    """Two tasks, each with four answers that are long enough for compressions among them."""
    with Model(shallow_file) as model, rollouts(model) as found:
        return found.groups(make_tasks(2, 0, "training", (80, 180)), [[0, 0], [0, 1]], 4)


@pytest.fixture(scope="module")
def decoder(shallow_file):
    torch.set_num_threads(1)
    return Decoder(Weights.load(Container(shallow_file), torch.float32, "cpu"))


def answered(rewards, cut=()):
    answers = [DrawnAnswer("", np.array([1], np.int32), np.zeros(1), i in cut, reward, []) for i, reward in enumerate(rewards)]
    return Group(SPEAK, np.array([1], np.int32), [], answers)


def test_advantages_are_rewards_beside_those_of_the_group():
    found = advantages(answered([1, 0, 0, 0]))
    assert found == pytest.approx([3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])
    assert found.sum() == pytest.approx(0)
    assert (advantages(answered([1, 1, 1])) == 0).all()
    assert (advantages(answered([0, 0, 0])) == 0).all()


def test_an_answer_that_was_cut_off_is_not_made_less_likely():
    found = advantages(answered([1, 0, 0, 1], cut=(1, 3)))
    assert found == pytest.approx([1, 0, -1, 1])


def test_the_masks_give_the_probabilities_that_the_engine_drew_with(groups, decoder):
    for group in groups:
        assert all(len(answer.changes) > len(group.changes) > 0 for answer in group.answers)
        packed = Packed.of(group, decoder.hyper)
        with torch.no_grad():
            apart = difference(token_logprobs(decoder, packed, None, 0.8), packed)
        # as far apart as without compression: what float16 inside of llama.cpp's attention makes
        assert apart.largest < 0.02
        assert apart.mean < 0.003
        blind = replace(group, changes=[], answers=[replace(answer, changes=[]) for answer in group.answers])
        packed = Packed.of(blind, decoder.hyper)
        with torch.no_grad():
            assert difference(token_logprobs(decoder, packed, None, 0.8), packed).mean > 0.03


def one_answer(path, **changes):
    """A conversation of random tokens and an answer of others, as the engine reads them."""
    rng = np.random.default_rng(0)
    drawn, logprobs = [], []
    with Model(path) as model, BudgetedCache(model, config(**changes), undo=False) as cache:
        cache.begin(4)
        kept = cache.compressor.observe = KeptTokens()
        cache.ledger.begin_segment("user")
        for _ in range(4):
            cache.append(rng.integers(0, N_VOCAB, 30).astype(np.int32))
        prompt, before = cache.ledger.ids.copy(), list(kept.changes)
        for token in rng.integers(0, N_VOCAB, 40).tolist():
            drawn.append(token)
            logprobs.append(log_probabilities(cache.context.logits() / 0.8, token, 0)[0])
            cache.append(np.array([token], np.int32), "decode")
    return Group(SPEAK, prompt, before, [DrawnAnswer("", np.array(drawn, np.int32), np.array(logprobs), False, 0.0, kept.changes)])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_layers_with_a_sliding_window_keep_what_they_see(tmp_path, family):
    path = tmp_path / "tiny.gguf"
    write_tiny_model(path, family, n_layer=7)
    decoder = Decoder(Weights.load(Container(path), torch.float32, "cpu"))

    def apart(group):
        packed = Packed.of(group, decoder.hyper)
        with torch.no_grad():
            return difference(token_logprobs(decoder, packed, None, 0.8), packed).largest

    whole, group = one_answer(path, policy="full", ratio=None, budget=256), one_answer(path, budget=64)
    changes = group.answers[0].changes
    # layers whose cells are chosen
    assert changes[0].tokens.shape[0] == (1 if family == "gemma3" else 7) and len(changes) > len(group.changes) > 1
    assert apart(group) < 2 * apart(whole) < 0.1
    assert apart(replace(group, changes=[], answers=[replace(group.answers[0], changes=[])])) > 20 * apart(group)


def test_answers_do_not_see_each_other(groups, decoder):
    group = groups[0]
    together = token_logprobs(decoder, Packed.of(group, decoder.hyper), None, 0.8)
    alone = [token_logprobs(decoder, Packed.of(replace(group, answers=[answer]), decoder.hyper), None, 0.8) for answer in group.answers]
    assert torch.cat(alone).sub(together).abs().max() < 1e-3


def test_a_step_along_the_gradient_makes_right_answers_likelier(groups, decoder):
    rewards = [1.0, 0.0, 0.0, 1.0]
    group = replace(groups[0], answers=[replace(answer, cut=False, reward=reward) for answer, reward in zip(groups[0].answers, rewards, strict=True)])
    parameters = AdapterParameters.begin(decoder.weights, 4, 0)
    optimiser = torch.optim.SGD(parameters.adapter_leaves, lr=0.05)
    packed = Packed.of(group, decoder.hyper)

    def sums():
        with torch.no_grad():
            found = token_logprobs(decoder, packed, parameters.adapter(torch.float32), 0.8)
        return torch.zeros(4).index_add_(0, packed.answers, found)

    before = sums()
    policy_gradient(decoder, group, parameters.adapter(torch.float32), 0.8, 1 / len(packed.targets))
    optimiser.step()
    change = sums() - before
    assert (change[[0, 3]].sum() > 0 > change[[1, 2]].sum()).item()


def test_rollouts_depend_on_their_seeds_alone(shallow_file):
    with Model(shallow_file) as model, rollouts(model, parallel=3, max_tokens=12) as found:
        tasks = make_tasks(3, 0, "training", (60, 90))
        seeds = [[5, i] for i in range(3)]
        one, same, other = found.groups(tasks, seeds, 3), found.groups(tasks, seeds, 3), found.groups(tasks, [[6, i] for i in range(3)], 3)

    def texts(groups):
        return [[answer.text for answer in group.answers] for group in groups]

    assert texts(one) == texts(same) != texts(other)
    assert all(len({answer.text for answer in group.answers}) > 1 for group in one)
    assert [answer.logprobs.tolist() for group in one for answer in group.answers] == [
        answer.logprobs.tolist() for group in same for answer in group.answers
    ]


def test_the_likeliest_answer_is_that_of_a_chat(shallow_file):
    task = make_tasks(1, 0, "training", (120, 120))[0]
    with Model(shallow_file) as model:
        with rollouts(model, parallel=1, temperature=0, max_tokens=20) as found:
            group = found.groups([task], [[0]], 1)[0]
        asked = replace(config(), system=task.system, max_tokens=20, sampling=SamplingParams(temperature=0))
        with ChatSession(model, asked, undo=False) as session:
            session.add_messages(task.turns)
            text = "".join(session.answer())
            assert session.last.drawn == group.answers[0].tokens.tolist()
    assert group.answers[0].text == text
    assert group.answers[0].cut == (len(group.answers[0].tokens) == 20)


@pytest.mark.parametrize("policy", ["recall", "streaming", "nexus", "kvzip"])
def test_policies_whose_answers_depend_on_more_are_refused(policy):
    with pytest.raises(KvlocalError, match=f"under the policy {policy} depend on more .* choose one of full, h2o"):
        exact_cache(SessionConfig(policy=policy))


def test_a_conversation_that_is_too_long_is_an_error_and_ends_the_threads(shallow_file):
    before = threading.active_count()
    with Model(shallow_file) as model, rollouts(model, policy="full", ratio=None, budget=256) as found:
        tasks = make_tasks(3, 0, "training", (600, 600))
        with pytest.raises(KvlocalError, match="cache of 256 cells is full"):
            found.groups(tasks, [[0]] * 3, 2)
    assert threading.active_count() == before
