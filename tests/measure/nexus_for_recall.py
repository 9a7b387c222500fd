"""Trains Nexus tokens for what recall leaves out, and says what they are worth beside recalled cells.

    kvlocal nexus synth smollm2-135m -o talk.jsonl --tokens 220000
    python tests/measure/nexus_for_recall.py --data talk.jsonl -o FILE --updates 110

The student has in each layer and head the cells that recall would choose, and behind each turn that is gone one or a few Nexus tokens, which are
counted among the cells. As in a chat, cells are chosen by the last queries every 16 tokens of what the user says, and after 0, 4, 12, 28 and so on
tokens of the answer, which is what is judged. Beside the divergence from the teacher, which has all cells, there are two losses on the attention of
each head to the turns that are gone. `gist`: cells of a turn and its Nexus tokens shall have as much together as the teacher gives to the turn, so
that the Nexus tokens have what the choice of cells leaves out. `rank`: the attention to the Nexus tokens of each turn shall be spread over turns as
the teacher's attention to them is (the cross-entropy of ListNet, Cao et al. 2007, less the teacher's entropy, weighted by the attention there is).

Printed are means over held-out conversations by the share of Nexus tokens. kl, gist, rank: the losses. hit: the part of the teacher's attention to
turns that are gone which is in a fourth of them, those with the most attention to their Nexus tokens; newest: the same in the newest of them; best:
in those with the most. mass: of a head's attention, what goes to Nexus tokens.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvlocal.gguf.container import Container
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.nexus.allotment import n_nexus
from kvlocal.nexus.file import NexusFile
from kvlocal.policies import CacheState, Recall
from kvlocal.training.checkpoint import warm_up_then_cosine
from kvlocal.training.decoder import Decoder
from kvlocal.training.distil import Compression, SequenceLayout, student_pass
from kvlocal.training.examples import Example, joined, read
from kvlocal.training.parameters import Parameters
from kvlocal.training.row_divergence import RowsKL
from kvlocal.training.weights import Weights

WINDOW = 16  # queries that choose
SLACK = 64  # cells that the stride of 128 leaves free on average
RATIOS = (0.5, 0.8, 0.9, 0.9)
SHARES = (0.01, 0.06)  # of Nexus tokens among the cells, in training
JOIN = 8
SEED = 5


@dataclass(frozen=True)
class Found:
    """Of one student: the losses, and what is printed of its attention, NaN without Nexus tokens."""

    kl: Tensor
    gist: Tensor
    rank: Tensor
    hit: float = math.nan
    newest: float = math.nan
    best: float = math.nan
    mass: float = math.nan


class Reading:
    """A conversation as the teacher reads it, for students that have Nexus tokens behind its first turns.

    example: ends with the turns that are judged
    n_gone: turns before those
    header: the tokens that an answer begins behind
    """

    def __init__(self, decoder: Decoder, example: Example, n_gone: int, header: list[int]) -> None:
        self._decoder, self._example, self._n_gone = decoder, example, n_gone
        self._segments = np.repeat(np.arange(-1, len(example.segments)), [len(example.prefix), *map(len, example.segments)])
        n = len(self._segments)
        self._begin = int((self._segments < n_gone).sum())
        self._starts, self._asked, self._judged = _choices(example.segments[n_gone:], self._begin, header)
        with torch.no_grad():
            self._teacher = decoder.forward(
                decoder.embed(torch.from_numpy(np.concatenate([example.prefix, *example.segments]).astype(np.int64))),
                torch.arange(n),
                torch.ones(1, 1, n, n, dtype=torch.bool).tril_(),
                columns=self._columns(self._segments, np.zeros(n, bool)),
                watch=torch.arange(self._begin - WINDOW, n),
            )
        assert self._teacher.watched is not None
        self._watched = self._teacher.watched.numpy()

    def student(self, parameters: Parameters, ratio: float, share: float) -> Found:
        """What one student loses whose cells are so many that this ratio of the conversation is gone, a share of them Nexus tokens."""
        decoder, begin = self._decoder, self._begin
        ks = [n_nexus(len(segment), ratio, share, len(parameters.table)) if share else 0 for segment in self._example.segments[: self._n_gone]]
        n_judged = len(self._example.segments) - self._n_gone
        layout = SequenceLayout.of(self._example, Compression((*ks, *[0] * (n_judged - 1)), self._n_gone, 0.0, n_judged=n_judged))
        is_nexus = layout.own_is_nexus
        visible = torch.from_numpy(self._visible(layout, is_nexus, self._kept(ratio, sum(ks))))
        column_is_nexus = np.concatenate([np.zeros(len(layout.past), bool), is_nexus])
        columns = self._columns(layout.segments[np.concatenate([layout.past, layout.own])], column_is_nexus) if share else None
        out = student_pass(decoder, parameters, layout, self._teacher.cells, visible, columns)
        text_rows = torch.from_numpy(np.flatnonzero(~is_nexus))
        judged = np.flatnonzero(self._judged[begin:])
        rows, same = text_rows[torch.from_numpy(judged)], torch.from_numpy(begin + judged)
        kl = RowsKL.apply(out.hidden.index_select(0, rows), self._teacher.hidden[same], decoder)
        if out.masses is None:
            return Found(kl, kl.new_zeros(()), kl.new_zeros(()))
        assert self._teacher.masses is not None
        return self._attention(kl, out.masses[:, :, rows].float(), self._teacher.masses[:, :, same].float())

    def _attention(self, kl: Tensor, got: Tensor, wanted: Tensor) -> Found:
        """The losses on masses [L, H, T, 2 * n_gone], and what they say of turns."""
        n = self._n_gone
        wanted, got, to_nexus = wanted[..., :n], got[..., :n], got[..., n:]
        weight = wanted.sum(-1)
        p = wanted / weight[..., None].clamp_min(1e-9)
        q = to_nexus.clamp_min(1e-7)
        q = q / q.sum(-1, keepdim=True)
        rank = ((p * (p.clamp_min(1e-9).log() - q.log())).sum(-1) * weight).sum() / weight.sum()

        def part(of: Tensor) -> float:
            chosen = of.argsort(-1, descending=True)[..., : max(1, round(n / 4))]
            return (wanted.gather(-1, chosen).sum() / wanted.sum()).item()

        newest = torch.arange(n).expand_as(wanted)
        return Found(kl, (got - wanted).abs().mean(), rank, part(q), part(newest), part(wanted), to_nexus.sum(-1).mean().item())

    def _columns(self, segments: np.ndarray, is_nexus: np.ndarray) -> Tensor:
        """Sets of columns, [1, 1, C, 2 * n_gone]: each turn that is gone, and the Nexus tokens of each."""
        turns = segments[:, None] == np.arange(self._n_gone)
        return torch.from_numpy(np.concatenate([turns, turns & is_nexus[:, None]], 1).astype(np.float32))[None, None]

    def _kept(self, ratio: float, n_nexus: int) -> np.ndarray:
        """What recall has of the text at each choice, bool [L, H_kv, choices, T]."""
        policy, n_pinned = Recall(), len(self._example.prefix)
        found = np.zeros((*self._watched.shape[:2], len(self._starts), len(self._segments)), bool)
        for i, (start, asked) in enumerate(zip(self._starts, self._asked, strict=True)):
            first = start - self._begin
            scores = self._watched[:, :, first : first + WINDOW, :start].mean(2)
            budget = max(n_pinned + round((1 - ratio) * (start - n_pinned)) + SLACK - n_nexus, n_pinned + WINDOW)
            if budget >= start:
                found[:, :, i, :start] = True
                continue
            state = CacheState(np.broadcast_to(np.arange(start) < n_pinned, scores.shape), np.full_like(scores, np.nan), WINDOW, scores)
            np.put_along_axis(found[:, :, i], (policy.for_question if asked else policy).plan(state, budget).keep, True, axis=-1)
        return found

    def _visible(self, layout: SequenceLayout, is_nexus: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """What the student's own rows see, bool [L, H_kv, T_own, T]: what the choice before them has, what came since, and all Nexus tokens.

        These see all of their own turn.
        """
        past, own = layout.past, layout.own
        columns = np.concatenate([past, own])
        text_of_own = np.cumsum(~is_nexus) - 1 + len(past)
        text = np.concatenate([np.arange(len(past)), text_of_own])
        choice = np.where(is_nexus, 0, np.searchsorted(self._starts, text_of_own, side="right") - 1)
        since = text >= self._starts[choice][:, None]
        to_nexus = np.concatenate([np.zeros(len(past), bool), is_nexus])
        own_turn = is_nexus[:, None] & (layout.segments[own][:, None] == layout.segments[columns])
        return (columns <= own[:, None]) & (to_nexus | since | own_turn | kept[:, :, choice][..., text])


def _choices(segments: tuple[np.ndarray, ...], begin: int, header: list[int]) -> tuple[np.ndarray, list[bool], np.ndarray]:
    """Of turns that begin at this token: where cells are chosen, ascending; whether that is as at a question; bool [T], which tokens are answers."""
    starts, asked, judged = [], [], np.zeros(begin + sum(map(len, segments)), bool)
    refresh = Recall.refresh
    for segment in segments:
        answer, end = begin + _answer(segment, header), begin + len(segment)
        judged[answer:end] = True
        for start in range(begin, answer, WINDOW):
            starts.append(start)
            asked.append(False)
        start, interval = answer, refresh // 4
        while start < end:
            starts.append(start)
            asked.append(interval < refresh)
            start, interval = start + interval, min(2 * interval, refresh)
        begin = end
    return np.array(starts), asked, judged


def _answer(segment: np.ndarray, header: list[int]) -> int:
    """Where the answer of a turn begins; 0 where the turn was cut in two and this is the end of it."""
    n = len(header)
    return max((i + n for i in range(len(segment) - n) if segment[i : i + n].tolist() == header), default=0)


@torch.no_grad()
def evaluate(decoder: Decoder, parameters: Parameters, chats: list[Example], header: list[int], ratios: list[float], shares: list[float]) -> None:
    readings = [Reading(decoder, chat, len(chat.segments) - 1, header) for chat in chats]
    for ratio in ratios:
        for share in shares:
            found = [reading.student(parameters, ratio, share) for reading in readings]
            values = {name: np.mean([float(getattr(one, name)) for one in found]) for name in Found.__dataclass_fields__}
            print(f"  ratio {ratio:g}, share {share:g}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dialogues that the model wrote")
    parser.add_argument("--start", type=Path, default=Path("models/smollm2-135m.nexus.gguf"))
    parser.add_argument("-o", type=Path, required=True, help="the Nexus file; with no updates it is only evaluated what it begins with")
    parser.add_argument("--updates", type=int, default=110)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--students", type=int, default=2)
    parser.add_argument("--gist-weight", type=float, default=1.0)
    parser.add_argument("--rank-weight", type=float, default=0.1)
    parser.add_argument("--rate", type=float, default=5e-4, help="of the adapter; the table has twice that")
    parser.add_argument("--tokens", type=int, default=1280, help="of a conversation")
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--evaluate-every", type=int, default=55)
    parser.add_argument("--ratios", default="0.8", help="that are evaluated")
    parser.add_argument("--shares", default="0,0.05", help="that are evaluated")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = resolve(DEFAULT_MODEL)
    with Model(path) as tokenizer:
        header = tokenizer.tokenize("<|im_start|>assistant\n", parse_special=True).tolist()
        examples = read(tokenizer, [args.data], max_tokens=args.tokens, held_out=0.1)
    training, held_out = examples.training, joined(examples.held_out[: args.held_out], JOIN, args.tokens)
    decoder = Decoder(Weights.load(Container(path), torch.bfloat16, "cpu"))
    start = NexusFile.load(args.start)
    parameters = Parameters.of(start, decoder.device)
    groups = [{"params": [parameters.table], "lr": 2 * args.rate}, {"params": parameters.adapter_leaves, "lr": args.rate}]
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warm_up_then_cosine(step, args.updates))
    ratios, shares = ([float(value) for value in values.split(",")] for values in (args.ratios, args.shares))
    print(f"{len(training)} conversations to train on, {len(held_out)} held out", flush=True)
    evaluate(decoder, parameters, held_out, header, ratios, shares)
    began, lately = time.time(), []
    for step in range(args.updates):
        for i in range(args.batch):
            n = step * args.batch + i
            rng = np.random.default_rng([SEED, 1, n])
            example = training[np.random.default_rng([SEED, 2, n // len(training)]).permutation(len(training))[n % len(training)]]
            for j in rng.integers(0, len(training), JOIN - 1):
                example = example.behind(training[j], args.tokens)
            n_gone = int(rng.integers(max(2, len(example.segments) // 2), len(example.segments)))
            n_judged = int(rng.integers(1, 3))
            reading = Reading(decoder, replace(example, segments=example.segments[: n_gone + n_judged]), n_gone, header)
            for _ in range(args.students):
                ratio, share = float(rng.choice(RATIOS)), math.exp(rng.uniform(*np.log(SHARES)))
                found = reading.student(parameters, ratio, share)
                loss = found.kl + args.gist_weight * found.gist + args.rank_weight * found.rank
                (loss / (args.batch * args.students)).backward()
                lately.append([value.item() for value in (found.kl, found.gist, found.rank)])
        torch.nn.utils.clip_grad_norm_(parameters.leaves, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        done = step + 1
        if done % 10 == 0:
            kl, gist, rank = np.mean(lately, 0)
            print(f"update {done}: kl {kl:.4f}, gist {gist:.5f}, rank {rank:.3f}, {(time.time() - began) / done:.1f} s an update", flush=True)
            lately = []
        if done % args.evaluate_every == 0 or done == args.updates:
            replace(start, table=parameters.table.detach().numpy().copy(), adapter=parameters.arrays()).save(args.o)
            evaluate(decoder, parameters, held_out, header, ratios, shares)


if __name__ == "__main__":
    main()
