"""Which keys of an archive need to be looked at: how much of what an exact choice of cells catches is found through an index.

    OMP_NUM_THREADS=1 python tests/measure/recall_index.py --data final.jsonl --nexus models/smollm2-135m.nexus.gguf

Chats of joined dialogues, with facts told early among them, are read into a session that recalls. Looked at are the last turns of the user, and
questions about the facts. Their last queries have exact scores for all keys, and these say which k keys of each head are the best among those that
are neither pinned nor recent; k is what the default budget leaves to them when something is asked, or while it is answered. An index says which keys
are scored exactly. Printed is how much of the attention to the exact choice the best k of those have: the mean over layers with its 95 % interval
over chats, the worst layer, and all layers together. The milliseconds are what the processor takes to ask the index, without the exact scores of what
it names; numpy's, but for rows marked native. Nexus tokens are read behind each answer and taken back, and only their keys are kept.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from kvlocal.cache.archive import CHUNK
from kvlocal.cache.config import DEFAULT_BUDGET
from kvlocal.cache.ledger import Ledger
from kvlocal.cache.recall import Refill
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.dialogues import load
from kvlocal.evaluation.history import turn_tokens
from kvlocal.evaluation.recall_chats import FACTS_PER_CHAT, RecallChat, recall_chats
from kvlocal.evaluation.statistics import bootstrap
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.cells import NativeCache
from kvlocal.llama.layout import BLOCK
from kvlocal.llama.model import Model
from kvlocal.llama.rows import RowTypes
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.tokens import NexusTokens
from kvlocal.policies import Policy, Recall
from kvlocal.policies.segmentation import SENTENCE, Dynamic, delimiter_strength
from kvlocal.template.chat_template import ChatTemplate

PARTS = (1 / 4, 1 / 8, 1 / 16)  # of the keys that are neither pinned nor recent, how many are scored exactly
WINDOW, OPENING = 16, 8
SHARES = {"asked": Recall.asked, "answer": Recall.recent}  # of the budget by age

T = TypeVar("T")


class Look:
    """What the last queries of a question find in the archive of a session, at the moment when its cells are chosen.

    session: as it is then
    nexus: of each finished turn, the number of tokens to its end and the keys of its Nexus tokens, float32 [L, H, k, head size]
    far_before: `far` of the look before

    scores: float32 [L, H, n], the attention to each of the n keys that are neither pinned nor recent
    far: float32 [L, H], the attention to all of these
    found: by index, the scores of what it names for each of PARTS, float32 [L, H, any], and milliseconds
    """

    def __init__(self, session: ChatSession, nexus: list[tuple[int, np.ndarray]], far_before: np.ndarray) -> None:
        ledger, layout, native = session.cache.ledger, session.cache.layout, session.cache.native
        archive, recaller, n_tokens = session.cache.archive, session.cache.compressor.recaller, ledger.n_tokens
        assert archive and recaller and (recaller.positions(ledger, ledger.next_position) == archive.positions).all()
        self.first, last = (n // BLOCK * BLOCK for n in (ledger.n_pinned + BLOCK - 1, n_tokens - round(Recall.asked * DEFAULT_BUDGET)))
        self.region, self.n = slice(self.first, last), last - self.first
        self.k = {name: DEFAULT_BUDGET - round(share * DEFAULT_BUDGET) - ledger.n_pinned for name, share in SHARES.items()}
        every, self.exact_ms = timed(lambda: native.copy_queries(WINDOW).row_scores(archive.key_chunks(), n_tokens))
        self.scores = every[..., self.region]
        self.far = self.scores.sum(axis=-1)
        keys = np.concatenate([chunk.view(np.float16) for chunk in archive.key_chunks()], axis=2)[:, :, :n_tokens].astype(np.float32)
        of_heads = (WINDOW, layout.n_head_kv, layout.n_head // layout.n_head_kv, layout.n_embd_head_k)
        # of each layer, [H, group, WINDOW, head size]
        self.queries = [
            native.kq_scale(i) * native.read_queries(i)[-WINDOW:].reshape(of_heads).transpose(1, 2, 0, 3) for i in range(layout.n_layer)
        ]
        self.found: dict[str, tuple[list[np.ndarray], float]] = {}
        texts = [session.model.token_bytes(token) for token in ledger.ids.tolist()]
        ends = np.concatenate([segment.start + Dynamic().split(texts[segment.start : segment.end], None) for segment in ledger.segments])
        self.lengths = {"semantic block": n_tokens / len(ends), "turn": n_tokens / len(nexus)}
        opening, ending = np.zeros(n_tokens, bool), delimiter_strength(texts) >= SENTENCE
        for segment in ledger.segments:
            opening[segment.start : segment.start + OPENING] = segment.role in ("user", "assistant")

        self.add("exact scores", self.scores, self.exact_ms)
        self.add("the newest", np.broadcast_to(np.arange(self.n), self.scores.shape), 0)
        self._add_native(native, archive.key_chunks(), recaller._boxes.of(archive), keys, layout.row_types)
        self._add_blocks(keys[:, :, self.region], self._starts(ends))
        self._add_heads(far_before)
        self._add_turns(nexus, opening, ending)

    def _add_native(
        self, native: NativeCache, chunks: list[np.ndarray], boxes: list[np.ndarray], keys: np.ndarray, own: RowTypes
    ) -> None:
        """Rounded keys, fewer queries, and the boxes in use, which are all there in native code."""
        n_tokens = keys.shape[2]

        def exact(keys: list[np.ndarray], types: RowTypes) -> np.ndarray:
            return native.copy_queries(WINDOW).row_scores(keys, n_tokens, types=types)

        for bits, kind in ((8, GGMLQuantizationType.Q8_0), (4, GGMLQuantizationType.Q4_0)):
            in_kind = in_chunks(quantize(keys, kind))
            types = RowTypes(int(kind), own.v, in_kind[0].shape[-1], own.size_v)
            values, ms = timed(partial(exact, in_kind, types=types))
            self.add(f"keys of {bits} bits (native)", values[..., self.region], ms)

        def best(n_blocks: int, every: int = 1) -> tuple[np.ndarray, np.ndarray]:
            queries = native.copy_queries(WINDOW, every=every)
            return queries.best_rows(chunks, boxes, n_tokens, first=self.first, last=self.first + self.n, n_blocks=n_blocks)

        (_, values), ms = timed(lambda: best(n_blocks=self.n // BLOCK, every=8))
        self.add("whole keys, by 2 of the queries (native)", values[..., self.region], ms)
        ms = timed(lambda: best(n_blocks=1))[1] - self.exact_ms * (1 - (self.n - BLOCK) / n_tokens)
        values = np.zeros_like(self.scores)
        for n in self.numbers:
            # the best few blocks are among the best of more
            rows = best(n_blocks=n // BLOCK)[0][..., self.first : self.first + n] - self.first
            np.put_along_axis(values, rows, np.take_along_axis(values, rows, axis=-1) + 1, axis=-1)
        self.add("boxes of 16, by 2 of the queries: in use (native)", values, ms)

    def _add_blocks(self, keys: np.ndarray, semantic: np.ndarray) -> None:
        for name, starts in (("16", np.arange(0, self.n, BLOCK)), ("semantic blocks", semantic)):
            lengths = np.diff(starts, append=self.n)
            low, high = (function.reduceat(keys, starts, axis=2) for function in (np.minimum, np.maximum))
            means = np.add.reduceat(keys, starts, axis=2) / lengths[:, None]
            self.add(f"boxes of {name}", *self.attention(low, high), lengths)
            self.add(f"mean keys of {name}", *self.attention(means), lengths)
            if name == "16":
                two_bits = rounded(keys, low, high)
                self.add("keys of 2 bits, between the ends of the box", *self.attention(two_bits))
                self.add("the same, by 2 of the queries", *self.attention(two_bits, every=8))

    def _add_heads(self, far_before: np.ndarray) -> None:
        rank = np.argsort(np.argsort(-far_before.ravel())).reshape(*far_before.shape, 1)
        newest = np.arange(self.n) >= self.n - max(self.k.values())
        looking = [np.where((rank < round(part * rank.size)) | newest, self.scores, 0) for part in PARTS]
        self.found["heads that looked far last time; of the others the newest, not scored"] = looking, 0

    def _add_turns(self, nexus: list[tuple[int, np.ndarray]], opening: np.ndarray, ending: np.ndarray) -> None:
        """Long turns have more of the attention, so it counts by length where all tokens, or a share of them, are looked at."""
        starts = self._starts(np.array([end for end, _ in nexus]))
        lengths = np.diff(starts, append=self.n)
        for name, most, per in (("all Nexus tokens", None, lengths), ("the first Nexus token", 1, 1)):
            cells = [of_turn[:, :, :most] for _, of_turn in nexus]
            values, ms = self.attention(np.concatenate(cells, axis=2))
            sums = np.add.reduceat(values, np.cumsum([0, *(cell.shape[2] for cell in cells[:-1])]), axis=2)
            # what comes after the last of them is in no finished turn
            of_turns = np.zeros((*sums.shape[:2], len(starts)), np.float32)
            of_turns[..., : sums.shape[2]] = sums[..., : len(starts)]
            self.add(f"turns by attention to {name}", of_turns / per, ms, lengths)
        for name, mask, per in (
            (f"the first {OPENING} tokens of question and answer", opening, 1), ("ends of sentences", ending, lengths),
            ("all their tokens", np.ones(len(opening), bool), lengths),
        ):  # fmt: skip
            sums = np.add.reduceat(np.where(mask[self.region], self.scores, 0), starts, axis=2)
            self.add(f"turns by attention to {name}", sums / per, self.exact_ms * mask.mean(), lengths)

    def _starts(self, ends: np.ndarray) -> np.ndarray:
        """Where the units begin that end before these tokens of the conversation."""
        ends = ends - self.first
        return np.unique([0, *ends[(ends > 0) & (ends < self.n)]])

    @property
    def numbers(self) -> list[int]:
        """How many keys are scored exactly for each of PARTS."""
        return [round(part * self.n / BLOCK) * BLOCK for part in PARTS]

    def add(self, name: str, values: np.ndarray, ms: float, lengths: np.ndarray | None = None) -> None:
        """An index names the keys of the highest values [L, H, n], of equals the oldest; or units of so many keys each, by values [L, H, units]."""
        order = np.argsort(-(values if lengths is None else np.repeat(values, lengths, axis=2)), axis=-1, kind="stable")
        self.found[name] = [np.take_along_axis(self.scores, order[..., :n], axis=-1) for n in self.numbers], ms

    def attention(self, keys: np.ndarray, high: np.ndarray | None = None, every: int = 1) -> tuple[np.ndarray, float]:
        """Of every so many-th query to keys [L, H, units, head size], or boxes from them to high: [L, H, units] as scores are, and milliseconds."""
        started, values = time.process_time(), []
        for layer, of_layer in enumerate(self.queries):
            chosen = of_layer[:, :, every - 1 :: every]
            queries, low = chosen.reshape(len(chosen), -1, chosen.shape[-1]), keys[layer].transpose(0, 2, 1)
            logits = queries @ low if high is None else np.minimum(queries, 0) @ low + np.maximum(queries, 0) @ high[layer].transpose(0, 2, 1)
            weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            values.append(weights.reshape(*chosen.shape[:3], -1).max(axis=1).mean(axis=1))
        return np.stack(values), 1000 * (time.process_time() - started)

    def shares(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """For which k, the index, and [parts, L + 1]: the share of the exact choice's attention in each layer, and in all together."""
        for which, k in self.k.items():
            best = largest(self.scores, k)
            for name, (candidates, _) in self.found.items():
                got = [largest(scores, k) for scores in candidates]
                yield which, name, np.array([[*(x / best), x.sum() / best.sum()] for x in got])


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and how many milliseconds the processor took."""
    started = time.process_time()
    return function(), 1000 * (time.process_time() - started)


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """The sum of the k largest of each head, and of the heads of a layer, [L]."""
    k = min(k, scores.shape[-1])
    return np.partition(scores, scores.shape[-1] - k, axis=-1)[..., -k:].sum(axis=(1, 2), dtype=np.float64)


def rounded(keys: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Each number of a key as the nearest of four between the ends of its block's box."""
    least, step = (np.repeat(array, BLOCK, axis=2) for array in (low, np.maximum((high - low) / 3, 1e-9)))
    return least + np.round((keys - least) / step) * step


def in_chunks(rows: np.ndarray) -> list[np.ndarray]:
    padded = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % CHUNK), (0, 0)))
    return [np.ascontiguousarray(chunk) for chunk in np.split(padded, padded.shape[2] // CHUNK, axis=2)]


def looks(model: Model, nexus: NexusTokens, chat: RecallChat, n_asked: int) -> Iterator[tuple[str, Look]]:
    """Reads a chat, and looks at its last turns and at questions about its facts; gives the kind of each."""
    # a large interval: an answer that is given is read in large pieces
    config = SessionConfig(policy="recall", policy_args={"refresh": 256}, archive="ram", archive_ram=2**40, n_threads=1)
    with ChatSession(model, config, nexus=nexus, spare=256) as session:
        cache, recaller, of_turns, found = session.cache, session.cache.compressor.recaller, list[tuple[int, np.ndarray]](), list[Look]()
        far, calls = np.zeros(cache.ledger.tokens.shape[:2], np.float32), 0
        assert recaller
        choose = recaller.choose

        def look(ledger: Ledger, n_keep: int, policy: Policy, closely: bool = False) -> Refill:
            nonlocal calls
            calls += closely
            # the second choice is by what the question's end looks for after it was evaluated again
            if asked and closely and calls % 2 == 0:
                found[:] = [Look(session, of_turns, far)]
            return choose(ledger, n_keep, policy, closely and asked)

        recaller.choose = look  # type: ignore[method-assign]
        for i, message in enumerate(chat.history):
            # the one before those that count only says which heads look far
            asked, calls = message["role"] == "user" and i >= len(chat.history) - 2 * (n_asked + 1), 0
            session.add_turn(message["role"], message["content"])
            if asked:
                if far.any():
                    yield "dialogue", found[0]
                far = found.pop().far
            if message["role"] == "assistant":
                of_turns.append((cache.ledger.n_tokens, nexus_keys(session, nexus, of_turns[-1][0] if of_turns else cache.ledger.n_pinned)))
        asked = True
        for question in chat.questions[: 2 * n_asked]:
            calls = 0
            session.add_turn("user", question.text)
            yield "facts", found[0]
            far = found.pop().far
            session.undo()


def nexus_keys(session: ChatSession, nexus: NexusTokens, start: int) -> np.ndarray:
    """Those of Nexus tokens that stand for the tokens from `start` on, behind the last answer; they are read and taken back."""
    cache = session.cache
    with session.hold():
        closing = session.template.close_assistant(session._history_for_template(), session.messages[-1]["content"])
        session._reader._evaluate(session._reader.passages(closing))
        n = cache.append_vectors(nexus.vectors(n_nexus(cache.ledger.n_tokens - start, 0.9, 0.5, nexus.file.k)), "nexus", nexus.adapter)
        return np.stack([cache.native.read_keys(layer)[:, -n:] for layer in range(cache.layout.n_layer)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, required=True, help="dialogues, in MT-Bench-101's format or as messages")
    parser.add_argument("--nexus", type=Path, required=True)
    parser.add_argument("--chats", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=7400, help="of a chat, some hundreds fewer than the model was trained for")
    parser.add_argument("--asked", type=int, default=1, help="turns of each chat that are looked at, and twice as many questions about facts")
    args = parser.parse_args()
    if args.tokens < 2 * DEFAULT_BUDGET:
        parser.error(f"in a chat of {args.tokens} tokens there is little to look for: give at least {2 * DEFAULT_BUDGET}")
    with Model(resolve(args.model)) as model:
        nexus, template, dialogues = NexusTokens(model, args.nexus), ChatTemplate.from_model(model), load(args.data).dialogues
        # [chats][looks] of [parts, L + 1], by kind, k and index
        shares, times = defaultdict[tuple[str, str, str], list[list[np.ndarray]]](list), defaultdict[str, list[float]](list)
        for chat in recall_chats(
            FACTS_PER_CHAT * args.chats, args.tokens, 0, lambda messages: [len(turn) for turn in turn_tokens(model, template, messages)], dialogues
        ):
            of_chat = defaultdict[tuple[str, str, str], list[np.ndarray]](list)
            for kind, look in looks(model, nexus, chat, args.asked):
                for which, name, found in look.shares():
                    of_chat[kind, which, name].append(found)
                for name, (_, ms) in look.found.items():
                    times[name].append(ms)
                mass = np.cumsum(np.sort(look.far.ravel())[::-1]) / look.far.sum()
                lengths = ", ".join(f"{length:.1f} tokens a {name}" for name, length in look.lengths.items())
                print(f"{kind}: {look.n} keys, k {look.k}, {lengths}, far attention {look.far.mean():.3f},", end=" ")
                print(f"95 % of it in {np.searchsorted(mass, 0.95) + 1} of {mass.size} heads", flush=True)
            for key, arrays in of_chat.items():
                shares[key].append(arrays)
            report(shares, times)


def report(shares: dict[tuple[str, str, str], list[list[np.ndarray]]], times: dict[str, list[float]]) -> None:
    for kind, which in dict.fromkeys(key[:2] for key in shares):
        print(f"\n{kind}, k as for: {which}\n\n| index | ms |", " | ".join(f"1/{round(1 / part)}" for part in PARTS), "|")
        print("| --- |" + " --- |" * (1 + len(PARTS)))
        for name, milliseconds in times.items():
            chats = np.array([np.mean(looks, axis=0) for looks in shares[kind, which, name]])
            cells = []
            for i in range(len(PARTS)):
                mean, lo, hi = bootstrap(chats[:, i, :-1].mean(axis=-1), np.ones(len(chats)))
                cells.append(f"{mean:.3f} [{lo:.3f}, {hi:.3f}], {chats[:, i, :-1].mean(axis=0).min():.2f}, {chats[:, i, -1].mean():.3f}")
            print(f"| {name} | {np.median(milliseconds):.0f} |", " | ".join(cells), "|")
    print(flush=True)


if __name__ == "__main__":
    main()
