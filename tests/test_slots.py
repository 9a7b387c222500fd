"""A slot behaves as a context of its own, whatever the others beside it do."""

import inspect
import threading
import time
from functools import partial
from pathlib import Path

import device
import numpy as np
import pytest

from kvlocal.llama.cells import NativeCache
from kvlocal.llama.context import Context
from kvlocal.llama.errors import CacheFull, EngineError
from kvlocal.llama.model import Model
from kvlocal.llama.sampling import Sampler, SamplingParams
from kvlocal.llama.sequence_decoder import SequenceDecoder
from kvlocal.llama.slots import Rounds, Slot, Slots, SlotsInStep

pytestmark = pytest.mark.device

OPTIONS = {"n_cells": 256, "n_outputs": 1, "n_ubatch": 64, "n_threads": 1}


@pytest.fixture(scope="module")
def model(short_smollm2):
    with Model(short_smollm2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokens(model):
    return np.random.default_rng(7).integers(100, model.n_vocab, 300).astype(np.int32)


def together(model, *tasks, n=3, **changes):
    """What each task returns, which gets a slot and runs beside the others."""
    slots, results = Slots(n, model, **OPTIONS | changes), [None] * len(tasks)

    def run(i):
        with slots.scheduler.turn():
            slot = slots.open(model, **OPTIONS | changes)
            try:
                results[i] = tasks[i](slot)
            except EngineError as error:
                results[i] = error
            finally:
                slot.close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(tasks))]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        slots.scheduler.advance(0.05)
    slots.close()
    return results


def read(tokens, n, context):
    """Reads a text and then n tokens one by one: the logits of each."""
    context.decode(tokens[:-n], 0)
    rows = [context.logits()]
    for pos in range(len(tokens) - n, len(tokens)):
        context.decode(tokens[pos : pos + 1], pos)
        rows.append(context.logits())
    return np.stack(rows)


@pytest.mark.cpu_only  # where a row of a product is rounded the same whatever rows stand beside it
def test_the_same_logits_as_alone(model, tokens):
    tasks = [partial(read, tokens[20 * i : 20 * i + 20 + 5 * i], 6) for i in range(3)]
    for task, rows in zip(tasks, together(model, *tasks), strict=True):
        with Context(model, **OPTIONS) as context:
            np.testing.assert_array_equal(rows, task(context))


@pytest.mark.cpu_only  # where a row of a product is rounded the same whatever rows stand beside it
def test_the_same_draws_as_alone(model, tokens):
    def draw(context):
        with Sampler(model, SamplingParams(temperature=1.5, seed=4)) as sampler:
            context.decode(tokens[:9], 0)
            drawn = [sampler.sample(context)]
            for pos in range(9, 15):
                context.decode(drawn[-1:], pos)
                drawn.append(sampler.sample(context))
        return drawn

    with Context(model, **OPTIONS) as context:
        alone = draw(context)
    assert together(model, draw, partial(read, tokens[:30], 9))[0] == alone


def test_a_full_stream_fails_alone(model, tokens):
    def fill(context):
        for pos in range(0, 256, 64):
            context.decode(tokens[:64], pos)
        context.decode(tokens[:1], 256)

    rows, error = together(model, partial(read, tokens[:40], 12), fill)
    assert isinstance(error, CacheFull) and rows.shape == (13, model.n_vocab)


def test_what_does_not_fit_gets_a_context_of_its_own(model):
    slots = Slots(2, model, **OPTIONS)
    with slots.scheduler.turn():
        first = slots.open(model, **OPTIONS)
        second = slots.open(model, **OPTIONS | {"n_cells": 100})
        large = slots.open(model, **OPTIONS | {"n_cells": 600})
        recorded = slots.open(model, n_recorded=16, **OPTIONS)
    assert (first.pointer, first.seq) != (second.pointer, second.seq) and first.pointer == second.pointer
    assert len({first.pointer, large.pointer, recorded.pointer}) == 3
    assert [slot.n_cells for slot in (first, second, large)] == [256, 256, 768]
    for slot in (first, second, large, recorded):
        slot.close()
    with pytest.raises(EngineError, match="closed"):
        first.pos_max()
    slots.close()


def test_state_and_cells_are_those_of_the_stream(model, tokens):
    def task(n, slot):
        slot.decode(tokens[:n], 0)
        native = NativeCache(slot.pointer, slot.seq)
        before = native.n_cells(), slot.pos_max(), native.read_keys(3)
        state = slot.state_get()
        slot.clear()
        assert (native.n_cells(), slot.pos_max()) == (0, -1)
        slot.state_set(0, state)
        np.testing.assert_array_equal(native.read_keys(3), before[2])
        with pytest.raises(EngineError, match="no logits"):
            slot.logits()
        with pytest.raises(EngineError, match="no sequence 1"):
            slot.remove(1, 0, -1)
        return before[:2]

    assert together(model, partial(task, 10), partial(task, 33)) == [(10, 9), (33, 32)]


def test_everything_is_computed_in_the_thread_that_decodes(model, tokens):
    """Each thread that computes has helpers of its own, and all of them slow down once there are more than cores."""

    def compressed(slot):
        native = NativeCache(slot.pointer, slot.seq, slot.call)
        slot.decode(tokens[:32], 0)
        n_threads = len(list(Path("/proc/self/task").iterdir()))
        scores, redundancy = native.scores(), native.redundancy()
        native.attention_map([0])
        layers, heads, n_cells = scores.shape
        native.compact(np.broadcast_to(np.arange(0, n_cells, 2, dtype=np.int32), (layers, heads, n_cells // 2)), np.arange(n_cells // 2))
        return len(list(Path("/proc/self/task").iterdir())) - n_threads, float(scores.sum()), float(redundancy.sum())

    ((n_new, *sums),) = together(model, compressed, n=1, n_threads=2, n_recorded=16)
    assert n_new == 0
    assert all(sums)


@pytest.mark.parametrize("kind", [Context, Slot])
def test_a_stream_and_a_context_are_used_in_the_same_way(kind):
    """Everything that a conversation may ask for is there, with the same arguments."""
    members = {name: member for name, member in vars(SequenceDecoder).items() if not name.startswith("_")}
    assert len(members) > 15
    for name, member in members.items():
        if callable(member):
            wanted, given = (list(inspect.signature(function).parameters.values())[1:] for function in (member, getattr(kind, name)))
            assert [one.name for one in given[: len(wanted)]] == [one.name for one in wanted], name
            assert all(one.default is not one.empty for one in given[len(wanted) :]), name


class TimedRequest:
    """Takes so many seconds."""

    context, seq = None, 0

    def __init__(self, seconds, is_next_token, done):
        self.seconds, self.is_next_token, self.done = seconds, is_next_token, done

    def decode(self):
        time.sleep(self.seconds)
        self.done.append(self)


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 4, 11), (0.0, 1, 1)])
def test_next_tokens_have_their_share_of_the_time_beside_long_texts(share, least, most):
    """Two texts, whose micro-batches take as long as ten tokens: one of them after another, and the tokens between."""
    rounds, done = Rounds(share), []
    waiting = [TimedRequest(0.1, False, done) for _ in range(2)]
    for _ in range(30):
        put_off = rounds.carry_out([*waiting, TimedRequest(0.01, True, done)])
        waiting = [*put_off, *(TimedRequest(0.1, False, done) for _ in range(2 - len(put_off)))]
    kinds = "".join("t" if one.is_next_token else "T" for one in done)
    between = [len(tokens) for tokens in kinds.split("T")[1:-1] if tokens]
    assert all(least <= n <= most for n in between) and kinds.count("t") == 30
    assert ("TT" in kinds) == (share == 0)


def test_texts_alone_are_all_read_at_once():
    done = []
    assert not Rounds(0.5).carry_out([TimedRequest(0, False, done) for _ in range(3)]) and len(done) == 3


def test_a_fault_in_one_request_is_its_own(model, tokens):
    def broken(slot):
        try:
            slot.use_adapter("no adapter")
            slot.decode(tokens[:5], 0)
        except AttributeError as error:
            return error

    error, rows = together(model, broken, lambda slot: read(tokens[:20], 3, slot))
    assert isinstance(error, AttributeError) and len(rows) == 4


def test_one_thread_decodes_next_tokens_of_several_slots_ahead(model, tokens):
    slots = SlotsInStep(3, model, **OPTIONS)
    texts = [tokens[i : i + 20 + i] for i in range(3)]
    opened = [slots.open(model, **OPTIONS) for _ in texts]
    for slot, text in zip(opened, texts, strict=True):
        slot.decode(text[:-1], 0)
    slots.decode_ahead([(slot, text[-1], len(text) - 1) for slot, text in zip(opened, texts, strict=True)])
    for slot, text in zip(opened, texts, strict=True):
        slot.decode(text[-1:], len(text) - 1)
        with Context(model, **OPTIONS) as alone:
            alone.decode(text[:-1], 0)
            alone.decode(text[-1:], len(text) - 1)
            # a device multiplies one token by other operations than several
            assert np.abs(slot.logits() - alone.logits()).max() < device.tolerance(1e-3, 4)
        assert slot.pos_max() == len(text) - 1
    slots.decode_ahead([(opened[0], 5, 20)])
    with pytest.raises(EngineError, match="another token was decoded ahead"):
        opened[0].decode([6], 20)
    slots.close()
