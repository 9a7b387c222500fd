"""A chat with its layers on one and on two RPC servers of this machine against the same chat in one process, turn by turn in alternation.

    python tests/measure/rpc_speed.py --turns 8
    python tests/measure/rpc_speed.py --turns 8 --policy gkv

Each side has the same budget and greedy answers, which are compared too; a process that computes has one thread unless --threads says another
number. "cells here" is one server for the weights, and the cells and their attention in this process. A server has ggml's attention, which rounds
otherwise than kvlocal's own: what is computed there is compared with a chat here that has that one too.
"""

import argparse
import json
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from rpc_process import RpcServer, ggml_attention

from kvlocal.chat.config import SessionConfig
from kvlocal.chat.session import ChatSession
from kvlocal.hub.catalogue import DEFAULT_MODEL, resolve
from kvlocal.llama.model import Model
from kvlocal.llama.placement import ALL, Placement
from kvlocal.llama.sampling import SamplingParams

QUESTIONS = (
    "The keeper of the lighthouse wrote down the weather, the ships and the birds of every single day. What would you ask him?",
    "My name is Ada and I live in a lighthouse with two cats and a dog. What would you ask me?",
    "Write a short story about a storm that took the roof of the lighthouse in the third year.",
    "Which animals live with me, and what did the keeper write down?",
)
HERE, HERE_GGML, CELLS_HERE = "here", "here, ggml's attention", "1 server, cells here"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer")
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--policy", default=SessionConfig().policy)
    args = parser.parse_args()
    config = SessionConfig(
        budget=args.budget, stride=32, policy=args.policy, max_tokens=args.tokens, n_threads=args.threads, sampling=SamplingParams(temperature=0),
        archive="ram" if args.policy == "recall" else "off",
    )  # fmt: skip
    with ExitStack() as stack:
        servers = [stack.enter_context(RpcServer(threads=args.threads)).address for _ in range(2)]
        sides = {HERE: [], HERE_GGML: [], "1 server": servers[:1], "2 servers": servers, CELLS_HERE: servers[:1]}
        sessions: dict[str, ChatSession] = {}
        for side, rpc in sides.items():
            placement = Placement(ALL if rpc else 0, kv_offload=side != CELLS_HERE, rpc=tuple(rpc))
            model = stack.enter_context(Model(resolve(args.model), placement=placement))
            with ggml_attention() if side == HERE_GGML else nullcontext():
                sessions[side] = stack.enter_context(ChatSession(model, config))
        answers: dict[str, list[str]] = {side: [] for side in sides}
        order = list(sides)
        for turn in range(args.turns):
            for side in order:
                answers[side].append("".join(sessions[side].send(QUESTIONS[turn % len(QUESTIONS)])))
                print(f"turn {turn + 1} of {args.turns}, {side}", file=sys.stderr)
            order = order[1:] + order[:1]
        same = {side: answers[HERE if side in (HERE, CELLS_HERE) else HERE_GGML] for side in sides}
        results = {side: figures(session, answers[side], same[side]) for side, session in sessions.items()}
    for found in results.values():
        found["of_here"] = round(found["tokens_per_second"] / results[HERE]["tokens_per_second"], 3)
    print(json.dumps(results, indent=1))
    return 0


def figures(session: ChatSession, answers: list[str], here: list[str]) -> dict[str, float]:
    seconds = session.seconds
    n_answered = sum(len(session.model.tokenize(answer, parse_special=False)) for answer in answers)
    return {
        "tokens_per_second": round(n_answered / (seconds.decode + seconds.sample), 2),
        "prefill_seconds": round(seconds.prefill, 2),
        "score_compact_recall_seconds": round(seconds.score + seconds.plan + seconds.compact + seconds.recall, 2),
        "compressions": session.cache.compressor.compressions,
        "answers_equal": sum(mine == theirs for mine, theirs in zip(answers, here, strict=True)),
        "answers": len(answers),
    }


if __name__ == "__main__":
    sys.exit(main())
