"""What an answer misses of a long archive by looking on only where its question looked.

    python tests/measure/recall_near.py --data final.jsonl --tokens 30000

A chat of joined dialogues, with facts told among them, is read into a session that recalls. In the last turns each choice that an answer makes is
made three times by the same queries: in the chunks that the question looked at, as it is, in the whole archive, and by exact scores of all keys.
Printed is the attention to what the first two choose, as a share of that to the exact choice, without what is pinned or among the newest: the mean
over layers with its 95 % interval over turns, and the worst layer.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvlocal.cache.archive import CHUNK
from kvlocal.cache.frames import stretches
from kvlocal.cache.ledger import Ledger
from kvlocal.cache.recall import ChosenTokens
from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.conversations.dialogues import load
from kvlocal.evaluation.history import turn_tokens
from kvlocal.evaluation.recall_chats import FACTS_PER_CHAT, recall_chats
from kvlocal.evaluation.statistics import bootstrap
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.policies import CacheState, Policy, Recall
from kvlocal.template.chat_template import ChatTemplate

CHOSEN = ("near", "everywhere", "exact")


class Comparison:
    """Stands in for a recaller's `choice`, and notes what its choices for answers catch of the attention.

    caught: by who chooses, of each turn [choices] of float64 [L], the attention to what is neither pinned nor recent
    all_far: of each turn [choices], the attention to all that is neither pinned nor recent, mean over layers and heads
    """

    def __init__(self, session: ChatSession) -> None:
        recaller = session.cache.compressor.recaller
        assert recaller
        self._recaller, self._native, self._choose = recaller, session.cache.native, recaller.choice
        self.caught, self.all_far = defaultdict[str, list[list[np.ndarray]]](list), list[list[float]]()
        recaller.choice = self.choice  # type: ignore[method-assign]

    def begin_turn(self) -> None:
        for name in CHOSEN:
            self.caught[name].append([])
        self.all_far.append([])

    def choice(self, ledger: Ledger, n_keep: int, policy: Policy, *, closely: bool = False, beside: bool = False) -> Callable[[], ChosenTokens]:
        recaller, choice = self._recaller, self._choose(ledger, n_keep, policy, closely=closely)()
        if closely or recaller._near is None or not self.all_far:
            return lambda: choice
        n_tokens, shape, near = ledger.n_tokens, ledger.tokens.shape[:2], recaller._near
        recaller.look_everywhere()
        everywhere = self._choose(ledger, n_keep, policy)()
        recaller._near = near
        shifts = recaller.positions(ledger, ledger.next_position) - recaller.archive.positions
        moved = stretches(shifts) if shifts.any() else None
        queries = self._native.copy_queries(recaller._window, stretches=moved)
        scores = queries.row_scores(recaller.archive.key_chunks(), n_tokens)
        pinned = np.broadcast_to(np.arange(n_tokens) < ledger.n_pinned, scores.shape)
        exact = policy.plan(CacheState(pinned, np.full((*shape, 1), np.nan, np.float32), recaller._window, scores), n_keep).keep
        far = scores.copy()
        far[..., : ledger.n_pinned] = far[..., n_tokens - round(Recall.recent * n_keep) :] = 0
        chosen: tuple[np.ndarray, ...] = choice.tokens, everywhere.tokens, exact
        for name, tokens in zip(CHOSEN, chosen, strict=True):
            self.caught[name][-1].append(np.take_along_axis(far, tokens, axis=-1).sum(axis=(1, 2), dtype=np.float64))
        self.all_far[-1].append(float(far.sum(axis=-1).mean()))
        return lambda: choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--data", type=Path, required=True, help="dialogues, in MT-Bench-101's format or as messages")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the chat")
    parser.add_argument("--turns", type=int, default=12, help="how many of its last answers are looked at")
    args = parser.parse_args()
    config = SessionConfig(policy="recall", archive="ram", archive_ram=2**40, n_threads=1)
    with Model(resolve(args.model)) as model, ChatSession(model, config, spare=256) as session:
        template, dialogues = ChatTemplate.from_model(model), load(args.data).dialogues
        (chat,) = recall_chats(
            FACTS_PER_CHAT, args.tokens, 0, lambda messages: [len(turn) for turn in turn_tokens(model, template, messages)], dialogues
        )
        comparison = Comparison(session)
        for i, message in enumerate(chat.history):
            if message["role"] == "assistant" and i >= len(chat.history) - 2 * args.turns:
                comparison.begin_turn()
            session.add_turn(message["role"], message["content"])
        report(comparison, session.cache.ledger.n_tokens)


def report(comparison: Comparison, n_tokens: int) -> None:
    # [turns, L]
    caught = {name: np.array([np.sum(choices, axis=0) for choices in turns if choices]) for name, turns in comparison.caught.items()}
    turns = [choices for choices in comparison.all_far if choices]
    print(f"{n_tokens} tokens in {-(-n_tokens // CHUNK)} chunks, {sum(map(len, turns))} choices in {len(turns)} answers;", end=" ")
    print(f"attention to what is neither pinned nor recent {np.mean(np.concatenate(turns)):.3f}")
    for name in CHOSEN[:2]:
        shares = caught[name] / caught["exact"]
        mean, lo, hi = bootstrap(shares.mean(axis=-1), np.ones(len(shares)))
        print(f"{name:12s} {mean:.3f} [{lo:.3f}, {hi:.3f}], worst layer {shares.mean(axis=0).min():.2f}")


if __name__ == "__main__":
    main()
